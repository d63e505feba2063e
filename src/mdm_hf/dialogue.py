"""A conversation with a pipeline, remembered as a state of fixed size; and texts of any length, block by block."""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch

from .conversation_state import MDMConversationState
from .conversations import AUTO, MODALITIES, as_modalities
from .prompts import whole_number


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
            state.check(pipe.model.config, 1)
        self.pipe, self.state = pipe, state

    @classmethod
    def load(cls, pipe, path: str | os.PathLike) -> "MDMDialogue":
        """The dialogue that `save` wrote. Raises ValueError for a file of another kind or of another model."""
        return cls(pipe, MDMConversationState.load(path, pipe.model.device))

    def save(self, path: str | os.PathLike) -> None:
        """Writes what is remembered into a safetensors file.

        Raises:
            ValueError: nothing was said yet.
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
        generate: str | Sequence[str] = "text",
        seed: int | None = None,
        **options: Any,
    ) -> dict:
        """One turn: what the user says, and the answer to it.

        Args:
            text, images: What the user says; nothing, for the assistant to go on.
            messages: Instead of the two: messages to be read before the answer, the system's for instance.
            generate: "text", "image" or both; "auto" for what the turn calls for, which a modality gate decides.
            seed, options: As in a call of the pipeline.

        Returns:
            {"text": [str, ...], "images": [PIL.Image, ...]}

        Raises:
            ValueError: as a call of the pipeline.
        """
        said = self.pipe.processor.as_messages(text, images) if messages is None else list(messages)
        answer = self.answer(said, generate, seed, **options)
        self.read([*said, _as_message(answer)])
        return answer

    def stream(
        self,
        text: str | None = None,
        images: Any = None,
        messages: list[dict] | None = None,
        *,
        generate: str | Sequence[str] = "text",
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
        said = self.pipe.processor.as_messages(text, images) if messages is None else list(messages)
        looks = self.pipe.watched(
            lambda look: self.pipe.postprocess(
                self._generate(said, generate, seed, **options, callback_on_step_end=look)
            ),
            callback_on_step_end,
        )
        answer: dict = {}
        for [answer] in looks:
            yield answer
        self.read([*said, _as_message(answer)])

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
            streamer: One of transformers' streamers: its `put` gets the tokens of each block, then `end` is called.
            seed, options: As in a call of the pipeline; block n is drawn with seed + n.

        Raises:
            ValueError: as a call of the pipeline.
        """
        processor = self.pipe.processor
        size = processor.max_new_tokens if block_size is None else whole_number("block_size", block_size)
        left = whole_number("max_new_tokens", max_new_tokens)
        due = whole_number("min_new_tokens", min_new_tokens, least=0)
        stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
        first = int(torch.randint(2**31, ()).item()) if seed is None else seed
        said, written = processor.as_messages(text, images), ""
        for number in count():
            canvas = min(size, left)
            out = self._generate(said, "text", first + number, max_new_tokens=canvas, min_new_tokens=due, **options)
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
        if streamer is not None:
            streamer.end()
        return written

    def read(self, messages: list[dict]) -> None:
        """Remembers messages as they are, without an answer to them."""
        model, processor = self.pipe.model, self.pipe.processor
        inputs = processor.as_history(messages, is_continued=self.state is not None).to(model.device)
        self.state = model.read_conversation(**inputs, state=self.state)

    def answer(self, messages: list[dict], generate: str | Sequence[str], seed: int | None = None, **options) -> dict:
        """The answer to messages, of which nothing is remembered."""
        return self.pipe.postprocess(self._generate(messages, generate, seed, **options))[0]

    def _generate(
        self, messages: list[dict], generate, seed: int | None, callback_on_step_end: Callable | None = None, **options
    ):
        pipe, is_continued = self.pipe, self.state is not None
        if generate == AUTO:
            asked = pipe.processor.apply_chat_template(messages, generate=MODALITIES, is_continued=is_continued)
            [generate] = pipe.model.predict_modalities(**asked.to(pipe.model.device), state=self.state)
        for_processor, for_generate = pipe._stages({"generate": as_modalities(generate)} | options)
        inputs = pipe.processor.apply_chat_template(messages, is_continued=is_continued, **for_processor)
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        return pipe.model.generate(
            **inputs.to(pipe.model.device),
            generator=generator,
            state=self.state,
            progress_bar=pipe.progress_bar,
            callback_on_step_end=callback_on_step_end,
            **for_generate,
        )


def _as_message(answer: dict) -> dict:
    """An answer as the assistant's message."""
    parts = [{"type": "image", "image": image} for image in answer["images"]]
    return {"role": "assistant", "content": parts + [{"type": "text", "text": one} for one in answer["text"]]}
