"""The digits data: 8x8 handwritten digits with captions, questions and answers from a small grammar.

- Image i of scikit-learn's `load_digits` is held out if i % 6 == 5; nothing is trained on those.
- A caption names its digit once, as a word or as a numeral, so what a generated text says can be read off exactly.
- A question and a digit determine the answer, so an answer is right or wrong, never a matter of taste.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from .gaps import with_gaps
from .records import image_part, text_part


TASKS = (
    "class_to_image",
    "text_to_image",
    "image_to_text",
    "question_answering",
    "image_and_text",
    "prompt_to_image_and_text",
)
HELD_OUT_EVERY = 6

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# {a} is the article of {d}; each template takes a word or a numeral.
CAPTIONS = (
    "{a} {d}",
    "a handwritten {d}",
    "the digit {d}",
    "this is {a} {d}",
    "a drawing of the number {d}",
    "a picture of {a} {d}",
    "the number {d} written by hand",
    "somebody wrote {a} {d}",
    "a small grey {d}",
    "here is the digit {d}",
    "it looks like {a} {d}",
)

QUESTIONS = (
    ("which digit is this?", "it is {a} {d}"),
    ("what number do you see?", "i see {a} {d}"),
    ("can you read this digit?", "yes, it is {a} {d}"),
    ("what is written here?", "the digit {d}"),
    ("which number was drawn?", "the number {d}"),
    ("name this digit", "{d}"),
    ("write this digit as a numeral", "{numeral}"),
)
YES_NO_QUESTION = "is this {a} {d}?"
YES, NO = "yes, it is {a} {d}", "no, it is {a} {d}"
YES_NO_SHARE = 0.25


def _fill(template: str, digit: int, numeral: bool = False) -> str:
    name = str(digit) if numeral else DIGIT_WORDS[digit]
    return template.format(a="an" if digit == 8 else "a", d=name, numeral=digit)


def caption(label: int, rng: np.random.Generator) -> str:
    """A caption that names the digit `label`, its wording drawn at random."""
    return _fill(CAPTIONS[rng.integers(len(CAPTIONS))], int(label), numeral=rng.random() < 0.5)


@lru_cache
def all_captions() -> tuple[str, ...]:
    """Every caption of the grammar, each once."""
    return tuple(_fill(c, digit, numeral) for c in CAPTIONS for digit in range(10) for numeral in (False, True))


def is_well_formed(text: str) -> bool:
    """Whether `text` is exactly one of the grammar's captions."""
    return text in all_captions()


def question_and_answer(label: int, rng: np.random.Generator) -> tuple[str, str]:
    """A question about an image of the digit `label`, and its one right answer."""
    label = int(label)
    if rng.random() < YES_NO_SHARE:
        asked = label if rng.random() < 0.5 else int(label + rng.integers(1, 10)) % 10
        return _fill(YES_NO_QUESTION, asked), _fill(YES if asked == label else NO, label)
    question, answer = QUESTIONS[rng.integers(len(QUESTIONS))]
    return question, _fill(answer, label)


@lru_cache
def all_questions_and_answers() -> tuple[tuple[str, str], ...]:
    """Every question of the grammar with its right answer for every digit."""
    open_questions = [(q, _fill(a, digit)) for q, a in QUESTIONS for digit in range(10)]
    yes_no = [
        (_fill(YES_NO_QUESTION, asked), _fill(YES if asked == digit else NO, digit))
        for asked in range(10)
        for digit in range(10)
    ]
    return tuple(open_questions + yes_no)


def digit_named_in(text: str) -> int | None:
    """The one digit that `text` names; None if it names none or several.

    Of "no, this is not a three, it is a seven" only what follows the last "it is" counts.
    """
    words = re.findall(r"[a-z]+|\d+", text.lower().rpartition("it is")[2])
    named = [DIGIT_WORDS.index(word) for word in words if word in DIGIT_WORDS]
    named += [int(word) for word in words if len(word) == 1 and word.isdecimal()]
    return named[0] if len(named) == 1 else None


@lru_cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 8, 8) in 0..255 and labels (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.rint(data.images * 255 / 16).astype(np.uint8), data.target.astype(np.int64)


def _indices(split: str) -> np.ndarray:
    held_out = np.arange(len(_digits()[1])) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    if split not in ("train", "heldout"):
        raise ValueError(f"Got split {split!r}; there are 'train' and 'heldout'.")
    return np.flatnonzero(held_out if split == "heldout" else ~held_out)


def load_digits_split(split: str) -> tuple[list[Image.Image], np.ndarray]:
    """The 8x8 grey images of a split, "train" or "heldout", and their labels (n,)."""
    pixels, labels = _digits()
    chosen = _indices(split)
    return [Image.fromarray(pixels[i]) for i in chosen], labels[chosen]


def augmented(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """`image` as another scan of the same paper: shifted by up to a pixel, a little noise, another contrast."""
    pixels = np.asarray(image, dtype=np.float64)
    for axis in (0, 1):
        if rng.random() < 0.5:
            step = 1 if rng.random() < 0.5 else -1
            pixels = np.roll(pixels, step, axis)
            border = (slice(None),) * axis + (0 if step == 1 else -1,)
            pixels[border] = 0
    pixels = pixels * rng.uniform(0.85, 1.15) + rng.normal(0, rng.uniform(0, 10), pixels.shape)
    return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))


def conversation(
    task: str,
    image: Image.Image,
    label: int,
    rng: np.random.Generator,
    augment: bool = False,
    condition_dropout: float = 0.0,
    class_probability: float = 0.0,
    infill: float = 0.0,
) -> dict:
    """One training example of `task`: the parts of its assistant message are the targets.

    Args:
        augment: Vary images that are conditions; images that are targets never.
        condition_dropout: Probability to leave out the class of class_to_image or the user turn of text_to_image:
            what guidance contrasts with.
        class_probability: Probability to tell the class beside the condition of the other conditional tasks.
        infill: Share of examples whose targets are known in part; see [`with_gaps`].
    """
    label = int(label)
    seen = augmented(image, rng) if augment and task in ("image_to_text", "question_answering") else image
    class_part = {"type": "class", "class": label}
    user: list[dict]
    assistant: list[dict] = [image_part(image)]
    if task == "class_to_image":
        user = [class_part]
    elif task == "text_to_image":
        user = [text_part(caption(label, rng))]
    elif task == "image_to_text":
        user = [image_part(seen)]
        assistant = [text_part(caption(label, rng))]
    elif task == "question_answering":
        question, answer = question_and_answer(label, rng)
        user = [image_part(seen), text_part(question)]
        assistant = [text_part(answer)]
    elif task in ("image_and_text", "prompt_to_image_and_text"):
        user = []
        if task == "prompt_to_image_and_text":
            user = [class_part if rng.random() < 0.5 else text_part(caption(label, rng))]
        assistant.append(text_part(caption(label, rng)))
    else:
        raise ValueError(f"Got task {task!r}; choose one of {', '.join(TASKS)}.")
    if task in ("text_to_image", "image_to_text", "question_answering") and rng.random() < class_probability:
        user.append(class_part)
    if task in ("class_to_image", "text_to_image") and rng.random() < condition_dropout:
        user = []
    messages = [{"role": "user", "content": user}] if user else []
    return {"messages": with_gaps([*messages, {"role": "assistant", "content": assistant}], rng, infill)}


def mosaic(images: Sequence[Image.Image], rows: int, columns: int) -> Image.Image:
    """Pictures of one size as one, row by row."""
    cells = [np.asarray(image) for image in images]
    return Image.fromarray(np.block([cells[row * columns : (row + 1) * columns] for row in range(rows)]))


def _is_grid(given: Any) -> bool:
    return isinstance(given, list | tuple) and len(given) == 2 and all(isinstance(n, int) and n > 0 for n in given)


class DigitsSource:
    """Endless variations on the digits, for a [`ConversationMix`].

    Args:
        split: "train" or "heldout".
        tasks: Task -> weight; the weights need not sum to one.
        augment, condition_dropout, class_probability, infill: See [`conversation`].
        mosaics: Rows and columns of digits, all of one kind, that a picture is made of; one of them is drawn for each
            picture. None for single digits.
    """

    on_bad = "refuse"  # there are no bad digits
    is_streaming = False

    def __init__(
        self,
        split: str,
        tasks: dict[str, float],
        augment: bool = True,
        condition_dropout: float = 0.1,
        class_probability: float = 0.1,
        infill: float = 0.0,
        mosaics: Sequence[Sequence[int]] | None = None,
    ):
        if unknown := sorted(set(tasks) - set(TASKS)):
            raise ValueError(f"Got task weights for {', '.join(unknown)}; choose among {', '.join(TASKS)}.")
        if mosaics is not None and not (mosaics and all(_is_grid(one) for one in mosaics)):
            raise ValueError(
                f"Got mosaics {mosaics!r}; need a list of [rows, columns], each 1 or more, such as [[2, 1]]."
            )
        self.images, self.labels = load_digits_split(split)
        self.mosaics = mosaics
        self.tasks = tasks
        self.options: dict[str, Any] = {
            "augment": augment,
            "condition_dropout": condition_dropout,
            "class_probability": class_probability,
            "infill": infill,
        }

    def __len__(self) -> int:
        return len(self.images)

    def length(self, index: int) -> int:
        """Letters of a row: as good as alike here."""
        return 0

    def texts(self) -> Iterator[str]:
        """Every caption, question and answer of the grammar."""
        yield from all_captions()
        for pair in all_questions_and_answers():
            yield from pair

    def sample(self, index: int, task: str, rng: np.random.Generator) -> dict:
        """A conversation about a digit that `rng` chooses; `index` has no say: the shipped weights saw this stream."""
        which = int(rng.integers(len(self.images)))
        image, label = self.images[which], self.labels[which]
        if self.mosaics is not None:
            rows, columns = self.mosaics[int(rng.integers(len(self.mosaics)))]
            alike = rng.choice(np.flatnonzero(self.labels == label), rows * columns)
            image = mosaic([self.images[i] for i in alike], rows, columns)
        return conversation(task, image, label, rng, **self.options)
