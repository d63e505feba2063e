"""A recipe's stages, run one after the other: tokenizer, VAE, diffusion, instruct. Each can be resumed.

output_dir/recipe.yaml   the recipe as it was run
output_dir/processor/    of the tokenizer stage
output_dir/STAGE/        checkpoint-*, samples/step-*.png, and final/ with what the next stage starts from
output_dir/final/        what the last stage made, ready for the Hub
"""

import copy
import inspect
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from transformers import TrainingArguments, set_seed
from transformers.integrations import is_tensorboard_available
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..configuration_mdm import MDM_PRESETS, MDMConfig
from ..generation_mdm import MDMGenerationConfig
from ..image_processing_mdm import MDMImageProcessorPil
from ..modeling_mdm import MDMForMultiModalGeneration
from ..pipeline_mdm import MDMPipeline
from ..processing_mdm import MDMProcessor
from .digits import DigitsSource
from .latent_cache import LatentCache
from .mix import ConversationMix, StreamingMix
from .pictures import Drawer, reconstructions_drawer, samples_drawer
from .readers import read_source
from .recipe import OF_STAGE, STAGES, stage_options
from .records import with_images
from .tokenizer import build_tokenizer
from .trainer import ConversationCollator, EMACallback, MDMTrainer, SampleGridCallback, keep_freed_memory


logger = logging.get_logger(__name__)

IMAGE_SIZE = (32, 32)
LOAD_OPTIONS = ("cache_dir", "data_dir", "field", "num_proc", "token", "verification_mode")  # of `load_dataset`
DIGITS = "digits"  # the path of scikit-learn's, which are no file


def run_recipe(recipe: dict, resume: bool = False, draw: Drawer | None = None) -> Path:
    """Runs every stage of a recipe that has been checked by `load_recipe`.

    Args:
        recipe: See recipe.py.
        resume: Leave out what is finished and go on from the newest checkpoint; without it a folder that holds
            either is refused.
        draw: Called every `sample_every` steps with the averaged model and the step, for a picture to keep; draws
            samples of every task by default.

    Returns:
        The folder `output_dir/final`.

    Raises:
        ValueError: a folder that holds another run, data or a processor that do not fit.
    """
    keep_freed_memory()
    root = Path(recipe["output_dir"])
    names = [name for name in STAGES if name in recipe["stages"]]
    used = [p for p in (root / "final", root / "processor", *(root / name for name in names)) if p.exists()]
    if used and not resume:
        raise ValueError(
            f"Got output_dir {root}, which holds {used[0].name} of an earlier run; need a new folder, or --resume to "
            "go on with that run."
        )
    set_seed(recipe.get("seed", 0))
    root.mkdir(parents=True, exist_ok=True)
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    processor = make_processor(recipe)
    previous = recipe["model"].get("from")
    for name in names:
        if name == "tokenizer":
            continue
        folder = root / name
        target = root / "final" if name == names[-1] else folder / "final"
        if _is_finished(target, folder, recipe["stages"][name]["max_steps"]):
            logger.warning(f"Stage {name} is finished: {target}.")
        else:
            model = make_model(recipe, processor, previous)
            _train(name, recipe, model, processor, folder, target, resume, draw)
        previous = target
    return root / "final"


def _is_finished(target: Path, folder: Path, max_steps: int) -> bool:
    """The stage has made its model, and not after fewer steps than the recipe asks for by now."""
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    return target.is_dir() and (last is None or int(last.rpartition("-")[2]) >= max_steps)


def make_processor(recipe: dict) -> MDMProcessor:
    """The recipe's processor: loaded, or built from the texts of its data by the tokenizer stage and kept."""
    spec = recipe["processor"]
    if not isinstance(spec, dict):
        return MDMProcessor.from_pretrained(spec)
    folder = Path(recipe["output_dir"]) / "processor"
    if not folder.is_dir():
        stage = recipe["stages"]["tokenizer"]
        texts = list(islice(_texts(recipe), stage.get("max_texts", 1_000_000)))
        if not texts:
            raise ValueError("Got no text in the recipe's data to build a tokenizer from; need captions or messages.")
        unfinished = folder.with_name(".unfinished-processor")
        shutil.rmtree(unfinished, ignore_errors=True)
        tokenizer = build_tokenizer(texts, stage["vocab_size"], unfinished, is_size_exact=False)
        options = dict(spec)
        height, width = options.pop("image_size", IMAGE_SIZE)
        kept = {name: options.pop(name) for name in ("max_new_tokens", "num_classes") if name in options}
        if "max_new_tokens" not in kept:  # room for the longest of what was read, and its end
            kept["max_new_tokens"] = max(len(ids) for ids in tokenizer(texts)["input_ids"]) + 1
        image_processor = MDMImageProcessorPil(size={"height": height, "width": width}, **options)
        MDMProcessor(image_processor, tokenizer, **kept).save_pretrained(unfinished)
        unfinished.rename(folder)
    return MDMProcessor.from_pretrained(folder)


def _texts(recipe: dict) -> Iterator[str]:
    """Every text of one pass over the data; rows without one, or bad ones, are met again, and counted, in training."""
    for source in make_sources(recipe["data"]).values():
        yield from source.texts()


def make_model(recipe: dict, processor: MDMProcessor, previous: str | Path | None) -> MDMForMultiModalGeneration:
    """The model of `previous`, or a new one whose vocabulary and patches are the processor's."""
    changes = copy.deepcopy(recipe["model"].get("config") or {})
    if previous is not None:
        return MDMForMultiModalGeneration.from_pretrained(previous, dtype=torch.float32, **changes)
    model = MDMForMultiModalGeneration(make_config(recipe, processor))
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
                options["check"] = text_check(processor)
                if options.get("latents"):
                    options["latents"] = LatentCache(options["latents"], image_processor=processor.image_processor)
            sources[name] = read_source(**options)
    return sources


def text_check(processor: MDMProcessor) -> Callable[[list[dict]], None]:
    """Raises ValueError for messages whose texts the processor refuses: too long, or with control tokens."""
    side = processor.patch_size
    blank = Image.new("RGB", (side, side))

    def check(messages: list[dict]) -> None:
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
    if "report_to" not in options:
        options["report_to"] = "tensorboard" if is_tensorboard_available() else "none"
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


def freeze(model: MDMForMultiModalGeneration, name: str, options: dict) -> MDMForMultiModalGeneration:
    """Leaves to train what a stage trains: the VAE alone, all, or all but the VAE."""
    if name == "vae":
        model.requires_grad_(False)
        model.model.vae.requires_grad_(True)
    elif options.get("freeze") == "vae":
        model.model.vae.requires_grad_(False)
    return model


def _train(
    name: str,
    recipe: dict,
    model: MDMForMultiModalGeneration,
    processor: MDMProcessor,
    folder: Path,
    target: Path,
    resume: bool,
    draw: Drawer | None,
) -> None:
    options, arguments = stage_options(recipe, name), make_arguments(recipe, name, folder)
    diffusion_weight = model.config.diffusion_weight
    if name == "vae":
        model.config.diffusion_weight = 0.0  # the blocks do not even run
    freeze(model, name, options)
    batch = arguments.per_device_train_batch_size
    rows = batch * arguments.gradient_accumulation_steps * arguments.world_size
    mix = make_mix(recipe, name, arguments.max_steps * rows, batch, processor)
    if draw is None:
        draw = (reconstructions_drawer if name == "vae" else samples_drawer)(processor, mix)
    ema = EMACallback(options["ema_decay"])
    trainer = MDMTrainer(
        model=model,
        args=arguments,
        train_dataset=mix,
        eval_dataset=make_eval_mix(recipe, arguments.per_device_eval_batch_size, processor),
        data_collator=ConversationCollator(processor),
        callbacks=[ema, SampleGridCallback(draw, ema, options["sample_every"])],
    )
    trainer.train(resume_from_checkpoint=resume)
    for source, bad in mix.report().items():
        if bad:
            logger.warning(f"Skipped rows of {source}: {bad}.")
    ema.swap_in(trainer.model)
    whole = trainer.whole_model()
    if arguments.should_save:
        whole.config.diffusion_weight = diffusion_weight
        publish(whole, processor, target, recipe.get("generation") or {})
    trainer.accelerator.wait_for_everyone()


def publish(model: MDMForMultiModalGeneration, processor: MDMProcessor, folder: Path, generation: dict) -> None:
    """Writes model, processor, scheduler, generation config and their code into one folder, all of it or nothing."""
    model.generation_config = MDMGenerationConfig(**generation)
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    MDMPipeline(model.eval(), processor, device=model.device).save_pretrained(unfinished)
    if folder.is_dir():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def _given(options: dict, *names: str) -> dict:
    return {name: options[name] for name in names if name in options}
