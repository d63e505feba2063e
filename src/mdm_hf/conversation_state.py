"""What the model remembers of a conversation: the states of its blocks, of one size however much was read.

All conditions come before the target group in every direction and never see t (`sequence_layout.py`), so that reading
a conversation is one pass over each stretch of it, in the order in which the stretches come.

Rows without an image are read in the text directions alone. Whether an image will follow cannot be known, so the
conversation is read both ways: `unseen` as if there never were one, `seen` as if there were; which of the two counts
is settled when the state is used.
"""

import copy
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .configuration_mdm import MDMConfig
from .fingerprint import fingerprint
from .input_checks import check_inputs
from .modeling_mdm_block import MDMConditionCache
from .sequence_layout import image_of_each_row


FORMAT = "mdm-conversation-state"
PARTS = ("conv", "ssm")  # of a block's cache; with `condition_broadcast` also "condition"
# Of the configuration, what a state depends on beside the weights.
SIZES = (
    *("hidden_size", "num_hidden_layers", "state_size", "head_dim", "expand", "conv_kernel"),
    *("scan_sharing", "scan_directions", "condition_broadcast"),
)


@dataclass
class MDMConversationState:
    """The states of all blocks after what was read of a batch of conversations.

    Args:
        unseen, seen: A cache a block, as if no row had an image, and as if every row had one.
        has_image: (b,) bool, whether there was one.
        length: (b,) number of positions read.
        sizes: What of the model's configuration the states depend on.
        weights: The model's `fingerprint`.
    """

    unseen: list[MDMConditionCache]
    seen: list[MDMConditionCache]
    has_image: Tensor
    length: Tensor
    sizes: dict[str, Any]
    weights: str

    @classmethod
    def of(cls, model, unseen, seen, has_image: Tensor, length: Tensor) -> "MDMConversationState":
        """A state that keeps of `model` what another one has to have alike."""
        sizes = {name: getattr(model.config, name) for name in SIZES}
        return cls(unseen, seen, has_image, length, sizes, fingerprint(model))

    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(value.nbytes for value in self._tensors().values())

    def to(self, device: Any) -> "MDMConversationState":
        """The state on `device`."""
        unseen, seen = ([_moved(cache, device) for cache in caches] for caches in (self.unseen, self.seen))
        of_rows = self.has_image.to(device), self.length.to(device)
        return type(self)(unseen, seen, *of_rows, self.sizes, self.weights)

    def cache(self, has_image: Tensor) -> list[MDMConditionCache]:
        """Open caches of the rows, by whether they have an image now (b,)."""
        caches = []
        for unseen, seen in zip(self.unseen, self.seen, strict=True):
            cache = MDMConditionCache()
            for name, value in _tensors_of(seen).items():
                rows = has_image.view(-1, *[1] * (value.ndim - 1))
                setattr(cache, name, torch.where(rows, value, getattr(unseen, name)))
            caches.append(cache)
        return caches

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file, whole or not at all.

        Raises:
            ValueError: no folder for it, or none that may be written to.
        """
        facts = {"format": FORMAT, "sizes": json.dumps(self.sizes), "weights": self.weights}
        facts["contents"] = self._digest()
        tensors = {name: value.contiguous() for name, value in self._tensors().items()}
        try:
            with TemporaryDirectory(prefix=".unfinished-", dir=Path(path).parent) as aside:
                save_file(tensors, Path(aside) / "state", metadata=facts)
                os.replace(Path(aside) / "state", Path(path).resolve())
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise ValueError(
                f"Got {path} to save a conversation in, which cannot be written ({error}); need the name of a file in "
                "a folder that is there."
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike, device: Any = "cpu") -> "MDMConversationState":
        """What `save` wrote.

        Raises:
            ValueError: no such file, none of this format, or one that was changed since.
        """
        need = "need a file that MDMConversationState.save wrote, whole"
        try:
            with safe_open(os.fspath(path), "pt", device=str(device)) as file:
                facts, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, TypeError) as error:
            raise ValueError(f"Got {path}, which cannot be read ({error}); {need}.") from error
        if facts.get("format") != FORMAT:
            raise ValueError(f"Got {path}, a safetensors file of another kind; {need}.")
        try:
            sizes = json.loads(facts["sizes"])
            parts = [*PARTS, *(["condition"] if sizes["condition_broadcast"] else [])]
            unseen, seen = (
                [
                    MDMConditionCache(**{part: tensors.pop(f"{branch}.{layer}.{part}") for part in parts})
                    for layer in range(sizes["num_hidden_layers"])
                ]
                for branch in ("unseen", "seen")
            )
            state = cls(unseen, seen, tensors.pop("has_image"), tensors.pop("length"), sizes, facts["weights"])
            if tensors or set(sizes) != {*SIZES}:
                raise ValueError(f"unknown {', '.join(sorted({*tensors} | ({*sizes} ^ {*SIZES})))}")
            state._check_tensors()
            if facts["contents"] != state._digest():
                raise ValueError("tensors that are not those that were written")
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"Got {path}, a damaged conversation state ({error}); {need}.") from error
        return state

    def _check_tensors(self) -> None:
        """Raises ValueError for tensors of other shapes or kinds than the sizes ask for, and for NaN."""
        of, batch = self.sizes, len(self.has_image)
        inner, directions = of["expand"] * of["hidden_size"], self.unseen[0].conv.shape[2]
        wanted = {
            "conv": (batch, of["conv_kernel"] - 1, directions, inner + 2 * of["state_size"]),
            "ssm": (batch, directions * inner // of["head_dim"], of["head_dim"], of["state_size"]),
            "condition": (batch, of["hidden_size"]),
        }
        for name, value in self._tensors().items():
            is_state = name not in ("has_image", "length")
            if tuple(value.shape) != (wanted[name.rpartition(".")[2]] if is_state else (batch,)):
                raise ValueError(f"{name} of shape {tuple(value.shape)}")
            if is_state and not (value.is_floating_point() and bool(torch.isfinite(value).all())):
                raise ValueError(f"{name} that holds NaN, infinity or no floats")
        if self.has_image.dtype != torch.bool or self.length.dtype != torch.int64:
            raise ValueError(f"has_image of {self.has_image.dtype}, length of {self.length.dtype}")

    def check(self, model, batch: int, input_ids: Tensor | None = None) -> None:
        """Raises ValueError for a state of another model, or of another number of conversations, and for `input_ids`
        that do not go on from it."""
        remedy = "need that of the same model; read the conversation again with this one."
        for name, value in self.sizes.items():
            if value != getattr(model.config, name):
                raise ValueError(
                    f"Got the state of a model with {name} {value!r} for one with {getattr(model.config, name)!r}; "
                    f"{remedy}"
                )
        if self.weights != fingerprint(model):
            raise ValueError(
                "Got the state of a model with other weights (trained further, with other adapters switched on, or of "
                f"another dtype); {remedy}"
            )
        if len(self.has_image) != batch:
            raise ValueError(
                f"Got the state of {len(self.has_image)} conversation(s) for a batch of {batch}; need one a row; give "
                "as many rows as conversations."
            )
        if input_ids is not None and bool((input_ids == model.config.class_token_id).any()):
            raise ValueError(
                "Got a state and `input_ids` with a class token, which begins a conversation; need what goes on from "
                "the state; make them with is_continued=True."
            )

    def _digest(self) -> str:
        """Of every byte of its tensors, alike on every device."""
        told = hashlib.sha256()
        for name, value in sorted(self._tensors().items()):
            told.update(name.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return told.hexdigest()

    def _tensors(self) -> dict[str, Tensor]:
        found = {"has_image": self.has_image, "length": self.length}
        for branch in ("unseen", "seen"):
            for layer, cache in enumerate(getattr(self, branch)):
                found |= {f"{branch}.{layer}.{name}": value for name, value in _tensors_of(cache).items()}
        return found


def _tensors_of(cache: MDMConditionCache) -> dict[str, Tensor]:
    return {name: value for name, value in vars(cache).items() if isinstance(value, Tensor)}


def _moved(cache: MDMConditionCache, device: Any) -> MDMConditionCache:
    moved = copy.copy(cache)
    for name, value in _tensors_of(cache).items():
        setattr(moved, name, value.to(device))
    return moved


class MDMConversationMixin:
    """Gives the model `read_conversation`. Knows the model only through `self`."""

    config: MDMConfig
    model: Any
    new_condition_cache: Any

    @torch.no_grad()
    def read_conversation(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        class_ids: Tensor | None = None,
        *,
        state: MDMConversationState | None = None,
        image_latents: Tensor | None = None,
    ) -> MDMConversationState:
        """Reads conditions, such as a turn of a conversation that is over, into a state for `generate` to go on from.

        Args:
            input_ids, pixel_values, image_grid_hw, attention_mask, class_ids, image_latents: As in `forward`, without
                targets.
            state: What was read before, one conversation a row; it stays as it is. The first stretch begins with the
                class token, no other does.

        Returns:
            The state after both, of the same size.

        Raises:
            ValueError: inputs that do not fit together, a state of another model, a Transformer.
        """
        if self.config.backbone == "transformer":
            raise ValueError(
                "Got a model with backbone 'transformer', whose conditions all see each other and grow with what is "
                "read; need a state of fixed size, backbone 'mamba'; give such a model the whole conversation as "
                "messages."
            )
        fixed = image_grid_hw, attention_mask, None
        check_inputs(self.config, input_ids, pixel_values, *fixed, class_ids, image_latents=image_latents)
        layout = self.model.layout(input_ids.long(), *fixed)
        latents = self.model.encode(
            layout, layout.input_ids, self.model.known_images(layout, pixel_values, image_latents)
        ).mean.float()
        has_image, length = image_of_each_row(layout), (~layout.is_padding).sum(1)
        unseen, seen = self.new_condition_cache(), self.new_condition_cache()
        if state is not None:
            state.check(self, len(input_ids), input_ids)
            state = state.to(latents.device)
            has_image, length = has_image | state.has_image, length + state.length
            unseen, seen = (state.cache(torch.full_like(has_image, value)) for value in (False, True))
        for value, cache in ((False, unseen), (True, seen)):
            self.model.read_conditions(latents, layout, torch.full_like(has_image, value), class_ids, cache)
        return MDMConversationState.of(self, unseen, seen, has_image, length)
