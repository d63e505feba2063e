"""What all our custom ops share: names of their own, and what none of them can do.

`torch.compile` does not look into a custom op and autograd does not work inside one, so each has an op for its
backward and tells PyTorch which. A derivative that nobody wrote would be missing without a word: here it is refused.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def namespace_of(module: str) -> str:
    """Of the ops of a file, one per copy of it: one that came with weights from the Hub may be of another version."""
    return "".join(letter if letter.isalnum() else "_" for letter in module)


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raises a RuntimeError if one of `tensors` carries a tangent: forward-mode differentiation would lose it."""
    if torch.compiler.is_compiling():
        return
    if any(value is not None and forward_ad.unpack_dual(value).tangent is not None for value in tensors):
        raise RuntimeError(
            f"Got a tangent, of torch.func.jvp for instance, in {op}; it has a derivative for backward only: use "
            "torch.func.vjp or backward()."
        )


def refuse_second_derivative(op: str, instead: str):
    """A backward for the backward of `op` that says that there is none."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"Got a second derivative of {op}; its backward is written by hand and has none: differentiate {instead} "
            "instead."
        )

    return refuse
