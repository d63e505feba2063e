"""The known images of a batch of conversations: what the model gets of them, and what of them is to be made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .conversations import Prompt
from .image_processing_mdm import MDMImageProcessorPil


@dataclass
class KnownImages:
    """All of a batch, in the order in which the rows name them."""

    inputs: dict[str, Any]  # `pixel_values` or `image_latents`; empty without images
    grids: list[list[int]]  # [rows, columns] in patches
    patch_masks: list[np.ndarray | None]  # (rows, columns), true where patches are to be made; None for a whole image


def read_images(
    prompts: list[Prompt], processor: MDMImageProcessorPil, options: dict, image_size: Sequence[int] | None
) -> KnownImages:
    """Reads the pictures or latents of conversations, and the masks over them.

    Args:
        prompts: The conversations; pictures with a mask are put into them as arrays, upright.
        options: Of the image processor.
        image_size: (height, width) of pictures that are targets; None keeps to `options`.

    Raises:
        ValueError: pictures and latents in one batch; target latents of another size; what the image processor
            refuses.
    """
    for prompt in prompts:
        for i in prompt.image_masks if prompt.images and not prompt.latents else ():
            picture = processor.fetch_images(prompt.images[i])
            prompt.images[i] = processor.process_image(picture, max_pixels=options.get("max_pixels"))
    inputs = _inputs(prompts, processor, options, image_size)
    grids = np.asarray(inputs.pop("image_grid_hw", [])).tolist()
    is_cut = image_size is None and _cuts(processor, options)
    numbers = [(prompt, i) for prompt in prompts for i in range(len(prompt.images) + len(prompt.latents))]
    masks = []
    for (prompt, i), grid in zip(numbers, grids, strict=True):
        if prompt.latents and i in prompt.target_images and image_size is not None:
            _check_size(grid, image_size, processor.patch_size)
        mask = prompt.image_masks.get(i)
        over = (prompt.images[i].shape[1:], is_cut) if prompt.images and mask is not None else ()
        masks.append(None if mask is None else processor.patch_mask(mask, grid, *over))
    return KnownImages(inputs, grids, masks)


def _inputs(
    prompts: list[Prompt], processor: MDMImageProcessorPil, options: dict, image_size: Sequence[int] | None
) -> dict[str, Any]:
    pictures = [image for prompt in prompts for image in prompt.images]
    latents = [image for prompt in prompts for image in prompt.latents]
    if pictures and latents:
        raise ValueError(
            f"Got {len(pictures)} image(s) as pictures and {len(latents)} as latents in one batch; need all of one "
            "kind; split the batch, or encode the pictures too."
        )
    if latents:
        return processor.pad_latents(latents)
    if not pictures:
        return {}
    if image_size is None:
        return dict(processor(pictures, **options))
    height, width = image_size
    of_targets = options | {
        "do_resize": True,
        "size": {"height": height, "width": width},
        "aspect_ratio_buckets": False,
    }
    is_target = [number in prompt.target_images for prompt in prompts for number in range(len(prompt.images))]
    pairs = zip(pictures, is_target, strict=True)
    return processor.pad_pictures([processor([one], **of_targets if it else options) for one, it in pairs])


def _check_size(grid: list[int], image_size: Sequence[int], patch_size: int) -> None:
    got, wanted = (f"{height}x{width}" for height, width in ([side * patch_size for side in grid], image_size))
    if got != wanted:
        raise ValueError(
            f"Got target latents of a picture of {got} pixels where image_size is {wanted}; need them of that size, "
            "as latents are not resized; leave image_size out, or give the picture itself."
        )


def _cuts(processor: MDMImageProcessorPil, options: dict) -> bool:
    """Whether pictures are cut to a bucket's aspect ratio."""
    given = {name: options.get(name) for name in ("do_resize", "aspect_ratio_buckets")}
    return all(getattr(processor, name) if value is None else value for name, value in given.items())
