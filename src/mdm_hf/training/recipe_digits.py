"""The recipe of mdm-digits: one small MDM that draws, reads and discusses handwritten digits."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed

from ..configuration_mdm import MDMConfig
from ..generation_mdm import MDMGenerationConfig
from ..modeling_mdm import MDMForMultiModalGeneration
from ..pipeline_mdm import MDMPipeline
from ..processing_mdm import MDMProcessor
from .digits import DigitsSource
from .mix import ConversationMix
from .trainer import ConversationCollator, EMACallback, MDMTrainer, SampleGridCallback, keep_freed_memory


TASK_WEIGHTS = {
    "class_to_image": 1.0,
    "text_to_image": 1.5,
    "image_to_text": 1.0,
    "question_answering": 0.75,
    "image_and_text": 2.5,
    "prompt_to_image_and_text": 1.5,
}
# When, as a share of the run, a task comes in that is not there from the start: once each modality alone is learned.
TASK_STARTS = {"prompt_to_image_and_text": 0.475}


def train_digits(
    output_dir: str | Path,
    processor: MDMProcessor,
    max_steps: int = 34_000,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    warmup_steps: int = 500,
    ema_decay: float = 0.999,
    seed: int = 0,
    sample_every: int = 2_000,
    save_every: int = 2_000,
    resume: bool = False,
    init_from: str | Path | None = None,
    use_cpu: bool | None = None,
    disable_tqdm: bool = False,
    draw: Callable[[MDMForMultiModalGeneration, Path], None] | None = None,
    **config_overrides,
) -> Path:
    """Trains mdm-digits from scratch and writes a Hub-ready folder.

    Args:
        output_dir: Gets `checkpoint-*`, `samples/step-*.png`, and the finished model in `final`.
        max_steps: Optimiser steps; the whole schedule is laid over them.
        resume: Go on from the newest checkpoint in `output_dir`; from the start if there is none.
        init_from: Start from the weights in this folder; every task is then there from the start.
        draw: Called every `sample_every` steps with the averaged model and the path of a PNG; draws a grid of samples
            by default.
        config_overrides: Fields of [`MDMConfig`] that differ from the preset.

    Returns:
        The folder `final`.
    """
    keep_freed_memory()
    set_seed(seed)
    output_dir = Path(output_dir)
    if init_from is None:
        model = MDMForMultiModalGeneration(MDMConfig.from_preset("mdm-digits", **config_overrides))
    else:
        model = MDMForMultiModalGeneration.from_pretrained(init_from, **config_overrides)
    task_starts = TASK_STARTS if init_from is None else {}
    data = ConversationMix(
        {"digits": DigitsSource("train", TASK_WEIGHTS)},
        num_samples=max_steps * batch_size,
        batch_size=batch_size,
        task_starts={task: int(share * max_steps) * batch_size for task, share in task_starts.items()},
        seed=seed,
    )
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=0.0,  # AdamW without weight decay (paper Sec. 5.1)
        adam_beta2=0.99,
        lr_scheduler_type="cosine",
        warmup_steps=warmup_steps,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",  # the data set draws at random itself: a resumed run sees the same data
        logging_steps=100,
        save_steps=save_every,
        save_total_limit=2,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available() if use_cpu is None else use_cpu,
        seed=seed,
        disable_tqdm=disable_tqdm,
    )
    ema = EMACallback(ema_decay)
    trainer = MDMTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=ConversationCollator(processor),
        callbacks=[ema, SampleGridCallback(draw or _grid_drawer(processor), ema, sample_every)],
    )
    trainer.train(resume_from_checkpoint=resume)
    ema.swap_in(model)
    return publish(model, processor, output_dir / "final")


def publish(model: MDMForMultiModalGeneration, processor: MDMProcessor, folder: Path) -> Path:
    """Writes model, processor, scheduler, generation config and their code into one folder."""
    model.generation_config = MDMGenerationConfig(
        num_inference_steps=20, guidance_scale=1.15, text_guidance_scale=1.0, text_temperature=0.7
    )
    MDMPipeline(model.eval(), processor, device=model.device).save_pretrained(folder)
    return folder


def _grid_drawer(processor: MDMProcessor):
    """A row of each class, and ten images with their captions."""

    def draw(model, path: Path):
        from ..evaluation.pictures import picture_grid

        def sample(**conditions) -> list[dict]:
            inputs = processor(**conditions, return_tensors="pt").to(model.device)
            generators = [torch.Generator().manual_seed(i) for i in range(10)]
            return processor.post_process_multimodal_output(model.generate(**inputs, generator=generators))

        classes = sample(class_ids=list(range(10)), generate=("image",))
        both = sample(text=[None] * 10, generate=("image", "text"))
        cells = [(one["images"][0], str(i)) for i, one in enumerate(classes)]
        cells += [(one["images"][0], one["text"][0]) for one in both]
        picture_grid(cells, columns=10).save(path)

    return draw
