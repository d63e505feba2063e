"""What the pages of `space.py` answer, without gradio: requests checked, samples as they form, the same as HTML.

A request that cannot be answered is a ValueError whose message is for the person who asked. The limits are those of
`handler.py`, and a picture that was sent is decoded only after its size is known.
"""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import cached_file

from ..conversation_state import MDMConversationState
from ..conversations import AUTO, MODALITIES
from ..pipeline_mdm import MDMPipeline
from .card_notes import NOTES, NOTES_FILE, read_notes
from .handler import MOST_SAMPLES, MOST_STEPS, check_work
from .space_html import Card, bubble, cards_as_html, on_canvas


MOST_CHARACTERS = 2000  # of a prompt, before anything reads it
MOST_GUIDANCE = 10
MOST_SEED = 2**32 - 1
MOST_PICTURES = 4  # of a message
MESSAGES_SHOWN = 60  # of a conversation; what the model remembers of it is of one size
SECONDS_BETWEEN_LOOKS = 0.1
MADE = {"both": MODALITIES, "image": ("image",), "text": ("text",), AUTO: AUTO}
MARK = re.compile(r"\[([^\[\]]*)\]")
REST = ("...", "…")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Look:
    """Samples while they form, and at last as they are.

    Args:
        results: A {"text": [...], "images": [...]} for each sample.
        seed: Of the first; of sample n it is seed + n.
        calls: Of the network so far.
        is_done: Whether this is the last look.
        decided: What the model itself chose to make, in words.
    """

    results: list[dict]
    seed: int
    calls: int
    is_done: bool
    decided: str = ""


@dataclass(frozen=True)
class Talk:
    """A conversation.

    Args:
        messages: The last of them, each {"role", "content"} with HTML.
        memory: What the model remembers, of one size however long it is.
    """

    messages: tuple[dict, ...] = ()
    memory: MDMConversationState | None = None

    def with_messages(self, *more: dict, memory: MDMConversationState | None = None) -> "Talk":
        """The conversation with more messages and another memory."""
        return Talk((*self.messages, *more)[-MESSAGES_SHOWN:], memory)


@dataclass
class Model:
    """What is known of a model beside its weights.

    Args:
        name, summary: In words; the summary may hold Markdown.
        examples: {"text", "image", "class_id", "generate", "seed"}, any of them; images as paths.
    """

    name: str
    summary: str
    examples: list[dict] = field(default_factory=list)


def model_of(pipe: MDMPipeline) -> Model:
    """What card.yaml beside the weights says; without one, the name and examples that any such model can draw.

    Args:
        pipe: The model's pipeline, whose `name_or_path` is looked at.
    """
    place = str(pipe.model.name_or_path or "mdm")
    found = _file(place, NOTES_FILE)
    notes = read_notes(Path(found).parent) if found else NOTES
    examples = []
    for example in notes["examples"]:
        path = _file(place, example["image"]) if "image" in example else None
        if "image" not in example or path:
            shown = example | ({"image": path} if path else {})
            if isinstance(wanted := example.get("generate"), list):
                shown["generate"] = wanted[0] if len(wanted) == 1 else "both"
            examples.append(shown)
    if not examples:
        examples = [{"class_id": number} for number in range(min(3, pipe.processor.num_classes or 0))] + [{"seed": 1}]
    is_named = found and notes["name"] != Path(found).parent.resolve().name  # a commit's, in the Hub's cache
    return Model(notes["name"] if is_named else Path(place).name, notes["summary"].strip(), examples)


def _file(place: str, name: str) -> str | None:
    """A file of a folder or of a repository, if it has it and can be reached."""
    try:
        return cached_file(place, name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None


class Answers:
    """Answers requests with one pipeline; holds nothing of whoever asks, so that any number of threads may.

    Args:
        pipe: The pipeline. Its progress bar is turned off.
    """

    def __init__(self, pipe: MDMPipeline):
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.images = pipe, pipe.processor.image_processor

    @property
    def classes(self) -> list[str]:
        """Names of the classes: their numbers where the model has no names for them."""
        names = self.pipe.model.config.id2label or {}
        count = self.pipe.processor.num_classes or 0
        is_named = len(names) == count and not all(str(name).startswith("LABEL_") for name in names.values())
        return [str(names[number]) if is_named else str(number) for number in range(count)]

    @property
    def decides(self) -> bool:
        """Whether the model can tell what a prompt calls for."""
        return bool(self.pipe.model.config.modality_gate)

    def draw(
        self,
        text: str | None = None,
        image: str | bytes | None = None,
        class_id: int | None = None,
        make: str = "both",
        seed: float | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        samples: int = 1,
    ) -> Iterator[Look]:
        """Samples of any conditions, as they form.

        Args:
            text: The prompt, or a question about the image.
            image: Path or bytes of a picture.
            class_id: Data category.
            make: One of `MADE`.
            seed: Of the first sample; drawn at random if None or below 0.
            steps, guidance: The model's own if None.
            samples: How many.

        Raises:
            ValueError: whatever cannot be drawn.
        """
        if make not in MADE:
            raise ValueError(f"Got {make!r} to make; need one of {', '.join(MADE)}.")
        given = {"text": self.words(text), "images": self.picture(image), "class_ids": class_id}
        wanted, decided = MADE[make], ""
        if wanted == AUTO:
            [wanted] = self.pipe.predict_modalities(**given)
            decided = " and ".join(wanted)
        options = {"generate": wanted} | self._options(steps, guidance)
        samples = _whole("samples", samples, MOST_SAMPLES)
        yield from self._looks(given, seed, options | {"num_return_sequences": samples}, decided)

    def edit(
        self,
        picture: Image.Image | None,
        mask: np.ndarray | None,
        text: str | None = None,
        strength: float = 1.0,
        seed: float | None = None,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Iterator[Look]:
        """A picture whose marked part is made anew, as it forms; all of it without a mask.

        Args:
            picture: As `fitted` makes one.
            mask: (height, width) bool, as `marked_by` makes one: what is to be made. The rest stays, bit by bit.
            text, seed, steps, guidance: As in `draw`.
            strength: 1 keeps nothing of what is made anew.

        Raises:
            ValueError: whatever cannot be drawn.
        """
        if picture is None:
            raise ValueError("Got no picture to change; need one; upload it, or take one that was made here.")
        if not isinstance(strength, int | float) or not 0 < strength <= 1:
            raise ValueError(f"Got the strength {strength!r}; need a number above 0, 1 at most.")
        canvas = {"type": "image", "image": picture} | ({} if mask is None else {"mask": mask})
        options = self._options(steps, guidance) | {"strength": float(strength)}
        yield from self._looks({"text": self.words(text), "canvas": canvas}, seed, options)

    def rewrite(
        self,
        caption: str,
        picture: Image.Image | None = None,
        seed: float | None = None,
        steps: int | None = None,
    ) -> Iterator[Look]:
        """A caption whose [marked] parts are written anew, as it forms; see `read_marks`.

        Args:
            caption: The caption with its marks.
            picture: What it describes.
            seed, steps: As in `draw`.

        Raises:
            ValueError: whatever cannot be written.
        """
        text, spans = read_marks(self.words(caption) or "")
        canvas = {"type": "text", "text": text, "mask": spans}
        yield from self._looks({"images": picture, "canvas": canvas}, seed, self._options(steps, None))

    def talk(
        self,
        talk: Talk,
        text: str | None,
        images: Sequence[str | bytes],
        make: str = "text",
        seed: float | None = None,
    ) -> Iterator[Talk]:
        """A conversation with one more message, then with the answer to it as it forms; the last is remembered.

        Raises:
            ValueError: a message that cannot be read or answered; `talk` is as it was.
        """
        if make not in MADE:
            raise ValueError(f"Got {make!r} to make; need one of {', '.join(MADE)}.")
        if len(images) > MOST_PICTURES:
            raise ValueError(
                f"Got {len(images)} pictures in a message; need {MOST_PICTURES} at most; send the rest later."
            )
        said, pictures = self.words(text), [self.picture(one) for one in images]
        if said is None and not pictures:
            raise ValueError("Got an empty message; need a text or a picture.")
        check_work(self.pipe, {"generate": MADE[make]})
        asked = {"role": "user", "content": bubble(said, pictures)}
        yield talk.with_messages(asked, memory=talk.memory)
        chat, answer = self.pipe.chat(talk.memory), {}
        looks = chat.stream(said, pictures or None, generate=MADE[make], seed=_seed(seed))
        for answer in _not_too_often(looks):
            yield talk.with_messages(asked, _reply(answer, is_done=False), memory=talk.memory)
        yield talk.with_messages(asked, _reply(answer), memory=chat.state)

    def words(self, text: str | None) -> str | None:
        """A prompt on one line; None where nothing is said.

        Raises:
            ValueError: it is too long, or no text.
        """
        if text is not None and not isinstance(text, str):
            raise ValueError(f"Got a prompt of type {type(text).__name__}; need a text.")
        if len(text or "") > MOST_CHARACTERS:
            raise ValueError(f"Got a prompt of {len(text)} characters; need {MOST_CHARACTERS} at most; shorten it.")
        if any("\ud800" <= letter <= "\udfff" for letter in text or ""):
            raise ValueError("Got a prompt with half a character in it; need whole ones; type it again.")
        return " ".join((text or "").split()) or None

    def unknown_to_model(self, text: str | None) -> str:
        """The characters of a prompt that the tokenizer has no token for, each once."""
        tokenizer = self.pipe.processor.tokenizer

        def is_known(letter: str) -> bool:
            tokens = tokenizer.tokenize(letter)
            return not any(token == tokenizer.unk_token or BYTE.fullmatch(token) for token in tokens)

        return "".join(letter for letter in dict.fromkeys("".join((text or "").split())) if not is_known(letter))

    def picture(self, source: str | bytes | None) -> Image.Image | None:
        """A picture that was sent, in the size of the model's own.

        Args:
            source: Path or bytes of its file; never an address, since it would be fetched.

        Raises:
            ValueError: it is none, it is broken, it has too many pixels.
        """
        if source is None:
            return None
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        return self.fitted(self.images.fetch_images(data))

    def fitted(self, image: Image.Image) -> Image.Image:
        """A picture as the model sees it: of its size, grey where it knows no colours."""
        pixels = self.images.preprocess(image, return_tensors="pt")
        [fitted] = self.images.postprocess(list(pixels["pixel_values"]))
        return fitted

    def marked_by(self, layers: Sequence[str | bytes], picture: Image.Image) -> np.ndarray | None:
        """What a brush has marked of a picture: (height, width) bool, whole patches; None where nothing is.

        Args:
            layers: Path or bytes of what was painted, over the picture as `on_canvas` shows it.

        Raises:
            ValueError: a layer that is no picture, or not of the size of what was painted on.
        """
        size = on_canvas(picture).size
        painted = np.zeros(size[::-1], dtype=bool)
        for layer in layers:
            image = self.images.fetch_images(layer if isinstance(layer, bytes) else Path(layer).read_bytes())
            if image.size != size:
                raise ValueError(
                    f"Got a mask of {image.width}x{image.height} over a picture of {size[0]}x{size[1]}; need both of "
                    "one size; paint it again."
                )
            try:
                levels = np.asarray(image.convert("RGBA").getchannel("A"))
            except (OSError, SyntaxError) as error:  # how Pillow reports a broken file
                raise ValueError(f"Got a broken mask ({error}); need a picture; paint it again.") from error
            painted |= levels >= 128
        if not painted.any():
            return None
        patches = self.images.patch_mask(painted, self.images.grid_of(picture.height, picture.width))
        side = self.images.patch_size
        return patches.repeat(side, 0).repeat(side, 1)

    def _looks(self, conditions: dict, seed: float | None, options: dict, decided: str = "") -> Iterator[Look]:
        first = _seed(seed)
        check_work(self.pipe, {"generate": options.get("generate") or conditions["canvas"]["type"]} | options)
        looks, calls, shown = self.pipe.stream(**conditions, seed=first, **options), 1, 0.0
        results = next(looks)
        for following in looks:
            if time.monotonic() - shown >= SECONDS_BETWEEN_LOOKS:
                shown = time.monotonic()
                yield Look(results, first, calls, False, decided)
            results, calls = following, calls + 1
        yield Look(results, first, calls, True, decided)

    def _options(self, steps: int | None, guidance: float | None) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if steps is not None:
            options["num_inference_steps"] = _whole("steps", steps, MOST_STEPS)
        if guidance is not None:
            if not isinstance(guidance, int | float) or not 0 <= guidance <= MOST_GUIDANCE:
                raise ValueError(f"Got the guidance {guidance!r}; need a number from 0 to {MOST_GUIDANCE}.")
            options["guidance_scale"] = float(guidance)
        return options


def _not_too_often(looks: Iterator[dict]) -> Iterator[dict]:
    """The looks that come late enough after the one before, and the last."""
    shown, look = 0.0, None
    for look in looks:
        is_due = time.monotonic() - shown >= SECONDS_BETWEEN_LOOKS
        if is_due:
            shown = time.monotonic()
            yield look
    if look is not None and not is_due:
        yield look


def _reply(answer: dict, is_done: bool = True) -> dict:
    return {"role": "assistant", "content": bubble(" ".join(answer["text"]), answer["images"], is_done)}


def _whole(name: str, value: Any, most: int) -> int:
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not is_whole or not 1 <= value <= most:
        raise ValueError(f"Got {value!r} {name}; need a whole number from 1 to {most}.")
    return int(value)


def _seed(value: Any) -> int:
    """A seed as it was given; one at random for None and whatever is below 0."""
    if value is None or (isinstance(value, int | float) and value < 0):
        return int(torch.randint(2**31, ()).item())
    if not isinstance(value, int | float) or not value <= MOST_SEED or value != int(value):
        raise ValueError(f"Got the seed {value!r}; need a whole number, {MOST_SEED} at most, or -1 for any.")
    return int(value)


def read_marks(caption: str) -> tuple[str, list[tuple[int, int | None]]]:
    """A caption without its brackets, and the characters in them: "a [small] three" -> "a small three", [(2, 7)]. What
    [...] at the end stands for has no end: None.

    Args:
        caption: On one line.

    Raises:
        ValueError: nothing is marked, a mark is empty, a bracket stands alone, something follows [...].
    """
    text, end = "", 0
    spans: list[tuple[int, int | None]] = []
    for mark in MARK.finditer(caption):
        text += caption[end : mark.start()]
        end = mark.end()
        if mark[1] in REST and not caption[end:].strip():
            text = text.rstrip()
            spans.append((len(text), None))
        elif not mark[1].strip() or mark[1] in REST:
            raise ValueError(
                f"Got the mark {mark[0]}; need words in it, to be replaced by as many tokens, or [...] at the end, "
                "for all that follows."
            )
        else:
            spans.append((len(text), len(text) + len(mark[1])))
            text += mark[1]
    text += caption[end:] if not spans or spans[-1][1] is not None else ""
    if not spans or "[" in text or "]" in text:
        raise ValueError(
            f"Got {caption!r} without a marked part, or with a bracket alone; need [brackets] around what is to be "
            "written anew, as in 'a [small] three'."
        )
    return text, spans


def look_as_html(look: Look) -> str:
    """The samples of a look side by side."""
    cards = []
    for number, one in enumerate(look.results):
        images, note = one["images"] or [None], f"seed {look.seed + number}"
        cards += [Card(image, " ".join(one["text"]), note) for image in images]
    return cards_as_html(cards, look.is_done)
