"""What a checkpoint makes of the examples on its card: drawn once, kept beside it with a hash of what it hangs on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from ..checkpoints import GENERATION_CONFIG, SOLVER, read_json, write_whole
from ..evaluation.results import file_hash, settings_hash
from ..generation_configuration_mdm import MDMGenerationConfig, sampling_options
from ..pipeline_mdm import MDMPipeline


EXAMPLES, FOLDER = "examples.json", "examples"
KEYS = ("text", "image", "class_id", "generate", "seed")
FORMS: dict[str, tuple] = {  # of the keys' values; a picture's is that of `_check_picture`
    "text": (str, "a text"),
    "class_id": (int, "a whole number"),
    "generate": (str | list, "'image', 'text', a list of both, or 'auto'"),
    "seed": (int, "a whole number"),
}
LEAST_SIDE = 256  # pixels: smaller pictures are enlarged by whole numbers, or a browser blurs them


def checkpoint_hash(folder: str | Path) -> str | None:
    """What tells the weights of one folder from another's, in however many files they lie: 16 hexadecimal digits, None
    where there are none.

    Raises:
        ValueError: weights that cannot be read, or lie in pickles alone: such a model is not untrained.
    """
    folder = Path(folder)
    where: dict[str, Path] = {}
    for path in folder.glob("*model*.safetensors"):  # a moving average beside them is another model's
        try:
            with safe_open(path, framework="pt") as file:
                where |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise ValueError(f"Got {path}, which cannot be read ({error}); need it whole.") from error
    if not where and (pickles := sorted(folder.glob("pytorch_model*.bin"))):
        raise ValueError(
            f"Got {folder} whose weights are in {pickles[0].name}; need them in safetensors; run `mdm convert "
            f"{folder} --to NEW`, and take NEW."
        )
    digest = hashlib.sha256()
    for name in sorted(where):
        with safe_open(where[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16] if where else None


def draw_examples(folder: str | Path, examples: list[dict], pipe: MDMPipeline | None = None) -> bool:
    """Has the checkpoint in `folder` make what the examples ask for; nothing if it already did.

    Args:
        examples: Dicts of text, image (a file of the folder), class_id, generate, seed (0), each at will.
        pipe: The checkpoint, if it is loaded already.

    Returns:
        Whether anything was drawn.

    Raises:
        ValueError: no weights; an example with other keys, with a picture that is not there, or that is refused.
    """
    folder = Path(folder)
    for example in examples:
        check_example(example)
        if "image" in example:
            _check_picture(folder, example["image"])
    if not examples or _drawn(folder, examples) is not None:
        return False
    if checkpoint_hash(folder) is None:
        raise ValueError(f"Got {folder} with examples and no weights; need both, or no examples; take them away.")
    pipe = pipe or MDMPipeline.from_pretrained(str(folder), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    drawn, pictures = [], {}
    for number, example in enumerate(examples, start=1):
        conditions: dict[str, Any] = {"text": example.get("text"), "class_ids": example.get("class_id")}
        if "image" in example:
            with Image.open(folder / example["image"]) as image:
                conditions["images"] = image.copy()
        wanted = {"generate": example["generate"]} if "generate" in example else {}
        result = pipe(**conditions, **wanted, seed=example.get("seed", 0))[0]  # type: ignore[index]
        made = {"text": " ".join(result["text"])} if result["text"] else {}
        if result["images"]:
            made["image"] = f"{FOLDER}/{number}.png"
            pictures[made["image"]] = enlarged(result["images"][0])
        drawn.append(example | {"made": made})
    # Only now, when none was refused: else a picture of these would lie under the examples of before.
    (folder / EXAMPLES).unlink(missing_ok=True)
    (folder / FOLDER).mkdir(exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / name)
    made = {name: file_hash(folder / name) for name in pictures}
    found = {"key": _key(folder, examples), "pictures": made, "examples": drawn}
    write_whole(folder / EXAMPLES, json.dumps(found, indent=1) + "\n")
    return True


def check_example(example: Any) -> None:
    """Refuses what a card could not show as it was drawn: other keys, null, lists of texts or classes.

    Raises:
        ValueError: with what is needed.
    """
    if not isinstance(example, dict) or set(example) - set(KEYS):
        raise ValueError(f"Got the example {example!r}; need a mapping with some of {', '.join(KEYS)}.")
    for name, (kinds, need) in FORMS.items():
        if name in example and (not isinstance(example[name], kinds) or isinstance(example[name], bool)):
            raise ValueError(f"Got the example {example!r} with {name} {example[name]!r}; need {need}, or no {name}.")


def _drawn(folder: Path, examples: list[dict]) -> list[dict] | None:
    """The examples with what these weights made of them, if all of it lies there as it was made."""
    found = _read(folder) if (folder / EXAMPLES).is_file() else None
    if found is None or _key(folder, examples) != found["key"]:
        return None
    is_whole = all(
        (folder / name).is_file() and file_hash(folder / name) == made for name, made in found["pictures"].items()
    )
    return found["examples"] if is_whole else None


def _check_picture(folder: Path, name: Any) -> None:
    """Refuses what a push would not take along, or Pillow cannot read."""
    if not isinstance(name, str) or not name.endswith(".png") or Path(name).name != name:
        raise ValueError(f"Got an example with the picture {name!r}; need the name of a .png in {folder} itself.")
    if not (folder / name).is_file():
        raise ValueError(f"Got an example with the picture {name}; need a file in {folder}.")
    try:
        with Image.open(folder / name) as image:
            image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"Got {folder / name}, which Pillow cannot read ({error}); need a whole picture.") from error


def drawn_examples(folder: str | Path, examples: list[dict]) -> list[dict]:
    """The examples, each with what was "made" of it.

    Raises:
        ValueError: they were not drawn, or by other weights, or a picture is not what was drawn.
    """
    folder = Path(folder)
    if not examples:
        return []
    if (drawn := _drawn(folder, examples)) is None:
        raise ValueError(
            f"Got {folder} whose {EXAMPLES} is missing, or of other weights, settings, examples or pictures; need "
            "what these weights make of these; draw them with `mdm card`."
        )
    return drawn


def enlarged(image: Image.Image) -> Image.Image:
    """A picture at least `LEAST_SIDE` pixels wide and high, every pixel of it a square."""
    factor = -(-LEAST_SIDE // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _key(folder: Path, examples: list[dict]) -> str:
    pictures = [file_hash(folder / one["image"]) for one in examples if "image" in one]
    saved, solver = (read_json(folder, name) for name in (GENERATION_CONFIG, SOLVER))
    how = {"sampling": sampling_options(MDMGenerationConfig(**(saved or {}))), "solver": solver}
    return settings_hash({"weights": checkpoint_hash(folder), "examples": examples, "pictures": pictures} | how)


def _read(folder: Path) -> dict:
    path = folder / EXAMPLES
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"Got {path}, which is not JSON ({error}); take it away, and `mdm card` draws anew."
        ) from error
    is_whole = isinstance(held, dict) and {"key", "examples"} <= set(held) and isinstance(held.get("pictures"), dict)
    return held if is_whole else {"key": None, "pictures": {}, "examples": []}
