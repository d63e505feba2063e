"""MDM: one Mamba-2 diffusion model over one unified latent space (paper Sec. 4, Fig. 2).

Read on from the block (`modeling_mdm_block.py`): `MDMEmbeddings`, `MDMModel` (encode, noise, embed, blocks),
`MDMForMultiModalGeneration` (predict the clean latents, losses of Eq. 18).

Symbols
    z_0, z_t   clean and noisy latents, Eq. 1               (b, l, d)
    t          timesteps in [0, 1], image and text          (b, 2)
    h          hidden state of a position                   (b, l, hidden_size)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .checkpoints import GENERATION_CONFIG, SOLVER, MDMCheckpointMixin
from .configuration_mdm import MDMConfig
from .conversation_state import MDMConversationMixin
from .generation_configuration_mdm import MDMGenerationConfig
from .generation_mdm import MDMGenerationMixin
from .input_checks import check_inputs, check_labels
from .modality_gate import MDMModalityGateMixin
from .modeling_mdm_attention import MDMAttentionBlock
from .modeling_mdm_block import MDMBlock, MDMConditionCache, MDMLayer, MDMMixer, MDMRMSNorm, MDMSelectiveScan
from .modeling_mdm_vae import MDMLatentPosterior, MDMVAEModel, patchify, reconstruction_loss
from .noise_schedule import add_noise, alpha_bar, alpha_bar_table
from .pixel_autoencoder import MDMPixelAutoencoder
from .score_entropy import (
    chunked_text_score_entropy,
    ddpm_epsilon_loss,
    image_score_entropy_exact,
    image_score_entropy_sampled,
    loss_weight,
)
from .scoring_mdm import MDMScoringMixin
from .seeded_noise import fold, seeded_normal, seeded_uniform
from .sequence_layout import (
    AttentionPlan,
    ScanPlan,
    SequenceLayout,
    build_layout,
    image_of_each_row,
    plan_scans,
)


LOSS_PARTS = ("loss_rec_image", "loss_rec_text", "loss_kl", "loss_se_image", "loss_se_text")  # of Eq. 18


def sinusoid(position: Tensor, size: int, max_period: float = 10000.0) -> Tensor:
    """Sines and cosines of `position` at size / 2 frequencies from 1 to 1 / max_period: (..., size)."""
    exponent = torch.arange(size // 2, device=position.device, dtype=torch.float32) / max(size // 2, 1)
    angle = position.float().unsqueeze(-1) * torch.exp(-math.log(max_period) * exponent)
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=-1), (0, size % 2))


def waves(position: Tensor, periods: Sequence[int]) -> Tensor:
    """Sines and cosines of `position` that return after each of `periods`: (..., 2 len(periods))."""
    lengths = torch.tensor(periods, device=position.device, dtype=torch.float32)
    angle = 2 * math.pi * (position.unsqueeze(-1) % lengths) / lengths
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class MDMEmbeddings(nn.Module):
    """Latents, control tokens, class, noise level and place of each position -> h (paper Sec. 4.1, Fig. 2d-e)."""

    def __init__(self, config: MDMConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.latent_projection = nn.Linear(config.latent_size, size)
        self.control_embedding = nn.Embedding(max(config.control_token_ids) + 1, size)
        self.class_embedding = nn.Embedding(config.num_classes + 1, size)  # the last one is "none"
        self.modality_embedding = nn.Embedding(2, size)  # text, image
        self.position_projection = nn.Linear(size, size, bias=False)
        if config.position_periods:
            self.period_projection = nn.Linear(4 * len(config.position_periods), size, bias=False)
        self.time_embedding = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, latents: Tensor, layout: SequenceLayout, timesteps: Tensor, class_ids: Tensor | None) -> Tensor:
        config, dtype = self.config, self.latent_projection.weight.dtype
        ids = layout.input_ids
        carries_latent = (layout.is_patch | layout.is_text).unsqueeze(-1)
        control = self.control_embedding(ids.clamp(max=self.control_embedding.num_embeddings - 1))
        none = torch.full_like(ids[:, 0], -1) if class_ids is None else class_ids
        category = self.class_embedding(torch.where(none < 0, config.num_classes, none)).unsqueeze(1)
        control = control + category * (ids == config.class_token_id).unsqueeze(-1)
        h = torch.where(carries_latent, self.latent_projection(latents.to(dtype)), control)

        size = config.hidden_size
        place = torch.cat([sinusoid(layout.row, size - size // 2), sinusoid(layout.column, size // 2)], dim=-1)
        h = h + self.position_projection(place.to(dtype)) + self.modality_embedding(layout.is_image.long())
        if periods := config.position_periods:
            place = torch.cat([waves(layout.row, periods), waves(layout.column, periods)], dim=-1)
            h = h + self.period_projection(place.to(dtype)) * layout.is_patch.unsqueeze(-1)
        levels = F.pad(timesteps.float(), (1, 0)) * config.num_train_timesteps  # 0 clean, 1 image, 2 text
        time = self.time_embedding(sinusoid(levels, size).to(dtype))
        h = h + time.gather(1, layout.level.unsqueeze(-1).expand(-1, -1, size))
        return h * (~layout.is_padding).unsqueeze(-1)


@dataclass
class MDMModelOutput(ModelOutput):
    """Output of [`MDMModel`].

    Args:
        last_hidden_state: (b, l, hidden_size), normalised.
        hidden_states: Output of each block, if asked for.
        latents: z_0 (b, l, latent_size), detached from the VAE.
        noisy_latents: z_t; equal to z_0 except at targets.
        alpha_bar: (b, l), the noise schedule at each position's timestep; 1 where it is clean.
        timesteps: (b, 2), t of image and text.
        noise: (b, l, latent_size).
        posterior: q(z | g) of every position.
        posterior_noise: (b, l, latent_size), of the sample that is reconstructed; None in evaluation.
        seeds: (b,), as given.
        layout: What each position is.
        known_images: (n, num_channels, h, w), what the unified VAE encoded: the pixels, or their latents.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    latents: Tensor | None = None
    noisy_latents: Tensor | None = None
    alpha_bar: Tensor | None = None
    timesteps: Tensor | None = None
    noise: Tensor | None = None
    posterior: MDMLatentPosterior | None = None
    posterior_noise: Tensor | None = None
    seeds: Tensor | None = None
    layout: SequenceLayout | None = None
    known_images: Tensor | None = None


@dataclass
class MDMOutput(ModelOutput):
    """Output of [`MDMForMultiModalGeneration`].

    Args:
        loss: L_total of Eq. 18, if `labels` are given: the mean over the rows, each of which averages over its own
            positions, so that it does not matter how a batch is cut.
        loss_rec_image, loss_rec_text, loss_kl: Reconstruction and KL terms (Eq. 15-17), unweighted.
        loss_se_image, loss_se_text: Score entropy (Eq. 4) of each modality, unweighted.
        row_losses: (b, 5), the five parts of each row in this order; 0 where a row has no position of the kind.
        timesteps: (b, 2), t of image and text, if `labels` are given.
        logits: (b, l, vocab_size), the VAE decoder's view of z0-hat; None in training, where they are never held.
        predicted_latents: z0-hat (b, l, latent_size).
        hidden_states: Output of each block, if asked for.
    """

    loss: Tensor | None = None
    loss_rec_image: Tensor | None = None
    loss_rec_text: Tensor | None = None
    loss_kl: Tensor | None = None
    loss_se_image: Tensor | None = None
    loss_se_text: Tensor | None = None
    row_losses: Tensor | None = None
    timesteps: Tensor | None = None
    logits: Tensor | None = None
    predicted_latents: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class MDMPreTrainedModel(MDMCheckpointMixin, PreTrainedModel):
    """Weights, loading and saving of all MDM models."""

    config: MDMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "D"]
    _can_record_outputs = {"hidden_states": MDMLayer}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.base_model.pixel_autoencoder is not None:
            model.base_model.pixel_autoencoder.freeze()
        return loaded

    def load_pixel_autoencoder(self, source: str | None = None, **hub_options):
        """Fetches the weights of the pixel autoencoder, once: what is saved or pushed afterwards has them.

        Args:
            source: Folder or Hub repository instead of the one in `config.pixel_autoencoder`.
            hub_options: `token`, `cache_dir`, ...; with `source` also `revision` and `subfolder`.

        Returns:
            The model.

        Raises:
            ValueError: the configuration has none, or its weights cannot be read.
        """
        if self.base_model.pixel_autoencoder is None:
            raise ValueError(
                "`config.pixel_autoencoder` is None, so there is nothing to load; build the model from "
                "config.with_pixel_autoencoder(repo_id)."
            )
        self.base_model.pixel_autoencoder.load(source, **hub_options)
        return self

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **kwargs
    ):
        """Resizes token embedding, token head and `config.vocab_size` together.

        Raises:
            ValueError: the new vocabulary would not hold the special tokens.
        """
        multiple = pad_to_multiple_of or 1
        padded = -(-(new_num_tokens or self.config.vocab_size) // multiple) * multiple
        if padded < self.config.vocab_size:
            self.config.check_vocab_size(padded)
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        config = self.config
        if isinstance(module, MDMMixer):
            init.uniform_(module.conv_weight, -(config.conv_kernel**-0.5), config.conv_kernel**-0.5)
            init.zeros_(module.conv_bias)
        elif isinstance(module, MDMSelectiveScan):
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(1, 16).log())
            init.ones_(module.D)
            low, high = math.log(config.time_step_min), math.log(config.time_step_max)
            dt = torch.empty_like(module.dt_bias).uniform_(low, high).exp().clamp(min=config.time_step_floor)
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        elif isinstance(module, MDMRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, MDMModel):
            for name in ("image", "text"):
                init.copy_(getattr(module, f"{name}_alpha_bar"), module.alpha_bar_of(name))
        elif isinstance(module, MDMPixelAutoencoder):
            init.constant_(module.is_loaded, module.loaded_at_start)
        elif isinstance(module, nn.Conv2d | nn.GroupNorm):  # of a pixel autoencoder; what is loaded is left alone
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            depth = config.num_hidden_layers if module.out_features == config.hidden_size else 1
            init.normal_(module.weight, std=(module.in_features * depth) ** -0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=config.initializer_range)


class MDMModel(MDMPreTrainedModel):
    """Encodes a sequence, noises its targets and runs the blocks. `forward` is one training or scoring step;
    `generate` of the head calls its parts. Its sizes are those of `config`."""

    def __init__(self, config: MDMConfig):
        super().__init__(config)
        self.vae = MDMVAEModel(config.vae_config)  # type: ignore[arg-type]
        self.pixel_autoencoder = None
        if config.pixel_autoencoder is not None:
            self.pixel_autoencoder = MDMPixelAutoencoder(config.pixel_autoencoder)
        self.embeddings = MDMEmbeddings(config)
        block = MDMAttentionBlock if config.backbone == "transformer" else MDMBlock
        self._no_split_modules = [block.__name__]  # FSDP looks for each of them, and must find it
        self.layers = nn.ModuleList(block(config) for _ in range(config.num_hidden_layers))
        self.norm = MDMRMSNorm(config.hidden_size, config.rms_norm_eps)
        for name in ("image", "text"):
            self.register_buffer(f"{name}_alpha_bar", self.alpha_bar_of(name), persistent=False)
        self.gradient_checkpointing = False
        self.post_init()

    def alpha_bar_of(self, modality: str) -> Tensor:
        """The modality's noise schedule as a table over t = 0, 1 / T, ..., 1: (T + 1,)."""
        config = self.config
        schedule = getattr(config, f"{modality}_beta_schedule")
        with torch.device("cpu"):
            return alpha_bar_table(config.num_train_timesteps, config.beta_start, config.beta_end, schedule).float()

    def _apply(self, fn, recurse: bool = True):
        """Moves the noise schedules with the model, but never casts them: `model.bfloat16()` would round alpha_bar."""
        tables = {name: self._buffers[name] for name in ("image_alpha_bar", "text_alpha_bar")}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            moved = self._buffers[name]
            self._buffers[name] = moved if moved.dtype == table.dtype else table.to(moved.device)
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        return self.vae.token_embedding

    def set_input_embeddings(self, value: nn.Embedding):
        self.vae.token_embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.vae.token_head

    def set_output_embeddings(self, value: nn.Linear):
        self.vae.token_head = value

    def layout(self, input_ids, image_grid_hw=None, attention_mask=None, target_mask=None) -> SequenceLayout:
        """What stands where in each row: see `sequence_layout.py`."""
        grid_hw = input_ids.new_ones(1, 2) if image_grid_hw is None else image_grid_hw.to(input_ids.device)
        return build_layout(self.config, input_ids, attention_mask, target_mask, grid_hw)

    def known_images(
        self, layout: SequenceLayout, pixel_values: Tensor | None, image_latents: Tensor | None
    ) -> Tensor | None:
        """What the unified VAE encodes: the pixels, or the latents of the pixel autoencoder, given or made here."""
        if pixel_values is None or self.pixel_autoencoder is None:
            return pixel_values if image_latents is None else image_latents
        grid = layout.grid.new_zeros(len(pixel_values), 2)
        grid[layout.known_index[layout.is_known_patch]] = layout.grid[layout.is_known_patch]
        sizes = [(h, w) for h, w in (grid * self.config.pixel_patch_size).tolist()]
        return self.pixel_autoencoder.encode_padded(pixel_values, sizes)

    def encode(self, layout: SequenceLayout, input_ids: Tensor, known_images: Tensor | None) -> MDMLatentPosterior:
        """q(z | g) of every position (b, l, latent_size); no meaning at control tokens and patches to generate."""
        posterior = self.vae.encode_tokens(input_ids)
        if known_images is None:
            return posterior
        images = self.vae.encode_images(known_images.to(self.dtype))
        _, h, w, _ = images.mean.shape
        at = (layout.known_index, layout.row.clamp(max=h - 1), layout.column.clamp(max=w - 1))
        known = layout.is_known_patch.unsqueeze(-1)
        return MDMLatentPosterior(
            mean=torch.where(known, images.mean[at], posterior.mean),
            log_variance=torch.where(known, images.log_variance[at], posterior.log_variance),
        )

    def decode_image(
        self, latents: Tensor, is_known: Tensor, known_image: Tensor | None, pixels: Tensor | None
    ) -> Tensor:
        """Latents (h, w, latent_size) -> image (channels, height, width) in float32, nominally in [-1, 1].

        Patches that `is_known` (h, w) stay what they are: in `known_image`, which the unified VAE encoded, and behind
        a pixel autoencoder once more in `pixels`, where they are given. Both may be larger than the image.
        """
        image = self.vae.decode_images(latents.unsqueeze(0).to(self.dtype))[0].float()
        image = _keep_known(image, is_known, known_image)
        if self.pixel_autoencoder is None:
            return image
        return _keep_known(self.pixel_autoencoder.decode(image.unsqueeze(0))[0], is_known, pixels)

    def alpha_bar_at(self, layout: SequenceLayout, timesteps: Tensor) -> Tensor:
        """The noise schedule at each position: (b, l); 1 wherever the position is no target."""
        image = alpha_bar(timesteps[:, :1], self.image_alpha_bar)
        text = alpha_bar(timesteps[:, 1:], self.text_alpha_bar)
        level = torch.where(layout.is_patch, image, text)
        return torch.where(layout.is_target, level, torch.ones_like(level))

    def draw(self, layout: SequenceLayout, seeds: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a forward pass needs of chance: uniform (b, 5), normal (3 in training, else 1; b, l, latent_size).

        With `seeds` a row's numbers depend on its own seed alone, position for position.
        """
        (b, l), device = layout.input_ids.shape, layout.input_ids.device
        count, size = (3 if self.training else 1), self.config.latent_size
        if seeds is None:
            return torch.rand(b, 5, device=device), torch.randn(count, b, l, size, device=device)
        seeds = seeds.to(device).long()
        uniform = seeded_uniform(seeds.unsqueeze(1), torch.arange(-5, 0, device=device))
        streams = fold(seeds, torch.arange(count, device=device).unsqueeze(1))  # (count, b)
        normal = seeded_normal(streams[..., None, None], _places(layout, size))
        return uniform, normal * (~layout.is_padding).unsqueeze(-1)

    def draw_candidates(self, layout: SequenceLayout, seeds: Tensor | None) -> tuple[Tensor, Tensor]:
        """What `score_entropy_sampled` needs of chance beside that: uniform (b, l), normal (b, l, k, latent_size)."""
        (b, l), device = layout.input_ids.shape, layout.input_ids.device
        k, size = self.config.num_candidates, self.config.latent_size
        if seeds is None:
            return torch.rand(b, l, device=device), torch.randn(b, l, k, size, device=device)
        of_draw = 3  # streams
        streams = fold(seeds.to(device).long().unsqueeze(1), of_draw + torch.arange(2, device=device))
        uniform = seeded_uniform(streams[:, :1], _places(layout, 1).squeeze(-1))
        return uniform, seeded_normal(streams[:, 1, None, None], _places(layout, k * size)).unflatten(-1, (k, size))

    def timesteps_from(self, uniform: Tensor, layout: SequenceLayout) -> Tensor:
        """t of image and text, independent and uniform in (0, 1], (b, 2). Where a row targets both, one of the two is
        sometimes pinned to 0 or 1, the ends through which lagged sampling passes."""
        t = 1 - uniform[:, :2]
        has_both = (layout.is_target & layout.is_patch).any(1) & (layout.is_target & layout.is_text).any(1)
        pin = has_both & (uniform[:, 2] < self.config.pinned_timestep_probability)
        which = uniform[:, 3:4] < 0.5
        chosen = torch.cat([which, ~which], dim=1) & pin.unsqueeze(1)
        return torch.where(chosen, (uniform[:, 4:5] < 0.5).float(), t)

    def denoise(
        self,
        latents: Tensor,
        layout: SequenceLayout,
        plan: ScanPlan | AttentionPlan,
        timesteps: Tensor,
        class_ids: Tensor | None = None,
        cache: list[MDMConditionCache] | None = None,
    ) -> Tensor:
        """Runs the blocks over z_t: (b, l, hidden_size). With a cache per block, over the prefix (fills it) or
        the target group (starts from it)."""
        if self.config.input_scaling == "posterior_mean":  # of z_0, were it N(0, I)
            latents = latents * self.alpha_bar_at(layout, timesteps).sqrt().unsqueeze(-1)
        hidden_states = self.embeddings(latents, layout, timesteps, class_ids)
        plans = plan.alternating() if self.config.scan_sharing == "alternate" else [plan]
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, plans[i % len(plans)], None if cache is None else cache[i])
        return self.norm(hidden_states)

    def read_conditions(
        self,
        latents: Tensor,
        layout: SequenceLayout,
        has_image: Tensor | None,
        class_ids: Tensor | None,
        cache: list[MDMConditionCache] | None,
    ) -> Tensor:
        """Runs the blocks over conditions alone, at t = 0, from which a cache goes on: (b, l, hidden_size)."""
        clean = torch.zeros(len(latents), 2, device=latents.device)
        return self.denoise(latents, layout, plan_scans(self.config, layout, has_image), clean, class_ids, cache)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        class_ids: Tensor | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        seeds: Tensor | None = None,
        image_latents: Tensor | None = None,
        **kwargs,
    ) -> MDMModelOutput:
        """One pass over conditions and noised targets.

        Args:
            input_ids: (b, l) token ids; `image_token_id` once per known patch, the true ids at known and target text.
            pixel_values: (n, c, height, width) in [-1, 1], the known images of the batch in row order, padded at the
                bottom and on the right.
            image_grid_hw: (m, 2) rows and columns in patches of every image of the batch, in row order.
            attention_mask: (b, l), 0 at padding. All ones if absent.
            target_mask: (b, l), 1 where the model is to generate.
            class_ids: (b,) data category, -1 for none.
            timesteps: (b, 2) t of image and text in [0, 1]; drawn if absent.
            noise: (b, l, latent_size) epsilon of Eq. 1; drawn if absent.
            seeds: (b,) whole numbers: all that a row draws comes from its own seed, so its loss is the same in any
                batch, on any device. Without them torch's generator is drawn from.
            image_latents: (n, num_channels, height / f, width / f), in place of `pixel_values` what the pixel
                autoencoder, which makes an image f times smaller, made of them.

        Raises:
            ValueError: inputs that do not fit together; the message says what was got, what is needed, what to do.
        """
        check_inputs(
            self.config,
            input_ids,
            pixel_values,
            image_grid_hw,
            attention_mask,
            target_mask,
            class_ids,
            timesteps,
            noise,
            seeds,
            kwargs,
            image_latents,
        )
        input_ids = input_ids.long()
        layout = self.layout(input_ids, image_grid_hw, attention_mask, target_mask)
        known_images = self.known_images(layout, pixel_values, image_latents)
        posterior = self.encode(layout, input_ids, known_images)
        uniform, normal = self.draw(layout, seeds)
        clean = posterior.mean
        if self.training:
            sampled = posterior.sample(normal[1].to(clean.dtype))
            clean = torch.where(layout.is_target.unsqueeze(-1), sampled, clean)
        # L_se never trains the encoder, unless asked to: it would shrink or inflate the latents
        z_0 = (clean.detach() if self.config.detach_latents else clean).float()
        timesteps = self.timesteps_from(uniform, layout) if timesteps is None else timesteps.float()
        noise = normal[0] if noise is None else noise.float()
        level = self.alpha_bar_at(layout, timesteps)
        z_t = add_noise(z_0, noise, level)
        has_image = None if image_grid_hw is None else image_of_each_row(layout)
        hidden_states = None
        if self.config.diffusion_weight or not self.training:  # else the VAE alone learns
            plan = plan_scans(self.config, layout, has_image)
            hidden_states = self.denoise(z_t, layout, plan, timesteps, class_ids)
        return MDMModelOutput(
            last_hidden_state=hidden_states,
            latents=z_0,
            noisy_latents=z_t,
            alpha_bar=level,
            timesteps=timesteps,
            noise=noise,
            posterior=posterior,
            posterior_noise=normal[2] if self.training else None,
            seeds=seeds,
            layout=layout,
            known_images=known_images,
        )


def _places(layout: SequenceLayout, size: int) -> Tensor:
    """`size` places a position, counted over those of its row that are not padding: (b, l, size)."""
    at = (~layout.is_padding).long().cumsum(1) - 1
    return at.unsqueeze(-1) * size + torch.arange(size, device=at.device)


def _keep_known(image: Tensor, is_known: Tensor, source: Tensor | None) -> Tensor:
    """`image` (c, h * p, w * p) with the patches that `is_known` (h, w) taken from `source`."""
    if source is None or not bool(is_known.any()):
        return image
    _, height, width = image.shape
    p = height // len(is_known)
    keep = is_known.repeat_interleave(p, 0).repeat_interleave(p, 1)
    return torch.where(keep, source[:, :height, :width].to(image), image)


def _row_means(values: Tensor, mask: Tensor, is_fill: Tensor | None = None) -> Tensor:
    """Mean of `values` (b, l) over each row's positions in `mask`; 0, with a gradient path, where it has none (b,).

    Those of them that are `is_fill` count together as one: else a short answer's own words would hardly count.
    """
    weight = mask.to(values.dtype)
    if is_fill is not None:
        fill = weight * is_fill
        weight = weight - fill + fill / fill.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask, values * weight, torch.zeros_like(values)).sum(1) / weight.sum(1).clamp(min=1)


class MDMForMultiModalGeneration(
    MDMPreTrainedModel, MDMGenerationMixin, MDMConversationMixin, MDMModalityGateMixin, MDMScoringMixin
):
    """MDM with its head: predicts the clean latents, computes L_total, generates and scores images and text.

    Args:
        config: Its sizes; weights are random, those of a checkpoint come by `from_pretrained`.
    """

    output_modalities = ("image", "text")
    accepts_loss_kwargs = False
    auto_classes = ("AutoModel", "AutoModelForMultimodalLM", "AutoModelForImageTextToText")
    generation_config_class = MDMGenerationConfig

    def __init__(self, config: MDMConfig):
        super().__init__(config)
        self.model = MDMModel(config)
        self.latent_head = nn.Linear(config.hidden_size, config.latent_size)
        self.modality_gate = None
        if config.modality_gate:  # fitted to a model that is trained, not trained with it
            self.modality_gate = nn.Linear(config.hidden_size, 2).requires_grad_(False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self.latent_head:  # the first prediction is the best linear one
            init.zeros_(module.weight)

    def _save_parts(self, folder: Path) -> None:
        self.config.saved_with = [GENERATION_CONFIG] + ([] if self.scheduler is None else [SOLVER])
        if self.scheduler is None:
            (folder / SOLVER).unlink(missing_ok=True)  # of an earlier save: it would be loaded
        else:
            self.scheduler.save_pretrained((folder / SOLVER).parent)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.vae.token_embedding

    def set_input_embeddings(self, value: nn.Embedding):
        self.model.vae.token_embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.model.vae.token_head

    def set_output_embeddings(self, value: nn.Linear):
        self.model.vae.token_head = value

    def new_condition_cache(self) -> list[MDMConditionCache]:
        """Empty caches for the prefix of one batch, one per block."""
        return [MDMConditionCache() for _ in self.model.layers]

    def predict_latents(self, hidden_states: Tensor, noisy_latents: Tensor, level: Tensor) -> Tensor:
        """z0-hat = sqrt(alpha_bar) z_t + sqrt(1 - alpha_bar) F(h).

        The first term is the best linear guess for latents of unit scale; the network adds what is known beyond it
        and is asked for nothing where there is no noise. `level` is alpha_bar (b, l).
        """
        level = level.unsqueeze(-1)
        return level.sqrt() * noisy_latents + (1 - level).sqrt() * self.latent_head(hidden_states).float()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        class_ids: Tensor | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        seeds: Tensor | None = None,
        labels: Tensor | None = None,
        image_latents: Tensor | None = None,
        **kwargs,
    ) -> MDMOutput:
        """Predicts the clean latents; with `labels`, L_total of Eq. 18 and its parts.

        Args:
            labels: (b, l) token ids at text targets, -100 elsewhere: a text target with -100 is noised, but counts in
                no loss. Image targets need none: their pixels are in `pixel_values`.

        All other arguments are those of [`MDMModel.forward`].

        Returns:
            [`MDMOutput`].

        Raises:
            ValueError: `labels` without any target or outside the text targets, and whatever [`MDMModel.forward`]
                raises.
        """
        if labels is not None:
            check_labels(self.config, input_ids, labels, attention_mask, target_mask)
            input_ids = torch.where(labels >= 0, labels, input_ids)
        outputs = self.model(
            input_ids,
            pixel_values=pixel_values,
            image_grid_hw=image_grid_hw,
            attention_mask=attention_mask,
            target_mask=target_mask,
            class_ids=class_ids,
            timesteps=timesteps,
            noise=noise,
            seeds=seeds,
            image_latents=image_latents,
            **kwargs,
        )
        hidden_states, predicted, logits = outputs.last_hidden_state, None, None
        if hidden_states is not None:
            predicted = self.predict_latents(hidden_states, outputs.noisy_latents, outputs.alpha_bar)
            if labels is None or not self.training:
                logits = self.model.vae.decode_tokens(predicted.to(self.dtype))
        losses = {} if labels is None else self.losses(outputs, predicted, outputs.known_images, labels)
        return MDMOutput(**losses, logits=logits, predicted_latents=predicted, hidden_states=outputs.hidden_states)

    def losses(
        self, outputs: MDMModelOutput, predicted: Tensor | None, pixel_values: Tensor | None, labels: Tensor
    ) -> dict[str, Tensor]:
        """L_total = L_rec^img + L_rec^txt + beta L_KL + lambda L_se (Eq. 18) and its parts."""
        config, layout, posterior, vae = self.config, outputs.layout, outputs.posterior, self.model.vae
        is_known_text = layout.is_text & (layout.input_ids != config.text_target_token_id)
        is_known_text &= ~layout.is_target | (labels >= 0)
        is_known_patch = layout.is_known_patch & ~layout.is_padding

        z = posterior.mean
        if outputs.posterior_noise is not None:
            z = posterior.sample(outputs.posterior_noise.to(z.dtype))
        rec_text = self._text_loss(z, layout.input_ids, is_known_text)
        rec_image = torch.zeros_like(rec_text)
        if pixel_values is not None:
            patches = patchify(pixel_values, config.vae_config.patch_size)
            _, h, w, _ = patches.shape
            pixels = patches[layout.known_index, layout.row.clamp(max=h - 1), layout.column.clamp(max=w - 1)]
            error = reconstruction_loss(pixels, vae.pixel_head(vae.decoder(z)))
            rec_image = _row_means(error, is_known_patch)
        kl = _row_means(posterior.kl(), is_known_text | is_known_patch)
        se_image, se_text = torch.zeros_like(kl), torch.zeros_like(kl)
        if predicted is not None:
            is_noised = layout.is_target & (outputs.alpha_bar < 1)
            se_image, se_text = self._score_entropy(
                outputs, predicted, is_noised & is_known_patch, is_noised & is_known_text
            )

        rows = torch.stack([part.float() for part in (rec_image, rec_text, kl, se_image, se_text)], dim=1)
        diffusion = config.diffusion_weight
        weights = [1.0, 1.0, config.kl_weight, diffusion * config.image_loss_weight, diffusion]
        parts = dict(zip(LOSS_PARTS, rows.mean(0).unbind(), strict=True))
        loss = torch.stack([weight * part for weight, part in zip(weights, parts.values(), strict=True)]).sum()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            loss = loss + 0 * self._ends()
        return {"loss": loss, **parts, "row_losses": rows.detach(), "timesteps": outputs.timesteps}

    def _ends(self) -> Tensor:
        """A number that depends on all of the VAE's ends. Processes that train together have to have gradients of the
        same weights, and a batch without images, or without text, would leave those of its ends out."""
        vae = self.model.vae
        patch = vae.patch_embedding.weight.new_zeros(1, vae.patch_embedding.in_features)
        token = torch.zeros(1, dtype=torch.long, device=patch.device)
        return vae.pixel_head(vae.patch_embedding(patch)).mean() + vae.token_head(vae.token_embedding(token)).mean()

    def _score_entropy(
        self, outputs: MDMModelOutput, predicted: Tensor, image_target: Tensor, text_target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """L_se of each row's image and text targets: (b,), (b,)."""
        config, level = self.config, outputs.alpha_bar
        if config.diffusion_loss == "ddpm_epsilon":
            se = ddpm_epsilon_loss(predicted, outputs.noise, outputs.noisy_latents, level)
            return _row_means(se, image_target), _row_means(se, text_target, self._is_fill(outputs.layout.input_ids))
        if config.diffusion_loss == "score_entropy_sampled":
            se = image_score_entropy_sampled(
                outputs.latents,
                predicted,
                outputs.timesteps[:, :1].expand_as(level),
                self.model.image_alpha_bar,
                *self.model.draw_candidates(outputs.layout, outputs.seeds),
            )
        else:
            se = image_score_entropy_exact(outputs.latents, predicted, loss_weight(level, config.loss_weighting))
        return _row_means(se, image_target), self._text_loss(predicted, outputs.layout.input_ids, text_target)

    def _text_loss(self, latents: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy of the tokens that `latents` decode to, of each row's positions in `mask`: (b,)."""
        vae = self.model.vae
        labels = torch.where(mask, input_ids, -100)
        entropy = chunked_text_score_entropy(vae.decode_tokens, latents.to(self.dtype), labels, vae.config.vocab_size)
        return _row_means(entropy, mask, self._is_fill(input_ids))

    def _is_fill(self, input_ids: Tensor) -> Tensor:
        """Where a text is filled up, after its end or, with <s>, where it goes on in another block."""
        return torch.isin(input_ids, torch.tensor(self.config.end_token_ids, device=input_ids.device))
