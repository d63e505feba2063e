"""The depthwise causal convolution in front of the selective scan (paper Sec. 4.2.1, item 2).

Symbols
    x, y       input and output                        (b, l, c)
    weight     one filter of w taps per channel        (c, w)
    tile       rows and steps worked on at a time
"""

import torch
from torch import Tensor

from .custom_ops import namespace_of, refuse_second_derivative, refuse_tangents


# Elements of a (b, l, c) tensor worked on at a time; on a CPU per thread, few enough to stay in its cache.
TILE_ELEMENTS_CPU, TILE_ELEMENTS = 1 << 17, 1 << 24
NAMESPACE = namespace_of(__name__)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, history: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution y_t = bias + sum_j weight_j x_{t-w+1+j}, as w shifted multiply-adds.

    Args:
        x: (b, l, c).
        weight: One filter per channel (c, w); the last tap meets the current step, as in `torch.nn.Conv1d`.
        bias: (c).
        history: The w - 1 steps before x (b, w - 1, c); zeros if None.

    Returns:
        y (b, l, c) in the dtype of x.

    Raises:
        ValueError: A shape does not fit the others.
        RuntimeError: A tensor carries a tangent of forward-mode differentiation.

    Examples:
        >>> causal_conv(torch.tensor([[[1.0], [2.0], [3.0]]]), weight=torch.tensor([[0.5, 1.0]])).flatten()
        tensor([1.0000, 2.5000, 4.0000])
    """
    refuse_tangents("causal_conv", x, weight, bias, history)
    if x.dim() != 3:
        raise ValueError(f"`x` has shape {tuple(x.shape)}; causal_conv needs (b, l, c): flatten the channels.")
    if x.numel() == 0:
        raise ValueError(f"`x` has shape {tuple(x.shape)}; causal_conv needs at least one element: skip the call.")
    b, l, c = x.shape
    if weight.dim() != 2 or weight.shape[0] != c or weight.shape[1] == 0:
        raise ValueError(f"`weight` has shape {tuple(weight.shape)}; `x` {tuple(x.shape)} needs ({c}, w): reshape it.")
    w = weight.shape[1]
    for name, value, shape in (("bias", bias, (c,)), ("history", history, (b, w - 1, c))):
        if value is not None and value.shape != shape:
            raise ValueError(
                f"`{name}` has shape {tuple(value.shape)}; `x` {tuple(x.shape)} and `weight` {tuple(weight.shape)} "
                f"need {shape}: reshape `{name}`."
            )
    return conv_forward(x, weight, bias, history)


def tiles_of(x: Tensor) -> list[tuple[slice, int, int]]:
    """Rows and steps from, to: few enough to stay in the cache of a CPU."""
    b, l, c = x.shape
    elements = TILE_ELEMENTS_CPU * torch.get_num_threads() if x.device.type == "cpu" else TILE_ELEMENTS
    size = max(1, elements // c)
    rows, steps = max(1, size // l), min(size, l)
    return [(slice(i, min(i + rows, b)), s, min(s + steps, l)) for i in range(0, b, rows) for s in range(0, l, steps)]


@torch.library.custom_op(f"{NAMESPACE}::conv_forward", mutates_args=())
def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None) -> Tensor:
    dtype, work, l = x.dtype, torch.promote_types(x.dtype, torch.float32), x.shape[1]
    x, taps = x.to(work), weight.to(work).T.flip(0).contiguous()  # taps[j] meets step t - j: (w, c)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows, start, end in tiles_of(x):
        tile = y[rows, start:end]
        if bias is None:
            torch.mul(x[rows, start:end], taps[0], out=tile)
        else:
            torch.addcmul(bias.to(work), x[rows, start:end], taps[0], out=tile)
        for j in range(1, len(taps)):
            first = min(max(start, j), end)
            tile[:, first - start :].addcmul_(x[rows, first - j : end - j], taps[j])
    for j in range(1, len(taps)) if history is not None else ():
        reached = min(j, l)
        y[:, :reached].addcmul_(history[:, -j:][:, :reached].to(work), taps[j])
    return y.to(dtype)


@conv_forward.register_fake
def _(x, weight, bias, history):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::conv_backward", mutates_args=())
def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, history: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    dy, x, taps = dy.to(work), x.to(work), weight.to(work).T.flip(0).contiguous()
    (l, c), w = x.shape[1:], len(taps)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    tiles = tiles_of(x)
    sums = x.new_zeros(w + 1, tiles[0][0].stop, tiles[0][2], c)  # for each tap, and for the bias
    for rows, start, end in tiles:
        tile, dy_tile = dx[rows, start:end], dy[rows, start:end]
        sum_tile = sums[:, : tile.shape[0], : end - start]
        torch.mul(dy_tile, taps[0], out=tile)
        sum_tile[w].add_(dy_tile)
        sum_tile[0].addcmul_(dy_tile, x[rows, start:end])
        for j in range(1, w):
            last = max(min(end, l - j), start)
            tile[:, : last - start].addcmul_(dy[rows, start + j : last + j], taps[j])
            first = min(max(start, j), end)
            sum_tile[j, :, first - start :].addcmul_(dy_tile[:, first - start :], x[rows, first - j : end - j])
    sums = sums.sum((1, 2))
    d_history = x.new_zeros(0 if history is None else history.shape)
    for j in range(1, w) if history is not None else ():
        reached = min(j, l)
        d_history[:, w - 1 - j :][:, :reached].addcmul_(dy[:, :reached], taps[j])
        sums[j] += (dy[:, :reached] * history[:, -j:][:, :reached].to(work)).sum((0, 1))
    return dx.to(dtype), sums[:w].flip(0).T.contiguous(), sums[w].clone(), d_history


@conv_backward.register_fake
def _(dy, x, weight, history):
    work = torch.promote_types(x.dtype, torch.float32)
    d_weight = torch.empty_like(weight, dtype=work, memory_format=torch.contiguous_format)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    d_history = d_weight.new_empty(0 if history is None else history.shape)
    return dx, d_weight, d_weight.new_empty(weight.shape[0]), d_history


def keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def differentiate(ctx, dy):
    x, weight, bias, history = ctx.saved_tensors
    dx, d_weight, d_bias, d_history = conv_backward(dy, x, weight, history)
    d_bias = None if bias is None else d_bias.to(bias.dtype)
    d_history = None if history is None else d_history.to(history.dtype)
    return dx, d_weight.to(weight.dtype), d_bias, d_history


conv_forward.register_autograd(differentiate, setup_context=keep_for_backward)
conv_backward.register_autograd(refuse_second_derivative("causal_conv", instead="torch's conv1d"))
