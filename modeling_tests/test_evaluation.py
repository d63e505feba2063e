"""Claims about the scores: a perfect model scores one, a blind one scores chance, the shipped one earns its card."""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mdm_hf import MDMPipeline
from mdm_hf.evaluation.demo import with_truth
from mdm_hf.evaluation.digits import DigitJudge, as_pixels, evaluate_digits, frechet_distance
from mdm_hf.evaluation.pictures import picture_grid
from mdm_hf.evaluation.results import SAMPLING, bootstrap_interval, model_id, settings_hash, settings_of
from mdm_hf.training.digits import all_questions_and_answers, caption, digit_named_in, load_digits_split


CARD = Path(__file__).parents[1] / "model_cards" / "mdm-digits"


class PerfectPipe:
    """Knows every digit by its pixels and draws training images."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.images, self.labels = load_digits_split("train")
        held_images, held_labels = load_digits_split("heldout")
        self.label_of = {i.tobytes(): int(n) for i, n in zip(held_images, held_labels, strict=True)}

    def draw(self, digit):
        return self.images[self.rng.choice(np.flatnonzero(self.labels == digit))]

    def __call__(self, text=None, images=None, class_ids=None, generate=None, **settings):
        count = len(text or images or class_ids)
        results = []
        for n in range(count):
            prompt = text[n] if text else None
            if images is not None:
                digit = self.label_of[images[n].tobytes()]
                said = caption(digit, self.rng)
                if prompt is not None:
                    said = self.answer(prompt, digit)
                results.append({"images": [], "text": [said]})
                continue
            digit = class_ids[n] if class_ids else None
            if digit is None:
                digit = digit_named_in(prompt) if prompt else int(self.rng.integers(10))
            results.append({"images": [self.draw(digit)], "text": [caption(digit, self.rng)]})
        return results

    @staticmethod
    def answer(question, digit):
        answers = [a for q, a in all_questions_and_answers() if q == question]
        return next(a for a in answers if digit_named_in(a) == digit)


class BlindPipe(PerfectPipe):
    """Draws and says the same, whatever it is asked."""

    def __call__(self, text=None, images=None, class_ids=None, generate=None, **settings):
        count = len(text or images or class_ids)
        return [{"images": [self.draw(int(self.rng.integers(10)))], "text": ["a five"]} for _ in range(count)]


TASKS = (
    "class_to_image",
    "text_to_image",
    "image_to_text",
    "question_answering",
    "image_and_text_agree",
    "prompt_to_image_and_text",
)


@pytest.mark.parametrize(
    ("said", "shown"), [("a three", "a three (3)"), ("a nine", "a nine (WRONG: 3)"), ("", " (WRONG: 3)")]
)
def test_the_demo_shows_what_a_digit_truly_is(said, shown):
    assert with_truth(said, 3) == shown


def test_a_perfect_model_scores_one_up_to_the_judge():
    scores = evaluate_digits(PerfectPipe(), num_samples=400)["scores"]
    assert all(scores[task] > 0.98 for task in TASKS)
    assert scores["captions_well_formed"] == 1
    assert 0.8 < scores["pixel_frechet_ratio"] < 2  # real images score 1.75 here: 400 of them, in 64 dimensions


def test_a_blind_model_scores_chance():
    scores = evaluate_digits(BlindPipe(), num_samples=400)["scores"]
    assert all(scores[task] < 0.2 for task in TASKS)


def test_the_frechet_distance_of_equal_gaussians_is_zero_and_of_shifted_ones_the_squared_shift():
    a = np.random.default_rng(0).normal(8, 2, (5000, 64))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + 4) == pytest.approx(64 * 0.5**2, rel=1e-6)
    b = 8 + 2 * (a - 8)
    root = np.sqrt(np.linalg.eigvalsh(np.cov(a / 8, rowvar=False))).sum()
    assert frechet_distance(a, b) > 0.9 * np.square(root) / 64


def test_the_judge_names_98_percent_of_digits_it_never_saw():
    assert DigitJudge().accuracy() > 0.975


def test_pixels_come_back_on_the_scale_of_the_data_set():
    images, _ = load_digits_split("train")
    pixels = as_pixels(images)
    assert pixels.min() == 0
    assert pixels.max() == pytest.approx(16)
    np.testing.assert_allclose(pixels, np.rint(pixels), atol=0.05)


def test_too_few_samples_for_the_frechet_distance_are_refused():
    with pytest.raises(ValueError, match="needs at least 65"):
        evaluate_digits(PerfectPipe(), num_samples=64)


def test_a_bootstrap_interval_is_as_wide_as_the_error_of_the_mean_says():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 2 / 400**0.5, rel=0.1)
    with pytest.raises(ValueError, match="needs at least one"):
        bootstrap_interval([])


def test_the_interval_of_a_biased_statistic_covers_it_as_often_as_it_says():
    def number_of_kinds(rows: np.ndarray) -> float:  # as an inception score counts them
        share = rows.mean(0)
        return float(np.exp(-(share * np.log(share.clip(min=1e-30))).sum()))

    rng = np.random.default_rng(0)
    sets = [np.eye(25)[rng.integers(25, size=200)] for _ in range(100)]
    expected = np.mean([number_of_kinds(rows) for rows in sets])
    ends = np.array([bootstrap_interval(rows, number_of_kinds, 100, is_biased=True) for rows in sets])
    assert ((ends[:, 0] <= expected) & (expected <= ends[:, 1])).mean() > 0.85
    assert all(low < number_of_kinds(rows) < high for rows, (low, high) in zip(sets, ends, strict=True))


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "processor_config.json", "scheduler/s.json"]
)
def test_a_model_is_another_one_when_any_of_its_configurations_changes(name, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / name).write_text("{}")
    before = model_id(str(tmp_path))
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "scores.json").write_text("{}")
    assert model_id(str(tmp_path)) == before
    (tmp_path / name).write_text('{"a": 1}')
    assert model_id(str(tmp_path)) != before


def test_a_model_is_the_same_one_wherever_it_lies_and_another_with_other_weights(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    before = model_id(str(tmp_path))
    os.utime(tmp_path / "model.safetensors", (0, 0))
    copy = shutil.copytree(tmp_path, tmp_path / "copy")
    assert model_id(str(tmp_path)) == model_id(str(copy)) == before
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    assert model_id(str(tmp_path)) != before


def test_the_hash_of_the_settings_is_another_when_the_model_its_sampling_or_its_solver_is(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(CARD, model)
    options = argparse.Namespace(model=str(model), steps=None, **dict.fromkeys(SAMPLING))
    pipe = MDMPipeline.from_pretrained(model, device="cpu")

    def of_now() -> str:
        return settings_hash(settings_of(options, pipe))

    seen = [of_now()]
    assert of_now() == seen[0]
    for name, value in {"steps": 7, "guidance_interval": [0.0, 0.5], "text_selection_tolerance": False}.items():
        setattr(options, name, value)
        seen.append(of_now())
    own = {"modality_lag": -0.5, "selection_tolerance": 0.1, "min_new_tokens": 3, "strength": 0.7, "step_tolerance": 1}
    for name, value in own.items():
        setattr(pipe.model.generation_config, name, value)
        seen.append(of_now())
    default = pipe.model.default_scheduler()
    for change in ({"solver_order": 1}, {"use_karras_sigmas": True}):
        pipe.scheduler = type(default).from_config(default.config, **change)
        seen.append(of_now())
    weights = load_file(model / "model.safetensors")
    next(iter(weights.values())).add_(1e-3)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    seen.append(of_now())
    assert len(set(seen)) == len(seen)
    assert settings_of(options, pipe)["solver"].startswith("DPMSolverMultistepScheduler ")


def test_a_grid_has_a_place_for_every_cell_caption_and_heading():
    cell = (Image.new("L", (8, 8), 255), "a long caption that needs more than one line")
    plain = picture_grid([cell] * 5, columns=3)
    headed = picture_grid([cell] * 5, columns=3, headings={0: "above"})
    assert plain.size[0] == headed.size[0]
    assert headed.size[1] > plain.size[1]
    assert len(set(plain.getdata())) > 1
    assert picture_grid([(None, "")], columns=1).size[0] > 90


def test_the_shipped_weights_still_earn_what_their_card_says():
    """100 samples a task, so allow for three standard errors of a share: what lies below is a regression."""
    pipe = MDMPipeline.from_pretrained(CARD, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    promised = json.loads((CARD / "scores.json").read_text())["scores"]
    got = evaluate_digits(pipe, num_samples=100, seed=1234)["scores"]
    for task in (*TASKS, "captions_well_formed"):
        p = min(max(promised[task], 0.02), 0.98)
        assert got[task] > promised[task] - 3 * (p * (1 - p) / 100) ** 0.5, task
