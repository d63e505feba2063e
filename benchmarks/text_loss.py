"""How much memory does the text loss need at a large vocabulary, and what does saving it cost?

The physics: logits of n positions over v tokens are n v numbers, and the plain way holds them three times (logits,
their softmax for the backward pass, their gradient), while latents and head are n h + v h. In chunks of 2^24 logits
only a chunk is held, and its logits are computed twice: 8 n h v operations where the plain way needs 6 n h v, so at
most 1.33 times the time where the matrix products rule.

Both ways are `mdm_hf`'s: `text_score_entropy` of all logits, as torch's cross-entropy takes them, and
`chunked_text_score_entropy`, which training uses. Forward and backward pass through the VAE's decoder and head.

    python benchmarks/text_loss.py --small
    python benchmarks/text_loss.py --output docs/text_loss.json --plot docs/images/text_loss.png
"""

import argparse
import json
from pathlib import Path

import torch
from _measure import machine, medians, peak_memory

from mdm_hf import MDMVAEConfig, MDMVAEModel
from mdm_hf.score_entropy import chunked_text_score_entropy, text_score_entropy


WAYS = ("plain", "chunked")


def work(way: str, batch: int, length: int, vocab_size: int, device: str):
    """A function that runs forward and backward once, its gradients left in the VAE's parameters."""
    torch.manual_seed(0)
    vae = MDMVAEModel(MDMVAEConfig(vocab_size=vocab_size)).to(device)
    latents = torch.randn(batch, length, vae.config.latent_size, device=device)
    labels = torch.randint(0, vocab_size, (batch, length), device=device)

    def run():
        vae.zero_grad()
        if way == "plain":
            losses = text_score_entropy(vae.decode_tokens(latents), labels)
        else:
            losses = chunked_text_score_entropy(vae.decode_tokens, latents, labels, vocab_size)
        losses.mean().backward()
        return vae

    return run


def distance(batch: int, length: int, vocab_size: int, device: str) -> float:
    """The largest difference of a gradient between both ways, in units of that parameter's largest."""
    plain, chunked = (
        {name: p.grad for name, p in work(way, batch, length, vocab_size, device)().named_parameters()} for way in WAYS
    )
    pairs = [(plain[name], chunked[name]) for name in plain if plain[name] is not None]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2), constrained_layout=True)
    for axis, unit in zip(axes, ("mib", "seconds"), strict=True):
        for way in WAYS:
            axis.plot(
                [row["length"] for row in result["rows"]], [r[unit][way] for r in result["rows"]], "o-", label=way
            )
        axis.set(xlabel=f"tokens per row, {result['batch']} rows", ylim=(0, None))
        axis.set_title({"mib": "peak memory, MiB", "seconds": "forward and backward, s"}[unit])
        axis.grid(alpha=0.3)
    axes[0].legend(title=f"{result['vocab_size']:,} tokens")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a run of seconds that shows that everything works")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    if options.small:
        options.batch, options.lengths, options.repeats = 2, [64], 1
    size = options.batch, options.vocab_size
    result = {"machine": machine(), "batch": size[0], "vocab_size": size[1], "rows": []}
    for length in options.lengths:
        shape = (size[0], length, size[1], options.device)
        row = {
            "length": length,
            "gradient_distance": distance(*shape),
            "mib": {way: peak_memory(work, way, *shape) for way in WAYS},
            "seconds": medians({way: work(way, *shape) for way in WAYS}, options.repeats),
        }
        for unit in ("mib", "seconds"):
            row[f"{unit}_ratio"] = row[unit]["plain"] / row[unit]["chunked"]
        result["rows"].append(row)
        mib, seconds = row["mib"], row["seconds"]
        print(
            f"{length:5d} tokens: {mib['plain']:.0f} -> {mib['chunked']:.0f} MiB ({row['mib_ratio']:.1f} times less), "
            f"{seconds['plain']:.2f} -> {seconds['chunked']:.2f} s, "
            f"gradients {row['gradient_distance']:.0e} apart"
        )
    if options.plot:
        plot(result, options.plot)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
