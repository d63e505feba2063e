"""From a recipe to its parts: processor, model, sources, mixtures, TrainingArguments."""

import copy
import inspect
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available
from transformers.utils import logging

from ..configuration_mdm import MDM_PRESETS, MDMConfig
from ..image_processing_mdm import MDMImageProcessorPil
from ..modeling_mdm import MDMForMultiModalGeneration
from ..modeling_mdm_block import MDMLayer
from ..processing_mdm import MDMProcessor
from .blocks import split_text
from .digits import DigitsSource
from .latent_cache import LatentCache
from .mix import ConversationMix, StreamingMix
from .muon import MuonWithAdamW, muon_for
from .readers import read_source
from .recipe import MUON, OF_STAGE, builds_processor, stage_options
from .records import WORDLESS, BadRow, with_images
from .tokenizer import build_tokenizer


logger = logging.get_logger(__name__)

IMAGE_SIZE = (32, 32)
STRATEGIES = ("save_strategy", "eval_strategy", "logging_strategy")
LOAD_OPTIONS = ("cache_dir", "data_dir", "field", "num_proc", "token", "verification_mode")  # of `load_dataset`
DIGITS = "digits"  # the path of scikit-learn's, which are no file
ADDED = ("broadcast.projection.weight", "period_projection.weight")  # to hidden states that do without


def make_processor(recipe: dict) -> MDMProcessor:
    """The recipe's processor: loaded, or built from the texts of its data by the tokenizer stage and kept."""
    spec = recipe["processor"]
    if not builds_processor(recipe):
        return _loaded_processor({"from": spec} if isinstance(spec, str) else spec)
    folder = Path(recipe["output_dir"]) / "processor"
    if not folder.is_dir():
        stage = recipe["stages"]["tokenizer"]
        texts = list(islice(_texts(recipe), stage.get("max_texts", 1_000_000)))
        if not texts:
            raise ValueError(f"Got no text in the recipe's data to build a tokenizer from; {_why_no_text(recipe)}")
        unfinished = folder.with_name(".unfinished-processor")
        shutil.rmtree(unfinished, ignore_errors=True)
        tokenizer = build_tokenizer(texts, stage["vocab_size"], unfinished, is_size_exact=False, keeps_words=True)
        options = dict(spec)
        height, width = options.pop("image_size", IMAGE_SIZE)
        kept = {name: options.pop(name) for name in ("max_new_tokens", "num_classes") if name in options}
        if "max_new_tokens" not in kept:  # room for the longest of what was read, and its end
            lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
            kept["max_new_tokens"] = 1 + max((n for n in lengths if n < tokenizer.model_max_length), default=1)
        image_processor = MDMImageProcessorPil(size={"height": height, "width": width}, **options)
        MDMProcessor(image_processor, tokenizer, **kept).save_pretrained(unfinished)
        unfinished.rename(folder)
        print(f"Built a tokenizer of {len(tokenizer)} tokens; texts to generate have {kept['max_new_tokens']}.")
    return MDMProcessor.from_pretrained(folder)


def _loaded_processor(spec: dict) -> MDMProcessor:
    """The processor of a folder, with what the recipe would have otherwise."""
    changes = dict(spec)
    processor = MDMProcessor.from_pretrained(changes.pop("from"))
    if changes:
        options = processor.image_processor.to_dict() | changes
        processor.image_processor = type(processor.image_processor).from_dict(options)
    return processor


def _why_no_text(recipe: dict) -> str:
    """What is wrong with the first row of the first source."""
    [(name, source), *_] = make_sources(recipe["data"]).items()
    rows = source.stream(0, 1, 1, (0, 1), 0) if source.is_streaming else map(source.row, range(len(source)))
    try:
        source.conversation(next(iter(rows)), next(iter(source.tasks)), np.random.default_rng(0))
    except BadRow as bad:
        return f"the first row of {name}: {bad}"
    except StopIteration:
        return f"{name} has no rows; need at least one."
    return "need captions or messages."


def _texts(recipe: dict) -> Iterator[str]:
    """The texts of one pass over the data, one of each source in turn; of those whose tasks show no text, none.

    Bad rows are met again, and counted, in training.
    """
    sources = make_sources(recipe["data"]).values()
    shown = [source.texts() for source in sources if any(w and task != WORDLESS for task, w in source.tasks.items())]
    for texts in zip_longest(*shown):
        yield from (text for text in texts if text is not None)


def make_model(recipe: dict, processor: MDMProcessor, previous: str | Path | None) -> MDMForMultiModalGeneration:
    """The model of `previous`, or a new one whose vocabulary and patches are the processor's.

    A modality gate is left behind: it reads states that will be others once the blocks are trained. What the recipe's
    `model.config` adds to a trained model, the projections of `condition_broadcast` and `position_periods`, is zero at
    first: it starts as the model that it was.
    """
    changes = copy.deepcopy(recipe["model"].get("config") or {})
    if previous is not None:
        if MDMConfig.from_pretrained(previous).modality_gate and "modality_gate" not in changes:
            changes["modality_gate"] = False
            if "gate" not in recipe["stages"]:
                logger.warning(f"The modality gate of {previous} is left behind: a stage `gate` fits one anew.")
        model, found = MDMForMultiModalGeneration.from_pretrained(
            previous, dtype=torch.float32, output_loading_info=True, **changes
        )
        for name in found["missing_keys"]:
            if name.endswith(ADDED):
                torch.nn.init.zeros_(model.get_parameter(name))
        return model
    model = MDMForMultiModalGeneration(make_config(recipe, processor))
    if "vae_from" in recipe["model"]:
        trained = MDMForMultiModalGeneration.from_pretrained(recipe["model"]["vae_from"], dtype=torch.float32)
        model.model.vae.load_state_dict(trained.model.vae.state_dict())
    return model if model.config.pixel_autoencoder is None else model.load_pixel_autoencoder()


def make_config(recipe: dict, processor: MDMProcessor | None) -> MDMConfig:
    """The configuration of a new model: preset, what the processor decides, what the recipe changes.

    Without a processor, which its tokenizer stage is still to build, what the recipe says of it decides.
    """
    autoencoder = recipe["model"].get("pixel_autoencoder")
    name, changes = recipe["model"]["preset"], copy.deepcopy(recipe["model"].get("config") or {})
    if name not in MDM_PRESETS:
        raise ValueError(f"Got model.preset {name!r}; need one of {', '.join(MDM_PRESETS)}.")
    if processor is None:
        spec = recipe["processor"]
        images = {"num_channels": spec.get("num_channels", 3), "patch_size": spec["patch_size"]}
        vocab_size, num_classes = recipe["stages"]["tokenizer"]["vocab_size"], spec.get("num_classes")
    else:
        images = {"num_channels": processor.image_processor.num_channels, "patch_size": processor.patch_size}
        vocab_size, num_classes = len(processor.tokenizer), processor.num_classes
    decided = {"vocab_size": vocab_size} | ({} if autoencoder else images)
    vae = MDM_PRESETS[name]["vae_config"] | decided | changes.pop("vae_config", {})
    classes = {} if num_classes is None else {"num_classes": num_classes}
    config = MDMConfig.from_preset(name, **(classes | changes | {"vae_config": vae}))
    if source := recipe["model"].get("vae_from"):
        own, given = vars(config.vae_config), vars(MDMConfig.from_pretrained(source).vae_config)
        sizes = ("vocab_size", "num_channels", "patch_size", "latent_size", "hidden_size", "num_hidden_layers")
        if unlike := [name for name in sizes if own[name] != given[name]]:
            name = unlike[0]
            raise ValueError(
                f"Got model.vae_from {source} with {name} {given[name]} for a model with {own[name]}; need a VAE of "
                f"the same sizes; set model.config.vae_config.{name}={given[name]}."
            )
    if not autoencoder:
        return config
    config = config.with_pixel_autoencoder(**autoencoder)
    if images["patch_size"] != config.pixel_patch_size:
        raise ValueError(
            f"Got processor.patch_size {images['patch_size']} for an autoencoder with {config.pixel_downsampling} "
            f"pixels a latent and patches of {config.vae_config.patch_size} latents; need {config.pixel_patch_size}."
        )
    return config


def make_sources(data: dict[str, dict], processor: MDMProcessor | None = None) -> dict[str, Any]:
    """The sources of a recipe's `data`, by name; what `processor` could not encode is a bad row of theirs."""
    sources: dict[str, Any] = {}
    for name, options in data.items():
        is_digits = options["path"] == DIGITS
        source = DigitsSource if is_digits else read_source
        known = {*inspect.signature(source).parameters, *(("path",) if is_digits else LOAD_OPTIONS), "weight"}
        needed = ("tasks",) if is_digits else ("adapter",)
        if unknown := sorted(set(options) - known):
            raise ValueError(f"Got data.{name} with the key {unknown[0]!r}; need among {', '.join(sorted(known))}.")
        if missing := [key for key in needed if not options.get(key)]:
            raise ValueError(f"Got data.{name} without {missing[0]!r}; need it; see docs/data.md.")
        options = {key: value for key, value in options.items() if key not in ("weight", *(("path",) * is_digits))}
        if is_digits:
            sources[name] = DigitsSource(**({"split": "train"} | options))
        else:
            if processor is not None:
                options["check"] = row_check(processor)
                options["split_text"] = text_splitter(processor)
                if options.get("latents"):
                    options["latents"] = LatentCache(options["latents"], image_processor=processor.image_processor)
            sources[name] = read_source(**options)
    return sources


def check_latents(recipe: dict, model: MDMForMultiModalGeneration) -> None:
    """Raises ValueError where a source's latents are not of the model's autoencoder."""
    for source in (*recipe["data"].values(), *(recipe.get("eval_data") or {}).values()):
        if source.get("latents"):
            LatentCache(source["latents"], model)


def text_splitter(processor: MDMProcessor) -> Callable[[str], list[str]]:
    """Cuts a text into blocks that fit the processor's canvas."""

    @lru_cache(maxsize=2**16)
    def count(word: str) -> int:
        return len(processor.tokenizer(word, add_special_tokens=False, verbose=False)["input_ids"])

    return partial(split_text, size=processor.max_new_tokens, count=count)


def row_check(processor: MDMProcessor) -> Callable[[list[dict]], None]:
    """Raises ValueError for messages that the processor refuses: texts, pictures, which are open here, and classes."""
    side, tokenizer, images = processor.patch_size, processor.tokenizer, processor.image_processor
    blank, special = Image.new("RGB", (side, side)), frozenset(tokenizer.all_special_ids)

    @lru_cache(maxsize=2**16)
    def fits(text: str, is_target: bool) -> bool:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        limit = processor.max_new_tokens if is_target else tokenizer.model_max_length
        return len(ids) <= limit and special.isdisjoint(ids)

    def is_taken(part: dict, is_target: bool) -> bool:
        if part["type"] == "text":
            return fits(part["text"], is_target)
        if part["type"] == "class":
            return processor.num_classes is None or part["class"] < processor.num_classes
        if "image" in part:  # and no latents
            height, width = images.process_image(part["image"]).shape[1:]
            if not images.do_resize:
                images.grid_of(height, width)
        return True

    def check(messages: list[dict]) -> None:
        parts = [(part, message is messages[-1]) for message in messages for part in message["content"]]
        if not all(is_taken(*part) for part in parts):  # the processor says why
            processor.apply_chat_template(with_images({"messages": messages}, lambda image: blank)["messages"])

    return check


def make_mix(
    recipe: dict, name: str, num_samples: int, batch_size: int, processor: MDMProcessor
) -> ConversationMix | StreamingMix:
    """The training examples of a stage."""
    options = stage_options(recipe, name)
    data = options["data"]
    sources = make_sources(data, processor)
    weights = {source: float(data[source].get("weight", 1.0)) for source in data}
    starts = {task: int(share * num_samples) for task, share in (options.get("task_starts") or {}).items()}
    if options.get("mixed_batches"):
        batch_size = 1  # each row draws a source and a task of its own
    common = {"batch_size": batch_size, "seed": recipe.get("seed", 0), "weights": weights, "task_starts": starts}
    streaming = [source.is_streaming for source in sources.values()]
    if all(streaming):
        return StreamingMix(sources, **common, **_given(options, "shuffle_buffer"))
    if any(streaming):
        raise ValueError("Got both streaming and other sources; need all of one kind; set `streaming` alike.")
    return ConversationMix(sources, num_samples=num_samples, **common, **_given(options, "length_groups"))


def make_eval_mix(recipe: dict, batch_size: int, processor: MDMProcessor) -> ConversationMix | None:
    """The recipe's examples to evaluate on, `eval_samples` of them, the same each time; None if it has none."""
    data = recipe.get("eval_data")
    if not data:
        return None
    weights = {name: float(options.get("weight", 1.0)) for name, options in data.items()}
    number = recipe.get("eval_samples", 256)
    return ConversationMix(make_sources(data, processor), number, batch_size, recipe.get("seed", 0), weights)


def make_arguments(recipe: dict, name: str, folder: Path) -> TrainingArguments:
    """A stage's TrainingArguments."""
    options = {k: v for k, v in stage_options(recipe, name).items() if k not in OF_STAGE}
    if options.get("optim") == MUON:  # see `make_optimizer`
        del options["optim"]
    if "report_to" not in options:
        options["report_to"] = "tensorboard" if is_tensorboard_available() else "none"
    options |= {key: "no" for key in STRATEGIES if options.get(key) is False}  # YAML reads `no` so
    if recipe.get("eval_data"):
        evaluation = {"eval_strategy": "steps", "eval_steps": options["save_steps"], "prediction_loss_only": True}
        options = evaluation | options
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        options = {"use_cpu": True} | options
    return TrainingArguments(
        output_dir=str(folder),
        seed=recipe.get("seed", 0),
        remove_unused_columns=False,
        train_sampling_strategy="sequential",  # the mix draws at random itself: a resumed run sees the same data
        **options,
    )


def make_optimizer(
    model: MDMForMultiModalGeneration, recipe: dict, name: str, arguments: TrainingArguments
) -> MuonWithAdamW | None:
    """The optimiser of a stage, if it is one that the Trainer does not know."""
    if stage_options(recipe, name).get("optim") != MUON:
        return None
    blocks = [module for module in model.modules() if isinstance(module, MDMLayer)]
    betas = arguments.adam_beta1, arguments.adam_beta2
    return muon_for(
        model, blocks, arguments.learning_rate, betas, arguments.adam_epsilon, weight_decay=arguments.weight_decay
    )


def freeze(model: MDMForMultiModalGeneration, name: str, options: dict) -> MDMForMultiModalGeneration:
    """Leaves to train what a stage trains: the VAE alone, all, or all but the VAE or its encoder."""
    vae = model.model.vae
    if name == "vae":
        model.requires_grad_(False)
        vae.requires_grad_(True)
    elif options.get("freeze") == "vae":
        vae.requires_grad_(False)
    elif options.get("freeze") == "encoder":
        for part in (vae.patch_embedding, vae.token_embedding, vae.encoder):
            part.requires_grad_(False)
    return model


def _given(options: dict, *names: str) -> dict:
    return {name: options[name] for name in names if name in options}
