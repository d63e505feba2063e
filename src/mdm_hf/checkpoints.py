"""Folders of MDM models, here or on the Hub: what `save_pretrained` writes, and what has to be there to load it again.

- `saved_with` in config.json lists the files that say how to sample. One that is missing is an error: with defaults in
  its place the samples would be others, and nobody would know why.
- The code goes with the weights, and config.json says which class the Auto classes find in it.
- Weights that had another name when first saved keep it on disk, which earlier versions read as well.
"""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from safetensors import SafetensorError
from transformers.conversion_mapping import WeightRenaming, register_checkpoint_conversion_mapping
from transformers.utils import cached_file
from transformers.utils.hub import create_and_tag_model_card


try:  # what LoRA adapts where a LoraConfig names no `target_modules`; here, so that it also travels with saved code
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
except ImportError:
    LORA_TARGETS = {}
LORA_TARGETS["mdm"] = ["in_proj", "out_proj"]

# Old pattern -> new name. `from_pretrained` and `load_state_dict` read both; `save_pretrained` writes the old one.
RENAMED_WEIGHTS = {r"mixer\.(A_log|D|dt_bias)": r"mixer.ssm.\1"}
register_checkpoint_conversion_mapping(
    "mdm", [WeightRenaming(old, new) for old, new in RENAMED_WEIGHTS.items()], overwrite=True
)

GENERATION_CONFIG = "generation_config.json"
SOLVER = "scheduler/scheduler_config.json"
ADAPTER_CONFIG = "adapter_config.json"
CARD = "README.md"
AGAIN = "push or download them again, with force_download=True if the cache holds a broken one."


def rename_weights(module, state_dict: dict, prefix: str, *_) -> None:
    """A hook of `load_state_dict`: old names of weights of `module` become the new ones, however deep it lies."""
    for old, new in RENAMED_WEIGHTS.items():
        for name in [name for name in state_dict if name.startswith(prefix) and re.search(old, name)]:
            state_dict[re.sub(old, new, name)] = state_dict.pop(name)


def write_whole(path: Path, text: str) -> None:
    """Writes a file, or, if stopped at any moment, leaves it as it was."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def read_json(path: Any, file: str, subfolder: str = "", is_needed: bool = False, **repository: Any) -> dict | None:
    """A JSON file of a folder or Hub repository; None if it is not there.

    Raises:
        ValueError: it is there and is not whole or no mapping, or it `is_needed` and not there.
    """
    full = f"{subfolder}/{file}" if subfolder else file
    found = cached_file(path, full, _raise_exceptions_for_missing_entries=False, **repository)
    if found is None:
        if is_needed:
            raise ValueError(
                f"Got {path} without {full}, which its config.json says it was saved with; need all of its files, or "
                f"it would sample with other settings than it was saved with; {AGAIN}"
            )
        return None
    try:
        held = json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"Got {path} with a {full} that is not whole JSON ({error}); need its files whole; {AGAIN}"
        ) from error
    if not isinstance(held, dict):
        raise ValueError(f"Got {path} with a {full} that holds a {type(held).__name__}; need a mapping; {AGAIN}")
    return held


class MDMCheckpointMixin:
    """`from_pretrained` and `save_pretrained` of all MDM models."""

    auto_classes: tuple[str, ...] = ("AutoModel",)  # which find the class in the code that is saved with it
    config: Any
    _auto_class: str | None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        except (SafetensorError, json.JSONDecodeError) as error:  # name neither the repository nor the file
            raise ValueError(
                f"Got {pretrained_model_name_or_path} with a .safetensors file or a model.safetensors.index.json that "
                f"cannot be read ({error}); need them whole; {AGAIN}"
            ) from error

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As [`~transformers.PreTrainedModel.save_pretrained`], with all that the model needs to be loaded again.

        The code that goes with it (see `register_for_auto_class`) is found by every Auto class that fits.

        Args:
            save_directory: The folder.
            push_to_hub: Whether what was written is then uploaded, and the folder's README.md, in one commit.
            kwargs: As there; of the upload `repo_id`, `private`, `token`, `revision`, `create_pr`, `commit_message`,
                `commit_description`, `tags`.
        """
        hub = hub_options(save_directory, kwargs) if push_to_hub else {}
        if self._auto_class is not None:
            module, name = type(self).__module__, type(self).__name__
            self.config.auto_map = dict.fromkeys(self.auto_classes, f"{module.rpartition('.')[2]}.{name}")
        for stale in ("custom_pipelines", "saved_with"):  # of the folder that the config came from
            if hasattr(self.config, stale):
                delattr(self.config, stale)
        self._save_parts(Path(save_directory))
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if push_to_hub:
            push_folder(save_directory, f"Upload {type(self).__name__}", **hub)

    def _save_parts(self, folder: Path) -> None:
        """What a model saves beside weights and config."""

    def load_adapter(self, peft_model_id: str | None = None, *args, **kwargs):
        """As [`~transformers.PreTrainedModel.load_adapter`].

        Raises:
            ValueError: a file of the adapter is not whole.
        """
        before = set(getattr(self, "peft_config", ()))
        try:
            return super().load_adapter(peft_model_id, *args, **kwargs)  # type: ignore[misc]
        except (SafetensorError, json.JSONDecodeError) as error:
            for half_loaded in set(getattr(self, "peft_config", ())) - before:
                self.delete_adapter(half_loaded)  # type: ignore[attr-defined]
            raise ValueError(
                f"Got the adapter {peft_model_id} with an {ADAPTER_CONFIG} or adapter_model.safetensors that cannot "
                f"be read ({error}); need them whole; {AGAIN}"
            ) from error


HUB_OPTIONS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


def hub_options(save_directory: Any, kwargs: dict) -> dict:
    """The arguments of `push_folder`: those among `save_pretrained`'s, taken out of them, and what is in the folder
    before it saves. The repository is named like the folder if by nothing else."""
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    before = _written(Path(save_directory))
    return {"repo_id": kwargs.pop("repo_id", Path(save_directory).name), "before": before} | hub


def _written(folder: Path) -> dict[str, int]:
    """When the files in a folder and below were last written, but for hidden ones."""
    places = {path: path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()}
    shown = {path: place for path, place in places.items() if not any(part.startswith(".") for part in place.parts)}
    return {place.as_posix(): path.stat().st_mtime_ns for path, place in shown.items()}


def push_folder(
    folder: Any,
    usual_message: str,
    repo_id: str,
    before: dict[str, int],
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    tags: list[str] | None = None,
    commit_message: str | None = None,
    **commit: Any,
) -> None:
    """Uploads what was written into a folder since `before`, in one commit, to a repository that is made if need be.

    The folder's README.md goes with it; without one, or with `tags`, the repository gets the card that `push_to_hub`
    would make.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr") and not commit.get("create_pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    folder, now = Path(folder), _written(Path(folder))
    files: dict[str, Path | bytes] = {
        name: folder / name for name, time in now.items() if name == CARD or before.get(name) != time
    }
    if tags or CARD not in files:
        own = str(folder / CARD) if CARD in files else repo_id
        files[CARD] = str(create_and_tag_model_card(own, tags, token=token)).encode()
    additions = [CommitOperationAdd(place, content) for place, content in files.items()]
    api.create_commit(repo_id, additions, commit_message=commit_message or usual_message, revision=revision, **commit)
