"""What only a model's makers know of it, for its card: `card.yaml` in its folder."""

import json
from pathlib import Path
from typing import Any

import yaml

from .examples import check_example


NOTES_FILE = "card.yaml"
NOTES: dict[str, Any] = {  # the keys of card.yaml, and what stands for one that is not there
    "name": None,  # the folder's
    "summary": "An MDM, one Mamba-2 diffusion model over one latent space that makes images, text, or both.",
    "license": "other",
    "language": ["en"],
    "tags": [],
    "datasets": [],  # names of the Hub's
    "picture": None,  # a file of the folder, shown at the top
    "examples": [],  # {text, image, class_id, generate, seed}, run by `mdm card`
    "scores": {},  # {name in a result: {"name": in words, "goal": in words}}, in this order; all of them if empty
    "trained_on": None,
    "not_trained_on": "anything else.",
    "training": None,
    "intended_use": "Research: training, ablation and comparison of multi-modal diffusion models.",
    "limits": "None have been measured. What was not in its training data it cannot know.",
}


def read_notes(folder: str | Path) -> dict:
    """card.yaml of a folder, with `NOTES` for what it leaves out.

    Args:
        folder: The model's; where no name is given, the folder's own is the name.

    Raises:
        ValueError: it is no YAML mapping, or has a key that is none of `NOTES`.
    """
    folder = Path(folder)
    path = folder / NOTES_FILE
    given = read_file(path) if path.is_file() else {}
    given = {} if given is None else given  # an empty file, or one of comments alone: every key may be left out
    if not isinstance(given, dict) or set(given) - set(NOTES):
        wrong = sorted(map(str, set(given) - set(NOTES))) if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"Got {path} with {wrong}; need a mapping with some of {', '.join(NOTES)}.")
    for name, value in given.items():
        is_right, need = _FORMS.get(name, (lambda value: isinstance(value, str), "a text"))
        if not is_right(value) and not (value is None and NOTES[name] is None and name != "name"):
            raise ValueError(f"Got {path} with {name} {value!r:.80}; need {need}; mend it, or take it out.")
    for example in given.get("examples", []):
        check_example(example)
    return NOTES | {"name": folder.resolve().name} | given


def read_file(path: Path) -> Any:
    """What a YAML or JSON file holds.

    Raises:
        ValueError: it is none, by its name.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise ValueError(f"Got {path}, which is not {kind} ({error}); need a mapping; mend it.") from error


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _are_words(value: Any) -> bool:
    """Of `scores`: name -> {"name": text, "goal": text}."""
    return isinstance(value, dict) and all(
        isinstance(words, dict) and set(words) <= {"name", "goal"} and _are_texts(list(words.values()))
        for words in value.values()
    )


_FORMS: dict[str, tuple] = {  # of the keys of card.yaml that are no texts of any length
    "name": (lambda value: isinstance(value, str) and value.strip() and "\n" not in value, "a text on one line"),
    "language": (lambda value: isinstance(value, str) or _are_texts(value), "a list of languages"),
    "tags": (_are_texts, "a list of texts"),
    "datasets": (_are_texts, "a list of names of data sets"),
    "examples": (lambda value: isinstance(value, list), "a list of mappings"),
    "scores": (_are_words, "a mapping of names to {name, goal}"),
}
