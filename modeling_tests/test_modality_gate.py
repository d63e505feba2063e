"""Claims about `generate="auto"`: the model decides what a prompt calls for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from mdm_hf import MDMForMultiModalGeneration, MDMPipeline, MDMProcessor
from mdm_hf.training.digits import caption, load_digits_split, question_and_answer
from mdm_hf.training.gate import fit_gate
from mdm_hf.training.recipe import load_recipe
from mdm_hf.training.stages import run_recipe


ROOT = Path(__file__).parents[1]
CARD = ROOT / "model_cards" / "mdm-digits"


@pytest.fixture(scope="module")
def pipe() -> MDMPipeline:
    pipe = MDMPipeline.from_pretrained(CARD, device="cpu", num_inference_steps=3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def held_out(number: int = 200) -> list[tuple[dict, tuple[str, ...]]]:
    """Prompts about images that nothing was trained on, and what each calls for."""
    rng = np.random.default_rng(123)
    images, labels = load_digits_split("heldout")
    prompts: list[tuple[dict, tuple[str, ...]]] = []
    for image, digit, sort in zip(images, labels, range(number), strict=False):
        asked, _ = question_and_answer(int(digit), rng)
        prompts += [
            [
                ({"text": caption(int(digit), rng)}, ("image",)),
                ({"class_ids": int(digit)}, ("image",)),
                ({"images": image}, ("text",)),
                ({"images": image, "text": asked}, ("text",)),
            ][sort % 4]
        ]
    return prompts


def test_the_shipped_gate_decides_what_held_out_prompts_call_for(pipe) -> None:
    prompts = held_out()
    columns = {name: [prompt.get(name) for prompt, _ in prompts] for name in ("text", "images", "class_ids")}
    decided = pipe.predict_modalities(**columns)
    right = [one == wanted for one, (_, wanted) in zip(decided, prompts, strict=True)]
    assert np.mean(right) >= 0.95
    assert set(decided) >= {("image",), ("text",)}
    assert pipe.predict_modalities([None]) == [("image", "text")]


@pytest.mark.parametrize("backbone", ["mamba", "transformer"])
def test_the_gate_sees_conditions_alone_and_a_row_as_it_is_alone(backbone) -> None:
    processor = MDMProcessor.from_pretrained(CARD)
    config = MDMForMultiModalGeneration.from_pretrained(CARD).config
    config.backbone, config.intermediate_size = backbone, None
    torch.manual_seed(0)
    model = MDMForMultiModalGeneration(config).eval()
    texts, images = ["a three", "which digit is this?"], [None, Image.new("L", (8, 8), 90)]
    of = {
        generate: model.gate_states(**processor(text=texts, images=images, generate=generate))
        for generate in ("image", "text", ("image", "text"))
    }
    for states in of.values():
        torch.testing.assert_close(states, of["image"], atol=1e-5, rtol=1e-5)
    alone = model.gate_states(**processor(text=texts[:1], generate="text"))
    torch.testing.assert_close(alone, of["image"][:1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(of["image"][0], of["image"][1], atol=0.01)


def test_auto_draws_what_asking_for_it_draws_in_prompt_order(pipe) -> None:
    picture = load_digits_split("heldout")[0][0]
    texts, images = ["a handwritten three", None, "a small seven"], [None, picture, None]
    found = pipe(text=texts, images=images, generate="auto", seed=5)
    for i, kind in enumerate(("image", "text", "image")):
        [alone] = pipe(text=texts[i], images=images[i], generate=kind, seed=5 + i)
        assert alone["text"] == found[i]["text"]
        assert [np.asarray(one).tolist() for one in alone["images"]] == [
            np.asarray(one).tolist() for one in found[i]["images"]
        ]


def test_a_chat_decides_turn_by_turn(pipe) -> None:
    chat = pipe.chat()
    drawn = chat(text="a handwritten four", generate="auto", seed=1)
    said = chat(text="which digit is this?", generate="auto", seed=1)
    assert (len(drawn["images"]), len(drawn["text"])) == (1, 0)
    assert (len(said["images"]), len(said["text"])) == (0, 1)


def test_sizes_of_what_the_model_may_decide_to_make_are_taken_in_a_chat_as_in_a_call(pipe) -> None:
    sizes = {"max_new_tokens": 8, "image_size": (8, 8), "generate": "auto", "seed": 1, "num_inference_steps": 2}
    chat = pipe.chat()
    assert chat(text="a handwritten four", **sizes)["images"]
    assert chat(text="which digit is this?", **sizes)["text"]
    with pytest.raises(ValueError, match="`max_new_tokens` is '5'; it must be a whole number, 1 or more"):
        chat(text="which digit is this?", generate="text", max_new_tokens="5")


def test_a_recipe_fits_a_gate_to_a_trained_model_and_leaves_all_else_as_it_was(tmp_path, pipe, capsys) -> None:
    tasks = "data.digits.tasks={class_to_image: 1, text_to_image: 1, image_to_text: 1, question_answering: 1}"
    changes = [f"output_dir={tmp_path / 'run'}", f"model={{from: {CARD}}}", "stages={gate: {num_samples: 320}}", tasks]
    recipe = load_recipe(ROOT / "recipes" / "digits.yaml", [*changes, f"processor={CARD}", "generation={}"])
    folder = run_recipe(recipe)
    assert "The gate decides " in capsys.readouterr().out
    fitted = MDMPipeline.from_pretrained(folder, device="cpu")
    for name, weight in pipe.model.state_dict().items():
        assert torch.equal(weight, fitted.model.state_dict()[name]) != name.startswith("modality_gate"), name
    assert fitted.model.generation_config.guidance_scale == pipe.model.generation_config.guidance_scale
    prompts = held_out(40)
    columns = {name: [prompt.get(name) for prompt, _ in prompts] for name in ("text", "images", "class_ids")}
    right = [one == wanted for one, (_, wanted) in zip(fitted.predict_modalities(**columns), prompts, strict=True)]
    assert np.mean(right) >= 0.9


@pytest.mark.parametrize("refits", [True, False])
def test_training_leaves_a_gate_behind_that_read_other_states(tmp_path, pipe, capsys, refits) -> None:
    gate = ", gate: {num_samples: 64}" if refits else ""
    stages = f"stages={{diffusion: {{max_steps: 2, per_device_train_batch_size: 2, report_to: none}}{gate}}}"
    changes = [f"output_dir={tmp_path / 'run'}", f"model={{from: {CARD}}}", f"processor={CARD}", stages]
    folder = run_recipe(load_recipe(ROOT / "recipes" / "digits.yaml", changes))
    model = MDMForMultiModalGeneration.from_pretrained(folder)
    assert model.config.modality_gate == refits
    assert ("The gate decides " in capsys.readouterr().out) == refits
    if refits:
        assert not torch.equal(model.modality_gate.weight, pipe.model.modality_gate.weight)


@pytest.mark.timeout(120)  # a stream has no end
def test_a_gate_is_fitted_to_as_many_conversations_of_a_stream_as_the_recipe_says(tmp_path, capsys) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a seven"}\n' * 4)
    source = f"data={{words: {{path: {tmp_path / 'rows.jsonl'}, adapter: text, streaming: true}}}}"
    changes = [f"output_dir={tmp_path / 'run'}", f"model={{from: {CARD}}}", "stages={gate: {num_samples: 80}}", source]
    run_recipe(load_recipe(ROOT / "recipes" / "digits.yaml", [*changes, f"processor={CARD}"]))
    assert "of 16 held-out conversations right" in capsys.readouterr().out


def test_data_of_the_gate_that_cannot_be_read_is_refused_before_anything_is_trained(tmp_path) -> None:
    stages = "stages={diffusion: {max_steps: 1, data: [digits]}, gate: {num_samples: 64, data: [calls]}}"
    calls = "data.calls={path: /no/such.jsonl, adapter: text}"
    changes = [f"output_dir={tmp_path / 'run'}", f"processor={CARD}", stages, calls]
    with pytest.raises(ValueError, match=r"Got path '/no/such\.jsonl'.* which cannot be read"):
        run_recipe(load_recipe(ROOT / "recipes" / "digits.yaml", changes))
    assert not (tmp_path / "run").exists()


def test_a_gate_is_fitted_to_what_separates_the_answers(monkeypatch) -> None:
    model = tiny_model(modality_gate=True)
    states = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    wants = torch.stack([states[:, 3] > 0, states[:, 5] + states[:, 6] > 0.2], dim=1)
    monkeypatch.setattr("mdm_hf.training.gate.gate_examples", lambda *_: (states, wants))
    assert fit_gate(model, []) >= 0.9
    assert ((model.modality_gate(states) > 0) == wants).all(1).double().mean() >= 0.95


def test_what_cannot_be_decided_is_refused(pipe, tmp_path) -> None:
    without = MDMPipeline(tiny_like(pipe), pipe.processor, device="cpu")
    with pytest.raises(ValueError, match="Got a model without a modality gate, .* need generate='image', 'text' or"):
        without(text="a three", generate="auto")
    with pytest.raises(ValueError, match="Got generate='auto' for a stream, .* ask `predict_modalities` first"):
        next(pipe.stream(text="a three", generate="auto"))
    changes = [f"output_dir={tmp_path}", "stages={gate: {num_samples: 10}}"]
    with pytest.raises(ValueError, match="Got 3 conversations to fit a modality gate to; need at least 10"):
        fit_gate(pipe.model, [pipe.processor(text=["a"] * 3, generate="text")])
    with pytest.raises(ValueError, match="Got a recipe with a gate stage, and no model that is trained; need one"):
        load_recipe(ROOT / "recipes" / "digits.yaml", changes)


def tiny_like(pipe) -> MDMForMultiModalGeneration:
    config = type(pipe.model.config)(**pipe.model.config.to_dict())
    config.modality_gate = False
    return MDMForMultiModalGeneration(config).eval()
