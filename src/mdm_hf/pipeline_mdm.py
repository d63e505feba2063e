"""MDMPipeline: conditions in, text and pictures out, in one call."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from transformers import Pipeline
from transformers.utils import logging

from .modeling_mdm import MDMForMultiModalGeneration
from .processing_mdm import MDMProcessor


logger = logging.get_logger(__name__)


class MDMPipeline(Pipeline):
    """Generates images, text, or both, from any mixture of conditions.

    Example:

    ```python
    from mdm_hf import MDMPipeline

    pipe = MDMPipeline.from_pretrained("model_cards/mdm-digits")
    result = pipe(text="a handwritten three", generate="image", seed=0)[0]
    result["images"][0].save("three.png")
    ```

    Args:
        model: The model, with its head.
        processor: Its processor.
        scheduler: A diffusers scheduler with `prediction_type="sample"`; `generate`'s default if None.
        compile: Compile the blocks with `torch.compile`, which takes a minute and pays where many samples are drawn. A
            string is its mode. Modes with CUDA graphs have not been tried: the states that the blocks keep for
            later steps are outputs of a graph that the next replay overwrites.
        kwargs: As in [`~transformers.Pipeline`]: `device`, `batch_size`, ...
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(
        self, model, processor: MDMProcessor | None = None, scheduler=None, compile: bool | str = False, **kwargs
    ):
        super().__init__(model=model, processor=processor, **kwargs)
        self.scheduler = scheduler
        if compile:
            for layer in self.model.model.layers:
                layer.compile(fullgraph=True, mode=compile if isinstance(compile, str) else None)
        self.progress_bar = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, device=None, batch_size=None, compile=False, **kwargs):
        """Loads model, processor and scheduler from one folder or Hub repository.

        Args:
            device: "cpu", "cuda:1", ...; the first accelerator by default.
            batch_size: Samples per `generate` call, 32 by default.
            compile: See [`MDMPipeline`].
            kwargs: `revision`, `token`, `cache_dir`, ... for all parts; `dtype` and `device_map` for the model.
        """
        shared = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs}
        model = MDMForMultiModalGeneration.from_pretrained(pretrained_model_name_or_path, **kwargs)
        processor = MDMProcessor.from_pretrained(pretrained_model_name_or_path, **shared)
        scheduler = _load_scheduler(pretrained_model_name_or_path, **shared)
        return cls(model.eval(), processor, scheduler, compile, device=device, batch_size=batch_size)

    def save_pretrained(self, save_directory, **kwargs):
        """Writes model, processor, scheduler and generation config into one folder."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        (self.scheduler or self.model.default_scheduler()).save_pretrained(Path(save_directory) / "scheduler")

    def load_adapter(self, peft_model_id: str, **kwargs):
        """Puts a PEFT adapter, from a folder or a Hub repository, on the model; see `PreTrainedModel.load_adapter`."""
        self.model.load_adapter(str(peft_model_id), **kwargs)

    def set_progress_bar_config(self, disable: bool = False):
        """Shows or hides the progress bar over the network calls."""
        self.progress_bar = not disable

    def __call__(
        self,
        text: str | list[str | None] | None = None,
        images=None,
        class_ids: int | list[int | None] | None = None,
        messages: list[dict] | list[list[dict]] | None = None,
        generate: str | tuple[str, ...] = ("image", "text"),
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        text_guidance_scale: float | None = None,
        text_temperature: float | None = None,
        modality_lag: float | None = None,
        num_return_sequences: int = 1,
        seed: int | None = None,
        image_size: tuple[int, int] | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
        scheduler=None,
        callback_on_step_end: Callable | None = None,
    ) -> list[dict]:
        """Generates `num_return_sequences` samples for each prompt.

        Args:
            text, images, class_ids: Conditions; each one value, or a list (a batch; lists of one length, None where a
                prompt has no such condition). All absent: unconditional.
            messages: Conversations instead of the three above: one list of messages, or a list of such lists.
            generate: "image", "text", or both.
            num_inference_steps, guidance_scale, text_guidance_scale, text_temperature, modality_lag: See
                [`MDMGenerationConfig`]; the model's defaults where None.
            seed: Sample n of the returned list is drawn with seed + n, and depends on nothing else but its prompt.
                None draws a seed at random.
            image_size: (height, width) in pixels of the images to generate.
            max_new_tokens: Length of the text canvas in tokens.
            batch_size: Samples per `generate` call, 32 by default.
            callback_on_step_end: See [`MDMForMultiModalGeneration.generate`].

        Returns:
            A flat list, `num_return_sequences` per prompt in prompt order, of {"text": [str, ...], "images":
            [PIL.Image, ...]}.

        Raises:
            ValueError: conditions that do not fit together, with what was got, what is needed, what to do.
        """
        if num_return_sequences < 1:
            raise ValueError(f"`num_return_sequences` is {num_return_sequences}; it must be 1 or more.")
        prompts = self._prompts(text, images, class_ids, messages)
        prompts = [prompt for prompt in prompts for _ in range(num_return_sequences)]
        seed = int(torch.randint(2**31, ()).item()) if seed is None else seed
        generate = (generate,) if isinstance(generate, str) else tuple(generate)
        size = batch_size if batch_size is not None else self._batch_size or 32
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"`batch_size` is {size!r}; it must be a whole number, 1 or more.")
        results: list[dict] = []
        starts = range(0, len(prompts), size)
        for start in logging.tqdm(starts, desc="Batches", disable=not self.progress_bar or len(starts) == 1):
            batch = prompts[start : start + size]
            inputs = self.preprocess(batch, generate=generate, image_size=image_size, max_new_tokens=max_new_tokens)
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
            outputs = self._forward(
                inputs,
                generator=generators,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                text_guidance_scale=text_guidance_scale,
                text_temperature=text_temperature,
                modality_lag=modality_lag,
                scheduler=scheduler or self.scheduler,
                callback_on_step_end=callback_on_step_end,
                progress_bar=self.progress_bar and len(starts) == 1,
            )
            results += self.postprocess(outputs)
        return results

    def _prompts(self, text, images, class_ids, messages) -> list:
        if messages is not None:
            if text is not None or images is not None or class_ids is not None:
                raise ValueError(
                    "Got `messages` together with `text`, `images` or `class_ids`; put the conditions into the "
                    "messages as content parts, or leave `messages` out."
                )
            if len(messages) == 0:
                raise ValueError("`messages` is empty; give one conversation, or a list of conversations.")
            return [messages] if isinstance(messages[0], dict) else list(messages)
        columns = {
            "text": text,
            "images": list(images) if _is_array(images, 4) else images,
            "class_ids": class_ids.tolist() if _is_array(class_ids, 1) else class_ids,
        }
        lengths = {name: len(value) for name, value in columns.items() if isinstance(value, list | tuple)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Got lists of different lengths, {lengths}; a batch needs lists of one length.")
        count = next(iter(lengths.values()), 1)
        if count == 0:
            raise ValueError(f"`{next(iter(lengths))}` is an empty list; a batch needs at least one prompt.")
        rows = {name: list(v) if isinstance(v, list | tuple) else [v] * count for name, v in columns.items()}
        return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]

    def preprocess(self, batch: list, **options):
        """Prompts -> model inputs."""
        if isinstance(batch[0], list):
            inputs = self.processor.apply_chat_template(batch, return_tensors="pt", **options)
        else:
            columns = {name: [prompt[name] for prompt in batch] for name in batch[0]}
            inputs = self.processor(**columns, return_tensors="pt", **options)
        return inputs.to(self.model.device)

    def _forward(self, inputs, **options):
        return self.model.generate(**inputs, **options)

    def postprocess(self, outputs) -> list[dict]:
        """Model outputs -> text and PIL images."""
        return self.processor.post_process_multimodal_output(outputs)

    def _sanitize_parameters(self, **kwargs):
        return {}, {}, {}


def _is_array(value, dimensions: int) -> bool:
    return isinstance(value, np.ndarray | torch.Tensor) and value.ndim == dimensions


def _load_scheduler(path, **repository):
    """The scheduler under `scheduler/`, of whatever class was saved; None, `generate`'s default, if there is none."""
    try:
        config = diffusers.DPMSolverMultistepScheduler.load_config(path, subfolder="scheduler", **repository)
    except OSError:
        logger.info(f"{path} has no scheduler/scheduler_config.json; using the model's default solver.")
        return None
    kind = config.get("_class_name")
    if not hasattr(diffusers, kind or ""):
        raise ValueError(
            f"{path} was saved with the scheduler {kind!r}, which diffusers {diffusers.__version__} does not have; "
            "update diffusers, or mend scheduler/scheduler_config.json."
        )
    return getattr(diffusers, kind).from_config(config)
