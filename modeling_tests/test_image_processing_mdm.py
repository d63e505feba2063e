"""The image processor: pixels in [-1, 1], grids in patches, and what it refuses."""

import base64
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from mdm_hf import MDMConfig
from mdm_hf.image_processing_mdm import MDMImageProcessorPil, buckets_of_area


def processor(height: int = 8, width: int = 8, **options) -> MDMImageProcessorPil:
    options = {"patch_size": 2, "num_channels": 1} | options
    return MDMImageProcessorPil(size={"height": height, "width": width}, **options)


def grey(height: int = 8, width: int = 8, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8))


def colour(height: int = 8, width: int = 8, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_pixels_run_from_minus_one_for_black_to_one_for_white() -> None:
    image = Image.fromarray(np.array([[0, 255], [51, 204]], dtype=np.uint8))
    out = processor(2, 2)(image, return_tensors="pt")
    assert out["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(out["pixel_values"], torch.tensor([[[[-1.0, 1.0], [-0.6, 0.6]]]]))
    assert out["image_grid_hw"].tolist() == [[1, 1]]
    assert out["image_grid_hw"].dtype == torch.int64


@pytest.mark.parametrize(("picture", "num_channels"), [(grey, 1), (colour, 3)])
def test_postprocess_inverts_the_processor(picture, num_channels: int) -> None:
    images = [picture(8, 12, seed) for seed in range(4)]
    tensors = processor(8, 12, num_channels=num_channels)(images, return_tensors="pt")["pixel_values"]
    back = processor(num_channels=num_channels).postprocess(list(tensors))
    assert [image.mode for image in back] == [images[0].mode] * 4
    for image, original in zip(back, images, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(original))


def test_postprocess_clips_what_lies_outside() -> None:
    [image] = processor().postprocess([torch.tensor([[[-3.0, 3.0]]])])
    assert np.asarray(image).tolist() == [[0, 255]]


def test_images_of_several_sizes_are_padded_with_zero_at_the_bottom_and_the_right() -> None:
    images = [grey(4, 8, 1), grey(6, 2, 2)]
    out = processor(do_resize=False)(images, return_tensors="pt")
    assert out["pixel_values"].shape == (2, 1, 6, 8)
    assert out["image_grid_hw"].tolist() == [[2, 4], [3, 1]]
    for row, image in zip(out["pixel_values"], images, strict=True):
        alone = processor(do_resize=False)(image, return_tensors="pt")["pixel_values"][0]
        height, width = alone.shape[1:]
        assert torch.equal(row[:, :height, :width], alone)
        assert row[:, height:].abs().sum() == 0
        assert row[:, :, width:].abs().sum() == 0


def test_images_are_resized_to_the_size_and_only_then() -> None:
    assert processor(8, 4)(grey(31, 17), return_tensors="pt")["pixel_values"].shape == (1, 1, 8, 4)
    assert processor()(grey(31, 17), size={"height": 4, "width": 4}, return_tensors="pt")[
        "image_grid_hw"
    ].tolist() == [[2, 2]]
    assert processor(do_resize=False)(grey(30, 18), return_tensors="pt")["image_grid_hw"].tolist() == [[15, 9]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "F"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_every_mode_of_pillow_is_converted(mode: str, num_channels: int) -> None:
    image = Image.new("I;16", (8, 8)) if mode == "I;16" else colour().convert(mode)
    out = processor(num_channels=num_channels)(image, return_tensors="pt")
    assert out["pixel_values"].shape == (1, num_channels, 8, 8)


def test_sixteen_bit_images_keep_their_contrast() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    out = processor()(Image.open(BytesIO(png(Image.fromarray(ramp)))), return_tensors="pt")["pixel_values"]
    assert out.flatten().tolist() == pytest.approx(np.linspace(-1, 1, 64), abs=0.01)


def test_what_is_transparent_shows_white() -> None:
    out = processor()(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), return_tensors="pt")
    assert torch.all(out["pixel_values"] == 1)


def test_a_photo_is_turned_upright() -> None:
    image = grey(4, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    buffer = BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    out = processor(do_resize=False)(buffer.getvalue(), return_tensors="pt")["pixel_values"]
    upright = processor(do_resize=False)(image.rotate(-90, expand=True), return_tensors="pt")["pixel_values"]
    assert torch.equal(out, upright)


def test_paths_bytes_arrays_and_tensors_of_one_picture_agree(tmp_path: Path) -> None:
    image = colour()
    path = tmp_path / "picture.png"
    path.write_bytes(png(image))
    array = np.asarray(image)
    forms = [
        image,
        path,
        str(path),
        png(image),
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array.copy()),
        torch.from_numpy(array.transpose(2, 0, 1).copy()).float(),
    ]
    outs = [processor(num_channels=3)(form, return_tensors="pt")["pixel_values"] for form in forms]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])
    stack = np.stack([array, array])
    assert processor(num_channels=3)(stack)["pixel_values"].shape == (2, 3, 8, 8)
    together = processor(num_channels=3)([image, path, png(image)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(together, outs[0].expand(3, -1, -1, -1))


@pytest.mark.parametrize("size", [8, 6], ids=["as-it-is", "resized"])
def test_floats_from_0_to_1_are_the_picture_that_0_to_255_are(size: int) -> None:
    levels = np.asarray(colour())
    unit = levels / 255
    dim = np.where(levels > 127, 1, 0).astype(np.uint8) * np.uint8(255)
    take = processor(size, size, num_channels=3)
    whole = take(levels)["pixel_values"]
    tensor = torch.from_numpy(unit)
    for form in (unit, unit.astype(np.float16), tensor, tensor.float(), tensor.bfloat16()):
        atol = 0.02 if form.dtype in (torch.bfloat16, np.float16) else 1e-6
        np.testing.assert_allclose(take(form)["pixel_values"], whole, atol=atol)
    np.testing.assert_allclose(take(dim > 0)["pixel_values"], take(dim)["pixel_values"], atol=1e-6)
    mixed = take([levels, unit])["pixel_values"]
    np.testing.assert_allclose(mixed[0], mixed[1], atol=1e-6)
    grey_levels = np.asarray(grey())
    as_pil = processor(size, size)([grey(), Image.fromarray((grey_levels / 255).astype(np.float32))])["pixel_values"]
    np.testing.assert_allclose(as_pil[0], as_pil[1], atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64, np.int16, np.uint16])
def test_numbers_from_0_to_255_of_any_type_are_resized_alike(dtype) -> None:
    levels = np.asarray(colour(16, 16))
    take = processor(num_channels=3)
    expected = take(levels)["pixel_values"]
    assert np.array_equal(take(levels.astype(dtype))["pixel_values"], expected)
    if np.dtype(dtype).kind == "f":
        between = levels.astype(dtype) + dtype(0.25) * (levels < 255)
        np.testing.assert_allclose(take(between)["pixel_values"], expected, atol=2 / 255)


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.linspace(-1, 1, 256), "pixels from -1 to 1;"),
        (np.arange(256, dtype=np.int16) - 300, "pixels from -300 to -45;"),
        (np.arange(256, dtype=np.uint16) * 257, "pixels from 0 to 65535;"),
    ],
    ids=["normalised", "negative", "sixteen-bit"],
)
def test_numbers_that_cannot_be_resized_are_told_what_is_needed(array, told) -> None:
    with pytest.raises(ValueError, match=f"Got an image to resize with {told} need 0 to 255; give values from 0 to"):
        processor()(array.reshape(16, 16))


def test_floats_from_0_to_1_keep_their_place_among_images_of_several_sizes() -> None:
    small, large = np.asarray(grey(4, 8)), np.asarray(grey(6, 2, 2))
    take = processor(do_resize=False)
    expected = take([small, large])["pixel_values"]
    np.testing.assert_allclose(take([small / 255, large])["pixel_values"], expected, atol=1e-6)


@pytest.mark.parametrize("array", [np.zeros((8, 8), complex), np.zeros((8, 8), object), np.zeros((0, 8))])
def test_arrays_that_hold_no_picture_are_refused(array) -> None:
    with pytest.raises(ValueError, match=r"Got an image array of dtype .* need whole .* no side of 0; convert it"):
        processor()(array)


@pytest.mark.parametrize(
    "array", [np.zeros((8, 8, 3)), np.zeros((4, 8, 8)), torch.zeros(3, 8, 8), np.zeros((2, 3, 4, 5, 6))]
)
def test_a_wrong_number_of_channels_is_refused(array) -> None:
    with pytest.raises(ValueError, match=r"Got an image array of shape .*need 1 channel\(s\): .*give a PIL image"):
        processor()(array)


def test_arrays_have_their_channels_where_it_is_said_or_where_they_fit() -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 16, 3), dtype=np.uint8)
    take = processor(1, 1, num_channels=3, patch_size=1, do_resize=False)
    first, last = (take(array, input_data_format=f"channels_{at}")["pixel_values"][0] for at in ("first", "last"))
    assert np.array_equal(first, take(array)["pixel_values"][0])
    assert np.array_equal(last, take(array.transpose(2, 0, 1))["pixel_values"][0])
    assert np.array_equal(last, take(Image.fromarray(array), input_data_format="channels_first")["pixel_values"][0])
    as_saved = processor(1, 1, num_channels=3, patch_size=1, do_resize=False, input_data_format="channels_last")
    assert np.array_equal(last, as_saved(array)["pixel_values"][0])
    with pytest.raises(ValueError, match=r"Got an image array of shape \(3, 16, 8\); need 3 channel"):
        take(np.zeros((3, 16, 8), np.uint8), input_data_format="channels_last")
    with pytest.raises(ValueError, match="Got input_data_format='last'; need one of channels_first, channels_last; l"):
        take(array, input_data_format="last")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_center_crop": True, "crop_size": {"height": 4, "width": 4}}, "Got do_center_crop=True; need `aspect_ra"),
        ({"do_pad": True}, "Got do_pad=True; need pictures padded to the largest of the call, as they are; leave"),
        ({"do_convert_rgb": True}, "Got do_convert_rgb=True with num_channels=1, which says .* need 3 for RGB"),
        ({"data_format": "channels_last"}, "Got data_format='channels_last'; need pixel values with their channels"),
        ({"device": "cpu"}, r"Got device='cpu'; need .* call \.to\(device\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_only_other_image_processors_do_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor()(grey(), **options)
    assert processor(num_channels=3)(grey(), do_convert_rgb=True)["pixel_values"].shape == (1, 3, 8, 8)
    idle = dict.fromkeys(options, False) if "do_pad" in options else dict.fromkeys(options)
    assert processor()(grey(), **idle)["pixel_values"].shape == (1, 1, 8, 8)


def test_a_side_that_is_no_multiple_of_the_patch_names_the_nearest_sizes() -> None:
    with pytest.raises(
        ValueError, match=r"Image height 250 is not a multiple of patch_size 16; resize to 240 or 256\."
    ):
        processor(do_resize=False, patch_size=16)(grey(250, 256))
    with pytest.raises(ValueError, match=r"Image width 7 is not a multiple of patch_size 16; resize to 16\."):
        processor(do_resize=False, patch_size=16)(grey(16, 7))
    with pytest.raises(ValueError, match=r"Image width 9 is not a multiple of patch_size 2; resize to 8 or 10\."):
        processor(8, 9)
    with pytest.raises(ValueError, match=r"Got a size without height; need both sides"):
        processor().grid_of(None, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_refused(bad: float) -> None:
    array = np.zeros((8, 8), dtype=np.float32)
    array[3, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        processor()(array)
    with pytest.raises(ValueError, match="NaN or infinity"):
        processor().postprocess([torch.from_numpy(array)[None]])


def test_pixels_that_were_already_normalised_are_refused() -> None:
    array = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    with pytest.raises(ValueError, match=r"become -1\.00784 to .*need \[-1, 1\]; give values from 0 to 255, or"):
        processor()(array)
    with pytest.raises(ValueError, match=r"need \[-1, 1\]"):
        processor(do_rescale=False)(grey())
    out = processor(do_rescale=False, do_normalize=False)(array, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(out[0, 0], torch.from_numpy(array))


def test_an_image_over_the_limit_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (5000, 4000)).save(path)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"4000x5000 = 20000000 pixels; need at most max_pixels = 16777216"):
        processor()(path)
    with pytest.raises(ValueError, match=r"need at most max_pixels = 15; give a smaller image"):
        processor(max_pixels=15)(np.zeros((4, 4), dtype=np.uint8))


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (Image.fromarray(np.full((16, 16), np.nan, np.float32)), "mode F .* pixels from nan to nan, where 0 to 255"),
        (Image.fromarray(np.full((16, 16), -5, np.float32)), "pixels from -5 to -5, where 0 to 255 are needed"),
        (Image.fromarray(np.full((16, 16), 70_000, np.int32)), "mode I .* pixels from 70000 to 70000, where 0 to"),
        (Image.new("LAB", (16, 16)), "mode LAB .* need one that is open and can become grey or RGB; convert it"),
        (Image.new("L", (0, 16)), "Got an image of 16x0 pixels; need some"),
    ],
)
def test_pictures_that_would_be_guessed_at_are_refused(image, told) -> None:
    with pytest.raises(ValueError, match=told.replace(" .* pixels", r" .*pixels")):
        processor()(image)
    closed = colour(16, 16)
    closed.close()
    with pytest.raises(ValueError, match=r"cannot be read \(Operation on closed image\); need one that is open"):
        processor()(closed)


def png_that_declares(height: int, width: int) -> bytes:
    """A file of under 100 bytes with a whole header and no more."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["bytes", "data URL", "path"])
@pytest.mark.parametrize(("side", "message"), [(30_000, "too many pixels, 900000000"), (5000, "25000000 pixels")])
def test_a_picture_of_too_many_pixels_is_told_how_many_are_allowed_in_any_form(tmp_path, form, side, message) -> None:
    content = png_that_declares(side, side)
    (tmp_path / "bomb.png").write_bytes(content)
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    source = {"bytes": content, "data URL": url, "path": tmp_path / "bomb.png"}[form]
    with pytest.raises(ValueError, match=f"{message}; need at most max_pixels = 16777216; give a smaller"):
        processor()(source)


def test_a_data_url_gives_the_pixels_that_its_file_gives() -> None:
    image = colour().convert("RGBA")
    image.putalpha(grey(seed=1))
    content = png(image)
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    by_bytes, by_url = (processor(num_channels=3)(source)["pixel_values"][0] for source in (content, url))
    assert np.array_equal(by_bytes, by_url)


@contextmanager
def served(files: dict[str, bytes]) -> Iterator[str]:
    """The address of a server of `files`."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.send_response(200 if self.path in files else 404)
            self.end_headers()
            self.wfile.write(files.get(self.path, b"not here"))

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_gives_what_the_file_behind_it_gives() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    deep = Image.fromarray((np.arange(64).reshape(8, 8) * 1000).astype(np.uint16))
    files = {f"/{name}.png": png(image) for name, image in (("clear", clear), ("deep", deep))}
    with served(files) as address:
        for name, content in files.items():
            by_bytes, by_url = (processor()(source)["pixel_values"][0] for source in (content, address + name))
            assert np.array_equal(by_bytes, by_url)
        with pytest.raises(ValueError, match="Got an image mask of mode RGBA that is transparent in places"):
            processor().patch_mask(f"{address}/clear.png", (4, 4))
        with pytest.raises(ValueError, match=r"none\.png', which cannot be opened .*404.*; check the path or the add"):
            processor()(f"{address}/none.png")


def test_a_large_picture_behind_an_address_is_refused_before_it_is_decoded(monkeypatch) -> None:
    decoded: list[tuple[int, int]] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image.size))
    told = "Got an image of 40x40 = 1600 pixels; need at most max_pixels = 1000"
    with served({"/large.png": png(grey(40, 40))}) as address, pytest.raises(ValueError, match=told):
        processor(max_pixels=1000)(f"{address}/large.png")
    assert not decoded


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a picture")
    with pytest.raises(ValueError, match=r"notes\.txt.*holds no image that Pillow can read; give a PNG"):
        processor()(path)
    for source in ("data:image/png;base64,AAAA", "data:image/png;base64", "data:image/png;base64,!", "a\0b"):
        with pytest.raises(ValueError, match=r"Got '.*, which holds no image .*or its bytes in base64 as a data URL"):
            processor()(source)
    with pytest.raises(ValueError, match=r"Got 5 bytes, which holds no image"):
        processor()(b"bytes")
    for source in (str(tmp_path / "missing.png"), "http://127.0.0.1:9/none.png"):
        with pytest.raises(ValueError, match=r"cannot be opened .*check the path or the address"):
            processor()(source)
    with pytest.raises(ValueError, match=r"Got an image of type int; need a PIL image"):
        processor()(3)
    with pytest.raises(ValueError, match="Got no images; need at least one"):
        processor()([])


def test_a_truncated_file_is_refused_wherever_it_is_cut() -> None:
    whole = png(colour(64, 64))
    for length in range(0, len(whole) - 20, 97):
        with pytest.raises(ValueError, match=r"holds no image|corrupt image"):
            processor()(whole[:length])


def test_a_damaged_file_gives_a_picture_or_a_value_error() -> None:
    whole = bytearray(png(colour(16, 16)))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            damaged[at] = rng.integers(256)
        try:
            processor()(bytes(damaged))
        except ValueError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_channels": 2}, r"Got num_channels 2; need 1 \(grey\) or 3 \(RGB\)"),
        ({"patch_size": 0}, "Got patch_size 0"),
        ({"max_pixels": 0}, "max_pixels 0; need 1 or more"),
        ({"do_center_crop": True}, "Got do_center_crop=True; need `aspect_ratio_buckets` to have pictures cut"),
        ({"pad_size": {"height": 9, "width": 9}}, "Got pad_size=.*9.*; need pictures padded to the largest"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(**options)


def test_postprocess_refuses_what_is_no_image() -> None:
    with pytest.raises(ValueError, match=r"Got an image of shape \(4, 2, 2\); need \(1 or 3, height, width\)"):
        processor().postprocess([torch.zeros(4, 2, 2)])


def test_a_saved_processor_comes_back_equal(tmp_path: Path) -> None:
    original = processor(12, 16, patch_size=4, max_pixels=1000, do_resize=True)
    original.save_pretrained(tmp_path)
    loaded = MDMImageProcessorPil.from_pretrained(tmp_path)
    assert loaded.to_dict() == original.to_dict()
    assert (loaded.patch_size, loaded.num_channels, loaded.max_pixels) == (4, 1, 1000)
    image = colour(20, 20)
    assert np.array_equal(loaded(image)["pixel_values"], original(image)["pixel_values"])


# Buckets


@pytest.mark.parametrize(("height", "width", "patch_size"), [(256, 256, 16), (8, 8, 2), (64, 32, 4), (2, 2, 2)])
def test_buckets_hold_no_more_patches_than_the_size_and_nothing_larger_fits(height, width, patch_size) -> None:
    area = height * width
    buckets = buckets_of_area(height, width, patch_size)
    assert len(set(buckets)) == len(buckets) >= 1
    for h, w in buckets:
        assert h % patch_size == w % patch_size == 0
        assert h * w <= area < min((h + patch_size) * w, h * (w + patch_size))
        assert max(h, w) <= 2 * min(h, w)
    assert {(w, h) for h, w in buckets} == set(buckets_of_area(width, height, patch_size))


def test_an_image_goes_to_the_bucket_nearest_in_aspect_ratio() -> None:
    take = processor(8, 8, aspect_ratio_buckets=True)  # of 16 patches: 3x5, 4x4, 5x3
    nearest = {(30, 50): [3, 5], (90, 100): [4, 4], (64, 20): [5, 3], (6, 10): [3, 5], (1, 9): [3, 5]}
    for (height, width), grid in nearest.items():
        assert take(grey(height, width))["image_grid_hw"].tolist() == [grid], (height, width)
    own = processor(8, 8, aspect_ratio_buckets=[(8, 8), (4, 16)])
    assert own(grey(10, 30))["image_grid_hw"].tolist() == [[2, 8]]
    assert own(grey(30, 10))["image_grid_hw"].tolist() == [[4, 4]]
    assert own(grey(30, 10), aspect_ratio_buckets=[(12, 4)])["image_grid_hw"].tolist() == [[6, 2]]


def test_a_bucket_shows_the_centre_of_the_image_without_squeezing_it() -> None:
    levels = np.zeros((8, 20), dtype=np.uint8)
    levels[:, 6:14] = 255  # the middle 8 columns
    out = processor(8, 8, aspect_ratio_buckets=[(8, 8)])(levels, return_tensors="pt")["pixel_values"]
    assert torch.all(out == 1)
    squeezed = processor(8, 8)(levels, return_tensors="pt")["pixel_values"]
    assert squeezed.min() == -1
    unit = processor(8, 8, aspect_ratio_buckets=[(4, 4)])(levels.T / 255, return_tensors="pt")["pixel_values"]
    assert torch.all(unit == 1)


def test_an_image_that_is_a_bucket_is_left_alone() -> None:
    image = grey(6, 10)
    out = processor(8, 8, aspect_ratio_buckets=True)(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(out, processor(do_resize=False)(image, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("buckets", [True, [[6, 10], [8, 8]], False])
def test_buckets_are_saved_with_the_processor(buckets, tmp_path: Path) -> None:
    original = processor(8, 8, aspect_ratio_buckets=buckets)
    original.save_pretrained(tmp_path)
    loaded = MDMImageProcessorPil.from_pretrained(tmp_path)
    assert loaded.aspect_ratio_buckets == original.aspect_ratio_buckets == buckets
    image = colour(20, 33)
    assert np.array_equal(loaded(image)["pixel_values"], original(image)["pixel_values"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aspect_ratio_buckets": [(8, 8), 4]}, r"Got the bucket 4; need \(height, width\) in pixels, or True for"),
        ({"aspect_ratio_buckets": [(8, 7)]}, r"Image width 7 is not a multiple of patch_size 2; resize to 6 or 8"),
        ({"aspect_ratio_buckets": True, "do_resize": False}, "need do_resize=True; drop one of the two"),
        ({"downsampling": 4}, r"Got downsampling 4 and patch_size 2; need .*use MDMImageProcessorPil\.for_model"),
        ({"downsampling": 0}, r"Got downsampling 0"),
    ],
)
def test_buckets_and_downsampling_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(**options)


def test_the_image_processor_for_a_model_has_its_channels_and_patches() -> None:
    made = MDMImageProcessorPil.for_model(MDMConfig.from_preset("mdm-digits"), size={"height": 8, "width": 8})
    assert (made.num_channels, made.patch_size, made.downsampling) == (1, 2, 1)
