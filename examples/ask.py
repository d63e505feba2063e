"""Ask about an image, as a chat.

python examples/ask.py [--model model_cards/mdm-digits] [--image digit.png] [--question "is this a seven?"]
"""

import argparse

from PIL import Image

from mdm_hf import MDMPipeline
from mdm_hf.training.digits import load_digits_split


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="model_cards/mdm-digits")
parser.add_argument("--image")
parser.add_argument("--question", default="which digit is this?")
options = parser.parse_args()

image = Image.open(options.image) if options.image else load_digits_split("heldout")[0][3]
messages = [
    {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": options.question}]}
]
pipe = MDMPipeline.from_pretrained(options.model)
print(pipe(messages=messages, generate="text", seed=0)[0]["text"][0])
