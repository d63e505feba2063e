"""What a run measures beside its loss: L_total's parts per noise level, tokens per second, memory."""

import resource
import sys
import time

import torch
from torch import Tensor

from ..modeling_mdm import LOSS_PARTS, MDMOutput


BUCKETS = 4  # of t, each a quarter of [0, 1]
OF_MODALITY = {"loss_se_image": 0, "loss_se_text": 1}  # column of the timesteps


class LossMeter:
    """Means of L_total's parts since the last `means`, each over the rows that have a part of the kind.

    The score entropies are also split by the timestep: `loss_se_image_t0.00-0.25` is the loss of nearly clean images,
    `..._t0.75-1.00` of those that are nearly noise.
    """

    def __init__(self):
        self._sums: Tensor | None = None  # (2, parts, 1 + BUCKETS): sums and counts

    def add(self, outputs: MDMOutput) -> None:
        rows, t = outputs.row_losses.cpu().double(), outputs.timesteps.cpu()  # float64, which MPS has not
        kinds = torch.ones(*rows.shape, 1 + BUCKETS, dtype=torch.float64)
        for i, name in enumerate(LOSS_PARTS):
            if name not in OF_MODALITY:
                kinds[:, i, 1:] = 0
                continue
            bucket = (t[:, OF_MODALITY[name]] * BUCKETS).ceil().long().clamp(1, BUCKETS) - 1
            kinds[:, i, 1:] = torch.nn.functional.one_hot(bucket, BUCKETS)
        kinds = kinds * (rows != 0).unsqueeze(-1)
        sums = torch.stack([(kinds * rows.unsqueeze(-1)).sum(0), kinds.sum(0)])
        self._sums = sums if self._sums is None else self._sums + sums

    def means(self, reduce) -> dict[str, float]:
        """Name -> mean, rounded to 5 places, and a new start; `reduce` sums a tensor over the processes."""
        if self._sums is None:
            return {}
        sums, counts = reduce(self._sums).tolist()
        self._sums = None
        edges = [i / BUCKETS for i in range(BUCKETS + 1)]
        tails = ["", *(f"_t{a:.2f}-{b:.2f}" for a, b in zip(edges, edges[1:], strict=False))]
        return {
            name + tail: round(sums[i][k] / counts[i][k], 5)
            for i, name in enumerate(LOSS_PARTS)
            for k, tail in enumerate(tails)
            if counts[i][k]
        }


class Throughput:
    """Tokens per second of all processes since the last reading, and the peak of memory in GiB."""

    def __init__(self):
        self._tokens, self._since = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def read(self, reduce) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        tokens = float(reduce(torch.tensor(float(self._tokens))))
        self._tokens, self._since = 0, time.perf_counter()
        return {"tokens_per_second": round(tokens / seconds, 1), "peak_memory_gib": round(peak_memory() / 2**30, 3)}


def peak_memory() -> int:
    """Most bytes that this process has held: of the GPU's memory where there is one, else of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
