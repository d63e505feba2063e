"""Does a long text take more memory than a short one?

The physics: MDM writes block by block. A block's targets, some ten positions here, are all that a network call
holds, and what was written before is a state of fixed size, kilobytes a layer, whatever the length. A Transformer that
writes token by token keeps the keys and values of all of them: 2 x layers x width numbers a token, 64 MiB at 16,384
tokens for 4 layers of width 128. So MDM's peak should be the same at 1,024 and 16,384 tokens, and that of the Llama of
transformers should grow by its cache. Measured is the most resident memory beyond model and inputs, in a process of
its own that has written 64 tokens before: what any network call allocates is there already.

    python benchmarks/long_text.py --small
    python benchmarks/long_text.py --output docs/long_text.json --plot docs/images/long_text.png
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _measure import machine, peak_memory
from transformers import LlamaConfig, LlamaForCausalLM

from mdm_hf import MDMPipeline


MODEL = Path(__file__).parents[1] / "model_cards" / "mdm-digits"
WARM = 64  # tokens that are written first, so that only what grows is measured


def mdm(tokens: int) -> Callable[[], object]:
    """Writes so many tokens with the shipped model, which would end sooner by itself."""
    pipe = MDMPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)

    def write(number: int) -> str:
        limits = {"max_new_tokens": number, "min_new_tokens": number}
        return pipe.chat().write("which digit is this?", num_inference_steps=2, seed=0, **limits)

    write(WARM)
    return lambda: write(tokens)


def llama(tokens: int) -> Callable[[], object]:
    """Writes so many tokens with transformers' Llama of random weights, as wide and as deep as the shipped model."""
    config = MDMPipeline.from_pretrained(MODEL).model.config
    size, layers = config.hidden_size, config.num_hidden_layers
    sizes = {"hidden_size": size, "num_hidden_layers": layers, "intermediate_size": 2 * size, "num_attention_heads": 4}
    torch.manual_seed(0)
    vocabulary = {"vocab_size": config.vocab_size, "max_position_embeddings": 2**15}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **vocabulary, eos_token_id=None)).eval()
    prompt = torch.tensor([[5, 6, 7]])

    def write(number: int) -> torch.Tensor:
        return model.generate(prompt, max_new_tokens=number, do_sample=False)

    write(WARM)
    return lambda: write(tokens)


def plot(rows: list[dict], path: Path) -> None:
    """Peak memory over length, a line a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.6), constrained_layout=True)
    for row in rows:
        axis.plot([*row["peak_mib"]], [*row["peak_mib"].values()], marker="o", label=row["model"])
    axis.set(xlabel="tokens written", ylabel="peak memory beyond the model, MiB", xscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="up to 256 tokens, to show that it runs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    lengths = (64, 256) if options.small else (1024, 4096, 16384)
    rows = []
    for name, work in (("MDM, block by block", mdm), ("Llama, token by token", llama)):
        row: dict = {"model": name, "peak_mib": {}, "seconds": {}}
        for length in lengths:
            started = time.perf_counter()
            row["peak_mib"][length] = round(peak_memory(work, length), 2)
            row["seconds"][length] = round(time.perf_counter() - started, 1)
            print(name, length, row["peak_mib"][length], "MiB", row["seconds"][length], "s", flush=True)
        row["growth_mib"] = round(row["peak_mib"][lengths[-1]] - row["peak_mib"][lengths[0]], 2)
        rows.append(row)
    found = {"benchmark": "long_text", **machine(), "results": rows}
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(rows, options.plot)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
