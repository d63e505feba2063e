"""Claims about training: it learns, it logs, it can be killed and resumed, it publishes a folder that works."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mdm_hf import MDMPipeline, MDMProcessor
from mdm_hf.training.recipe_digits import train_digits
from mdm_hf.training.trainer import EMA_FILE


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


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    whole = train(tmp_path / "whole", save_every=2, sample_every=100)
    final = tmp_path / "whole" / "checkpoint-4"
    expected = {name: load_file(final / name) for name in ("model.safetensors", EMA_FILE)}
    published = load_file(whole / "model.safetensors")
    for path in final.iterdir():
        path.unlink()
    final.rmdir()
    resumed = train(tmp_path / "whole", save_every=2, sample_every=100, resume=True)
    for name, weights in expected.items():
        for key, value in load_file(final / name).items():
            assert torch.equal(value, weights[key]), (name, key)
    for key, value in load_file(resumed / "model.safetensors").items():
        assert torch.equal(value, published[key]), key


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
