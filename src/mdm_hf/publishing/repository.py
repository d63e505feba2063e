"""Models to the Hub and back: `mdm push`, `mdm pull`.

- What is pushed is one commit with all that a user needs: weights, processor, solver, the code, the card, the entry of
  Inference Endpoints. It is put together and checked in full before the Hub is asked for anything.
- A push or a pull that was stopped is run again: the Hub keeps the large files that had arrived, in shards of
  `max_shard_size`, and does not ask for them again; a pull asks for the rest of a file.
- The commit comes last, so that nobody ever sees half a model.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import requires
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id
from safetensors import SafetensorError, safe_open

from ..checkpoints import AGAIN, SOLVER
from ..configuration_mdm import MDMConfig
from ..conversion.files import check_shard_size
from ..conversion.training_checkpoint import read_model
from ..pipeline_mdm import MDMPipeline
from .adapter import FILES, read_adapter
from .card import CARD, SPEED, card_of, check_card, is_generated
from .card_notes import NOTES_FILE, read_notes
from .examples import EXAMPLES, FOLDER, checkpoint_hash, draw_examples


HANDLER = Path(__file__).parent / "handler.py"
MARK = Path(".cache", "huggingface")  # where huggingface_hub notes what it has fetched
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")  # in fnmatch's words
NOT_FOR_ENDPOINTS = {"torch"}  # the server brings it


@contextmanager
def staged(folder: str | Path, repo_id: str, max_shard_size: str = "5GB") -> Iterator[Path]:
    """A temporary folder with all that is to be pushed of the model in `folder`.

    Args:
        folder: A trained model with its processor; config.json alone, of a model that is untrained; or a PEFT adapter.
        repo_id: Named in the code that the card shows.
        max_shard_size: Of a file of weights.

    Raises:
        ValueError: a model that does not load, a size that is none, a card that the Hub would refuse.
    """
    folder = Path(folder)
    adapter = read_adapter(folder)
    if adapter is None and not (folder / "config.json").is_file():
        raise ValueError(f"Got {folder} without config.json; need the folder of a saved model; name that.")
    check_names(repo_id)
    check_shard_size(max_shard_size)
    with TemporaryDirectory(prefix="mdm-push-") as name:
        target = Path(name)
        if adapter is not None:  # as it lies there: its base, on the Hub, brings the code, an endpoint would lack it
            for path in folder.iterdir():
                if path.is_file() and path.suffix in FILES:
                    shutil.copy(path, target)
            if (folder / SOLVER).is_file():
                shutil.copytree((folder / SOLVER).parent, (target / SOLVER).parent)
        elif checkpoint_hash(folder) is None:
            MDMConfig.from_pretrained(folder).save_pretrained(name)
        else:
            read_model(folder)  # names, shapes and numbers of the weights: what is missing would be made at random
            pipe = MDMPipeline.from_pretrained(str(folder), device="cpu", dtype="auto")
            pipe.save_pretrained(name, max_shard_size=max_shard_size)
            shutil.copy(HANDLER, target)
            (target / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
        _add_card(folder, target, repo_id)
        yield target


def requirements() -> list[str]:
    """What the code of a repository needs, beside torch, which the server of Inference Endpoints brings."""
    needed = [line for line in requires("mdm-hf") or () if "extra ==" not in line]
    return sorted(line for line in needed if not line.startswith(tuple(NOT_FOR_ENDPOINTS)))


def _add_card(folder: Path, target: Path, repo_id: str) -> None:
    """The card into the staged folder, with all that it shows: somebody's own, or one that is made for the weights.
    Examples that have to be drawn for it are kept in the model's folder."""
    own = folder / CARD
    is_ours = not own.is_file() or is_generated(own)
    text = "" if is_ours else own.read_text(encoding="utf-8")
    if not text:
        draw_examples(folder, read_notes(folder)["examples"])
        text = card_of(folder, repo_id)
    (target / CARD).write_text(text, encoding="utf-8")
    for path in sorted(folder.iterdir()):
        if path.name in (NOTES_FILE, SPEED, EXAMPLES) or path.match("*scores*.json") or path.match("*.png"):
            shutil.copy(path, target)
    for path in (folder / FOLDER).glob("*"):
        if f"{FOLDER}/{path.name}" in text:  # what earlier examples left behind stays there
            (target / FOLDER).mkdir(exist_ok=True)
            shutil.copy(path, target / FOLDER)
    check_card(text, target)


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    max_shard_size: str = "5GB",
    token: str | None = None,
) -> str:
    """Pushes a model with its code, card and endpoint in one commit.

    Args:
        folder: Of the model, as `mdm train` and `save_pretrained` write it.
        repo_id: owner/name, made if it is not there.
        private: Whether a new repository is private.
        revision: Branch, made if it is not there; main if None.
        message: Of the commit.
        max_shard_size: Of a file of weights: what a push that was stopped may have to send again.
        token: The one that `hf auth login` keeps if None.

    Returns:
        The commit's address.

    Raises:
        ValueError: what cannot be pushed as it is: see [`staged`]; a public repository where `private` was asked for.
        OSError: the Hub refuses, or is not reached.
    """
    folder = Path(folder)
    api = HfApi(token=token)
    check_names(repo_id, revision)
    with staged(folder, repo_id, max_shard_size) as target, reaching_the_hub():
        _ask_about_card((target / CARD).read_text(encoding="utf-8"))  # before anything is made there
        try:
            is_public = not api.repo_info(repo_id).private
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private)
        else:
            if private and is_public:
                raise ValueError(
                    f"Got --private for {repo_id}, which is there and public; need a private one; change its settings "
                    "on the Hub, or give another name."
                )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        try:
            done = api.upload_folder(
                repo_id=repo_id,
                folder_path=target,
                revision=revision,
                commit_message=message or f"Upload {folder.resolve().name} with mdm push",
                delete_patterns=list(WEIGHTS),  # of before: model.safetensors would be loaded in place of new shards
            )
        except RuntimeError as error:  # huggingface_hub's, of a file that did not get through
            raise OSError(
                f"Got no further than half of {repo_id} ({error}); need all of its files there, before which "
                "none is visible; push again, what had arrived is not sent again."
            ) from error
    return done.commit_url


def _ask_about_card(text: str) -> None:
    """Has the Hub check a card by its own rules; `ModelCard.validate` of huggingface_hub 1 knows no HF_ENDPOINT."""
    question = {"repoType": "model", "content": text}
    reply = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=question)
    if reply.status_code == 400:
        raise ValueError(f"Got a card that the Hub refuses: {reply.text}; mend {NOTES_FILE} or {CARD}.")
    hf_raise_for_status(reply)


def pull(
    repo_id: str, folder: str | Path, revision: str | None = None, overwrite: bool = False, token: str | None = None
) -> Path:
    """Fetches a whole repository into a folder and checks that it is whole. Runs nothing of what it fetches.

    Args:
        repo_id: owner/name.
        folder: New, or of an earlier pull, which then goes on. A symbolic link is followed.
        revision: Branch, tag or commit; main if None.
        overwrite: Write into a folder that holds other things, but no other weights.
        token: The one that `hf auth login` keeps if None.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds other things, or is none; weights that are missing or not whole.
        OSError: the Hub refuses, or is not reached.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Got {folder} to pull into, which is there and no folder; need a folder; give another name.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_dir() and not overwrite:
        raise ValueError(
            f"Got {folder}, which holds other things than an earlier pull; need a new folder; name one, or give "
            "--overwrite."
        )
    check_names(repo_id, revision)
    with reaching_the_hub():
        # asked first, else what lies in the folder would be taken for it
        there = HfApi(token=token).repo_info(repo_id, revision=revision).siblings or []
        former = _former_weights(folder, {one.rfilename for one in there})
        snapshot_download(repo_id, revision=revision, local_dir=folder, token=token)
    for path in former:
        path.unlink()
    check_weights(folder)
    if (folder / HANDLER.name).is_file() and not has_weights(folder):
        raise ValueError(f"Got {repo_id} with {HANDLER.name} and no weights; need them there; push the model again.")
    return folder


def has_weights(folder: str | Path) -> bool:
    """Whether a folder has weights in safetensors, a model's or an adapter's."""
    return any(Path(folder).glob("*model*.safetensors"))


def _former_weights(folder: Path, there: set[str]) -> list[Path]:
    """Weights and indices that an earlier pull fetched and the repository no longer has: they would be loaded in place
    of its own, as model.safetensors is before shards.

    Raises:
        ValueError: there are others than an earlier pull's.
    """
    former = sorted(path for path in folder.glob("*model*.safetensors*") if path.name not in there)
    if others := [path for path in former if not (folder / MARK / "download" / f"{path.name}.metadata").is_file()]:
        raise ValueError(
            f"Got {folder} with {others[0].name}, which neither the repository has nor a pull has fetched, and which "
            "might be loaded in place of the repository's; need a folder without; move it away, or name another."
        )
    return former


def sizes_on_hub(repo_id: str, revision: str | None = None, token: str | None = None) -> dict[str, int]:
    """Bytes of each file of a repository."""
    check_names(repo_id, revision)
    with reaching_the_hub():
        entries = HfApi(token=token).list_repo_tree(repo_id, recursive=True, revision=revision)
        return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}


def check_names(repo_id: str, revision: str | None = None) -> None:
    """Refuses a repository or a branch that there cannot be.

    Raises:
        ValueError: with what is needed.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"Got the repository {repo_id!r} ({error}); need owner/name.") from error
    if revision is not None and (not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", revision) or ".." in revision):
        raise ValueError(f"Got the revision {revision!r}; need the name of a branch or tag, or a commit.")


@contextmanager
def reaching_the_hub() -> Iterator[None]:
    """Failures of the network as OSError, whichever library of HTTP huggingface_hub was built on."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError | ValueError) or not type(error).__module__.startswith(("httpx", "httpcore")):
            raise
        raise OSError(
            f"Got no answer of the Hub at {constants.ENDPOINT} ({type(error).__name__}: {error}); need a connection; "
            "try again, or set HF_ENDPOINT."
        ) from error


def check_weights(folder: str | Path) -> None:
    """Refuses weights of which a file is missing or not whole.

    Raises:
        ValueError: with the file's name.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    try:
        where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        if any(Path(name).name != name for name in where.values()):
            raise ValueError("it names files elsewhere")
        if index.is_file() and not where:
            raise ValueError("it names no weights")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"Got {index}, which cannot be followed ({error}); need it whole; {AGAIN}") from error
    for name in sorted(set(where.values()) | {path.name for path in folder.glob("*.safetensors")}):
        try:
            with safe_open(folder / name, framework="pt") as file:
                held = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"Got {folder} with a {name} that cannot be read ({error}); need it whole; {AGAIN}"
            ) from error
        if missing := {key for key, file in where.items() if file == name} - held:
            raise ValueError(f"Got {folder} with a {name} without {min(missing)}; need it as its index says; {AGAIN}")
