"""Claims about what transformers, accelerate, torchao and torch do to the model: its outputs stay what they were."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import KINDS, batch, fixed_noise, generators, tiny_config, tiny_model
from transformers import AutoModel, TorchAoConfig

from mdm_hf import MDMForMultiModalGeneration, MDMModel, MDMVAEModel


FP32 = {"A_log", "dt_bias", "D"}
DISK_IN_PART = {"model.vae": "disk", "model.embeddings": "cpu", "model.norm": "disk", "latent_head": "cpu"}
DISK_IN_PART |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}


def training_inputs(kinds=KINDS) -> dict:
    inputs = batch(kinds, is_training=True)
    return inputs | {"timesteps": torch.full((len(kinds), 2), 0.6), "noise": fixed_noise(inputs)}


def forward(model):
    with torch.no_grad():
        return model(**training_inputs())


def generate(model):
    return model.generate(**batch(KINDS), generator=generators(range(5)), num_inference_steps=3)


def farthest_pixel(one, other) -> float:
    pairs = zip(sum(one.images, []), sum(other.images, []), strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs)


def assert_same(model, reference):
    """Both give the same bytes, in `forward` and in `generate`."""
    one, other = forward(model), forward(reference)
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.loss, other.loss)
    one, other = generate(model), generate(reference)
    assert torch.equal(one.latents, other.latents)
    assert torch.equal(one.sequences, other.sequences)
    assert farthest_pixel(one, other) == 0


@pytest.mark.parametrize(
    ("sharing", "options", "is_on_disk"),
    [
        ("shared", {"device_map": "auto"}, False),
        ("shared", {"device_map": "auto", "max_memory": {"cpu": 60_000}}, True),
        ("shared", {"device_map": DISK_IN_PART}, True),
        ("shared", {"device_map": {"": "disk"}, "offload_buffers": True}, True),
        ("independent", {"device_map": {"": "disk"}}, True),
        ("alternate", {"device_map": {"": "disk"}}, True),
    ],
    ids=["auto", "auto-little-memory", "disk-in-part", "disk-buffers-too", "disk-independent", "disk-alternate"],
)
def test_offloaded_weights_change_no_byte(tmp_path, sharing, options, is_on_disk):
    model = tiny_model(scan_sharing=sharing)
    model.save_pretrained(tmp_path / "model")
    offloaded = AutoModel.from_pretrained(tmp_path / "model", offload_folder=tmp_path / "disk", **options)
    assert any(p.is_meta for p in offloaded.parameters()) == is_on_disk
    assert_same(offloaded, model)


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)], ids=["bf16", "fp16"])
def test_half_precision_stays_close_and_comes_back_as_it_was_saved(tmp_path, dtype, near):
    reference = tiny_model()
    reference.save_pretrained(tmp_path / "fp32")
    model = AutoModel.from_pretrained(tmp_path / "fp32", dtype=dtype)
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.dtype != dtype} == FP32
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    out, expected = forward(model), forward(reference)
    torch.testing.assert_close(out.loss.float(), expected.loss, rtol=0.005, atol=0)
    torch.testing.assert_close(out.logits.float(), expected.logits, rtol=0, atol=2 * near)
    assert farthest_pixel(generate(model), generate(reference)) < near

    model.save_pretrained(tmp_path / "half")
    again = AutoModel.from_pretrained(tmp_path / "half")
    assert {n: p.dtype for n, p in again.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert_same(again, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_int8_weights_draw_nearly_the_same_and_survive_a_save(tmp_path, dtype):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    model = tiny_model()
    model.save_pretrained(tmp_path / "whole")
    int8 = TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    quantised = AutoModel.from_pretrained(tmp_path / "whole", dtype=dtype, quantization_config=int8)
    kinds = {type(layer.weight) for layer in quantised.model.layers.modules() if isinstance(layer, torch.nn.Linear)}
    assert kinds == {quantization.Int8Tensor}
    assert 0 < farthest_pixel(generate(quantised), generate(model)) < 0.2
    quantised.save_pretrained(tmp_path / "int8")
    size = {folder: (tmp_path / folder / "model.safetensors").stat().st_size for folder in ("whole", "int8")}
    assert size["int8"] < 0.6 * size["whole"]
    again = AutoModel.from_pretrained(tmp_path / "int8")
    assert type(again.latent_head.weight) is quantization.Int8Tensor
    assert_same(again, quantised)


def test_a_compiled_step_is_one_graph_with_the_same_loss_and_gradients():
    models = [tiny_model(num_hidden_layers=1) for _ in range(2)]
    compiled = torch.compile(models[1], fullgraph=True, backend="aot_eager")
    losses = [model(**training_inputs()).loss for model in (models[0], compiled)]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_an_exported_program_answers_other_inputs_as_the_model_does(tmp_path):
    model = tiny_model(num_hidden_layers=1)
    inputs = {name: value for name, value in training_inputs().items() if name != "labels"}
    torch.export.save(torch.export.export(model, (), inputs), tmp_path / "mdm.pt2")
    program = torch.export.load(tmp_path / "mdm.pt2").module()
    others = inputs | {"timesteps": torch.full((5, 2), 0.3), "noise": fixed_noise(inputs, seed=7)}
    others["input_ids"] = torch.where(inputs["input_ids"] == 20, 50, inputs["input_ids"])
    with torch.no_grad():
        for values in (inputs, others):
            torch.testing.assert_close(program(**values).logits, model(**values).logits, atol=1e-6, rtol=1e-6)


def test_shards_load_as_the_whole(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same(AutoModel.from_pretrained(tmp_path), model)


def sizes(model) -> set[int]:
    """Every place where the size of the vocabulary shows."""
    vae = model.vae if isinstance(model, MDMModel) else model if isinstance(model, MDMVAEModel) else model.model.vae
    configured = {model.config.vocab_size, vae.config.vocab_size, vae.token_embedding.num_embeddings}
    head = vae.token_head
    return configured | {
        vae.token_embedding.weight.shape[0],
        head.out_features,
        *head.weight.shape[:1],
        len(head.bias),
    }


@pytest.mark.parametrize("size", [17, 40, 64, 100])
def test_resizing_the_vocabulary_resizes_every_part_of_it_and_keeps_what_was_there(tmp_path, size):
    model, before = tiny_model(), tiny_model()
    model.resize_token_embeddings(size)
    assert sizes(model) == {size}
    kept = min(size, 64)
    new, old = model.model.vae, before.model.vae
    assert torch.equal(new.token_embedding.weight[:kept], old.token_embedding.weight[:kept])
    assert torch.equal(new.token_head.weight[:kept], old.token_head.weight[:kept])
    assert torch.equal(new.token_head.bias[:kept], old.token_head.bias[:kept])
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert sizes(again) == {size}
    if size >= 40:  # the rows of `batch` hold ids up to 35
        assert_same(again, model)


def test_a_new_token_can_be_read_generated_and_learned():
    model = tiny_model()
    model.resize_token_embeddings(80)
    with torch.no_grad():
        model.model.vae.token_head.bias[79] = 50.0
    out = generate(model)
    targets = batch(KINDS)["input_ids"] == 13
    assert (out.sequences[targets] == 79).all()
    inputs = training_inputs(["both"])
    inputs["input_ids"][inputs["labels"] == 33] = 78
    inputs["labels"][inputs["labels"] == 33] = 78
    model(**inputs).loss.backward()
    assert model.model.vae.token_embedding.weight.grad[78].any()
    assert model.model.vae.token_head.weight.grad[78].any()


def test_the_bare_model_and_the_vae_resize_their_token_head_too():
    for model in (MDMModel(tiny_config()), MDMVAEModel(tiny_config().vae_config)):
        model.resize_token_embeddings(70)
        assert sizes(model) == {70}


def test_a_vocabulary_without_the_special_tokens_is_refused():
    with pytest.raises(ValueError, match="A vocabulary of 16 tokens leaves out special ones.*take 17 tokens or more"):
        tiny_model().resize_token_embeddings(16)
    with pytest.raises(Exception, match="A vocabulary of 10 tokens leaves out special ones"):
        tiny_config(vae_config={"vocab_size": 10})
    model = tiny_model()
    model.resize_token_embeddings(16, pad_to_multiple_of=24)
    assert sizes(model) == {24}


def with_old_names(folder) -> dict:
    """Writes the tiny model to `folder` under its weights' names from before `mixer.ssm` was a module."""
    model = tiny_model()
    model.save_pretrained(folder, save_original_format=False)
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()
    old = {name.replace("mixer.ssm.", "mixer."): weight for name, weight in model.state_dict().items()}
    assert "model.layers.0.mixer.A_log" in old
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    return old


def test_a_checkpoint_with_old_weight_names_loads_exactly_and_so_does_one_with_new_names(tmp_path):
    model, old = tiny_model(), with_old_names(tmp_path / "old")
    loaded, info = AutoModel.from_pretrained(tmp_path / "old", output_loading_info=True)
    assert not any(info.values())
    assert_same(loaded, model)
    base = MDMModel.from_pretrained(tmp_path / "old")
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), model.model.parameters(), strict=True))

    loaded.save_pretrained(tmp_path / "original")
    assert load_file(tmp_path / "original" / "model.safetensors").keys() == old.keys()
    loaded.save_pretrained(tmp_path / "new", save_original_format=False)
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == model.state_dict().keys()
    assert_same(AutoModel.from_pretrained(tmp_path / "new"), model)


def test_a_state_dict_with_old_weight_names_loads_too(tmp_path):
    fresh = MDMForMultiModalGeneration(tiny_config()).eval()
    fresh.load_state_dict(with_old_names(tmp_path))
    assert_same(fresh, tiny_model())


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "a.b.c."])
def test_old_weight_names_load_however_deep_the_model_lies(tmp_path, prefix):
    model = fresh = MDMForMultiModalGeneration(tiny_config()).eval()
    for name in reversed(prefix.rstrip(".").split(".")):
        fresh = torch.nn.ModuleDict({name: fresh})
    old = {prefix + name: weight for name, weight in with_old_names(tmp_path).items()}
    fresh.load_state_dict(old)
    assert_same(model, tiny_model())
    assert_same(copy.deepcopy(model), tiny_model())
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({name: weight for name, weight in old.items() if not name.endswith("mixer.D")})


def test_old_weight_names_load_onto_the_disk(tmp_path):
    with_old_names(tmp_path)
    offloaded = AutoModel.from_pretrained(tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "disk")
    assert_same(offloaded, tiny_model())
