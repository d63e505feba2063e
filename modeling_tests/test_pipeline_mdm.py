"""Claims about MDMPipeline and the Auto classes, on the shipped digits folder's processor and a tiny model."""

import copy
import json
import logging
import threading
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny import tiny_pipeline
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor, pipeline
from transformers.pipelines.any_to_any import Chat

from mdm_hf import MDMConfig, MDMForMultiModalGeneration, MDMPipeline, MDMProcessor
from mdm_hf.pipeline_mdm import TASK


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def digit(value: int = 128) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, dtype=np.uint8))


def pixels(results) -> list:
    return [np.asarray(image).tolist() for r in results for image in r["images"]]


def test_a_call_without_conditions_gives_one_image_and_its_text(pipe):
    (result,) = pipe(seed=0, num_inference_steps=2)
    assert set(result) == {"text", "images"}
    assert isinstance(result["text"][0], str)
    assert result["images"][0].size == (8, 8)
    assert len(result["text"]) == len(result["images"]) == 1


@pytest.mark.parametrize(
    ("conditions", "images", "texts"),
    [
        ({"class_ids": 3, "generate": "image"}, 1, 0),
        ({"text": "a three", "generate": ("image",)}, 1, 0),
        ({"images": digit(), "generate": "text"}, 0, 1),
        ({"images": digit(), "text": "which digit is this?", "generate": "text"}, 0, 1),
        ({"text": "a three", "generate": ("image", "text")}, 1, 1),
    ],
    ids=["class-to-image", "text-to-image", "caption", "question", "both"],
)
def test_every_task_is_the_same_call(pipe, conditions, images, texts):
    (result,) = pipe(**conditions, seed=0, num_inference_steps=2)
    assert (len(result["images"]), len(result["text"])) == (images, texts)


def test_results_are_flat_in_prompt_order_and_each_depends_on_its_own_seed_only(pipe):
    prompts = ["a three", "this is an 8"]
    options = {"generate": "image", "num_inference_steps": 3}
    together = pipe(text=prompts, num_return_sequences=2, seed=10, **options)
    assert len(together) == 4
    for n in range(4):
        alone = pipe(text=prompts[n // 2], seed=10 + n, **options)
        assert pixels(alone) == pixels(together[n : n + 1])
    assert pixels(pipe(text=prompts, num_return_sequences=2, seed=10, batch_size=3, **options)) == pixels(together)
    assert pixels(pipe(text=prompts, num_return_sequences=2, seed=11, **options)) != pixels(together)


def test_messages_and_conditions_are_the_same_prompt(pipe):
    parts = [{"type": "image", "image": digit()}, {"type": "text", "text": "which digit is this?"}]
    messages = [{"role": "user", "content": parts}]
    options = {"generate": "text", "seed": 1, "num_inference_steps": 3}
    by_messages = pipe(messages=messages, **options)
    assert by_messages == pipe(images=digit(), text="which digit is this?", **options)
    assert pipe(messages=[messages, messages], **options)[0] == by_messages[0]


def test_the_class_matters_only_if_it_is_given(pipe):
    options = {"generate": "image", "seed": 1, "num_inference_steps": 3}
    three, four, none = (pixels(pipe(class_ids=[c], **options)) for c in (3, 4, None))
    assert three != four != none != three


def test_another_scheduler_may_be_passed(pipe):
    options = {"class_ids": 1, "generate": "image", "seed": 0, "num_inference_steps": 4}
    solver = DDIMScheduler(prediction_type="sample", clip_sample=False)
    assert pixels(pipe(scheduler=solver, **options)) != pixels(pipe(**options))


def test_one_folder_holds_model_processor_scheduler_and_generation_config(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "scheduler",
        "tokenizer.json",
    }
    assert not (tmp_path / "model_index.json").exists()
    loaded = MDMPipeline.from_pretrained(tmp_path, device="cpu")
    loaded.set_progress_bar_config(disable=True)
    options = {"class_ids": [1, 2], "seed": 0, "num_inference_steps": 3}
    assert pixels(loaded(**options)) == pixels(pipe(**options))
    assert type(AutoModel.from_pretrained(tmp_path)) is MDMForMultiModalGeneration
    assert type(AutoModelForMultimodalLM.from_pretrained(tmp_path)) is MDMForMultiModalGeneration
    assert type(AutoProcessor.from_pretrained(tmp_path)) is MDMProcessor
    assert type(AutoConfig.from_pretrained(tmp_path)) is MDMConfig


def test_the_scheduler_that_was_saved_comes_back(pipe, tmp_path):
    MDMPipeline(pipe.model, pipe.processor, DDIMScheduler(prediction_type="sample")).save_pretrained(tmp_path)
    assert type(MDMPipeline.from_pretrained(tmp_path).scheduler) is DDIMScheduler
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("DDIMScheduler", "NoSuchScheduler"))
    with pytest.raises(ValueError, match="saved with the scheduler 'NoSuchScheduler', which diffusers"):
        MDMPipeline.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="without scheduler/scheduler_config.json, which its config.json says it was"):
        MDMPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["generation_config", "config", "processor"])
def test_a_save_that_is_stopped_leaves_no_folder_that_samples_with_another_solver(pipe, tmp_path, monkeypatch, part):
    stopped = pipe.processor if part == "processor" else getattr(pipe.model, part)
    monkeypatch.setattr(type(stopped), "save_pretrained", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        MDMPipeline(pipe.model, pipe.processor, DDIMScheduler(prediction_type="sample")).save_pretrained(tmp_path)
    assert "DDIMScheduler" in (tmp_path / "scheduler" / "scheduler_config.json").read_text()
    config = tmp_path / "config.json"
    assert not config.is_file() or "scheduler/scheduler_config.json" in json.loads(config.read_text())["saved_with"]
    assert type(pipe.model.scheduler) is not DDIMScheduler


def test_a_model_without_a_solver_leaves_none_of_an_earlier_save(pipe, tmp_path):
    MDMPipeline(pipe.model, pipe.processor, DDIMScheduler(prediction_type="sample")).save_pretrained(tmp_path)
    model = MDMForMultiModalGeneration.from_pretrained(tmp_path)
    model.scheduler = None
    model.save_pretrained(tmp_path)
    assert MDMForMultiModalGeneration.from_pretrained(tmp_path).scheduler is None


def test_a_folder_that_names_no_files_to_sample_with_may_have_none_but_says_so(pipe, tmp_path, caplog):
    pipe.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("saved_with") == ["generation_config.json", "scheduler/scheduler_config.json"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in ("generation_config.json", "scheduler/scheduler_config.json"):
        (tmp_path / file).unlink()
    logging.getLogger("transformers").addHandler(caplog.handler)
    loaded = MDMPipeline.from_pretrained(tmp_path)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert loaded.scheduler is None
    assert (
        f"Got {tmp_path} without generation_config.json; sampling as MDMGenerationConfig's defaults say" in caplog.text
    )


def test_all_parts_come_from_the_subfolder_and_options_become_defaults(pipe, tmp_path):
    MDMPipeline(pipe.model, pipe.processor, DDIMScheduler(prediction_type="sample")).save_pretrained(tmp_path / "deep")
    loaded = MDMPipeline.from_pretrained(tmp_path, subfolder="deep", num_inference_steps=2, generate="image")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is DDIMScheduler
    expected = pipe("a three", generate="image", seed=0, num_inference_steps=2, scheduler=loaded.scheduler)
    assert pixels(loaded("a three", seed=0)) == pixels(expected)
    with pytest.raises(ValueError, match="Got the option\\(s\\) seed; need some of generate"):
        MDMPipeline.from_pretrained(tmp_path, subfolder="deep", seed=1)


def test_an_adapter_is_loaded_onto_the_base_that_it_names(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "base")
    base = MDMPipeline.from_pretrained(tmp_path / "base")
    adapter = LoraConfig(r=2, init_lora_weights=False, task_type="FEATURE_EXTRACTION")
    torch.manual_seed(0)
    get_peft_model(base.model, adapter).eval().save_pretrained(tmp_path / "alone")
    adapted = MDMPipeline(base.model, base.processor, DDIMScheduler(prediction_type="sample"))
    adapted.set_progress_bar_config(disable=True)
    options = {"generate": "image", "seed": 0, "num_inference_steps": 2}
    alone = MDMPipeline.from_pretrained(tmp_path / "alone")
    alone.set_progress_bar_config(disable=True)
    assert pixels(alone("a three", scheduler=adapted.scheduler, **options)) == pixels(adapted("a three", **options))

    alone.scheduler = adapted.scheduler
    alone.save_pretrained(tmp_path / "both")
    both = MDMPipeline.from_pretrained(tmp_path / "both")
    assert type(both.scheduler) is DDIMScheduler
    both.set_progress_bar_config(disable=True)
    assert pixels(both("a three", **options)) == pixels(adapted("a three", **options))

    config = tmp_path / "alone" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="adapter_config.json names no base_model_name_or_path; need the model that"):
        MDMPipeline.from_pretrained(tmp_path / "alone")


def test_a_pipeline_without_a_processor_is_refused(pipe):
    with pytest.raises(ValueError, match="Got a model without a processor; need both; pass processor=MDMProcessor"):
        MDMPipeline(pipe.model)


CHAT = [{"role": "user", "content": "a three"}]
PROMPTS = ["a three", "this is an 8", "the number five"]
DRAW = {"generate": "image", "seed": 5, "num_inference_steps": 2}


class TorchColumn(torch.utils.data.Dataset):
    """As transformers' KeyDataset: a length, items, and no end that iteration would see."""

    def __len__(self):
        return len(PROMPTS)

    def __getitem__(self, index: int):
        return PROMPTS[index % len(PROMPTS)]


@pytest.mark.parametrize(
    "prompts",
    [
        {"text": (text for text in PROMPTS)},
        {"text": TorchColumn()},
        {"text": ({"text": text, "images": None} for text in PROMPTS)},
        {"text": [{"text": text} for text in PROMPTS]},
        {"text": [[{"role": "user", "content": text}] for text in PROMPTS]},
        {"messages": ([{"role": "user", "content": text}] for text in PROMPTS)},
        {"text": ({"messages": [{"role": "user", "content": text}]} for text in PROMPTS)},
        {"text": (text for text in PROMPTS), "class_ids": [None] * 3},
        {"text": [Chat([{"role": "user", "content": text}]) for text in PROMPTS]},
        {"messages": (Chat([{"role": "user", "content": text}]) for text in PROMPTS)},
    ],
    ids=[
        *("generator", "torch-data-set", "rows", "list-of-rows", "chats", "messages", "rows-of-messages", "columns"),
        *("Chats", "Chats-one-by-one"),
    ],
)
def test_however_prompts_come_they_give_the_same_samples(pipe, prompts):
    expected = pixels(pipe(text=PROMPTS, num_return_sequences=2, **DRAW))
    results = pipe(**prompts, num_return_sequences=2, batch_size=4, **DRAW)
    assert isinstance(results, list) == isinstance(next(iter(prompts.values())), list)
    assert pixels(results) == expected


def test_a_number_of_numpy_is_a_class_and_no_data_set(pipe):
    options = {"generate": "image", "seed": 0, "num_inference_steps": 2}
    assert pixels(pipe(class_ids=np.int64(3), **options)) == pixels(pipe(class_ids=3, **options))


def test_a_data_set_is_drawn_row_by_row(pipe):
    datasets = pytest.importorskip("datasets")
    table = datasets.table.InMemoryTable.from_pydict({"text": PROMPTS, "class_ids": [1, None, 3]})
    rows = datasets.Dataset(table, fingerprint="rows")
    expected = pixels(pipe(text=PROMPTS, class_ids=[1, None, 3], **DRAW))
    assert pixels(pipe(rows, batch_size=2, **DRAW)) == expected
    assert pixels(pipe(text=rows["text"], class_ids=rows["class_ids"], batch_size=2, **DRAW)) == expected
    assert pixels(pipe(rows.to_iterable_dataset(), **DRAW)) == expected


def test_one_conversation_may_be_given_as_other_pipelines_take_it(pipe):
    assert pixels(pipe(CHAT, **DRAW)) == pixels(pipe(messages=CHAT, **DRAW)) == pixels(pipe("a three", **DRAW))
    assert pixels(pipe(Chat(CHAT), **DRAW)) == pixels(pipe(messages=Chat(CHAT), **DRAW)) == pixels(pipe(CHAT, **DRAW))
    canvas = {"canvas": {"type": "image"}, "seed": 5, "num_inference_steps": 2}
    assert pixels(pipe(messages=Chat(CHAT), **canvas)) == pixels(pipe(messages=CHAT, **canvas))
    scores = [pipe.score_choices(messages=one, choices=["a", "b"], num_samples=4) for one in (Chat(CHAT), CHAT)]
    assert repr(scores[0]) == repr(scores[1])


def test_messages_read_one_by_one_are_refused_as_one_alone_is(pipe):
    for ask in (pipe.predict_modalities, lambda **prompts: next(pipe(**prompts, **DRAW))):
        with pytest.raises(ValueError, match="Got the message .* alone in place of a conversation; need a list of m"):
            ask(messages=(message for message in CHAT * 2))


def test_a_generator_is_read_a_batch_at_a_time_and_may_be_endless(pipe):
    read = []

    def endless():
        while True:
            read.append(PROMPTS[len(read) % 3])
            yield read[-1]

    results = pipe(endless(), batch_size=2, **DRAW)
    assert read == []
    first = [next(results) for _ in range(3)]
    assert len(read) == 4
    assert pixels(first) == pixels(pipe(text=PROMPTS, **DRAW))


def test_conditions_that_end_before_others_are_refused(pipe):
    with pytest.raises(ValueError, match="`class_ids` ended before the other conditions; need as many"):
        list(pipe((text for text in PROMPTS), class_ids=iter([1, 2]), **DRAW))
    with pytest.raises(ValueError, match="lists of different lengths"):
        pipe(TorchColumn(), class_ids=[1, 2], **DRAW)


@pytest.mark.parametrize("lag", [0.0, 1.0, -1.0])
def test_a_stream_shows_every_network_call_and_ends_with_the_result(pipe, lag):
    options = {"num_inference_steps": 4, "modality_lag": lag, "seed": 3}
    looks = list(pipe.stream(text=["a three", None], num_return_sequences=2, **options))
    results = pipe(text=["a three", None], num_return_sequences=2, **options)
    assert len(looks) == round(4 * (1 + abs(lag)))
    assert pixels(looks[-1]) == pixels(results)
    assert [r["text"] for r in looks[-1]] == [r["text"] for r in results]
    assert all(len(look) == 4 and set(look[0]) == {"text", "images"} for look in looks)
    assert pixels(looks[0]) != pixels(looks[-1])


def test_a_stream_computes_as_the_thread_that_asks_for_it(pipe):
    seen = []

    def look(*_):
        seen.append(
            (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_inference_mode_enabled())
        )

    options = {"generate": "image", "seed": 0, "num_inference_steps": 4, "callback_on_step_end": look}
    plain = pixels(pipe("a three", **options))
    with torch.autocast("cpu", torch.float16), torch.inference_mode():
        expected = pixels(pipe("a three", **options))
        *_, streamed = pipe.stream("a three", **options)
        *_, answer = pipe.chat().stream("a three", **options)
    assert pixels(streamed) == expected != plain
    assert pixels([answer])
    assert seen == 4 * [(False, torch.bfloat16, False)] + 12 * [(True, torch.float16, True)]


def test_a_stream_that_is_left_stops_the_network_and_its_errors_are_raised(pipe, monkeypatch):
    calls = []
    predict = type(pipe.model).predict_latents

    def counted(self, *arguments):
        calls.append(len(calls))
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return predict(self, *arguments)

    monkeypatch.setattr(type(pipe.model), "predict_latents", counted)
    threads = threading.active_count()
    looks = pipe.stream("a three", generate="image", num_inference_steps=9)
    next(looks)
    next(looks)
    looks.close()
    assert (len(calls), threading.active_count()) == (2, threads)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(pipe.stream("a three", generate="image", num_inference_steps=9))
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(pipe.stream("a three", generate="image", callback_on_step_end=lambda *step: next(iter(()))))
    assert threading.active_count() == threads


def test_a_stream_runs_the_callback_before_each_look(pipe):
    def blank(model, step, timesteps, tensors):
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    steps: list[int] = []
    options = {"generate": "image", "seed": 0, "num_inference_steps": 3}
    *looks, last = pipe.stream("a three", callback_on_step_end=blank, **options)
    assert (steps, len(looks)) == ([0, 1, 2], 2)
    assert pixels(last) == pixels(pipe("a three", callback_on_step_end=blank, **options))
    assert pixels(last) != pixels(pipe("a three", **options))


def test_a_stream_of_prompts_read_one_by_one_is_refused(pipe):
    with pytest.raises(ValueError, match="a stream draws all of them at once; make a list of them"):
        pipe.stream(text in PROMPTS for text in PROMPTS)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    MDMPipeline(pipe.model, pipe.processor, DDIMScheduler(prediction_type="sample")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("task", "trust"), [(TASK, None), (TASK, False), (TASK, True), (None, None), (None, True)])
def test_transformers_pipeline_gives_ours_without_trusting_code_in_the_folder(pipe, folder, task, trust):
    loaded = pipeline(task, model=folder, trust_remote_code=trust, device="cpu", generate="image", batch_size=2)
    assert (type(loaded), loaded.task, type(loaded.scheduler)) == (MDMPipeline, TASK, DDIMScheduler)
    options = {"class_ids": [1, 2, None], "seed": 0, "num_inference_steps": 2}
    loaded.set_progress_bar_config(disable=True)
    solver = DDIMScheduler(prediction_type="sample")
    assert pixels(loaded(**options)) == pixels(pipe(generate="image", scheduler=solver, **options))
    with pytest.raises(ValueError, match="Got the option\\(s\\) seed; need some of generate"):
        pipeline(TASK, model=pipe.model, processor=pipe.processor, device="cpu", seed=1)


@pytest.mark.parametrize(
    ("solver", "complaint"),
    [
        (
            DDIMScheduler(),
            r"`scheduler` \(DDIMScheduler\) has prediction_type 'epsilon', but MDM predicts clean latents",
        ),
        (DDIMScheduler, "`scheduler` is the class DDIMScheduler; it must be one of its objects, or its name"),
        ("EulerDiscreteScheduler", "EulerDiscreteScheduler.* starts from noise of scale"),
        (False, r"`scheduler` \(bool\) has no `prediction_type`"),
    ],
)
def test_a_solver_that_cannot_drive_the_model_is_refused_when_the_pipeline_is_made(pipe, solver, complaint):
    with pytest.raises(ValueError, match=complaint):
        MDMPipeline(pipe.model, pipe.processor, scheduler=solver)


def test_a_model_brings_and_keeps_its_solver_but_not_the_pipeline_whose_code_it_does_not_write(folder, tmp_path):
    model = AutoModel.from_pretrained(folder)
    assert type(model.scheduler) is DDIMScheduler
    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path).scheduler) is DDIMScheduler
    assert "pipeline_mdm" in (folder / "config.json").read_text()
    assert (folder / "pipeline_mdm.py").is_file()
    assert "pipeline_mdm" not in (tmp_path / "config.json").read_text()


QUESTION = [{"role": "user", "content": [{"type": "image", "image": digit()}, {"type": "text", "text": "a seven?"}]}]


@pytest.mark.parametrize("task", ["any-to-any", "image-text-to-text"])
def test_the_pipelines_of_transformers_answer_and_draw(pipe, folder, task, monkeypatch):
    # The first asks for torchvision wherever images are an input; neither it nor we ever use it.
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)
    theirs = pipeline(task, model=folder, device="cpu")

    def ask(**options) -> list:
        steps = {"num_inference_steps": 2, "generator": [torch.Generator().manual_seed(7)]}
        return theirs(**options, generate_kwargs=steps)

    expected = pipe(
        messages=QUESTION, generate="text", seed=7, num_inference_steps=2, scheduler=theirs.model.scheduler
    )
    answer = ask(text=QUESTION, return_full_text=False)
    assert [one["generated_text"] for one in answer] == expected[0]["text"]
    assert ask(text=QUESTION)[0]["generated_text"][-1] == {"role": "assistant", "content": expected[0]["text"][0]}
    batch = ask(text=[QUESTION, QUESTION], return_full_text=False)
    assert len(batch) == 2
    assert batch[0] == answer
    if task == "any-to-any":
        options = {"seed": 7, "num_inference_steps": 2, "scheduler": theirs.model.scheduler, "generate": "image"}
        for prompt in (CHAT, "a three"):
            drawn = ask(text=prompt, generate="image", generation_mode="image")[0]["generated_image"]
            assert pixels([{"images": [drawn]}]) == pixels(pipe(prompt, **options))
    with pytest.raises(ValueError, match=r"Got max_new_tokens=3; .* as processor_kwargs"):
        theirs(text=QUESTION, max_new_tokens=3)
    short = theirs(text=QUESTION, processor_kwargs={"max_new_tokens": 1}, return_full_text=False)
    assert len(short[0]["generated_text"].split()) <= 1


def compiled_of(pipe, monkeypatch=None, **overrides):
    """The pipeline with compiled blocks, on the same weights unless the config differs; with `monkeypatch` they are
    traced and guarded as ever, but no code is generated, which takes most of the time."""
    if monkeypatch is not None:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = copy.deepcopy(pipe.model)
    if overrides:
        model = MDMForMultiModalGeneration(MDMConfig.from_dict(pipe.model.config.to_dict() | overrides)).eval()
        torch.nn.init.normal_(model.latent_head.weight, std=0.3)
    compiled = MDMPipeline(model, pipe.processor, compile=True, device="cpu")
    compiled.set_progress_bar_config(disable=True)
    counters.clear()
    return compiled


def assert_draw_the_same(pipe, compiled, **options):
    options = {"seed": 0, "num_inference_steps": 2} | options
    expected, got = pipe(**options), compiled(**options)
    assert np.abs(np.array(pixels(got), dtype=int) - np.array(pixels(expected), dtype=int)).max(initial=0) <= 1
    assert [result["text"] for result in got] == [result["text"] for result in expected]


def test_compiled_blocks_draw_the_same(pipe):
    compiled = compiled_of(pipe)
    options = {"class_ids": [1, 2], "generate": "image", "num_inference_steps": 3, "guidance_scale": 2.0}
    for _ in range(2):
        assert_draw_the_same(pipe, compiled, **options)
        assert counters["stats"]["unique_graphs"] == 2  # of the prefix and of the step, for all blocks together
    assert not counters["graph_break"]


ANY_CALLS = [
    {"class_ids": 3, "generate": "image"},
    {"text": "a handwritten three please now", "generate": "image"},
    {"images": digit(), "text": "which digit is this?", "generate": "text"},
    {},
    {"class_ids": [1, 2], "generate": "image", "guidance_scale": 2.0},
    {"text": ["a three"] * 3},
    {"text": "hello there", "generate": "text"},
    {"text": ["hello there", "x"], "generate": "text", "guidance_scale": 2.0},
    {"text": "a three", "generate": "image", "image_size": (16, 24)},
    {"text": "a three", "generate": "image", "image_size": (24, 24), "guidance_scale": 3.0},
    {"generate": "text", "max_new_tokens": 9},
    {"images": [digit(), None], "text": ["q", "w e"], "generate": "text"},
]


@pytest.mark.parametrize("sharing", ["shared", "alternate"])
def test_any_calls_share_a_few_graphs(pipe, monkeypatch, sharing):
    """Of the prefix and of the step, each for one row and for many: 4; and for rows with and without an image: 2."""
    compiled = compiled_of(pipe, monkeypatch, scan_sharing=sharing, num_hidden_layers=5)
    plain = MDMPipeline(copy.deepcopy(compiled.model), pipe.processor, device="cpu")
    plain.set_progress_bar_config(disable=True)
    for options in ANY_CALLS:
        assert_draw_the_same(plain, compiled, **options)
    assert counters["stats"]["unique_graphs"] == (6 if sharing == "shared" else 4)
    assert not counters["graph_break"]


def test_no_model_takes_the_place_of_another_ones_graphs(pipe, monkeypatch):
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in (16, 32):
            compiled = compiled_of(pipe, monkeypatch, hidden_size=size)
            for _ in range(2):
                compiled(class_ids=3, generate="image", num_inference_steps=1)
            assert counters["stats"]["unique_graphs"] == 2


def test_where_the_graphs_run_out_the_rest_runs_without_and_says_so(pipe, monkeypatch, caplog):
    compiled = compiled_of(pipe, monkeypatch)
    log = logging.getLogger("torch._dynamo")
    log.addHandler(caplog.handler)
    with torch._dynamo.config.patch(recompile_limit=1):
        for options in ANY_CALLS[:5]:
            assert_draw_the_same(pipe, compiled, **options)
    log.removeHandler(caplog.handler)
    assert counters["stats"]["unique_graphs"] == 1
    assert "torch._dynamo hit config.recompile_limit (1)" in caplog.text


def test_arrays_are_batches_as_lists_are(pipe):
    options = {"seed": np.int64(0), "num_inference_steps": 2}
    classes = pixels(pipe(class_ids=[1, 2], generate="image", **options))
    assert pixels(pipe(class_ids=torch.tensor([1, 2]), generate="image", **options)) == classes
    assert pixels(pipe(class_ids=np.array([1, 2]), generate="image", **options)) == classes
    stack = np.stack([np.asarray(digit(v))[..., None] for v in (0, 200)])
    texts = [r["text"] for r in pipe(images=[digit(0), digit(200)], generate="text", **options)]
    assert [r["text"] for r in pipe(images=stack, generate="text", **options)] == texts


LEARNED = DDPMScheduler(prediction_type="sample", variance_type="learned")


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"text": ["a", "b"], "class_ids": [1]}, "a batch needs lists of one length"),
        ({"messages": CHAT, "text": "a three"}, "put the conditions into the messages"),
        ({"messages": CHAT[0]}, "Got the message {'role': 'user', 'content': 'a three'} alone in place of a conver"),
        ({"text": [{"messages": CHAT, "class_ids": 3}]}, "put the conditions into the messages"),
        ({"text": [{"caption": "a three"}]}, "Got a prompt with 'caption'; need some of text, images"),
        ({"text": [CHAT, "a three"]}, "Got a batch of 1 conversations and 1 prompts of another kind"),
        ({"messages": ["a three", "a four"]}, "batches of strings, such as a DataLoader's, are no prompts"),
        ({"text": [["a three", "a four"]]}, "batches of strings, such as a DataLoader's, are no prompts"),
        ({"steps": 3}, "Got the option(s) steps; need some of generate, image_size"),
        ({"num_return_sequences": 0}, "`num_return_sequences` is 0; it must be a whole number, 1 or more"),
        ({"num_return_sequences": 2.5}, "`num_return_sequences` is 2.5; it must be a whole number"),
        ({"num_return_sequences": "2"}, "`num_return_sequences` is '2'"),
        ({"num_return_sequences": None}, "`num_return_sequences` is None"),
        ({"seed": 1.5}, "`seed` is 1.5; it must be a whole number, 0 or more"),
        ({"seed": "3"}, "`seed` is '3'"),
        ({"image_size": 8}, "Got image_size 8; need (height, width)"),
        ({"image_size": (0, 8)}, "Got image height 0; need 2 or a multiple of it, whole patches"),
        ({"image_size": (100_000, 100_000)}, "Got image_size 100000x100000 = 10000000000 pixels; need at most max_"),
        ({"callback_on_step_end": 5}, "`callback_on_step_end` is 5; it must be a function f(model, step, timesteps"),
        ({"text": [{"canvas": {"type": "image"}}], "generate": "image"}, "Got generate='image' and a canvas, whose"),
        ({"text": "half \ud800"}, "with half a character at 5 (a lone surrogate); need whole ones"),
        ({"guidance_scale": True}, "`guidance_scale` is True; it must be a number, 0 or more"),
        ({"scheduler": 5, "num_inference_steps": "auto"}, "`scheduler` (int) has no `prediction_type`; it must be a"),
        ({"scheduler": DDIMScheduler, "num_inference_steps": "auto"}, "`scheduler` is the class DDIMScheduler; it"),
        ({"scheduler": LEARNED}, "`scheduler` (DDPMScheduler) has variance_type 'learned', but MDM predicts no"),
        ({"guidance_scale": 10**400}, "it must be a number, 0 or more (1 is no guidance)"),
        ({"strength": 1e-320}, "`strength` is 1e-320 of num_inference_steps = 20, half a step or less; raise one of"),
        ({"min_new_tokens": 10**30}, "it must be a whole number, 0 or more, below 2**63"),
        ({"max_new_tokens": 10**30}, "need a whole number of at least 1 and at most 16777216"),
        ({"num_inference_steps": np.array([4, 5])}, "`num_inference_steps` is array([4, 5]); it must be a whole"),
        ({"scheduler": "SchedulerMixin"}, "`scheduler` is 'SchedulerMixin', which names no scheduler of diffusers"),
        ({"scheduler": "UnCLIPScheduler"}, "`scheduler` is 'UnCLIPScheduler', which cannot be made from the model's"),
        ({"scheduler": DDIMScheduler}, "`scheduler` is the class DDIMScheduler; it must be one of its objects, or"),
        ({"batch_size": -1}, "`batch_size` is -1; it must be a whole number, 1 or more"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"text": []}, "`text` is empty; a batch needs at least one prompt"),
        ({"messages": []}, "`messages` is empty; a batch needs at least one prompt"),
        ({"class_ids": 10}, "10"),
        ({"generate": "sound"}, "sound"),
        ({"generate": ["auto"]}, "Got generate with 'auto'; need 'image', 'text' or both, or 'auto' in a call"),
        (
            {"generate": "image", "max_new_tokens": 5},
            "Got max_new_tokens where image is made, and it does nothing; need it where texts are made",
        ),
        ({"generate": "image", "min_new_tokens": 5}, "need it where texts are made; leave it out, or ask for 'text'"),
        ({"generate": "text", "image_size": (8, 8)}, "Got image_size where text is made, and it does"),
        ({"messages": [*CHAT, {"role": "assistant", "content": "3"}]}, "or pass it to the pipeline as its `canvas`"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"text": "a three " * 600, "generate": "image"}, "512"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_prompts_that_cannot_work_are_refused(pipe, conditions, message):
    with pytest.raises(ValueError) as error:
        pipe(**conditions)
    assert message in str(error.value)


def test_numbers_of_numpy_are_numbers(pipe):
    plain = pipe(seed=0, num_inference_steps=2, guidance_scale=1.5, max_new_tokens=3, min_new_tokens=2)
    numpy = {"num_inference_steps": np.int64(2), "guidance_scale": np.float32(1.5)}
    numpy |= {"max_new_tokens": np.int64(3), "min_new_tokens": np.uint8(2)}
    assert pipe(seed=np.int64(0), **numpy) == plain
