"""What a recipe's stages would take, before anything is trained: `mdm train recipe.yaml --dry-run`."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging

from ..configuration_mdm import MDM_PRESETS, MDMConfig, MDMVAEConfig
from ..processing_mdm import MDMProcessor
from .assembly import IMAGE_SIZE, freeze, make_arguments, make_config, make_mix, make_processor
from .memory import TrainingEstimate, estimate_training, images_name, largest_batch
from .pictures import LOOK_AT, some_examples
from .recipe import OF_FITTED, STAGES, builds_processor, stage_options
from .trainer import ConversationCollator


logger = logging.get_logger(__name__)


def dry_run(recipe: dict) -> Iterator[tuple[str, TrainingEstimate]]:
    """What each training stage takes, after a line that says of what rows. Writes nothing, trains nothing.

    The rows are like the longest of a few of the data; where there is no processor or no data yet, like the largest
    that the recipe's processor can make: an image and a text.
    """
    root = Path(recipe["output_dir"])
    built = not builds_processor(recipe) or (root / "processor").is_dir()
    processor = make_processor(recipe) if built else None
    for name in STAGES:
        if name in OF_FITTED or name not in recipe["stages"]:
            continue
        arguments = make_arguments(recipe, name, root / name)
        config = _config_for_dry_run(recipe, processor)
        rows = arguments.per_device_train_batch_size
        make_batch, described = _rows_for_dry_run(recipe, name, config, processor, rows)
        if name == "vae":
            config.diffusion_weight = 0.0
        options = stage_options(recipe, name)

        def prepare(model, name=name, options=options, arguments=arguments):
            if arguments.gradient_checkpointing:
                getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            return freeze(model, name, options)

        estimate = estimate_training(
            config,
            make_batch,
            rows,
            device=arguments.device,
            autocast=torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None,
            prepare=prepare,
            accumulation=arguments.gradient_accumulation_steps,
            processes=arguments.world_size,
            is_sharded=bool(arguments.fsdp),
        )
        yield f"{name}, rows like {described}", estimate


def _config_for_dry_run(recipe: dict, processor: MDMProcessor | None) -> MDMConfig:
    previous = recipe["model"].get("from")
    if previous is not None:
        return MDMConfig.from_pretrained(previous, **copy.deepcopy(recipe["model"].get("config") or {}))
    try:
        return make_config(recipe, processor)
    except ValueError as error:
        if not recipe["model"].get("pixel_autoencoder"):
            raise
        logger.warning(f"Estimated for the preset's latents alone, without the pixel autoencoder: {error}")
        alone = recipe["model"] | {"pixel_autoencoder": None}
        config = make_config(recipe | {"model": alone}, processor)
        latents = {key: MDMVAEConfig().to_dict()[key] for key in ("num_channels", "patch_size")}
        for key, value in (latents | MDM_PRESETS[alone["preset"]]["vae_config"]).items():
            setattr(config.vae_config, key, value)
        return config


def _as_the_vae_sees(
    config: MDMConfig, processor: MDMProcessor, collate: Callable[[list[dict]], dict], examples: list[dict]
) -> dict:
    """The batch of `examples` with pictures made up, of as many patches, behind the autoencoder: none is loaded."""
    batch = collate(examples)
    if "pixel_values" in batch:
        n, _, *sides = batch.pop("pixel_values").shape
        vae = config.vae_config
        sides = [side // processor.patch_size * vae.patch_size for side in sides]
        batch[images_name(config)] = torch.rand(n, vae.num_channels, *sides) * 2 - 1
    return batch


def _rows_for_dry_run(
    recipe: dict, name: str, config: MDMConfig, processor: MDMProcessor | None, rows: int
) -> tuple[Callable[[int], dict], str]:
    if processor is not None:
        try:
            mix = make_mix(recipe, name, rows * LOOK_AT, rows, processor)
            collate = partial(_as_the_vae_sees, config, processor, ConversationCollator(processor))
            longest = max(some_examples(mix), key=lambda example: collate([example])["input_ids"].shape[1])
            length = collate([longest])["input_ids"].shape[1]
            return (lambda n: collate([longest] * n)), f"the longest of {LOOK_AT} of the data, {length} positions"
        except (ValueError, OSError) as error:
            logger.warning(f"Rows are made up, for the recipe's data cannot be read: {error}")
    spec = recipe["processor"] if processor is None else None
    if spec is None:
        size, patch, text = processor.image_processor.size, processor.patch_size, processor.max_new_tokens
        grid = size.height // patch, size.width // patch
    else:
        height, width = spec.get("image_size", IMAGE_SIZE)
        grid = height // spec["patch_size"], width // spec["patch_size"]
        text = spec.get("max_new_tokens", 128)
    return partial(largest_batch, config, image_grid=grid, text_tokens=text), (
        f"an image of {grid[0]}x{grid[1]} patches and a text of {text} tokens"
    )
