"""Claims about training: it learns, it logs, it can be killed and resumed, it publishes a folder that works."""

import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mdm_hf import MDMForMultiModalGeneration, MDMPipeline, MDMProcessor
from mdm_hf.training.recipe_digits import train_digits
from mdm_hf.training.trainer import EMA_FILE, UNFINISHED


CARD = Path(__file__).parents[1] / "model_cards" / "mdm-digits"
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "batch_size": 8, "use_cpu": True, "disable_tqdm": True}


def train(folder, max_steps=4, **options):
    processor = MDMProcessor.from_pretrained(CARD)
    return train_digits(folder, processor, max_steps=max_steps, warmup_steps=1, **(SMALL | options))


def test_a_run_draws_grids_saves_an_average_and_publishes_a_working_folder(tmp_path):
    final = train(tmp_path, save_every=2, sample_every=2)
    assert [p.name for p in sorted((tmp_path / "samples").iterdir())] == ["step-0000002.png", "step-0000004.png"]
    averaged = list(load_file(tmp_path / "checkpoint-4" / EMA_FILE).values())
    trained = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    published = load_file(final / "model.safetensors")
    assert len(averaged) == len(trained)
    assert any(not torch.equal(published[k], trained[k]) for k in trained), "the average, not the last weights"
    pipe = MDMPipeline.from_pretrained(final, device="cpu")
    assert len(pipe(class_ids=[1, 2], num_inference_steps=2, seed=0)) == 2


RUN = """
import sys
from mdm_hf import MDMProcessor
from mdm_hf.training.recipe_digits import train_digits
train_digits(sys.argv[1], MDMProcessor.from_pretrained(sys.argv[2]), max_steps=12, save_every=1, warmup_steps=1,
    sample_every=100, resume=True, hidden_size=32, num_hidden_layers=1, batch_size=8, use_cpu=True, disable_tqdm=True)
"""


def test_a_run_killed_at_any_moment_leaves_whole_checkpoints_and_resumes_to_the_same_weights(tmp_path):
    whole = train(tmp_path / "whole", max_steps=12, save_every=1, sample_every=100)
    run = tmp_path / "killed"
    command = [sys.executable, "-c", RUN, str(run), str(CARD)]
    for kill_at in (2, 5):  # steps; every step saves, so most of the time is spent in a save
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (run / f"checkpoint-{kill_at}").is_dir():
            time.sleep(0.002)
        time.sleep(random.random() * 0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
        checkpoints = sorted(run.glob("checkpoint-*"))
        assert checkpoints
        for checkpoint in checkpoints:
            MDMForMultiModalGeneration.from_pretrained(checkpoint)
            for name in (EMA_FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
                assert (checkpoint / name).stat().st_size > 0
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    for name in (f"checkpoint-12/{EMA_FILE}", "checkpoint-12/model.safetensors", "final/model.safetensors"):
        expected = load_file(whole.parent / name)
        for key, value in load_file(run / name).items():
            assert torch.equal(value, expected[key]), (name, key)
    assert not (run / UNFINISHED).exists()
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-11", "checkpoint-12"]


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint_whole(tmp_path):
    train(tmp_path, max_steps=2, save_every=2, sample_every=100)
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no file may grow beyond
    try:
        with pytest.raises(OSError, match="Could not write .*checkpoint-4.* free space on the disk"):
            train(tmp_path, max_steps=4, save_every=2, sample_every=100, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()} == before
    assert not (tmp_path / UNFINISHED).exists()


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    train(tmp_path, max_steps=2, save_every=2, sample_every=100)
    with pytest.raises(FloatingPointError, match="loss of inf in step 3, .*last whole checkpoint is .*checkpoint-2"):
        train(tmp_path, max_steps=4, save_every=2, sample_every=100, resume=True, diffusion_weight=float("inf"))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_resuming_without_the_average_says_so(tmp_path):
    train(tmp_path, max_steps=2, save_every=2, sample_every=100)
    (tmp_path / "checkpoint-2" / EMA_FILE).unlink()
    with pytest.raises(ValueError, match="needs the moving average .* which is missing"):
        train(tmp_path, max_steps=4, save_every=2, sample_every=100, resume=True)


def test_the_log_holds_every_part_of_the_loss(tmp_path):
    train(tmp_path, max_steps=100, save_every=100, sample_every=1000)
    state = json.loads((tmp_path / "checkpoint-100" / "trainer_state.json").read_text())
    entry = state["log_history"][0]
    for name in ("loss", "loss_rec_image", "loss_rec_text", "loss_kl", "loss_se_image", "loss_se_text"):
        assert entry[name] > 0
