"""Rows of token ids: placeholders to patches and canvases, rows to a padded batch, and back to the generated texts.

Plain Python and NumPy. `tokens` is the id of each control token, by the name of the tokenizer's attribute.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np


IGNORED_LABEL = -100

# What the rows are built with.
CONTROL_TOKENS = (
    "pad_token",
    "bos_token",
    "eos_token",
    "time_image_token",
    "time_text_token",
    "text_start_token",
    "text_end_token",
    "image_token",
    "image_target_token",
    "text_target_token",
)


@dataclass
class TokenRow:
    """One row of the batch under construction."""

    input_ids: list[int] = field(default_factory=list)
    target_mask: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    grids: list[list[int]] = field(default_factory=list)  # [rows, columns] in patches of each image
    is_known: bool = True  # all that is to be made is there, so that it can be learnt from

    def add(self, ids: list[int], is_target: Sequence[bool] = (), is_text: bool = False) -> None:
        marks = is_target or [False] * len(ids)
        self.input_ids += ids
        self.target_mask += map(int, marks)
        self.labels += [one if mark and is_text else IGNORED_LABEL for one, mark in zip(ids, marks, strict=True)]


def expand_placeholders(
    text: str,
    ids: list[int],
    offsets: Sequence[tuple[int, int]],
    tokens: dict[str, int],
    known_grids: Iterator[list[int]],
    target_grid: list[int],
    canvas: int,
    max_text: int,
    decode: Callable[[list[int]], str],
    patch_masks: Iterator[np.ndarray | None],
    text_masks: Sequence[list[tuple[int, int | None]] | None] = (),
    text_continues: Sequence[bool] = (),
) -> TokenRow:
    """Expands image placeholders to their patches and target texts to their canvas.

    Args:
        text, ids, offsets: The rendered conversation, and the characters that each token stands for.
        tokens: Ids of the control tokens.
        known_grids, patch_masks: Of each known image in turn, [rows, columns] and which patches are to be made, all
            of a target's if None.
        target_grid: [rows, columns] of an image to be made.
        canvas, max_text: Most tokens of a target text, and of another one.
        decode: Words the errors.
        text_masks: Of each target text, the (start, end) of what is to be made in its characters; all of it if None.
        text_continues: Of each target text, whether it is a block after which another comes: its canvas is filled with
            <s>, that of others with </s>.
    """
    row, in_targets, i = TokenRow(), False, 0
    masks, continues = iter(text_masks), iter(text_continues)
    gap = tokens["text_target_token"]
    while i < len(ids):
        if ids[i] == tokens["text_start_token"]:
            end = ids.index(tokens["text_end_token"], i)
            body = ids[i + 1 : end]
            is_target: list[bool] = []
            if in_targets:
                spans, filler = next(masks, None), "bos_token" if next(continues, False) else "eos_token"
                if body == [gap] and spans is None:
                    body = body * canvas
                if len(body) > canvas:
                    raise ValueError(
                        f"Got a target text of {len(body)} tokens, {decode(body)[:60]!r}; need at most "
                        f"max_new_tokens = {canvas}; shorten it or raise max_new_tokens."
                    )
                start = offsets[i][1]
                places = _places_of_words(text, offsets[i + 1 : end], start)
                is_target = _targets_of(body, places, gap, spans, canvas, decode)
                row.is_known = row.is_known and gap not in body
                body = body + [tokens[filler]] * (canvas - len(body))
            elif len(body) > max_text:
                raise ValueError(
                    f"Got a text of {len(body)} tokens, {decode(body)[:60]!r}; need at most the tokenizer's "
                    f"model_max_length = {max_text}; shorten it."
                )
            row.add([ids[i]])
            row.add(body, is_target, is_text=True)
            row.add([ids[end]])
            i = end
        elif ids[i] in (tokens["image_token"], tokens["image_target_token"]):
            is_known = ids[i] == tokens["image_token"]
            grid, mask = (next(known_grids), next(patch_masks)) if is_known else (target_grid, None)
            count = grid[0] * grid[1]
            row.grids.append(grid)
            row.is_known = row.is_known and is_known
            row.add([ids[i]] * count, [in_targets] * count if mask is None else mask.flatten().tolist())
        else:
            in_targets = in_targets or ids[i] in (tokens["time_image_token"], tokens["time_text_token"])
            row.add([ids[i]])
        i += 1
    return row


def _places_of_words(text: str, offsets: Sequence[tuple[int, int]], start: int) -> list[tuple[int, int]]:
    """Where each token of a text stands in it, less the blank before a word; a blank alone, where what follows does.

    Args:
        offsets: In `text`, in which the tokens' own begins at `start`.
    """
    places: list[tuple[int, int]] = []
    for first, last in reversed(offsets):
        first = last - len(text[first:last].lstrip())
        is_blank = first == last and bool(places)
        places.append(places[-1] if is_blank else (first - start, last - start))
    return places[::-1]


def _targets_of(
    body: list[int],
    places: list[tuple[int, int]],
    gap: int,
    spans: list[tuple[int, int | None]] | None,
    canvas: int,
    decode: Callable[[list[int]], str],
) -> list[bool]:
    """Which tokens of a canvas are to be made: the gaps, those that a span touches, or all; the </s> after a text
    where its end is to be made."""
    if spans is None:
        return [one == gap for one in body] + [False] * (canvas - len(body)) if gap in body else [True] * canvas
    marks = [
        one == gap or any(first < (math.inf if end is None else end) and last > start for start, end in spans)
        for one, (first, last) in zip(body, places, strict=True)
    ]
    marks += [any(end is None for _, end in spans)] * (canvas - len(body))
    if not any(marks):
        remedy = "widen it"
        if not spans:
            remedy = "to keep a text whole, leave it out of what is made, and say it as a condition"
        elif any(end is None for _, end in spans) and len(body) == canvas:
            remedy = f"the text fills its canvas of max_new_tokens = {canvas}: raise that"
        raise ValueError(f"Got a text mask {spans} that touches no token of {decode(body)[:60]!r}; {remedy}.")
    return marks


def pad_rows(rows: Sequence[TokenRow], pad_token_id: int, length: int) -> dict[str, np.ndarray]:
    """input_ids, attention_mask, target_mask, labels (b, length), padded on the right; image_grid_hw (m, 2) with
    images."""
    b, l = len(rows), length
    data = {
        "input_ids": np.full((b, l), pad_token_id, dtype=np.int64),
        "attention_mask": np.zeros((b, l), dtype=np.int64),
        "target_mask": np.zeros((b, l), dtype=np.int64),
        "labels": np.full((b, l), IGNORED_LABEL, dtype=np.int64),
    }
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        data["input_ids"][i, :n] = row.input_ids
        data["attention_mask"][i, :n] = 1
        data["target_mask"][i, :n] = row.target_mask
        data["labels"][i, :n] = row.labels
    grids = [grid for row in rows for grid in row.grids]
    if grids:
        data["image_grid_hw"] = np.array(grids, dtype=np.int64)
    return data


def target_texts(ids: list[int], tokens: dict[str, int]) -> list[list[int]]:
    """The text segments after the first time token of a row, each up to its first </s> or <s>."""
    headers = (tokens["time_image_token"], tokens["time_text_token"])
    start = next((i for i, one in enumerate(ids) if one in headers), len(ids))
    texts: list[list[int]] = []
    is_open = False
    for one in ids[start:]:
        if one == tokens["text_start_token"]:
            texts.append([])
            is_open = True
        elif one in (tokens["text_end_token"], tokens["eos_token"], tokens["bos_token"]):
            is_open = False
        elif is_open:
            texts[-1].append(one)
    return texts


def continues(ids: list[int], tokens: dict[str, int]) -> bool:
    """Whether the first target text of a row has another block after it: it fills its canvas, or with <s>."""
    headers = (tokens["time_image_token"], tokens["time_text_token"])
    start = next((i for i, one in enumerate(ids) if one in headers), len(ids))
    ends = (tokens["text_end_token"], tokens["eos_token"], tokens["bos_token"])
    return next((one for one in ids[start:] if one in ends), tokens["eos_token"]) != tokens["eos_token"]
