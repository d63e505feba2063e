"""`mdm convert`: which conversion it is, what it needs, and where the result goes.

from                                        to
a .pt of a training loop                    a folder                            training_checkpoint.py
a folder                                    a .pt
a Mamba-2, folder or file                   a folder whose blocks start so      mamba2.py
a folder                                    a .safetensors of a Mamba-2's names
a diffusers autoencoder's folder            a folder with it built in
a folder with one built in                  a diffusers folder, --as autoencoder
a SentencePiece .model                      a tokenizer's folder                sentencepiece_model.py
a folder with a tokenizer                   a .model
a folder                                    a folder in another dtype, or in shards
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.utils import logging

from ..configuration_mdm import MDM_PRESETS, MDMConfig
from ..modeling_mdm import MDMForMultiModalGeneration
from ..pipeline_mdm import MDMPipeline
from ..pixel_autoencoder import CLASSES
from ..processing_mdm import MDMProcessor
from ..prompts import whole_number
from ..publishing.card import is_of_weights
from .files import PICKLES, check_apart, check_shard_size, new_file, new_folder, read_pickle
from .mamba2 import read_mamba2, start_from_mamba2, to_mamba2
from .sentencepiece_model import from_sentencepiece, to_sentencepiece
from .training_checkpoint import STATE, WRAPPERS, assembled, from_training, read_model, to_training


logger = logging.get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ELSEWHERE = (".json", ".yaml", ".txt", ".gguf", ".onnx", ".h5", ".npz", ".zip", ".tar", ".gz")  # of files, no folders
WEIGHTS = (".safetensors", ".safetensors.index.json", *PICKLES)
OLD_WEIGHTS = r"(pytorch_)?model([.-].*)?\.(safetensors|bin)(\.index\.json)?|__pycache__|\..*"  # and what nobody reads


def convert(
    source: Path,
    target: Path,
    kind: str | None = None,
    like: str | None = None,
    use: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    direction: int = 0,
    seed: int = 0,
    overwrite: bool = False,
) -> str:
    """Converts a checkpoint of one format to another; the table at the top of the file says which.

    Args:
        source: A file or folder; what it is, its ending and its config.json say: see `kind_of`.
        target: A new folder, or a file whose ending says what it becomes: .pt, .pth, .bin or .ckpt, .model,
            .safetensors. No symbolic link.
        kind: What `target` becomes, "mdm", "training", "mamba2", "autoencoder" or "sentencepiece"; by its ending if
            None.
        like: Folder or preset that gives what the source has not: the config, weights of the rest, the processor.
        use: "ema" or "model" of a training checkpoint; its average if None and it has one.
        dtype: "float32", "bfloat16" or "float16" of the weights in a folder; as they are if None. A, D and the bias of
            dt stay in float32.
        max_shard_size: Of a file of weights in a folder: a number with KB, MB, GB or TB.
        direction: Of a block of ours, the scan direction, from 0, that a Mamba-2 gets.
        seed: Of weights that neither the source nor `like` has.
        overwrite: Put the result in the place of what is at `target`, once it is whole.

    Returns:
        What was made of what, in words.

    Raises:
        ValueError: what is not understood, not whole, or does not fit; then there is nothing at `target` that was not
            there before.
        OSError: what cannot be read or written.
    """
    whole_number("seed", seed, least=0)
    check_shard_size(max_shard_size)
    came = kind_of(source)
    check_apart(target, source, *([Path(like)] if like and Path(like).exists() else []))
    by_name = {**dict.fromkeys(PICKLES, "training"), ".model": "sentencepiece", ".safetensors": "mamba2"}
    goes = kind or by_name.get(target.suffix.lower(), "mdm")
    if kind is None and target.suffix.lower() in ELSEWHERE:
        raise ValueError(
            f"Got --to {target}, a file of a kind that nothing here becomes; need a folder, or a file in "
            f"{', '.join(by_name)}; give another name, or --as mdm for a folder of that name."
        )
    done = f"{source} ({came}) -> {target} ({goes})"
    if dtype is not None and (goes != "mdm" or came == "sentencepiece"):
        raise ValueError(f"Got --dtype {dtype} for {done}, which keeps each weight's; convert to a folder first.")
    if use is not None and came != "training":
        raise ValueError(f"Got --use {use} for {source} ({came}); need a training loop's .pt, which may hold both.")
    if like is not None and came in ("mdm", "sentencepiece"):
        raise ValueError(f"Got --like {like} for {source}, which has all of its own; leave it out.")
    for name, value, default, does in (
        ("max-shard-size", max_shard_size, "5GB", goes == "mdm" and came != "sentencepiece"),
        ("direction", direction, 0, goes == "mamba2"),
        ("seed", seed, 0, came in ("mamba2", "autoencoder")),
    ):
        if value != default and not does:
            raise ValueError(f"Got --{name} {value} for {done}, where it would do nothing; leave it out.")
    if goes == "sentencepiece":
        made = to_sentencepiece(source)
        with new_file(target, overwrite) as path:
            path.write_bytes(made)
    elif came == "sentencepiece" and goes == "mdm":
        tokenizer = from_sentencepiece(source)
        with new_folder(target, overwrite) as folder:
            tokenizer.save_pretrained(folder)
    elif goes == "training" and came == "mdm":
        held = to_training(source)
        with new_file(target, overwrite) as path:
            torch.save(held, path)
    elif goes == "mamba2" and came == "mdm":
        weights = to_mamba2(read_model(source), direction)
        with new_file(target, overwrite) as path:
            save_file(weights, path, metadata={"format": "pt"})
    elif goes == "autoencoder" and came == "mdm":
        inside = read_model(source).base_model.pixel_autoencoder
        if inside is None:
            raise ValueError(f"Got {source} without a pixel autoencoder; need a model that has one; name that.")
        with new_folder(target, overwrite) as folder:
            inside.autoencoder.save_pretrained(folder)
    elif goes != "mdm":
        raise ValueError(f"Got {done}, for which there is no conversion; need one end of it to be a model of ours.")
    elif came == "mdm":
        if left := _rewrite(source, target, dtype, max_shard_size, overwrite):
            done += f"; left out {', '.join(left)}, which are of the other weights: `mdm card` tells of these"
    else:
        model = _read(source, came, like, use, seed)
        if like is not None and Path(like).is_dir():
            model.adjust_generation_fn(None, False, False, like)
        if dtype is not None:
            model = _cast(model, dtype)
        processor = _processor(like, model.config)
        with new_folder(target, overwrite) as folder:
            saved = MDMPipeline(model, processor, device="cpu") if processor else model
            saved.save_pretrained(folder, max_shard_size=max_shard_size)
            if state := getattr(model, "training_state", None):
                torch.save(state, folder / STATE)
        if processor is None:
            done += "; there is no processor in it: --like FOLDER adds that of a folder"
    return done


def kind_of(source: Path) -> str:
    """What a file or folder is: "mdm", "training", "mamba2", "autoencoder" or "sentencepiece".

    Args:
        source: The file or folder. Of a pickle the names of the weights decide, of a folder its config.json.

    Raises:
        ValueError: nothing that is known.
        OSError: it is not there.
    """
    if not source.exists():
        raise FileNotFoundError(f"Got {source}, which is not there; check the spelling.")
    ending = "" if source.is_dir() else source.suffix.lower()  # --as mdm makes folders of any name
    if ending == ".model":
        return "sentencepiece"
    if ending == ".safetensors":
        return "mamba2"
    if ending in PICKLES:
        held = read_pickle(source)
        names = [WRAPPERS.sub("", str(name)) for name in held] if isinstance(held, dict) else []
        return "mamba2" if any(name.startswith("backbone.layers.") for name in names) else "training"
    config = source / "config.json"
    fields = {}
    if config.is_file():
        try:
            fields = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"Got {config}, which is no JSON ({error}); need it whole.") from error
        if not isinstance(fields, dict):
            raise ValueError(f"Got {config} with {type(fields).__name__}; need a mapping of settings.")
    if fields.get("model_type") == "mdm" or (source / "tokenizer.json").is_file():
        return "mdm"
    if fields.get("_class_name") in CLASSES:
        return "autoencoder"
    if fields.get("model_type") == "mamba2" or "d_model" in fields:
        return "mamba2"
    raise ValueError(
        f"Got {source}, which is nothing that is known here; need a .pt, a .model, a .safetensors of a Mamba-2, or a "
        "folder with config.json of MDM, a Mamba-2 or an autoencoder of diffusers."
    )


def _read(source: Path, came: str, like: str | None, use: str | None, seed: int) -> MDMForMultiModalGeneration:
    if came == "training":
        return from_training(source, _config(like) if like else None, use)
    if like is None:
        raise ValueError(f"Got {source} ({came}), a part of a model; need the rest; give --like FOLDER or PRESET.")
    torch.manual_seed(seed)
    is_trained = like not in MDM_PRESETS and any(Path(like).glob("*.safetensors"))
    if came == "mamba2":
        if is_trained:
            model = MDMForMultiModalGeneration.from_pretrained(like)
        else:
            model = MDMForMultiModalGeneration(_config(like))
        start_from_mamba2(model, read_mamba2(source, model.config.rms_norm_eps))
        return model.eval()
    before = _config(like)
    config = before.with_pixel_autoencoder(str(source))
    channels, wanted = before.vae_config.num_channels, config.vae_config.num_channels
    if is_trained and channels != wanted:
        raise ValueError(
            f"Got {source} with latents of {wanted} channels and --like {like}, whose weights take patches of "
            f"{channels}; need as many; give --like a preset or a folder without weights, or another autoencoder."
        )
    model = MDMForMultiModalGeneration(config)
    if is_trained:
        weights = model.state_dict() | {
            name: value for name, value in read_model(Path(like)).state_dict().items() if not _is_of_pixels(name)
        }
        model = assembled(weights, config)
    return model.load_pixel_autoencoder(str(source)).eval()


def _is_of_pixels(name: str) -> bool:
    return ".pixel_autoencoder." in name


def _config(like: str) -> MDMConfig:
    if like in MDM_PRESETS:
        return MDMConfig.from_preset(like)
    if not (Path(like) / "config.json").is_file():
        raise ValueError(f"Got --like {like}; need a model's folder, or one of {', '.join(MDM_PRESETS)}.")
    return MDMConfig.from_pretrained(like)


def _processor(like: str | None, config: MDMConfig | None = None) -> MDMProcessor | None:
    """The processor of a folder; for a `config` with as many patches as there, but of its pixels: with another
    autoencoder in front they are larger or smaller, and may have other channels."""
    if like is None or not (Path(like) / "processor_config.json").is_file():
        return None
    processor = MDMProcessor.from_pretrained(like)
    if config is None:
        return processor
    images, patch = processor.image_processor, config.pixel_patch_size
    fitting: dict[str, Any] = {
        "num_channels": config.image_channels,
        "patch_size": patch,
        "downsampling": config.pixel_downsampling,
    }
    if fitting != {name: getattr(images, name) for name in fitting}:
        height, width = (side // images.patch_size * patch for side in (images.size.height, images.size.width))
        fitting["size"] = {"height": height, "width": width}
        if isinstance(images.aspect_ratio_buckets, list):
            fitting["aspect_ratio_buckets"] = [
                [side // images.patch_size * patch for side in bucket] for bucket in images.aspect_ratio_buckets
            ]
        processor.image_processor = type(images).from_dict(images.to_dict() | fitting)
    return processor


def _cast(model: MDMForMultiModalGeneration, dtype: str) -> MDMForMultiModalGeneration:
    """The model in another dtype, but for what stays in float32.

    Raises:
        ValueError: a weight is too large for it.
    """
    kept = set(model._keep_in_fp32_modules_strict)
    cast = {}
    for name, value in model.state_dict().items():
        wanted = torch.float32 if name.rpartition(".")[2] in kept else DTYPES[dtype]
        cast[name] = value.to(wanted) if value.is_floating_point() else value
        if not bool(cast[name].isfinite().all()):
            raise ValueError(f"Got {name} with values too large for {dtype}; need them finite; take bfloat16.")
    model.load_state_dict(cast, assign=True)
    return model


def _rewrite(source: Path, target: Path, dtype: str | None, max_shard_size: str, overwrite: bool) -> list[str]:
    """A folder of ours in another dtype or in other files; what else it holds comes along, but for what tells of
    weights that these no longer are, whose names are returned."""
    saved = read_model(source)
    before = [weight.dtype for weight in saved.state_dict().values()]
    if dtype is not None:
        saved = _cast(saved, dtype)
    is_other = before != [weight.dtype for weight in saved.state_dict().values()]
    if (processor := _processor(str(source))) is not None:
        saved = MDMPipeline(saved, processor, device="cpu")
    left = []
    with new_folder(target, overwrite) as folder:
        saved.save_pretrained(folder, max_shard_size=max_shard_size)
        for path in sorted(source.iterdir()):
            if re.fullmatch(OLD_WEIGHTS, path.name) or (folder / path.name).exists():
                continue
            is_state = path.name.endswith(WEIGHTS) and path.name != STATE  # of a run that trained the old ones
            if is_other and (is_of_weights(path) or is_state):
                left.append(path.name)
            elif path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                shutil.copy(path, folder)
    return left
