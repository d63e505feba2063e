"""Teach mdm-digits something new with a LoRA adapter: inverted digits, dark on light, and a word for them.

python examples/finetune_lora.py [--output-dir runs/lora] [--max-steps 600]

Each step is of two batches, one of what is new and one of what the model knows, so that it stays known; half of that
is image and caption from nothing, which is forgotten first. Prints every score before and after; the adapter alone is
saved. Some twenty minutes on one core.
"""

import argparse

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import ImageOps
from torch.utils.data import Dataset
from transformers import TrainingArguments, set_seed

from mdm_hf import MDMPipeline
from mdm_hf.allocator import keep_freed_memory
from mdm_hf.evaluation.digits import DigitJudge, evaluate_digits
from mdm_hf.training.digits import DIGIT_WORDS, DigitsSource, load_digits_split
from mdm_hf.training.mix import ConversationMix
from mdm_hf.training.recipe import load_recipe
from mdm_hf.training.trainer import ConversationCollator, MDMTrainer


REPLAY = load_recipe("recipes/digits.yaml")["data"]["digits"]["tasks"] | {"image_and_text": 6.0}


class Lessons(Dataset):
    """Batches of what is new, prompts and the inverted digits they ask for, in turn with batches of what is known."""

    def __init__(self, count: int, batch_size: int):
        self.images, self.labels = load_digits_split("train")
        self.known = ConversationMix({"digits": DigitsSource("train", REPLAY)}, count, batch_size, seed=1)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.known)

    def __getitem__(self, index: int) -> dict:
        if index // self.batch_size % 2:
            return self.known[index]
        rng = np.random.default_rng(index)
        which = rng.integers(len(self.images))
        text = {"type": "text", "text": prompt_for(self.labels[which], as_word=rng.random() < 0.5)}
        image = {"type": "image", "image": ImageOps.invert(self.images[which])}
        return {"messages": [{"role": "user", "content": [text]}, {"role": "assistant", "content": [image]}]}


def prompt_for(digit: int, as_word: bool) -> str:
    return f"a dark {DIGIT_WORDS[digit] if as_word else digit}"


def share_inverted_and_right(pipe: MDMPipeline, count: int) -> float:
    """Of `count` prompted samples, how many are light grounds with the digit that was asked for."""
    digits = np.arange(count) % 10
    prompts = [prompt_for(d, as_word=i // 10 % 2 == 0) for i, d in enumerate(digits)]
    images = [result["images"][0] for result in pipe(text=prompts, generate="image", seed=123, batch_size=100)]
    inverted = np.array([np.mean(image) > 127 for image in images])
    return float(np.mean(inverted & (DigitJudge()([ImageOps.invert(image) for image in images]) == digits)))


def skills(pipe: MDMPipeline, count: int) -> dict[str, float]:
    known = evaluate_digits(pipe, num_samples=count, seed=3)["scores"]
    told_elsewhere = ("judge_accuracy", "pixel_frechet_distance_of_training_images", "pixel_frechet_ratio")
    known = {name: score for name, score in known.items() if name not in told_elsewhere}
    return {"inverted digits": share_inverted_and_right(pipe, count), **known}


parser = argparse.ArgumentParser()
parser.add_argument("--output-dir", default="runs/lora")
parser.add_argument("--max-steps", type=int, default=600)
parser.add_argument("--num-samples", type=int, default=200, help="a skill, for the scores; 65 or more")
options = parser.parse_args()
if options.num_samples < 65:
    parser.error(f"Got --num-samples {options.num_samples}; need 65 or more, for a Frechet distance over 64 pixels.")

keep_freed_memory()
set_seed(0)
pipe = MDMPipeline.from_pretrained("model_cards/mdm-digits", device="cpu", batch_size=100)
pipe.set_progress_bar_config(disable=True)
before = skills(pipe, options.num_samples)

batch_size = 64
adapted = get_peft_model(pipe.model, LoraConfig(r=7, lora_alpha=14, task_type="FEATURE_EXTRACTION"))
adapted.print_trainable_parameters()
trainer = MDMTrainer(
    model=adapted,
    args=TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        learning_rate=8e-3,
        train_sampling_strategy="sequential",
        lr_scheduler_type="cosine",
        warmup_steps=50,
        max_grad_norm=1.0,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    ),
    train_dataset=Lessons(2 * options.max_steps * batch_size, batch_size),
    data_collator=ConversationCollator(pipe.processor),
)
trainer.train()
adapted.eval().save_pretrained(options.output_dir)

fresh = MDMPipeline.from_pretrained("model_cards/mdm-digits", device="cpu", batch_size=100)
fresh.set_progress_bar_config(disable=True)
fresh.load_adapter(options.output_dir)
after = skills(fresh, options.num_samples)
merged = adapted.merge_and_unload()
with torch.no_grad():
    probe = fresh.processor(text="a dark three")
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    one, two = (
        m.generate(**probe, generator=g).latents for m, g in zip((fresh.model, merged), generators, strict=True)
    )
for name in before:
    print(f"{name:32s} {before[name]:.3f} -> {after[name]:.3f}")
shares = [name for name in before if name != "pixel_frechet_distance"]
worst = max(shares, key=lambda name: before[name] - after[name])
print(f"The largest drop: {worst}, by {100 * (before[worst] - after[worst]):.1f} points.")
print(f"The adapter merged into the weights changes the latents by {float((one - two).abs().max()):.1e}.")
print(f"Wrote {options.output_dir}; use it with MDMPipeline.load_adapter({options.output_dir!r}).")
