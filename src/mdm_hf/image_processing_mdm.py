"""Pictures to pixel values in [-1, 1] and back, with Pillow and NumPy alone."""

import math
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack

from .image_reading import MODES, converted, is_unit, marked_by, opened


RANGE_SLACK = 1e-3  # what rounding may add to [-1, 1]
WIDEST_BUCKET = 2  # long side to short side
LAYOUTS = ("channels_first", "channels_last")
# What other image processors can do and this one cannot: what is needed instead, and what to do.
CUT = "`aspect_ratio_buckets` to have pictures cut; leave it out, or cut them yourself"
PADDED = "pictures padded to the largest of the call, as they are; leave it out"
REFUSED_IMAGE_OPTIONS = {
    "do_center_crop": CUT,
    "crop_size": CUT,
    "do_pad": PADDED,
    "pad_size": PADDED,
    "data_format": "pixel values with their channels first, as the model reads them; leave it out",
    "image_seq_length": "as many positions as an image has patches; leave it out",
    "device": "tensors that are moved when they are made; leave it out and call .to(device) on the result",
}


class MDMImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    patch_size (`int`, *optional*):
        Height and width of a patch in pixels; one patch is one position of the sequence.
    num_channels (`int`, *optional*):
        1 for grey images, 3 for RGB.
    max_pixels (`int`, *optional*):
        Larger images are refused before they are decoded.
    downsampling (`int`, *optional*):
        Pixels to a latent of the pixel autoencoder, along a side; 1 where there is none.
    aspect_ratio_buckets (`bool` or `list`, *optional*):
        Where images are resized: each is cut around its centre and resized to the bucket nearest to its own aspect
        ratio, instead of all being squeezed into `size`. A list of (height, width), or True for those that
        `buckets_of_area` makes of `size`.
    """

    patch_size: int
    num_channels: int
    max_pixels: int
    downsampling: int
    aspect_ratio_buckets: bool | list | tuple


class MDMImageProcessorPil(PilBackend):
    """Any picture -> `pixel_values` (n, c, h, w) in [-1, 1] and `image_grid_hw` (n, 2), rows and columns in patches.

    Pictures are turned upright, converted to grey or RGB, resized to `size` unless `do_resize` is off, rescaled and
    normalised, and padded with 0 at the bottom and the right to the largest of the call. `postprocess` goes back.

    Behind a pixel autoencoder, latents made before take the place of pictures: `pad_latents`. `for_model` makes the
    image processor that fits a model.

    Arrays and tensors hold whole numbers or floats from 0 to 255. A float image with all its values in [0, 1], or one
    of booleans, is taken to run from 0, black, to 1, white: its rescale factor is 1 instead of `rescale_factor`.

    Args:
        size: {"height": ..., "width": ...}, multiples of `patch_size`.
        patch_size, num_channels, max_pixels, downsampling, aspect_ratio_buckets: See [`MDMImageProcessorKwargs`].
        do_resize, do_rescale, do_normalize, resample, image_mean, image_std, rescale_factor: As in every image
            processor.
        input_data_format: "channels_first" or "channels_last", of arrays and tensors; told by `num_channels` if None,
            first where either may be.

    Raises:
        ValueError: sizes that do not fit together; options of other image processors, such as `do_center_crop`.
    """

    valid_kwargs = MDMImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_hw"]

    do_resize = True
    size: Any = {"height": 256, "width": 256}
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5]
    image_std = [0.5]
    patch_size = 16
    num_channels = 3
    max_pixels = 4096 * 4096
    downsampling = 1
    aspect_ratio_buckets: Any = False

    def __init__(self, **kwargs: Unpack[MDMImageProcessorKwargs]):
        check_refused(REFUSED_IMAGE_OPTIONS, dict(kwargs))
        super().__init__(**kwargs)
        if self.num_channels not in MODES:
            raise ValueError(f"Got num_channels {self.num_channels}; need 1 (grey) or 3 (RGB).")
        if self.patch_size < 1 or self.max_pixels < 1:
            raise ValueError(f"Got patch_size {self.patch_size} and max_pixels {self.max_pixels}; need 1 or more.")
        if self.downsampling < 1 or self.patch_size % self.downsampling:
            raise ValueError(
                f"Got downsampling {self.downsampling} and patch_size {self.patch_size}; need a patch_size that is a "
                "multiple of downsampling, patches of whole latents; use MDMImageProcessorPil.for_model(config)."
            )
        if self.aspect_ratio_buckets and not self.do_resize:
            raise ValueError(
                "Got aspect_ratio_buckets with do_resize=False; need do_resize=True; drop one of the two."
            )
        if self.do_resize:
            self.grid_of(self.size.height, self.size.width)
            buckets = self._buckets(self.aspect_ratio_buckets, self.size, self.patch_size)
            self.aspect_ratio_buckets = self.aspect_ratio_buckets is True or buckets or False

    @classmethod
    def for_model(cls, config: Any, **options: Any) -> "MDMImageProcessorPil":
        """The image processor that fits a model: channels and patches of its MDMConfig; `options` for the rest."""
        fitting = {
            "num_channels": config.image_channels,
            "patch_size": config.pixel_patch_size,
            "downsampling": config.pixel_downsampling,
        }
        return cls(**fitting | options)

    def _buckets(self, buckets: bool | Sequence, size: SizeDict, patch_size: int) -> Sequence:
        """The (height, width) that images may be resized to, apart from `size`; none without buckets."""
        if isinstance(buckets, bool):
            return buckets_of_area(size.height, size.width, patch_size) if buckets else ()
        for bucket in buckets:
            if not isinstance(bucket, list | tuple) or len(bucket) != 2:
                raise ValueError(
                    f"Got the bucket {bucket!r}; need (height, width) in pixels, or True for the usual ones."
                )
            self.grid_of(bucket[0], bucket[1], patch_size)
        return [list(bucket) for bucket in buckets]

    def grid_of(self, height: int, width: int, patch_size: int | None = None) -> tuple[int, int]:
        """(rows, columns) in patches of an image of `height` x `width` pixels.

        Raises:
            ValueError: a side is not a multiple of the patch size.
        """
        patch_size = patch_size or self.patch_size
        for name, side in (("height", height), ("width", width)):
            if side is None:
                raise ValueError(f"Got a size without {name}; need both sides in pixels: {{'height': h, 'width': w}}.")
            if side < 1:
                raise ValueError(f"Got image {name} {side}; need {patch_size} or a multiple of it, whole patches.")
            if side < patch_size or side % patch_size:
                below = side // patch_size * patch_size
                nearest = f"{below} or {below + patch_size}" if below > 0 else f"{patch_size}"
                raise ValueError(
                    f"Image {name} {side} is not a multiple of patch_size {patch_size}; resize to {nearest}."
                )
        return height // patch_size, width // patch_size

    def fetch_images(self, image_url_or_urls):
        """Opens paths, URLs and bytes; images and arrays pass through."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, str | bytes | os.PathLike):
            source = image_url_or_urls
            return opened(os.fspath(source) if isinstance(source, os.PathLike) else source, self.max_pixels)
        if isinstance(image_url_or_urls, Image.Image | np.ndarray | torch.Tensor):
            return image_url_or_urls
        raise ValueError(
            f"Got an image of type {type(image_url_or_urls).__name__}; need a PIL image, an array, a tensor, a path, "
            "a URL, or the bytes of an image file."
        )

    def _prepare_images_structure(self, images, expected_ndims: int = 3) -> list:
        """One image, a nested list of them, or a stack (n, c, h, w) -> a flat list."""
        return list(_flat(self.fetch_images(images)))

    def process_image(
        self,
        image,
        num_channels: int | None = None,
        max_pixels: int | None = None,
        input_data_format: str | None = None,
        do_convert_rgb: bool | None = None,
        **kwargs: Any,
    ):
        """One PIL image, array or tensor -> array (c, h, w)."""
        num_channels = num_channels or self.num_channels
        max_pixels = max_pixels or self.max_pixels
        if do_convert_rgb and num_channels != 3:
            raise ValueError(
                f"Got do_convert_rgb=True with num_channels={num_channels}, which says what pictures become; need 3 "
                "for RGB; leave it out."
            )
        if isinstance(image, Image.Image):
            width, height = image.size
            if not width * height:
                raise ValueError(f"Got an image of {height}x{width} pixels; need some; give one that holds a picture.")
            if width * height > max_pixels:  # known from the header, before any pixel is decoded
                raise ValueError(
                    f"Got an image of {height}x{width} = {height * width} pixels; need at most max_pixels = "
                    f"{max_pixels}; give a smaller image or raise max_pixels."
                )
            return _to_channels_first(converted(image, num_channels))
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = image.float() if image.dtype == torch.bfloat16 else image  # which NumPy does not have
        array = np.asarray(image)
        if array.dtype.kind not in "biuf" or array.size == 0:
            raise ValueError(
                f"Got an image array of dtype {array.dtype} and shape {tuple(array.shape)}; need whole numbers from 0 "
                "to 255, floats or booleans, and no side of 0; convert it."
            )
        if input_data_format not in (None, *LAYOUTS):
            raise ValueError(
                f"Got input_data_format={input_data_format!r}; need one of {', '.join(LAYOUTS)}; leave it out to have "
                "it told by the number of channels."
            )
        array = array.astype(np.float32) if array.dtype.kind == "b" else array
        shape = array.shape
        if array.ndim == 2 and num_channels == 1:
            array = array[None]
        elif array.ndim == 3 and (input_data_format or _layout_of(shape, num_channels)) == "channels_last":
            array = np.moveaxis(array, -1, 0)
        if array.ndim != 3 or array.shape[0] != num_channels:
            raise ValueError(
                f"Got an image array of shape {tuple(shape)}; need {num_channels} channel(s): "
                f"({num_channels}, height, width) or (height, width, {num_channels}); convert it, or give a PIL "
                "image, which is converted for you."
            )
        if array.shape[1] * array.shape[2] > max_pixels:
            raise ValueError(
                f"Got an image of {array.shape[1]}x{array.shape[2]} pixels; need at most max_pixels = {max_pixels}; "
                "give a smaller image or raise max_pixels."
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(
                "Got an image with NaN or infinity among its pixels; all must be finite; mend its source."
            )
        return array

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: "PILImageResampling | int | None",
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        return_tensors: str | None,
        patch_size: int | None = None,
        aspect_ratio_buckets: bool | Sequence = False,
        **kwargs: Any,
    ) -> BatchFeature:
        if not images:
            raise ValueError("Got no images; need at least one; leave the image processor out where there is none.")
        check_refused(REFUSED_IMAGE_OPTIONS, kwargs)
        are_unit = [is_unit(image) for image in images]
        if do_resize:
            buckets = self._buckets(aspect_ratio_buckets, size, patch_size or self.patch_size)
            sizes = [_nearest(buckets, *image.shape[1:]) if buckets else (size.height, size.width) for image in images]
            if buckets:
                images = [_centre_crop(image, h, w) for image, (h, w) in zip(images, sizes, strict=True)]
            images = [
                image if image.shape[1:] == (h, w) else self._resized(image, unit, SizeDict(h, w), resample)
                for image, unit, (h, w) in zip(images, are_unit, sizes, strict=True)
            ]
        grids = np.array(
            [self.grid_of(image.shape[1], image.shape[2], patch_size) for image in images], dtype=np.int64
        )
        height, width = np.max([image.shape[1:] for image in images], axis=0)
        factor = rescale_factor if do_rescale else 1
        scale = np.array([1 if unit else factor for unit in are_unit], dtype=np.float32).reshape(-1, 1, 1, 1)
        mean, std = np.zeros((1, 1, 1), np.float32), np.ones((1, 1, 1), np.float32)
        if do_normalize:
            mean = np.asarray(image_mean, dtype=np.float32).reshape(-1, 1, 1)
            std = np.asarray(image_std, dtype=np.float32).reshape(-1, 1, 1)
        pixels = np.zeros((len(images), images[0].shape[0], height, width), dtype=np.float32)
        if all(image.shape == images[0].shape for image in images):
            pixels = (np.stack(images).astype(np.float32) * scale - mean) / std
        else:
            for row, image, own in zip(pixels, images, scale, strict=True):
                row[:, : image.shape[1], : image.shape[2]] = (image.astype(np.float32) * own - mean) / std
        low, high = float(pixels.min()), float(pixels.max())
        if do_normalize and not (low >= -1 - RANGE_SLACK and high <= 1 + RANGE_SLACK):
            raise ValueError(
                f"Got pixels that become {low:g} to {high:g}; need [-1, 1]; give values from 0 to 255, or floats from "
                "0 to 1."
            )
        return BatchFeature({"pixel_values": pixels, "image_grid_hw": grids}, tensor_type=return_tensors)

    def _resized(self, image: np.ndarray, unit: bool, size: SizeDict, resample) -> np.ndarray:
        """`image` of another size, by way of the 256 levels that Pillow resizes."""
        levels = image * 255 if unit else image
        low, high = float(levels.min()), float(levels.max())
        if not (low >= 0 and high <= 255):
            raise ValueError(
                f"Got an image to resize with pixels from {low:g} to {high:g}; need 0 to 255; give values from 0 to "
                "255, or floats from 0 to 1."
            )
        resized = self.resize(np.rint(levels).astype(np.uint8), size, resample)
        return resized / np.float32(255) if unit else resized

    def patch_mask(
        self, mask: Any, grid: Sequence[int], shape: Sequence[int] | None = None, is_cut: bool | None = None
    ) -> np.ndarray:
        """Which patches of a picture a mask of it touches: (rows, columns) bool.

        Args:
            mask: PIL image, path, URL or array (height, width) of what is to be made: white, or at least half of it.
                It is laid over the picture, upright, as the picture is processed: stretched or cut.
            grid: (rows, columns) of the picture in patches.
            shape: (height, width) of the picture before it was processed. A mask is of that aspect ratio, to a pixel,
                or of the grid's; unchecked if None.
            is_cut: Whether the picture was cut to the grid's aspect ratio; `aspect_ratio_buckets` says it if None.

        Raises:
            ValueError: no mask of two dimensions, one that marks nothing, or one of another aspect ratio.
        """
        if isinstance(mask, str | bytes | os.PathLike):
            mask = self.fetch_images(mask)
        if isinstance(mask, Image.Image) and mask.width * mask.height > self.max_pixels:
            raise ValueError(
                f"Got an image mask of {mask.height}x{mask.width} pixels; need at most max_pixels = "
                f"{self.max_pixels}; give a smaller one."
            )
        rows, columns = grid
        marked = marked_by(mask)
        h, w = marked.shape
        if shape is not None and not any(_is_alike(h, w, *of) for of in (shape, grid)):
            raise ValueError(
                f"Got an image mask of {h}x{w} over a picture of {shape[0]}x{shape[1]} pixels, height and width as it "
                "is seen, upright; need one aspect ratio; turn the mask as the picture is, or draw it anew."
            )
        if bool(self.aspect_ratio_buckets) if is_cut is None else is_cut:
            marked = _centre_crop(marked[None], rows, columns)[0]
            if not marked.any():
                raise ValueError(
                    f"Got an image mask of {h}x{w} that marks nothing of what is left where the picture is cut to "
                    f"{rows}x{columns} patches; need something of it; widen the mask, or say with `image_size` that "
                    "the picture is to be resized whole."
                )
        h, w = marked.shape
        sums = np.pad(marked.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        top, left = (np.arange(n) * side // n for n, side in ((rows, h), (columns, w)))
        bottom, right = (-(-np.arange(1, n + 1) * side // n) for n, side in ((rows, h), (columns, w)))
        inside = sums[bottom][:, right] - sums[top][:, right] - sums[bottom][:, left] + sums[top][:, left]
        return inside > 0

    @staticmethod
    def pad_pictures(processed: Sequence) -> dict[str, np.ndarray]:
        """What the image processor made of several pictures, one at a time, as if of all at once: padded with 0."""
        pixels = [np.asarray(one["pixel_values"]) for one in processed]
        height, width = (max(one.shape[axis] for one in pixels) for axis in (2, 3))
        sides = [((0, 0), (0, 0), (0, height - one.shape[2]), (0, width - one.shape[3])) for one in pixels]
        padded = np.concatenate([np.pad(one, pad) for one, pad in zip(pixels, sides, strict=True)])
        return {"pixel_values": padded, "image_grid_hw": np.concatenate([one["image_grid_hw"] for one in processed])}

    def pad_latents(self, latents: Sequence) -> dict[str, np.ndarray]:
        """Latents (c, h, w) of pictures -> `image_latents` (n, c, h, w), padded with 0, and `image_grid_hw` (n, 2).

        Raises:
            ValueError: shapes that do not fit together, or sides that hold no whole number of patches.
        """
        p = self.patch_size // self.downsampling
        arrays = [np.asarray(x.detach().float().cpu() if isinstance(x, torch.Tensor) else x) for x in latents]
        for array in arrays:
            is_image = array.ndim == 3 and array.dtype.kind == "f" and len(array) == len(arrays[0]) and array.size
            if not is_image or array.shape[1] % p or array.shape[2] % p:
                raise ValueError(
                    f"Got latents of dtype {array.dtype} and shape {tuple(array.shape)}; need floats (channels, "
                    f"height, width), as many channels in all of a batch, height and width multiples of {p}; take "
                    "them from LatentCache."
                )
        grids = [(array.shape[1] // p, array.shape[2] // p) for array in arrays]
        height, width = np.max([array.shape[1:] for array in arrays], axis=0)
        padded = np.zeros((len(arrays), len(arrays[0]), height, width), dtype=np.float32)
        for row, array in zip(padded, arrays, strict=True):
            row[:, : array.shape[1], : array.shape[2]] = array
        return {"image_latents": padded, "image_grid_hw": np.array(grids, dtype=np.int64)}

    def postprocess(self, images: list[torch.Tensor]) -> list[Image.Image]:
        """Tensors (c, h, w) in [-1, 1] -> PIL images; values outside are clipped."""
        pictures = []
        for image in images:
            if image.ndim != 3 or image.shape[0] not in MODES:
                raise ValueError(f"Got an image of shape {tuple(image.shape)}; need (1 or 3, height, width).")
            if not bool(torch.isfinite(image).all()):
                raise ValueError("Got an image with NaN or infinity among its pixels; all must be finite.")
            levels = ((image.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
            pictures.append(Image.fromarray(levels[0] if len(levels) == 1 else np.moveaxis(levels, 0, -1)))
        return pictures


@lru_cache
def buckets_of_area(height: int, width: int, patch_size: int) -> tuple[tuple[int, int], ...]:
    """The (height, width) with no more patches than an image of `height` x `width` pixels, from 1:2 to 2:1.

    Of each width the tallest and of each height the widest, so that all have nearly the same number of patches.
    """
    rows, columns = height // patch_size, width // patch_size
    area, found = rows * columns, []
    for r in range(1, area + 1):
        c = area // r
        if max(r, c) <= WIDEST_BUCKET * min(r, c) and area // (r + 1) < c:  # the tallest of its width
            found.append((r * patch_size, c * patch_size))
    return tuple(found) or ((height, width),)


def _nearest(buckets: Sequence, height: int, width: int) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest, on a logarithmic scale."""
    h, w = min(buckets, key=lambda bucket: abs(math.log(bucket[0] * width / (bucket[1] * height))))
    return h, w


def _is_alike(height: int, width: int, *of: int) -> bool:
    """Whether one rectangle is another scaled, its sides rounded to whole pixels."""
    return abs(height - width * of[0] / of[1]) <= 1 or abs(width - height * of[1] / of[0]) <= 1


def _centre_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest piece around the centre of (c, h, w) with the aspect ratio of `height` to `width`."""
    _, whole_h, whole_w = image.shape
    h = max(1, min(whole_h, round(whole_w * height / width)))
    w = max(1, min(whole_w, round(whole_h * width / height)))
    top, left = (whole_h - h) // 2, (whole_w - w) // 2
    return image[:, top : top + h, left : left + w]


def check_refused(refused: dict[str, str], options: dict) -> None:
    """Raises ValueError for options among `refused`; what is None or False is not asked for."""
    for name, value in options.items():
        if name in refused and value is not None and value is not False:
            raise ValueError(f"Got {name}={repr(value)[:60]}; need {refused[name]}.")


def _layout_of(shape: Sequence[int], num_channels: int) -> str:
    return LAYOUTS[shape[0] != num_channels and shape[-1] == num_channels]


def _flat(images: Any) -> Iterator[Any]:
    if isinstance(images, list | tuple) or (not isinstance(images, Image.Image) and images.ndim == 4):
        for image in images:
            yield from _flat(image)
    else:
        yield images


def _to_channels_first(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
