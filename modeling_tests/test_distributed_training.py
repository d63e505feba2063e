"""Claims about a run of several processes: it is the run of one. See distributed_training.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import tiny_model

from mdm_hf import MDMForMultiModalGeneration


FOLDER = Path(__file__).parent
STEPS = 20


def run(root: Path, way: str, processes: int, *options: str) -> Path:
    folder = root / f"{way}-{processes}{'-apart' if 'apart' in options else ''}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    script = [str(FOLDER / "distributed_training.py"), str(root / "model"), str(folder), way, str(STEPS), *options]
    paths = os.pathsep.join((str(FOLDER), str(FOLDER.parent / "src")))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(launch + script, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    tiny_model().save_pretrained(root / "model")
    run(root, "ddp", 1)
    return root


def log(folder: Path) -> list[dict]:
    return json.loads((folder / "log.json").read_text())


def assert_equal_weights(folder: Path, other: Path, atol: float):
    for name in ("averaged.safetensors", f"checkpoint-{STEPS}/model.safetensors"):
        expected, got = load_file(folder / name), load_file(other / name)
        assert got.keys() == expected.keys()
        assert max(float((got[key] - value).abs().max()) for key, value in expected.items()) <= atol, name


def assert_equal_runs(folder: Path, other: Path):
    expected, got = log(folder), log(other)
    assert len([entry for entry in got if "loss" in entry]) == STEPS
    assert expected[0]["loss"] > 2 * expected[STEPS - 1]["loss"]
    for entry, of_other in zip(expected, got, strict=True):
        for name in [name for name in entry if "loss" in name or name == "grad_norm"]:
            rel = 1e-5 if name == "grad_norm" else 0
            assert of_other[name] == pytest.approx(entry[name], rel=rel, abs=1.5e-5), name  # logged to 5 places
    assert_equal_weights(folder, other, atol=5e-6)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_follow_the_loss_curve_of_one_for_twenty_steps(root, way):
    """Rows of five kinds and three lengths, with random timesteps and noise: all that is drawn belongs to the row."""
    assert_equal_runs(root / "ddp-1", run(root, way, 2))
    MDMForMultiModalGeneration.from_pretrained(root / f"{way}-2" / f"checkpoint-{STEPS}")


def test_processes_that_see_images_alone_and_texts_alone_follow_the_one_that_sees_both(root):
    whole = run(root, "ddp", 1, "apart")
    for way in ("ddp", "fsdp2"):
        assert_equal_runs(whole, run(root, way, 2, "apart"))


def test_a_sharded_run_resumes_to_the_same_weights_bit_for_bit(root):
    whole = root / "fsdp2-2"
    if not whole.is_dir():
        run(root, "fsdp2", 2)
    shutil.copytree(whole, root / "whole")
    shutil.rmtree(whole / f"checkpoint-{STEPS}")
    run(root, "fsdp2", 2, "resume")
    assert_equal_weights(root / "whole", whole, atol=0)


def test_a_checkpoint_of_a_sharded_model_holds_no_code_of_torch(root):
    if not (root / "fsdp2-2").is_dir():
        run(root, "fsdp2", 2)
    assert not list((root / "fsdp2-2").glob("checkpoint-*/_fsdp*"))
