"""Pictures as they come: files, addresses and bytes opened, any mode made grey or RGB, masks over them."""

import re
import warnings
from base64 import b64decode
from io import BytesIO
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import get_session
from PIL import Image, ImageOps, UnidentifiedImageError


MODES = {1: "L", 3: "RGB"}


def opened(source: str | bytes, max_pixels: int) -> Image.Image:
    """A picture from a path, an address, bytes or a data URL. Pillow reads the header alone.

    Args:
        source: Where it is, or itself.
        max_pixels: Named where a picture is too large for Pillow's own limit.

    Raises:
        ValueError: there is none, or none that can be read.
    """
    name = (
        f"{len(source)} bytes"
        if isinstance(source, bytes)
        else repr(source[:80] if source.startswith("data:") else source)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is stricter
        try:
            if isinstance(source, str) and source.startswith(("http://", "https://")):
                content: str | bytes = _fetched(source)
            elif isinstance(source, str) and source.startswith("data:image/"):
                content = b64decode(source.partition(",")[2])
            else:
                content = source
            return Image.open(BytesIO(content) if isinstance(content, bytes) else content)
        except (UnidentifiedImageError, ValueError) as error:  # the latter: no base64
            raise ValueError(
                f"Got {name}, which holds no image that Pillow can read; give a PNG, JPEG or another image file, "
                "or its bytes in base64 as a data URL."
            ) from error
        except (OSError, SyntaxError) as error:  # the latter is how Pillow reports a broken PNG
            is_sent = isinstance(source, bytes) or source.startswith("data:")
            remedy = "send the whole file" if is_sent else "check the path or the address"
            raise ValueError(f"Got image {name}, which cannot be opened ({error}); {remedy}.") from error
        except Image.DecompressionBombError as error:  # above Pillow's own limit, which no max_pixels lifts
            count = re.search(r"\d+", str(error))
            pixels = f"too many pixels, {count[0]}" if count else "too many pixels"
            raise ValueError(
                f"Got image {name} with {pixels}; need at most max_pixels = {max_pixels}; give a smaller one."
            ) from error


def _fetched(url: str) -> bytes:
    """The file behind an address; it becomes a picture where all files do, so that it gives the same pixels."""
    try:
        # A client as the Hub's, but not that one, which fetches nothing from anywhere where HF_HUB_OFFLINE is set.
        with type(get_session())(follow_redirects=True, timeout=30) as client:
            return client.get(url).raise_for_status().content
    except Exception as error:  # of the HTTP library that huggingface_hub has, which is not always the same
        raise ConnectionError(str(error).partition("\n")[0] or type(error).__name__) from error


def converted(image: Image.Image, num_channels: int) -> Image.Image:
    """`image` upright and in the mode of `num_channels`; what is transparent shows white."""
    mode = image.mode
    try:
        if image.mode == MODES[num_channels] and not getattr(image, "is_animated", False) and not image.info:
            image.load()
            return image
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # 16 bits a pixel, which Pillow would clip to 8
            image = Image.fromarray((np.asarray(image, dtype=np.uint16) // 257).astype(np.uint8))
        if image.mode == "F" and is_unit(np.asarray(image)):
            image = image.point(lambda level: level * 255 + 0.5)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if mode in ("F", "I"):  # numbers of any size, which Pillow would clip
            numbers = np.asarray(image)
            low, high = numbers.min(), numbers.max()
            if not (low >= 0 and high < 256):
                raise ValueError(f"pixels from {low:g} to {high:g}, where 0 to 255 are needed")
        return image.convert(MODES[num_channels])
    except (OSError, SyntaxError) as error:  # how Pillow reports a truncated or broken file
        raise ValueError(f"Got a corrupt image ({error}); give a file that opens without error.") from error
    except ValueError as error:  # closed, or of a mode without a way to RGB
        raise ValueError(
            f"Got an image of mode {mode} that cannot be read ({error}); need one that is open and can become grey "
            "or RGB; convert it."
        ) from error


def is_unit(image: np.ndarray) -> bool:
    """Whether 1 stands for white, not 255."""
    return image.dtype.kind == "f" and image.min() >= 0 and image.max() <= 1


def marked_by(mask: Any) -> np.ndarray:
    """A picture, array or tensor over a picture -> (height, width) bool, true where it is white or 1."""
    if isinstance(mask, Image.Image):
        if mask.has_transparency_data and np.asarray(mask.convert("RGBA").getchannel("A")).min() < 255:
            raise ValueError(
                f"Got an image mask of mode {mask.mode} that is transparent in places, which may mean either; need "
                "white where pixels are to be made, and no transparency; what was painted on a clear ground is "
                "mask.getchannel('A'), holes in a picture are ImageOps.invert(mask.getchannel('A'))."
            )
        mask = np.asarray(converted(mask, 1)) / 255  # a level of 1 is black
    elif isinstance(mask, torch.Tensor):
        mask = mask.detach().cpu().to(torch.float32 if mask.is_floating_point() else mask.dtype).numpy()
    try:
        array = np.asarray(mask)
    except ValueError:  # rows of different lengths
        array = np.empty(0)
    is_mask = array.ndim == 2 and array.dtype.kind in "biuf" and array.size
    if is_mask and array.dtype.kind in "iu" and array.max() > 1:
        array = array / 255
    if not is_mask or not (array.min() >= 0 and array.max() <= 1) or not (array >= 0.5).any():
        got = f", from {array.min():g} to {array.max():g}," if is_mask else ""
        raise ValueError(
            f"Got an image mask of type {type(mask).__name__}, shape {array.shape}{got} that marks nothing, or none "
            "of two dimensions; need a picture or (height, width) numbers, 0 to 1 or whole ones to 255, white or 1 "
            "where pixels are to be made."
        )
    return array >= 0.5
