"""The only file that knows kernel packages: mamba-ssm's Triton SSD, and Triton kernels for what stands around it.

None is needed. A call takes a kernel if its tensors are on a CUDA device, in fp32, bf16 or fp16, and the package can
be imported; `ssd_chunks.py` and `fused_scan.py` have the same in plain PyTorch. `MDM_FORCE_TORCH=1` in the environment
turns all kernels off.

Symbols
    b, l, k, c     batch, length, scan directions, channels; w taps of the convolution
    i, p           step of a direction and position in the sequence, p = order[b, i, k] and i = rank[b, p, k]
"""

import functools
import importlib
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from .custom_ops import namespace_of


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


logger = logging.get_logger(__name__)

FORWARD_ARGUMENTS = {"x", "dt", "A", "B", "C", "chunk_size", "D", "initial_states"}
BACKWARD_ARGUMENTS = FORWARD_ARGUMENTS | {"dout", "out", "dfinal_states"}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMESPACE = namespace_of(__name__)


def takes_kernels(x: Tensor) -> bool:
    """Whether calls on `x` may go to Triton kernels at all."""
    is_forced_off = os.environ.get("MDM_FORCE_TORCH", "").lower() not in ("", "0", "false", "no", "off")
    return x.is_cuda and x.dtype in KERNEL_DTYPES and triton is not None and not is_forced_off


class SSDKernel(NamedTuple):
    """mamba-ssm's fused SSD, both passes apart: inside a custom op autograd would not put them together."""

    forward_function: Callable
    backward_function: Callable

    def forward(self, x, dt, A, B, C, D, initial_states, chunk_size: int) -> tuple[Tensor, Tensor]:
        """y and the final state."""
        y, *_, final_state = self.forward_function(
            x=x, dt=dt, A=A, B=B, C=C, D=D, initial_states=initial_states, chunk_size=chunk_size
        )
        return y, final_state

    def backward(self, dy, d_state, x, dt, A, B, C, D, initial_states, chunk_size: int) -> tuple:
        """Gradients of x, dt, A, B, C, D and of the state before the first step."""
        # Where there is no gate, no more is asked of `out` than its shape.
        arguments = {"dout": dy, "out": dy, "dfinal_states": d_state, "initial_states": initial_states}
        dx, ddt, dA, dB, dC, dD, _, _, d_initial, *_ = self.backward_function(
            x=x, dt=dt, A=A, B=B, C=C, D=D, chunk_size=chunk_size, **arguments
        )
        return dx, ddt, dA, dB, dC, torch.zeros_like(dA) if D is None else dD.to(dA.dtype), d_initial


def find_ssd_kernel(x: Tensor) -> SSDKernel | None:
    """mamba-ssm's kernel, if a call on `x` can go to it."""
    return mamba_ssd() if takes_kernels(x) else None


@functools.cache
def mamba_ssd() -> SSDKernel | None:
    """mamba-ssm's fused SSD, or None, with a warning that says why. Known by its arguments: versions do not tell."""
    try:
        if importlib.util.find_spec("mamba_ssm") is None:
            logger.warning(
                "mamba-ssm is not installed: the SSD on the GPU runs in plain PyTorch. See docs/performance.md."
            )
            return None
        module = _import_ssd_combined()
        kernel = SSDKernel(module._mamba_chunk_scan_combined_fwd, module._mamba_chunk_scan_combined_bwd)
        needed = zip(kernel, (FORWARD_ARGUMENTS, BACKWARD_ARGUMENTS), strict=True)
        missing = set().union(*(names - set(inspect.signature(function).parameters) for function, names in needed))
    except Exception as error:  # whatever an installation that does not fit this machine raises
        reason = f"{type(error).__name__}: {error}"
        logger.warning(f"mamba-ssm is installed, but cannot be used ({reason}): the SSD on the GPU runs in PyTorch.")
        return None
    if missing:
        logger.warning(f"mamba-ssm's SSD lacks {sorted(missing)}: it is not used; install a version that has them.")
        return None
    logger.warning("mamba-ssm's Triton kernels tune themselves in the first call of each shape; that takes a minute.")
    return kernel


def _import_ssd_combined() -> types.ModuleType:
    """Also out of a wheel without compiled extensions, whose `__init__` asks for one that the SSD does not need."""
    name = "mamba_ssm.ops.triton.ssd_combined"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if "selective_scan_cuda" not in str(error):
            raise
    spec = importlib.util.find_spec("mamba_ssm")
    bare = types.ModuleType("mamba_ssm")
    bare.__spec__, bare.__path__ = spec, list(spec.submodule_search_locations)
    sys.modules["mamba_ssm"] = bare
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules["mamba_ssm"]  # the next `import mamba_ssm` says what is missing, as it did before


if triton is not None:

    @triton.jit
    def _load_before(
        x, order, history, b, k, i, c, l, channels, K, x_row, x_step, j, W: tl.constexpr, HAS: tl.constexpr
    ):
        """What tap j meets at the steps i: x in scan order, the history before it, zero before that: (i, c)."""
        step = i - (W - 1 - j)
        is_inside, is_channel = (step >= 0) & (i < l), c < channels
        p = tl.load(order + (b * l + step) * K + k, mask=is_inside, other=0)
        at = x + b * x_row + p[:, None] * x_step + c[None, :]
        value = tl.load(at, mask=is_inside[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
        if HAS:
            at = history + ((b * (W - 1) + step + W - 1) * K + k)[:, None] * channels + c[None, :]
            is_before = (step < 0) & (i < l)
            value += tl.load(at, mask=is_before[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
        return value

    @triton.jit
    def _scan_conv_kernel(
        x, order, weight, bias, history, y, l, channels, K, x_row, x_step,
        W: tl.constexpr, HAS: tl.constexpr, L: tl.constexpr, C: tl.constexpr,
    ):  # fmt: skip
        b, k = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
        i, c = tl.program_id(1) * L + tl.arange(0, L), tl.program_id(2) * C + tl.arange(0, C)
        is_channel = c < channels
        total = tl.zeros((L, C), tl.float32) + tl.load(bias + k * channels + c, mask=is_channel, other=0.0)[None, :]
        for j in tl.static_range(W):
            tap = tl.load(weight + (k * channels + c) * W + j, mask=is_channel, other=0.0).to(tl.float32)
            total += tap[None, :] * _load_before(
                x, order, history, b, k, i, c, l, channels, K, x_row, x_step, j, W, HAS
            )
        at = y + ((b * l + i) * K + k)[:, None] * channels + c[None, :]
        tl.store(at, total * tl.sigmoid(total), mask=(i < l)[:, None] & is_channel[None, :])

    @triton.jit
    def _scan_conv_backward_kernel(
        dy, x, order, weight, bias, history, d_total, sums, l, channels, K, x_row, x_step,
        W: tl.constexpr, HAS: tl.constexpr, L: tl.constexpr, C: tl.constexpr,
    ):  # fmt: skip
        """The gradient before SiLU, and this program's share of the gradients of taps and bias."""
        b, k = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
        i, c = tl.program_id(1) * L + tl.arange(0, L), tl.program_id(2) * C + tl.arange(0, C)
        is_channel = c < channels
        total = tl.zeros((L, C), tl.float32) + tl.load(bias + k * channels + c, mask=is_channel, other=0.0)[None, :]
        for j in tl.static_range(W):
            tap = tl.load(weight + (k * channels + c) * W + j, mask=is_channel, other=0.0).to(tl.float32)
            total += tap[None, :] * _load_before(
                x, order, history, b, k, i, c, l, channels, K, x_row, x_step, j, W, HAS
            )
        offset = ((b * l + i) * K + k)[:, None] * channels + c[None, :]
        is_real = (i < l)[:, None] & is_channel[None, :]
        gate = tl.sigmoid(total)
        d = tl.load(dy + offset, mask=is_real, other=0.0).to(tl.float32) * gate * (1 + total * (1 - gate))
        tl.store(d_total + offset, d, mask=is_real)
        share = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (W + 1)
        for j in tl.static_range(W):
            value = _load_before(x, order, history, b, k, i, c, l, channels, K, x_row, x_step, j, W, HAS)
            tl.store(sums + (share + j) * channels + c, tl.sum(d * value, axis=0), mask=is_channel)
        tl.store(sums + (share + W) * channels + c, tl.sum(d, axis=0), mask=is_channel)

    @triton.jit
    def _scan_conv_dx_kernel(
        d_total, rank, weight, dx, l, channels, K, W: tl.constexpr, L: tl.constexpr, C: tl.constexpr
    ):
        """dx of a position: from every direction and every tap that read it."""
        b = tl.program_id(0).to(tl.int64)
        p, c = tl.program_id(1) * L + tl.arange(0, L), tl.program_id(2) * C + tl.arange(0, C)
        is_position, is_channel = p < l, c < channels
        total = tl.zeros((L, C), tl.float32)
        for k in range(K):
            i = tl.load(rank + (b * l + p) * K + k, mask=is_position, other=0)
            for j in tl.static_range(W):
                tap = tl.load(weight + (k * channels + c) * W + j, mask=is_channel, other=0.0).to(tl.float32)
                step = i + (W - 1 - j)
                at = d_total + ((b * l + step) * K + k)[:, None] * channels + c[None, :]
                is_real = (is_position & (step < l))[:, None] & is_channel[None, :]
                total += tap[None, :] * tl.load(at, mask=is_real, other=0.0).to(tl.float32)
        tl.store(
            dx + (b * l + p)[:, None] * channels + c[None, :], total, mask=is_position[:, None] & is_channel[None, :]
        )

    @triton.jit
    def _merge_gate_norm_kernel(y, rank, z, weight, out, l, channels, K, z_row, z_step, eps, C: tl.constexpr):
        """One position: its outputs in all directions, summed, gated, normalised."""
        at = tl.program_id(0).to(tl.int64)
        b, p = at // l, at % l
        c = tl.arange(0, C)
        is_channel = c < channels
        merged = tl.zeros((C,), tl.float32)
        for k in range(K):
            i = tl.load(rank + at * K + k)
            merged += tl.load(y + ((b * l + i) * K + k) * channels + c, mask=is_channel, other=0.0).to(tl.float32)
        gate = tl.load(z + b * z_row + p * z_step + c, mask=is_channel, other=0.0).to(tl.float32)
        value = merged * gate * tl.sigmoid(gate)
        scale = tl.rsqrt(tl.sum(value * value, axis=0) / channels + eps)
        value *= scale * tl.load(weight + c, mask=is_channel, other=0.0).to(tl.float32)
        tl.store(out + at * channels + c, value, mask=is_channel)

    @triton.jit
    def _merge_gate_norm_backward_kernel(
        d_out, y, rank, z, weight, dy, dz, d_weight, l, positions, channels, K, z_row, z_step, eps,
        ROWS: tl.constexpr, C: tl.constexpr,
    ):  # fmt: skip
        """ROWS positions one after the other; this program's share of the gradient of `weight`."""
        c = tl.arange(0, C)
        is_channel = c < channels
        w = tl.load(weight + c, mask=is_channel, other=0.0).to(tl.float32)
        share = tl.zeros((C,), tl.float32)
        for row in range(ROWS):
            at = tl.program_id(0).to(tl.int64) * ROWS + row
            if at < positions:
                b, p = at // l, at % l
                merged = tl.zeros((C,), tl.float32)
                for k in range(K):
                    i = tl.load(rank + at * K + k)
                    from_step = y + ((b * l + i) * K + k) * channels + c
                    merged += tl.load(from_step, mask=is_channel, other=0.0).to(tl.float32)
                gate = tl.load(z + b * z_row + p * z_step + c, mask=is_channel, other=0.0).to(tl.float32)
                sigmoid = tl.sigmoid(gate)
                value = merged * gate * sigmoid
                scale = tl.rsqrt(tl.sum(value * value, axis=0) / channels + eps)
                d = tl.load(d_out + at * channels + c, mask=is_channel, other=0.0).to(tl.float32)
                share += d * value * scale
                d *= w
                d_value = scale * (d - value * (scale * scale * tl.sum(d * value, axis=0) / channels))
                d_gate = d_value * merged * sigmoid * (1 + gate * (1 - sigmoid))
                tl.store(dz + at * channels + c, d_gate, mask=is_channel)
                d_merged = d_value * gate * sigmoid
                for k in range(K):
                    i = tl.load(rank + at * K + k)
                    tl.store(dy + ((b * l + i) * K + k) * channels + c, d_merged, mask=is_channel)
        tl.store(d_weight + tl.program_id(0) * channels + c, share, mask=is_channel)


def on_its_device(launch: Callable) -> Callable:
    """Launches kernels on the device of the first argument: Triton takes the current one, a custom op leaves it."""

    @functools.wraps(launch)
    def wrapped(*args, **kwargs):
        with torch.cuda.device_of(next(iter((*args, *kwargs.values())))):
            return launch(*args, **kwargs)

    return wrapped


BLOCK_STEPS, BLOCK_CHANNELS, BLOCK_ROWS = 32, 64, 16


def _strides(x: Tensor) -> tuple[Tensor, int, int]:
    """`x` (b, l, c) with its channels side by side, and its strides per row and per step."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1)


def _conv_grid(rows: int, steps: int, channels: int) -> tuple[int, int, int]:
    """Rows first: a CUDA grid holds 2^31 - 1 blocks that way, and 65,535 each of the other two."""
    return rows, triton.cdiv(steps, BLOCK_STEPS), triton.cdiv(channels, BLOCK_CHANNELS)


@torch.library.custom_op(f"{NAMESPACE}::scan_conv", mutates_args=())
@on_its_device
def scan_conv_kernel(
    x: Tensor, order: Tensor, rank: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None
) -> Tensor:
    """silu(causal_conv(scan(x))): x (b, l, c), order and rank (b, l, k), weight (k, c, w), bias (k, c), history
    (b, w - 1, k, c) -> (b, l, k, c). Sums in fp32."""
    (b, l, K), channels, W = order.shape, x.shape[-1], weight.shape[-1]
    x, row, step = _strides(x)
    y = x.new_empty(b, l, K, channels)
    tail = x if history is None else history.contiguous()
    _scan_conv_kernel[_conv_grid(b * K, l, channels)](
        x, order.contiguous(), weight.contiguous(), bias.contiguous(), tail, y, l, channels, K, row, step,
        W=W, HAS=history is not None, L=BLOCK_STEPS, C=BLOCK_CHANNELS,
    )  # fmt: skip
    return y


@scan_conv_kernel.register_fake
def _(x, order, rank, weight, bias, history):
    return x.new_empty(*order.shape, x.shape[-1])


@torch.library.custom_op(f"{NAMESPACE}::scan_conv_backward", mutates_args=())
@on_its_device
def scan_conv_backward(
    dy: Tensor, x: Tensor, order: Tensor, rank: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, l, K), channels, W = order.shape, x.shape[-1], weight.shape[-1]
    x, row, step = _strides(x)
    order, rank, weight, bias = (value.contiguous() for value in (order, rank, weight, bias))
    tail = x if history is None else history.contiguous()
    d_total = x.new_empty(b, l, K, channels)
    grid = _conv_grid(b * K, l, channels)
    sums = x.new_empty(b, K, grid[1], W + 1, channels, dtype=torch.float32)
    _scan_conv_backward_kernel[grid](
        dy.contiguous(), x, order, weight, bias, tail, d_total, sums, l, channels, K, row, step,
        W=W, HAS=history is not None, L=BLOCK_STEPS, C=BLOCK_CHANNELS,
    )  # fmt: skip
    dx = x.new_empty(b, l, channels)
    _scan_conv_dx_kernel[_conv_grid(b, l, channels)](
        d_total, rank, weight, dx, l, channels, K, W=W, L=BLOCK_STEPS, C=BLOCK_CHANNELS
    )
    sums = sums.sum((0, 2))  # (k, w + 1, c)
    d_history = x.new_zeros(0 if history is None else history.shape, dtype=torch.float32)
    for before in range(W - 1) if history is not None else ():
        for j in range(max(0, before - l + 1), before + 1):  # meets tap j in step before - j
            d_history[:, before] += weight[..., j].float() * d_total[:, before - j].float()
    return dx, sums[:, :W].transpose(1, 2).contiguous(), sums[:, W].clone(), d_history


@scan_conv_backward.register_fake
def _(dy, x, order, rank, weight, bias, history):
    sums = {"dtype": torch.float32}
    d_history = x.new_empty(0 if history is None else history.shape, **sums)
    return x.new_empty(x.shape), x.new_empty(weight.shape, **sums), x.new_empty(bias.shape, **sums), d_history


def _keep_for_scan_conv(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate_scan_conv(ctx, dy):
    x, order, rank, weight, bias, history = ctx.saved_tensors
    dx, d_weight, d_bias, d_history = scan_conv_backward(dy, x, order, rank, weight, bias, history)
    d_history = None if history is None else d_history.to(history.dtype)
    return dx, None, None, d_weight.to(weight.dtype), d_bias.to(bias.dtype), d_history


@torch.library.custom_op(f"{NAMESPACE}::merge_gate_norm", mutates_args=())
@on_its_device
def merge_gate_norm_kernel(y: Tensor, rank: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm(unscan(y) * silu(z)) * weight: y (b, l, k, c), rank (b, l, k), z (b, l, c), weight (c) -> (b, l, c).
    Sums in fp32."""
    b, l, K, channels = y.shape
    z, row, step = _strides(z)
    out = z.new_empty(b, l, channels)
    _merge_gate_norm_kernel[(b * l,)](
        y.contiguous(), rank.contiguous(), z, weight, out, l, channels, K, row, step, eps,
        C=triton.next_power_of_2(channels),
    )  # fmt: skip
    return out


@merge_gate_norm_kernel.register_fake
def _(y, rank, z, weight, eps):
    return z.new_empty(z.shape)


@torch.library.custom_op(f"{NAMESPACE}::merge_gate_norm_backward", mutates_args=())
@on_its_device
def merge_gate_norm_backward(
    d_out: Tensor, y: Tensor, rank: Tensor, z: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    b, l, K, channels = y.shape
    z, row, step = _strides(z)
    programs = triton.cdiv(b * l, BLOCK_ROWS)
    dy, dz = y.new_empty(y.shape), z.new_empty(b, l, channels)
    d_weight = z.new_empty(programs, channels, dtype=torch.float32)
    _merge_gate_norm_backward_kernel[(programs,)](
        d_out.contiguous(), y.contiguous(), rank.contiguous(), z, weight, dy, dz, d_weight,
        l, b * l, channels, K, row, step, eps, ROWS=BLOCK_ROWS, C=triton.next_power_of_2(channels),
    )  # fmt: skip
    return dy, dz, d_weight.sum(0)


@merge_gate_norm_backward.register_fake
def _(d_out, y, rank, z, weight, eps):
    return y.new_empty(y.shape), z.new_empty(z.shape), z.new_empty(weight.shape, dtype=torch.float32)


def _keep_for_merge(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_merge(ctx, d_out):
    y, rank, z, weight = ctx.saved_tensors
    dy, dz, d_weight = merge_gate_norm_backward(d_out, y, rank, z, weight, ctx.eps)
    return dy, None, dz, d_weight.to(weight.dtype), None


scan_conv_kernel.register_autograd(_differentiate_scan_conv, setup_context=_keep_for_scan_conv)
merge_gate_norm_kernel.register_autograd(_differentiate_merge, setup_context=_keep_for_merge)
