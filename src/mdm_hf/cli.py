"""The command line `mdm`."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from .allocator import keep_freed_memory
from .conversion import command as conversion
from .evaluation.benchmarks import BENCHMARKS
from .publishing import command as publishing


DEFAULT_MODEL = "model_cards/mdm-digits"
MODEL_HELP = "folder or Hub repository (default: %(default)s)"
INTERVAL = "times between which there is guidance; 1 is pure noise, 0 done (default: the model's)"
SELECTION = "nats of a token at which it is decided, and stays; 0.5 is 61%%; off (default: the model's)"


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if more and not (options.command == "train" and all("=" in one and one[0] != "-" for one in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # key=value that stands after a flag
        options.changes += more
    keep_freed_memory()
    try:
        if "model" in options:
            _check_model("--model", options.model, "run this in the repository's root, where the default lies")
        if getattr(options, "trained", None) is not None:
            _check_model("--trained", options.trained, "leave it out to train one")
        options.run(options)
    except (
        ValueError,
        OSError,
        FloatingPointError,
        ImportError,
        StrictDataclassError,
    ) as error:  # bad input: the message says what to do, a traceback would hide it
        if options.debug:
            raise
        from .configuration_mdm import why_refused

        said = why_refused(error) if isinstance(error, StrictDataclassError) else error
        print(f"mdm {options.command}: {said}", file=sys.stderr)
        return 2
    return 0


def _check_model(flag: str, model: str, otherwise: str) -> None:
    is_folder = model != "" and Path(model).is_dir()
    if not is_folder and (model == DEFAULT_MODEL or len(Path(model).parts) != 2):
        raise ValueError(
            f"Got {model!r}, which is no folder here; give {flag} a folder or a Hub repository owner/name, or "
            f"{otherwise}."
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mdm", description="MDM: images, text, or both from one diffusion model.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run, help: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    demo = command(
        "demo", _demo, "draw, write and read digits, and save one picture of it", "mdm demo --output demo.png"
    )
    demo.add_argument("--model", default=DEFAULT_MODEL, help=MODEL_HELP)
    demo.add_argument("--output", type=_picture, default="demo.png", help="picture to write (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of all samples (default: %(default)s)")

    generate = command(
        "generate",
        _generate,
        "generate images, text, or both",
        'mdm generate --text "a handwritten three" --generate image --output three.png',
    )
    generate.add_argument("--model", default=DEFAULT_MODEL, help=MODEL_HELP)
    generate.add_argument("--text", help="a description, or a question about --image")
    generate.add_argument(
        "--image", help="a picture to caption or ask about: path or URL (mdm-digits knows light strokes on dark)"
    )
    generate.add_argument("--canvas", help="a picture to change: path or URL; takes the place of --generate")
    generate.add_argument("--mask", help="a picture over --canvas, white where it is to be made anew (default: all)")
    generate.add_argument(
        "--strength", type=float, help="of the change of --canvas: 1 keeps nothing of what is made anew (default: 1)"
    )
    generate.add_argument("--class-id", type=int, help="data category, for instance the digit")
    generate.add_argument(
        "--generate",
        nargs="+",
        choices=("image", "text", "auto"),
        help="what to make, or let the model decide (default: text if there is an --image, else both)",
    )
    generate.add_argument("--num-samples", type=_count, default=1, help="samples (default: %(default)s)")
    generate.add_argument(
        "--steps", type=_steps, help="solver steps of each modality, or auto: as few as will do (default: the model's)"
    )
    generate.add_argument("--guidance-scale", type=float, help="1 is no guidance (default: the model's)")
    generate.add_argument("--text-guidance-scale", type=float, help="of texts alone (default: the model's)")
    generate.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=INTERVAL)
    generate.add_argument("--text-temperature", type=float, help="of token predictions (default: the model's)")
    generate.add_argument("--text-selection-tolerance", type=_tolerance, help=SELECTION)
    generate.add_argument(
        "--modality-lag", type=float, help="1 the text is done before the image, 0 both at once (default: the model's)"
    )
    generate.add_argument("--scheduler", help="a solver of diffusers, UniPCMultistepScheduler (default: the model's)")
    generate.add_argument("--seed", type=int, help="of the first sample, n + seed of sample n (default: at random)")
    generate.add_argument(
        "--output", type=_picture, default="generated.png", help="picture grid (default: %(default)s)"
    )

    train = command(
        "train",
        _train,
        "train a model by a recipe",
        "mdm train recipes/folder.yaml data.pictures.path=my_pictures output_dir=runs/mine",
    )
    train.add_argument("recipe", type=Path, help="YAML file; recipes/ has some to copy, docs/training.md says all")
    train.add_argument(
        "changes", nargs="*", metavar="key=value", help="what differs, such as stages.diffusion.max_steps=2000"
    )
    train.add_argument("--resume", action="store_true", help="go on with the run in the recipe's output_dir")
    train.add_argument(
        "--dry-run", action="store_true", help="print parameters, tokens and time a step, and memory; train nothing"
    )

    shapes = command(
        "make-shapes",
        _make_shapes,
        "write the shapes world as a data set: scenes, captions, prompts, questions, riddles",
        "mdm make-shapes --output data/shapes",
    )
    shapes.add_argument("--output", type=Path, default="data/shapes", help="new folder (default: %(default)s)")
    shapes.add_argument("--train", type=_count, default=24_000, help="scenes to train on (default: %(default)s)")
    shapes.add_argument("--classes", type=_count, default=6_000, help="... of one class each (default: %(default)s)")
    shapes.add_argument("--validation", type=_count, default=1_000, help="... to tune on (default: %(default)s)")
    shapes.add_argument("--test", type=_count, default=2_000, help="... to report on (default: %(default)s)")

    cache = command(
        "cache-latents",
        _cache_latents,
        "encode a folder of pictures once with a model's pixel autoencoder; a killed run goes on where it was",
        "mdm cache-latents --model runs/base --images pictures --output runs/latents",
    )
    cache.add_argument("--model", required=True, help="folder or Hub repository of model and processor")
    cache.add_argument("--images", type=Path, required=True, help="folder with pictures, in subfolders too")
    cache.add_argument("--output", type=Path, required=True, help="folder that gets the shards")
    cache.add_argument("--batch-size", type=_count, default=16, help="pictures at once (default: %(default)s)")
    cache.add_argument("--shard-size", type=_count, default=1024, help="pictures in a file (default: %(default)s)")
    cache.add_argument("--half", action="store_true", help="keep the latents in float16, half the space")
    cache.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")

    evaluate = command(
        "evaluate", _evaluate, "score a model on a benchmark", "mdm evaluate --benchmark digits --num-samples 500"
    )
    lines = [f"  {name:20s} {one.help}" for name, one in BENCHMARKS.items()]
    evaluate.epilog = "\n".join(
        [str(evaluate.epilog), "", "benchmarks, with what they need in docs/benchmarks.md:", *lines]
    )
    evaluate.add_argument("--benchmark", default="digits", help="one of those below (default: %(default)s)")
    evaluate.add_argument("--model", default=DEFAULT_MODEL, help=MODEL_HELP)
    evaluate.add_argument(
        "--num-samples",
        type=_sample_count,
        default=500,
        help="of digits and shapes: samples per task, 65 or more (default: %(default)s)",
    )
    evaluate.add_argument("--steps", type=int, help="solver steps of each modality (default: the model's)")
    evaluate.add_argument("--guidance-scale", type=float, help="1 is no guidance (default: the model's)")
    evaluate.add_argument("--text-guidance-scale", type=float, help="of texts alone (default: the model's)")
    evaluate.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=INTERVAL)
    evaluate.add_argument("--text-temperature", type=float, help="of token predictions (default: the model's)")
    evaluate.add_argument("--text-selection-tolerance", type=_tolerance, help=SELECTION)
    evaluate.add_argument(
        "--seed",
        type=int,
        nargs="+",
        default=[0],
        help="of samples and wordings; several for mean and range (default: 0)",
    )
    evaluate.add_argument("--tasks", nargs="+", help="of shapes: class_to_image, ...; docs/shapes.md (default: all)")
    evaluate.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="of shapes; validation to choose settings by (default: %(default)s)",
    )
    evaluate.add_argument("--limit", type=_count, help="items of a real benchmark at most (default: all)")
    evaluate.add_argument("--data", type=Path, help="the benchmark's file or folder; docs/benchmarks.md says which")
    evaluate.add_argument("--images", type=Path, help="folder with the benchmark's pictures")
    evaluate.add_argument("--prompt", help="text beside a picture to caption (default: none)")
    evaluate.add_argument("--inception", type=Path, help="TorchScript file of the Inception network, for FID")
    evaluate.add_argument("--num-draws", type=_count, default=32, help="of model.score (default: %(default)s)")
    evaluate.add_argument("--num-fewshot", type=int, help="examples before a question (default: the task's own)")
    evaluate.add_argument("--batch-size", type=_count, default=32, help="items at once (default: %(default)s)")
    evaluate.add_argument(
        "--work-dir",
        type=Path,
        default=Path("runs/evaluate"),
        help="what a run keeps, to go on with after a kill (default: %(default)s)",
    )
    evaluate.add_argument("--output", type=Path, help="also write the result as JSON")
    evaluate.set_defaults(default_of=evaluate.get_default)

    again = command(
        "reproduce",
        _reproduce,
        "run one of the paper's ablations on the shapes world: a table, a plot, a JSON",
        "mdm reproduce table3 --cpu-seconds 1200",
    )
    again.add_argument("experiment", help="table3, sharing, objective, noise, vae, solver or guidance")
    again.add_argument("--recipe", type=Path, default="recipes/shapes.yaml", help="what varies (default: %(default)s)")
    again.add_argument("--output", type=Path, default="runs/reproduce", help="folder (default: %(default)s)")
    again.add_argument("--trained", help="a trained model, for solver and guidance; else one is trained")
    again.add_argument(
        "--cpu-seconds", type=float, default=1200, help="of training, for each variant (default: %(default)s)"
    )
    again.add_argument("--num-samples", type=_sample_count, default=200, help="a task (default: %(default)s)")
    again.add_argument("--seed", type=int, default=0, help="of training and samples (default: %(default)s)")
    again.add_argument("--vae", help="a trained model with the VAE for all variants; else it is trained first")

    publishing.add_commands(command)
    conversion.add_commands(command)
    return parser


def _count(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"got {given!r}; need a whole number, 1 or more")
    return int(given)


def _steps(given: str) -> int | str:
    if given != "auto" and not given.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"got {given!r}; need a whole number, 1 or more, or auto")
    return given if given == "auto" else int(given)


def _tolerance(given: str) -> float | bool:
    """A number, or False for "off"."""
    return given != "off" and float(given)


def _sample_count(given: str) -> int:
    if _count(given) < 65:
        raise argparse.ArgumentTypeError(
            f"got {given}; need 65 or more, for a Frechet distance over 64 pixels or features"
        )
    return int(given)


def _picture(name: str) -> Path:
    """A path that a picture can be written to; its folder is made."""
    path = Path(name)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise argparse.ArgumentTypeError(f"got {name!r}; need a picture's name: .png, .jpg or .webp")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _demo(options) -> None:
    from .evaluation.demo import run_demo

    started = time.perf_counter()
    path = run_demo(options.model, options.output, options.seed)
    print(f"Wrote {path.resolve()} in {time.perf_counter() - started:.0f} s.")


def _generate(options) -> None:
    from . import MDMPipeline
    from .evaluation.pictures import picture_grid

    wanted = options.generate or (("text",) if options.image else ("image", "text"))
    if options.generate == ["auto"]:
        wanted = "auto"
    canvas = None
    if options.canvas is not None:
        canvas = {"type": "image", "image": options.canvas}
        if options.mask is not None:
            canvas["mask"] = options.mask
        wanted = options.generate
    elif options.mask is not None or options.strength is not None:
        raise ValueError("Got --mask or --strength without --canvas; need the picture that is to be changed; name it.")
    pipe = MDMPipeline.from_pretrained(options.model)
    results = pipe(
        text=options.text,
        images=options.image,
        class_ids=options.class_id,
        generate=wanted,
        canvas=canvas,
        strength=options.strength,
        scheduler=options.scheduler,
        num_return_sequences=options.num_samples,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        text_guidance_scale=options.text_guidance_scale,
        guidance_interval=options.guidance_interval,
        text_temperature=options.text_temperature,
        text_selection_tolerance=options.text_selection_tolerance,
        modality_lag=options.modality_lag,
        seed=options.seed,
    )
    for result in results:
        for text in result["text"]:
            print(text)
    if cells := [(image, " ".join(r["text"])) for r in results for image in r["images"]]:
        picture_grid(cells, columns=min(10, len(cells))).save(options.output)
        print(f"Wrote {options.output.resolve()}.")


def _train(options) -> None:
    from .training.dry_run import dry_run
    from .training.recipe import load_recipe
    from .training.stages import run_recipe

    recipe = load_recipe(options.recipe, options.changes)
    if options.dry_run:
        for name, estimate in dry_run(recipe):
            print(f"{name}\n{estimate}")
        return
    folder = run_recipe(recipe, resume=options.resume)
    if os.environ.get("RANK", "0") == "0":
        print(f"Wrote {folder.resolve()}. Try it with: mdm generate --model {folder}")


def _make_shapes(options) -> None:
    from .evaluation.shapes_world import write_dataset

    sizes = {split: getattr(options, split) for split in ("train", "classes", "validation", "test")}
    print(f"Wrote {write_dataset(options.output, sizes).resolve()}.")


def _cache_latents(options) -> None:
    import torch

    from . import MDMForMultiModalGeneration, MDMProcessor
    from .training.latent_cache import pictures_in, write_latent_cache

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    paths = pictures_in(options.images)
    cache = write_latent_cache(
        paths,
        MDMForMultiModalGeneration.from_pretrained(options.model).to(device),
        MDMProcessor.from_pretrained(options.model).image_processor,
        options.output,
        names=[path.relative_to(options.images).as_posix() for path in paths],
        batch_size=options.batch_size,
        shard_size=options.shard_size,
        dtype=torch.float16 if options.half else torch.float32,
    )
    print(f"{options.output.resolve()} holds the latents of {len(cache)} pictures.")


def _evaluate(options) -> None:
    from .evaluation.benchmarks import run_benchmark
    from .publishing.examples import checkpoint_hash

    if options.output is not None:  # before hours of work, not after
        if options.output.is_dir():
            raise ValueError(f"Got --output {options.output}, which is a folder; need a file's name, such as a.json.")
        options.output.parent.mkdir(parents=True, exist_ok=True)
    if min(options.seed) < 0:
        raise ValueError(f"Got --seed {min(options.seed)}; need 0 or more.")
    # Before it runs: others may lie in the folder when it is done.
    weights = {"weights": checkpoint_hash(Path(options.model))} if Path(options.model).is_dir() else {}
    result = run_benchmark(options.benchmark, options) | {"benchmark": options.benchmark} | weights
    spread = result.get("intervals") or {
        name: [low, result["highest"][name]] for name, low in result.get("lowest", {}).items()
    }
    for name, value in result["scores"].items():
        ends = "   {} to {}".format(*spread[name]) if name in spread else ""
        print(f"{name:45s} {value}{ends}")
    print(json.dumps(result["settings"]), f"{result['seconds']} s")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n")  # in place: it may be /dev/stdout


def _reproduce(options) -> None:
    from .evaluation.experiment_rows import table
    from .evaluation.reproduce import reproduce

    found = reproduce(
        options.experiment,
        options.recipe,
        options.output,
        options.trained,
        options.cpu_seconds,
        options.num_samples,
        options.seed,
        options.vae,
    )
    print(table(found))
    print(f"Wrote {(options.output / options.experiment).resolve()}.json, .md and .png.")


if __name__ == "__main__":
    sys.exit(main())
