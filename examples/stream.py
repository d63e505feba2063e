"""Watch samples form: a strip of pictures, one row a sample, one column a look.

python examples/stream.py [--model model_cards/mdm-digits] [--text "a handwritten three"] [--output steps.png]
"""

import argparse

from mdm_hf import MDMPipeline
from mdm_hf.evaluation.pictures import picture_grid


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="model_cards/mdm-digits")
parser.add_argument("--text", help="a description; none draws digits of the model's own choice")
parser.add_argument("--output", default="steps.png")
options = parser.parse_args()

pipe = MDMPipeline.from_pretrained(options.model)
looks = list(pipe.stream(text=options.text, num_return_sequences=3, num_inference_steps=12, modality_lag=0.0, seed=0))
cells = [(r["images"][0], f"{n + 1}: {r['text'][0]}") for row in zip(*looks, strict=True) for n, r in enumerate(row)]
picture_grid(cells, columns=len(looks)).save(options.output)
print(f"Wrote {options.output}: {len(looks)} looks at {len(looks[0])} samples, from a blur to the result.")
