"""How well a model of the digits fills in what is missing, and draws pictures of several digits.

- Pictures: a part of a held-out digit is to be made, with its description as the prompt or with nothing; what comes
  of it is right if the judge names it as the held-out one is labelled.
- Texts: a part of a held-out digit's caption is to be made; it is right if it is of the grammar and names the digit.
- Sizes: rows and columns of one kind of digit, from its class; right if the judge names every one so.

What is known has to come back as it was: pixel by pixel, letter by letter.
"""

import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..pipeline_mdm import MDMPipeline
from ..training.digits import CAPTIONS, DIGIT_WORDS, digit_named_in, is_well_formed, load_digits_split
from .digits import DigitJudge
from .pictures import picture_grid
from .results import bootstrap_interval, result, sampling_of, settings_of


SIDE = 8  # pixels
SHOWN = 11  # examples of each kind on the sheet


def _box(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


# What is to be made of a picture.
PICTURE_MASKS = {
    "upper_half": _box(0, 4, 0, 8),
    "lower_half": _box(4, 8, 0, 8),
    "left_half": _box(0, 8, 0, 4),
    "right_half": _box(0, 8, 4, 8),
    "centre": _box(2, 6, 2, 6),
    "border": ~_box(2, 6, 2, 6),
}
TEXT_MASKS = ("digit", "wording", "end")
SIZES = ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (2, 3), (3, 2), (3, 3))  # rows and columns of digits


def spans_of(caption: str, digit: str, kind: str) -> list[tuple[int, int | None]]:
    """What is to be made of a caption that names `digit`: its name, all other words, or all after its first word."""
    start = caption.index(digit)
    if kind == "digit":
        return [(start, start + len(digit))]
    if kind == "end":
        return [(caption.find(" ") + 1, None)]
    return [(first, last) for first, last in ((0, start - 1), (start + len(digit) + 1, len(caption))) if first < last]


def with_gaps(text: str, spans: list[tuple[int, int | None]]) -> str:
    """A text as it is shown to people, with [...] for what is to be made."""
    shown, last = "", 0
    for start, end in spans:
        shown, last = f"{shown}{text[last:start]}[...]", len(text) if end is None else end
    return shown + text[last:]


class DigitsEditing:
    """Runs and judges; see the head of this file.

    Args:
        pipe: [`MDMPipeline`] of a model of the digits, with the sampling of `settings`.
        num_samples: Of each mask and of each size.
    """

    def __init__(self, pipe, num_samples: int, settings: dict, seed: int = 0):
        self.pipe, self.num_samples, self.settings, self.seed = pipe, num_samples, settings, seed
        self.judge = DigitJudge()
        images, labels = load_digits_split("heldout")
        which = np.arange(num_samples) % len(images)
        self.images, self.labels = [images[i] for i in which], np.asarray(labels)[which]
        self.right: dict[str, np.ndarray] = {}
        self.is_kept = True
        self.shown: dict[str, list[list[tuple[Image.Image, str]]]] = {}  # rows of the sheet, by their heading

    def sample(self, **conditions) -> list[dict]:
        return self.pipe(**conditions, **self.settings, seed=self.seed, batch_size=64)

    def pictures(self) -> None:
        prompts = [f"a handwritten {DIGIT_WORDS[digit]}" for digit in self.labels]
        for kind, mask in PICTURE_MASKS.items():
            canvas = [[{"type": "image", "image": image, "mask": mask}] for image in self.images]
            for name, texts in (("prompted", prompts), ("alone", [None] * self.num_samples)):
                made = [one["images"][0] for one in self.sample(text=texts, canvas=canvas)]
                self.right[f"inpainting_{name}_{kind}"] = self.judge(made) == self.labels
                pairs = zip(made, self.images, strict=True)
                self.is_kept &= all((np.asarray(a)[~mask] == np.asarray(b)[~mask]).all() for a, b in pairs)
                if name == "prompted":
                    known = [
                        Image.fromarray(np.where(mask, 128, np.asarray(image)).astype(np.uint8))
                        for image in self.images
                    ]
                    rows = [(one, "") for one in known], list(zip(made, prompts, strict=True))
                    self.show(f"Pictures, {kind.replace('_', ' ')}", *rows)

    def texts(self) -> None:
        rng = np.random.default_rng(self.seed)
        for kind in TEXT_MASKS:
            canvas, known, gapped = [], [], []
            for label in self.labels:
                digit = DIGIT_WORDS[label] if rng.random() < 0.5 else str(label)
                template = CAPTIONS[rng.integers(len(CAPTIONS))]
                text = template.format(a="an" if label == 8 else "a", d=digit)
                spans = spans_of(text, digit, kind)
                canvas.append([{"type": "text", "text": text, "mask": spans}])
                gapped.append(with_gaps(text, spans))
                known.append((text[: spans[0][0]], "" if spans[-1][1] is None else text[spans[-1][1] :]))
            made = [one["text"][0] for one in self.sample(images=self.images, canvas=canvas)]
            self.right[f"text_infilling_{kind}"] = np.array(
                [is_well_formed(text) and digit_named_in(text) == d for text, d in zip(made, self.labels, strict=True)]
            )
            told = [f"{gaps} -> {text}" for gaps, text in zip(gapped, made, strict=True)]
            self.show(f"Captions, {kind}", list(zip(self.images, told, strict=True)))
            pairs = zip(made, known, strict=True)
            self.is_kept &= all(text.startswith(a.strip()) and text.endswith(b.strip()) for text, (a, b) in pairs)

    def sizes(self) -> None:
        classes = np.arange(self.num_samples) % 10
        examples: list[tuple[Image.Image, str]] = []
        for rows, columns in SIZES:
            size = (rows * SIDE, columns * SIDE)
            drawn = self.sample(class_ids=classes.tolist(), generate="image", image_size=size)
            named = [self.tiles(one["images"][0]) == label for one, label in zip(drawn, classes, strict=True)]
            self.right[f"size_{size[0]}x{size[1]}"] = np.array([tiles.mean() for tiles in named])
            examples.append((drawn[len(examples) % self.num_samples]["images"][0], f"{size[0]} x {size[1]}"))
        self.show("Sizes", examples)

    def show(self, kind: str, *rows: Sequence[tuple[Image.Image, str]]) -> None:
        """Puts the first of each row on the sheet."""
        self.shown[kind] = [[*row[:SHOWN]] for row in rows]

    def sheet(self) -> Image.Image:
        """The first examples of each kind."""
        cells: list[tuple[Image.Image | None, str]] = []
        headings = {}
        for kind, rows in self.shown.items():
            headings[len(cells) // SHOWN] = kind
            for row in rows:
                cells += row + [(None, "")] * (SHOWN - len(row))
        return picture_grid(cells, columns=SHOWN, cell_size=72, caption_lines=6, headings=headings)

    def tiles(self, image) -> np.ndarray:
        """What the judge names each digit of a mosaic."""
        boxes = [(x, y, x + SIDE, y + SIDE) for y in range(0, image.height, SIDE) for x in range(0, image.width, SIDE)]
        return self.judge([image.crop(box) for box in boxes])

    def run(self, of_model: dict | None = None) -> dict:
        started = time.perf_counter()
        self.pictures()
        self.texts()
        self.sizes()
        for name in ("inpainting_prompted", "inpainting_alone", "text_infilling"):
            parts = [value for key, value in self.right.items() if key.startswith(f"{name}_")]
            self.right[name] = np.concatenate(parts)
        scores = {name: float(value.mean()) for name, value in self.right.items()}
        intervals = {name: bootstrap_interval(value) for name, value in self.right.items()}
        settings = (of_model or {}) | self.settings | {"num_samples": self.num_samples, "seed": self.seed}
        return result(scores | {"known_parts_kept": float(self.is_kept)}, intervals, settings, started)


def run(options) -> dict:
    """The benchmark "digits-editing" of the command line."""
    pipe = MDMPipeline.from_pretrained(options.model)
    editing = DigitsEditing(pipe, options.num_samples, sampling_of(options, pipe), options.seed[0])
    found = editing.run({"benchmark": "digits-editing", **settings_of(options, pipe)})
    options.work_dir.mkdir(parents=True, exist_ok=True)
    editing.sheet().save(options.work_dir / "digits-editing.png")
    return found
