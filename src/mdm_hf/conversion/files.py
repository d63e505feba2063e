"""What conversions read and write: weights out of files that may be anybody's, folders that are whole or not there.

- A pickle is read with `weights_only=True`, after a look at what it asks for: `ASKED_FOR` is all that state dicts
  need. torch itself would also make a bytearray of any size.
- A `.pt` of torch is an archive of uncompressed records, which are mapped into memory, not copied.
- What is written lies in a folder beside its place until it is whole.
"""

import io
import json
import pickle
import pickletools
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .keys import some


PICKLES = (".pt", ".pth", ".bin", ".ckpt")
ASKED_FOR = re.compile(
    r"collections (OrderedDict|Counter)|_codecs encode|builtins (set|complex)|__builtin__ (set|complex)"
    r"|torch (Size|device|(b?float|u?int|bool|complex)\d*|[A-Z][A-Za-z0-9]*Storage)|torch\.storage UntypedStorage"
    r"|torch\._utils _rebuild_(tensor_v[23]|parameter|parameter_with_state)|torch\.nn\.parameter Parameter"
)


def read_pickle(path: Path) -> Any:
    """What a `.pt` holds: tensors, numbers, texts, and lists and dicts of them; tensors on the CPU, mapped.

    Raises:
        ValueError: it is no such archive, it is not whole, or it asks for more.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            asked = _asked_for(archive, records)
    except OSError:
        raise
    except Exception as error:  # zipfile and pickletools raise whatever a damaged file makes of them
        raise ValueError(
            f"Got {path}, which is no archive of torch.save ({error}); need one as torch writes since 1.6; load and "
            "save it again there if it is older."
        ) from error
    unpacked = sum(record.file_size for record in records)
    if unpacked > path.stat().st_size or any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError(
            f"Got {path} with records of {unpacked} bytes in all, packed, or more than the file has; need it as "
            "torch.save writes it, unpacked and whole."
        )
    if unknown := {name for name in asked if not ASKED_FOR.fullmatch(name)}:
        raise ValueError(
            f"Got {path}, which asks for {some(unknown)}: it could run code and was not loaded; need state dicts "
            "alone, tensors, numbers and texts; save those, options as a dict."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Got {path}, which is not whole or holds more than tensors, numbers and texts: it could run code and was "
            f"not loaded ({str(error).splitlines()[0]}); need state dicts alone; save those, options as a dict."
        ) from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in whatever it was about to do: torch names no class for it
        raise ValueError(f"Got {path}, which is damaged ({type(error).__name__}: {error}); need it whole.") from error


def _asked_for(archive: zipfile.ZipFile, records: list[zipfile.ZipInfo]) -> set[str]:
    """Names of what the archive's pickle would import, "module name" each; runs nothing of it."""
    pickled = [record for record in records if re.fullmatch(r"[^/]*/data\.pkl", record.filename)]
    if len(pickled) != 1 or pickled[0].file_size > pickled[0].compress_size:
        raise ValueError(f"{len(pickled)} whole data.pkl in it")
    operations = pickletools.genops(io.BytesIO(archive.read(pickled[0])))
    return {str(argument) for operation, argument, _ in operations if operation.name in ("GLOBAL", "INST")}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file.

    Raises:
        ValueError: it is not whole.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # safetensors and torch raise a dozen classes for headers that are wrong
        raise ValueError(f"Got {path}, of which no tensors can be read ({error}); need it whole.") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Raises:
        ValueError: it is not whole, or no dict of tensors.
    """
    return tensors_of(read_pickle(path), path) if path.suffix in PICKLES else read_safetensors(path)


def read_folder(folder: Path, names: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")) -> dict[str, Tensor]:
    """The tensors of a folder: of the first of these files that it has, whole or in the shards of its index.

    Raises:
        ValueError: it has none, or one is not whole.
    """
    for name in names:
        if (folder / name).is_file():
            return read_weights(folder / name)
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(_is_beside(folder, shard) for shard in shards.values()):
            raise ValueError(f"Got {index}, whose weight_map does not name files beside it; need it whole.")
        weights: dict[str, Tensor] = {}
        for shard in sorted(set(shards.values())):
            weights |= read_weights(folder / shard)
        return weights
    raise ValueError(f"Got {folder} without weights; need {' or '.join(names)} in it; check the folder.")


def _is_beside(folder: Path, name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name and (folder / name).is_file()


def read_json(path: Path) -> dict[str, Any]:
    """The dict in a JSON file.

    Raises:
        ValueError: it is not whole, or no dict.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Got {path}, which is no JSON ({error}); need it whole.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"Got {path} with a {type(fields).__name__}; need fields by name; check the file.")
    return fields


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
    return dict(given)


def check_place(target: Path, overwrite: bool = False, *needed: Path) -> None:
    """Refuses a place to write to that is taken, or that cannot go without taking what is needed along.

    Args:
        needed: What is read. A folder that holds it, or this process, is not replaced; nor is one inside it.

    Raises:
        ValueError: there is something at `target`, or `target` and what is needed lie inside each other.
    """
    is_used = target.is_file() or target.is_dir() and any(target.iterdir())
    if is_used and not overwrite:
        raise ValueError(f"Got {target} to write, which is there; need a new name; give one, or --overwrite.")
    place = target.resolve()
    for other in (one.resolve() for one in needed):
        if place in other.parents or place != other and other.is_dir() and other in place.parents:
            raise ValueError(f"Got {target} to write and {other} to read, one inside the other; need a place outside.")
    if is_used and Path.cwd().is_relative_to(place):
        raise ValueError(f"Got {target} to overwrite, where this runs; need another folder, or run it elsewhere.")


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that takes the place of `target` when the block ends well, and is gone else.

    Raises:
        ValueError: `target` is there, and not empty, and not to be overwritten.
    """
    with _unfinished(target, overwrite) as (made, before):
        made.mkdir()
        yield made
        if target.is_dir():
            target.rename(before)
        try:
            made.rename(target)
        except OSError:
            if before.exists():
                before.rename(target)
            raise


@contextmanager
def new_file(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """As `new_folder`, for a file."""
    with _unfinished(target, overwrite) as (made, _):
        yield made
        made.replace(target)


@contextmanager
def _unfinished(target: Path, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """Where to make what is to stand at `target`, and where to put what stands there, in a folder beside it."""
    check_place(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    made, before = beside / target.name, beside / "before"
    try:
        yield made, before
    finally:
        if target.exists() or not before.exists():  # else it is all that is left of what was there
            shutil.rmtree(beside, ignore_errors=True)
