"""The command line `mdm`."""

import argparse
import json
import sys
import time
from pathlib import Path


DEFAULT_MODEL = "model_cards/mdm-digits"


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:  # bad input: the message says what to do, a traceback would hide it
        if options.debug:
            raise
        print(f"mdm {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


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
    demo.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub repository (default: %(default)s)")
    demo.add_argument("--output", type=Path, default=Path("demo.png"), help="picture to write (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)

    generate = command(
        "generate",
        _generate,
        "generate images, text, or both",
        'mdm generate --text "a handwritten three" --generate image --output three.png',
    )
    generate.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub repository (default: %(default)s)")
    generate.add_argument("--text", help="a description, or a question about --image")
    generate.add_argument("--image", type=Path, help="a picture to caption or ask about")
    generate.add_argument("--class-id", type=int, help="data category, for instance the digit")
    generate.add_argument("--generate", nargs="+", choices=("image", "text"), default=["image", "text"])
    generate.add_argument("--num-samples", type=int, default=1)
    generate.add_argument("--steps", type=int, help="network calls (default: the model's)")
    generate.add_argument("--guidance-scale", type=float, help="1 is no guidance (default: the model's)")
    generate.add_argument("--text-guidance-scale", type=float, help="of texts alone (default: the model's)")
    generate.add_argument("--seed", type=int)
    generate.add_argument(
        "--output", type=Path, default=Path("generated.png"), help="picture grid (default: %(default)s)"
    )

    train = command("train", _train, "train mdm-digits from scratch", "mdm train --output-dir runs/digits")
    train.add_argument("--output-dir", type=Path, required=True)
    train.add_argument("--processor", default=DEFAULT_MODEL, help="folder with the processor (default: %(default)s)")
    train.add_argument("--max-steps", type=int, default=34_000)
    train.add_argument("--batch-size", type=int, default=64)
    train.add_argument("--learning-rate", type=float, default=2e-3)
    train.add_argument("--diffusion-loss", default=None, help="see MDMConfig.diffusion_loss (default: the preset's)")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output-dir")

    evaluate = command(
        "evaluate", _evaluate, "score a digits model on the held-out digits", "mdm evaluate --num-samples 500"
    )
    evaluate.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub repository (default: %(default)s)")
    evaluate.add_argument("--num-samples", type=int, default=500, help="samples per task (default: %(default)s)")
    evaluate.add_argument("--steps", type=int, default=20)
    evaluate.add_argument("--guidance-scale", type=float, help="1 is no guidance (default: the model's)")
    evaluate.add_argument("--text-guidance-scale", type=float, help="of texts alone (default: the model's)")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--output", type=Path, help="also write the result as JSON")
    return parser


def _demo(options) -> None:
    from .evaluation.demo import run_demo

    started = time.perf_counter()
    path = run_demo(options.model, options.output, options.seed)
    print(f"Wrote {path.resolve()} in {time.perf_counter() - started:.0f} s.")


def _generate(options) -> None:
    from PIL import Image

    from . import MDMPipeline
    from .evaluation.pictures import picture_grid

    pipe = MDMPipeline.from_pretrained(options.model)
    results = pipe(
        text=options.text,
        images=None if options.image is None else Image.open(options.image),
        class_ids=options.class_id,
        generate=tuple(options.generate),
        num_return_sequences=options.num_samples,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        text_guidance_scale=options.text_guidance_scale,
        seed=options.seed,
    )
    for result in results:
        print(*result["text"], sep="\n")
    if "image" in options.generate:
        cells = [(image, " ".join(r["text"])) for r in results for image in r["images"]]
        picture_grid(cells, columns=min(10, len(cells))).save(options.output)
        print(f"Wrote {options.output.resolve()}.")


def _train(options) -> None:
    from .processing_mdm import MDMProcessor
    from .training.recipe_digits import train_digits

    overrides = {} if options.diffusion_loss is None else {"diffusion_loss": options.diffusion_loss}
    folder = train_digits(
        options.output_dir,
        MDMProcessor.from_pretrained(options.processor),
        max_steps=options.max_steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        resume=options.resume,
        **overrides,
    )
    print(f"Wrote {folder.resolve()}. Score it with: mdm evaluate --model {folder}")


def _evaluate(options) -> None:
    from . import MDMPipeline
    from .evaluation.digits import evaluate_digits

    result = evaluate_digits(
        MDMPipeline.from_pretrained(options.model),
        num_samples=options.num_samples,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        text_guidance_scale=options.text_guidance_scale,
        seed=options.seed,
    )
    for name, value in result["scores"].items():
        print(f"{name:45s} {value}")
    print(json.dumps(result["settings"]), f"{result['seconds']} s")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
