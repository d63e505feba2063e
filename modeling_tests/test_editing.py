"""Claims about targets that are known in part: masks, gaps, strength, and what is frozen while it is denoised."""

import re
from io import BytesIO
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import LATENT, batch, generators, tiny_model, tiny_pipeline

from mdm_hf import MDMConfig, MDMForMultiModalGeneration, MDMImageProcessorPil, MDMPipeline, MDMProcessor
from mdm_hf.denoiser import Denoiser
from mdm_hf.noise_schedule import alpha_bar
from mdm_hf.training.digits import DigitsSource
from mdm_hf.training.gaps import drawn_box, drawn_span, scattered_cells, scattered_words, with_gaps
from mdm_hf.training.trainer import ConversationCollator


CANVAS = 8
UPPER = np.repeat([True, False], [4, 4])[:, None].repeat(8, 1)  # of 8x8 pixels


@pytest.fixture(scope="module")
def pipe() -> MDMPipeline:
    return tiny_pipeline(num_inference_steps=3)


@pytest.fixture(scope="module")
def processor(pipe) -> MDMProcessor:
    return pipe.processor


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8))


def answer(*parts: dict) -> list[dict]:
    return [{"role": "assistant", "content": list(parts)}]


def targets(processor, inputs, row: int = 0) -> list[str]:
    ids = inputs["input_ids"][row][inputs["target_mask"][row] == 1]
    return processor.tokenizer.convert_ids_to_tokens(ids.tolist())


def test_a_mask_over_a_picture_makes_targets_of_the_patches_that_it_touches(processor, tmp_path) -> None:
    one_pixel = np.zeros((8, 8))
    one_pixel[5, 3] = 1
    Image.fromarray(UPPER).save(tmp_path / "mask.png")
    masks = (UPPER, range(8)), (one_pixel, [9]), (Image.fromarray(UPPER), range(8)), (tmp_path / "mask.png", range(8))
    for mask, marked in masks:
        inputs = processor.apply_chat_template(answer({"type": "image", "image": picture(), "mask": mask}))
        ids, target = inputs["input_ids"][0], inputs["target_mask"][0]
        patches = (ids == processor.image_token_id).nonzero().flatten()
        assert target[patches].nonzero().flatten().tolist() == list(marked)
        assert target.sum() == len(marked)
        assert inputs["pixel_values"].shape == (1, 1, 8, 8)


def test_a_mask_is_laid_over_the_picture_as_the_picture_is_processed() -> None:
    plain = MDMImageProcessorPil(size={"height": 8, "width": 8}, patch_size=2, num_channels=1)
    tall = np.zeros((12, 4), dtype=np.uint8)
    tall[:3] = 255
    assert plain.patch_mask(tall, (4, 4)).tolist() == [[True] * 4] + [[False] * 4] * 3
    assert plain.patch_mask(torch.tensor(tall), (3, 2)).tolist() == [[True] * 2] + [[False] * 2] * 2
    cut = MDMImageProcessorPil(
        size={"height": 8, "width": 8}, patch_size=2, num_channels=1, aspect_ratio_buckets=[[8, 8]]
    )
    tall[:5] = 255
    assert cut.patch_mask(tall, (4, 4)).tolist() == [[True] * 4] + [[False] * 4] * 3  # rows 4 to 7 are left
    assert cut.patch_mask(tall, (4, 4), is_cut=False).tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    tall[4:] = 0
    with pytest.raises(
        ValueError, match="Got an image mask of 12x4 that marks nothing of what is left .* 4x4 patches"
    ):
        cut.patch_mask(tall, (4, 4))


def patches_made(processor, part: dict, **options) -> list[list[int]]:
    inputs = processor.apply_chat_template(answer({"type": "image"} | part), **options)
    is_patch = inputs["input_ids"][0] == processor.image_token_id
    return inputs["target_mask"][0][is_patch].view(*inputs["image_grid_hw"][0].tolist()).tolist()


def test_a_mask_is_cut_where_its_picture_is_and_nowhere_else(pipe) -> None:
    cutting = MDMImageProcessorPil(
        size={"height": 8, "width": 8}, patch_size=2, num_channels=1, aspect_ratio_buckets=[[8, 8]]
    )
    processor = MDMProcessor(cutting, pipe.processor.tokenizer)
    marked = np.zeros((16, 8), dtype=bool)
    marked[:6] = True
    part = {"image": Image.new("L", (8, 16)), "mask": marked}
    assert patches_made(processor, part) == [[1] * 4] + [[0] * 4] * 3  # rows 4 to 11 are left
    assert patches_made(processor, part, image_size=(16, 8)) == [[1] * 4] * 3 + [[0] * 4] * 5
    assert patches_made(processor, part, image_size=(8, 8)) == [[1] * 4] * 2 + [[0] * 4] * 2
    assert patches_made(processor, part, do_resize=False) == [[1] * 4] * 3 + [[0] * 4] * 5
    assert patches_made(processor, part, aspect_ratio_buckets=False) == [[1] * 4] * 2 + [[0] * 4] * 2
    assert patches_made(pipe.processor, part, aspect_ratio_buckets=[[8, 8]]) == [[1] * 4] + [[0] * 4] * 3


def test_a_mask_is_over_the_picture_as_it_is_seen(processor) -> None:
    turned = Image.new("L", (24, 8))
    turned.getexif()[0x0112] = 6  # seen as 24 high and 8 wide
    stored = BytesIO()
    turned.save(stored, "JPEG", exif=turned.getexif())
    upper = np.repeat([True, False], [12, 12])[:, None].repeat(8, 1)
    for picture in (stored.getvalue(), Image.open(stored)):
        assert patches_made(processor, {"image": picture, "mask": upper}) == [[1] * 4] * 2 + [[0] * 4] * 2
        with pytest.raises(ValueError, match="Got an image mask of 8x24 over a picture of 24x8 pixels, height and .*"):
            patches_made(processor, {"image": picture, "mask": upper.T})
    for scaled in (upper[::3, ::3], upper.repeat(3, 0).repeat(3, 1), UPPER, UPPER[::2, ::2]):  # or as it is processed
        assert patches_made(processor, {"image": stored.getvalue(), "mask": scaled}) == [[1] * 4] * 2 + [[0] * 4] * 2
    lying = BytesIO()
    Image.fromarray(upper.T.astype(np.uint8) * 255).save(lying, "PNG", exif=turned.getexif())
    for mask in (lying.getvalue(), Image.fromarray(upper)):  # a mask is turned upright too
        made = patches_made(processor, {"image": stored.getvalue(), "mask": mask})
        assert made == [[1] * 4] * 2 + [[0] * 4] * 2


def test_the_blank_before_a_word_of_several_tokens_is_made_with_it(processor) -> None:
    for text, mask in (("a xq three", [(2, 4)]), ("a xq", [(2, None)])):
        spelt = processor.tokenizer(" xq", add_special_tokens=False).tokens()
        assert spelt[0] == "▁"
        made = targets(processor, processor.apply_chat_template(answer({"type": "text", "text": text, "mask": mask})))
        assert made[: len(spelt)] == spelt
        assert "▁three" not in made


def test_a_mask_of_none_is_no_mask(processor) -> None:
    shown, asked = {"type": "image", "image": picture()}, {"type": "text", "text": "a three"}
    plain = processor.apply_chat_template([{"role": "user", "content": [shown]}, *answer(asked)])
    empty = {"mask": None}  # as the rows of a data set have it, whose parts all have the same columns
    inputs = processor.apply_chat_template([{"role": "user", "content": [shown | empty]}, *answer(asked | empty)])
    for name in plain:
        assert inputs[name].equal(plain[name])


def test_a_part_holds_one_picture(processor, pipe) -> None:
    marked = {"mask": UPPER}
    one = np.asarray(picture())
    for image in ([picture()], (one,), one[None, None], torch.tensor(one)[None, None]):
        for mask in ({}, marked):
            made = patches_made(processor, {"image": image} | mask)
            assert made == patches_made(processor, {"image": picture()} | mask)
    for several in ([picture(), picture()], np.stack([one[None], one[None]]), []):
        with pytest.raises(ValueError, match=f"Got {len(several)} pictures in an image part; need one; give each a"):
            patches_made(processor, {"image": several})


def test_what_is_black_in_a_mask_picture_marks_nothing(processor) -> None:
    for level in (1, 2, 127):
        with pytest.raises(ValueError, match="Got an image mask of .* that marks nothing"):
            patches_made(processor, {"image": picture(), "mask": Image.fromarray(UPPER.astype(np.uint8) * level)})
    for white in (UPPER.astype(np.uint8) * 128, UPPER):  # modes L and 1
        made = patches_made(processor, {"image": picture(), "mask": Image.fromarray(white)})
        assert made == [[1] * 4] * 2 + [[0] * 4] * 2


def test_a_mask_may_be_no_larger_than_a_picture(processor) -> None:
    limited = MDMImageProcessorPil(size={"height": 8, "width": 8}, patch_size=2, num_channels=1, max_pixels=64)
    with pytest.raises(ValueError, match="Got an image mask of 9x8 pixels; need at most max_pixels = 64; give a smal"):
        limited.patch_mask(Image.new("L", (8, 9), 255), (4, 4))


def test_a_mask_that_is_transparent_is_refused_and_an_opaque_one_is_not(processor) -> None:
    opaque = Image.fromarray(UPPER.astype(np.uint8) * 255).convert("RGBA")
    assert patches_made(processor, {"image": picture(), "mask": opaque}) == [[1] * 4] * 2 + [[0] * 4] * 2
    opaque.putpixel((0, 7), (0, 0, 0, 0))
    with pytest.raises(
        ValueError, match=r"Got an image mask of mode RGBA that is transparent in places, .*; need white"
    ):
        patches_made(processor, {"image": picture(), "mask": opaque})


@pytest.mark.parametrize(
    "mask",
    [
        *(np.zeros((8, 8)), np.ones(8), np.ones((8, 8, 3)), np.array([["a"]]), np.full((8, 8), 100.0), {"a": 1}),
        *(-np.ones((8, 8)), np.full((8, 8), np.nan), np.ones((8, 8), complex), [[1, 0], [1]], [(0, 3)]),
    ],
)
def test_a_mask_that_marks_nothing_is_refused(processor, mask) -> None:
    with pytest.raises(ValueError, match=r"Got an image mask of type (?s:.*) need a picture or .*, white or 1 where"):
        processor.apply_chat_template(answer({"type": "image", "image": picture(), "mask": mask}))


@pytest.mark.parametrize(
    ("mask", "made"),
    [
        ([(2, 13)], ["▁handwritten"]),
        ([(5, 6)], ["▁handwritten"]),  # a token that is touched is made as a whole
        ([(0, 1), (14, 19)], ["▁a", "▁three"]),
        ([(14, None)], ["▁three"] + ["</s>"] * 5),
        ([(19, None)], ["</s>"] * 5),
        ([(0, 2)], ["▁a"]),  # the blank before a word is not the word
        ([(1, 2), (13, 15)], ["▁three"]),
        ([(13, None)], ["▁three"] + ["</s>"] * 5),
        (np.array([[0, 1]]), ["▁a"]),
        ([(np.int64(14), np.int64(19))], ["▁three"]),
        (None, ["▁a", "▁handwritten", "▁three"] + ["</s>"] * 5),
    ],
)
def test_a_mask_of_a_text_makes_targets_of_its_words_and_labels_them(processor, mask, made) -> None:
    part = {"type": "text", "text": "a handwritten three"} | ({} if mask is None else {"mask": mask})
    inputs = processor.apply_chat_template([{"role": "user", "content": "draw"}, *answer(part)])
    assert targets(processor, inputs) == made
    assert (inputs["labels"] >= 0).equal(inputs["target_mask"] == 1)
    wanted = torch.where(inputs["target_mask"] == 1, inputs["input_ids"], -100)
    assert inputs["labels"].equal(wanted)


def test_mask_tokens_stand_for_tokens_to_be_made_and_leave_no_labels(processor) -> None:
    gap = processor.mask_token
    inputs = processor.apply_chat_template(answer({"type": "text", "text": f"a {gap}{gap} three"}))
    assert targets(processor, inputs) == [gap, gap]
    assert "labels" not in inputs
    masked = {"text": f"a {gap} three", "mask": [(0, 1)]}, {"text": gap, "mask": [(0, len(gap))]}
    for part, made in zip(masked, (["▁a", gap], [gap]), strict=True):  # whatever else a mask marks
        assert targets(processor, processor.apply_chat_template(answer({"type": "text"} | part))) == made
    both = processor.apply_chat_template(answer({"type": "image"}, {"type": "text"}))
    assert targets(processor, both) == ["<|image_target|>"] * 16 + [gap] * CANVAS
    assert "labels" not in both
    assert both["input_ids"].equal(processor()["input_ids"])


@pytest.mark.parametrize(
    "mask",
    [
        *([(3, 2)], [(0, 99)], [(20, None)], "all", [(0.5, 2)], [(1,)], [(-1, 2)], [[None, 3]], 5, [5], ["ab"]),
        np.ones((8, 8)),
    ],
)
def test_a_text_mask_outside_its_text_is_refused(processor, mask) -> None:
    with pytest.raises(
        ValueError, match=r"Got the text mask (?s:.*) for 'a handwritten three'; need a list of \(start, end"
    ):
        processor.apply_chat_template(answer({"type": "text", "text": "a handwritten three", "mask": mask}))


def test_what_no_mask_can_mean_is_refused(processor) -> None:
    with pytest.raises(ValueError, match=r"Got a text mask \[\(1, 2\)\] that touches no token of 'a three'; widen it"):
        processor.apply_chat_template(answer({"type": "text", "text": "a  three", "mask": [(1, 2)]}))
    for part in (
        {"type": "image", "image": picture(), "mask": UPPER},
        {"type": "text", "text": "a", "mask": [(0, 1)]},
    ):
        with pytest.raises(
            ValueError, match=f"Got a mask in an? {part['type']} part that is no target; need it in the"
        ):
            processor.apply_chat_template([{"role": "user", "content": [part]}], generate="text")
    for text, mask, remedy in (
        ("a three", [], "; to keep a text whole, leave it out of what is made, and say it as a condition"),
        ("a a a a a a a a", [(15, None)], "; the text fills its canvas of max_new_tokens = 8: raise that"),
    ):
        with pytest.raises(ValueError, match=r"Got a text mask \[.*\] that touches no token of .*" + remedy):
            processor.apply_chat_template(answer({"type": "text", "text": text, "mask": mask}))
    with pytest.raises(
        ValueError, match="Got an image part with a mask and no picture; need .*; add it, or leave the"
    ):
        processor.apply_chat_template(answer({"type": "image", "mask": UPPER}))
    with pytest.raises(ValueError, match="it marks gaps in the parts of a last assistant message alone"):
        processor(text=f"a {processor.mask_token}")


def test_inpainting_keeps_every_known_pixel_to_the_bit(pipe) -> None:
    given = picture(1)
    results = pipe(text="a three", canvas={"type": "image", "image": given, "mask": UPPER}, num_return_sequences=3)
    for result in results:
        made = np.asarray(result["images"][0])
        assert (made[~UPPER] == np.asarray(given)[~UPPER]).all()
        assert (made[UPPER] != np.asarray(given)[UPPER]).any()
    assert len({result["images"][0].tobytes() for result in results}) == 3


def test_infilling_keeps_every_known_word(pipe) -> None:
    gap = pipe.processor.mask_token
    canvas = {"type": "text", "text": f"a {gap} {gap} three"}
    for result in pipe(images=picture(), canvas=canvas, num_return_sequences=4, seed=0):
        assert result["text"][0].startswith("a")
        assert result["text"][0].endswith("three")
    for text, known in (("É 😀\tis  three", "É 😀 is"), ("№ 3 is three", "No 3 is")):  # as the tokenizer has it
        spelt = {"type": "text", "text": text, "mask": [(text.index("three"), len(text))]}
        assert pipe(canvas=spelt, max_new_tokens=32, seed=0)[0]["text"][0].startswith(known)
    continued = {"type": "text", "text": "a handwritten", "mask": [(13, None)]}
    assert pipe(images=picture(), canvas=continued, seed=0)[0]["text"][0].startswith("a handwritten")


def test_a_text_does_not_end_in_a_gap_before_its_known_words(pipe, monkeypatch) -> None:
    vae, gap, ends = pipe.model.model.vae, pipe.processor.mask_token, pipe.model.config.end_token_ids
    decode = vae.decode_tokens

    def ending(latents):
        logits = decode(latents)
        logits[..., ends] = 100.0
        return logits

    monkeypatch.setattr(vae, "decode_tokens", ending)
    [infilled] = pipe(images=picture(), canvas={"type": "text", "text": f"a {gap} three"}, seed=0)
    assert infilled["text"][0].startswith("a")
    assert infilled["text"][0].endswith("three")
    assert pipe(images=picture(), generate="text", seed=0)[0]["text"] == [""]


def test_a_canvas_of_new_parts_is_the_plain_call(pipe) -> None:
    plain = pipe(class_ids=3, seed=0)
    canvas = pipe(class_ids=3, canvas=[{"type": "image"}, {"type": "text"}], seed=0)
    assert plain[0]["text"] == canvas[0]["text"]
    assert plain[0]["images"][0].tobytes() == canvas[0]["images"][0].tobytes()


def test_each_prompt_may_have_a_canvas_of_its_own(pipe) -> None:
    parts = [{"type": "image", "image": picture(i), "mask": UPPER} for i in range(2)]
    together = pipe(text=["a", "b"], canvas=[[part] for part in parts], seed=5)
    alone = [pipe(text=text, canvas=part, seed=5 + i) for i, (text, part) in enumerate(zip("ab", parts, strict=True))]
    for one, (other,) in zip(together, alone, strict=True):
        assert one["images"][0].tobytes() == other["images"][0].tobytes()
    with pytest.raises(ValueError, match="prompts that have a canvas and others that have none; need all of one kind"):
        pipe(text=["a", "b"], canvas=[parts[:1], None])
    with pytest.raises(
        ValueError, match="Got generate='image' and a canvas, .* need one of the two; leave `generate`"
    ):
        pipe(canvas=parts[0], generate="image")


def test_strength_starts_from_what_is_known_under_as_much_noise_as_it_says(pipe) -> None:
    model, processor = pipe.model, pipe.processor
    inputs = processor.apply_chat_template(answer({"type": "image", "image": picture()}))
    inputs.pop("labels")
    seen, steps, predict = [], [], Denoiser.predict

    def watch(self, z, tracks, step):
        seen.append((z.clone(), self.noise, tracks[0].times))
        return predict(self, z, tracks, step)

    options = {"num_inference_steps": 10, "generator": generators([0])}
    with mock.patch.object(Denoiser, "predict", watch):
        model.generate(**inputs, strength=0.4, callback_on_step_end=lambda *a: steps.append(a[2]), **options)
    assert len(steps) == len(seen) == 4
    assert steps[-1] == [0.0]
    z, noise, times = seen[0]
    assert times[0] == pytest.approx(0.4, abs=0.01)
    level = alpha_bar(torch.tensor(times[0]), model.model.image_alpha_bar)
    clean = model.model.vae.encode_images(inputs["pixel_values"]).mean.flatten(1, 2)
    wanted = level.sqrt() * clean + (1 - level).sqrt() * noise[:, -17:-1]
    torch.testing.assert_close(z[:, -17:-1], wanted)


def test_the_weaker_the_nearer_to_what_was_given(pipe) -> None:
    given = np.asarray(picture()).astype(float)
    canvas = {"type": "image", "image": picture()}
    nearness = []
    for strength in (0.05, 0.4, 1.0):
        made = pipe(canvas=canvas, strength=strength, num_inference_steps=20, seed=0)[0]["images"][0]
        nearness.append(np.abs(np.asarray(made) - given).mean())
    assert nearness == sorted(nearness)
    whole = pipe(canvas={"type": "image"}, num_inference_steps=20, seed=0)[0]["images"][0]
    again = pipe(canvas=canvas, strength=1.0, num_inference_steps=20, seed=0)[0]["images"][0]
    assert whole.tobytes() == again.tobytes()


def test_a_strength_of_less_than_half_a_step_is_refused(pipe) -> None:
    canvas = {"type": "image", "image": picture()}
    with pytest.raises(ValueError, match="`strength` is 0.1 of num_inference_steps = 4, half a .* steps to 6 or more"):
        pipe(canvas=canvas, strength=0.1, num_inference_steps=4)
    assert pipe(canvas=canvas, strength=0.1, num_inference_steps=6, seed=0)[0]["images"]
    assert pipe(canvas=canvas, strength=0.1, num_inference_steps="auto", seed=0)[0]["images"]
    assert min(pipe.model.found_steps.values()) >= 6


@pytest.mark.parametrize("canvas", [picture(), "three", 5, [picture()], [{"type": "image"}, 3]])
def test_a_canvas_that_is_no_part_is_refused(pipe, canvas) -> None:
    with pytest.raises(ValueError, match="Got the canvas .*; need a part of a message or a list of them; a picture"):
        pipe(canvas=[canvas] if isinstance(canvas, list) else canvas)


@pytest.mark.parametrize(
    "part",
    [{"type": "image", "imge": 5}, {"type": "image", "strength": 0.5}, {"type": "text", "text": "a", "msk": [(0, 1)]}],
)
def test_what_no_part_of_a_canvas_has_is_refused(pipe, part) -> None:
    strange = {*part} - {"type", "text"}
    with pytest.raises(ValueError, match=f"Got '{strange.pop()}' in a part of type .*; need some of type"):
        pipe(text="a three", canvas=part)
    assert pipe(text="a three", canvas={"type": "image", "text": None}, seed=0)[0]["images"]


def test_whole_numbers_up_to_255_and_half_precision_are_masks_too(processor) -> None:
    for mask in (UPPER.astype(int) * 255, torch.tensor(UPPER).bfloat16(), UPPER.tolist()):
        made = processor.image_processor.patch_mask(mask, (4, 4))
        assert (made == processor.image_processor.patch_mask(UPPER, (4, 4))).all()


def test_strength_needs_something_to_start_from(pipe) -> None:
    with pytest.raises(
        ValueError, match=r"Got strength=0.5 and a target image of which nothing is known.* `canvas`, or"
    ):
        pipe(text="a three", generate="image", strength=0.5)
    with pytest.raises(ValueError, match=r"Got strength=0.5 and a target text"):
        pipe(images=picture(), generate="text", strength=0.5)
    for strength in (0, 1.5, True, "half"):
        with pytest.raises(ValueError, match=r"`strength` is .*; it must lie in \(0, 1\]"):
            pipe(text="a three", generate="image", strength=strength)
    with pytest.raises(ValueError, match=r"`strength` is 0.005 with .* = 'auto', half a step .* to more than 0.01\.$"):
        pipe(canvas={"type": "image", "image": picture()}, strength=0.005, num_inference_steps="auto")


def test_sizes_are_those_of_what_a_canvas_has_made(pipe) -> None:
    image, text = {"type": "image"}, {"type": "text"}
    for canvas, sizes, said in (
        (text, {"image_size": (8, 8)}, "Got image_size where text is made, and it does nothing; need it where images"),
        (image, {"max_new_tokens": 4}, "Got max_new_tokens where image is made"),
        ([[image], [image]], {"min_new_tokens": 1}, "Got min_new_tokens where image is made"),
    ):
        for call in (pipe, pipe.stream):
            with pytest.raises(ValueError, match=re.escape(said)):
                list(call(canvas=canvas, **sizes))
    makes_images = MDMPipeline(pipe.model, pipe.processor, generate="image", num_inference_steps=1)
    [one] = makes_images(text={"canvas": text}, max_new_tokens=3, seed=0)
    assert one["text"]
    assert not one["images"]
    made = pipe(canvas=[[image], [text]], image_size=(4, 4), max_new_tokens=3, num_inference_steps=1, seed=0)
    assert [(len(one["images"]), len(one["text"])) for one in made] == [(1, 0), (0, 1)]


def test_the_size_check_leaves_a_part_that_is_none_to_those_who_read_it(pipe) -> None:
    for part in ({"type": "img"}, {"image": picture()}):
        with pytest.raises(ValueError, match="Got a content part .*; need a dict of type 'text', 'image' or 'class'"):
            pipe(text="a three", canvas=part, image_size=(8, 8), max_new_tokens=3)
    assert pipe(text="a three", generate="image", min_new_tokens=0, seed=0)[0]["images"]  # 0 asks for nothing


def test_canvases_of_several_prompts_are_parts_and_lists_in_any_order(pipe) -> None:
    image, text = {"type": "image"}, {"type": "text"}
    for canvas in ([image, [text]], [[image], text], [[image], [text]]):
        made = pipe(text=["a three", "a two"], canvas=canvas, seed=0)
        assert [(len(one["images"]), len(one["text"])) for one in made] == [(1, 0), (0, 1)]
    with pytest.raises(
        ValueError, match=r"'canvas': 1}; .* one canvas: for one a prompt, put each into a list of its"
    ):
        pipe(text=["a three", "a two"], canvas=[image, text])
    said = [{"role": "user", "content": "a three"}]
    for conversation in ({"messages": said}, {"text": said}):  # one for all canvases
        made = pipe(**conversation, canvas=[[image], [text]], seed=0)
        assert made == pipe(text="a three", canvas=[[image], [text]], seed=0)


def test_what_a_canvas_says_is_made_is_not_for_the_model_to_decide(pipe) -> None:
    with pytest.raises(ValueError, match="Got a prompt with a canvas, whose parts say what is made; need one without"):
        pipe.predict_modalities(text={"text": "a three", "canvas": {"type": "text"}})


def test_sizes_of_prompts_that_are_read_one_by_one_are_checked_when_they_are_drawn(pipe) -> None:
    drawn = pipe(text=iter(["a three"]), generate="image", max_new_tokens=3)
    with pytest.raises(ValueError, match="Got max_new_tokens where image is made"):
        next(drawn)
    kinds = iter([{"canvas": {"type": "image"}}, {"canvas": {"type": "text"}}])
    made = list(pipe(text=kinds, batch_size=1, image_size=(4, 4), max_new_tokens=3, num_inference_steps=1, seed=0))
    assert [(len(one["images"]), len(one["text"])) for one in made] == [(1, 0), (0, 1)]


def freezing(at: int, mask: torch.Tensor, ids: torch.Tensor | None = None):
    """A callback that freezes `mask` after network call `at`."""

    def callback(model, step, times, state):
        changed = {"frozen": mask} | ({} if ids is None else {"input_ids": ids})
        return changed if step == at else None

    return callback


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("use_cache", [True, False])
def test_words_that_are_frozen_stay_and_the_rest_follows(guidance_scale, use_cache) -> None:
    model, inputs = tiny_model(), batch(["both", "text_to_image"])
    options = {"num_inference_steps": 6, "modality_lag": 0.0, "guidance_scale": guidance_scale}
    options |= {"use_cache": use_cache}

    def drawn(callback=None):
        return model.generate(**inputs, generator=generators([0, 1]), callback_on_step_end=callback, **options)

    text = torch.zeros_like(inputs["input_ids"])
    places = (inputs["target_mask"][0].bool() & (inputs["input_ids"][0] == 13)).nonzero().flatten()
    text[0, places[:2]] = 1
    said = inputs["input_ids"].clone()
    said[0, places[:2]] = torch.tensor([40, 41])
    plain, frozen = drawn(), drawn(freezing(1, text, said))
    assert frozen.sequences[0, places[:2]].tolist() == [40, 41]
    patches = inputs["target_mask"][0].bool() & (inputs["input_ids"][0] == 12)
    assert not torch.allclose(plain.latents[0, patches], frozen.latents[0, patches], atol=1e-3)
    torch.testing.assert_close(plain.latents[1], frozen.latents[1])  # nothing of that row was frozen
    clean = model.model.vae.encode_tokens(torch.tensor([[40, 41]])).mean[0]
    torch.testing.assert_close(frozen.latents[0, places[:2]], clean)


def test_what_is_frozen_without_tokens_stays_as_it_was_predicted_then() -> None:
    model, inputs, then = tiny_model(), batch(["both"]), []
    mask = inputs["target_mask"].clone()

    def callback(model, step, times, state):
        if step == 2:
            then.append(state["decode"]())
            return {"frozen": mask}
        return None

    options = {"num_inference_steps": 6, "modality_lag": 0.0, "generator": generators([0])}
    out = model.generate(**inputs, callback_on_step_end=callback, **options)
    assert out.sequences.equal(then[0].sequences)
    torch.testing.assert_close(out.images[0][0], then[0].images[0][0])


def test_a_callback_that_returns_what_cannot_be_frozen_is_told_so() -> None:
    model, inputs = tiny_model(), batch(["both"])
    shape = inputs["input_ids"].shape
    for changed, message in (
        (
            {"frozen": torch.ones(3)},
            rf"returned 'frozen' of shape \(3,\); it must be a tensor of shape \({shape[0]}, ",
        ),
        ({"frozen": [1]}, "returned 'frozen' of type list"),
        ({"input_ids": inputs["input_ids"]}, "returned 'input_ids' without 'frozen'; return the mask of the text"),
        ({"freeze": torch.ones(shape)}, "returned a dict of 'freeze'; it must return None or"),
        (
            {"frozen": inputs["target_mask"], "input_ids": torch.full(shape, 99_999)},
            r"returned 'input_ids' with 99999 at text that is frozen; they must be tokens of text in \[0, vocab",
        ),
        (
            {"frozen": inputs["target_mask"], "input_ids": torch.full(shape, model.config.text_end_token_id)},
            "returned 'input_ids' with 10 at text that is frozen; .* no control tokens",
        ),
        (
            {"frozen": inputs["target_mask"], "input_ids": torch.full(shape, 50.7)},
            "`input_ids of callback_on_step_end` has dtype torch.float32; it must hold whole numbers",
        ),
        (
            {"frozen": inputs["target_mask"] * 0.3},
            "returned 'frozen' with other values than 0 and 1; it must be a mask",
        ),
        (torch.ones(shape), "returned latents of shape .*; it must return None or"),
        (0, "returned 0; it must return None or"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, num_inference_steps=2, callback_on_step_end=lambda *a, c=changed: c)


def test_latents_that_a_callback_returns_change_targets_alone(pipe) -> None:
    canvas = {"type": "image", "image": picture(), "mask": UPPER}
    seen = []

    def moved(model, step, timesteps, state):
        seen.append(state["latents"].clone())
        return {"latents": state["latents"] + 5}

    pipe(canvas=canvas, seed=0, callback_on_step_end=moved)
    is_target = pipe.processor.apply_chat_template([{"role": "assistant", "content": [canvas]}])["target_mask"][0]
    made = is_target[-seen[0].shape[1] :].bool()
    for latents in seen[1:]:
        assert latents[0, ~made].equal(seen[0][0, ~made])
        assert not latents[0, made].equal(seen[0][0, made])


def test_gaps_are_drawn_in_the_share_that_is_asked_for_and_move_nothing_else() -> None:
    messages = answer({"type": "image", "image": picture()}, {"type": "text", "text": "a drawing of a three"})
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert with_gaps(messages, rng, 0.0) is messages
    assert rng.bit_generator.state == before
    drawn = [with_gaps(messages, rng, 0.25)[-1]["content"] for _ in range(2000)]
    masked = np.array([["mask" in part for part in parts] for parts in drawn])
    assert masked.any(1).mean() == pytest.approx(0.25, abs=0.03)
    assert np.abs(masked.mean(0) / masked.any(1).mean() - 0.75).max() < 0.06
    assert "mask" not in messages[-1]["content"][0]


def test_drawn_boxes_and_spans_reach_all_of_a_picture_and_of_a_text() -> None:
    rng, text = np.random.default_rng(0), "a small grey three"
    boxes = np.array([drawn_box(rng) for _ in range(500)])
    assert boxes.any((1, 2)).all()
    assert (np.abs(boxes.mean(0) - 0.5) < 0.2).all()
    spans = [drawn_span(text, rng)[0] for _ in range(500)]
    assert {start for start, _ in spans} == {0, 2, 8, 13}
    assert {end for _, end in spans} == {None, 1, 7, 12, 18}
    assert all(end is None or not set(text[start - 1 : start] + text[end : end + 1]) - {" "} for start, end in spans)


def test_scattered_gaps_leave_any_share_of_a_picture_and_of_a_text() -> None:
    rng, text = np.random.default_rng(0), "a small grey three"
    masks = np.array([scattered_cells(rng) for _ in range(500)])
    patches = masks.reshape(500, 4, 16, 4, 16).any((2, 4))
    assert masks.any((1, 2)).all()
    assert set(patches.sum((1, 2))) == set(range(1, 17))
    assert (np.abs(patches.mean(0) - patches.mean()) < 0.08).all()
    spans = [scattered_words(text, rng) for _ in range(500)]
    assert {len(one) for one in spans} == {1, 2, 3, 4, 5}
    assert {start for one in spans for start, _ in one} == {0, 2, 8, 13, 18}
    assert {one[-1] for one in spans if one[-1][1] is None} == {(18, None)}


def test_a_model_learns_from_targets_known_in_part(processor) -> None:
    source = DigitsSource("train", {"image_and_text": 1.0}, infill=1.0)
    examples = [source.sample(0, "image_and_text", np.random.default_rng(i)) for i in range(8)]
    inputs = ConversationCollator(processor)(examples)
    real = inputs["attention_mask"] == 1
    plain = ConversationCollator(processor)([{"messages": without_masks(e["messages"])} for e in examples])
    assert inputs["input_ids"].equal(plain["input_ids"])
    assert (inputs["target_mask"] <= plain["target_mask"]).all()
    assert (inputs["target_mask"].sum(1) < plain["target_mask"].sum(1)).all()
    torch.manual_seed(0)
    model = MDMForMultiModalGeneration(MDMConfig.from_preset("mdm-digits", hidden_size=32, num_hidden_layers=2))
    out = model.model(**{k: v for k, v in inputs.items() if k != "labels"})
    known = real & (inputs["target_mask"] == 0)
    assert (out.alpha_bar[known] == 1).all()
    assert out.noisy_latents.shape[-1] == model.config.latent_size != LATENT
    loss = model(**inputs).loss
    loss.backward()
    assert bool(loss.isfinite())


def without_masks(messages: list[dict]) -> list[dict]:
    *before, last = messages
    return [*before, {**last, "content": [{k: v for k, v in p.items() if k != "mask"} for p in last["content"]]}]


def test_image_size_is_the_canvas_size_and_known_pictures_keep_the_processors(pipe) -> None:
    rng = np.random.default_rng(0)
    wide, small = (Image.fromarray(rng.integers(256, size=size, dtype=np.uint8)) for size in ((8, 24), (16, 16)))
    beside = np.arange(24)[None].repeat(8, 0) >= 8
    canvas = {"type": "image", "image": wide, "mask": beside}
    made = pipe(images=small, canvas=canvas, image_size=(8, 24), num_inference_steps=2, seed=0)[0]["images"][0]
    assert made.size == (24, 8)
    assert np.array_equal(np.asarray(made)[:, :8], np.asarray(wide)[:, :8])
    messages = [
        {"role": "user", "content": [{"type": "image", "image": small}]},
        {"role": "assistant", "content": [canvas]},
    ]
    rows = pipe.processor.apply_chat_template(messages, image_size=(8, 24))
    assert rows["image_grid_hw"].tolist() == [[4, 4], [4, 12]]
    alone = pipe.processor(images=small, generate="text")["pixel_values"]
    assert torch.equal(torch.as_tensor(rows["pixel_values"])[:1, :, :8, :8], torch.as_tensor(alone))
    shrunk = pipe(canvas=canvas, num_inference_steps=2, seed=0)[0]["images"][0]
    assert shrunk.size == (8, 8)
