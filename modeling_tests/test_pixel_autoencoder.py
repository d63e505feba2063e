"""A frozen pixel autoencoder in front of the patches: as diffusers has it, never trained, one repository for all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from loopback_hub import WRITE_TOKEN, LoopbackHub, Repository
from safetensors.torch import load_file, save_file
from tiny import GRID, model_with, rgb_batch, rgb_pixels, save_autoencoder, tiny_config
from torch.testing import assert_close

import mdm_hf.pixel_autoencoder
from mdm_hf import MDMConfig, MDMForMultiModalGeneration
from mdm_hf.pixel_autoencoder import MDMPixelAutoencoder
from mdm_hf.training.trainer import EMACallback


CLASSES = ("AutoencoderKL", "VQModel")
HEIGHT, WIDTH = (4 * side for side in GRID)  # patches of 2x2 latents, each of 2x2 pixels


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in CLASSES}
    for name, folder in made.items():
        save_autoencoder(folder, name)
    return made


@pytest.fixture(scope="module")
def models(folders) -> dict[str, MDMForMultiModalGeneration]:
    return {name: model_with(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def model(models) -> MDMForMultiModalGeneration:
    return models["AutoencoderKL"]


def spec(**changes) -> dict:
    config = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [8, 8]}
    fields = {"class_name": "AutoencoderKL", "config": config | {"scaling_factor": 0.5}}
    return fields | changes | {"config": fields["config"] | changes.get("config", {})}


# Configuration


@pytest.mark.parametrize("class_name", CLASSES)
def test_the_config_names_class_source_and_licence_and_survives_json(folders, class_name, tmp_path):
    config = tiny_config().with_pixel_autoencoder(str(folders[class_name]))
    found = config.pixel_autoencoder
    assert (found["class_name"], found["repo_id"], found["license"]) == (class_name, str(folders[class_name]), "mit")
    assert not any(name.startswith("_") for name in found["config"])
    assert (config.image_channels, config.vae_config.num_channels) == (3, 4)
    assert (config.pixel_downsampling, config.pixel_patch_size) == (2, 4)
    config.save_pretrained(tmp_path)
    assert MDMConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert tiny_config().pixel_autoencoder is None, "the config it was made from is left alone"


def test_without_an_autoencoder_a_patch_is_as_large_in_pixels_as_it_is():
    config = tiny_config()
    assert (config.image_channels, config.pixel_downsampling, config.pixel_patch_size) == (1, 1, 2)


def test_an_autoencoder_is_found_in_the_subfolder_of_a_pipeline(tmp_path):
    save_autoencoder(tmp_path / "vae")
    with pytest.raises(
        ValueError, match=r"of which no config\.json can be read .*; need .*; check id, revision and su"
    ):
        tiny_config().with_pixel_autoencoder(str(tmp_path))
    config = tiny_config().with_pixel_autoencoder(str(tmp_path), subfolder="vae")
    assert config.pixel_autoencoder["subfolder"] == "vae"
    assert "license" not in config.pixel_autoencoder, "the card lies in the subfolder, not in the repository's root"
    MDMForMultiModalGeneration(config).load_pixel_autoencoder()
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match=r"a UNet2DModel; need AutoencoderKL or VQModel; .*subfolder=\"vae\""):
        tiny_config().with_pixel_autoencoder(str(tmp_path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            spec(class_name="AutoencoderTiny"),
            r"class_name 'AutoencoderTiny'; it must be one of AutoencoderKL, VQModel",
        ),
        (spec(name="x"), r"unknown field\(s\) \['name'\]; it knows class_name, repo_id"),
        (spec(config={"scaling_factor": None}), r"without scaling_factor; .*read it with MDMConfig\.with_pixel_auto"),
        (spec(config={"scaling_factor": "text"}), r"scaling_factor 'text'; it must be a finite number above 0; take"),
        (spec(config={"scaling_factor": 0}), r"scaling_factor 0; it must be a finite number above 0"),
        (spec(config={"shift_factor": float("inf")}), r"shift_factor inf; it must be a finite number, or null"),
        (spec(config={"latents_mean": 3}), r"latents_mean 3; it must be a list of finite numbers, or null"),
        (spec(config={"latents_std": [1.0, 0.0, 1.0, 1.0]}), r"it must be a list of finite numbers above 0, or null"),
        (spec(config={"block_out_channels": "8"}), r"block_out_channels '8'; it must be a list of whole numbers"),
        (spec(config={"in_channels": "3"}), r"in_channels '3'; it must be a whole number, 1 or more"),
        (spec(config={"latent_channels": 16}), r"16 channels, `vae_config.num_channels` is 4; .*set .* to 16"),
        (spec(config={"vq_embed_dim": 8}), r"latents of 8 channels"),
        (spec(config={"out_channels": 6}), r"takes 3 channels and gives 6; both must be 1 \(grey\) or 3 \(RGB\)"),
        (spec(config={"latents_std": [1.0]}), r"latents_std with 1 values for 4 channels; give one a channel"),
    ],
)
def test_an_autoencoder_that_cannot_stand_in_front_is_refused(given, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        MDMConfig(vae_config={"num_channels": 4}, pixel_autoencoder=given)


# Encoding and decoding


def test_kl_latents_are_the_scaled_mean_of_diffusers_posterior(folders, models):
    ours = models["AutoencoderKL"].model.pixel_autoencoder
    theirs = save_autoencoder(folders["AutoencoderKL"])
    with torch.no_grad():
        assert_close(
            ours.encode(rgb_pixels(2)), theirs.encode(rgb_pixels(2)).latent_dist.mean * 0.18215, atol=1e-6, rtol=1e-5
        )
        z = torch.randn(2, 4, 4, 6)
        assert_close(ours.decode(z), theirs.decode(z / 0.18215).sample, atol=1e-5, rtol=1e-5)


def test_vq_latents_are_those_before_quantisation_and_decoding_quantises(folders, models):
    ours = models["VQModel"].model.pixel_autoencoder
    theirs = save_autoencoder(folders["VQModel"], "VQModel")
    with torch.no_grad():
        z = theirs.encode(rgb_pixels(2)).latents
        assert_close(ours.encode(rgb_pixels(2)), z * 0.18215, atol=1e-6, rtol=1e-5)
        codes = theirs.quantize(z)[0]
        assert not torch.allclose(codes, z)
        quantised = theirs.decode(codes, force_not_quantize=True).sample
        assert_close(ours.decode(z * 0.18215), quantised, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "shift", "scale"),
    [
        ({"shift_factor": 0.1, "scaling_factor": 2.0}, [0.1] * 4, [2.0] * 4),
        (
            {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 4.0, 8.0], "scaling_factor": 0.5},
            [0.1, 0.2, 0.3, 0.4],
            [0.5, 0.25, 0.125, 0.0625],
        ),
    ],
    ids=["shift", "mean-and-std"],
)
def test_latents_are_shifted_and_scaled_as_the_config_says_and_back(tmp_path, options, shift, scale):
    theirs = save_autoencoder(tmp_path, **options)
    ours = model_with(tmp_path).model.pixel_autoencoder
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (shift, scale))
    with torch.no_grad():
        z = theirs.encode(rgb_pixels()).latent_dist.mean
        assert_close(ours.encode(rgb_pixels()), (z - shift) * scale, atol=1e-6, rtol=1e-5)
        assert_close(ours.decode((z - shift) * scale), theirs.decode(z).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("class_name", CLASSES)
def test_padding_does_not_reach_into_the_latents_of_a_picture(models, class_name):
    autoencoder = models[class_name].model.pixel_autoencoder
    sizes = [(8, 12), (12, 4), (8, 12)]
    padded = torch.zeros(3, 3, 12, 12)
    for i, (h, w) in enumerate(sizes):
        padded[i, :, :h, :w] = rgb_pixels(1, h, w, seed=i)[0]
    latents = autoencoder.encode_padded(padded, sizes)
    assert latents.shape == (3, 4, 6, 6)
    for i, (h, w) in enumerate(sizes):
        alone = autoencoder.encode(rgb_pixels(1, h, w, seed=i))[0]
        assert_close(latents[i, :, : h // 2, : w // 2], alone, atol=1e-6, rtol=1e-5)
        assert latents[i, :, h // 2 :].abs().sum() == latents[i, :, :, w // 2 :].abs().sum() == 0


def test_a_batch_beyond_the_memory_bound_is_encoded_and_decoded_in_parts(model, monkeypatch):
    autoencoder, seen = model.model.pixel_autoencoder, []
    together = autoencoder.encode(rgb_pixels(5))
    decoded = autoencoder.decode(together)
    monkeypatch.setattr(mdm_hf.pixel_autoencoder, "PIXELS_AT_ONCE", 2 * HEIGHT * WIDTH)
    hook = autoencoder.autoencoder.encoder.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    assert_close(autoencoder.encode(rgb_pixels(5)), together, atol=1e-6, rtol=1e-5)
    assert_close(autoencoder.decode(together), decoded, atol=1e-5, rtol=1e-5)
    hook.remove()
    assert seen == [2, 2, 1]


# One repository for all weights


@pytest.mark.parametrize("class_name", CLASSES)
def test_what_is_saved_comes_back_equal_from_meta_and_frozen(models, class_name, tmp_path):
    model = models[class_name]
    model.save_pretrained(tmp_path)
    assert (tmp_path / "pixel_autoencoder.py").is_file(), "the code travels"
    loaded, report = MDMForMultiModalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    autoencoder = loaded.model.pixel_autoencoder
    assert_close(
        autoencoder.encode(rgb_pixels()), model.model.pixel_autoencoder.encode(rgb_pixels()), atol=1e-6, rtol=1e-5
    )
    assert not any(p.requires_grad for p in autoencoder.parameters())


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_model_in_bfloat16_encodes_nearly_the_same(models, class_name, tmp_path):
    models[class_name].save_pretrained(tmp_path)
    half = MDMForMultiModalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exact = models[class_name].model.pixel_autoencoder.encode(rgb_pixels())
    assert half.model.pixel_autoencoder.dtype == torch.bfloat16
    assert (half.model.pixel_autoencoder.encode(rgb_pixels()) - exact).abs().max() < 0.05 * exact.std()
    inputs = rgb_batch(["caption"], is_training=True)
    assert half(**inputs).loss.isfinite()


def test_an_autoencoder_that_overflows_in_float16_runs_in_float32(model, tmp_path):
    model.save_pretrained(tmp_path)
    half = MDMForMultiModalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    half.model.pixel_autoencoder.encode(rgb_pixels())
    assert half.model.pixel_autoencoder.dtype == torch.float32
    assert half.dtype == torch.float16


def test_weights_that_were_never_fetched_are_not_used(folders, tmp_path):
    config = tiny_config().with_pixel_autoencoder(str(folders["AutoencoderKL"]))
    model = MDMForMultiModalGeneration(config)
    message = r"has random weights; call `model\.load_pixel_autoencoder\(\)` once, before the first use"
    with pytest.raises(ValueError, match=message):
        model(**rgb_batch(["caption"], is_training=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MDMForMultiModalGeneration.from_pretrained(tmp_path).generate(**rgb_batch(["class_to_image"]))
    assert model(**rgb_batch(["text"], is_training=True)).loss.isfinite(), "text needs no autoencoder"


def test_a_checkpoint_without_its_autoencoder_loads_as_one_that_was_never_fetched(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "pixel_autoencoder" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = MDMForMultiModalGeneration.from_pretrained(tmp_path)
    assert all(p.isfinite().all() for p in loaded.parameters())
    with pytest.raises(ValueError, match="has random weights"):
        loaded.model.pixel_autoencoder.encode(rgb_pixels())
    loaded.load_pixel_autoencoder()
    assert_close(
        loaded.model.pixel_autoencoder.encode(rgb_pixels()), model.model.pixel_autoencoder.encode(rgb_pixels())
    )


def test_weights_that_belong_to_another_config_are_refused(folders, tmp_path):
    model = model_with(folders["AutoencoderKL"])
    save_autoencoder(tmp_path / "scaled", scaling_factor=0.5)
    with pytest.raises(ValueError, match=r"with scaling_factor 0\.5; `pixel_autoencoder` says 0\.18215; need the one"):
        model.load_pixel_autoencoder(str(tmp_path / "scaled"))
    save_autoencoder(tmp_path / "gone")
    (tmp_path / "gone" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"of which no AutoencoderKL can be loaded .*; need whole safetensors"):
        model.load_pixel_autoencoder(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"`config.pixel_autoencoder` is None, so there is nothing to load; build"):
        MDMForMultiModalGeneration(tiny_config()).load_pixel_autoencoder()
    with pytest.raises(ValueError, match=r"has no repo_id; give a folder or a Hub repository to load from"):
        MDMPixelAutoencoder({k: v for k, v in model.config.pixel_autoencoder.items() if k != "repo_id"}).load()


# Never trained


def test_no_gradient_reaches_it_and_training_leaves_it_in_evaluation_mode(folders):
    model = model_with(folders["AutoencoderKL"], diffusion_loss="ddpm_epsilon").train()
    autoencoder = model.model.pixel_autoencoder
    assert not any(module.training for module in autoencoder.modules())
    model(**rgb_batch(["caption", "both"], is_training=True)).loss.backward()
    assert all(p.grad is None for p in autoencoder.parameters())
    assert model.model.vae.patch_embedding.weight.grad.abs().sum() > 0
    frozen = sum(p.numel() for p in autoencoder.parameters())
    assert model.num_parameters() - model.num_parameters(only_trainable=True) == frozen > 0


def test_the_average_of_the_weights_leaves_it_out(folders):
    model, callback = model_with(folders["AutoencoderKL"]), EMACallback(decay=0.5)
    before = model.model.pixel_autoencoder.state_dict()
    callback.on_train_begin(None, None, None, model=model)
    assert sum(p.numel() for p in callback.ema.shadow_params) == model.num_parameters(only_trainable=True)
    callback.on_step_end(None, None, None, model=model)
    callback.swap_in(model)
    callback.swap_out(model)
    for name, weight in model.model.pixel_autoencoder.state_dict().items():
        assert torch.equal(weight, before[name]), name


# Over a Hub


COMMON = """
import hashlib, json, sys, torch
from transformers import AutoModel
seen = {}
x = torch.linspace(-1, 1, 3 * 8 * 12).view(1, 3, 8, 12)

def digest(model):
    torch.manual_seed(0)
    return hashlib.sha256(model.model.pixel_autoencoder.encode(x).numpy().round(4).tobytes()).hexdigest()
"""
FRIEND = """
from mdm_hf import MDMConfig, MDMForMultiModalGeneration
tiny = MDMConfig(**json.loads(sys.argv[1]))
for name, revision in (("old", sys.argv[2]), ("new", None)):
    config = tiny.with_pixel_autoencoder("org/vae", revision=revision)
    model = MDMForMultiModalGeneration(config).load_pixel_autoencoder()
    seen[name] = [config.pixel_autoencoder["revision"], config.pixel_autoencoder["license"], digest(model)]
model.push_to_hub("org/mdm")
try:
    tiny.with_pixel_autoencoder("org/none")
except ValueError as error:
    seen["none"] = str(error)
"""
STRANGER = """
sys.modules["mdm_hf"] = None  # any import of the installed package fails
model = AutoModel.from_pretrained("org/mdm", trust_remote_code=True)
seen["pulled"] = digest(model)
seen["frozen"] = not any(p.requires_grad for p in model.model.pixel_autoencoder.parameters())
"""


@pytest.fixture(scope="module")
def over_the_hub(tmp_path_factory) -> dict:
    vae, shas, seen = Repository(is_private=False), [], {}
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp(f"seed{seed}")
        save_autoencoder(folder, seed=seed)
        shas.append(
            vae.commit(
                {path.name: path.read_bytes() + b"\n" * (path.name == "README.md") for path in folder.iterdir()}
            )
        )
    arguments = [tiny_config().to_json_string(use_diff=True), shas[0]]
    with LoopbackHub() as hub:
        hub.repositories["org/vae"] = vae
        for code in (FRIEND, STRANGER):
            environment = os.environ | hub.environment(tmp_path_factory.mktemp("cache"), WRITE_TOKEN)
            command = [sys.executable, "-c", f"{COMMON}{code}\nprint(json.dumps(seen))", *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr
            seen |= json.loads(done.stdout.splitlines()[-1])
        seen["files"] = set(hub.repositories["org/mdm"].commits[-1][1])
    return seen | {"shas": shas}


def test_an_autoencoder_is_read_by_id_and_revision_with_its_commit_and_licence(over_the_hub):
    old, new = over_the_hub["old"], over_the_hub["new"]
    assert [old[0], new[0]] == over_the_hub["shas"]
    assert old[1] == new[1] == "mit"
    assert old[2] != new[2]
    assert "Got org/none, of which no config.json can be read" in over_the_hub["none"]


def test_a_process_without_the_package_or_the_autoencoders_repository_encodes_the_same(over_the_hub):
    assert "pixel_autoencoder.py" in over_the_hub["files"]
    assert over_the_hub["pulled"] == over_the_hub["new"][2]
    assert over_the_hub["frozen"]
