"""Draws larger pictures than the processor's: rows and columns of one kind of digit. 2 x 3, 3 x 2 and 4 x 4 were not
trained on.

python examples/sizes.py [--model model_cards/mdm-digits] [--output sizes.png]
"""

import argparse

import numpy as np
from PIL import Image

from mdm_hf import MDMPipeline
from mdm_hf.evaluation.pictures import picture_grid


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="model_cards/mdm-digits")
parser.add_argument("--output", default="sizes.png")
options = parser.parse_args()


def apart(image: Image.Image) -> Image.Image:
    """The digits of a picture, which touch each other, with a line between them to show them better."""
    pixels = np.asarray(image)
    pixels = np.insert(pixels, range(8, pixels.shape[0], 8), 90, axis=0)
    return Image.fromarray(np.insert(pixels, range(8, pixels.shape[1], 8), 90, axis=1))


pipe = MDMPipeline.from_pretrained(options.model)
cells = []
for digit, (rows, columns) in enumerate([(1, 1), (1, 2), (3, 1), (2, 2), (3, 3), (2, 3), (3, 2), (4, 4)]):
    size = (8 * rows, 8 * columns)  # height and width in pixels, multiples of the patch size
    [made] = pipe(class_ids=digit, generate="image", image_size=size, seed=0)
    cells.append((apart(made["images"][0]), f"class {digit}, {size[0]} x {size[1]}"))
picture_grid(cells, columns=4, cell_size=175, caption_lines=1).save(options.output)
print(f"Wrote {options.output}.")
