"""The processor: the layout of rows, one path for all inputs, what it refuses, and the way back."""

import logging
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.pipelines.any_to_any import AnyToAnyPipeline, Chat, ReturnType

from mdm_hf import MDMImageProcessorPil, MDMProcessor
from mdm_hf.training.digits import TASKS, DigitsSource
from mdm_hf.training.mix import ConversationMix


SHIPPED = Path(__file__).resolve().parents[1] / "model_cards" / "mdm-digits"
PATCHES = 16  # 8x8 pixels in patches of 2x2
CANVAS = 8

C, U, A, S = "<|class|>", "<|user|>", "<|assistant|>", "<|system|>"
TIME_IMAGE, TIME_TEXT = "<|time_image|>", "<|time_text|>"
KNOWN_IMAGE = ["<|image_start|>"] + ["<|image|>"] * PATCHES + ["<|image_end|>"]
NEW_IMAGE = ["<|image_start|>"] + ["<|image_target|>"] * PATCHES + ["<|image_end|>"]
NEW_TEXT = ["<|text_start|>"] + ["<|text_target|>"] * CANVAS + ["<|text_end|>"]


@pytest.fixture(scope="module")
def processor() -> MDMProcessor:
    return MDMProcessor.from_pretrained(SHIPPED)


def picture(seed: int = 0, height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8))


def known_text(*pieces: str) -> list[str]:
    return ["<|text_start|>", *pieces, "<|text_end|>"]


def filled(*pieces: str) -> list[str]:
    return ["<|text_start|>", *pieces, *["</s>"] * (CANVAS - len(pieces)), "<|text_end|>"]


def tokens(processor: MDMProcessor, inputs, row: int = 0) -> list[str]:
    real = inputs["attention_mask"][row].bool()
    assert torch.all(inputs["input_ids"][row][~real] == processor.tokenizer.pad_token_id)
    return processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][row][real].tolist())


def targets(processor: MDMProcessor, inputs, row: int = 0) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(
        inputs["input_ids"][row][inputs["target_mask"][row] == 1].tolist()
    )


def assert_same(one, other) -> None:
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def image_part(image) -> dict:
    return {"type": "image", "image": image}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


def assistant(*parts: dict) -> dict:
    return {"role": "assistant", "content": list(parts)}


# Layouts of prompts


def test_layout_of_class_to_image(processor: MDMProcessor) -> None:
    inputs = processor(class_ids=3, generate="image")
    assert tokens(processor, inputs) == [C, A, TIME_IMAGE, *NEW_IMAGE]
    assert targets(processor, inputs) == ["<|image_target|>"] * PATCHES
    assert inputs["class_ids"].tolist() == [3]
    assert inputs["image_grid_hw"].tolist() == [[4, 4]]
    assert set(inputs) == {"input_ids", "attention_mask", "target_mask", "class_ids", "image_grid_hw"}


def test_layout_of_text_to_image(processor: MDMProcessor) -> None:
    inputs = processor(text="a three", generate="image")
    assert tokens(processor, inputs) == [C, U, *known_text("▁a", "▁three"), A, TIME_IMAGE, *NEW_IMAGE]
    assert targets(processor, inputs) == ["<|image_target|>"] * PATCHES
    assert inputs["class_ids"].tolist() == [-1]


def test_layout_of_captioning(processor: MDMProcessor) -> None:
    inputs = processor(images=picture(), generate="text")
    assert tokens(processor, inputs) == [C, U, *KNOWN_IMAGE, A, TIME_TEXT, *NEW_TEXT]
    assert targets(processor, inputs) == ["<|text_target|>"] * CANVAS
    assert inputs["pixel_values"].shape == (1, 1, 8, 8)
    assert inputs["image_grid_hw"].tolist() == [[4, 4]]


def test_layout_of_question_answering(processor: MDMProcessor) -> None:
    inputs = processor(images=picture(), text="name this digit", generate="text")
    question = known_text("▁name", "▁this", "▁digit")
    assert tokens(processor, inputs) == [C, U, *KNOWN_IMAGE, *question, A, TIME_TEXT, *NEW_TEXT]


@pytest.mark.parametrize("generate", [("image", "text"), ["text", "image"]])
def test_layout_of_image_and_text_has_the_image_first(processor: MDMProcessor, generate) -> None:
    inputs = processor(generate=generate)
    assert tokens(processor, inputs) == [C, A, TIME_IMAGE, *NEW_IMAGE, TIME_TEXT, *NEW_TEXT]
    assert targets(processor, inputs) == ["<|image_target|>"] * PATCHES + ["<|text_target|>"] * CANVAS
    assert_same(inputs, processor())


def test_text_alone_needs_no_image(processor: MDMProcessor) -> None:
    inputs = processor(text="a three", generate="text")
    assert set(inputs) == {"input_ids", "attention_mask", "target_mask", "class_ids"}


def test_the_image_token_in_a_text_says_where_its_image_stands(processor: MDMProcessor) -> None:
    inputs = processor(text="this is <|image|> a three", images=picture(), generate="text")
    before, after = known_text("▁this", "▁is"), known_text("▁a", "▁three")
    assert tokens(processor, inputs) == [C, U, *before, *KNOWN_IMAGE, *after, A, TIME_TEXT, *NEW_TEXT]
    two = processor(text=["<|image|><|image|>"], images=[[picture(1), picture(2)]], generate="text")
    assert tokens(processor, two) == [C, U, *KNOWN_IMAGE, *KNOWN_IMAGE, A, TIME_TEXT, *NEW_TEXT]
    assert_same(two, processor(images=[[picture(1), picture(2)]], generate="text"))


def test_sizes_of_what_to_make_are_asked_for_or_saved(processor: MDMProcessor) -> None:
    inputs = processor(image_size=(4, 6), max_new_tokens=3)
    assert inputs["image_grid_hw"].tolist() == [[2, 3]]
    assert targets(processor, inputs) == ["<|image_target|>"] * 6 + ["<|text_target|>"] * 3
    other = MDMProcessor(processor.image_processor, processor.tokenizer, image_size=(2, 4), max_new_tokens=5)
    assert targets(other, other()) == ["<|image_target|>"] * 2 + ["<|text_target|>"] * 5


# Layouts in training


@pytest.mark.parametrize(
    ("messages", "row", "labelled"),
    [
        (
            [user({"type": "class", "class": 3}), assistant(image_part(picture()))],
            [C, A, TIME_IMAGE, *KNOWN_IMAGE],
            [],
        ),
        (
            [user(text_part("a three")), assistant(image_part(picture()))],
            [C, U, *known_text("▁a", "▁three"), A, TIME_IMAGE, *KNOWN_IMAGE],
            [],
        ),
        (
            [user(image_part(picture())), assistant(text_part("a three"))],
            [C, U, *KNOWN_IMAGE, A, TIME_TEXT, *filled("▁a", "▁three")],
            ["▁a", "▁three", *["</s>"] * 6],
        ),
        (
            [user(image_part(picture()), text_part("name this digit")), assistant(text_part("three"))],
            [C, U, *KNOWN_IMAGE, *known_text("▁name", "▁this", "▁digit"), A, TIME_TEXT, *filled("▁three")],
            ["▁three", *["</s>"] * 7],
        ),
        (
            [assistant(image_part(picture()), text_part("a three"))],
            [C, A, TIME_IMAGE, *KNOWN_IMAGE, TIME_TEXT, *filled("▁a", "▁three")],
            ["▁a", "▁three", *["</s>"] * 6],
        ),
        (
            [user(text_part("a three")), assistant(image_part(picture()), text_part("three"))],
            [C, U, *known_text("▁a", "▁three"), A, TIME_IMAGE, *KNOWN_IMAGE, TIME_TEXT, *filled("▁three")],
            ["▁three", *["</s>"] * 7],
        ),
    ],
    ids=TASKS,
)
def test_in_training_the_last_assistant_turn_holds_the_targets(
    processor: MDMProcessor, messages: list[dict], row: list[str], labelled: list[str]
) -> None:
    inputs = processor.apply_chat_template(messages)
    assert tokens(processor, inputs) == row
    start = row.index(A)
    patches = ["<|image|>"] * row[start:].count("<|image|>")
    assert targets(processor, inputs) == patches + labelled
    known = inputs["labels"] != -100
    assert processor.tokenizer.convert_ids_to_tokens(inputs["labels"][known].tolist()) == labelled
    assert torch.equal(inputs["labels"][known], inputs["input_ids"][known])
    assert torch.all(inputs["target_mask"][known] == 1)
    assert torch.all(inputs["target_mask"][0, :start] == 0)


def test_a_training_row_and_its_prompt_differ_in_the_targets_alone(processor: MDMProcessor) -> None:
    question = user(image_part(picture()), text_part("name this digit"))
    training = processor.apply_chat_template([question, assistant(text_part("three"))])
    prompt = processor.apply_chat_template([question], generate="text")
    assert torch.equal(training["target_mask"], prompt["target_mask"])
    given = training["target_mask"] == 0
    assert torch.equal(training["input_ids"][given], prompt["input_ids"][given])
    assert torch.equal(training["pixel_values"], prompt["pixel_values"])
    assert set(training) - set(prompt) == {"labels"}


def test_a_time_token_stands_before_the_first_target_of_each_modality_only(processor: MDMProcessor) -> None:
    messages = [assistant(text_part("one"), image_part(picture()), text_part("two"), image_part(picture(1)))]
    assert tokens(processor, processor.apply_chat_template(messages)) == [
        *(C, A, TIME_TEXT, *filled("▁one"), TIME_IMAGE, *KNOWN_IMAGE),
        *(*filled("▁two"), *KNOWN_IMAGE),
    ]


def test_earlier_assistant_turns_are_conditions(processor: MDMProcessor) -> None:
    messages = [
        {"role": "system", "content": "read"},
        user(image_part(picture())),
        assistant(text_part("three")),
        {"role": "user", "content": "name this digit"},
    ]
    history = [C, S, *known_text("▁read"), U, *KNOWN_IMAGE, A, *known_text("▁three")]
    history += [U, *known_text("▁name", "▁this", "▁digit"), A, TIME_TEXT]
    prompt = processor.apply_chat_template(messages)
    assert tokens(processor, prompt) == [*history, *NEW_TEXT]
    training = processor.apply_chat_template([*messages, {"role": "assistant", "content": "three"}])
    assert tokens(processor, training) == [*history, *filled("▁three")]
    assert targets(processor, training) == ["▁three", *["</s>"] * 7]


def test_a_text_that_fills_its_canvas_has_no_end_token(processor: MDMProcessor) -> None:
    inputs = processor.apply_chat_template([assistant(text_part("a three"))], max_new_tokens=2)
    assert tokens(processor, inputs) == [C, A, TIME_TEXT, "<|text_start|>", "▁a", "▁three", "<|text_end|>"]


# One path, batches, padding


def test_calling_and_chatting_give_the_same_row(processor: MDMProcessor) -> None:
    image = picture()
    parts = ({"type": "class", "class": 2}, image_part(image), text_part("a three"))
    called = processor(text="a three", images=image, class_ids=2, generate=("image", "text"))
    assert_same(called, processor.apply_chat_template([user(*parts)], generate=("image", "text")))
    handed_on = processor.apply_chat_template([user(*parts)], processor_kwargs={"generate": ("image", "text")})
    assert_same(called, handed_on)


def test_a_user_turn_without_parts_is_left_out(processor: MDMProcessor) -> None:
    for messages in ([user()], [user({"type": "class", "class": 1})], [{"role": "user", "content": None}]):
        inputs = processor.apply_chat_template(messages, generate="image")
        assert tokens(processor, inputs) == [C, A, TIME_IMAGE, *NEW_IMAGE]


@pytest.mark.parametrize("task", TASKS)
def test_a_row_does_not_depend_on_its_batch(processor: MDMProcessor, task: str) -> None:
    data = ConversationMix({"digits": DigitsSource("train", {task: 1.0})}, 12, 12)
    batch = [data[i]["messages"] for i in range(12)]
    together = processor.apply_chat_template(batch)
    seen = 0
    for i, messages in enumerate(batch):
        alone = processor.apply_chat_template(messages)
        length = alone["input_ids"].shape[1]
        for name, padding in (("input_ids", 0), ("attention_mask", 0), ("target_mask", 0), ("labels", -100)):
            assert torch.equal(together[name][i, :length], alone[name][0]), name
            assert torch.all(together[name][i, length:] == padding), name
        assert together["class_ids"][i] == alone["class_ids"][0]
        count = len(alone["image_grid_hw"])
        assert torch.equal(together["pixel_values"][seen : seen + count], alone["pixel_values"])
        assert torch.equal(together["image_grid_hw"][seen : seen + count], alone["image_grid_hw"])
        seen += count
    assert seen == len(together["image_grid_hw"])


def test_rows_of_different_lengths_are_padded_on_the_right(processor: MDMProcessor) -> None:
    inputs = processor(
        text=["a three", None, "it looks like a seven"], images=[None, picture(), None], generate="text"
    )
    lengths = [len(tokens(processor, inputs, row)) for row in range(3)]
    assert inputs["attention_mask"].sum(1).tolist() == lengths
    assert inputs["attention_mask"].shape[1] == max(lengths)
    assert len(set(lengths)) == 3
    assert inputs["pixel_values"].shape[0] == 1


def test_images_of_several_sizes_keep_their_grids_in_row_order(processor: MDMProcessor) -> None:
    small = MDMProcessor(
        MDMImageProcessorPil(size={"height": 8, "width": 8}, patch_size=2, num_channels=1, do_resize=False),
        processor.tokenizer,
    )
    images = [picture(0, 4, 6), None, picture(1, 8, 2)]
    inputs = small(images=images, generate="image", image_size=(2, 2))
    assert inputs["image_grid_hw"].tolist() == [[2, 3], [1, 1], [1, 1], [4, 1], [1, 1]]
    assert inputs["pixel_values"].shape == (2, 1, 8, 6)
    assert [tokens(small, inputs, row).count("<|image|>") for row in range(3)] == [6, 0, 4]


def test_one_value_stands_for_every_prompt(processor: MDMProcessor) -> None:
    inputs = processor(text="a three", class_ids=[1, None, 2], generate="image")
    assert inputs["class_ids"].tolist() == [1, -1, 2]
    assert tokens(processor, inputs, 0) == tokens(processor, inputs, 2)
    assert_same(inputs, processor(text=["a three"] * 3, class_ids=[1, None, 2], generate="image"))
    assert processor(class_ids=torch.arange(4), generate="image")["class_ids"].tolist() == [0, 1, 2, 3]
    stack = np.stack([np.asarray(picture(i))[None] for i in range(3)])
    assert_same(processor(images=stack), processor(images=[picture(i) for i in range(3)]))


@pytest.mark.parametrize("return_tensors", ["np", None])
def test_arrays_come_back_where_no_tensors_are_asked_for(processor: MDMProcessor, return_tensors) -> None:
    inputs = processor(images=picture(), return_tensors=return_tensors)
    assert all(isinstance(value, np.ndarray) for value in inputs.values())


def test_the_rendered_string_has_one_placeholder_an_image(processor: MDMProcessor) -> None:
    messages = [user(image_part(picture()), text_part("what is written here?"))]
    rendered = processor.apply_chat_template(messages, tokenize=False)
    assert rendered == (
        "<|class|><|user|><|image_start|><|image|><|image_end|><|text_start|>what is written here?<|text_end|>"
        "<|assistant|><|time_text|><|text_start|><|text_target|><|text_end|>"
    )
    assert processor.apply_chat_template([messages, messages], tokenize=False) == [rendered] * 2
    ids = processor.apply_chat_template(messages, return_dict=False)
    assert torch.equal(ids, processor.apply_chat_template(messages)["input_ids"])


def test_an_image_is_expanded_as_replace_image_token_says(processor: MDMProcessor) -> None:
    inputs = processor(images=[picture(0), picture(1)], generate="text")
    assert processor.replace_image_token(inputs, 1) == "<|image|>" * PATCHES
    assert tokens(processor, inputs, 1).count(processor.image_token) == PATCHES
    assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids("<|image|>")


def test_outputs_are_named_as_the_model_input_names(processor: MDMProcessor) -> None:
    assert set(processor(images=picture())) == set(processor.model_input_names)


@pytest.mark.parametrize("key", ["image", "url", "path"])
def test_an_image_part_may_name_a_file(processor: MDMProcessor, key: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture().save(path)
    named = processor.apply_chat_template([user({"type": "image", key: str(path)})])
    assert_same(named, processor(images=picture(), generate="text"))


# What is refused


def refuses(message: str):
    return pytest.raises(ValueError, match=message)


def test_a_text_over_the_limit_is_refused_without_a_warning_before_it(caplog) -> None:
    fresh = MDMProcessor.from_pretrained(SHIPPED)  # a tokenizer warns once
    logger = logging.getLogger("transformers")
    with mock.patch.object(logger, "propagate", True), refuses("need at most the tokenizer's model_max"):
        fresh(text="a three " * 600, generate="image")
    assert "indexing errors" not in caplog.text


def test_lists_of_different_lengths_are_refused(processor: MDMProcessor) -> None:
    with refuses(
        r"lists of different lengths or empty ones, \{'text': 2, 'class_ids': 3\}; a batch needs lists of one"
    ):
        processor(text=["a", "b"], class_ids=[1, 2, 3])
    with refuses(r"'text': 0"):
        processor(text=[])


@pytest.mark.parametrize("generate", ["video", ("image", "sound"), "", (), "images", 3, {"image": 1}])
def test_an_unknown_or_empty_generate_is_refused(processor: MDMProcessor, generate) -> None:
    with refuses(r"Got generate with .*; need 'image', 'text' or both, or 'auto' in a call"):
        processor(text="a three", generate=generate)
    with refuses("need 'image', 'text' or both"):
        processor.apply_chat_template([user(text_part("a three"))], generate=generate)


@pytest.mark.parametrize("class_id", [-1, 10, 2.5, "3", True, np.float32(2)])
def test_a_class_that_is_no_class_is_refused(processor: MDMProcessor, class_id) -> None:
    with refuses(r"Got class .*; need a whole number of at least 0 and at most 9; leave the class out for none\."):
        processor(class_ids=class_id)
    with refuses("Got class"):
        processor.apply_chat_template([user({"type": "class", "class": class_id})])


def test_class_numbers_are_checked_against_num_classes_where_it_is_known(processor: MDMProcessor) -> None:
    unchecked = MDMProcessor(processor.image_processor, processor.tokenizer)
    assert unchecked(class_ids=np.int64(1234))["class_ids"].tolist() == [1234]
    with refuses(r"need a whole number of at least 0; leave"):
        unchecked(class_ids=-2)


def test_an_image_token_without_pixels_is_refused(processor: MDMProcessor) -> None:
    with refuses(r"Got 1 <\|image\|> in a text with 0 image\(s\); need as many .*; give the pixels in `images`"):
        processor(text="<|image|> what is this?")
    with refuses(r"Got 2 <\|image\|> in a text with 1 image"):
        processor(text="<|image|><|image|>", images=picture())
    with refuses(r"Got the control token <\|image\|> in the text .*; give the image as a part of its own"):
        processor.apply_chat_template([user(text_part("<|image|> what is this?"))])
    with refuses(r"Got an image part without pixels; need .*; to make an image, leave the part out"):
        processor.apply_chat_template([user({"type": "image"})])


def test_pixels_that_the_template_gives_no_token_are_refused(processor: MDMProcessor) -> None:
    with refuses(r"Got 0 <\|image\|> for 1 image\(s\); need one each; mend the chat template"):
        processor.apply_chat_template([user(image_part(picture()))], chat_template="<|class|>")


@pytest.mark.parametrize(
    "token", ["</s>", "<pad>", "<|assistant|>", "<|time_image|>", "<|text_end|>", "<|text_target|>"]
)
def test_text_cannot_write_control_tokens(processor: MDMProcessor, token: str) -> None:
    with refuses(
        r"Got the control token .* need text without one, since the chat template sets them; (take it out|it marks)"
    ):
        processor(text=f"ignore {token} this")


def test_a_target_text_longer_than_its_canvas_is_refused(processor: MDMProcessor) -> None:
    messages = [assistant(text_part("a small grey three written by hand here is"))]
    with refuses(r"Got a target text of 9 tokens, 'a small grey .*'; need at most max_new_tokens = 8; shorten it"):
        processor.apply_chat_template(messages)
    assert targets(processor, processor.apply_chat_template(messages, max_new_tokens=10))[-2:] == ["▁is", "</s>"]


def test_a_message_that_aims_at_nothing_is_refused(processor: MDMProcessor) -> None:
    with refuses(r"Got a last assistant message without a text or image part, and so no target"):
        processor.apply_chat_template([user(text_part("a three")), assistant()])
    with refuses(r"Got a last assistant message, .*, where \('image',\) is to be generated; need one of the two"):
        processor.apply_chat_template([assistant(text_part("a three"))], generate=("image",))
    with refuses("Got the message {'role': 'user'.* alone in place of a conversation; need a list .*put it into a"):
        processor.apply_chat_template(user(text_part("a three")))
    with refuses("Got no messages; need at least one"):
        processor.apply_chat_template([])


def test_prompts_and_training_examples_are_not_mixed(processor: MDMProcessor) -> None:
    with refuses(r"Got a batch of 1 conversations with targets and 1 without; need all of one kind; split the batch"):
        processor.apply_chat_template([[user(text_part("a"))], [assistant(text_part("a"))]])


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "robot", "content": "a"}, r"Got the message .*robot.*need a dict with 'content' and a 'role' among"),
        (
            user({"type": "video", "video": "x"}),
            r"Got a content part .*video.*; need a dict of type 'text', 'image' or",
        ),
        (user({"type": "text", "text": 3}), r"Got a text part with text 3; need a string"),
        (user({"type": "class", "class": 1}, {"type": "class", "class": 2}), r"Got two class parts in a conversation"),
        (assistant({"type": "class", "class": 1}), r"Got a class part in an assistant message; need it in a user"),
        ({"role": "user", "content": ["a three"]}, r"Got a content part a three; need a dict"),
        (user({"type": ["text"], "text": "a"}), r"Got a content part .*; need a dict of type 'text', 'image' or"),
        (
            user({"type": "text", "text": "a", "txt": "b"}),
            r"Got 'txt' in a part of type 'text'; need some of type, text",
        ),
        (user({"type": "class", "class": 1, "id": 2}), "Got 'id' in a part of type 'class'; need some of type, class"),
        (assistant({"type": "image", "image": 0, "msk": 1}), "Got 'msk' in a part of type 'image'; need some of type"),
    ],
)
def test_a_malformed_message_is_refused(processor: MDMProcessor, message: dict, complaint: str) -> None:
    with refuses(complaint):
        processor.apply_chat_template([message])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_new_tokens": 0}, "Got max_new_tokens 0; need a whole number of at least 1"),
        ({"max_new_tokens": 2.5}, r"Got max_new_tokens 2\.5"),
        ({"image_size": (8, 9)}, "Image width 9 is not a multiple of patch_size 2; resize to 8 or 10"),
        ({"image_size": (8,)}, r"Got image_size \(8,\); need \(height, width\), whole numbers of pixels"),
        ({"image_size": 8}, r"Got image_size 8; need \(height, width\), whole numbers of pixels"),
        ({"image_size": (8.0, 8.0)}, r"Got image_size \(8\.0, 8\.0\); need"),
        ({"videos": ["x.mp4"]}, r"Got videos=\['x.mp4'\]; need text, images or class_ids"),
        ({"text": 3}, "Got a text of type int; need a string"),
    ],
)
def test_options_that_cannot_be_are_refused(processor: MDMProcessor, options: dict, complaint: str) -> None:
    with refuses(complaint):
        processor(**options)


def test_an_argument_that_cannot_be_is_not_laid_at_the_door_of_the_files(tmp_path: Path) -> None:
    for options, complaint in (
        ({"max_new_tokens": 0}, "^Got max_new_tokens 0; need a whole number of at least 1"),
        ({"image_size": (7, 8)}, "^Image height 7 is not a multiple of patch_size 2"),
    ):
        with refuses(complaint):
            MDMProcessor.from_pretrained(SHIPPED, **options)
    shutil.copytree(SHIPPED, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    with refuses("^Got .* with a processor that cannot be made .* with force_download=True"):
        MDMProcessor.from_pretrained(tmp_path, max_new_tokens=5)


def test_continuing_a_message_and_unknown_processor_kwargs_are_refused(processor: MDMProcessor) -> None:
    with refuses("Got continue_final_message=True"):
        processor.apply_chat_template([assistant(text_part("a"))], continue_final_message=True)
    with refuses("Got the argument 'num_frames', which neither .*; need some of generate, image_size, max_new_tokens"):
        processor.apply_chat_template([user(text_part("a"))], processor_kwargs={"num_frames": 1})


def test_a_tokenizer_without_the_control_tokens_is_refused(processor: MDMProcessor) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with refuses(r"Got a tokenizer without pad_token, bos_token, eos_token, .*; build it with mdm_hf.training.tok"):
        MDMProcessor(processor.image_processor, plain)


# The way back


def generated(processor: MDMProcessor, inputs, texts: list[str], images: list[list[torch.Tensor]]):
    """What a model would return that wrote `texts`, each followed by </s> and then nonsense."""
    sequences = inputs["input_ids"].clone()
    for row, text in enumerate(texts):
        written = processor.tokenizer(text)["input_ids"] + [processor.tokenizer.eos_token_id]
        spots = (sequences[row] == processor.tokenizer.text_target_token_id).nonzero().flatten()
        written += [processor.tokenizer.convert_tokens_to_ids("▁nine")] * (len(spots) - len(written))
        sequences[row, spots] = torch.tensor(written[: len(spots)])
    return SimpleNamespace(sequences=sequences, images=images)


def test_generated_rows_come_back_as_text_and_pictures(processor: MDMProcessor) -> None:
    inputs = processor(text=["a six", "a two"], images=[picture(), None], generate=("image", "text"))
    pixels = processor.image_processor([picture(5), picture(6)], return_tensors="pt")["pixel_values"]
    outputs = generated(processor, inputs, ["a three", "the digit four"], [[pixels[0]], [pixels[1]]])
    results = processor.post_process_multimodal_output(outputs)
    assert [result["text"] for result in results] == [["a three"], ["the digit four"]]
    shown = [np.asarray(image) for result in results for image in result["images"]]
    assert np.array_equal(np.stack(shown), np.stack([np.asarray(picture(5)), np.asarray(picture(6))]))
    assert processor.post_process_multimodal_output(outputs, generation_mode="text") == ["a three", "the digit four"]
    assert len(processor.post_process_multimodal_output(outputs, generation_mode="image")) == 2


def test_a_training_row_comes_back_as_what_was_put_in(processor: MDMProcessor) -> None:
    data = ConversationMix({"digits": DigitsSource("train", {"question_answering": 1.0})}, 40, 40)
    examples = [data[i]["messages"] for i in range(40)]
    sequences = processor.apply_chat_template(examples)["input_ids"]
    results = processor.post_process_multimodal_output(sequences)
    assert results == [{"text": [messages[-1]["content"][0]["text"]], "images": []} for messages in examples]


def test_conditions_are_no_part_of_the_result(processor: MDMProcessor) -> None:
    inputs = processor(text="a three", generate="image")
    outputs = SimpleNamespace(sequences=inputs["input_ids"], images=[[torch.zeros(1, 8, 8)]])
    [result] = processor.post_process_multimodal_output(outputs)
    assert result["text"] == []
    assert np.unique(np.asarray(result["images"][0])).tolist() == [128]
    assert processor.post_process_multimodal_output(inputs["input_ids"], generation_mode="text") == [""]


def test_what_is_not_written_yet_reads_as_empty(processor: MDMProcessor) -> None:
    inputs = processor(text="a three", generate="text")
    assert processor.post_process_multimodal_output(inputs["input_ids"]) == [{"text": [""], "images": []}]
    [result] = processor.post_process_multimodal_output(inputs["input_ids"], skip_special_tokens=False)
    assert result["text"] == ["<|text_target|>" * CANVAS]


def test_an_unknown_generation_mode_is_refused(processor: MDMProcessor) -> None:
    with refuses("Got generation_mode 'audio'; need 'image', 'text' or 'both'"):
        processor.post_process_multimodal_output(torch.zeros(1, 3, dtype=torch.long), generation_mode="audio")


def test_the_any_to_any_pipeline_of_transformers_reads_the_result(processor: MDMProcessor) -> None:
    pipeline = SimpleNamespace(processor=processor, tokenizer=processor.tokenizer, model=object())
    messages = [user(text_part("name this digit"), image_part(picture()))]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, continue_final_message=False)
    outputs = generated(processor, inputs, ["three"], [[torch.ones(1, 8, 8)]])
    state = {"prompt_text": Chat(messages), "generated_sequence": outputs, "input_ids": inputs["input_ids"]}

    def postprocess(return_type, generation_mode):
        return AnyToAnyPipeline.postprocess(
            pipeline, state, return_type, continue_final_message=False, generation_mode=generation_mode
        )

    [full] = postprocess(ReturnType.FULL_TEXT, None)
    assert full["generated_text"] == [*messages, {"role": "assistant", "content": "three"}]
    assert postprocess(ReturnType.NEW_TEXT, "text")[0]["generated_text"] == "three"
    assert postprocess(None, "image")[0]["generated_image"].size == (8, 8)


def test_an_argument_nobody_knows_is_refused(processor: MDMProcessor) -> None:
    with refuses("Got the argument 'max_new_token', which neither the processor nor its chat template knows"):
        processor.apply_chat_template([user(text_part("a three"))], max_new_token=3)
    template = "{{ '<|class|><|user|><|text_start|>' ~ greeting ~ '<|text_end|><|time_text|>' }}"
    template += "<|text_start|><|text_target|><|text_end|>"
    inputs = processor.apply_chat_template([user()], chat_template=template, greeting="a three", tools=None)
    assert tokens(processor, inputs) == [C, U, *known_text("▁a", "▁three"), TIME_TEXT, *NEW_TEXT]


def test_options_work_by_name_in_their_group_and_in_the_common_one(processor: MDMProcessor) -> None:
    dark = {"do_rescale": True, "rescale_factor": 1e-3}
    by_name = processor(text="a three", images=picture(), padding="max_length", max_length=60, **dark)
    groups = {"text_kwargs": {"padding": "max_length", "max_length": 60}, "images_kwargs": dark}
    assert_same(by_name, processor(text="a three", images=picture(), common_kwargs={"return_tensors": "pt"}, **groups))
    assert by_name["input_ids"].shape == (1, 60)
    assert by_name["pixel_values"].max() < -0.4
    chat = [user(image_part(picture()), text_part("a three"))]
    for options in ({"processor_kwargs": groups}, groups):
        assert_same(by_name, processor.apply_chat_template(chat, generate=("image", "text"), **options))
    assert isinstance(processor(common_kwargs={"return_tensors": "np"})["input_ids"], np.ndarray)
    assert isinstance(processor(text_kwargs={"return_tensors": None})["input_ids"], np.ndarray)
    small = processor(images=picture(), size={"height": 4, "width": 4}, generate="text")
    assert small["image_grid_hw"].tolist() == [[2, 2]]
    idle = {"padding_side": "right", "truncation": False, "device": None, "do_pad": False, "add_special_tokens": False}
    assert_same(processor(text="a", **idle), processor(text="a"))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"truncation": True}, "Got truncation=True; need whole texts, .*; shorten the text"),
        ({"text_kwargs": {"truncation": True}}, "Got truncation=True; need whole texts"),
        ({"padding": False}, "Got padding=False; need True, 'longest' or 'max_length'.*leave it out"),
        ({"padding": "nonsense"}, "Got padding='nonsense'; need True"),
        ({"padding": "max_length"}, "Got padding='max_length' without max_length; need how long"),
        ({"max_length": 20}, "Got a row of 37 tokens; need at most max_length = 20, as rows are never cut; shorten"),
        ({"max_length": -1}, "Got max_length -1; need a whole number of at least 1"),
        ({"padding_side": "left"}, "Got padding_side='left'; need padding on the right"),
        ({"device": "cpu"}, r"Got device='cpu'; need tensors that are moved .*\.to\(device\)"),
        ({"images_kwargs": {"do_center_crop": True}}, "Got do_center_crop=True; need `aspect_ratio_buckets`"),
        ({"do_reszie": False}, "Got the argument 'do_reszie', which neither"),
        ({"images_kwargs": {"do_reszie": False}}, "Got the argument 'do_reszie', which neither .*check its spelling"),
        ({"add_special_tokens": True}, "Got the argument 'add_special_tokens', which neither"),
        ({"videos_kwargs": {"fps": 1}}, "Got the argument 'videos_kwargs'"),
        ({"return_tensors": "tf"}, "Got return_tensors='tf'; need 'pt', 'np' or None"),
        ({"do_resize": "maybe"}, "(?s)Got an option of the wrong type .*do_resize.*; see MDMProcessor.__call__"),
        ({"do_rescale": True, "images_kwargs": {"do_rescale": False}}, "do_rescale was passed two times"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_options_that_a_row_has_no_room_for_are_refused(processor: MDMProcessor, options, complaint: str) -> None:
    with refuses(complaint):
        processor(text="a three", **options)
    with refuses(complaint):
        processor.apply_chat_template(
            [user(text_part("a three"))], generate=("image", "text"), processor_kwargs=options
        )


def test_a_mask_of_assistant_tokens_is_refused_and_ids_come_alone_where_no_dict_is_wanted(processor) -> None:
    messages = [user(text_part("a three"))]
    with refuses("Got return_assistant_tokens_mask=True; need `target_mask` and `labels`"):
        processor.apply_chat_template(messages, return_assistant_tokens_mask=True)
    alone = processor.apply_chat_template(messages, return_dict=False, processor_kwargs={"padding": "longest"})
    assert torch.equal(alone, processor.apply_chat_template(messages)["input_ids"])


def test_templates_go_by_name_and_the_default_one_is_the_default(processor: MDMProcessor, tmp_path: Path) -> None:
    named = MDMProcessor.from_pretrained(SHIPPED)
    named.chat_template = {"default": processor.chat_template, "loud": processor.chat_template + "{# loud #}"}
    named.save_pretrained(tmp_path)
    named = MDMProcessor.from_pretrained(tmp_path)
    messages = [user(text_part("a three"))]
    expected = processor.apply_chat_template(messages)
    for name in (None, "default", "loud", processor.chat_template):
        assert_same(named.apply_chat_template(messages, chat_template=name), expected)
    assert_same(named(text="a three"), processor(text="a three"))
    del named.chat_template["default"]
    with refuses("Got no chat_template, and none of the processor's is the default one; need one of loud; name it"):
        named.apply_chat_template(messages)


def test_a_rendering_without_the_target_that_is_to_be_made_is_refused(processor: MDMProcessor) -> None:
    complaint = r"Got a chat template that renders 'default', without a target for text; need one for all .*; mend"
    with refuses(complaint):
        processor.apply_chat_template([user(text_part("a three"))], chat_template="default")
    only_text = processor.chat_template.replace("'image' in generate", "false")
    with refuses("without a target for image; need one"):
        processor.apply_chat_template([user()], generate=("image", "text"), chat_template=only_text)
    with refuses("without a target for the last assistant message; need one"):
        processor.apply_chat_template([assistant(text_part("a"))], chat_template="<|class|>")


def test_a_conversation_of_strings_is_refused_as_a_batch_of_strings(processor: MDMProcessor) -> None:
    for messages in ("a three", [["a three", "a four"]]):
        with refuses(r"as a conversation; need messages, .*; batches of strings, .* one string a prompt\."):
            processor.apply_chat_template([messages] if isinstance(messages, str) else messages)


def test_a_folder_without_its_chat_template_or_with_half_of_it_is_refused(processor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    file = tmp_path / "chat_template.jinja"
    file.write_text(file.read_text()[:300])
    with refuses(f"Got {tmp_path} with a chat_template.jinja that cannot be read .*; need it whole; push"):
        MDMProcessor.from_pretrained(tmp_path)
    file.unlink()
    with refuses(f"Got {tmp_path} without chat_template.jinja; need the layout that its model was trained with"):
        MDMProcessor.from_pretrained(tmp_path)


# Saving


@pytest.mark.parametrize("load", [MDMProcessor.from_pretrained, AutoProcessor.from_pretrained], ids=["own", "auto"])
def test_a_saved_processor_comes_back_equal(processor: MDMProcessor, load, tmp_path: Path) -> None:
    original = MDMProcessor(
        processor.image_processor,
        processor.tokenizer,
        chat_template=processor.chat_template + "{# mine #}",
        image_size=(4, 8),
        max_new_tokens=11,
        num_classes=7,
    )
    original.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    code = {
        "conversations.py",
        "image_processing_mdm.py",
        "image_reading.py",
        "known_images.py",
        "processing_mdm.py",
        "processing_options.py",
        "prompts.py",
        "token_rows.py",
    }
    assert files - code == {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files & code == code  # travels along, for those without this package
    loaded = load(tmp_path)
    assert type(loaded) is MDMProcessor
    del original.auto_map  # saving notes where the code is; loading from this package forgets it
    assert loaded.to_dict() == original.to_dict()
    assert loaded.chat_template == original.chat_template
    assert (loaded.image_size, loaded.max_new_tokens, loaded.num_classes) == ([4, 8], 11, 7)
    assert loaded.patch_size == original.patch_size == 2
    conditions = {"text": ["a three", None], "images": [None, picture()], "class_ids": 2}
    assert_same(loaded(**conditions), original(**conditions))


def test_a_processor_travels_to_worker_processes(processor: MDMProcessor) -> None:
    copy = pickle.loads(pickle.dumps(processor))
    assert_same(copy(text="a three", images=picture()), processor(text="a three", images=picture()))


def test_saving_twice_writes_the_same_files(processor: MDMProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path / "one")
    MDMProcessor.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_the_shipped_processor_is_that_of_the_digits(processor: MDMProcessor) -> None:
    assert (processor.patch_size, processor.max_new_tokens, processor.num_classes) == (2, CANVAS, 10)
    assert processor.chat_template == MDMProcessor(processor.image_processor, processor.tokenizer).chat_template
