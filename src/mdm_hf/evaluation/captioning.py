"""COCO and Flickr30K captions, scored by pycocoevalcap's CIDEr.

CIDEr counts words, so what a word is matters. The published numbers are by the Penn Treebank tokenizer of Stanford's
CoreNLP, which pycocoevalcap runs in Java. Without Java a plain tokenizer stands in, and the result says so: the same
for ordinary sentences, apart from contractions ("dog's" is "dog 's" there).
"""

import contextlib
import io
import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from ..pipeline_mdm import MDMPipeline
from .results import ResultCache, bootstrap_interval, file_hash, reading, result, settings_of
from .visual_questions import ask, coco_image


@dataclass(frozen=True)
class Captioned:
    """A picture and what humans said of it."""

    image: Path
    captions: tuple[str, ...]


def read_captions(benchmark: str, data: Path | None, images: Path, split: str = "test") -> list[Captioned]:
    """Pictures and captions of a benchmark's own file.

    Args:
        data: COCO's captions_val2014.json, or Karpathy's dataset_flickr30k.json or dataset_coco.json, of which the
            pictures of `split` are read.

    Raises:
        ValueError: the file is not there, cannot be read, or is neither of the two; a picture without captions.
    """
    if data is None or not data.is_file():
        raise ValueError(
            f"Got --data {data}, which is no file; {benchmark} needs captions_val2014.json, or Karpathy's "
            "dataset_flickr30k.json."
        )
    with reading(data, "COCO's or Karpathy's file as it was published"):
        content = json.loads(data.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("images"), list):
            raise ValueError(
                f"Got {data} without a list of `images`; need COCO's or Karpathy's file as it was published."
            )
        items = _of_coco(content, images) if "annotations" in content else _of_karpathy(content, images, split)
    if bare := [one for one in items if not any(plain_tokens(text) for text in one.captions)]:
        raise ValueError(
            f"Got {data}, where nobody said a word of {bare[0].image.name}; need captions of every picture; leave it "
            "out."
        )
    return items


def _of_coco(content: dict, images: Path) -> list[Captioned]:
    said: dict[int, list[str]] = {}
    for row in content["annotations"]:
        said.setdefault(row["image_id"], []).append(row["caption"])
    names = {row["id"]: row.get("file_name") for row in content["images"]}
    return [
        Captioned(images / names[i] if names.get(i) else coco_image(images, "val2014", i), tuple(captions))
        for i, captions in said.items()
    ]


def _of_karpathy(content: dict, images: Path, split: str) -> list[Captioned]:
    return [
        Captioned(_place(images, row), tuple(one["raw"] for one in row["sentences"]))
        for row in content["images"]
        if row["split"] == split
    ]


def _place(images: Path, row: dict) -> Path:
    """Karpathy's COCO file names a folder beside the picture."""
    inside = images / row.get("filepath", "") / row["filename"]
    return inside if inside.is_file() else images / row["filename"]


def plain_tokens(text: str) -> str:
    """Lower case, words and numbers alone: what remains of a sentence for CIDEr where there is no Java."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower()))


def tokenized(texts: list[list[str]], with_java: bool) -> dict[int, list[str]]:
    """Item -> its texts as words between spaces."""
    if not with_java:
        return {i: [plain_tokens(one) for one in some] for i, some in enumerate(texts)}
    return PTBTokenizer().tokenize({i: [{"caption": one} for one in some] for i, some in enumerate(texts)})


def cider(
    said: Sequence[str], humans: Sequence[Sequence[str]], with_java: bool | None = None
) -> tuple[np.ndarray, str]:
    """CIDEr of each text (n,), whose mean is the corpus' CIDEr, and the tokenizer's name.

    Args:
        said: The texts.
        humans: For each, what people said.
        with_java: Tokenize as the published numbers do; None where there is Java.
    """
    with_java = shutil.which("java") is not None if with_java is None else with_java
    references, candidates = (
        tokenized([list(some) for some in humans], with_java),
        tokenized([[one] for one in said], with_java),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        _, scores = Cider().compute_score(references, candidates)
    return np.asarray(scores), "ptb (CoreNLP 3.4.1)" if with_java else "plain (no Java here)"


def run(options) -> dict:
    """The benchmarks "coco-captions" and "flickr30k-captions" of the command line."""
    started = time.perf_counter()
    if options.images is None:
        raise ValueError(f"Got no --images; {options.benchmark} needs the folder of its pictures.")
    items = read_captions(options.benchmark, options.data, options.images)[: options.limit]
    if not items:
        raise ValueError(f"Got {options.data} without a picture of the test split; need the file as it was published.")
    pipe = MDMPipeline.from_pretrained(options.model)
    cache = ResultCache(options.work_dir / f"{options.benchmark}.jsonl")
    said = ask(pipe, [one.image for one in items], [options.prompt] * len(items), cache, options)
    scores, tokenizer = cider(said, [one.captions for one in items])
    settings = {
        "benchmark": options.benchmark,
        "limit": options.limit,
        "seed": options.seed[0],
        "batch_size": options.batch_size,
        "prompt": options.prompt,
        "data": file_hash(options.data),
        "tokenizer": tokenizer,
        **settings_of(options, pipe),
    }
    return result(
        {"cider": float(scores.mean())},
        {"cider": bootstrap_interval(scores)},
        settings,
        started,
        num_samples=len(items),
        captions=[{"image": one.image.name, "caption": text} for one, text in zip(items, said, strict=True)],
    )
