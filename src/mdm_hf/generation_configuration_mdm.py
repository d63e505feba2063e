"""How a model samples: the options of `generate`, saved with the model as generation_config.json."""

import sys
from numbers import Real

import numpy as np
from transformers import GenerationConfig

from .prompts import whole
from .step_calibration import AUTO_STEPS, fewest_whole


SAMPLING_OPTIONS = (
    "num_inference_steps",
    "step_tolerance",
    "guidance_scale",
    "text_guidance_scale",
    "guidance_interval",
    "text_temperature",
    "modality_lag",
    "strength",
    "min_new_tokens",
    "selection_tolerance",
    "text_selection_tolerance",
    "use_cache",
)


class MDMGenerationConfig(GenerationConfig):
    """How [`MDMForMultiModalGeneration.generate`] samples.

    Args:
        num_inference_steps: Solver steps of each modality, each a network call; both may move in the same one. "auto"
            for the fewest that make the samples of 50 up to `step_tolerance`: measured on up to eight rows of the
            first call of a kind, and remembered by the model.
        step_tolerance: How far from those the latents may be, as a share of their size, where the steps are "auto".
        guidance_scale: Classifier-free guidance; 1 is none, at half the cost.
        text_guidance_scale: Guidance of text where it is to differ from that of images; None is `guidance_scale`.
        guidance_interval: (low, high), the times t of a modality between which it is guided; 1 is pure noise, 0 done.
            Guided from pure noise on, pictures of what may look many ways become the mean of them, and pale beyond it;
            with (0, 0.7) the noise decides first (Kynkäänniemi et al. 2024), and calls that guide nothing cost half.
            None is (0, 1), in a call the model's own.
        text_temperature: Divides the token logits before they become the next text latent: below 1 commits to the
            likelier tokens sooner.
        modality_lag: Where image and text are generated together, by what share of its steps one runs ahead: 0 both
            at once, 1 the text is done before the image starts, -1 the reverse. It takes `num_inference_steps * (1 +
            |modality_lag|)` network calls.
        strength: Where all that is targeted is known already, as in an image to be changed, how much of the way from
            it to noise is gone before it is denoised: 1 keeps nothing of it, 0.5 starts at t = 0.5, with half of the
            network calls. It is rounded to whole steps; half a step or less is refused.
        min_new_tokens: No text ends before it has so many tokens, or as many as its canvas. An end that is known,
            where the middle of a text alone is made, stays.
        selection_tolerance: Token selection (paper Sec. 3.2, Theorem 3): targets whose score entropy is at most this
            are frozen, projected once more as conditions and then skipped, so that later network calls cost less.
            None is off, and in a call the model's own; False is off, in a call for texts too unless it names those.
        text_selection_tolerance: That of text where it is to differ from that of images; None is
            `selection_tolerance`, False is off. 0.5 freezes a token that has 61% of the probability: words then follow
            each other better, as what is still open sees what is decided, and not a mean of all that it may be.
        use_cache: Compute the conditions once instead of in every step; the samples are the same.
    """

    pad_token_id = None  # pipelines of older transformers look for it

    def __init__(self, **kwargs):
        # The parent's token-by-token options do not apply and are left out.
        kwargs = {name: _plain(value) for name, value in kwargs.items()}
        self.num_inference_steps = kwargs.pop("num_inference_steps", 20)
        self.step_tolerance = kwargs.pop("step_tolerance", 0.05)
        self.guidance_scale = kwargs.pop("guidance_scale", 1.0)
        self.text_guidance_scale = kwargs.pop("text_guidance_scale", None)
        self.guidance_interval = kwargs.pop("guidance_interval", None)
        self.text_temperature = kwargs.pop("text_temperature", 1.0)
        self.modality_lag = kwargs.pop("modality_lag", 1.0)
        self.strength = kwargs.pop("strength", 1.0)
        self.min_new_tokens = kwargs.pop("min_new_tokens", 0)
        self.selection_tolerance = kwargs.pop("selection_tolerance", None)
        self.text_selection_tolerance = kwargs.pop("text_selection_tolerance", None)
        self.use_cache = kwargs.pop("use_cache", True)
        self._from_model_config = kwargs.pop("_from_model_config", False)
        self._commit_hash = kwargs.pop("_commit_hash", None)
        self._original_object_hash = None
        self.transformers_version = kwargs.pop("transformers_version", None)
        kwargs.pop("generation_config_class", None)
        if kwargs:
            raise ValueError(
                f"Unknown generation option(s) {sorted(kwargs)}; MDM knows {', '.join(SAMPLING_OPTIONS[:-1])} and "
                f"{SAMPLING_OPTIONS[-1]}."
            )
        self.validate()

    def validate(self, **kwargs):
        steps, lag = self.num_inference_steps, self.modality_lag
        is_auto = isinstance(steps, str) and steps == AUTO_STEPS
        if not is_auto and whole(steps, 1) is None:
            raise ValueError(f"`num_inference_steps` is {steps!r}; it must be a whole number, 1 or more, or 'auto'.")
        allowed = self.step_tolerance
        if not _is_number(allowed) or allowed <= 0:
            raise ValueError(f"`step_tolerance` is {allowed!r}; it must be a number above 0 (0.05 is a twentieth).")
        for name in ("guidance_scale", "text_guidance_scale"):
            scale = getattr(self, name)
            if name == "text_guidance_scale" and scale is None:
                continue
            if not _is_number(scale) or scale < 0:
                raise ValueError(f"`{name}` is {scale!r}; it must be a number, 0 or more (1 is no guidance).")
        if self.guidance_interval is not None:
            ends = self.guidance_interval
            is_pair = isinstance(ends, list | tuple) and len(ends) == 2 and all(map(_is_number, ends))
            if not is_pair or not 0 <= ends[0] <= ends[1] <= 1:
                raise ValueError(
                    f"`guidance_interval` is {ends!r:.80}; it must be two times, low and high, with 0 <= low <= high "
                    "<= 1 (1 is pure noise), or None for all."
                )
            self.guidance_interval = [float(end) for end in ends]
        heat = self.text_temperature
        if not _is_number(heat) or heat <= 0:
            raise ValueError(f"`text_temperature` is {heat!r}; it must be a number above 0 (1 is the model's own).")
        if not _is_number(lag) or not -1 <= lag <= 1:
            raise ValueError(f"`modality_lag` is {lag!r}; it must lie in [-1, 1] (1 is text first, -1 image first).")
        strength = self.strength
        if not _is_number(strength) or not 0 < strength <= 1:
            raise ValueError(f"`strength` is {strength!r}; it must lie in (0, 1] (1 keeps nothing of what is known).")
        if not is_auto and round(steps * strength) < 1:
            raise ValueError(
                f"`strength` is {strength!r} of num_inference_steps = {steps}, half a step or less; raise one of "
                f"the two, the steps to {fewest_whole(strength)} or more."
            )
        least = self.min_new_tokens
        if (fewest := whole(least, 0)) is None or fewest >= 2**63:
            raise ValueError(f"`min_new_tokens` is {least!r:.60}; it must be a whole number, 0 or more, below 2**63.")
        for name in ("selection_tolerance", "text_selection_tolerance"):
            tolerance = getattr(self, name)
            if tolerance is None or tolerance is False:
                continue
            if not _is_number(tolerance) or not 0 <= tolerance < 1e9:
                raise ValueError(
                    f"`{name}` is {tolerance!r}; it must be a number, 0 or more, False for none, or None."
                )
            if not self.use_cache:
                raise ValueError(
                    f"Got {name} = {tolerance}, of the call or else the model's own, with use_cache=False; it needs "
                    f"the cache; switch it off with {name}=False, or leave use_cache out."
                )

    @staticmethod
    def _get_default_generation_params() -> dict:
        return {}

    def get_generation_mode(self, *args, **kwargs):
        raise NotImplementedError("MDM samples by diffusion; it has no token-by-token generation mode.")

    @classmethod
    def from_model_config(cls, *args, **kwargs):
        raise NotImplementedError("A model config holds no generation options of MDM; use MDMGenerationConfig(...).")


def _plain(value):
    """Numbers of NumPy, and fractions, as Python's."""
    value = value.item() if isinstance(value, np.generic) else value
    return float(value) if isinstance(value, Real) and not isinstance(value, int | float) else value


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def sampling_options(config) -> dict:
    return {name: getattr(config, name) for name in SAMPLING_OPTIONS if getattr(config, name, None) is not None}
