"""The digits data: 8x8 handwritten digits with captions, questions and answers from a small grammar.

- Image i of scikit-learn's `load_digits` is held out if i % 6 == 5; nothing is trained on those.
- A caption names its digit once, as a word or as a numeral, so what a generated text says can be read off exactly.
- A question and a digit determine the answer, so an answer is right or wrong, never a matter of taste.
- Sample n of a run depends on (seed, n) alone: a resumed run sees what the first would have seen.
"""

import re
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset


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
    """The 8x8 grey images of "train" or "heldout", and their labels (n,)."""
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
) -> dict:
    """One training example of `task`: the parts of its assistant message are the targets.

    Args:
        augment: Vary images that are conditions; images that are targets never.
        condition_dropout: Probability to leave out the class of class_to_image or the user turn of text_to_image:
            what guidance contrasts with.
        class_probability: Probability to tell the class beside the condition of the other conditional tasks.
    """
    label = int(label)
    seen = augmented(image, rng) if augment and task in ("image_to_text", "question_answering") else image
    class_part = {"type": "class", "class": label}
    user: list[dict]
    assistant: list[dict] = [{"type": "image", "image": image}]
    if task == "class_to_image":
        user = [class_part]
    elif task == "text_to_image":
        user = [_text(caption(label, rng))]
    elif task == "image_to_text":
        user = [{"type": "image", "image": seen}]
        assistant = [_text(caption(label, rng))]
    elif task == "question_answering":
        question, answer = question_and_answer(label, rng)
        user = [{"type": "image", "image": seen}, _text(question)]
        assistant = [_text(answer)]
    elif task in ("image_and_text", "prompt_to_image_and_text"):
        user = []
        if task == "prompt_to_image_and_text":
            user = [class_part if rng.random() < 0.5 else _text(caption(label, rng))]
        assistant.append(_text(caption(label, rng)))
    else:
        raise ValueError(f"Got task {task!r}; choose one of {', '.join(TASKS)}.")
    if task in ("text_to_image", "image_to_text", "question_answering") and rng.random() < class_probability:
        user.append(class_part)
    if task in ("class_to_image", "text_to_image") and rng.random() < condition_dropout:
        user = []
    messages = [{"role": "user", "content": user}] if user else []
    return {"messages": messages + [{"role": "assistant", "content": assistant}]}


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


class DigitsTaskDataset(Dataset):
    """Endless variations on the digits as `num_samples` conversations, one task per batch when read in order.

    Args:
        split: "train" or "heldout".
        num_samples: Length of the data set.
        batch_size: Runs of this many samples share a task, drawn by weight.
        task_weights: Task -> weight; the weights need not sum to one.
        task_starts: Task -> the first sample that can be of it; 0 where it is not named.
        seed: With the index, determines a sample.
        augment, condition_dropout, class_probability: See [`conversation`].
    """

    def __init__(
        self,
        split: str,
        num_samples: int,
        batch_size: int,
        task_weights: dict[str, float],
        seed: int = 0,
        augment: bool = True,
        condition_dropout: float = 0.1,
        class_probability: float = 0.1,
        task_starts: dict[str, int] | None = None,
    ):
        unknown = sorted((set(task_weights) | set(task_starts or {})) - set(TASKS))
        if unknown:
            raise ValueError(f"Got task weights or starts for {', '.join(unknown)}; choose among {', '.join(TASKS)}.")
        if not task_weights or min(task_weights.values()) < 0 or sum(task_weights.values()) <= 0:
            raise ValueError(f"Got task weights {task_weights}; need weights of 0 or more, one of them positive.")
        if num_samples < 0 or batch_size < 1:
            raise ValueError(
                f"Got num_samples {num_samples} and batch_size {batch_size}; need at least 0 samples, and 1 a batch."
            )
        self.images, self.labels = load_digits_split(split)
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.task_weights, self.task_starts = task_weights, task_starts or {}
        if not self._tasks_at(0):
            raise ValueError(f"Got task_starts {task_starts}; need a task of positive weight that starts at 0.")
        self.options: dict[str, Any] = {
            "augment": augment,
            "condition_dropout": condition_dropout,
            "class_probability": class_probability,
        }

    def __len__(self) -> int:
        return self.num_samples

    def task_of(self, index: int) -> str:
        """The task of sample `index`, the same throughout its batch."""
        number = index // self.batch_size
        tasks = self._tasks_at(number * self.batch_size)
        weights = np.array([self.task_weights[task] for task in tasks], dtype=np.float64)
        draw = np.random.default_rng((self.seed, 0, number)).random()
        ends = np.cumsum(weights / weights.sum())
        return tasks[min(int(np.searchsorted(ends, draw, side="right")), len(tasks) - 1)]

    def _tasks_at(self, index: int) -> list[str]:
        """Tasks of positive weight that have started."""
        return [t for t in TASKS if self.task_weights.get(t, 0) > 0 and index >= self.task_starts.get(t, 0)]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"Got index {index}; the data set has {self.num_samples} samples.")
        rng = np.random.default_rng((self.seed, 1, index))
        which = int(rng.integers(len(self.images)))
        return conversation(self.task_of(index), self.images[which], self.labels[which], rng, **self.options)
