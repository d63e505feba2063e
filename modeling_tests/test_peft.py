"""Claims about PEFT adapters: every target learns, whatever wraps the model, and an adapter comes and goes exactly."""

import pytest
import torch
from peft import AutoPeftModelForFeatureExtraction, LoraConfig, get_peft_model
from tiny import batch, fixed_noise, generators, tiny_model

from mdm_hf import MDMForMultiModalGeneration


KINDS = ["text_to_image", "caption"]


def lora(model, **options):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, task_type="FEATURE_EXTRACTION", init_lora_weights=False, **options))


def training_inputs() -> dict:
    inputs = batch(KINDS, is_training=True)
    return inputs | {"timesteps": torch.full((2, 2), 0.5), "noise": fixed_noise(inputs)}


def sample(model) -> torch.Tensor:
    return model.generate(**batch(KINDS), generator=generators(range(2)), num_inference_steps=3).latents


@pytest.mark.parametrize("sharing", ["shared", "independent", "alternate"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_every_default_target_gets_a_gradient_and_nothing_else_does(sharing, options, checkpointing):
    adapted = lora(tiny_model(scan_sharing=sharing), **options).train()
    if checkpointing:
        adapted.gradient_checkpointing_enable()
    adapted(**training_inputs()).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-4] for name in trained} == {"in_proj", "out_proj"}
    assert len(trained) % (2 * (2 + len(options))) == 0
    for name, parameter in adapted.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert learns == (name in trained), name


def test_an_adapter_is_saved_loaded_and_merged_without_a_change(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    plain = sample(base)
    base.name_or_path = base.config.name_or_path = str(tmp_path / "base")
    adapted = lora(base).eval()
    expected = sample(adapted)
    assert not torch.allclose(expected, plain, atol=1e-3)
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 50_000

    by_peft = AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "adapter").eval()
    by_model = MDMForMultiModalGeneration.from_pretrained(tmp_path / "base").eval()
    by_model.load_adapter(str(tmp_path / "adapter"))
    for loaded in (by_peft, by_model):
        assert torch.equal(sample(loaded), expected)
    by_model.disable_adapters()
    assert torch.equal(sample(by_model), plain)

    merged = adapted.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(sample(merged), expected, atol=1e-5, rtol=1e-5)


def test_two_adapters_live_in_one_model_and_are_switched():
    model = tiny_model()
    plain = sample(model)
    for name, seed in (("first", 1), ("second", 2)):
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False), adapter_name=name)
    samples = {}
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        samples.setdefault(name, []).append(sample(model))
    assert torch.equal(*samples["first"])
    assert not torch.allclose(samples["first"][0], samples["second"][0], atol=1e-3)
    model.disable_adapters()
    assert torch.equal(sample(model), plain)


def test_whole_modules_can_be_trained_beside_an_adapter():
    adapted = lora(tiny_model(), modules_to_save=["latent_head"]).train()
    adapted(**training_inputs()).loss.backward()
    copies = [p for name, p in adapted.named_parameters() if "latent_head.modules_to_save" in name]
    assert copies
    assert all(float(p.grad.abs().sum()) > 0 for p in copies)
