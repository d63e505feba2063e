"""Configurations of MDM (paper Sec. 5.1, Appendix C)."""

import json
import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .pixel_autoencoder import check_pixel_autoencoder, downsampling, latent_channels, read_pixel_autoencoder


def why_refused(error: Exception) -> str:
    """What is wrong with a config, in one line: a strict dataclass puts its own words and a line break before it."""
    cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    return str(cause).partition(" Errors: ")[0].rstrip(".")


class _CustomPipelines(dict):
    """The pipelines that a repository brings along, task -> class, without those that are registered here.

    `transformers.pipeline` looks here before it looks at what is registered, and asks for `trust_remote_code`. With
    the package imported its own class is to win, as it does for the Auto classes.
    """

    def __contains__(self, task) -> bool:
        from transformers.pipelines import PIPELINE_REGISTRY

        return super().__contains__(task) and task not in PIPELINE_REGISTRY.supported_tasks


@strict
class MDMVAEConfig(PreTrainedConfig):
    """The unified VAE: image patches and text tokens in one latent space (paper Sec. 4.1, 4.2.2).

    Args:
        vocab_size: Number of token ids, control tokens included.
        num_channels: Channels of the images, or of a pixel autoencoder's latents.
        patch_size: Height and width of a patch in pixels, or in those latents; one patch is one position of the
            sequence.
        latent_size: Width of the latent space shared by both modalities.
        hidden_size: Width of the encoder and the decoder.
        num_hidden_layers: Hidden layers of the encoder, and of the decoder.
        initializer_range: Standard deviation of the token embeddings at initialisation.
        *_token_id: Ids of padding, of the beginning and of the end of a text.
    """

    model_type = "mdm_vae"
    base_config_key = "vae_config"
    base_model_fsdp_plan = {"encoder": "free_full_weight", "decoder": "free_full_weight"}

    vocab_size: int = 32000
    num_channels: int = 3
    patch_size: int = 2
    latent_size: int = 64
    hidden_size: int = 512
    num_hidden_layers: int = 2
    initializer_range: float | int = 1.0
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def validate_sizes(self):
        _require_positive(
            self, "vocab_size", "num_channels", "patch_size", "latent_size", "hidden_size", "num_hidden_layers"
        )


@strict
class MDMConfig(PreTrainedConfig):
    """Configuration of [`MDMModel`] and [`MDMForMultiModalGeneration`].

    Args:
        vae_config: The unified VAE's configuration.
        pixel_autoencoder: A frozen autoencoder of diffusers between pixels and patches, or None: "class_name"
            ("AutoencoderKL" or "VQModel"), "config" (its config.json), and where it is from: "repo_id", "revision",
            "subfolder", "license". `with_pixel_autoencoder` fills it in.
        backbone: What the blocks are made of: `"mamba"`, or `"transformer"` for attention and a gated MLP in Mamba's
            place (Table 3's ablation). All else is the same; of the fields of the scans it heeds none, but for the
            size of its MLP.
        hidden_size: Width of the blocks.
        num_hidden_layers: Number of blocks.
        intermediate_size: Width of a Transformer's MLP. By default as wide as gives its block the parameters of the
            Mamba block that the other fields describe (`mlp_size`).
        state_size: Width N of the SSM state (paper Eq. 10).
        head_dim: Width of an SSM head, of which `expand * hidden_size` must be a multiple; or of a Transformer's head,
            of which `hidden_size` must be.
        expand: Inner width of a block in units of `hidden_size`.
        conv_kernel: Taps of the causal convolution.
        chunk_size: Chunk of the SSM scan; chosen by length and device if None.
        scan_sharing: What the scan directions of a block share. `"shared"`: both projections; convolution, A, D and
            the bias of dt are per direction. `"independent"`: projections per direction and modality.
            `"alternate"`: one direction per block, in turn.
        scan_directions: Number of image and of text orders: [4, 2] in the paper, [2, 1] in its ablation (Table 3).
        condition_broadcast: Whether each block adds the state of the last condition, projected, to every position of
            the target group, which so is told at once what was said. False is the paper's.
        position_periods: Lengths, in patches, of the waves in which a patch is told its row and column besides those
            of `sinusoid`, of which the shortest is 2 pi, too long to tell a patch from the next one well. With
            [2, 4, 8, 16] images of sizes that were not trained on come out better. None, the default, is the paper's.
        num_classes: Number of data categories; 0 for none.
        input_scaling: What the blocks see of z_t: `"posterior_mean"`, sqrt(alpha_bar) z_t, the mean of z_0 given z_t
            for latents at unit scale, which fades as noise drowns the latent; or `"none"`, z_t itself.
        modality_gate: Whether there is one, which `generate="auto"` of a pipeline asks what a prompt calls for.
        num_train_timesteps: T of the DDPM schedule (Eq. 1).
        beta_start, beta_end: Ends of the beta schedule.
        image_beta_schedule, text_beta_schedule: Beta schedule of each modality, by its name in diffusers.
        diffusion_loss: Estimator of the image part of L_se: `"score_entropy_exact"` (closed form of Eq. 4),
            `"score_entropy_sampled"` (Eq. 4 with Theorem 2's softmax over sampled earlier states), or
            `"ddpm_epsilon"` (squared error of the noise, both modalities; the ablation's baseline).
        loss_weighting: Weight omega of `"score_entropy_exact"` over the noise levels.
        num_candidates: Number of earlier states in `"score_entropy_sampled"`.
        kl_weight: beta of Eq. 18.
        diffusion_weight: lambda of Eq. 18.
        image_loss_weight: Of the image part of L_se beside its text part. The former is a mean over latent channels,
            the latter a sum of nats: with 1, a model that learns both learns words long before pictures.
        detach_latents: Keep L_se from training the VAE. False is Eq. 18 read literally: what is easiest to denoise is
            then learned, not what says most of the data; there for the ablation.
        pinned_timestep_probability: Where a row targets both modalities, the probability that training pins the
            timestep of one of them to 0 (it is known) or 1 (it is pure noise); lagged sampling passes through both.
        time_step_min, time_step_max, time_step_floor: Range of dt at initialisation.
        rms_norm_eps: Epsilon of the normalisations.
        initializer_range: Standard deviation of the embeddings at initialisation; a projection goes by its width.
        *_token_id: Ids of the control tokens, as the tokenizer has them.

    Examples:
        >>> config = MDMConfig.from_preset("mdm-base", num_classes=10)
        >>> config.num_hidden_layers, config.num_heads, config.pixel_patch_size
        (24, 32, 2)
    """

    model_type = "mdm"
    sub_configs = {"vae_config": MDMVAEConfig}
    sub_configs_defaults = {"vae_config": MDMVAEConfig}
    base_model_fsdp_plan = {"layers.*": "free_full_weight"}
    keys_to_ignore_at_inference = [
        "loss_rec_image",
        "loss_rec_text",
        "loss_kl",
        "loss_se_image",
        "loss_se_text",
        "row_losses",
        "timesteps",
        "predicted_latents",
        "hidden_states",
    ]

    vae_config: dict | PreTrainedConfig | None = None
    pixel_autoencoder: dict | None = None
    backbone: Literal["mamba", "transformer"] = "mamba"
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    intermediate_size: int | None = None
    state_size: int = 128
    head_dim: int = 64
    expand: int = 2
    conv_kernel: int = 4
    chunk_size: int | None = None
    scan_sharing: Literal["shared", "independent", "alternate"] = "shared"
    scan_directions: list[int] | tuple[int, ...] = (4, 2)
    condition_broadcast: bool = False
    position_periods: list[int] | tuple[int, ...] = ()
    num_classes: int = 0
    input_scaling: Literal["none", "posterior_mean"] = "posterior_mean"
    modality_gate: bool = False
    num_train_timesteps: int = 1000
    beta_start: float | int = 1e-4
    beta_end: float | int = 2e-2
    image_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    text_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    diffusion_loss: Literal["score_entropy_exact", "score_entropy_sampled", "ddpm_epsilon"] = "score_entropy_exact"
    loss_weighting: Literal["unit", "snr_plus_one", "min_snr"] = "unit"
    num_candidates: int = 8
    kl_weight: float | int = 1e-2
    diffusion_weight: float | int = 1.0
    image_loss_weight: float | int = 1.0
    detach_latents: bool = True
    pinned_timestep_probability: float | int = 0.2
    time_step_min: float | int = 1e-3
    time_step_max: float | int = 1e-1
    time_step_floor: float | int = 1e-4
    rms_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02

    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    unk_token_id: int = 3
    class_token_id: int = 4
    time_image_token_id: int = 5
    time_text_token_id: int = 6
    image_start_token_id: int = 7
    image_end_token_id: int = 8
    text_start_token_id: int = 9
    text_end_token_id: int = 10
    image_token_id: int = 11
    image_target_token_id: int = 12
    text_target_token_id: int = 13
    user_token_id: int = 14
    assistant_token_id: int = 15
    system_token_id: int = 16

    def __post_init__(self, **kwargs):
        if self.vae_config is None:
            self.vae_config = MDMVAEConfig()
        elif isinstance(self.vae_config, dict):
            self.vae_config = MDMVAEConfig(**self.vae_config)
        if self.pixel_autoencoder is not None:  # a copy, with lists for tuples, as it comes back from JSON
            self.pixel_autoencoder = json.loads(json.dumps(dict(self.pixel_autoencoder)))
        self.scan_directions = list(self.scan_directions)
        self.position_periods = list(self.position_periods)
        super().__post_init__(**kwargs)
        if "custom_pipelines" in kwargs:
            self.custom_pipelines = _CustomPipelines(kwargs["custom_pipelines"])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As [`~transformers.PreTrainedConfig.from_pretrained`].

        Raises:
            ValueError: there is no config.json, it is of another kind of model, or it has a setting that cannot be.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (StrictDataclassError, TypeError, AttributeError) as error:  # the last: a dtype that torch has not
            raise ValueError(
                f"Got {pretrained_model_name_or_path} with a config that is refused: {why_refused(error)}; need that "
                "of an MDM; mend its config.json, or take the one that its weights were saved with."
            ) from error

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not found:  # it would pass for a config of defaults
            raise ValueError(
                f"Got {pretrained_model_name_or_path} without a config.json; need the one that its weights were saved "
                "with; push or download it again."
            )
        kind = found.get("model_type") if isinstance(found, dict) else type(found).__name__
        if kind != cls.model_type:
            raise ValueError(
                f"Got {pretrained_model_name_or_path} whose config.json has the model_type {kind!r}; need "
                f"{cls.model_type!r}; give the folder or repository of an MDM, or take the config.json that its "
                "weights were saved with."
            )
        if not isinstance(found.get("saved_with", []), list):
            raise ValueError(
                f"Got {pretrained_model_name_or_path} with saved_with {found['saved_with']!r} in its config.json; "
                "need a list of files; take the one that its weights were saved with."
            )
        return found, kwargs

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "MDMConfig":
        """The configuration of a named size (`MDM_PRESETS`), its `overrides` in place of single fields.

        Raises:
            ValueError: an unknown name.
        """
        if name not in MDM_PRESETS:
            raise ValueError(f"Unknown preset {name!r}; choose one of {', '.join(MDM_PRESETS)}.")
        return cls(**(MDM_PRESETS[name] | overrides))

    def with_pixel_autoencoder(
        self, repo_id: str, revision: str | None = None, subfolder: str | None = None, **hub_options: Any
    ) -> "MDMConfig":
        """This configuration with the autoencoder of a folder or a Hub repository in front of the patches.

        Reads its config.json alone; the model's `load_pixel_autoencoder` fetches the weights. The number of its latent
        channels becomes `vae_config.num_channels`.

        Args:
            repo_id: Folder or Hub repository with an AutoencoderKL or a VQModel of diffusers.
            revision: Branch, tag or commit; the commit is what is kept.
            subfolder: Where in the repository it lies: "vae" in those of whole pipelines.
            hub_options: `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            ValueError: there is no such autoencoder.
        """
        spec = read_pixel_autoencoder(repo_id, revision, subfolder, **hub_options)
        fields = self.to_dict()
        fields["vae_config"] = fields["vae_config"] | {"num_channels": latent_channels(spec)}
        return type(self).from_dict(fields | {"pixel_autoencoder": spec})

    @property
    def image_channels(self) -> int:
        """Channels of the pixels."""
        spec = self.pixel_autoencoder
        return self.vae_config.num_channels if spec is None else spec["config"]["in_channels"]

    @property
    def pixel_downsampling(self) -> int:
        """Pixels to what the patches are cut from, along a side; 1 without a pixel autoencoder."""
        return 1 if self.pixel_autoencoder is None else downsampling(self.pixel_autoencoder)

    @property
    def pixel_patch_size(self) -> int:
        """Height and width in pixels of what one position of the sequence stands for."""
        return self.pixel_downsampling * self.vae_config.patch_size

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.vae_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int):  # `resize_token_embeddings` sets it
        self.vae_config.vocab_size = value

    @property
    def latent_size(self) -> int:
        """Width of a position's latent."""
        return self.vae_config.latent_size

    @property
    def inner_size(self) -> int:
        """Width of a block inside, per direction."""
        return self.expand * self.hidden_size

    @property
    def num_heads(self) -> int:
        """SSM heads per direction."""
        return self.inner_size // self.head_dim

    @property
    def num_attention_heads(self) -> int:
        """Heads of a Transformer's attention; without one, 0."""
        return self.hidden_size // self.head_dim if self.backbone == "transformer" else 0

    @property
    def mlp_size(self) -> int:
        """Width of a Transformer's MLP: `intermediate_size`, or what is left of a Mamba block's parameters.

        It is a multiple of 8 from 512 on; the two blocks' parameters differ by less than 1% from `hidden_size` 32 on.
        """
        if self.intermediate_size is not None:
            return self.intermediate_size
        size, inner, heads, directions = self.hidden_size, self.inner_size, self.num_heads, self.scan_directions[0]
        channels = inner + 2 * self.state_size
        mamba = size * (inner + channels + heads) + inner + inner * size  # in_proj, norm, out_proj
        mamba += directions * (channels * (self.conv_kernel + 1) + 3 * heads)  # convolution; A, D and the bias of dt
        attention = 4 * size * size + 2 * self.head_dim + size  # its norms, and the MLP's
        width = (mamba - attention) / (3 * size)
        return round(width) if width < 512 else 8 * round(width / 8)

    @property
    def end_token_ids(self) -> list[int]:
        """Tokens with which a text ends, or a block of it, before its canvas does."""
        ends = [self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id or []
        return [*ends, *([] if self.bos_token_id is None else [self.bos_token_id])]

    @property
    def placeholder_token_ids(self) -> list[int]:
        """Tokens that stand for patches, and for a token that is to be made."""
        return [self.image_token_id, self.image_target_token_id, self.text_target_token_id]

    @property
    def control_token_ids(self) -> list[int]:
        """Tokens that frame the latents and are embedded as learned vectors; all others carry latents."""
        return [
            self.pad_token_id,
            self.class_token_id,
            self.time_image_token_id,
            self.time_text_token_id,
            self.image_start_token_id,
            self.image_end_token_id,
            self.text_start_token_id,
            self.text_end_token_id,
            self.user_token_id,
            self.assistant_token_id,
            self.system_token_id,
        ]

    @property
    def special_token_ids(self) -> list[int]:
        """Every token id that this configuration names."""
        values = [getattr(self, name) for name in vars(self) if name.endswith("_token_id")]
        return [i for value in values if value is not None for i in (value if isinstance(value, list) else [value])]

    def check_vocab_size(self, vocab_size: int):
        """Raises ValueError if `vocab_size` tokens do not include the special ones."""
        needed = max(self.special_token_ids) + 1
        if vocab_size < needed:
            raise ValueError(
                f"A vocabulary of {vocab_size} tokens leaves out special ones: the highest id that the configuration "
                f"names is {needed - 1}; take {needed} tokens or more."
            )

    def validate_vocabulary(self):
        seen: dict[int, str] = {}
        of_text = ("bos_token_id", "eos_token_id", "unk_token_id")
        for name in [name for name in vars(self) if name.endswith("_token_id") and name not in of_text]:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"`{name}` is {value!r}; it must be the token's id, a whole number of 0 or more.")
            if value in seen:
                raise ValueError(
                    f"`{seen[value]}` and `{name}` are both {value}; each must be a token of its own, or nobody could "
                    "tell them apart; give the ids that the tokenizer has."
                )
            seen[value] = name
        self.check_vocab_size(self.vocab_size)

    def validate_pixel_autoencoder(self):
        if self.pixel_autoencoder is not None:
            check_pixel_autoencoder(self.pixel_autoencoder, self.vae_config.num_channels)

    def validate_sizes(self):
        _require_positive(
            self, "hidden_size", "num_hidden_layers", "state_size", "head_dim", "expand", "num_train_timesteps"
        )
        if self.num_candidates < 2:
            raise ValueError(f"`num_candidates` is {self.num_candidates}; a softmax over states needs at least 2.")
        if self.conv_kernel < 2:
            raise ValueError(f"`conv_kernel` is {self.conv_kernel}; the causal convolution needs at least 2 taps.")
        if any(period < 2 for period in self.position_periods):
            raise ValueError(
                f"`position_periods` is {self.position_periods}; each must be 2 patches or more: shorter waves tell "
                "no two patches apart."
            )
        if not 0 < self.time_step_min <= self.time_step_max < math.inf:
            raise ValueError(
                f"`time_step_min` and `time_step_max` are {self.time_step_min} and {self.time_step_max}; dt starts "
                "between the two: need 0 < time_step_min <= time_step_max."
            )
        if not 0 <= self.time_step_floor < math.inf:
            raise ValueError(f"`time_step_floor` is {self.time_step_floor}; it must be 0 or more: 1e-4 is usual.")
        if not 0 <= self.rms_norm_eps < math.inf:
            raise ValueError(f"`rms_norm_eps` is {self.rms_norm_eps}; it must be 0 or more: 1e-5 is usual.")
        if self.num_classes < 0:
            raise ValueError(f"`num_classes` is {self.num_classes}; it must be 0 (no classes) or more.")
        if self.inner_size % self.head_dim:
            raise ValueError(
                f"`expand * hidden_size` = {self.expand} * {self.hidden_size} is not a multiple of `head_dim` "
                f"{self.head_dim}; change one of the three."
            )

    def validate_backbone(self):
        if self.backbone == "mamba":
            if self.intermediate_size is not None:
                raise ValueError(
                    f"`intermediate_size` is {self.intermediate_size}, but `backbone` 'mamba' has no MLP; leave it "
                    "out, or choose backbone='transformer'."
                )
            return
        if self.scan_sharing != "shared":
            raise ValueError(
                f"`scan_sharing` is {self.scan_sharing!r}, but `backbone` 'transformer' scans nothing; leave it at "
                "'shared'."
            )
        if self.head_dim % 4 or self.hidden_size % self.head_dim:
            raise ValueError(
                f"`head_dim` is {self.head_dim}; attention needs a multiple of 4 (pairs for row and column) that "
                f"divides `hidden_size` {self.hidden_size}; change one of the two."
            )
        if self.mlp_size < 1:
            raise ValueError(
                f"The MLP's width is {self.mlp_size}; it must be 1 or more: attention alone has the parameters of a "
                f"Mamba block with `expand` {self.expand}; set `intermediate_size`, or a larger `expand`."
            )

    def validate_scan(self):
        images, texts = (*self.scan_directions, 0, 0)[:2]
        if len(self.scan_directions) != 2 or not (1 <= texts <= 2 and texts <= images <= 4):
            raise ValueError(
                f"`scan_directions` is {self.scan_directions}; give two numbers, 1 to 4 image orders and 1 to 2 text "
                "orders, no more text than image orders: [4, 2] is the paper's."
            )

    def validate_probabilities(self):
        if not 0 <= self.pinned_timestep_probability <= 1:
            raise ValueError(
                f"`pinned_timestep_probability` is {self.pinned_timestep_probability}; it must lie in [0, 1]."
            )
        for name in ("kl_weight", "diffusion_weight", "image_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}; a loss weight must be 0 or more, and finite.")


MDM_PRESETS: dict[str, dict] = {
    # Trained: 8x8 digits with captions, on a CPU.
    "mdm-digits": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "state_size": 16,
        "head_dim": 32,
        "num_classes": 10,
        "pinned_timestep_probability": 0.5,
        "vae_config": {
            "vocab_size": 384,
            "num_channels": 1,
            "patch_size": 2,
            "latent_size": 6,
            "hidden_size": 128,
            "num_hidden_layers": 1,
        },
    },
    # Untrained sizes. Images of 256x256 pixels enter as 32x32x4 latents of a pixel autoencoder, in patches of 2x2.
    "mdm-base": {"hidden_size": 1024, "num_hidden_layers": 24, "num_classes": 1000, "vae_config": {"num_channels": 4}},
    "mdm-1b": {"hidden_size": 2048, "num_hidden_layers": 49, "num_classes": 1000, "vae_config": {"num_channels": 4}},
    "mdm-7b": {
        "hidden_size": 2048,
        "num_hidden_layers": 49,
        "num_classes": 1000,
        "scan_sharing": "independent",
        "vae_config": {"num_channels": 4},
    },
}


def _require_positive(config, *names: str):
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"`{name}` is {getattr(config, name)}; it must be 1 or more.")
