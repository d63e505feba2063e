"""How do the scores of a run on the shapes world grow with its steps?

The average of each checkpoint, which is what would have been published there, is scored by the shapes benchmark, drawn
as the run's recipe says under `generation`. What to expect: which shapes and colours a text asks for comes before how
many and where, drawing before describing, and what is still rising at the last checkpoint was cut off, not finished. A
run keeps its checkpoints with stages.diffusion.save_total_limit=100.

    python benchmarks/learning_curve.py --small                              # a minute, shows that it runs
    python benchmarks/learning_curve.py --run runs/shapes/diffusion --processor runs/shapes/processor \
        --output docs/learning_curve.json --plot docs/images/learning_curve.png
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from mdm_hf import MDMForMultiModalGeneration, MDMPipeline, MDMProcessor
from mdm_hf.evaluation.shapes import TASKS, ShapesBenchmark
from mdm_hf.evaluation.shapes_world import write_dataset
from mdm_hf.training.assembly import freeze
from mdm_hf.training.recipe import load_recipe, stage_options
from mdm_hf.training.stages import run_recipe
from mdm_hf.training.trainer import EMA_FILE, trained_parameters


def averaged(checkpoint: Path) -> MDMForMultiModalGeneration:
    """The model of a checkpoint with the moving average of what its run trained."""
    stage, recipe = checkpoint.parent, yaml.safe_load((checkpoint.parents[1] / "recipe.yaml").read_text("utf-8"))
    model = MDMForMultiModalGeneration.from_pretrained(checkpoint)
    freeze(model, stage.name, stage_options(recipe, stage.name))
    average = load_file(checkpoint / EMA_FILE)
    with torch.no_grad():
        for i, parameter in enumerate(trained_parameters(model)):
            parameter.copy_(average[str(i)])
    return model


def curve(
    run: Path, processor: MDMProcessor, sampling: dict, num_samples: int, known: list[dict], every: int, before: int
) -> list[dict]:
    """The scores of the last checkpoint of a run and of those of every so many before it, in order, counted from
    `before`; those in `known` are not scored again."""
    steps = sorted(int(folder.name.rpartition("-")[2]) for folder in run.glob("checkpoint-*"))
    points = {point["step"]: point for point in known}
    for step in steps[::-1][::every][::-1]:
        if before + step not in points:
            pipe = MDMPipeline(averaged(run / f"checkpoint-{step}"), processor)
            pipe.set_progress_bar_config(disable=True)
            found = ShapesBenchmark(pipe, num_samples, sampling, split="validation").run()
            point = {"step": before + step, **{key: found[key] for key in ("scores", "intervals", "settings")}}
            points[before + step] = point
            print(json.dumps({"step": before + step} | {name: found["scores"][name] for name in TASKS}), flush=True)
    return [points[step] for step in sorted(points)]


def plot(points: list[dict], path: Path) -> None:
    """One line a task, its 95% interval shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), constrained_layout=True)
    steps = [point["step"] for point in points]
    for name in TASKS:
        low, high = zip(*(point["intervals"][name] for point in points), strict=True)
        [line] = axis.plot(steps, [p["scores"][name] for p in points], marker="o", label=name.replace("_", " "))
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.12)
    axis.set(xlabel="optimiser steps", ylabel="share right", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def small_recipe(folder: Path) -> Path:
    """The recipe with a few scenes, a tiny model and a few steps, as a file in `folder`."""
    write_dataset(folder / "data", {"train": 40, "classes": 20})
    changes = ["model.config={hidden_size: 64, num_hidden_layers: 2, vae_config: {latent_size: 8, hidden_size: 64}}"]
    changes += [f"data.{name}.path={folder / 'data'}" for name in ("scenes", "classes")]
    for stage in ("vae", "diffusion"):
        changes += [f"stages.{stage}.{key}=2" for key in ("max_steps", "save_steps", "per_device_train_batch_size")]
        changes += [f"stages.{stage}.report_to=none", f"stages.{stage}.sample_every=100"]
    recipe = load_recipe("recipes/shapes.yaml", [*changes, f"output_dir={folder / 'run'}"])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few steps of a tiny model that show that it runs")
    parser.add_argument("--run", type=Path, default="runs/shapes/diffusion", help="folder with checkpoints")
    parser.add_argument("--processor", default="runs/shapes/processor")
    parser.add_argument("--every", type=int, default=1, help="score each n-th checkpoint, counted from the last")
    parser.add_argument("--steps-before", type=int, default=0, help="of the run that this one went on from")
    parser.add_argument("--num-samples", type=int, default=100, help="a task, of the validation split")
    parser.add_argument("--output", type=Path, help="JSON of the points; those in it are not made again")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.small:
            run_recipe(load_recipe(small_recipe(Path(scratch))))
            made = Path(scratch) / "run"
            options.run, options.processor = made / "diffusion", made / "processor"
            options.num_samples = 65
        known = json.loads(options.output.read_text()) if options.output and options.output.is_file() else []
        recipe = yaml.safe_load((options.run.parent / "recipe.yaml").read_text("utf-8"))
        sampling = recipe["generation"] | ({"num_inference_steps": 1} if options.small else {})
        processor = MDMProcessor.from_pretrained(options.processor)
        which = options.every, options.steps_before
        points = curve(options.run, processor, sampling, options.num_samples, known, *which)
    if options.output:
        options.output.write_text(json.dumps(points, indent=1) + "\n")
    if options.plot:
        plot(points, options.plot)
    print(json.dumps({point["step"]: {name: point["scores"][name] for name in TASKS} for point in points}))


if __name__ == "__main__":
    main()
