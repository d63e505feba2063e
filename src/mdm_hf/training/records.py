"""One row of any data set as a `Record`, and a record as a conversation of one task.

- A conversation is what [`MDMProcessor.apply_chat_template`] takes: {"messages": [{"role", "content": [parts]}]};
  the parts of the last assistant message are the targets.
- A record knows nothing of where it came from, a task nothing of data sets: any source serves any task that it has
  the fields for.
- Images are handed on as they are, a path or undecoded bytes too: only what a task shows is ever opened.
- What cannot be used raises [`BadRow`]; whether that skips the row or stops the run is decided where rows are drawn.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from .blocks import in_blocks
from .gaps import with_gaps


TASKS = (
    "class_to_image",
    "text_to_image",
    "image_to_text",
    "question_answering",
    "image_and_text",
    "prompt_to_image_and_text",
    "text",
    "conversation",
)
WORDLESS = "class_to_image"  # the one task that shows no text
PROMPT_SHARE = 0.5  # of text_to_image where a record has prompts, beside its captions
BAD_KINDS = ("missing field", "bad value", "empty text", "missing image", "corrupt image", "refused")


class BadRow(ValueError):
    """A row that cannot be used: `message` says why, and `kind`, one of `BAD_KINDS`, is what it is counted under."""

    def __init__(self, message: str, kind: str = "bad value"):
        super().__init__(message)
        self.kind = kind


@dataclass
class Record:
    """What a row holds; an adapter fills what its source has.

    Args:
        image: A PIL image, a path, the bytes of an image file, or {"bytes", "path"} as `datasets` stores it.
        captions: Texts that all describe the image; plain text where there is no image.
        prompts: Texts to draw the image from that are no captions of it: they say less, or another thing.
        class_id: The data category.
        questions: Questions about the image, each with its answers; several answers are several people's, and as many
            agree as list the same.
        messages: A conversation in our schema, in full.
    """

    image: Any = None
    captions: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    class_id: int | None = None
    questions: list[tuple[str, list[str]]] = field(default_factory=list)
    messages: list[dict] = field(default_factory=list)

    def texts(self) -> Iterator[str]:
        """Every text of the row, each answer once."""
        yield from self.captions
        yield from self.prompts
        for question, answers in self.questions:
            yield question
            yield from dict.fromkeys(answers)
        for message in self.messages:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")


def conversation_of(
    record: Record,
    task: str,
    rng: np.random.Generator,
    condition_dropout: float = 0.1,
    infill: float = 0.0,
    split: Callable[[str], list[str]] | None = None,
) -> dict:
    """One training example of `task`; what a record has several of is drawn at random.

    Args:
        record: What the row holds.
        task: One of `TASKS`. `text` is a caption, or plain text, under no condition; `conversation` ends at an
            assistant turn drawn at random, with everything before it as context.
        rng: Source of all that is drawn.
        condition_dropout: Probability to leave out the condition of class_to_image and text_to_image: what guidance
            contrasts with.
        infill: Share of examples whose targets are known in part; see [`with_gaps`].
        split: Cuts the long texts of `text` and `conversation` into blocks, one of which is the target.

    Raises:
        BadRow: `record` has not what the task needs.
        ValueError: no such task.
    """
    if task == "conversation":
        turns = record.messages if split is None else in_blocks(record.messages, split)
        return {"messages": with_gaps(_up_to_a_drawn_answer(turns, rng), rng, infill)}
    if task not in TASKS:
        raise ValueError(f"Got task {task!r}; choose one of {', '.join(TASKS)}.")
    need = partial(_field, record, task)
    user: list[dict] = []
    if task == "text":
        assistant = [text_part(drawn(need("captions"), rng))]
        blocks = [] if split is None else in_blocks([{"role": "assistant", "content": assistant}], split)
        if len(blocks) > 1:
            return {"messages": with_gaps(_up_to_a_drawn_answer(blocks, rng), rng, infill)}
    elif task == "image_to_text":
        user = [image_part(need("image"))]
        assistant = [text_part(drawn(need("captions"), rng))]
    elif task == "question_answering":
        question, answers = drawn(need("questions"), rng)
        user = [] if record.image is None else [image_part(need("image"))]
        user.append(text_part(question))
        assistant = [text_part(drawn(answers, rng))]
    else:
        assistant = [image_part(need("image"))]
        if task == "class_to_image":
            user = [_class_part(need("class_id"))]
        elif task == "text_to_image":
            told = record.prompts if record.prompts and rng.random() < PROMPT_SHARE else need("captions")
            user = [text_part(drawn(told, rng))]
        else:
            texts = need("captions")
            order = rng.permutation(len(texts))
            assistant.append(text_part(texts[order[0]]))
            if task == "prompt_to_image_and_text":  # another caption than the target where there is one
                as_class = record.class_id is not None and rng.random() < 0.5
                user = [_class_part(need("class_id")) if as_class else text_part(texts[order[-1]])]
        if task in ("class_to_image", "text_to_image") and rng.random() < condition_dropout:
            user = []
    messages = [{"role": "user", "content": user}] if user else []
    return {"messages": with_gaps([*messages, {"role": "assistant", "content": assistant}], rng, infill)}


def drawn(items: Sequence, rng: np.random.Generator) -> Any:
    """One of `items`; what they hold twice is twice as likely."""
    return items[int(rng.integers(len(items)))]


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def image_part(image: Any) -> dict:
    return {"type": "image", "image": image}


def _class_part(class_id: int) -> dict:
    return {"type": "class", "class": class_id}


def with_images(conversation: dict, opened: Callable[[Any], Any]) -> dict:
    """`conversation` with `opened(image)` in place of every image: the image, or a whole part, with latents."""

    def part(one: dict) -> dict:
        if one["type"] != "image":
            return one
        image = opened(one.get("image"))
        mask = {"mask": one["mask"]} if "mask" in one else {}
        return (image if isinstance(image, dict) else image_part(image)) | mask

    messages = [{**message, "content": [part(p) for p in message["content"]]} for message in conversation["messages"]]
    return {"messages": messages}


def _up_to_a_drawn_answer(messages: list[dict], rng: np.random.Generator) -> list[dict]:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message["content"]]
    if not answers:
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise BadRow(
            f"Got a conversation without an assistant turn (its turns: {roles}), and so without a target; need at "
            "least one; drop the row, or name another task.",
            "missing field",
        )
    return messages[: drawn(answers, rng) + 1]


def _field(record: Record, task: str, name: str) -> Any:
    value = getattr(record, name)
    if value is None or (isinstance(value, list) and not value):
        raise BadRow(
            f"Got a record without {name} for the task {task}; need it; leave the task out, or mend the row.",
            "missing field",
        )
    return value
