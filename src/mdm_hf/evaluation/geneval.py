"""GenEval (Ghosh et al. 2023): pictures of its 553 prompts, in the folders that its own scorer reads.

    00000/metadata.jsonl   the prompt's line of evaluation_metadata.jsonl
    00000/samples/0000.png ... 0003.png
    00000/grid.png         the same four side by side

Its scorer, `evaluation/evaluate_images.py` of github.com/djghosh13/geneval, needs an object detector and a GPU, and
runs on that folder afterwards: no score is made here.
"""

import json
import math
import time
from pathlib import Path

from PIL import Image

from ..pipeline_mdm import MDMPipeline
from .results import batches, file_hash, reading, result, sampling_of, settings_hash, settings_of


SAMPLES = 4  # of each prompt, as GenEval's paper has it


def read_prompts(data: Path | None) -> list[dict]:
    """The lines of evaluation_metadata.jsonl.

    Raises:
        ValueError: no such file, or a line without a prompt.
    """
    if data is None or not data.is_file():
        raise ValueError(f"Got --data {data}, which is no file; geneval needs its prompts/evaluation_metadata.jsonl.")
    with reading(data, "GenEval's own file, a JSON object a line"):
        rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows:
        raise ValueError(f"Got --data {data} without a line; need GenEval's own file.")
    if bad := [i for i, row in enumerate(rows) if not isinstance(row, dict) or not isinstance(row.get("prompt"), str)]:
        raise ValueError(f"Got {data} whose line {bad[0] + 1} has no `prompt`; need GenEval's own file.")
    return rows


def grid(images: list[Image.Image]) -> Image.Image:
    """Pictures of one size in a square, as far as they go."""
    columns = math.isqrt(len(images) - 1) + 1
    width, height = images[0].size
    whole = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for i, image in enumerate(images):
        whole.paste(image, (i % columns * width, i // columns * height))
    return whole


def save(image: Image.Image, path: Path) -> None:
    """All of a picture, or nothing: the scorer reads whatever is called .png."""
    unfinished = path.with_suffix(".part")
    image.save(unfinished, format="PNG")
    unfinished.replace(path)


def run(options) -> dict:
    """The benchmark "geneval" of the command line. Sample i of prompt p is drawn with the seed 4 p + i, after
    `--seed`; a killed run draws what is missing."""
    started = time.perf_counter()
    rows = read_prompts(options.data)[: options.limit]
    pipe = MDMPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    sampling, seed = sampling_of(options, pipe), options.seed[0]
    settings = {"benchmark": "geneval", "seed": seed, "samples": SAMPLES, **settings_of(options, pipe)}
    settings["data"] = file_hash(options.data)
    folder = options.work_dir / "geneval" / settings_hash(settings)

    def place(i: int) -> Path:
        return folder / f"{i // SAMPLES:05d}" / "samples" / f"{i % SAMPLES:04d}.png"

    for p, row in enumerate(rows):
        place(p * SAMPLES).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{p:05d}" / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    count = len(rows) * SAMPLES
    for part in batches(count, options.batch_size, "drawing", lambda part: all(place(i).is_file() for i in part)):
        prompts = [rows[i // SAMPLES]["prompt"] for i in part]
        drawn = pipe(text=prompts, generate="image", seed=seed + part[0], batch_size=len(part), **sampling)
        for i, one in zip(part, drawn, strict=True):
            save(one["images"][0], place(i))
    for p in range(len(rows)):
        if not (path := folder / f"{p:05d}" / "grid.png").is_file():
            save(grid([Image.open(place(p * SAMPLES + i)) for i in range(SAMPLES)]), path)
    more = {
        "folder": str(folder.resolve()),
        "next": "python evaluation/evaluate_images.py FOLDER, in GenEval's repository",
    }
    return result({"pictures": count}, {}, settings | {"limit": options.limit}, started, num_samples=count, **more)
