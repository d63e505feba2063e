"""Training with the Hugging Face Trainer: loss parts in the log, EMA, sample grids, exact resume."""

import ctypes
import platform
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints
from transformers.utils import logging

from ..processing_mdm import MDMProcessor


logger = logging.get_logger(__name__)

LOSS_PARTS = ("loss_rec_image", "loss_rec_text", "loss_kl", "loss_se_image", "loss_se_text")
EMA_FILE = "ema.safetensors"
UNFINISHED = ".unfinished"


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
    """Exponential moving average of the weights (paper Sec. 5.1); [`MDMTrainer`] saves and resumes it."""

    def __init__(self, decay: float = 0.9999):
        self.decay = decay
        self.ema: EMAModel | None = None
        self.resume_from: Path | None = None  # a checkpoint's folder

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.ema = EMAModel(model.parameters(), decay=self.decay)
        if self.resume_from is None:
            return
        path = self.resume_from / EMA_FILE
        if not path.is_file():
            raise ValueError(
                f"Resuming from {self.resume_from} needs the moving average {path.name}, which is missing; resume "
                "from a checkpoint that was trained with one, or train without EMACallback."
            )
        saved = load_file(path)
        self.ema.shadow_params = [saved[str(i)].to(p.device) for i, p in enumerate(self.ema.shadow_params)]
        self.ema.optimization_step = state.global_step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.ema.step(model.parameters())

    def save(self, folder: Path):
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
    """Trainer with the parts of L_total in its log and checkpoints that are whole or absent.

    - Each part of the loss is averaged over the batches in which it occurs.
    - A checkpoint is written aside, into `.unfinished/`, and renamed when all of it is there; one that is rotated out
      is renamed before it is deleted. A run killed at any moment resumes from the newest `checkpoint-*`.
    - A loss that is not finite stops the run before it reaches the weights; weights that are not are never saved.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._parts: dict[str, list] = defaultdict(list)
        self._aside: Path | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As in transformers, but `True` starts from scratch where there is no checkpoint yet."""
        run = Path(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(run) if run.is_dir() else None
        for callback in self._averages():
            callback.resume_from = Path(str(resume_from_checkpoint)) if resume_from_checkpoint else None
        if self.args.should_save:
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        if model.training:
            if not bool(outputs.loss.isfinite()):
                parts = {name: outputs[name].item() for name in LOSS_PARTS}
                raise FloatingPointError(
                    f"Got a loss of {outputs.loss.item()} in step {self.state.global_step + 1}, {parts}; it must be "
                    f"finite; {self._where_to_resume()}"
                )
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

    def _where_to_resume(self) -> str:
        run = Path(self.args.output_dir)
        last = get_last_checkpoint(run) if run.is_dir() else None
        kept = f"the last whole checkpoint is {last}" if last else "there is no checkpoint yet"
        return f"{kept}; lower the learning rate or `max_grad_norm`, train in fp32, or look for broken examples."

    def _averages(self) -> list[EMACallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EMACallback)]

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._aside is None:  # else later, from the folder's own place
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial):
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            step = self.state.global_step
            raise FloatingPointError(
                f"Got weights that are not finite after step {step}, not saved; {self._where_to_resume()}"
            )
        run = Path(self._get_output_dir(trial))
        self._aside = run / UNFINISHED
        written = self._aside / f"checkpoint-{self.state.global_step}"
        final = run / written.name
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                for callback in self._averages():
                    callback.save(written)
                if self.state.best_model_checkpoint == str(written):
                    self.state.best_model_checkpoint = str(final)
                    self.state.save_to_json(str(written / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self._aside, ignore_errors=True)
            raise OSError(
                f"Could not write {final}: {error}; whole checkpoints are left as they were; free space on the disk, "
                "or give another output_dir, and resume."
            ) from error
        finally:
            self._aside = None
        if self.args.should_save:
            self._put_in_place(written, final)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _put_in_place(self, written: Path, final: Path):
        """Renames the new checkpoint, then takes out those beyond `save_total_limit`, best and newest excepted."""
        if final.exists():  # of an earlier run in the same folder
            final.rename(written.parent / "replaced")
        written.rename(final)
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if limit:
            kept = {str(final), best}
            oldest_first = [Path(one) for one in sort_checkpoints(str(final.parent))]
            for old in [one for one in oldest_first if str(one) not in kept][: max(0, len(oldest_first) - limit)]:
                old.rename(written.parent / old.name)
        shutil.rmtree(written.parent)
