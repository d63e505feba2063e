"""Draws several pictures of a prompt and puts those first in which the model itself best reads the prompt.

python examples/rerank.py [--text "a handwritten four"] [--num-samples 8] [--output ranked.png]
"""

import argparse

from mdm_hf import MDMPipeline
from mdm_hf.evaluation.pictures import picture_grid


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="model_cards/mdm-digits")
parser.add_argument("--text", default="a handwritten four")
parser.add_argument("--num-samples", type=int, default=8)
parser.add_argument("--output", default="ranked.png")
options = parser.parse_args()

pipe = MDMPipeline.from_pretrained(options.model)
drawn = pipe(text=options.text, generate="image", guidance_scale=1.0, num_return_sequences=options.num_samples, seed=0)
images = [one["images"][0] for one in drawn]
# a lower bound of log p(prompt | picture)
scores = pipe.score_choices(images=images, choices=[[options.text]] * len(images), seed=0)
ranked = sorted(zip(images, scores, strict=True), key=lambda pair: -float(pair[1].log_likelihood[0]))
cells = [(image, f"{score.log_likelihood[0]:.1f} ± {score.standard_error[0]:.1f} nats") for image, score in ranked]
picture_grid(cells, columns=4).save(options.output)
print(f"Wrote {options.output}, the best of {len(images)} first.")
