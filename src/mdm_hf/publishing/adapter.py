"""A PEFT adapter of an MDM: what its card says of it. Its folder has adapter_config.json in config.json's place."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..checkpoints import ADAPTER_CONFIG, read_json
from ..conversion.files import read_safetensors


WEIGHTS = "adapter_model.safetensors"
FILES = (".json", ".safetensors", ".jinja", ".py", ".yaml", ".png")  # what of its folder is pushed


@dataclass(frozen=True)
class Adapter:
    """What adapter_config.json and the weights say.

    Args:
        kind: PEFT's name of it: LORA, ...
        base: owner/name of the base model on the Hub.
        revision: Of the base model, where the adapter names one.
        rows: Of the card's table, name and value each: kind, base, rank, trained modules, parameters.
    """

    kind: str
    base: str
    revision: str | None
    rows: list[list[str]]

    @property
    def of_base(self) -> str:
        """The arguments that load the base."""
        return f'"{self.base}"' + (f', revision="{self.revision}"' if self.revision else "")


def read_adapter(folder: str | Path) -> Adapter | None:
    """The adapter in a folder; None where there is a model, or nothing.

    Args:
        folder: As PEFT saves it, or a pipeline with an adapter on it.

    Raises:
        ValueError: a base that is no repository of the Hub, settings without trained modules, weights that are
            missing, not whole or not finite.
    """
    folder = Path(folder)
    fields = None if (folder / "config.json").is_file() else _settings(folder)
    if fields is None:
        return None
    base, modules = fields.get("base_model_name_or_path"), fields.get("target_modules")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)) or Path(base).is_dir():
        raise ValueError(
            f"Got {folder}, an adapter whose base model is {base!r}; need owner/name of the Hub, where others find "
            f"it; push the base, and write its name into base_model_name_or_path of {ADAPTER_CONFIG}."
        )
    if not modules or not isinstance(modules, list | str) or not isinstance(fields.get("peft_type"), str):
        raise ValueError(
            f"Got {folder} whose {ADAPTER_CONFIG} has peft_type {fields.get('peft_type')!r} and target_modules "
            f"{modules!r}; need both; save the adapter with PEFT again."
        )
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"Got {folder} without {WEIGHTS}; need the adapter's weights; save it with PEFT again.")
    weights = read_safetensors(folder / WEIGHTS)
    if broken := [name for name, weight in weights.items() if not bool(weight.isfinite().all())]:
        raise ValueError(f"Got {folder / WEIGHTS} with values that are not finite in {min(broken)}; need it whole.")
    kind, revision, whole = fields["peft_type"], fields.get("revision"), fields.get("modules_to_save") or []
    rows = [
        ["kind", kind + (", DoRA" if fields.get("use_dora") else "")],
        ["base model", f"{base} at {revision}" if revision else base],
        ["rank, alpha", f"{fields['r']}, {fields.get('lora_alpha')}"] if "r" in fields else [],
        ["trained modules", modules if isinstance(modules, str) else ", ".join(sorted(modules))],
        ["modules trained whole", ", ".join(sorted(whole))] if whole else [],
        ["parameters", f"{sum(weight.numel() for weight in weights.values()):,}"],
    ]
    return Adapter(kind, base, revision, [row for row in rows if row])


def _settings(folder: Path) -> dict | None:
    return read_json(str(folder), ADAPTER_CONFIG) if folder.is_dir() else None


def usage(place: str, adapter: Adapter, calls: list[str]) -> list[str]:
    """The card's section on how to load it."""
    lines = ["from mdm_hf import MDMPipeline", "", f'pipe = MDMPipeline.from_pretrained("{place}")', *calls]
    by_peft = [
        "import mdm_hf  # or, where it is not installed, trust_remote_code=True for the base model",
        "from peft import PeftModel",
        "from transformers import AutoModel",
        "",
        f"base = AutoModel.from_pretrained({adapter.of_base})",
        f'model = PeftModel.from_pretrained(base, "{place}")',
    ]
    return [
        "## Use",
        "```python\n" + "\n".join(lines) + "\n```",
        "That loads the base model and puts the adapter on it. With PEFT alone:",
        "```python\n" + "\n".join(by_peft) + "\n```",
    ]


def is_template(text: str) -> bool:
    """Whether a README.md is the one that PEFT leaves in a folder, with nothing filled in."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL).strip()
    template = ModelCard.from_template(ModelCardData()).text.strip()
    rest = r"\s*(### Framework versions\s*(- PEFT \S+\s*)*)?"
    return body.startswith(template) and re.fullmatch(rest, body.removeprefix(template)) is not None
