"""Unified VAE: image patches and text tokens share one latent space (paper Sec. 4.1, 4.2.2, Eq. 15-17).

Symbols
    g          a patch or a token embedding, one position of a sequence   (..., h)
    mu, log_variance   parameters of q(z | g) = N(mu, sigma^2)            (..., d)
    z          latent, z = mu + sigma * epsilon                           (..., d)

Both modalities pass through the *same* encoder and the *same* decoder; only the layers at the very ends (patch and
token embedding, pixel and vocabulary head) are their own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .checkpoints import MDMCheckpointMixin
from .configuration_mdm import MDMVAEConfig


LOG_VARIANCE_RANGE = (-12.0, 4.0)


@dataclass
class MDMLatentPosterior(ModelOutput):
    """q(z | g) = N(mean, exp(log_variance)) at each position.

    Args:
        mean: (..., latent_size).
        log_variance: (..., latent_size), within [-12, 4].
    """

    mean: Tensor | None = None
    log_variance: Tensor | None = None

    def sample(self, noise: Tensor) -> Tensor:
        """z = mu + sigma * noise."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Tensor:
        """D_KL(q(z | g) || N(0, I)), summed over the latent axis, in float32 at least: (...,). Eq. 17."""
        mean, log_variance = (_in_float(value) for value in (self.mean, self.log_variance))
        return 0.5 * (mean**2 + torch.expm1(log_variance) - log_variance).sum(-1)


@dataclass
class MDMVAEOutput(ModelOutput):
    """Output of [`MDMVAEModel`]; what was not given is None.

    Args:
        reconstruction: (n, c, h * p, w * p), nominally in [-1, 1].
        logits: (..., vocab_size).
        image_latents: Posterior mean (n, h, w, latent_size).
        text_latents: Posterior mean (..., latent_size).
    """

    reconstruction: Tensor | None = None
    logits: Tensor | None = None
    image_latents: Tensor | None = None
    text_latents: Tensor | None = None


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(n, c, h * p, w * p) -> (n, h, w, c * p * p)."""
    n, c, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"`pixel_values` is {height}x{width} pixels, not a multiple of patch_size {patch_size}; resize to "
            f"{height // patch_size * patch_size}x{width // patch_size * patch_size} or pad to "
            f"{-(-height // patch_size) * patch_size}x{-(-width // patch_size) * patch_size}."
        )
    patches = images.view(n, c, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """(n, h, w, c * p * p) -> (n, c, h * p, w * p); the inverse of `patchify`."""
    n, h, w, _ = patches.shape
    images = patches.view(n, h, w, -1, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
    return images.reshape(n, -1, h * patch_size, w * patch_size)


def _mlp(in_size: int, hidden_size: int, out_size: int, num_hidden_layers: int) -> nn.Sequential:
    sizes = [in_size, *[hidden_size] * num_hidden_layers]
    layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], out_size))


class MDMVAEModel(MDMCheckpointMixin, PreTrainedModel):
    """The unified VAE of an `MDMVAEConfig`, `config`. `forward` auto-encodes images, tokens, or both."""

    config: MDMVAEConfig
    base_model_prefix = "vae"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")

    def __init__(self, config: MDMVAEConfig):
        super().__init__(config)
        patch_dim = config.num_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch_dim, config.hidden_size)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = _mlp(config.hidden_size, config.hidden_size, 2 * config.latent_size, config.num_hidden_layers)
        self.decoder = _mlp(config.latent_size, config.hidden_size, config.hidden_size, config.num_hidden_layers)
        self.pixel_head = nn.Linear(config.hidden_size, patch_dim)
        self.token_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Embedding):
        self.token_embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.token_head

    def set_output_embeddings(self, value: nn.Linear):
        self.token_head = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)

    def encode(self, embedding: Tensor) -> MDMLatentPosterior:
        """(..., hidden_size) -> q(z | g) with mean and log-variance (..., latent_size)."""
        mean, log_variance = self.encoder(embedding).chunk(2, dim=-1)
        return MDMLatentPosterior(mean=mean, log_variance=log_variance.clamp(*LOG_VARIANCE_RANGE))

    def encode_images(self, pixel_values: Tensor) -> MDMLatentPosterior:
        """(n, c, h * p, w * p) in [-1, 1] -> (n, h, w, latent_size). Raises ValueError if p does not divide a side."""
        return self.encode(self.patch_embedding(patchify(pixel_values, self.config.patch_size)))

    def encode_tokens(self, input_ids: Tensor) -> MDMLatentPosterior:
        """Token ids (...,) -> (..., latent_size)."""
        return self.encode(self.token_embedding(input_ids))

    def decode_images(self, latents: Tensor) -> Tensor:
        """(n, h, w, latent_size) -> pixels (n, c, h * p, w * p), nominally in [-1, 1]."""
        return unpatchify(self.pixel_head(self.decoder(latents)), self.config.patch_size)

    def decode_tokens(self, latents: Tensor) -> Tensor:
        """(..., latent_size) -> logits (..., vocab_size)."""
        return self.token_head(self.decoder(latents))

    def codebook(self, device: torch.device | str) -> Tensor:
        """mu(y) of every token y, in float32: (vocab_size, latent_size).

        softmax(logits) @ codebook is the mean of z_0 under the predicted tokens. Offloaded weights are on no device:
        `device` is where they compute.
        """
        everything = torch.arange(self.config.vocab_size, device=device)
        return self.encode_tokens(everything).mean.float()

    @can_return_tuple
    def forward(self, pixel_values: Tensor | None = None, input_ids: Tensor | None = None, **kwargs) -> "MDMVAEOutput":
        """Auto-encodes `pixel_values` (n, c, h, w) and `input_ids` (...,) through the posterior mean.

        Raises:
            ValueError: neither is given, or the patch size does not divide a side.
        """
        if pixel_values is None and input_ids is None:
            raise ValueError("Got neither `pixel_values` nor `input_ids`; give at least one of them to auto-encode.")
        images = None if pixel_values is None else self.encode_images(pixel_values).mean
        tokens = None if input_ids is None else self.encode_tokens(input_ids).mean
        return MDMVAEOutput(
            reconstruction=None if images is None else self.decode_images(images),
            logits=None if tokens is None else self.decode_tokens(tokens),
            image_latents=images,
            text_latents=tokens,
        )


def reconstruction_loss(pixels: Tensor, reconstruction: Tensor) -> Tensor:
    """||X - X_hat||^2 of each position, in float32 at least (Eq. 15): (..., patch) -> (...,)."""
    return F.mse_loss(_in_float(reconstruction), _in_float(pixels), reduction="none").sum(-1)


def _in_float(value: Tensor) -> Tensor:
    """In half precision a sum of many small errors, or of terms that cancel, is worth nothing."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
