"""Claims about the Transformer in Mamba's place: what it computes, who sees whom, what stays as it is."""

import json
import math
from pathlib import Path

import pytest
import torch
from gradients import assert_near, gradients
from peft import LoraConfig, get_peft_model
from tiny import KINDS, batch, fixed_noise, generators, tiny_config, tiny_model
from transformers import AutoModel

from mdm_hf import MDMConfig, MDMForMultiModalGeneration, MDMModel
from mdm_hf.modeling_mdm_attention import MDMAttentionBlock
from mdm_hf.modeling_mdm_block import MDMBlock
from mdm_hf.sequence_layout import plan_scans


CARD = Path(__file__).parents[1] / "model_cards" / "mdm-digits"


def transformer(**options) -> MDMForMultiModalGeneration:
    return tiny_model(backbone="transformer", **options)


def layout_of(model, inputs):
    names = ("input_ids", "image_grid_hw", "attention_mask", "target_mask")
    return model.model.layout(*(inputs.get(name) for name in names))


def sees_oracle(ids: list[int], query: int, key: int) -> bool:
    """A tiny row's first time token heads its target group: all before it is the prefix."""
    start = next(i for i, token in enumerate(ids) if token in (5, 6))
    if ids[query] == 0 or ids[key] == 0:
        return query == key
    return key < start or query >= start


def place_oracle(ids: list[int]) -> list[tuple[int, int]]:
    """Row and column of each position: of patches in their grid of 2x3, of all else its place in its segment, 0."""
    places, opened = [], 0
    for i, token in enumerate(ids):
        if token in (4, 5, 6, 7, 9, 14, 15):  # a segment of its own, or the first token of one
            opened = i
        places.append(divmod(i - opened - 1, 3) if token in (11, 12) else (i - opened, 0))
    return places


def turned(x, place, d):
    """The rotary embedding of one head's vector, pair by pair, written as complex numbers."""
    count = d // 4
    angles = [place[axis] * 100.0 ** (-i / count) for axis in (0, 1) for i in range(count)]
    factors = torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles], dtype=torch.complex128)
    product = torch.complex(x[: d // 2], x[d // 2 :]) * factors
    return torch.cat([product.real, product.imag])


def rms(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def block_oracle(weights, h, ids, config):
    """One row (l, hidden_size) through a block in float64: a loop over heads, queries and the keys that each sees."""
    size, d, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
    start = next(i for i, token in enumerate(ids) if token in (5, 6))
    told = rms(h[start - 1], weights["broadcast.norm.weight"], eps) @ weights["broadcast.projection.weight"].T
    h = torch.stack([row + told if i >= start and ids[i] else row for i, row in enumerate(h)])
    q, k, v = (rms(h, weights["norm.weight"], eps) @ weights["mixer.in_proj.weight"].T).split(size, dim=-1)
    places, rows = place_oracle(ids), []
    for i in range(len(ids)):
        heads = []
        for own in (slice(n, n + d) for n in range(0, size, d)):
            query = turned(rms(q[i, own], weights["mixer.query_norm.weight"], eps), places[i], d)
            seen = [j for j in range(len(ids)) if sees_oracle(ids, i, j)]
            keys = [turned(rms(k[j, own], weights["mixer.key_norm.weight"], eps), places[j], d) for j in seen]
            scores = torch.stack([query @ key for key in keys]).exp() ** (d**-0.5)
            heads.append((scores / scores.sum()) @ v[seen, own])
        rows.append(torch.cat(heads))
    h = h + torch.stack(rows) @ weights["mixer.out_proj.weight"].T
    gate, x = (rms(h, weights["mlp_norm.weight"], eps) @ weights["mlp.in_proj.weight"].T).chunk(2, dim=-1)
    return h + (gate / (1 + (-gate).exp()) * x) @ weights["mlp.out_proj.weight"].T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [0, 3], ids=["full", "padded"])
def test_the_block_and_its_gradients_equal_a_float64_oracle(kind, padding):
    model = transformer().double()
    block = model.model.layers[1]
    inputs = batch([kind])
    ids = torch.nn.functional.pad(inputs["input_ids"], (0, padding))
    mask = {name: torch.nn.functional.pad(inputs[name], (0, padding)) for name in ("attention_mask", "target_mask")}
    plan = plan_scans(model.config, layout_of(model, inputs | mask | {"input_ids": ids}), None)
    torch.manual_seed(1)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    h = torch.randn(*ids.shape, model.config.hidden_size, dtype=torch.float64) * (ids != 0).unsqueeze(-1)
    h.requires_grad_()
    values = dict(block.named_parameters()) | {"h": h}
    got, expected = block(h, plan), block_oracle(values, h[0], ids[0].tolist(), model.config).unsqueeze(0)
    assert_near({"out": got}, {"out": expected}, 1e-6)  # norms and angles are in fp32
    assert_near(gradients(values, [got]), gradients(values, [expected]), 1e-5)
    assert not got[ids == 0].any()


def test_conditions_never_see_t_nor_the_targets_and_targets_see_all():
    model, inputs = transformer(), batch(["text_to_image", "both"])
    times = [torch.full((2, 2), t) for t in (0.1, 0.9)]
    first, second = (
        model.model(**inputs, timesteps=t, noise=fixed_noise(inputs, seed)).last_hidden_state
        for seed, t in enumerate(times)
    )
    assert torch.equal(first[0, :8], second[0, :8])
    assert torch.equal(first[1, :2], second[1, :2])
    noise = fixed_noise(inputs)
    changed = noise.clone()
    changed[1, 5] += 1  # a patch
    other = inputs | {"input_ids": torch.where(inputs["input_ids"] == 21, 40, inputs["input_ids"])}
    plain, by_noise, by_text = (
        model(**i, timesteps=times[0], noise=n).predicted_latents
        for i, n in ((inputs, noise), (inputs, changed), (other, noise))
    )
    assert (plain - by_noise)[1, 13:18].abs().amax(-1).min() > 1e-6
    assert (plain - by_text)[0, 10:16].abs().amax(-1).min() > 1e-6


def test_a_padded_batch_equals_single_rows():
    model, together = transformer(), batch(KINDS, is_training=True)
    seeds = torch.arange(len(KINDS))
    out = model(**together, seeds=seeds)
    for i, kind in enumerate(KINDS):
        alone = batch([kind], is_training=True)
        single = model(**alone, seeds=seeds[i : i + 1])
        length = alone["input_ids"].shape[1]
        predicted = out.predicted_latents[i, :length]
        torch.testing.assert_close(predicted, single.predicted_latents[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.row_losses[i], single.row_losses[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5], ids=["plain", "guided"])
def test_the_cached_conditions_change_no_sample_nor_does_the_batch(guidance_scale):
    model, inputs = transformer(), batch(KINDS)
    options = {"num_inference_steps": 6, "guidance_scale": guidance_scale}
    cached, whole = (
        model.generate(**inputs, generator=generators(range(5)), use_cache=c, **options) for c in (True, False)
    )
    torch.testing.assert_close(cached.latents, whole.latents, atol=1e-5, rtol=1e-5)
    assert torch.equal(cached.sequences, whole.sequences)
    for i, kind in enumerate(KINDS):
        alone = batch([kind])
        single = model.generate(**alone, generator=generators([i]), **options)
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(cached.latents[i, :length], single.latents[0], atol=1e-5, rtol=1e-5)


def test_a_row_without_any_condition_samples_beside_one_with_many():
    """Its prefix is padding alone, whose softmax must not be over nothing."""
    model, inputs = transformer(), batch(["text_to_image", "class_to_image"])
    inputs["attention_mask"][1, :2] = 0
    inputs["input_ids"][1, :2] = 0
    inputs["class_ids"][:] = -1
    latents = model.generate(**inputs, generator=generators(range(2)), num_inference_steps=3).latents
    assert bool(latents.isfinite().all())


def test_a_denoising_step_computes_nothing_of_the_prefix_again(monkeypatch):
    lengths, forward = [], MDMAttentionBlock.forward
    monkeypatch.setattr(
        MDMAttentionBlock, "forward", lambda self, h, *rest: lengths.append(h.shape[1]) or forward(self, h, *rest)
    )
    transformer(num_hidden_layers=1).generate(**batch(["text_to_image"]), num_inference_steps=3)
    assert lengths == [8, 9, 9, 9]


def test_a_model_of_either_kind_is_the_same_once_saved_and_loaded(tmp_path):
    inputs = batch(KINDS, is_training=True)
    for name, model in (("transformer", transformer()), ("mamba", tiny_model())):
        model.save_pretrained(tmp_path / name)
        loaded = AutoModel.from_pretrained(tmp_path / name)
        assert loaded.config.backbone == name
        seeds = torch.arange(5)
        assert torch.equal(loaded(**inputs, seeds=seeds).logits, model(**inputs, seeds=seeds).logits)
        assert (tmp_path / name / "modeling_mdm_attention.py").is_file()


def test_a_model_saved_before_there_was_a_choice_is_a_mamba_model():
    assert "backbone" not in json.loads((CARD / "config.json").read_text(encoding="utf-8"))
    assert type(MDMModel.from_pretrained(CARD).layers[0]) is MDMBlock


def test_lora_adapts_attention_and_mlp_by_default():
    adapted = get_peft_model(transformer(), LoraConfig(r=2, task_type="FEATURE_EXTRACTION"))
    names = {name.split(".lora_A")[0].partition("layers.0.")[2] for name, _ in adapted.named_parameters()}
    assert names >= {"mixer.in_proj", "mixer.out_proj", "mlp.in_proj", "mlp.out_proj"}


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 32, "head_dim": 16, "state_size": 8},
        {"hidden_size": 128, "head_dim": 32, "state_size": 16},
        {"hidden_size": 256, "head_dim": 64, "state_size": 64, "scan_directions": [2, 1]},
        {"hidden_size": 1024, "head_dim": 64, "state_size": 128},
        {"hidden_size": 2048, "head_dim": 64, "state_size": 128},
    ],
    ids=lambda options: str(options["hidden_size"]),
)
def test_a_block_has_the_parameters_of_mamba_s_within_1_percent(options):
    counts = {}
    for backbone in ("mamba", "transformer"):
        with torch.device("meta"):
            model = MDMForMultiModalGeneration(MDMConfig(backbone=backbone, num_hidden_layers=1, **options))
        counts[backbone] = sum(p.numel() for p in model.model.layers.parameters())
    assert counts["transformer"] == pytest.approx(counts["mamba"], rel=0.01)


def test_every_parameter_learns_and_the_loss_falls_with_and_without_checkpointing():
    inputs = batch(["both", "caption", "text_to_image"], is_training=True) | {"seeds": torch.arange(3)}
    losses = {}
    for checkpointing in (False, True):
        model = transformer().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses[checkpointing] = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
            optimizer.step()
            losses[checkpointing].append(float(loss))
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[True][-1] < 0.6 * losses[True][0]


def test_in_bfloat16_the_loss_is_near_that_of_fp32():
    inputs = batch(KINDS, is_training=True) | {"seeds": torch.arange(5)}
    half, full = transformer().to(torch.bfloat16)(**inputs).loss, transformer()(**inputs).loss
    assert abs(float(half) - float(full)) < 0.03 * float(full)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "rnn"}, "backbone"),
        ({"backbone": "mamba", "intermediate_size": 8}, "`intermediate_size` is 8, but `backbone` 'mamba' has no MLP"),
        ({"scan_sharing": "alternate"}, "`scan_sharing` is 'alternate', but `backbone` 'transformer' scans nothing"),
        ({"head_dim": 64}, "`head_dim` is 64; attention needs a multiple of 4"),
        ({"hidden_size": 30, "head_dim": 10}, "that divides `hidden_size` 30; change one of the two"),
        (
            {"expand": 1, "hidden_size": 1024},
            "it must be 1 or more: attention alone has the parameters of a Mamba block with `expand` 1",
        ),
        ({"intermediate_size": 0}, "The MLP's width is 0; it must be 1 or more"),
    ],
    ids=lambda v: "" if isinstance(v, str) else "-".join(v),
)
def test_a_transformer_that_cannot_work_is_refused(options, message):
    with pytest.raises(Exception) as error:
        tiny_config(**({"backbone": "transformer"} | options))
    assert message in str(error.value)
