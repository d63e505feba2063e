"""The card of a model's folder, its README.md, made from what lies in the folder.

    card.yaml        what only its makers know: summary, training data, use, limits, examples (`card_notes.py`)
    config.json      sizes; recipe.yaml, here or in the folder above: how it was trained
    examples.json    what the checkpoint made of the examples (`examples.py`)
    *scores*.json    results of `mdm evaluate --output`
    speed.json       result of benchmarks/checkpoint_speed.py

A folder without weights gets a card that says untrained. A README.md that somebody wrote is never overwritten.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checkpoints import write_whole
from ..configuration_mdm import MDM_PRESETS, MDMConfig
from ..image_reading import MODES
from ..modeling_mdm import MDMForMultiModalGeneration
from .adapter import Adapter, is_template, read_adapter, usage
from .card_notes import NOTES, NOTES_FILE, read_file, read_notes
from .examples import EXAMPLES, FOLDER, checkpoint_hash, drawn_examples


CARD, SPEED = "README.md", "speed.json"
MADE_BY = "<!-- Made by `mdm card` from card.yaml and the results beside it: change those, not this. -->"
TAGS = ["mdm", "diffusion", "mamba", "custom_code"]
# The Hub's task of a score: that of the longest of these that the score's name, or the benchmark's, starts with.
TASKS = {
    "text_to_image": "text-to-image",
    "image_to_text": "image-to-text",
    "question_answering": "visual-question-answering",
    "text_only": "text-generation",
    "geneval": "text-to-image",
    "fid": "text-to-image",
    "coco-captions": "image-to-text",
    "flickr30k-captions": "image-to-text",
    "vqav2": "visual-question-answering",
    "vizwiz": "visual-question-answering",
    "okvqa": "visual-question-answering",
}
OTHER_TASK = "any-to-any"
PAPER = """@article{mdm,
  title = {End-to-End Multi-Modal Diffusion Mamba},
  author = {Chunhao Lu and Qiang Lu and Meichen Dong and Jake Luo}
}"""


def write_card(folder: str | Path, repo_id: str | None = None, overwrite: bool = False) -> Path:
    """Writes README.md of a folder; see the module.

    Args:
        folder: With config.json; weights and processor unless untrained. Examples must have been drawn.
        repo_id: Where it will lie, for the code that is shown; the folder's own path if None.
        overwrite: Replace a README.md that was not made here.

    Returns:
        The README.md.

    Raises:
        ValueError: the README.md is somebody's; what `card_of` and `check_card` refuse.
    """
    folder = Path(folder)
    path = check_readme(folder, overwrite)
    text = card_of(folder, repo_id)
    check_card(text, folder)
    write_whole(path, text)
    return path


def check_readme(folder: str | Path, overwrite: bool = False) -> Path:
    """Where the card of a folder goes.

    Raises:
        ValueError: somebody's README.md is there, and not to be replaced.
    """
    folder = Path(folder)
    path = folder / CARD
    if path.is_file() and not overwrite and not is_generated(path):
        raise ValueError(
            f"Got {path}, which `mdm card` did not make; it would be lost; move what it says to {NOTES_FILE} and run "
            "this with --overwrite."
        )
    return path


def is_generated(path: Path) -> bool:
    """Whether a README.md is one of ours, or PEFT's that says nothing: one that nobody wrote."""
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"Got {path}, which is no text in UTF-8 ({error}); need one; save it as that.") from error
    return MADE_BY in text or is_template(text)


def is_of_weights(path: Path) -> bool:
    """Whether a file or folder beside a model's weights tells what these were measured to do, or made: true of no
    others, not even of the same in another dtype."""
    return path.name in (CARD, SPEED, EXAMPLES, FOLDER) or path.match("*scores*.json")


def card_of(folder: str | Path, repo_id: str | None = None) -> str:
    """The card's text: front matter and sections.

    Raises:
        ValueError: scores or examples are of other weights than the folder's; neither an MDM nor an adapter of one.
    """
    folder = Path(folder)
    adapter = read_adapter(folder)
    if adapter is None and not (folder / "config.json").is_file():
        raise ValueError(f"Got {folder} without config.json; need the folder of a saved model; name that.")
    notes = read_notes(folder)
    if adapter is not None and notes["summary"] == NOTES["summary"]:
        notes["summary"] = f"A {adapter.kind} adapter of {adapter.base}. {NOTES['summary']}"
    place = repo_id or folder.as_posix()
    is_trained = checkpoint_hash(folder) is not None
    results, examples = list(_results(folder)), drawn_examples(folder, notes["examples"])
    sections = [
        MADE_BY,
        f"# {notes['name']}",
        notes["summary"].strip(),
        f"![Samples]({notes['picture']})" if notes["picture"] else "",
        *(
            _how_to_use(place, repo_id is not None, examples, adapter)
            if is_trained
            else _untrained(MDMConfig.from_pretrained(folder), place, notes["name"])
        ),
        *(["## What it makes", _example_table(examples)] if examples else []),
        *_score_sections(results, notes["scores"]),
        *_speed_section(folder),
        *(["## Adapter", _table([["", ""], *adapter.rows])] if adapter else ["## Model", _sizes(folder)]),
        *(["## Training", *_training(folder, notes)] if is_trained else []),
        "## Intended use",
        notes["intended_use"].strip(),
        "## Limits",
        notes["limits"].strip(),
        "## Paper",
        f"```bibtex\n{PAPER}\n```",
    ]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{_front_matter(notes, results, examples, adapter).to_yaml()}\n---\n{body}\n"


def check_card(text: str, folder: str | Path) -> None:
    """Refuses a card that the Hub would refuse, or would show with a hole in it.

    Raises:
        ValueError: front matter that is none, or lacks a licence; a task or library that the Hub does not know; a
            picture that is not in the folder.
    """
    folder = Path(folder)
    try:
        data = ModelCard(text).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"Got a card whose front matter is not the Hub's ({error}); need its YAML between two ---."
        ) from error
    names = json.loads((Path(__file__).parent / "hub_names.json").read_text(encoding="utf-8"))
    faults = []
    if not data.get("license"):
        faults.append("no license")
    elif data["license"] not in names["licenses"]:
        faults.append(f"the license {data['license']!r}, which is none of the Hub's: `other` stands for any")
    tasks = [result["task"]["type"] for model in data.get("model-index", []) for result in model["results"]]
    faults += [
        f"the task {task!r}, which is none of the Hub's"
        for task in [data.get("pipeline_tag"), *tasks]
        if task not in names["tasks"]
    ]
    if data.get("library_name") not in names["libraries"]:
        faults.append(f"the library {data.get('library_name')!r}, which is none of the Hub's")
    shown = re.findall(r"!\[[^\]]*\]\(\s*([^)\"]*[^)\"\s])", text)
    for example in data.get("widget") or []:
        if not isinstance(example, dict) or not isinstance(example.get("output", {}), dict):
            faults.append(f"the widget example {example!r}, which is no mapping with its output")
            continue
        shown += [example.get("src"), example.get("output", {}).get("url")]
    faults += [
        f"the picture {name!r}, whose name has a space, at which Markdown ends an address"
        for name in sorted({name for name in shown if name and " " in name})
    ]
    faults += [
        f"the picture {name}, which is not in {folder}"
        for name in sorted({name for name in shown if name and "://" not in name})
        if Path(name).is_absolute() or ".." in Path(name).parts or not (folder / name).is_file()
    ]
    if faults:
        raise ValueError(f"Got a card with {'; '.join(faults)}; need one that the Hub accepts; mend {NOTES_FILE}.")


def _front_matter(
    notes: dict, results: list[dict], examples: list[dict], adapter: Adapter | None = None
) -> ModelCardData:
    widget = []
    for example in examples:
        entry = {"text": example["text"]} if "text" in example else {}
        if "image" in example:
            entry["src"] = example["image"]
        made = example["made"]
        output = {"url": made["image"]} if "image" in made else {"text": made["text"]}
        if entry:  # a class alone is no input of a widget
            title = {"example_title": made["text"]} if set(made) == {"image", "text"} else {}
            widget.append(entry | title | {"output": output})
    return ModelCardData(
        license=notes["license"],
        library_name="peft" if adapter else "transformers",
        base_model=adapter.base if adapter else None,
        pipeline_tag=OTHER_TASK,
        tags=TAGS + ([adapter.kind.lower()] if adapter else []) + notes["tags"],
        language=notes["language"],
        datasets=notes["datasets"] or None,
        widget=widget or None,
        model_name=notes["name"],
        eval_results=_eval_results(results, notes["scores"]) or None,
    )


def _eval_results(results: list[dict], shown: dict) -> list[EvalResult]:
    """The entries of `model-index`: each score under the Hub's task that it is about."""
    found = []
    for result in results:
        benchmark = result["benchmark"]
        for name, words in _shown_scores(result, shown):
            fits = [start for start in TASKS if name.startswith(start) or benchmark == start]
            found.append(
                EvalResult(
                    task_type=TASKS[max(fits, key=len)] if fits else OTHER_TASK,
                    dataset_type=benchmark,
                    dataset_name=f"{benchmark} of mdm evaluate",
                    metric_type=name,
                    metric_name=words["name"],
                    metric_value=result["scores"][name],
                )
            )
    return found


def _results(folder: Path) -> Iterator[dict]:
    """The results of `mdm evaluate` in a folder."""
    weights = checkpoint_hash(folder)
    for path in sorted(folder.glob("*scores*.json")):
        result = read_file(path)
        if not isinstance(result, dict):
            raise ValueError(f"Got {path} with {type(result).__name__}; need what `mdm evaluate --output` writes.")
        if missing := {"scores", "settings", "benchmark", "weights"} - set(result):
            raise ValueError(
                f"Got {path} without {', '.join(sorted(missing))}; need what `mdm evaluate --output` writes; run it "
                "again or take the file away."
            )
        if result["weights"] != weights:
            raise ValueError(
                f"Got {path}, scores of the weights {result['weights']}, beside the weights {weights}; need scores of "
                "these; run `mdm evaluate --output` again or take the file away."
            )
        spreads = [result["scores"], result.get("lowest", {}), result.get("highest", {})]
        values = [value for spread in spreads if isinstance(spread, dict) for value in spread.values()]
        if not all(isinstance(one, dict) for one in spreads) or not all(map(_is_number, values)):
            raise ValueError(f"Got {path} with scores that are no numbers by name; need those of `mdm evaluate`.")
        intervals = result.get("intervals") or {}
        if (
            not isinstance(result["settings"], dict)
            or not isinstance(result["benchmark"], str)
            or not isinstance(intervals, dict)
            or not all(_is_interval(ends) for ends in intervals.values())
        ):
            raise ValueError(
                f"Got {path} whose benchmark is no text, whose settings are no mapping or whose intervals are no two "
                "numbers each; need those of `mdm evaluate`; run it again or take the file away."
            )
        if set(spreads[1]) != set(spreads[2]):
            raise ValueError(f"Got {path} whose `lowest` and `highest` name other scores; need both of each.")
        yield result | {"file": path.name}


def _is_interval(ends: Any) -> bool:
    return isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends))


def _is_number(value: Any) -> bool:
    """A score: neither a truth value nor what JSON of Python's takes and the Hub does not, NaN and infinities."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown_scores(result: dict, shown: dict) -> Iterator[tuple[str, dict]]:
    """Names of a result's scores that are to be shown, each with its words."""
    known = [name for name in shown if name in result["scores"]] or list(result["scores"])
    for name in known:
        yield name, {"name": name.replace("_", " "), "goal": ""} | shown.get(name, {})


def _score_sections(results: list[dict], shown: dict) -> list[str]:
    sections = []
    for result in results:
        spread = result.get("intervals") or {
            name: [low, result["highest"][name]] for name, low in result.get("lowest", {}).items()
        }
        rows = [["score", "value", "from, to", "goal"]]
        for name, words in _shown_scores(result, shown):
            ends = "{:.3f}, {:.3f}".format(*spread[name]) if name in spread else ""
            rows.append([words["name"], f"{result['scores'][name]:.3f}", ends, words["goal"]])
        meaning = "95% bootstrap intervals" if result.get("intervals") else "the lowest and the highest of the seeds"
        told = {
            name: value
            for name, value in result["settings"].items()
            if value is not None and name not in ("hash", "benchmark", "tasks")
        }
        settings = ", ".join(f"{name} {value}" for name, value in told.items())
        sections += [
            f"## Scores: {result['benchmark']}",
            _table(rows),
            f"`mdm evaluate --benchmark {result['benchmark']}` with {settings}; from and to are {meaning}; all scores "
            f"are in [{result['file']}]({result['file']}). What they measure is in the docs of mdm-hf.",
        ]
    return sections


def _speed_section(folder: Path) -> list[str]:
    path = folder / SPEED
    if not path.is_file():
        return []
    speed = read_file(path)
    rows = [["task", "samples at once", "seconds a sample", "peak memory of the process"]]
    try:
        for row in speed["rows"]:
            rows.append([str(row["task"]), str(row["batch"]), f"{row['seconds']:.3g}", f"{row['peak_mib']:.0f} MiB"])
        machine = speed["machine"]
        where = f"{machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}"
        steps = speed["num_inference_steps"]
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"Got {path}, no result of benchmarks/checkpoint_speed.py ({type(error).__name__}: {error}); run it "
            "again, or take it away."
        ) from error
    return [
        "## Speed and memory",
        _table(rows),
        f"{where}, {steps} solver steps; measured by benchmarks/checkpoint_speed.py of mdm-hf.",
    ]


def _how_to_use(place: str, is_on_hub: bool, examples: list[dict], adapter: Adapter | None) -> list[str]:
    files = f"https://huggingface.co/{place}/resolve/main" if is_on_hub else place
    calls = [f"pipe({_arguments(example, files)})[0]" for example in examples[:4]] or ["pipe(seed=0)[0]"]
    if adapter is not None:
        return usage(place, adapter, calls)
    lines = ["from mdm_hf import MDMPipeline", "", f'pipe = MDMPipeline.from_pretrained("{place}")', *calls]
    sections = [
        "## Use",
        "```python\n" + "\n".join(lines) + "\n```",
        'Each call gives a list of `{"text": [...], "images": [...]}`.',
    ]
    if is_on_hub:
        remote = f'from transformers import pipeline\n\npipe = pipeline(model="{place}", trust_remote_code=True)'
        sections += ["Where mdm-hf is not installed, read this repository's code, then:", f"```python\n{remote}\n```"]
    return sections


def _untrained(config: MDMConfig, place: str, name: str) -> list[str]:
    lines = ["from mdm_hf import MDMConfig, MDMForMultiModalGeneration", ""]
    lines.append(f'config = MDMConfig.from_pretrained("{place}")')
    made, recipe, told = "model = MDMForMultiModalGeneration(config)", f"preset: {name}", ""
    if _needs_autoencoder(config):
        channels = config.vae_config.num_channels
        lines.append(f'config = config.with_pixel_autoencoder("org/vae")  # one of {channels} latent channels')
        recipe += ", pixel_autoencoder: {repo_id: org/vae}"
        told = (
            f"The configuration takes pictures as {channels} channels of latents and names no autoencoder that makes "
            "these of pixels: put one of your choice in front, a folder or a repository of the Hub, as shown."
        )
    if _needs_autoencoder(config) or config.pixel_autoencoder is not None:
        lines.append(f"{made}.load_pixel_autoencoder()  # all other weights are random")
    else:
        lines.append(f"{made}  # random weights")
    return [
        "**Untrained.** There are no weights here: this is the configuration to train one with.",
        "## Use",
        "```python\n" + "\n".join(lines) + "\n```",
        told,
        f"To train it, write `model: {{{recipe}}}` into a recipe; `mdm train RECIPE --dry-run` says what a step takes."
        if name in MDM_PRESETS
        else "",
    ]


def _needs_autoencoder(config: MDMConfig) -> bool:
    """Whether patches are of latents, and nothing there makes these of pixels."""
    return config.image_channels not in MODES


def _arguments(example: dict, files: str) -> str:
    names = {"text": "text", "image": "images", "class_id": "class_ids", "generate": "generate", "seed": "seed"}
    given = {"seed": 0} | example
    if "image" in given:
        given["image"] = f"{files}/{given['image']}"
    return ", ".join(f"{names[key]}={json.dumps(given[key])}" for key in names if key in given)


def _example_table(examples: list[dict]) -> str:
    rows = [["given", "made"]]
    for example in examples:
        given = [example["text"]] if "text" in example else []
        given += [f"class {example['class_id']}"] if "class_id" in example else []
        given += [f"![Given]({example['image']})"] if "image" in example else []
        made = [example["made"]["text"]] if "text" in example["made"] else []
        made += [f"![Made]({example['made']['image']})"] if "image" in example["made"] else []
        rows.append([" ".join(given) or "nothing", " ".join(made)])
    return _table(rows) + "\n\nEach is what these weights make of it with the seed that was given; none was picked."


def _sizes(folder: Path) -> str:
    config = MDMConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = MDMForMultiModalGeneration(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    directions = " + ".join(map(str, config.scan_directions))
    patches = f"{config.pixel_patch_size} {'latents of an autoencoder' if _needs_autoencoder(config) else 'pixels'}"
    rows = [
        ["parameters", f"{count:,}"],
        ["weights in float32, bfloat16", f"{count * 4 / 2**20:,.1f} MiB, {count * 2 / 2**20:,.1f} MiB"],
        ["blocks, width, state", f"{config.num_hidden_layers}, {config.hidden_size}, {config.state_size}"],
        ["backbone", config.backbone if config.backbone != "mamba" else f"Mamba-2, {directions} scan directions"],
        ["vocabulary", f"{config.vocab_size:,} tokens"],
        ["latents", f"{config.vae_config.latent_size} a position, patches of {patches}"],
    ]
    return _table([["", ""], *rows])


def _training(folder: Path, notes: dict) -> list[str]:
    found = [path for path in (folder / "recipe.yaml", folder.parent / "recipe.yaml") if path.is_file()]
    recipe = read_file(found[0]) if found else None
    data, stages = (recipe.get("data"), recipe.get("stages")) if isinstance(recipe, dict) else (None, None)
    is_whole = isinstance(data, dict) and isinstance(stages, dict)
    if found and not (is_whole and all(isinstance(stage, dict) for stage in stages.values())):
        raise ValueError(f"Got {found[0]}, which is no recipe; need the one that was trained by; take it away.")
    trained_on = notes["trained_on"]
    if trained_on is None:
        trained_on = f"the recipe's data: {', '.join(recipe['data'])}." if recipe else "its makers do not say what."
    sections = [f"**Trained on** {trained_on.strip()} **Not on** {notes['not_trained_on'].strip()}"]
    if notes["training"]:
        sections.append(notes["training"].strip())
    elif recipe:
        rows = [["stage", "steps", "rows a step", "learning rate"]]
        for name, stage in recipe["stages"].items():
            keys = ("max_steps", "per_device_train_batch_size", "learning_rate")
            rows.append([name, *(str(stage.get(key, "")) for key in keys)])
        sections.append(_table(rows))
    return sections


def _table(rows: list[list[str]]) -> str:
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "\n".join(f"| {' | '.join(_in_cell(cell) for cell in line)} |" for line in lines)


def _in_cell(text: str) -> str:
    """A text that ends neither its cell nor its row."""
    return " ".join(text.replace("|", "&#124;").split())
