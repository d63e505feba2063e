"""State space duality (SSD): the selective scan of Mamba-2 as matrix products (paper Eq. 10-13).

- `ssd_oracle` is the recurrence, step by step in float64: slow, independent, what `ssd` is judged by.
- `ssd` is the op the model calls: mamba-ssm's kernels where they can be had; else, in `ssd_chunks.py`, a masked matrix
  product within a chunk of the sequence and one state between chunks.

Symbols
    symbol      meaning                                        shape           paper
    x           input                                          (b, l, h, p)    z, Eq. 10
    dt          step size, >= 0                                (b, l, h)       Delta, Eq. 12-13
    A           decay rate, < 0, one per head                  (h)             A, Eq. 12
    B, C        what enters and what leaves the state          (b, l, g, n)    B, C, Eq. 10-11
    D           skip weight                                    (h)             D, Eq. 11
    H           state                                          (b, h, p, n)    H, Eq. 10
    y           output                                         (b, l, h, p)    z of the next position, Eq. 11
    b, l, h     batch, length, heads; p channels per head, n state channels per head
    g           groups; the heads of a group share B and C

H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T and y_t = H_t C_t + D x_t. Departs from the paper: the paper's Eq. 13 is the
zero-order hold, B-bar = (dt A)^-1 (exp(dt A) - 1) dt B; Mamba-2 and its kernels, on which the paper builds, use its
first-order (Euler) term B-bar = dt B. So do we: pretrained Mamba-2 weights and kernels stay usable, nothing is divided
by dt A (padding has dt = 0), and what is lost, a factor near 1 per head and step, dt and B can learn.
"""

import torch
from torch import Tensor

from .custom_ops import namespace_of, refuse_second_derivative, refuse_tangents
from .ssd_chunks import differentiate_in_chunks, scan_in_chunks
from .ssd_kernels import find_ssd_kernel


LONGEST_CHUNK_CPU, LONGEST_CHUNK = 64, 128
NAMESPACE = namespace_of(__name__)


def ssd_oracle(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence of Eq. 10-12 (B-bar = dt B, see above), one step at a time in float64.

    Args:
        x, dt, A, B, C, D, initial_states, return_final_states: As in `ssd`.

    Returns:
        As `ssd`, in float64.
    """
    x, dt, A, B, C = x.double(), dt.double().clamp(min=0), A.double(), B.double(), C.double()
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = (value.repeat_interleave(heads_per_group, dim=2) for value in (B, C))  # (b, l, h, n)
    b, l, h, p = x.shape
    H = x.new_zeros(b, h, p, B.shape[-1]) if initial_states is None else initial_states.double()
    outputs = []
    for t in range(l):
        decay = torch.exp(dt[:, t] * A)  # A-bar, Eq. 12: (b, h)
        H = decay[:, :, None, None] * H + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        outputs.append(torch.einsum("bhpn,bhn->bhp", H, C[:, t]))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.double()[:, None] * x
    return (y, H) if return_final_states else y


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan y_t = H_t C_t + D x_t, H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T (paper Eq. 10-13).

    Arithmetic is in fp32, or float64 if `x` is; gradients reach every tensor argument, also through the final state.
    Autocast does not touch it. It cannot be differentiated twice, nor in forward mode. NaN or infinity at a step also
    reaches the outputs of its chunk that come before it.

    Args:
        x: Input (b, l, h, p).
        dt: Step sizes (b, l, h). Below 0 it counts as 0, as in mamba-ssm, and where it is 0 the state stays as it is.
        A: Decay rates (h), negative.
        B: (b, l, g, n); h is a multiple of g and head i reads group i // (h / g).
        C: (b, l, g, n).
        chunk_size: The most steps in a chunk; changes the speed, not the result. None chooses, and a CPU takes at most
            64, whatever a checkpoint that was made for a GPU says.
        D: Skip weights (h).
        dt_bias: Added to dt (h).
        dt_softplus: Whether dt passes through softplus, after `dt_bias`.
        initial_states: State before the first step (b, h, p, n); zeros if None.
        return_final_states: Whether to return the state after the last step.

    Returns:
        y (b, l, h, p) in the dtype of x; with `return_final_states` also the state (b, h, p, n) in fp32 (float64 if
        `x` is).

    Raises:
        ValueError: A shape does not fit the others, or a dtype or a device.
        RuntimeError: A tensor carries a tangent of forward-mode differentiation.

    Examples:
        >>> x = dt = torch.ones(1, 4, 1)
        >>> B = C = torch.ones(1, 4, 1, 1)
        >>> ssd(x[..., None], dt, torch.tensor([0.5]).log(), B, C).flatten()  # each step halves the state and adds 1
        tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    check_ssd_inputs(x, dt, A, B, C, chunk_size, D, dt_bias, initial_states)
    refuse_tangents("ssd", x, dt, A, B, C, D, dt_bias, initial_states)
    work = torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(work)
    if dt_bias is not None:
        dt = dt + dt_bias.to(work)
    if dt_softplus:
        dt = torch.nn.functional.softplus(dt)
    else:
        dt = dt.clamp(min=0)
    tensors = (x, dt, A, B, C, D, initial_states)
    keep = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in tensors)
    y, final_state, _ = ssd_forward(*tensors, chunk_size, return_final_states, keep)
    return (y, final_state) if return_final_states else y


def check_ssd_inputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
) -> None:
    """Raise a ValueError that says got, need, do if a shape, a dtype or a device does not fit the others."""
    if x.dim() != 4:
        raise ValueError(f"`x` has shape {tuple(x.shape)}; ssd needs (b, l, h, p): split the channels into heads.")
    b, l, h, p = x.shape
    if x.numel() == 0:
        raise ValueError(f"`x` has shape {tuple(x.shape)}; ssd needs at least one element: skip the call.")
    if B.dim() != 4 or B.shape[:2] != x.shape[:2]:
        raise ValueError(f"`B` has shape {tuple(B.shape)}; `x` needs ({b}, {l}, g, n): add a group axis if g = 1.")
    g, n = B.shape[2:]
    if n == 0:
        raise ValueError(f"`B` has shape {tuple(B.shape)}; ssd needs at least one state channel: make n 1 or more.")
    if g == 0 or h % g:
        raise ValueError(f"`x` has {h} heads, not a multiple of the {g} groups of `B`; choose h divisible by g.")
    needed = {
        "x": (x, (b, l, h, p)),
        "B": (B, (b, l, g, n)),
        "dt": (dt, (b, l, h)),
        "A": (A, (h,)),
        "C": (C, (b, l, g, n)),
        "D": (D, (h,)),
        "dt_bias": (dt_bias, (h,)),
        "initial_states": (initial_states, (b, h, p, n)),
    }
    for name, (value, shape) in needed.items():
        if value is None:
            continue
        if value.shape != shape:
            raise ValueError(
                f"`{name}` has shape {tuple(value.shape)}; `x` {tuple(x.shape)} and `B` {tuple(B.shape)} need "
                f"{shape}: reshape `{name}`."
            )
        if not value.is_floating_point():
            raise ValueError(f"`{name}` is {value.dtype}; ssd needs floating point: pass `{name}.float()`.")
        if value.device != x.device:
            raise ValueError(f"`{name}` is on {value.device}, `x` on {x.device}; move `{name}` to the device of `x`.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` is {chunk_size}; ssd needs at least 1 step per chunk: pass None to choose.")


def chunks_of(x: Tensor, chunk_size: int | None) -> tuple[int, int]:
    """How many chunks, and the most steps in one: as equal as can be."""
    longest = LONGEST_CHUNK if chunk_size is None else chunk_size
    if x.device.type == "cpu":
        longest = min(longest, LONGEST_CHUNK_CPU)
    chunks = -(-x.shape[1] // longest)
    return chunks, -(-x.shape[1] // chunks)


def kernel_chunk(x: Tensor, chunk_size: int | None) -> int:
    """Steps in a chunk of the kernels, which compute whole chunks: the power of two that a short sequence fills."""
    length = max(16, 2 ** (x.shape[1] - 1).bit_length())
    return min(length, LONGEST_CHUNK if chunk_size is None else chunk_size)


# Which kernel runs is decided inside the ops: `torch.compile` could not look for one.


@torch.library.custom_op(f"{NAMESPACE}::ssd_forward", mutates_args=())
def ssd_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    chunk_size: int | None,
    need_final_state: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state if needed, and the states before each chunk if kept; what is not there is empty."""
    kernel, (_, steps) = find_ssd_kernel(x), chunks_of(x, chunk_size)
    tensors = (x, dt, A, B, C, D, initial_states)
    with torch.autocast(x.device.type, enabled=False):
        if kernel is None:
            y, final_state, states = scan_in_chunks(*tensors, steps, need_final_state, keep_states)
        else:
            y, final_state, states = *kernel.forward(*tensors, kernel_chunk(x, chunk_size)), None
    nothing = dt.new_empty(0)
    final_state = final_state if need_final_state else nothing
    return y.contiguous(), final_state, nothing.clone() if states is None else states


@ssd_forward.register_fake
def _(x, dt, A, B, C, D, initial_states, chunk_size, need_final_state, keep_states):
    b, _, h, p = x.shape
    n, chunks = B.shape[-1], chunks_of(x, chunk_size)[0]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final_state = dt.new_empty((b, h, p, n) if need_final_state else 0)
    has_states = keep_states and find_ssd_kernel(x) is None and (initial_states is not None or chunks > 1)
    return y, final_state, dt.new_empty((b * chunks, h, p, n) if has_states else 0)


@torch.library.custom_op(f"{NAMESPACE}::ssd_backward", mutates_args=())
def ssd_backward(
    dy: Tensor,
    d_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    states: Tensor,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernel, (chunks, steps) = find_ssd_kernel(x), chunks_of(x, chunk_size)
    tensors = (x, dt, A, B, C, D)
    with torch.autocast(x.device.type, enabled=False):
        if kernel is None:
            before = states if states.numel() else None
            if before is None and (initial_states is not None or chunks > 1):  # traced where no gradient was asked for
                *_, before = scan_in_chunks(*tensors, initial_states, steps, need_final_state=False, keep_states=True)
            *found, d_initial = differentiate_in_chunks(dy, d_state, *tensors, before, steps)
        else:
            *found, d_initial = kernel.backward(dy, d_state, *tensors, initial_states, kernel_chunk(x, chunk_size))
    dx, ddt, dA, dB, dC, dD = (value.contiguous() for value in found)
    return dx, ddt, dA, dB, dC, dD, dt.new_empty(0) if initial_states is None else d_initial


@ssd_backward.register_fake
def _(dy, d_state, x, dt, A, B, C, D, initial_states, states, chunk_size):
    dx, ddt, dB, dC = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt, B, C))
    dA, dD = dt.new_empty(A.shape), dt.new_empty(A.shape)
    return dx, ddt, dA, dB, dC, dD, dt.new_empty(0 if initial_states is None else initial_states.shape)


def keep_for_backward(ctx, inputs, output):
    *tensors, ctx.chunk_size, _, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def differentiate(ctx, dy, d_state, _):
    x, dt, A, B, C, D, initial_states, states = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, ddt, dA, dB, dC, dD, d_initial = ssd_backward(
        dy, d_state, x, dt, A, B, C, D, initial_states, states, ctx.chunk_size
    )
    dD = None if D is None else dD.to(D.dtype)
    d_initial = None if initial_states is None else d_initial.to(initial_states.dtype)
    return dx, ddt, dA.to(A.dtype), dB, dC, dD, d_initial, None, None, None


ssd_forward.register_autograd(differentiate, setup_context=keep_for_backward)
ssd_backward.register_autograd(refuse_second_derivative("ssd", instead="ssd_oracle"))
