"""How fast is the selective scan of Mamba-2, and what keeps it from being faster?

The physics. In chunks of q steps the scan is four matrix products. Per step they need (q + 1) n operations for C B^T
of a group, (q + 1) p for M x of each head, as only s <= t counts in both, 2 p n for the state that a chunk writes
and 2 p n for the one it reads. Nothing can run faster than these at the rate of this machine's best matrix product:
"of peak" below is how near ours comes, both timed in turns. The products compute whole squares and mask what is
above the diagonal; that half is work, but not credited.

Contenders, on the same tensors, fp32 unless asked otherwise:
    ours            mdm_hf.ssd
    transformers    its Mamba-2 torch path, at the checkpoint default of 256 steps a chunk and at 64
    recurrence      one step at a time, what the formulas say
    attention       one non-causal scaled_dot_product_attention of the same width: what a transformer pays here

Correctness comes first: each scan is compared with the float64 recurrence before anything is timed.

    python benchmarks/ssm_core.py --small                                           # a minute
    python benchmarks/ssm_core.py --threads 1 --plot docs/images/ssm_core.png --output docs/ssm_core.json
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from _measure import best_matrix_product, machine, medians, peak_memory
from torch.nn import functional as F
from transformers.models.mamba2 import modeling_mamba2

from mdm_hf.ssd import LONGEST_CHUNK, LONGEST_CHUNK_CPU, ssd, ssd_oracle


HEAD_DIM, STATE_SIZE = 64, 128  # p and n, Mamba-2's own


def tensors(length: int, width: int, device: str, dtype: torch.dtype = torch.float32) -> dict:
    """Arguments of the scan: one row, one group; x, B and C in `dtype`, the rest in fp32, as the model has it."""
    generator = torch.Generator().manual_seed(0)
    h = width // HEAD_DIM

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    return {
        "x": normal(1, length, h, HEAD_DIM).to(dtype),
        "dt": F.softplus(normal(1, length, h) - 3),
        "A": -normal(h).exp(),
        "B": normal(1, length, 1, STATE_SIZE).to(dtype),
        "C": normal(1, length, 1, STATE_SIZE).to(dtype),
        "D": normal(h),
    }


def transformers_scan(chunk: int) -> Callable:
    scan = modeling_mamba2.mamba2_chunk_scan
    scan = getattr(scan, "__wrapped__", scan)  # its torch path, whatever kernels are installed
    return lambda x, dt, A, B, C, D: scan(x, dt, A, B, C, chunk_size=chunk, D=D)


def recurrence(x, dt, A, B, C, D):
    """Eq. 10-12, one step at a time in fp32."""
    x, B, C = x.float(), B.float(), C.float()
    B, C = (value.expand(-1, -1, x.shape[2], -1) for value in (B, C))
    decay, write = torch.exp(dt * A), dt.unsqueeze(-1) * x
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[-1])
    outputs = []
    for t in range(x.shape[1]):
        state = decay[:, t, :, None, None] * state + write[:, t].unsqueeze(-1) * B[:, t].unsqueeze(-2)
        outputs.append((state @ C[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1) + D[:, None] * x


def attention(x, dt, A, B, C, D):
    q = x.transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2)


SCANS = {
    "ours": ssd,
    "transformers, chunk 64": transformers_scan(64),
    "transformers, chunk 256": transformers_scan(256),
    "recurrence": recurrence,
}
CONTENDERS = SCANS | {"attention": attention}


def work(
    name: str, length: int, width: int, backward: bool, device: str, dtype: torch.dtype = torch.float32
) -> Callable[[], object]:
    """A call of a contender, forward alone or with the gradients of all inputs."""
    values = tensors(length, width, device, dtype)
    if not backward:
        return torch.no_grad()(lambda: CONTENDERS[name](**values))
    leaves = {key: value.requires_grad_() for key, value in values.items()}
    wanted = [leaves["x"]] if name == "attention" else list(leaves.values())

    def step():
        y = CONTENDERS[name](**leaves)
        return torch.autograd.grad(y, wanted, torch.ones_like(y))

    return step


def check(width: int, device: str, dtype: torch.dtype = torch.float32) -> dict:
    """Largest error of each scan against the float64 recurrence, relative to the largest output."""
    values = tensors(300, width, device, dtype)
    exact = ssd_oracle(**values)
    limit = (
        3e-2 if dtype != torch.float32 else 1e-4 if device == "cpu" else 5e-3
    )  # Triton's fp32 product keeps ten bits
    errors = {name: float((scan(**values) - exact).abs().max() / exact.abs().max()) for name, scan in SCANS.items()}
    wrong = {name: error for name, error in errors.items() if not error < limit}
    if wrong:
        raise SystemExit(f"Not timed, as these are wrong by more than {limit}: {wrong}")
    return errors


def operations(length: int, width: int, device: str) -> int:
    """What our scan needs, forward: of squares the triangle s <= t, though more is computed."""
    q = min(length, LONGEST_CHUNK_CPU if device == "cpu" else LONGEST_CHUNK)
    h, p, n = width // HEAD_DIM, HEAD_DIM, STATE_SIZE
    return length * ((q + 1) * (n + h * p) + 4 * h * p * n)


def run(options) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    torch.set_num_threads(options.threads)
    result = {"machine": machine(), "width": options.width, "dtype": options.dtype}
    result |= {"errors": check(options.width, device, dtype), "rows": []}
    product, product_operations, peak = best_matrix_product(device, dtype)
    result["matrix_gflops"] = peak / 1e9
    print(f"{result['machine']}, best matrix product {peak / 1e9:.0f} GFLOP/s, errors {result['errors']}")
    for length in options.lengths:
        for backward in (False, True):
            names = [n for n in CONTENDERS if n != "recurrence" or length <= 1024]
            calls = {name: work(name, length, options.width, backward, device, dtype) for name in names}
            # In pairs: what one contender leaves of the allocator and the caches is not to slow another one.
            peers = sorted(set(names) - {"ours"}, key=lambda name: name == "recurrence")
            pairs = {name: medians({"ours": calls["ours"], name: calls[name]}, options.rounds) for name in peers}
            seconds = {"ours": median(pair["ours"] for pair in pairs.values())}
            seconds |= {name: pair[name] for name, pair in pairs.items()}
            ratios = {name: round(pair[name] / pair["ours"], 2) for name, pair in pairs.items()}
            row = {"length": length, "pass": "forward+backward" if backward else "forward"}
            row |= {"seconds": seconds, "ratios": ratios}
            if not backward:
                pair = medians({"ours": calls["ours"], "product": product}, options.rounds)
                share = operations(length, options.width, device) / product_operations
                row["share_of_peak"] = share * pair["product"] / pair["ours"]
            if length in options.memory_lengths:
                row["mib"] = {
                    n: peak_memory(work, n, length, options.width, backward, device, dtype)
                    for n in names
                    if n != "recurrence"
                }
            extra = f"{row['share_of_peak']:.0%} of peak" if not backward else ""
            print(
                f"L={length:5d} {row['pass']:17s} ours {seconds['ours'] * 1e3:8.2f} ms; others/ours {ratios} {extra}"
            )
            if "mib" in row:
                print("        peak memory, MiB:", {name: round(value) for name, value in row["mib"].items()})
            result["rows"].append(row)
    return result


def plot(result: dict, path: Path) -> None:
    """Time per step of the sequence over its length, forward and with backward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    for axis, kind in zip(axes, ("forward", "forward+backward"), strict=True):
        rows = [row for row in result["rows"] if row["pass"] == kind]
        for name in CONTENDERS:
            points = [(r["length"], r["seconds"][name] / r["length"] * 1e6) for r in rows if name in r["seconds"]]
            axis.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=3 if name == "ours" else 1.5)
        axis.set(title=kind, xlabel="sequence length", xscale="log", yscale="log")
        axis.set_xticks(sorted({row["length"] for row in rows}), [str(n) for n in sorted({r["length"] for r in rows})])
        axis.tick_params(axis="x", which="minor", labelbottom=False)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("microseconds per position")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"Selective scan, width {result['width']}, {result['machine']['threads']} thread(s)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two lengths, three rounds")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--memory-lengths", type=int, nargs="*", default=[1024, 4096])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    options = parser.parse_args()
    if options.small:
        options.lengths, options.rounds = [1024, 4096], 3
    result = run(options)
    if options.plot:
        plot(result, options.plot)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"benchmark": "ssm_core", **result}))


if __name__ == "__main__":
    main()
