"""Images encoded once by the model's pixel autoencoder: latents in safetensors shards, read back one by one.

    folder/
      latent_cache.json           what made them, their number, their names
      latents-00000.safetensors   `shard_size` images, each a tensor (c, h, w) under its index
      ...

A shard is written aside and renamed when all of it is there, so a run killed at any moment goes on at the first shard
that is missing, and batches as it would have.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from ..checkpoints import write_whole
from ..image_processing_mdm import MDMImageProcessorPil
from ..modeling_mdm import MDMForMultiModalGeneration
from ..pixel_autoencoder import MDMPixelAutoencoder


INDEX = "latent_cache.json"
UNFINISHED = ".unfinished"
# What of the image processor shows in the pixels.
SETTINGS = (
    "size",
    "do_resize",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "patch_size",
    "num_channels",
    "aspect_ratio_buckets",
)


def autoencoder_fingerprint(autoencoder: MDMPixelAutoencoder) -> str:
    """A hash of the configuration and of the weights, these in bfloat16: the same for a model loaded in bfloat16."""
    digest = hashlib.sha256(json.dumps(autoencoder.spec["config"], sort_keys=True).encode())
    digest.update(
        str((autoencoder.spec["class_name"], getattr(autoencoder.autoencoder, "use_tiling", False))).encode()
    )
    for name, weight in sorted(autoencoder.autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _made_by(model: MDMForMultiModalGeneration | None, image_processor: MDMImageProcessorPil | None) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if model is not None:
        autoencoder = model.base_model.pixel_autoencoder
        if autoencoder is None:
            raise ValueError(
                "Got a model without a pixel autoencoder, which has no latents to cache; build it from "
                "config.with_pixel_autoencoder(repo_id)."
            )
        made["autoencoder"] = autoencoder_fingerprint(autoencoder)
    if image_processor is not None:
        settings = image_processor.to_dict()
        config = None if model is None else model.config
        if config is not None and (image_processor.patch_size, image_processor.num_channels) != (
            config.pixel_patch_size,
            config.image_channels,
        ):
            raise ValueError(
                f"Got an image processor with patch_size {image_processor.patch_size} and num_channels "
                f"{image_processor.num_channels}; the model needs {config.pixel_patch_size} and "
                f"{config.image_channels}; use MDMImageProcessorPil.for_model(model.config)."
            )
        made |= json.loads(json.dumps({name: settings.get(name) for name in SETTINGS}, default=dict))
    return made


def _check_same(folder: Path, recorded: dict, wanted: dict) -> None:
    for name, value in wanted.items():
        if recorded.get(name) != value:
            shown = (f"{one!r}" if len(f"{one!r}") <= 60 else f"{one!r:.60}..." for one in (recorded.get(name), value))
            raise ValueError(
                "Got the latent cache {} with {} {}; this call has {}; need the same; use the model and the image "
                "processor that it was made with, or write a new one into another folder.".format(folder, name, *shown)
            )


def _shard_name(shard: int) -> str:
    return f"latents-{shard:05d}.safetensors"


@torch.no_grad()
def write_latent_cache(
    images: Sequence | Callable[[int], Any],
    model: MDMForMultiModalGeneration,
    image_processor: MDMImageProcessorPil,
    folder: str | Path,
    *,
    count: int | None = None,
    names: Sequence[str] | None = None,
    batch_size: int = 16,
    shard_size: int = 1024,
    dtype: torch.dtype = torch.float32,
    progress_bar: bool = True,
) -> "LatentCache":
    """Encodes images once. Where a former call was killed, this one goes on.

    Args:
        images: Whatever the image processor takes, by index: a sequence, or a function of the index with `count`.
        model: The model, on the device that is to encode.
        image_processor: The model's; its buckets are the sizes of the latents.
        folder: Gets the shards.
        count: Number of images, where `images` is a function.
        names: One for each image, to know it by later: its file, say.
        batch_size: Images encoded together. A shard's images are batched among themselves.
        shard_size: Images in a file.
        dtype: Of the latents on the disk. float32 keeps them exactly; half precision takes half the space.
        progress_bar: Show the images on a progress bar.

    Returns:
        The cache, opened.

    Raises:
        ValueError: the folder holds a cache of other images, or made by another autoencoder or image processor; or an
            image, which is named, is one that the image processor refuses.
    """
    if count is None and not hasattr(images, "__len__"):
        raise ValueError("Got `images` without a length; need `count`, the number of images, beside a function.")
    count = len(images) if count is None else count  # type: ignore[arg-type]
    for name, value in (("count", count), ("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"Got {name} {value}; need 1 or more.")
    if names is not None and len(names) != count:
        raise ValueError(f"Got {len(names)} names for {count} images; need one each.")
    read = images if callable(images) else images.__getitem__
    folder = Path(folder)
    made = _made_by(model, image_processor) | {
        "count": count,
        "shard_size": shard_size,
        "dtype": str(dtype).removeprefix("torch."),
        "names": None if names is None else list(names),
    }
    if (folder / INDEX).exists():
        _check_same(folder, _read_index(folder), made)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / INDEX, json.dumps(made, indent=1))
    aside = folder / UNFINISHED

    with logging.tqdm(total=count, desc="Encoding", disable=not progress_bar) as bar:
        for shard, first in enumerate(range(0, count, shard_size)):
            index = range(first, min(first + shard_size, count))
            if not (folder / _shard_name(shard)).exists():
                latents: list[Tensor] = []
                for start in index[::batch_size]:
                    numbers = range(start, min(start + batch_size, index.stop))
                    batch = [_taken(read(i), i if names is None else names[i], image_processor) for i in numbers]
                    latents += _encode(batch, model, image_processor)
                    bar.update(len(batch))
                save_file({str(i): z.to(dtype) for i, z in zip(index, latents, strict=True)}, aside)
                os.replace(aside, folder / _shard_name(shard))
            else:
                bar.update(len(index))
    return LatentCache(folder)


def _taken(image: Any, name: str | int, image_processor: MDMImageProcessorPil) -> np.ndarray:
    """The pixels (c, h, w) of an image, opened if need be."""
    try:
        return image_processor.process_image(image_processor.fetch_images(image))
    except ValueError as error:
        raise ValueError(
            f"Got the picture {name}, which cannot be encoded: {error} Then call again, which goes on from there; to "
            "leave the picture out, take another output folder as well."
        ) from error


def _encode(batch: list, model: MDMForMultiModalGeneration, image_processor: MDMImageProcessorPil) -> list[Tensor]:
    """The latents (c, h, w) of each image, on the CPU."""
    inputs = image_processor(batch, return_tensors="pt")
    grid, config = inputs["image_grid_hw"], model.config
    sizes = [(h, w) for h, w in (grid * config.pixel_patch_size).tolist()]
    autoencoder = model.base_model.pixel_autoencoder
    latents = autoencoder.encode_padded(inputs["pixel_values"].to(autoencoder.is_loaded.device), sizes).cpu()
    cut = (grid * config.vae_config.patch_size).tolist()
    return [z[:, :h, :w].contiguous() for z, (h, w) in zip(latents, cut, strict=True)]


def _read_index(folder: Path) -> dict:
    try:
        return json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Got {folder}, of which no {INDEX} can be read ({error}); need a folder that write_latent_cache or "
            "`mdm cache-latents` has written; check the path."
        ) from error


class LatentCache(Sequence):
    """What `write_latent_cache` wrote; `cache[i]` is an image part of a message, of which the file is read when asked.

    Args:
        folder: Where the shards are.
        model, image_processor: Where given, the cache has to be made by the same autoencoder and settings.

    Raises:
        ValueError: no cache, an unfinished one, or one made by another autoencoder or with other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        model: MDMForMultiModalGeneration | None = None,
        image_processor: MDMImageProcessorPil | None = None,
    ):
        self.folder = Path(folder)
        self.record = _read_index(self.folder)
        _check_same(self.folder, self.record, _made_by(model, image_processor))
        self.names: list[str] | None = self.record["names"]
        self._open = _opener()
        shards = -(-len(self) // self.record["shard_size"])
        missing = [shard for shard in range(shards) if not (self.folder / _shard_name(shard)).exists()]
        if missing:
            raise ValueError(
                f"Got {self.folder} with {shards - len(missing)} of {shards} shards; need all; call "
                "write_latent_cache again, which goes on where it was stopped."
            )

        self._index = {name: i for i, name in enumerate(self.names or ())}

    def __len__(self) -> int:
        return self.record["count"]

    def index_of(self, name: str) -> int | None:
        """The index of the picture of that name, its path under the folder that was encoded; None if there is none."""
        return self._index.get(name)

    def __getstate__(self) -> dict:  # open files do not go to the workers of a data loader
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _open=_opener())

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = index + len(self) if index < 0 else index
        if not 0 <= i < len(self):
            raise IndexError(f"Got index {index}; the latent cache {self.folder} holds {len(self)} images.")
        file = self._open(self.folder / _shard_name(i // self.record["shard_size"]))
        return {"type": "image", "latents": file.get_tensor(str(i))}


def _opener() -> Callable:
    """Maps a shard into memory; the last ones used stay open."""
    return lru_cache(maxsize=256)(partial(safe_open, framework="pt"))


def pictures_in(folder: str | Path) -> list[Path]:
    """The picture files under `folder`, sorted.

    Raises:
        ValueError: there is none.
    """
    suffixes = Image.registered_extensions()
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not found:
        raise ValueError(f"Got {folder}, in which there is no picture; need a folder with PNG, JPEG or other images.")
    return found
