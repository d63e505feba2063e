"""From token ids to what the scan switch and the embeddings need to know of each position.

Symbols
    segment    a run of positions read as one piece: `<|image_start|> patches <|image_end|>`, the same for text, or one
               control token alone (class, role, time)
    prefix     all segments without a target: the conditions, which never see t
    target group   all segments with a target, headed by the time tokens; only targets are noised, what is known of
               such a segment stays in its place
    level      0 clean, 1 at the image timestep, 2 at the text timestep
"""

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from .configuration_mdm import MDMConfig
from .scan_switch import invert_order, scan, scan_orders


ROTARY_PERIOD = 100.0


@dataclass
class SequenceLayout:
    """What a position is and where it stands; every tensor is (b, l) unless noted."""

    input_ids: Tensor
    is_padding: Tensor
    is_patch: Tensor
    is_text: Tensor  # a text token, control tokens excluded
    is_target: Tensor
    is_known_patch: Tensor  # a patch whose pixels are given
    is_image: Tensor  # in an image segment, its frame included
    is_header: Tensor  # a time token
    in_target_group: Tensor
    segment: Tensor
    offset: Tensor
    row: Tensor
    column: Tensor
    grid: Tensor  # (b, l, 2)
    image_index: Tensor  # which image of the batch, counted over all images
    known_index: Tensor  # which image of `pixel_values`
    level: Tensor
    must_be_word: Tensor  # a target text token at which its text cannot end: a known one follows in it

    def select(self, index: Tensor, is_real: Tensor) -> "SequenceLayout":
        """The layout of the positions `index` (b, m); those not `is_real` become padding."""
        picked = {}
        for field in fields(self):
            value = getattr(self, field.name)
            expanded = index if value.ndim == 2 else index.unsqueeze(-1).expand(-1, -1, value.shape[-1])
            picked[field.name] = value.gather(1, expanded)
        picked["is_padding"] = picked["is_padding"] | ~is_real
        return SequenceLayout(**picked)


@dataclass
class ScanPlan:
    """How a stretch of positions is read: orders, their inverses, and which steps are real."""

    order: Tensor  # (b, l, k)
    rank: Tensor  # (b, l, k)
    is_real: Tensor  # (b, l, 1)
    step_is_real: Tensor  # (b, l, k)
    is_image: Tensor  # (b, l, 1): which projections a position uses where they differ by modality
    in_target_group: Tensor  # (b, l, 1), without padding
    last_condition: Tensor  # (b,): place of the last position of the prefix, -1 where there is none
    direction_weight: Tensor | None  # (b, 1, k, 1), None where every row uses every direction

    def alternating(self) -> list["ScanPlan"]:
        """One plan per direction, for blocks that take turns (`scan_sharing="alternate"`)."""
        parts = zip(*(value.split(1, -1) for value in (self.order, self.rank, self.step_is_real)), strict=True)
        return [replace(self, order=o, rank=r, step_is_real=s) for o, r, s in parts]


@dataclass
class AttentionPlan:
    """Who sees whom, and by which angles queries and keys are turned, for a Transformer in place of the scans."""

    is_real: Tensor  # (b, l, 1)
    in_target_group: Tensor  # (b, l, 1), without padding
    last_condition: Tensor  # (b,): place of the last position of the prefix, -1 where there is none
    sees: Tensor  # (b, 1, l, l): [query, key]
    cos: Tensor  # (b, 1, l, head_dim / 2), fp32
    sin: Tensor


Rows = TypeVar("Rows", SequenceLayout, ScanPlan | AttentionPlan)


def _isin(ids: Tensor, tokens: list[int]) -> Tensor:
    found = ids == tokens[0]
    for token in tokens[1:]:
        found = found | (ids == token)
    return found


def token_kinds(
    config: MDMConfig, input_ids: Tensor, attention_mask: Tensor | None, target_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which of `input_ids` (b, l) are padding, patches, text tokens, and targets: (b, l) each."""
    is_padding = torch.zeros_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask == 0
    is_patch = _isin(input_ids, [config.image_token_id, config.image_target_token_id])
    is_text = ~(_isin(input_ids, config.control_token_ids) | is_patch | is_padding)
    is_target = torch.zeros_like(is_text) if target_mask is None else target_mask.bool()
    return is_padding, is_patch, is_text, is_target & (is_patch | is_text) & ~is_padding


def build_layout(
    config: MDMConfig, input_ids: Tensor, attention_mask: Tensor | None, target_mask: Tensor | None, grid_hw: Tensor
) -> SequenceLayout:
    """Finds the segments of `input_ids` (b, l); `grid_hw` (m, 2) lists the images in row order, m >= 1 (a dummy
    row of ones if there is none)."""
    b, l = input_ids.shape
    is_padding, is_patch, is_text, is_target = token_kinds(config, input_ids, attention_mask, target_mask)
    is_known_patch = input_ids == config.image_token_id
    is_header = _isin(input_ids, [config.time_image_token_id, config.time_text_token_id])

    is_single = is_header | _isin(
        input_ids,
        [config.class_token_id, config.user_token_id, config.assistant_token_id, config.system_token_id],
    )
    is_start = input_ids == config.image_start_token_id
    opens = is_single | is_start | (input_ids == config.text_start_token_id)
    closes = is_single | _isin(input_ids, [config.image_end_token_id, config.text_end_token_id])
    ends = closes | is_padding  # on the left, too: a row may begin with bare text
    opens = opens | torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], dim=1)
    segment = opens.long().cumsum(1)
    position = torch.arange(l, device=input_ids.device).expand(b, l)
    start = torch.where(opens, position, 0).cummax(1).values
    offset = position - start
    is_image = input_ids.gather(1, start) == config.image_start_token_id

    def in_segments_with(mask: Tensor) -> Tensor:
        counts = torch.zeros(b, l + 1, dtype=torch.long, device=mask.device).scatter_add(1, segment, mask.long())
        return counts.gather(1, segment) > 0

    in_target_group = in_segments_with(is_target) | is_header
    is_known_start = is_start & in_segments_with(is_known_patch)  # some patches of it may be targets to fill in
    image_index = (is_start.flatten().long().cumsum(0) - 1).clamp(min=0).view(b, l)
    known_index = (is_known_start.flatten().long().cumsum(0) - 1).clamp(min=0).view(b, l)
    grid = grid_hw[image_index.clamp(max=grid_hw.shape[0] - 1)]
    place = (offset - 1).clamp(min=0)
    level = torch.where(is_target, torch.where(is_patch, 1, 2), 0)
    level = torch.where(input_ids == config.time_image_token_id, 1, level)
    level = torch.where(input_ids == config.time_text_token_id, 2, level)
    is_known_word = is_text & ~is_target
    for end in config.end_token_ids:
        is_known_word = is_known_word & (input_ids != end)
    return SequenceLayout(
        input_ids=input_ids,
        is_padding=is_padding,
        is_patch=is_patch,
        is_text=is_text,
        is_target=is_target,
        is_known_patch=is_known_patch,
        is_image=is_image,
        is_header=is_header,
        in_target_group=in_target_group,
        segment=segment,
        offset=offset,
        row=torch.where(is_patch, place // grid[..., 1], offset),
        column=torch.where(is_patch, place % grid[..., 1], 0),
        grid=grid,
        image_index=image_index,
        known_index=known_index,
        level=level,
        must_be_word=is_text & is_target & _precedes(is_known_word, segment),
    )


def _precedes(mask: Tensor, segment: Tensor) -> Tensor:
    """Where `mask` (b, l) holds further on in the same segment."""
    place = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    first = place.new_full((len(mask), mask.shape[1] + 1), -1)
    last = first.scatter_reduce(1, segment, torch.where(mask, place, -1), "amax")
    return place < last.gather(1, segment)


def plan_attention(config: MDMConfig, layout: SequenceLayout) -> AttentionPlan:
    """Conditions first: the prefix sees itself, the target group everything. Padding sees itself alone, and nothing
    sees padding: no row of the softmax is without a key.

    Half of a head's pairs turn with the row, half with the column, at frequencies from 1 to 1 / 100: a score depends
    on how far apart two places are, beside what the embeddings say of them.
    """
    is_real, is_target = ~layout.is_padding, layout.in_target_group
    sees = is_real.unsqueeze(1) & is_real.unsqueeze(2) & (is_target.unsqueeze(2) | ~is_target.unsqueeze(1))
    sees = sees | torch.eye(sees.shape[1], dtype=torch.bool, device=sees.device)
    count = config.head_dim // 4
    frequency = ROTARY_PERIOD ** (-torch.arange(count, device=sees.device, dtype=torch.float32) / count)
    angle = torch.cat([place.unsqueeze(-1) * frequency for place in (layout.row, layout.column)], dim=-1).unsqueeze(1)
    return AttentionPlan(
        is_real.unsqueeze(-1), *_groups(layout), sees=sees.unsqueeze(1), cos=angle.cos(), sin=angle.sin()
    )


def _groups(layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """A plan's `in_target_group` and `last_condition`."""
    is_real, in_target_group = ~layout.is_padding, layout.in_target_group
    place = torch.arange(is_real.shape[1], device=is_real.device)
    last = torch.where(is_real & ~in_target_group, place, -1).amax(1)
    return (is_real & in_target_group).unsqueeze(-1), last


def plan_scans(config: MDMConfig, layout: SequenceLayout, has_image: Tensor | None) -> ScanPlan | AttentionPlan:
    """The scan switch: orders for the positions of `layout`. A Transformer, which scans nothing, gets its own plan.

    Args:
        has_image: (b,) bool, the row holds an image; None where no row does. Rows without an image use the text
            directions only, alone or in a batch.
    """
    if config.backbone == "transformer":
        return plan_attention(config, layout)
    images, texts = config.scan_directions
    order = scan_orders(
        layout.segment,
        layout.offset,
        layout.row,
        layout.column,
        layout.grid,
        layout.is_patch,
        layout.is_image,
        layout.in_target_group,
        layout.is_header,
        layout.is_padding,
        directions=(images, texts),
    )
    weight = None
    if config.scan_sharing != "alternate":
        if has_image is None:
            order = order[..., :texts].contiguous()
        elif images > texts and (torch.compiler.is_compiling() or not bool(has_image.all())):
            weight = torch.ones(len(has_image), 1, images, 1, device=order.device)
            weight[:, :, texts:] = has_image.view(-1, 1, 1, 1)
    rank = invert_order(order)
    is_real = ~layout.is_padding.unsqueeze(-1)
    step_is_real = scan(is_real.float(), order, rank).squeeze(-1)
    return ScanPlan(order, rank, is_real, step_is_real, layout.is_image.unsqueeze(-1), *_groups(layout), weight)


def image_of_each_row(layout: SequenceLayout) -> Tensor:
    """(b,) bool: the row holds an image segment that is not padding."""
    return (layout.is_image & ~layout.is_padding).any(1)


def positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where `mask` (b, l) holds, in order: indices (b, m) and which of them are real; m is the longest row, >= 1."""
    longest = max(int(mask.sum(1).max()), 1)
    index = torch.argsort(mask.long(), dim=1, stable=True, descending=True)[:, :longest]
    return index, mask.gather(1, index)


def rows_of(value: Rows, rows: slice | Tensor) -> Rows:
    """Some rows of a layout or a plan."""
    tensors = {field.name: getattr(value, field.name) for field in fields(value)}
    return replace(value, **{name: None if tensor is None else tensor[rows] for name, tensor in tensors.items()})


def pick(values: Tensor, index: Tensor) -> Tensor:
    """`values` (b, l, d) at `index` (b, m): (b, m, d)."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
