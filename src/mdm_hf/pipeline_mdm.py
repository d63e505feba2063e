"""MDMPipeline: conditions in, text and pictures out, in one call.

- Prompts come as values, lists, or anything that can be iterated: data sets and generators are read as they are drawn.
- Prompt n is drawn with a seed of its own, so that batches change nothing.
- The code travels with what is saved, so that `transformers.pipeline` loads it where this package is not installed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice

import torch
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .checkpoints import hub_options, push_folder
from .choice_scores import ChoiceScores, score_choices
from .conversation_state import MDMConversationState
from .conversations import AUTO, MODALITIES, as_modalities
from .dialogue import MDMDialogue
from .generation_configuration_mdm import SAMPLING_OPTIONS
from .pipeline_loading import compile_blocks, load_parts
from .processing_mdm import MDMProcessor
from .prompts import CONDITIONS, check_prompts, first_seed, of_fitting_sizes, read_prompts, whole_number
from .solvers import solver_for, solver_named
from .watching import watched


TASK = "any-to-any-diffusion"  # the name by which `transformers.pipeline` knows MDMPipeline
PROCESSOR_OPTIONS = ("generate", "image_size", "max_new_tokens")
GENERATE_OPTIONS = (*(name for name in SAMPLING_OPTIONS if name != "use_cache"), "scheduler")
CALL_OPTIONS = ("num_return_sequences", "seed", "callback_on_step_end")  # of a call alone: never defaults
# How to reach the Hub, for all parts alike.
ACCESS = ("token", "cache_dir", "local_files_only", "force_download", "proxies")


class MDMPipeline(Pipeline):
    """Generates images, text, or both, from any mixture of conditions.

    Args:
        model: The model, with its head.
        processor: Its processor.
        scheduler: A diffusers scheduler with `prediction_type="sample"`, or its name; the one that the model was saved
            with if None, else `generate`'s default.
        compile: Compile the blocks with `torch.compile`, which takes a minute and pays where many samples are drawn. A
            string is its mode. Modes with CUDA graphs have not been tried: the states that the blocks keep for
            later steps are outputs of a graph that the next replay overwrites.
        kwargs: As in [`~transformers.Pipeline`]: `device`, `batch_size`, ...; and defaults for the options of a call.

    Raises:
        ValueError: no processor, or a scheduler that cannot drive the model.

    Examples:
        >>> pipe = MDMPipeline.from_pretrained("model_cards/mdm-digits")
        >>> pipe.set_progress_bar_config(disable=True)
        >>> three = pipe(text="a handwritten three", generate="image", seed=0)[0]["images"][0]
        >>> three.size, pipe(images=three, text="is this a three?", generate="text", seed=0)[0]["text"]
        ((8, 8), ['yes, it is a three'])
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(
        self, model, processor: MDMProcessor | None = None, scheduler=None, compile: bool | str = False, **kwargs
    ):
        if processor is None:
            raise ValueError(
                "Got a model without a processor; need both; pass processor=MDMProcessor.from_pretrained(...), or "
                "load the two together with MDMPipeline.from_pretrained(...)."
            )
        super().__init__(model=model, processor=processor, **kwargs)
        if isinstance(scheduler, str):
            scheduler = solver_named(scheduler, model.config)
        for modality in MODALITIES if scheduler is not None else ():  # refused here, where it was given
            few = min(20, model.config.num_train_timesteps)
            solver_for(scheduler, model.config, modality, few, model.model.alpha_bar_of(modality))
        self.scheduler = model.scheduler if scheduler is None else scheduler
        if compile:
            compile_blocks(self.model.model.layers, mode=compile if isinstance(compile, str) else None)
        self.progress_bar = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, device=None, batch_size=None, compile=False, **kwargs):
        """Loads model, processor and scheduler from one folder or Hub repository.

        Args:
            pretrained_model_name_or_path: The folder or repository.
            device: "cpu", "cuda:1", ...; the first accelerator by default.
            batch_size: Samples per `generate` call, 32 by default.
            compile: See [`MDMPipeline`].
            kwargs: `revision`, `token`, `cache_dir`, `subfolder`, `force_download`, ... for all parts; `dtype`,
                `device_map`, ... for the model; the options of a call, as defaults for it.

        A folder or repository with a PEFT adapter is loaded onto the base model that it names; processor and settings
        that are not beside the adapter are the base model's.

        Raises:
            ValueError: files that are missing or not whole, named with what to do.
        """
        path = pretrained_model_name_or_path
        defaults = {k: kwargs.pop(k) for k in (*PROCESSOR_OPTIONS, *GENERATE_OPTIONS, *CALL_OPTIONS) if k in kwargs}
        place = {k: kwargs[k] for k in ("revision", "subfolder") if k in kwargs}
        access = {k: kwargs[k] for k in ACCESS if k in kwargs}
        model, processor = load_parts(path, place, access, kwargs)
        return cls(model.eval(), processor, compile=compile, device=device, batch_size=batch_size, **defaults)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Writes model, processor, scheduler, generation config and the code of them all into one folder.

        Args:
            save_directory: The folder.
            push_to_hub: Whether what was written is then uploaded, and the folder's README.md, in one commit.
            kwargs: As of the model's own `save_pretrained`; of the upload `repo_id`, `private`, `token`, `revision`,
                `create_pr`, `commit_message`, `commit_description`, `tags`.
        """
        hub = hub_options(save_directory, kwargs) if push_to_hub else {}
        own, self.model.scheduler = self.model.scheduler, self.scheduler or self.model.default_scheduler()
        try:  # the model saves it, before anything else, and notes that it did
            self.model.save_pretrained(save_directory, **kwargs)
        finally:
            self.model.scheduler = own
        self.processor.save_pretrained(save_directory)
        if not getattr(self.model, "_hf_peft_config_loaded", False):  # then it is an adapter, without a config
            impl = f"{__name__.rpartition('.')[2]}.{type(self).__name__}"
            self.model.config.custom_pipelines = {TASK: {"impl": impl, "pt": ["AutoModel"], "type": "multimodal"}}
            self.model.config.save_pretrained(save_directory)
            custom_object_save(self, save_directory)
        if push_to_hub:
            push_folder(save_directory, f"Upload {type(self).__name__}", **hub)

    def load_adapter(self, peft_model_id: str, **kwargs):
        """Puts a PEFT adapter, the folder or Hub repository `peft_model_id`, on the model.

        See `PreTrainedModel.load_adapter`.
        """
        self.model.load_adapter(str(peft_model_id), **kwargs)

    @property
    def default_modalities(self) -> str | Sequence[str] | None:
        """What it was told to generate when it was made; None if nothing."""
        return self._preprocess_params.get("generate")

    def set_progress_bar_config(self, disable: bool = False):
        """Shows or hides the progress bar over the network calls."""
        self.progress_bar = not disable

    def __call__(
        self,
        text=None,
        images=None,
        class_ids=None,
        messages=None,
        *,
        canvas=None,
        num_return_sequences: int = 1,
        seed: int | None = None,
        batch_size: int | None = None,
        callback_on_step_end: Callable | None = None,
        **options,
    ) -> list[dict] | Iterator[dict]:
        """Generates `num_return_sequences` samples for each prompt.

        Args:
            text, images, class_ids: Conditions; each one value, or a list (a batch; lists of one length, None where a
                prompt has no such condition). All absent: unconditional.
            messages: Conversations instead of the three above: one list of messages, or a list of such lists.
                Each of the four may also be a data set, a generator, or whatever else can be iterated. `text` may
                hold whole prompts: conversations, or dicts with any of the four names, as rows of a data set are.
            canvas: What the answer starts from, instead of `generate`: the parts of an assistant message, {"type":
                "image" | "text"}, one or a list, or a list of such lists, one a prompt. A "mask" says what of a part
                is to be made, and the rest stays as it is; see [`MDMProcessor.apply_chat_template`]. With `strength`
                below 1, what is to be made starts from what is there.
            num_return_sequences: Samples per prompt.
            seed: Sample n of the returned list is drawn with seed + n, and depends on nothing else but its prompt: in
                float32 to the byte, in half precision up to a few grey levels, as a matrix product is rounded
                differently in a batch of another size. None draws a seed at random.
            batch_size: Samples per `generate` call, 32 by default.
            callback_on_step_end: See [`MDMForMultiModalGeneration.generate`].
            generate: "image", "text", or both, which is the default; "auto" for what each prompt calls for, which
                a model with a modality gate decides.
            image_size: (height, width) in pixels of the images to generate; a canvas becomes of that size.
            max_new_tokens: Length of the text canvas in tokens.
            scheduler: Instead of the pipeline's; a name of diffusers' will do, "UniPCMultistepScheduler".
            num_inference_steps, step_tolerance, modality_lag, strength, min_new_tokens, text_temperature,
                selection_tolerance, text_selection_tolerance: See [`MDMGenerationConfig`]; the model's where None.
            guidance_scale, text_guidance_scale, guidance_interval: The same.

        Returns:
            A flat list, `num_return_sequences` per prompt in prompt order, of {"text": [str, ...], "images":
            [PIL.Image, ...]}. For prompts that are neither values nor lists, an iterator over the same, which reads
            and draws a batch at a time.

        Raises:
            ValueError: conditions that do not fit together, or sizes of what is not made (not beside canvases that are
                read one by one), with what was got, what is needed, what to do.
        """
        size = whole_number("batch_size", batch_size if batch_size is not None else self._batch_size or 32)
        stages = self._stages(options)
        conditions = {"text": text, "images": images, "class_ids": class_ids, "messages": messages, "canvas": canvas}
        prompts = read_prompts(num_return_sequences, options.get("generate"), **conditions)
        checked = _possible(stages[0]["generate"]), options
        if isinstance(prompts, list):
            check_prompts(prompts, *checked)
        else:
            prompts = of_fitting_sizes(prompts, *checked)
        results = self._results(prompts, size, first_seed(seed), *stages, callback_on_step_end)
        return list(results) if isinstance(prompts, list) else results

    def stream(
        self,
        text=None,
        images=None,
        class_ids=None,
        messages=None,
        *,
        canvas=None,
        num_return_sequences: int = 1,
        seed: int | None = None,
        callback_on_step_end: Callable | None = None,
        **options,
    ) -> Iterator[list[dict]]:
        """Watches the samples form: the same call, in one batch, with a look at it after every network call.

        The network waits until the next look is asked for, and stops when no more is.

        Args:
            text, images, class_ids, messages, canvas: Values or lists, as in a call.
            num_return_sequences, seed, callback_on_step_end, options: As in a call. The callback runs before the look
                is taken, in the thread of the network.

        Yields:
            After each network call the list that the call returns, of what the samples would be if the network were
            right; at last the list of the samples themselves.

        Raises:
            ValueError: as a call; prompts that are neither values nor lists.
        """
        for_processor, for_generate = self._stages(options)
        conditions = {"text": text, "images": images, "class_ids": class_ids, "messages": messages, "canvas": canvas}
        prompts = read_prompts(num_return_sequences, options.get("generate"), **conditions)
        if not isinstance(prompts, list):
            raise ValueError(
                "Got prompts to be read one by one; a stream draws all of them at once; make a list of them, or call "
                "the pipeline itself."
            )
        check_prompts(prompts, _possible(for_processor["generate"]), options)
        if for_processor["generate"] == AUTO and prompts[0].get("canvas") is None:
            raise ValueError(
                "Got generate='auto' for a stream, whose samples are drawn in one batch; need the same of all; ask "
                "`predict_modalities` first, or call the pipeline itself."
            )
        first = first_seed(seed)
        return watched(
            lambda look: self._batch(prompts, first, for_processor, for_generate | {"callback_on_step_end": look}),
            self.postprocess,
            callback_on_step_end,
        )

    def chat(self, state: str | os.PathLike | MDMConversationState | None = None) -> MDMDialogue:
        """A conversation whose past is remembered as a state of fixed size; `state` is that of an earlier one, or the
        file that [`MDMDialogue.save`] wrote."""
        if isinstance(state, str | os.PathLike):
            return MDMDialogue.load(self, state)
        return MDMDialogue(self, state)

    def predict_modalities(self, text=None, images=None, class_ids=None, messages=None) -> list[tuple[str, ...]]:
        """What `generate="auto"` makes of each prompt: ("image",), ("text",) or ("image", "text").

        Raises:
            ValueError: the model has no modality gate; prompts as a call refuses them.
        """
        prompts = read_prompts(1, text=text, images=images, class_ids=class_ids, messages=messages, canvas=None)
        for_processor, _ = self._stages({})
        prompts, decided = iter(prompts), []
        while batch := list(islice(prompts, self._batch_size or 32)):
            if any(prompt.get("canvas") is not None for prompt in batch):
                raise ValueError(
                    "Got a prompt with a canvas, whose parts say what is made; need one without, for the model to "
                    "decide; leave the canvas out."
                )
            decided += self._decided(batch, for_processor)
        return decided

    def _decided(self, batch: list[dict], for_processor: dict) -> list[tuple[str, ...]]:
        inputs = self.preprocess(batch, **for_processor | {"generate": MODALITIES})
        return self.model.predict_modalities(**inputs)

    def score_choices(
        self,
        text=None,
        images=None,
        class_ids=None,
        messages=None,
        *,
        choices,
        num_samples: int = 32,
        seed: int = 0,
        batch_size: int = 64,
        max_new_tokens: int | None = None,
    ) -> list[ChoiceScores]:
        """How likely the model finds each of several answers to each prompt.

        From [`~MDMForMultiModalGeneration.score`], a bound on log p.

        Args:
            text, images, class_ids, messages: Conditions, values or lists, as in a call.
            choices: A list of answers for each prompt, or one list for the only prompt; a string is a text, anything
                else a picture. All answers to a prompt share times and noise.
            num_samples, seed, batch_size, max_new_tokens: See [`~choice_scores.score_choices`].

        Raises:
            ValueError: conditions or choices that do not fit together.
        """
        prompts = list(read_prompts(1, text=text, images=images, class_ids=class_ids, messages=messages))
        if not isinstance(choices, list | tuple):
            raise ValueError(
                f"Got choices of type {type(choices).__name__}; need a list of answers to the prompt, or a list of "
                "such lists, one a prompt."
            )
        if len(prompts) == 1 and not (choices and isinstance(choices[0], list | tuple)):
            choices = [choices]
        asked = []
        for prompt in prompts:
            if prompt.get("canvas") is not None:
                raise ValueError(
                    "Got a prompt with a canvas to score answers to; need the answers as `choices`; leave it out."
                )
            conditions = (prompt[name] for name in CONDITIONS[:3])
            asked.append(prompt["messages"] or self.processor.as_messages(*conditions))
        return score_choices(self.model, self.processor, asked, choices, num_samples, seed, batch_size, max_new_tokens)

    def _stages(self, options: dict) -> tuple[dict, dict]:
        """Options of `preprocess` and of `_forward`: this call's over the pipeline's."""
        for_processor, for_generate, _ = self._sanitize_parameters(**options)
        for_processor = self._preprocess_params | for_processor
        generate = for_processor.get("generate", MODALITIES)
        for_processor["generate"] = generate if generate == AUTO else as_modalities(generate)
        return for_processor, {"scheduler": self.scheduler} | self._forward_params | for_generate

    def _results(self, prompts, size: int, seed: int, for_processor: dict, for_generate: dict, callback):
        """Results one by one, drawn `size` at a time."""
        is_known = isinstance(prompts, list)
        is_one = is_known and len(prompts) <= size
        starts = range(0, len(prompts), size) if is_known else count(0, size)
        for_generate = for_generate | {"callback_on_step_end": callback, "progress_bar": self.progress_bar and is_one}
        prompts = iter(prompts)
        for start in logging.tqdm(starts, desc="Batches", disable=not self.progress_bar or is_one or not is_known):
            batch = list(islice(prompts, size))
            if not batch:
                return
            yield from self._batch(batch, seed + start, for_processor, for_generate)

    def _batch(self, batch: list[dict], seed: int, for_processor: dict, for_generate: dict) -> list[dict]:
        """One `generate` call: prompt i of the batch is drawn with seed + i."""
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(batch))]
        return self._drawn(batch, generators, for_processor, for_generate)

    def _drawn(self, batch: list[dict], generators: list, for_processor: dict, for_generate: dict) -> list[dict]:
        """A sample of each prompt; where the model decides what to make, in one call for each decision."""
        if for_processor["generate"] != AUTO or batch[0].get("canvas") is not None:
            inputs = self.preprocess(batch, **for_processor)
            return self.postprocess(self._forward(inputs, generator=generators, **for_generate))
        wanted = self._decided(batch, for_processor)
        results: list[dict] = [{}] * len(batch)
        for modalities in dict.fromkeys(wanted):
            rows = [i for i, one in enumerate(wanted) if one == modalities]
            part, sources = [batch[i] for i in rows], [generators[i] for i in rows]
            made = self._drawn(part, sources, for_processor | {"generate": modalities}, for_generate)
            for i, result in zip(rows, made, strict=True):
                results[i] = result
        return results

    def preprocess(self, batch: list, **options):
        """Prompts -> model inputs."""
        if any(prompt.get("canvas") is not None for prompt in batch):
            batch = [self._with_canvas(prompt) for prompt in batch]
            options.pop("generate", None)
        conversations = [prompt["messages"] for prompt in batch if prompt["messages"] is not None]
        if 0 < len(conversations) < len(batch):
            raise ValueError(
                f"Got a batch of {len(conversations)} conversations and {len(batch) - len(conversations)} prompts of "
                "another kind; need all of one kind; make two calls, or write the others as messages."
            )
        if conversations:
            inputs = self.processor.apply_chat_template(conversations, return_tensors="pt", **options)
            inputs.pop("labels", None)  # of a canvas whose targets are known
        else:
            columns = {name: [prompt[name] for prompt in batch] for name in CONDITIONS[:3]}
            inputs = self.processor(**columns, return_tensors="pt", **options)
        return inputs.to(self.model.device)

    def _with_canvas(self, prompt: dict) -> dict:
        """A prompt as a conversation that ends with its canvas."""
        canvas = prompt.get("canvas")
        if canvas is None:
            raise ValueError(
                "Got a batch with prompts that have a canvas and others that have none; need all of one kind; make "
                "two calls."
            )
        messages = prompt["messages"]
        if messages is None:
            messages = self.processor.as_messages(*(prompt[name] for name in CONDITIONS[:3]))
        content = [canvas] if isinstance(canvas, dict) else canvas
        if not isinstance(content, list | tuple) or not all(isinstance(part, dict) for part in content):
            raise ValueError(
                f"Got the canvas {canvas!r:.60}; need a part of a message or a list of them; a picture to start from "
                'is {"type": "image", "image": picture}.'
            )
        return {"messages": [*messages, {"role": "assistant", "content": [*content]}]}

    def _forward(self, inputs, **options):
        return self.model.generate(**inputs, **options)

    def postprocess(self, outputs) -> list[dict]:
        """Model outputs -> text and PIL images."""
        return self.processor.post_process_multimodal_output(outputs)

    def _sanitize_parameters(self, **options):
        unknown = sorted(set(options) - {*PROCESSOR_OPTIONS, *GENERATE_OPTIONS})
        if unknown:
            raise ValueError(
                f"Got the option(s) {', '.join(unknown)}; need some of {', '.join(PROCESSOR_OPTIONS)}, "
                f"{', '.join(GENERATE_OPTIONS)}; check the spelling."
            )
        given = {name: value for name, value in options.items() if value is not None}
        parts = [
            {name: given[name] for name in names if name in given} for names in (PROCESSOR_OPTIONS, GENERATE_OPTIONS)
        ]
        return *parts, {}


def _possible(generate: str | Sequence[str]) -> Sequence[str]:
    """What may be made."""
    return MODALITIES if generate == AUTO else generate
