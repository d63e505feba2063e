"""A run of the Trainer as one process or as one of several, started by test_distributed_training.py.

    torchrun --standalone --nproc_per_node N distributed_training.py CHECKPOINT FOLDER WAY STEPS [resume] [apart]

WAY is "ddp" or "fsdp2"; a batch is eight rows whatever N is: of all kinds, or, "apart" and with activations computed
again, four without text and four without images, each for one of two processes. Writes FOLDER/log.json and
FOLDER/averaged.safetensors.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny import KINDS, batch
from transformers import TrainingArguments

from mdm_hf import MDMForMultiModalGeneration
from mdm_hf.training.trainer import EMACallback, MDMTrainer, unsharded


ROWS = 8


class MixedRows(torch.utils.data.Dataset):
    """Rows of every kind, of three lengths and with different numbers of targets."""

    def __len__(self):
        return 1000

    def __getitem__(self, i):
        return KINDS[i % len(KINDS)]


class RowsApart(MixedRows):
    """Four images, four texts, and so on."""

    def __getitem__(self, i):
        return "text" if i // (ROWS // 2) % 2 else "class_to_image"


def main(checkpoint: str, folder: str, way: str, steps: str, *options: str):
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    model = MDMForMultiModalGeneration.from_pretrained(checkpoint)
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=ROWS // world,
        per_device_eval_batch_size=ROWS // world,
        max_steps=int(steps),
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        adam_epsilon=1e-6,
        logging_steps=1,
        save_steps=10,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        use_cpu=True,
        ddp_backend="gloo",
        fsdp=way == "fsdp2",
        gradient_checkpointing="apart" in options,
        disable_tqdm=True,
        report_to=[],
    )
    ema = EMACallback(0.9)
    trainer = MDMTrainer(
        model,
        arguments,
        train_dataset=RowsApart() if "apart" in options else MixedRows(),
        eval_dataset=torch.utils.data.Subset(MixedRows(), range(16)),
        data_collator=lambda kinds: batch(kinds, is_training=True),
        callbacks=[ema],
    )
    trainer.train(resume_from_checkpoint="resume" in options)
    trainer.evaluate()
    ema.swap_in(trainer.model)
    averaged = {name: unsharded(p.detach()).contiguous() for name, p in trainer.model.named_parameters()}
    if dist.get_rank() == 0:
        (Path(folder) / "log.json").write_text(json.dumps(trainer.state.log_history))
        save_file(averaged, Path(folder) / "averaged.safetensors")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads, torn down with the interpreter, have been seen to abort it


if __name__ == "__main__":
    main(*sys.argv[1:])
