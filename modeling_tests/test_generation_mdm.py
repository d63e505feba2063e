"""Claims about sampling."""

import logging
from unittest import mock

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SCMScheduler,
    UniPCMultistepScheduler,
)
from tiny import ASSISTANT, KINDS, VOCAB, batch, generators, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from mdm_hf import MDMForMultiModalGeneration, MDMGenerationConfig, MDMModel, denoiser, generation_mdm
from mdm_hf.solvers import solver_named


GUIDANCE = pytest.mark.parametrize(
    "guidance",
    [{}, {"guidance_scale": 2.5}, {"guidance_scale": 2.5, "guidance_interval": (0.3, 0.7)}],
    ids=["unguided", "guided", "between"],
)


def same_outputs(a, b, atol=3e-5):
    torch.testing.assert_close(a.latents, b.latents, atol=atol, rtol=1e-5)
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.images, b.images, strict=True):
        for image, other in zip(x, y, strict=True):
            torch.testing.assert_close(image, other, atol=atol, rtol=1e-5)


@GUIDANCE
@pytest.mark.parametrize("sharing", ["shared", "independent", "alternate"])
def test_the_condition_cache_changes_no_sample(sharing, guidance):
    model = tiny_model(scan_sharing=sharing)
    cached, uncached = (
        model.generate(
            **batch(KINDS),
            generator=generators(range(5)),
            num_inference_steps=6,
            use_cache=use_cache,
            **guidance,
        )
        for use_cache in (True, False)
    )
    same_outputs(cached, uncached)


def test_the_condition_cache_gives_the_hidden_states_of_the_full_run():
    model = tiny_model()
    inputs = batch(["text_to_image", "both", "caption"])
    seen = {}

    def remember(name):
        return lambda module, args, output: seen.setdefault(name, []).append(output)

    for name, use_cache in (("cached", True), ("full", False)):
        handle = model.model.norm.register_forward_hook(remember(name))
        options = {"num_inference_steps": 1, "modality_lag": 0.0, "use_cache": use_cache}
        model.generate(**inputs, generator=generators(range(3)), **options)
        handle.remove()
    prefix, targets = seen["cached"]
    (full,) = seen["full"]
    assert max(prefix.shape[1], targets.shape[1]) < full.shape[1] == inputs["input_ids"].shape[1]
    for i in range(3):
        size = int(inputs["attention_mask"][i].sum())
        count = size - int((inputs["input_ids"][i] == ASSISTANT).nonzero()[0]) - 1
        torch.testing.assert_close(targets[i, :count], full[i, size - count : size], atol=1e-5, rtol=1e-5)


@GUIDANCE
def test_after_many_turns_neither_cache_nor_batch_changes_a_sample(guidance):
    model, options = tiny_model(), {"num_inference_steps": 4} | guidance
    together, uncached = (
        model.generate(**batch(["chat", "both"]), generator=generators(range(2)), use_cache=use_cache, **options)
        for use_cache in (True, False)
    )
    same_outputs(together, uncached)
    alone = model.generate(**batch(["chat"]), generator=generators([0]), **options)
    torch.testing.assert_close(together.latents[0], alone.latents[0], atol=3e-5, rtol=1e-5)


def test_the_vocabulary_is_encoded_once_however_many_steps_are_taken():
    model, seen = tiny_model(), []
    model.model.vae.token_embedding.register_forward_hook(lambda module, given, out: seen.append(given[0].numel()))
    model.generate(**batch(["caption"]), num_inference_steps=5)
    assert seen.count(VOCAB) == 1


def test_a_default_device_of_torch_changes_no_sample_and_no_score():
    model, inputs = tiny_model(), batch(["both", "caption"])
    scored = batch(["both", "caption"], is_training=True) | {"num_samples": 4, "seeds": torch.arange(2)}
    sample = model.generate(**inputs, generator=generators(range(2)), num_inference_steps=3)
    score = model.score(**scored)
    with torch.device("meta"):
        again = model.generate(**inputs, generator=generators(range(2)), num_inference_steps=3)
        same_outputs(sample, again)
        assert torch.equal(model.score(**scored).draws, score.draws)


@GUIDANCE
def test_a_sample_is_the_same_alone_and_in_a_batch(guidance):
    model = tiny_model()
    options = {"num_inference_steps": 6, "modality_lag": 0.5} | guidance
    together = model.generate(**batch(KINDS), generator=generators(range(5)), **options)
    for i, kind in enumerate(KINDS):
        alone = model.generate(**batch([kind]), generator=generators([i]), **options)
        length = alone.sequences.shape[1]
        torch.testing.assert_close(together.latents[i, :length], alone.latents[0], atol=2e-5, rtol=1e-5)
        assert torch.equal(together.sequences[i, :length], alone.sequences[0])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("solver", [DDPMScheduler, DPMSolverMultistepScheduler], ids=["ddpm", "sde"])
def test_what_a_stochastic_solver_draws_for_a_row_is_the_same_alone_and_in_a_batch(solver, use_cache):
    kind = {"algorithm_type": "sde-dpmsolver++"} if solver is DPMSolverMultistepScheduler else {}
    options = {"scheduler": solver(prediction_type="sample", **kind), "num_inference_steps": 4, "use_cache": use_cache}
    model = tiny_model()
    together = model.generate(**batch(KINDS), generator=generators(range(5)), **options)
    for i, kind in enumerate(KINDS):
        alone = model.generate(**batch([kind]), generator=generators([i]), **options)
        length = alone.sequences.shape[1]
        torch.testing.assert_close(together.latents[i, :length], alone.latents[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("lag", [1.0, -1.0])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_with_a_full_lag_one_modality_takes_all_its_steps_before_the_other(steps, lag):
    times = []
    tiny_model().generate(
        **batch(["both"]),
        modality_lag=lag,
        num_inference_steps=steps,
        callback_on_step_end=lambda model, step, after, state: times.append(after),
    )
    image, text = zip([1.0, 1.0], *times, strict=True)
    assert len(times) == 2 * steps
    moves = [(a != b, c != d) for a, b, c, d in zip(image, image[1:], text, text[1:], strict=False)]
    assert all(sum(move) == 1 for move in moves)
    first = [move[1 if lag == 1 else 0] for move in moves]
    assert first == sorted(first, reverse=True)


def test_a_stock_scheduler_neither_clips_nor_starts_below_pure_noise():
    model = tiny_model()
    stock, fit = (
        model.generate(**batch(KINDS[:2]), generator=generators([0, 1]), scheduler=s, num_inference_steps=5).latents
        for s in (
            DDIMScheduler(prediction_type="sample"),
            DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing"),
        )
    )
    assert torch.equal(stock, fit)


@pytest.mark.parametrize("options", [{"trained_betas": [0.01] * 1000}, {"rescale_betas_zero_snr": True}])
def test_a_scheduler_with_a_noise_schedule_of_its_own_takes_the_models(options):
    model = tiny_model()
    plain, own = (
        model.generate(**batch(KINDS[:1]), generator=generators([0]), scheduler=s, num_inference_steps=3).latents
        for s in (DDIMScheduler(prediction_type="sample"), DDIMScheduler(prediction_type="sample", **options))
    )
    assert torch.equal(plain, own)


class WaitsForTheDevice(TorchDispatchMode):
    """Collects the operators whose result the host has to wait for.

    On a GPU the tables of a scheduler stay on the host: tensors in `of_host`, and what is made of them alone, cost no
    wait. Here all tensors are on the CPU.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.found = []
        self.of_host = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        is_of_host = bool(tensors) and all(value in self.of_host for value in tensors)
        indices = tree_leaves([value for value in args if isinstance(value, list)])
        by_mask = "index" in name and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)
        if not is_of_host and (by_mask or name.startswith(self.WAITING)):
            self.found.append(name)
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results) if is_of_host else ():
            if isinstance(result, torch.Tensor):
                self.of_host[result] = True
        return results


def test_the_watch_for_waits_sees_them():
    with WaitsForTheDevice() as waits:
        values, of_host = torch.arange(3), torch.arange(3)
        waits.of_host[of_host] = True
        bool((of_host + 1).any())
        bool(values.any())
        values[values > 1]
        float((of_host * values)[0])
    assert waits.found == ["_local_scalar_dense", "index", "_local_scalar_dense"]


@pytest.mark.parametrize("interval", [None, (0.3, 0.7)])
@pytest.mark.parametrize("lag", [1.0, 0.0])
def test_no_step_of_the_loop_waits_for_the_device(monkeypatch, lag, interval):
    """Network calls and steps of the default solver."""
    waits = WaitsForTheDevice()
    steps = []

    def watched(function):
        def step(self, *args):
            tables = vars(self.scheduler).values() if isinstance(self, generation_mdm._Track) else ()
            waits.of_host.update({table: True for table in tables if isinstance(table, torch.Tensor)})
            steps.append(function.__name__)
            with waits:
                return function(self, *args)

        return step

    for part, name in ((denoiser.Denoiser, "predict"), (generation_mdm._Track, "advance")):
        monkeypatch.setattr(part, name, watched(getattr(part, name)))
    options = {"guidance_scale": 2.0, "guidance_interval": interval, "modality_lag": lag}
    tiny_model().generate(**batch(KINDS), num_inference_steps=3, **options)
    assert set(steps) == {"predict", "advance"}
    assert waits.found == []


def test_a_seed_reproduces_a_sample_bit_for_bit_and_another_does_not():
    model = tiny_model()
    first, second, third = (model.generate(**batch(KINDS), generator=generators([s] * 5)) for s in (1, 1, 2))
    assert torch.equal(first.latents, second.latents)
    assert not torch.equal(first.latents, third.latents)


def test_only_targets_change():
    inputs = batch(KINDS)
    out = tiny_model().generate(**inputs, num_inference_steps=3)
    known = inputs["target_mask"] == 0
    assert torch.equal(out.sequences[known], inputs["input_ids"][known])
    is_text = (inputs["input_ids"] == 13) & ~known
    assert not (out.sequences[is_text] == 13).any()


def test_generated_text_holds_no_control_token():
    model = tiny_model()
    inputs = batch(["caption"] * 20)
    out = model.generate(**inputs, num_inference_steps=2)
    written = out.sequences[inputs["target_mask"] == 1]
    assert bool(((written >= 17) | (written <= 3) & (written >= 1)).all())


def test_no_text_ends_before_it_has_its_fewest_tokens():
    model, inputs = tiny_model(), batch(["caption"] * 8)
    decoder = model.model.vae.token_head
    decoder.bias.data[2] += 2.0  # so that about half of all tokens would be </s>
    options = {"generator": generators(range(8)), "num_inference_steps": 3}
    is_text = inputs["input_ids"][0] == 13
    free = model.generate(**inputs, **options).sequences[:, is_text]
    assert bool((free[:, :3] == 2).any())
    kept = model.generate(**inputs, min_new_tokens=3, **options | {"generator": generators(range(8))}).sequences
    assert not bool((kept[:, is_text][:, :3] == 2).any())
    assert bool((kept[:, is_text][:, 3:] == 2).any())


def test_every_row_gets_its_images_and_only_those():
    out = tiny_model().generate(**batch(KINDS), num_inference_steps=2)
    assert [len(images) for images in out.images] == [1, 1, 0, 1, 0]
    assert all(image.shape == (1, 4, 6) for images in out.images for image in images)
    assert all(float(image.abs().max()) <= 1 for images in out.images for image in images)


@pytest.mark.parametrize("known", [0, 1], ids=["first-row", "second-row"])
@pytest.mark.parametrize("is_placeholder", [False, True])
def test_known_pixels_of_a_partly_known_image_are_kept(known, is_placeholder):
    inputs = batch(["class_to_image"], is_training=True)
    del inputs["labels"]
    inputs["target_mask"][0, 4 + 3 * known : 7 + 3 * known] = 0  # one row of three patches is known
    if is_placeholder:
        inputs["input_ids"][(inputs["input_ids"] == 11) & (inputs["target_mask"] == 1)] = 12
    (image,) = tiny_model().generate(**inputs, num_inference_steps=2).images[0]
    given, made = (slice(2 * k, 2 * k + 2) for k in (known, 1 - known))
    torch.testing.assert_close(image[:, given], inputs["pixel_values"][0, :, given])
    assert not torch.allclose(image[:, made], inputs["pixel_values"][0, :, made])


def test_ids_of_any_integer_type_give_the_same_samples():
    model, inputs = tiny_model(), batch(["caption"])
    narrow = inputs | {"input_ids": inputs["input_ids"].int()}
    wide, other = (model.generate(**i, generator=generators([0]), num_inference_steps=2) for i in (inputs, narrow))
    assert torch.equal(wide.sequences, other.sequences)


@pytest.mark.parametrize("lag", [1.0, -1.0, 0.5, 0.0])
def test_a_lag_delays_one_modality_by_its_share_of_the_steps(lag):
    model = tiny_model()
    history = []

    def watch(module, step, times, state):
        history.append(state["latents"].clone())

    calls = []
    handle = model.latent_head.register_forward_hook(lambda *a: calls.append(1))
    model.generate(**batch(["both"]), modality_lag=lag, num_inference_steps=8, callback_on_step_end=watch)
    handle.remove()
    assert len(calls) == round(8 * (1 + abs(lag)))
    moved = [
        [not torch.equal(a[0, part], b[0, part]) for a, b in zip(history, history[1:], strict=False)]
        for part in (slice(2, 8), slice(11, 16))  # patches and tokens of the target group
    ]
    image, text = moved
    if lag == 1:
        assert text == [True] * 7 + [False] * 8
        assert image == [False] * 7 + [True] * 8
    elif lag == -1:
        assert image == [True] * 7 + [False] * 8
        assert text == [False] * 7 + [True] * 8
    elif lag == 0:
        assert image == text == [True] * 7
    else:
        assert text == [True] * 7 + [False] * 4
        assert image == [False] * 3 + [True] * 8


def test_guidance_of_one_is_no_guidance_and_moves_samples_otherwise():
    model = tiny_model()
    inputs = batch(["text_to_image"])
    plain, one, three = (
        model.generate(**inputs, generator=generators([0]), guidance_scale=s).latents for s in (1, 1.0, 3.0)
    )
    assert torch.equal(plain, one)
    assert not torch.allclose(plain, three)


def test_guidance_without_any_condition_changes_nothing():
    model = tiny_model()
    inputs = batch(["class_to_image"])
    inputs["class_ids"][:] = -1
    plain, guided = (model.generate(**inputs, generator=generators([0]), guidance_scale=s).latents for s in (1.0, 3.0))
    torch.testing.assert_close(plain, guided, atol=1e-5, rtol=1e-5)


def test_guidance_extrapolates_from_the_row_without_its_conditions():
    """One call at t = 1: z0-hat = without + s (with - without), both from unguided runs."""
    model = tiny_model()
    bare = batch(["class_to_image"])
    bare["class_ids"][:] = -1
    conditioned = batch(["class_to_image"])

    def one_call(inputs, scale):
        out = model.generate(**inputs, generator=generators([0]), num_inference_steps=1, guidance_scale=scale)
        return out.latents[inputs["target_mask"] == 1]

    expected = one_call(bare, 1.0) + 2.0 * (one_call(conditioned, 1.0) - one_call(bare, 1.0))
    torch.testing.assert_close(one_call(conditioned, 2.0), expected, atol=1e-5, rtol=1e-5)


def network_calls(model, inputs, **options):
    """What `generate` gives, the rows that each network call of a step saw, and z_t after each."""
    rows, latents = [], []
    denoise = MDMModel.denoise

    def watch(self, z, *rest):
        rows.append(len(z))
        return denoise(self, z, *rest)

    def after(model, step, times, tensors):
        latents.append(tensors["latents"].clone())

    with mock.patch.object(MDMModel, "denoise", watch):
        out = model.generate(**inputs, generator=generators([0]), callback_on_step_end=after, **options)
    return out, rows[1:], latents  # the first pass reads the conditions


@pytest.mark.parametrize("kind", ["text_to_image", "caption"])
def test_guidance_acts_within_its_interval_alone_and_the_other_calls_see_half_the_rows(kind):
    """Before it the latents are those without guidance, after it those that follow from there without guidance."""
    model, inputs = tiny_model(), batch([kind])
    options = {"num_inference_steps": 10, "scheduler": DDIMScheduler(prediction_type="sample")}
    guided = {"guidance_scale": 3.0, "guidance_interval": (0.25, 0.65)}
    between, rows, latents = network_calls(model, inputs, **options, **guided)
    _, of_plain, plain = network_calls(model, inputs, **options)
    assert of_plain == [1] * 10
    assert rows == [1, 1, 1, 1, 2, 2, 2, 2, 1, 1]  # at t = 1, 0.9, ..., 0.1
    torch.testing.assert_close(latents[:4], plain[:4], atol=2e-5, rtol=1e-5)
    assert not torch.allclose(latents[4], plain[4], atol=1e-3)

    def go_on(model, step, times, tensors):
        return {"latents": latents[7]} if step == 7 else None

    after = model.generate(**inputs, generator=generators([0]), callback_on_step_end=go_on, **options)
    same_outputs(after, between)
    _, of_whole, whole = network_calls(model, inputs, **options, guidance_scale=3.0)
    assert of_whole == [2] * 10
    assert not torch.allclose(whole[0], latents[0], atol=1e-3)


def test_an_interval_between_the_calls_is_no_guidance_and_one_over_all_of_them_is_none():
    model, inputs = tiny_model(), batch(["text_to_image"])
    plain, between, guided, over_all = (
        model.generate(**inputs, generator=generators([0]), num_inference_steps=10, **options).latents
        for options in (
            {},
            {"guidance_scale": 3.0, "guidance_interval": (0.51, 0.59)},
            {"guidance_scale": 3.0},
            {"guidance_scale": 3.0, "guidance_interval": (0, 1)},
        )
    )
    torch.testing.assert_close(plain, between, atol=2e-5, rtol=1e-5)
    assert guided.equal(over_all)


@pytest.mark.parametrize("lag", [1.0, -1.0])
def test_a_modality_without_guidance_costs_one_row_while_the_other_waits_or_is_done(lag):
    options = {"guidance_scale": 2.0, "text_guidance_scale": 1.0, "num_inference_steps": 3, "modality_lag": lag}
    out, rows, _ = network_calls(tiny_model(), batch(["both"]), **options)
    assert rows == ([1] * 3 + [2] * 3 if lag == 1 else [2] * 3 + [1] * 3)
    selected, rows, _ = network_calls(tiny_model(), batch(["both"]), **options, selection_tolerance=0.0)
    assert rows == ([2] * 6 if lag == 1 else [2] * 3 + [1] * 3)  # what is to be guided yet has to know what was said


@pytest.mark.parametrize(
    ("scales", "same_as"),
    [({"guidance_scale": 3.0, "text_guidance_scale": 1.0}, 1.0), ({"text_guidance_scale": 3.0}, 3.0)],
    ids=["text-unguided", "text-alone-guided"],
)
def test_text_has_a_guidance_of_its_own(scales, same_as):
    model = tiny_model()
    caption, plain = (
        model.generate(**batch(["caption"]), generator=generators([0]), **options).latents
        for options in (scales, {"guidance_scale": same_as})
    )
    torch.testing.assert_close(caption, plain, atol=1e-5, rtol=1e-5)
    image, guided = (
        model.generate(**batch(["text_to_image"]), generator=generators([0]), **options).latents
        for options in (scales, {"guidance_scale": scales.get("guidance_scale", 1.0)})
    )
    torch.testing.assert_close(image, guided, atol=1e-5, rtol=1e-5)


def test_temperature_sharpens_the_token_predictions_of_texts_alone():
    model = tiny_model()
    vae = model.model.vae
    inputs, options = batch(["caption"]), {"num_inference_steps": 1}
    at = inputs["target_mask"] == 1
    softened, plain = (
        model.generate(**inputs, generator=generators([0]), **options, text_temperature=heat).latents[at]
        for heat in (0.5, 1.0)
    )
    # One call leaves the text at its prediction, the mean of the codebook under softmax(logits / temperature).
    seen, decode = [], vae.decode_tokens
    with mock.patch.object(vae, "decode_tokens", lambda latents: seen.append(decode(latents)) or seen[-1]):
        model.generate(**inputs, generator=generators([0]), **options)
    for got, heat in ((softened, 0.5), (plain, 1.0)):
        torch.testing.assert_close(got, (seen[0] / heat).softmax(-1) @ vae.codebook("cpu"))
    assert (softened - plain).abs().max() > 1e-4
    image, same = (
        model.generate(**batch(["text_to_image"]), generator=generators([0]), text_temperature=heat).latents
        for heat in (0.5, 1.0)
    )
    torch.testing.assert_close(image, same, atol=0, rtol=0)


@pytest.mark.parametrize(
    "solver", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DDIMScheduler, DDPMScheduler]
)
def test_any_variance_preserving_solver_drives_the_loop(solver):
    out = tiny_model().generate(
        **batch(KINDS),
        scheduler=solver(prediction_type="sample"),
        num_inference_steps=5,
        generator=generators(range(5)),
    )
    assert torch.isfinite(out.latents).all()


@pytest.mark.parametrize(
    ("solver", "steps"),
    [(DPMSolverMultistepScheduler, 20), (UniPCMultistepScheduler, 20), (DDIMScheduler, 20), (DDPMScheduler, 1000)],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_solvers_sample_a_gaussian_from_its_exact_predictor(solver, steps):
    """Data N(2, 0.5^2) in every latent: the loop must return that mean and width."""
    mean, deviation = 2.0, 0.5

    class Exact(MDMForMultiModalGeneration):
        def predict_latents(self, hidden_states, noisy_latents, level):
            level = level.unsqueeze(-1).clamp(1e-12, 1 - 1e-7)
            gain = level.sqrt() * deviation**2 / (level * deviation**2 + 1 - level)
            return mean + gain * (noisy_latents - level.sqrt() * mean)

    model = tiny_model(num_hidden_layers=1)
    model.__class__ = Exact
    inputs = batch(["class_to_image"] * (20 if steps > 100 else 200))
    out = model.generate(
        **inputs,
        scheduler=solver(prediction_type="sample", **({"clip_sample": False} if "DD" in solver.__name__ else {})),
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
    )
    values = out.latents[inputs["target_mask"] == 1]
    assert abs(float(values.mean()) - mean) < 0.06
    assert abs(float(values.std()) - deviation) < 0.08


def test_a_solver_may_be_named():
    model, inputs = tiny_model(), batch(["both"])
    options = {"num_inference_steps": 4}
    for kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DDIMScheduler):
        built = kind.from_config(model.default_scheduler().config)
        one, other = (
            model.generate(**inputs, scheduler=solver, generator=generators([0]), **options)
            for solver in (kind.__name__, built)
        )
        same_outputs(one, other)
    for name in ("EulerSolver", "UNet2DModel", "__version__"):
        with pytest.raises(ValueError, match=f"`scheduler` is '{name}', which names no scheduler of diffusers"):
            model.generate(**inputs, scheduler=name)
    with pytest.raises(ValueError, match=r"`scheduler` \(EulerDiscreteScheduler\)"):
        model.generate(**inputs, scheduler="EulerDiscreteScheduler")


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "DDIMScheduler"])
def test_a_named_solver_is_made_without_a_warning(name, caplog):
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        solver_named(name, tiny_model().config)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_the_callback_sees_every_step_and_may_replace_the_latents():
    model = tiny_model()
    seen = []

    def freeze(module, step, times, state):
        assert module is model
        preview = state["decode"]()
        seen.append((step, times, preview.images[0][0].shape))
        return {"latents": torch.zeros_like(state["latents"])}

    out = model.generate(**batch(["class_to_image"]), num_inference_steps=3, callback_on_step_end=freeze)
    assert [s[0] for s in seen] == [0, 1, 2]
    assert seen[-1][1] == [0.0]
    assert float(out.latents[0, 4:10].abs().max()) == 0


def test_generation_config_travels_with_the_model(tmp_path):
    model = tiny_model()
    model.generation_config = MDMGenerationConfig(num_inference_steps=7, guidance_scale=1.5, modality_lag=0.5)
    model.save_pretrained(tmp_path)
    loaded = MDMForMultiModalGeneration.from_pretrained(tmp_path).generation_config
    assert type(loaded) is MDMGenerationConfig
    assert (loaded.num_inference_steps, loaded.guidance_scale, loaded.modality_lag) == (7, 1.5, 0.5)
    out, named = (
        m.generate(**batch(["both"]), generator=generators([0]), **o).latents
        for m, o in (
            (MDMForMultiModalGeneration.from_pretrained(tmp_path), {}),
            (tiny_model(), {"num_inference_steps": 7, "guidance_scale": 1.5, "modality_lag": 0.5}),
        )
    )
    torch.testing.assert_close(out, named)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0; it must be a whole number, 1 or more"),
        ({"num_inference_steps": -3}, "`num_inference_steps` is -3"),
        ({"num_inference_steps": 1001}, "`num_inference_steps` is 1001; it must be at most 1000, the steps of"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps` is 2.5"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` is nan; it must be a number, 0 or more"),
        ({"text_guidance_scale": -1}, "`text_guidance_scale` is -1; it must be a number, 0 or more"),
        ({"guidance_interval": (0.7, 0.2)}, "`guidance_interval` is (0.7, 0.2); it must be two times, low and high"),
        ({"guidance_interval": (0, 1.1)}, "`guidance_interval` is (0, 1.1); it must be two times"),
        ({"guidance_interval": [0.2]}, "`guidance_interval` is [0.2]; it must be two times"),
        ({"guidance_interval": (float("nan"), 1)}, "`guidance_interval` is (nan, 1); it must be two times"),
        ({"guidance_interval": "all"}, "`guidance_interval` is 'all'; it must be two times"),
        ({"text_temperature": 0}, "`text_temperature` is 0; it must be a number above 0 (1 is the model's own)"),
        ({"modality_lag": 2}, "`modality_lag` is 2; it must lie in [-1, 1]"),
        ({"temperature": 2}, "Unknown generation option(s) ['temperature']"),
        ({"generation_mode": "audio"}, "`generation_mode` is 'audio'; it must be 'image', 'text' or None"),
        ({"generation_mode": "image"}, "the inputs have no such target"),
        ({"generator": generators([1, 2])}, "`generator` is a list of 2 for a batch of 1"),
        ({"generator": 0}, "`generator` is 0; it must be a torch.Generator on the CPU, or one per row; for a seed"),
        ({"generator": [0]}, "`generator` is 0"),
        ({"text_temperature": 1e-45}, "The text latents decode to NaN or infinity; lower `guidance_scale`, bring"),
        ({"guidance_scale": 1e300}, "The text latents decode to NaN or infinity"),
        ({"callback_on_step_end": lambda *a: 3}, "`callback_on_step_end` returned 3; it must return None or {"),
        ({"callback_on_step_end": lambda *a: {"latents": 3}}, "`callback_on_step_end` returned 3"),
        (
            {"callback_on_step_end": lambda *a: {"latents": a[-1]["latents"][:, 1:]}},
            "returned latents of shape (1, 7, 8); it must return None or {'latents': a tensor of shape (1, 8, 8)}",
        ),
        ({"callback_on_step_end": lambda *a: {"latents": a[-1]["latents"] * float("nan")}}, "The text latents decode"),
        ({"min_new_tokens": -1}, "`min_new_tokens` is -1; it must be a whole number, 0 or more"),
        ({"target_mask": None}, "`target_mask` marks nothing to generate in row 0"),
        ({"labels": torch.zeros(1, 19)}, "`generate` got `labels`"),
        ({"scheduler": "ddim"}, "`scheduler` is 'ddim', which names no scheduler of diffusers"),
        ({"scheduler": 5}, "`scheduler` (int) has no `prediction_type`; it must be a diffusers scheduler"),
        ({"scheduler": FlowMatchEulerDiscreteScheduler()}, "has no `prediction_type`"),
        ({"scheduler": DDPMWuerstchenScheduler()}, "has no `prediction_type`"),
        ({"scheduler": DDIMInverseScheduler(prediction_type="sample")}, "runs from t = 0.05 to 1; it must start near"),
        ({"scheduler": CogVideoXDDIMScheduler(prediction_type="sample")}, "bends the noise schedule that the model"),
        ({"scheduler": SCMScheduler(prediction_type="sample")}, "(SCMScheduler) cannot make 20 steps on the model's"),
        ({"scheduler": DDIMScheduler()}, "prediction_type 'epsilon', but MDM predicts clean latents"),
        ({"scheduler": DDIMScheduler(num_train_timesteps=50, prediction_type="sample")}, "has num_train_timesteps 50"),
        ({"scheduler": EulerDiscreteScheduler(prediction_type="sample")}, "MDM keeps them at unit variance"),
    ],
    ids=lambda v: "" if isinstance(v, str) else "-".join(v),
)
def test_sampling_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        tiny_model().generate(**(batch(["caption"]) | options))
    assert message in str(error.value)
