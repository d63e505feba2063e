"""What the benchmarks share: interleaved timing, peak memory in a process of its own, the machine's matrix peak."""

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
import transformers


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(contenders: Mapping[str, Callable[[], object]], rounds: int = 7, least_seconds: float = 0.05) -> dict:
    """Seconds per call of each contender: the median over rounds in which all of them take their turn.

    Turns alternate, so that whatever else the machine does meets all alike. A contender is called often enough to
    fill `least_seconds` in a round.
    """
    calls = {}
    for name, call in contenders.items():
        call()  # warm up
        started = time.perf_counter()
        call()
        synchronize()
        calls[name] = max(1, int(least_seconds / max(time.perf_counter() - started, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            started = time.perf_counter()
            for _ in range(calls[name]):
                call()
            synchronize()
            seconds[name].append((time.perf_counter() - started) / calls[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


def best_matrix_product(device: str, dtype: torch.dtype = torch.float32) -> tuple[Callable[[], object], int, float]:
    """The square matrix product that this machine does fastest, its floating-point operations, and those per second:
    no kernel here can beat its rate."""
    found = []
    for size in (512, 1024, 2048) if device == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        product, operations = partial(torch.matmul, a, b), 2 * size**3
        found.append((product, operations, operations / medians({"product": product}, rounds=5)["product"]))
    return max(found, key=lambda entry: entry[2])


def peak_memory(work: Callable[..., Callable[[], object]], *arguments) -> float:
    """MiB that the first call of `work(*arguments)()` needs beyond what `work(*arguments)` had set up. Linux only."""
    return in_own_process(_memory_of, work, arguments)


def in_own_process(function: Callable, *arguments):
    """What `function(*arguments)` returns in a fresh process with one thread."""
    context = multiprocessing.get_context("forkserver")  # each call in a fresh process, which need not import anew
    context.set_forkserver_preload(["mdm_hf.ssd", "transformers.models.mamba2.modeling_mamba2"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(send, function, arguments))
    process.start()
    send.close()  # so that a child that dies without an answer ends the wait
    result = receive.recv()
    process.join()
    return result


def _send_result(send, function, arguments) -> None:
    torch.set_num_threads(1)
    send.send(function(*arguments))


def _memory_of(work, arguments) -> float:
    call = work(*arguments)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    start_peak_anew()
    before = resident("VmRSS")
    call()
    return (resident("VmHWM") - before) / 1024


def start_peak_anew() -> None:
    """The peak "VmHWM" starts from what is resident now. Linux only."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def resident(field: str) -> int:
    """KiB of this process in memory: "VmRSS" now, "VmHWM" at its peak."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))


def machine() -> dict:
    """What the numbers were taken on."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        with open("/proc/cpuinfo", encoding="utf-8") if platform.system() == "Linux" else open("/dev/null") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.processor()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": name, "threads": torch.get_num_threads(), **versions}
