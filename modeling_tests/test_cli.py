"""Claims about the command line and the examples: each runs as its help and the README say."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdm_hf import cli
from mdm_hf.cli import main
from mdm_hf.evaluation.digits import over_seeds


ROOT = Path(__file__).parents[1]
CARD = str(ROOT / "model_cards" / "mdm-digits")


def test_demo_writes_one_picture_of_every_task(tmp_path, capsys):
    output = tmp_path / "new" / "demo.png"
    assert main(["demo", "--model", CARD, "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    width, height = Image.open(output).size
    assert width > 900
    assert height > 500


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its allocator is glibc's")
def test_the_command_line_keeps_freed_memory_and_the_package_leaves_the_allocator_alone():
    script = """
import resource, sys
import torch
from mdm_hf import cli

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults() for _ in range(4)))
assert cli.main(["train", "no such recipe"]) == 2
print(min(faults() for _ in range(4)))  # the first grows the heap, and the second may, if something lies in the gap
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    with_import, with_command = map(int, ran.stdout.split())
    assert with_import > 1000 > 10 * with_command  # of up to 16,384 pages; fewer where they are large ones


def test_generate_prints_text_and_writes_a_grid(tmp_path, capsys):
    output = tmp_path / "out.png"
    arguments = ["generate", "--model", CARD, "--num-samples", "2", "--steps", "2", "--seed", "0"]
    assert main([*arguments, "--output", str(output)]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 3
    assert Image.open(output).size[0] > 200


def test_generate_takes_as_few_steps_as_will_do(tmp_path, capsys):
    arguments = ["generate", "--model", CARD, "--generate", "image", "--text", "a three", "--seed", "0"]
    assert main([*arguments, "--steps", "auto", "--output", str(tmp_path / "three.png")]) == 0
    assert Image.open(tmp_path / "three.png").size[0] > 100
    with pytest.raises(SystemExit):
        main([*arguments, "--steps", "few"])
    assert "got 'few'; need a whole number, 1 or more, or auto" in capsys.readouterr().err


def test_generate_auto_makes_what_the_prompt_calls_for(tmp_path, capsys):
    output, options = tmp_path / "three.png", ["--steps", "3", "--seed", "0"]
    drawn = [
        "generate",
        "--model",
        CARD,
        "--generate",
        "auto",
        "--text",
        "a handwritten three",
        "--output",
        str(output),
        *options,
    ]
    assert main(drawn) == 0
    assert capsys.readouterr().out == f"Wrote {output.resolve()}.\n"
    assert main(["generate", "--model", CARD, "--generate", "auto", "--image", str(output), *options]) == 0
    said = capsys.readouterr().out
    assert said.strip()
    assert "Wrote" not in said


def test_generate_changes_what_a_mask_marks(tmp_path):
    given, output = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8), tmp_path / "out.png"
    Image.fromarray(given).save(tmp_path / "given.png")
    Image.fromarray(np.repeat([255, 0], 4)[:, None].repeat(8, 1).astype(np.uint8)).save(tmp_path / "mask.png")
    edit = ["--canvas", str(tmp_path / "given.png"), "--mask", str(tmp_path / "mask.png"), "--strength", "0.7"]
    arguments = ["generate", "--model", CARD, *edit, "--steps", "4", "--seed", "0", "--scheduler", "DDIMScheduler"]
    assert main([*arguments, "--output", str(output)]) == 0
    assert Image.open(output).size[0] > 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--steps", "0"], "`num_inference_steps` is 0"),
        (["generate", "--class-id", "12"], "12"),
        (["generate", "--strength", "0.5"], "Got --mask or --strength without --canvas; need the picture"),
        (["generate", "--canvas", "missing.png", "--generate", "text"], "Got generate=['text'] and a canvas"),
        (["generate", "--scheduler", "Euler"], "`scheduler` is 'Euler', which names no scheduler"),
        (["generate", "--modality-lag", "2"], "`modality_lag` is 2.0; it must lie in [-1, 1]"),
        (["generate", "--image", "missing.png"], "'missing.png', which cannot be opened"),
        (["generate", "--image", __file__], "which holds no image that Pillow can read"),
    ],
    ids=["steps", "class", "strength", "canvas", "scheduler", "lag", "file", "no-image"],
)
def test_bad_input_ends_with_a_message_and_no_traceback(arguments, message, capsys):
    assert main([*arguments, "--model", CARD]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


COMMANDS = {
    "convert": ["convert", "{model}", "--to", "{model}/../out.pt"],
    "dtype": ["convert", "{model}", "--to", "{model}/../out", "--dtype", "bfloat16"],
    "card": ["card", "{model}"],
    "push": ["push", "{model}", "org/x", "--dry-run"],
    "generate": ["generate", "--model", "{model}", "--output", "{model}/../out.png"],
}


def refused(command, model, capsys) -> str:
    """The one line with which a command refuses a model's folder; nothing is written."""
    capsys.readouterr()
    assert main([part.format(model=model) for part in COMMANDS[command]]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mdm ")]
    assert len(said) == 1
    assert not list(model.parent.glob("out*"))
    return said[0]


@pytest.fixture
def broken(tmp_path):
    """A copy of mdm-digits with a change of its config.json, which may be a whole new text."""

    def change(fields):
        folder = Path(shutil.copytree(CARD, tmp_path / "model"))
        config = folder / "config.json"
        whole = json.loads(config.read_text()) | fields if isinstance(fields, dict) else fields
        config.write_text(json.dumps(whole))
        return folder

    return change


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "big"}, "a config that is refused: Field 'hidden_size' expected int, got str (value: 'big')"),
        ({"hidden_size": -1}, "a config that is refused: `hidden_size` is -1; it must be 1 or more; need that of an"),
        ({"vae_config": 3}, "a config that is refused: Field 'vae_config' with value 3"),
        ({"dtype": "float99"}, "a config that is refused: module 'torch' has no attribute 'float99'"),
        ({"saved_with": 3}, "with saved_with 3 in its config.json; need a list of files"),
        (
            {"model_type": "gpt2"},
            "whose config.json has the model_type 'gpt2'; need 'mdm'; give the folder or",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_be_is_refused_in_one_line_by_every_command(command, fields, message, broken, capsys):
    folder = broken(fields)
    said = refused(command, folder, capsys)
    assert f"Got {folder} " in said
    assert message in said


@pytest.mark.parametrize("command", ["card", "push", "generate"])
def test_a_config_that_is_no_mapping_is_refused(command, broken, capsys):
    said = refused(command, broken([1]), capsys)
    by_transformers_5_17 = "with a config that is refused: list indices must be integers or slices"
    assert "config.json has the model_type 'list'; need 'mdm'" in said or by_transformers_5_17 in said


@pytest.mark.parametrize("command", ["convert", "dtype", "push", "generate"])
def test_a_folder_without_the_generation_config_it_was_saved_with_is_refused(command, broken, capsys):
    folder = broken({})
    (folder / "generation_config.json").unlink()
    said = refused(command, folder, capsys)
    assert f"Got {folder} without generation_config.json, which its config.json says it was saved with" in said


@pytest.mark.parametrize("command", ["push", "generate"])
def test_a_model_without_a_processor_is_refused_with_what_is_missing(command, broken, capsys):
    folder = broken({})
    (folder / "processor_config.json").unlink()
    said = refused(command, folder, capsys)
    assert f"Got {folder} without processor_config.json; need the processor beside the model, its tokenizer" in said


@pytest.mark.parametrize("size", ["nonsense", "0GB", "-5GB", "nanGB", "1e3", "5XB", ""])
def test_a_size_of_shards_that_is_none_is_refused_before_anything_is_read(size, tmp_path, capsys):
    for arguments in (["convert", CARD, "--to", str(tmp_path / "out")], ["push", CARD, "org/x", "--dry-run"]):
        assert main([*arguments, f"--max-shard-size={size}"]) == 2
        said = capsys.readouterr().err
        assert f"Got --max-shard-size {size!r}; need a number above 0 with KB, MB, GB or TB, such as 2GB" in said
        assert "Loading" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [2**63, 2**64, -1])
def test_a_seed_that_is_none_is_refused(seed, tmp_path, capsys):
    out = str(tmp_path / "out.png")
    for arguments in (
        ["convert", CARD, "--to", str(tmp_path / "out")],
        ["generate", "--model", CARD, "--output", out],
        ["demo", "--model", CARD, "--output", out],
    ):
        assert main([*arguments, f"--seed={seed}"]) == 2
        more = ", below 2**63" if seed > 0 else ""
        assert f"`seed` is {seed}; it must be a whole number, 0 or more{more}." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_too_few_samples_to_score_are_refused_before_a_model_is_loaded(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--num-samples", "64", "--model", CARD])
    assert stop.value.code == 2
    assert "got 64; need 65 or more, for a Frechet distance over 64 pixels or features" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "samples per task, 65 or more" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["0", "-2", "1.5", "ten"])
def test_training_for_no_whole_number_of_steps_is_refused(given, capsys):
    assert main(["train", "recipes/digits.yaml", f"stages.diffusion.max_steps={given}"]) == 2
    error = capsys.readouterr().err
    assert "mdm train: Got stages.diffusion.max_steps " in error
    assert f"{given}" in error
    assert "need a whole number of at least 1" in error


def test_changes_of_a_recipe_may_stand_after_a_flag(capsys):
    assert main(["train", "recipes/digits.yaml", "--resume", "stages.diffusion.max_steps=0"]) == 2
    assert "Got stages.diffusion.max_steps 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "recipes/digits.yaml", "--resum", "--no-such=3"])
    assert "unrecognized arguments: --no-such=3" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["", "model_cards/mdm-digits", "/no/such/folder", "./none"])
def test_a_model_folder_that_is_not_there_is_named(model, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--model", model]) == 2
    assert f"Got {model!r}, which is no folder here" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["", "nowhere", "/no/such/folder"])
def test_a_trained_model_that_is_not_there_is_named_before_the_hub_is_asked(model, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "solver", "--trained", model]) == 2
    said = f"Got {model!r}, which is no folder here; give --trained a folder or a Hub repository owner/name, or leave"
    assert said in (error := capsys.readouterr().err)
    assert "--model" not in error


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ("{}", "no field 'rows'"),
        ('{"rows": [1]}', "no attribute 'get'"),
        (b"\xff", "invalid start byte"),
    ],
)
def test_kept_results_that_cannot_be_read_are_named_with_what_to_do(content, why, tmp_path, capsys):
    kept = tmp_path / "solver.json"
    kept.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["reproduce", "solver", "--trained", CARD, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"Got {kept}, which is no whole file of results (" in error
    assert why in error
    assert "need the one that an earlier run left, or none; delete it to make its rows anew" in error


def test_a_picture_that_cannot_be_written_is_refused_before_any_sampling(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--model", CARD, "--output", "out.xyz"])
    assert "got 'out.xyz'; need a picture's name: .png" in capsys.readouterr().err


def test_an_image_alone_is_described(tmp_path, capsys):
    path = tmp_path / "digit.png"
    Image.new("L", (8, 8)).save(path)
    assert main(["generate", "--model", CARD, "--image", str(path), "--steps", "2", "--seed", "0"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["demo", "generate", "train", "evaluate"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  mdm {command}" in capsys.readouterr().out


def test_evaluate_refuses_what_it_could_not_write_or_draw_before_it_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mdm_hf.evaluation.benchmarks.run_benchmark", None)
    assert main(["evaluate", "--model", CARD, "--output", str(tmp_path)]) == 2
    assert f"Got --output {tmp_path}, which is a folder; need a file's name" in capsys.readouterr().err
    assert main(["evaluate", "--model", CARD, "--seed", "0", "-1"]) == 2
    assert "Got --seed -1; need 0 or more" in capsys.readouterr().err


def test_evaluate_writes_scores_with_their_settings(tmp_path):
    output = tmp_path / "scores.json"
    assert main(["evaluate", "--model", CARD, "--num-samples", "70", "--steps", "4", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["settings"]["num_samples"] == 70
    assert len(result["settings"]["hash"]) == 12
    assert 0.97 <= result["scores"]["judge_accuracy"] <= 1


def test_evaluate_takes_the_models_own_number_of_steps(tmp_path, monkeypatch):
    """Digits and shapes, whose own settings tell them, and what all others sample by."""
    asked: list[int | None] = []

    class Stop(Exception):
        pass

    def stops(self, *args, num_inference_steps=None, **options):
        asked.append(num_inference_steps)
        raise Stop

    model = tmp_path / "model"
    shutil.copytree(CARD, model)
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"num_inference_steps": 7}))
    monkeypatch.setattr("mdm_hf.MDMPipeline.__call__", stops)
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "a three"}')
    more = {"geneval": ["--data", str(data), "--work-dir", str(tmp_path)]}
    for name in ("digits", "digits-editing", "shapes", "geneval"):
        for given, steps in (([], 7), (["--steps", "3"], 3)):
            with pytest.raises(Stop):
                main(["evaluate", "--model", str(model), "--benchmark", name, *given, *more.get(name, [])])
            assert asked.pop() in ((None, steps) if name == "shapes" and not given else (steps,)), name


def test_an_unknown_benchmark_is_refused_with_the_known_ones(capsys):
    assert main(["evaluate", "--model", CARD, "--benchmark", "digit"]) == 2
    assert "Got --benchmark digit; need one of digits" in capsys.readouterr().err
    assert main(["evaluate", "--model", CARD, "--benchmark", "shapes", "--seed", "0", "1"]) == 2
    assert "Got --seed with 2 seeds for shapes, which takes one and gives intervals" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        (
            "digits",
            ["--limit", "9", "--prompt", "x"],
            "Got --limit, --prompt for digits, which reads no such option",
        ),
        ("shapes", ["--batch-size", "8"], "need --num-samples, --tasks, --split at most; leave the others out"),
        ("fid", ["--num-samples", "70"], "Got --num-samples for fid"),
        ("hellaswag", ["--split", "validation"], "Got --split for hellaswag"),
    ],
)
def test_an_option_that_a_benchmark_does_not_read_is_refused(name, given, said, capsys):
    assert main(["evaluate", "--model", CARD, "--benchmark", name, *given]) == 2
    assert said in capsys.readouterr().err


def test_shapes_are_scored_on_the_tasks_and_the_split_that_are_asked_for(tmp_path, capsys):
    model, output = str(Path(CARD).with_name("mdm-shapes")), tmp_path / "scores.json"
    arguments = ["evaluate", "--benchmark", "shapes", "--model", model, "--num-samples", "65", "--steps", "2"]
    asked = ["--tasks", "question_answering", "--split", "validation"]
    assert main([*arguments, *asked, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert (found["settings"]["split"], found["settings"]["tasks"]) == ("validation", ["question_answering"])
    assert all(name.startswith("question_answering") for name in found["scores"])
    assert main([*arguments, "--tasks", "drawing"]) == 2
    assert "Got tasks drawing; need some of class_to_image" in capsys.readouterr().err


def test_several_seeds_are_told_as_mean_and_range():
    one, two = (
        {
            "scores": {"class_to_image": score},
            "settings": {"num_samples": 70, "seed": seed, "hash": "x"},
            "seconds": 2.0,
        }
        for seed, score in enumerate((0.9, 1.0))
    )
    both = over_seeds([one, two])
    assert (both["scores"], both["lowest"], both["highest"]) == (
        {"class_to_image": 0.95},
        {"class_to_image": 0.9},
        {"class_to_image": 1.0},
    )
    assert both["settings"]["seed"] == [0, 1]
    assert both["seconds"] == 4.0


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("generate.py", ["--output", "{tmp}/generated.png"]),
        ("caption.py", []),
        ("ask.py", ["--question", "is this a seven?"]),
        ("stream.py", ["--output", "{tmp}/steps.png"]),
        ("edit.py", ["--output", "{tmp}/edit.png"]),
        ("sizes.py", ["--output", "{tmp}/sizes.png"]),
        ("one_mask.py", ["--output", "{tmp}/one_mask.png"]),
        ("chat.py", ["--state", "{tmp}/chat.safetensors"]),
        ("train.py", ["--output-dir", "{tmp}/run", "--max-steps", "3"]),
        ("finetune_lora.py", ["--output-dir", "{tmp}/lora", "--max-steps", "1", "--num-samples", "65"]),
    ],
    ids=lambda v: v.removesuffix(".py") if isinstance(v, str) else "",
)
def test_examples_run(name, arguments, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / name), *(a.format(tmp=tmp_path) for a in arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_selection_of_texts_has_a_number_or_is_off(command) -> None:
    def given(value: str):
        return cli._parser().parse_args([command, "--text-selection-tolerance", value]).text_selection_tolerance

    assert given("off") is False
    assert given("0.5") == 0.5
    with pytest.raises(SystemExit):
        given("of")
