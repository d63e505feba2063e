"""How long a checkpoint takes for a sample, and how much memory: the table on its card.

What to expect: a step of one sample is made of small operations, whose count is what it costs; a batch shares them,
and its time is that of the arithmetic. Memory is that of weights, Python and torch, and of a few rows of activations.

Each row has a process of its own, loads the checkpoint, draws once to warm up, and is timed on the fastest of three
calls. Memory is the process's peak on a CPU (Linux), what torch had allocated on a GPU.

    python benchmarks/checkpoint_speed.py --small
    python benchmarks/checkpoint_speed.py --model model_cards/mdm-digits --output model_cards/mdm-digits/speed.json
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from _measure import in_own_process, machine, resident, start_peak_anew, synchronize
from PIL import Image

from mdm_hf import MDMPipeline


MODEL = Path(__file__).parents[1] / "model_cards" / "mdm-digits"
TASKS = {"text to image": "image", "image to text": "text", "image and text": ("image", "text")}
CALLS = 3


def measured(model: str, task: str, text: str, batch: int, steps: int) -> dict:
    """Seconds a sample and MiB at the peak, of a process that does nothing else."""
    pipe = MDMPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.processor.image_processor.size
    given = {
        "text to image": {"text": [text] * batch},
        "image to text": {"images": [Image.new("RGB", (size["width"], size["height"]), "gray")] * batch},
        "image and text": {"text": [None] * batch},
    }[task]
    draw = partial(pipe, **given, generate=TASKS[task], num_inference_steps=steps, seed=0, batch_size=batch)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        start_peak_anew()
    seconds = []
    for _ in range(1 + CALLS):
        started = time.perf_counter()
        draw()
        synchronize()
        seconds.append(time.perf_counter() - started)
    on_gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    peak = resident("VmHWM") / 1024 if on_gpu is None else on_gpu
    return {"task": task, "batch": batch, "seconds": min(seconds[1:]) / batch, "peak_mib": round(peak, 1)}


def plot(found: dict, path: Path) -> None:
    """Seconds a sample of each task, a bar a batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3), constrained_layout=True)
    labels = [f"{row['task']}, {row['batch']} at once" for row in found["rows"]]
    axes.barh(labels[::-1], [row["seconds"] for row in found["rows"]][::-1])
    axes.set_xlabel("seconds a sample")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one task and two steps, to show that it runs")
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--text", default="a handwritten three", help="of the pictures")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    steps, tasks, sizes = options.steps, tuple(TASKS), options.batch_sizes
    if options.small:
        steps, tasks, sizes = 2, ("text to image",), [1, 2]
    rows = []
    for task in tasks:
        for batch in sizes:
            rows.append(in_own_process(measured, options.model, task, options.text, batch, steps))
            print(json.dumps(rows[-1]), flush=True)
    found = {"machine": machine(), "num_inference_steps": steps, "rows": rows}
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(found, options.plot)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
