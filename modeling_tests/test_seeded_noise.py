"""Claims about random numbers that are a function of a seed and a place."""

import math

import torch

from mdm_hf.seeded_noise import bits, fold, seeded_normal, seeded_uniform


PLACES = torch.arange(100_000)


def split_mix_64(seed: int, place: int) -> int:
    """The generator's own definition, in Python's integers."""
    x = (seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_the_bits_are_those_of_split_mix_64():
    seeds, places = torch.tensor([0, 1, 7, 2**62, 2**63 - 1]), torch.tensor([-5, -1, 0, 1, 2**40])
    drawn = bits(seeds.unsqueeze(1), places)
    expected = [[split_mix_64(int(seed), int(place)) for place in places] for seed in seeds]
    assert [[value % 2**64 for value in row] for row in drawn.tolist()] == expected
    assert split_mix_64(0, 0) == 0xE220A8397B1DCDAF  # as published


def test_normals_have_the_moments_and_tails_of_a_normal_distribution():
    x = seeded_normal(torch.arange(20).unsqueeze(1), PLACES).double()
    assert x.isfinite().all()
    assert x.abs().max() < 5.8
    n = x.numel() ** 0.5
    assert abs(x.mean()) < 4 / n
    assert abs(x.var() - 1) < 4 * math.sqrt(2) / n
    assert abs((x**3).mean()) < 4 * math.sqrt(15) / n
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96) / n
    for limit in (1.0, 2.0, 3.0, 4.0):
        share = math.erfc(limit / math.sqrt(2))
        assert abs((x.abs() > limit).double().mean() - share) < 4 * math.sqrt(share) / n


def test_uniforms_fill_the_unit_interval():
    x = seeded_uniform(torch.arange(20).unsqueeze(1), PLACES).double()
    assert x.min() >= 0
    assert x.max() < 1
    counts = torch.histc(x, 100, 0, 1)
    expected = x.numel() / 100
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 99 + 4 * math.sqrt(2 * 99)


def test_neither_neighbouring_places_nor_neighbouring_seeds_nor_folded_ones_are_correlated():
    seeds = torch.arange(20).unsqueeze(1)
    x = seeded_normal(seeds, PLACES)
    folded = seeded_normal(fold(seeds, torch.tensor(1)), PLACES)
    pairs = [(x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x, folded), (x, seeded_normal(seeds, -1 - PLACES))]
    for one, other in pairs:
        assert abs((one * other).double().mean()) < 4 / one.numel() ** 0.5


def test_a_folded_seed_is_a_seed_and_differs_from_place_to_place():
    folded = fold(torch.arange(20).unsqueeze(1), PLACES)
    assert folded.min() >= 0
    assert folded.unique().numel() == folded.numel()
