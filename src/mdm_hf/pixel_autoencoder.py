"""The frozen pixel autoencoder in front of the patches: diffusers' AutoencoderKL or VQModel.

- It stands in `MDMConfig.pixel_autoencoder` by class, id, revision and licence, and is built inside the model, so that
  one repository holds all weights. Nothing trains it, and no gradient passes through it.
- Both classes are encoded without sampling, so a picture has one set of latents, which can be cached: AutoencoderKL
  by the mean of its posterior, VQModel by its encoder *before* quantisation. Its decoder quantises, so what the
  diffusion gets wrong by less than half the way to the next code does not show.

Symbols
    x    pixels in [-1, 1]                                                (n, 1 or 3, H, W)
    y    latents of about unit scale, (E(x) - shift) * scale              (n, c, H / f, W / f)
    f    downsampling, 2^(levels - 1)
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers.utils import cached_file, logging
from transformers.utils.hub import extract_commit_hash


logger = logging.get_logger(__name__)

CLASSES = ("AutoencoderKL", "VQModel")
FIELDS = ("class_name", "repo_id", "revision", "subfolder", "license", "config")
SIZES = ("in_channels", "out_channels", "latent_channels", "block_out_channels", "scaling_factor")
PIXELS_AT_ONCE = 2**20  # bounds the memory: 16 images of 256x256, 4 of 512x512
SHOWN = 5  # names of weights in a message


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(map(is_one, value))


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


COUNT = (_is_count, "a whole number, 1 or more")
FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {  # of what is read of an autoencoder's config
    "in_channels": COUNT,
    "out_channels": COUNT,
    "latent_channels": COUNT,
    "vq_embed_dim": COUNT,
    "block_out_channels": (_are(_is_count), "a list of whole numbers, 1 or more"),
    "scaling_factor": (_is_positive, "a finite number above 0"),
    "shift_factor": (_is_number, "a finite number, or null"),
    "latents_mean": (_are(_is_number), "a list of finite numbers, or null"),
    "latents_std": (_are(_is_positive), "a list of finite numbers above 0, or null"),
}


def check_pixel_autoencoder(spec: dict, num_channels: int | None = None) -> None:
    """Raises ValueError unless `spec` names an autoencoder whose latents are images of `num_channels` channels; of any
    number if None."""
    if unknown := sorted(set(spec) - set(FIELDS)):
        raise ValueError(f"`pixel_autoencoder` has the unknown field(s) {unknown}; it knows {', '.join(FIELDS)}.")
    if spec.get("class_name") not in CLASSES:
        raise ValueError(
            f"`pixel_autoencoder` has class_name {spec.get('class_name')!r}; it must be one of {', '.join(CLASSES)}, "
            "classes of diffusers; take another autoencoder, or convert it."
        )
    config = spec.get("config")
    missing = [name for name in SIZES if not isinstance(config, dict) or config.get(name) is None]
    if missing:
        raise ValueError(
            f"`pixel_autoencoder` has a config without {', '.join(missing)}; it must be the whole config.json of the "
            "autoencoder; read it with MDMConfig.with_pixel_autoencoder."
        )
    for name, (is_right, need) in FORMS.items():
        if config.get(name) is not None and not is_right(config[name]):
            raise ValueError(
                f"`pixel_autoencoder` has a config with {name} {config[name]!r:.80}; it must be {need}; take the "
                "config.json that the autoencoder was saved with."
            )
    if config["in_channels"] != config["out_channels"] or config["in_channels"] not in (1, 3):
        raise ValueError(
            f"`pixel_autoencoder` takes {config['in_channels']} channels and gives {config['out_channels']}; both "
            "must be 1 (grey) or 3 (RGB); take another autoencoder."
        )
    if num_channels is not None and latent_channels(spec) != num_channels:
        raise ValueError(
            f"`pixel_autoencoder` makes latents of {latent_channels(spec)} channels, `vae_config.num_channels` is "
            f"{num_channels}; they must be equal; set `vae_config.num_channels` to {latent_channels(spec)}."
        )
    for name in ("latents_mean", "latents_std"):
        values = len(config.get(name) or [])
        if values not in (0, latent_channels(spec)):
            raise ValueError(
                f"`pixel_autoencoder` has {name} with {values} values for {latent_channels(spec)} channels; give one "
                "a channel, or null."
            )


def latent_channels(spec: dict) -> int:
    """Channels of the latents; a VQModel's are those of its codes."""
    return spec["config"].get("vq_embed_dim") or spec["config"]["latent_channels"]


def downsampling(spec: dict) -> int:
    """Pixels to a latent, along a side: each level but the last halves the sides."""
    return 2 ** (len(spec["config"]["block_out_channels"]) - 1)


def read_pixel_autoencoder(
    repo_id: str, revision: str | None = None, subfolder: str | None = None, **hub_options: Any
) -> dict:
    """`MDMConfig.pixel_autoencoder` of an autoencoder in a folder or a Hub repository; fetches no weights.

    The revision becomes the commit that it stands for, the licence is that of the repository's card, if it names one.

    Raises:
        ValueError: there is no config of an AutoencoderKL or a VQModel, or one with a setting that cannot be.
    """
    where = f"{repo_id}/{subfolder}" if subfolder else repo_id
    try:
        path = cached_file(repo_id, "config.json", revision=revision, subfolder=subfolder or "", **hub_options)
        if path is None:  # what transformers makes of a folder without it
            raise OSError("no such file")
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Got {where}, of which no config.json can be read ({error}); need a folder or a Hub repository with an "
            "autoencoder of diffusers; check id, revision and subfolder."
        ) from error
    if config.get("_class_name") not in CLASSES:
        raise ValueError(
            f"Got {where}, a {config.get('_class_name')}; need {' or '.join(CLASSES)}; in the repository of a whole "
            'pipeline it lies in a subfolder, for instance subfolder="vae".'
        )
    spec = {
        "class_name": config["_class_name"],
        "repo_id": repo_id,
        "revision": extract_commit_hash(path, None) or revision,
        "subfolder": subfolder,
        "license": _license(repo_id, revision, hub_options),
        "config": {name: value for name, value in config.items() if not name.startswith("_")},
    }
    spec = {name: value for name, value in spec.items() if value is not None}
    check_pixel_autoencoder(spec)
    return spec


def _license(repo_id: str, revision: str | None, hub_options: dict) -> str | None:
    try:
        card = cached_file(repo_id, "README.md", revision=revision, **hub_options)
    except OSError:
        logger.warning(f"{repo_id} has no README.md: the licence of its weights is not known.")
        return None
    data = ModelCard(Path(card).read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    return data.get("license_name") or data.get("license")


class MDMPixelAutoencoder(nn.Module):
    """x <-> y. Frozen: always in evaluation mode, never with gradients.

    Args:
        spec: `MDMConfig.pixel_autoencoder`. Without `repo_id` the random weights of the start are taken for what they
            are; with one, `load` has to come before the first use.
    """

    def __init__(self, spec: dict):
        super().__init__()
        self.spec = spec
        try:
            self.autoencoder = getattr(diffusers, spec["class_name"]).from_config(spec["config"])
        except Exception as error:  # whatever a config that was never an autoencoder's makes diffusers raise
            raise ValueError(
                f"Got a `pixel_autoencoder` of whose config no {spec['class_name']} can be built "
                f"({type(error).__name__}: {error}); need the config.json that the autoencoder was saved with."
            ) from error
        self.register_buffer("is_loaded", torch.tensor(self.loaded_at_start))
        self.freeze()

    @property
    def loaded_at_start(self) -> float:
        return float(self.spec.get("repo_id") is None)

    def freeze(self) -> None:
        """Takes the weights out of training; transformers makes parameters anew when it loads them."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "MDMPixelAutoencoder":
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.autoencoder.parameters()).dtype

    def load(self, source: str | None = None, **hub_options: Any) -> None:
        """Fetches the weights from `source`, a folder or a Hub repository; by default from where the config says.

        Raises:
            ValueError: none can be read, they belong to another config, or one is missing, unknown or not finite.
        """
        spec = self.spec
        where = source or spec.get("repo_id")
        if where is None:
            raise ValueError("`pixel_autoencoder` has no repo_id; give a folder or a Hub repository to load from.")
        if source is None:
            hub_options = {name: spec[name] for name in ("revision", "subfolder") if name in spec} | hub_options
        try:
            loaded, report = type(self.autoencoder).from_pretrained(
                where, use_safetensors=True, output_loading_info=True, **hub_options
            )
        except Exception as error:  # OSError, SafetensorError, and whatever a wrong config makes diffusers raise
            raise ValueError(
                f"Got {where}, of which no {spec['class_name']} can be loaded ({error}); need whole safetensors and "
                "the config.json that belongs to them; push or download them again."
            ) from error
        held = {name: weight for name, weight in loaded.state_dict().items() if name not in report["missing_keys"]}
        broken = [name for name, weight in held.items() if not bool(weight.isfinite().all())]
        for names, what in (
            (report["missing_keys"], "without the weights"),
            (report["unexpected_keys"], "with weights of unknown names:"),
            (broken, "with values that are not finite in"),
        ):
            if names:
                raise ValueError(
                    f"Got {where} {what} {_some(names)}; need those of its {spec['class_name']}, whole; push or "
                    "download them again."
                )
        ours, theirs = dict(self.autoencoder.config), dict(loaded.config)
        differing = [name for name in ours if not name.startswith("_") and _plain(ours[name]) != _plain(theirs[name])]
        if differing:
            name = differing[0]
            raise ValueError(
                f"Got {where} with {name} {theirs[name]!r}; `pixel_autoencoder` says {ours[name]!r}; need the one "
                "that the config was read from; read it anew with MDMConfig.with_pixel_autoencoder."
            )
        self.autoencoder.load_state_dict(loaded.state_dict())
        self.is_loaded.fill_(1)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """x (n, c, H, W) in [-1, 1], H and W multiples of f -> y (n, latent channels, H / f, W / f) in float32."""
        self._make_ready()
        encoded = []
        for x in _slices(pixel_values, pixel_values.shape[-2] * pixel_values.shape[-1]):
            found = self.autoencoder.encode(x.to(self.dtype))
            encoded.append((found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents).float())
        shift, scale = self._shift_and_scale(pixel_values.device)
        return (torch.cat(encoded) - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """y (n, latent channels, h, w) -> x (n, c, h * f, w * f) in float32, nominally in [-1, 1]."""
        self._make_ready()
        shift, scale = self._shift_and_scale(latents.device)
        z, area = latents.float() / scale + shift, latents.shape[-2] * latents.shape[-1] * downsampling(self.spec) ** 2
        return torch.cat([self.autoencoder.decode(part.to(self.dtype)).sample.float() for part in _slices(z, area)])

    def encode_padded(self, pixel_values: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """Images of several sizes in one tensor -> their latents, (n, latent channels, h, w), padded with 0.

        Each is cut to its own (height, width) of `sizes` first: the padding would reach into the latents of the
        picture through convolutions, attention and group norms.
        """
        f = downsampling(self.spec)
        height, width = (max(sides) // f for sides in zip(*sizes, strict=True))
        latents = pixel_values.new_zeros(len(sizes), latent_channels(self.spec), height, width, dtype=torch.float32)
        of_size = defaultdict(list)
        for i, size in enumerate(sizes):
            of_size[size].append(i)
        for (h, w), index in of_size.items():
            latents[index, :, : h // f, : w // f] = self.encode(pixel_values[index, :, :h, :w])
        return latents

    def _shift_and_scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What diffusers' pipelines subtract from the latents, and multiply them with: (c or 1, 1, 1) each."""
        config = self.spec["config"]
        mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
        std = config.get("latents_std") or [1.0]
        shift, std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1) for values in (mean, std)
        )
        return shift, config["scaling_factor"] / std

    def _make_ready(self) -> None:
        if torch.compiler.is_compiling():
            return
        if not bool(self.is_loaded):
            raise ValueError(
                f"The pixel autoencoder {self.spec['repo_id']} has random weights; call "
                "`model.load_pixel_autoencoder()` once, before the first use: what is saved then has them."
            )
        if self.dtype == torch.float16 and self.autoencoder.config.get("force_upcast", False):
            self.autoencoder.float()  # its activations are beyond float16


def _slices(images: Tensor, area: int) -> Iterator[Tensor]:
    """`images` in batches of at most `PIXELS_AT_ONCE` pixels, one image at least."""
    yield from images.split(max(1, PIXELS_AT_ONCE // area))


def _some(names: Iterable[str]) -> str:
    """The first few of some names, and how many more there are."""
    listed = sorted(names)
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
