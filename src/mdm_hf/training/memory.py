"""How much memory will a training run take, and how long a step? Known before the run, from a probe of seconds.

Weights, gradients, optimiser states and the average are counted. What a step holds beside them, activations and
scratch, is measured on two models cut to one and to two blocks, at the batch's own shape or two smaller ones, and is
linear in blocks and rows. The full model is never built.
"""

import copy
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import initialization as init

from ..configuration_mdm import MDMConfig
from ..modeling_mdm import MDMForMultiModalGeneration


GIB = 2**30
ADAM_STATES = 2
TIMED = 3  # steps, of which the fastest counts; one if it takes a second


@dataclass
class TrainingEstimate:
    """What one training step of one process takes.

    Args:
        parameters, trainable: Numbers of them.
        tokens_per_step: Positions of all processes' batches, padding included.
        weights, gradients, optimizer, average: Bytes, all processes' shares together.
        activations: Bytes that one process holds at the end of the forward pass, scratch included.
        one_block: As `activations`, of one block: what is left of them at the end of the backward pass.
        seconds_per_step: On this machine; without the optimiser's work.
        processes: Over which FSDP2 shards weights, gradients, optimiser and average; 1 without it.
        largest_block: Bytes of the largest group of weights that FSDP2 gathers at once.
        own: Bytes that Python and its libraries hold; 0 on a GPU, of whose memory they take none.
    """

    parameters: int
    trainable: int
    tokens_per_step: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    one_block: int
    seconds_per_step: float
    processes: int = 1
    largest_block: int = 0
    own: int = 0

    @property
    def peak(self) -> int:
        """Bytes of one process at its fullest: when the backward pass starts, or when it ends."""
        kept = (self.weights + self.optimizer + self.average) // self.processes
        gathered = 2 * self.largest_block if self.processes > 1 else 0
        return self.own + kept + gathered + max(self.activations, self.gradients // self.processes + self.one_block)

    def __str__(self) -> str:
        shared = f", of which each of {self.processes} processes holds its share" if self.processes > 1 else ""
        return "\n".join(
            [
                f"parameters        {self.parameters:,}, {self.trainable:,} of them trained",
                f"tokens per step   {self.tokens_per_step:,}",
                f"memory            {self.peak / GIB:.2f} GiB at the peak of a process, {self.own / GIB:.2f} of it "
                "Python's own",
                f"  weights         {self.weights / GIB:.2f} GiB, gradients {self.gradients / GIB:.2f}, optimizer "
                f"{self.optimizer / GIB:.2f}, average {self.average / GIB:.2f}{shared}",
                f"  activations     {self.activations / GIB:.2f} GiB",
                f"time per step     {self.seconds_per_step:.2f} s here",
            ]
        )


class _LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def _free(self, key: int, size: int):
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inside = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._known or key in inside:
                continue
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._free, key, size)
        self.peak = max(self.peak, self.now)
        return result


def _build(config: MDMConfig, device: torch.device, dtype: torch.dtype, prepare: Callable) -> torch.nn.Module:
    """A model whose weights hold anything: only their shapes matter."""
    with torch.device(device), init.no_init_weights():
        model = MDMForMultiModalGeneration(config).to(dtype).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    return prepare(model)


def _probe(model, batch: dict[str, Tensor], autocast: torch.dtype | None) -> tuple[int, float]:
    """(bytes, seconds) of a forward and backward pass; each gradient is dropped as soon as it is whole."""

    def drop(parameter):
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters() if p.requires_grad]
    device = next(model.parameters()).device

    def step():
        with torch.autocast(device.type, dtype=autocast) if autocast else nullcontext():
            loss = model(**batch).loss
        loss.backward()

    step()  # warms up
    times = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    for _ in range(TIMED):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
        if sum(times) > 1:
            break
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with _LiveBytes() as live:
            step()
        peak = live.peak
    for handle in handles:
        handle.remove()
    return peak, min(times)


def _seconds(values: dict[tuple[int, int], float], blocks: int, rows: int) -> float:
    """Seconds of (1 or 2 blocks, more rows) at (blocks, rows): linear in blocks, and as rows grow from the most probed
    in proportion to them, which a GPU that they do not fill would undercut."""
    most = max(row for _, row in values)
    one, two = values[1, most], values[2, most]
    return (one + (blocks - 1) * max(two - one, 0.0)) * rows / most


def _linear(values: dict[tuple[int, int], float], blocks: int, rows: int) -> float:
    """The bilinear function through `values` at (1 or 2 blocks, a or b rows), at (blocks, rows)."""
    a, b = min(row for _, row in values), max(row for _, row in values)
    share = (rows - a) / (b - a) if b > a else 0.0
    one, two = (values[n, a] + share * (values[n, b] - values[n, a]) for n in (1, 2))
    return one + (blocks - 1) * (two - one)


def largest_batch(config: MDMConfig, rows: int, image_grid: tuple[int, int], text_tokens: int) -> dict[str, Tensor]:
    """A batch of rows that target an image of `image_grid` patches and a text of `text_tokens` tokens, made up."""
    c, (height, width) = config, image_grid
    word = max(config.special_token_ids) + 1
    row = [c.class_token_id, c.assistant_token_id]
    row += [
        c.time_image_token_id,
        c.image_start_token_id,
        *[c.image_token_id] * (height * width),
        c.image_end_token_id,
    ]
    row += [c.time_text_token_id, c.text_start_token_id, *[word] * text_tokens, c.text_end_token_id]
    input_ids = torch.tensor([row] * rows)
    is_text = input_ids == word
    sides = height * c.vae_config.patch_size, width * c.vae_config.patch_size
    return {
        "input_ids": input_ids,
        "target_mask": (is_text | (input_ids == c.image_token_id)).long(),
        "labels": torch.where(is_text, input_ids, -100),
        "image_grid_hw": torch.tensor([[height, width]] * rows),
        images_name(config): torch.rand(rows, c.vae_config.num_channels, *sides) * 2 - 1,
    }


def images_name(config: MDMConfig) -> str:
    """What images that the VAE's patches are cut from are called among the model's inputs."""
    return "pixel_values" if config.pixel_autoencoder is None else "image_latents"


def estimate_training(
    config: MDMConfig,
    make_batch: Callable[[int], dict[str, Tensor]],
    rows: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    prepare: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model,
    has_average: bool = True,
    accumulation: int = 1,
    processes: int = 1,
    is_sharded: bool = False,
) -> TrainingEstimate:
    """What a run of AdamW takes, in bytes and seconds.

    Args:
        config: Of the full model.
        make_batch: Number of rows -> inputs with labels, on the CPU.
        rows: Rows of a process's micro-batch.
        device: Where the probe runs.
        dtype, autocast: Of the weights, and of the arithmetic if another.
        prepare: What is done to the model before it is trained: freezing, LoRA, gradient checkpointing.
        has_average: An EMA is kept.
        accumulation: Micro-batches a step.
        processes: Number of them.
        is_sharded: FSDP2 shards the model over the processes.
    """
    device = torch.device(device)
    own = psutil.Process().memory_info().rss if device.type == "cpu" else 0
    with torch.device("meta"):
        full = prepare(MDMForMultiModalGeneration(config).to(dtype))
    sizes = [(p.numel(), p.numel() * p.element_size(), p.requires_grad) for p in full.parameters()]
    trained = [(n, size) for n, size, requires_grad in sizes if requires_grad]
    groups = [*full.get_base_model().model.layers] if hasattr(full, "get_base_model") else [*full.model.layers]
    largest = max(sum(p.numel() * p.element_size() for p in group.parameters()) for group in groups)

    counts = (rows,) if rows < 4 else (max(1, rows // 8), max(2, rows // 4))
    batches = {n: {k: v.to(device) for k, v in make_batch(n).items()} for n in counts}
    measured: dict[tuple[int, int], tuple[int, float]] = {}
    for blocks in (1, 2):
        cut = copy.deepcopy(config)
        cut.num_hidden_layers = blocks
        model = _build(cut, device, dtype, prepare)
        for n, batch in batches.items():
            measured[blocks, n] = _probe(model, batch, autocast)
        del model
    blocks, peaks = config.num_hidden_layers, {key: float(peak) for key, (peak, _) in measured.items()}
    return TrainingEstimate(
        parameters=sum(n for n, _, _ in sizes),
        trainable=sum(n for n, _ in trained),
        tokens_per_step=next(iter(batches.values()))["input_ids"].shape[1] * rows * accumulation * processes,
        weights=sum(size for _, size, _ in sizes),
        gradients=sum(size for _, size in trained),
        optimizer=ADAM_STATES * sum(size for _, size in trained),
        average=sum(size for _, size in trained) if has_average else 0,
        activations=int(_linear(peaks, blocks, rows)),
        one_block=int(_linear(peaks, 1, rows)),
        seconds_per_step=accumulation * _seconds({key: s for key, (_, s) in measured.items()}, blocks, rows),
        processes=processes if is_sharded else 1,
        largest_block=largest,
        own=own,
    )
