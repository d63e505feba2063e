"""Data sets on disk or on the Hub as sources of conversations, through `datasets`.

- One call reads Hub ids, parquet, JSON and JSON lines, CSV, WebDataset tars, image folders with metadata.csv or
  metadata.jsonl, and `save_to_disk` folders, as tables or as streams.
- `datasets` never decodes an image: it would crash on a corrupt one. We open it when a task shows it.
"""

import dataclasses
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
from datasets.distributed import split_dataset_by_node
from PIL import Image, ImageOps

from .adapters import ADAPTERS, DEFAULT_TASKS
from .records import TASKS, BadRow, Record, conversation_of, with_images


ON_BAD = ("skip", "refuse")
BUILDERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tar": "webdataset",
}
# What Pillow raises for files that are broken in one way or another.
BROKEN = (OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, EOFError, struct.error, zlib.error)
ROW_KEYS = ("__key__", "id", "question_id", "prompt_id", "image_id", "cocoid", "img_path")  # what a row is called by


class RecordSource:
    """Rows with an adapter, and the tasks that they serve.

    Args:
        rows: A `datasets.Dataset`, a `datasets.IterableDataset`, or a sequence of dicts.
        adapter: A name in `ADAPTERS`, or a function from a row to a [`Record`].
        tasks: Task -> weight; the adapter's own, `DEFAULT_TASKS`, if None.
        on_bad: "skip" counts, reports and replaces a bad row; "refuse" stops at it.
        image_folder: Where relative image paths start, and the names in `latents`.
        image_file: The image's path for rows without one, filled in from the row: "{image_id:012d}.jpg".
        condition_dropout, infill, split: See [`conversation_of`].
        latents: A `LatentCache` whose latents take the place of the images, by their paths under `image_folder`.
        check: Called with the messages of each example; a ValueError makes the row bad. For the price of encoding
            twice, `processor.apply_chat_template` finds what training would stop at: texts too long, control tokens.
    """

    def __init__(
        self,
        rows: datasets.Dataset | datasets.IterableDataset | Sequence[dict],
        adapter: str | Callable[[dict], Record],
        tasks: dict[str, float] | None = None,
        on_bad: str = "skip",
        image_folder: str | Path | None = None,
        image_file: str | None = None,
        condition_dropout: float = 0.1,
        latents: Any = None,
        check: Callable[[list[dict]], Any] | None = None,
        infill: float = 0.0,
        split: Callable[[str], list[str]] | None = None,
    ):
        if isinstance(adapter, str) and adapter not in ADAPTERS:
            raise ValueError(f"Got adapter {adapter!r}; need one of {', '.join(ADAPTERS)}, or a function.")
        if tasks is None and not isinstance(adapter, str):
            raise ValueError("Got a function as adapter and no tasks; name in `tasks` what its records can serve.")
        if on_bad not in ON_BAD:
            raise ValueError(f"Got on_bad {on_bad!r}; need 'skip' or 'refuse'.")
        self.adapter = ADAPTERS[adapter] if isinstance(adapter, str) else adapter
        self.tasks = dict(DEFAULT_TASKS[adapter] if tasks is None and isinstance(adapter, str) else tasks)
        if unknown := sorted(set(self.tasks) - set(TASKS)):
            raise ValueError(f"Got tasks {', '.join(unknown)}; choose among {', '.join(TASKS)}.")
        self.is_streaming = isinstance(rows, datasets.IterableDataset)
        self.on_bad, self.condition_dropout, self.check = on_bad, condition_dropout, check
        self.infill, self.split = infill, split
        self.image_folder, self.image_file = image_folder, image_file
        self.latents = latents
        self._features = None
        if isinstance(rows, datasets.Dataset):
            self._features = _undecoded(rows.features)
            rows = rows.with_format("arrow")
        elif isinstance(rows, datasets.IterableDataset) and rows.features:
            rows = rows.cast(_undecoded(rows.features))  # `decode(False)` would leave JSON undecoded too
        self.rows = rows

    def __len__(self) -> int:
        if self.is_streaming:
            raise TypeError(
                "Got a streaming source, which has no length; use StreamingMix, or read it without streaming."
            )
        return len(self.rows)

    def row(self, index: int) -> dict:
        """Row `index` with its images undecoded."""
        if self._features is None:
            return dict(self.rows[index])
        return self._features.decode_example(self.rows[index].to_pylist()[0])

    def sample(self, index: int, task: str, rng: np.random.Generator) -> dict:
        """The conversation of row `index`. Raises [`BadRow`]."""
        return self.conversation(self.row(index), task, rng)

    def conversation(self, row: dict, task: str, rng: np.random.Generator) -> dict:
        """One example of `task` from `row`, with its images open. Raises [`BadRow`], which names the row."""
        try:
            example = conversation_of(self.record(row), task, rng, self.condition_dropout, self.infill, self.split)
            example = with_images(example, self._opened)
            if self.check is not None:
                self._checked(example["messages"])
        except BadRow as bad:
            named = next((f" ({key} {row[key]})" for key in ROW_KEYS if row.get(key) is not None), "")
            raise BadRow(f"{bad}{named}", bad.kind) from bad
        return example

    def record(self, row: dict) -> Record:
        """What the adapter makes of `row`. Raises [`BadRow`], also for what the adapter stumbles over."""
        try:
            return self.adapter(self._with_image_file(row))
        except BadRow:
            raise
        except (AttributeError, TypeError, LookupError, ValueError) as error:
            raise BadRow(
                f"Got a row that the adapter cannot read ({error!r}); need fields of the kinds it names; mend the "
                "row, or choose another adapter."
            ) from error

    def length(self, index: int) -> int:
        """Letters in row `index`, by which like rows are batched; 0 of a bad row."""
        try:
            return sum(map(len, self.record(self.row(index)).texts()))
        except BadRow:  # counted where it is sampled
            return 0

    def texts(self) -> Iterator[str]:
        """Every text of one pass, to build a tokenizer from; bad rows, counted where they are sampled, have none."""
        for row in self.rows if self.is_streaming else map(self.row, range(len(self))):
            try:
                yield from self.record(row).texts()
            except BadRow:
                continue

    def stream(self, rank: int, world_size: int, workers: int, shuffle: tuple[int, int], epoch: int) -> Iterator[dict]:
        """The rows of one pass, those of this rank and, inside a DataLoader's worker, of this worker alone.

        Args:
            workers: DataLoader workers of a rank, at least 1; `datasets` gives each its share of the rank's shards.
            shuffle: Seed, and how many rows to draw from.
        """
        seed, buffer_size = shuffle
        rows = self.rows.shuffle(seed=seed, buffer_size=buffer_size) if buffer_size > 1 else self.rows
        rows = split_dataset_by_node(rows, rank=rank, world_size=world_size)
        if rows.num_shards < workers:
            raise ValueError(
                f"Got {workers} DataLoader workers for a stream of {rows.num_shards} shard(s) on each of {world_size} "
                "process(es); need at most one worker a shard; set dataloader_num_workers lower, or split the data "
                "into more files."
            )
        rows.set_epoch(epoch)
        yield from rows

    def _with_image_file(self, row: dict) -> dict:
        if self.image_file is None or row.get("image") is not None:
            return row
        try:
            return {**row, "image": self.image_file.format_map(row)}
        except (KeyError, ValueError) as error:
            raise BadRow(
                f"Got image_file {self.image_file!r} and a row with the fields {', '.join(sorted(row))}; need a "
                f"template that those fill ({error!r}).",
                "missing field",
            ) from error

    def _opened(self, image: Any) -> Any:
        if self.latents is None:
            return open_image(image, self.image_folder)
        folder = Path(self.image_folder or "").absolute()
        path = image.get("path") if isinstance(image, dict) else image
        name = Path(os.path.relpath(folder / path, folder)).as_posix() if isinstance(path, str) else None
        index = None if name is None else self.latents.index_of(name)
        if index is None:
            raise BadRow(
                f"Got the image {path!r}, {name} from {folder}, of which {self.latents.folder} has no latents; need "
                "them for every image, by its path under `image_folder`; run mdm cache-latents on that folder.",
                "missing image",
            )
        return self.latents[index]

    def _checked(self, messages: list[dict]) -> None:
        try:
            self.check(messages)
        except ValueError as error:
            raise BadRow(str(error), "refused") from error


def read_source(
    path: str | Path,
    adapter: str | Callable[[dict], Record],
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    data_files: Any = None,
    streaming: bool = False,
    tasks: dict[str, float] | None = None,
    on_bad: str = "skip",
    image_folder: str | Path | None = None,
    image_file: str | None = None,
    condition_dropout: float = 0.1,
    latents: Any = None,
    check: Callable[[list[dict]], Any] | None = None,
    infill: float = 0.0,
    split_text: Callable[[str], list[str]] | None = None,
    **load_options: Any,
) -> RecordSource:
    """Reads a data set.

    Args:
        path: A Hub id; a folder that `datasets` knows (images, parquet, JSON, tars, or written by `save_to_disk`); a
            file by its ending (.parquet, .json, .jsonl, .csv, .tar), with wildcards if you like; or the name of a
            builder of `datasets`, with `data_files`.
        split: As `datasets` writes it: "train", "train[:10%]"; a file alone is "train".
        name, revision, data_files, load_options: As for `datasets.load_dataset`: `field`, `data_dir`, `cache_dir`,
            `token`, `num_proc`, ...
        streaming: Read row by row, for [`StreamingMix`]; else as a table on disk, for [`ConversationMix`].
        adapter, tasks, on_bad, image_folder, image_file, condition_dropout, latents, check, infill: See
            [`RecordSource`]. With `latents` alone, `image_folder` is `path` where that is a folder.
        split_text: Its `split`, which is the name of something else here.

    Returns:
        A source for a mix.

    Raises:
        ValueError: there is no such data set, split or adapter, with what was got, what is needed, what to do.
    """
    path = os.fspath(path)
    if latents is not None and image_folder is None and Path(path).is_dir():
        image_folder = path
    try:
        if _is_saved(path):
            rows = _saved(path, split)
            rows = rows.to_iterable_dataset(num_shards=max(1, min(64, len(rows)))) if streaming else rows
        else:
            ending = Path(path).suffix.lower()
            is_file = data_files is None and ending in BUILDERS
            rows = datasets.load_dataset(
                BUILDERS[ending] if is_file else path,
                name,
                split=split,
                revision=revision,
                data_files=path if is_file else data_files,
                streaming=streaming,
                **load_options,
            )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"Got path {path!r}, name {name!r}, split {split!r}, which cannot be read ({error}); need a Hub id, a "
            "folder or a file of data; check the spelling, and for a Hub repository that is a script try "
            "revision='refs/convert/parquet'."
        ) from error
    given = adapter, tasks, on_bad, image_folder, image_file, condition_dropout, latents, check, infill, split_text
    return RecordSource(rows, *given)


def open_image(image: Any, image_folder: str | Path | None = None) -> Image.Image:
    """A PIL image, a path, bytes, or {"bytes", "path"} -> a PIL image, all of it read, upright as EXIF has it.

    Raises:
        BadRow: there is no such file, or Pillow cannot read all of it.
    """
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (None, image)
    label = f"the image {path!r}" if isinstance(path, str) else "an image"
    try:
        if data is None and path is None:
            raise ValueError("neither a path nor bytes")
        if data is None and isinstance(path, str | os.PathLike):
            data = _read(os.fspath(path), image_folder)
    except (OSError, ValueError) as error:
        raise BadRow(
            f"Got {label}, which cannot be read ({error}); need a file; set `image_folder`, or drop the row.",
            "missing image",
        ) from error
    try:
        opened = path if isinstance(path, Image.Image) else Image.open(BytesIO(path if data is None else data))
        opened.load()
        return ImageOps.exif_transpose(opened)
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise BadRow(
            f"Got {label}, which Pillow cannot read ({error}); need a whole image file; mend it, or drop the row.",
            "corrupt image",
        ) from error


def _read(path: str, image_folder: str | Path | None) -> bytes:
    if "://" in path:
        with fsspec.open(path, "rb") as file:
            return file.read()
    return (Path(image_folder or "") / path).read_bytes()


def _is_saved(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved(path: str, split: str) -> datasets.Dataset:
    """What `save_to_disk` wrote; of several splits the one asked for."""
    saved = datasets.load_from_disk(path)
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ValueError(f"Got split {split!r}; the folder has {', '.join(saved)}; name one of those.")
    return saved[split]


def _undecoded(feature: Any) -> Any:
    """`feature` with every image, sound or video in it left as bytes and path."""
    if isinstance(feature, dict):
        return type(feature)({name: _undecoded(one) for name, one in feature.items()})
    if isinstance(feature, list):
        return [_undecoded(one) for one in feature]
    if isinstance(feature, datasets.List | datasets.LargeList):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
        return dataclasses.replace(feature, decode=False)
    return feature
