"""What `forward` and `generate` refuse: every message says what was got, what is needed, what to do.

Inputs are checked once, before the first layer: nothing here runs inside the denoising loop, nor while compiling.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .configuration_mdm import MDMConfig
from .prompts import whole
from .sequence_layout import SequenceLayout, token_kinds


PIXEL_SLACK = 1e-3  # what rounding may add to [-1, 1]
# What transformers hands to any model; it has no effect here, or a decorator of `forward` has dealt with it.
FORWARD_OPTIONS = {
    "is_causal",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_cache",
}


def check_inputs(
    config: MDMConfig,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    image_grid_hw: Tensor | None,
    attention_mask: Tensor | None,
    target_mask: Tensor | None,
    class_ids: Tensor | None = None,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    image_latents: Tensor | None = None,
) -> None:
    """Raises ValueError for inputs that do not fit together, and for `options` that no model knows."""
    if torch.compiler.is_compiling():
        return
    given = {name for name, value in (options or {}).items() if value is not None}  # PEFT adds its own as None
    if unknown := sorted(given - FORWARD_OPTIONS):
        raise ValueError(f"`forward` got the unknown argument(s) {unknown}; check the spelling, or leave them out.")
    _check_tokens(config, input_ids, attention_mask, target_mask)
    b, l = input_ids.shape
    if class_ids is not None:
        _check_tensor("class_ids", class_ids, is_whole=True)
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
        _check_tensor("timesteps", timesteps, is_whole=False)
        if timesteps.shape != (b, 2):
            raise ValueError(
                f"`timesteps` has shape {tuple(timesteps.shape)}; it must be (batch, 2) = ({b}, 2): image, text."
            )
        if not bool(((timesteps >= 0) & (timesteps <= 1)).all()):
            raise ValueError(
                f"`timesteps` ranges from {timesteps.min().item():g} to {timesteps.max().item():g}; t must lie in "
                "[0, 1]: 0 is clean, 1 is pure noise. Divide a step count by num_train_timesteps."
            )
    if noise is not None:
        _check_tensor("noise", noise, is_whole=False)
        if noise.shape != (b, l, config.latent_size):
            raise ValueError(
                f"`noise` has shape {tuple(noise.shape)}; it must be (batch, length, latent_size) = "
                f"({b}, {l}, {config.latent_size})."
            )
        if not bool(torch.isfinite(noise).all()):
            raise ValueError("`noise` holds NaN or infinity; draw it with torch.randn, or leave it out.")
    if seeds is not None:
        _check_tensor("seeds", seeds, is_whole=True)
        if seeds.shape != (b,) or not bool((seeds >= 0).all()):
            raise ValueError(
                f"`seeds` is {seeds.tolist()}; it must be (batch,) = ({b},) whole numbers of 0 or more, one per row."
            )
    if pixel_values is not None and image_latents is not None:
        raise ValueError(
            "Got both `pixel_values` and `image_latents`; give one of them: latents are what the pixel autoencoder "
            "made of the pixels."
        )
    _check_images(config, input_ids, pixel_values, image_grid_hw, image_latents)
    _check_headers(config, input_ids, attention_mask, target_mask)


def check_labels(
    config: MDMConfig, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None, target_mask: Tensor | None
) -> None:
    """Raises ValueError for `labels` that are not text tokens at text targets, and -100 elsewhere."""
    if torch.compiler.is_compiling():
        return
    _check_tokens(config, input_ids, attention_mask, target_mask)
    _check_tensor("labels", labels, is_whole=True)
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)}, `input_ids` {tuple(input_ids.shape)}; they must be "
            "equal: one entry a token, -100 outside text targets."
        )
    is_labelled = labels != -100
    _, _, label_is_text, _ = token_kinds(config, labels, None, None)
    wrong = labels[is_labelled & ~(label_is_text & (labels >= 0) & (labels < config.vocab_size))]
    if wrong.numel():
        raise ValueError(
            f"`labels` holds {wrong[0].item()}; a label must be the id of a text token, at least 0 and below "
            f"vocab_size {config.vocab_size}, or -100 where the loss is to ignore a position."
        )
    _, _, is_text, is_target = token_kinds(config, input_ids, attention_mask, target_mask)
    if not bool(is_target.any()):
        raise ValueError(
            "`target_mask` marks no target, so there is nothing to learn; set it to 1 at the patches and text "
            "tokens to generate, as MDMProcessor does for the last assistant message."
        )
    stray = (is_labelled & ~(is_text & is_target)).nonzero()
    if len(stray):
        raise ValueError(
            f"`labels` gives an id to row {stray[0, 0].item()}, place {stray[0, 1].item()}, which is no text target; "
            "set it to -100 there, or mark the place in `target_mask`."
        )


def as_generators(generator, batch: int) -> list[torch.Generator | None]:
    """One source of noise per row; raises ValueError for what is none."""
    if isinstance(generator, list | tuple):
        if len(generator) != batch:
            raise ValueError(
                f"`generator` is a list of {len(generator)} for a batch of {batch}; give one per row, or a single one."
            )
        generators = list(generator)
    else:
        generators = [generator] * batch
    for one in generators:
        if one is not None and (not isinstance(one, torch.Generator) or one.device.type != "cpu"):
            raise ValueError(
                f"`generator` is {one!r}; it must be a torch.Generator on the CPU, or one per row; for a seed write "
                "torch.Generator().manual_seed(seed)."
            )
    return generators


def replaced_latents(changed, z: Tensor, is_target: Tensor) -> Tensor:
    """The latents after `callback_on_step_end` returned `changed`, those of targets alone; whether they are finite
    shows where they are decoded, as a look at their values would make every step wait for the device."""
    latents = changed.get("latents", z) if isinstance(changed, dict) else changed
    known = isinstance(changed, dict) and set(changed) <= {"latents", "frozen", "input_ids"}
    if not known or not isinstance(latents, Tensor) or latents.shape != z.shape:
        got = f"latents of shape {tuple(latents.shape)}" if isinstance(latents, Tensor) else f"{latents!r:.60}"
        got = got if known or not isinstance(changed, dict) else f"a dict of {', '.join(map(repr, changed))}"
        raise ValueError(
            f"`callback_on_step_end` returned {got}; it must return None or {{'latents': a tensor of shape "
            f"{tuple(z.shape)}}}, the shape that it was given, with 'frozen' and 'input_ids' if need be."
        )
    return torch.where(is_target.unsqueeze(-1), latents.to(z), z)


def frozen_targets(changed: dict, layout: SequenceLayout, config: MDMConfig) -> tuple[Tensor | None, Tensor | None]:
    """The mask "frozen" and the "input_ids" that `callback_on_step_end` returned: (b, l) each, or None."""
    frozen, input_ids, is_target = changed.get("frozen"), changed.get("input_ids"), layout.is_target
    for name, value in (("frozen", frozen), ("input_ids", input_ids)):
        if value is not None and not (isinstance(value, Tensor) and value.shape == is_target.shape):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise ValueError(
                f"`callback_on_step_end` returned {name!r} of {got}; it must be a tensor of shape "
                f"{tuple(is_target.shape)}, the shape of the model's `input_ids`."
            )
    if input_ids is not None and frozen is None:
        raise ValueError(
            "`callback_on_step_end` returned 'input_ids' without 'frozen'; return the mask of the text that they "
            "replace, too."
        )
    if frozen is not None:
        frozen = frozen.to(is_target.device)
        if not bool(((frozen == 0) | (frozen == 1)).all()):
            raise ValueError(
                "`callback_on_step_end` returned 'frozen' with other values than 0 and 1; it must be a mask of the "
                "targets that are to stay."
            )
        frozen = frozen.bool()
    if input_ids is not None:
        _check_tensor("input_ids of callback_on_step_end", input_ids, is_whole=True)
        input_ids = input_ids.to(is_target.device).long()
        said = input_ids[frozen & is_target & layout.is_text]
        no_text = torch.tensor([*config.control_token_ids, *config.placeholder_token_ids], device=said.device)
        wrong = said[(said < 0) | (said >= config.vocab_size) | torch.isin(said, no_text)]
        if len(wrong):
            raise ValueError(
                f"`callback_on_step_end` returned 'input_ids' with {int(wrong[0])} at text that is frozen; they must "
                f"be tokens of text in [0, vocab_size) = [0, {config.vocab_size}), no control tokens."
            )
    return frozen, input_ids


def check_finite(decoded: Tensor, modality: str) -> Tensor:
    """What the VAE made of the final latents; they are not finite if it is not."""
    if not bool(torch.isfinite(decoded).all()):
        raise ValueError(
            f"The {modality} latents decode to NaN or infinity; lower `guidance_scale`, bring `text_temperature` "
            "nearer to 1, take another `scheduler`, return finite latents from `callback_on_step_end`, or run a "
            "float16 model in bfloat16."
        )
    return decoded


def check_targets(layout: SequenceLayout, generation_mode: str | None) -> None:
    image, text = (layout.is_target & layout.is_patch), (layout.is_target & layout.is_text)
    empty = ~(image | text).any(1)
    if bool(empty.any()):
        raise ValueError(
            f"`target_mask` marks nothing to generate in row {empty.nonzero()[0].item()}; set it to 1 at patches or "
            'text tokens, for instance with MDMProcessor(..., generate=("image", "text")).'
        )
    if generation_mode is not None:
        if generation_mode not in ("image", "text"):
            raise ValueError(f"`generation_mode` is {generation_mode!r}; it must be 'image', 'text' or None.")
        if not bool((image if generation_mode == "image" else text).any()):
            raise ValueError(
                f"`generation_mode` is {generation_mode!r}, but the inputs have no such target; make them with "
                f"generate=({generation_mode!r},)."
            )


def check_callback(callback: Any) -> None:
    """Raises ValueError for a `callback_on_step_end` that cannot be called."""
    if callback is not None and not callable(callback):
        raise ValueError(
            f"`callback_on_step_end` is {callback!r:.60}; it must be a function f(model, step, timesteps, tensors), "
            "or None."
        )


def check_state(model: Any, state: Any, batch: int, use_cache: bool = True, input_ids: Tensor | None = None) -> None:
    """Raises ValueError for what is no state of `batch` conversations with this model."""
    if not hasattr(state, "has_image"):
        raise ValueError(
            f"`state` is of type {type(state).__name__}; it must be what `read_conversation` returned, for a "
            "dialogue also the name of a file that it was saved in, or None."
        )
    if not use_cache:
        raise ValueError("Got use_cache=False and a `state`, which is a cache; leave one of the two out.")
    state.check(model, batch, input_ids)


def check_known_targets(config: MDMConfig, layout: SequenceLayout, name: str, value: Any) -> None:
    """Raises ValueError where a target is a placeholder; `name` and `value` are the option that needs it known."""
    for kind, token in (("text", config.text_target_token_id), ("image", config.image_target_token_id)):
        bare = (layout.is_target & (layout.input_ids == token)).nonzero()
        if len(bare):
            raise ValueError(
                f"Got {name}={value} and a target {kind} of which nothing is known, at row {bare[0, 0].item()}, place "
                f"{bare[0, 1].item()}; need what to start from; put it there as the part of a last assistant message, "
                f"in the pipeline as `canvas`, or leave {name} out."
            )


def check_scored(config: MDMConfig, layout: SequenceLayout, num_samples: int, batch_size: int) -> None:
    """Raises ValueError for what `score` cannot score: no target, a placeholder where a target should stand."""
    if whole(num_samples, 4) is None or num_samples % 2:
        raise ValueError(
            f"`num_samples` is {num_samples!r}; it must be an even number, 4 or more: each stratum of times has two "
            "draws, whose difference gives the standard error."
        )
    if whole(batch_size, 1) is None:
        raise ValueError(f"`batch_size` is {batch_size!r}; it must be a whole number, 1 or more.")
    remedy = (
        "put it there, for instance with processor.apply_chat_template(messages), whose last message is the "
        "assistant's and holds the answer."
    )
    empty = ~layout.is_target.any(1)
    if bool(empty.any()):
        raise ValueError(
            f"`target_mask` marks no target in row {empty.nonzero()[0].item()}, so there is nothing to score; mark "
            f"what is to be scored, and {remedy}"
        )
    for name, token in (("text", config.text_target_token_id), ("image", config.image_target_token_id)):
        bare = (layout.is_target & (layout.input_ids == token)).nonzero()
        if len(bare):
            raise ValueError(
                f"`input_ids` holds the placeholder {token} at row {bare[0, 0].item()}, place {bare[0, 1].item()}: "
                f"conditions without the {name} to score; {remedy}"
            )


def _check_tensor(name: str, value: Tensor, is_whole: bool | None = None) -> None:
    """`is_whole` asks for whole numbers, or for floats; None takes both."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"`{name}` is of type {type(value).__name__}; it must be a tensor; build it with torch.tensor."
        )
    is_integer = value.dtype != torch.bool and not value.is_floating_point() and not value.is_complex()
    if is_whole is not None and not (is_integer if is_whole else value.is_floating_point()):
        needed, cast = ("whole numbers", "long") if is_whole else ("floats", "float")
        raise ValueError(f"`{name}` has dtype {value.dtype}; it must hold {needed}; cast it with .{cast}().")


def _check_tokens(config, input_ids, attention_mask, target_mask) -> None:
    _check_tensor("input_ids", input_ids, is_whole=True)
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"`input_ids` has shape {tuple(input_ids.shape)}; it must be (batch, length), neither of them 0."
        )
    for name, mask in (("attention_mask", attention_mask), ("target_mask", target_mask)):
        if mask is None:
            continue
        _check_tensor(name, mask)
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"`{name}` has shape {tuple(mask.shape)}, `input_ids` {tuple(input_ids.shape)}; they must be equal: "
                "one entry a token."
            )
        if ((mask != 0) & (mask != 1)).any():
            raise ValueError(f"`{name}` holds other numbers than 0 and 1; it must say yes or no of each token.")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"`input_ids` holds ids from {low} to {high}; they must lie in [0, vocab_size) = [0, {config.vocab_size})."
        )


def _check_headers(config, input_ids, attention_mask, target_mask) -> None:
    _, is_patch, _, is_target = token_kinds(config, input_ids, attention_mask, target_mask)
    for name, header, targets in (
        ("image", config.time_image_token_id, is_target & is_patch),
        ("text", config.time_text_token_id, is_target & ~is_patch),
    ):
        bare = (targets & ((input_ids == header).cumsum(1) == 0)).nonzero()
        if len(bare):
            raise ValueError(
                f"`target_mask` marks {name} at row {bare[0, 0].item()}, place {bare[0, 1].item()}, without the time "
                f"token {header} before it; put it in front of the first {name} target, as MDMProcessor does."
            )


def _check_images(config, input_ids, pixel_values, image_grid_hw, image_latents) -> None:
    is_start = input_ids == config.image_start_token_id
    is_known = input_ids == config.image_token_id
    is_patch = is_known | (input_ids == config.image_target_token_id)
    depth = (is_start.long() - (input_ids == config.image_end_token_id).long()).cumsum(1)
    stray = (is_patch & (depth != 1)).nonzero()
    if len(stray):
        raise ValueError(
            f"`input_ids` holds a patch at row {stray[0, 0].item()}, place {stray[0, 1].item()}, that is in no image; "
            f"put each image between the tokens {config.image_start_token_id} and {config.image_end_token_id}."
        )
    num_images = int(is_start.sum())
    image = is_start.flatten().long().cumsum(0).view_as(input_ids) - 1  # the index of each patch's image
    known = image[is_known].unique()  # images of which at least one patch is known
    if len(known) and pixel_values is None and image_latents is None:
        raise ValueError(
            f"`input_ids` holds {len(known)} image(s) of known patches (id {config.image_token_id}), but "
            f"`pixel_values` is None; pass the pixels, or use id {config.image_target_token_id} where an image is to "
            "be generated."
        )
    if pixel_values is not None:
        _check_pixels(config, pixel_values, len(known))
    if image_latents is not None:
        _check_latents(config, image_latents, len(known))
    if num_images == 0 and image_grid_hw is None:
        return
    if image_grid_hw is None:
        raise ValueError(
            f"`input_ids` holds {num_images} image(s), but `image_grid_hw` is None; give their (rows, columns) in "
            "patches, shape (images, 2)."
        )
    _check_tensor("image_grid_hw", image_grid_hw, is_whole=True)
    if image_grid_hw.shape != (num_images, 2) or num_images == 0:
        needed = f"it must be ({num_images}, 2)" if num_images else "it must be left out"
        raise ValueError(
            f"`image_grid_hw` has shape {tuple(image_grid_hw.shape)}; `input_ids` holds {num_images} image(s), so "
            f"{needed}."
        )
    counts = torch.bincount(image[is_patch], minlength=num_images)
    grid = image_grid_hw.to(counts.device)
    needed = grid.prod(-1)
    wrong = ((counts != needed) | (grid < 1).any(-1)).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"Image {i} has {counts[i].item()} patch tokens, its `image_grid_hw` {grid[i].tolist()} needs "
            f"{needed[i].item()}, from 1 or more rows and columns; expand the image token once per patch."
        )
    for name, images, patch, unit in (
        ("pixel_values", pixel_values, config.pixel_patch_size, "pixels"),
        ("image_latents", image_latents, config.vae_config.patch_size, "latents"),
    ):
        if images is not None and len(known):
            height, width = (grid[known].amax(0) * patch).tolist()
            if height > images.shape[2] or width > images.shape[3]:
                raise ValueError(
                    f"`image_grid_hw` asks for images of up to {height}x{width} {unit}, `{name}` is only "
                    f"{images.shape[2]}x{images.shape[3]}; make them agree."
                )


def _check_latents(config, image_latents, num_known: int) -> None:
    if config.pixel_autoencoder is None:
        raise ValueError(
            "Got `image_latents` for a model without a pixel autoencoder; pass the images as `pixel_values`, or build "
            "the model from config.with_pixel_autoencoder(repo_id)."
        )
    _check_stack("image_latents", image_latents, config.vae_config.num_channels, num_known, config.image_token_id)
    p = config.vae_config.patch_size
    if image_latents.shape[2] % p or image_latents.shape[3] % p:
        raise ValueError(
            f"`image_latents` is {image_latents.shape[2]}x{image_latents.shape[3]}, not a multiple of patch_size {p}; "
            f"encode images whose sides are multiples of {config.pixel_patch_size} pixels."
        )


def _check_pixels(config, pixel_values, num_known: int) -> None:
    _check_stack("pixel_values", pixel_values, config.image_channels, num_known, config.image_token_id)
    if bool((pixel_values.abs() > 1 + PIXEL_SLACK).any()):
        raise ValueError(
            f"`pixel_values` ranges from {pixel_values.min().item():g} to {pixel_values.max().item():g}; pixels must "
            "lie in [-1, 1], black to white; scale them as MDMImageProcessorPil does."
        )


def _check_stack(name: str, images, num_channels: int, num_known: int, image_token_id: int) -> None:
    _check_tensor(name, images, is_whole=False)
    if images.ndim != 4 or images.shape[1] != num_channels:
        raise ValueError(
            f"`{name}` has shape {tuple(images.shape)}; it must be (images, {num_channels}, height, width)."
        )
    if len(images) == num_known == 0:
        raise ValueError(f"`{name}` holds no image; leave it out of a batch that has none.")
    if len(images) != num_known:
        raise ValueError(
            f"`{name}` holds {len(images)} image(s), `input_ids` has places for {num_known}; give "
            f"one run of id {image_token_id} between image start and end tokens for each image."
        )
    if not bool(torch.isfinite(images).all()):
        needed = ", in [-1, 1]" if name == "pixel_values" else ""
        raise ValueError(f"`{name}` holds NaN or infinity; all values must be finite{needed}.")
