"""Options of a call of the processor, by name or in transformers' groups, and those that a row has no room for."""

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs

from .image_processing_mdm import REFUSED_IMAGE_OPTIONS, MDMImageProcessorKwargs, check_refused
from .prompts import whole


MOST_POSITIONS = 2**24  # of a row: as many as a picture of `max_pixels` may have
GROUPS = ("text_kwargs", "images_kwargs", "common_kwargs")
TEXT_OPTIONS = ("padding", "max_length", "return_tensors")
IMAGE_OPTIONS = (
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "max_pixels",
    "aspect_ratio_buckets",
)
# What other processors can do and a row of MDM cannot: what is needed instead, and what to do.
REFUSED = REFUSED_IMAGE_OPTIONS | {
    "truncation": "whole texts, as a cut row would lose its targets; shorten the text, or lower max_new_tokens",
    "padding_side": "padding on the right, which the model counts on; leave it out",
    "videos": "text, images or class_ids, as MDM knows no other modality; leave it out",
    "audio": "text, images or class_ids, as MDM knows no other modality; leave it out",
    "return_assistant_tokens_mask": "`target_mask` and `labels`, which say what is learnt; leave it out",
    "continue_final_message": "finished targets in a last assistant message; leave it out and name what to make with "
    "`generate`",
}
# What transformers has a name for: None or False asks for nothing.
NAMED = {"tools", "documents", *REFUSED, *TextKwargs.__annotations__, *MDMImageProcessorKwargs.__annotations__}


class MDMProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Options of a call, each by its name or in a group; see [`MDMProcessor.__call__`] for those that MDM knows."""

    _defaults = {"text_kwargs": {"padding": True}}  # type: ignore[misc]  # of transformers 5.17 not to be missing
    images_kwargs: MDMImageProcessorKwargs


def options_of(processor: ProcessorMixin, given: dict) -> tuple[dict, dict]:
    """Options of a call -> those of the rows (`TEXT_OPTIONS`) and those of the image processor."""
    grouped = [pair for group in GROUPS for pair in (given.get(group) or {}).items()]
    for name, value in [*grouped, *((k, v) for k, v in given.items() if k not in GROUPS)]:
        check_option(name, value)
    given = {name: value for name, value in given.items() if name in (*GROUPS, *TEXT_OPTIONS, *IMAGE_OPTIONS)}
    of_tokenizer = {k: v for k, v in processor.tokenizer.init_kwargs.items() if k in ("padding", "max_length")}
    try:
        merged = processor._merge_kwargs(MDMProcessorKwargs, tokenizer_init_kwargs=of_tokenizer, **given)
    except StrictDataclassError as error:
        raise ValueError(
            f"Got an option of the wrong type ({error}); need one that its name admits; see MDMProcessor.__call__."
        ) from error
    rows = {name: value for name, value in merged["text_kwargs"].items() if name in TEXT_OPTIONS}
    padding = rows["padding"]
    if padding not in (True, "longest", "max_length"):
        raise ValueError(
            f"Got padding={padding!r}; need True, 'longest' or 'max_length', as the rows of a batch are one "
            "tensor; leave it out for the longest."
        )
    if rows.get("max_length") is not None:
        positive("max_length", rows["max_length"])
    elif padding == "max_length":
        raise ValueError("Got padding='max_length' without max_length; need how long rows are to be; give both.")
    if rows.get("return_tensors") not in (None, "pt", "np"):
        raise ValueError(f"Got return_tensors={rows['return_tensors']!r}; need 'pt', 'np' or None for arrays.")
    images = {name: value for name, value in merged["images_kwargs"].items() if name in IMAGE_OPTIONS}
    return rows, images


def check_option(name: str, value: Any) -> None:
    """Raises ValueError for an option that a row has no room for, or that nobody knows by that name."""
    if name in (*TEXT_OPTIONS, *IMAGE_OPTIONS) or (name == "padding_side" and value == "right"):
        return
    check_refused(REFUSED, {name: value})
    if name not in NAMED or not (value is None or value is False):
        raise ValueError(
            f"Got the argument {name!r}, which neither the processor nor its chat template knows; need some of "
            f"generate, image_size, max_new_tokens, {', '.join((*TEXT_OPTIONS, *IMAGE_OPTIONS))}; check its spelling, "
            "leave it out, or pass a `chat_template` that uses it."
        )


def positive(name: str, value: Any) -> int:
    number = whole(value, 1)
    if number is None or number > MOST_POSITIONS:
        most = "" if number is None else f" and at most {MOST_POSITIONS}"
        raise ValueError(f"Got {name} {value!r:.60}; need a whole number of at least 1{most}.")
    return number
