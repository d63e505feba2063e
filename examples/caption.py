"""Caption an image: a file of yours, or a handwritten digit that the model never saw.

python examples/caption.py [--model model_cards/mdm-digits] [--image digit.png]
"""

import argparse

from PIL import Image

from mdm_hf import MDMPipeline
from mdm_hf.training.digits import load_digits_split


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="model_cards/mdm-digits")
parser.add_argument("--image")
options = parser.parse_args()

image = Image.open(options.image) if options.image else load_digits_split("heldout")[0][3]
pipe = MDMPipeline.from_pretrained(options.model)
for result in pipe(images=image, generate="text", num_return_sequences=3, seed=0):
    print(result["text"][0])
