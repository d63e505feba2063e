"""Sampling: the one denoising loop (paper Sec. 8, Alg. 2).

Every modality follows its own time grid, driven by its own copy of one diffusers solver:

    network call    1   2   3   ...
    text            [t = 1 ............ 0]                      N solver steps each; without a lag in the same N calls,
    image                    [t = 1 ............ 0]             with lag 1 the text is done when the image starts

What a network call is, with its conditions and guidance, stands in `denoiser.py`.
"""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor
from transformers.utils import ModelOutput
from transformers.utils import logging as hf_logging

from .checkpoints import GENERATION_CONFIG, SOLVER, read_json
from .configuration_mdm import MDMConfig
from .denoiser import Denoiser
from .fingerprint import fingerprint
from .generation_configuration_mdm import MDMGenerationConfig, sampling_options
from .input_checks import (
    as_generators,
    check_callback,
    check_finite,
    check_inputs,
    check_known_targets,
    check_state,
    check_targets,
    frozen_targets,
    replaced_latents,
)
from .sequence_layout import SequenceLayout
from .solvers import default_solver, load_solver, solver_for, solver_named
from .step_calibration import AUTO_STEPS, CALIBRATION_ROWS, MOST_STEPS, fewest_steps, fewest_whole, first_rows


logger = hf_logging.get_logger(__name__)

# What transformers' pipelines add to every call, beside the tokenizer's pad token; it says nothing about a canvas.
PIPELINE_DEFAULTS = {"max_new_tokens": 256}


@dataclass
class MDMGenerateOutput(ModelOutput):
    """What [`MDMForMultiModalGeneration.generate`] returns.

    Args:
        sequences: (b, l) `input_ids` with the generated text filled in.
        images: For each row, a list of its generated images (channels, height, width) in [-1, 1].
        latents: (b, l, latent_size), the final latents of the targets, the posterior mean elsewhere.
        frozen_at: (b, l) with token selection, the network call after which a target was frozen, by it or by a
            callback; -1 for the others.
        num_live: (calls, b) with token selection, how many positions the network saw of each row in each call.
        call_seconds: With token selection, how long each call took.
    """

    sequences: Tensor | None = None
    images: list[list[Tensor]] | None = None
    latents: Tensor | None = None
    frozen_at: Tensor | None = None
    num_live: Tensor | None = None
    call_seconds: tuple[float, ...] | None = None


@dataclass
class _Track:
    """The time grid of one modality in those rows that target it alone, or together with the other one."""

    modality: str  # "image" or "text"
    rows: Tensor  # (b,) bool, rows that it concerns
    at: tuple[Tensor, Tensor]  # row and place of each of its n targets, two of (n,)
    generators: list | None  # one a target, for solvers that draw
    first: int  # network call at which it starts
    scheduler: Any
    times: list[float]  # t in [0, 1] at each of its calls
    skipped: int = 0  # of the scheduler's steps, where it starts from what is known

    @property
    def last(self) -> int:
        return self.first + len(self.times)

    def time_after(self, calls: int) -> float:
        """t in [0, 1] when `calls` network calls are done."""
        if calls < self.first:
            return self.times[0] if self.skipped else 1.0
        if calls >= self.last:
            return 0.0
        return self.times[calls - self.first]

    def advance(self, calls: int, z_0: Tensor, z: Tensor) -> Tensor:
        """One solver step from z_t with the prediction z0-hat, at the track's targets: (b, m, d).

        The solver sees the targets as a batch of n, so that what a stochastic one draws for a row depends on that
        row's targets alone.
        """
        extra = {} if self.generators is None else {"generator": self.generators}
        timestep = self.scheduler.timesteps[calls - self.first + self.skipped]
        moved = self.scheduler.step(z_0[self.at], timestep, z[self.at], return_dict=False, **extra)[0]
        return z.index_put(self.at, moved)


class _Selection:
    """Token selection after each network call, and the account of what it saved."""

    def __init__(self, view: Denoiser):
        self.view, self.started = view, time.perf_counter()
        self.frozen_at = torch.full_like(view.full_layout.input_ids, -1)
        self.num_live: list[Tensor] = []
        self.seconds: list[float] = []

    def after(self, step: int, z_0: Tensor, z: Tensor, tracks: list[_Track]) -> Tensor:
        view, now = self.view, time.perf_counter()
        self.num_live.append(view.num_live)
        self.seconds.append(now - self.started)
        self.started = now
        z = view.select(z_0, z, tracks, step)
        self.note(step)
        return z

    def note(self, step: int) -> None:
        """What is frozen by now, and was not before."""
        row, place = self.view.frozen.nonzero(as_tuple=True)
        at = row, self.view.index[0][row, place]
        self.frozen_at[at] = torch.where(self.frozen_at[at] < 0, step, self.frozen_at[at])

    def report(self) -> dict:
        num_live = torch.stack(self.num_live)
        return {"frozen_at": self.frozen_at, "num_live": num_live, "call_seconds": tuple(self.seconds)}


class MDMGenerationMixin:
    """Gives the model `generate`. Knows the model only through `self`."""

    config: MDMConfig
    model: Any
    dtype: torch.dtype
    generation_config: MDMGenerationConfig
    output_modalities = ("image", "text")
    found_steps: dict[str, int] | None = None  # of num_inference_steps="auto", by the kind of call
    scheduler: Any = None  # the repository's solver, if it has one; `default_scheduler()` otherwise

    def adjust_generation_fn(self, generation_config, from_auto_class, from_pipeline, path, *args, **kwargs):
        """Called by `from_pretrained`: takes the repository's generation config and solver, if it has them.

        Raises:
            ValueError: a file of the two is not whole, or missing though the model was saved with it, or names a
                solver that the installed diffusers does not know.
        """
        names = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
        repository = dict(zip(names, args, strict=False)) | {k: kwargs[k] for k in names if k in kwargs}
        saved_with = getattr(self.config, "saved_with", ())
        if generation_config is not None:
            self.generation_config = MDMGenerationConfig(**sampling_options(generation_config))
        elif path is not None:
            saved = read_json(path, GENERATION_CONFIG, is_needed=GENERATION_CONFIG in saved_with, **repository)
            if saved is None:
                logger.warning(
                    f"Got {path} without {GENERATION_CONFIG}; sampling as MDMGenerationConfig's defaults say."
                )
            self.generation_config = MDMGenerationConfig(**(saved or {}))
        if path is not None:
            self.scheduler = load_solver(path, is_needed=SOLVER in saved_with, **repository)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        class_ids: Tensor | None = None,
        *,
        generation_config: MDMGenerationConfig | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        scheduler=None,
        callback_on_step_end: Callable | None = None,
        generation_mode: str | None = None,
        image_latents: Tensor | None = None,
        state=None,
        progress_bar: bool = False,
        return_dict_in_generate: bool = True,
        labels: Tensor | None = None,
        **options,
    ) -> MDMGenerateOutput | Tensor:
        """Generates whatever `target_mask` marks: images, text, or both.

        Args:
            input_ids, pixel_values, image_grid_hw, attention_mask, target_mask, class_ids: As in `forward`;
                [`MDMProcessor`] makes them.
            generation_config: Defaults to `self.generation_config`; `options` override single fields
                (`num_inference_steps`, `guidance_scale`, ...).
            generator: Source of the noise, on the CPU: one for all rows, or one per row, which makes a sample
                independent of the batch it is in, up to rounding in half precision.
            scheduler: A diffusers scheduler of variance-preserving form with `prediction_type="sample"`, or its name.
                Defaults to the one that the model was saved with, else second-order DPM-Solver++. It is copied with
                each modality's own betas, without clipping or thresholding, and with "trailing" in place of "leading"
                time steps.
            callback_on_step_end: Called as `f(self, step, timesteps, {"latents": ..., "decode": ...})` after each
                network call; the latents are z_t (b, m, d) of the m positions from each row's first target segment on,
                `decode()` gives a preview as MDMGenerateOutput. It may return a dict of some of "latents", to
                replace those of targets; "frozen", a mask (b, l) of targets that are to stay as they are predicted
                now and to be a condition of the rest; "input_ids" (b, l), the tokens that frozen text has instead.
            generation_mode: "image" or "text"; checked against the targets, None accepts any.
            image_latents: As in `forward`, in place of `pixel_values`.
            state: What was read of each row's conversation before, by `read_conversation`; the inputs go on from
                there, without a class token.
            progress_bar: Show the network calls on a progress bar.
            return_dict_in_generate: False returns `sequences` alone.
            labels: As in `forward`; where they stand, known text is kept.

        Returns:
            [`MDMGenerateOutput`], or its `sequences`.

        Raises:
            ValueError: inputs that do not fit together, no target, a scheduler that cannot drive this model.
        """
        config = self._sampling_config(generation_config, options)
        check_callback(callback_on_step_end)
        if labels is not None:
            raise ValueError("`generate` got `labels`; they are for training. Drop them from the inputs.")
        fixed = image_grid_hw, attention_mask, target_mask
        check_inputs(self.config, input_ids, pixel_values, *fixed, class_ids, image_latents=image_latents)
        input_ids = input_ids.long()
        layout = self.model.layout(input_ids, *fixed)
        check_targets(layout, generation_mode)
        layout.must_be_word |= layout.is_target & layout.is_text & (layout.offset <= config.min_new_tokens)
        if config.strength < 1:
            check_known_targets(self.config, layout, "strength", config.strength)
        generators = as_generators(generator, len(input_ids))
        if state is not None:
            check_state(self, state, len(input_ids), config.use_cache, input_ids)
        if scheduler is None:
            scheduler = self.default_scheduler() if self.scheduler is None else self.scheduler
        elif isinstance(scheduler, str):
            scheduler = solver_named(scheduler, self.config)
        if config.num_inference_steps == AUTO_STEPS:
            inputs = {"input_ids": input_ids, "pixel_values": pixel_values, "image_latents": image_latents}
            inputs |= {"image_grid_hw": image_grid_hw, "attention_mask": attention_mask}
            inputs |= {"target_mask": target_mask, "class_ids": class_ids}
            config.num_inference_steps = self._found_steps(
                layout, inputs, config, scheduler=scheduler, state=state, progress_bar=progress_bar
            )
        known_images = self.model.known_images(layout, pixel_values, image_latents)
        conditions = self.model.encode(layout, input_ids, known_images).mean.float()
        known = input_ids, known_images, pixel_values
        noise = self._draw_noise(layout, conditions, generators)

        scales = {"image": config.guidance_scale, "text": config.guidance_scale}
        if config.text_guidance_scale is not None:
            scales["text"] = config.text_guidance_scale
        view = Denoiser(self, layout, conditions, noise, class_ids, image_grid_hw, scales, config, state)
        tracks = self._tracks(view.layout, scheduler, config, generators)
        z = view.start(tracks)
        steps = range(max(track.last for track in tracks))
        selection = _Selection(view) if view.selects else None
        for step in hf_logging.tqdm(steps, desc="Denoising", disable=not progress_bar):
            if selection is not None and not bool(view.layout.is_target.any()):
                break  # everything has converged
            z_0 = view.predict(z, tracks, step)
            for track in tracks:
                if track.first <= step < track.last:
                    z = view.with_frozen(track.advance(step, z_0, z))
            if selection is not None:
                z = selection.after(step, z_0, z, tracks)
            if callback_on_step_end is not None:
                preview = partial(self._decode, view, z_0, *known)
                times = [track.time_after(step + 1) for track in tracks]
                changed = callback_on_step_end(self, step, times, {"latents": z, "decode": preview})
                changed = {} if changed is None else changed
                z = replaced_latents(changed, z, view.layout.is_target)
                z = view.freeze(*frozen_targets(changed, layout, self.config), z_0, z)
                if selection is not None:
                    selection.note(step)
        output = self._decode(view, z, *known)
        if selection is not None:
            output = MDMGenerateOutput(**output, **selection.report())
        return output if return_dict_in_generate else output.sequences

    def _sampling_config(self, generation_config, options: dict) -> MDMGenerationConfig:
        base = self.generation_config if generation_config is None else generation_config
        added = PIPELINE_DEFAULTS | {"pad_token_id": self.config.pad_token_id}
        given = {k: v for k, v in options.items() if v is not None and (k not in added or v != added[k])}
        if "max_new_tokens" in given:
            raise ValueError(
                f"Got max_new_tokens={given['max_new_tokens']}; a text is as long as its canvas in the inputs; give "
                "it to the processor instead, in transformers' pipelines as processor_kwargs={'max_new_tokens': n}."
            )
        if given.get("selection_tolerance") is False:
            given = {"text_selection_tolerance": False} | given
        sampling, most = MDMGenerationConfig(**(sampling_options(base) | given)), self.config.num_train_timesteps
        if sampling.num_inference_steps != AUTO_STEPS and sampling.num_inference_steps > most:
            raise ValueError(
                f"`num_inference_steps` is {sampling.num_inference_steps}; it must be at most {most}, the steps of "
                "the noise schedule."
            )
        return sampling

    def _found_steps(self, layout: SequenceLayout, inputs: dict, config: MDMGenerationConfig, **how: Any) -> int:
        """The fewest steps for a call of this kind: as an earlier one found, or measured on its first rows."""
        image, text = layout.is_target & layout.is_patch, layout.is_target & layout.is_text
        kept = layout.in_target_group & (layout.is_patch | layout.is_text) & ~layout.is_target
        of_rows = torch.stack([image.any(1), text.any(1), kept.any(1)], dim=1).tolist()
        solver = how["scheduler"]
        told = type(solver).__name__, repr(getattr(solver, "config", solver))
        # Of the pictures that are made, and of the longest text to a factor of two: a token more makes no other kind.
        sizes = layout.grid[image].unique(dim=0).tolist(), int(text.sum(1).max()).bit_length()
        of_latents = sampling_options(config) | {"min_new_tokens": 0}  # which says how latents are read, no more
        key = repr((sorted({*map(tuple, of_rows)}), of_latents, told, sizes, fingerprint(self)))
        if self.found_steps is None:
            self.found_steps = {}
        if key not in self.found_steps:
            most = min(MOST_STEPS, self.config.num_train_timesteps)
            if fewest_whole(config.strength) > most:
                raise ValueError(
                    f"`strength` is {config.strength!r} with num_inference_steps = 'auto', half a step or less of the "
                    f"{most} that it takes at most; raise the strength to more than {0.5 / most:g}."
                )
            count = min(CALIBRATION_ROWS, len(of_rows))
            has_all = {*map(tuple, of_rows[:count])} == {*map(tuple, of_rows)}
            is_cut = has_all and how["state"] is None
            rows = first_rows(layout, count, inputs) if is_cut else inputs
            count = len(rows["input_ids"])

            def draw(steps: int) -> Tensor:
                noise = [torch.Generator().manual_seed(row) for row in range(count)]
                same = MDMGenerationConfig(**sampling_options(config) | {"num_inference_steps": steps})
                return self.generate(**rows, generator=noise, generation_config=same, **how).latents

            targets = [mask[:count] for mask in (image, text) if bool(mask[:count].any())]
            limits = config.step_tolerance, most, fewest_whole(config.strength)
            self.found_steps[key], errors = fewest_steps(draw, targets, *limits)
            measured = ", ".join(f"{steps}: {error:.3f}" for steps, error in errors.items())
            logger.info(f"num_inference_steps='auto' is {self.found_steps[key]} here; errors by steps: {measured}.")
        return self.found_steps[key]

    def default_scheduler(self) -> DPMSolverMultistepScheduler:
        """The solver of a model that was saved without one."""
        return default_solver(self.config)

    def _tracks(self, layout: SequenceLayout, scheduler, config: MDMGenerationConfig, generators) -> list[_Track]:
        steps, lag = config.num_inference_steps, config.modality_lag
        skipped = steps - max(1, round(steps * config.strength))
        image, text = layout.is_target & layout.is_patch, layout.is_target & layout.is_text
        has_both = (image.any(1) & text.any(1)).unsqueeze(1)
        delay = round((steps - skipped) * abs(lag))
        tracks = []
        for modality, mask, is_first in (("image", image, lag <= 0), ("text", text, lag >= 0)):
            for rows, first in ((~has_both, 0), (has_both, 0 if is_first else delay)):
                if bool((mask & rows).any()):
                    alpha_bar = self.model.alpha_bar_of(modality)
                    solver, times = solver_for(scheduler, self.config, modality, steps, alpha_bar)
                    if skipped and hasattr(solver, "set_begin_index"):
                        solver.set_begin_index(skipped)
                    row, place = (mask & rows).nonzero(as_tuple=True)
                    draws = "generator" in inspect.signature(solver.step).parameters and None not in generators
                    of_target = [generators[i] for i in row.tolist()] if draws else None
                    on_rows = (mask & rows).any(1)
                    where = modality, on_rows, (row, place), of_target
                    tracks.append(_Track(*where, first, solver, times[skipped:], skipped))
        return tracks

    def _draw_noise(self, layout: SequenceLayout, like: Tensor, generators: list) -> Tensor:
        """Noise at the targets, drawn row by row on the CPU so that no row depends on its neighbours or padding."""
        noise = torch.zeros(like.shape, dtype=torch.float32, device="cpu")
        mask = layout.is_target.cpu()
        for row, generator in enumerate(generators):
            count = int(mask[row].sum())
            noise[row, mask[row]] = torch.randn(count, like.shape[-1], generator=generator, device="cpu")
        return noise.to(like.device)

    def likeliest_tokens(self, latents: Tensor, is_word: Tensor) -> Tensor:
        """The text tokens that latents (n, d) decode to, </s> left out where `is_word` (n,): (n,)."""
        config = self.config
        logits = check_finite(self.model.vae.decode_tokens(latents.to(self.dtype)).float(), "text")
        logits[:, [*config.control_token_ids, *config.placeholder_token_ids]] = -torch.inf
        for end in config.end_token_ids:
            logits[:, end].masked_fill_(is_word, -torch.inf)
        return logits.argmax(-1)

    def _decode(self, view: "Denoiser", z: Tensor, input_ids: Tensor, known_images, pixel_values):
        """Latents of the active positions (b, m, d) -> MDMGenerateOutput (paper Sec. 4.2.2). A partly known image
        keeps its known patches."""
        layout, latents = view.full_layout, view.restore(z)
        sequences = input_ids.clone()
        text = layout.is_target & layout.is_text
        if bool(text.any()):
            sequences[text] = self.likeliest_tokens(latents[text], layout.must_be_word[text])
            sequences = torch.where(view.said < 0, sequences, view.said)
        images: list[list[Tensor]] = [[] for _ in range(len(input_ids))]
        wanted = layout.is_target & layout.is_patch
        for row in wanted.any(1).nonzero().flatten().tolist():
            for index in layout.image_index[row][wanted[row]].unique().tolist():
                at = layout.is_patch[row] & (layout.image_index[row] == index)
                h, w = layout.grid[row][at][0].tolist()
                is_known = (at & layout.is_known_patch[row] & ~layout.is_target[row])[at].view(h, w)
                i = int(layout.known_index[row][at][0])
                sources = (None if one is None else one[i] for one in (known_images, pixel_values))
                image = self.model.decode_image(latents[row][at].view(h, w, -1), is_known, *sources)
                images[row].append(check_finite(image, "image").clamp(-1, 1))
        return MDMGenerateOutput(sequences=sequences, images=images, latents=latents)
