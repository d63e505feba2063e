"""Scoring: a bound on log p(targets | conditions), by Monte Carlo (docs/mathematics.md, Eq. S1-S6).

Symbols
    a          alpha_bar; a_0 at the smallest noise t = 1 / T, a_1 at t = 1; SNR = a / (1 - a)      (...)
    n, s       draws of a row; strata, of which each has two draws, n = 2 s
    q(a)       density that noise levels are drawn with: a mixture of uniform a and uniform log(1 - a)
    z_0        clean latent: of text its codebook entry, of a patch a sample of the VAE's posterior  (..., d)

What a draw costs is one network call over the target group. Conditions never see t: rows with the same conditions
share one pass over them, and all draws start from its states.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .configuration_mdm import MDMConfig
from .input_checks import check_inputs, check_labels, check_scored
from .modeling_mdm_vae import patchify, reconstruction_loss
from .noise_schedule import add_noise, alpha_bar
from .score_entropy import LOGITS_IN_MEMORY, text_score_entropy
from .sequence_layout import SequenceLayout, image_of_each_row, pick, plan_scans, positions, rows_of


# Share of q(a) that is uniform in a; the rest is uniform in log(1 - a). Text is decided where SNR is about 1, patches
# gain d / 2 nats with every factor e of SNR down to the smallest noise: docs/mathematics.md has both measured.
UNIFORM_SHARE = {"text": 0.75, "image": 0.25}


@dataclass
class MDMScoreOutput(ModelOutput):
    """What [`MDMForMultiModalGeneration.score`] returns, in nats.

    Args:
        log_likelihood: (b,), an estimate of a lower bound on log p(targets | conditions).
        standard_error: (b,), of that estimate, from the spread inside the strata.
        text_log_likelihood, image_log_likelihood: (b,), its parts: log probability of the text tokens, log density of
            the patches' pixels.
        draws: (b, num_samples), whose mean is `log_likelihood`; neighbours 2 i and 2 i + 1 are of one stratum.
        num_text_targets, num_image_targets: (b,), tokens and patches scored, to normalise by.
    """

    log_likelihood: Tensor | None = None
    standard_error: Tensor | None = None
    text_log_likelihood: Tensor | None = None
    image_log_likelihood: Tensor | None = None
    draws: Tensor | None = None
    num_text_targets: Tensor | None = None
    num_image_targets: Tensor | None = None


def stratified_error(draws: Tensor) -> Tensor:
    """Standard error of the mean of `draws` (..., 2 s), two neighbours a stratum: (...). Of a difference of two rows
    that share their noise it is the error of the difference of their draws."""
    pairs = draws.unflatten(-1, (-1, 2))
    return (pairs.diff(dim=-1).squeeze(-1) ** 2).sum(-1).sqrt() / (2 * pairs.shape[-2])


def noise_levels(uniform: Tensor, low: float, high: float, share: float) -> tuple[Tensor, Tensor]:
    """Stratified draws of a in [low, high] and their density q(a), from uniform numbers (n,), in float64: (n,), (n,).

    Args:
        share: Of q that is uniform in a; the rest is uniform in log(1 - a).
    """
    n = len(uniform)
    rank = (torch.arange(n, device=uniform.device) // 2 + uniform.double()) / (n // 2)
    width, log_width = high - low, math.log1p(-low) - math.log1p(-high)
    below, above = torch.zeros_like(rank), torch.ones_like(rank)
    for _ in range(60):  # of q's distribution function, which rises, by halving
        x = (below + above) / 2
        a = low + width * x
        is_low = share * x + (1 - share) * (math.log1p(-low) - torch.log1p(-a)) / log_width < rank
        below, above = torch.where(is_low, x, below), torch.where(is_low, above, x)
    a = low + width * below
    return a, share / width + (1 - share) / (log_width * (1 - a))


def time_of(a: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """t at which alpha_bar is `a`, and -d alpha_bar / dt there; the inverse of `noise_schedule.alpha_bar`, in
    float64."""
    log_table, steps = table.double().log(), len(table) - 1
    below = (torch.searchsorted(-log_table, -a.log()) - 1).clamp(0, steps - 1)
    drop = log_table[below] - log_table[below + 1]
    return (below + (log_table[below] - a.log()) / drop) / steps, a * drop * steps


class MDMScoringMixin:
    """Gives the model `score`. Knows the model only through `self`."""

    config: MDMConfig
    model: Any
    dtype: torch.dtype

    @torch.no_grad()
    def score(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        class_ids: Tensor | None = None,
        *,
        num_samples: int = 32,
        seeds: Tensor | None = None,
        batch_size: int = 64,
        labels: Tensor | None = None,
        image_latents: Tensor | None = None,
    ) -> MDMScoreOutput:
        """A bound on log p(targets | conditions) of each row, in nats, with its standard error (Eq. S1).

        Text is bounded as the probability of its tokens, the </s> that fill its canvas included. Images are bounded as
        the density of their pixels in [-1, 1] (behind a pixel autoencoder: of its latents), with Eq. 15's squared
        error read as a Gaussian of variance 1/2. In a row that targets both, both are noised at the same t.

        Args:
            input_ids, pixel_values, image_grid_hw, attention_mask, target_mask, class_ids, labels, image_latents: As
                in `forward`, for training: targets hold what is to be scored. `processor.apply_chat_template` makes
                them of a conversation that ends with the assistant's message.
            num_samples: Draws a row, an even number; the standard error falls at least with its root.
            seeds: (b,) one whole number a row, all that its draws depend on. Rows with equal seeds share times and
                noise, so that differences between them vary far less than their scores. Drawn if absent.
            batch_size: Rows of one network call; it changes nothing but memory and speed.

        Raises:
            ValueError: inputs that do not fit together, no target, or a target without what is to be scored.
        """
        if labels is not None:
            check_labels(self.config, input_ids, labels, attention_mask, target_mask)
            input_ids = torch.where(labels >= 0, labels, input_ids)
        fixed = image_grid_hw, attention_mask, target_mask
        check_inputs(self.config, input_ids, pixel_values, *fixed, class_ids, seeds=seeds, image_latents=image_latents)
        input_ids = input_ids.long()
        layout = self.model.layout(input_ids, *fixed)
        check_scored(self.config, layout, num_samples, batch_size)
        if seeds is None:
            seeds = torch.randint(2**62, (len(input_ids),), device="cpu")
        known_images = self.model.known_images(layout, pixel_values, image_latents)
        view = _Scorer(self, layout, known_images, class_ids, seeds.tolist(), num_samples)
        everything = torch.arange(len(seeds) * num_samples, device=input_ids.device).split(batch_size)
        bound = torch.cat([view.bound(part // num_samples, part % num_samples) for part in everything])
        bound = bound.view(len(seeds), num_samples, 2)
        return MDMScoreOutput(
            log_likelihood=bound.sum(-1).mean(1),
            standard_error=stratified_error(bound.sum(-1)),
            text_log_likelihood=bound[..., 1].mean(1),
            image_log_likelihood=bound[..., 0].mean(1),
            draws=bound.sum(-1),
            num_text_targets=(layout.is_target & layout.is_text).sum(1),
            num_image_targets=(layout.is_target & layout.is_patch).sum(1),
        )


class _Scorer:
    """The model seen from `score`: conditions cached, what each row draws, the bound of any of its draws."""

    def __init__(self, model, layout: SequenceLayout, known_images: Tensor | None, class_ids, seeds: list, n: int):
        self.model, config = model, model.config
        posterior = model.model.encode(layout, layout.input_ids, known_images)
        self._encode_conditions(layout, posterior.mean.float(), class_ids)
        index, is_real = positions(layout.in_target_group & ~layout.is_padding)
        self.layout = layout.select(index, is_real)
        self.plan = plan_scans(config, self.layout, self.has_image)
        self.codebook = model.model.vae.codebook(index.device)
        self.mean = pick(posterior.mean.float(), index)
        is_text = self.layout.is_text.unsqueeze(-1)
        self.mean = torch.where(is_text, self.codebook[self.layout.input_ids], self.mean)  # exactly an entry of it
        self.log_variance = pick(posterior.log_variance.float(), index)
        self.patches = None
        if known_images is not None:
            patches = patchify(known_images, config.vae_config.patch_size).float()
            _, h, w, _ = patches.shape
            place = self.layout.row.clamp(max=h - 1), self.layout.column.clamp(max=w - 1)
            self.patches = patches[self.layout.known_index, *place]
        self.tables = [table.double() for table in (model.model.image_alpha_bar, model.model.text_alpha_bar)]
        self._draw(seeds, n)

    def _encode_conditions(self, layout: SequenceLayout, latents: Tensor, class_ids: Tensor | None) -> None:
        """One pass over the prefixes that differ; `prefix_of` says which of them a row has."""
        model = self.model.model
        has_image = image_of_each_row(layout)
        self.has_image = has_image if bool(has_image.any()) else None
        self.class_ids = torch.full_like(layout.input_ids[:, 0], -1) if class_ids is None else class_ids
        index, is_real = positions(~layout.in_target_group & ~layout.is_padding)
        prefix, latents = layout.select(index, is_real), pick(latents, index)
        of_patches = torch.where(prefix.is_patch.unsqueeze(-1), latents, 0.0).flatten(1).double()
        told = torch.stack([prefix.input_ids, prefix.row, prefix.column, prefix.segment - prefix.segment[:, :1]])
        told = torch.where(is_real, told, -1).movedim(0, 1).flatten(1)
        of_row = torch.stack([self.class_ids, has_image.long()], dim=1)
        _, self.prefix_of = torch.cat([told, of_row, of_patches], dim=1).unique(dim=0, return_inverse=True)
        first = torch.arange(len(latents) - 1, -1, -1, device=latents.device)
        some = torch.empty_like(first[: int(self.prefix_of.max()) + 1]).index_put((self.prefix_of[first],), first)
        has_image = None if self.has_image is None else has_image[some]
        self.cache = self.model.new_condition_cache()
        model.read_conditions(latents[some], rows_of(prefix, some), has_image, self.class_ids[some], self.cache)
        for states in self.cache:
            states.is_open = False

    def _draw(self, seeds: list[int], n: int) -> None:
        """Times, weights of the squared errors (b, n, 2; image, text), and noise (b, n, 2, m, d) at the targets."""
        is_target, patches = (
            self.layout.is_target.cpu(),
            (self.layout.is_target & self.layout.is_patch).any(1).tolist(),
        )
        b, m, d = self.mean.shape
        self.time, self.weight, self.level = (
            torch.empty(b, n, *last, dtype=torch.float64, device="cpu") for last in ((), (2,), (2,))
        )
        self.noise = torch.zeros(b, n, 2, m, d, device="cpu")
        for row, seed in enumerate(seeds):
            drawn: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "device": "cpu"}
            own = self.tables[0 if patches[row] else 1].cpu()  # of the modality that levels are drawn for
            share = UNIFORM_SHARE["image" if patches[row] else "text"]
            uniform = torch.rand(n, dtype=torch.float64, **drawn)
            a, density = noise_levels(uniform, float(own[-1]), float(own[1]), share)
            t, slope = time_of(a, own)
            self.time[row] = t
            for i, table in enumerate(self.tables):
                level = a if table.equal(own) else alpha_bar(t, table.cpu())
                of_time = time_of(level, table.cpu())[1] / slope  # 1 where both modalities have one schedule
                self.level[row, :, i], self.weight[row, :, i] = level, of_time / (2 * (1 - level) ** 2 * density)
            noise = [torch.randn(n, 2, d, **drawn) for _ in range(int(is_target[row].sum()))]
            self.noise[row, :, :, is_target[row]] = torch.stack(noise, dim=2)

    def bound(self, rows: Tensor, draws: Tensor) -> Tensor:
        """Eq. S1 with one draw, of `draws` (p,) of `rows` (p,): (p, 2), image and text, in float64."""
        layout, device = rows_of(self.layout, rows), rows.device
        at = rows.cpu(), draws.cpu()
        noise, posterior_noise = self.noise[at].to(device).unbind(1)
        patch, text = layout.is_target & layout.is_patch, layout.is_target & layout.is_text
        z_0 = self.mean[rows]
        sampled = z_0 + (0.5 * self.log_variance[rows]).exp() * posterior_noise
        z_0 = torch.where(patch.unsqueeze(-1), sampled, z_0)
        level, weight = self.level[at].to(device), self.weight[at].to(device)
        of_position = torch.where(layout.is_patch, level[:, :1], level[:, 1:]).masked_fill(~layout.is_target, 1.0)
        z_t = add_noise(z_0, noise, of_position.float())
        time = self.time[at].float().to(device).unsqueeze(1).expand(-1, 2)
        error = (self.predict(z_t, rows, layout, time) - z_0).square().sum(-1)
        value = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)
        for i, (mask, table) in enumerate(zip((patch, text), self.tables, strict=True)):
            value[:, i] -= weight[:, i] * (error * mask).sum(1)  # S2
            value[:, i] -= (_gaussian_kl(z_0, float(table[-1])) * mask).sum(1)  # S3
        if bool(text.any()):  # S4
            first = float(self.tables[1][1])
            logits_at = (z_0 + ((1 - first) / first) ** 0.5 * noise)[text]
            entropy = self._by_chunks(self._entropy, logits_at, layout.input_ids[text])
            value[:, 1] -= torch.zeros_like(error).masked_scatter(text, entropy).sum(1)
        if bool(patch.any()):  # S5, S6
            value[:, 0] += (self._of_patches(z_0, rows) * patch).sum(1)
        return value

    def predict(self, z_t: Tensor, rows: Tensor, layout: SequenceLayout, time: Tensor) -> Tensor:
        """z0-hat (p, m, d) from z_t of `rows`: of text the codebook's mean under the predicted tokens."""
        model, of_prefix = self.model, self.prefix_of[rows]
        cache = [states.take(of_prefix) for states in self.cache]
        hidden = model.model.denoise(z_t, layout, rows_of(self.plan, rows), time, self.class_ids[rows], cache)
        z_0 = model.predict_latents(hidden, z_t, model.model.alpha_bar_at(layout, time))
        text = layout.is_text & layout.is_target
        expected = self._by_chunks(lambda z: self._logits(z).softmax(-1) @ self.codebook, z_0[text])
        return z_0.masked_scatter(text.unsqueeze(-1), expected)

    def _logits(self, latents: Tensor) -> Tensor:
        return self.model.model.vae.decode_tokens(latents.to(self.model.dtype)).float()

    def _entropy(self, latents: Tensor, ids: Tensor) -> Tensor:
        return text_score_entropy(self._logits(latents), ids)

    def _by_chunks(self, of_chunk, *values: Tensor) -> Tensor:
        """`of_chunk` of text positions, without ever holding the logits of all of them."""
        size = max(1, LOGITS_IN_MEMORY // len(self.codebook))
        return torch.cat([of_chunk(*part) for part in zip(*(value.split(size) for value in values), strict=True)])

    def _of_patches(self, z_0: Tensor, rows: Tensor) -> Tensor:
        """log p(pixels | z_0) - log q(z_0 | pixels) + log p(z_0 | z at the smallest noise), the Gaussians' means over
        their own noise in closed form: (p, m)."""
        vae, first = self.model.model.vae, float(self.tables[0][1])
        patches = self.patches[rows]
        found = vae.pixel_head(vae.decoder(z_0.to(self.model.dtype))).float()
        seen = -reconstruction_loss(patches, found) - patches.shape[-1] / 2 * math.log(math.pi)
        finest = math.log((1 - first) / first)  # log-variance of z_0 given z at the smallest noise
        return seen + 0.5 * (self.log_variance[rows] - finest).sum(-1)


def _gaussian_kl(z_0: Tensor, a: float) -> Tensor:
    """D_KL(q(z_1 | z_0) || N(0, I)) at alpha_bar a: (..., d) -> (...)."""
    return 0.5 * (a * z_0**2 - a - math.log1p(-a)).sum(-1)
