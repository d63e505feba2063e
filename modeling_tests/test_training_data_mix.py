"""A mix of sources: the same whenever it is drawn, every row once a pass, every bad row in the account."""

import io
import pickle
import pydoc_data.topics
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from mdm_hf import MDMConfig, MDMForMultiModalGeneration, MDMProcessor
from mdm_hf.training.mix import ConversationMix, StreamingMix
from mdm_hf.training.readers import RecordSource
from mdm_hf.training.trainer import ConversationCollator, MDMTrainer


CARD = Path(__file__).parents[1] / "model_cards" / "mdm-digits"


def words(count: int, start: str = "word", **options) -> RecordSource:
    return RecordSource([{"text": f"{start} {i}"} for i in range(count)], "text", **options)


def pictures(count: int, bad: tuple[int, ...] = (), **options) -> RecordSource:
    """Captioned images, those numbered in `bad` broken: by turns no image file, a blank text, no text."""
    rows = []
    for i in range(count):
        file = io.BytesIO()
        Image.new("L", (8, 8), i).save(file, "PNG")
        rows.append({"id": str(i), "image": {"bytes": file.getvalue(), "path": None}, "text": f"shade {i}"})
    for n, i in enumerate(bad):
        rows[i] |= ({"image": {"bytes": b"broken", "path": None}}, {"text": " "}, {"text": None})[n % 3]
    return RecordSource(datasets.Dataset.from_list(rows), "captions", tasks={"image_to_text": 1.0}, **options)


def stream(shards: int, rows: int, **options) -> RecordSource:
    """`rows` rows in each of `shards` shards: "<shard> <row>"."""
    data = datasets.IterableDataset.from_generator(
        _rows,
        gen_kwargs={"shards": list(range(shards)), "rows": rows},
        features=datasets.Features({"text": datasets.Value("string")}),
    )
    return RecordSource(data, "text", **options)


def _rows(shards, rows):
    for shard in shards:
        for row in range(rows):
            yield {"text": f"{shard} {row}"}


def said(example: dict) -> str:
    return example["messages"][-1]["content"][0]["text"]


def as_given(examples: list[dict]) -> list[dict]:
    return examples


def test_each_pass_over_a_source_gives_every_row_once_in_another_order() -> None:
    mix = ConversationMix({"words": words(12)}, 36, 4, seed=5)
    passes = [[said(mix[i]) for i in range(start, start + 12)] for start in (0, 12, 24)]
    assert [sorted(one) for one in passes] == [sorted(f"word {i}" for i in range(12))] * 3
    assert passes[0] != passes[1] != passes[2]


def test_each_source_of_a_mix_gives_every_row_once_a_pass_however_the_batches_fall() -> None:
    sources = {"many": words(40, "many"), "few": words(10, "few")}
    mix = ConversationMix(sources, 4000, 5, weights={"many": 3.0, "few": 1.0})
    drawn: dict[str, list[str]] = {"many": [], "few": []}
    for number in range(800):
        name, _ = mix.choice(number)
        batch = [said(mix[number * 5 + i]) for i in range(5)]
        assert {text.split()[0] for text in batch} == {name}
        drawn[name] += batch
    assert len(drawn["many"]) / 4000 == pytest.approx(0.75, abs=0.05)
    for name, size in (("many", 40), ("few", 10)):
        for start in range(0, len(drawn[name]) - size + 1, size):
            assert len(set(drawn[name][start : start + size])) == size


def test_an_example_depends_on_seed_and_index_alone_whatever_was_drawn_before() -> None:
    def mix(seed: int) -> ConversationMix:
        return ConversationMix({"a": words(40, "a"), "b": words(7, "b"), "c": pictures(9)}, 600, 3, seed=seed)

    first, resumed, other = mix(1), mix(1), mix(2)
    in_order = [said(first[i]) for i in range(600)]
    assert {i: said(resumed[i]) for i in reversed(range(600))} == dict(enumerate(in_order))
    assert in_order != [said(other[i]) for i in range(600)]


def test_tasks_come_by_their_weights_within_a_source_and_from_where_they_start() -> None:
    rows = [{"image": Image.new("L", (8, 8)), "text": "words", "label": 3}]
    source = RecordSource(rows, "captions", tasks={"text_to_image": 3.0, "image_to_text": 1.0, "class_to_image": 9.0})
    mix = ConversationMix({"a": source}, 8000, 2, task_starts={"class_to_image": 4000})
    before, after = (Counter(mix.task_of(i) for i in range(start, start + 4000, 2)) for start in (0, 4000))
    assert before["class_to_image"] == 0
    assert before["text_to_image"] / 2000 == pytest.approx(0.75, abs=0.04)
    assert after["class_to_image"] / 2000 == pytest.approx(9 / 13, abs=0.04)


def test_a_source_whose_tasks_have_not_started_leaves_its_share_to_the_others() -> None:
    talk = RecordSource([{"data": ["Hi", "Ho"]}], "ultrachat")
    mix = ConversationMix({"words": words(3), "talk": talk}, 400, 2, task_starts={"conversation": 200})
    assert {mix.choice(number)[0] for number in range(100)} == {"words"}
    assert {mix.choice(number)[0] for number in range(100, 200)} == {"words", "talk"}


def test_bad_rows_are_counted_by_kind_named_and_replaced_by_the_next_good_ones(caplog) -> None:
    mix = ConversationMix({"shades": pictures(12, bad=(2, 3, 4, 7))}, 12, 4)
    with caplog.at_level("WARNING"):
        shown = [said(mix[i]) for i in range(12)]
    good = {f"shade {i}" for i in range(12)} - {"shade 2", "shade 3", "shade 4", "shade 7"}
    assert set(shown) == good
    assert [said(mix[i]) for i in range(12)] == shown
    met = mix.report()["shades"]
    assert set(met) == {"corrupt image", "empty text", "missing field"}
    assert min(met.values()) >= 2
    assert "of shades, corrupt image: Got an image, which Pillow cannot read" in caplog.text
    assert "(id 2)" in caplog.text


def test_many_bad_rows_are_named_only_at_first_and_then_in_totals(caplog) -> None:
    mix = ConversationMix({"shades": pictures(40, bad=tuple(range(1, 40)))}, 40, 4)
    with caplog.at_level("WARNING"):
        assert {said(mix[i]) for i in range(40)} == {"shade 0"}
    lines = [record.message for record in caplog.records]
    assert sum("Pillow" in line or "need" in line for line in lines) == 5
    assert "Skipped 10 rows of shades so far" in " ".join(lines)
    assert "Skipped 100 rows of shades so far" in " ".join(lines)


def test_a_source_that_refuses_bad_rows_stops_at_the_first_and_names_it() -> None:
    mix = ConversationMix({"shades": pictures(3, bad=(0, 1, 2), on_bad="refuse")}, 12, 4)
    with pytest.raises(
        ValueError, match=r"Bad row: row \d of shades: Got .* need .*\(id \d\) Or read it with on_bad='skip'"
    ):
        mix[0]


@pytest.mark.parametrize("kind", ["table", "stream"])
def test_a_source_of_bad_rows_alone_is_an_error_and_not_an_endless_search(kind) -> None:
    rows = datasets.Dataset.from_list([{"text": " "}] * 3)
    if kind == "table":
        with pytest.raises(ValueError, match="Got 3 bad rows of blanks and no good one between; need at least one"):
            ConversationMix({"blanks": RecordSource(rows, "text")}, 12, 4)[0]
    else:
        source = RecordSource(rows.to_iterable_dataset(), "text")
        with pytest.raises(ValueError, match="Got 1000 bad rows of blanks and .*'empty text': 1000"):
            next(iter(StreamingMix({"blanks": source}, 4)))


@pytest.mark.parametrize(("start_method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_give_the_same_batches_as_none_and_write_into_one_account(start_method, workers) -> None:
    def batches(**options) -> tuple[list, dict]:
        mix = ConversationMix({"shades": pictures(12, bad=(2, 3, 4)), "words": words(5)}, 80, 4)
        loader = DataLoader(mix, batch_size=4, collate_fn=as_given, **options)
        return [[said(example) for example in batch] for batch in loader], mix.report()

    alone = batches()
    assert alone[1]["shades"]
    assert batches(num_workers=workers, multiprocessing_context=start_method) == alone


def test_a_batch_of_the_mix_is_a_batch_of_the_model() -> None:
    mix = ConversationMix({"shades": pictures(12)}, 8, 4)
    collator = ConversationCollator(MDMProcessor.from_pretrained(CARD))
    inputs = next(iter(DataLoader(mix, batch_size=4, collate_fn=collator)))
    assert inputs["pixel_values"].shape == (4, 1, 8, 8)
    assert bool(inputs["target_mask"].any(1).all())


def one_pass(shards: int, rows: int, world_size: int, workers: int, shuffle_buffer: int) -> list[list[str]]:
    """What each process's loader gives in the first pass over a stream: that many batches of one."""
    parts = []
    for rank in range(world_size):
        mix = StreamingMix(
            {"s": stream(shards, rows)}, 1, shuffle_buffer=shuffle_buffer, rank=rank, world_size=world_size
        )
        loader = iter(DataLoader(mix, batch_size=1, num_workers=workers, collate_fn=as_given))
        parts.append([said(next(loader)[0]) for _ in range(shards * rows // world_size)])
    return parts


@pytest.mark.parametrize(
    ("shards", "world_size", "workers"), [(1, 1, 0), (1, 2, 0), (4, 2, 2), (3, 2, 0), (3, 3, 1), (4, 1, 2), (2, 3, 2)]
)
@pytest.mark.parametrize("shuffle_buffer", [1, 5])
def test_no_row_of_a_stream_is_lost_or_seen_twice_in_a_pass(shards, world_size, workers, shuffle_buffer) -> None:
    parts = one_pass(shards, 12, world_size, workers, shuffle_buffer)
    seen = sorted(text for part in parts for text in part)
    assert seen == sorted(f"{shard} {row}" for shard in range(shards) for row in range(12))


def test_a_stream_is_shuffled_by_the_seed_and_anew_in_each_pass() -> None:
    def passes(seed: int) -> list[list[str]]:
        rows = iter(StreamingMix({"s": stream(2, 10)}, 4, seed=seed))
        return [[said(next(rows)) for _ in range(20)] for _ in range(2)]

    assert passes(0) == passes(0)
    assert passes(0) != passes(1)
    assert passes(0)[0] != passes(0)[1]
    assert sorted(passes(0)[0]) == sorted(passes(0)[1])


def test_streams_share_batches_as_tables_do() -> None:
    mix = StreamingMix({"a": stream(1, 20), "b": stream(1, 20)}, 4, weights={"a": 3.0, "b": 1.0})
    table = ConversationMix({"a": words(20), "b": words(20)}, 400, 4, weights={"a": 3.0, "b": 1.0})
    assert [mix.choice(n) for n in range(100)] == [table.choice(n) for n in range(100)]


def streamed_pairs() -> StreamingMix:
    """Conversations with two images each, under a short answer."""
    turns = [{"from": "human", "value": "<image><image> alike?"}, {"from": "gpt", "value": "no"}]
    rows = datasets.Dataset.from_list(
        [{"id": str(i), "image": [f"{i}.png"] * 2, "conversations": turns} for i in range(8)]
    )
    source = RecordSource(rows.to_iterable_dataset(num_shards=2), "llava")
    return StreamingMix({"pairs": source}, 4)


def trainer(folder: Path, max_steps: int) -> MDMTrainer:
    torch.manual_seed(0)
    return MDMTrainer(
        model=MDMForMultiModalGeneration(MDMConfig.from_preset("mdm-digits", hidden_size=32, num_hidden_layers=1)),
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=max_steps,
            per_device_train_batch_size=4,
            save_steps=1,
            lr_scheduler_type="constant",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=streamed_pairs(),
        data_collator=ConversationCollator(MDMProcessor.from_pretrained(CARD)),
    )


def test_the_trainer_reads_a_stream_with_all_its_images_and_resumes_where_it_stopped(tmp_path, monkeypatch) -> None:
    for i in range(8):
        Image.new("L", (8, 8), 30 * i).save(tmp_path / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    loader = trainer(tmp_path / "none", 1).get_train_dataloader()
    assert next(iter(loader))["pixel_values"].shape[0] == 2 * 4
    trainer(tmp_path / "whole", 3).train()
    trainer(tmp_path / "parts", 2).train()
    trainer(tmp_path / "parts", 3).train(resume_from_checkpoint=True)
    last = "checkpoint-3/model.safetensors"
    expected, resumed = (load_file(tmp_path / run / last) for run in ("whole", "parts"))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_more_workers_than_shards_are_refused_since_the_surplus_would_have_no_rows() -> None:
    with pytest.raises(
        ValueError, match=r"Got 2 DataLoader workers for a stream of 1 shard\(s\).*dataloader_num_work"
    ):
        next(stream(1, 4).stream(0, 1, 2, (0, 1), 0))


def test_a_stream_without_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Got no row of s for process 0 of 1 with 1 worker\(s\); need at least one"):
        next(iter(StreamingMix({"s": stream(1, 0)}, 1)))


def test_a_mix_can_be_pickled() -> None:
    mix = pickle.loads(pickle.dumps(ConversationMix({"words": words(4)}, 8, 2)))
    assert said(mix[0]).startswith("word")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": {}}, r"Got sources \{\}; need a dict of name -> source, at least one"),
        ({"sources": [words(2)]}, "need a dict of name -> source"),
        ({"weights": {"other": 1.0}}, "Got weights for other and the sources words; need a weight for each"),
        ({"weights": {"words": 0.0}}, r"Got weights \{'words': 0.0\} for sources; need weights of 0 or more"),
        ({"sources": {"words": words(2, tasks={"text": -1.0})}}, r"\{'text': -1.0\} for words; need weights of 0"),
        ({"task_starts": {"text": 5}}, "need a task of positive weight that starts at 0"),
        ({"batch_size": 0}, "Got batch_size 0; need at least 1"),
        ({"num_samples": -1}, "Got num_samples -1; need at least 0"),
        ({"sources": {"none": words(0)}}, "Got the source none without rows; need at least one"),
        ({"sources": {"s": stream(1, 1)}}, "Got the streaming source s; use StreamingMix"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ConversationMix(**({"sources": {"words": words(2)}, "num_samples": 8, "batch_size": 2} | options))


def test_a_table_in_a_streaming_mix_is_refused() -> None:
    with pytest.raises(ValueError, match="Got the source words, a table; use ConversationMix"):
        StreamingMix({"words": words(2)}, 2)


def padding(mix: ConversationMix) -> float:
    """The share of letters that a batch is padded with."""
    texts = [mix[i]["messages"][0]["content"][0]["text"] for i in range(len(mix))]
    batches = [texts[i : i + mix.batch_size] for i in range(0, len(texts), mix.batch_size)]
    wide = sum(max(map(len, batch)) * len(batch) for batch in batches)
    return 1 - sum(map(len, texts)) / wide


def test_length_groups_pad_less_and_lose_no_row():
    """Paragraphs of Python's documentation, batches of 8."""
    topics = pydoc_data.topics.topics.values()
    rows = [{"text": part} for topic in topics for part in topic.split("\n\n") if part.strip()][:2048]
    source = RecordSource(rows, "text")
    plain, grouped = (ConversationMix({"docs": source}, 2048, 8, seed=1, length_groups=n) for n in (1, 16))
    assert padding(plain) > 0.6
    assert padding(grouped) < 0.3
    seen = [[mix[i]["messages"][0]["content"][0]["text"] for i in range(2048)] for mix in (plain, grouped)]
    assert sorted(seen[0]) == sorted(seen[1])
    again = ConversationMix({"docs": source}, 2048, 8, seed=1, length_groups=16)
    assert [again[i] for i in (700, 3, 2047)] == [grouped[i] for i in (700, 3, 2047)], "in any order of asking"
    lengths = [len(text) for text in seen[1]]
    firsts = [lengths[i] for i in range(0, 2048, 8)]
    assert firsts != sorted(firsts), "short batches do not come first"


def test_no_length_groups_are_refused():
    with pytest.raises(ValueError, match="Got length_groups 0; need 1"):
        ConversationMix({"docs": RecordSource([{"text": "a"}], "text")}, 8, 8, length_groups=0)
