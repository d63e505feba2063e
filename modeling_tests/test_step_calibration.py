"""Claims about `num_inference_steps="auto"`: the fewest steps that make the samples of many, measured once a kind."""

from unittest import mock

import pytest
import torch
from PIL import Image
from tiny import KINDS, batch, generators, tiny_model, tiny_pipeline

from mdm_hf import MDMForMultiModalGeneration, MDMGenerationConfig
from mdm_hf.step_calibration import CANDIDATES, fewest_steps, fewest_whole, first_rows


ONE_TARGET = [torch.ones(1, 3, dtype=torch.bool)]


def off_by(error: float):
    """Latents whose error with n steps is `error / n**2` of their size, and the numbers that were asked for."""
    exact, away, asked = torch.randn(1, 3, 4).double(), torch.randn(1, 3, 4).double(), []
    away = away / away.square().sum().sqrt() * exact.square().sum().sqrt()

    def draw(steps: int) -> torch.Tensor:
        asked.append(steps)
        return exact if steps == 50 else exact + away * error / steps**2

    return draw, asked


@pytest.mark.parametrize(("tolerance", "steps"), [(0.21, 10), (0.06, 20), (1.5, 4), (1e-4, 50)])
def test_the_first_number_of_steps_within_the_tolerance_is_taken(tolerance, steps) -> None:
    draw, asked = off_by(20)
    found, errors = fewest_steps(draw, ONE_TARGET, tolerance)
    assert found == steps
    assert asked == [50, *(n for n in CANDIDATES if n <= steps)]
    assert errors == pytest.approx({n: 20 / n**2 for n in asked[1:]})


def test_the_worse_of_two_modalities_decides() -> None:
    (fine, _), (coarse, _) = off_by(1), off_by(20)
    masks = [torch.tensor([[True] * 3 + [False] * 3]), torch.tensor([[False] * 3 + [True] * 3])]
    found, _ = fewest_steps(lambda steps: torch.cat([fine(steps), coarse(steps)], dim=1), masks, 0.21)
    assert found == 10


def test_no_candidate_beyond_the_most_or_below_the_least_is_tried() -> None:
    draw, asked = off_by(20)
    assert fewest_steps(draw, ONE_TARGET, 1e-9, most=8)[0] == 8
    assert asked == [8, 4, 6]
    draw, asked = off_by(20)
    assert fewest_steps(draw, ONE_TARGET, 1e-9, most=8, least=6)[0] == 8
    assert asked == [8, 6]


def test_a_single_target_takes_no_more_steps_than_many() -> None:
    draw, _ = off_by(20)
    alone = [torch.tensor([[True, False, False]])]
    assert fewest_steps(lambda steps: draw(steps)[:, :1].expand(1, 3, 4), alone, 1.5)[0] < 50


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 1), (0.5, 2), (0.3, 2), (0.1, 6), (0.05, 11), (1 / 186, 94)])
def test_the_fewest_steps_of_which_a_share_is_a_whole_one(strength, steps) -> None:
    assert fewest_whole(strength) == steps
    assert round(steps * strength) >= 1
    assert steps == 1 or round((steps - 1) * strength) < 1


@pytest.mark.parametrize("count", [1, 4, len(KINDS)])
def test_the_first_rows_of_a_batch_take_their_own_images_along(count) -> None:
    model, names = tiny_model(), ("pixel_values", "image_grid_hw", "image_latents", "class_ids")
    inputs = batch(KINDS)
    layout = model.model.layout(inputs["input_ids"], *(inputs.get(k) for k in ("image_grid_hw", "attention_mask")))
    rows = first_rows(layout, count, dict.fromkeys(names) | dict(inputs))
    alone = model.generate(**rows, generator=generators(range(count)), num_inference_steps=2)
    together = model.generate(**inputs, generator=generators(range(len(KINDS))), num_inference_steps=2)
    assert alone.sequences.equal(together.sequences[:count])
    torch.testing.assert_close(alone.latents, together.latents[:count], atol=3e-5, rtol=0)


def test_auto_draws_what_its_number_of_steps_draws_and_measures_once_a_kind() -> None:
    model, inputs = tiny_model(), batch(KINDS)
    options = {"num_inference_steps": "auto", "step_tolerance": 0.3}
    calls, generate = [], MDMForMultiModalGeneration.generate

    def watch(self, *args, **kwargs):
        calls.append(kwargs.get("num_inference_steps") or kwargs["generation_config"].num_inference_steps)
        return generate(self, *args, **kwargs)

    with mock.patch.object(MDMForMultiModalGeneration, "generate", watch):
        auto = model.generate(**inputs, generator=generators(range(len(KINDS))), **options)
        [steps] = model.found_steps.values()
        measured = ["auto", 50, *(n for n in CANDIDATES if n <= steps)]
        assert calls == measured
        model.generate(**inputs, generator=generators(range(len(KINDS))), **options)
        assert calls == [*measured, "auto"]
        model.generate(**inputs, **options | {"step_tolerance": 0.9})
        model.generate(**inputs, **options, scheduler="DDIMScheduler")
    assert len(model.found_steps) == 3
    plain = model.generate(**inputs, generator=generators(range(len(KINDS))), num_inference_steps=steps)
    assert auto.latents.equal(plain.latents)
    assert auto.sequences.equal(plain.sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": "many"}, "`num_inference_steps` is 'many'; it must be a whole number, 1 or more, or"),
        ({"step_tolerance": 0}, "`step_tolerance` is 0; it must be a number above 0"),
        ({"step_tolerance": True}, "`step_tolerance` is True; it must be a number above 0"),
        ({"step_tolerance": float("nan")}, "`step_tolerance` is nan; it must be a number above 0"),
    ],
)
def test_steps_and_tolerances_that_are_none_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(**batch(KINDS), **options)


@pytest.mark.parametrize(("kinds", "measured"), [(["text", "text"], 1), (["text", "class_to_image"], 2)])
def test_a_batch_of_several_kinds_is_measured_on_all_of_it(monkeypatch, kinds, measured) -> None:
    monkeypatch.setattr("mdm_hf.generation_mdm.CALIBRATION_ROWS", 1)
    with mock.patch("mdm_hf.generation_mdm.fewest_steps", return_value=(2, {})) as fewest:
        tiny_model().generate(**batch(kinds), num_inference_steps="auto")
    assert {len(mask) for mask in fewest.call_args[0][1]} == {measured}


def test_how_long_a_text_has_to_be_makes_no_other_kind() -> None:
    model, inputs = tiny_model(), batch(["text"])
    with mock.patch("mdm_hf.generation_mdm.fewest_steps", return_value=(2, {})) as fewest:
        for due in (4, 2, 0):  # as of the blocks of a long answer
            model.generate(**inputs, num_inference_steps="auto", min_new_tokens=due)
    assert fewest.call_count == 1


def test_a_kind_is_what_is_made_of_what_size_whatever_is_shown_with_it() -> None:
    pipe, options = tiny_pipeline(), {"num_inference_steps": "auto", "seed": 0}
    small, large = (Image.new("L", (side, side)) for side in (8, 24))
    pipe.processor.image_processor.do_resize = False
    with mock.patch("mdm_hf.generation_mdm.fewest_steps", return_value=(2, {})) as fewest:
        for shown in (small, large):
            for side in (8, 24):
                pipe(images=shown, generate="image", image_size=(side, side), **options)
        assert fewest.call_count == 2
        for length in (4, 4, 5, 8):  # 5 is as 4, to a factor of two
            pipe(images=small, generate="text", max_new_tokens=length, **options)
        assert fewest.call_count == 4


def test_steps_are_measured_as_the_call_samples_and_not_as_the_model_does() -> None:
    model, asked = tiny_model(), []
    model.generation_config = MDMGenerationConfig(text_selection_tolerance=0.5, text_guidance_scale=3.0)
    watched = model._sampling_config

    def watch(config, options):
        found = watched(config, options)
        asked.append((found.text_selection_tolerance, found.text_guidance_scale))
        return found

    with mock.patch.object(model, "_sampling_config", watch):
        own = MDMGenerationConfig(num_inference_steps="auto", step_tolerance=0.9)
        model.generate(**batch(["text"]), generation_config=own)
    assert len(asked) > 2
    assert {*asked} == {(own.text_selection_tolerance, own.text_guidance_scale)}


def test_steps_that_were_found_are_those_of_these_weights() -> None:
    model, inputs = tiny_model(), batch(["text"])
    with mock.patch("mdm_hf.generation_mdm.fewest_steps", return_value=(2, {})) as fewest:
        for _ in range(2):
            model.generate(**inputs, num_inference_steps="auto")
        assert fewest.call_count == 1
        model.latent_head.weight.data.mul_(2)
        model.generate(**inputs, num_inference_steps="auto")
    assert fewest.call_count == 2
