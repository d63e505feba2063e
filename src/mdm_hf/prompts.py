"""What a pipeline is asked, as prompts: one value or many of each condition, there already or read one by one."""

import operator
from collections.abc import Collection, Iterator, Sized
from itertools import zip_longest
from typing import Any

import numpy as np
import torch


CONDITIONS = ("text", "images", "class_ids", "messages", "canvas")
SIZES = {"image": ("image_size",), "text": ("max_new_tokens", "min_new_tokens")}  # of what is made


def read_prompts(repeats: int, generate: Any = None, **columns) -> list[dict] | Iterator[dict]:
    """Every prompt `repeats` times; an iterator where they are to be read one by one.

    Args:
        generate: What is to be made of all, if that was said.
        columns: One value, a batch of them, or something to iterate, for each of `CONDITIONS`.

    Raises:
        ValueError: columns of different lengths, empty ones, conditions that do not go together.
    """
    repeats = whole_number("num_return_sequences", repeats)
    one = {name for name in ("text", "messages") if _is_list_of("role", columns.get(name))}  # conversation, no batch
    if is_one_canvas := _is_list_of("type", columns.get("canvas")):
        columns["canvas"] = [columns["canvas"]]
    many = {
        name: v
        for name, v in columns.items()
        if name not in one and (_is_lazy(v) or _is_batch(v, 4 if name == "images" else 1))
    }
    lengths = {name: len(value) for name, value in many.items() if isinstance(value, Sized)}
    if len(set(lengths.values())) > 1:
        told = "; a list of parts is one canvas: for one a prompt, put each into a list of its own"
        raise ValueError(
            f"Got lists of different lengths, {lengths}; a batch needs lists of one length{told * is_one_canvas}."
        )
    prompts = _zipped({name: value for name, value in columns.items() if name not in many}, many, generate)
    repeated = (prompt for prompt in prompts for _ in range(repeats))
    if any(_is_lazy(value) for value in many.values()):
        return repeated
    if 0 in lengths.values():
        raise ValueError(f"`{next(iter(lengths))}` is empty; a batch needs at least one prompt.")
    return list(repeated)


def of_fitting_sizes(prompts: Iterator[dict], made: Collection[str], options: dict) -> Iterator[dict]:
    """The prompts, each without a canvas checked when it is read; of canvases others may come that have a use for a
    size. The arguments are those of `check_prompts`."""
    for prompt in prompts:
        if prompt.get("canvas") is None:
            check_sizes(made, options)
        yield prompt


def check_prompts(prompts: list[dict], made: Collection[str], options: dict) -> None:
    """Raises ValueError for a size among the call's `options` that is of nothing that is made.

    Args:
        made: What is made of a prompt without a canvas, or may be.
    """
    check_sizes({kind for prompt in prompts for kind in _made_of(prompt.get("canvas"), made)}, options)


def check_sizes(made: Collection[str], options: dict) -> None:
    """Raises ValueError for a size of what is not among `made`."""
    for kind, names in SIZES.items():
        idle = [name for name in names if options.get(name) is not None and whole(options[name], 0) != 0]
        if idle and kind not in made:
            raise ValueError(
                f"Got {', '.join(idle)} where {' and '.join(sorted(made))} is made, and it does nothing; need it "
                f"where {kind}s are made; leave it out, or ask for {kind!r} too."
            )


def whole(value, least: int) -> int | None:
    """`value`, of Python or NumPy, as an int; None if it is no whole number or below `least`."""
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        return None
    return None if number is None or number < least else number


def whole_number(name: str, value, least: int = 1) -> int:
    """`value` as an int. Raises ValueError, which names the argument `name`."""
    number = whole(value, least)
    if number is None or number >= 2**63:
        most = "" if number is None else ", below 2**63"
        raise ValueError(f"`{name}` is {value!r:.80}; it must be a whole number, {least} or more{most}.")
    return number


def first_seed(seed: int | None) -> int:
    """`seed`, or one at random for None. Raises ValueError for what is no seed."""
    return int(torch.randint(2**31, ()).item()) if seed is None else whole_number("seed", seed, least=0)


def messages_of(conversation: Any) -> Any:
    """The messages of transformers' Chat; whatever else stands for them, as it is.

    Raises:
        ValueError: a message alone.
    """
    if isinstance(conversation, dict):
        raise ValueError(
            f"Got the message {str(conversation)[:60]} alone in place of a conversation; need a list of messages, "
            "dicts with 'role' and 'content'; put it into a list."
        )
    return getattr(conversation, "messages", conversation)


def _made_of(canvas: Any, made: Collection[str]) -> Collection[str]:
    """The kinds of a canvas's parts; `made` where there is none, or one that is refused when it is drawn."""
    parts = [canvas] if isinstance(canvas, dict) else canvas
    if not isinstance(parts, list | tuple) or not all(isinstance(part, dict) for part in parts):
        return made
    kinds = [part.get("type") for part in parts]
    return kinds if all(kind in list(SIZES) for kind in kinds) else made


def _is_list_of(field: str, value) -> bool:
    """Messages, by their role, or parts of one, by their type."""
    are_dicts = isinstance(value, list | tuple) and bool(value) and all(isinstance(one, dict) for one in value)
    return are_dicts and field in value[0]


def _is_batch(value, dimensions: int) -> bool:
    is_stack = isinstance(value, np.ndarray | torch.Tensor) and value.ndim == dimensions
    return is_stack or isinstance(value, list | tuple)


def _is_lazy(value) -> bool:
    """A data set, a generator: neither one value nor a batch that is there already."""
    is_there = isinstance(
        value, str | bytes | bytearray | dict | list | tuple | np.ndarray | np.generic | torch.Tensor
    )
    return not is_there and (hasattr(value, "__iter__") or hasattr(value, "__getitem__"))


def _zipped(fixed: dict, many: dict[str, Any], generate: Any) -> Iterator[dict]:
    """Prompts of one value from each of `many` and all that is `fixed`."""
    if not many:
        yield _prompt(fixed, generate)
        return
    # The data sets of PyTorch have a length, and no end that iteration would see.
    columns = [v if hasattr(v, "__iter__") else (v[i] for i in range(len(v))) for v in many.values()]
    end = object()
    for row in zip_longest(*columns, fillvalue=end):
        if ended := [name for name, value in zip(many, row, strict=True) if value is end]:
            raise ValueError(f"`{ended[0]}` ended before the other conditions; need as many of one as of the others.")
        yield _prompt(fixed | dict(zip(many, row, strict=True)), generate)


def _prompt(prompt: dict, generate: Any) -> dict:
    """One prompt, whose `text` may be a whole one."""
    text = prompt["text"]
    if isinstance(text, list | tuple) or hasattr(text, "messages"):
        text = {"messages": text}
    if isinstance(text, dict):
        if unknown := sorted(set(text) - set(CONDITIONS)):
            raise ValueError(
                f"Got a prompt with {', '.join(map(repr, unknown))}; need some of {', '.join(CONDITIONS)}; rename or "
                "drop the others, or pass one column as text=, images=, class_ids=, messages= or canvas=."
            )
        prompt = prompt | {"text": None} | text
    prompt = prompt | {"messages": messages_of(prompt["messages"])}
    if prompt.get("canvas") is not None and generate is not None:
        raise ValueError(
            f"Got generate={generate!r} and a canvas, whose parts say what is made; need one of the two; leave "
            '`generate` out, and put {"type": "image"} or {"type": "text"} into the canvas for a part that is all to '
            "be made."
        )
    if prompt["messages"] is not None and any(prompt[name] is not None for name in CONDITIONS[:3]):
        raise ValueError(
            "Got `messages` together with `text`, `images` or `class_ids`; put the conditions into the messages as "
            "content parts, or leave `messages` out."
        )
    return prompt
