"""The selective scan in chunks, as matrix products, forward and backward: what `ssd` runs wherever no kernel does.

Symbols, beside those of `ssd.py`
    symbol      meaning                                        shape
    H           state                                          (b, h, p, n)
    r           heads per group, h = g r
    c, q        chunks and steps per chunk
    m           chunks of all rows in one dimension, row by row, or those of a block
    s, t        the step that writes and the step that reads, s <= t
    a           log2 of the decay since the chunk's start, sum of dt A log2(e): (m, h, q), falling
    u           log2(dt_s) - a_s: (m, h, q)
    L           exp2(a_t + u_s), decay from s to t times dt_s: (m, h, q, q), lower triangular
    M           L * (C_t . B_s), y = M x inside a chunk: (m, h, q, q)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


LOG2_E = math.log2(math.e)  # powers of two throughout: exp2 is several times faster than exp on a CPU
LARGEST_A = -32.0  # below this log2 of a decay over a chunk, its rounding is made good
# Stands for dt = 0 where its logarithm is taken; where dt is below it, gradients of B are off by as much.
SMALLEST_DT = 1e-20
WITHOUT_FLOAT64 = ("mps",)  # devices: there the rounding of `a` cannot be made good
# Elements of an (m, h, q, q) tensor worked on at a time; on a CPU per thread, few enough to stay in its cache.
BLOCK_ELEMENTS_CPU, BLOCK_ELEMENTS = 3 << 16, 1 << 26


class Block(NamedTuple):
    """Some rows and chunks of a run: few enough to stay in the cache of a CPU, all of them elsewhere."""

    rows: slice
    chunks: slice
    m: slice  # the same in a dimension of rows x chunks


class Run:
    """Chunks of equal length, and what both passes derive from dt, A, B and C alone."""

    def __init__(self, start: int, c: int, q: int, dt: Tensor, A: Tensor, B: Tensor, C: Tensor):
        self.start, self.c, self.q = start, c, q
        self.g = B.shape[2]
        self.dt, self.B, self.C = (
            self.steps(v).to(dt.dtype).transpose(2, 3).flatten(0, 1).contiguous() for v in (dt, B, C)
        )  # (m, h, q), (m, g, q, n) twice
        # A step that forgets everything is cut to one that just does, or rounding in `a` would grow without bound.
        self.least = -1100 if dt.dtype == torch.float64 else -160
        self.rate = (self.dt * (A * LOG2_E)[:, None]).clamp_(min=self.least)  # log2 of A-bar, Eq. 12: (m, h, q)
        has_float64 = self.rate.device.type not in WITHOUT_FLOAT64
        exact = (self.rate.double() if has_float64 else self.rate).cumsum(-1)
        self.a = exact.to(dt.dtype)  # (m, h, q)
        self.positive_dt = self.dt.clamp(min=SMALLEST_DT)
        self.u = self.positive_dt.log2().sub_(self.a)  # (m, h, q)
        # What `a` loses to rounding, where after much decay it is large enough for that to show in a difference.
        # Off the CPU it always is: to look would wait for the device.
        is_rounded = exact.dtype != self.a.dtype
        is_needed = is_rounded and (self.a.device.type != "cpu" or self.a[..., -1].min().item() < LARGEST_A)
        self.lost = exact.sub_(self.a).to(dt.dtype) if is_needed else None  # (m, h, q)
        self.CB = torch.matmul(self.C, self.B.mT)  # C_t . B_s: (m, g, q, q)
        self.CB_diagonal = diagonal(self.CB).clone()  # (m, g, q)
        self.CB.tril_(-1)
        self.lower = dt.new_ones(q, q).tril_()

    def steps(self, value: Tensor) -> Tensor:
        """A view of the run's steps of (b, l, ...): (b, c, q, ...)."""
        return value[:, self.start : self.start + self.c * self.q].unflatten(1, (self.c, self.q))

    def by_group(self, value: Tensor) -> Tensor:
        """(m, h, ...) as (m, g, r, ...)."""
        return value.unflatten(1, (self.g, -1))

    def blocks(self) -> list[Block]:
        m, h, q = self.a.shape
        is_cpu = self.a.device.type == "cpu"
        elements = BLOCK_ELEMENTS_CPU * torch.get_num_threads() if is_cpu else BLOCK_ELEMENTS
        size = max(1, elements // (h * q * q))
        rows, chunks = max(1, size // self.c), min(size, self.c)
        blocks = []
        for i in range(0, m // self.c, rows):
            for j in range(0, self.c, chunks):
                i_end, j_end = min(i + rows, m // self.c), min(j + chunks, self.c)
                all_m = slice(i * self.c + j, (i_end - 1) * self.c + j_end)
                blocks.append(Block(slice(i, i_end), slice(j, j_end), all_m))
        return blocks

    def side_by_side(self, value: Tensor, factor: Tensor, block: Block, out: Tensor) -> Tensor:
        """x or dy of a block, (rows, c, q, h, p), times `factor` (m, g, r, q, 1): (m g, q, r p), in memory of `out`
        (m, g, q, r p). The heads of a group share B and C: side by side, one matrix product with these does for all.
        """
        shape = value.shape[:2]
        factor = factor[block.m].unflatten(0, shape).transpose(3, 4)
        product = out.view(*out.shape[:-1], -1, value.shape[-1]).unflatten(0, shape)
        torch.mul(value.unflatten(3, (self.g, -1)).transpose(2, 3), factor, out=product)
        return out.flatten(0, 1)

    def apart(self, value: Tensor, p: int) -> Tensor:
        """What stands side by side, (m g, q, r p), as (m, g, r, q, p)."""
        return value.view(-1, self.g, self.q, value.shape[-1] // p, p).transpose(2, 3)

    def M_diagonal(self, D: Tensor | None) -> Tensor:
        """dt_t C_t . B_t + D: (m, h, q)."""
        value = self.by_group(self.dt) * self.CB_diagonal.unsqueeze(2)
        return value.flatten(1, 2) if D is None else value.flatten(1, 2).add_(D[:, None])

    def decay(self) -> Tensor:
        """Decay over a whole chunk: (b, c, h, 1, 1)."""
        return torch.exp2(self.a[..., -1, None, None]).unflatten(0, (-1, self.c))

    def from_start(self) -> Tensor:
        """Decay from before the chunk's first step to t: (m, g, r, q, 1)."""
        return self.by_group(torch.exp2(self.a)).unsqueeze(-1)

    def to_end(self) -> Tensor:
        """dt_s times the decay from s to the chunk's end: (m, g, r, q, 1)."""
        to_come = before_each(self.rate.flip(-1)).flip(-1)
        return self.by_group(to_come.exp2_().mul_(self.positive_dt)).unsqueeze(-1)

    def inside(self, block: Block, out: Tensor) -> Tensor:
        """L of a block, written into `out` (m, h, q, q) but for its diagonal.

        Above the diagonal stands exp2(a_t) <= 1 in place of 0, so that no exponent of a decay is positive; CB, which
        is zero there, masks it, once per group instead of once per head. CB masks the diagonal too: it is filled in
        apart, exactly, however large |a| is.
        """
        a = self.a[block.m]
        if self.lost is None:
            torch.addcmul(a.unsqueeze(-1), self.u[block.m].unsqueeze(-2), self.lower, out=out)
            return out.exp2_()
        lost, log_dt = self.lost[block.m], self.positive_dt[block.m].log2()
        torch.addcmul(a.unsqueeze(-1), a.unsqueeze(-2), self.lower, value=-1, out=out)
        out.add_(lost.unsqueeze(-1)).addcmul_((log_dt - lost).unsqueeze(-2), self.lower)
        return out.exp2_()


def cut_into_runs(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> list[Run]:
    """Full chunks, then a shorter one if the length asks for it: nothing is padded."""
    full, rest = divmod(dt.shape[1], chunk_size)
    spans = [(0, full, chunk_size)] * (full > 0) + [(full * chunk_size, 1, rest)] * (rest > 0)
    return [Run(*span, dt, A.to(dt.dtype), B, C) for span in spans]


def diagonal(value: Tensor) -> Tensor:
    return value.diagonal(dim1=-2, dim2=-1)


def before_each(value: Tensor) -> Tensor:
    """The sum of all that comes before each element of the last dimension."""
    return torch.nn.functional.pad(value[..., :-1], (1, 0)).cumsum(-1)


def heads_first(value: Tensor, out: Tensor) -> Tensor:
    """Copy (rows, c, q, h, p) into `out` (m, h, q, p), for matrix products: (m h, q, p)."""
    out.unflatten(0, value.shape[:2]).copy_(value.transpose(2, 3))
    return out.flatten(0, 1)


def steps_first(value: Tensor, out: Tensor) -> None:
    """The inverse of `heads_first`: copy (m h, q, p) into `out` (rows, c, q, h, p)."""
    rows, c, q, h, p = out.shape
    out.copy_(value.view(rows, c, h, q, p).transpose(2, 3))


def scan_in_chunks(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    chunk_size: int,
    need_final_state: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, the final state if needed, and the state before each chunk (all m, h, p, n) if kept and not only zeros."""
    b, l, h, p = x.shape
    n = B.shape[-1]
    runs = cut_into_runs(dt, A, B, C, chunk_size)
    total = sum(run.c for run in runs)
    has_states = total > 1 or initial_states is not None
    keep_states = keep_states and has_states
    states = dt.new_empty(b * total if keep_states else 0, h, p, n)
    changes = total > 1 or need_final_state
    state = (
        dt.new_zeros(b, h, p, n)
        if initial_states is None
        else initial_states.to(dt.dtype, copy=changes, memory_format=torch.contiguous_format)
    )
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for run, kept in zip(runs, states.split([b * run.c if keep_states else 0 for run in runs]), strict=True):
        q, x_run, y_run, blocks = run.q, run.steps(x), run.steps(y), run.blocks()
        most = blocks[0].m.stop
        x_heads, y_heads, M_memory = (dt.new_empty(most, h, q, size) for size in (p, p, q))
        beside = dt.new_empty(most, run.g, q, h // run.g * p)
        state_is_read_later = run is not runs[-1] or run.c > 1 or need_final_state
        if state_is_read_later:
            added_memory = dt.new_empty(most, h, p, n)  # to the state, by each chunk
            to_end, decay = run.to_end(), run.decay()
        if has_states:
            from_start = run.from_start()
            before_memory = dt.new_empty(most if changes and not keep_states else 0, h, p, n)
        M_diagonal = run.M_diagonal(D)
        for block in blocks:  # of a row, in the order of their chunks
            size, rows = block.m.stop - block.m.start, block.rows
            x_block = heads_first(x_run[rows, block.chunks], out=x_heads[:size])
            if has_states:
                before = kept[block.m] if keep_states else before_memory[:size] if changes else state[rows]
            if state_is_read_later:
                write = run.side_by_side(x_run[rows, block.chunks], to_end, block, out=beside[:size])
                added = added_memory[:size]
                torch.bmm(write.mT, run.B[block.m].flatten(0, 1), out=added.view(size * run.g, -1, n))
            for i, c in enumerate(range(block.chunks.start, block.chunks.stop)):
                if has_states and (changes or keep_states):
                    before.unflatten(0, (rows.stop - rows.start, -1))[:, i] = state[rows]
                if state_is_read_later:
                    state[rows].mul_(decay[rows, c]).add_(added.unflatten(0, (rows.stop - rows.start, -1))[:, i])

            M = M_memory[:size]
            run.by_group(run.inside(block, out=M)).mul_(run.CB[block.m].unsqueeze(2))
            diagonal(M).copy_(M_diagonal[block.m])
            y_block = torch.bmm(M.view(-1, q, q), x_block, out=y_heads[:size].view(-1, q, p))
            if has_states:
                read = beside[:size].flatten(0, 1)
                torch.bmm(run.C[block.m].flatten(0, 1), before.view(size * run.g, -1, n).mT, out=read)
                run.by_group(y_heads[:size]).addcmul_(run.apart(read, p), from_start[block.m])
            steps_first(y_block, out=y_run[rows, block.chunks])
    return y, state if need_final_state else None, states if keep_states else None


def differentiate_in_chunks(
    dy: Tensor,
    d_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    states: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, dt, A, B, C, D and of the state before the first chunk, from those of y and the final state.

    With E = dM * M, the gradient of log M, a_t is due the sum of row t of E and u_s the sum of column s. The diagonal
    of M does not depend on a: left out of E, it does not have to cancel.
    """
    b, l, h, p = x.shape
    n = B.shape[-1]
    A = A.to(dt.dtype)
    if d_state is not None:
        d_state = d_state.to(dt.dtype, copy=True, memory_format=torch.contiguous_format)
    runs = cut_into_runs(dt, A, B, C, chunk_size)
    dx, ddt, dB, dC = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt, B, C))
    dA, dD = dt.new_zeros(h), dt.new_zeros(h)
    has_states = states is not None
    split = [None] * len(runs) if states is None else states.split([b * run.c for run in runs])
    for run, before in reversed(list(zip(runs, split, strict=True))):
        q, x_run, dy_run, dx_run, blocks = run.q, run.steps(x), run.steps(dy), run.steps(dx), run.blocks()
        most = blocks[0].m.stop
        x_heads, dy_heads, dx_heads, M_memory, E_memory = (dt.new_empty(most, h, q, size) for size in (p, p, p, q, q))
        beside, state_memory = (dt.new_empty(most, run.g, q, h // run.g * p) for _ in range(2))
        has_after = d_state is not None or run.c > 1
        if has_states or has_after:
            d_state = dt.new_zeros(b, h, p, n) if d_state is None else d_state
        if has_states:
            from_start = run.from_start()
            d_before_memory = dt.new_empty(most, h, p, n)  # of the state before each chunk, from its outputs
        if has_after:
            to_end, decay = run.to_end(), run.decay()
            d_after_memory = dt.new_empty(most, h, p, n)  # of the state after each chunk
            d_decay = dt.new_empty(b * run.c, h)

        M_diagonal = run.M_diagonal(D)
        row_sums, column_sums, dM_diagonal = (torch.empty_like(run.a) for _ in range(3))
        d_CB = torch.empty_like(run.CB)
        dB_run, dC_run = torch.zeros_like(run.B), torch.zeros_like(run.C)
        d_to_end = torch.zeros_like(run.a)  # gradient of its logarithm
        for block in reversed(blocks):
            size, rows = block.m.stop - block.m.start, block.rows
            M, E, CB = M_memory[:size], E_memory[:size], run.CB[block.m].unsqueeze(2)
            x_block = heads_first(x_run[rows, block.chunks], out=x_heads[:size])
            dy_block = heads_first(dy_run[rows, block.chunks], out=dy_heads[:size])
            B_block, C_block = run.B[block.m].flatten(0, 1), run.C[block.m].flatten(0, 1)
            of_state = state_memory[:size].flatten(0, 1)
            if has_states:
                dy_beside = run.side_by_side(dy_run[rows, block.chunks], from_start, block, out=beside[:size])
                d_before = d_before_memory[:size]
                torch.bmm(dy_beside.mT, C_block, out=d_before.view(size * run.g, -1, n))
            if has_after:
                d_after = d_after_memory[:size]
            for i, c in reversed(list(enumerate(range(block.chunks.start, block.chunks.stop)))):
                if has_after:
                    d_after.unflatten(0, (rows.stop - rows.start, -1))[:, i] = d_state[rows]
                if has_after and has_states:
                    d_state[rows].mul_(decay[rows, c])
                if has_states:
                    d_state[rows].add_(d_before.unflatten(0, (rows.stop - rows.start, -1))[:, i])
            torch.bmm(dy_block, x_block.mT, out=E.view(-1, q, q))  # dM
            dM_diagonal[block.m] = diagonal(E)
            E.mul_(run.inside(block, out=M))  # dM * L
            torch.sum(run.by_group(E), dim=2, out=d_CB[block.m])
            run.by_group(E).mul_(CB)
            torch.sum(E, dim=-1, out=row_sums[block.m])
            torch.sum(E, dim=-2, out=column_sums[block.m])
            run.by_group(M).mul_(CB)
            diagonal(M).copy_(M_diagonal[block.m])
            dx_block = torch.bmm(M.view(-1, q, q).mT, dy_block, out=dx_heads[:size].view(-1, q, p))
            if has_states:
                H = before[block.m].view(size * run.g, -1, n)
                torch.bmm(dy_beside, H, out=dC_run[block.m].flatten(0, 1))
                torch.bmm(C_block, H.mT, out=of_state)
                row_sums[block.m] += run.apart(of_state.mul_(dy_beside), p).sum(-1).flatten(1, 2)
            if has_after:
                d_added = d_after.view(size * run.g, -1, n)
                x_beside = run.side_by_side(x_run[rows, block.chunks], to_end, block, out=beside[:size])
                torch.bmm(x_beside, d_added, out=dB_run[block.m].flatten(0, 1))
                torch.bmm(B_block, d_added.mT, out=of_state)
                run.by_group(dx_heads[:size]).addcmul_(run.apart(of_state, p), to_end[block.m])
                d_to_end[block.m] = run.apart(of_state.mul_(x_beside), p).sum(-1).flatten(1, 2)
            if has_after and has_states:
                d_decay[block.m] = (d_after * before[block.m]).sum((-1, -2))
            steps_first(dx_block, out=dx_run[rows, block.chunks])

        d_rate = (row_sums - column_sums).flip(-1).cumsum(-1).flip(-1)  # gradient of dt_t A
        if has_after:
            d_rate += before_each(d_to_end)
        if has_after and has_states:
            d_rate += d_decay.mul_(decay.flatten(0, 1)[..., 0, 0]).unsqueeze(-1)
        d_rate.masked_fill_(run.rate <= run.least, 0)
        d_steps = column_sums.add_(d_to_end).div_(run.positive_dt).addcmul_(d_rate, A[:, None])
        run.by_group(d_steps).addcmul_(run.by_group(dM_diagonal), run.CB_diagonal.unsqueeze(2))
        run.steps(ddt).copy_(d_steps.unflatten(0, (b, run.c)).transpose(2, 3))
        dA += d_rate.mul_(run.dt).sum((0, 2))
        dD += dM_diagonal.sum((0, 2))
        diagonal(d_CB.tril_(-1)).copy_(run.by_group(dM_diagonal.mul_(run.dt)).sum(2))
        run.steps(dC).copy_(dC_run.add_(d_CB @ run.B).unflatten(0, (b, run.c)).transpose(2, 3))
        run.steps(dB).copy_(dB_run.add_(d_CB.mT @ run.C).unflatten(0, (b, run.c)).transpose(2, 3))
    return dx, ddt, dA, dB, dC, dD, d_state
