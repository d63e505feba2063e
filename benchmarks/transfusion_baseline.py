"""A peer for MDM: PyPI's transfusion-pytorch (text token by token, images by flow matching, one Transformer) on the
conversations, tokens, patches, parameters and CPU seconds of a recipe, and called like MDMPipeline.

How it is used, and why so:
- The rows are MDMProcessor's: an MDM row of the same conversation says what is known and what is to be made.
- A text to be made comes before the image to be made beside it: the image then reads it, and it is never written under
  a noisy image. `<|time_image|>` and `<|time_text|>` after the role say what is to be made.
- Loss on targets alone. Known images are clean (t = 1) and have none.
- Images are the recipe's patches, raw or as the latents of a trained model's frozen VAE (`vae`). Small ones are better
  raw: nothing is lost, and neither parameters nor seconds go into an autoencoder. 8x8 pixels in colour are 192
  numbers, more than such a model is wide, and it is to predict their noise too: there the latents are the stronger
  choice. What of the VAE serves images counts among the parameters; its seconds are to be left off the budget.
- Guidance contrasts with an answer to nothing, which the conversations hold already (`condition_dropout`). The
  package's own dropout would hide the texts to be learned as well.
- Midpoint steps of two network calls, in as many calls as MDM's solver takes.
- The package's batched sampler leaves out the places of patches, and its other one draws one sample at a time: ours
  calls the network as training does.

At equal parameters it is narrower than MDM: its conditioning on t has 24 width^2 parameters of a block's 38.

    pip install -c constraints.txt -e ".[baselines]"
    python benchmarks/transfusion_baseline.py recipes/digits.yaml --output runs/transfusion --cpu-seconds 600
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _transfusion import Sizes, Transfusion, TransfusionModel, image_parameters, sizes_for
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import get_scheduler

from mdm_hf import MDMForMultiModalGeneration, MDMPipeline, MDMProcessor
from mdm_hf.allocator import keep_freed_memory
from mdm_hf.evaluation.pictures import picture_grid
from mdm_hf.modeling_mdm_vae import MDMVAEModel
from mdm_hf.training.assembly import make_config, make_mix, make_processor
from mdm_hf.training.muon import muon_for
from mdm_hf.training.recipe import MUON, OF_FITTED, load_recipe, stage_options
from mdm_hf.training.trainer import ConversationCollator


CHECKPOINT, WEIGHTS, SETTINGS = "checkpoint.pt", "model.safetensors", "baseline.json"
TIMED = 30  # steps, from which the number that fits a budget follows
RECENT = 100  # steps whose mean loss is told


class TransfusionPipeline(MDMPipeline):
    """MDMPipeline's call, prompts, seeds and results, with Transfusion behind them."""

    def __init__(self, model: TransfusionModel, processor: MDMProcessor):
        self.model, self.processor = model.eval(), processor
        self.scheduler, self.progress_bar, self._batch_size = None, False, None
        self._preprocess_params: dict = {}
        self._forward_params: dict = {}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TransfusionPipeline":
        """What `train` left in a folder."""
        folder = Path(folder)
        processor = MDMProcessor.from_pretrained(folder)
        sizes = Sizes(**json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["sizes"])
        vae = MDMVAEModel.from_pretrained(folder / "vae") if (folder / "vae").is_dir() else None
        model = TransfusionModel(sizes, processor, vae)
        model.net.load_state_dict(load_file(folder / WEIGHTS))
        return cls(model, processor)

    def save_pretrained(self, folder: str | Path, **facts) -> None:
        """Weights, processor and `baseline.json` with the sizes and `facts`, all of it or nothing."""
        folder = Path(folder)
        unfinished = folder.with_name(f".unfinished-{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        self.processor.save_pretrained(unfinished)
        if self.model.vae is not None:
            self.model.vae.save_pretrained(unfinished / "vae")
        save_file({k: v.contiguous() for k, v in self.model.net.state_dict().items()}, unfinished / WEIGHTS)
        settings = json.dumps({"sizes": asdict(self.model.sizes)} | facts, indent=1)
        (unfinished / SETTINGS).write_text(settings + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)


class _Run:
    """A model in training: the network, and what changes with it from step to step."""

    def __init__(
        self, recipe: dict, stage: str, processor: MDMProcessor, sizes: Sizes, vae, max_steps: int, lr: float
    ):
        self.options, self.seed = stage_options(recipe, stage), recipe.get("seed", 0)
        options = self.options
        self.size = options["per_device_train_batch_size"] * options.get("gradient_accumulation_steps", 1)
        self.mix = make_mix(recipe, stage, max_steps * self.size, self.size, processor)
        self.collate = ConversationCollator(processor)
        torch.manual_seed(self.seed)
        self.model = TransfusionModel(sizes, processor, vae)
        self.net = self.model.net.train()
        betas = options.get("adam_beta1", 0.9), options.get("adam_beta2", 0.999)
        if options.get("optim") == MUON:
            optimizer: Optimizer = muon_for(self.net, [self.net.transformer], lr, betas)
        else:
            optimizer = AdamW(self.net.parameters(), lr=lr, betas=betas, weight_decay=0.0)
        warmup = min(options.get("warmup_steps", 0), max_steps // 20)
        schedule = get_scheduler(options["lr_scheduler_type"], optimizer, warmup, max_steps)
        average = EMAModel(self.net.parameters(), decay=options["ema_decay"])
        self.parts = {"net": self.net, "optimizer": optimizer, "schedule": schedule, "average": average}

    def step(self, number: int) -> Tensor:
        """One optimiser step on the recipe's examples of that number; its losses, text and flow (2,)."""
        examples = [self.mix[i] for i in range(number * self.size, (number + 1) * self.size)]
        torch.manual_seed(1_000_003 * (self.seed + 1) + number)
        loss, losses = self.model(self.collate(examples))
        if not bool(loss.isfinite()):
            raise FloatingPointError(
                f"Got a loss of {loss.item()} in step {number + 1}; it must be finite; lower the learning rate."
            )
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), self.options.get("max_grad_norm", 1.0))
        self.parts["optimizer"].step()
        self.parts["schedule"].step()
        self.parts["optimizer"].zero_grad()
        self.parts["average"].step(self.net.parameters())
        return losses

    def save(self, path: Path, **facts) -> None:
        """Writes a checkpoint aside and puts it in place when it is whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".unfinished-{path.name}")
        torch.save(facts | {name: part.state_dict() for name, part in self.parts.items()}, unfinished)
        os.replace(unfinished, path)


def _prepared(
    recipe: dict, folder: Path, depth: int, dim: int | None, vae: str | Path | None
) -> tuple[dict[str, Any], int]:
    """What a run starts from, and the parameters of the recipe's own model, which it is to have too."""
    recipe = recipe | {"output_dir": str(folder)}  # where it builds its processor
    keep_freed_memory()
    processor = make_processor(recipe)
    with torch.device("meta"):
        wanted = sum(p.numel() for p in MDMForMultiModalGeneration(make_config(recipe, processor)).parameters())
    images = None if vae is None else MDMForMultiModalGeneration.from_pretrained(vae).model.vae.eval()
    sizes = sizes_for(processor, wanted, depth, vae=images)
    sizes.dim = sizes.dim if dim is None else dim
    stage = [name for name in recipe["stages"] if name not in OF_FITTED][-1]  # a gate is fitted to MDM alone
    start = {"recipe": recipe, "stage": stage, "processor": processor, "sizes": sizes, "vae": images}
    return start, wanted


def _seconds_a_step(start: dict[str, Any], learning_rate: float) -> float:
    trial = _Run(**start, max_steps=TIMED, lr=learning_rate)
    before = time.process_time()
    for number in range(TIMED):
        trial.step(number)
    return (time.process_time() - before) / TIMED


def seconds_a_step(
    recipe: dict, folder: str | Path, learning_rate: float, depth: int, vae: str | Path | None
) -> float:
    """Processor seconds that a step of `train` with these arguments takes, its data included."""
    start, _ = _prepared(recipe, Path(folder), depth, None, vae)
    return _seconds_a_step(start, learning_rate)


def train(
    recipe: dict,
    folder: str | Path,
    *,
    max_steps: int | None = None,
    cpu_seconds: float | None = None,
    learning_rate: float = 5e-3,
    depth: int = 2,
    dim: int | None = None,
    vae: str | Path | None = None,
    resume: bool = False,
    save_every: int = 500,
    stop_after: int | None = None,
) -> dict:
    """Trains a baseline on a recipe's conversations, with its batch, optimiser, schedule and average, and saves it.

    Step n sees the examples of the recipe's step n and draws from a seed of its own, so that a resumed run gives the
    same weights.

    Args:
        recipe: As `load_recipe` gives it; its last stage before the gate says how to train.
        folder: Gets `checkpoint.pt`, and `final/` for TransfusionPipeline.from_pretrained; if the recipe builds a
            processor, `processor/` too.
        max_steps: Optimiser steps; or
        cpu_seconds: as many as fit into these seconds of the process's CPU time, by the first `TIMED`.
        learning_rate: Its peak.
        depth, dim: Blocks, and their width; None is that at which parameters are those of the recipe's model.
        vae: Folder of an MDM model whose VAE makes the images' latents; None for raw patches.
        resume: Go on from `checkpoint.pt`, with the number of steps and the sizes that it was begun with.
        save_every: Steps between checkpoints.
        stop_after: Leave off after this step, as a killed run would.

    Returns:
        What the run was: sizes, parameters, steps, CPU seconds of the process, losses over the last steps.

    Raises:
        ValueError: neither or both of the budgets; a recipe's model that cannot be matched; no checkpoint to resume.
    """
    if (max_steps is None) == (cpu_seconds is None):
        raise ValueError(f"Got max_steps {max_steps} and cpu_seconds {cpu_seconds}; need one of the two; give one.")
    folder = Path(folder)
    kept = folder / CHECKPOINT
    if resume and not kept.is_file():
        raise ValueError(f"Got {folder} without {CHECKPOINT} to resume; need one; start without resume.")
    started = time.process_time()
    start, wanted = _prepared(recipe, folder, depth, dim, vae)
    first, spent = 0, 0.0
    if resume:
        saved = torch.load(kept, weights_only=True)
        max_steps, first, spent = saved["max_steps"], saved["step"], saved["spent"]
        start = start | {"sizes": Sizes(**saved["sizes"])}
    if max_steps is None:
        pace = _seconds_a_step(start, learning_rate)
        max_steps = max(1, int((cpu_seconds - (time.process_time() - started)) / pace))
    processor, sizes, images = start["processor"], start["sizes"], start["vae"]
    run = _Run(**start, max_steps=max_steps, lr=learning_rate)
    if resume:
        for name, part in run.parts.items():
            part.load_state_dict(saved[name])
    recent: list[Tensor] = []
    for number in range(first, max_steps):
        recent = [*recent[1 - RECENT :], run.step(number)]
        done = number + 1
        if done % save_every == 0 or done in (max_steps, stop_after):
            seconds, (text, flow) = spent + time.process_time() - started, torch.stack(recent).mean(0).tolist()
            facts = {"sizes": asdict(sizes), "step": done, "max_steps": max_steps, "spent": seconds}
            run.save(kept, **facts, text_loss=text, flow_loss=flow)
            print(f"step {done} of {max_steps}, {seconds:.0f} CPU seconds, text {text:.4f}, flow {flow:.4f}")
        if done == stop_after:
            return facts
    run.parts["average"].copy_to(run.net.parameters())
    own = sum(p.numel() for p in run.net.parameters())
    last = torch.load(kept, weights_only=True)
    result = {
        "parameters": own + (0 if images is None else image_parameters(images)),
        "parameters_of_mdm": wanted,
        "steps": max_steps,
        "cpu_seconds": last["spent"],
        "learning_rate": learning_rate,
        "text_loss": last["text_loss"],
        "flow_loss": last["flow_loss"],
    }
    TransfusionPipeline(run.model, processor).save_pretrained(folder / "final", **result)
    return {"sizes": asdict(sizes)} | result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/digits.yaml")
    parser.add_argument("changes", nargs="*", help="key=value, as for mdm train")
    parser.add_argument("--output", help="folder for the checkpoint and the baseline")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--cpu-seconds", type=float, help="of this process; instead of --steps")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--dim", type=int, help="width, instead of that with the parameters of the recipe's model")
    parser.add_argument("--vae", help="folder of a trained MDM model, for latents in place of raw patches")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--plot", type=Path, help="picture of eight samples")
    parser.add_argument("--small", action="store_true", help="a few steps that show that everything works")
    options = parser.parse_args()
    if Transfusion is None and options.small:
        print(json.dumps({"skipped": 'needs transfusion-pytorch: pip install -e ".[baselines]"'}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if options.small:
            options.output, options.steps, options.cpu_seconds = scratch, 3, None
        if options.output is None:
            parser.error("--output is missing; name a folder, or try --small")
        result = train(
            load_recipe(options.recipe, options.changes),
            options.output,
            max_steps=options.steps,
            cpu_seconds=options.cpu_seconds,
            learning_rate=options.learning_rate,
            depth=options.depth,
            dim=options.dim,
            vae=options.vae,
            resume=options.resume,
        )
        pipe = TransfusionPipeline.from_pretrained(Path(options.output) / "final")
        started = time.process_time()
        samples = pipe(seed=0, num_return_sequences=8)
        result["cpu_seconds_per_sample"] = (time.process_time() - started) / len(samples)
        if options.plot:
            options.plot.parent.mkdir(parents=True, exist_ok=True)
            picture_grid([(one["images"][0], one["text"][0]) for one in samples], columns=8).save(options.plot)
        print(json.dumps(result))


if __name__ == "__main__":
    main()
