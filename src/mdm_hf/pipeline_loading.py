"""What a pipeline is made of: model and processor of a folder or repository, an adapter on its base, compiled code."""

from functools import partial
from types import FunctionType

import torch

from .checkpoints import ADAPTER_CONFIG, GENERATION_CONFIG, read_json
from .generation_configuration_mdm import MDMGenerationConfig
from .modeling_mdm import MDMForMultiModalGeneration
from .processing_mdm import MDMProcessor
from .solvers import load_solver


PROCESSOR_CONFIG = "processor_config.json"


def load_parts(path, place: dict, access: dict, options: dict):
    """Model and processor of a folder or repository; of an adapter its base with the adapter on it.

    Args:
        place: `revision` and `subfolder`, where given.
        access: How to reach the Hub.
        options: Of the model's `from_pretrained`, place and access among them.

    Raises:
        ValueError: files that are missing or not whole, named with what to do.
    """
    adapter = read_json(path, ADAPTER_CONFIG, **place, **access)
    if adapter is not None:
        of_model = {name: value for name, value in options.items() if name not in place}
        return _load_adapted(path, adapter, place, access, of_model)
    model = MDMForMultiModalGeneration.from_pretrained(path, **options)
    if read_json(path, PROCESSOR_CONFIG, **place, **access) is None:
        raise ValueError(
            f"Got {path} without {PROCESSOR_CONFIG}; need the processor beside the model, its tokenizer and the sizes "
            "of its pictures; save one there with MDMProcessor(...).save_pretrained, or load the model alone with "
            "AutoModel."
        )
    return model, MDMProcessor.from_pretrained(path, **place, **access)


def _load_adapted(path, adapter: dict, place: dict, access: dict, of_model: dict):
    """The base model of an adapter with the adapter on it, and the processor of the two."""
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"Got {path}, an adapter whose {ADAPTER_CONFIG} names no base_model_name_or_path; need the model that it "
            "was trained on; load that with MDMPipeline.from_pretrained(...), then load_adapter(...) this."
        )
    of_base = {"revision": adapter["revision"]} if adapter.get("revision") else {}
    model = MDMForMultiModalGeneration.from_pretrained(base, **of_base, **of_model)
    model.load_adapter(str(path), adapter_kwargs=place | access)
    # A pipeline with an adapter saves these beside it.
    if (saved := read_json(path, GENERATION_CONFIG, **place, **access)) is not None:
        model.generation_config = MDMGenerationConfig(**saved)
    model.scheduler = load_solver(path, **place, **access) or model.scheduler
    has_own = read_json(path, PROCESSOR_CONFIG, **place, **access) is not None
    processor = MDMProcessor.from_pretrained(path if has_own else base, **(place if has_own else of_base), **access)
    return model, processor


def _call_block(layer, *args, **kwargs):
    return layer._call_impl(*args, **kwargs)


def compile_blocks(layers, mode: str | None = None) -> None:
    """Has `torch.compile` run the blocks of a model, all of them by the same few graphs.

    PyTorch keeps graphs, and limits their number, by code object: with a copy of the code for each model, no model
    takes the place of another one's. Where the limit is reached, what has no graph runs without, after a warning.
    """
    call_block = FunctionType(_call_block.__code__.replace(), globals())
    compiled = torch.compile(call_block, dynamic=True, mode=mode)
    for layer in layers:
        layer._compiled_call_impl = partial(compiled, layer)  # where `torch.nn.Module.compile` leaves its own
