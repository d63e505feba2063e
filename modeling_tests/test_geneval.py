"""Claims about GenEval: its own scorer finds in the folder what it looks for, after a kill as well."""

import json
import re
from pathlib import Path

import pytest
from evaluated import OF_SETTINGS, evaluate, killed_and_resumed
from PIL import Image

from mdm_hf.evaluation.geneval import grid, read_prompts


LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a handwritten three"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a handwritten four"},
    {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "red"}], "prompt": "the digit one"},
]


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def what_the_scorer_reads(folder: Path) -> dict:
    """As `evaluate_images.py` walks it: numbered folders, their metadata as one JSON value, numbered pictures."""
    found = {}
    for sub in folder.iterdir():
        if sub.is_dir() and sub.name.isdigit():
            metadata = json.loads((sub / "metadata.jsonl").read_text())
            names = [p.name for p in (sub / "samples").iterdir() if re.match(r"\d+\.png", p.name)]
            found[sub.name] = metadata, sorted(names)
    return found


def test_a_killed_run_leaves_whole_pictures_and_ends_with_all_of_them(data, tmp_path, monkeypatch):
    given = "--data", str(data), "--batch-size", "5"
    whole = Path(evaluate(tmp_path / "whole", "geneval", *given)["folder"])
    again = killed_and_resumed(monkeypatch, tmp_path / "killed", 2, "geneval", *given)
    folder = Path(again["folder"])
    assert again["scores"] == {"pictures": 12}
    assert set(again["settings"]) >= OF_SETTINGS
    names = [f"{i:04d}.png" for i in range(4)]
    assert what_the_scorer_reads(folder) == {f"{p:05d}": (line, names) for p, line in enumerate(LINES)}
    for path in whole.rglob("*.png"):
        assert path.read_bytes() == (folder / path.relative_to(whole)).read_bytes()
    assert Image.open(folder / "00001" / "grid.png").size == (16, 16)
    assert not list(folder.rglob("*.part"))


def test_a_limit_draws_the_first_prompts(data, tmp_path):
    found = evaluate(tmp_path, "geneval", "--data", str(data), "--limit", "1")
    assert found["scores"] == {"pictures": 4}
    assert list(what_the_scorer_reads(Path(found["folder"]))) == ["00000"]


def test_what_is_not_genevals_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="which is no file; geneval needs its prompts/evaluation_metadata.jsonl"):
        read_prompts(None)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"tag": "b"}\n')
    with pytest.raises(ValueError, match="whose line 2 has no `prompt`"):
        read_prompts(bad)
    for content, why in (
        (b"", "without a line"),
        (b'{"prompt', "not whole JSON"),
        (b'{"prompt": "\xe9"}', "not whole"),
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=f"{bad}.*{why}"):
            read_prompts(bad)


def test_a_grid_is_square():
    assert grid([Image.new("RGB", (2, 3))] * 4).size == (4, 6)
    assert grid([Image.new("RGB", (2, 3))] * 3).size == (4, 6)
    assert grid([Image.new("RGB", (2, 3))]).size == (2, 3)
