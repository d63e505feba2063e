"""The paper's ablations on the shapes world, each by one command: `mdm reproduce table3`.

- Variants of an experiment differ in what it asks about and in nothing else: data, seed, batches, parameters (to a few
  in a hundred), solver, and seconds of the processor are the same. A second is worth more on an idle machine than on a
  busy one, so a variant's pace is measured in turns with the plain recipe's, and its steps follow from the ratio.
- The unified VAE is trained once, or taken from a trained model, and given to all of them.
- What is trained or scored is kept in the output folder under its settings' hash: a command that was stopped goes on
  where it was, and experiments share the variants that they have in common. Of rows that NAME.json already has, not
  even the models are needed: with that file an experiment goes on on another machine.
"""

import copy
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from transformers.utils import logging

from ..checkpoints import write_whole
from ..pipeline_mdm import MDMPipeline
from ..training.recipe import load_recipe
from ..training.stages import run_recipe
from .experiment_rows import plot, table, with_rows
from .results import model_id, settings_hash
from .shapes import TASKS, VERSION, ShapesBenchmark, examples_sheet


logger = logging.get_logger(__name__)

TIMED = (20, 60)  # steps between which a pace is measured
ROUNDS = 4  # in which a variant's pace and the plain recipe's are measured in turns


@dataclass(frozen=True)
class Variant:
    """What differs: changes to the recipe, the sampling, the solver."""

    changes: tuple[str, ...] = ()
    sampling: dict = field(default_factory=dict)
    solver: dict | None = None  # options of the model's own, or "ddpm": True


@dataclass(frozen=True)
class Experiment:
    """What is asked, and the variants that answer it."""

    question: str
    variants: dict[str, Variant]
    tasks: tuple[str, ...] = TASKS


def _config(**fields) -> Variant:
    return Variant(tuple(f"model.config.{name}={json.dumps(value)}" for name, value in fields.items()))


def _guided(scale: float, high: float) -> Variant:
    return Variant((), {"guidance_scale": scale, "guidance_interval": [0.0, high]})


OURS = Variant()
EXPERIMENTS = {
    "table3": Experiment(
        "Mamba-2 read in 4 + 2 directions, in 2 + 1, or a Transformer in its place (the paper's Table 3)?",
        {
            "mamba 4+2": OURS,
            "mamba 2+1": _config(scan_directions=[2, 1]),
            "transformer": _config(backbone="transformer"),
        },
    ),
    "sharing": Experiment(
        "What do the directions of a block share?",
        {
            "shared": OURS,
            "independent": _config(scan_sharing="independent"),
            "alternate": _config(scan_sharing="alternate"),
        },
    ),
    "objective": Experiment(
        "Score entropy in closed form, sampled, or the squared error of the noise?",
        {
            "exact": OURS,
            "sampled": _config(diffusion_loss="score_entropy_sampled"),
            "epsilon": _config(diffusion_loss="ddpm_epsilon"),
        },
    ),
    "noise": Experiment(
        "Which noise counts for how much: the error of the velocity or of z_0, a cosine or the DDPM's schedule?",
        {
            "velocity, cosine": OURS,
            "velocity, linear": _config(image_beta_schedule="linear"),
            "z_0, cosine": _config(loss_weighting="unit"),
            "z_0, linear": _config(loss_weighting="unit", image_beta_schedule="linear"),
        },
    ),
    "vae": Experiment(
        "Does the diffusion loss train the VAE?", {"detached": OURS, "attached": _config(detach_latents=False)}
    ),
    "solver": Experiment(
        "How many steps of which order come up to a thousand steps of DDPM?",
        {
            **{
                f"order {order}, {steps} steps": Variant((), {"num_inference_steps": steps}, {"solver_order": order})
                for order in (1, 2)
                for steps in (5, 10, 20, 50)
            },
            "DDPM, 1000 steps": Variant((), {"num_inference_steps": 1000}, {"ddpm": True}),
        },
        ("class_to_image", "image_to_text"),
    ),
    "guidance": Experiment(
        "How much guidance, and from which noise on?",
        {
            **{f"{scale}": _guided(scale, 1.0) for scale in (1.0, 1.5, 2.0, 3.0, 5.0)},
            **{f"{scale} below t = {high}": _guided(scale, high) for scale in (3.0, 5.0) for high in (0.5, 0.7)},
        },
        ("class_to_image", "text_to_image", "image_and_text"),
    ),
}


def reproduce(
    name: str,
    recipe: str | Path,
    output: str | Path,
    model: str | None = None,
    cpu_seconds: float = 1200,
    num_samples: int = 200,
    seed: int = 0,
    vae: str | Path | None = None,
) -> dict:
    """Runs an experiment and writes `name.json`, `name.md` and `name.png`.

    Args:
        name: One of `EXPERIMENTS`.
        recipe: The variants' recipe but for what they change; it ends with a diffusion stage.
        output: Folder of the results; models and finished scores are kept below it.
        model: The trained model that solvers and guidance are tried on; trained as the first variant of the others if
            None. The others take none.
        cpu_seconds: Processor time that each variant is trained for, on a machine as busy as when the first was timed.
        num_samples: Of each task.
        seed: Of the variants' training and of the samples.
        vae: Folder of a trained model whose processor and VAE all variants get; the recipe's own stages make them if
            None.

    Returns:
        The experiment's question and a row for each variant: scores, intervals, settings, steps, seconds, parameters.

    Raises:
        ValueError: no such experiment; what recipe and benchmark refuse.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"Got the experiment {name!r}; need one of {', '.join(EXPERIMENTS)}.")
    if not 0 < cpu_seconds < math.inf:
        raise ValueError(f"Got {cpu_seconds} seconds (--cpu-seconds) to train for; need a number above 0.")
    if seed < 0:
        raise ValueError(f"Got the seed {seed} (--seed); need 0 or more.")
    experiment, output = EXPERIMENTS[name], Path(output)
    if model and any(variant.changes for variant in experiment.variants.values()):
        raise ValueError(
            f"Got a trained model, {model}, for {name}, whose variants differ in how they are trained; need solver or "
            "guidance with it; leave it out to train each variant."
        )
    if model and vae:
        raise ValueError(
            f"Got a trained model, {model}, and the VAE of {vae} to train others with; need one; leave one out."
        )

    def row(variant: Variant) -> dict:
        where = Path(model) if model else trained(recipe, variant.changes, output / "models", cpu_seconds, seed, vae)
        return scored(where, variant, experiment.tasks, output / "scores", num_samples, seed)

    wanted = {}
    for label, variant in experiment.variants.items():
        settings = row_settings(recipe, variant, experiment.tasks, cpu_seconds, num_samples, seed, model, vae)
        wanted[label] = settings, partial(row, variant)
    found = with_rows({"experiment": name, "question": experiment.question}, wanted, output / f"{name}.json")
    (output / f"{name}.md").write_text(table(found), encoding="utf-8")
    plot(found, output / f"{name}.png")
    return found


def row_settings(
    recipe: str | Path,
    variant: Variant,
    tasks: tuple[str, ...],
    cpu_seconds: float,
    num_samples: int,
    seed: int,
    model: str | None = None,
    vae: str | Path | None = None,
) -> dict:
    """All that a row of a table depends on, but for the machine and its folders."""
    training = load_recipe(recipe, [f"seed={seed}", *variant.changes]) | {"output_dir": ""}
    how = {"recipe": training, "cpu_seconds": float(cpu_seconds)} if model is None else {"model": model_id(model)}
    how |= _state_of(vae)
    sampling = {"sampling": variant.sampling, "solver": variant.solver, "benchmark_version": VERSION}
    return how | sampling | {"tasks": list(tasks), "num_samples": num_samples, "seed": seed}


def trained(
    recipe: str | Path,
    changes: tuple[str, ...],
    folder: Path,
    cpu_seconds: float,
    seed: int,
    vae: str | Path | None = None,
) -> Path:
    """The folder of a model trained by `recipe` with `changes` for so many seconds of the processor, made if need be.

    Beside the model `budget.json` says what it took.
    """
    base = on_shared_vae(recipe, changes, folder, seed, vae)
    settings = for_steps(base, Path(), 0)  # whatever number of steps the recipe itself asks for
    target = folder / settings_hash({"recipe": settings, "cpu_seconds": float(cpu_seconds)} | _state_of(vae))
    if (target / "final").is_dir():
        return target / "final"
    budget = target.with_suffix(".json")
    if not budget.is_file():
        timed = target.with_name(f".timed-{target.name}")
        measure = None if changes == () else partial(seconds_a_step, base, timed)
        facts = steps_within(cpu_seconds, measure, on_shared_vae(recipe, (), folder, seed, vae), folder)
        write_whole(budget, json.dumps(facts | {"changes": list(changes)}))
    facts = json.loads(budget.read_text())
    run_recipe(for_steps(base, target, facts["steps"]), resume=target.is_dir())
    write_whole(target / "final" / "budget.json", json.dumps(facts) + "\n")
    return target / "final"


def on_shared_vae(
    recipe: str | Path, changes: tuple[str, ...], folder: Path, seed: int, vae: str | Path | None = None
) -> dict:
    """The recipe's diffusion stage alone, with processor and VAE of the model in the folder `vae`, or, if None, of a
    run of the stages before, made if need be."""
    if vae is None:
        before = _without(load_recipe(recipe, [f"seed={seed}"]), "diffusion")
        shared = folder / f"vae-{settings_hash({'recipe': before})}"
        if not (shared / "final").is_dir():
            run_recipe(before | {"output_dir": str(shared)}, resume=shared.is_dir())
        vae = shared / "final"
    base = _without(load_recipe(recipe, [f"seed={seed}", *changes]), "tokenizer", "vae")
    return base | {"processor": str(vae), "model": base["model"] | {"vae_from": str(vae)}}


def _state_of(vae: str | Path | None) -> dict:
    return {} if vae is None else {"vae": model_id(str(vae))}


def steps_within(cpu_seconds: float, measure: Callable[[], float] | None, plain: dict, folder: Path) -> dict:
    """How many steps a variant takes in the time in which the plain recipe takes its own, its pace, and the ratio of
    its pace to the plain recipe's in each turn. The seconds of a row are steps times pace: what a run takes by the
    clock depends on what else the machine does that day.

    Args:
        cpu_seconds: Processor time that the plain recipe is given.
        measure: Seconds of a step of the variant; None for the plain recipe itself.
        plain: The recipe that all are compared with.
        folder: Keeps the plain recipe's pace, which is measured once.
    """
    scratch = folder / f".timed-{settings_hash(plain)}"
    kept = folder / f"pace-{settings_hash(for_steps(plain, Path(), 0))}.json"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps({"cpu_seconds_a_step": seconds_a_step(plain, scratch)}))
    pace = json.loads(kept.read_text())["cpu_seconds_a_step"]
    turns = [] if measure is None else [(measure(), seconds_a_step(plain, scratch)) for _ in range(ROUNDS)]
    if turns:
        pace *= sum(theirs for theirs, _ in turns) / sum(ours for _, ours in turns)
    facts = {"steps": max(1, int(cpu_seconds / pace)), "cpu_seconds_a_step": round(pace, 4)}
    return facts | {"of_plain_pace": [round(theirs / ours, 3) for theirs, ours in turns]}


def seconds_a_step(recipe: dict, scratch: Path) -> float:
    """Processor seconds that an optimiser step of a recipe takes, its data included."""
    at: list[float] = []
    first, last = TIMED
    timed = _without(for_steps(recipe, scratch, last), "gate")  # it takes no such steps
    timed["stages"]["diffusion"] |= {"sample_every": first, "save_steps": last}
    shutil.rmtree(scratch, ignore_errors=True)
    run_recipe(timed, draw=lambda model, step: at.append(time.process_time()))
    shutil.rmtree(scratch)
    return (at[-1] - at[0]) / (last - first)


def for_steps(recipe: dict, folder: Path, steps: int) -> dict:
    """The recipe with a diffusion stage of so many steps and ten checkpoints, in `folder`."""
    recipe = copy.deepcopy(recipe) | {"output_dir": str(folder)}
    stage = recipe["stages"]["diffusion"]
    stage |= {"max_steps": steps, "save_steps": max(1, steps // 10), "sample_every": steps + 1, "report_to": "none"}
    stage["warmup_steps"] = min(stage.get("warmup_steps", 0), steps // 20)
    return recipe


def _without(recipe: dict, *stages: str) -> dict:
    left = {name: stage for name, stage in recipe["stages"].items() if name not in stages}
    return copy.deepcopy(recipe | {"stages": left})


def scored(
    where: Path,
    variant: Variant,
    tasks: tuple[str, ...],
    folder: Path,
    num_samples: int,
    seed: int,
    load: Callable[[Path], Any] = MDMPipeline.from_pretrained,
) -> dict:
    """The result of the shapes benchmark, with what the model took to train; kept in `folder`, beside a picture of its
    first examples. `load` makes a pipeline of the model."""
    facts: dict[str, Any] = {
        "model": model_id(str(where)),
        "sampling": variant.sampling,
        "solver": variant.solver,
        "tasks": tasks,
    }
    facts |= {"num_samples": num_samples, "seed": seed, "benchmark_version": VERSION}
    kept = folder / f"{settings_hash(facts)}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    pipe = load(where)
    pipe.set_progress_bar_config(disable=True)
    if variant.solver:
        options = dict(variant.solver)
        kind = DDPMScheduler if options.pop("ddpm", False) else type(pipe.scheduler or pipe.model.default_scheduler())
        pipe.scheduler = kind.from_config(pipe.model.default_scheduler().config, **options)
    benchmark = ShapesBenchmark(pipe, num_samples, variant.sampling, seed)
    found = benchmark.run(tasks)
    budget = Path(where) / "budget.json"
    found["examples"] = f"scores/{kept.stem}.png"
    found["training"] = (json.loads(budget.read_text()) if budget.is_file() else {}) | losses_of(Path(where).parent)
    found["parameters"] = found["training"].get("parameters") or sum(p.numel() for p in pipe.model.parameters())
    folder.mkdir(parents=True, exist_ok=True)
    examples_sheet(benchmark.examples).save(kept.with_suffix(".png"))
    write_whole(kept, json.dumps(found, indent=1) + "\n")
    return found


def losses_of(run: Path) -> dict:
    """{"losses": {"step": [...], "image": [...], "text": [...]}} from a run's log; nothing where it has none."""
    logs = run.glob("diffusion/checkpoint-*/trainer_state.json")
    last = max(logs, key=lambda path: int(path.parent.name.rpartition("-")[2]), default=None)
    if last is None:
        return {}
    history = json.loads(last.read_text())["log_history"]
    rows = [row for row in history if {"loss_se_image", "loss_se_text"} <= set(row)]
    columns = {"step": "step", "image": "loss_se_image", "text": "loss_se_text"}
    return {"losses": {name: [row[column] for row in rows] for name, column in columns.items()}}
