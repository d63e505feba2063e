"""What tells the weights that act in a model from those of another: of adapters only those that are switched on."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # whole numbers of so many bytes


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits, alike on every device, of the sums of the bits of all weights that act, and of what PEFT
    scales its adapters by."""
    resting = {id(weight) for weight in _resting(model)}
    acting = [one.detach() for one in model.parameters() if id(one) not in resting and not one.is_meta]
    sums = [one.contiguous().view(WORDS[one.element_size()]).sum(dtype=torch.int64) for one in acting]
    scales = [module.scaling[name] for module in model.modules() for name in _active(module)]
    return hashlib.sha256(repr(([int(one) for one in sums], scales)).encode()).hexdigest()[:16]


def _active(layer: nn.Module) -> list[str]:
    """Names of the adapters that act in a layer of PEFT's; of any other module none."""
    if not hasattr(layer, "adapter_layer_names") or layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in getattr(layer, "scaling", {})]


def _resting(model: nn.Module) -> Iterator[Tensor]:
    """Weights of adapters that are there and switched off."""
    for layer in model.modules():
        for kind in getattr(layer, "adapter_layer_names", ()):
            for name, part in getattr(layer, kind).items():
                if name not in _active(layer):
                    yield from part.parameters() if isinstance(part, nn.Module) else [part]
