"""Forward noise: the DDPM schedule and what follows from it in closed form (paper Eq. 1-3).

Symbols
    t              time in [0, 1]; t = k / T is the DDPM's step k, 0 is clean                (...)
    alpha_bar      product of alpha up to t, the share of signal variance in z_t             (...)
    z_0, z_t       clean and noisy latents                                                   (..., d)
    epsilon        unit Gaussian noise                                                       (..., d)
    SNR            alpha_bar / (1 - alpha_bar)

Functions of latents take `alpha_bar` without the latent axis; they add it.
"""

import math

import torch
from torch import Tensor


BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def alpha_bar_table(
    num_train_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    beta_schedule: str = "linear",
) -> Tensor:
    """alpha_bar at t = 0, 1 / T, ..., 1, in float64: (T + 1,). Schedules have their names and values of diffusers.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end: Ends of the betas; "squaredcos_cap_v2" has its own.
        beta_schedule: One of `BETA_SCHEDULES`.

    Raises:
        ValueError: an unknown schedule; betas that are no shares of variance in rising order; more noise at t = 1 than
            float32 can tell from nothing but noise.

    Examples:
        >>> alpha_bar(torch.tensor([0.0, 0.5, 1.0]), alpha_bar_table())
        tensor([1.0000e+00, 7.8587e-02, 4.0358e-05])
    """
    steps = num_train_timesteps
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"`beta_start` and `beta_end` are {beta_start} and {beta_end}; need 0 < beta_start <= beta_end < 1: the "
            "DDPM has 1e-4 and 0.02."
        )
    if beta_schedule == "linear":
        beta = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    elif beta_schedule == "scaled_linear":
        beta = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    elif beta_schedule == "squaredcos_cap_v2":
        angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
        survival = angle.cos() ** 2
        beta = (1 - survival[1:] / survival[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"`beta_schedule` is {beta_schedule!r}; it must be one of {', '.join(BETA_SCHEDULES)}.")
    table = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, dim=0)])
    if not table[-1] > torch.finfo(torch.float32).tiny:
        raise ValueError(
            f"`beta_end` {beta_end} over {steps} steps (`num_train_timesteps`) leaves alpha_bar = {table[-1]:.1e} at "
            f"t = 1; float32 has none below {torch.finfo(torch.float32).tiny:.1e}; lower one of the two."
        )
    return table


def alpha_bar(t: Tensor, table: Tensor) -> Tensor:
    """alpha_bar at any t in [0, 1]; log alpha_bar is linear between the table's entries: the shape of t.

    In float64 if t is, else in float32, whatever the table's type: a half-precision t * T would miss its entry.
    """
    steps = table.shape[0] - 1
    dtype = torch.promote_types(t.dtype, torch.float32)
    position = t.to(dtype) * steps
    below = position.floor().clamp(0, steps - 1).long()
    log_table = table.to(torch.promote_types(table.dtype, dtype)).log().to(dtype)
    return torch.lerp(log_table[below], log_table[below + 1], position - below).exp()


def snr(alpha_bar: Tensor) -> Tensor:
    """alpha_bar / (1 - alpha_bar), finite also where there is no noise."""
    return alpha_bar / (1 - alpha_bar).clamp(min=1e-7)


def add_noise(z_0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) epsilon (Eq. 1), where `noise` is epsilon.

    Examples:
        >>> z_0, noise = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
        >>> level = torch.tensor([0.9, 0.1]).view(2, 1).expand(2, 3)
        >>> torch.allclose(noise_from(z_0, add_noise(z_0, noise, level), level), noise, atol=1e-5)
        True
    """
    level = alpha_bar.unsqueeze(-1)
    return level.sqrt() * z_0 + (1 - level).sqrt() * noise


def noise_from(z_0: Tensor, z_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The epsilon that takes z_0 to z_t at alpha_bar: Eq. 1 solved for it."""
    level = alpha_bar.unsqueeze(-1)
    return (z_t - level.sqrt() * z_0) / (1 - level).clamp(min=1e-7).sqrt()


def posterior(z_0: Tensor, z_t: Tensor, alpha_bar_s: Tensor, alpha_bar_t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (..., d) and variance (..., 1) of q(z_s | z_t, z_0) for any earlier s < t; Eq. 3 has s = t - 1.

    Their alpha_bar are `alpha_bar_s` and `alpha_bar_t`.
    The mean is written as sqrt(alpha_bar_s) z_0 plus what is left of the noise, so that it is z_0 where t is clean.
    """
    s, t = alpha_bar_s.unsqueeze(-1), alpha_bar_t.unsqueeze(-1)
    step = t / s  # alpha-bar from s to t
    left = (1 - s) / (1 - t).clamp(min=1e-7)  # share of z_t's noise variance that z_s has
    mean = s.sqrt() * z_0 + left * step.sqrt() * (z_t - t.sqrt() * z_0)
    return mean, left * (1 - step)
