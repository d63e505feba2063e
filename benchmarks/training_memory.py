"""Is the memory that `mdm train --dry-run` foretells the memory that training takes?

The physics: weights, gradients, two states of AdamW and the average are counted; activations are measured on one and
two blocks and are linear in blocks and rows. What is left out: the allocator's waste, and what libraries load when
they are first used.

Measured is a run of two steps of MDMTrainer with its moving average in a fresh process: the most that the process
holds (on a GPU, that torch has allocated) beyond what it held before the model was built. The last column compares
whole processes, Python, torch and transformers included, which is what has to fit into a machine.

    python benchmarks/training_memory.py --small
    python benchmarks/training_memory.py --output docs/training_memory.json --plot docs/images/training_memory.png
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import torch
from _measure import machine, peak_memory, resident
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from mdm_hf import MDMConfig, MDMForMultiModalGeneration
from mdm_hf.allocator import keep_freed_memory
from mdm_hf.training.memory import estimate_training, largest_batch
from mdm_hf.training.trainer import EMACallback, MDMTrainer


# Name -> preset, rows, patches of the image, tokens of the text, LoRA, gradient checkpointing.
RUNS = {
    "mdm-digits, 64 rows": ("mdm-digits", 64, (4, 4), 8, False, False),
    "mdm-digits, 256 rows": ("mdm-digits", 256, (4, 4), 8, False, False),
    "mdm-base, 1 row": ("mdm-base", 1, (16, 16), 32, False, False),
    "mdm-base, 4 rows, checkpointing": ("mdm-base", 4, (16, 16), 32, False, True),
    "mdm-1b, LoRA, 1 row": ("mdm-1b", 1, (16, 16), 32, True, False),
}
SMALL = {"mdm-digits, 16 rows": ("mdm-digits", 16, (4, 4), 8, False, False)}


def prepare(has_lora: bool, checkpointing: bool, model):
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return get_peft_model(model, LoraConfig(r=8)) if has_lora else model


def work(preset: str, rows: int, grid: tuple[int, int], tokens: int, has_lora: bool, checkpointing: bool):
    """A function that builds the model and trains it for two steps."""
    keep_freed_memory()
    config = MDMConfig.from_preset(preset)

    def run():
        torch.manual_seed(0)
        model = prepare(has_lora, checkpointing, MDMForMultiModalGeneration(config))
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=2,
                per_device_train_batch_size=rows,
                weight_decay=0.0,
                save_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            )
            batch = partial(largest_batch, config, image_grid=grid, text_tokens=tokens)
            MDMTrainer(
                model,
                arguments,
                train_dataset=[0] * (2 * rows),
                data_collator=lambda examples: batch(len(examples)),
                callbacks=[EMACallback()],
            ).train()

    return run


def estimate(preset: str, rows: int, grid: tuple[int, int], tokens: int, has_lora: bool, checkpointing: bool):
    config = MDMConfig.from_preset(preset)
    return estimate_training(
        config,
        partial(largest_batch, config, image_grid=grid, text_tokens=tokens),
        rows,
        device="cuda" if torch.cuda.is_available() else "cpu",
        prepare=partial(prepare, has_lora, checkpointing),
    )


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 0.6 * len(rows) + 1.2), constrained_layout=True)
    for i, row in enumerate(rows):
        axis.barh(i - 0.2, row["estimated_gib"], 0.38, color="C0", label="estimated" if not i else None)
        axis.barh(i + 0.2, row["measured_gib"], 0.38, color="C1", label="measured" if not i else None)
    axis.set_yticks(range(len(rows)), [row["run"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("GiB beside Python's own")
    axis.legend()
    axis.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one run of seconds that shows that everything works")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    runs = SMALL if options.small else {name: RUNS[name] for name in options.runs}
    own = resident("VmRSS") / 2**20 if not torch.cuda.is_available() else 0.0  # before any probe
    result: dict = {"machine": machine(), "python_gib": round(own, 3), "rows": []}
    for name, shape in runs.items():
        found = estimate(*shape)
        guess, measured = (found.peak - found.own) / 2**30, peak_memory(work, *shape) / 2**10
        row = {
            "run": name,
            "parameters": found.parameters,
            "trainable": found.trainable,
            "tokens": found.tokens_per_step,
            "estimated_gib": round(guess, 3),
            "measured_gib": round(measured, 3),
            "off_by": round(guess / measured - 1, 3),
            "whole_process_off_by": round((guess + own) / (measured + own) - 1, 3),
        }
        result["rows"].append(row)
        print(
            f"{name:34s} estimated {guess:6.2f}, measured {measured:6.2f} GiB: {row['off_by']:+.0%}, "
            f"whole process {row['whole_process_off_by']:+.0%}",
            flush=True,
        )
    if options.plot:
        plot(result["rows"], options.plot)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
