"""`num_inference_steps="auto"`: the fewest solver steps whose samples are those of many.

The solver follows a differential equation from noise to sample, so with the same noise more steps come ever closer to
one sample. A few of the caller's own rows are drawn with each number of steps in turn; what a number costs is seen in
the latents, where image and text are of one kind: their distance from those of the most steps, over the size of those,
the worse of the two.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .sequence_layout import SequenceLayout


AUTO_STEPS = "auto"
CANDIDATES = (4, 6, 8, 10, 12, 16, 20, 25, 32, 40)
MOST_STEPS = 50
CALIBRATION_ROWS = 8


def fewest_steps(
    draw: Callable[[int], Tensor],
    targets: Sequence[Tensor],
    tolerance: float,
    most: int = MOST_STEPS,
    least: int = 1,
) -> tuple[int, dict[int, float]]:
    """The first of `CANDIDATES` whose error is within `tolerance`, or `most`; and the errors that were measured.

    Args:
        draw: Number of steps -> latents (b, l, d), always from the same noise.
        targets: Masks (b, l) of the targets, one a modality.
        tolerance: Of the error, as a share of the latents' size, root mean square.
        most, least: The number of steps that the others are held against, and the first that can be drawn with.
    """
    reference, errors = draw(most).double(), {}
    for steps in CANDIDATES:
        if steps >= most:
            break
        if steps < least:
            continue
        away = draw(steps).double() - reference
        errors[steps] = max(_size(away[mask]) / _size(reference[mask]) for mask in targets)
        if errors[steps] <= tolerance:
            return steps, errors
    return most, errors


def fewest_whole(strength: float) -> int:
    """The fewest steps of which a share of `strength` rounds to one or more."""
    fewest = math.floor(min(0.5 / strength, 2**53)) + 1
    return fewest if round(fewest * strength) else fewest + 1  # 0.5 / strength may be rounded down


def _size(values: Tensor) -> float:
    """Root mean square of the lengths of (n, d)."""
    return float(values.square().sum(-1).mean().clamp(min=1e-12).sqrt())


def first_rows(layout: SequenceLayout, count: int, inputs: dict) -> dict:
    """The first rows of a batch: of `inputs`, tensors or None, what belongs to them. Images lie in row order."""

    def images(index: Tensor, mask: Tensor) -> int:
        return int(torch.where(mask, index + 1, 0)[:count].max())

    shown = images(layout.image_index, layout.is_patch)
    known = images(layout.known_index, layout.is_known_patch)
    sizes = {"image_grid_hw": shown, "pixel_values": known, "image_latents": known}
    cut = {name: value if value is None else value[: sizes.get(name, count)] for name, value in inputs.items()}
    return {name: None if value is None or len(value) == 0 else value for name, value in cut.items()}
