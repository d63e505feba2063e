"""Claims about the scores of edited digits: who fills in the truth gets full marks, who draws another digit none, and
whoever touches what is known is told of."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdm_hf.cli import main
from mdm_hf.evaluation.digits_editing import DigitsEditing, spans_of
from mdm_hf.training.digits import DIGIT_WORDS, load_digits_split, mosaic


class Editor:
    """Knows what a canvas was made from; fills in the truth, or the digit after it, or changes what is known."""

    def __init__(self, shift: int = 0, keeps: bool = True):
        self.shift, self.keeps = shift, keeps
        images, labels = load_digits_split("train")
        self.by_digit = [next(i for i, label in zip(images, labels, strict=True) if label == d) for d in range(10)]
        images, labels = load_digits_split("heldout")
        self.label_of = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}

    def __call__(self, text=None, images=None, class_ids=None, canvas=None, image_size=None, **settings) -> list[dict]:
        if canvas is None:
            return [{"images": [self.draw(c, image_size)], "text": []} for c in class_ids]
        return [self.fill(part, images and images[i]) for i, [part] in enumerate(canvas)]

    def draw(self, digit: int, image_size: tuple[int, int]) -> Image.Image:
        rows, columns = (side // 8 for side in image_size)
        return mosaic([self.by_digit[(digit + self.shift) % 10]] * (rows * columns), rows, columns)

    def fill(self, part: dict, seen: Image.Image | None) -> dict:
        if part["type"] == "image":
            other = self.by_digit[(self.label_of[part["image"].tobytes()] + self.shift) % 10]
            whole = np.asarray(part["image"] if self.shift == 0 else other)
            keep = ~part["mask"] & self.keeps
            return {"images": [Image.fromarray(np.where(keep, np.asarray(part["image"]), whole))], "text": []}
        digit = (self.label_of[seen.tobytes()] + self.shift) % 10
        text = part["text"]
        if self.shift:
            text = f"the digit {DIGIT_WORDS[digit]}"
        return {"images": [], "text": [text if self.keeps else f"so {text}"]}


def test_the_truth_gets_full_marks_and_another_digit_next_to_none() -> None:
    settings = {"num_inference_steps": 2}
    found = DigitsEditing(Editor(), 65, settings).run()
    truth = found["scores"]
    assert truth.pop("known_parts_kept") == 1
    assert min(truth.values()) > 0.93  # the judge itself is right on 98.3%
    assert found["intervals"].keys() == truth.keys()
    other = DigitsEditing(Editor(shift=1), 65, settings).run()["scores"]
    for name in ("text_infilling", "size_8x8", "size_16x24"):
        assert other[name] < 0.05, name
    assert other["inpainting_alone"] < 0.5  # what is known still looks like the right one


def test_what_is_known_and_changed_is_noticed() -> None:
    assert DigitsEditing(Editor(shift=1, keeps=False), 65, {}).run()["scores"]["known_parts_kept"] == 0
    pictures = DigitsEditing(Editor(shift=1, keeps=False), 65, {})
    pictures.pictures()
    assert not pictures.is_kept
    texts = DigitsEditing(Editor(keeps=False), 65, {})
    texts.texts()
    assert not texts.is_kept


@pytest.mark.parametrize(
    ("kind", "left"),
    [("digit", "a small grey "), ("wording", "three"), ("end", "a ")],
)
def test_the_parts_of_a_caption_that_are_asked_for_are_those_named(kind: str, left: str) -> None:
    text, kept = "a small grey three", list("a small grey three")
    for start, end in spans_of(text, "three", kind):
        kept[start:end] = [""] * (len(kept[start:end]))
    assert "".join(kept).strip() == left.strip()


def test_a_mosaic_holds_its_pictures_row_by_row() -> None:
    images, labels = load_digits_split("train")
    whole = mosaic(images[:6], 2, 3)
    assert whole.size == (24, 16)
    found = DigitsEditing(Editor(), 1, {}).tiles(whole)
    assert (found == labels[:6]).mean() > 0.8
    assert np.array_equal(np.asarray(whole)[8:16, 16:24], np.asarray(images[5]))


def test_the_command_line_scores_the_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdm_hf.evaluation.digits_editing.SIZES", ((2, 2),))
    output = tmp_path / "scores.json"
    card = Path(__file__).parents[1] / "model_cards" / "mdm-digits"
    arguments = ["evaluate", "--benchmark", "digits-editing", "--num-samples", "65", "--steps", "2"]
    assert main([*arguments, "--model", str(card), "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["scores"]["known_parts_kept"] == 1
    assert found["settings"]["num_inference_steps"] == 2
    assert {"benchmark", "state", "solver", "modality_lag"} <= set(found["settings"])
