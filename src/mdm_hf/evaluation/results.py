"""What every result file holds beside its scores: the settings with their hash, and how sure the scores are."""

import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np


def settings_hash(settings: dict) -> str:
    """Results with the same hash were made with the same settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def bootstrap_interval(
    values: Sequence | np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> list[float]:
    """Percentile bootstrap of `statistic` over the rows of `values` (n, ...): [low, high].

    Raises:
        ValueError: no values.
    """
    rows = np.asarray(values)
    if len(rows) == 0:
        raise ValueError("Got no values; a bootstrap needs at least one; check that the benchmark has any items.")
    rng = np.random.default_rng(seed)
    drawn = [statistic(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(draws)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]
