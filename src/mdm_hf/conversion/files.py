"""What conversions read and write: weights out of files that may be anybody's, folders that are whole or not there.

- A pickle is read with `weights_only=True`: it runs nothing, and one that asks for more than tensors is refused.
- A `.pt` of torch is an archive of uncompressed records. One whose records are longer than the file itself is refused
  before anything is read of it.
- What is written lies in a folder beside its place until it is whole, and is then as open to others as the umask says.
"""

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp, mkstemp
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def read_pickle(path: Path) -> Any:
    """What a `.pt` holds: tensors, numbers, texts, and lists and dicts of them; tensors on the CPU.

    Raises:
        ValueError: it is no such archive, it is not whole, or it asks for code to be run.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise ValueError(
            f"Got {path}, which is no archive of torch.save ({error}); need one as torch writes since 1.6; load and "
            "save it again there if it is older."
        ) from error
    if unpacked > path.stat().st_size:
        raise ValueError(f"Got {path} with records of {unpacked} bytes in all, more than the file has; need it whole.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))  # the rest of torch's words tells how to run it all the same
        why = f"it asks for {asked[1]}, which could run code, and was not loaded" if asked else "it was not loaded"
        raise ValueError(
            f"Got {path}, which is not whole or holds more than tensors, numbers and texts: {why}; need state dicts "
            "alone; save those, options as a dict."
        ) from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in whatever it was about to do: torch names no class for it
        raise ValueError(f"Got {path}, which is damaged ({type(error).__name__}: {error}); need it whole.") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file.

    Raises:
        ValueError: it is not whole.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"Got {path}, of which no tensors can be read ({error}); need it whole.") from error


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder, from the files that transformers would load.

    Those are `model.safetensors`, or the shards that its index names; else `pytorch_model.bin`, or its shards; else
    the only `.safetensors` or `.bin` that there is. What lies beside them, of an earlier saving say, is not read.

    Raises:
        ValueError: there are none, several that could be meant, an index that cannot be followed, or one is not whole.
    """
    weights: dict[str, Tensor] = {}
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return _read(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            for shard, names in _shards(index).items():
                held = _read(folder / shard)
                if missing := [one for one in names if one not in held]:
                    raise ValueError(f"Got {folder / shard} without {missing[0]}, which {index.name} says it has.")
                weights |= {one: held[one] for one in names}
            return weights
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if len(found) != 1:
        listed = ", ".join(path.name for path in found[:4]) or "no weights"
        raise ValueError(
            f"Got {folder} with {listed}; need model.safetensors, its shards with their index, or one file of "
            "weights; check the folder, or name the file."
        )
    return _read(found[0])


def _read(path: Path) -> dict[str, Tensor]:
    return read_safetensors(path) if path.suffix == ".safetensors" else tensors_of(read_pickle(path), path)


def _shards(index: Path) -> dict[str, list[str]]:
    """File -> names of its weights, as an index has them."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str]] = {}
        if not places:
            raise ValueError("it names no weights")
        for name, shard in places.items():
            if Path(shard).name != shard or not (index.parent / shard).is_file():
                raise ValueError(f"{shard!r} is no file beside it")
            shards.setdefault(shard, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"Got {index}, which cannot be followed ({error}); need it and all its shards.") from error
    return shards


def tensors_of(given: Any, where: Any) -> dict[str, Tensor]:
    """A state dict, checked to be one.

    Raises:
        ValueError: it is no dict of tensors by name.
    """
    if not isinstance(given, dict) or not given:
        raise ValueError(f"Got {where} with {type(given).__name__} for weights; need a dict of tensors by name.")
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"Got {where} with {name!r}: {type(value).__name__}; need tensors by name, nothing else.")
        is_dense = value.layout == torch.strided and not value.is_meta
        if is_dense and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(
                f"Got {where} with {name} of shape {list(value.shape)}, of which the file has "
                f"{value.untyped_storage().nbytes()} bytes, told to repeat; need all of it; save a contiguous copy."
            )
    return dict(given)


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well, and is gone else.

    What was there is put aside first and deleted at last: it comes back if its place cannot be taken.

    Raises:
        ValueError: `target` is there, and not empty, and not to be overwritten; or it is no place for a folder.
    """
    target = _free(target, overwrite, is_folder=True)
    unfinished = Path(mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    aside = unfinished.with_name(f"{unfinished.name}-before")
    try:
        yield unfinished
        _open_as_others(unfinished)
        _check_unused(target, overwrite)
        if target.is_dir():
            target.rename(aside)
        try:
            unfinished.rename(target)
        except OSError:
            if aside.is_dir():
                aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def new_file(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """As `new_folder`, for a file."""
    target = _free(target, overwrite, is_folder=False)
    handle, name = mkstemp(prefix=f".{target.name}-", dir=target.parent)  # of its own: another may write here as well
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        _open_as_others(unfinished)
        _check_unused(target, overwrite)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _open_as_others(made: Path) -> None:
    """Gives a file, or a folder with all in it, the modes that the umask asks for: what was made as temporary, weights
    among it, is its owner's alone, what was copied has another's."""
    with TemporaryDirectory(prefix=f".{made.name}-", dir=made.parent) as name:  # the umask itself cannot be read alone
        probe = Path(name)
        (probe / "folder").mkdir()
        (probe / "file").touch()
        modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in probe.iterdir()}
    for path in (made, *made.rglob("*")):
        path.chmod(modes[path.is_dir()])


def _free(target: Path, overwrite: bool, is_folder: bool) -> Path:
    """The whole path of `target`, and its parent there."""
    wanted = "folder" if is_folder else "file"
    whole = target.absolute()
    if whole.is_symlink():
        raise ValueError(
            f"Got {target} to write, which is a symbolic link to {whole.readlink()}; need a {wanted} itself, since "
            "what is made is moved into its place at last, and would replace the link and leave what it points to as "
            f"it was; give {whole.resolve()}, or another name."
        )
    _check_unused(target, overwrite)
    if whole.exists() and not (whole.is_dir() if is_folder else whole.is_file()):
        raise ValueError(f"Got {target} to write, which is there and no {wanted}; need a {wanted}; give another name.")
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{whole.name}-", dir=whole.parent):
            return whole
    except OSError as error:
        raise type(error)(
            f"Got {target} to write, but nothing can be made in {whole.parent} ({error.strerror}); need a place that "
            "one may write to; give another name."
        ) from error


def _check_unused(target: Path, overwrite: bool) -> None:
    """Asked before anything is made, and again before it takes its place: another may have been faster."""
    if not overwrite and (target.is_file() or (target.is_dir() and any(target.iterdir()))):
        raise ValueError(f"Got {target} to write, which is there; need a new name; give one, or --overwrite.")


def check_shard_size(given: str | int) -> None:
    """Refuses what is no size of a file, "2GB" or a number of bytes, before anything is read or made for it.

    Raises:
        ValueError: it is none.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[KMGT]B", str(given).strip(), re.IGNORECASE)
    if not (float(size[1]) > 0 if size else type(given) is int and given > 0):
        raise ValueError(
            f"Got --max-shard-size {given!r}; need a number above 0 with KB, MB, GB or TB, such as 2GB; give that."
        )


def check_apart(target: Path, *others: Path) -> None:
    """Refuses a target that is one of `others`, or that one of them, or the current folder, lies in.

    Raises:
        ValueError: it is; or it has no name.
    """
    if str(target) in ("", "."):
        raise ValueError(f"Got {str(target)!r} to write; need the name of a new file or folder; give one.")
    whole = target.resolve()
    for other in (*others, Path.cwd()):
        if whole == other.resolve() or whole in other.resolve().parents:
            raise ValueError(f"Got {target} to write, in which {other} is; need a place beside it; give another name.")
