"""What does one denoising step cost, and what does it depend on?

The physics. A block of hidden size h takes, per position, 2 h (4 h + 2 n + heads) operations in its input projection
and 4 h h in its output projection, whatever the number of scan directions if they share them; each direction adds a
gather, a convolution and a selective scan, whose cost per position does not grow with the length. Attention adds
4 L h operations per position of a sequence of L. Conditions cost a step nothing: their states are computed once.

So expect: the same step at any prompt length; time linear in the targets; four directions at less than four times the
price of one; and a length from which the transformer of equal size is the slower one.

Four tables, each from one run with turns alternating, all through `MDMForMultiModalGeneration.generate`:
    prompt       step time at 64 targets behind prompts of 0 to 1024 tokens, with and without the condition cache
    targets      step time against the number of target patches, MDM against a transformer of as many parameters:
                 bidirectional SDPA and SwiGLU in place of the mixer; same embeddings, heads, loop
    directions   one block at 1,024 positions with 1, 2 and 4 image orders, and where four spend their time
    sharing      one block with shared, alternating and independent projections

    python benchmarks/denoise_step.py --small                                       # a minute
    python benchmarks/denoise_step.py --threads 1 --plot docs/images/denoise_step.png --output docs/denoise_step.json
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from _measure import machine, medians, synchronize
from torch import Tensor, nn
from torch.nn import functional as F

from mdm_hf import MDMConfig, MDMForMultiModalGeneration
from mdm_hf.sequence_layout import image_of_each_row, plan_scans


# Where a block spends its time, by the names of the operators that torch's profiler sees.
PARTS = {
    "projections": ("linear",),
    "gather and merge": ("scan", "unscan", "merge_gate_norm"),
    "convolution and SiLU": ("conv_forward", "scan_conv", "silu", "silu_"),
    "selective scan": ("ssd_forward",),
}


class TransformerBlock(nn.Module):
    """Pre-norm attention over all positions and SwiGLU: the peer of MDMBlock, same call."""

    def __init__(self, config: MDMConfig, parameters: int):
        super().__init__()
        size = config.hidden_size
        self.heads = size // 64
        self.qkv, self.out = nn.Linear(size, 3 * size, bias=False), nn.Linear(size, size, bias=False)
        self.width = (parameters - 4 * size**2 - 2 * size) // (3 * size)
        self.up, self.down = nn.Linear(size, 2 * self.width, bias=False), nn.Linear(self.width, size, bias=False)
        self.norms = nn.ModuleList([nn.RMSNorm(size), nn.RMSNorm(size)])

    def forward(self, h: Tensor, plan, cache=None) -> Tensor:
        q, k, v = self.qkv(self.norms[0](h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        gate, up = self.up(self.norms[1](h)).chunk(2, -1)
        return h + self.down(F.silu(gate) * up)


def build(options, device: str, **overrides) -> MDMForMultiModalGeneration:
    config = MDMConfig(
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        vae_config={"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 1},
        **overrides,
    )
    torch.manual_seed(0)
    return MDMForMultiModalGeneration(config).eval().to(device, getattr(torch, options.dtype))


def as_transformer(model: MDMForMultiModalGeneration) -> MDMForMultiModalGeneration:
    """The same model with attention blocks of as many parameters."""
    layers = model.model.layers
    parameters = sum(p.numel() for p in layers[0].parameters())
    blocks = [TransformerBlock(model.config, parameters) for _ in layers]
    found = sum(p.numel() for p in blocks[0].parameters())
    assert abs(found / parameters - 1) < 0.01, f"the peer has {found} parameters a block, MDM {parameters}"
    model.model.layers = nn.ModuleList(blocks).to(model.device, model.dtype).eval()
    return model


def prompt_and_targets(config: MDMConfig, prompt: int, side: int, device: str) -> dict:
    """A text of `prompt` tokens and an image of side x side patches to generate behind it."""
    c = config
    text = [c.user_token_id, c.text_start_token_id, *range(100, 100 + prompt % 400), *[99] * (prompt - prompt % 400)]
    text = [*text[: prompt + 2], c.text_end_token_id] if prompt else []
    image = [c.time_image_token_id, c.image_start_token_id, *[c.image_target_token_id] * side**2, c.image_end_token_id]
    ids = torch.tensor([[c.class_token_id, *text, c.assistant_token_id, *image]], device=device)
    grid = torch.tensor([[side, side]], device=device)
    return {"input_ids": ids, "target_mask": (ids == c.image_target_token_id).long(), "image_grid_hw": grid}


def step_seconds(model, inputs: dict, options, **sampling) -> float:
    """Median time between two callbacks of `generate`: one network call and one solver step."""
    ticks = []

    def tick(*_):
        synchronize()
        ticks.append(time.perf_counter())

    model.generate(**inputs, num_inference_steps=options.steps, callback_on_step_end=tick, **sampling)
    return median(b - a for a, b in zip(ticks, ticks[1:], strict=False))


def alternate(cases: dict, options) -> dict:
    """Median step time of each case, over rounds in which all take their turn."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, case in cases.items():
            found[name].append(case())
    return {name: median(values) for name, values in found.items()}


def prompt_table(options, device: str) -> dict:
    model = build(options, device)
    cases = {}
    for prompt in options.prompts:
        inputs = prompt_and_targets(model.config, prompt, 8, device)
        for use_cache in (True, False):
            cases[prompt, use_cache] = lambda i=inputs, u=use_cache: step_seconds(model, i, options, use_cache=u)
    found = alternate(cases, options)
    return {prompt: {"cached": found[prompt, True], "uncached": found[prompt, False]} for prompt in options.prompts}


def targets_table(options, device: str) -> dict:
    models = {"mdm": build(options, device), "transformer": as_transformer(build(options, device))}
    table = {}
    for side in options.sides:
        cases = {}
        for name, model in models.items():
            inputs = prompt_and_targets(model.config, 0, side, device)
            cases[name] = lambda m=model, i=inputs: step_seconds(m, i, options, use_cache=False)
        table[side**2] = alternate(cases, options)
    return table


def one_block(options, device: str, length: int = 1024, **overrides):
    """A call of one block on an image of `length` patches."""
    model = build(options, device, **overrides).model
    inputs = prompt_and_targets(model.config, 0, round(length**0.5), device)
    layout = model.layout(inputs["input_ids"], inputs["image_grid_hw"], None, inputs["target_mask"])
    plan = plan_scans(model.config, layout, image_of_each_row(layout))
    plan = plan.alternating()[0] if model.config.scan_sharing == "alternate" else plan
    h = torch.randn(1, inputs["input_ids"].shape[1], model.config.hidden_size, device=device, dtype=model.dtype)
    block = model.layers[0]
    return torch.no_grad()(lambda: block(h, plan))


def directions_table(options, device: str) -> dict:
    calls = {str(k): one_block(options, device, scan_directions=(k, min(k, 2))) for k in (1, 2, 4)}
    seconds = medians(calls, options.rounds)
    shares = {}
    for name in ("1", "1", "4"):  # the first profile is slow, and replaced
        with torch.profiler.profile() as profile:
            calls[name]()
        spent = "cpu_time_total" if device == "cpu" else "device_time_total"
        total = {event.key.rpartition("::")[2]: getattr(event, spent) / 1e3 for event in profile.key_averages()}
        shares[name] = {part: sum(total.get(op, 0.0) for op in ops) for part, ops in PARTS.items()}
        whole = sum(getattr(event, f"self_{spent}") for event in profile.key_averages()) / 1e3
        shares[name]["rest"] = whole - sum(shares[name].values())
    return {"seconds": seconds, "ratio_4_to_1": seconds["4"] / seconds["1"], "milliseconds": shares}


def sharing_table(options, device: str) -> dict:
    kinds = ("shared", "alternate", "independent")
    return medians({kind: one_block(options, device, scan_sharing=kind) for kind in kinds}, options.rounds)


def plot(result: dict, path: Path) -> None:
    """Step time against prompt length, and against the number of targets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for label in ("cached", "uncached"):
        points = [(int(prompt), 1e3 * row[label]) for prompt, row in result["prompt"].items()]
        left.plot(*zip(*points, strict=True), marker="o", label=f"conditions {label}")
    left.set(title="64 targets", xlabel="prompt tokens", ylabel="milliseconds per step", ylim=(0, None))
    for name in ("mdm", "transformer"):
        points = [(int(n), 1e3 * row[name]) for n, row in result["targets"].items()]
        right.plot(*zip(*points, strict=True), marker="o", label=name)
    right.set(title="no prompt", xlabel="target patches", xscale="log", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"One denoising step, {result['parameters'] / 1e6:.0f}M parameters, {result['machine']['device']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two blocks, few lengths")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, nargs="+", default=[0, 64, 256, 1024])
    parser.add_argument("--sides", type=int, nargs="+", default=[8, 16, 32, 48, 64], help="patches on a side")
    parser.add_argument("--steps", type=int, default=6, help="denoising steps a measurement")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    options = parser.parse_args()
    if options.small:
        options.layers, options.rounds, options.steps = 2, 3, 4
        options.prompts, options.sides = [0, 1024], [8, 64]
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {
        "machine": machine(),
        "dtype": options.dtype,
        "parameters": sum(p.numel() for p in build(options, device).parameters()),
    }
    tables = {
        "prompt": prompt_table,
        "targets": targets_table,
        "directions": directions_table,
        "sharing": sharing_table,
    }
    for name, table in tables.items():
        result[name] = table(options, device)
        print(name, json.dumps(result[name], indent=1), flush=True)
    if options.plot:
        plot(result, options.plot)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"benchmark": "denoise_step", **result}))


if __name__ == "__main__":
    main()
