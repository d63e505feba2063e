"""Targets that are known in part: what a model learns to fill in, extend and edit from."""

import re

import numpy as np


MASK_SIZE = 64  # pixels a side of an image's mask, which is laid over a picture of any size
CELLS = (4, 8, 16)  # pixels a side of what is known or not as one, where it is scattered
SMALLEST = 0.2  # side of a drawn box, as a share of the picture's
OPEN_END = 1 / 3  # of gaps in texts reach to the end of the canvas
SCATTERED = 1 / 3  # of gaps are here and there, as token selection leaves them


def with_gaps(messages: list[dict], rng: np.random.Generator, share: float) -> list[dict]:
    """Masks targets of the last message in a `share` of cases: at least one part, each of several in half of them.

    Returns a copy of `messages`; `rng` draws.

    Of an image a box is to be made, or all but a box; of a text some words, or all from some word on; of either, in a
    third of cases, places here and there.
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
            is_scattered = rng.random() < SCATTERED
            if part["type"] == "image":
                part = part | {"mask": scattered_cells(rng) if is_scattered else drawn_box(rng)}
            else:
                spans = scattered_words(part["text"], rng) if is_scattered else drawn_span(part["text"], rng)
                part = part | {"mask": spans}
        content.append(part)
    return [*before, {**last, "content": content}]


def drawn_box(rng: np.random.Generator) -> np.ndarray:
    """A mask (64, 64): True in a box, or outside it."""
    height, width = (rng.uniform(SMALLEST, 1, 2) * MASK_SIZE).astype(int).tolist()
    top, left = int(rng.integers(MASK_SIZE - height + 1)), int(rng.integers(MASK_SIZE - width + 1))
    mask = np.zeros((MASK_SIZE, MASK_SIZE), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return ~mask if rng.random() < 0.5 and not mask.all() else mask


def scattered_cells(rng: np.random.Generator) -> np.ndarray:
    """A mask (64, 64) of squares of one size, any share of which are True."""
    size = int(rng.choice(CELLS))
    count = MASK_SIZE // size
    cells = rng.random((count, count)) < rng.uniform() ** 2  # a patch is to be made where any square on it is
    cells[tuple(rng.integers(count, size=2))] = True
    return cells.repeat(size, 0).repeat(size, 1)


def drawn_span(text: str, rng: np.random.Generator) -> list[tuple[int, int | None]]:
    """Some words of a text, as (start, end) in its characters."""
    words = _words(text)
    first, last = sorted(rng.integers(len(words), size=2).tolist())
    return [(words[first][0], None if rng.random() < OPEN_END else words[last][1])]


def scattered_words(text: str, rng: np.random.Generator) -> list[tuple[int, int | None]]:
    """Any share of a text's words, and perhaps the end of its canvas, as (start, end) in its characters."""
    words = _words(text)
    chosen = rng.random(len(words)) < rng.uniform()
    chosen[int(rng.integers(len(words)))] = True
    spans: list[tuple[int, int | None]] = [words[i] for i in np.flatnonzero(chosen)]
    return [*spans, (len(text), None)] if rng.random() < OPEN_END else spans


def _words(text: str) -> list[tuple[int, int]]:
    return [found.span() for found in re.finditer(r"\S+", text)]
