"""Targets that are known in part: what a model learns to fill in, extend and edit from."""

import re

import numpy as np


MASK_SIZE = 64  # pixels a side of an image's mask, which is laid over a picture of any size
SMALLEST = 0.2  # side of a drawn box, as a share of the picture's
OPEN_END = 1 / 3  # of gaps in texts reach to the end of the canvas


def with_gaps(messages: list[dict], rng: np.random.Generator, share: float) -> list[dict]:
    """Masks targets of the last message in a `share` of cases: at least one part, each of several in half of them.

    Of an image a box is to be made, or all but a box; of a text some words, or all from some word on.
    """
    if not share or rng.random() >= share:
        return messages
    *before, last = messages
    parts = last["content"]
    masked = rng.random(len(parts)) < 0.5
    masked[int(rng.integers(len(parts)))] = True
    content = []
    for part, is_masked in zip(parts, masked, strict=True):
        if is_masked and part.get("text") != "":  # the last block of a text may have no word
            mask = drawn_box(rng) if part["type"] == "image" else drawn_span(part["text"], rng)
            part = part | {"mask": mask}
        content.append(part)
    return [*before, {**last, "content": content}]


def drawn_box(rng: np.random.Generator) -> np.ndarray:
    """A mask (64, 64): True in a box, or outside it."""
    height, width = (rng.uniform(SMALLEST, 1, 2) * MASK_SIZE).astype(int).tolist()
    top, left = int(rng.integers(MASK_SIZE - height + 1)), int(rng.integers(MASK_SIZE - width + 1))
    mask = np.zeros((MASK_SIZE, MASK_SIZE), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return ~mask if rng.random() < 0.5 and not mask.all() else mask


def drawn_span(text: str, rng: np.random.Generator) -> list[tuple[int, int | None]]:
    """Some words of a text, as (start, end) in its characters."""
    words = [found.span() for found in re.finditer(r"\S+", text)]
    first, last = sorted(rng.integers(len(words), size=2).tolist())
    return [(words[first][0], None if rng.random() < OPEN_END else words[last][1])]
