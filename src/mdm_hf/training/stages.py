"""A recipe's stages, run one after the other: tokenizer, VAE, diffusion, instruct, gate. Each can be resumed.

output_dir/recipe.yaml   the recipe as it was run
output_dir/processor/    of the tokenizer stage
output_dir/STAGE/        checkpoint-*, samples/step-*.png, and final/ with what the next stage starts from
output_dir/final/        what the last stage made, ready for the Hub
"""

import shutil
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..allocator import keep_freed_memory
from ..checkpoints import write_whole
from ..configuration_mdm import MDMConfig
from ..conversion.files import new_folder
from ..generation_configuration_mdm import MDMGenerationConfig, sampling_options
from ..modeling_mdm import MDMForMultiModalGeneration
from ..pipeline_mdm import MDMPipeline
from ..processing_mdm import MDMProcessor
from .assembly import (
    check_latents,
    freeze,
    make_arguments,
    make_config,
    make_eval_mix,
    make_mix,
    make_model,
    make_optimizer,
    make_processor,
    make_sources,
)
from .gate import HELD_OUT, fit_gate
from .pictures import Drawer, reconstructions_drawer, samples_drawer
from .recipe import MUON, OF_FITTED, STAGES, builds_processor, stage_options
from .trainer import ConversationCollator, EMACallback, MDMTrainer, SampleGridCallback


logger = logging.get_logger(__name__)
GATE_BATCH = 64  # conversations that are read at once


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
    training = [name for name in names if name not in OF_FITTED]
    for name in training:  # with several processes, this is where they meet
        check_arguments(name, make_arguments(recipe, name, root / name), recipe["stages"][name].get("optim"))
    set_seed(recipe.get("seed", 0))
    on_main_process(partial(_prepare, recipe, root, names, resume))
    processor = make_processor(recipe)
    previous = recipe["model"].get("from")
    for name in training:
        folder = root / name
        target = root / "final" if name == training[-1] else folder / "final"
        if _is_finished(target, folder, recipe["stages"][name]["max_steps"]):
            logger.warning(f"Stage {name} is finished: {target}.")
        else:
            model = make_model(recipe, processor, previous)
            check_latents(recipe, model)
            _train(name, recipe, model, processor, folder, target, resume, draw)
        previous = target
    if "gate" in names:
        on_main_process(partial(_fit_gate, recipe, processor, previous, root / "final"))
    return root / "final"


def on_main_process(work: Callable[[], None]) -> None:
    """Runs `work` on the main process, while the others wait; what it raises, all of them raise."""
    state, error = PartialState(), None
    if state.is_main_process:
        try:
            work()
        except (ValueError, OSError) as raised:
            error = raised
    messages = [None if error is None else str(error)]
    if state.num_processes > 1:
        broadcast_object_list(messages)
    if error is not None:
        raise error
    if messages[0] is not None:
        raise ValueError(messages[0])


def _prepare(recipe: dict, root: Path, names: list[str], resume: bool) -> None:
    """Refuses what would fail later on, then writes the recipe down and builds the processor."""
    used = [p for p in (root / "final", root / "processor", *(root / name for name in names)) if p.exists()]
    if used and not resume:
        raise ValueError(
            f"Got output_dir {root}, which holds {used[0].name} of an earlier run; need a new folder, or --resume to "
            "go on with that run."
        )
    try:
        MDMGenerationConfig(**recipe.get("generation") or {})
    except TypeError as error:
        raise ValueError(f"Got generation with values of a wrong kind: {error}.") from error
    last = [name for name in names if name not in OF_FITTED][-1:]
    if last and (root / "final").is_dir() and not (root / last[0]).is_dir():
        raise ValueError(
            f"Got {root / 'final'}, which is not of stage {last[0]}, as that has no folder beside it; need none, "
            "as it would pass for what that stage makes; move it away to resume."
        )
    kept = root / "recipe.yaml"
    if used and kept.is_file():
        _check_same_run(recipe, yaml.safe_load(kept.read_text(encoding="utf-8")), root, names)
    if not builds_processor(recipe) or (root / "processor").is_dir():
        processor = make_processor(recipe)
        for name in names:
            if name != "tokenizer":
                make_mix(recipe, name, 1, 1, processor)
        make_eval_mix(recipe, 1, processor)
        for key in {"from", "vae_from"} & set(recipe["model"]):
            check_fits(recipe["model"][key], processor)
        if "from" not in recipe["model"]:
            make_config(recipe, processor)
    else:
        make_sources(recipe["data"])
        make_sources(recipe.get("eval_data") or {})
    root.mkdir(parents=True, exist_ok=True)
    write_whole(kept, yaml.safe_dump(recipe, sort_keys=False))
    make_processor(recipe)


def _check_same_run(recipe: dict, former: dict, root: Path, names: list[str]) -> None:
    """Raises ValueError where `recipe` does not go on with the run that `former` began."""
    for key in ("seed", "model", "processor"):
        if recipe.get(key) != former.get(key):
            raise ValueError(
                f"Got {key} {recipe.get(key)!r} to resume a run with {former.get(key)!r}; need the same; start "
                "another run with another output_dir."
            )
    training = [name for name in names if name not in OF_FITTED]
    for i, name in enumerate(training[:-1]):
        later = [one for one in training[i + 1 :] if (root / one).is_dir()]
        steps = recipe["stages"][name]["max_steps"]
        if later and not _is_finished(root / name / "final", root / name, steps):
            raise ValueError(
                f"Got stages.{name}.max_steps {steps}, more than made the model that stage {later[0]} started from; "
                "need as many as before; start another run with another output_dir."
            )


def check_arguments(name: str, arguments: TrainingArguments, optim: str | None) -> None:
    """Raises ValueError for what the Trainer would refuse only once the stage begins."""
    try:
        get_reporting_integration_callbacks(arguments.report_to)
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"Got stages.{name}.report_to {arguments.report_to}: {error}") from error
    if arguments.n_gpu > 1:
        raise ValueError(
            f"Got stages.{name} with {arguments.n_gpu} GPUs for one process, which would cut a batch's images apart "
            "from their rows; need a process for each; start with torchrun --nproc_per_node "
            f"{arguments.n_gpu} -m mdm_hf.cli train ..., or set CUDA_VISIBLE_DEVICES=0."
        )
    if arguments.fsdp and arguments.world_size == 1:
        raise ValueError(
            f"Got stages.{name}.fsdp on one process; need several to shard over; start with torchrun "
            "--nproc_per_node N -m mdm_hf.cli train ..., or leave it out."
        )
    if arguments.fsdp and optim == MUON:
        raise ValueError(
            f"Got stages.{name}.optim {MUON} with fsdp, whose shards it cannot make orthogonal; need whole matrices; "
            "leave out one of the two."
        )


def check_fits(previous: str | Path, processor: MDMProcessor) -> None:
    """Raises ValueError for a model that was made with another processor."""
    config = MDMConfig.from_pretrained(previous)
    images = processor.image_processor
    facts = {
        "tokens": (config.vocab_size, len(processor.tokenizer)),
        "pixels a patch side": (config.pixel_patch_size, images.patch_size),
        "channels": (config.image_channels, images.num_channels),
    }
    for name, (of_model, of_processor) in facts.items():
        if of_model != of_processor:
            raise ValueError(
                f"Got the model {previous} with {of_model} {name} and a processor with {of_processor}; need one made "
                "for the other; name the model's own folder as 'processor'."
            )
    try:
        own = MDMProcessor.from_pretrained(previous)
    except (ValueError, OSError):  # weights alone
        logger.warning(f"{previous} has no processor of its own: whether its tokens are these is not known.")
        return
    if own.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise ValueError(
            f"Got the model {previous}, whose tokenizer has as many tokens as the processor's, but others; need the "
            "same; name the model's own folder as 'processor'."
        )


def _is_finished(target: Path, folder: Path, max_steps: int) -> bool:
    """The stage has made its model, and not after fewer steps than the recipe asks for by now."""
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    return target.is_dir() and (last is None or int(last.rpartition("-")[2]) >= max_steps)


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
    generation = recipe.get("generation") or sampling_options(model.generation_config)
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
        optimizers=(make_optimizer(model, recipe, name, arguments), None),
    )
    trainer.train(resume_from_checkpoint=resume)
    for source, bad in mix.report().items():
        if bad:
            logger.warning(f"Skipped rows of {source}: {bad}.")
    ema.swap_in(trainer.model)
    whole = trainer.whole_model()
    if arguments.should_save:
        whole.config.diffusion_weight = diffusion_weight
        publish(whole, processor, target, generation)
    trainer.accelerator.wait_for_everyone()


def _fit_gate(recipe: dict, processor: MDMProcessor, previous: str | Path, target: Path) -> None:
    """Gives the model of `previous` a gate and writes it to `target`, where it may be already."""
    if target.is_dir() and MDMConfig.from_pretrained(target).modality_gate:
        logger.warning(f"Stage gate is finished: {target}.")
        return
    model = MDMForMultiModalGeneration.from_pretrained(previous, dtype=torch.float32, modality_gate=True).eval()
    check_latents(recipe, model)
    generation = recipe.get("generation") or sampling_options(model.generation_config)
    number = recipe["stages"]["gate"]["num_samples"]
    examples = islice(iter(make_mix(recipe, "gate", number, GATE_BATCH, processor)), number)  # a stream has no end
    batches = map(ConversationCollator(processor), iter(lambda: list(islice(examples, GATE_BATCH)), []))
    right = fit_gate(model, logging.tqdm(batches, desc="Reading conversations", total=-(-number // GATE_BATCH)))
    print(f"The gate decides {right:.1%} of {number // HELD_OUT} held-out conversations right.")
    publish(model, processor, target, generation)


def publish(model: MDMForMultiModalGeneration, processor: MDMProcessor, folder: Path, generation: dict) -> None:
    """Writes model, processor, scheduler, generation config and their code into one folder, all of it or nothing."""
    model.generation_config = MDMGenerationConfig(**generation)
    for left in folder.parent.glob(f".{folder.name}-*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    with new_folder(folder, overwrite=True) as unfinished:
        MDMPipeline(model.eval(), processor, device=model.device).save_pretrained(unfinished)
