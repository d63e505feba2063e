"""Solvers from diffusers: which of them can drive MDM, and the copy of one for each modality (paper Sec. 8)."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor
from transformers.utils import logging

from .checkpoints import SOLVER, read_json
from .configuration_mdm import MDMConfig


logger = logging.get_logger(__name__)

EARLIEST_START = 0.95  # of a solver's time grid: the model was shown pure noise at t = 1
USABLE_SOLVERS = "use DPMSolverMultistepScheduler, UniPCMultistepScheduler, DDIMScheduler or DDPMScheduler."


def _on_cpu(make: Callable) -> Callable:
    """A solver is made on the CPU whatever torch's default device is: no step waits for the device."""

    @wraps(make)
    def on_cpu(*args, **kwargs):
        with torch.device("cpu"):
            return make(*args, **kwargs)

    return on_cpu


@_on_cpu
def default_solver(config: MDMConfig) -> DPMSolverMultistepScheduler:
    """Second-order DPM-Solver++ (Eq. 9, 62) on the betas of `config`."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.image_beta_schedule,
        prediction_type="sample",
        solver_order=2,
    )


@_on_cpu
def solver_named(name: str, config: MDMConfig):
    """The scheduler of diffusers called `name`, on the betas of `config` and told to take clean latents.

    Raises:
        ValueError: diffusers has no scheduler of that name, or one that cannot be made from betas.
    """
    kind: Any = getattr(diffusers, name, None)
    is_scheduler = (
        isinstance(kind, type)
        and issubclass(kind, diffusers.SchedulerMixin)
        and issubclass(kind, diffusers.ConfigMixin)
    )
    if not is_scheduler:
        raise ValueError(
            f"`scheduler` is {name!r}, which names no scheduler of diffusers {diffusers.__version__}; {USABLE_SOLVERS}"
        )
    known = {*inspect.signature(kind.__init__).parameters, "_use_default_values"}  # diffusers warns of others
    try:
        return kind.from_config({name: v for name, v in default_solver(config).config.items() if name in known})
    except Exception as error:  # one for other noise than ours; each says so in its own way
        raise ValueError(
            f"`scheduler` is {name!r}, which cannot be made from the model's betas ({error}); {USABLE_SOLVERS}"
        ) from error


@_on_cpu
def solver_for(scheduler, config: MDMConfig, modality: str, length: int, alpha_bar: Tensor) -> tuple[Any, list[float]]:
    """A fresh copy of `scheduler` on the modality's betas, and t in [0, 1] at each of its `length` network calls.

    Args:
        alpha_bar: (T + 1,), the modality's own noise schedule, which the solver's has to equal.

    Raises:
        ValueError: a scheduler that cannot drive MDM, with what to use instead.
    """
    kind = type(scheduler).__name__
    if isinstance(scheduler, type):
        raise ValueError(
            f"`scheduler` is the class {scheduler.__name__}; it must be one of its objects, or its name; pass "
            f"scheduler={scheduler.__name__!r}."
        )
    if "prediction_type" not in getattr(scheduler, "config", {}):
        raise ValueError(
            f"`scheduler` ({kind}) has no `prediction_type`; it must be a diffusers scheduler that can be told to "
            f"take clean latents; {USABLE_SOLVERS}"
        )
    given = scheduler.config
    if given.get("prediction_type") != "sample":
        raise ValueError(
            f"`scheduler` ({kind}) has prediction_type {given.get('prediction_type')!r}, but MDM predicts clean "
            f'latents; build it with {kind}.from_config(scheduler.config, prediction_type="sample").'
        )
    if given.get("num_train_timesteps") != config.num_train_timesteps:
        raise ValueError(
            f"`scheduler` has num_train_timesteps {given.get('num_train_timesteps')}, the model was trained with "
            f"{config.num_train_timesteps}; make them equal."
        )
    if str(given.get("variance_type", "")).startswith("learned"):
        raise ValueError(
            f"`scheduler` ({kind}) has variance_type {given['variance_type']!r}, but MDM predicts no variance; build "
            'it with variance_type="fixed_small".'
        )
    # What would bend the model's own noise schedule, or cut its latents to the range of pixels.
    bent: dict[str, Any] = {
        "trained_betas": None,
        "rescale_betas_zero_snr": False,
        "clip_sample": False,
        "thresholding": False,
        "use_flow_sigmas": False,
    }
    if given.get("timestep_spacing") == "leading":  # starts at t < 1, where the latents are no longer pure noise
        bent["timestep_spacing"] = "trailing"
    try:
        solver = type(scheduler).from_config(
            given,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule=getattr(config, f"{modality}_beta_schedule"),
            **{name: value for name, value in bent.items() if name in given},
        )
        solver.set_timesteps(length)
    except Exception as error:  # each solver fails in its own way at what it cannot do
        raise ValueError(
            f"`scheduler` ({kind}) cannot make {length} steps on the model's noise schedule ({error}); "
            f"{USABLE_SOLVERS}"
        ) from error
    sigma = float(getattr(solver, "init_noise_sigma", "nan"))
    if sigma != 1:
        raise ValueError(
            f"`scheduler` ({kind}) starts from noise of scale {sigma:.3g}: it scales its samples, MDM keeps them "
            f"at unit variance; {USABLE_SOLVERS}"
        )
    own = getattr(solver, "alphas_cumprod", None)
    if own is None or not torch.allclose(own.float(), alpha_bar[1:], atol=1e-4):
        raise ValueError(
            f"`scheduler` ({kind}) bends the noise schedule that the model was trained with; {USABLE_SOLVERS}"
        )
    times = ((solver.timesteps.double() + 1) / config.num_train_timesteps).tolist()
    if len(times) != length:
        raise ValueError(
            f"`scheduler` ({kind}) makes {len(times)} network calls of {length} steps; it must make one call a "
            f"step; {USABLE_SOLVERS}"
        )
    if times[0] < EARLIEST_START or sorted(times, reverse=True) != times:
        raise ValueError(
            f"`scheduler` ({kind}) runs from t = {times[0]:.3g} to {times[-1]:.3g}; it must start near 1, where "
            f"the latents are pure noise, and fall; {USABLE_SOLVERS}"
        )
    return solver, times


@_on_cpu
def load_solver(path, subfolder: str = "", is_needed: bool = False, **repository):
    """The solver of a folder or repository, of whatever class was saved; None if there is none.

    Raises:
        ValueError: its file is not whole, or `is_needed` and missing, or of a class that diffusers does not have.
    """
    config = read_json(path, SOLVER, subfolder, is_needed, **repository)
    if config is None:
        logger.info(f"{path} has no {SOLVER}; using the model's default solver.")
        return None
    kind = config.get("_class_name")
    if not isinstance(kind, str) or not hasattr(diffusers, kind):
        raise ValueError(
            f"{path} was saved with the scheduler {kind!r}, which diffusers {diffusers.__version__} does not have; "
            f"update diffusers, or mend {SOLVER}."
        )
    return getattr(diffusers, kind).from_config(config)
