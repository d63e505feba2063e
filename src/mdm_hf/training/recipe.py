"""A training recipe: one YAML file that says everything about a run, with `key=value` changes from the command line.

output_dir: runs/digits          # gets a folder for each stage, and final/
seed: 0
model:                           # preset or from, and what differs; vae_from, a folder whose VAE a preset starts with
  preset: mdm-digits
  config: {scan_sharing: shared}
processor: model_cards/mdm-digits    # or how to build one, in the tokenizer stage
data:                            # name -> a source, see `read_source`
  pictures: {path: my_folder, adapter: captions}
stages:                          # those of STAGES that the run has, in that order
  diffusion: {max_steps: 2000, learning_rate: 1e-3}
generation: {guidance_scale: 1.5}    # defaults of the published model
"""

import copy
import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from ..configuration_mdm import MDMConfig, MDMVAEConfig
from .gate import HELD_OUT
from .records import TASKS


STAGES = ("tokenizer", "vae", "diffusion", "instruct", "gate")
TOP = ("output_dir", "seed", "model", "processor", "data", "eval_data", "eval_samples", "stages", "generation")
MODEL = ("preset", "from", "vae_from", "config", "pixel_autoencoder")
AUTOENCODER = ("repo_id", "revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")
PROCESSOR = ("image_size", "patch_size", "num_channels", "downsampling", "aspect_ratio_buckets") + (
    "max_pixels",
    "max_new_tokens",
    "num_classes",
)
# What a recipe may say of a processor that is there.
LOADED_PROCESSOR = ("from", "do_resize", "aspect_ratio_buckets", "max_pixels")
OF_FITTED = {"tokenizer": ("vocab_size", "max_texts"), "gate": ("num_samples", "data")}  # keys of these stages
OF_STAGE = ("data", "ema_decay", "sample_every", "freeze", "task_starts") + (
    "mixed_batches",
    "length_groups",
    "shuffle_buffer",
)
FREEZE = ("vae", "encoder")
MUON = "muon"  # a value of `optim` that TrainingArguments do not know
# What a stage takes from TrainingArguments unless the recipe says otherwise: AdamW without weight decay (Sec. 5.1).
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-4,
    "weight_decay": 0.0,
    "lr_scheduler_type": "constant",
    "logging_steps": 50,
    "save_steps": 1000,
    "save_total_limit": 2,
    "ema_decay": 0.9999,
    "sample_every": 1000,
}
OURS = {"output_dir", "seed", "remove_unused_columns", "train_sampling_strategy"}  # set by the run itself


def load_recipe(path: str | Path, changes: list[str] | tuple[str, ...] = ()) -> dict:
    """Reads a recipe and applies changes to it.

    Args:
        path: Its YAML file.
        changes: "stages.diffusion.max_steps=100" and the like, their values as YAML.

    Returns:
        The recipe, checked.

    Raises:
        ValueError: no such file, no YAML, a key that no recipe has, or one that is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"Got recipe {str(path)!r}, which is no file; need a YAML file; recipes/ has some to copy.")
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"Got recipe {path}, which is no YAML: {error}.") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"Got recipe {path} with {type(recipe).__name__} at its top; need keys: {', '.join(TOP)}.")
    for change in changes:
        _apply(recipe, change)
    if isinstance(recipe.get("stages"), dict):  # "stages.vae=" takes a stage away
        recipe["stages"] = {name: stage for name, stage in recipe["stages"].items() if stage is not None}
    check_recipe(recipe)
    return recipe


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: 1e-4 is a number, as people write it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _apply(recipe: dict, change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise ValueError(f"Got the change {change!r}; need key=value, such as stages.diffusion.max_steps=100.")
    *parents, last = key.split(".")
    place = recipe
    for name in parents:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise ValueError(f"Got the change {change!r}, but {name} is {place!r} and has no keys of its own.")
    try:
        place[last] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"Got the change {change!r}, whose value is no YAML: {error}.") from error


def check_recipe(recipe: dict) -> None:
    """Raises ValueError for unknown, missing or contradicting keys."""
    _known("the recipe", recipe, TOP)
    for name in ("output_dir", "model", "processor", "data", "stages"):
        if not recipe.get(name):
            raise ValueError(f"Got a recipe without {name!r}; need it; {MISSING[name]}.")
    for name in ("model", "data", "stages"):
        if not isinstance(recipe[name], dict):
            raise ValueError(f"Got {name}: {recipe[name]!r}; need keys under it; {MISSING[name]}.")
    _typed("seed", recipe.get("seed", 0), int, "a whole number")
    _typed("output_dir", recipe["output_dir"], str, "a folder's name")
    _typed("eval_samples", recipe.get("eval_samples", 1), int, "a whole number of at least 1", least=1)
    _typed("generation", recipe.get("generation") or {}, dict, "keys under it")
    _typed("eval_data", recipe.get("eval_data") or {}, dict, f"keys under it; {MISSING['data']}")
    _typed("processor", recipe["processor"], (str, dict), f"a name or keys under it; {MISSING['processor']}")
    model, stages = recipe["model"], recipe["stages"]
    _known("model", model, MODEL)
    if ("preset" in model) == ("from" in model):
        raise ValueError(
            "Got a model with both or neither of 'preset' and 'from'; need one: a size to start afresh, or a folder."
        )
    for key in {"preset", "from", "vae_from"} & set(model):
        _typed(f"model.{key}", model[key], str, "a name")
    if "vae_from" in model and "from" in model:
        raise ValueError("Got model.vae_from beside 'from', which has a VAE; need one of the two; take one away.")
    autoencoder = _typed("model.pixel_autoencoder", model.get("pixel_autoencoder") or {}, dict, "{repo_id: ...}")
    _known("model.pixel_autoencoder", autoencoder, AUTOENCODER)
    if autoencoder and "from" in model:
        raise ValueError(
            "Got model.pixel_autoencoder beside 'from', which has one or was made without; need one of the two; take "
            "one away, or build a model with it by mdm convert and start from that."
        )
    if autoencoder and "repo_id" not in autoencoder:
        raise ValueError("Got model.pixel_autoencoder without 'repo_id'; need it; name a folder or a Hub repository.")
    config = _typed("model.config", model.get("config") or {}, dict, "keys under it")
    _known("model.config", config, list(MDMConfig.__dataclass_fields__))
    vae_config = _typed("model.config.vae_config", config.get("vae_config", {}), dict, "keys under it")
    _known("model.config.vae_config", vae_config, list(MDMVAEConfig.__dataclass_fields__))
    _known("stages", stages, STAGES)
    _check_processor(recipe["processor"])
    if builds_processor(recipe) != ("tokenizer" in stages):
        raise ValueError(
            "Got a 'processor' to build without a tokenizer stage, or that stage with a finished processor; need "
            "both or neither; name a folder as 'processor', or give stages.tokenizer.vocab_size."
        )
    for where in ("data", "eval_data"):
        for name, source in (recipe.get(where) or {}).items():
            if not isinstance(source, dict) or not isinstance(source.get("path"), str):
                raise ValueError(f"Got {where}.{name}: {source!r}; need at least a 'path'; see docs/data.md.")
            _typed(f"{where}.{name}.weight", source.get("weight", 1.0), (int, float), "a number")
            _typed(f"{where}.{name}.tasks", source.get("tasks", {}), dict, "weights by the names of tasks")
    for name, stage in stages.items():
        _check_stage(name, stage, recipe["data"])
    if set(stages) == {"tokenizer"}:
        raise ValueError("Got a recipe with a tokenizer stage alone; need one that trains the model too.")
    if "gate" in stages and not set(stages) - set(OF_FITTED) and "from" not in model:
        raise ValueError(
            "Got a recipe with a gate stage, and no model that is trained; need one to fit the gate to; name it as "
            "model.from, or add a diffusion stage."
        )


def builds_processor(recipe: dict) -> bool:
    """Whether the tokenizer stage makes the processor; else it is there."""
    return isinstance(recipe["processor"], dict) and "from" not in recipe["processor"]


def _check_processor(spec: dict | str) -> None:
    if isinstance(spec, str):
        return
    is_loaded = "from" in spec
    _known("processor", spec, LOADED_PROCESSOR if is_loaded else PROCESSOR)
    size = spec.get("image_size", [1, 1])
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise ValueError(f"Got processor.image_size {size!r}; need [height, width] in pixels.")
    for name in ("patch_size", "num_channels", "downsampling", "max_pixels", "max_new_tokens"):
        if name in spec or (name == "patch_size" and not is_loaded):
            _typed(f"processor.{name}", spec.get(name), int, "a whole number of at least 1", least=1)


def _check_stage(name: str, stage: Any, data: dict) -> None:
    where = f"stages.{name}"
    _typed(where, stage, dict, "keys under it, max_steps first of all")
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.name not in OURS}
    _known(where, stage, OF_FITTED.get(name, (*OF_STAGE, *sorted(fields))))
    needed = OF_FITTED[name][0] if name in OF_FITTED else "max_steps"
    for key in (needed, "max_texts", "sample_every", "length_groups", "shuffle_buffer", "per_device_train_batch_size"):
        if key in stage or key == needed:
            least = 2 * HELD_OUT if key == "num_samples" else 1
            _typed(f"{where}.{key}", stage.get(key), int, f"a whole number of at least {least}", least=least)
    for key, value in stage.items():
        default = fields[key].default if key in fields else None
        if isinstance(default, int | float) and not isinstance(default, bool):
            _typed(f"{where}.{key}", value, (int, float), "a number")
    decay = _typed(f"{where}.ema_decay", stage.get("ema_decay", 0), (int, float), "a number from 0 to below 1")
    if not 0 <= decay < 1:
        raise ValueError(f"Got {where}.ema_decay {decay}; need a number from 0 to below 1, such as 0.999.")
    if stage.get("freeze") not in (None, *FREEZE):
        raise ValueError(f"Got {where}.freeze {stage['freeze']!r}; need 'vae' or 'encoder', or leave it out.")
    if not isinstance(stage.get("mixed_batches", False), bool):
        raise ValueError(f"Got {where}.mixed_batches {stage['mixed_batches']!r}; need true or false.")
    if stage.get("mixed_batches") and stage.get("length_groups", 1) > 1:
        raise ValueError(
            f"Got {where}.mixed_batches with length_groups {stage['length_groups']}, which sorts rows of one source; "
            "need one of the two; leave out the other."
        )
    starts = _typed(f"{where}.task_starts", stage.get("task_starts") or {}, dict, "shares of the run by task")
    _known(f"{where}.task_starts", starts, TASKS)
    for task, share in starts.items():
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"Got {where}.task_starts.{task} {share!r}; need a share of the run, from 0 to 1.")
    names = _typed(f"{where}.data", stage.get("data", list(data)), list, "a list of the names of sources")
    if unknown := sorted(set(names) - set(data)) or not names:
        got = "nothing" if unknown is True else ", ".join(unknown)
        raise ValueError(f"Got {where}.data with {got}; the recipe has {', '.join(data)}.")
    are_streams = {bool(data[source].get("streaming")) for source in names}
    if stage.get("length_groups", 1) > 1 and True in are_streams:
        raise ValueError(f"Got {where}.length_groups for streams, which come as they are; need tables; leave it out.")
    if "shuffle_buffer" in stage and False in are_streams:
        raise ValueError(
            f"Got {where}.shuffle_buffer for tables, which are shuffled whole; need streams; leave it out."
        )


def _typed(where: str, value: Any, kinds, words: str, least: int | None = None) -> Any:
    is_wrong = not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not dict)
    if is_wrong or (least is not None and value < least):
        raise ValueError(f"Got {where} {value!r}; need {words}.")
    return value


MISSING = {
    "output_dir": "say where the run is to write, on the command line with output_dir=runs/mine",
    "model": "name a preset or a folder to start from",
    "processor": "name a folder, or say how to build one",
    "data": "name at least one source, such as pictures: {path: my_folder, adapter: captions}",
    "stages": f"name at least one of {', '.join(STAGES)}",
}


def _known(where: str, given: dict, names) -> None:
    unknown = sorted(set(given) - set(names))
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names[:20])}."
        raise ValueError(f"Got the key {unknown[0]!r} in {where}, which it does not have; check the spelling: {hint}")


def stage_options(recipe: dict, name: str) -> dict[str, Any]:
    """The options of a stage, defaults included, with the sources that it draws from under "data"."""
    options = copy.deepcopy(DEFAULTS) | recipe["stages"][name]
    names = options.get("data", recipe["data"])
    options["data"] = {source: recipe["data"][source] for source in names}
    return options
