"""Latents are encoded once, exactly, resumably, and never read back for another model or other settings."""

import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny import save_autoencoder, tiny_config
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from mdm_hf import MDMForMultiModalGeneration, MDMImageProcessorPil, MDMProcessor
from mdm_hf.cli import main
from mdm_hf.training.latent_cache import INDEX, UNFINISHED, LatentCache, pictures_in, write_latent_cache
from mdm_hf.training.readers import RecordSource
from mdm_hf.training.records import BadRow


CARD = Path(__file__).parents[1] / "model_cards" / "mdm-digits"
COUNT, SHARD = 7, 3
QUIET = {"batch_size": 2, "shard_size": SHARD, "progress_bar": False}


def picture(index: int) -> Image.Image:
    shape = [(30, 50, 3), (20, 20, 3), (64, 32, 3)][index % 3]
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a model that has a pixel autoencoder, and its processor."""
    folder = tmp_path_factory.mktemp("model")
    save_autoencoder(folder / "vae")
    vae_config = tiny_config().vae_config.to_dict() | {"vocab_size": 384}
    config = tiny_config(vae_config=vae_config).with_pixel_autoencoder(str(folder / "vae"))
    MDMForMultiModalGeneration(config).load_pixel_autoencoder().save_pretrained(folder / "model")
    size = {"height": 16, "width": 16}
    image_processor = MDMImageProcessorPil.for_model(config, size=size, aspect_ratio_buckets=True)
    MDMProcessor(image_processor, PreTrainedTokenizerFast.from_pretrained(CARD)).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def model(saved) -> MDMForMultiModalGeneration:
    return MDMForMultiModalGeneration.from_pretrained(saved)


@pytest.fixture(scope="module")
def processor(saved) -> MDMProcessor:
    return MDMProcessor.from_pretrained(saved)


@pytest.fixture(scope="module")
def written(model, processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write_latent_cache([picture(i) for i in range(COUNT)], model, processor.image_processor, folder, **QUIET)
    return folder


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_each_image_is_kept_as_the_latents_that_the_model_makes_of_it_alone(written, model, processor):
    cache = LatentCache(written, model, processor.image_processor)
    assert len(cache) == COUNT
    assert len(shards(written)) == 3
    for i, part in enumerate(cache):
        alone = processor.image_processor(picture(i), return_tensors="pt")["pixel_values"]
        assert_close(part["latents"], model.model.pixel_autoencoder.encode(alone)[0], atol=1e-6, rtol=1e-5)
    assert torch.equal(cache[-1]["latents"], cache[COUNT - 1]["latents"])
    assert [part["latents"].shape for part in cache[:2]] == [(4, 6, 10), (4, 8, 8)]
    with pytest.raises(IndexError, match=r"Got index 7; the latent cache .* holds 7 images"):
        cache[COUNT]


def test_training_from_the_cache_gives_the_loss_that_pictures_give(written, model, processor):
    def loss(parts) -> torch.Tensor:
        turns = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": [part]}] for part in parts]
        inputs = processor.apply_chat_template(turns)
        noise = torch.randn(*inputs["input_ids"].shape, 8, generator=torch.Generator().manual_seed(0))
        return model(**inputs, noise=noise, timesteps=torch.full((3, 2), 0.5)).loss

    with torch.no_grad():
        cached = loss(LatentCache(written)[:3])
        assert_close(cached, loss([{"type": "image", "image": picture(i)} for i in range(3)]), atol=1e-5, rtol=1e-5)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from test_latent_cache import COUNT, QUIET, picture
from mdm_hf import MDMForMultiModalGeneration, MDMProcessor
from mdm_hf.training.latent_cache import write_latent_cache

def read(i):
    if i == 5:  # in the middle of the second shard
        os.kill(os.getpid(), signal.SIGKILL)
    return picture(i)

model, processor = (kind.from_pretrained(sys.argv[1]) for kind in (MDMForMultiModalGeneration, MDMProcessor))
write_latent_cache(read, model, processor.image_processor, sys.argv[2], count=COUNT, **QUIET)
"""


def test_a_killed_run_goes_on_where_it_was_and_ends_with_the_same_latents(saved, written, model, processor, tmp_path):
    arguments = [str(saved), str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(shards(tmp_path)) == ["latents-00000.safetensors"]
    with pytest.raises(ValueError, match=r"with 1 of 3 shards; need all; call write_latent_cache again, which"):
        LatentCache(tmp_path)
    (tmp_path / UNFINISHED).write_bytes(b"half a shard")
    seen = []

    def read(i):
        seen.append(i)
        return picture(i)

    cache = write_latent_cache(read, model, processor.image_processor, tmp_path, count=COUNT, **QUIET)
    assert seen == [3, 4, 5, 6], "the finished shard is not made again"
    assert (tmp_path / INDEX).read_bytes() == (written / INDEX).read_bytes()
    for resumed, at_once in zip(cache, LatentCache(written), strict=True):
        assert_close(resumed["latents"], at_once["latents"], atol=1e-6, rtol=1e-5)
    assert not (tmp_path / UNFINISHED).exists()


def test_latents_are_found_by_the_path_under_the_image_folder_and_not_by_a_name_that_others_share(
    tmp_path, model, processor
):
    images, names = [picture(0), picture(1)], ["cats/001.jpg", "001.jpg"]
    cache = write_latent_cache(images, model, processor.image_processor, tmp_path / "cache", names=names, **QUIET)
    folder = tmp_path / "images"
    paths = ["cats/001.jpg", "./001.jpg", str(folder / "cats" / "001.jpg"), {"path": str(folder / "001.jpg")}]
    rows = [{"image": path, "label": 0} for path in [*paths, "dogs/001.jpg", "/elsewhere/001.jpg"]]
    source = RecordSource(rows, "imagenet", image_folder=folder, latents=cache)

    def latents(i):
        return source.sample(i, "class_to_image", np.random.default_rng(0))["messages"][-1]["content"][0]["latents"]

    for i, index in enumerate([0, 1, 0, 1]):
        assert torch.equal(latents(i), cache[index]["latents"])
    for i in (4, 5):
        with pytest.raises(
            BadRow, match="of which .*cache has no latents; need them .* under `image_folder`; run mdm"
        ):
            latents(i)


def test_half_precision_takes_half_the_space(model, processor, tmp_path):
    images = [picture(i) for i in range(2)]
    cache = write_latent_cache(images, model, processor.image_processor, tmp_path, dtype=torch.float16, **QUIET)
    assert cache[0]["latents"].dtype == torch.float16
    inputs = processor.apply_chat_template([{"role": "user", "content": [cache[0]]}], generate="text")
    assert inputs["image_latents"].dtype == torch.float32


def test_a_cache_is_read_from_its_files_and_by_a_data_loaders_workers(written):
    cache = LatentCache(written)
    assert cache._open.cache_info().currsize == 0, "no shard is opened before it is asked for"
    other = pickle.loads(pickle.dumps(cache))
    assert torch.equal(other[4]["latents"], cache[4]["latents"])
    assert cache._open.cache_info().currsize == 1
    with safe_open(written / "latents-00002.safetensors", framework="pt") as last:
        assert list(last.keys()) == ["6"]


def test_a_cache_of_another_autoencoder_or_with_other_settings_is_refused(written, saved, model, processor, tmp_path):
    save_autoencoder(tmp_path, seed=1)
    other = MDMForMultiModalGeneration.from_pretrained(saved).load_pixel_autoencoder(str(tmp_path))
    images, image_processor = [picture(i) for i in range(COUNT)], processor.image_processor
    squares = MDMImageProcessorPil.for_model(model.config, size={"height": 16, "width": 16})
    need = "need the same; use the model and the image processor that it was made with, or write a new one"
    with pytest.raises(
        ValueError, match=rf"with autoencoder '[0-9a-f]+\.\.\.; this call has '[0-9a-f]+\.\.\.; {need}"
    ):
        LatentCache(written, other)
    with pytest.raises(ValueError, match=rf"with aspect_ratio_buckets True; this call has False; {need}"):
        LatentCache(written, image_processor=squares)
    with pytest.raises(ValueError, match="with autoencoder "):
        write_latent_cache(images, other, image_processor, written, **QUIET)
    with pytest.raises(ValueError, match="with count 7; this call has 6"):
        write_latent_cache(images[:6], model, image_processor, written, **QUIET)
    with pytest.raises(ValueError, match="with shard_size 3; this call has 4"):
        write_latent_cache(images, model, image_processor, written, **(QUIET | {"shard_size": 4}))
    with pytest.raises(ValueError, match=r"with names None; this call has \['0', '1'"):
        write_latent_cache(images, model, image_processor, written, names=[str(i) for i in range(COUNT)], **QUIET)


def test_the_fingerprint_is_that_of_the_weights_whatever_their_precision(written, saved):
    half = MDMForMultiModalGeneration.from_pretrained(saved, dtype=torch.bfloat16)
    assert len(LatentCache(written, half)) == COUNT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": picture}, "Got `images` without a length; need `count`, the number of images, beside a function"),
        ({"images": []}, "Got count 0; need 1 or more"),
        ({"batch_size": 0}, "Got batch_size 0; need 1 or more"),
        ({"names": ["a"]}, r"Got 1 names for 2 images; need one each"),
        (
            {"image_processor": MDMImageProcessorPil()},
            r"patch_size 16 and num_channels 3; the model needs 4 and 3; use MDMImageProcessorPil\.for_model",
        ),
        (
            {"model": MDMForMultiModalGeneration(tiny_config())},
            r"without a pixel autoencoder, which has no latents to cache; build it from config\.with_pixel_autoenc",
        ),
    ],
)
def test_what_cannot_be_cached_is_refused(model, processor, tmp_path, change, message):
    arguments = {"images": [picture(0), picture(1)], "model": model, "image_processor": processor.image_processor}
    with pytest.raises(ValueError, match=message):
        write_latent_cache(**(arguments | QUIET | {"folder": tmp_path} | change))
    assert not any(tmp_path.iterdir())


def test_a_picture_that_cannot_be_encoded_is_named_and_can_be_mended(model, processor, tmp_path):
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[:200])
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    given = {"names": ["0.png", "1.png"], **QUIET}
    with pytest.raises(
        ValueError, match=r"Got the picture 1\.png, which cannot be encoded: Got a corrupt image .*Then"
    ):
        write_latent_cache(paths, model, processor.image_processor, tmp_path / "cache", **given)
    (tmp_path / "1.png").write_bytes(whole)
    cache = write_latent_cache(paths, model, processor.image_processor, tmp_path / "cache", **given)
    images = [picture(i) for i in range(2)]
    expected = write_latent_cache(images, model, processor.image_processor, tmp_path / "expected", **QUIET)
    assert all(torch.equal(a["latents"], b["latents"]) for a, b in zip(cache, expected, strict=True))


def test_a_folder_without_a_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"of which no {INDEX} can be read .*; need a folder that write_lat"):
        LatentCache(tmp_path)


def test_the_command_encodes_a_folder_of_pictures_and_keeps_their_names(saved, tmp_path, capsys):
    images, output = tmp_path / "images", tmp_path / "cache"
    (images / "sub").mkdir(parents=True)
    for i, name in enumerate(["b.png", "a.jpg", "sub/c.png"]):
        picture(i).save(images / name)
    (images / "notes.txt").write_text("no picture")
    command = ["cache-latents", "--model", str(saved), "--images", str(images), "--output", str(output)]
    assert main([*command, "--half", "--device", "cpu"]) == 0
    assert "holds the latents of 3 pictures" in capsys.readouterr().out
    cache = LatentCache(output)
    assert cache.names == ["a.jpg", "b.png", "sub/c.png"]
    assert cache[1]["latents"].dtype == torch.float16
    assert main([*command, "--shard-size", "2"]) == 2
    assert "mdm cache-latents: Got the latent cache" in capsys.readouterr().err
    with pytest.raises(ValueError, match="in which there is no picture; need a folder with PNG, JPEG or other images"):
        pictures_in(output)
