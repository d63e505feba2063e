"""All that one model does with one mask, each in one call: drawn, described, asked, filled in, widened, ranked,
remembered in a file, written on and on.

python examples/one_mask.py [--model model_cards/mdm-digits] [--output one_mask.png]
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import TextStreamer

from mdm_hf import MDMPipeline
from mdm_hf.evaluation.pictures import picture_grid


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="model_cards/mdm-digits")
parser.add_argument("--output", default="one_mask.png")
options = parser.parse_args()

pipe = MDMPipeline.from_pretrained(options.model)
pipe.set_progress_bar_config(disable=True)
chat = pipe.chat()


def picture(**given) -> Image.Image:
    return pipe(**given, seed=0)[0]["images"][0]


def words(**given) -> str:
    return pipe(**given, seed=0)[0]["text"][0]


three = picture(text="a handwritten three", generate="image")
known = {"type": "image", "image": three}
upper = np.arange(8)[:, None].repeat(8, 1) < 4  # the rows to be made anew
wide = Image.new("L", (16, 8))
wide.paste(three, (0, 0))
beside = np.arange(16)[None].repeat(8, 0) >= 8


def keep_left_half(model, step, timesteps, state) -> dict | None:
    """A callback: after the sixth network call the left half of the picture is frozen, and the rest follows it."""
    if step != 5:
        return None
    frozen = state["decode"]().sequences * 0
    patches = inputs["target_mask"][0].nonzero().flatten().view(4, 4)
    frozen[0, patches[:, :2].flatten()] = 1
    return {"frozen": frozen}


def say_seven(model, step, timesteps, state) -> dict | None:
    """A callback: after the fifth network call the caption is fixed, and the picture, half formed, follows it."""
    if step != 4:
        return None
    ids = state["decode"]().sequences
    start = int((ids[0] == pipe.processor.tokenizer.convert_tokens_to_ids("<|text_start|>")).nonzero()[-1]) + 1
    frozen = ids * 0
    frozen[0, start : start + len(seven)], ids[0, start : start + len(seven)] = 1, seven
    return {"frozen": frozen, "input_ids": ids}


seven = pipe.processor.tokenizer("a handwritten seven", add_special_tokens=False, return_tensors="pt")["input_ids"][0]
inputs = pipe.processor(class_ids=8, generate="image")
pictures = {
    "from a description": three,
    "from a class": picture(class_ids=7, generate="image"),
    "let the model decide": picture(text="a small grey seven", generate="auto"),
    "inpainting": picture(text="a handwritten three", canvas=known | {"mask": upper}),
    "outpainting": picture(
        text="a handwritten three", canvas={"type": "image", "image": wide, "mask": beside}, image_size=(8, 16)
    ),
    "image to image": picture(text="a handwritten five", canvas=known, strength=0.8),
    "another size": picture(class_ids=1, generate="image", image_size=(8, 24)),
    "another solver": picture(class_ids=5, generate="image", scheduler="UniPCMultistepScheduler"),
    "as few steps as will do": picture(class_ids=5, generate="image", num_inference_steps="auto"),
    "token selection": picture(class_ids=5, generate="image", selection_tolerance=0.5),
    "frozen half way": picture(class_ids=8, generate="image", callback_on_step_end=keep_left_half),
    "its caption said half way": pipe(modality_lag=0.0, seed=3, callback_on_step_end=say_seven)[0]["images"][0],
}
selected = pipe.model.generate(**inputs, selection_tolerance=0.5, generator=torch.Generator().manual_seed(0))
skipped = 1 - selected.num_live.float().mean() / selected.num_live[0, 0]
both = pipe(generate=("image", "text"), seed=0)[0]
pictures[f"both at once: {both['text'][0]}"] = both["images"][0]
[scores] = pipe.score_choices(images=three, choices=["a handwritten three", "a handwritten five", "a small grey nine"])
texts = {
    "caption": words(images=three, generate="text"),
    "answer": words(images=three, text="is this a seven?", generate="text"),
    "text infilling, a [...] three": words(
        images=three, canvas={"type": "text", "text": "a handwritten three", "mask": [(2, 13)]}
    ),
    "conversation": chat(text="which digit is this?", images=three, seed=0)["text"][0],
    "skipped by token selection": f"{skipped:.0%} of the positions, in {sum(selected.call_seconds):.2f} s",
    "likeliest of three captions": f"{scores.choices[scores.best]}, by %.1f ± %.1f nats" % scores.margin(0, 1),
}
with tempfile.TemporaryDirectory() as folder:
    chat.save(Path(folder) / "chat.safetensors")
    again = pipe.chat(Path(folder) / "chat.safetensors")
    texts["and on, from a file"] = again(text="is this a seven?", seed=0)["text"][0]
for name, text in texts.items():
    print(f"{name:32s} {text}")
print("a text of any length, streamed   ", end="")
streamer = TextStreamer(pipe.processor.tokenizer, skip_prompt=True)
long = {"min_new_tokens": 24, "max_new_tokens": 64, "block_size": 8, "stop_strings": ["eight"]}
pipe.chat().write(text="a handwritten three", **long, streamer=streamer, seed=0)
picture_grid([(image, name) for name, image in pictures.items()], columns=6, caption_lines=2).save(options.output)
print(f"Wrote {options.output}.")
