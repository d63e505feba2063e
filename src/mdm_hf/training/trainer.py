"""Training with the Hugging Face Trainer: loss parts in the log, EMA, sample grids, exact resume."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints
from transformers.utils import logging

from ..modeling_mdm import LOSS_PARTS
from ..processing_mdm import MDMProcessor
from ..seeded_noise import fold
from .measures import LossMeter, Throughput


logger = logging.get_logger(__name__)

EMA_FILE = "ema.safetensors"
UNFINISHED = ".unfinished"


def unsharded(tensor: Tensor) -> Tensor:
    """The whole of what FSDP2 shards; every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_sharded(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, sharded as `like` is; every process has to hold all of it."""
    whole = whole.to(like.device, like.dtype)
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


class ConversationCollator:
    """Conversations -> one padded batch, by a `processor`; the last assistant message of each holds its targets."""

    def __init__(self, processor: MDMProcessor):
        self.processor = processor

    def __call__(self, examples: list[dict]) -> dict:
        """The batch of `examples`, dicts of "messages" and what else a row has."""
        return dict(self.processor.apply_chat_template([e["messages"] for e in examples], return_tensors="pt"))


class EMACallback(TrainerCallback):
    """Exponential moving average of the weights (paper Sec. 5.1); [`MDMTrainer`] saves and resumes it.

    Of a model that FSDP2 shards every process averages its own shard. Frozen weights, a pixel autoencoder's or those
    under an adapter, are left out.

    Args:
        decay: What of the average stays at each step.
    """

    def __init__(self, decay: float = 0.9999):
        self.decay = decay
        self.ema: EMAModel | None = None
        self.resume_from: Path | None = None  # a checkpoint's folder

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.ema = EMAModel(trained_parameters(model), decay=self.decay)
        if self.resume_from is not None:
            self.load(self.resume_from)
            self.ema.optimization_step = state.global_step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.ema.step(trained_parameters(model))

    def load(self, folder: Path):
        """Takes up the average that a checkpoint's folder holds.

        Raises:
            ValueError: it holds none.
        """
        path = folder / EMA_FILE
        if not path.is_file():
            raise ValueError(
                f"Resuming from {folder} needs the moving average {path.name}, which is missing; resume "
                "from a checkpoint that was trained with one, or train without EMACallback."
            )
        saved = load_file(path)
        for i, shadow in enumerate(self.ema.shadow_params):
            shadow.copy_(as_sharded(saved[str(i)], shadow))

    def save(self, folder: Path, is_main_process: bool = True):
        """Writes the average as the unsharded model has it; every process has to call this."""
        whole = {str(i): unsharded(p).contiguous() for i, p in enumerate(self.ema.shadow_params)}
        if is_main_process:
            save_file(whole, folder / EMA_FILE)

    def swap_in(self, model):
        """Puts the averaged weights into `model`; `swap_out` brings the trained ones back."""
        self.ema.store(_trained_at_rest(model))
        self.ema.copy_to(trained_parameters(model))

    def swap_out(self, model):
        """Gives the model back the weights that `swap_in` put aside."""
        self.ema.restore(_trained_at_rest(model))

    @contextmanager
    def averaged(self, model) -> Iterator[None]:
        """A block in which `model` has the averaged weights."""
        self.swap_in(model)
        try:
            yield
        finally:
            self.swap_out(model)


def trained_parameters(model) -> list:
    """What a moving average is kept of, in the order of its file."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _trained_at_rest(model) -> list:
    """The trained parameters; of a model under FSDP2 as shards, of which a forward pass alone leaves some gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return trained_parameters(model)


class SampleGridCallback(TrainerCallback):
    """Draws samples from the averaged weights every `every` steps: output_dir/samples/step-*.png.

    Args:
        draw: Is given the model and the step, and returns a picture, or None for nothing to keep.
        ema: Whose average is drawn from.
        every: Steps between pictures.
    """

    def __init__(self, draw: Callable[[torch.nn.Module, int], Image.Image | None], ema: EMACallback, every: int):
        self.draw, self.ema, self.every = draw, ema, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        if not state.is_world_process_zero and not isinstance(model, FSDPModule):  # a sharded model needs them all
            return
        random_state = torch.get_rng_state()
        model.eval()
        try:
            with self.ema.averaged(model):
                picture = self.draw(model, state.global_step)
        finally:
            torch.set_rng_state(random_state)
            model.train()
        if picture is not None and state.is_world_process_zero:
            path = Path(args.output_dir) / "samples" / f"step-{state.global_step:07d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)


class MDMTrainer(Trainer):
    """Trainer with the parts of L_total in its log and checkpoints that are whole or absent.

    - All that is drawn for a row comes from (seed, step, the row's place in the whole batch): the loss does not depend
      on the number of processes or micro-batches, and an evaluation gives the same loss every time.
    - The log has each part of the loss, over the rows in which it occurs, by timestep, tokens per second and memory.
    - With an [`EMACallback`] an evaluation is of the average, and `load_best_model_at_end` brings back the best one.
    - A checkpoint is written aside, into `.unfinished/`, and renamed when all of it is there; one that is rotated out
      is renamed before it is deleted. A run killed at any moment resumes from the newest `checkpoint-*`.
    - A loss that is not finite stops the run before it reaches the weights; weights that are not are never saved.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._meters = {True: LossMeter(), False: LossMeter()}  # training, evaluation
        self._throughput = Throughput()
        self._batches = {True: (-1, 0), False: (-1, 0)}  # the step, and how many of its batches this process has seen
        self._aside: Path | None = None

    def create_accelerator_and_postprocess(self):
        """As in transformers; but accelerate, asked for FSDP2 among processes on CPUs, quietly takes DDP: here it
        shards."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

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

    def get_train_dataloader(self) -> DataLoader:
        """As in transformers, but what reads each process's part of a stream by itself is not split once more.

        accelerate would have process 0 read for all and cut each tensor to the rows of `input_ids`, pixels too.
        """
        if not getattr(self.train_dataset, "splits_by_rank", False):
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        device = self.accelerator.device
        return prepare_data_loader(
            loader, device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "seeds" not in inputs:
            inputs = dict(inputs) | {"seeds": self._seeds(inputs["input_ids"], model.training)}
        outputs = model(**inputs)
        if model.training:
            if not bool(outputs.loss.isfinite()):
                parts = {name: outputs[name].item() for name in LOSS_PARTS}
                raise FloatingPointError(
                    f"Got a loss of {outputs.loss.item()} in step {self.state.global_step + 1}, {parts}; it must be "
                    f"finite; {self._where_to_resume()}"
                )
            mask = inputs.get("attention_mask")
            self._throughput.add(inputs["input_ids"].numel() if mask is None else int(mask.sum()))
        if outputs.row_losses is not None:
            self._meters[model.training].add(outputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _seeds(self, input_ids: Tensor, is_training: bool) -> Tensor:
        """A seed for each row, by the row's place among all rows that the step takes, in whatever pieces: (b,)."""
        step, seen = self._batches[is_training]
        if is_training and step != self.state.global_step:
            step, seen = self.state.global_step, 0
        self._batches[is_training] = step, seen + 1
        args = self.args
        size = args.per_device_train_batch_size if is_training else args.per_device_eval_batch_size
        first = (seen * args.world_size + args.process_index) * size
        seed = torch.tensor(args.seed, device=input_ids.device)
        for number in (int(is_training), max(step, 0)):
            seed = fold(seed, torch.tensor(number, device=input_ids.device))
        return fold(seed, torch.arange(first, first + len(input_ids), device=input_ids.device))

    def evaluation_loop(self, *args, **kwargs):
        """As in transformers, but of the moving average where one is kept, as it is what gets published."""
        self._batches[False] = (-1, 0)
        with ExitStack() as averaged:
            for callback in self._averages():
                if callback.ema is not None:  # else nothing has been trained
                    averaged.enter_context(callback.averaged(self.model))
            output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = self._meters[False].means(self._sum_over_processes)
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "loss" in logs:
            logs |= self._meters[True].means(self._sum_over_processes)
            logs |= self._throughput.read(self._sum_over_processes)
        super().log(logs, *args, **kwargs)

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return tensor if self.args.world_size == 1 else self.accelerator.reduce(tensor.to(self.args.device), "sum")

    def whole_model(self):
        """The model as one process holds it, on every process; of a model under FSDP2 a copy on the CPU."""
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(self.model, FSDPModule):
            return model
        weights = {name: unsharded(value).cpu() for name, value in model.state_dict().items()}
        whole = type(model).__mro__[2](model.config)  # of FSDP's class, FSDPModule, and the class that it wraps
        whole.load_state_dict(weights)
        return whole

    def _where_to_resume(self) -> str:
        run = Path(self.args.output_dir)
        last = get_last_checkpoint(run) if run.is_dir() else None
        kept = f"the last whole checkpoint is {last}" if last else "there is no checkpoint yet"
        return f"{kept}; lower the learning rate or `max_grad_norm`, train in fp32, or look for broken examples."

    def _averages(self) -> list[EMACallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EMACallback)]

    def _load_best_model(self):
        super()._load_best_model()
        for callback in self._averages():
            callback.load(Path(str(self.state.best_model_checkpoint)))

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._aside is None:  # else later, from the folder's own place
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial):
        if not all(bool(unsharded(p.isfinite().all())) for p in model.parameters()):
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
            for callback in self._averages():
                callback.save(written, self.args.should_save)
            if self.args.should_save and self.state.best_model_checkpoint == str(written):
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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        if isinstance(self.model, FSDPModule):  # of a class of torch's, whose code would be saved as the model's
            setattr(type(self.model), "_auto_class", None)  # noqa: B010
        super()._save(output_dir, state_dict)

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
