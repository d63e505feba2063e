"""Rows of token ids: placeholders to patches and canvases, rows to a padded batch, and back to the generated texts.

Plain Python and NumPy. `tokens` is the id of each control token, by the name of the tokenizer's attribute.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np


IGNORED_LABEL = -100

# What the rows are built with.
CONTROL_TOKENS = (
    "pad_token",
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

    def add(self, ids: list[int], is_target: bool = False, is_labelled: bool = False) -> None:
        self.input_ids += ids
        self.target_mask += [int(is_target)] * len(ids)
        self.labels += ids if is_labelled else [IGNORED_LABEL] * len(ids)


def expand_placeholders(
    ids: list[int],
    tokens: dict[str, int],
    known_grids: Iterator[list[int]],
    target_grid: list[int],
    canvas: int,
    max_text: int,
    decode: Callable[[list[int]], str],
) -> TokenRow:
    """Expands image placeholders to their patches and target texts to their canvas; `decode` words the errors."""
    row, in_targets, i = TokenRow(), False, 0
    while i < len(ids):
        if ids[i] == tokens["text_start_token"]:
            end = ids.index(tokens["text_end_token"], i)
            body = ids[i + 1 : end]
            if body == [tokens["text_target_token"]]:
                body = body * canvas
            elif in_targets:
                if len(body) > canvas:
                    raise ValueError(
                        f"Got a target text of {len(body)} tokens, {decode(body)[:60]!r}; need at most "
                        f"max_new_tokens = {canvas}; shorten it or raise max_new_tokens."
                    )
                body = body + [tokens["eos_token"]] * (canvas - len(body))
            elif len(body) > max_text:
                raise ValueError(
                    f"Got a text of {len(body)} tokens, {decode(body)[:60]!r}; need at most the tokenizer's "
                    f"model_max_length = {max_text}; shorten it."
                )
            row.add([ids[i]])
            row.add(body, is_target=in_targets, is_labelled=in_targets)
            row.add([ids[end]])
            i = end
        elif ids[i] in (tokens["image_token"], tokens["image_target_token"]):
            grid = next(known_grids) if ids[i] == tokens["image_token"] else target_grid
            row.grids.append(grid)
            row.add([ids[i]] * (grid[0] * grid[1]), is_target=in_targets)
        else:
            in_targets = in_targets or ids[i] in (tokens["time_image_token"], tokens["time_text_token"])
            row.add([ids[i]])
        i += 1
    return row


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
    """The text segments after the first time token of a row, each up to its first </s>."""
    headers = (tokens["time_image_token"], tokens["time_text_token"])
    start = next((i for i, one in enumerate(ids) if one in headers), len(ids))
    texts: list[list[int]] = []
    is_open = False
    for one in ids[start:]:
        if one == tokens["text_start_token"]:
            texts.append([])
            is_open = True
        elif one in (tokens["text_end_token"], tokens["eos_token"]):
            is_open = False
        elif is_open:
            texts[-1].append(one)
    return texts
