"""The demo: one picture of what the model does, in under a minute on a laptop."""

from pathlib import Path

from transformers import AutoModel, AutoProcessor

import mdm_hf

from ..training.digits import digit_named_in, load_digits_split
from .pictures import picture_grid


PROMPTS = (
    "a handwritten zero",
    "the digit one",
    "this is a 2",
    "a handwritten three",
    "the digit four",
    "this is a 5",
    "a handwritten six",
    "the digit seven",
    "this is an 8",
    "a handwritten nine",
)


def run_demo(model: str, output: Path, seed: int = 0) -> Path:
    """Draws digits with their captions, draws digits from text, reads and discusses held-out digits.

    Args:
        model: Folder or Hub repository of a model trained on the digits.
        output: Picture to write.
        seed: Of all samples.
    """
    loaded = AutoModel.from_pretrained(model).eval()
    pipe = mdm_hf.MDMPipeline(loaded, AutoProcessor.from_pretrained(model))
    photos, labels = (part[:10] for part in load_digits_split("heldout"))
    question = "which digit is this?"
    parts: tuple[tuple[str, dict], ...] = (
        ("Images and captions, generated together", {"text": [None] * 10, "generate": ("image", "text")}),
        ("Images from text", {"text": list(PROMPTS), "generate": "image"}),
        ("Captions of digits it never saw (and what they are)", {"images": photos, "generate": "text"}),
        (f'Answers to "{question}" (and what it is)', {"images": photos, "text": [question] * 10, "generate": "text"}),
    )
    cells: list[tuple] = []
    headings = {}
    for row, (heading, conditions) in enumerate(parts):
        print(heading)
        headings[row] = heading
        results = pipe(**conditions, seed=seed)
        shown = [r["images"][0] if r["images"] else photo for r, photo in zip(results, photos, strict=True)]
        captions = [r["text"][0] if r["text"] else prompt for r, prompt in zip(results, PROMPTS, strict=True)]
        if "images" in conditions:
            captions = [with_truth(said, digit) for said, digit in zip(captions, labels, strict=True)]
        cells += zip(shown, captions, strict=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(cells, columns=10, caption_lines=4, headings=headings).save(output)
    return output


def with_truth(said: str, digit: int) -> str:
    """What was said of a picture, and what the picture is."""
    return f"{said} ({digit})" if digit_named_in(said) == digit else f"{said} (WRONG: {digit})"
