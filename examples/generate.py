"""Draw digits from text, from a class, and together with their captions.

python examples/generate.py [--model model_cards/mdm-digits] [--output generated.png]
"""

import argparse

from mdm_hf import MDMPipeline
from mdm_hf.evaluation.pictures import picture_grid


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="model_cards/mdm-digits")
parser.add_argument("--output", default="generated.png")
options = parser.parse_args()

pipe = MDMPipeline.from_pretrained(options.model)
prompts = ["a handwritten three", "this is an 8", "the number five written by hand"]
from_text = pipe(text=prompts, generate="image", num_return_sequences=2, seed=0)
from_class = pipe(class_ids=[0, 1, 2, 3, 4, 5], generate="image", guidance_scale=1.5, seed=0)
together = pipe(generate=("image", "text"), num_return_sequences=6, seed=0)

cells = [(r["images"][0], prompt) for r, prompt in zip(from_text, [p for p in prompts for _ in range(2)], strict=True)]
cells += [(r["images"][0], f"class {i}") for i, r in enumerate(from_class)]
cells += [(r["images"][0], r["text"][0]) for r in together]
picture_grid(cells, columns=6).save(options.output)
print(f"Wrote {options.output}.")
