"""Reads pictures and texts of the shapes world back into what they show and say, and tells whether they agree.

- A picture is read by its chroma, max(r, g, b) - min(r, g, b): 0 on every grey ground whatever its texture, and at the
  edge of a shape in proportion to what the shape covers. What is there is the best match among templates.
- What cannot be read is None, and agrees with nothing: a blurred or half-drawn shape is not given the benefit of the
  doubt, an empty quarter is not filled in.
- Texts are read word by word for what they mean; any order of shapes and any frame will do.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image

from .shapes_world import COLOURS, KINDS, NUMBERS, PLACES, RADII, RELATIONS, SIZE, Shape, covers, plural, relations


CHROMA, NOISE = 0.75, 0.15  # of the colours; up to here there is none
EMPTY, PRESENT = 3.0, 8.0  # chroma summed over a quarter: below the first nothing, from the second a shape
BLURS = (0.0, 0.7, 1.2)  # of the templates, standard deviations in pixels
MATCH = 0.85  # cosine between a quarter's chroma and its best template, at the least


@dataclass(frozen=True)
class Mention:
    """A shape, or `number` of them, as a text names it; None is not said."""

    kind: str
    colour: str | None = None
    size: str | None = None
    place: int | None = None
    number: int = 1

    def fits(self, shape: Shape) -> bool:
        """Whether all that is said is true of `shape`."""
        said = ((self.kind, shape.kind), (self.colour, shape.colour), (self.size, shape.size))
        return all(word in (None, is_so) for word, is_so in (*said, (self.place, shape.place)))


@dataclass(frozen=True)
class Meaning:
    """Every shape that a text names, and how the first of two lies to the second."""

    mentions: tuple[Mention, ...]
    relation: str | None = None


def read_pictures(images: Iterable[Image.Image]) -> list[tuple[Shape, ...] | None]:
    """The shapes of each of `images`, in reading order; None where one of its quarters cannot be read."""
    pixels = np.stack([np.asarray(image.convert("RGB").resize((SIZE, SIZE)), dtype=np.float64) for image in images])
    half = SIZE // 2
    quarters = pixels.reshape(-1, 2, half, 2, half, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, half * half, 3)
    chroma = ((quarters.max(-1) - quarters.min(-1)) / 255 - NOISE).clip(min=0)
    templates, names = _templates()
    norm = np.linalg.norm(chroma, axis=-1)
    match = chroma @ templates.T / np.maximum(norm, 1e-9)[:, None]
    best, mass = match.argmax(-1), chroma.sum(-1)
    colours = _colours(quarters, chroma)
    read: list[tuple[Shape, ...] | None] = []
    for first in range(0, len(quarters), 4):
        shapes: list[Shape] | None = []
        for place, i in enumerate(range(first, first + 4)):
            if mass[i] < EMPTY:
                continue
            if mass[i] < PRESENT or match[i, best[i]] < MATCH:
                shapes = None
                break
            kind, size = names[best[i]]
            shapes.append(Shape(kind, colours[i], size, place))
        read.append(None if shapes is None else tuple(shapes))
    return read


@lru_cache
def _templates() -> tuple[np.ndarray, list[tuple[str, str]]]:
    """What shapes of every kind cover of a quarter, at sizes around the two, shifts of half a pixel and several blurs:
    (n, 256) of norm 1, and the kind and size of each."""
    samples, half = 4, SIZE // 2
    apart = np.subtract.outer(np.arange(half), np.arange(half))
    blurs = [np.exp(-0.5 * (apart / blur) ** 2) if blur else np.eye(half) for blur in BLURS]
    blurs = [blur / blur[half // 2].sum() for blur in blurs]
    at = (np.arange(half * samples) + 0.5) / samples - half / 2
    masks, names = [], []
    for kind in KINDS:
        for size, radius in RADII.items():
            for scale in (0.9, 1.0, 1.1):
                for dy in np.arange(-1.5, 1.6, 0.5):
                    for dx in np.arange(-1.5, 1.6, 0.5):
                        inside = covers(kind, at[None, :] - dx, at[:, None] - dy, scale * radius)
                        mask = inside.reshape(half, samples, half, samples).mean((1, 3))
                        masks += [(CHROMA * (blur @ mask @ blur.T) - NOISE).clip(min=0).ravel() for blur in blurs]
                        names += [(kind, size)] * len(blurs)
    stacked = np.stack(masks)
    return stacked / np.linalg.norm(stacked, axis=-1, keepdims=True), names


def _colours(quarters: np.ndarray, chroma: np.ndarray) -> list[str]:
    """The colour of nearest hue, weighted by chroma, for each quarter (n, 256, 3)."""
    axes = np.array([[1, -0.5, -0.5], [0, 3**0.5 / 2, -(3**0.5) / 2]])  # r, g, b at 0, 120 and 240 degrees
    palette = np.array(list(COLOURS.values())) @ axes.T
    palette /= np.linalg.norm(palette, axis=-1, keepdims=True)
    mean = np.einsum("npc,np->nc", quarters, chroma) @ axes.T
    return [tuple(COLOURS)[i] for i in (mean @ palette.T).argmax(-1)]


_COLOURS, _SIZES = frozenset(COLOURS), frozenset(RADII)
_KINDS = {name: kind for kind in KINDS for name in (kind, plural(kind))}
_NUMBERS = {"a": 1, "an": 1} | {name: n for n, word in enumerate(NUMBERS) if n for name in (word, str(n))}
# What they say of a shape, that there is none, perhaps, or an unclear number of it, no scene can be held against.
_DENIALS = ("no", "not", "t", "non", "none", "nothing", "neither", "nor", "never", "without", "or")
_OTHER_NUMBERS = ("zero", "any", "some", "many", "several", "few", "five", "six", "seven", "eight", "nine", "ten")
_UNREAD = frozenset(_DENIALS + _OTHER_NUMBERS)


def read_text(text: str) -> Meaning | None:
    """What `text`, a description or a prompt, says; None where a shape is named by halves, denied, or one of a number
    that is not said or beyond four, or nothing is named."""
    mentions: list[Mention] = []
    said: dict = {}
    relation = None
    words = re.findall(r"[a-z]+|\d+", text.lower())
    i = 0
    while i < len(words):
        two = " ".join(words[i : i + 2])
        if words[i] in _UNREAD or (words[i].isdigit() and words[i] not in _NUMBERS):
            return None
        if words[i] in _KINDS:
            if words[i] not in KINDS and "number" not in said:
                return None
            mentions.append(Mention(_KINDS[words[i]], **said))
            said = {}
        elif words[i] in _COLOURS or words[i] in _SIZES:
            key = "colour" if words[i] in _COLOURS else "size"
            if key in said:
                return None
            said[key] = words[i]
        elif words[i] in _NUMBERS:
            if set(said) - {"number"}:
                return None
            said = {"number": _NUMBERS[words[i]]}  # the last one counts: "a scene with two ..."
        elif two in PLACES:
            if not mentions or mentions[-1].place is not None or set(said):
                return None
            mentions[-1] = Mention(**(vars(mentions[-1]) | {"place": PLACES.index(two)}))
            i += 1
        elif words[i] in RELATIONS or two in RELATIONS:
            if relation is not None or len(mentions) != 1 or said:
                return None
            relation = words[i] if words[i] in RELATIONS else two
            i += two in RELATIONS
        i += 1
    if said or not mentions or (relation is not None and len(mentions) != 2):
        return None
    return Meaning(tuple(mentions), relation)


def agree(said: Meaning | None, shapes: tuple[Shape, ...] | None) -> bool:
    """Whether what is `said` is true of the `shapes` shown and names all of them: every one once, none besides."""
    if said is None or shapes is None:
        return False
    each = [mention for mention in said.mentions for _ in range(mention.number)]
    if len(each) != len(shapes):
        return False
    for order in permutations(shapes):
        is_so = said.relation is None or said.relation in relations(order[0], order[1])
        if is_so and all(mention.fits(shape) for mention, shape in zip(each, order, strict=True)):
            return True
    return False


def describes(said: Meaning | None, shapes: tuple[Shape, ...] | None) -> bool:
    """Whether a text is a caption of what is shown: true, complete, and each shape named with its kind and colour."""
    return agree(said, shapes) and all(mention.colour for mention in said.mentions)


def same_answer(given: str, right: str) -> bool:
    """Whether two answers mean the same: case, articles and marks aside, numerals as words."""
    return _answer(given) == _answer(right)


def _answer(text: str) -> list[str]:
    numerals = {str(n): word for n, word in enumerate(NUMBERS)} | {"zero": "none"}
    words = re.findall(r"[a-z]+|\d+", text.lower())
    return [numerals.get(word, word) for word in words if word not in ("a", "an", "the")]
