"""The command line's `mdm card`, `mdm push`, `mdm pull` and `mdm serve`."""

from pathlib import Path


def add_commands(command) -> None:
    """Adds them; `command(name, run, help, example)` makes a parser."""
    card = command("card", _card, "write a model's card from what lies in its folder", "mdm card runs/mine/final")
    card.add_argument("folder", type=Path, help="of the model; card.yaml in it says what its makers know")
    card.add_argument("--repo-id", help="where it will lie, for the code that the card shows (default: the folder)")
    card.add_argument("--overwrite", action="store_true", help="also a README.md that somebody wrote")

    push = command(
        "push",
        _push,
        "push a model to the Hub: weights, code, card, endpoint, in one commit",
        "mdm push runs/mine/final org/mine --private",
    )
    push.add_argument("folder", type=Path, help="of the model")
    push.add_argument("repo_id", help="owner/name, made if it is not there")
    push.add_argument("--private", action="store_true", help="make a new repository a private one")
    push.add_argument("--revision", help="branch, made if it is not there (default: main)")
    push.add_argument("--message", help="of the commit")
    push.add_argument("--max-shard-size", default="5GB", help="of a file of weights (default: %(default)s)")
    push.add_argument("--dry-run", action="store_true", help="put it together, check it, list it; push nothing")

    pull = command(
        "pull", _pull, "fetch a model from the Hub and check that it is whole", "mdm pull org/mine models/mine"
    )
    pull.add_argument("repo_id", help="owner/name")
    pull.add_argument("folder", type=Path, help="new, or of a pull that was stopped")
    pull.add_argument("--revision", help="branch, tag or commit (default: main)")
    pull.add_argument("--overwrite", action="store_true", help="into a folder that holds other things")
    pull.add_argument("--dry-run", action="store_true", help="list what would be fetched; fetch nothing")

    serve = command("serve", _serve, "show a model in the browser", "mdm serve --model model_cards/mdm-digits")
    serve.add_argument(
        "--model", default="model_cards/mdm-digits", help="folder or Hub repository (default: %(default)s)"
    )
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for other machines too (default: %(default)s)")
    serve.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    serve.add_argument("--share", action="store_true", help="also under a public address, for three days")
    serve.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    serve.add_argument("--concurrency", type=int, default=1, help="calls of the network at a time (default: 1)")
    serve.add_argument("--max-queue", type=int, default=64, help="requests that may wait (default: %(default)s)")


def _card(options) -> None:
    from .card import check_readme, write_card
    from .card_notes import read_notes
    from .examples import draw_examples

    check_readme(options.folder, options.overwrite)  # before anything is drawn
    draw_examples(options.folder, read_notes(options.folder)["examples"])
    print(f"Wrote {write_card(options.folder, options.repo_id, options.overwrite).resolve()}.")


def _push(options) -> None:
    from .repository import check_names, push, staged

    check_names(options.repo_id, options.revision)
    if not options.dry_run:
        names = ("private", "revision", "message", "max_shard_size")
        print(push(options.folder, options.repo_id, **{name: getattr(options, name) for name in names}))
        return
    with staged(options.folder, options.repo_id, options.max_shard_size) as target:
        files = {path.relative_to(target).as_posix(): path.stat().st_size for path in target.rglob("*")}
        _print_files({name: size for name, size in files.items() if (target / name).is_file()})
        print((target / "README.md").read_text(encoding="utf-8"))


def _pull(options) -> None:
    from .repository import has_weights, pull, sizes_on_hub

    if options.dry_run:
        _print_files(sizes_on_hub(options.repo_id, options.revision))
        return
    folder = pull(options.repo_id, options.folder, options.revision, options.overwrite)
    how = f"Try it with: mdm generate --model {folder}" if has_weights(folder) else "It has no weights: train it."
    print(f"Wrote {folder.resolve()}. {how}")


def _serve(options) -> None:
    from .space import serve

    names = ("model", "host", "port", "share", "device", "concurrency", "max_queue")
    serve(**{name: getattr(options, name) for name in names})


def _print_files(sizes: dict[str, int]) -> None:
    for name, size in sorted(sizes.items()):
        print(f"{size:>14,}  {name}")
    print(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files")
