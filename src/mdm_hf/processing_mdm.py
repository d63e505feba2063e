"""Conversations to token rows with pixels and masks, and generated rows back to text and pictures.

- Every input goes one way: parts -> chat template -> token ids -> placeholders expanded, canvases filled.
- The parts of a last assistant message are targets, known in training; otherwise `generate` says what to make. A mask
  says what of a part is to be made: in training what is learnt, in generation what is filled in.
- Control tokens come from the template alone: text that spells one is refused.

A row:  <|class|> { role { <|image_start|> patches <|image_end|> | <|text_start|> tokens <|text_end|> } }
with <|time_image|> or <|time_text|> before the first target segment of each modality.
"""

import operator
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin, Unpack
from transformers.utils.chat_template_utils import _get_template_variables, render_jinja_template

from .conversations import MODALITIES, NO_CLASS, ConversationReader, Prompt, as_columns, as_modalities
from .known_images import read_images
from .processing_options import IMAGE_OPTIONS, MDMProcessorKwargs, options_of, positive
from .prompts import messages_of
from .token_rows import CONTROL_TOKENS, continues, expand_placeholders, pad_rows, target_texts


CHAT_TEMPLATE = """\
{#- Segments of a conversation, images as one placeholder each. The parts of a last assistant message are targets;
    otherwise `generate`, a list of "image" and "text", names what to make. A turn without parts is left out. What goes
    on from a state, `is_continued`, has no class token. -#}
{%- set made = namespace(image=false, text=false) -%}
{%- if not is_continued -%}{{- '<|class|>' -}}{%- endif -%}
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
            {{- '<|image_start|>' ~ ('<|image_target|>' if part.is_unknown else '<|image|>') ~ '<|image_end|>' -}}
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


# Arguments of `from_pretrained` that change what the files say; the others say where they are, or who trusts them.
CHANGES = ("image_size", "max_new_tokens", "num_classes", "chat_template", *IMAGE_OPTIONS)


class MDMProcessor(ProcessorMixin):
    """Image processor, tokenizer and chat template of MDM in one.

    Args:
        image_processor: [`MDMImageProcessorPil`].
        tokenizer: A fast tokenizer with the control tokens of `mdm_hf.training.tokenizer.build_tokenizer`.
        chat_template: Jinja source; the standard layout if None.
        image_size: (height, width) in pixels of images to generate; the image processor's `size` if None.
        max_new_tokens: Length in tokens of the canvas of every text to generate.
        num_classes: Number of data categories, to check class ids against; unchecked if None.

    Examples:
        >>> processor = MDMProcessor.from_pretrained("model_cards/mdm-digits")
        >>> inputs = processor(text="a handwritten three", generate="image")  # for `model.generate(**inputs)`
        >>> inputs["target_mask"].sum().item()  # the patches of a picture, 2x2 pixels each
        16
    """

    valid_processor_kwargs = MDMProcessorKwargs

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
                "mdm_hf.training.tokenizer.build_tokenizer."
            )
        self.max_new_tokens = positive("max_new_tokens", max_new_tokens)
        self.num_classes = num_classes
        self.image_size = None if image_size is None else list(image_size)
        self._grid(self.image_size)
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.image_token_id
        self.mask_token = tokenizer.text_target_token
        # Looked up once: an attribute of the tokenizer costs as much as the rest of the work on a token.
        self._ids = {name: tokenizer.convert_tokens_to_ids(getattr(tokenizer, name)) for name in CONTROL_TOKENS}
        self._special_text = re.compile("|".join(re.escape(token) for token in tokenizer.all_special_tokens))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        try:
            processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        # Of files that are no mappings, or lack a key, transformers raises whatever comes first; none names the file.
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            unchanged = {name: value for name, value in kwargs.items() if name not in CHANGES}
            if unchanged != kwargs:
                cls.from_pretrained(pretrained_model_name_or_path, *args, **unchanged)
                raise  # the files alone are good: what was given beside them is not
            raise ValueError(
                f"Got {pretrained_model_name_or_path} with a processor that cannot be made ({error}); need "
                "processor_config.json, tokenizer_config.json and tokenizer.json, whole; push or download them again, "
                "with force_download=True if the cache holds a broken one."
            ) from error
        given = processor.chat_template
        if given is CHAT_TEMPLATE:  # the very object: no file had one
            raise ValueError(
                f"Got {pretrained_model_name_or_path} without chat_template.jinja; need the layout that its model was "
                "trained with; push or download it again, or write one with MDMProcessor(...).save_pretrained."
            )
        for template in given.values() if isinstance(given, dict) else [given]:
            try:
                _get_template_variables(template)
            except Exception as error:  # jinja's own, which is no dependency of ours
                raise ValueError(
                    f"Got {pretrained_model_name_or_path} with a chat_template.jinja that cannot be read ({error}); "
                    "need it whole; push or download it again, with force_download=True if the cache holds a broken "
                    "one."
                ) from error
        return processor

    @property
    def patch_size(self) -> int:
        """That of the image processor."""
        return self.image_processor.patch_size

    @property
    def longest_text(self) -> int:
        """Most tokens of a text that is not a target."""
        return self.tokenizer.model_max_length

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "target_mask", "class_ids", *self.image_processor.model_input_names]

    def __call__(
        self,
        text: str | list[str | None] | None = None,
        images: Any = None,
        class_ids: int | list[int | None] | None = None,
        generate: str | Sequence[str] | None = None,
        image_size: Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        **kwargs: Unpack[MDMProcessorKwargs],
    ) -> BatchFeature:
        """Conditions -> inputs of the model, with `target_mask` = 1 on what it is to generate.

        Args:
            text, images, class_ids: Conditions; each one value, or a list (a batch; lists of one length, None where
                a prompt has no such condition). All absent: one unconditional prompt. `<|image|>` in a text says
                where its image stands, which is before the text otherwise.
            generate: "image", "text", or both, which is the default.
            image_size: (height, width) in pixels of the images to generate.
            max_new_tokens: Length in tokens of the text canvas.
            kwargs: By their names, or in the groups `text_kwargs`, `images_kwargs`, `common_kwargs`:
                return_tensors: "pt", which is the default, "np", or None for arrays.
                padding: True or "longest", to the longest row, which is the default; "max_length".
                max_length: Rows that are longer are refused; with padding="max_length" all are as long.
                do_resize, size, resample, do_rescale, rescale_factor, do_normalize, image_mean, image_std, max_pixels,
                    aspect_ratio_buckets: Of the known images, as in [`MDMImageProcessorPil`].

        Returns:
            BatchFeature with input_ids, attention_mask, target_mask (b, l), class_ids (b,), and with images
            image_grid_hw (m, 2), with known images pixel_values or image_latents (n, c, h, w).

        Raises:
            ValueError: conditions that do not fit together, with what was got, what is needed, what to do.
        """
        options = options_of(self, dict(kwargs))
        columns = as_columns(text=text, images=images, class_ids=class_ids)
        conversations = [self._reader.as_messages(*row) for row in zip(*columns, strict=True)]
        prompts = [self._reader.read(messages) for messages in conversations]
        modalities = as_modalities(MODALITIES if generate is None else generate)
        return self._encode(prompts, modalities, image_size, max_new_tokens, *options)

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
        processor_kwargs: dict | None = None,
        **kwargs: Any,
    ):
        """Conversations -> inputs of the model; the same for training and for generation.

        Args:
            conversation: Messages {"role": "system" | "user" | "assistant", "content": str or parts}, or a list of
                such lists. Parts: {"type": "text", "text": str}, {"type": "image", "image": PIL image, array, path
                or URL}, {"type": "image", "latents": (c, h, w)} as a LatentCache has them, {"type": "class", "class":
                int}. If the last message is the assistant's, its parts are the targets and the output has `labels`:
                token ids at target text, -100 elsewhere. There a part may have a "mask" of what of it is a target:
                of an image a picture or array over it, white or 1 where patches are to be made; of a text a list of
                (start, end) in its characters, end None for all to the end of the canvas. Without its picture or text
                a part is all to be made, and in a text each `mask_token` is one token to be made; such targets
                are unknown, and without `labels`. A text that "continues" in another assistant message fills its
                canvas with <s>.
            chat_template: The name of one of the processor's templates, where it has several, or Jinja source instead
                of its own.
            generate: "image", "text" or both, where the last message is not the assistant's; ("text",) if None.
            tokenize: False returns the rendered string, or a list of them, with one placeholder an image.
            return_dict: False returns `input_ids` alone.
            image_size, max_new_tokens, return_tensors: As when the processor is called; a target picture becomes of
                that size, target latents have to be; a target text fills its canvas of `max_new_tokens` with </s>.
            add_generation_prompt: Has no effect: `generate` says what to make.
            processor_kwargs: Options of a call of the processor, as transformers' pipelines hand them on.
            kwargs: Variables of the template, and options of a call of the processor; others are refused.

        Raises:
            ValueError: messages that do not fit together, with what was got, what is needed, what to do.
        """
        template = self._template(chat_template)
        known = _get_template_variables(template)
        variables = {name: kwargs.pop(name) for name in [*kwargs] if name in known}
        given = kwargs | (processor_kwargs or {})
        options: dict[str, Any] = {"generate": generate, "image_size": image_size, "max_new_tokens": max_new_tokens}
        for name, value in options.items():
            options[name] = given.pop(name, value) if value is None else value
        row_options = options_of(self, {"return_tensors": return_tensors} | given)
        messages = messages_of(conversation)
        if not messages and not variables.get("is_continued"):
            raise ValueError("Got no messages; need at least one; call the processor itself for no conditions.")
        is_batch = bool(messages) and not isinstance(messages[0], dict)
        prompts = [self._reader.read(one) for one in (messages if is_batch else [messages])]
        training = sum(prompt.has_targets for prompt in prompts)
        if training and options["generate"] is not None:
            raise ValueError(
                f"Got a last assistant message, whose parts are the targets, where {options['generate']!r} is to be "
                "generated; need one of the two; to generate, drop that message, or pass it to the pipeline as its "
                "`canvas`; to train, pass no `generate`."
            )
        if 0 < training < len(prompts):
            raise ValueError(
                f"Got a batch of {training} conversations with targets and {len(prompts) - training} without; need "
                "all of one kind; split the batch."
            )
        wanted = ("text",) if options["generate"] is None else options["generate"]
        modalities = () if training else as_modalities(wanted)
        if not tokenize:
            rendered = self._render(prompts, modalities, template, variables)
            return rendered if is_batch else rendered[0]
        sizes = options["image_size"], options["max_new_tokens"]
        inputs = self._encode(prompts, modalities, *sizes, *row_options, template, variables)
        return inputs if return_dict else inputs["input_ids"]

    def as_history(self, messages: list[dict], is_continued: bool = False, **image_options: Any) -> BatchFeature:
        """A conversation as conditions alone, its last answer too.

        What comes out are inputs of [`~MDMForMultiModalGeneration.read_conversation`].

        Args:
            messages: One conversation, or a stretch of it.
            is_continued: Whether something of it was read before.
            image_options: As when the processor is called.

        Raises:
            ValueError: messages that do not fit together, or without any part.
        """
        prompts = [self._reader.read([*messages, {"role": "user", "content": []}])]
        if prompts[0].class_id == NO_CLASS and not any(message["content"] for message in prompts[0].messages):
            raise ValueError("Got messages without a part; need at least one to remember; leave them out.")
        options = options_of(self, {"return_tensors": "pt"} | image_options)
        inputs = self._encode(prompts, (), None, None, *options, None, {"is_continued": is_continued}, False)
        for name in ("target_mask", "labels"):
            inputs.pop(name, None)
        return inputs

    def as_messages(self, text: str | None = None, images: Any = None, class_id: int | None = None) -> list[dict]:
        """The conditions of one prompt as a conversation; no condition, no message."""
        return self._reader.as_messages(text, images, class_id)

    @property
    def _reader(self) -> ConversationReader:
        return ConversationReader(self._special_text, self.image_token, self.mask_token, self.num_classes)

    def _template(self, name: str | None = None) -> str:
        """A template's Jinja source, by its name if the processor has several; what is no name is a source."""
        own = self.chat_template
        if not isinstance(own, dict):
            return own if name is None else name
        if name is None and "default" not in own:
            raise ValueError(
                f"Got no chat_template, and none of the processor's is the default one; need one of {', '.join(own)}; "
                "name it."
            )
        return own["default"] if name is None else own.get(name, name)

    def _render(self, prompts: list[Prompt], generate: Sequence[str], template: str, variables: dict) -> list[str]:
        rendered, _ = render_jinja_template(
            conversations=[prompt.messages for prompt in prompts],
            chat_template=template,
            generate=list(generate),
            **variables,
        )
        return rendered

    def _encode(
        self,
        prompts: list[Prompt],
        generate: Sequence[str],
        image_size: Sequence[int] | None,
        max_new_tokens: int | None,
        row_options: dict,
        image_options: dict,
        template: str | None = None,
        variables: dict | None = None,
        needs_targets: bool = True,
    ) -> BatchFeature:
        canvas = self.max_new_tokens if max_new_tokens is None else positive("max_new_tokens", max_new_tokens)
        if (variables or {}).get("is_continued") and any(prompt.class_id != NO_CLASS for prompt in prompts):
            raise ValueError(
                "Got a class in a conversation that goes on; need it in the first turn, whose class token it is; say "
                "it there, or begin another conversation."
            )
        target_grid = self._grid(image_size)
        rendered = self._render(prompts, generate, template or self._template(), variables or {})
        # `expand_placeholders` refuses what is too long; the tokenizer's own warning would only foretell it.
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        tokenized = self.tokenizer(rendered, return_offsets_mapping=True, **options)

        images = read_images(prompts, self.image_processor, image_options, image_size)
        grids, patch_masks = iter(images.grids), iter(images.patch_masks)
        limits = canvas, self.longest_text
        rows = []
        of_rows = tokenized["input_ids"], tokenized["offset_mapping"]
        for prompt, text, ids, offsets in zip(prompts, rendered, *of_rows, strict=True):
            given = len(prompt.images) + len(prompt.latents)
            if ids.count(self.image_token_id) != given:
                raise ValueError(
                    f"Got {ids.count(self.image_token_id)} {self.image_token} for {given} image(s); need "
                    "one each; mend the chat template so that it renders every image part."
                )
            row = expand_placeholders(
                text,
                ids,
                offsets,
                self._ids,
                grids,
                target_grid,
                *limits,
                self.tokenizer.decode,
                patch_masks,
                prompt.text_masks,
                prompt.text_continues,
            )
            absent = [name for name in generate if self._ids[f"{name}_target_token"] not in ids]
            if needs_targets and (absent or not any(row.target_mask)):
                raise ValueError(
                    f"Got a chat template that renders {text[:60]!r}, without a target for "
                    f"{' and '.join(absent) or 'the last assistant message'}; need one for all that is to be made; "
                    "mend the template, or name one of the processor's own."
                )
            rows.append(row)

        data = pad_rows(rows, self._ids["pad_token"], self._length(rows, row_options))
        data["class_ids"] = np.array([prompt.class_id for prompt in prompts], dtype=np.int64)
        if generate or not all(row.is_known for row in rows):
            del data["labels"]
        return BatchFeature(data | images.inputs, tensor_type=row_options.get("return_tensors", "pt"))

    @staticmethod
    def _length(rows: list, options: dict) -> int:
        """How long all rows of a batch are to be."""
        longest, most = max(len(row.input_ids) for row in rows), options.get("max_length")
        if most is not None and longest > most:
            raise ValueError(
                f"Got a row of {longest} tokens; need at most max_length = {most}, as rows are never cut; shorten the "
                "text, lower max_new_tokens or image_size, or raise max_length."
            )
        return most if options["padding"] == "max_length" else longest

    def _grid(self, image_size: Sequence[int] | None) -> list[int]:
        """[rows, columns] in patches of an image to generate."""
        image_size = self.image_size if image_size is None else image_size
        if image_size is None:
            image_size = (self.image_processor.size.height, self.image_processor.size.width)
        try:
            height, width = (operator.index(side) for side in image_size)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Got image_size {image_size}; need (height, width), whole numbers of pixels.") from error
        if height * width > self.image_processor.max_pixels:
            raise ValueError(
                f"Got image_size {height}x{width} = {height * width} pixels; need at most max_pixels = "
                f"{self.image_processor.max_pixels}; ask for less, or raise the image processor's max_pixels."
            )
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

    def continues(self, sequence: torch.Tensor) -> bool:
        """Whether the text that was generated in a row of `sequences` (l,) is a block after which another comes."""
        return continues(sequence.tolist(), self._ids)

    def post_process_image_text_to_text(self, generated_outputs: Any, **decode_kwargs: Any) -> list[str]:
        """The text alone, as transformers' pipeline "image-text-to-text" asks for it."""
        return self.post_process_multimodal_output(generated_outputs, generation_mode="text", **decode_kwargs)
