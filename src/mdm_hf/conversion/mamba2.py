"""Blocks of Mamba-2 language models, by state-spaces' or transformers' names, to start ours from, and back.

A mixer of ours in one direction is Mamba-2's: the rows of in_proj are z, x, B, C, dt in both, the gate comes before
the norm, and B and C are one for all heads. Of what a direction has for itself, convolution, A, D and the bias of dt,
all directions start with a copy; projections and norms are one. Embeddings and the head of words are another model's
and are left: ours come from the folder or preset that is given.

    theirs                                        ours, of block i                        shape
    backbone.layers.{i}.norm.weight               norm.weight                             hidden
    backbone.layers.{i}.mixer.in_proj.weight      mixer.projections.0.in_proj.weight      (z, x, B, C, dt), hidden
    backbone.layers.{i}.mixer.conv1d.weight       mixer.conv_weight[k]                    inner + 2 state, 1, kernel
    backbone.layers.{i}.mixer.conv1d.bias         mixer.conv_bias[k]                      inner + 2 state
    backbone.layers.{i}.mixer.A_log, D, dt_bias   mixer.ssm.A_log[k], D[k], dt_bias[k]    heads
    backbone.layers.{i}.mixer.norm.weight         mixer.projections.0.norm.weight         inner
    backbone.layers.{i}.mixer.out_proj.weight     mixer.projections.0.out_proj.weight     hidden, inner
    backbone.norm_f.weight                        norm.weight of the model                hidden
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..modeling_mdm import MDMForMultiModalGeneration
from .files import PICKLES, read_folder, read_pickle, read_safetensors, tensors_of
from .keys import KeyTable, check_weights


KEYS = KeyTable(
    ("backbone.layers.{i}.mixer.in_proj.weight", "model.layers.{i}.mixer.projections.0.in_proj.weight"),
    ("backbone.layers.{i}.mixer.out_proj.weight", "model.layers.{i}.mixer.projections.0.out_proj.weight"),
    ("backbone.layers.{i}.mixer.norm.weight", "model.layers.{i}.mixer.projections.0.norm.weight"),
    ("backbone.layers.{i}.mixer.conv1d.weight", "model.layers.{i}.mixer.conv_weight"),
    ("backbone.layers.{i}.mixer.conv1d.bias", "model.layers.{i}.mixer.conv_bias"),
    ("backbone.layers.{i}.mixer.A_log", "model.layers.{i}.mixer.ssm.A_log"),
    ("backbone.layers.{i}.mixer.D", "model.layers.{i}.mixer.ssm.D"),
    ("backbone.layers.{i}.mixer.dt_bias", "model.layers.{i}.mixer.ssm.dt_bias"),
    ("backbone.layers.{i}.norm.weight", "model.layers.{i}.norm.weight"),
    ("backbone.norm_f.weight", "model.norm.weight"),
)
OF_WORDS = ("backbone.embedding.weight", "backbone.embeddings.weight", "lm_head.weight")  # left where they are
PER_DIRECTION = ("conv_weight", "conv_bias", "A_log", "D", "dt_bias")


# What transformers' config.json or state-spaces' `ssm_cfg` may say of the computation, and what a block of ours does.
SETTINGS: dict[str, tuple] = {
    "n_groups": (1,),
    "ngroups": (1,),
    "hidden_act": ("silu", "swish"),
    "activation": ("silu", "swish"),
    "use_bias": (False,),
    "bias": (False,),
    "use_conv_bias": (True,),
    "conv_bias": (True,),
    "rms_norm": (True,),
    "rmsnorm": (True,),
    "norm_before_gate": (False,),
    "D_has_hdim": (False,),
    "time_step_limit": ([0.0, math.inf],),
    "dt_limit": ([0.0, math.inf],),
    "attn_layer_idx": ([],),
    "d_intermediate": (0,),
}
EPSILONS = ("layer_norm_epsilon", "norm_epsilon")


def read_mamba2(path: Path, rms_norm_eps: float = 1e-5) -> dict[str, Tensor]:
    """The weights of a folder or file.

    Args:
        path: A folder with config.json, or weights alone, whose settings are then taken to be Mamba-2's own.
        rms_norm_eps: Of the norms of the model that is to have them.

    Raises:
        ValueError: it is not whole, is no Mamba-2, or its config has it compute what a block of ours does not.
    """
    if path.is_dir():
        weights = read_folder(path)
    else:
        weights = tensors_of(read_pickle(path), path) if path.suffix.lower() in PICKLES else read_safetensors(path)
    config = path / "config.json"
    fields = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    nested = fields.get("ssm_cfg")
    fields = fields | (nested if isinstance(nested, dict) else {})
    needed = SETTINGS | dict.fromkeys(EPSILONS, (rms_norm_eps,))
    for name, allowed in needed.items():
        if name in fields and _plain(fields[name]) not in allowed:
            raise ValueError(
                f"Got {path} with {name} {_plain(fields[name])!r}; a block of MDM computes with {allowed[0]!r}; need "
                f"a Mamba-2 with that{', or a model with the other' if name in EPSILONS else ''}."
            )
    return {name: weight for name, weight in weights.items() if name not in OF_WORDS}


def _plain(value: Any) -> Any:
    """A setting as Python has it: transformers writes infinity as {"__float__": "Infinity"}. What is neither stays."""
    if isinstance(value, dict) and value.get("__float__") in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return [_plain(one) for one in value] if isinstance(value, list) else value


def start_from_mamba2(model: MDMForMultiModalGeneration, weights: dict[str, Tensor]) -> None:
    """Gives a model's blocks and last norm the weights of a Mamba-2; the dtype stays the model's, and so does what a
    Mamba-2 has not (`condition_broadcast`).

    Args:
        model: Is changed in place; its blocks are of "mamba" and share their projections.
        weights: As `read_mamba2` gives them: names and shapes of the table at the top of the file.

    Raises:
        ValueError: `scan_sharing` is "independent"; blocks, width, state or heads differ, by the weight's name.
    """
    config = model.config
    if config.backbone != "mamba" or config.scan_sharing == "independent":
        raise ValueError(
            f"Got a model with backbone {config.backbone!r} and scan_sharing {config.scan_sharing!r}; need 'mamba' "
            "blocks whose directions share their projections, 'shared' or 'alternate': there is one of each to take."
        )
    ours = {KEYS.to_ours([name])[name]: weight for name, weight in weights.items()}
    wanted = {name: value for name, value in model.state_dict().items() if name in _named_in(model)}
    filled = {}
    for name, weight in ours.items():
        if name.endswith("conv_weight") and weight.dim() == 3:
            weight = weight.squeeze(1)
        if name.endswith(PER_DIRECTION) and name in wanted:
            weight = weight.expand(len(wanted[name]), *weight.shape)
        filled[name] = weight
    check_weights(filled, wanted)
    with torch.no_grad():
        for name, weight in filled.items():
            model.get_parameter(name).copy_(weight)


def to_mamba2(model: MDMForMultiModalGeneration, direction: int = 0) -> dict[str, Tensor]:
    """One direction of a model's blocks by state-spaces' names, in the shapes of the table at the top of the file;
    their condition broadcast is left out.

    Args:
        model: One whose blocks share their projections.
        direction: Of the scan, from 0.

    Raises:
        ValueError: there is no such direction, or no one projection that is its own.
    """
    directions = len(model.model.layers[0].mixer.conv_weight) if model.config.backbone == "mamba" else 0
    if model.config.scan_sharing == "independent" or not 0 <= direction < directions:
        raise ValueError(
            f"Got direction {direction} of a model with {directions} and scan_sharing {model.config.scan_sharing!r}; "
            "need one of its directions, which share their projections."
        )
    found = {}
    state = model.state_dict()
    for ours, theirs in KEYS.to_theirs(sorted(_named_in(model))).items():
        weight = state[ours]
        weight = weight[direction] if ours.endswith(PER_DIRECTION) else weight
        found[theirs] = (weight.unsqueeze(1) if ours.endswith("conv_weight") else weight).clone()
    return found


def _named_in(model: MDMForMultiModalGeneration) -> set[str]:
    """Our names that a Mamba-2 has a weight for; it has no condition broadcast."""
    names = {name for name in model.state_dict() if name.startswith("model.layers.") and ".broadcast." not in name}
    return names | {"model.norm.weight"}
