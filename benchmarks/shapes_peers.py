"""MDM beside its peers on every task of the shapes world: the variants of Table 3, and transfusion-pytorch.

All have the same conversations, seed, batches, tokens, VAE, parameters within 5%, and seconds of one CPU's time
to train in; the pace of each is measured in turns with MDM's, and its schedule ends with its budget. What to expect:
rows of some fifty positions are where attention is cheap and a scan without kernels is not, so the Transformer takes
more steps in the time; Transfusion writes token by token and learns texts from every position of each row at once,
where a diffusion learns them from one noise level a row.

    python benchmarks/shapes_peers.py --small                    # a minute, shows that it runs
    python benchmarks/shapes_peers.py --cpu-seconds 6440 --vae model_cards/mdm-shapes \
        --output docs/shapes_peers.json --plot docs/images/shapes_peers.png
"""

import argparse
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from _transfusion import Transfusion
from learning_curve import small_recipe
from transfusion_baseline import CHECKPOINT, SETTINGS, TransfusionPipeline, seconds_a_step, train

from mdm_hf.evaluation.experiment_rows import plot, table, with_rows
from mdm_hf.evaluation.reproduce import (
    EXPERIMENTS,
    Variant,
    for_steps,
    on_shared_vae,
    row_settings,
    scored,
    steps_within,
    trained,
)
from mdm_hf.evaluation.results import settings_hash
from mdm_hf.evaluation.shapes import TASKS


QUESTION = "MDM, the same with a Transformer, or Transfusion, in the same time with as many parameters?"
TRANSFUSION = {"learning_rate": 5e-3, "depth": 2}
GUIDANCE = {"guidance_scale": 5.0, "guidance_interval": (0.0, 0.6)}  # Transfusion's, chosen on the validation split


def transfusion(recipe: str, folder: Path, cpu_seconds: float, seed: int, vae: str | None) -> Path:
    """The folder of a baseline trained for the same seconds on the same VAE's latents, made if need be."""
    base = on_shared_vae(recipe, (), folder, seed, vae)
    settings = for_steps(base, Path(), 0) | {"cpu_seconds": float(cpu_seconds), **TRANSFUSION}
    target = folder / f"transfusion-{settings_hash(settings)}"
    if not (target / "final").is_dir():
        options, budget = TRANSFUSION | {"vae": base["processor"]}, target.with_suffix(".json")
        if not budget.is_file():
            facts = steps_within(cpu_seconds, partial(seconds_a_step, base, target, **options), base, folder)
            budget.write_text(json.dumps(facts))
        steps = json.loads(budget.read_text())["steps"]
        train(base, target, max_steps=steps, resume=(target / CHECKPOINT).is_file(), **options)
    facts = json.loads((target / "final" / SETTINGS).read_text()) | json.loads(target.with_suffix(".json").read_text())
    (target / "final" / "budget.json").write_text(json.dumps(facts))
    return target / "final"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models and a second each, to show that it runs")
    parser.add_argument("--recipe", default="recipes/shapes.yaml")
    parser.add_argument("--cpu-seconds", type=float, default=7200, help="of training, for each model")
    parser.add_argument("--num-samples", type=int, default=200, help="a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", help="a trained model with the VAE for all; else it is trained first")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/reproduce"), help="keeps models and scores")
    parser.add_argument("--output", type=Path, help="JSON, the table beside it; rows that it has are not made again")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    tasks, sampling = TASKS, {}
    with tempfile.TemporaryDirectory() as scratch:
        if options.small:
            options.recipe, options.work_dir = small_recipe(Path(scratch)), Path(scratch) / "work"
            options.cpu_seconds, options.num_samples, options.vae = 1, 65, None
            tasks, sampling = ("image_and_text",), {"num_inference_steps": 2}
        folder, scores = options.work_dir / "models", options.work_dir / "scores"
        output = options.output or options.work_dir / "peers.json"
        rest = options.num_samples, options.seed
        budget = options.cpu_seconds, options.seed, options.vae

        def mdm(variant: Variant) -> dict:
            where = trained(options.recipe, variant.changes, folder, *budget)
            return scored(where, variant, tasks, scores, *rest)

        def peer(variant: Variant) -> dict:
            where = transfusion(options.recipe, folder, *budget)
            return scored(where, variant, tasks, scores, *rest, load=TransfusionPipeline.from_pretrained)

        wanted = {}
        for label, one in EXPERIMENTS["table3"].variants.items():
            variant = replace(one, sampling=sampling)
            settings = row_settings(options.recipe, variant, tasks, options.cpu_seconds, *rest, vae=options.vae)
            wanted[label] = settings, partial(mdm, variant)
        if Transfusion is None:
            print('Transfusion is left out: it needs pip install -c constraints.txt -e ".[baselines]"')
        else:
            variant = Variant(sampling=GUIDANCE | sampling)
            settings = row_settings(options.recipe, variant, tasks, options.cpu_seconds, *rest, vae=options.vae)
            wanted["transfusion"] = settings | {"transfusion": TRANSFUSION}, partial(peer, variant)
        found = with_rows({"experiment": "peers", "question": QUESTION}, wanted, output)
        output.with_suffix(".md").write_text(table(found), encoding="utf-8")
        rows = found["rows"]
    if options.plot:
        plot(found, options.plot)
    print(table(found))
    print(json.dumps({row["variant"]: row["scores"] for row in rows}))


if __name__ == "__main__":
    main()
