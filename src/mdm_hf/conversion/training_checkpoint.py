"""Checkpoints of training loops, one `.pt` of torch.save, to folders of ours and back, to the bit.

    {"model": state dict, "ema": state dict, "config": dict, "optimizer": ..., "step": ..., ...}

Nobody has published a checkpoint of MDM. What is read is what loops around a plain module write:

- "model", "state_dict" or nothing around the weights; "ema" or "model_ema" beside them, its weights bare or under
  "shadow", "module" or "state_dict";
- names with `module.` of DistributedDataParallel or AveragedModel and `_orig_mod.` of torch.compile in front;
- ours, or those of the model without its head, whose parts stand at the top: `KEYS`;
- "config" or "args": a dict with fields of MDMConfig, for folders without a config of their own.

Whatever else it holds, the optimiser for one, is kept in `training_state.pt` and comes back with the way back. On that
way the checkpoints of `mdm train` take their average along, whose file numbers the weights that their stage trained.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..checkpoints import RENAMED_WEIGHTS
from ..configuration_mdm import MDMConfig, why_refused
from ..modeling_mdm import MDMForMultiModalGeneration
from ..training.assembly import freeze
from .files import read_folder, read_pickle, read_safetensors, tensors_of
from .keys import KeyTable, check_weights, some


logger = logging.get_logger(__name__)

PARTS = ("vae", "embeddings", "layers", "norm", "pixel_autoencoder")
HEADS = ("latent_head", "modality_gate")
KEYS = KeyTable(
    *[(f"{part}.{{rest}}", f"model.{part}.{{rest}}") for part in PARTS],
    *[(f"{head}.{{rest}}", f"{head}.{{rest}}") for head in HEADS],
)
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
MODEL_KEYS, EMA_KEYS, CONFIG_KEYS = ("model", "state_dict"), ("ema", "model_ema"), ("config", "args")
INSIDE_EMA = ("shadow", "module", "state_dict")
NOT_WEIGHTS = {"n_averaged"}  # torch's AveragedModel counts in its state dict
NEVER_TRAINED = re.compile(r"pixel_autoencoder|modality_gate")
RAW = "mdm_hf.raw_model"  # in the state that is kept: the weights beside the average that became the model's
OF_FOLDERS = {"saved_with", "custom_pipelines", "auto_map"}  # in a config.json, and made anew with each folder
STATE, EMA = "training_state.pt", "ema.safetensors"


def from_training(path: Path, config: MDMConfig | None = None, use: str | None = None) -> MDMForMultiModalGeneration:
    """The model of a training checkpoint; `model.training_state` is what else it holds.

    Args:
        path: A `.pt`.
        config: Instead of the checkpoint's.
        use: "ema" or "model"; the average if None and there is one.

    Raises:
        ValueError: what is not whole, not understood, or does not fit the config, by name.
    """
    held = read_pickle(path)
    if not isinstance(held, dict):
        raise ValueError(f"Got {path} with a {type(held).__name__}; need a dict of state dicts.")
    model_key = next((key for key in MODEL_KEYS if isinstance(held.get(key), dict)), None)
    ema_key = next((key for key in EMA_KEYS if isinstance(held.get(key), dict)), None)
    config_key = next((key for key in CONFIG_KEYS if isinstance(held.get(key), dict)), None)
    if model_key is None:
        held, model_key = {"model": held}, "model"
        ema_key = config_key = None
    if use == "ema" and ema_key is None:
        raise ValueError(f"Got {path} without an average; need one of {', '.join(EMA_KEYS)} in it; use the model.")
    takes_ema = ema_key is not None and use != "model"
    logger.info(f"{path}: taking the {'average' if takes_ema else 'model'}.")
    raw = named_as_ours(held[model_key], path)
    try:
        weights = named_as_ours(_inside(held[ema_key]), path) if takes_ema else raw
    except ValueError as error:
        raise ValueError(f"{error} That is its average; --use model takes the weights themselves.") from error
    if takes_ema and (missing := set(raw) - set(weights)):
        raise ValueError(
            f"Got {path} with an average that lacks {some(missing)}; need one of all weights; --use model takes the "
            "weights themselves."
        )
    if config is None:
        if config_key is None:
            raise ValueError(f"Got {path} without a config; need one; give a preset or a model's folder with --like.")
        config = _config(held[config_key], path)
    model = assembled(weights, config)
    taken = {model_key, config_key} | ({ema_key} if takes_ema else set())  # an average that is not is kept as it is
    model.training_state = {key: value for key, value in held.items() if key not in taken}
    if takes_ema:  # for the way back
        model.training_state[RAW] = raw
    return model


def to_training(folder: Path) -> dict:
    """What `torch.save` is to write of a model's folder: "model", "config", and "ema" where the folder has one.

    Args:
        folder: As `save_pretrained` or `mdm convert` wrote it.

    Raises:
        ValueError: weights that are not whole, or not those of the config; a training_state.pt that is none.
    """
    model = read_model(folder)
    kept = read_pickle(folder / STATE) if (folder / STATE).is_file() else {}
    if not isinstance(kept, dict):
        raise ValueError(f"Got {folder / STATE} with a {type(kept).__name__}; need a dict; take the file away.")
    weights = model.state_dict()
    average = raw = tensors_of(kept.pop(RAW), folder / STATE) if RAW in kept else None
    if raw is not None:
        average = weights
    elif (folder / EMA).is_file():
        average = _average(read_safetensors(folder / EMA), model, folder / EMA)
    found: dict[str, Any] = {}
    for keys, state in ((MODEL_KEYS, raw or weights), (EMA_KEYS, average)):
        if state is not None:
            theirs = KEYS.to_theirs(state)
            found[_free(keys, kept, folder)] = {theirs[name]: value for name, value in state.items()}
    found[_free(CONFIG_KEYS, kept, folder)] = json.loads(model.config.to_json_string(use_diff=False))
    return found | kept


def _free(keys: tuple[str, ...], kept: dict, folder: Path) -> str:
    """The first of some keys that the kept state has not: {"model": "a name", "state_dict": weights} has the weights
    under the second."""
    if (free := next((key for key in keys if key not in kept), None)) is None:
        raise ValueError(
            f"Got {folder / STATE} with {' and '.join(keys)}, one of which is to hold what the folder has; need one "
            "of them free; take the file away."
        )
    return free


def _average(given: dict[str, Tensor], model: MDMForMultiModalGeneration, where: Path) -> dict[str, Tensor]:
    """An average under our names; that of `mdm train` numbers the parameters that its stage had trained."""
    if not all(name.isdecimal() for name in given):
        return named_as_ours(given, where)
    given = {str(i): given[str(i)] for i in range(len(given)) if str(i) in given}
    for stage, frozen in (("diffusion", None), ("diffusion", "encoder"), ("diffusion", "vae"), ("vae", None)):
        freeze(model.requires_grad_(True), stage, {"freeze": frozen})
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad and not NEVER_TRAINED.search(n)}
        if [one.shape for one in trained.values()] == [one.shape for one in given.values()]:
            averaged = dict(zip(trained, given.values(), strict=True))
            return {name: averaged.get(name, weight) for name, weight in model.state_dict().items()}
    raise ValueError(
        f"Got {where} with {len(given)} numbered weights, which are those of no stage of this model; need the average "
        "that was saved with these weights; check the folder, or take the file away."
    )


def read_model(folder: Path) -> MDMForMultiModalGeneration:
    """The model of a folder of ours, each weight in the dtype that it has there.

    Args:
        folder: With config.json and weights.

    Raises:
        ValueError: weights that are not whole, or not those of the config; a file that it was saved with is missing.
    """
    weights = read_folder(folder)
    for old, new in RENAMED_WEIGHTS.items():
        weights = {re.sub(old, new, name): value for name, value in weights.items()}
    model = assembled(weights, MDMConfig.from_pretrained(folder))
    model.adjust_generation_fn(None, False, False, folder)  # how it samples, as `from_pretrained` reads it
    return model


def named_as_ours(given: Any, where: Any) -> dict[str, Tensor]:
    """A state dict under our names."""
    weights = tensors_of(given, where)
    bare = {WRAPPERS.sub("", name): value for name, value in weights.items() if name not in NOT_WEIGHTS}
    if len(bare) < len(set(weights) - NOT_WEIGHTS):
        twice = [name for name in weights if WRAPPERS.sub("", name) != name and WRAPPERS.sub("", name) in weights]
        raise ValueError(f"Got {where} with two of {some(twice)}, with and without a wrapper's name; need one each.")
    if any(name.startswith("model.") for name in bare):  # ours already
        return bare
    return {ours: bare[name] for name, ours in KEYS.to_ours(bare).items()}


def assembled(weights: dict[str, Tensor], config: MDMConfig) -> MDMForMultiModalGeneration:
    """A model of these weights, in their dtypes.

    Raises:
        ValueError: weights that are not those of the config, by name.
    """
    layers = {int(match[1]) for name in weights if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    in_config, in_vae = config.num_hidden_layers, config.vae_config.num_hidden_layers
    if len(layers) != in_config or not isinstance(in_vae, int) or in_vae > len(weights):
        raise ValueError(
            f"Got weights of {len(layers)} blocks and a config of {in_config}, its VAE of {in_vae} layers; need the "
            "config that they were trained with."
        )
    try:
        with torch.device("meta"):
            model = MDMForMultiModalGeneration(config)
    except Exception as error:  # whatever a config that was never a model's comes to
        raise ValueError(
            f"Got a config of which no model can be built ({error}); need that of the weights."
        ) from error
    check_weights(weights, model.state_dict())
    model.load_state_dict(_apart(weights), assign=True)
    return model.eval()


def _apart(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, of which none lies in the memory of another: loops tie some, safetensors saves none that are."""
    apart, end = {}, 0
    for name, weight in sorted(weights.items(), key=lambda one: one[1].data_ptr()):
        apart[name] = weight.clone() if weight.data_ptr() < end else weight
        end = max(end, weight.data_ptr() + weight.numel() * weight.element_size())
    return apart


def _inside(ema: dict) -> Any:
    """The weights of an average."""
    return next((ema[key] for key in INSIDE_EMA if isinstance(ema.get(key), dict)), ema)


def _config(fields: dict, path: Path) -> MDMConfig:
    known = {name: value for name, value in fields.items() if name in MDMConfig.__dataclass_fields__}
    if ignored := set(fields) - set(known) - set(MDMConfig().to_dict()) - OF_FOLDERS:
        logger.warning(f"{path}: left options that are none of MDMConfig: {some(ignored)}.")
    try:
        return MDMConfig(**known)
    except Exception as error:  # transformers' strict dataclasses raise classes of their own
        raise ValueError(
            f"Got {path} with a config that is refused ({why_refused(error)}); need fields of MDMConfig."
        ) from error
