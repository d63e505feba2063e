"""From token ids to what the scan switch and the embeddings need to know of each position.

Symbols
    segment    a run of positions read as one piece: `<|image_start|> patches <|image_end|>`, the same for text, or one
               control token alone (class, role, time)
    prefix     all segments without a target: the conditions, which never see t
    target group   all segments with a target, headed by the time tokens; only targets are noised
    level      0 clean, 1 at the image timestep, 2 at the text timestep
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .configuration_mdm import MDMConfig
from .scan_switch import invert_order, scan, scan_orders


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
    direction_weight: Tensor | None  # (b, 1, k, 1), None where every row uses every direction


def _isin(ids: Tensor, tokens: list[int]) -> Tensor:
    found = ids == tokens[0]
    for token in tokens[1:]:
        found = found | (ids == token)
    return found


def build_layout(
    config: MDMConfig, input_ids: Tensor, attention_mask: Tensor | None, target_mask: Tensor | None, grid_hw: Tensor
) -> SequenceLayout:
    """Finds the segments of `input_ids` (b, l); `grid_hw` (m, 2) lists the images in row order, m >= 1 (a dummy
    row of ones if there is none)."""
    b, l = input_ids.shape
    is_padding = torch.zeros_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask == 0
    is_header = _isin(input_ids, [config.time_image_token_id, config.time_text_token_id])
    is_patch = _isin(input_ids, [config.image_token_id, config.image_target_token_id])
    is_text = ~(_isin(input_ids, config.control_token_ids) | is_patch | is_padding)
    is_target = torch.zeros_like(is_text) if target_mask is None else target_mask.bool()
    is_target = is_target & (is_patch | is_text) & ~is_padding

    is_single = is_header | _isin(
        input_ids,
        [config.class_token_id, config.user_token_id, config.assistant_token_id, config.system_token_id],
    )
    is_start = input_ids == config.image_start_token_id
    opens = is_single | is_start | (input_ids == config.text_start_token_id)
    closes = is_single | _isin(input_ids, [config.image_end_token_id, config.text_end_token_id])
    opens = opens | torch.cat([torch.zeros_like(closes[:, :1]), closes[:, :-1]], dim=1)
    segment = opens.long().cumsum(1)
    position = torch.arange(l, device=input_ids.device).expand(b, l)
    start = torch.where(opens, position, 0).cummax(1).values
    offset = position - start
    is_image = input_ids.gather(1, start) == config.image_start_token_id
    targets_per_segment = torch.zeros(b, l + 1, dtype=torch.long, device=input_ids.device)
    targets_per_segment = targets_per_segment.scatter_add(1, segment, is_target.long())
    in_target_group = (targets_per_segment.gather(1, segment) > 0) | is_header

    following = torch.cat([input_ids[:, 1:], input_ids.new_zeros(b, 1)], dim=1)
    is_known_start = is_start & (following == config.image_token_id)
    image_index = (is_start.flatten().long().cumsum(0) - 1).clamp(min=0).view(b, l)
    known_index = (is_known_start.flatten().long().cumsum(0) - 1).clamp(min=0).view(b, l)
    grid = grid_hw[image_index.clamp(max=grid_hw.shape[0] - 1)]
    place = (offset - 1).clamp(min=0)
    level = torch.where(is_target, torch.where(is_patch, 1, 2), 0)
    level = torch.where(input_ids == config.time_image_token_id, 1, level)
    level = torch.where(input_ids == config.time_text_token_id, 2, level)
    return SequenceLayout(
        input_ids=input_ids,
        is_padding=is_padding,
        is_patch=is_patch,
        is_text=is_text,
        is_target=is_target,
        is_known_patch=input_ids == config.image_token_id,
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
    )


def plan_scans(config: MDMConfig, layout: SequenceLayout, has_image: Tensor | None, padding_first=False) -> ScanPlan:
    """The scan switch: orders for the positions of `layout`.

    Args:
        has_image: (b,) bool, the row holds an image; None where no row does. Rows without an image use the text
            directions only, alone or in a batch.
    """
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
        padding_first=padding_first,
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
    return ScanPlan(order, rank, is_real, step_is_real, layout.is_image.unsqueeze(-1), weight)


def image_of_each_row(layout: SequenceLayout) -> Tensor:
    """(b,) bool: the row holds an image segment that is not padding."""
    return (layout.is_image & ~layout.is_padding).any(1)


def check_inputs(
    config: MDMConfig,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    image_grid_hw: Tensor | None,
    attention_mask: Tensor | None,
    target_mask: Tensor | None,
    class_ids: Tensor | None,
    timesteps: Tensor | None,
    noise: Tensor | None,
) -> None:
    """Raises ValueError (got, need, do) for inputs that do not fit together; skipped while compiling."""
    if torch.compiler.is_compiling():
        return
    if input_ids.ndim != 2:
        raise ValueError(f"`input_ids` has shape {tuple(input_ids.shape)}; it must be (batch, length).")
    b, l = input_ids.shape
    for name, mask in (("attention_mask", attention_mask), ("target_mask", target_mask)):
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(
                f"`{name}` has shape {tuple(mask.shape)}, `input_ids` {(b, l)}; they must be equal: one entry a token."
            )
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"`input_ids` holds ids from {low} to {high}; they must lie in [0, vocab_size) = [0, {config.vocab_size})."
        )
    if class_ids is not None:
        if class_ids.shape != (b,):
            raise ValueError(f"`class_ids` has shape {tuple(class_ids.shape)}; it must be (batch,) = ({b},).")
        wrong = class_ids[(class_ids < -1) | (class_ids >= config.num_classes)]
        if wrong.numel():
            raise ValueError(
                f"`class_ids` holds {wrong[0].item()}; this model knows classes 0 to {config.num_classes - 1}, "
                "and -1 for none."
            )
        silent = (class_ids >= 0) & ~(input_ids == config.class_token_id).any(1)
        if silent.any():
            raise ValueError(
                f"`class_ids` gives row {silent.nonzero()[0].item()} a class, but its `input_ids` hold no class token "
                f"{config.class_token_id}; put one first, as MDMProcessor does."
            )
    if timesteps is not None:
        if timesteps.shape != (b, 2):
            raise ValueError(
                f"`timesteps` has shape {tuple(timesteps.shape)}; it must be (batch, 2) = ({b}, 2): image, text."
            )
        if not bool(((timesteps >= 0) & (timesteps <= 1)).all()):
            raise ValueError(
                f"`timesteps` ranges from {timesteps.min().item():g} to {timesteps.max().item():g}; t must lie in "
                "[0, 1]: 0 is clean, 1 is pure noise. Divide a step count by num_train_timesteps."
            )
    if noise is not None and noise.shape != (b, l, config.latent_size):
        raise ValueError(
            f"`noise` has shape {tuple(noise.shape)}; it must be (batch, length, latent_size) = "
            f"({b}, {l}, {config.latent_size})."
        )
    _check_images(config, input_ids, pixel_values, image_grid_hw)


def _check_images(config, input_ids, pixel_values, image_grid_hw) -> None:
    is_start = input_ids == config.image_start_token_id
    is_known = input_ids == config.image_token_id
    is_patch = is_known | (input_ids == config.image_target_token_id)
    num_images, num_patches = int(is_start.sum()), int(is_patch.sum())
    num_known = int((is_start[:, :-1] & is_known[:, 1:]).sum())
    if num_known and pixel_values is None:
        raise ValueError(
            f"`input_ids` holds {num_known} image(s) of known patches (id {config.image_token_id}), but "
            f"`pixel_values` is None; pass the pixels, or use id {config.image_target_token_id} where an image is to "
            "be generated."
        )
    if pixel_values is not None:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != config.vae_config.num_channels:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}; it must be (images, "
                f"{config.vae_config.num_channels}, height, width)."
            )
        if len(pixel_values) != num_known:
            raise ValueError(
                f"`pixel_values` holds {len(pixel_values)} image(s), `input_ids` has places for {num_known}; give "
                f"one run of id {config.image_token_id} between image start and end tokens for each image."
            )
        if not bool(torch.isfinite(pixel_values).all()):
            raise ValueError("`pixel_values` holds NaN or infinity; all pixels must be finite, in [-1, 1].")
    if num_images == 0 and num_patches == 0:
        return
    if image_grid_hw is None:
        raise ValueError(
            f"`input_ids` holds {num_images} image(s), but `image_grid_hw` is None; give their (rows, columns) in "
            "patches, shape (images, 2)."
        )
    if image_grid_hw.shape != (num_images, 2):
        raise ValueError(
            f"`image_grid_hw` has shape {tuple(image_grid_hw.shape)}; `input_ids` holds {num_images} image(s), so it "
            f"must be ({num_images}, 2)."
        )
    flat = is_start.flatten().long().cumsum(0) - 1
    counts = torch.bincount(flat[is_patch.flatten()].clamp(min=0), minlength=num_images)
    needed = image_grid_hw.prod(-1).to(counts.device)
    if not torch.equal(counts, needed):
        i = int((counts != needed).nonzero()[0])
        raise ValueError(
            f"Image {i} has {counts[i].item()} patch tokens, its `image_grid_hw` {image_grid_hw[i].tolist()} needs "
            f"{needed[i].item()}; expand the image token once per patch."
        )
    if pixel_values is not None and num_known:
        known = image_grid_hw[flat.view_as(input_ids)[:, :-1][is_start[:, :-1] & is_known[:, 1:]]]
        p = config.vae_config.patch_size
        largest = (known.amax(0) * p).tolist()
        if largest[0] > pixel_values.shape[2] or largest[1] > pixel_values.shape[3]:
            raise ValueError(
                f"`image_grid_hw` asks for images of up to {largest[0]}x{largest[1]} pixels, `pixel_values` is only "
                f"{pixel_values.shape[2]}x{pixel_values.shape[3]}; make them agree."
            )
