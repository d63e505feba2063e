"""From the rows of known data sets to records: one short function per source, in the source's own field names.

Each reads the layouts that its docstring names and raises [`BadRow`] for a row that lacks what it needs. What a list
of captions or answers has of blank entries is left out; a row where nothing is left is bad. Where a source keeps its
pixels in files apart, the reader's `image_folder` and `image_file` say where: see `readers.py`.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .records import BadRow, Record, image_part, text_part


Row = Mapping[str, Any]

IMAGE_FIELDS = ("image", "jpg", "jpeg", "png", "webp")  # the later ones as WebDataset names a file by its ending
IMAGE_MARK = "<image>"
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def imagenet(row: Row) -> Record:
    """`image`, `label`: ILSVRC/imagenet-1k on the Hub, and image folders with a folder a class.

    Also `jpg`, `cls`: ImageNet as WebDataset tars. The test split has the label -1 and is bad.
    """
    return Record(image=_need(row, *IMAGE_FIELDS), class_id=_class_id(_need(row, "label", "cls")))


def journeydb(row: Row) -> Record:
    """`img_path`, `prompt`, optionally `Task2.Caption`: a line of train_anno_realease_repath.jsonl.

    Paths like "./000/<uuid>.jpg" are relative to the folder imgs. Prompts keep Midjourney's flags ("--ar 3:2").
    """
    described = (row.get("Task2") or {}).get("Caption")
    captions = _texts(_need(row, "prompt"), "prompt") + (_texts(described, "Task2.Caption") if described else [])
    return Record(image=_need(row, "img_path", "image"), captions=captions)


def ultrachat(row: Row) -> Record:
    """`messages` of {"role", "content"}: HuggingFaceH4/ultrachat_200k.

    Or `data`, a list of strings in turns that the user begins: stingning/ultrachat, openbmb/UltraChat.
    """
    if row.get("messages") is not None:
        return Record(messages=[_message(m.get("role"), m.get("content")) for m in row["messages"]])
    turns = _need(row, "messages", "data")
    return Record(messages=[_message(("user", "assistant")[i % 2], said) for i, said in enumerate(turns)])


def coco(row: Row) -> Record:
    """`image` with its captions, in the layouts that COCO and Flickr30K are published in.

    - `sentences_raw`, a list: HuggingFaceM4/COCO, 2014_captions
    - `sentences`, strings or {"raw"}: yerevann/coco-karpathy, Karpathy's dataset_coco.json with field="images"
    - `answer`, a list: lmms-lab/COCO-Caption
    - `caption`: captions_train2017.json with field="annotations", image_file="{image_id:012d}.jpg"
    """
    captions = _need(row, "sentences_raw", "sentences", "answer", "caption")
    return Record(image=_need(row, "image", "filename", "file_name"), captions=_texts(captions, "captions", "raw"))


def flickr30k(row: Row) -> Record:
    """`image`, `caption`, a list of five: nlphuji/flickr30k, lmms-lab/flickr30k; and the layouts of [`coco`]."""
    return coco(row)


def vqav2(row: Row) -> Record:
    """`image`, `question`, `answers`, ten of {"answer"}: HuggingFaceM4/VQAv2, lmms-lab/VQAv2.

    Without `answers`, `multiple_choice_answer`. An answer that more people gave is drawn more often.
    """
    answers = _texts(_need(row, "answers", "multiple_choice_answer"), "answers", "answer")
    return _asked(row, [(_text(_need(row, "question"), "question"), answers)])


def gqa(row: Row) -> Record:
    """`question`, `answer`: lmms-lab/GQA, *_instructions, with image_file="{imageId}.jpg"."""
    return _asked(row, [(_text(_need(row, "question"), "question"), _texts(_need(row, "answer"), "answer"))])


def ocrvqa(row: Row) -> Record:
    """`image`, `questions` and `answers`, lists of one length: howard-hou/OCR-VQA."""
    questions, answers = _need(row, "questions"), _need(row, "answers")
    if len(questions) != len(answers):
        raise BadRow(
            f"Got {len(questions)} questions and {len(answers)} answers; need as many of one as of the other; drop "
            "the row."
        )
    pairs = zip(questions, answers, strict=True)
    return _asked(row, [(_text(q, "questions"), _texts(a, "answers")) for q, a in pairs])


def textvqa(row: Row) -> Record:
    """`image`, `question`, `answers`, ten strings: facebook/textvqa, lmms-lab/textvqa.

    Also TextVQA_0.5.1_train.json with field="data", image_file="{image_id}.jpg". The test split has no answers.
    """
    return vqav2(row)


def visual_genome(row: Row) -> Record:
    """`qas` of {"question", "answer"}, or `regions` of {"phrase"}: ranjaykrishna/visual_genome.

    Also question_answers.json and region_descriptions.json with image_file="{id}.jpg". A region's phrase is a caption
    here, though it describes only a part of the image.
    """
    if row.get("regions") is not None:
        return Record(image=_need(row, *IMAGE_FIELDS), captions=_texts(row["regions"], "regions", "phrase"))
    pairs = [(_text(q.get("question"), "question"), _texts(q.get("answer"), "answer")) for q in _need(row, "qas")]
    return _asked(row, pairs)


def llava(row: Row) -> Record:
    """`conversations` of {"from", "value"}, `image` where there is one: liuhaotian/LLaVA-Instruct-150K and its kin.

    Each <image> in a value becomes the next of `image`, a path or a list of them.
    """
    pictures = iter(_listed(row, "image", "images"))
    turns = _need(row, "conversations")
    messages = [_message(SPEAKERS.get(turn.get("from"), ""), turn.get("value"), pictures) for turn in turns]
    _all_shown(pictures)
    return Record(messages=messages)


def conversations(row: Row) -> Record:
    """`messages` in our own schema: content a string, or parts.

    Image parts without pixels take them in order from `images`, or `image`; where a row has those, so does each
    <image> in a string.
    """
    images = _listed(row, "images", "image")
    pictures = iter(images)
    turns = _need(row, "messages")
    messages = [_message(m.get("role"), m.get("content"), pictures if images else None) for m in turns]
    _all_shown(pictures)
    return Record(messages=messages)


def captions(row: Row) -> Record:
    """An image with `text`, `caption`, `captions` or `txt`: image folders, WebDataset, most captioned sets."""
    texts = _texts(_need(row, "text", "caption", "captions", "txt"), "text")
    label = row.get("label")
    return Record(
        image=_need(row, *IMAGE_FIELDS), captions=texts, class_id=None if label is None else _class_id(label)
    )


def shapes(row: Row) -> Record:
    """What `mdm make-shapes` writes: `image`, `captions`, `prompts`, `questions`, `answers`, `label`, `messages`."""
    pairs = zip(_need(row, "questions"), _need(row, "answers"), strict=True)
    label = row.get("label")
    return Record(
        image=_need(row, "image"),
        captions=_texts(_need(row, "captions"), "captions"),
        prompts=[_text(prompt, "prompts") for prompt in row.get("prompts") or ()],
        class_id=None if label is None else _class_id(label),
        questions=[(_text(question, "questions"), [_text(answer, "answers")]) for question, answer in pairs],
        messages=conversations({"messages": _need(row, "messages")}).messages,
    )


def text(row: Row) -> Record:
    """`text`, or `txt`: plain text without an image."""
    return Record(captions=_texts(_need(row, "text", "txt"), "text"))


ADAPTERS: dict[str, Callable[[Row], Record]] = {
    adapter.__name__: adapter
    for adapter in (
        imagenet,
        journeydb,
        ultrachat,
        coco,
        flickr30k,
        vqav2,
        gqa,
        ocrvqa,
        textvqa,
        visual_genome,
        llava,
        captions,
        conversations,
        shapes,
        text,
    )
}

_CAPTIONED = {"text_to_image": 1.0, "image_to_text": 1.0, "image_and_text": 1.0}
_ASKED = {"question_answering": 1.0}
_TALKED = {"conversation": 1.0}
DEFAULT_TASKS: dict[str, dict[str, float]] = {
    "imagenet": {"class_to_image": 1.0},
    "journeydb": {"text_to_image": 1.0},
    "ultrachat": _TALKED,
    "coco": _CAPTIONED,
    "flickr30k": _CAPTIONED,
    "vqav2": _ASKED,
    "gqa": _ASKED,
    "ocrvqa": _ASKED,
    "textvqa": _ASKED,
    "visual_genome": _ASKED,
    "llava": _TALKED,
    "captions": _CAPTIONED,
    "conversations": _TALKED,
    "shapes": _CAPTIONED | _ASKED | _TALKED,
    "text": {"text": 1.0},
}


def _need(row: Row, *names: str) -> Any:
    """The first of the fields `names` that `row` has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    remedy = "give `image_folder` and `image_file`" if "image" in names else "rename the column"
    raise BadRow(
        f"Got a row with the fields {', '.join(sorted(k for k, v in row.items() if v is not None)) or 'none'}; need "
        f"{' or '.join(names)}; choose another adapter, or {remedy}.",
        "missing field",
    )


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(
            f"Got {name} {value!r}; need a string; mend the row.", "missing field" if value is None else "bad value"
        )
    if not value.strip():
        raise BadRow(f"Got {name} {value!r}; need text that is not blank; drop the row.", "empty text")
    return value.strip()


def _texts(value: Any, name: str, key: str = "") -> list[str]:
    """A string, a list of strings, or a list of {key: string}, or {key: list} -> those that are not blank."""
    if isinstance(value, Mapping):
        value = value.get(key)
    many = [one.get(key) if isinstance(one, Mapping) else one for one in value] if isinstance(value, list) else [value]
    filled = [one for one in many if not (one is None or (isinstance(one, str) and not one.strip()))]
    if many and not filled:
        return [_text(many[0], name)]  # which says what is wrong with it
    if not filled:
        raise BadRow(f"Got no {name}; need at least one; drop the row.", "empty text")
    return [_text(one, name) for one in filled]


def _class_id(value: Any) -> int:
    try:
        class_id = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        class_id = -1
    if class_id < 0:
        raise BadRow(
            f"Got class {value!r}; need a whole number of at least 0; number the classes, or take a split that has "
            "labels."
        )
    return class_id


def _asked(row: Row, questions: list[tuple[str, list[str]]]) -> Record:
    if not questions:
        raise BadRow("Got a row without a question; need at least one; drop the row.", "missing field")
    return Record(image=_need(row, *IMAGE_FIELDS), questions=questions)


def _listed(row: Row, *names: str) -> list:
    """The first of the fields `names` that `row` has, as a list."""
    value: Any = next((row[name] for name in names if row.get(name) is not None), [])
    return value if isinstance(value, list) else [value]


def _message(role: Any, content: Any, pictures: Iterator | None = None) -> dict:
    """One turn in our schema; with `pictures`, each <image> in a string becomes the next of them."""
    if role not in SPEAKERS.values():
        raise BadRow(f"Got a turn of {role!r}; need one of system, user, assistant; mend the row.")
    if isinstance(content, list):
        return {"role": role, "content": [_part(part, pictures) for part in content]}
    parts: list[dict] = []
    said = _text(content, f"the text of the {role}")
    for piece in [said] if pictures is None else re.split(f"({IMAGE_MARK})", said):
        if piece == IMAGE_MARK and pictures is not None:
            parts.append(image_part(_next(pictures)))
        elif piece.strip():
            parts.append(text_part(piece.strip()))
    return {"role": role, "content": parts}


def _part(part: Row, pictures: Iterator | None) -> dict:
    kind = part.get("type")
    if part.get("mask") is not None:
        raise BadRow(
            "Got a part with a mask; need whole ones, as `infill` of the recipe says what share of them is masked in "
            "training; leave it out."
        )
    if kind == "text":
        return text_part(_text(part.get("text"), "a text part"))
    if kind == "class":
        return {"type": "class", "class": _class_id(part.get("class"))}
    if kind == "image":
        own = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
        return image_part(_next(pictures) if own is None else own)
    raise BadRow(f"Got a part of type {kind!r}; need text, image or class; mend the row.")


def _next(pictures: Iterator | None) -> Any:
    picture = next(pictures or iter(()), None)
    if picture is None:
        raise BadRow(
            "Got more image marks than images; need an image for each; give the missing ones in the row's `image` or "
            "`images`.",
            "missing image",
        )
    return picture


def _all_shown(pictures: Iterator) -> None:
    if left := sum(1 for _ in pictures):
        raise BadRow(f"Got {left} more image(s) than {IMAGE_MARK} marks; need a mark for each; mend the row.")
