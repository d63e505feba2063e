"""Conversations, read and checked: what the chat template sees of them, and what it does not need to see.

{"role": "user", "content": [parts]}, or a string for one text; parts are {"type": "text", "text": str},
{"type": "image", "image": picture} and {"type": "class", "class": int}. The parts of a last assistant message are
targets: all of a part, or what its "mask" marks of it, the rest being known. There a part may lack its picture or
text, which is then all to be made, and a text may hold the mask token, once for each token to be made.
"""

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .prompts import messages_of


MODALITIES = ("image", "text")
AUTO = "auto"  # in place of them: the model decides
ROLES = ("system", "user", "assistant")
MEDIA_KEYS = ("image", "url", "path", "base64")
PART_KEYS = {
    "image": ("type", *MEDIA_KEYS, "latents", "mask"),
    "text": ("type", "text", "mask", "continues"),
    "class": ("type", "class"),
}
NO_CLASS = -1


@dataclass
class Prompt:
    """A checked conversation: what the template sees, and what it does not need to see."""

    messages: list[dict] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    latents: list[Any] = field(default_factory=list)  # of images that a pixel autoencoder has seen before
    class_id: int = NO_CLASS
    has_targets: bool = False
    image_masks: dict[int, Any] = field(default_factory=dict)  # by the number of the image among the known ones
    target_images: set[int] = field(default_factory=set)  # numbers of those of the last assistant message
    text_masks: list[list | None] = field(default_factory=list)  # of each text of the last assistant message
    text_continues: list[bool] = field(default_factory=list)  # of the same, whether another block follows


@dataclass
class ConversationReader:
    """Reads conversations; texts that hold one of the control tokens are refused."""

    special_text: re.Pattern
    image_token: str
    mask_token: str
    num_classes: int | None = None

    def as_messages(self, text: str | None, image: Any, class_id: int | None) -> list[dict]:
        """The conditions of one prompt as a conversation; no condition, no message."""
        images = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
        if text is not None and not isinstance(text, str):
            raise ValueError(f"Got a text of type {type(text).__name__}; need a string, or None for no text.")
        image_parts = [{"type": "image", "image": one} for one in images]
        marks = 0 if text is None else text.count(self.image_token)
        if marks not in (0, len(images)):
            raise ValueError(
                f"Got {marks} {self.image_token} in a text with {len(images)} image(s); need as many of one as of the "
                f"other; give the pixels in `images`, or take {self.image_token} out of the text."
            )
        parts: list[dict] = [] if class_id is None else [{"type": "class", "class": class_id}]
        if marks:
            for piece, image_part in zip(text.split(self.image_token), [*image_parts, None], strict=True):
                parts += [{"type": "text", "text": piece}] if piece.strip() else []
                parts += [] if image_part is None else [image_part]
        else:
            parts += image_parts + ([] if text is None else [{"type": "text", "text": text}])
        return [{"role": "user", "content": parts}] if parts else []

    def read(self, messages: Any) -> Prompt:
        """Checks a conversation and takes images and class out of it."""
        messages = messages_of(messages)
        if isinstance(messages, str) or any(isinstance(message, str) for message in messages):
            raise ValueError(
                f"Got {str(messages)[:60]} as a conversation; need messages, dicts with 'role' and 'content'; batches "
                "of strings, such as a DataLoader's, are no prompts: give texts as `text`, one string a prompt."
            )
        prompt = Prompt()
        for number, message in enumerate(messages):
            fields = message if isinstance(message, dict) else {}
            role, content = fields.get("role"), fields.get("content")
            if role not in ROLES:
                raise ValueError(
                    f"Got the message {str(message)[:60]}; need a dict with 'content' and a 'role' among "
                    f"{', '.join(ROLES)}."
                )
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            prompt.has_targets = role == "assistant" and number == len(messages) - 1
            parts = [self._read_part(part, role, prompt) for part in content or []]
            prompt.messages.append({"role": role, "content": [part for part in parts if part is not None]})
        if prompt.has_targets and not prompt.messages[-1]["content"]:
            raise ValueError(
                "Got a last assistant message without a text or image part, and so no target; need at least one; add "
                "what the model is to learn, or drop the message and name what to make with `generate`."
            )
        return prompt

    def _read_part(self, part: Any, role: str, prompt: Prompt) -> dict | None:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in PART_KEYS:
            raise ValueError(
                f"Got a content part {str(part)[:60]}; need a dict of type 'text', 'image' or 'class'; see "
                "MDMProcessor.apply_chat_template."
            )
        known = PART_KEYS[kind]  # a misspelt mask would leave nothing known
        if strange := [name for name, value in part.items() if value is not None and name not in known]:
            raise ValueError(
                f"Got {', '.join(map(repr, strange))} in a part of type {kind!r}; need some of {', '.join(known)}; "
                "check the spelling, and pass options beside the messages."
            )
        if kind != "class" and part.get("mask") is not None and not prompt.has_targets:
            raise ValueError(
                f"Got a mask in {'an' if kind == 'image' else 'a'} {kind} part that is no target; need it in the last "
                "message, the assistant's, whose parts are what is made; move it there, or leave it out."
            )
        if kind == "text":
            return self._read_text(part, prompt)
        if kind == "image":
            return self._read_image(part, prompt)
        if role == "assistant":
            raise ValueError("Got a class part in an assistant message; need it in a user message; move it there.")
        if prompt.class_id != NO_CLASS:
            raise ValueError("Got two class parts in a conversation; need at most one; drop the other.")
        prompt.class_id = self._class_id(part.get("class"))
        return None

    def _read_text(self, part: dict, prompt: Prompt) -> dict:
        text, mask = part.get("text"), part.get("mask")
        if prompt.has_targets:
            prompt.text_masks.append(_spans(text, mask))
            prompt.text_continues.append(bool(part.get("continues")))
            text = self.mask_token if text is None else text
        if not isinstance(text, str):
            raise ValueError(f"Got a text part with text {text!r}; need a string.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Got the text {text[:60]!r} with half a character at {error.start} (a lone surrogate); need whole "
                "ones; decode it anew, with errors='replace' if its source is broken."
            ) from error
        without_gaps = text.replace(self.mask_token, "") if prompt.has_targets else text
        if found := self.special_text.search(without_gaps):
            remedy = "give the image as a part of its own" if found[0] == self.image_token else "take it out"
            if found[0] == self.mask_token:
                remedy = "it marks gaps in the parts of a last assistant message alone"
            raise ValueError(
                f"Got the control token {found[0]} in the text {text[:60]!r}; need text without one, since the "
                f"chat template sets them; {remedy}."
            )
        return {"type": "text", "text": text}

    def _read_image(self, part: dict, prompt: Prompt) -> dict:
        key = next((key for key in MEDIA_KEYS if part.get(key) is not None), None)
        number = len(prompt.images) + len(prompt.latents)
        if part.get("mask") is not None:
            prompt.image_masks[number] = part["mask"]
        if prompt.has_targets:
            prompt.target_images.add(number)
        if part.get("latents") is not None:
            prompt.latents.append(part["latents"])
        elif key is not None:
            picture = f"data:image/any;base64,{part[key]}" if key == "base64" else part[key]
            if isinstance(picture, list | tuple) or getattr(picture, "ndim", 0) == 4:
                if len(picture) != 1:
                    raise ValueError(
                        f"Got {len(picture)} pictures in an image part; need one; give each a part of its own."
                    )
                picture = picture[0]
            prompt.images.append(picture)
        elif part.get("mask") is not None:
            raise ValueError(
                "Got an image part with a mask and no picture; need what the mask is over, {'type': 'image', 'image': "
                "picture, 'mask': mask}; add it, or leave the mask out, and all of a picture is made."
            )
        elif not prompt.has_targets:
            raise ValueError(
                "Got an image part without pixels; need {'type': 'image', 'image': picture}; to make an image, "
                "leave the part out and pass generate='image'."
            )
        else:
            return {"type": "image", "is_unknown": True}
        return {"type": "image"}

    def _class_id(self, value: Any) -> int:
        try:
            class_id = NO_CLASS if isinstance(value, bool) else operator.index(value)
        except TypeError:
            class_id = NO_CLASS
        if class_id < 0 or (self.num_classes is not None and class_id >= self.num_classes):
            upper = "" if self.num_classes is None else f" and at most {self.num_classes - 1}"
            raise ValueError(
                f"Got class {value!r}; need a whole number of at least 0{upper}; leave the class out for none."
            )
        return class_id


def _spans(text: Any, mask: Any) -> list[tuple[int, int | None]] | None:
    """The characters of a text that are to be made, as (start, end) with None for all to the end of the canvas."""
    if mask is None:
        return None
    spans = []
    given = mask.tolist() if isinstance(mask, np.ndarray | torch.Tensor) else mask
    for span in given if isinstance(given, list | tuple) and isinstance(text, str) else [None]:
        try:
            start, end = (None if place is None else operator.index(place) for place in span)
        except (TypeError, ValueError):
            start, end = -1, None
        if start is None or not 0 <= start <= len(text) or not (end is None or start < end <= len(text)):
            raise ValueError(
                f"Got the text mask {mask!r:.80} for {text!r:.60}; need a list of (start, end) in its characters, end "
                "None for all that follows; or leave the mask out and put the mask token where tokens are to be made."
            )
        spans.append((start, end))
    return spans


def as_modalities(generate: str | Iterable[str]) -> tuple[str, ...]:
    """`generate` as a tuple; the template orders it."""
    is_many = isinstance(generate, Iterable) and not isinstance(generate, str | Mapping)
    asked: tuple = tuple(generate) if is_many else (generate,)
    unknown = [one for one in asked if one not in MODALITIES]
    if unknown or not asked:
        got = repr(unknown[0]) if unknown else "nothing"
        raise ValueError(
            f"Got generate with {got}; need 'image', 'text' or both, or 'auto' in a call of a pipeline; name what "
            "to make."
        )
    return asked


def as_columns(**conditions: Any) -> list[list]:
    """Each condition as a list of one length; what is not a list stands for every prompt."""
    columns: dict[str, list | None] = {}
    for name, value in conditions.items():
        is_stack = isinstance(value, np.ndarray | torch.Tensor) and value.ndim == (4 if name == "images" else 1)
        columns[name] = list(value) if is_stack or isinstance(value, list | tuple) else None
    lengths = {name: len(column) for name, column in columns.items() if column is not None}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(
            f"Got lists of different lengths or empty ones, {lengths}; a batch needs lists of one length; put None "
            "where a prompt has no such condition."
        )
    count = next(iter(lengths.values()), 1)
    return [[conditions[name]] * count if column is None else column for name, column in columns.items()]
