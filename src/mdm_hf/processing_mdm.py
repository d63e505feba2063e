"""Conversations to token rows with pixels and masks, and generated rows back to text and pictures.

- Every input goes one way: parts -> chat template -> token ids -> placeholders expanded, canvases filled.
- The parts of a last assistant message are targets, known in training; otherwise `generate` says what to make.
- Control tokens come from the template alone: text that spells one is refused.

A row:  <|class|> { role { <|image_start|> patches <|image_end|> | <|text_start|> tokens <|text_end|> } }
with <|time_image|> or <|time_text|> before the first target segment of each modality.
"""

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .token_rows import CONTROL_TOKENS, expand_placeholders, pad_rows, target_texts


MODALITIES = ("image", "text")
ROLES = ("system", "user", "assistant")
MEDIA_KEYS = ("image", "url", "path", "base64")
NO_CLASS = -1

CHAT_TEMPLATE = """\
{#- Segments of a conversation, images as one placeholder each. The parts of a last assistant message are targets;
    otherwise `generate`, a list of "image" and "text", names what to make. A turn without parts is left out. -#}
{%- set made = namespace(image=false, text=false) -%}
{{- '<|class|>' -}}
{%- for message in messages -%}
    {%- if message.content is string -%}
        {%- set parts = [{'type': 'text', 'text': message.content}] -%}
    {%- else -%}
        {%- set parts = message.content | selectattr('type', 'in', ['image', 'text']) | list -%}
    {%- endif -%}
    {%- set is_target = loop.last and message.role == 'assistant' -%}
    {%- if parts -%}{{- '<|' ~ message.role ~ '|>' -}}{%- endif -%}
    {%- for part in parts -%}
        {%- if part.type == 'image' -%}
            {%- if is_target and not made.image -%}{{- '<|time_image|>' -}}{%- set made.image = true -%}{%- endif -%}
            {{- '<|image_start|><|image|><|image_end|>' -}}
        {%- else -%}
            {%- if is_target and not made.text -%}{{- '<|time_text|>' -}}{%- set made.text = true -%}{%- endif -%}
            {{- '<|text_start|>' ~ part.text ~ '<|text_end|>' -}}
        {%- endif -%}
    {%- endfor -%}
{%- endfor -%}
{%- if generate -%}
    {{- '<|assistant|>' -}}
    {%- if 'image' in generate -%}{{- '<|time_image|><|image_start|><|image_target|><|image_end|>' -}}{%- endif -%}
    {%- if 'text' in generate -%}{{- '<|time_text|><|text_start|><|text_target|><|text_end|>' -}}{%- endif -%}
{%- endif -%}
"""


@dataclass
class _Prompt:
    """A checked conversation: what the template sees, and what it does not need to see."""

    messages: list[dict] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    latents: list[Any] = field(default_factory=list)  # of images that a pixel autoencoder has seen before
    class_id: int = NO_CLASS
    has_targets: bool = False


class MDMProcessor(ProcessorMixin):
    """Image processor, tokenizer and chat template of MDM in one.

    Args:
        image_processor: [`MDMImageProcessorPil`].
        tokenizer: A fast tokenizer with the control tokens of `conversion/build_tokenizer.py`.
        chat_template: Jinja source; the standard layout if None.
        image_size: (height, width) in pixels of images to generate; the image processor's `size` if None.
        max_new_tokens: Length in tokens of the canvas of every text to generate.
        num_classes: Number of data categories, to check class ids against; unchecked if None.

    Example:

    ```python
    inputs = processor(text="a handwritten three", generate="image")
    [result] = processor.post_process_multimodal_output(model.generate(**inputs))
    result["images"][0].save("three.png")
    ```
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        image_size: Sequence[int] | None = None,
        max_new_tokens: int = 128,
        num_classes: int | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        missing = [name for name in CONTROL_TOKENS if getattr(tokenizer, name, None) is None]
        if missing:
            raise ValueError(
                f"Got a tokenizer without {', '.join(missing)}; need one with MDM's control tokens; build it with "
                "conversion/build_tokenizer.py."
            )
        self.max_new_tokens = _positive("max_new_tokens", max_new_tokens)
        self.num_classes = num_classes
        self.image_size = None if image_size is None else list(image_size)
        self._grid(self.image_size)
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.image_token_id
        # Looked up once: an attribute of the tokenizer costs as much as the rest of the work on a token.
        self._ids = {name: tokenizer.convert_tokens_to_ids(getattr(tokenizer, name)) for name in CONTROL_TOKENS}
        self._special_text = re.compile("|".join(re.escape(token) for token in tokenizer.all_special_tokens))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except ValueError as error:  # names neither the repository nor the file
            raise ValueError(
                f"Got {pretrained_model_name_or_path} with a processor that cannot be made ({error}); need "
                "processor_config.json, tokenizer_config.json and tokenizer.json, whole; push or download them again, "
                "with force_download=True if the cache holds a broken one."
            ) from error

    @property
    def patch_size(self) -> int:
        return self.image_processor.patch_size

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "target_mask", "class_ids", *self.image_processor.model_input_names]

    def __call__(
        self,
        text: str | list[str | None] | None = None,
        images: Any = None,
        class_ids: int | list[int | None] | None = None,
        generate: str | Sequence[str] = MODALITIES,
        image_size: Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        return_tensors: str | None = "pt",
        videos: None = None,
        audio: None = None,
        padding: bool = True,
    ) -> BatchFeature:
        """Conditions -> inputs of the model, with `target_mask` = 1 on what it is to generate.

        Args:
            text, images, class_ids: Conditions; each one value, or a list (a batch; lists of one length, None where
                a prompt has no such condition). All absent: one unconditional prompt. `<|image|>` in a text says
                where its image stands, which is before the text otherwise.
            generate: "image", "text", or both.
            image_size: (height, width) in pixels of the images to generate.
            max_new_tokens: Length in tokens of the text canvas.
            return_tensors: "pt", "np", or None for arrays.
            videos, audio: Not supported.
            padding: Rows are always padded to the longest.

        Returns:
            BatchFeature with input_ids, attention_mask, target_mask (b, l), class_ids (b,), and with images
            image_grid_hw (m, 2), with known images pixel_values or image_latents (n, c, h, w).

        Raises:
            ValueError: conditions that do not fit together, with what was got, what is needed, what to do.
        """
        if videos is not None or audio is not None:
            raise ValueError("Got videos or audio; need text, images or class_ids; MDM knows no other modality.")
        columns = _columns(text=text, images=images, class_ids=class_ids)
        conversations = [self._as_messages(*row) for row in zip(*columns, strict=True)]
        prompts = [self._read(messages) for messages in conversations]
        return self._encode(prompts, as_modalities(generate), image_size, max_new_tokens, return_tensors)

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        generate: str | Sequence[str] | None = None,
        tokenize: bool = True,
        return_dict: bool = True,
        image_size: Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        return_tensors: str | None = "pt",
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        processor_kwargs: dict | None = None,
        padding: bool = True,
        **template_kwargs: Any,
    ):
        """Conversations -> inputs of the model; the same for training and for generation.

        Args:
            conversation: Messages {"role": "system" | "user" | "assistant", "content": str or parts}, or a list of
                such lists. Parts: {"type": "text", "text": str}, {"type": "image", "image": PIL image, array, path
                or URL}, {"type": "image", "latents": (c, h, w)} as a LatentCache has them, {"type": "class", "class":
                int}. If the last message is the assistant's, its parts are the targets and the output has `labels`:
                token ids at target text, -100 elsewhere.
            chat_template: Jinja source instead of the processor's own.
            generate: "image", "text" or both, where the last message is not the assistant's; ("text",) if None.
            tokenize: False returns the rendered string, or a list of them, with one placeholder an image.
            return_dict: False returns `input_ids` alone.
            image_size, max_new_tokens, return_tensors: As when the processor is called; a target text fills
                its canvas of `max_new_tokens` with </s>.
            add_generation_prompt: Has no effect: `generate` says what to make.
            continue_final_message: Not supported.
            processor_kwargs: `generate`, `image_size`, `max_new_tokens` once more, as transformers' pipelines hand
                them on.
            padding: Rows are always padded to the longest.
            template_kwargs: Variables for the template; those it does not name are refused.

        Raises:
            ValueError: messages that do not fit together, with what was got, what is needed, what to do.
        """
        options: dict[str, Any] = {"generate": generate, "image_size": image_size, "max_new_tokens": max_new_tokens}
        for name, value in (processor_kwargs or {}).items():
            if name not in options:
                raise ValueError(f"Got processor_kwargs {name!r}; need {', '.join(options)}; leave the others out.")
            options[name] = value if options[name] is None else options[name]
        if continue_final_message:
            raise ValueError(
                "Got continue_final_message=True; a last assistant message holds finished targets; leave it out and "
                "name what to make with `generate`."
            )
        if not conversation:
            raise ValueError("Got no messages; need at least one; call the processor itself for no conditions.")
        messages = conversation.messages if hasattr(conversation, "messages") else conversation
        is_batch = not isinstance(messages[0], dict)
        prompts = [self._read(one) for one in (messages if is_batch else [messages])]
        training = sum(prompt.has_targets for prompt in prompts)
        if training and options["generate"] is not None:
            raise ValueError(
                f"Got generate={options['generate']!r} and a last assistant message, whose parts are the targets; "
                "need one of the two; drop that message to generate, or `generate` to train."
            )
        if 0 < training < len(prompts):
            raise ValueError(
                f"Got a batch of {training} conversations with targets and {len(prompts) - training} without; need "
                "all of one kind; split the batch."
            )
        wanted = ("text",) if options["generate"] is None else options["generate"]
        modalities = () if training else as_modalities(wanted)
        if not tokenize:
            rendered = self._render(prompts, modalities, chat_template, template_kwargs)
            return rendered if is_batch else rendered[0]
        sizes = options["image_size"], options["max_new_tokens"]
        inputs = self._encode(prompts, modalities, *sizes, return_tensors, chat_template, template_kwargs)
        return inputs if return_dict else inputs["input_ids"]

    def _as_messages(self, text: str | None, image: Any, class_id: int | None) -> list[dict]:
        """The conditions of one prompt as a conversation; no condition, no message."""
        images = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
        if text is not None and not isinstance(text, str):
            raise ValueError(f"Got a text of type {type(text).__name__}; need a string, or None for no text.")
        image_parts = [{"type": "image", "image": one} for one in images]
        marks = 0 if text is None else text.count(self.image_token)
        if marks not in (0, len(images)):
            raise ValueError(
                f"Got {marks} {self.image_token} in a text with {len(images)} image(s); need as many of one as of the "
                f"other; give the pixels in `images`, or take {self.image_token} out of the text."
            )
        parts: list[dict] = [] if class_id is None else [{"type": "class", "class": class_id}]
        if marks:
            for piece, image_part in zip(text.split(self.image_token), [*image_parts, None], strict=True):
                parts += [{"type": "text", "text": piece}] if piece.strip() else []
                parts += [] if image_part is None else [image_part]
        else:
            parts += image_parts + ([] if text is None else [{"type": "text", "text": text}])
        return [{"role": "user", "content": parts}] if parts else []

    def _read(self, messages: Any) -> _Prompt:
        """Checks a conversation and takes images and class out of it."""
        messages = messages.messages if hasattr(messages, "messages") else messages
        prompt = _Prompt()
        for message in messages:
            fields = message if isinstance(message, dict) else {}
            role, content = fields.get("role"), fields.get("content")
            if role not in ROLES:
                raise ValueError(
                    f"Got the message {str(message)[:60]}; need a dict with 'content' and a 'role' among "
                    f"{', '.join(ROLES)}."
                )
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            parts = [self._read_part(part, role, prompt) for part in content or []]
            prompt.messages.append({"role": role, "content": [part for part in parts if part is not None]})
        prompt.has_targets = bool(messages) and messages[-1]["role"] == "assistant"
        if prompt.has_targets and not prompt.messages[-1]["content"]:
            raise ValueError(
                "Got a last assistant message without a text or image part, and so no target; need at least one; add "
                "what the model is to learn, or drop the message and name what to make with `generate`."
            )
        return prompt

    def _read_part(self, part: Any, role: str, prompt: _Prompt) -> dict | None:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise ValueError(f"Got a text part with text {text!r}; need a string.")
            if found := self._special_text.search(text):
                remedy = "give the image as a part of its own" if found[0] == self.image_token else "take it out"
                raise ValueError(
                    f"Got the control token {found[0]} in the text {text[:60]!r}; need text without one, since the "
                    f"chat template sets them; {remedy}."
                )
            return {"type": "text", "text": text}
        if kind == "image" and part.get("latents") is not None:
            prompt.latents.append(part["latents"])
            return {"type": "image"}
        if kind == "image":
            key = next((key for key in MEDIA_KEYS if part.get(key) is not None), None)
            if key is None:
                raise ValueError(
                    "Got an image part without pixels; need {'type': 'image', 'image': picture}; to make an image, "
                    "leave the part out and pass generate='image'."
                )
            prompt.images.append(f"data:image/any;base64,{part[key]}" if key == "base64" else part[key])
            return {"type": "image"}
        if kind == "class":
            if role == "assistant":
                raise ValueError("Got a class part in an assistant message; need it in a user message; move it there.")
            if prompt.class_id != NO_CLASS:
                raise ValueError("Got two class parts in a conversation; need at most one; drop the other.")
            prompt.class_id = self._class_id(part.get("class"))
            return None
        raise ValueError(
            f"Got a content part {str(part)[:60]}; need a dict of type 'text', 'image' or 'class'; see "
            "MDMProcessor.apply_chat_template."
        )

    def _class_id(self, value: Any) -> int:
        try:
            class_id = NO_CLASS if isinstance(value, bool) else operator.index(value)
        except TypeError:
            class_id = NO_CLASS
        if class_id < 0 or (self.num_classes is not None and class_id >= self.num_classes):
            upper = "" if self.num_classes is None else f" and at most {self.num_classes - 1}"
            raise ValueError(
                f"Got class {value!r}; need a whole number of at least 0{upper}; leave the class out for none."
            )
        return class_id

    def _render(
        self, prompts: list[_Prompt], generate: Sequence[str], chat_template: str | None, template_kwargs: dict | None
    ) -> list[str]:
        template = chat_template or self.chat_template
        variables = {name: value for name, value in (template_kwargs or {}).items() if value is not None}
        unused = [name for name in variables if name not in template]
        if unused:
            raise ValueError(
                f"Got the argument {unused[0]!r}, which neither the processor nor its chat template knows; check its "
                "spelling, or pass a `chat_template` that uses it."
            )
        rendered, _ = render_jinja_template(
            conversations=[prompt.messages for prompt in prompts],
            chat_template=template,
            generate=list(generate),
            **variables,
        )
        return rendered

    def _encode(
        self,
        prompts: list[_Prompt],
        generate: Sequence[str],
        image_size: Sequence[int] | None,
        max_new_tokens: int | None,
        return_tensors: str | None,
        chat_template: str | None = None,
        template_kwargs: dict | None = None,
    ) -> BatchFeature:
        canvas = self.max_new_tokens if max_new_tokens is None else _positive("max_new_tokens", max_new_tokens)
        target_grid = self._grid(image_size)
        rendered = self._render(prompts, generate, chat_template, template_kwargs)
        # `expand_placeholders` refuses what is too long; the tokenizer's own warning would only foretell it.
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        token_ids = self.tokenizer(rendered, **options)["input_ids"]

        known = self._known_images(prompts)
        known_grids = iter(np.asarray(known.pop("image_grid_hw", [])).tolist())
        limits = canvas, self.tokenizer.model_max_length
        rows = []
        for prompt, ids in zip(prompts, token_ids, strict=True):
            given = len(prompt.images) + len(prompt.latents)
            if ids.count(self.image_token_id) != given:
                raise ValueError(
                    f"Got {ids.count(self.image_token_id)} {self.image_token} for {given} image(s); need "
                    "one each; mend the chat template so that it renders every image part."
                )
            rows.append(expand_placeholders(ids, self._ids, known_grids, target_grid, *limits, self.tokenizer.decode))

        data = pad_rows(rows, self._ids["pad_token"])
        data["class_ids"] = np.array([prompt.class_id for prompt in prompts], dtype=np.int64)
        if generate:
            del data["labels"]
        return BatchFeature(data | known, tensor_type=return_tensors)

    def _known_images(self, prompts: list[_Prompt]) -> dict[str, Any]:
        """`pixel_values` or `image_latents` with `image_grid_hw`; nothing where there is no image."""
        pictures = [image for prompt in prompts for image in prompt.images]
        latents = [image for prompt in prompts for image in prompt.latents]
        if pictures and latents:
            raise ValueError(
                f"Got {len(pictures)} image(s) as pictures and {len(latents)} as latents in one batch; need all of "
                "one kind; split the batch, or encode the pictures too."
            )
        if latents:
            return self.image_processor.pad_latents(latents)
        return dict(self.image_processor(pictures)) if pictures else {}

    def _grid(self, image_size: Sequence[int] | None) -> list[int]:
        """[rows, columns] in patches of an image to generate."""
        image_size = self.image_size if image_size is None else image_size
        if image_size is None:
            image_size = (self.image_processor.size.height, self.image_processor.size.width)
        try:
            height, width = (operator.index(side) for side in image_size)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Got image_size {image_size}; need (height, width), whole numbers of pixels.") from error
        return list(self.image_processor.grid_of(height, width))

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The placeholder of image `image_idx`, once per patch."""
        return self.image_token * int(np.prod(image_inputs["image_grid_hw"][image_idx].tolist()))

    def post_process_multimodal_output(
        self,
        outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = "both",
        **decode_kwargs: Any,
    ) -> list:
        """What the model generated, as text and PIL images.

        Args:
            outputs: What `generate` returned, or its `sequences` alone.
            skip_special_tokens: Leave control tokens out of the text.
            generation_mode: "both"; or "image" for pictures alone, "text" for texts alone (so does None, as
                transformers' pipelines have it): a list with the first of each row.
            decode_kwargs: Options of the tokenizer's `decode`.

        Returns:
            For each row {"text": [str, ...], "images": [PIL.Image, ...]}, its generated segments in order, or what
            `generation_mode` names.
        """
        if generation_mode not in ("both", None, *MODALITIES):
            raise ValueError(f"Got generation_mode {generation_mode!r}; need 'image', 'text' or 'both'.")
        sequences = outputs if isinstance(outputs, torch.Tensor | np.ndarray) else outputs.sequences
        rows = [sequences.tolist()] if sequences.ndim == 1 else sequences.tolist()
        images = getattr(outputs, "images", None) or [[]] * len(rows)
        results = []
        for ids, tensors in zip(rows, images, strict=True):
            texts = [
                self.tokenizer.decode(text, skip_special_tokens=skip_special_tokens, **decode_kwargs)
                for text in target_texts(ids, self._ids)
            ]
            results.append({"text": texts, "images": self.image_processor.postprocess(tensors)})
        if generation_mode == "both":
            return results
        if generation_mode == "image":
            return [next(iter(result["images"]), None) for result in results]
        return [next(iter(result["text"]), "") for result in results]

    def post_process_image_text_to_text(self, generated_outputs: Any, **decode_kwargs: Any) -> list[str]:
        """The text alone, as transformers' pipeline "image-text-to-text" asks for it."""
        return self.post_process_multimodal_output(generated_outputs, generation_mode="text", **decode_kwargs)


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Got {name} {value!r}; need a whole number of at least 1.")
    return value


def as_modalities(generate: str | Iterable[str]) -> tuple[str, ...]:
    """`generate` as a tuple; the template orders it."""
    asked = (generate,) if isinstance(generate, str) or not isinstance(generate, Iterable) else tuple(generate)
    unknown = [one for one in asked if one not in MODALITIES]
    if unknown or not asked:
        got = repr(unknown[0]) if unknown else "nothing"
        raise ValueError(f"Got generate with {got}; need 'image', 'text' or both; name what to make.")
    return asked


def _columns(**conditions: Any) -> list[list]:
    """Each condition as a list of one length; what is not a list stands for every prompt."""
    columns: dict[str, list | None] = {}
    for name, value in conditions.items():
        is_stack = isinstance(value, np.ndarray | torch.Tensor) and value.ndim == (4 if name == "images" else 1)
        columns[name] = list(value) if is_stack or isinstance(value, list | tuple) else None
    lengths = {name: len(column) for name, column in columns.items() if column is not None}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(
            f"Got lists of different lengths or empty ones, {lengths}; a batch needs lists of one length; put None "
            "where a prompt has no such condition."
        )
    count = next(iter(lengths.values()), 1)
    return [[conditions[name]] * count if column is None else column for name, column in columns.items()]
