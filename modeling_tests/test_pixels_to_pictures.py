"""Pixels in, pixels out, with a pixel autoencoder in between: losses, samples, and pictures of every shape."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    GRID,
    KINDS,
    batch,
    fixed_noise,
    generators,
    model_with,
    rgb_batch,
    rgb_pixels,
    save_autoencoder,
    tiny_config,
)
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from mdm_hf import MDMForMultiModalGeneration, MDMImageProcessorPil, MDMProcessor


CLASSES = ("AutoencoderKL", "VQModel")
CARD = Path(__file__).parents[1] / "model_cards" / "mdm-digits"
HEIGHT, WIDTH = (4 * side for side in GRID)


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


def with_latents(model, inputs: dict) -> dict:
    latents = model.model.pixel_autoencoder.encode(inputs["pixel_values"])
    return {name: value for name, value in inputs.items() if name != "pixel_values"} | {"image_latents": latents}


# Forward and generate


@pytest.mark.parametrize("class_name", CLASSES)
def test_pixels_and_their_latents_give_the_same_losses(models, class_name):
    model, inputs = models[class_name], rgb_batch(KINDS, is_training=True)
    fixed = {"noise": fixed_noise(inputs), "timesteps": torch.full((len(KINDS), 2), 0.4)}
    given = model(**inputs, **fixed)
    cached = model(**with_latents(model, inputs), **fixed)
    assert given.loss_rec_image > 0
    for name in ("loss", "loss_rec_image", "loss_se_image", "loss_kl", "predicted_latents"):
        assert_close(getattr(given, name), getattr(cached, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("class_name", CLASSES)
def test_generated_images_are_rgb_in_the_size_of_their_grid(models, class_name):
    out = models[class_name].generate(
        **rgb_batch(["class_to_image", "both", "text"]), num_inference_steps=2, generator=generators(range(3))
    )
    assert [[tuple(image.shape) for image in images] for images in out.images] == [[(3, HEIGHT, WIDTH)]] * 2 + [[]]
    assert all(image.abs().max() <= 1 for images in out.images for image in images)


def test_a_caption_is_the_same_from_pixels_and_from_latents(model):
    inputs = rgb_batch(["caption", "caption"])
    one, other = (
        model.generate(**given, num_inference_steps=3, generator=generators([0, 1])).sequences
        for given in (inputs, with_latents(model, inputs))
    )
    assert torch.equal(one, other)


def test_previews_are_decoded_to_pixels(model):
    shapes = []

    def look(model, step, timesteps, tensors):
        shapes.append(tensors["decode"]().images[0][0].shape)

    model.generate(**rgb_batch(["class_to_image"]), num_inference_steps=2, callback_on_step_end=look)
    assert shapes == [(3, HEIGHT, WIDTH)] * 2


def test_a_partly_known_image_keeps_its_known_pixels_or_latents(model):
    inputs = rgb_batch(["both"], is_training=True)
    del inputs["labels"]
    first = (inputs["input_ids"] == 11).nonzero()[0, 1]
    inputs["target_mask"][:, first] = 0  # the upper left patch is known
    out = model.generate(**inputs, num_inference_steps=2).images[0][0]
    assert_close(out[:, :4, :4], inputs["pixel_values"][0, :, :4, :4])
    assert not torch.allclose(out[:, 4:, 4:], inputs["pixel_values"][0, :, 4:, 4:])
    cached = model.generate(**with_latents(model, inputs), num_inference_steps=2, generator=generators([0]))
    autoencoder, seen = model.model.pixel_autoencoder, []
    hook = autoencoder.autoencoder.post_quant_conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.generate(**with_latents(model, inputs), num_inference_steps=2, generator=generators([0]))
    hook.remove()
    latents = autoencoder.encode(inputs["pixel_values"])
    assert_close(seen[0][0, :, :2, :2] * 0.18215, latents[0, :, :2, :2], atol=1e-6, rtol=1e-5)
    assert cached.images[0][0].shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, z: i | {"image_latents": z}, r"both `pixel_values` and `image_latents`; give one of them"),
        (
            lambda i, z: i | {"pixel_values": rgb_pixels()[:, :1]},
            r"`pixel_values` has shape .*\(images, 3, height, width\)",
        ),
        (lambda i, z: i | {"pixel_values": rgb_pixels() * 3}, r"`pixel_values` ranges from .*must lie in \[-1, 1\]"),
        (
            lambda i, z: i | {"pixel_values": rgb_pixels(1, 8, 8)},
            r"up to 8x12 pixels, `pixel_values` is only 8x8; make",
        ),
        (lambda i, z: i | {"pixel_values": None}, r"`pixel_values` is None; pass the pixels"),
        (lambda i, z: _latents(i, z[:, :3]), r"`image_latents` has shape \(1, 3, 4, 6\); it must be \(images, 4, hei"),
        (lambda i, z: _latents(i, z[:, :, :3]), r"`image_latents` is 3x6, not a multiple of patch_size 2; encode ima"),
        (lambda i, z: _latents(i, z[:, :, :2]), r"up to 4x6 latents, `image_latents` is only 2x6; make them agree"),
        (lambda i, z: _latents(i, z * torch.nan), r"`image_latents` holds NaN or infinity; all values must be finite"),
        (
            lambda i, z: _latents(i, z.repeat(2, 1, 1, 1)),
            r"`image_latents` holds 2 image\(s\), `input_ids` has places",
        ),
        (lambda i, z: _latents(i, z.long()), r"`image_latents` has dtype torch.int64; it must hold floats"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(model, change, message):
    inputs = rgb_batch(["caption"])
    changed = change(inputs, model.model.pixel_autoencoder.encode(inputs["pixel_values"]))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**changed)


def _latents(inputs: dict, latents: torch.Tensor) -> dict:
    return inputs | {"pixel_values": None, "image_latents": latents}


def test_latents_for_a_model_without_an_autoencoder_are_refused():
    inputs = batch(["caption"])
    with pytest.raises(
        ValueError, match=r"`image_latents` for a model without a pixel autoencoder; pass the images as"
    ):
        MDMForMultiModalGeneration(tiny_config())(**_latents(inputs, torch.zeros(1, 1, 4, 6)))


# From pictures to pictures


@pytest.fixture(scope="module")
def whole(folders) -> tuple[MDMForMultiModalGeneration, MDMProcessor]:
    model = model_with(folders["AutoencoderKL"], vae_config=tiny_config().vae_config.to_dict() | {"vocab_size": 384})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CARD)
    image_processor = MDMImageProcessorPil.for_model(
        model.config, size={"height": 16, "width": 16}, aspect_ratio_buckets=True
    )
    return model, MDMProcessor(image_processor, tokenizer, max_new_tokens=4)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def to_learn(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": "a three"}, {"role": "assistant", "content": list(parts)}]


def test_pictures_of_several_shapes_go_through_buckets_to_losses_and_back_to_pictures(whole):
    model, processor = whole
    pictures = [picture(30, 50), picture(64, 32), picture(20, 20)]
    conversations = [to_learn({"type": "image", "image": one}) for one in pictures]
    inputs = processor.apply_chat_template(conversations)
    grids = inputs["image_grid_hw"].tolist()
    assert grids == [[3, 5], [5, 3], [4, 4]]
    assert model(**inputs).loss.isfinite()
    for one, (h, w) in zip(pictures, grids, strict=True):
        asked = processor(images=one, text="a three", generate="image", image_size=(4 * h, 4 * w))
        out = model.generate(**asked, num_inference_steps=2)
        [result] = processor.post_process_multimodal_output(out)
        assert [(made.mode, made.size) for made in result["images"]] == [("RGB", (4 * w, 4 * h))]


def test_latents_in_messages_give_the_same_inputs_as_their_pictures(whole):
    model, processor = whole
    pictures = [picture(30, 50), picture(64, 32)]
    given = processor.apply_chat_template([to_learn({"type": "image", "image": one}) for one in pictures])
    patch = model.config.vae_config.patch_size
    sizes = [(4 * h, 4 * w) for h, w in given["image_grid_hw"].tolist()]
    latents = model.model.pixel_autoencoder.encode_padded(given["pixel_values"], sizes)
    parts = [
        z[:, : h * patch, : w * patch] for z, (h, w) in zip(latents, given["image_grid_hw"].tolist(), strict=True)
    ]
    forms = [parts[0].bfloat16().float().numpy(), parts[1].bfloat16()]
    cached = processor.apply_chat_template([to_learn({"type": "image", "latents": one}) for one in forms])
    assert set(cached) == set(given) - {"pixel_values"} | {"image_latents"}
    for name in set(given) - {"pixel_values"}:
        assert torch.equal(cached[name], given[name]), name
    assert torch.equal(cached["image_latents"], latents.bfloat16().float())
    assert model(**cached).loss.isfinite()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            [np.zeros((4, 4), np.float32)],
            r"Got latents of dtype float32 and shape \(4, 4\); need floats \(channels, h",
        ),
        ([np.zeros((4, 4, 4), np.int64)], r"Got latents of dtype int64 .*; take them from LatentCache"),
        ([np.zeros((4, 3, 4), np.float32)], r"height and width multiples of 2; take them"),
        ([np.zeros((4, 2, 2), np.float32), np.zeros((3, 2, 2), np.float32)], r"as many channels in all of a batch"),
    ],
)
def test_latents_that_are_none_are_refused(whole, parts, message):
    with pytest.raises(ValueError, match=message):
        whole[1].apply_chat_template([to_learn({"type": "image", "latents": one}) for one in parts])


def test_pictures_and_latents_in_one_batch_are_refused(whole):
    latents = {"type": "image", "latents": np.zeros((4, 4, 4), np.float32)}
    with pytest.raises(
        ValueError, match=r"Got 1 image\(s\) as pictures and 1 as latents in one batch; need all of one"
    ):
        whole[1].apply_chat_template([to_learn({"type": "image", "image": picture(8, 8)}), to_learn(latents)])


def test_target_latents_of_another_size_than_image_size_are_refused(whole):
    processor = whole[1]
    messages = to_learn({"type": "image", "latents": np.zeros((4, 4, 6), np.float32)})
    height, width = (side * processor.patch_size for side in (2, 3))
    expected = processor.apply_chat_template(messages)
    given = processor.apply_chat_template(messages, image_size=(height, width))
    assert all(torch.equal(given[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match=r"Got target latents of a picture of 8x12 pixels where image_size is 12x8; "):
        processor.apply_chat_template(messages, image_size=(width, height))
