"""What `mdm evaluate --benchmark NAME` runs: one line a benchmark.

A benchmark is a function of the parsed command line that returns a dict with `scores` ({name: number}), `settings`
with their `hash`, `seconds`, and, where it has them, `intervals` ({name: [low, high]}, 95%).
"""

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's function is, "file:function" in this folder, and what it measures.

    It is imported when it runs: what one benchmark needs, no other has to have.
    """

    function: str
    help: str


BENCHMARKS = {
    "digits": Benchmark("digits:run", "the six tasks of mdm-digits, judged by a classifier"),
}


def run_benchmark(name: str, options) -> dict:
    """The result of benchmark `name` with the command line's `options`.

    Raises:
        ValueError: no such benchmark.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"Got --benchmark {name}; need one of {', '.join(BENCHMARKS)}; check the spelling.")
    file, _, function = BENCHMARKS[name].function.partition(":")
    return getattr(import_module(f".{file}", __package__), function)(options)
