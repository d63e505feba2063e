"""What a run draws while it trains: samples of each kind of example, or what the VAE makes of its input."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch.distributed.fsdp import FSDPModule

from ..evaluation.pictures import picture_grid
from ..modeling_mdm import MDMForMultiModalGeneration
from ..processing_mdm import MDMProcessor
from .mix import ConversationMix, StreamingMix


COLUMNS = 8
LOOK_AT = 256  # examples among which those to draw are chosen
Drawer = Callable[[MDMForMultiModalGeneration, int], Image.Image | None]


def some_examples(mix: ConversationMix | StreamingMix) -> Iterator[dict]:
    """The first of each of the first batches of tables; of streams what comes first."""
    if isinstance(mix, StreamingMix):
        return islice(iter(mix), LOOK_AT)
    return (mix[i] for i in range(0, min(len(mix), LOOK_AT * mix.batch_size), mix.batch_size))


def examples_to_draw(mix: ConversationMix | StreamingMix) -> dict[str, list[dict]]:
    """Up to `COLUMNS` training examples of each shape, "text -> image" and the like.

    In all processes they are those of the first one: of a model that is sharded all draw together, and each reads
    another part of a stream.
    """
    found = [_found_in(mix) if PartialState().is_main_process else {}]
    if PartialState().num_processes > 1:
        broadcast_object_list(found)
    return found[0]


def _found_in(mix: ConversationMix | StreamingMix) -> dict[str, list[dict]]:
    shapes: dict[str, list[dict]] = {}
    for example in some_examples(mix):
        *context, last = example["messages"]
        given = [kind for message in context for kind in _kinds(message)]
        shape = f"{' and '.join(dict.fromkeys(given)) or 'nothing'} -> {' and '.join(dict.fromkeys(_kinds(last)))}"
        shapes.setdefault(shape, []).append(example)
    return {shape: found[:COLUMNS] for shape, found in sorted(shapes.items())}


def samples_drawer(processor: MDMProcessor, mix: ConversationMix | StreamingMix) -> Drawer:
    """A row for each shape of example: what the model makes of its conditions, the noise the same each time."""
    shapes = examples_to_draw(mix)

    def draw(model: MDMForMultiModalGeneration, step: int) -> Image.Image:
        cells: list[tuple[Image.Image | None, str]] = []
        headings: dict[int, str] = {}
        for shape, examples in shapes.items():
            headings[len(cells) // COLUMNS] = shape
            contexts = [example["messages"][:-1] for example in examples]
            wanted = tuple(dict.fromkeys(_kinds(examples[0]["messages"][-1])))
            if contexts[0]:
                inputs = processor.apply_chat_template(contexts, generate=wanted)
            else:
                inputs = processor(text=[None] * len(examples), generate=wanted)
            generators = [torch.Generator().manual_seed(i) for i in range(len(examples))]
            outputs = model.generate(**inputs.to(model.device), generator=generators)
            for context, made in zip(contexts, processor.post_process_multimodal_output(outputs), strict=True):
                image = next(iter(made["images"]), None) or _first_image(context)
                said = [text for message in context for text in _texts(message)]
                cells.append((image, " / ".join([*said, *(f"> {text}" for text in made["text"])])))
            cells += [(None, "")] * (-len(cells) % COLUMNS)
        return picture_grid(cells, COLUMNS, headings=headings)

    return draw


def reconstructions_drawer(processor: MDMProcessor, mix: ConversationMix | StreamingMix) -> Drawer:
    """Images as they are and as the VAE gives them back, each with a text that went through the VAE as well.

    Of a model that FSDP2 shards none are drawn: it gathers weights where the whole model is called, not for its VAE.
    """
    examples = [one for found in examples_to_draw(mix).values() for one in found]
    images = [image for one in examples for image in map(_first_image, [one["messages"]]) if image is not None][
        :COLUMNS
    ]
    texts = [text for one in examples for message in one["messages"] for text in _texts(message)][:COLUMNS]

    def draw(model: MDMForMultiModalGeneration, step: int) -> Image.Image | None:
        if isinstance(model, FSDPModule):
            return None
        vae, cells = model.model.vae, []
        with torch.no_grad():
            said = [_through(vae, processor, text) for text in texts]
            if images:
                back = [_image_through(model, processor, image) for image in images]
                cells += [(image, "") for image in images] + [(None, "")] * (COLUMNS - len(images))
                cells += [(image, "") for image in back] + [(None, "")] * (COLUMNS - len(back))
        headings = {0: "as they are", 1: "through the VAE"} if images else {}
        headings[len(cells) // COLUMNS] = "texts through the VAE"
        cells += [(None, text) for text in said] + [(None, "")] * (COLUMNS - len(said))
        return picture_grid(cells, COLUMNS, headings=headings)

    return draw


def _through(vae, processor: MDMProcessor, text: str) -> str:
    ids = torch.tensor(processor.tokenizer(text, add_special_tokens=False)["input_ids"], device=vae.device)
    return processor.tokenizer.decode(vae(input_ids=ids).logits.argmax(-1))


def _image_through(model: MDMForMultiModalGeneration, processor: MDMProcessor, image: Image.Image) -> Image.Image:
    pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    autoencoder = getattr(model.model, "pixel_autoencoder", None)
    if autoencoder is None:
        back = model.model.vae(pixel_values=pixels).reconstruction
    else:
        back = autoencoder.decode(model.model.vae(pixel_values=autoencoder.encode(pixels)).reconstruction)
    return processor.image_processor.postprocess([back[0]])[0]


def _kinds(message: dict) -> list[str]:
    return [part["type"] for part in message["content"]]


def _texts(message: dict) -> list[str]:
    return [part["text"] for part in message["content"] if part["type"] == "text"]


def _first_image(messages: list[dict]) -> Image.Image | None:
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    return next((part["image"] for part in parts if isinstance(part.get("image"), Image.Image)), None)
