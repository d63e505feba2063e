"""What it brings on a CPU to keep freed memory, as `mdm` does (`keep_freed_memory`), a process each way in turns.

What to expect: glibc returns what it was given for a tensor beyond 32 MiB when that is freed, and the next one is
touched page by page for the first time. One sample has no such tensors, a batch of 64 is made of them. The memory at
the peak stays what it was, and the process keeps it.

    python benchmarks/freed_memory.py --small
    OMP_NUM_THREADS=1 python benchmarks/freed_memory.py --output docs/freed_memory.json
"""

import argparse
import json
import resource
import statistics
from pathlib import Path

from _measure import in_own_process, machine
from checkpoint_speed import measured

from mdm_hf.allocator import keep_freed_memory


MODEL = Path(__file__).parents[1] / "model_cards" / "mdm-shapes"
WAYS = {"returned": lambda: None, "kept": keep_freed_memory}


def one_way(way: str, model: str, task: str, batch: int, steps: int) -> dict:
    """Seconds a sample, MiB at the peak, and the page faults of a process."""
    WAYS[way]()
    found = measured(model, task, "a red circle left of a blue square", batch, steps)
    return found | {"freed": way, "page_faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two samples of two steps, to show that it runs")
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--tasks", nargs="+", default=["text to image", "image and text"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    if options.small:
        options.tasks, options.batch_sizes, options.steps, options.rounds = ["text to image"], [2], 2, 1
    rows = []
    for task in options.tasks:
        for batch in options.batch_sizes:
            given = options.model, task, batch, options.steps
            turns = [{way: in_own_process(one_way, way, *given) for way in WAYS} for _ in range(options.rounds)]
            ratios = [round(turn["returned"]["seconds"] / turn["kept"]["seconds"], 2) for turn in turns]
            row = {"task": task, "batch": batch, "returned_over_kept": statistics.median(ratios), "turns": ratios}
            rows.append(row | turns[-1])
            print(json.dumps(rows[-1]), flush=True)
    found = {"machine": machine(), "num_inference_steps": options.steps, "rows": rows}
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
