"""The command line's `mdm convert`."""

from pathlib import Path


OPTIONS = ("kind", "like", "use", "dtype", "max_shard_size", "direction", "seed", "overwrite")


def add_commands(command) -> None:
    """Adds it; `command(name, run, help, example)` makes a parser."""
    convert = command(
        "convert",
        _convert,
        "convert checkpoints: .pt of training loops, Mamba-2, autoencoders, SentencePiece, dtypes, shards",
        "mdm convert run/step-9000.pt --to models/mine --like model_cards/mdm-digits",
    )
    kinds = ("mdm", "training", "mamba2", "autoencoder", "sentencepiece")
    convert.add_argument("source", type=Path, help="file or folder")
    convert.add_argument("--to", type=Path, required=True, help="new folder, or file: .pt, .model, .safetensors")
    convert.add_argument("--as", dest="kind", choices=kinds, help="what --to becomes (default: by its name)")
    convert.add_argument("--like", help="folder or preset: the config, where the source has none, and the processor")
    convert.add_argument("--use", choices=("ema", "model"), help="of a .pt (default: ema, if it has one)")
    convert.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as they are)"
    )
    convert.add_argument("--max-shard-size", default="5GB", help="of a file of weights (default: %(default)s)")
    convert.add_argument("--direction", type=int, default=0, help="of a block, that a Mamba-2 gets (default: 0)")
    convert.add_argument("--seed", type=int, default=0, help="of weights that the source has not (default: 0)")
    convert.add_argument("--overwrite", action="store_true", help="what is at --to")


def _convert(options) -> None:
    from .convert import convert

    print(convert(options.source, options.to, **{name: getattr(options, name) for name in OPTIONS}))
