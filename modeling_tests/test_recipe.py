"""Claims about recipe files: what they may say, what the command line changes, what is refused."""

from pathlib import Path

import pytest
import yaml

from mdm_hf.training.recipe import load_recipe, stage_options


ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMALL = {
    "output_dir": "runs/x",
    "model": {"preset": "mdm-digits"},
    "processor": "model_cards/mdm-digits",
    "data": {"digits": {"path": "digits"}},
    "stages": {"diffusion": {"max_steps": 2}},
}


def written(tmp_path, recipe) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_can_be_read(path):
    assert load_recipe(path)["stages"]


def test_the_paper_s_recipe_has_the_paper_s_settings():
    """Sec. 5.1, Appendix C and D."""
    recipe = load_recipe(ROOT / "recipes" / "paper-7b.yaml")
    options = stage_options(recipe, "diffusion")
    assert (options["learning_rate"], options["weight_decay"], options["ema_decay"]) == (1e-4, 0, 0.9999)
    assert (options["lr_scheduler_type"], options["max_steps"]) == ("constant", 500_000)
    assert recipe["processor"]["image_size"] == [256, 256]
    assert recipe["processor"]["max_new_tokens"] == 512
    assert recipe["stages"]["tokenizer"]["vocab_size"] == 32_000
    assert set(options["data"]) == {"imagenet", "journeydb", "ultrachat"}


def test_changes_from_the_command_line_reach_any_depth_and_are_read_as_yaml(tmp_path):
    changes = [
        "stages.diffusion.max_steps=7",
        "stages.diffusion.learning_rate=2e-3",
        "model.config.vae_config={latent_size: 4}",
        "data.more.path=here",
        "output_dir=runs/y",
    ]
    recipe = load_recipe(written(tmp_path, SMALL), changes)
    assert recipe["stages"]["diffusion"] == {"max_steps": 7, "learning_rate": 0.002}
    assert recipe["model"]["config"] == {"vae_config": {"latent_size": 4}}
    assert recipe["data"]["more"] == {"path": "here"}
    assert recipe["output_dir"] == "runs/y"


def test_a_stage_draws_from_all_sources_or_from_those_it_names(tmp_path):
    recipe = load_recipe(
        written(tmp_path, SMALL), ["data.more.path=x", "stages.instruct={max_steps: 1, data: [more]}"]
    )
    assert set(stage_options(recipe, "diffusion")["data"]) == {"digits", "more"}
    assert set(stage_options(recipe, "instruct")["data"]) == {"more"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nonsense", "Got the change 'nonsense'; need key=value"),
        ("output_dir.x=1", "output_dir is 'runs/x' and has no keys of its own"),
        ("seed=[1", "whose value is no YAML"),
        (
            "modle=1",
            "Got the key 'modle' in the recipe, which it does not have; check the spelling: did you",
        ),
        ("output_dir=", "Got a recipe without 'output_dir'"),
        ("data=[]", "Got a recipe without 'data'"),
        ("stages=3", "Got stages: 3; need keys under it"),
        ("model.from=x", "both or neither of 'preset' and 'from'"),
        ("stages.difusion={max_steps: 1}", "did you mean 'diffusion'?"),
        ("stages.diffusion.max_step=3", "did you mean 'max_steps'?"),
        ("stages.diffusion.seed=3", "Got the key 'seed' in stages.diffusion"),
        ("stages.diffusion.max_steps=0", "Got stages.diffusion.max_steps 0; need a whole number of at least 1"),
        ("stages.diffusion.max_steps=1.5", "need a whole number of at least 1"),
        ("stages.diffusion.freeze=blocks", "Got stages.diffusion.freeze 'blocks'; need 'vae' or 'encoder'"),
        ("stages.diffusion.mixed_batches=yes please", "Got stages.diffusion.mixed_batches 'yes please'; need true or"),
        (
            "stages.diffusion={max_steps: 9, mixed_batches: true, length_groups: 4}",
            "Got stages.diffusion.mixed_batches with length_groups 4, which sorts rows of one source",
        ),
        ("stages.diffusion.data=[other]", "Got stages.diffusion.data with other; the recipe has digits"),
        ("stages.tokenizer.vocab_size=300", "need both or neither; name a folder as 'processor'"),
        ("processor={patch_size: 2}", "need both or neither; name a folder as 'processor'"),
        ("processor={from: model_cards/mdm-digits, patch_size: 2}", "Got the key 'patch_size' in processor"),
        ("data.digits=x", "Got data.digits: 'x'; need at least a 'path'"),
        ("data.digits.path=3", "need at least a 'path'"),
        ("data.digits.weight=heavy", "Got data.digits.weight 'heavy'; need a number"),
        ("data.digits.tasks=[text_to_image]", "need weights by the names of tasks"),
        ("seed=1.5", "Got seed 1.5; need a whole number"),
        ("output_dir=3", "Got output_dir 3; need a folder's name"),
        ("generation=3", "Got generation 3; need keys under it"),
        ("model.config=3", "Got model.config 3; need keys under it"),
        ("model.config.hidden_sizee=3", "Got the key 'hidden_sizee' in model.config"),
        ("model.config.vae_config.latent=3", "did you mean 'latent_size'?"),
        ("stages.diffusion.learning_rate=fast", "Got stages.diffusion.learning_rate 'fast'; need a number"),
        ("stages.diffusion.sample_every=0", "Got stages.diffusion.sample_every 0; need a whole number of at least 1"),
        ("stages.diffusion.per_device_train_batch_size=0", "need a whole number of at least 1"),
        ("stages.diffusion.ema_decay=2", "Got stages.diffusion.ema_decay 2; need a number from 0 to below 1"),
        ("stages.diffusion.ema_decay=high", "Got stages.diffusion.ema_decay 'high'"),
        ("stages.diffusion.task_starts.image_and_text=5", "image_and_text 5; need a share of the run, from 0 to 1"),
        ("stages.diffusion.task_starts.image_and_words=0", "did you mean 'image_and_text'?"),
        ("stages.diffusion.data=digits", "need a list of the names of sources"),
        ("eval_data=[a]", "Got eval_data ['a']; need keys under it; name at least one source"),
        ("processor=3", "Got processor 3; need a name or keys under it; name a folder, or say how to build one"),
        ("model={preset: [mdm-base]}", "Got model.preset ['mdm-base']; need a name"),
        ("model.vae_from=3", "Got model.vae_from 3; need a name"),
        ("model.pixel_autoencoder=org/vae", "Got model.pixel_autoencoder 'org/vae'; need {repo_id: ...}"),
        ("model.pixel_autoencoder={repo: org/vae}", "did you mean 'repo_id'?"),
        ("model.pixel_autoencoder={revision: main}", "Got model.pixel_autoencoder without 'repo_id'; need it; name"),
        (
            "model={from: runs/y, pixel_autoencoder: {repo_id: org/vae}}",
            "Got model.pixel_autoencoder beside 'from', which has one or was made without; need one of the two; take",
        ),
        (
            "stages.diffusion.shuffle_buffer=10",
            "Got stages.diffusion.shuffle_buffer for tables, which are shuffled whole; need streams; leave it out",
        ),
        (
            "data={words: {path: a.jsonl, streaming: true}}",
            "Got stages.diffusion.length_groups for streams, which come as they are; need tables; leave it out",
        ),
        ("stages.gate.num_samples=9", "Got stages.gate.num_samples 9; need a whole number of at least 10"),
        ("stages.diffusion.data=[]", "Got stages.diffusion.data with nothing"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused_with_what_to_do(tmp_path, change, message):
    grouped = ["stages.diffusion.length_groups=4"] if "streaming" in change else []
    with pytest.raises(ValueError, match="^Got ") as error:
        load_recipe(written(tmp_path, SMALL), [*grouped, change])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("processor.image_size=32", "Got processor.image_size 32; need [height, width] in pixels"),
        ("processor.patch_size=", "Got processor.patch_size None; need a whole number"),
        ("processor.patchsize=4", "did you mean 'patch_size'?"),
        ("stages.tokenizer.vocab_size=0", "Got stages.tokenizer.vocab_size 0"),
    ],
)
def test_a_processor_that_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError, match="^Got ") as error:
        load_recipe(ROOT / "recipes" / "folder.yaml", [change])
    assert message in str(error.value)


def test_what_is_no_recipe_is_refused(tmp_path):
    with pytest.raises(ValueError, match="which is no file; need a YAML file; recipes/ has some"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="which is no YAML"):
        load_recipe(written(tmp_path, "a: [1"))
    with pytest.raises(ValueError, match="with list at its top; need keys: output_dir"):
        load_recipe(written(tmp_path, "[1, 2]"))
