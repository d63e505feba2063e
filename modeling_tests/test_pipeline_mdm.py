"""Claims about MDMPipeline and the Auto classes, on the shipped digits folder's processor and a tiny model."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor

from mdm_hf import MDMConfig, MDMForMultiModalGeneration, MDMPipeline, MDMProcessor


CARD = Path(__file__).parents[1] / "model_cards" / "mdm-digits"


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    model = MDMForMultiModalGeneration(MDMConfig.from_preset("mdm-digits", hidden_size=32, num_hidden_layers=2)).eval()
    torch.nn.init.normal_(model.latent_head.weight, std=0.3)
    pipe = MDMPipeline(model, MDMProcessor.from_pretrained(CARD), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
    assert MDMPipeline.from_pretrained(tmp_path).scheduler is None


def test_compiled_blocks_are_compiled_once_per_shape_and_draw_the_same(pipe):
    options = {"class_ids": [1, 2], "generate": "image", "seed": 0, "num_inference_steps": 3, "guidance_scale": 2.0}
    eager = np.array(pixels(pipe(**options)))
    model = copy.deepcopy(pipe.model)
    compiled = MDMPipeline(model, pipe.processor, compile=True, device="cpu")
    compiled.set_progress_bar_config(disable=True)
    counters.clear()
    assert np.abs(np.array(pixels(compiled(**options))) - eager).max() <= 1
    assert counters["stats"]["unique_graphs"] == 2  # of the prefix and of the step, for all blocks together
    compiled(**options)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_any_number_of_prompt_lengths_shares_a_few_compiled_graphs(pipe):
    compiled = MDMPipeline(copy.deepcopy(pipe.model), pipe.processor, compile=True, device="cpu")
    compiled.set_progress_bar_config(disable=True)
    counters.clear()
    options = {"generate": "image", "seed": 0, "num_inference_steps": 2}
    for words in range(1, 12):
        text = " ".join(["three"] * words)
        assert np.abs(np.array(pixels(compiled(text=text, **options))) - pixels(pipe(text=text, **options))).max() <= 1
    assert counters["stats"]["unique_graphs"] <= 4


def test_arrays_are_batches_as_lists_are(pipe):
    options = {"seed": 0, "num_inference_steps": 2}
    classes = pixels(pipe(class_ids=[1, 2], generate="image", **options))
    assert pixels(pipe(class_ids=torch.tensor([1, 2]), generate="image", **options)) == classes
    assert pixels(pipe(class_ids=np.array([1, 2]), generate="image", **options)) == classes
    stack = np.stack([np.asarray(digit(v))[..., None] for v in (0, 200)])
    texts = [r["text"] for r in pipe(images=[digit(0), digit(200)], generate="text", **options)]
    assert [r["text"] for r in pipe(images=stack, generate="text", **options)] == texts


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"text": ["a", "b"], "class_ids": [1]}, "a batch needs lists of one length"),
        ({"messages": [], "text": "a three"}, "put the conditions into the messages"),
        ({"num_return_sequences": 0}, "`num_return_sequences` is 0; it must be 1 or more"),
        ({"batch_size": -1}, "`batch_size` is -1; it must be a whole number, 1 or more"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"text": []}, "`text` is an empty list; a batch needs at least one prompt"),
        ({"messages": []}, "`messages` is empty; give one conversation"),
        ({"class_ids": 10}, "10"),
        ({"generate": "sound"}, "sound"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"text": "a three " * 600, "generate": "image"}, "512"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_prompts_that_cannot_work_are_refused(pipe, conditions, message):
    with pytest.raises(ValueError) as error:
        pipe(**conditions)
    assert message in str(error.value)
