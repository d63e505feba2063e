"""Claims about the baseline of transfusion-pytorch: it sees what MDM sees, samples as it trained, and is no larger."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mdm_hf import MDMForMultiModalGeneration, MDMPipeline, MDMProcessor
from mdm_hf.modeling_mdm_vae import patchify
from mdm_hf.training.assembly import make_mix
from mdm_hf.training.recipe import load_recipe, stage_options


pytest.importorskip("transfusion_pytorch", reason='needs transfusion-pytorch: pip install -e ".[baselines]"')
from _transfusion import ROUND, Sizes, TransfusionModel, image_parameters, sizes_for
from transfusion_baseline import TransfusionPipeline, train


ROOT = Path(__file__).parents[1]
CARD = ROOT / "model_cards" / "mdm-digits"
PROCESSOR = MDMProcessor.from_pretrained(CARD)
DIGIT = np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4
SMALL = Sizes(
    dim=16, depth=2, dim_head=16, vocab_size=len(PROCESSOR.tokenizer), num_classes=10, patch_size=2, patch_dim=4
)


def small_model(seed: int = 0) -> TransfusionModel:
    """Random weights in what is zero at first, so that every part has its effect."""
    torch.manual_seed(seed)
    model = TransfusionModel(SMALL, PROCESSOR).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def part(kind: str, value) -> dict:
    return {"type": kind, kind: value}


def conversation(user: list, assistant: list) -> list[dict]:
    turns = [{"role": "user", "content": user}] if user else []
    return [*turns, {"role": "assistant", "content": assistant}]


TEXT, IMAGE = part("text", "it is a three"), part("image", DIGIT)
CONVERSATIONS = {
    "class_to_image": conversation([part("class", 3)], [IMAGE]),
    "text_to_image": conversation([part("text", "a three")], [IMAGE]),
    "image_to_text": conversation([IMAGE], [TEXT]),
    "question_answering": conversation([IMAGE, part("text", "which digit is this?")], [TEXT]),
    "image_and_text": conversation([], [IMAGE, TEXT]),
    "text": conversation([part("text", "name this digit")], [TEXT]),
}


def inputs_of(*tasks: str) -> dict:
    return dict(PROCESSOR.apply_chat_template([CONVERSATIONS[task] for task in tasks], return_tensors="pt"))


def digits_recipe(*changes: str) -> dict:
    return load_recipe(ROOT / "recipes" / "digits.yaml", ["stages.diffusion.per_device_train_batch_size=4", *changes])


@pytest.mark.parametrize("task", CONVERSATIONS)
def test_a_row_holds_all_that_the_conversation_says_and_nothing_of_the_targets_in_its_prompt(task):
    model, inputs = small_model(), inputs_of(task)
    [row] = model.rows(inputs)
    patches = patchify(inputs["pixel_values"], 2)[0] if "pixel_values" in inputs else None
    *user, assistant = [turn["content"] for turn in CONVERSATIONS[task]]
    written = PROCESSOR.tokenizer.decode([one for one in row.prompt if isinstance(one, int) and one < 384])
    for one in sum(user, []):
        if one["type"] == "text":
            assert one["text"] in written
        elif one["type"] == "class":
            assert row.prompt[0] == SMALL.vocab_size + 3
        else:
            assert any(torch.equal(image, patches) for image in row.prompt if not isinstance(image, int))
    assert (TEXT in assistant) == ("<|time_text|>" in written) == (row.text is not None)
    assert (IMAGE in assistant) == ("<|time_image|>" in written) == (row.image is not None)
    assert TEXT["text"] not in written
    if row.text is not None:
        assert PROCESSOR.tokenizer.decode(row.text) == TEXT["text"] + "</s>"
    if row.image is not None:
        assert torch.equal(row.image, patches)


@pytest.mark.parametrize("task", CONVERSATIONS)
def test_sampling_sees_what_training_saw(task):
    """The package's losses of a row are those of the logits and flows that sampling would use for the same row."""
    model, inputs = small_model(), inputs_of(task)
    [row] = model.rows(inputs)
    torch.manual_seed(1)
    _, (text_loss, flow_loss) = model(inputs)
    torch.manual_seed(1)
    t, known = float(torch.rand(1, 1)), sum(not isinstance(one, int) for one in row.prompt)
    noise = torch.randn(known + 1, 4, 4, 4)[known]  # known images draw theirs first
    text = [] if row.text is None else [model.ids["text_start"], *row.text]
    net, flow = model.net, torch.zeros(())
    targets = [*text]
    prompt = [*row.prompt, *text]
    if row.image is not None:
        prompt.append(row.image * t + noise * (1 - t))
        targets = [*text, *model._opening((4, 4)), *[-100] * 17]  # nothing is asked of patches
    embed, [length] = model._embed([prompt], 1.0 if row.image is None else t)
    if row.image is not None:
        predicted = net.model_to_latent_projs[0](embed[0, length - 17 : length - 1]).view(4, 4, 4)
        flow = (predicted - (row.image - noise)).square().sum()
    logits = net.to_text_logits(embed[0, length - len(targets) - 1 : length - 1])
    entropy = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum")
    padding = -(length + 1) % ROUND  # so that the end of the row, too, is a multiple
    embed, [length] = model._embed([[*prompt, *[0] * padding]], 1.0 if row.image is None else t)
    end = torch.nn.functional.cross_entropy(net.to_text_logits(embed[0, length - 1]), torch.tensor(net.eos_id))
    torch.testing.assert_close(flow_loss * (length + 1), flow, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(text_loss * (length + 1), entropy + end, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5], ids=["plain", "guided"])
def test_a_sample_depends_on_its_seed_and_prompt_alone(guidance_scale):
    pipe = TransfusionPipeline(small_model(), PROCESSOR)
    options = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "max_new_tokens": 5}
    texts = ["a three", "this is a drawing of the number seven", None]
    together = pipe(text=texts, seed=5, **options)
    for i, text in enumerate(texts):
        [alone] = pipe(text=text, seed=5 + i, **options)
        assert alone["text"] == together[i]["text"]
        near = np.abs(np.asarray(alone["images"][0], dtype=int) - np.asarray(together[i]["images"][0], dtype=int))
        assert near.max() <= 1
    assert together[0]["text"] != together[1]["text"]


def test_its_guidance_acts_within_the_interval_alone(monkeypatch):
    model, seen = small_model(), []
    embed = TransfusionModel._embed

    def watch(self, prompts, t=1.0):
        seen.append((round(1 - t, 3), len(prompts)))
        return embed(self, prompts, t)

    monkeypatch.setattr(TransfusionModel, "_embed", watch)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "guidance_interval": (0.25, 0.6)}
    TransfusionPipeline(model, PROCESSOR)(class_ids=[3], generate="image", seed=0, **options)
    assert seen == [(1.0, 1), (0.75, 1), (0.5, 2), (0.25, 2)]


def test_it_is_called_like_mdm_s_pipeline_on_every_task():
    pipe, own = TransfusionPipeline(small_model(), PROCESSOR), MDMPipeline.from_pretrained(CARD)
    own.set_progress_bar_config(disable=True)
    images = [PROCESSOR.image_processor.postprocess([torch.zeros(1, 8, 8)])[0]] * 2
    for conditions in (
        {"class_ids": [3, 4], "generate": "image"},
        {"text": ["a three", "a four"], "generate": "image"},
        {"images": images, "generate": "text"},
        {"images": images, "text": ["which digit is this?"] * 2, "generate": "text"},
        {"text": ["name this digit"] * 2, "generate": "text"},
        {"num_return_sequences": 2, "generate": ("image", "text")},
    ):
        limit = {"max_new_tokens": 4} if "text" in conditions["generate"] else {}
        options = {"num_inference_steps": 2, "seed": 0} | limit | conditions
        for got, expected in zip(pipe(**options), own(**options), strict=True):
            assert [len(got[name]) for name in ("text", "images")] == [
                len(expected[name]) for name in ("text", "images")
            ]
            assert [i.size for i in got["images"]] == [i.size for i in expected["images"]]
            assert [i.mode for i in got["images"]] == [i.mode for i in expected["images"]]


def test_a_resumed_run_ends_with_the_same_weights_and_so_does_a_repeated_one(tmp_path):
    options = {"max_steps": 4, "depth": 2, "dim": 16}
    whole = train(digits_recipe(), tmp_path / "whole", **options)
    train(digits_recipe(), tmp_path / "killed", stop_after=2, **options)
    again = train(digits_recipe(), tmp_path / "killed", resume=True, **options)
    assert not (tmp_path / "whole" / "processor").exists()
    nets = [TransfusionPipeline.from_pretrained(tmp_path / name / "final").model.net for name in ("whole", "killed")]
    for one, other in zip(*(net.state_dict().values() for net in nets), strict=True):
        assert torch.equal(one, other)
    assert (whole["steps"], whole["parameters"]) == (again["steps"], again["parameters"])
    assert again["cpu_seconds"] > 0


def test_it_learns_from_what_mdm_learns_from_and_not_from_the_gate_s_conversations(tmp_path, monkeypatch):
    recipe, asked = digits_recipe(), []
    recipe["stages"]["gate"] = {"num_samples": 8}

    def watch(recipe, stage, *rest):
        asked.append((stage, stage_options(recipe, stage)["per_device_train_batch_size"]))
        return make_mix(recipe, stage, *rest)

    monkeypatch.setattr("transfusion_baseline.make_mix", watch)
    train(recipe, tmp_path, max_steps=1, dim=16)
    assert asked == [("diffusion", 4)]


def test_its_parameters_are_those_of_mdm_within_5_percent_with_and_without_a_vae():
    mdm = MDMForMultiModalGeneration.from_pretrained(CARD)
    wanted, vae = mdm.num_parameters(), mdm.model.vae
    for depth in (2, 4):
        for images in (None, vae):
            sizes = sizes_for(PROCESSOR, wanted, depth, vae=images)
            extra = 0 if images is None else image_parameters(vae)
            assert sizes.parameters() + extra == pytest.approx(wanted, rel=0.05)
    with pytest.raises(ValueError, match="need a width with within 5% of them, the nearest has"):
        sizes_for(PROCESSOR, 10_000, 4)


def test_with_a_vae_it_trains_on_latents_keeps_the_vae_and_draws_pictures(tmp_path):
    result = train(digits_recipe(), tmp_path, max_steps=2, depth=2, dim=16, vae=CARD)
    pipe = TransfusionPipeline.from_pretrained(tmp_path / "final")
    own = MDMForMultiModalGeneration.from_pretrained(CARD).model.vae
    for name, weight in own.state_dict().items():
        assert torch.equal(pipe.model.vae.state_dict()[name], weight), name
    assert result["sizes"]["patch_dim"] == own.config.latent_size
    pixels = inputs_of("class_to_image")["pixel_values"]
    assert float((pipe.model.decode(pipe.model.encode(pixels)) - pixels).abs().mean()) < 0.1
    assert pipe(class_ids=3, generate="image", seed=0, num_inference_steps=2)[0]["images"][0].size == (8, 8)


def test_the_loss_of_one_batch_falls():
    torch.manual_seed(0)
    model, inputs = TransfusionModel(SMALL, PROCESSOR).train(), inputs_of(*CONVERSATIONS)
    optimizer, values = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(40):
        loss, _ = model(inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5])


def test_what_it_learned_by_heart_it_says_and_draws_again():
    """A dark and a bright picture, each with a class and a name: the answer follows the image, the image the class."""
    torch.manual_seed(0)
    shades = [np.full((8, 8, 1), grey, dtype=np.uint8) for grey in (30, 220)]
    names = ("a three", "a seven")
    rows = [conversation([part("image", i)], [part("text", n)]) for i, n in zip(shades, names, strict=True)]
    rows += [conversation([part("class", c)], [part("image", i)]) for c, i in zip((3, 7), shades, strict=True)]
    inputs = dict(PROCESSOR.apply_chat_template(rows * 4, return_tensors="pt"))
    model = TransfusionModel(SMALL, PROCESSOR).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model(inputs)[0].backward()
        optimizer.step()
    pipe = TransfusionPipeline(model, PROCESSOR)
    said = pipe(images=[i[:, :, 0] for i in shades], generate="text", seed=0)
    assert [one["text"] for one in said] == [[name] for name in names]
    drawn = pipe(class_ids=[3, 7], generate="image", seed=0, guidance_scale=1.0)
    dark, bright = (float(np.asarray(one["images"][0]).mean()) for one in drawn)
    assert abs(dark - 30) < 25
    assert abs(bright - 220) < 25


def test_what_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Got max_steps None and cpu_seconds None; need one of the two; give one"):
        train(digits_recipe(), tmp_path)
    with pytest.raises(ValueError, match=r"without checkpoint.pt to resume; need one; start without resume"):
        train(digits_recipe(), tmp_path, max_steps=1, resume=True)
    two = conversation([], [IMAGE, IMAGE])
    with pytest.raises(ValueError, match="two images to be made; need at most one; leave its task out"):
        small_model().rows(dict(PROCESSOR.apply_chat_template([two], return_tensors="pt")))
