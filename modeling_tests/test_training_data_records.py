"""Rows of known data sets become records, and records conversations of every task that they have the fields for."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from layouts import LAYOUTS, PICTURE, told

from mdm_hf import MDMProcessor
from mdm_hf.training.adapters import ADAPTERS, DEFAULT_TASKS
from mdm_hf.training.digits import TASKS as DIGITS_TASKS
from mdm_hf.training.records import TASKS, BadRow, Record, conversation_of


CARD = Path(__file__).parents[1] / "model_cards" / "mdm-digits"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def parts(example: dict, role: str) -> list:
    return [p[p["type"]] for m in example["messages"] if m["role"] == role for p in m["content"]]


def full_record() -> Record:
    said = [("user", "1?"), ("assistant", "1."), ("user", "2?"), ("assistant", "2."), ("user", "3?")]
    return Record(
        image=PICTURE,
        captions=["one", "two", "three"],
        class_id=3,
        questions=[("what?", ["this", "this", "this", "that"])],
        messages=[{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said],
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_reads_its_sources_layout(layout: str) -> None:
    adapter, row, expected = LAYOUTS[layout]
    assert told(ADAPTERS[adapter](row)) == expected


def test_every_adapter_has_a_layout_tested_and_default_tasks_that_its_records_serve() -> None:
    assert {adapter for adapter, _, _ in LAYOUTS.values()} == set(ADAPTERS) == set(DEFAULT_TASKS)
    for layout, (adapter, row, _) in LAYOUTS.items():
        if layout != "visual-genome-regions":
            for task in DEFAULT_TASKS[adapter]:
                assert conversation_of(ADAPTERS[adapter](row), task, rng())["messages"][-1]["role"] == "assistant"


@pytest.mark.parametrize(
    ("adapter", "row", "kind", "message"),
    [
        (
            "imagenet",
            {"picture": 1, "label": 2},
            "missing field",
            "fields label, picture; need image or jpg .*`image_folder`",
        ),
        ("imagenet", {"image": PICTURE, "label": -1}, "bad value", "Got class -1; need a whole number of at least 0"),
        ("imagenet", {"image": PICTURE, "label": "cat"}, "bad value", "Got class 'cat'; need a whole number"),
        ("journeydb", {"img_path": "a.jpg"}, "missing field", "need prompt"),
        (
            "journeydb",
            {"img_path": "a.jpg", "prompt": " "},
            "empty text",
            "Got prompt ' '; need text that is not blank",
        ),
        ("ultrachat", {"id": "0"}, "missing field", "need messages or data"),
        ("ultrachat", {"data": ["Hello?", ""]}, "empty text", "the text of the assistant ''"),
        ("ultrachat", {"messages": [{"role": "tool", "content": "x"}]}, "bad value", "Got a turn of 'tool'"),
        ("coco", {"image": PICTURE, "sentences_raw": []}, "empty text", "Got no captions; need at least one"),
        ("flickr30k", {"image": PICTURE, "caption": ["", " "]}, "empty text", "Got captions ''"),
        ("vqav2", {"image": PICTURE, "question": "why?"}, "missing field", "need answers or multiple_choice_answer"),
        ("vqav2", {"image": PICTURE, "question": None, "answers": ["a"]}, "missing field", "need question"),
        ("gqa", {"question": "why?", "answer": "so"}, "missing field", "need image .*`image_folder` and `image_file`"),
        ("ocrvqa", {"image": PICTURE, "questions": ["a"], "answers": []}, "bad value", "1 questions and 0 answers"),
        ("textvqa", {"image": PICTURE, "question": "?", "answers": []}, "empty text", "Got no answers"),
        ("visual_genome", {"image": PICTURE, "qas": []}, "missing field", "without a question"),
        (
            "llava",
            {"conversations": [{"from": "human", "value": "<image>"}]},
            "missing image",
            "Got more image marks than images",
        ),
        (
            "llava",
            {"image": "a.jpg", "conversations": [{"from": "human", "value": "Hi"}]},
            "bad value",
            r"Got 1 more image\(s\) than <image> marks",
        ),
        ("captions", {"image": PICTURE, "text": 3}, "bad value", "Got text 3; need a string"),
        (
            "conversations",
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "bad value",
            "Got a part of type 'audio'; need text, image or class",
        ),
        (
            "conversations",
            {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a", "mask": [(0, 1)]}]}]},
            "bad value",
            "Got a part with a mask; need whole ones, as `infill` of the recipe",
        ),
    ],
)
def test_a_row_that_cannot_be_used_says_what_is_wrong(adapter: str, row: dict, kind: str, message: str) -> None:
    with pytest.raises(BadRow, match=message) as caught:
        ADAPTERS[adapter](row)
    assert caught.value.kind == kind


@pytest.mark.parametrize("task", TASKS)
def test_the_processor_takes_the_conversation_of_every_task(task: str) -> None:
    processor = MDMProcessor.from_pretrained(CARD)
    example = conversation_of(full_record(), task, rng(), condition_dropout=0.0)
    inputs = processor.apply_chat_template(example["messages"])
    assert int(inputs["target_mask"].sum()) > 0


@pytest.mark.parametrize(
    ("task", "given", "targets"),
    [
        ("class_to_image", {3}, [PICTURE]),
        ("text_to_image", {"one", "two", "three"}, [PICTURE]),
        ("image_and_text", set(), [PICTURE, "caption"]),
        ("prompt_to_image_and_text", {3, "one", "two", "three"}, [PICTURE, "caption"]),
        ("text", set(), ["caption"]),
    ],
)
def test_a_task_draws_each_of_its_conditions_and_captions(task: str, given: set, targets: list) -> None:
    drawn = [conversation_of(full_record(), task, rng(i), condition_dropout=0.0) for i in range(60)]
    assert {part for example in drawn for part in parts(example, "user")} == given
    captions = Counter(text for example in drawn for text in parts(example, "assistant") if isinstance(text, str))
    assert set(captions) == ({"one", "two", "three"} if "caption" in targets else set())
    shown = [["caption" if isinstance(p, str) else p for p in parts(example, "assistant")] for example in drawn]
    assert all(one == targets for one in shown)


def test_a_prompt_is_never_the_caption_to_write_where_there_are_two() -> None:
    record = Record(image=PICTURE, captions=["one", "two"])
    for i in range(20):
        example = conversation_of(record, "prompt_to_image_and_text", rng(i))
        assert parts(example, "user") != parts(example, "assistant")[1:]


def test_an_answer_is_drawn_as_often_as_people_gave_it() -> None:
    drawn = [conversation_of(full_record(), "question_answering", rng(i)) for i in range(400)]
    assert all(parts(example, "user") == [PICTURE, "what?"] for example in drawn)
    answers = Counter(parts(example, "assistant")[0] for example in drawn)
    assert set(answers) == {"this", "that"}
    assert answers["this"] / 400 == pytest.approx(0.75, abs=0.07)


def test_a_conversation_ends_at_any_assistant_turn_and_keeps_all_before_it() -> None:
    drawn = [conversation_of(full_record(), "conversation", rng(i)) for i in range(40)]
    ends = Counter(len(example["messages"]) for example in drawn)
    assert set(ends) == {2, 4}
    assert all(example["messages"] == full_record().messages[: len(example["messages"])] for example in drawn)


def test_a_condition_is_dropped_as_often_as_asked_and_only_where_guidance_needs_it() -> None:
    for task, share in (("class_to_image", 0.3), ("text_to_image", 0.3), ("image_to_text", 0.0)):
        drawn = [conversation_of(full_record(), task, rng(i), condition_dropout=0.3) for i in range(400)]
        assert sum(len(one["messages"]) == 1 for one in drawn) / 400 == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("task", [*TASKS])
def test_a_record_that_lacks_what_a_task_needs_is_bad(task: str) -> None:
    with pytest.raises(
        BadRow, match="without (image|captions|questions|class_id|an assistant turn).*; need"
    ) as caught:
        conversation_of(Record(), task, rng(), condition_dropout=0.0)
    assert caught.value.kind == "missing field"


def test_an_unknown_task_is_refused_by_name_and_the_digits_tasks_are_among_ours() -> None:
    with pytest.raises(ValueError, match="Got task 'video'; choose one of class_to_image"):
        conversation_of(full_record(), "video", rng())
    assert TASKS[: len(DIGITS_TASKS)] == DIGITS_TASKS


def test_prompts_take_half_of_text_to_image_and_nothing_else() -> None:
    record = Record(image=PICTURE, captions=["a red circle"], prompts=["a circle"])
    drawn = [conversation_of(record, "text_to_image", np.random.default_rng(i), 0.0)["messages"] for i in range(400)]
    asked = [messages[0]["content"][0]["text"] for messages in drawn]
    assert 0.4 < asked.count("a circle") / len(asked) < 0.6
    for task in ("image_to_text", "image_and_text"):
        said = [conversation_of(record, task, np.random.default_rng(i))["messages"] for i in range(20)]
        assert all(part.get("text") != "a circle" for m in said for turn in m for part in turn["content"])
    assert list(record.texts()) == ["a red circle", "a circle"]
