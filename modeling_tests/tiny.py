"""A tiny model and hand-made sequences for the tests; token ids as MDMConfig's defaults have them."""

from pathlib import Path

import diffusers
import torch

from mdm_hf import MDMConfig, MDMForMultiModalGeneration, MDMPipeline, MDMProcessor


CARD = Path(__file__).parents[1] / "model_cards" / "mdm-digits"
VOCAB, LATENT, GRID, CANVAS = 64, 8, (2, 3), 5
KINDS = ("class_to_image", "text_to_image", "caption", "both", "text")
CLASS, TIME_IMAGE, TIME_TEXT, IMAGE, IMAGE_TARGET, TEXT_TARGET, USER, ASSISTANT = 4, 5, 6, 11, 12, 13, 14, 15


def tiny_config(**overrides) -> MDMConfig:
    options = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "state_size": 8,
        "head_dim": 16,
        "condition_broadcast": True,
        "position_periods": [2, 4],
        "num_classes": 10,
        "vae_config": {
            "vocab_size": VOCAB,
            "num_channels": 1,
            "latent_size": LATENT,
            "hidden_size": 32,
            "num_hidden_layers": 1,
        },
    }
    return MDMConfig(**(options | overrides))


def tiny_model(**overrides) -> MDMForMultiModalGeneration:
    """Random weights, the head included, so that every part of the model has its effect on the output."""
    torch.manual_seed(0)
    model = MDMForMultiModalGeneration(tiny_config(**overrides)).eval()
    torch.nn.init.normal_(model.latent_head.weight, std=0.3)
    return model


def tiny_pipeline(**options) -> MDMPipeline:
    """A narrow mdm-digits with random weights and the shipped processor."""
    torch.manual_seed(0)
    model = MDMForMultiModalGeneration(MDMConfig.from_preset("mdm-digits", hidden_size=32, num_hidden_layers=2)).eval()
    torch.nn.init.normal_(model.latent_head.weight, std=0.3)
    pipe = MDMPipeline(model, MDMProcessor.from_pretrained(CARD), device="cpu", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_autoencoder(class_name: str = "AutoencoderKL", seed: int = 0, **options) -> torch.nn.Module:
    """A pixel autoencoder with random weights: RGB images to latents of 4 channels, half as high and wide."""
    sizes = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    torch.manual_seed(seed)
    return getattr(diffusers, class_name)(**(sizes | options)).eval()


def save_autoencoder(folder, class_name: str = "AutoencoderKL", seed: int = 0, **options) -> torch.nn.Module:
    """Writes one, with a card that names its licence, as a repository on the Hub has it."""
    autoencoder = tiny_autoencoder(class_name, seed, **options)
    autoencoder.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nAn autoencoder.\n")
    return autoencoder


def model_with(folder, **overrides) -> MDMForMultiModalGeneration:
    """A tiny model with the autoencoder of a folder in front of it."""
    config = tiny_config(**overrides).with_pixel_autoencoder(str(folder))
    torch.manual_seed(0)
    model = MDMForMultiModalGeneration(config).eval().load_pixel_autoencoder()
    torch.nn.init.normal_(model.latent_head.weight, std=0.3)
    return model


def rgb_pixels(n: int = 1, height: int = 4 * GRID[0], width: int = 4 * GRID[1], seed: int = 0) -> torch.Tensor:
    """Images of GRID patches of 2x2 latents, each latent of 2x2 pixels."""
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def image_segment(token: int) -> list[int]:
    return [7, *[token] * (GRID[0] * GRID[1]), 8]


def text_segment(ids: list[int]) -> list[int]:
    return [9, *ids, 10]


def row(kind: str, is_training: bool = False) -> tuple[list[int], int]:
    """Token ids and how many of the last positions form the target group, its time token included."""
    image = [TIME_IMAGE, *image_segment(IMAGE if is_training else IMAGE_TARGET)]
    text = [TIME_TEXT, *text_segment([33, 34, 35, 2, 2] if is_training else [TEXT_TARGET] * CANVAS)]
    prefix, target = {
        "class_to_image": ([], image),
        "text_to_image": ([USER, *text_segment([20, 21, 22])], image),
        "caption": ([USER, *image_segment(IMAGE)], text),
        "both": ([], image + text),
        "text": ([USER, *text_segment([20, 21])], text),
        "chat": (20 * [USER, *text_segment([20, 21]), ASSISTANT, *text_segment([22])], text),  # many more segments
    }[kind]
    return [CLASS, *prefix, ASSISTANT, *target], len(target)


def batch(kinds, is_training: bool = False) -> dict:
    """Model inputs of one row per kind, padded on the right."""
    rows = [row(kind, is_training) for kind in kinds]
    length = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows])
    target_mask = torch.zeros_like(input_ids)
    for i, (ids, size) in enumerate(rows):
        for j in range(len(ids) - size, len(ids)):
            target_mask[i, j] = ids[j] >= IMAGE or ids[j] in (1, 2, 3)
    known = int(((input_ids == 7)[:, :-1] & (input_ids == IMAGE)[:, 1:]).sum())
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "target_mask": target_mask,
        "class_ids": torch.tensor([3 if kind == "class_to_image" else -1 for kind in kinds]),
    }
    if known:
        pixels = torch.rand(1, 1, 2 * GRID[0], 2 * GRID[1], generator=torch.Generator().manual_seed(1)) * 2 - 1
        inputs["pixel_values"] = pixels.repeat(known, 1, 1, 1)
    images = int((input_ids == 7).sum())
    if images:
        inputs["image_grid_hw"] = torch.tensor([list(GRID)] * images)
    if is_training:
        is_text = (target_mask == 1) & (input_ids != IMAGE)
        inputs["labels"] = torch.where(is_text, input_ids, -100)
    return inputs


def rgb_batch(kinds, is_training: bool = False) -> dict:
    """As `batch`, for a model with an autoencoder in front of it."""
    inputs = batch(kinds, is_training)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = rgb_pixels(len(inputs["pixel_values"]))
    return inputs


def generators(seeds) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def fixed_noise(inputs: dict, seed: int = 0) -> torch.Tensor:
    """The same noise at the same place of a row, however long the batch makes it."""
    b, length = inputs["input_ids"].shape
    noise = torch.randn(b, 200, LATENT, generator=torch.Generator().manual_seed(seed))
    return noise[:, :length]
