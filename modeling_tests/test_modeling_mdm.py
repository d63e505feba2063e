"""Claims about the model: what it computes, what it sees, what it learns from."""

import math

import pytest
import torch
from gradients import assert_near, gradients
from tiny import (
    CANVAS,
    GRID,
    IMAGE,
    IMAGE_TARGET,
    KINDS,
    LATENT,
    TEXT_TARGET,
    TIME_IMAGE,
    TIME_TEXT,
    batch,
    fixed_noise,
    row,
    tiny_config,
    tiny_model,
)
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from mdm_hf import MDMConfig, MDMForMultiModalGeneration, MDMModel
from mdm_hf.scan_switch import image_scan_order, text_scan_order
from mdm_hf.sequence_layout import image_of_each_row, plan_scans
from mdm_hf.ssd import ssd_oracle


SHARINGS = ("shared", "independent", "alternate")


def timesteps_of(inputs, value=0.6):
    return torch.full((len(inputs["input_ids"]), 2), value)


def oracle_order(kind: str, direction: int) -> list[int]:
    """The reading order of a tiny row, written down segment by segment."""
    patches = [1 + i for i in image_scan_order(2, 3, direction).tolist()]
    backward = direction % 2 == 1
    image = [7, *patches, 0] if backward else [0, *patches, 7]

    def text(n):
        return text_scan_order(n, direction % 2).tolist()

    def at(start, places):
        return [start + p for p in places]

    if kind == "class_to_image":  # class, assistant, time, image
        return [0, 1, 2, *at(3, image)]
    if kind == "text_to_image":  # class, user, text of 5, assistant, time, image
        return [0, 1, *at(2, text(5)), 7, 8, *at(9, image)]
    if kind == "caption":  # class, user, image, assistant, time, text of 7
        return [0, 1, *at(2, image), 10, 11, *at(12, text(7))]
    if kind == "both":  # class, assistant, time, image, time, text of 7
        segments = [at(3, image), at(12, text(7))]
        return [0, 1, 2, 11, *(segments[1] + segments[0] if backward else segments[0] + segments[1])]
    raise KeyError(kind)


def mixer_oracle(mixer, h, kind):
    """One row through the shared mixer in float64: loops over directions, F.conv1d, the recurrent scan."""
    config = mixer.config
    inner, n, heads = config.inner_size, config.state_size, config.num_heads
    weights = {name: p.detach().double() for name, p in mixer.named_parameters()}
    z, xbc, dt = (h @ weights["projections.0.in_proj.weight"].T).split([inner, inner + 2 * n, heads], dim=-1)
    merged = torch.zeros_like(z)
    for k in range(4):
        order = oracle_order(kind, k)
        kernel = weights["conv_weight"][k]
        padded = F.pad(xbc[order].T[None], (config.conv_kernel - 1, 0))
        u = F.silu(F.conv1d(padded, kernel[:, None], weights["conv_bias"][k], groups=len(kernel)))[0].T
        x, B, C = u.split([inner, n, n], dim=-1)
        y = ssd_oracle(
            x.view(1, -1, heads, config.head_dim),
            F.softplus(dt[order] + weights["ssm.dt_bias"][k])[None],
            -weights["ssm.A_log"][k].exp(),
            B[None, :, None],
            C[None, :, None],
            D=weights["ssm.D"][k],
        )[0].flatten(1)
        merged[order] += y
    gated = merged * F.silu(z)
    normed = gated * (gated.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
    return (normed * weights["projections.0.norm.weight"]) @ weights["projections.0.out_proj.weight"].T


@pytest.mark.parametrize("kind", ["class_to_image", "text_to_image", "caption", "both"])
def test_the_mixer_equals_its_float64_oracle(kind):
    model = tiny_model()
    inputs = batch([kind])
    layout = model.model.layout(inputs["input_ids"], inputs["image_grid_hw"], None, inputs["target_mask"])
    plan = plan_scans(model.config, layout, image_of_each_row(layout))
    h = torch.randn(1, inputs["input_ids"].shape[1], 32)
    got = model.model.layers[0].mixer(h, plan)
    torch.testing.assert_close(
        got[0].double(), mixer_oracle(model.model.layers[0].mixer, h[0].double(), kind), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_last_condition_tells_is_added_to_every_target_and_to_nothing_else(kind):
    model = tiny_model().double()
    inputs = batch([kind, "both"])  # the shorter row is padded
    names = ("input_ids", "image_grid_hw", "attention_mask", "target_mask")
    layout = model.model.layout(*(inputs[name] for name in names))
    block, size = model.model.layers[1], model.config.hidden_size
    h = torch.randn(*inputs["input_ids"].shape, size, dtype=torch.float64, requires_grad=True)
    plan = plan_scans(model.config, layout, None)
    got = block.with_condition(h, plan, None)
    rows = []
    for states, ids in zip(h, inputs["input_ids"].tolist(), strict=True):
        start = min(ids.index(token) for token in (TIME_IMAGE, TIME_TEXT) if token in ids)
        last = states[start - 1]
        normed = last / (last.pow(2).mean() + model.config.rms_norm_eps).sqrt() * block.broadcast.norm.weight
        told = block.broadcast.projection.weight @ normed
        rows.append(torch.stack([x + told if i >= start and ids[i] else x for i, x in enumerate(states)]))
    values = {"h": h, **dict(block.broadcast.named_parameters())}
    assert_near({"out": got}, {"out": torch.stack(rows)}, 1e-6)  # the norm is in fp32
    assert_near(gradients(values, [got]), gradients(values, [torch.stack(rows)]), 1e-5)


def test_from_the_second_block_on_what_is_told_depends_on_the_words():
    """The first block sees the last condition as it is embedded, before anything was read."""
    model, inputs = tiny_model(), batch(["text_to_image"])
    told = []
    for word in (21, 40):
        ids = torch.where(inputs["input_ids"] == 21, word, inputs["input_ids"])[:, :8]
        state = model.read_conversation(ids, class_ids=inputs["class_ids"])
        told.append([cache.condition for cache in state.unseen])
    assert torch.equal(told[0][0], told[1][0])
    assert all((one - other).abs().max() > 1e-4 for one, other in zip(told[0][1:], told[1][1:], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_is_told_its_row_and_column_in_waves_of_each_period_and_nothing_else_is(kind):
    periods = [2, 3, 5]
    model = tiny_model(position_periods=periods).double().model
    embeddings, inputs = model.embeddings, batch([kind])
    layout = model.layout(inputs["input_ids"], inputs.get("image_grid_hw"), None, inputs["target_mask"])
    told = (torch.zeros(*inputs["input_ids"].shape, LATENT).double(), layout, torch.zeros(1, 2), inputs["class_ids"])
    got = embeddings(*told)
    weight = embeddings.period_projection.weight.detach().clone()
    embeddings.period_projection.weight.data.zero_()
    added = got - embeddings(*told)
    patches = [i for i, token in enumerate(inputs["input_ids"][0].tolist()) if token in (IMAGE, IMAGE_TARGET)]
    expected = torch.zeros_like(added[0])
    for place, i in enumerate(patches):
        turns = [[2 * math.pi * at / period for period in periods] for at in divmod(place, GRID[1])]
        waves = [f(angle) for angles in turns for f in (math.sin, math.cos) for angle in angles]
        expected[i] = weight @ torch.tensor(waves, dtype=torch.float64)
    torch.testing.assert_close(added[0], expected, atol=1e-5, rtol=1e-5)  # the waves are in fp32
    assert bool(patches) == bool(added.any())


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_padded_batch_equals_single_runs(sharing):
    model = tiny_model(scan_sharing=sharing)
    together = batch(KINDS)
    noise = fixed_noise(together)
    out = model(**together, timesteps=timesteps_of(together), noise=noise)
    for i, kind in enumerate(KINDS):
        alone = batch([kind])
        length = alone["input_ids"].shape[1]
        single = model(**alone, timesteps=timesteps_of(alone), noise=noise[i : i + 1, :length])
        real = alone["input_ids"][0] != 0
        torch.testing.assert_close(
            out.predicted_latents[i, :length][real], single.predicted_latents[0][real], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("begins", [0, 3], ids=["framed", "bare"])
def test_padding_on_the_left_changes_nothing(begins):
    model, (ids, size) = tiny_model(), row("text")
    ids = ids[begins:]  # from the class token, or from within a text
    is_target = [0] * (len(ids) - size) + [int(token == TEXT_TARGET) for token in ids[-size:]]
    noise, predicted = torch.randn(1, len(ids), LATENT), []
    for padding in (0, 7):
        left = [0] * padding
        inputs = {"input_ids": left + ids, "attention_mask": left + [1] * len(ids), "target_mask": left + is_target}
        inputs = {name: torch.tensor([values]) for name, values in inputs.items()}
        given = torch.nn.functional.pad(noise, (0, 0, padding, 0))
        out = model(**inputs, timesteps=torch.full((1, 2), 0.5), noise=given)
        predicted.append(out.predicted_latents[:, padding:])
    torch.testing.assert_close(predicted[0], predicted[1], atol=1e-5, rtol=1e-5)


def test_conditions_never_see_t_nor_the_targets():
    model = tiny_model()
    inputs = batch(["text_to_image"])
    early, late = (
        model.model(**inputs, timesteps=timesteps_of(inputs, t), noise=fixed_noise(inputs, seed)).last_hidden_state
        for seed, t in ((0, 0.1), (1, 0.9))
    )
    torch.testing.assert_close(early[:, :8], late[:, :8], atol=0, rtol=0)
    assert not torch.allclose(early[:, 8:], late[:, 8:])


def test_targets_see_the_conditions_and_each_other():
    model = tiny_model(condition_broadcast=False)
    inputs = batch(["text_to_image"])
    noise = fixed_noise(inputs)
    other = inputs | {"input_ids": torch.where(inputs["input_ids"] == 21, 40, inputs["input_ids"])}
    a, b = (model(**i, timesteps=timesteps_of(i), noise=noise).predicted_latents for i in (inputs, other))
    assert (a - b)[0, 10:16].abs().amax(-1).min() > 1e-4
    inputs = batch(["both"])
    for place, elsewhere in ((5, slice(13, 18)), (15, slice(4, 10))):  # a patch, a token
        noise = fixed_noise(inputs)
        changed = noise.clone()
        changed[0, place] += 1
        a, b = (model(**inputs, timesteps=timesteps_of(inputs), noise=n).predicted_latents for n in (noise, changed))
        assert (a - b)[0, elsewhere].abs().amax(-1).min() > 1e-6


def test_known_positions_of_a_target_segment_stay_clean():
    model = tiny_model()
    inputs = batch(["class_to_image"], is_training=True)
    inputs["target_mask"][0, 4:6] = 0
    out = model.model(**{k: v for k, v in inputs.items() if k != "labels"}, timesteps=timesteps_of(inputs, 1.0))
    torch.testing.assert_close(out.noisy_latents[0, 4:6], out.latents[0, 4:6])
    assert not torch.allclose(out.noisy_latents[0, 6:8], out.latents[0, 6:8])


def test_total_loss_is_the_weighted_sum_of_its_parts():
    model = tiny_model(kl_weight=0.3, diffusion_weight=0.7, image_loss_weight=4)
    inputs = batch(["both", "caption"], is_training=True)
    out = model(**inputs, timesteps=timesteps_of(inputs), noise=fixed_noise(inputs))
    se = 4 * out.loss_se_image + out.loss_se_text
    expected = out.loss_rec_image + out.loss_rec_text + 0.3 * out.loss_kl + 0.7 * se
    torch.testing.assert_close(out.loss, expected)
    assert all(part > 0 for part in (out.loss_rec_image, out.loss_rec_text, out.loss_kl, se))


@pytest.mark.parametrize("ends", [[2, 2], [1, 1], [2, 2, 2]])
def test_what_fills_a_text_up_counts_in_its_loss_as_one_word(ends):
    model = tiny_model()
    inputs = batch(["text", "caption"], is_training=True)
    start = int((inputs["labels"][0] != -100).nonzero()[0])
    for name in ("input_ids", "labels"):
        inputs[name][0, start + CANVAS - len(ends) : start + CANVAS] = torch.tensor(ends)
    labels = inputs["labels"][0]
    out = model(**inputs, timesteps=timesteps_of(inputs), noise=fixed_noise(inputs))
    is_own, is_end = labels >= 3, (labels >= 0) & (labels < 3)
    entropy = -out.logits[0].double().log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    expected = (entropy[is_own].sum() + entropy[is_end].mean()) / (is_own.sum() + 1)
    assert int(is_end.sum()) == len(ends)
    assert out.row_losses[0, 4].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_blocks_see_the_mean_of_the_clean_latents_given_the_noisy_ones():
    """For latents N(0, I), by regression; what is clean is left as it is."""
    scaled, plain = tiny_model(), tiny_model(input_scaling="none")
    inputs = batch(["both", "caption"], is_training=True)
    fixed = {"timesteps": timesteps_of(inputs, 0.4), "noise": fixed_noise(inputs)}
    outputs = scaled.model(**{k: v for k, v in inputs.items() if k != "labels"}, **fixed)
    layout = outputs.layout
    generator = torch.Generator().manual_seed(0)
    level = outputs.alpha_bar[layout.is_target][0].double()
    z_0, noise = torch.randn(2, 100_000, generator=generator, dtype=torch.float64)
    z_t = level.sqrt() * z_0 + (1 - level).sqrt() * noise
    slope = (z_0 * z_t).mean() / (z_t**2).mean()
    seen = torch.where(layout.is_target[..., None], outputs.noisy_latents * slope, outputs.noisy_latents).float()
    plan = plan_scans(plain.config, layout, image_of_each_row(layout))
    hidden = plain.model.denoise(seen, layout, plan, fixed["timesteps"], inputs["class_ids"])
    torch.testing.assert_close(outputs.last_hidden_state, hidden, atol=0.05, rtol=0.05)
    unscaled = plain.model.denoise(outputs.noisy_latents, layout, plan, fixed["timesteps"], inputs["class_ids"])
    assert (outputs.last_hidden_state - unscaled).abs().max() > 0.5


def test_score_entropy_never_trains_the_encoder():
    model = tiny_model().train()
    inputs = batch(["both"], is_training=True)
    out = model(**inputs)
    (out.loss_se_image + out.loss_se_text).backward()
    vae = model.model.vae
    for name, parameter in vae.named_parameters():
        is_decoder = name.startswith(("decoder", "token_head"))
        assert (parameter.grad is not None and bool(parameter.grad.any())) == is_decoder, name


def test_score_entropy_trains_the_encoder_where_it_is_asked_to():
    model = tiny_model(detach_latents=False).train()
    out = model(**batch(["both"], is_training=True))
    (out.loss_se_image + out.loss_se_text).backward()
    vae = model.model.vae
    assert all(bool(p.grad.any()) for part in (vae.encoder, vae.patch_embedding) for p in part.parameters())


def test_every_parameter_learns_from_the_total_loss():
    for sharing in SHARINGS:
        model = tiny_model(scan_sharing=sharing, num_hidden_layers=4).train()
        inputs = batch(["both", "caption", "text_to_image"], is_training=True)
        model(**inputs).loss.backward()
        silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == [], sharing


@pytest.mark.parametrize("loss", ["score_entropy_exact", "score_entropy_sampled", "ddpm_epsilon"])
def test_every_diffusion_loss_falls_when_trained_on_one_batch(loss):
    model = tiny_model(diffusion_loss=loss).train()
    inputs = batch(["both"] * 4, is_training=True)
    fixed = {"timesteps": timesteps_of(inputs, 0.5), "noise": fixed_noise(inputs)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for _ in range(60):
        out = model(**inputs, **fixed)
        values.append(float(out.loss_se_image + out.loss_se_text))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(values[-5:]) < 0.7 * sum(values[:5])
    assert all(math.isfinite(v) for v in values)


def test_gradient_checkpointing_runs_each_block_twice_and_changes_no_gradient():
    inputs = batch(["both", "caption"], is_training=True)
    grads = []
    for checkpointing in (False, True):
        model, runs = tiny_model().train(), []
        model.model.layers[0].mixer.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        model(**inputs).loss.backward()
        assert len(runs) == 1 + checkpointing
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-6, rtol=1e-5, msg=name)


def test_the_untrained_prediction_is_the_best_linear_one():
    model = MDMForMultiModalGeneration(tiny_config()).eval()
    inputs = batch(["class_to_image"])
    noise = fixed_noise(inputs)
    out = model(**inputs, timesteps=timesteps_of(inputs, 0.5), noise=noise)
    base = model.model(**inputs, timesteps=timesteps_of(inputs, 0.5), noise=noise)
    torch.testing.assert_close(out.predicted_latents, base.alpha_bar[..., None].sqrt() * base.noisy_latents)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("mdm-digits", (0.0003, 0.003)), ("mdm-base", (0.15, 0.25)), ("mdm-1b", (1.25, 1.45)), ("mdm-7b", (7.5, 7.7))],
)
def test_presets_have_the_parameter_counts_they_promise(name, billions):
    with torch.device("meta"):
        model = MDMForMultiModalGeneration(MDMConfig.from_preset(name))
    count = sum(p.numel() for p in model.parameters()) / 1e9
    assert billions[0] <= count <= billions[1], count


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="choose one of mdm-digits, mdm-base"):
        MDMConfig.from_preset("mdm-2b")


def test_save_and_load_give_the_same_outputs(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is MDMForMultiModalGeneration
    assert not loaded.training
    inputs = batch(KINDS)
    fixed = {"timesteps": timesteps_of(inputs), "noise": fixed_noise(inputs)}
    torch.testing.assert_close(loaded(**inputs, **fixed).logits, model(**inputs, **fixed).logits, atol=0, rtol=0)
    same = AutoConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": model.config._name_or_path}
    assert same == model.config.to_dict()
    base = MDMModel.from_pretrained(tmp_path)
    hidden = base(**inputs, **fixed).last_hidden_state
    torch.testing.assert_close(hidden, model.model(**inputs, **fixed).last_hidden_state, atol=0, rtol=0)


def test_half_precision_keeps_the_recurrence_in_fp32(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name.split(".")[-1] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "dt_bias", "D"}
    inputs = batch(KINDS, is_training=True)
    out = model(**inputs, timesteps=timesteps_of(inputs), noise=fixed_noise(inputs))
    reference = tiny_model()(**inputs, timesteps=timesteps_of(inputs), noise=fixed_noise(inputs))
    assert abs(float(out.loss) - float(reference.loss)) < 0.03 * float(reference.loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_casting_the_model_leaves_the_noise_schedule_exact(dtype):
    model = tiny_model().to(dtype).model
    for name in ("image", "text"):
        assert torch.equal(getattr(model, f"{name}_alpha_bar"), model.alpha_bar_of(name))


def test_hidden_states_of_every_block_can_be_had():
    model = tiny_model()
    inputs = batch(["both"])
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert all(state.shape == (*inputs["input_ids"].shape, 32) for state in states)


def test_text_only_sequences_run_two_directions():
    model = tiny_model()
    inputs = batch(["text"])
    layout = model.model.layout(inputs["input_ids"], None, None, inputs["target_mask"])
    assert plan_scans(model.config, layout, None).order.shape[-1] == 2


@pytest.mark.parametrize("directions", [[1, 1], [2, 1], [4, 1], [3, 2], [4, 2]], ids=str)
def test_any_number_of_directions_trains(directions):
    model = tiny_model(scan_directions=directions).train()
    loss = model(**batch(["both", "text"], is_training=True)).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_drawn_timesteps_are_independent_per_modality_and_sometimes_pinned():
    model = tiny_model(pinned_timestep_probability=0.5)
    inputs = batch(["both"] * 400)
    layout = model.model.layout(inputs["input_ids"], inputs["image_grid_hw"], None, inputs["target_mask"])
    torch.manual_seed(0)
    t = model.model.timesteps_from(torch.rand(400, 5), layout)
    pinned = (t == 0) | (t == 1)
    assert 0.4 < pinned.any(1).float().mean() < 0.6
    assert not pinned.all(1).any()
    free = t[~pinned.any(1)]
    assert abs(float(torch.corrcoef(free.T)[0, 1])) < 0.2
    alone = batch(["caption"] * 50)
    layout = model.model.layout(alone["input_ids"], alone["image_grid_hw"], None, alone["target_mask"])
    t = model.model.timesteps_from(torch.rand(50, 5), layout)
    assert not ((t == 0) | (t == 1)).any()


@pytest.mark.parametrize("loss", ["score_entropy_exact", "score_entropy_sampled", "ddpm_epsilon"])
@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
def test_with_seeds_the_loss_of_a_row_is_the_same_alone_and_in_any_batch(loss, is_training):
    model = tiny_model(diffusion_loss=loss).train(is_training)
    seeds = torch.tensor([7, 2**62, 5, 7, 0])
    together = model(**batch(KINDS, is_training=True), seeds=seeds)
    alone = [model(**batch([kind], is_training=True), seeds=seeds[i : i + 1]) for i, kind in enumerate(KINDS)]
    torch.testing.assert_close(together.row_losses, torch.cat([one.row_losses for one in alone]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.timesteps, torch.cat([one.timesteps for one in alone]), atol=0, rtol=0)
    torch.testing.assert_close(together.loss, torch.stack([one.loss for one in alone]).mean(), atol=1e-5, rtol=1e-5)
    other = model(**batch(KINDS, is_training=True), seeds=seeds + 1)
    assert bool(((other.row_losses - together.row_losses).abs().amax(1) > 1e-4).all())


def test_without_seeds_torch_s_generator_decides():
    model, inputs = tiny_model().train(), batch(["both"], is_training=True)
    torch.manual_seed(3)
    first, second = model(**inputs).loss, model(**inputs).loss
    torch.manual_seed(3)
    assert torch.equal(model(**inputs).loss, first)
    assert not torch.equal(first, second)


def test_training_holds_no_logits_and_evaluation_does():
    inputs = batch(["both", "caption"], is_training=True)
    assert tiny_model().train()(**inputs).logits is None
    assert tiny_model().eval()(**inputs).logits.shape == (*inputs["input_ids"].shape, 64)
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    assert tiny_model().train()(**unlabelled).logits is not None


def test_with_a_diffusion_weight_of_zero_the_vae_alone_is_trained_and_no_block_runs():
    model, inputs = tiny_model(diffusion_weight=0).train(), batch(["both", "caption"], is_training=True)
    model.model.layers[0].register_forward_hook(lambda *_: pytest.fail("a block ran"))
    out = model(**inputs)
    out.loss.backward()
    assert float(out.loss_rec_image) > 0
    assert float(out.loss_se_image) == float(out.loss_se_text) == 0
    assert all(p.grad is not None for p in model.model.vae.parameters())
    assert all(p.grad is None for p in model.model.layers.parameters())


def broken(**changes):
    return batch(["caption", "both"]) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.ones(3, dtype=torch.long)}, "must be (batch, length)"),
        ({"input_ids": torch.full((2, 19), 64)}, "must lie in [0, vocab_size) = [0, 64)"),
        ({"attention_mask": torch.ones(2, 3)}, "`attention_mask` has shape (2, 3)"),
        ({"target_mask": torch.ones(2, 3)}, "`target_mask` has shape (2, 3)"),
        (
            {"target_mask": torch.full((2, 19), 2)},
            "`target_mask` holds other numbers than 0 and 1; it must say yes or",
        ),
        ({"attention_mask": torch.full((2, 19), 0.5)}, "`attention_mask` holds other numbers than 0 and 1"),
        ({"seeds": torch.tensor([1, 2, 3])}, "`seeds` is [1, 2, 3]; it must be (batch,) = (2,) whole numbers"),
        ({"seeds": torch.tensor([1, -2])}, "of 0 or more, one per row"),
        ({"class_ids": torch.tensor([1, 10])}, "`class_ids` holds 10; this model knows classes 0 to 9"),
        ({"class_ids": torch.tensor([1])}, "`class_ids` has shape (1,); it must be (batch,) = (2,)"),
        ({"timesteps": torch.tensor([[0.5, 0.5], [0.5, 1.5]])}, "t must lie in [0, 1]"),
        ({"timesteps": torch.tensor([[0.5, float("nan")]] * 2)}, "t must lie in [0, 1]"),
        ({"timesteps": torch.zeros(2)}, "`timesteps` has shape (2,); it must be (batch, 2) = (2, 2)"),
        ({"noise": torch.zeros(2, 3, 8)}, "`noise` has shape (2, 3, 8)"),
        (
            batch(["text"]) | {"pixel_values": None, "image_grid_hw": torch.tensor([[2, 3]])},
            "holds 0 image(s), so it must be left out",
        ),
        (
            batch(["text"]) | {"pixel_values": None, "image_grid_hw": torch.zeros(0, 2, dtype=torch.long)},
            "`image_grid_hw` has shape (0, 2); `input_ids` holds 0 image(s), so it must be left out",
        ),
        (batch(["text"]) | {"pixel_values": torch.zeros(0, 1, 4, 6)}, "`pixel_values` holds no image; leave it out"),
        ({"pixel_values": None}, "holds 1 image(s) of known patches (id 11), but `pixel_values` is None"),
        ({"pixel_values": torch.zeros(2, 1, 4, 6)}, "holds 2 image(s), `input_ids` has places for 1"),
        ({"pixel_values": torch.zeros(1, 3, 4, 6)}, "must be (images, 1, height, width)"),
        ({"pixel_values": torch.full((1, 1, 4, 6), float("nan"))}, "holds NaN or infinity"),
        (
            {"pixel_values": torch.zeros(1, 1, 4, 7)},
            "4x7 pixels, not a multiple of patch_size 2; resize to 4x6 or pad to 4x8",
        ),
        (
            {"pixel_values": torch.full((1, 1, 4, 6), 255.0)},
            "`pixel_values` ranges from 255 to 255; pixels must",
        ),
        (
            {"pixel_values": torch.zeros(1, 1, 4, 6, dtype=torch.uint8)},
            "`pixel_values` has dtype torch.uint8; it",
        ),
        ({"noise": torch.full((2, 19, 8), float("nan"))}, "`noise` holds NaN or infinity; draw it with torch.randn"),
        ({"noise": torch.zeros(2, 19, 8).long()}, "`noise` has dtype torch.int64; it must hold floats; cast it with"),
        ({"input_ids": [[1, 2]]}, "`input_ids` is of type list; it must be a tensor"),
        ({"input_ids": torch.ones(2, 19)}, "dtype torch.float32; it must hold whole numbers; cast it with .long()"),
        (
            {"input_ids": torch.ones(0, 19).long()},
            "`input_ids` has shape (0, 19); it must be (batch, length), n",
        ),
        ({"input_ids": torch.ones(2, 0).long()}, "`input_ids` has shape (2, 0)"),
        ({"target_mask": [[1]]}, "`target_mask` is of type list"),
        ({"class_ids": torch.tensor([1.0, 2.0])}, "`class_ids` has dtype torch.float32; it must hold whole numbers"),
        ({"class_ids": [1, 2]}, "`class_ids` is of type list; it must be a tensor"),
        ({"timesteps": [[0.5, 0.5]] * 2}, "`timesteps` is of type list"),
        ({"timesteps": 0.5}, "`timesteps` is of type float"),
        ({"image_grid_hw": torch.tensor([[2.0, 3.0]] * 2)}, "`image_grid_hw` has dtype torch.float32"),
        (
            {"image_grid_hw": torch.tensor([[2, 3], [-2, -3]])},
            "`image_grid_hw` [-2, -3] needs 6, from 1 or more rows and columns",
        ),
        ({"foo": 1}, "`forward` got the unknown argument(s) ['foo']; check the spelling"),
        ({"pixel_values": torch.zeros(1, 1, 2, 6)}, "`image_grid_hw` asks for images of up to 4x6 pixels"),
        ({"image_grid_hw": None}, "holds 2 image(s), but `image_grid_hw` is None"),
        ({"image_grid_hw": torch.tensor([[2, 3]])}, "must be (2, 2)"),
        (
            {"image_grid_hw": torch.tensor([[2, 3], [3, 3]])},
            "Image 1 has 6 patch tokens, its `image_grid_hw` [3, 3] needs 9",
        ),
    ],
    ids=lambda v: v[:40].replace(" ", "_") if isinstance(v, str) else "",
)
def test_inputs_that_do_not_fit_are_refused_with_the_remedy(changes, message):
    with pytest.raises(ValueError) as error:
        tiny_model()(**broken(**changes))
    assert message in str(error.value)


def test_a_class_without_a_class_token_is_refused():
    inputs = batch(["class_to_image"])
    inputs["input_ids"][0, 0] = 15
    with pytest.raises(ValueError, match="put one first, as MDMProcessor does"):
        tiny_model()(**inputs)


def test_patches_outside_an_image_are_refused():
    inputs = batch(["text"])
    inputs["input_ids"][0, 4] = 11
    with pytest.raises(ValueError, match="a patch at row 0, place 4, that is in no image; put each image between"):
        tiny_model()(**inputs, image_grid_hw=torch.zeros(0, 2).long())


@pytest.mark.parametrize(("name", "header"), [("image", 5), ("text", 6)])
def test_a_target_without_its_time_token_is_refused(name, header):
    inputs = batch(["both"])
    inputs["input_ids"][inputs["input_ids"] == header] = 15
    with pytest.raises(ValueError, match=f"marks {name} at row 0, place .* without the time token {header} before it"):
        tiny_model()(**inputs)


def test_ids_of_any_integer_type_give_the_same_outputs():
    model = tiny_model()
    inputs = batch(["caption", "both"])
    fixed = {"timesteps": timesteps_of(inputs), "noise": fixed_noise(inputs)}
    narrow = {name: v if v.is_floating_point() else v.to(torch.int32) for name, v in inputs.items()}
    assert torch.equal(model(**inputs, **fixed).logits, model(**narrow, **fixed).logits)


def test_an_image_is_known_if_any_patch_of_it_is():
    """Its first patches may be targets; without the pixels the token's own embedding would stand in for them."""
    inputs = batch(["class_to_image", "caption"])
    inputs["input_ids"][0, 6:10] = 11  # patches 2 to 5 of six
    inputs["target_mask"][0, 6:10] = 0
    with pytest.raises(ValueError, match=r"holds 2 image\(s\) of known patches .*, but `pixel_values` is None"):
        tiny_model()(**(inputs | {"pixel_values": None}))
    inputs["pixel_values"] = torch.stack([inputs["pixel_values"][0] * 0.5, inputs["pixel_values"][0]])
    model = tiny_model()
    fixed = {"timesteps": timesteps_of(inputs), "noise": fixed_noise(inputs)}
    latents = model.model(**inputs, **fixed).latents
    own = model.model.vae.encode_images(inputs["pixel_values"]).mean.flatten(1, 2)
    torch.testing.assert_close(latents[0, 6:10], own[0, 2:])
    torch.testing.assert_close(latents[1][inputs["input_ids"][1] == 11], own[1])


def test_a_text_target_labelled_minus_100_counts_in_no_loss():
    model = tiny_model()
    inputs = batch(["caption"], is_training=True)
    fixed = {"timesteps": timesteps_of(inputs), "noise": fixed_noise(inputs)}
    parts = ("loss_se_text", "loss_rec_text", "loss_kl")
    whole = model(**inputs, **fixed)
    none = model(**inputs | {"labels": torch.full_like(inputs["labels"], -100)}, **fixed)
    assert float(none.loss_se_text) == float(none.loss_rec_text) == 0
    first = inputs["labels"].clone()
    first[0, first[0].ne(-100).nonzero()[1:]] = -100
    one = model(**inputs | {"labels": first}, **fixed)
    for part in parts:
        assert float(one[part]) not in (0, float(whole[part])), part


@pytest.mark.parametrize(
    ("place", "label", "message"),
    [
        (-3, 64, "`labels` holds 64; a label must be the id of a text token, at least 0 and below vocab_size 64"),
        (-3, -1, "`labels` holds -1"),
        (-3, 10, "`labels` holds 10"),
        (1, 20, "`labels` gives an id to row 0, place 1, which is no text target; set it to -100 there"),
        (3, 20, "`labels` gives an id to row 0, place 3"),
    ],
    ids=["high", "negative", "control", "condition", "patch"],
)
def test_labels_are_text_tokens_at_text_targets(place, label, message):
    inputs = batch(["caption"], is_training=True)
    inputs["labels"][0, place] = label
    with pytest.raises(ValueError) as error:
        tiny_model()(**inputs)
    assert message in str(error.value)


def test_labels_without_a_target_are_refused():
    inputs = batch(["both"], is_training=True)
    inputs["target_mask"].zero_()
    with pytest.raises(ValueError, match="marks no target, so there is nothing to learn"):
        tiny_model()(**inputs)


def test_labels_of_another_shape_are_refused():
    inputs = batch(["both"], is_training=True)
    inputs["labels"] = inputs["labels"][:, :-1]
    with pytest.raises(ValueError, match="`labels` has shape"):
        tiny_model()(**inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scan_directions": [1, 2]}, "no more text than image orders"),
        ({"scan_directions": [5, 2]}, "1 to 4 image orders"),
        ({"hidden_size": 0}, "`hidden_size` is 0; it must be 1 or more"),
        ({"head_dim": 24}, "is not a multiple of `head_dim` 24"),
        ({"scan_sharing": "none"}, "scan_sharing"),
        ({"kl_weight": -1.0}, "a loss weight must be 0 or more"),
        ({"image_loss_weight": -1.0}, "`image_loss_weight` is -1.0; a loss weight must be 0 or more"),
        ({"kl_weight": math.nan}, "`kl_weight` is nan; a loss weight must be 0 or more, and finite"),
        ({"num_candidates": 1}, "`num_candidates` is 1; a softmax over states needs at least 2"),
        ({"rms_norm_eps": -1.0}, "`rms_norm_eps` is -1.0; it must be 0 or more"),
        ({"time_step_min": 0.2}, "`time_step_min` and `time_step_max` are 0.2 and 0.1; dt starts between the two"),
        ({"time_step_floor": -1.0}, "`time_step_floor` is -1.0; it must be 0 or more"),
        ({"pad_token_id": None}, "`pad_token_id` is None; it must be the token's id, a whole number of 0 or more"),
        ({"image_token_id": 12}, "`image_token_id` and `image_target_token_id` are both 12; each must be a token of"),
        ({"pinned_timestep_probability": 2}, "it must lie in [0, 1]"),
        ({"conv_kernel": 1}, "at least 2 taps"),
        ({"position_periods": [4, 1]}, "`position_periods` is [4, 1]; each must be 2 patches or more"),
    ],
    ids=lambda v: "" if isinstance(v, str) else "-".join(v),
)
def test_configurations_that_cannot_work_are_refused(options, message):
    with pytest.raises(Exception) as error:
        tiny_config(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("end", [0.2, 2.0])
def test_a_noise_schedule_that_cannot_work_is_refused_when_the_model_is_built(end):
    with pytest.raises(ValueError, match="`beta_end`"):
        tiny_model(beta_end=end)
