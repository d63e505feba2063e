"""The block of MDM: scan switch, causal convolution, selective scan, unscan (paper Sec. 4.2.1, Fig. 2f-g).

Read bottom-up: `MDMProjections` and `MDMSelectiveScan` hold the weights, `MDMMixer` runs the scan switch over them,
`MDMBlock` adds norm and skip. `MDMConditionBroadcast` is ours, and optional.

Symbols
    h          hidden state of a position                                            (b, l, hidden_size)
    k          scan directions
    z          gate of a position                                                    (b, l, inner_size)
    x, B, C, dt   input, state projections and step size of the selective scan, Eq. 10-13
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .checkpoints import rename_weights
from .configuration_mdm import MDMConfig
from .fused_scan import merge_gate_norm, scan_conv
from .scan_switch import scan
from .sequence_layout import AttentionPlan, ScanPlan, pick
from .ssd import ssd


@dataclass(eq=False)
class MDMConditionCache:
    """What one block remembers of the prefix: the tail of its convolution input and its SSM state, per direction; of a
    Transformer its keys and values.

    Conditions come first in every direction and never see t, so all are the same in every denoising step. While it is
    open, each pass adds what it reads to the prefix; once it is closed, passes start from it and leave it alone. Of
    the SSM its size does not grow, and a prefix may be read segment by segment; a Transformer's sees all of itself.

    With token selection (paper Sec. 3.2, Theorem 3) it also keeps what the block's input projections made of the
    target group. Only the live positions are projected anew; the others are read as they were last.

    Attributes:
        is_open: Whether passes add to it.
        conv: (b, conv_kernel - 1, k, inner_size + 2 state_size).
        ssm: (b, k * heads, head_dim, state_size), fp32.
        condition: (b, hidden_size), what the last condition tells every target, with `condition_broadcast`.
        keys, values: (b, heads, l, head_dim).
        is_real: (b, l, 1), which of them are no padding.
        live: (b, n), places in the target group that passes bring; None where they bring all of it.
        live_is_real: (b, n, 1), which of these are no padding.
        projected: Of each input projection (b, m, c), what it last made of every position of the target group.
    """

    is_open: bool = True
    live: Tensor | None = None
    live_is_real: Tensor | None = None
    projected: list[Tensor] | None = None
    conv: Tensor | None = None
    ssm: Tensor | None = None
    condition: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    is_real: Tensor | None = None

    def take(self, rows: Tensor | slice) -> "MDMConditionCache":
        """A cache of the `rows` (p,) of this one; a row may be taken many times."""
        taken: dict[str, Any] = {name: v[rows] if isinstance(v, Tensor) else v for name, v in vars(self).items()}
        taken["projected"] = None if self.projected is None else [one[rows] for one in self.projected]
        return MDMConditionCache(**taken)

    def complete(self, projected: list[Tensor]) -> list[Tensor]:
        """Projections (b, n, c) of the live positions -> (b, m, c) of the whole target group, remembered."""
        if self.projected is None:  # the first pass brings all, in order
            self.projected = projected
            return projected
        whole = []
        for new, last in zip(projected, self.projected, strict=True):
            places = self.live.unsqueeze(-1).expand_as(new)
            whole.append(last.scatter(1, places, torch.where(self.live_is_real, new, last.gather(1, places))))
        self.projected = whole
        return whole

    def stacked_on(self, other: "MDMConditionCache") -> "MDMConditionCache":
        """A cache of the rows of this one, then those of the other one; not of a Transformer."""
        stacked = MDMConditionCache(conv=torch.cat([self.conv, other.conv]), ssm=torch.cat([self.ssm, other.ssm]))
        if self.condition is not None:
            stacked.condition = torch.cat([self.condition, other.condition])
        return stacked


class MDMRMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class MDMGatedRMSNorm(MDMRMSNorm):
    """Puts y of all directions back in place, sums it, multiplies by silu(z) and normalises: (b, l, inner_size)."""

    def forward(self, y: Tensor, order: Tensor, rank: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
        return merge_gate_norm(y, order, rank, z, self.weight, self.eps)


class MDMProjections(nn.Module):
    """The linear input and output projections of a mixer (paper Sec. 4.2.1, items 1 and 6)."""

    def __init__(self, config: MDMConfig):
        super().__init__()
        in_features = 2 * config.inner_size + 2 * config.state_size + config.num_heads
        self.in_proj = nn.Linear(config.hidden_size, in_features, bias=False)
        self.norm = MDMGatedRMSNorm(config.inner_size, config.rms_norm_eps)
        self.out_proj = nn.Linear(config.inner_size, config.hidden_size, bias=False)


class MDMSelectiveScan(nn.Module):
    """Eq. 10-13 in K directions at once, each with its own A, D and bias of dt.

    `from_pretrained` keeps them in fp32 at any `dtype`. In a module that holds nothing else they can be a group of
    their own for FSDP2, whose groups are of one dtype each.
    """

    def __init__(self, directions: int, num_heads: int, chunk_size: int | None):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(directions, num_heads))
        self.D = nn.Parameter(torch.empty(directions, num_heads))
        self.dt_bias = nn.Parameter(torch.empty(directions, num_heads))
        self.chunk_size = chunk_size

    def forward(
        self,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        step_is_real: Tensor,
        initial_states: Tensor | None,
        return_final_states: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (b, l, k, inner), dt (b, l, k, heads), B and C (b, l, k, state) -> y (b, l, k * heads, head_dim), and, if
        asked for, the final states (b, k * heads, head_dim, state)."""
        b, l, directions, heads = dt.shape
        dt = F.softplus(dt.float() + self.dt_bias[:directions].float()) * step_is_real.unsqueeze(-1)  # 0 at padding
        return ssd(
            x.view(b, l, directions * heads, -1),
            dt.flatten(2),
            -self.A_log[:directions].float().exp().flatten(),
            B,
            C,
            chunk_size=self.chunk_size,
            D=self.D[:directions].float().flatten(),
            initial_states=initial_states,
            return_final_states=return_final_states,
        )


class MDMMixer(nn.Module):
    """Scan switch, causal convolution and selective scan in K directions, merged, gated and projected.

    Convolution, A, D and the bias of dt are per direction. The projections are shared by all directions, or each
    direction has its own for image and for text positions (`scan_sharing="independent"`).
    """

    def __init__(self, config: MDMConfig):
        super().__init__()
        self.config = config
        num_images, num_texts = config.scan_directions
        self.is_independent = config.scan_sharing == "independent"
        self.num_image_projections = num_images if self.is_independent else 1
        num_projections = num_images + num_texts if self.is_independent else 1
        directions = 1 if config.scan_sharing == "alternate" else num_images
        conv_channels = config.inner_size + 2 * config.state_size
        self.conv_weight = nn.Parameter(torch.empty(directions, conv_channels, config.conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(directions, conv_channels))
        self.ssm = MDMSelectiveScan(directions, config.num_heads, config.chunk_size)
        self.projections = nn.ModuleList(MDMProjections(config) for _ in range(num_projections))
        self.register_load_state_dict_pre_hook(rename_weights)  # those of `ssm` were once the mixer's own

    def project_in(self, hidden_states: Tensor, is_image: Tensor, directions: int) -> list[Tensor]:
        """One projection for all directions, or one per direction: (b, l, z + x + B + C + dt) each."""
        if not self.is_independent:
            return [self.projections[0].in_proj(hidden_states)]
        n = self.num_image_projections
        images, texts = self.projections[:n], self.projections[n:]
        return [
            torch.where(is_image, image.in_proj(hidden_states), texts[k % len(texts)].in_proj(hidden_states))
            for k, image in enumerate(images[:directions])
        ]

    def project_out(self, scanned: Sequence[tuple[Tensor, ...]], is_image: Tensor, live: Tensor | None) -> Tensor:
        """Merge, gate, norm, out_proj; the sum over the directions if each has its own projections: (b, l, h), of the
        live positions alone where there are some (b, n)."""

        def project(i: int, y: Tensor, order: Tensor, rank: Tensor, z: Tensor) -> Tensor:
            branch = self.projections[i]
            merged = branch.norm(y, order, rank, z)
            return branch.out_proj(merged if live is None else pick(merged, live))

        if not self.is_independent:
            return project(0, *scanned[0])
        n = self.num_image_projections
        num_texts = len(self.projections) - n
        by_direction = [
            torch.where(is_image, project(k, *one), project(n + k % num_texts, *one)) for k, one in enumerate(scanned)
        ]
        return torch.stack(by_direction).sum(0)

    def forward(self, hidden_states: Tensor, plan: ScanPlan, cache: MDMConditionCache | None = None) -> Tensor:
        config = self.config
        inner, state, heads = config.inner_size, config.state_size, config.num_heads
        order, rank, step_is_real = plan.order, plan.rank, plan.step_is_real
        directions = order.shape[-1]

        live = None if cache is None else cache.live
        is_image = plan.is_image if live is None else pick(plan.is_image, live)
        projected = self.project_in(hidden_states, is_image, directions)
        if live is not None:
            projected = cache.complete(projected)
        width = directions // len(projected)  # directions that read the same projection
        sources = [
            (*p.split([inner, inner + 2 * state, heads], dim=-1), o, r)
            for p, o, r in zip(projected, order.split(width, -1), rank.split(width, -1), strict=True)
        ]  # of each projection: z (b, l, inner), x B C (b, l, inner + 2 state), dt (b, l, heads), and its orders
        tail, ssm_state = (None, None) if cache is None else (cache.conv, cache.ssm)
        adds_to_cache = cache is not None and cache.is_open
        conv_weight, conv_bias = self.conv_weight[:directions], self.conv_bias[:directions]

        def convolve(first: int, last: int) -> Tensor:  # channels of x B C, read in every direction: (b, l, k, c)
            parts = []
            for i, (_, xBC, _, o, r) in enumerate(sources):
                own = slice(i * width, (i + 1) * width)
                history = None if tail is None else tail[:, :, own, first:last]
                weight, bias = conv_weight[own, first:last], conv_bias[own, first:last]
                parts.append(scan_conv(xBC[..., first:last], o, r, weight, bias, history))
            return _join(parts)

        x, B, C = convolve(0, inner), convolve(inner, inner + state), convolve(inner + state, inner + 2 * state)
        dt = _join([scan(dt, o, r) for _, _, dt, o, r in sources])
        y = self.ssm(x, dt, B, C, step_is_real, ssm_state, adds_to_cache)
        if adds_to_cache:
            y, cache.ssm = y
            count = plan.is_real.sum((1, 2))
            tails = [None] * len(sources) if tail is None else tail.split(width, 2)
            kept = config.conv_kernel - 1
            cache.conv = _join([last_steps(s[1], s[3], kept, count, t) for s, t in zip(sources, tails, strict=True)])
        y = y.reshape(x.shape)
        if plan.direction_weight is not None:
            y = y * plan.direction_weight.to(y.dtype)
        scanned = [(part, o, r, z) for part, (z, _, _, o, r) in zip(y.split(width, dim=2), sources, strict=True)]
        return self.project_out(scanned, is_image, live)


def _join(parts: list[Tensor]) -> Tensor:
    """Directions of several projections side by side: (b, l, k, c)."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def last_steps(x: Tensor, order: Tensor, count: int, length: Tensor, before: Tensor | None) -> Tensor:
    """The last `count` real steps of each direction: (b, l, c) -> (b, count, k, c).

    `length` (b,) is how many of the steps are real, the first ones; where there are fewer than `count`, those of
    `before` (b, count, k, c) come first, or zeros.
    """
    steps = torch.arange(-count, 0, device=x.device) + length.unsqueeze(1)  # (b, count)
    rows = torch.arange(len(x), device=x.device).view(-1, 1, 1)
    places = order.gather(1, steps.clamp(min=0).unsqueeze(-1).expand(-1, -1, order.shape[-1]))
    found = x[rows, places]
    earlier = torch.zeros_like(found)
    if before is not None:
        earlier = before[rows.squeeze(-1), (steps + count).clamp(max=count - 1)].to(found)
    return torch.where((steps >= 0)[..., None, None], found, earlier)


class MDMConditionBroadcast(nn.Module):
    """h + W norm(h of the last condition) at every position of the target group (docs/mathematics.md, "Conditions at
    every target").

    The last condition, the `<|assistant|>` token of a prompt, has read all the others in every direction, and never
    sees t: what it tells is computed once, and kept in the cache.
    """

    def __init__(self, config: MDMConfig):
        super().__init__()
        self.norm = MDMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: Tensor, plan: ScanPlan | AttentionPlan, cache: MDMConditionCache | None
    ) -> Tensor:
        told = None if cache is None else cache.condition
        if cache is None or cache.is_open:
            last = plan.last_condition
            rows = torch.arange(len(last), device=last.device)
            new = self.projection(self.norm(hidden_states[rows, last.clamp(min=0)]))
            told = torch.where((last >= 0).unsqueeze(-1), new, torch.zeros_like(new) if told is None else told)
        if cache is not None and cache.is_open:
            cache.condition = told
        at = plan.in_target_group if cache is None or cache.live is None else cache.live_is_real
        return hidden_states + told.unsqueeze(1) * at


class MDMLayer(GradientCheckpointingLayer):
    """A block of either backbone: what hidden states are recorded of."""

    def __init__(self, config: MDMConfig):
        super().__init__()
        self.broadcast = MDMConditionBroadcast(config) if config.condition_broadcast else None

    def with_condition(
        self, hidden_states: Tensor, plan: ScanPlan | AttentionPlan, cache: MDMConditionCache | None
    ) -> Tensor:
        return hidden_states if self.broadcast is None else self.broadcast(hidden_states, plan, cache)


class MDMBlock(MDMLayer):
    """h + mixer(norm(h)); padding stays zero, so that it never enters a convolution."""

    def __init__(self, config: MDMConfig):
        super().__init__(config)
        self.norm = MDMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = MDMMixer(config)

    def forward(self, hidden_states: Tensor, plan: ScanPlan, cache: MDMConditionCache | None = None) -> Tensor:
        hidden_states = self.with_condition(hidden_states, plan, cache)
        mixed = self.mixer(self.norm(hidden_states), plan, cache)
        is_real = plan.is_real if cache is None or cache.live is None else cache.live_is_real
        return (hidden_states + mixed) * is_real.to(hidden_states.dtype)
