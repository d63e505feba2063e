"""Change a part of a picture and of a text, and leave the rest as it is.

python examples/edit.py [--model model_cards/mdm-digits] [--output edit.png]
"""

import argparse

import numpy as np

from mdm_hf import MDMPipeline
from mdm_hf.evaluation.pictures import picture_grid


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="model_cards/mdm-digits")
parser.add_argument("--output", default="edit.png")
options = parser.parse_args()

pipe = MDMPipeline.from_pretrained(options.model)
three = pipe(text="a handwritten three", generate="image", seed=0)[0]["images"][0]
upper = np.zeros((8, 8), dtype=bool)
upper[:4] = True  # what is to be made anew: patches that the mask touches

part = {"type": "image", "image": three}
painted = pipe(text="a handwritten three", canvas=part | {"mask": upper}, num_return_sequences=3, seed=0)
strengths = (0.4, 0.6, 0.8)
moved = [pipe(text="a handwritten five", canvas=part, strength=s, seed=0)[0] for s in strengths]
words = {"type": "text", "text": "a handwritten three", "mask": [(2, 13)]}  # from character 2 to 13
[infilled] = pipe(images=three, canvas=words, seed=0)

cells = [(three, "given")] + [(one["images"][0], "upper half anew") for one in painted]
cells += [(three, "given")]
cells += [(one["images"][0], f"a five, strength {s}") for one, s in zip(moved, strengths, strict=True)]
picture_grid(cells, columns=4).save(options.output)
print(f"a [handwritten] three -> {infilled['text'][0]}\nWrote {options.output}.")
