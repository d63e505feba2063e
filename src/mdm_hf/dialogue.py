"""A conversation with a pipeline, remembered as a state of fixed size; and texts of any length, block by block."""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch

from .conversation_state import MDMConversationState
from .conversations import AUTO, MODALITIES
from .input_checks import check_state
from .prompts import check_sizes, first_seed, whole_number
from .watching import watched


OF_PIPELINE = ("canvas", "class_ids", "num_return_sequences", "batch_size")  # of a call of the pipeline, not of a turn


class MDMDialogue:
    """Turns of images and text. Each is read once; what is kept of them does not grow.

    Example:

    ```python
    chat = pipe.chat()
    chat(text="a handwritten three", generate="image")["images"][0].save("three.png")
    chat(text="which digit is this?", generate="text")["text"]
    chat.save("chat.safetensors")
    ```

    Args:
        pipe: The pipeline.
        state: What was read before.
    """

    def __init__(self, pipe, state: MDMConversationState | None = None):
        if state is not None:
            check_state(pipe.model, state, 1)
        self.pipe, self.state = pipe, state

    @classmethod
    def load(cls, pipe, path: str | os.PathLike) -> "MDMDialogue":
        """The dialogue that `save` wrote. Raises ValueError for a file of another kind or of another model."""
        return cls(pipe, MDMConversationState.load(path, pipe.model.device))

    def save(self, path: str | os.PathLike) -> None:
        """Writes what is remembered into a safetensors file.

        Raises:
            ValueError: nothing was said yet, or a file that cannot be written.
        """
        if self.state is None:
            raise ValueError("Got a dialogue without a turn; need at least one to save; say something first.")
        self.state.save(path)

    def __call__(
        self,
        text: str | None = None,
        images: Any = None,
        messages: list[dict] | None = None,
        *,
        generate: str | Sequence[str] | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> dict:
        """One turn: what the user says, and the answer to it.

        Args:
            text, images: What the user says; nothing, for the assistant to go on.
            messages: Instead of the two: messages to be read before the answer, the system's for instance.
            generate: "text", "image" or both; "auto" for what the turn calls for, which a modality gate decides; the
                pipeline's own, if it was made with one, or "text" if None.
            seed, options: As in a call of the pipeline.

        Returns:
            {"text": [str, ...], "images": [PIL.Image, ...]}

        Raises:
            ValueError: as a call of the pipeline.
        """
        said = self._said(text, images, messages)
        answer = self.answer(said, generate, seed, **options)
        self._remember(said, answer)
        return answer

    def stream(
        self,
        text: str | None = None,
        images: Any = None,
        messages: list[dict] | None = None,
        *,
        generate: str | Sequence[str] | None = None,
        seed: int | None = None,
        callback_on_step_end: Callable | None = None,
        **options: Any,
    ) -> Iterator[dict]:
        """Watches an answer form: the same turn, with a look at the answer after every network call.

        The turn is remembered when the last look, the answer itself, was taken and another is asked for, as a loop
        does; of a turn that is left before, nothing is.

        Args:
            text, images, messages, generate, seed, options: As in a call.
            callback_on_step_end: As in a call; it runs before the look is taken, in the thread of the network.

        Yields:
            {"text": [str, ...], "images": [PIL.Image, ...]}, as it would be if the network were right; at last the
            answer.

        Raises:
            ValueError: as a call.
        """
        said = self._said(text, images, messages)
        draw = self._drawer(said, generate, seed, **options)
        shown = self.pipe.postprocess
        looks = watched(lambda look: shown(draw(look)), shown, callback_on_step_end)

        def taken() -> Iterator[dict]:
            answer: dict = {}
            for [answer] in looks:
                yield answer
            self._remember(said, answer)

        return taken()

    def write(
        self,
        text: str | None = None,
        images: Any = None,
        *,
        max_new_tokens: int = 1024,
        min_new_tokens: int = 0,
        block_size: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        streamer: Any = None,
        seed: int | None = None,
        callback_on_step_end: Callable | None = None,
        **options: Any,
    ) -> str:
        """An answer of any length, block by block: each block is read when it is written, and no memory grows.

        It ends where the model ends it, after a stop string, or with `max_new_tokens`.

        Args:
            text, images: What the user says; nothing, for the assistant to go on.
            max_new_tokens: Most tokens of the answer.
            min_new_tokens: Fewest; only a stop string can end it before.
            block_size: Most tokens of a block; the processor's `max_new_tokens` if None.
            stop_strings: The answer ends after the first of them.
            streamer: One of transformers' streamers. As `generate` of other models does, its `put` first gets the
                tokens of what the user says (1, l), which `skip_prompt=True` leaves out, then those of each block
                (n,); at last `end` is called.
            seed, callback_on_step_end, options: As in a call of the pipeline; block n is drawn with seed + n.

        Raises:
            ValueError: as a call of the pipeline. Nothing of the turn is remembered then.
        """
        processor, before = self.pipe.processor, self.state
        if foreign := [name for name in ("generate", "messages", "image_size") if name in options]:
            raise ValueError(
                f"Got {', '.join(foreign)} for a text of any length; need none of them, as it makes text of a text "
                "and images; leave it out, and let `read` remember other messages before."
            )
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise ValueError(
                f"`streamer` is of type {type(streamer).__name__}; it must have `put` and `end`, as transformers' "
                "TextStreamer; pass TextStreamer(pipe.processor.tokenizer, skip_prompt=True)."
            )
        size = processor.max_new_tokens if block_size is None else whole_number("block_size", block_size)
        left = whole_number("max_new_tokens", max_new_tokens)
        if min(size, left) > (most := processor.longest_text):
            raise ValueError(
                f"`block_size` is {size}; it must be at most the tokenizer's model_max_length = {most}, as blocks are "
                "remembered; lower it."
            )
        due = whole_number("min_new_tokens", min_new_tokens, least=0)
        if due > left:
            raise ValueError(f"`min_new_tokens` is {due}; it must be at most max_new_tokens = {left}; lower it.")
        stops, first = _as_stops(stop_strings), first_seed(seed)
        said, written = self._said(text, images), ""
        try:
            for number in count():
                canvas = min(size, left)
                sizes = {"max_new_tokens": canvas, "min_new_tokens": due}
                out = self._drawer(said, "text", first + number, **sizes, **options)(callback_on_step_end)
                if streamer is not None and number == 0:
                    streamer.put(out.sequences[:, : out.sequences.shape[1] - canvas - 1].cpu())
                [block] = self.pipe.postprocess(out)[0]["text"]
                whole = f"{written} {block}".strip()
                ends = [
                    at + len(stop) for stop in stops if (at := whole.find(stop, max(0, len(written) - len(stop)))) >= 0
                ]
                if ends:
                    whole = whole[: min(ends)]
                    block = whole[len(written) :].strip()
                ids = processor.tokenizer(block, add_special_tokens=False)["input_ids"]
                due = max(0, due - len(ids))
                is_over = bool(ends) or (due == 0 and not processor.continues(out.sequences[0]))
                if streamer is not None and ids:
                    streamer.put(torch.tensor(ids))
                answer = [{"role": "assistant", "content": [{"type": "text", "text": block}]}] if block else []
                if said or answer:
                    self.read([*said, *answer])
                said, written, left = [], whole, left - max(1, len(ids))
                if is_over or left <= 0:
                    break
        except BaseException:
            self.state = before
            raise
        if streamer is not None:
            streamer.end()
        return written

    def read(self, messages: list[dict], **image_options: Any) -> None:
        """Remembers messages as they are, without an answer to them.

        Args:
            messages: As in [`MDMProcessor.apply_chat_template`].
            image_options: Of the image processor: with `do_resize=False` pictures keep their sizes.

        Raises:
            ValueError: messages that do not fit together, or without any part.
        """
        model, processor = self.pipe.model, self.pipe.processor
        said = self._said(messages=messages)
        inputs = processor.as_history(said, is_continued=self.state is not None, **image_options).to(model.device)
        self.state = model.read_conversation(**inputs, state=self.state)

    def answer(
        self,
        messages: list[dict],
        generate: str | Sequence[str] | None = None,
        seed: int | None = None,
        callback_on_step_end: Callable | None = None,
        **options: Any,
    ) -> dict:
        """The answer to messages, of which nothing is remembered."""
        draw = self._drawer(self._said(messages=messages), generate, seed, **options)
        return self.pipe.postprocess(draw(callback_on_step_end))[0]

    def _said(self, text: str | None = None, images: Any = None, messages: Any = None) -> list[dict]:
        """What the user says in a turn, as messages."""
        if messages is None:
            return self.pipe.processor.as_messages(text, images)
        if text is not None or images is not None:
            raise ValueError(
                "Got `messages` together with `text` or `images`; need one of the two; put the text and the images "
                "into the messages as content parts."
            )
        if not isinstance(messages, list | tuple):
            raise ValueError(
                f"Got messages of type {type(messages).__name__}; need a list of messages, dicts with 'role' and "
                "'content'; put a single one into a list."
            )
        return list(messages)

    def _remember(self, said: list[dict], answer: dict) -> None:
        """Reads a turn that is over, the pictures of its answer at the size that they were drawn in."""
        before = self.state
        try:
            if any(message.get("content") for message in said):
                self.read(said)
            self.read([_as_message(answer)], do_resize=False)
        except BaseException:
            self.state = before
            raise

    def _drawer(
        self, messages: list[dict], generate: str | Sequence[str] | None, seed: int | None, **options: Any
    ) -> Callable[..., Any]:
        """A function of `callback_on_step_end` that draws the answer to messages, once all of them are checked."""
        pipe, is_continued = self.pipe, self.state is not None
        is_silent = all(isinstance(message, dict) and not message.get("content") for message in messages)
        if is_silent and not is_continued:
            raise ValueError(
                "Got a first turn in which nothing is said; need a text, images or messages; say something."
            )
        if foreign := [name for name in OF_PIPELINE if name in options]:
            raise ValueError(
                f"Got {', '.join(foreign)} in a turn of a conversation; need one answer to what is said; call the "
                "pipeline itself, with the conversation as `messages`, or say a class as a part of a first message."
            )
        if generate is None:
            generate = pipe.default_modalities or "text"
        for_processor, for_generate = pipe._stages({"generate": generate} | options)
        if for_processor["generate"] != AUTO:
            check_sizes(for_processor["generate"], options)
        else:
            asked = pipe.processor.apply_chat_template(messages, generate=MODALITIES, is_continued=is_continued)
            [decided] = pipe.model.predict_modalities(**asked.to(pipe.model.device), state=self.state)
            for_processor["generate"] = decided
        given, most = for_processor.get("max_new_tokens"), pipe.processor.longest_text
        canvas = pipe.processor.max_new_tokens if given is None else whole_number("max_new_tokens", given)
        if "text" in for_processor["generate"] and canvas > most:
            raise ValueError(
                f"Got max_new_tokens={canvas} for an answer that is to be remembered; need at most the tokenizer's "
                f"model_max_length = {most}; lower it, or let `write` make the text in blocks."
            )
        inputs = pipe.processor.apply_chat_template(messages, is_continued=is_continued, **for_processor)
        how = {"generator": torch.Generator().manual_seed(first_seed(seed)), "state": self.state} | for_generate
        inputs = inputs.to(pipe.model.device)
        return lambda look=None: pipe.model.generate(
            **inputs, **how, progress_bar=pipe.progress_bar, callback_on_step_end=look
        )


def _as_message(answer: dict) -> dict:
    """An answer as the assistant's message."""
    parts = [{"type": "image", "image": image} for image in answer["images"]]
    return {"role": "assistant", "content": parts + [{"type": "text", "text": one} for one in answer["text"]]}


def _as_stops(stop_strings: str | Sequence[str] | None) -> list[str]:
    stops = [stop_strings] if isinstance(stop_strings, str) else stop_strings or []
    if not isinstance(stops, list | tuple) or not all(isinstance(one, str) and one for one in stops):
        raise ValueError(
            f"`stop_strings` is {stop_strings!r:.60}; it must be a string or a list of them, none of them empty, or "
            "None."
        )
    return [*stops]
