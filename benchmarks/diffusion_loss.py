"""Which diffusion loss learns best from the same data in the same number of steps?

Three runs of the digits recipe that differ in `MDMConfig.diffusion_loss` alone: the two estimators of score entropy
(Eq. 4: its closed form, and Theorem 2's softmax over sampled earlier states) and the DDPM's epsilon loss, for both
modalities, as the baseline. Same model, seed, batches, optimiser, solver. The loss values cannot be compared, so the
averaged model is scored by `mdm evaluate` while it trains.

What to expect: all three have the same optimum for images. The sampled estimator has noisier gradients than the closed
form and values nearly clean latents less. The epsilon loss weighs the noise levels by the SNR, so it spends itself on
nearly clean latents, while what an image shows is decided in the noisy ones.

    python benchmarks/diffusion_loss.py --small                                     # a minute, shows that it runs
    python benchmarks/diffusion_loss.py --plot docs/images/ablation.png             # the table in docs/ablation.md
"""

import argparse
import json
import tempfile
from pathlib import Path

from mdm_hf import MDMPipeline, MDMProcessor
from mdm_hf.evaluation.digits import evaluate_digits
from mdm_hf.training.recipe import load_recipe
from mdm_hf.training.stages import run_recipe


LOSSES = ("score_entropy_exact", "score_entropy_sampled", "ddpm_epsilon")
CURVES = ("class_to_image", "text_to_image", "image_to_text", "image_and_text_agree", "pixel_frechet_distance")


def run(loss: str, folder: Path, options) -> dict:
    """Trains with one loss; returns its scores over the steps."""
    processor = MDMProcessor.from_pretrained(options.processor)
    history: list[dict] = []

    def score(model, step: int) -> None:
        pipe = MDMPipeline(model, processor, device=model.device)
        pipe.set_progress_bar_config(disable=True)
        count = options.num_samples if step == options.max_steps else min(options.num_samples, 100)
        history.append({"step": step} | evaluate_digits(pipe, num_samples=count, seed=options.seed)["scores"])
        print(json.dumps({"loss": loss} | history[-1]), flush=True)

    stage = {
        "max_steps": options.max_steps,
        "sample_every": max(1, options.max_steps // options.points),
        "save_steps": options.max_steps,
        "disable_tqdm": "true",
        "report_to": "none",
    }
    config = {
        "diffusion_loss": loss,
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_hidden_layers,
    }
    changes = [f"stages.diffusion.{key}={value}" for key, value in stage.items()]
    changes += [f"model.config.{key}={value}" for key, value in config.items()]
    changes += [f"output_dir={folder / loss}", f"processor={options.processor}", f"seed={options.seed}"]
    run_recipe(load_recipe(options.recipe, changes), draw=score)
    return {"loss": loss, "history": history}


def plot(results: list[dict], path: Path) -> None:
    """One panel per score over the optimiser steps, one line per loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(4 * len(CURVES), 3.4), constrained_layout=True)
    for axis, name in zip(axes, CURVES, strict=True):
        for result in results:
            steps = [point["step"] for point in result["history"]]
            axis.plot(steps, [point[name] for point in result["history"]], marker="o", label=result["loss"])
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("optimiser steps")
        axis.grid(alpha=0.3)
        if name != "pixel_frechet_distance":
            axis.set_ylim(0, 1)
    axes[-1].set_yscale("log")
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a run of seconds that shows that everything works")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--recipe", default="recipes/digits.yaml")
    parser.add_argument("--processor", default="model_cards/mdm-digits")
    parser.add_argument("--max-steps", type=int, default=4000)
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--num-hidden-layers", type=int, default=3)
    parser.add_argument("--num-samples", type=int, default=500, help="samples per task at the last step; 100 before")
    parser.add_argument("--points", type=int, default=5, help="points on each curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--results", type=Path, help="JSON of earlier runs to plot together with these")
    options = parser.parse_args()
    if options.small:
        options.max_steps, options.hidden_size, options.num_hidden_layers = 4, 32, 1
        options.num_samples, options.points = 65, 1
    results = json.loads(options.results.read_text()) if options.results and options.results.exists() else []
    for loss in options.losses:
        with tempfile.TemporaryDirectory() as folder:
            results.append(run(loss, Path(folder), options))
        if options.results:
            options.results.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(results, options.plot)
    print(json.dumps({r["loss"]: r["history"][-1] for r in results}))


if __name__ == "__main__":
    main()
