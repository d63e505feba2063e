"""One training step of the tiny model in each of two processes, started by test_distributed.py.

Each process takes half of the batch. Rank 0 writes how far loss, gradients and samples are from those of one process
that takes the whole batch: {"way": {"loss": ..., "gradient": ..., "sample": ...}}.

    torchrun --standalone --nproc_per_node 2 distributed_step.py CHECKPOINT RESULT.json
"""

import json
import sys

import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from tiny import batch, fixed_noise, generators
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from mdm_hf import MDMForMultiModalGeneration


# Found so in 5.23; 5.17 puts bf16 weights and the fp32 recurrence into one group, which FSDP2 refuses.
GROUPS_BY_DTYPE = Version(transformers.__version__) >= Version("5.23")


def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer.mixer.ssm)  # fp32 in any model, so a group of its own
        fully_shard(layer)
    return fully_shard(model)


def gathered(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(model, inputs):
    """Loss over all processes, and the gradients by name."""
    loss = model(**inputs).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    gradients = {name.removeprefix("module."): gathered(p.grad) for name, p in model.named_parameters()}
    return mean / dist.get_world_size(), gradients


def sample(model):
    return model.generate(**batch(["both"]), generator=generators([0]), num_inference_steps=2).latents


def main(checkpoint: str, result: str):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    def load(dtype=torch.float32, **options):
        return MDMForMultiModalGeneration.from_pretrained(checkpoint, dtype=dtype, **options).eval()

    whole = batch(["both"] * 4, is_training=True)
    whole |= {"timesteps": torch.tensor([[0.2, 0.9], [0.4, 0.7], [0.6, 0.5], [0.8, 0.3]]), "noise": fixed_noise(whole)}
    half = {name: value.chunk(world)[rank] for name, value in whole.items()}
    on_load = DistributedConfig(fsdp_size=world)
    ways = {
        "ddp": lambda: DistributedDataParallel(load()),
        "fsdp2": lambda: sharded(load()),
        "fsdp2_on_load": lambda: load(distributed_config=on_load),
        "fsdp2_bf16": lambda: sharded(load(torch.bfloat16)),
    }
    if GROUPS_BY_DTYPE:
        ways["fsdp2_bf16_on_load"] = lambda: load(torch.bfloat16, distributed_config=on_load)
    distances = {}
    for way, build in ways.items():
        alone = load(torch.bfloat16 if "bf16" in way else torch.float32)
        expected_loss = alone(**whole).loss
        expected_loss.backward()
        expected = {name: p.grad for name, p in alone.named_parameters()}
        model = build()
        loss, gradients = step(model, half)
        assert gradients.keys() == expected.keys()
        largest = {name: (gradients[name] - g).abs().max() / g.abs().max() for name, g in expected.items()}
        distances[way] = {"loss": float((loss - expected_loss).abs()), "gradient": float(max(largest.values()))}
        if way != "ddp":
            register_fsdp_forward_method(model, "generate")
            distances[way]["sample"] = float((sample(model) - sample(alone)).abs().max())
    if rank == 0:
        with open(result, "w") as file:
            json.dump(distances, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
