"""Real files of every kind are read, as tables and as streams; what is broken in them is a bad row, not a crash."""

import csv
import io
import json
import re
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from layouts import LAYOUTS, told
from PIL import Image

from mdm_hf import MDMProcessor
from mdm_hf.training.adapters import ADAPTERS
from mdm_hf.training.readers import RecordSource, open_image, read_source
from mdm_hf.training.records import BadRow


CARD = Path(__file__).parents[1] / "model_cards" / "mdm-digits"
DOCS = Path(__file__).parents[1] / "docs"
COUNT = 6
CAPTIONS = [f"shade {i}" for i in range(COUNT)]


def shade(i: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (40 * i, 0, 0))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image_files(folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(encoded(shade(i)))
    return [f"{i}.png" for i in range(COUNT)]


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def folder_with_csv(root: Path) -> dict:
    with open(_folder(root) / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *zip(image_files(root / "train"), CAPTIONS, strict=True)])
    return {"path": root}


def folder_with_jsonl(root: Path) -> dict:
    names = image_files(root / "train")
    jsonl(
        root / "train" / "metadata.jsonl",
        [{"file_name": n, "text": t} for n, t in zip(names, CAPTIONS, strict=True)],
    )
    return {"path": root}


def parquet(root: Path) -> dict:
    data = datasets.Dataset.from_dict({"image": [shade(i) for i in range(COUNT)], "caption": CAPTIONS})
    data.to_parquet(str(_folder(root) / "train.parquet"))
    return {"path": root / "train" / "train.parquet"}


def json_lines(root: Path) -> dict:
    rows = [{"image": n, "text": t} for n, t in zip(image_files(root / "pictures"), CAPTIONS, strict=True)]
    return {"path": jsonl(root / "rows.jsonl", rows), "image_folder": root / "pictures"}


def json_with_a_template(root: Path) -> dict:
    image_files(root / "pictures")
    rows = [{"number": i, "text": text} for i, text in enumerate(CAPTIONS)]
    (root / "all.json").write_text(json.dumps({"rows": rows, "info": {"year": 2014}}))
    options = {"image_folder": root / "pictures", "image_file": "{number:01d}.png"}
    return {"path": root / "all.json", "field": "rows", **options}


def webdataset(root: Path, shards: int = 2) -> dict:
    for shard in range(shards):
        with tarfile.open(_folder(root) / f"{shard}.tar", "w") as tar:
            for i in range(shard, COUNT, shards):
                for ending, data in (("png", encoded(shade(i))), ("txt", CAPTIONS[i].encode())):
                    info = tarfile.TarInfo(f"{i:04d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return {"path": root / "train" / "*.tar"}


def saved_to_disk(root: Path) -> dict:
    data = datasets.Dataset.from_dict({"image": [shade(i) for i in range(COUNT)], "text": CAPTIONS})
    datasets.DatasetDict({"train": data}).save_to_disk(root / "saved")
    return {"path": root / "saved"}


def _folder(root: Path) -> Path:
    (root / "train").mkdir(parents=True, exist_ok=True)
    return root / "train"


KINDS = (folder_with_csv, folder_with_jsonl, parquet, json_lines, json_with_a_template, webdataset, saved_to_disk)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def captioned(source: RecordSource, row: dict) -> tuple[str, bytes]:
    messages = source.conversation(row, "image_to_text", np.random.default_rng(0))["messages"]
    return messages[1]["content"][0]["text"], messages[0]["content"][0]["image"].convert("RGB").tobytes()


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_captioned_data_set_of_any_kind_gives_each_image_with_its_caption(kind, streaming, tmp_path) -> None:
    source = read_source(**kind(tmp_path / "data"), adapter="captions", streaming=streaming)
    rows = source.stream(0, 1, 1, (0, 1), 0) if streaming else [source.row(i) for i in range(len(source))]
    found = sorted(captioned(source, row) for row in rows)
    assert found == [(text, shade(i).tobytes()) for i, text in enumerate(CAPTIONS)]


def test_a_folder_a_class_is_read_with_its_classes(tmp_path) -> None:
    for label in ("cat", "dog"):
        image_files(tmp_path / "data" / "train" / label)
    source = read_source(tmp_path / "data", "imagenet")
    assert [ADAPTERS["imagenet"](source.row(i)).class_id for i in range(len(source))] == [0] * COUNT + [1] * COUNT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_the_same_record_once_it_has_been_in_arrow(layout) -> None:
    adapter, row, expected = LAYOUTS[layout]
    source = RecordSource(datasets.Dataset.from_list([row, row], on_mixed_types="use_json"), adapter)
    found = told(source.adapter(source.row(1)))
    if isinstance(found.get("image"), dict):
        found["image"] = open_image(found["image"])
    assert found == expected


def test_changed_files_are_read_anew_and_not_from_a_cache(tmp_path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "old"}])
    assert ADAPTERS["text"](read_source(path, "text").row(0)).captions == ["old"]
    jsonl(path, [{"text": "new words"}])
    assert ADAPTERS["text"](read_source(path, "text").row(0)).captions == ["new words"]


def test_the_snippet_for_a_folder_of_ones_own_runs_as_docs_data_has_it(tmp_path, monkeypatch, capsys) -> None:
    folder_with_csv(tmp_path / "my_images")
    monkeypatch.chdir(tmp_path)
    snippet = re.search(r"```python\n(.*?)```", (DOCS / "data.md").read_text(), flags=re.DOTALL)[1]
    exec(snippet, {})
    assert "'role': 'assistant'" in capsys.readouterr().out


def broken_images() -> dict[str, tuple[object, str, str]]:
    """Name -> image, kind, message."""
    whole = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
    png = bytearray(encoded(Image.effect_noise((64, 64), 90)))
    png[len(png) // 2] ^= 0xFF
    corrupt = "corrupt image"
    return {
        "truncated JPEG": (
            whole[: len(whole) // 2],
            corrupt,
            "Pillow cannot read .*truncated.*need a whole image file",
        ),
        "PNG with a flipped byte": (bytes(png), corrupt, "which Pillow cannot read"),
        "no image": (b"<html>", corrupt, "cannot identify image file"),
        "no bytes": (b"", corrupt, "which Pillow cannot read"),
        "no file": (
            "nowhere.png",
            "missing image",
            "Got the image 'nowhere.png', which cannot be read .*`image_folder`",
        ),
        "neither": ({"bytes": None, "path": None}, "missing image", "neither a path nor bytes"),
    }


@pytest.mark.parametrize("name", broken_images())
def test_a_broken_image_is_a_bad_row_that_says_what_and_where(name, tmp_path) -> None:
    image, kind, message = broken_images()[name]
    source = RecordSource([{"id": "000123", "image": image, "text": "words"}], "captions", image_folder=tmp_path)
    with pytest.raises(BadRow, match=message + r".* \(id 000123\)") as caught:
        source.sample(0, "image_to_text", np.random.default_rng(0))
    assert caught.value.kind == kind


def test_a_broken_image_in_a_file_does_not_stop_datasets_from_reading_the_others(tmp_path) -> None:
    options = folder_with_csv(tmp_path / "data")
    (tmp_path / "data" / "train" / "3.png").write_bytes(encoded(shade(3))[:40])
    for streaming in (False, True):
        source = read_source(**options, adapter="captions", streaming=streaming)
        rows = list(source.stream(0, 1, 1, (0, 1), 0)) if streaming else [source.row(i) for i in range(COUNT)]
        assert [captioned(source, row)[0] for i, row in enumerate(rows) if i != 3] == CAPTIONS[:3] + CAPTIONS[4:]
        with pytest.raises(BadRow, match="3.png', which Pillow cannot read"):
            captioned(source, rows[3])


def test_an_image_that_the_task_does_not_show_is_never_opened() -> None:
    source = RecordSource([{"image": b"broken", "text": "words"}], "captions", tasks={"text": 1.0})
    assert source.sample(0, "text", np.random.default_rng(0))["messages"][0]["content"][0]["text"] == "words"


def test_an_image_is_turned_upright_as_its_exif_says_and_grey_or_coloured_as_the_processor_needs() -> None:
    image = Image.new("RGB", (16, 8), "white")
    image.paste("black", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is on the right
    opened = open_image({"bytes": encoded(image, "JPEG", exif=exif), "path": "a.jpg"})
    assert opened.size == (8, 16)
    assert np.asarray(opened)[0].max() < 64
    assert np.asarray(opened)[-1].min() > 192
    processor = MDMProcessor.from_pretrained(CARD)
    pixels = processor.image_processor([opened], return_tensors="pt")["pixel_values"]
    assert pixels.shape[1] == 1
    assert pixels[0, 0, 0].max() < pixels[0, 0, -1].min()


def test_what_the_check_refuses_is_a_bad_row() -> None:
    processor = MDMProcessor.from_pretrained(CARD)
    rows = [{"text": "a seven"}, {"text": "an <|image|> mark"}, {"text": "a " * 5000}]
    source = RecordSource(rows, "text", check=processor.apply_chat_template)
    source.sample(0, "text", np.random.default_rng(0))
    for index, message in ((1, "control token"), (2, "need")):
        with pytest.raises(BadRow, match=message) as caught:
            source.sample(index, "text", np.random.default_rng(0))
        assert caught.value.kind == "refused"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nowhere.parquet"}, "Got path 'nowhere.parquet', name None, split 'train', which cannot be read"),
        ({"path": "org/nothing"}, "Got path 'org/nothing'.*need a Hub id, a folder or a file of data; check"),
        ({"split": "test"}, "split 'test', which cannot be read"),
        ({"path": "saved", "split": "test"}, "Got split 'test'; the folder has train; name one of those"),
        ({"adapter": "imagnet"}, "Got adapter 'imagnet'; need one of imagenet, journeydb"),
        ({"adapter": dict}, "Got a function as adapter and no tasks; name in `tasks`"),
        ({"on_bad": "ignore"}, "Got on_bad 'ignore'; need 'skip' or 'refuse'"),
        ({"tasks": {"video": 1.0}}, "Got tasks video; choose among class_to_image"),
    ],
)
def test_a_source_that_cannot_be_is_refused(options, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "rows.jsonl", [{"text": "words"}])
    saved_to_disk(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_source(**({"path": "rows.jsonl", "adapter": "text"} | options))


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_rows_whose_image_is_named_by_a_template_lend_their_words_to_the_tokenizer_and_their_length(
    streaming, tmp_path
) -> None:
    rows = [{"image_id": i, "caption": "word " * (i + 1)} for i in range(3)]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": rows, "info": {"year": 2017}}))
    named = {"field": "annotations", "image_file": "{image_id:012d}.jpg"}
    source = read_source(tmp_path / "captions.json", "coco", streaming=streaming, **named)
    assert sorted(source.texts()) == ["word", "word word", "word word word"]
    if not streaming:
        assert [source.length(i) for i in range(3)] == [4, 9, 14]


MALFORMED = {
    "ultrachat, a turn of None": ("ultrachat", {"messages": [None]}),
    "llava, a turn of None": ("llava", {"conversations": [None]}),
    "visual_genome, a pair of None": ("visual_genome", {"image": b"", "qas": [None]}),
    "journeydb, Task2 a string": ("journeydb", {"img_path": "a.jpg", "prompt": "a cat", "Task2": "a dog"}),
    "conversations, a part a string": ("conversations", {"messages": [{"role": "user", "content": ["hello"]}]}),
    "ocrvqa, answers a number": ("ocrvqa", {"image": b"", "questions": ["what?"], "answers": 3}),
    "shapes, lists of unlike length": (
        "shapes",
        {"image": b"", "captions": ["a"], "questions": ["what?"], "answers": [], "messages": []},
    ),
    "shapes, a question of 3": (
        "shapes",
        {"image": b"", "captions": ["a"], "questions": [3], "answers": ["a"], "messages": []},
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_nested_value_of_the_wrong_kind_is_a_bad_row_that_stops_neither_the_run_nor_the_tokenizer(name) -> None:
    adapter, row = MALFORMED[name]
    source = RecordSource([{"id": 7, **row}], adapter)
    with pytest.raises(BadRow, match=r"^Got .*; need .*; mend the row.*\(id 7\)$") as caught:
        source.sample(0, next(iter(source.tasks)), np.random.default_rng(0))
    assert caught.value.kind == "bad value"
    assert list(source.texts()) == []
    assert source.length(0) == 0


def test_a_template_that_the_row_cannot_fill_is_a_bad_row() -> None:
    source = RecordSource([{"id": 7, "text": "words"}], "captions", image_file="{image_id:012d}.jpg")
    with pytest.raises(BadRow, match=r"image_file '\{image_id:012d\}.jpg' and a row with the fields id, text"):
        source.sample(0, "image_to_text", np.random.default_rng(0))


def test_a_stream_has_no_length() -> None:
    source = RecordSource(datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), "text")
    with pytest.raises(TypeError, match="which has no length; use StreamingMix"):
        len(source)
