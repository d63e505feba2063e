"""Several sources and tasks as one stream of training examples, the same whenever and wherever it is drawn.

- Each batch is of one source and one task, drawn by weight from (seed, number of the batch).
- A source's rows come in an order of their own for each pass over them; example n depends on (seed, n) alone, so a
  resumed run sees what the first would have seen.
- A bad row is counted, reported and replaced by the next good one of its source, or stops the run, as the source says.
- [`ConversationMix`] draws from tables, by number; [`StreamingMix`] from streams, in the order of their files.
"""

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers.utils import logging

from .records import BAD_KINDS, TASKS, BadRow


logger = logging.get_logger(__name__)

WARN_FIRST = 5  # bad rows of a source that each process names; then only totals, at each power of ten
GIVE_UP_AFTER = 1000  # bad rows of a source without a good one between
SLOTS = 257  # of the table of counts: the main process and up to 256 workers write without a lock


class Source(Protocol):
    """What a mix draws from; [`RecordSource`] is one."""

    tasks: dict[str, float]
    on_bad: str
    is_streaming: bool

    def __len__(self) -> int: ...

    def length(self, index: int) -> int: ...

    def texts(self) -> Iterator[str]: ...

    def sample(self, index: int, task: str, rng: np.random.Generator) -> dict: ...


class _Mix:
    """What both mixes share: which source and task a batch has, and the account of bad rows."""

    def __init__(
        self,
        sources: Mapping[str, Any],
        batch_size: int,
        seed: int,
        weights: Mapping[str, float] | None,
        task_starts: Mapping[str, int] | None,
    ):
        if not sources or not isinstance(sources, Mapping):
            raise ValueError(f"Got sources {sources!r}; need a dict of name -> source, at least one.")
        if batch_size < 1:
            raise ValueError(f"Got batch_size {batch_size}; need at least 1.")
        self.sources, self.batch_size, self.seed = dict(sources), batch_size, seed
        self.weights = dict.fromkeys(sources, 1.0) if weights is None else dict(weights)
        self.task_starts = dict(task_starts or {})
        if set(self.weights) != set(self.sources):
            raise ValueError(
                f"Got weights for {', '.join(self.weights)} and the sources {', '.join(self.sources)}; need a weight "
                "for each source."
            )
        named = {task for source in self.sources.values() for task in source.tasks}
        if unknown := sorted((named | set(self.task_starts)) - set(TASKS)):
            raise ValueError(f"Got task weights or starts for {', '.join(unknown)}; choose among {', '.join(TASKS)}.")
        for name, given in [("sources", self.weights), *((n, s.tasks) for n, s in self.sources.items())]:
            if not given or min(given.values()) < 0 or sum(given.values()) <= 0:
                raise ValueError(
                    f"Got weights {dict(given)} for {name}; need weights of 0 or more, one of them positive."
                )
        self._known_choices: dict[tuple[str, ...], tuple[list[tuple[str, str]], np.ndarray]] = {}
        if not self._choices(0)[0]:
            raise ValueError(f"Got task_starts {task_starts}; need a task of positive weight that starts at 0.")
        self._counts = torch.zeros(SLOTS, len(self.sources), len(BAD_KINDS), dtype=torch.int64).share_memory_()
        self._warned = dict.fromkeys(self.sources, 0)

    def report(self) -> dict[str, dict[str, int]]:
        """Source -> kind -> how many times a bad row was met, in all workers; a row met in two passes counts twice."""
        totals = self._counts.sum(0).tolist()
        return {
            name: {kind: n for kind, n in zip(BAD_KINDS, row, strict=True) if n}
            for name, row in zip(self.sources, totals, strict=True)
        }

    def choice(self, number: int) -> tuple[str, str]:
        """Source and task of batch `number`."""
        choices, ends = self._choices(number * self.batch_size)
        draw = np.random.default_rng((self.seed, 0, number)).random()
        return choices[min(int(np.searchsorted(ends, draw, side="right")), len(choices) - 1)]

    def _choices(self, index: int) -> tuple[list[tuple[str, str]], np.ndarray]:
        """Sources and tasks that have started by example `index`, and where each one's share of [0, 1) ends."""
        started = tuple(t for t in TASKS if index >= self.task_starts.get(t, 0))
        if started in self._known_choices:
            return self._known_choices[started]
        tasks = {
            name: [t for t in started if self.weights[name] > 0 and source.tasks.get(t, 0) > 0]
            for name, source in self.sources.items()
        }
        names = [name for name in tasks if tasks[name]]
        total = sum(self.weights[name] for name in names)
        shares = [np.zeros(0)]
        for name in names:
            own = np.array([self.sources[name].tasks[task] for task in tasks[name]], dtype=np.float64)
            shares.append(self.weights[name] / total * (own / own.sum()))
        choices = [(name, task) for name in names for task in tasks[name]]
        self._known_choices[started] = choices, np.cumsum(np.concatenate(shares))
        return self._known_choices[started]

    def _bad(self, name: str, where: str, bad: BadRow, in_a_row: int) -> None:
        """Counts and reports a bad row; raises if its source refuses such rows, or has nothing else."""
        if self.sources[name].on_bad == "refuse":
            raise ValueError(f"Bad row: {where} of {name}: {bad} Or read it with on_bad='skip'.") from bad
        info, source = get_worker_info(), list(self.sources).index(name)
        slot = 0 if info is None else 1 + info.id % (SLOTS - 1)
        self._counts[slot, source, BAD_KINDS.index(bad.kind)] += 1
        total = int(self._counts[:, source].sum())
        if self._warned[name] < WARN_FIRST:
            self._warned[name] += 1
            logger.warning(f"Skipped {where} of {name}, {bad.kind}: {bad}")
        elif str(total).strip("0") == "1":
            logger.warning(f"Skipped {total} rows of {name} so far: {self.report()[name]}")
        if in_a_row >= GIVE_UP_AFTER:
            raise self._exhausted(name, in_a_row, bad) from bad

    def _exhausted(self, name: str, in_a_row: int, bad: BadRow) -> ValueError:
        return ValueError(
            f"Got {in_a_row} bad rows of {name} and no good one between; need at least one; the last: {bad} Check the "
            f"adapter and `image_folder`; counted so far: {self.report()[name]}."
        )


class ConversationMix(_Mix, Dataset):
    """`num_samples` conversations from several tables, in batches of one source and one task when read in order.

    Args:
        sources: Name -> source.
        num_samples: Length of the data set.
        batch_size: Runs of this many examples share source and task: the batch size of a device.
        seed: With the index, determines an example.
        weights: Name -> weight; alike if None. The weights within a source are its `tasks`.
        task_starts: Task -> the first example that can be of it; 0 where it is not named.
        length_groups: Batches of a source whose rows are sorted by length before they are dealt out, so that a batch
            pads little; 1 leaves the rows as they come.

    Raises:
        ValueError: sources, weights or starts that give nothing to draw; later, a bad row that its source refuses, or
            a source of nothing but bad rows.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        num_samples: int,
        batch_size: int,
        seed: int = 0,
        weights: Mapping[str, float] | None = None,
        task_starts: Mapping[str, int] | None = None,
        length_groups: int = 1,
    ):
        super().__init__(sources, batch_size, seed, weights, task_starts)
        if num_samples < 0:
            raise ValueError(f"Got num_samples {num_samples}; need at least 0.")
        if length_groups < 1:
            raise ValueError(f"Got length_groups {length_groups}; need 1, for no sorting, or more.")
        for name, source in self.sources.items():
            if source.is_streaming:
                raise ValueError(f"Got the streaming source {name}; use StreamingMix, or read it without streaming.")
            if len(source) == 0:
                raise ValueError(f"Got the source {name} without rows; need at least one; check its path and split.")
        self.num_samples, self.length_groups = num_samples, length_groups
        self._sorted: dict[tuple[str, int], np.ndarray] = {}  # the group last used of each source
        self._before: list[int] = []  # per batch: earlier ones of the same source
        self._seen = dict.fromkeys(self.sources, 0)

    def __len__(self) -> int:
        return self.num_samples

    def task_of(self, index: int) -> str:
        """The task of example `index`, the same throughout its batch."""
        return self.choice(index // self.batch_size)[1]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"Got index {index}; the data set has {self.num_samples} samples.")
        number, place = divmod(index, self.batch_size)
        name, task = self.choice(number)
        source = self.sources[name]
        place = self._dealt(name, self._earlier(number) * self.batch_size + place)
        epoch, position = divmod(place, len(source))
        order = self._order_of(name, epoch)
        rng = np.random.default_rng((self.seed, 1, index))
        tries = min(len(source), GIVE_UP_AFTER)
        for step in range(tries):
            row = int(order[(position + step) % len(source)])
            try:
                return source.sample(row, task, rng)
            except BadRow as bad:
                self._bad(name, f"row {row}", bad, step + 1)
                last = bad
        raise self._exhausted(name, tries, last) from last

    def _order_of(self, name: str, epoch: int) -> np.ndarray:
        return _order(len(self.sources[name]), (self.seed, 2, list(self.sources).index(name), epoch))

    def _dealt(self, name: str, place: int) -> int:
        """Which of a source's rows, in the order of its passes, is its example number `place`."""
        if self.length_groups == 1:
            return place
        size, source = self.length_groups * self.batch_size, self.sources[name]
        group, inside = divmod(place, size)
        if (name, group) not in self._sorted:
            self._sorted = {key: value for key, value in self._sorted.items() if key[0] != name}
            passes = [divmod(group * size + i, len(source)) for i in range(size)]
            lengths = [source.length(int(self._order_of(name, epoch)[at])) for epoch, at in passes]
            by_length = np.argsort(lengths, kind="stable").reshape(self.length_groups, self.batch_size)
            rng = np.random.default_rng((self.seed, 3, list(self.sources).index(name), group))
            self._sorted[name, group] = rng.permutation(by_length).reshape(-1)
        return group * size + int(self._sorted[name, group][inside])

    def _earlier(self, number: int) -> int:
        """How many batches before batch `number` are of its source."""
        if len(self.sources) == 1:
            return number
        while len(self._before) <= number:
            name = self.choice(len(self._before))[0]
            self._before.append(self._seen[name])
            self._seen[name] += 1
        return self._before[number]


@lru_cache(maxsize=16)
def _order(length: int, seed: tuple[int, ...]) -> np.ndarray:
    """The order of one pass over a source: (length,)."""
    return np.random.default_rng(seed).permutation(length)


class StreamingMix(_Mix, IterableDataset):
    """Conversations from several streams without end, in batches of one source and one task.

    Every process and every DataLoader worker reads its own part of each stream: no row is read twice in a pass, none
    is left out. Examples depend on the seed, and on how many processes and workers there are.

    Args:
        sources: Name -> source read with streaming=True.
        batch_size: The batch size of a device, which must be that of the DataLoader.
        seed, weights, task_starts: As for [`ConversationMix`].
        shuffle_buffer: Rows to draw the next one from; 1 keeps the order of the files.
        rank, world_size: Which of how many processes this is; as torchrun's environment has it if None.
    """

    splits_by_rank = True  # accelerate must not split it once more: MDMTrainer looks for this

    def __init__(
        self,
        sources: Mapping[str, Any],
        batch_size: int,
        seed: int = 0,
        weights: Mapping[str, float] | None = None,
        task_starts: Mapping[str, int] | None = None,
        shuffle_buffer: int = 1000,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        super().__init__(sources, batch_size, seed, weights, task_starts)
        for name, source in self.sources.items():
            if not source.is_streaming:
                raise ValueError(
                    f"Got the source {name}, a table; use ConversationMix, or read it with streaming=True."
                )
        self.shuffle_buffer = shuffle_buffer
        self.rank = int(os.environ.get("RANK", 0)) if rank is None else rank
        self.world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        streams = {name: self._rows(name, workers) for name in self.sources}
        for number in count(self.rank * workers + worker, self.world_size * workers):
            name, task = self.choice(number)
            for index in range(number * self.batch_size, (number + 1) * self.batch_size):
                yield self._next(name, task, streams[name], np.random.default_rng((self.seed, 1, index)))

    def _next(self, name: str, task: str, rows: Iterator[tuple[str, dict]], rng: np.random.Generator) -> dict:
        in_a_row = 0
        while True:
            where, row = next(rows)
            try:
                return self.sources[name].conversation(row, task, rng)
            except BadRow as bad:
                in_a_row += 1
                self._bad(name, where, bad, in_a_row)

    def _rows(self, name: str, workers: int) -> Iterator[tuple[str, dict]]:
        """Pass after pass over this worker's part of a stream, each row with words for where it stands."""
        shuffle = (self.seed, self.shuffle_buffer)
        for epoch in count():
            number = -1
            rows = self.sources[name].stream(self.rank, self.world_size, workers, shuffle, epoch)
            for number, row in enumerate(rows):
                yield f"row {number} of pass {epoch}", row
            if number < 0:
                raise ValueError(
                    f"Got no row of {name} for process {self.rank} of {self.world_size} with {workers} worker(s); "
                    "need at least one each; read with fewer, or check the path and split."
                )
