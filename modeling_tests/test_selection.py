"""Claims about token selection: targets that have come to their fixed point are frozen, seen once more, skipped."""

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from tiny import IMAGE_TARGET, KINDS, batch, generators, tiny_model

from mdm_hf import MDMGenerationConfig, MDMModel
from mdm_hf.denoiser import Denoiser


NAMES = ("selection_tolerance", "text_selection_tolerance")
OPTIONS = {"num_inference_steps": 6, "modality_lag": 0.0}


def drawn(model, inputs, rows=range(9), **options):
    count = len(inputs["input_ids"])
    return model.generate(**inputs, generator=generators(list(rows)[:count]), **OPTIONS | options)


@pytest.mark.parametrize("backbone", ["mamba", "transformer"])
def test_a_tolerance_that_nothing_meets_changes_no_sample(backbone) -> None:
    model, inputs = tiny_model(backbone=backbone), batch(KINDS)
    plain, selected = drawn(model, inputs), drawn(model, inputs, selection_tolerance=0.0)
    assert plain.sequences.equal(selected.sequences)
    assert plain.latents.equal(selected.latents)
    assert (selected.frozen_at == -1).all()
    assert selected.num_live.shape == (6, len(KINDS))
    assert len(selected.call_seconds) == 6
    assert plain.frozen_at is plain.num_live is plain.call_seconds is None


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("backbone", ["mamba", "transformer"])
def test_what_has_converged_is_seen_once_more_and_no_longer(guidance_scale, backbone) -> None:
    model, inputs, seen = tiny_model(backbone=backbone), batch(KINDS), []
    denoise = MDMModel.denoise

    def watch(self, latents, layout, *rest):
        seen.append((~layout.is_padding)[: len(KINDS)].sum(1))
        return denoise(self, latents, layout, *rest)

    with mock.patch.object(MDMModel, "denoise", watch):
        out = drawn(model, inputs, selection_tolerance=3.0, guidance_scale=guidance_scale)
    targets = inputs["target_mask"] == 1
    frozen = out.frozen_at >= 0
    assert frozen.any()
    assert not (frozen & ~targets).any()
    calls, first = len(out.num_live), out.num_live[0]
    for call in range(calls):
        skipped = frozen & (out.frozen_at < call - 1)  # in the call after which it was frozen it is seen as it is now
        assert out.num_live[call].equal(first - skipped.sum(1))
    passes = torch.stack(seen)
    assert passes[0].equal((~targets & (inputs["attention_mask"] == 1)).sum(1) - (first - targets.sum(1)))
    assert passes[1:].equal(out.num_live)


def oracle(model):
    """Has generate project every position in every call, and then put in place of what a skipped one was projected to
    what it was projected to last: an independent reading of what token selection saves."""
    view_of, last = {}, {}
    look, predict = Denoiser._look, Denoiser.predict

    def look_at_all(self):
        skipped, self.skipped = self.skipped, torch.zeros_like(self.skipped)
        selects, self.selects = self.selects, False  # the caches are told of no live positions
        look(self)
        self.skipped, self.selects = skipped, selects

    def watched(self, *args):
        view_of["now"] = self
        z_0 = predict(self, *args)
        view_of.clear()
        return z_0

    def keep(module, args, out):
        view = view_of.get("now")
        if view is not None:
            skipped = view.skipped.repeat(len(out) // len(view.skipped), 1).unsqueeze(-1)
            last[module] = out if module not in last else torch.where(skipped, last[module][: len(out)], out)
            return last[module]

    hooks = [
        m.register_forward_hook(keep)
        for name, m in model.named_modules()
        if name.endswith("in_proj") and "mlp" not in name
    ]
    stack = ExitStack()
    stack.enter_context(mock.patch.object(Denoiser, "_look", look_at_all))
    stack.enter_context(mock.patch.object(Denoiser, "predict", watched))
    for hook in hooks:
        stack.callback(hook.remove)
    return stack


@pytest.mark.parametrize("modality_lag", [0.0, 0.5])
@pytest.mark.parametrize(
    "guidance",
    [{}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "guidance_interval": (0.5, 0.8)}],
    ids=["unguided", "guided", "between"],
)
@pytest.mark.parametrize(
    "kind", [{}, {"scan_sharing": "independent"}, {"scan_sharing": "alternate"}, {"backbone": "transformer"}]
)
def test_what_is_skipped_is_read_as_it_was_last(kind, guidance, modality_lag) -> None:
    model, inputs = tiny_model(**kind), batch(KINDS)
    options = {"selection_tolerance": 3.0, "num_inference_steps": 8, "modality_lag": modality_lag} | guidance
    fast, plain = drawn(model, inputs, **options), drawn(model, inputs, **options | {"selection_tolerance": None})
    with oracle(model):
        slow = drawn(model, inputs, **options)
    assert (fast.num_live[-1] < fast.num_live[0]).any()
    assert (slow.num_live == slow.num_live[0]).all()
    assert fast.frozen_at.equal(slow.frozen_at)
    assert fast.sequences.equal(slow.sequences)
    torch.testing.assert_close(fast.latents, slow.latents, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(fast.latents, plain.latents, atol=1e-3)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_modality_that_is_done_is_skipped_while_the_other_goes_on(guidance_scale) -> None:
    model, inputs = tiny_model(), batch(["both"])
    options = {"modality_lag": 1.0, "guidance_scale": guidance_scale}
    plain, out = drawn(model, inputs, **options), drawn(model, inputs, selection_tolerance=0.0, **options)
    text = (inputs["target_mask"] == 1) & (inputs["input_ids"] == model.config.text_target_token_id)
    assert (out.frozen_at == torch.where(text, 5, -1)).all()
    live = int(out.num_live[0])
    assert out.num_live.flatten().tolist() == [live] * 7 + [live - int(text.sum())] * 5
    assert out.sequences.equal(plain.sequences)  # the text was done before anything was skipped
    assert out.latents[text].equal(model.model.vae.encode_tokens(out.sequences).mean[text])
    assert not out.latents.equal(plain.latents)


@pytest.mark.parametrize("frozen_after", ["selected", 5, 6])
def test_where_no_conditions_are_seen_a_frozen_modality_that_is_done_is_noise_like_any_other(frozen_after) -> None:
    model, inputs = tiny_model(), batch(["both"])
    text = (inputs["target_mask"] == 1) & (inputs["input_ids"] == model.config.text_target_token_id)
    seen, denoise = [], MDMModel.denoise

    def watch(self, latents, layout, *rest):
        seen.append((latents, layout))
        return denoise(self, latents, layout, *rest)

    def freeze(model, step, timesteps, tensors):
        return {"frozen": text} if step == frozen_after else None

    options = {"modality_lag": 1.0, "guidance_scale": 2.0}
    how = {"selection_tolerance": 0.0} if frozen_after == "selected" else {"callback_on_step_end": freeze}
    call = 7 if frozen_after == 6 else 6  # the text has calls 0 to 5, the image those after them
    with mock.patch.object(MDMModel, "denoise", watch):
        drawn(model, inputs, **options)
        plain = seen[1 + call]  # the first pass reads the conditions
        seen.clear()
        drawn(model, inputs, **how, **options)
        selected = seen[1 + call]
    assert selected[0][1].equal(plain[0][1])  # the half without conditions
    assert selected[1].level[1].equal(plain[1].level[1])
    assert selected[1].is_target[1].equal(plain[1].is_target[1])
    changed = selected[1].is_target[0] != plain[1].is_target[0]  # the half with conditions has the text as one
    assert int(changed.sum()) == int(text.sum())


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_with_guidance_what_was_skipped_is_projected_once_more_when_its_modality_is_done(guidance_scale) -> None:
    model, inputs = tiny_model(), batch(["both"])
    options = {"modality_lag": 1.0, "guidance_scale": guidance_scale}
    out = drawn(model, inputs, selection_tolerance=3.0, **options)
    live = out.num_live.flatten().tolist()
    assert live[5] < live[0]  # some of the text is skipped
    assert (live[6] == live[0]) == (guidance_scale > 1)  # all of it is noise now to the half without conditions
    assert live[7] <= live[5]


def test_a_sample_is_the_same_alone_and_in_a_batch() -> None:
    model, inputs = tiny_model(), batch(KINDS)
    together = drawn(model, inputs, selection_tolerance=3.0)
    for row, kind in enumerate(KINDS):
        alone = drawn(model, batch([kind]), rows=[row], selection_tolerance=3.0)
        length = alone.sequences.shape[1]
        assert alone.frozen_at[0].equal(together.frozen_at[row, :length])
        torch.testing.assert_close(alone.latents[0], together.latents[row, :length], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("modality_lag", [0.0, 1.0, -1.0])
def test_a_modality_without_a_tolerance_is_left_alone(modality_lag) -> None:
    model, inputs = tiny_model(), batch(KINDS)
    options = {"modality_lag": modality_lag, "guidance_scale": 1.5, "text_selection_tolerance": 1e8}
    frozen = drawn(model, inputs, **options).frozen_at >= 0
    text_targets = (inputs["target_mask"] == 1) & (inputs["input_ids"] != IMAGE_TARGET)
    assert (frozen & text_targets).any()
    assert not (frozen & ~text_targets).any()


def test_text_may_have_a_tolerance_of_its_own() -> None:
    model, inputs = tiny_model(), batch(KINDS)
    is_patch = inputs["input_ids"] == IMAGE_TARGET
    strict = drawn(model, inputs, selection_tolerance=1e8, text_selection_tolerance=0.0).frozen_at >= 0
    assert (strict & is_patch).any()
    assert not (strict & ~is_patch).any()


def test_one_tolerance_is_that_of_both() -> None:
    model, inputs = tiny_model(), batch(KINDS)
    one = drawn(model, inputs, selection_tolerance=3.0)
    both = drawn(model, inputs, selection_tolerance=3.0, text_selection_tolerance=3.0)
    assert one.frozen_at.equal(both.frozen_at)
    assert one.latents.equal(both.latents)


def test_when_everything_has_converged_no_call_is_made() -> None:
    out = drawn(tiny_model(), batch(["caption", "text"]), selection_tolerance=1e8)
    assert len(out.num_live) == 1
    assert (out.frozen_at.max(1).values == 0).all()


def test_a_tolerance_that_is_none_is_refused() -> None:
    for tolerance in (-1, "low", True, float("inf"), float("nan")):
        for name in NAMES:
            with pytest.raises(ValueError, match=f"`{name}` is .*; it must be a number, 0 or more, False for none"):
                MDMGenerationConfig(**{name: tolerance})
    for name in NAMES:
        with pytest.raises(ValueError, match=f"Got {name} = 0.1, .* with use_cache=False; .* with {name}=False, or"):
            MDMGenerationConfig(**{name: 0.1, "use_cache": False})
        assert not getattr(MDMGenerationConfig(**{name: False, "use_cache": False}), name)


def test_what_a_model_selects_by_default_can_be_switched_off(tmp_path) -> None:
    model, inputs = tiny_model(), batch(KINDS)
    is_patch = inputs["input_ids"] == IMAGE_TARGET
    plain = drawn(model, inputs)
    model.generation_config = MDMGenerationConfig(selection_tolerance=1e8, text_selection_tolerance=1e8)
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    assert drawn(model, inputs, selection_tolerance=None).num_live is not None  # None is the model's own
    images_alone = drawn(model, inputs, text_selection_tolerance=False).frozen_at >= 0
    assert (images_alone & is_patch).any()
    assert not (images_alone & ~is_patch).any()
    texts_alone = drawn(model, inputs, selection_tolerance=False, text_selection_tolerance=1e8).frozen_at >= 0
    assert texts_alone.any()
    assert not (texts_alone & is_patch).any()
    off = drawn(model, inputs, selection_tolerance=False, use_cache=False)
    assert off.num_live is None
    assert off.sequences.equal(plain.sequences)
    torch.testing.assert_close(off.latents, plain.latents, atol=1e-4, rtol=1e-4)
    model.generation_config = MDMGenerationConfig(selection_tolerance=False)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).generation_config.selection_tolerance is False
