"""The shapes benchmark and the ablations on it: who answers rightly gets full marks, who does not gets none."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file

from mdm_hf.evaluation import reproduce as module
from mdm_hf.evaluation.experiment_rows import table
from mdm_hf.evaluation.reproduce import EXPERIMENTS, Experiment, Variant, reproduce, steps_within
from mdm_hf.evaluation.shapes import TASKS, VERSION, ShapesBenchmark, _by_elimination
from mdm_hf.evaluation.shapes_classifier import ShapesClassifier, accuracy
from mdm_hf.evaluation.shapes_judge import Meaning, Mention, agree, read_pictures, read_text
from mdm_hf.evaluation.shapes_world import (
    CLASSES,
    NUMBERS,
    PLACES,
    SPLITS,
    Scene,
    Shape,
    caption,
    draw_scene,
    noun,
    plural,
    render,
    riddle,
    scene_of,
    write_dataset,
)
from mdm_hf.training.recipe import load_recipe


COUNT = 65


class Oracle:
    """Called like MDMPipeline, it does what it is asked: by another way than the one the questions are made."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(0)
        riddles_of_the_benchmark = np.random.default_rng((SPLITS["test"], seed, 1))
        self.riddles = dict(riddle(riddles_of_the_benchmark)[:2] for _ in range(COUNT))

    def __call__(self, text=None, images=None, class_ids=None, generate="image", **options) -> list[dict]:
        count = len(next(column for column in (text, images, class_ids) if column is not None))
        texts, pictures, classes = (column or [None] * count for column in (text, images, class_ids))
        return [self.one(*row, generate) for row in zip(texts, pictures, classes, strict=True)]

    def one(self, text, image, class_id, generate) -> dict:
        if image is not None:
            [shapes] = read_pictures([image])
            said = caption(Scene(shapes), self.rng) if text is None else self.answer(text, shapes)
            return {"text": [said], "images": []}
        if class_id is not None:
            colour, kind = CLASSES[class_id].split()
            return {"text": [], "images": [self.drawn((Mention(kind, colour),))]}
        if generate == "text":
            return {"text": [self.riddles[text]], "images": []}
        if text is None:
            scene = draw_scene(self.rng)
            return {"text": [caption(scene, self.rng)], "images": [render(scene)]}
        meaning = read_text(text)
        return {"text": [], "images": [self.drawn(meaning.mentions, meaning.relation)]}

    def drawn(self, mentions: tuple[Mention, ...], relation: str | None = None) -> Image.Image:
        """Scenes at random until one is as it is said."""
        each = [mention for mention in mentions for _ in range(mention.number)]
        while True:
            places = self.rng.permutation(4).tolist()
            shapes = [
                Shape(m.kind, m.colour or "red", m.size or "large", places[i] if m.place is None else m.place)
                for i, m in enumerate(each)
            ]
            shapes.sort(key=lambda shape: shape.place)
            distinct = len({shape.place for shape in shapes}) == len(shapes)
            if distinct and agree(Meaning(mentions, relation), tuple(shapes)):
                return render(Scene(tuple(shapes)))

    def answer(self, question: str, shapes: tuple[Shape, ...]) -> str:
        words = re.findall("[a-z]+", question)
        if question.startswith("how many"):
            return NUMBERS[sum(words[2] in ("shapes", plural(shape.kind)) for shape in shapes)]
        if question.startswith("is there"):
            return "yes" if any(noun(shape).split() == words[2:] for shape in shapes) else "no"
        if question.startswith("what is"):
            there = [shape for shape in shapes if PLACES[shape.place].split() == words[2:]]
            return noun(there[0]) if there else "nothing"
        told = {word for name in CLASSES for word in name.split()} & {*words}
        [meant] = [shape for shape in shapes if told <= {shape.kind, shape.colour}]
        asked = {"what colour": meant.colour, "which shape": meant.kind, "where is": PLACES[meant.place]}
        return next((value for start, value in asked.items() if question.startswith(start)), meant.size)


class Contrary(Oracle):
    """It does what another one was asked."""

    def __call__(self, **conditions) -> list[dict]:
        results = super().__call__(**conditions)
        texts = [result["text"] for result in results]
        if conditions.get("text") is not None and conditions.get("generate") == "text":
            return [{"text": ["perhaps"], "images": []} for _ in results]
        images = [result["images"] for result in results]
        return [{"text": t, "images": i} for t, i in zip(texts[1:] + texts[:1], images[2:] + images[:2], strict=True)]


@pytest.fixture(scope="module")
def of_oracle() -> dict:
    return ShapesBenchmark(Oracle(), COUNT).run()


def test_who_does_all_that_is_asked_gets_full_marks(of_oracle) -> None:
    scores = of_oracle["scores"]
    exact = [name for name in scores if name.startswith(("text_to_image", "question_answering", "text_only"))]
    for name in [*exact, "class_to_image", "image_to_text", "image_and_text"]:
        if "_by_" not in name:
            assert scores[name] == 1.0, name
            assert of_oracle["intervals"][name] == [1.0, 1.0]
    assert len([name for name in exact if name.startswith("text_to_image_")]) == 7
    assert scores["question_answering_by_commonest_answer"] < 0.7
    assert 0.6 < scores["text_only_by_elimination"] < 0.85
    assert scores["image_to_text_cider"] > 0.8 * scores["image_to_text_cider_of_true_captions"] > 0.5


def test_who_does_something_else_gets_next_to_nothing() -> None:
    scores = ShapesBenchmark(Contrary(), COUNT).run()["scores"]
    for name in ("class_to_image", "image_to_text", "question_answering", "text_only_written", "image_and_text"):
        assert scores[name] < 0.1, name
    assert scores["text_to_image"] < 0.4  # "a circle" is often another one's wish too


def test_one_good_pair_over_and_over_is_no_distinct_one(of_oracle) -> None:
    class Parrot(Oracle):
        def __call__(self, **conditions) -> list[dict]:
            return super().__call__(**conditions)[:1] * COUNT

    scores = ShapesBenchmark(Parrot(), COUNT).run(["image_and_text"])["scores"]
    assert (scores["image_and_text"], scores["image_and_text_distinct"]) == (1.0, round(1 / COUNT, 4))
    assert of_oracle["scores"]["image_and_text_distinct"] > 0.9


def test_a_score_lies_in_its_interval_and_whatever_is_a_mean_of_samples_has_one(of_oracle) -> None:
    scores, intervals = of_oracle["scores"], of_oracle["intervals"]
    assert all(low <= scores[name] <= high for name, (low, high) in intervals.items())
    others = ("shapes_recall", "of_real_images", "of_true_captions", "by_commonest_answer", "by_elimination")
    assert {name for name in scores if not name.endswith(others)} == set(intervals)


def test_empty_grounds_are_no_pictures_that_can_be_read() -> None:
    class Silent(Oracle):
        def __call__(self, **conditions) -> list[dict]:
            empty = Image.new("RGB", (32, 32), "grey")
            return [{"images": [empty], "text": one["text"]} for one in super().__call__(**conditions)]

    scores = ShapesBenchmark(Silent(), COUNT).run(["image_and_text"])["scores"]
    assert (scores["image_and_text"], scores["image_and_text_pictures_read"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("riddle", "choices", "answer", "chance"),
    [
        (
            "a red cross above a cyan circle. what is below the red cross?",
            ["red cross", "cyan circle"],
            "cyan circle",
            1,
        ),
        ("a red cross and a cyan circle. what colour is the cross?", ["red", "cyan", "blue"], "red", 0.5),
        ("a red cross. how many red crosses are there?", ["one", "two", "three", "four"], "one", 0.25),
        ("two red crosses. how many red crosses are there?", ["one", "two", "three"], "one", 0.0),
    ],
)
def test_elimination_chooses_among_what_is_told_of_and_not_asked_about(riddle, choices, answer, chance) -> None:
    assert _by_elimination(riddle, choices, answer) == chance


def test_a_benchmark_says_what_it_was_and_shows_what_it_saw(of_oracle) -> None:
    settings = of_oracle["settings"]
    assert (settings["split"], settings["num_samples"], settings["seed"]) == ("test", COUNT, 0)
    assert settings["benchmark_version"] == VERSION
    other = ShapesBenchmark(Oracle(1), COUNT, seed=1)
    assert other.run(["text_only"])["settings"]["hash"] != settings["hash"]
    [(nothing, said, is_right), *_] = other.examples["text_only_written"]
    assert nothing is None
    assert "?" in said
    assert is_right
    with pytest.raises(ValueError, match=r"Got tasks dance; need some of class_to_image, text_to_image"):
        other.run(["dance"])
    with pytest.raises(ValueError, match=r"Got num_samples 64; need more than 64"):
        ShapesBenchmark(Oracle(), 64)


def test_settings_have_another_hash_when_the_solver_or_the_order_of_picture_and_text_differs() -> None:
    def hash_with(order: int, lag: float) -> str:
        pipe = Oracle()
        pipe.scheduler = DPMSolverMultistepScheduler(solver_order=order)
        pipe.model = SimpleNamespace(generation_config=SimpleNamespace(modality_lag=lag))
        return ShapesBenchmark(pipe, COUNT).run(["text_only"])["settings"]["hash"]

    assert len({hash_with(1, 1.0), hash_with(2, 1.0), hash_with(2, -1.0), hash_with(2, 1.0)}) == 3


@pytest.mark.parametrize("is_wise", [True, False])
def test_a_riddle_counts_where_the_right_answer_is_the_likeliest(monkeypatch, is_wise) -> None:
    pipe = Oracle()
    pipe.processor = None
    pipe.model = SimpleNamespace(score=None)

    def scores(model, processor, conversations, choices, *options) -> list[SimpleNamespace]:
        answers = [pipe.riddles[messages[0]["content"]] for messages in conversations]
        at = [some.index(answer) for some, answer in zip(choices, answers, strict=True)]
        return [
            SimpleNamespace(choices=some, best=i if is_wise else (i + 1) % len(some))
            for some, i in zip(choices, at, strict=True)
        ]

    monkeypatch.setattr("mdm_hf.evaluation.shapes.score_choices", scores)
    assert ShapesBenchmark(pipe, COUNT).run(["text_only"])["scores"]["text_only"] == float(is_wise)


def test_the_shipped_classifier_knows_the_scenes() -> None:
    assert accuracy(ShapesClassifier.from_pretrained(), [scene_of("test", i)[0] for i in range(200)]) >= 0.99


def test_a_distance_grows_with_what_is_wrong_with_the_pictures(of_oracle) -> None:
    """The oracle's pictures of a class have one shape on a plain ground: far from the real ones' one to four."""
    scores = of_oracle["scores"]
    assert 0 < scores["shapes_frechet_distance_of_training_images"] < 0.2 * scores["shapes_frechet_distance"]
    assert scores["shapes_recall"] < 0.9
    assert 1 < scores["shapes_classifier_score"] < scores["shapes_classifier_score_of_real_images"] <= 25


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    write_dataset(folder / "data", {"train": 40, "classes": 10})
    text = f"""
output_dir: {folder / "run"}
model:
  preset: mdm-digits
  config: {{hidden_size: 32, num_hidden_layers: 2, vae_config: {{hidden_size: 32, latent_size: 8}}}}
processor: {{image_size: [32, 32], patch_size: 8, num_channels: 3, num_classes: 24, max_new_tokens: 21}}
data: {{scenes: {{path: {folder / "data"}, adapter: shapes}}}}
stages:
  tokenizer: {{vocab_size: 420}}
  vae: {{max_steps: 2, report_to: none}}
  diffusion: {{max_steps: 4, warmup_steps: 2, lr_scheduler_type: cosine, logging_steps: 1}}
"""
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def test_an_ablation_trains_each_variant_once_for_its_seconds_and_goes_on_where_it_stopped(
    recipe, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(module, "TIMED", (1, 3))
    measured = module.seconds_a_step
    monkeypatch.setattr(module, "seconds_a_step", lambda *given: 0.05 + 0 * measured(*given))  # ten steps anywhere
    variants = {
        "detached": Variant(),
        "attached": Variant(("model.config.detach_latents=false",)),
        "two steps": Variant((), {"num_inference_steps": 2}, {"solver_order": 1}),
        "ancestral": Variant((), {"num_inference_steps": 3}, {"ddpm": True}),
    }
    monkeypatch.setitem(EXPERIMENTS, "vae", Experiment("Which?", variants, ("image_and_text",)))
    found = reproduce("vae", recipe, tmp_path, cpu_seconds=0.5, num_samples=COUNT)
    assert [row["variant"] for row in found["rows"]] == list(variants)
    assert len({row["settings"]["hash"] for row in found["rows"]}) == 3  # the first two sample alike
    assert [row["settings"]["solver"] for row in found["rows"][1:]] == [
        "DPMSolverMultistepScheduler, order 2",
        "DPMSolverMultistepScheduler, order 1",
        "DDPMScheduler",
    ]
    first, second, *others = (row["training"] for row in found["rows"])
    assert first["steps"] == second["steps"] == 10
    assert second["changes"] == ["model.config.detach_latents=false"]
    assert all(one == first for one in others)
    losses = first["losses"]
    assert losses["step"] == sorted({*losses["step"]} & {*range(first["steps"] + 1)})
    assert len(losses["image"]) == len(losses["text"]) == len(losses["step"]) > 0
    assert losses != second["losses"]
    assert len(list((tmp_path / "models").glob("*/final"))) == 3  # the VAE's, and two
    kept = json.loads((tmp_path / "vae.json").read_text())
    assert kept == json.loads(json.dumps(found))
    with Image.open(tmp_path / "vae.png") as picture:
        assert picture.height > 700  # scores, and losses below them
    [*sheets] = {row["examples"] for row in kept["rows"]}
    assert len(sheets) == 4
    for sheet in sheets:
        with Image.open(tmp_path / sheet) as picture:
            assert picture.width > 8 * 96
    said = table(found)
    assert said.count("\n| ") == 5
    assert "image and text" in said
    shutil.rmtree(tmp_path / "models")
    shutil.rmtree(tmp_path / "scores")
    monkeypatch.setattr(module, "run_recipe", None)  # nothing is trained again
    monkeypatch.setattr(module, "ShapesBenchmark", None)  # nor scored
    assert json.loads(json.dumps(reproduce("vae", recipe, tmp_path, cpu_seconds=0.5, num_samples=COUNT))) == kept


def test_a_trained_models_vae_is_given_to_every_variant(recipe, tmp_path, monkeypatch) -> None:
    base = module.on_shared_vae(recipe, (), tmp_path / "models", seed=0)
    vae = Path(base["processor"])
    monkeypatch.setattr(module, "seconds_a_step", lambda *_: 0.05)
    variants = {"frozen": Variant(("stages.diffusion.freeze=encoder",))}
    monkeypatch.setitem(EXPERIMENTS, "vae", Experiment("Which?", variants, ("image_and_text",)))
    settings = {"cpu_seconds": 0.1, "num_samples": COUNT}
    found = reproduce("vae", recipe, tmp_path / "given", **settings, vae=vae)
    [final] = (tmp_path / "given" / "models").glob("*/final")  # none is the VAE's
    encoders = [
        {name: weight for name, weight in load_file(folder / "model.safetensors").items() if ".encoder." in name}
        for folder in (vae, final)
    ]
    assert encoders[0]
    assert all(torch.equal(weight, encoders[1][name]) for name, weight in encoders[0].items())
    shutil.copytree(vae, tmp_path / "copy")
    monkeypatch.setattr(module, "run_recipe", None)  # nothing is trained again
    assert reproduce("vae", recipe, tmp_path / "given", **settings, vae=tmp_path / "copy")["rows"] == found["rows"]
    with pytest.raises(ValueError, match="Got a trained model, mine, and the VAE of yours to train others with;"):
        reproduce("solver", recipe, tmp_path, model="mine", vae="yours")


def test_a_variant_that_is_timed_on_a_busy_machine_still_gets_its_steps(recipe, tmp_path, monkeypatch) -> None:
    paces = iter([0.5, 1.2, 0.9, 1.2, 0.9])  # on an idle machine once, then in turns on a busy one
    monkeypatch.setattr(module, "seconds_a_step", lambda recipe, scratch: next(paces))
    plain = load_recipe(recipe)
    own = {"steps": 200, "cpu_seconds_a_step": 0.5, "of_plain_pace": []}
    assert steps_within(100, None, plain, tmp_path) == own
    theirs = iter([0.6, 0.45, 0.6, 0.45])
    of_variant = {"steps": 400, "cpu_seconds_a_step": 0.25, "of_plain_pace": [0.5] * 4}
    assert steps_within(100, lambda: next(theirs), plain, tmp_path) == of_variant


def test_a_pace_is_that_of_the_diffusion_stage_without_the_gate(tmp_path, monkeypatch) -> None:
    ran = []

    def run(timed: dict, draw) -> None:
        ran.append(timed["stages"])
        Path(timed["output_dir"]).mkdir()
        draw(None, 20)
        draw(None, 60)

    monkeypatch.setattr(module, "run_recipe", run)
    changes = ["stages.tokenizer=", "stages.vae=", "processor=any"]
    plain = load_recipe(Path(__file__).parents[1] / "recipes" / "shapes.yaml", changes)
    assert module.seconds_a_step(plain, tmp_path / "timed") >= 0
    [stages] = ran
    assert [*stages] == ["diffusion"]
    assert "gate" in plain["stages"]


def test_experiments_are_named_in_the_help_and_unknown_ones_refused(recipe, tmp_path, capsys) -> None:
    from mdm_hf.cli import main

    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in EXPERIMENTS)
    assert main(["reproduce", "table9", "--recipe", str(recipe), "--output", str(tmp_path)]) == 2
    assert "Got the experiment 'table9'; need one of table3, sharing" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-5", "nan", "inf"])
def test_no_time_to_train_in_is_refused(recipe, tmp_path, capsys, seconds: str) -> None:
    from mdm_hf.cli import main

    where = ["--recipe", str(recipe), "--output", str(tmp_path)]
    assert main(["reproduce", "table3", *where, "--cpu-seconds", seconds]) == 2
    assert "(--cpu-seconds) to train for; need a number above 0" in capsys.readouterr().err
    assert main(["reproduce", "table3", *where, "--seed", "-1"]) == 2
    assert "Got the seed -1 (--seed); need 0 or more" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_trained_model_is_refused_where_each_variant_has_to_be_trained(recipe, tmp_path) -> None:
    with pytest.raises(
        ValueError, match="Got a trained model, mine, for sharing, whose variants differ in how they are"
    ):
        reproduce("sharing", recipe, tmp_path, model="mine")


def test_every_task_of_the_benchmark_is_a_task_of_an_experiment() -> None:
    assert set(TASKS) == {task for experiment in EXPERIMENTS.values() for task in experiment.tasks}
