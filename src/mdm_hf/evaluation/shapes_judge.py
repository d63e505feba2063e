"""Reads pictures and texts of the shapes world back into what they show and say, and tells whether they agree.

- A picture is read by its chroma, max(r, g, b) - min(r, g, b): 0 on every grey ground whatever its texture, and at the
  edge of a shape in proportion to what the shape covers. What is there is the best match among templates.
- What cannot be read is None, and agrees with nothing: a half-drawn, faint or two-coloured shape is not given
  the benefit of the doubt, an empty quarter is not filled in.
- Texts are read word by word for what they mean; any order of shapes and any frame will do, an unknown word will not.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations, product

import numpy as np
from PIL import Image

from .shapes_world import COLOURS, KINDS, NUMBERS, PLACES, RADII, RELATIONS, SIZE, Shape, covers, plural, relations


CHROMA, NOISE = 0.75, 0.15  # of the colours; up to here there is none
EMPTY, PRESENT = 1.0, 8.0  # chroma summed over a quarter: below the first nothing, from the second a shape
BLURS = (0.0, 0.7, 1.2)  # of the templates, standard deviations in pixels
MATCH = 0.88  # cosine between a quarter's chroma and its best template, at the least
STRENGTH = 0.6  # of a quarter's chroma beside that template's, at the least
OTHER, NEAR = 1.0, 40.0  # chroma summed over the pixels whose hue is further than so many degrees off, at the most


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
    templates, full, names = _templates()
    norm = np.linalg.norm(chroma, axis=-1)
    match = chroma @ templates.T / np.maximum(norm, 1e-9)[:, None]
    best, mass = match.argmax(-1), chroma.sum(-1)
    colours, others = _colours(quarters, chroma)
    readable = (mass >= PRESENT) & (match.max(-1) >= MATCH) & (others <= OTHER)
    readable &= match.max(-1) * norm >= STRENGTH * full[best]
    read: list[tuple[Shape, ...] | None] = []
    for first in range(0, len(quarters), 4):
        shapes: list[Shape] | None = []
        for place, i in enumerate(range(first, first + 4)):
            if mass[i] < EMPTY:
                continue
            if not readable[i]:
                shapes = None
                break
            kind, size = names[best[i]]
            shapes.append(Shape(kind, colours[i], size, place))
        read.append(None if shapes is None else tuple(shapes))
    return read


@lru_cache
def _templates() -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """What shapes of every kind cover of a quarter, at sizes around the two, shifts of half a pixel and several blurs:
    (n, 256) of norm 1, the norm of each before, its kind and size."""
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
    norms = np.linalg.norm(stacked, axis=-1)
    return stacked / norms[:, None], norms, names


def _colours(quarters: np.ndarray, chroma: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Of quarters (n, 256, 3) the colours of nearest hue, weighted by chroma, and the sums of chroma of other hues."""
    axes = np.array([[1, -0.5, -0.5], [0, 3**0.5 / 2, -(3**0.5) / 2]])  # r, g, b at 0, 120 and 240 degrees
    palette = np.array(list(COLOURS.values())) @ axes.T
    palette /= np.linalg.norm(palette, axis=-1, keepdims=True)
    hues = quarters @ axes.T  # (n, 256, 2)
    best = ((hues * chroma[..., None]).sum(1) @ palette.T).argmax(-1)
    along = (hues @ palette[best][..., None])[..., 0]
    others = (chroma * (along < np.cos(np.deg2rad(NEAR)) * np.linalg.norm(hues, axis=-1))).sum(-1)
    return [tuple(COLOURS)[i] for i in best], others


_KINDS = {name: kind for kind in KINDS for name in (kind, plural(kind))}
_NUMBERS = {"a": 1, "an": 1} | {name: n for n, word in enumerate(NUMBERS) if n for name in (word, str(n))}
_SYNONYMS = {
    r"(?:to|on|at) the (left|right) of": r"\1 of",
    "on top of|over": "above",
    "under|underneath|beneath": "below",
    "upper": "top",
    "lower": "bottom",
    "big|huge": "large",
    "little|tiny": "small",
    "magenta": "pink",
}
_THINGS = ("shape", "shapes", "object", "objects")  # with a number before them: how many there are in all
_FRAME = ("picture", "image", "photo", "drawing", "scene", "background", "ground", "see", "sees")
_NOT_OF_SHAPES = ("in", "on", "at", "plain", "textured", "grey", "gray")  # but of a place or a word of `_FRAME`
_NEUTRAL = (
    *("the", "there", "there's", "here", "is", "are", "it", "it's", "i", "you", "we", "can", "this", "that", "of"),
    *("with", ",", "and", "show", "shows", "showing", "shown", "contain", "contains", "containing", "has", "have"),
    *("located", "placed", "corner", "quarter", "coloured", "colored", *_THINGS),
)
_NOT_OF_ANSWERS = (*_NEUTRAL, *_FRAME, "a", "an", "in", "on", "at", "colour", "color")


def _words(text: str) -> list[str]:
    """Words, synonyms as the world has them, and a comma for each mark."""
    words = " ".join(re.findall(r"[^\s.,;:!?()\"-]+|[.,;:!?]", text.lower().replace("\u2019", "'")))
    for pattern, word in _SYNONYMS.items():
        words = re.sub(rf"(?<!\S)(?:{pattern})(?!\S)", word, words)
    return ["," if word in ".;:!?" else word for word in words.split()]


def read_text(text: str) -> Meaning | None:
    """What `text`, a description or a prompt, says; None where one of its words is not known or cannot be told what it
    is said of, a shape is named by halves, or nothing is named."""
    mentions: list[Mention] = []
    said: dict = {}  # of the shape to come
    relation = total = None
    near = False  # whether what comes may be said of the last mention: up to an "and" or a comma
    words = _words(text)
    i = 0
    while i < len(words):
        word, two = words[i], " ".join(words[i : i + 2])
        if word in _KINDS:
            if "else" in said or (word not in KINDS and "number" not in said):
                return None
            mentions.append(Mention(_KINDS[word], **said))
            said, near = {}, True
        elif word in COLOURS or word in RADII:
            key = "colour" if word in COLOURS else "size"
            if key in said:
                return None
            said[key] = word
        elif word in _NUMBERS:
            if set(said) - {"else"}:
                return None
            said["number"] = _NUMBERS[word]
        elif two in PLACES:
            if not near or mentions[-1].place is not None or set(said) - {"else"}:
                return None
            mentions[-1] = replace(mentions[-1], place=PLACES.index(two))
            said = {}
            i += 1
        elif word in RELATIONS or two in RELATIONS:
            if not near or relation is not None or len(mentions) != 1 or said:
                return None
            relation = word if word in RELATIONS else two
            i += two in RELATIONS
        elif word in _FRAME:
            if set(said) - {"number", "else"} or said.get("number", 1) != 1:
                return None
            said = {}
        elif word in _NOT_OF_SHAPES:
            said["else"] = word
        elif word in _THINGS and "number" in said:
            if total is not None or len(said) > 1:
                return None
            total, said = said["number"], {}
        elif word not in _NEUTRAL or (relation and len(mentions) == 1 and word != "the"):
            return None  # the latter: "a circle; above it a square"
        elif word in ("and", ","):
            near = False
        i += 1
    if said or not mentions or (relation is not None and len(mentions) != 2):
        return None
    if total not in (None, sum(mention.number for mention in mentions)):
        return None
    return Meaning(tuple(mentions), relation)


def agree(said: Meaning | None, shapes: tuple[Shape, ...] | None) -> bool:
    """Whether what is `said` is true of the `shapes` shown and names all of them: every one once, none besides."""
    if said is None or shapes is None:
        return False
    each = [mention for mention in said.mentions for _ in range(mention.number)]
    if len(each) != len(shapes):
        return False
    first = said.mentions[0].number
    for order in permutations(shapes):
        pairs = product(order[:first], order[first:]) if said.relation else ()
        is_so = all(said.relation in relations(*pair) for pair in pairs)
        if is_so and all(mention.fits(shape) for mention, shape in zip(each, order, strict=True)):
            return True
    return False


def describes(said: Meaning | None, shapes: tuple[Shape, ...] | None) -> bool:
    """Whether a text is a caption of what is shown: true, complete, and each shape named with its kind and colour."""
    return agree(said, shapes) and all(mention.colour for mention in said.mentions)


def same_answer(given: str, right: str) -> bool:
    """Whether two answers mean the same; an empty one never does. A number may have a kind after it."""
    said, wanted = _answer(given), _answer(right)
    if len(wanted) == 1 and wanted[0] in NUMBERS:
        if len(said) == 2 and said[1] in _KINDS:
            said = said[:1]
        if said in (["no"], ["nothing"], ["zero"]):
            said = ["none"]
    return bool(said) and said == wanted


def _answer(text: str) -> list[str]:
    numerals = {str(n): word for n, word in enumerate(NUMBERS)}
    return [numerals.get(word, word) for word in _words(text) if word not in _NOT_OF_ANSWERS]
