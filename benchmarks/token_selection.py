"""What does token selection save, and what does it cost?

The physics: a position that is frozen is projected once more and then no longer; the scans and the convolution go on
over all positions, and a call has costs of its own. So time falls by less than the number of live positions, and the
least is what the scans take. Where everything has converged no call is made at all.

Each tolerance draws samples of the same seeds as the full run beside it. Token-steps are live positions, summed over
calls; seconds are those of whole `generate` calls of 50 rows, in turns with the full run; accuracy is the digits'
judge's, and the distance of pictures to held-out ones, of Gaussians over pixels, tells whether variety was lost.

    python benchmarks/token_selection.py --small
    python benchmarks/token_selection.py --output docs/token_selection.json --plot docs/images/token_selection.png \
        --maps docs/images/selection_maps.png
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import machine
from PIL import Image

from mdm_hf import MDMPipeline
from mdm_hf.evaluation.digits import DigitJudge, as_pixels, frechet_distance
from mdm_hf.evaluation.pictures import picture_grid
from mdm_hf.training.digits import digit_named_in, is_well_formed, load_digits_split


MODEL = Path(__file__).parents[1] / "model_cards" / "mdm-digits"
TOLERANCES = (0.1, 0.3, 0.5)
TASKS = {"class to image": "image", "image to text": "text", "image and text": ("image", "text")}
ROWS = 50
PIXELS = 64  # a distance takes more pictures than a picture has pixels


class Task:
    """A task's prompts in batches of `ROWS`, its generate call, and how many of its samples are right."""

    def __init__(self, pipe: MDMPipeline, name: str, count: int):
        self.pipe, self.name, self.judge = pipe, name, DigitJudge()
        images, labels = load_digits_split("heldout")
        which = np.arange(count)
        self.digits = which % 10 if name == "class to image" else np.asarray(labels)[which % len(images)]
        self.batches = []
        for rows in np.array_split(which, max(1, count // ROWS)):
            given = {"text": [None] * len(rows)}
            if name == "class to image":
                given = {"class_ids": self.digits[rows].tolist()}
            elif name == "image to text":
                given = {"images": [images[i % len(images)] for i in rows]}
            self.batches.append((rows, pipe.processor(**given, generate=TASKS[name], return_tensors="pt")))

    def draw(self, **options) -> dict:
        """Share right, calls, live positions in the first of them and in all, seconds, and outputs, of all batches."""
        right: list[bool] = []
        outputs: list[tuple] = []
        pictures: list[Image.Image] = []
        calls: list[int] = []
        found: dict[str, Any] = {"first": 0, "token_steps": 0, "seconds": 0.0, "distance": None}
        for rows, inputs in self.batches:
            noise = [torch.Generator().manual_seed(int(row)) for row in rows]
            started = time.perf_counter()
            count = partial(_count, calls)
            out = self.pipe.model.generate(**inputs, generator=noise, callback_on_step_end=count, **options)
            found["seconds"] += time.perf_counter() - started
            if out.num_live is not None:
                found["first"] += int(out.num_live[0].sum())
                found["token_steps"] += int(out.num_live.sum())
            outputs.append((inputs, out))
            made = self.pipe.postprocess(out)
            pictures += [image for one in made for image in one["images"]]
            right += self.right(rows, made)
        if len(pictures) > PIXELS:
            held_out = as_pixels(load_digits_split("heldout")[0])
            found["distance"] = round(frechet_distance(as_pixels(pictures), held_out), 3)
        return found | {"right": float(np.mean(right)), "calls": len(calls) // len(outputs), "outputs": outputs}

    def right(self, rows: np.ndarray, made: list[dict]) -> list[bool]:
        drawn = self.judge([one["images"][0] for one in made]) if made[0]["images"] else self.digits[rows]
        if not made[0]["text"]:
            return (drawn == self.digits[rows]).tolist()
        said = [one["text"][0] for one in made]
        return [digit_named_in(text) == d and is_well_formed(text) for text, d in zip(said, drawn, strict=True)]


def _count(calls: list, model, step: int, timesteps: list, tensors: dict) -> None:
    calls.append(step)


def measured(task: Task, tolerances: tuple[float, ...]) -> list[dict]:
    """A row for each tolerance, each run in turns with the full run."""
    rows = []
    for tolerance in tolerances:
        full, some, again = task.draw(), task.draw(selection_tolerance=tolerance), task.draw()
        rows.append(
            {
                "task": task.name,
                "tolerance": tolerance,
                "right": round(some["right"], 4),
                "right_without": round(full["right"], 4),
                "frechet_distance": some["distance"],
                "frechet_distance_without": full["distance"],
                "fewer_token_steps": round(some["first"] * full["calls"] / some["token_steps"], 3),
                "faster": round((full["seconds"] + again["seconds"]) / 2 / some["seconds"], 3),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def maps(task: Task, tolerance: float, count: int = 8) -> list[tuple[Image.Image | None, str]]:
    """The first samples, and, below each, after which call its patches were frozen: black at once, white never."""
    inputs, out = task.draw(selection_tolerance=tolerance)["outputs"][0]
    made, calls = task.pipe.postprocess(out), len(out.num_live)
    pictures, frozen = [], []
    for row, one in enumerate(made[:count]):
        at = inputs["input_ids"][row] == task.pipe.model.config.image_target_token_id
        after = out.frozen_at[row][at]
        after = torch.where(after < 0, calls, after).float() / calls
        side = round(len(after) ** 0.5)
        pictures.append((one["images"][0], ""))
        map_of = Image.fromarray((after.view(side, side) * 255).byte().numpy())
        frozen.append((map_of, f"{float((after < 1).float().mean()):.0%} frozen"))
    return pictures + frozen


def plot(rows: list[dict], path: Path) -> None:
    """Points of accuracy lost over the token-steps saved, a line a task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for name in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == name]
        lost = [100 * (row["right_without"] - row["right"]) for row in own]
        axes[0].plot([row["fewer_token_steps"] for row in own], lost, marker="o", label=name)
        axes[1].plot([row["fewer_token_steps"] for row in own], [row["faster"] for row in own], marker="o", label=name)
    axes[0].axhline(1, color="grey", linewidth=0.8)
    axes[0].set(xlabel="times fewer token-steps", ylabel="points of accuracy lost")
    axes[1].set(xlabel="times fewer token-steps", ylabel="times faster")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one tolerance and ten samples, to show that it runs")
    parser.add_argument("--model", default=MODEL, help="a model of the digits")
    parser.add_argument("--num-samples", type=int, default=200, help="a task")
    parser.add_argument("--tolerances", type=float, nargs="+", default=TOLERANCES)
    parser.add_argument("--map-tolerance", type=float, default=0.5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--maps", type=Path, help="picture of where and when patches were frozen")
    options = parser.parse_args()
    if options.small:
        options.num_samples, options.tolerances = 10, (0.1,)
    pipe = MDMPipeline.from_pretrained(options.model)
    tasks = [Task(pipe, name, options.num_samples) for name in TASKS]
    rows = [row for task in tasks for row in measured(task, tuple(options.tolerances))]
    found = {"benchmark": "token_selection", **machine(), "num_samples": options.num_samples, "results": rows}
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(rows, options.plot)
    if options.maps:
        picture_grid(maps(tasks[0], options.map_tolerance), columns=8, caption_lines=1).save(options.maps)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
