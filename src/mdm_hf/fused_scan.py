"""What stands around the selective scan, each in one pass where kernels can (paper Fig. 2f-g, Sec. 4.2.1).

    scan_conv          read in every direction, convolve, SiLU
    merge_gate_norm    put back in place, sum over the directions, gate, normalise

On CUDA tensors both go to Triton kernels if those can be had; elsewhere they are the composition of plain PyTorch ops
that stands below.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .causal_conv import causal_conv
from .custom_ops import refuse_tangents
from .scan_switch import scan, unscan
from .ssd_kernels import merge_gate_norm_kernel, scan_conv_kernel, takes_kernels


def scan_conv(
    x: Tensor, order: Tensor, rank: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None = None
) -> Tensor:
    """silu(causal_conv(scan(x))), with filters of its own for each direction.

    Args:
        x: (b, l, c).
        order, rank: (b, l, k), see `scan_switch`.
        weight, bias: (k, c, w) and (k, c).
        history: The w - 1 steps before the first, in each direction (b, w - 1, k, c); zeros if None.

    Returns:
        (b, l, k, c) in the dtype of x.
    """
    refuse_tangents("scan_conv", x, weight, bias, history)
    if takes_kernels(x):
        return scan_conv_kernel(x, order, rank, weight, bias, history)
    read = scan(x, order, rank)
    history = None if history is None else history.flatten(2)
    convolved = causal_conv(read.flatten(2), weight.flatten(0, 1), bias.flatten(), history)
    return F.silu(convolved, inplace=not torch.is_grad_enabled()).view(read.shape)


def merge_gate_norm(y: Tensor, order: Tensor, rank: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm(unscan(y) * silu(z)) * weight, with the mean square and its root in fp32.

    Args:
        y: (b, l, k, c).
        order, rank: (b, l, k), see `scan_switch`.
        z: Gate (b, l, c).
        weight: (c).

    Returns:
        (b, l, c) in the dtype of z.
    """
    refuse_tangents("merge_gate_norm", y, z, weight)
    if takes_kernels(y):
        return merge_gate_norm_kernel(y, rank, z, weight, eps)
    gated = unscan(y, order, rank) * F.silu(z)
    return (F.rms_norm(gated.float(), gated.shape[-1:], eps=eps) * weight).to(z.dtype)
