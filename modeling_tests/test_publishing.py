"""Claims about cards, `mdm push` and `mdm pull`: a card says what the files beside it say; what is pushed is whole,
and checked before the Hub hears of it; what was stopped goes on."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from loopback_hub import WRITE_TOKEN, LoopbackHub
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from tiny import save_autoencoder, tiny_config, tiny_model

from mdm_hf import MDMConfig, MDMForMultiModalGeneration, MDMPipeline
from mdm_hf.cli import main
from mdm_hf.conversion.convert import convert
from mdm_hf.publishing.adapter import read_adapter
from mdm_hf.publishing.card import MADE_BY, card_of, check_card, write_card
from mdm_hf.publishing.card_notes import NOTES, read_notes
from mdm_hf.publishing.examples import checkpoint_hash, draw_examples, drawn_examples, enlarged
from mdm_hf.publishing.repository import check_weights, has_weights, pull, push, requirements, staged


ROOT = Path(__file__).parents[1]
CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/config.json"))
DIGITS = ROOT / "model_cards" / "mdm-digits"
TRAINED = [folder for folder in CARDS if (folder / "model.safetensors").is_file()]


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[LoopbackHub]:
    """A Hub that this process talks to, as somebody who may write."""
    with LoopbackHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        yield hub


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of mdm-digits to do things to."""
    return Path(shutil.copytree(DIGITS, tmp_path / "mdm-digits"))


def files(hub: LoopbackHub, name: str, revision: str = "main") -> dict[str, bytes]:
    return hub.repositories[name].at(revision)[1]


@pytest.fixture(scope="module")
def trip(tmp_path_factory) -> dict:
    script = Path(__file__).parent / "hub_round_trip.py"
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "TMPDIR": str(tmp_path_factory.mktemp("trip"))}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_goes_to_the_hub_and_back_and_answers_as_its_card_says(trip) -> None:
    assert trip["card validated before anything was made"]
    assert trip["the picture that the endpoint draws is the widget's"]
    assert trip["the widget's own answer"] in trip["answers about it"]
    assert trip["files listed"] == trip["files pulled"] > 40


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_the_card_that_is_there_is_what_the_folder_says(folder, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert (folder / "README.md").read_text(encoding="utf-8") == card_of(folder.relative_to(ROOT))
    check_card((folder / "README.md").read_text(encoding="utf-8"), folder)


@pytest.mark.parametrize("folder", TRAINED, ids=lambda folder: folder.name)
def test_the_outputs_on_the_card_are_what_the_weights_make(folder, tmp_path) -> None:
    again = Path(shutil.copytree(folder, tmp_path / folder.name))
    (again / "examples.json").unlink()
    examples = read_notes(again)["examples"]
    assert draw_examples(again, examples)
    for old, new in zip(drawn_examples(folder, examples), drawn_examples(again, examples), strict=True):
        assert old == new
        if "image" in old["made"]:
            with Image.open(folder / old["made"]["image"]) as a, Image.open(again / new["made"]["image"]) as b:
                assert max(most for _, most in ImageChops.difference(a, b).convert("RGB").getextrema()) <= 8
    assert not draw_examples(again, examples)


def test_presets_without_weights_are_called_untrained() -> None:
    for folder in CARDS:
        is_said = "**Untrained.**" in (folder / "README.md").read_text(encoding="utf-8")
        assert is_said == (folder not in TRAINED)


def test_the_code_on_an_untrained_card_gives_a_model_that_sees_pictures(tmp_path) -> None:
    vae, folder = tmp_path / "vae", tmp_path / "mdm-base"
    save_autoencoder(vae)
    config = tiny_config()
    config.save_pretrained(folder)
    assert "autoencoder" not in card_of(folder)
    config.vae_config.num_channels = 4
    config.save_pretrained(folder)
    card = card_of(folder)
    assert "names no autoencoder that makes these of pixels: put one of your choice in front" in card
    assert "`model: {preset: mdm-base, pixel_autoencoder: {repo_id: org/vae}}`" in card
    assert f"patches of {config.vae_config.patch_size} latents of an autoencoder" in card
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("org/vae", str(vae)), names)
    assert names["model"].config.image_channels == 3
    assert bool(names["model"].model.pixel_autoencoder.is_loaded)

    names["config"].save_pretrained(folder)
    card = card_of(folder)
    assert "MDMForMultiModalGeneration(config).load_pixel_autoencoder()" in card
    assert "with_pixel_autoencoder" not in card
    assert f"patches of {names['config'].pixel_patch_size} pixels" in card


def test_every_score_on_the_card_is_the_one_in_the_file_and_has_a_task_of_the_hub() -> None:
    results = ModelCard.load(DIGITS / "README.md").data.eval_results
    scores = json.loads((DIGITS / "scores.json").read_text())["scores"]
    assert {one.metric_type: one.metric_value for one in results}.items() <= scores.items()
    tasks = {one.metric_type: one.task_type for one in results}
    assert tasks["question_answering"] == "visual-question-answering"
    assert tasks["text_to_image"] == "text-to-image"
    assert tasks["image_and_text_agree"] == "any-to-any"


def test_settings_and_intervals_stand_beside_the_scores() -> None:
    text, found = (DIGITS / "README.md").read_text(encoding="utf-8"), json.loads((DIGITS / "scores.json").read_text())
    score, lowest, highest = (found[of]["class_to_image"] for of in ("scores", "lowest", "highest"))
    assert lowest < highest
    assert f"| class to image, right | {score:.3f} | {lowest:.3f}, {highest:.3f} | at least 0.95 |" in text
    assert "num_samples 500" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("pipeline_tag: any-to-any", "pipeline_tag: mind-reading"), "the task 'mind-reading', which is none"),
        (("type: text-to-image", "type: text-to-thought"), "the task 'text-to-thought', which is none"),
        (("library_name: transformers", "library_name: mdm-hf"), "the library 'mdm-hf', which is none"),
        (("license: apache-2.0\n", ""), "Got a card with no license; need one that the Hub accepts"),
        (("license: apache-2.0\n", "license: mine\n"), "the license 'mine', which is none of the Hub's: `other`"),
        (("](demo.png)", "](a demo.png)"), "the picture 'a demo.png', whose name has a space, at which"),
        (("url: examples/1.png", "url: examples/9.png"), "the picture examples/9.png, which is not in"),
        (("widget:\n", "widget:\n- no mapping\n"), "the widget example 'no mapping', which is no mapping"),
        (("](demo.png)", f"]({DIGITS}/demo.png)"), "demo.png, which is not in"),
        (("](demo.png)", "](../mdm-digits/demo.png)"), "the picture ../mdm-digits/demo.png, which is not in"),
        (("](demo.png)", "](lost.png)"), "the picture lost.png, which is not in"),
        (("language:\n", "language: [\n"), "Got a card whose front matter is not the Hub's"),
    ],
)
def test_a_card_that_the_hub_would_refuse_is_refused_here(change, message) -> None:
    text = (DIGITS / "README.md").read_text(encoding="utf-8")
    assert change[0] in text
    with pytest.raises(ValueError, match=message):
        check_card(text.replace(*change), DIGITS)


def test_scores_and_examples_of_other_weights_are_refused(folder) -> None:
    draws = MDMPipeline.from_pretrained(folder)
    with torch.no_grad():
        next(draws.model.parameters()).add_(1e-3)
    draws.model.save_pretrained(folder)
    with pytest.raises(ValueError, match="scores of the weights .* beside the weights .*; need scores of these"):
        card_of(folder)
    (folder / "scores.json").unlink()
    with pytest.raises(
        ValueError, match="examples.json is missing, or of other weights, settings, examples or pictures"
    ):
        card_of(folder)


def test_an_evaluation_says_which_benchmark_and_weights_it_was_of(folder, monkeypatch) -> None:
    told = {"scores": {"class_to_image": 0.5}, "settings": {"hash": "0"}, "seconds": 0.0}
    monkeypatch.setattr("mdm_hf.evaluation.benchmarks.run_benchmark", lambda *_: dict(told))
    main(["evaluate", "--model", str(folder), "--output", str(folder / "scores.json")])
    assert "0.500" in card_of(folder)
    found = json.loads((folder / "scores.json").read_text())
    assert (found["benchmark"], found["weights"]) == ("digits", checkpoint_hash(folder))


def test_an_evaluation_is_of_the_weights_that_it_read_whatever_lies_there_when_it_is_done(folder, monkeypatch) -> None:
    before = checkpoint_hash(folder)

    def train_meanwhile(*_) -> dict:
        model = MDMPipeline.from_pretrained(folder).model
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        model.save_pretrained(folder)
        return {"scores": {}, "settings": {"hash": "0"}, "seconds": 0.0}

    monkeypatch.setattr("mdm_hf.evaluation.benchmarks.run_benchmark", train_meanwhile)
    main(["evaluate", "--model", str(folder), "--output", str(folder / "scores.json")])
    assert json.loads((folder / "scores.json").read_text())["weights"] == before != checkpoint_hash(folder)


@pytest.mark.parametrize("missing", ["benchmark", "weights", "scores"])
def test_a_result_without_its_origin_is_refused(folder, missing) -> None:
    result = json.loads((folder / "scores.json").read_text())
    del result[missing]
    (folder / "scores.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=f"scores.json without {missing}; need what `mdm evaluate --output` writes"):
        card_of(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("summry: mine", "card.yaml with \\['summry'\\]; need a mapping with some of name, summary"),
        ("- a list", "card.yaml with list; need a mapping"),
        ("{", "card.yaml, which is not YAML"),
        ("tags: mamba", "card.yaml with tags 'mamba'; need a list of texts"),
        ("summary: 3", "card.yaml with summary 3; need a text"),
        ("limits:", "card.yaml with limits None; need a text"),
        ("intended_use: 2024-01-01", "with intended_use datetime.date.*; need a text"),
        ("examples: 5", "with examples 5; need a list of mappings"),
        ("scores: [a]", "with scores \\['a'\\]; need a mapping of names to"),
        ("scores: {class_to_image: hallo}", "need a mapping of names to {name, goal}"),
        ("{name: a, 1: 2, foo: 2}", "card.yaml with \\['1', 'foo'\\]"),
        ("language: 5", "with language 5; need a list of languages"),
        ("name: ''", "with name ''; need a text on one line"),
        ("name:", "with name None; need a text on one line"),
        ('name: "a\\nb"', "need a text on one line"),
        ("examples: [three]", "Got the example 'three'; need a mapping"),
    ],
)
def test_notes_that_are_not_understood_are_refused(folder, text, message) -> None:
    (folder / "card.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_notes(folder)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"prompt": "three"}, "Got the example {'prompt': 'three'}; need a mapping with some of text, image"),
        ({"image": "lost.png"}, "Got an example with the picture lost.png; need a file in"),
        ("three", "Got the example 'three'"),
        ({"text": None, "class_id": 3}, "with text None; need a text, or no text"),
        ({"text": ["a three", "a four"]}, "need a text, or no text"),
        ({"class_id": [3, 7]}, "need a whole number, or no class_id"),
        ({"text": "a three", "seed": None}, "with seed None; need a whole number, or no seed"),
        ({"text": "a three", "seed": True}, "with seed True; need a whole number"),
        ({"text": "a three", "generate": None}, "with generate None; need 'image', 'text', a list of both"),
    ],
)
def test_examples_that_are_not_understood_are_refused(folder, example, message) -> None:
    with pytest.raises(ValueError, match=message):
        draw_examples(folder, [example])


def test_a_text_of_several_lines_stays_in_its_cell(folder) -> None:
    notes = "name: a\nscores: {image_to_text: {name: of many, goal: 'above | all\n\n  0.9'}}\n"
    (folder / "card.yaml").write_text(notes + 'examples: [{text: "a\\nthree", generate: image}]')
    draw_examples(folder, read_notes(folder)["examples"])
    text = card_of(folder)
    assert re.search(r"^\| of many \| 0.\d+ \| .* \| above &#124; all 0.9 \|$", text, re.MULTILINE)
    assert "| a three | ![Made](examples/1.png) |" in text


def test_weights_in_pickles_alone_are_not_called_untrained(tmp_path, capsys) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path / "old")
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    for command in (["card", str(tmp_path / "old")], ["push", str(tmp_path / "old"), "org/x", "--dry-run"]):
        assert main(command) == 2
        assert "whose weights are in pytorch_model.bin; need them in safetensors" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "old"), "--to", str(tmp_path / "new")]) == 0
    assert checkpoint_hash(tmp_path / "new") is not None


def test_an_example_that_is_refused_leaves_the_pictures_of_before_and_a_lost_picture_is_drawn_again(folder) -> None:
    examples, picture = read_notes(folder)["examples"], folder / "examples" / "1.png"
    before = picture.read_bytes()
    with pytest.raises(ValueError, match="`seed` is -4"):
        draw_examples(folder, [examples[0] | {"seed": 77}, {"text": "a three", "seed": -4}])
    assert picture.read_bytes() == before
    assert not draw_examples(folder, examples)
    for harm in (picture.unlink, lambda: shutil.copy(folder / "digit.png", picture)):
        harm()
        with pytest.raises(
            ValueError, match="of other weights, settings, examples or pictures; need what these weights make"
        ):
            card_of(folder)
        assert draw_examples(folder, examples)
        with Image.open(picture) as again, Image.open(io.BytesIO(before)) as first:
            assert ImageChops.difference(again, first).getbbox() is None


def test_examples_of_other_sampling_settings_are_drawn_again(folder) -> None:
    examples, settings = read_notes(folder)["examples"], folder / "generation_config.json"
    saved = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps(saved | {"transformers_version": "0"}), encoding="utf-8")
    assert not draw_examples(folder, examples)  # no setting of the samples
    settings.write_text(json.dumps(saved | {"num_inference_steps": 2}), encoding="utf-8")
    with pytest.raises(ValueError, match="of other weights, settings, examples or pictures"):
        card_of(folder)
    assert draw_examples(folder, examples)
    assert not draw_examples(folder, examples)


def test_a_card_that_somebody_wrote_is_not_overwritten(folder, capsys) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    assert main(["card", str(folder)]) == 2
    assert "README.md, which `mdm card` did not make; it would be lost" in capsys.readouterr().err
    assert (folder / "README.md").read_text().endswith("Mine.\n")
    assert main(["card", str(folder), "--overwrite"]) == 0
    assert MADE_BY in (folder / "README.md").read_text()


def test_a_card_whose_writing_is_stopped_is_what_it_was(folder, monkeypatch) -> None:
    before, write = (folder / "README.md").read_text(), Path.write_text

    def stopped(path: Path, text: str, **options):
        write(path, text[:100], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_card(folder, "org/another")
    assert (folder / "README.md").read_text() == before


def test_a_folder_without_notes_gets_a_card_of_what_is_known(folder) -> None:
    for name in ("card.yaml", "examples.json", "README.md"):
        (folder / name).unlink()
    recipe = {"data": {"digits": {}}, "stages": {"diffusion": {"max_steps": 12, "learning_rate": 0.5}}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    text = write_card(folder, "org/mine").read_text()
    assert "**Trained on** the recipe's data: digits." in text
    assert "| diffusion | 12 |  | 0.5 |" in text
    assert NOTES["limits"] in text
    assert 'pipeline(model="org/mine", trust_remote_code=True)' in text
    assert "license: other" in text


def test_speed_is_on_the_card_where_it_was_measured(folder) -> None:
    rows = [{"task": "text to image", "batch": 16, "seconds": 0.0123, "peak_mib": 412.4}]
    machine = {"device": "A chip", "threads": 1, "torch": "2"}
    (folder / "speed.json").write_text(json.dumps({"machine": machine, "num_inference_steps": 20, "rows": rows}))
    assert "| text to image | 16 | 0.0123 | 412 MiB |" in card_of(folder)


def test_the_hash_of_weights_does_not_depend_on_their_files(tmp_path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert checkpoint_hash(tmp_path / "one") == checkpoint_hash(tmp_path / "many")
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1
    model.save_pretrained(tmp_path / "other")
    assert checkpoint_hash(tmp_path / "one") != checkpoint_hash(tmp_path / "other")


def test_small_pictures_are_enlarged_without_blur() -> None:
    image = Image.new("L", (8, 16))
    image.putpixel((7, 0), 255)
    large = enlarged(image)
    assert large.size == (256, 512)
    assert set(large.get_flattened_data() if hasattr(large, "get_flattened_data") else large.getdata()) == {0, 255}
    assert enlarged(Image.new("L", (300, 400))).size == (300, 400)


def test_a_push_that_was_stopped_leaves_no_commit_and_sends_only_the_rest(hub, folder) -> None:
    hub.uploads_left = 2
    with pytest.raises(OSError, match="no further than half of org/mine"):
        push(folder, "org/mine", max_shard_size="500KB")
    assert len(hub.repositories["org/mine"].commits) == 1  # the one that made it
    arrived, hub.uploads_left = set(hub.uploads), None
    assert arrived
    hub.requests.clear()
    push(folder, "org/mine", max_shard_size="500KB", message="Second try")
    sent = {line.removeprefix("PUT /storage/") for line in hub.requests if line.startswith("PUT")}
    assert sent
    assert not sent & arrived
    assert len(hub.repositories["org/mine"].commits) == 2


def test_a_branch_gets_the_push_and_main_stays(hub, folder, tmp_path) -> None:
    push(folder, "org/mine", revision="better")
    assert set(files(hub, "org/mine")) == {".gitattributes"}
    assert "handler.py" in files(hub, "org/mine", "better")
    pull("org/mine", tmp_path / "pulled", revision="better")
    assert (tmp_path / "pulled" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_public_repository_is_no_place_for_a_private_push(hub, folder) -> None:
    push(folder, "org/public")
    with pytest.raises(
        ValueError, match="Got --private for org/public, which is there and public; need a private one"
    ):
        push(folder, "org/public", private=True)
    push(folder, "org/secret", private=True)
    assert hub.repositories["org/secret"].is_private
    push(folder, "org/secret", private=True)


def test_the_hubs_own_refusal_of_a_card_comes_before_anything_is_made(hub, folder) -> None:
    text = "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: any-to-any\ntags: mine\n---\nMine.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="Got a card that the Hub refuses: .*tags"):
        push(folder, "org/mine")
    assert not hub.repositories


def test_a_card_that_somebody_wrote_is_pushed_as_it_is(hub, folder) -> None:
    text = "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: any-to-any\n---\nMine.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    push(folder, "org/mine")
    assert files(hub, "org/mine")["README.md"].decode() == text


def test_pictures_that_earlier_examples_left_behind_stay_here(hub, folder) -> None:
    shutil.copy(folder / "digit.png", folder / "examples" / "9.png")
    push(folder, "org/mine")
    pushed = {name for name in files(hub, "org/mine") if name.startswith("examples/")}
    assert pushed == {f"examples/{number}.png" for number in (1, 4, 5)}


def test_a_dry_run_lists_everything_and_asks_the_hub_nothing(hub, folder, capsys) -> None:
    assert main(["push", str(folder), "org/mine", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert not hub.requests
    assert {"model.safetensors", "modeling_mdm.py", "handler.py"} <= set(shown.split())
    assert 'MDMPipeline.from_pretrained("org/mine")' in shown


def test_an_untrained_preset_is_pushed_without_weights(hub) -> None:
    push(ROOT / "model_cards" / "mdm-base", "org/mdm-base")
    pushed = files(hub, "org/mdm-base")
    assert "config.json" in pushed
    assert not [name for name in pushed if name.endswith(".safetensors")]
    assert b"**Untrained.**" in pushed["README.md"]


def test_a_folder_may_be_given_as_a_text(hub, tmp_path) -> None:
    preset, pulled = str(tmp_path / "preset"), str(tmp_path / "pulled")
    MDMConfig().save_pretrained(preset)
    assert read_notes(preset)["name"] == "preset"
    assert (read_adapter(preset), checkpoint_hash(preset), draw_examples(preset, [])) == (None, None, False)
    assert write_card(preset) == Path(preset, "README.md")
    push(preset, "org/preset")
    assert pull("org/preset", pulled) == Path(pulled)
    assert not has_weights(pulled)


def test_what_is_no_model_is_not_pushed(hub, tmp_path, capsys) -> None:
    assert main(["push", str(tmp_path), "org/mine"]) == 2
    assert "without config.json; need the folder of a saved model; name that" in capsys.readouterr().err
    assert not hub.requests


def test_an_endpoint_is_told_to_install_all_but_torch(folder) -> None:
    with staged(folder, "org/mine") as target:
        lines = (target / "requirements.txt").read_text().split()
    assert lines == requirements()
    assert [line for line in lines if line.startswith("transformers")]
    assert not [line for line in lines if line.startswith("torch")]


def test_a_pull_into_a_folder_of_other_things_is_refused(hub, folder, tmp_path, capsys) -> None:
    push(folder, "org/mine")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "thesis.txt").write_text("years of work")
    assert main(["pull", "org/mine", str(tmp_path / "busy")]) == 2
    assert "which holds other things than an earlier pull; need a new folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "busy").iterdir()] == ["thesis.txt"]
    assert main(["pull", "org/mine", str(tmp_path / "new")]) == 0
    assert main(["pull", "org/mine", str(tmp_path / "new")]) == 0


def test_a_pull_onto_a_file_is_refused_and_one_into_a_link_follows_it(hub, folder, tmp_path, capsys) -> None:
    push(folder, "org/mine")
    (tmp_path / "file").write_text("mine")
    assert main(["pull", "org/mine", str(tmp_path / "file"), "--overwrite"]) == 2
    assert "file to pull into, which is there and no folder; need a folder; give another" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "new")
    assert main(["pull", "org/mine", str(tmp_path / "link")]) == 0
    assert (tmp_path / "new" / "model.safetensors").is_file()


def test_a_pull_of_half_a_model_names_the_file(hub, folder, tmp_path) -> None:
    push(folder, "org/mine", max_shard_size="500KB")
    tree = dict(files(hub, "org/mine"))
    shard = next(name for name in sorted(tree) if name.endswith(".safetensors"))
    hub.repositories["org/mine"].commit(tree | {shard: tree[shard][:1000]})
    with pytest.raises(ValueError, match=f"with a {shard} that cannot be read"):
        pull("org/mine", tmp_path / "half")
    hub.repositories["org/mine"].commit({name: content for name, content in tree.items() if name != shard})
    with pytest.raises(ValueError, match=f"with a {shard} that cannot be read"):
        pull("org/mine", tmp_path / "less")


@pytest.mark.parametrize("sizes", [("5GB", "500KB"), ("500KB", "5GB")])
def test_a_later_push_and_its_pull_leave_no_weights_of_the_one_before(hub, folder, tmp_path, sizes) -> None:
    push(folder, "org/mdm-digits", max_shard_size=sizes[0])
    pull("org/mdm-digits", tmp_path / "pulled")
    convert(folder, tmp_path / "later", dtype="bfloat16")
    push(tmp_path / "later", "org/mdm-digits", max_shard_size=sizes[1])
    names = files(hub, "org/mdm-digits")
    assert ("model.safetensors" in names, "model.safetensors.index.json" in names) == (
        sizes[1] == "5GB",
        sizes[1] != "5GB",
    )
    pull("org/mdm-digits", tmp_path / "pulled")
    assert checkpoint_hash(tmp_path / "pulled") == checkpoint_hash(tmp_path / "later") != checkpoint_hash(folder)


def test_a_pull_beside_weights_of_another_origin_is_refused_before_anything_is_fetched(hub, folder, tmp_path) -> None:
    push(folder, "org/mdm-digits")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model-00001-of-00002.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="with model-00001-of-00002.safetensors, which neither the repository has"):
        pull("org/mdm-digits", tmp_path / "mine", overwrite=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["model-00001-of-00002.safetensors"]


def test_a_pull_without_weights_says_so(hub, folder, tmp_path, capsys) -> None:
    push(DIGITS.parent / "mdm-base", "org/mdm-base")
    assert main(["pull", "org/mdm-base", str(tmp_path / "base")]) == 0
    assert "It has no weights: train it." in capsys.readouterr().out
    push(folder, "org/mdm-digits")
    HfApi(token=WRITE_TOKEN).delete_file("model.safetensors", "org/mdm-digits")
    assert main(["pull", "org/mdm-digits", str(tmp_path / "digits")]) == 2
    assert "with handler.py and no weights" in capsys.readouterr().err


def test_a_shard_without_what_its_index_says_is_named(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    shutil.copy(second, first)
    with pytest.raises(ValueError, match=f"with a {first.name} without .*; need it as its index says"):
        check_weights(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 5}}']
)
def test_an_index_that_cannot_be_followed_is_refused_by_its_name(tmp_path, text) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="model.safetensors.index.json, which cannot be followed .*; need it whole"):
        check_weights(tmp_path)


def test_a_repository_that_is_not_there_is_an_error_in_words(hub, tmp_path, capsys) -> None:
    assert main(["pull", "org/nowhere", str(tmp_path / "new")]) == 2
    assert "Repository" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("speed.json", "{}", "no result of benchmarks/checkpoint_speed.py"),
        ("speed.json", "{", "speed.json, which is not JSON"),
        ("scores.json", "3", "scores.json with int; need what `mdm evaluate --output` writes"),
        ("scores.json", "{", "scores.json, which is not JSON"),
        ("examples.json", "x", "examples.json, which is not JSON"),
        ("examples.json", "{}", "examples.json is missing, or of other weights"),
        ("recipe.yaml", "a: [", "recipe.yaml, which is not YAML"),
        ("recipe.yaml", "a: 1", "recipe.yaml, which is no recipe"),
        ("recipe.yaml", "", "recipe.yaml, which is no recipe"),
        ("recipe.yaml", "{data: 5, stages: {}}", "recipe.yaml, which is no recipe"),
        ("recipe.yaml", "{data: {}, stages: [1]}", "recipe.yaml, which is no recipe"),
        ("recipe.yaml", "{data: {}, stages: {a: 1}}", "recipe.yaml, which is no recipe"),
        (
            "speed.json",
            '{"rows": [{}], "machine": {}, "num_inference_steps": 1}',
            "no result of benchmarks/checkpoint_sp",
        ),
        (
            "speed.json",
            '{"rows": 5, "machine": [], "num_inference_steps": 1}',
            "no result of benchmarks/checkpoint_sp",
        ),
        ("model.safetensors", "short", "model.safetensors, which cannot be read"),
    ],
)
def test_a_broken_file_beside_the_card_is_refused_by_its_name(folder, name, text, message) -> None:
    notes = "examples: [{class_id: 1}]" if name == "examples.json" else "summary: a model"
    (folder / "card.yaml").write_text(notes)
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        card_of(folder)


@pytest.mark.parametrize("change", [{"settings": []}, {"benchmark": 5}, {"intervals": 5}, {"intervals": {"a": [1]}}])
def test_a_result_of_another_form_is_refused_by_its_name(folder, change) -> None:
    result = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").write_text(json.dumps(result | change))
    with pytest.raises(ValueError, match="scores.json whose benchmark is no text"):
        card_of(folder)


def test_notes_of_comments_alone_are_those_of_a_folder_without(folder) -> None:
    (folder / "card.yaml").write_text("# name: later\n")
    assert read_notes(folder)["summary"] == NOTES["summary"]


def test_a_readme_that_is_no_text_is_refused_by_its_name(folder, capsys) -> None:
    (folder / "README.md").write_bytes(b"\xff\xfe")
    assert main(["card", str(folder)]) == 2
    assert "README.md, which is no text in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"a": None}, {"a": "x"}, {"a": float("nan")}, {"a": True}, 3])
def test_scores_that_are_no_numbers_are_refused(folder, change) -> None:
    result = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").write_text(json.dumps(result | {"scores": change}))
    with pytest.raises(ValueError, match="scores.json with scores that are no numbers by name"):
        card_of(folder)


@pytest.mark.parametrize("picture", ["digit.jpg", "pics/a.png", "../a.png", 5])
def test_an_examples_picture_that_a_push_would_leave_behind_is_refused(folder, picture) -> None:
    with pytest.raises(ValueError, match="need the name of a .png in .* itself"):
        draw_examples(folder, [{"image": picture}])


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A LoRA adapter of mdm-digits, as PEFT saves it, whose base is said to lie on the Hub."""
    base = MDMForMultiModalGeneration.from_pretrained(DIGITS)
    base.name_or_path = base.config.name_or_path = "org/mdm-digits"
    options = {"task_type": "FEATURE_EXTRACTION", "init_lora_weights": False, "modules_to_save": ["latent_head"]}
    get_peft_model(base, LoraConfig(r=3, lora_alpha=6, **options)).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def test_an_adapters_card_says_its_base_rank_and_modules_and_how_to_load_it(adapter, hub) -> None:
    push(adapter, "org/lora")
    pushed = files(hub, "org/lora")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(pushed)
    assert not {"config.json", "model.safetensors", "handler.py"} & set(pushed)
    text = pushed["README.md"].decode()
    data = ModelCard(text).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("org/mdm-digits", "peft", "any-to-any")
    assert "lora" in data.tags
    assert "| rank, alpha | 3, 6 |" in text
    assert "| trained modules | in_proj, out_proj |" in text
    assert "| modules trained whole | latent_head |" in text
    assert "More Information Needed" not in text
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert 'MDMPipeline.from_pretrained("org/lora")' in blocks[0]
    names: dict = {}
    exec(blocks[1].replace('"org/mdm-digits"', repr(str(DIGITS))).replace('"org/lora"', repr(str(adapter))), names)
    assert isinstance(names["model"], PeftModel)
    assert names["model"].peft_config["default"].r == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"base_model_name_or_path": "/home/me/digits"},
            "whose base model is '/home/me/digits'; need owner/name of th",
        ),
        ({"base_model_name_or_path": None}, "whose base model is None; need owner/name"),
        ({"target_modules": None}, "has peft_type 'LORA' and target_modules None; need both"),
        ("missing", "without adapter_model.safetensors; need the adapter's weights"),
        ("broken", "with values that are not finite in "),
        ("short", "adapter_model.safetensors, of which no tensors can be read"),
    ],
)
def test_an_adapter_that_others_could_not_load_is_not_pushed(adapter, change, message, capsys) -> None:
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    if isinstance(change, dict):
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    elif change == "missing":
        weights.unlink()
    elif change == "short":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        save_file({name: value * float("nan") for name, value in load_file(weights).items()}, weights)
    for command in (["card", str(adapter)], ["push", str(adapter), "org/lora", "--dry-run"]):
        assert main(command) == 2
        assert message in capsys.readouterr().err


def test_pefts_empty_card_is_replaced_and_one_with_a_word_in_it_is_not(adapter, capsys) -> None:
    path = adapter / "README.md"
    empty = path.read_text()
    path.write_text(empty.replace("[More Information Needed]", "me", 1))
    assert main(["card", str(adapter)]) == 2
    assert "which `mdm card` did not make; it would be lost" in capsys.readouterr().err
    path.write_text(empty)
    assert main(["card", str(adapter)]) == 0
    assert MADE_BY in path.read_text()


def test_an_examples_picture_that_is_a_bomb_is_refused(folder) -> None:
    Image.new("1", (30_000, 30_000)).save(folder / "bomb.png")
    with pytest.raises(ValueError, match="bomb.png, which Pillow cannot read .*900000000 pixels.*; need a whole"):
        draw_examples(folder, [{"image": "bomb.png"}])


def test_a_card_that_is_refused_draws_nothing(folder, capsys) -> None:
    (folder / "README.md").write_text("mine")
    for name in ("examples.json", "scores.json"):
        (folder / name).unlink(missing_ok=True)
    before = sorted(folder.rglob("*"))
    (folder / "card.yaml").write_text("examples: [{class_id: 1}]")
    assert main(["card", str(folder)]) == 2
    assert "which `mdm card` did not make" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == sorted({*before, folder / "card.yaml"})


@pytest.mark.parametrize("name", ["not a repo!!", "", "a/b/c"])
def test_a_dry_run_refuses_a_repository_that_there_cannot_be(folder, name, capsys) -> None:
    assert main(["push", str(folder), name, "--dry-run"]) == 2
    assert f"Got the repository {name!r}" in capsys.readouterr().err


def test_a_dry_run_refuses_a_branch_that_there_cannot_be(folder, capsys) -> None:
    assert main(["push", str(folder), "org/x", "--revision", "bad name~^", "--dry-run"]) == 2
    assert "Got the revision 'bad name~^'; need the name of a branch" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["missing", "unknown", "not finite", "misshapen"])
def test_weights_that_are_not_the_models_are_not_pushed(folder, change, capsys) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    if change == "missing":
        del weights["latent_head.weight"]
    elif change == "unknown":
        weights["foo.bar"] = torch.zeros(1)
    elif change == "not finite":
        weights["latent_head.weight"][0, 0] = float("nan")
    else:
        weights["latent_head.weight"] = weights["latent_head.weight"][:3].clone()
    save_file(weights, path, metadata={"format": "pt"})
    for name in ("card.yaml", "examples.json", "scores.json", "README.md"):
        (folder / name).unlink(missing_ok=True)
    assert main(["push", str(folder), "org/x", "--dry-run"]) == 2
    assert ("foo.bar" if change == "unknown" else "latent_head.weight") in capsys.readouterr().err


def test_a_pull_that_reaches_nobody_fails_whatever_lies_in_the_folder(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("mdm_hf.publishing.repository.HfApi", partial(HfApi, endpoint="http://127.0.0.1:9"))
    assert main(["pull", "org/x", str(folder), "--overwrite"]) == 2
    said = capsys.readouterr()
    assert "Got no answer of the Hub at" in said.err
    assert "Wrote" not in said.out
