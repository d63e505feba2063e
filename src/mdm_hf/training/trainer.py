"""Training with the Hugging Face Trainer: loss parts in the log, EMA, sample grids, exact resume."""

import ctypes
import platform
from collections import defaultdict
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..processing_mdm import MDMProcessor


logger = logging.get_logger(__name__)

LOSS_PARTS = ("loss_rec_image", "loss_rec_text", "loss_kl", "loss_se_image", "loss_se_text")
EMA_FILE = "ema.safetensors"


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory instead of returning each large tensor to the system.

    Training on a CPU otherwise spends much of its time in page faults. Returns whether the allocator is glibc's and
    took all three settings; elsewhere nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # names of mallopt(3)
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(*s) for s in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28)))


class ConversationCollator:
    """Conversations -> one padded batch; the last assistant message of each holds its targets."""

    def __init__(self, processor: MDMProcessor):
        self.processor = processor

    def __call__(self, examples: list[dict]) -> dict:
        return dict(self.processor.apply_chat_template([e["messages"] for e in examples], return_tensors="pt"))


class EMACallback(TrainerCallback):
    """Exponential moving average of the weights (paper Sec. 5.1), saved and resumed with every checkpoint."""

    def __init__(self, decay: float = 0.9999):
        self.decay = decay
        self.ema: EMAModel | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        from safetensors.torch import load_file

        self.ema = EMAModel(model.parameters(), decay=self.decay)
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / EMA_FILE
        if state.global_step > 0:
            if not path.is_file():
                raise ValueError(
                    f"Resuming at step {state.global_step} needs the moving average {path}, which is missing; resume "
                    "from a checkpoint that this trainer wrote, or train without EMA."
                )
            saved = load_file(path)
            self.ema.shadow_params = [saved[str(i)].to(p.device) for i, p in enumerate(self.ema.shadow_params)]
            self.ema.optimization_step = state.global_step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.ema.step(model.parameters())

    def on_save(self, args, state, control, **kwargs):
        from safetensors.torch import save_file

        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_file({str(i): p.contiguous() for i, p in enumerate(self.ema.shadow_params)}, folder / EMA_FILE)

    def swap_in(self, model):
        """Puts the averaged weights into `model`; `swap_out` brings the trained ones back."""
        self.ema.store(model.parameters())
        self.ema.copy_to(model.parameters())

    def swap_out(self, model):
        self.ema.restore(model.parameters())


class SampleGridCallback(TrainerCallback):
    """Draws a grid of samples from the averaged weights every `every` steps: output_dir/samples/step-*.png."""

    def __init__(self, draw, ema: EMACallback, every: int):
        self.draw, self.ema, self.every = draw, ema, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        path = Path(args.output_dir) / "samples" / f"step-{state.global_step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.ema.swap_in(model)
        model.eval()
        random_state = torch.get_rng_state()
        try:
            self.draw(model, path)
        finally:
            torch.set_rng_state(random_state)
            model.train()
            self.ema.swap_out(model)


class MDMTrainer(Trainer):
    """Trainer that logs the parts of L_total, each over the batches in which it occurs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._parts: dict[str, list] = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        if model.training:
            for name in LOSS_PARTS:
                self._parts[name].append(outputs[name].detach())
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], *args, **kwargs):
        for name, values in self._parts.items():
            measured = torch.stack(values)
            if bool((measured != 0).any()):
                logs[name] = round(measured[measured != 0].mean().item(), 5)
        self._parts.clear()
        super().log(logs, *args, **kwargs)
