"""Claims about training: it learns, it logs, it can be killed and resumed, it publishes a folder that works."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.kill_and_resume import kill_and_resume
from mdm_hf import MDMPipeline
from mdm_hf.modeling_mdm import LOSS_PARTS, MDMOutput
from mdm_hf.training.measures import LossMeter
from mdm_hf.training.recipe import load_recipe
from mdm_hf.training.stages import run_recipe
from mdm_hf.training.trainer import EMA_FILE, UNFINISHED


ROOT = Path(__file__).parents[1]
SMALL = ["model.config={hidden_size: 32, num_hidden_layers: 1}", "seed=0"]
STAGE = {
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "warmup_steps": 1,
    "save_steps": 2,
    "sample_every": 100,
    "disable_tqdm": "true",
    "report_to": "none",
}


def changes(folder, **options) -> list[str]:
    stage = STAGE | options
    more = stage.pop("more", [])
    return [*SMALL, f"output_dir={folder}", *(f"stages.diffusion.{k}={v}" for k, v in stage.items()), *more]


def train(folder, resume=False, **options):
    recipe = load_recipe(ROOT / "recipes" / "digits.yaml", changes(folder, **options))
    return run_recipe(recipe, resume=resume)


def test_a_run_draws_grids_saves_an_average_and_publishes_a_working_folder(tmp_path):
    final = train(tmp_path, sample_every=2)
    run = tmp_path / "diffusion"
    assert [p.name for p in sorted((run / "samples").iterdir())] == ["step-0000002.png", "step-0000004.png"]
    averaged = list(load_file(run / "checkpoint-4" / EMA_FILE).values())
    trained = load_file(run / "checkpoint-4" / "model.safetensors")
    published = load_file(final / "model.safetensors")
    assert len(averaged) == len(trained)
    assert any(not torch.equal(published[k], trained[k]) for k in trained), "the average, not the last weights"
    pipe = MDMPipeline.from_pretrained(final, device="cpu")
    assert len(pipe(class_ids=[1, 2], num_inference_steps=2, seed=0)) == 2


def test_a_run_killed_at_any_moment_leaves_whole_checkpoints_and_resumes_to_the_same_weights(tmp_path):
    """Twice here; benchmarks/kill_and_resume.py does it as often as one likes."""
    result = kill_and_resume(tmp_path, kills=2, steps=20)
    assert [one["whole_checkpoints"] for one in result["kills"]] != [0, 0]
    for folder in (tmp_path / "whole" / "diffusion", tmp_path / "killed" / "diffusion"):
        assert not (folder / UNFINISHED).exists()
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-19", "checkpoint-20"]


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint_whole(tmp_path):
    train(tmp_path, max_steps=2, save_steps=2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "diffusion" / "checkpoint-2").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no file may grow beyond
    try:
        with pytest.raises(OSError, match="Could not write .*checkpoint-4.* free space on the disk"):
            train(tmp_path, max_steps=4, save_steps=2, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "diffusion").glob("*checkpoint*")] == ["checkpoint-2"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "diffusion" / "checkpoint-2").iterdir()} == before
    assert not (tmp_path / "diffusion" / UNFINISHED).exists()


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, monkeypatch):
    train(tmp_path, max_steps=2, save_steps=2)
    monkeypatch.setattr("mdm_hf.modeling_mdm.reconstruction_loss", lambda pixels, made: made.sum(-1) + float("inf"))
    with pytest.raises(FloatingPointError, match="loss of inf in step 3, .*last whole checkpoint is .*checkpoint-2"):
        train(tmp_path, max_steps=4, save_steps=2, resume=True)
    assert [path.name for path in (tmp_path / "diffusion").glob("checkpoint-*")] == ["checkpoint-2"]


def test_losses_are_summed_on_the_cpu_for_not_every_device_has_float64():
    class OnDevice:
        def __init__(self, tensor):
            self.cpu = lambda: tensor

    meter = LossMeter()
    rows = torch.zeros(2, len(LOSS_PARTS))
    rows[:, 0] = torch.tensor([1.0, 2.0])
    meter.add(MDMOutput(row_losses=OnDevice(rows), timesteps=OnDevice(torch.full((2, 2), 0.5))))
    assert meter.means(lambda sums: sums)[LOSS_PARTS[0]] == 1.5


def test_resuming_without_the_average_says_so(tmp_path):
    train(tmp_path, max_steps=2, save_steps=2)
    (tmp_path / "diffusion" / "checkpoint-2" / EMA_FILE).unlink()
    with pytest.raises(ValueError, match="needs the moving average .* which is missing"):
        train(tmp_path, max_steps=4, save_steps=2, resume=True)


def test_the_log_holds_every_part_of_the_loss(tmp_path):
    train(tmp_path, max_steps=100, save_steps=100)
    state = json.loads((tmp_path / "diffusion" / "checkpoint-100" / "trainer_state.json").read_text())
    entry = state["log_history"][0]
    for name in ("loss", "loss_rec_image", "loss_rec_text", "loss_kl", "loss_se_image", "loss_se_text"):
        assert entry[name] > 0
