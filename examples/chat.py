"""A conversation of pictures and text whose past is a state of fixed size, saved and taken up again.

python examples/chat.py [--model model_cards/mdm-digits] [--state chat.safetensors]
"""

import argparse

from mdm_hf import MDMPipeline


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="model_cards/mdm-digits")
parser.add_argument("--state", default="chat.safetensors")
options = parser.parse_args()

pipe = MDMPipeline.from_pretrained(options.model)
pipe.set_progress_bar_config(disable=True)
chat = pipe.chat()
chat(text="a handwritten three", generate="image", seed=0)
for question in ("which digit is this?", "is this a seven?"):
    print(f"{question} {chat(text=question, seed=0)['text'][0]} ({chat.state.nbytes() / 1024:.0f} KiB remembered)")
chat.save(options.state)
print(pipe.chat(options.state)(text="is this a three?", seed=0)["text"][0])
