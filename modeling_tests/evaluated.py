"""What the tests of benchmarks share: the command line with the shipped model, cheap, and a kill in the middle."""

import json
from pathlib import Path

import pytest

from mdm_hf import MDMPipeline
from mdm_hf.cli import main


CARD = Path(__file__).parents[1] / "model_cards" / "mdm-digits"

# What the settings of every benchmark but digits and shapes tell of the model and its sampling.
OF_SETTINGS = {"model", "state", "solver", "modality_lag", "guidance_interval", "text_selection_tolerance"}


def evaluate(tmp_path: Path, name: str, *more: str, status: int = 0) -> dict | None:
    """The result file of a benchmark, or None where it is to fail."""
    output = tmp_path / "result.json"
    where = ["--model", str(CARD), "--work-dir", str(tmp_path / "work"), "--output", str(output)]
    assert main(["evaluate", *where, "--steps", "2", "--benchmark", name, *more]) == status
    return None if status else json.loads(output.read_text())


def same_result(a: dict, b: dict) -> bool:
    """Equal apart from the time they took and where their files lie."""
    return {k: v for k, v in a.items() if k not in ("seconds", "folder")} == {
        k: v for k, v in b.items() if k not in ("seconds", "folder")
    }


def killed_and_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: int, name: str, *more: str) -> dict:
    """The result of a run killed in its call number `after` of the pipeline, and started again; it asks for no batch
    twice but the one that was killed."""
    calls: list[int] = []
    call = MDMPipeline.__call__

    def counted(self, *args, **options):
        calls.append(options["seed"])
        if len(calls) == after:
            raise KeyboardInterrupt
        return call(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MDMPipeline, "__call__", counted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(tmp_path, name, *more)
        found = evaluate(tmp_path, name, *more)
    assert len(calls) - 1 == len(set(calls))
    assert calls.count(calls[after - 1]) == 2
    return found
