"""Claims about what the benchmarks count; what they measure is in docs/performance.md."""

import importlib
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("length", [128, 192])
def test_the_share_of_peak_credits_only_pairs_of_steps_that_meet(monkeypatch, length):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    ssm_core = importlib.import_module("ssm_core")
    q, h, p, n = ssm_core.LONGEST_CHUNK_CPU, 2, ssm_core.HEAD_DIM, ssm_core.STATE_SIZE
    pairs = sum(1 for t in range(length) for s in range(t + 1) if s // q == t // q)
    multiplications = pairs * (n + h * p) + length * 2 * h * p * n
    assert ssm_core.operations(length, h * p, "cpu") == 2 * multiplications
