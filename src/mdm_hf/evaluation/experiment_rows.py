"""The rows of an experiment, one a variant: kept in a file as they are made, shown as a table and a plot."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from transformers.utils import logging

from ..checkpoints import write_whole
from .results import settings_hash
from .shapes import TASKS


logger = logging.get_logger(__name__)


def with_rows(found: dict, wanted: Mapping[str, tuple[dict, Callable[[], dict]]], path: Path) -> dict:
    """`found` with a row for each variant: that of the file `path` with the same settings, or a new one.

    Args:
        found: What else the results have.
        wanted: The settings of each row, and how it is made, by the variants' names.
        path: JSON, written anew after each row; rows of other settings are left in it until all are made.

    Raises:
        ValueError: the file is there, but is no table of results.
    """
    known: dict[str | None, dict] = {}
    rows: list[dict] = []
    if path.is_file():
        try:
            known = {row.get("key"): row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            lack = f"no field {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"Got {path}, which is no whole file of results ({lack}); need the one that an earlier run left, or "
                "none; delete it to make its rows anew, or name another --output."
            ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    for label, (settings, make) in wanted.items():
        key = settings_hash(settings)
        rows.append((known.pop(key, None) or make()) | {"variant": label, "key": key})
        logger.info(f"{label}: {rows[-1]['scores']}")
        unfinished = len(rows) < len(wanted)
        text = json.dumps(found | {"rows": rows + [*known.values()] * unfinished}, indent=1)
        write_whole(path, text + "\n")
    return found | {"rows": rows}


def shown_scores(found: dict) -> list[str]:
    """The names of the scores that a table of an experiment has, those of the plot first."""
    names = [name for name in TASKS if any(name in row["scores"] for row in found["rows"])]
    return names + [n for n in ("shapes_frechet_distance", "image_to_text_cider") if n in found["rows"][0]["scores"]]


def table(found: dict) -> str:
    """An experiment as a table in Markdown, with 95% intervals."""
    names = shown_scores(found)
    heads = ["", *(name.replace("_", " ") for name in names), "parameters", "steps", "CPU s"]
    lines = [found["question"], "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in found["rows"]:
        cells = [row["variant"]]
        for name in names:
            value, ends = row["scores"].get(name), row["intervals"].get(name)
            cells.append("" if value is None else f"{value:.3f}" + (f" ({ends[0]:.2f}-{ends[1]:.2f})" if ends else ""))
        budget = row["training"]
        spent = [str(budget["steps"]), f"{budget['steps'] * budget['cpu_seconds_a_step']:.0f}"] if budget else ["", ""]
        cells += [f"{row['parameters'] / 1e6:.2f}M", *spent]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(found: dict, path: Path) -> None:
    """Bars of the main scores, a group a task and a colour a variant, with 95% intervals; below them, where trainings
    differ, their losses over steps and over seconds of the processor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = [(i, row) for i, row in enumerate(found["rows"]) if row["training"].get("losses")]
    has_curves = len({json.dumps(row["training"]["losses"]) for _, row in curves}) > 1
    figure = pyplot.figure(figsize=(11, 7.2 if has_curves else 3.6), constrained_layout=True)
    grid = figure.add_gridspec(2 if has_curves else 1, 2)
    axis = figure.add_subplot(grid[0, :])
    if has_curves:
        _plot_losses(curves, [figure.add_subplot(grid[1, i]) for i in range(2)])
    rows, names = found["rows"], [name for name in TASKS if any(name in row["scores"] for row in found["rows"])]
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        at = [n + (i - (len(rows) - 1) / 2) * width for n in range(len(names))]
        values = [row["scores"].get(name, float("nan")) for name in names]
        ends = [row["intervals"].get(name, [value] * 2) for name, value in zip(names, values, strict=True)]
        errors = [[max(0.0, v - e[0]) for v, e in zip(values, ends, strict=True)]]
        errors.append([max(0.0, e[1] - v) for v, e in zip(values, ends, strict=True)])
        axis.bar(at, values, width, yerr=errors, capsize=2, label=row["variant"])
    axis.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.set(ylim=(0, 1.25), yticks=np.linspace(0, 1, 6))  # the legend is above the bars
    axis.set_title(found["question"], loc="left", fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8, ncols=3, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_losses(curves: list[tuple[int, dict]], axes: list) -> None:
    for number, row in curves:
        name, training = row["variant"], row["training"]
        steps, pace = np.asarray(training["losses"]["step"]), training["cpu_seconds_a_step"]
        for line, kind in (("-", "image"), (":", "text")):
            values = np.asarray(training["losses"][kind])
            width = min(10, len(values))
            smooth = np.convolve(values, np.ones(width) / width, "valid")
            for axis, at in zip(axes, (steps, steps * pace), strict=True):
                axis.plot(at[width - 1 :], smooth, line, color=f"C{number}", label=f"{name}, {kind}")
    for axis, label in zip(axes, ("steps", "CPU seconds"), strict=True):
        axis.set(xlabel=label, ylabel="score entropy, training", ylim=(0, 2))
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7, ncols=2)
