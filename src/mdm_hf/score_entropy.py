"""Score entropy, the one objective of both modalities (paper Eq. 4-8, 14, Theorems 1 and 2).

Symbols
    y              a candidate state out of the set Y                                    last axis (..., k)
    r              true ratio p_data(y) / p_data(z_t), Eq. 5                             (..., k)
    s              the model's ratio s_theta, Eq. 6-7                                    (..., k)
    K(a)           a (log a - 1)                                                         (...)
    omega          weight of Eq. 4                                                       (...)
    z_0, z0_hat    clean latent and its prediction                                       (..., d)
    delta          z0_hat - z_0                                                          (..., d)

With Theorem 2's softmax both ratios sum to one, and Eq. 4 becomes the Kullback-Leibler divergence KL(r || s). For
text, Y is the vocabulary, and that is the cross-entropy. For images, Y are earlier states of the same position, and
that is a function of delta alone, the weighted squared error in closed form.

All functions return one value per position and average nothing over positions. `normaliser`, `theorem1_log_ratio` and
`log_ratio` are the paper's formulas as it writes them: no loss calls them, the tests hold the losses against them.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .noise_schedule import alpha_bar as alpha_bar_at
from .noise_schedule import noise_from, posterior, snr


LOGITS_IN_MEMORY = 2**24


def normaliser(a: Tensor) -> Tensor:
    """K(a) = a (log a - 1), with K(0) = 0: what makes Eq. 4 non-negative.

    K'(a) = log a has no limit at 0; the gradient there is set to 0, as a ratio of zero stays zero.
    """
    positive = torch.where(a > 0, a, torch.ones_like(a))
    return torch.where(a > 0, positive * (positive.log() - 1), torch.zeros_like(a))


def score_entropy(log_score: Tensor, log_ratio: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Eq. 4: sum over y of omega (s - r log s + K(r)), from logarithms: (..., k), (..., k) -> (...).

    `log_score` is log s, `weight` omega; `log_ratio`, log r, may be -inf. Non-negative, and zero only where s = r.

    With u = log s - log r a candidate's term is r (e^u - 1 - u), in which nothing larger than the result cancels if
    e^u is expanded at small u; the sum as Eq. 4 writes it is off by 1e-7, of either sign, near its minimum.

    Examples:
        >>> ratio = torch.tensor([0.2, 0.3, 0.5]).log()
        >>> score_entropy(ratio, ratio), score_entropy(ratio.flip(0), ratio)
        (tensor(0.), tensor(0.2749))
    """
    score, ratio = log_score.exp(), log_ratio.exp()
    possible = ratio > 0
    u = torch.where(possible, log_score, 0.0) - torch.where(possible, log_ratio, 0.0)
    small = u.abs() < 0.1
    near = torch.where(small, u, 0.0)
    series = torch.ones_like(near)
    for n in range(9, 2, -1):  # e^u - 1 - u = u^2 / 2 (1 + u / 3 (1 + u / 4 (...)))
        series = 1 + near / n * series
    term = torch.where(small, ratio * near**2 / 2 * series, score - ratio * (1 + u))
    return (weight * torch.where(possible, term, score)).sum(-1)


def theorem1_log_ratio(z_t: Tensor, z_0: Tensor, alpha_bar: Tensor) -> Tensor:
    """log of Eq. 5: ||z_t||^2 / 2 - ||z_t - sqrt(alpha_bar) z_0||^2 / (2 (1 - alpha_bar)): (..., d) -> (...).

    Eq. 5 leaves out the normalising constants of the two Gaussians; the log-ratio of the densities themselves is this
    minus d / 2 log(1 - alpha_bar). The constant is the same for every z_0 and cancels in Theorem 2's softmax.
    """
    level = alpha_bar.unsqueeze(-1)
    return (0.5 * z_t**2 - 0.5 * (z_t - level.sqrt() * z_0) ** 2 / (1 - level)).sum(-1)


def log_ratio(y: Tensor, z_t: Tensor, z_0: Tensor, alpha_bar_s: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """log q(y | z_t, z_0): Eq. 5 for candidates y at any earlier time s < t: (..., k, d), (..., d) -> (..., k).

    With z0_hat in place of z_0 it is f_theta(z_t, y) of Eq. 7. Both are log-ratios up to log p(y), which is the same
    in r and s. Normalising constants are kept; they are the same for all candidates of one s, but not between times.
    At s = 0, where `alpha_bar_s` is 1, the posterior is a point, of variance 1e-7; `alpha_bar_t` is that at t.
    """
    mean, variance = posterior(z_0, z_t, alpha_bar_s, alpha_bar_t)
    variance = variance.clamp(min=1e-7)
    distance = ((y - mean.unsqueeze(-2)) ** 2).sum(-1)
    return -0.5 * (distance / variance + y.shape[-1] * (2 * math.pi * variance).log())


def theorem2_log_score(energies: Tensor) -> Tensor:
    """log s_theta of Eq. 7: the log-softmax of the energies f_theta(z_t, y) over the candidates y: (..., k)."""
    return energies.log_softmax(-1)


def text_score_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 4 with Y = the vocabulary, r one-hot and s = softmax(logits): the cross-entropy: (..., v), (...) -> (...).

    Positions whose entry of `labels` is -100 give 0.
    """
    flat = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none", ignore_index=-100)
    return flat.view(labels.shape)


def chunked_text_score_entropy(
    decode: Callable[[Tensor], Tensor], latents: Tensor, labels: Tensor, vocab_size: int
) -> Tensor:
    """`text_score_entropy(decode(latents), labels)` without ever holding the logits of all positions: (...).

    Positions with label -100 are not decoded. The others are taken in chunks of 2^24 logits (64 MiB in fp32), whose
    logits are computed again in the backward pass: a third more work in the vocabulary head for a peak that does not
    grow with the batch.

    Args:
        decode: Latents (n, d) -> logits (n, vocab_size).
        latents: (..., d).
        labels: (...), token ids, or -100.
        vocab_size: v.
    """
    size = max(1, LOGITS_IN_MEMORY // vocab_size)
    is_labelled = labels != -100
    if torch.compiler.is_compiling():  # how many are labelled is not known to the graph
        wanted, targets = latents.flatten(0, -2), labels.flatten()
    else:
        wanted, targets = latents[is_labelled], labels[is_labelled]

    def of_chunk(part: Tensor, target: Tensor) -> Tensor:
        return text_score_entropy(decode(part), target)

    if len(wanted) <= size:
        losses = of_chunk(wanted, targets)
    else:
        parts = zip(wanted.split(size), targets.split(size), strict=True)
        losses = torch.cat([checkpoint(of_chunk, *part, use_reentrant=False) for part in parts])
    if torch.compiler.is_compiling():
        return losses.view(labels.shape)
    return losses.new_zeros(labels.shape).masked_scatter(is_labelled, losses)


def loss_weight(alpha_bar: Tensor, weighting: str) -> Tensor:
    """omega over the noise levels `alpha_bar`, as the weight of ||delta||^2: (...).

    "unit" is 1; "snr_plus_one" is SNR + 1, the squared error of the velocity; "min_snr" is min(SNR, 5), which starves
    the noisy steps in which an image's content is decided.

    Raises:
        ValueError: an unknown weighting.
    """
    if weighting == "unit":
        return torch.ones_like(alpha_bar)
    if weighting == "snr_plus_one":
        return 1 + snr(alpha_bar)
    if weighting == "min_snr":
        return snr(alpha_bar).clamp(max=5)
    raise ValueError(f"`weighting` is {weighting!r}; it must be 'unit', 'snr_plus_one' or 'min_snr'.")


def image_score_entropy_exact(z_0: Tensor, z0_hat: Tensor, weight: Tensor) -> Tensor:
    """Eq. 4 over all states at an earlier time s, in closed form: (..., d) -> (...).

    KL(q(z_s | z_t, z_0) || q(z_s | z_t, z0_hat)) = (SNR_s - SNR_t) / 2 ||delta||^2. The paper leaves omega open; it is
    taken such that the factor becomes `weight / d`, the same for every s.
    """
    return weight * ((z0_hat - z_0) ** 2).mean(-1)


def image_score_entropy_sampled(
    z_0: Tensor,
    z0_hat: Tensor,
    t: Tensor,
    table: Tensor,
    uniform: Tensor,
    candidates: Tensor,
) -> Tensor:
    """Eq. 4 over K sampled earlier states of the same position, normalised by Theorem 2: (..., d) -> (...).

    Candidates y_j = m + sqrt(v) e_j are drawn from q(z_s | z_t, z_0) = N(m, v) at one time s, uniform in (0, t). With
    energies log q(y | z_t, z_0) for r and f_theta = log q(y | z_t, z0_hat) for s, and a^2 = SNR_s - SNR_t:

        log r_j = -||e_j||^2 / 2 + const,    log s_j = log r_j + a e_j . delta + const.

    Neither difference cancels in fp32, and z_t itself drops out. All candidates share s: between times the densities'
    heights differ by v^(-d/2), the softmax would see only the smallest s, and no gradient would be left. For small
    delta the value is a^2 / 2 delta^T Cov_r(e) delta; omega = 2 / (a^2 d kappa), kappa the expected variance of e
    under r, puts it on the scale of `image_score_entropy_exact` with unit weight.

    Args:
        z_0, z0_hat: The clean latent and its prediction (..., d).
        t: Time of z_t in [0, 1] (...); where it is 0 the result is 0.
        table: alpha_bar over time, see `noise_schedule.alpha_bar_table`.
        uniform: s / t, drawn from [0, 1) (...).
        candidates: The e_j, drawn from N(0, I) (..., K, d).
    """
    num_candidates = candidates.shape[-2]
    if num_candidates < 2:
        raise ValueError(f"`candidates` holds {num_candidates} a position; a softmax over states needs at least 2.")
    s, e = t * uniform, candidates
    a = (snr(alpha_bar_at(s, table)) - snr(alpha_bar_at(t, table))).clamp(min=1e-6).sqrt()
    energy = _energy(e)
    log_r = theorem2_log_score(energy)
    projection = (e @ (z0_hat - z_0).unsqueeze(-1)).squeeze(-1)  # e_j . delta
    log_s = theorem2_log_score(energy + a.unsqueeze(-1) * projection)
    omega = 2 / (a**2 * z_0.shape[-1] * _mean_variance(num_candidates, z_0.shape[-1]))
    return torch.where(t > 0, omega * score_entropy(log_s, log_r), torch.zeros_like(a))


def _energy(candidates: Tensor) -> Tensor:
    return -0.5 * (candidates**2).sum(-1)


@torch.compiler.assume_constant_result
@cache
def _mean_variance(num_candidates: int, latent_size: int) -> float:
    """kappa, over 4096 draws of candidates: of one call's own it would make a row's loss depend on its batch."""
    with torch.device("cpu"):
        e = torch.randn(4096, num_candidates, latent_size, generator=torch.Generator().manual_seed(0))
    ratio = theorem2_log_score(_energy(e)).exp().unsqueeze(-1)
    return float(((ratio * e**2).sum(-2) - (ratio * e).sum(-2) ** 2).mean())


def ddpm_epsilon_loss(z0_hat: Tensor, noise: Tensor, z_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """||epsilon_hat - epsilon||^2 / d of the noise that z0_hat implies, the DDPM's own loss: (..., d) -> (...).

    `noise` is epsilon, and `z_t` what it made of the clean latent at `alpha_bar`.
    """
    return ((noise_from(z0_hat, z_t, alpha_bar) - noise) ** 2).mean(-1)
