"""Random numbers that are a function of a seed and a place: no generator, no loop over rows, no wait for the device.

A number's bits are SplitMix64's (Steele, Lea and Flood 2014) at that place of the seed's sequence. In int64 its
additions and products wrap around as in uint64; shifts to the right are masked to be logical.
"""

import math

import torch
from torch import Tensor


GAMMA, FIRST, SECOND = (
    -7046029254386353131,
    -4658895280553007687,
    -7723592293110705685,
)  # 0x9e37..., 0xbf58..., 0x94d0...


def _shifted(x: Tensor, count: int) -> Tensor:
    return (x >> count) & ((1 << (64 - count)) - 1)


def bits(seeds: Tensor, places: Tensor) -> Tensor:
    """64 random bits each: int64 in the shape that `seeds` and `places` broadcast to.

    Examples:
        >>> hex(int(bits(torch.tensor(0), torch.tensor(1))) % 2**64)  # the second number of Java's SplittableRandom(0)
        '0x6e789e6aa1b965f4'
    """
    x = seeds + (places + 1) * GAMMA
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def fold(seeds: Tensor, places: Tensor) -> Tensor:
    """A seed of 0 or more for each place of another seed, whose sequences have nothing to do with each other."""
    return bits(seeds, places) & (2**63 - 1)


def seeded_uniform(seeds: Tensor, places: Tensor) -> Tensor:
    """Uniform in [0, 1), a multiple of 2^-24: float32 in the shape that `seeds` and `places` broadcast to."""
    return _shifted(bits(seeds, places), 40).float() * 2.0**-24


def seeded_normal(seeds: Tensor, places: Tensor) -> Tensor:
    """Standard normal, by Box and Muller; at most 5.8: float32 in the shape that `seeds` and `places` broadcast to.

    Logarithm and cosine are rounded by the device: equal seeds give equal numbers on one, and to some 1e-6 on two.
    """
    drawn = bits(seeds, places)
    radius = (-2 * (1 - _shifted(drawn, 40).float() * 2.0**-24).log()).sqrt()
    angle = (drawn & (2**24 - 1)).float() * (2 * math.pi * 2.0**-24)
    return radius * torch.cos(angle)
