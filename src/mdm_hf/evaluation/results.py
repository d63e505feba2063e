"""What all benchmarks share: settings with their hash, how sure a score is, what a killed run leaves to go on with.

A run is cut into batches by the place of an item in its list, never by what is left to do: item i is drawn with
seed + i, and is the same in a run that was killed and in one that was not.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging


CONFIGS = ("generation_config.json", "*processor_config.json", "token*.json", "*.jinja", "scheduler/*.json")
SAMPLING = (
    "guidance_scale",
    "text_guidance_scale",
    "guidance_interval",
    "text_temperature",
    "text_selection_tolerance",
)

OF_MODEL = ("step_tolerance", "modality_lag", "strength", "min_new_tokens", "selection_tolerance")  # no options


def settings_hash(settings: dict) -> str:
    """A hash of the settings: results with the same one were made with the same settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def file_hash(path: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]


@contextmanager
def reading(path: Path, needed: str) -> Iterator[None]:
    """A benchmark's file is read inside: what is wrong with it is said of the file, with what is `needed`.

    Raises:
        ValueError: the file is no JSON, not in UTF-8, or has not the fields that are looked for.
    """
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Got --data {path}, which is not whole JSON ({error}); need {needed}.") from error
    except (KeyError, TypeError, AttributeError) as error:
        lack = f"no field {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"Got --data {path}, which is built otherwise ({lack}); need {needed}.") from error


def bootstrap_interval(
    values: Sequence | np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    is_biased: bool = False,
) -> list[float]:
    """Percentile bootstrap of `statistic` over the rows of `values` (n, ...): [low, high].

    Args:
        values: A row a sample.
        statistic: Rows to a score.
        draws: How often the rows are drawn anew.
        level: Share of the draws between the two ends.
        seed: Of the draws.
        is_biased: Moves the interval back by what the draws' mean is off `statistic` of all rows: drawing twice makes
            a set less diverse than it is.

    Raises:
        ValueError: no values.
    """
    rows = np.asarray(values)
    if len(rows) == 0:
        raise ValueError("Got no values; a bootstrap needs at least one; check that the benchmark has any items.")
    rng = np.random.default_rng(seed)
    drawn = [statistic(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(draws)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    if is_biased:
        low, high = (end - np.mean(drawn) + statistic(rows) for end in (low, high))
    return [float(low), float(high)]


def model_id(model: str) -> str:
    """What tells a model from another in a folder: a hash of its configuration, of those of tokenizer, processor and
    solver, and of its weights' files, the same wherever it lies; of a Hub repository its name."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    configs = [folder / "config.json", *sorted(path for name in CONFIGS for path in folder.glob(name))]
    parts: list[Any] = [path.read_text(encoding="utf-8") if path.is_file() else "" for path in configs]
    parts += [[path.name, file_hash(path)] for path in sorted(folder.glob("*.safetensors"))]
    return settings_hash({"parts": parts})


class ResultCache:
    """Results by key in a file of JSON lines, one a result, written as they come. A line torn by a kill is dropped."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, Any] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for line in text.splitlines():
            try:
                key, value = json.loads(line)
            except ValueError:
                continue
            self.values[key] = value
        path.parent.mkdir(parents=True, exist_ok=True)
        if text and not text.endswith("\n"):
            self._append("\n")

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def put(self, results: dict[str, Any]) -> None:
        self.values |= results
        self._append("".join(json.dumps([key, value]) + "\n" for key, value in results.items()))

    def _append(self, lines: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(lines)


def batches(count: int, size: int, name: str, is_done: Callable[[range], bool]) -> Iterator[range]:
    """Ranges of up to `size` of `count` places in order, without those that are done, under a progress bar whose time
    left is that of what is left."""
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
    left = [part for part in parts if not is_done(part)]
    with logging.tqdm(desc=name, total=sum(map(len, left)), unit="item") as bar:
        for part in left:
            yield part
            bar.update(len(part))


def sampling_of(options, pipe) -> dict:
    """The sampling options of a command line, the model's defaults where it has none."""
    given = {"num_inference_steps": options.steps} | {name: getattr(options, name) for name in SAMPLING}
    defaults = pipe.model.generation_config
    return {name: getattr(defaults, name) if value is None else value for name, value in given.items()}


def settings_of(options, pipe) -> dict:
    """All of the model and its sampling that a result depends on: settings with it are hashed, and results kept by it.

    - model, state: its path or name, and its [`model_id`], with the Hub's commit where it has one.
    - sampling: [`sampling_of`], and what is the model's own.
    - solver: its name and a hash of its options.
    """
    defaults, commit = pipe.model.generation_config, getattr(pipe.model.config, "_commit_hash", None)
    solver = pipe.scheduler or pipe.model.default_scheduler()
    fields = {name: value for name, value in json.loads(solver.to_json_string()).items() if not name.startswith("_")}
    return {
        "model": options.model,
        "state": model_id(options.model) + (f"@{commit}" if commit else ""),
        **{name: getattr(defaults, name) for name in OF_MODEL},
        **sampling_of(options, pipe),
        "solver": f"{type(solver).__name__} {settings_hash(fields)}",
    }


def result(scores: dict, intervals: dict, settings: dict, started: float, **more: Any) -> dict:
    """A result file: scores and 95% intervals rounded, settings with their hash, seconds since `started`."""
    return {
        "scores": {name: _rounded(value) for name, value in scores.items()},
        "intervals": {name: [_rounded(end) for end in ends] for name, ends in intervals.items()},
        "settings": settings | {"hash": settings_hash(settings)},
        "seconds": round(time.perf_counter() - started, 1),
        **more,
    }


def _rounded(value):
    return round(float(value), 4) if isinstance(value, float | np.floating) else value
