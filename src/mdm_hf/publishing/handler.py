"""The entry of Inference Endpoints: a request in, a picture or JSON out. It stands at the root of a repository.

    request                                                        answer
    {"inputs": "a handwritten three"}                              a picture
    a picture's bytes, or {"inputs": base64}                       [{"generated_text": "the digit three"}]
    {"inputs": base64, "question": "which digit is this?"}         [{"answer": "it is a three", "score": 0.9}, ...]
    {"inputs": {"text": ..., "image": base64, "class": 3}}         [{"generated_text": ..., "images": [base64]}]
    {"inputs": {"messages": [...]}}, images as base64              the same

`parameters` are options of a call of MDMPipeline, `height` and `width` of a picture to be made, and `top_k` answers to
a question. Whatever cannot be answered is a ValueError that says what to send instead; the server makes it a reply of
status 400.
"""

import base64
import io
from collections import Counter
from typing import Any

from PIL import Image
from transformers import pipeline


PARAMETERS = (
    "generate",
    "num_inference_steps",
    "guidance_scale",
    "text_guidance_scale",
    "guidance_interval",
    "text_temperature",
    "selection_tolerance",
    "text_selection_tolerance",
    "modality_lag",
    "scheduler",
    "seed",
    "max_new_tokens",
    "num_return_sequences",
    "height",
    "width",
    "top_k",
)
FIELDS = ("inputs", "question", "image", "parameters")  # the client sends a question's picture as "image" too
CONDITIONS = ("text", "image", "class", "messages")
MOST_SAMPLES = 16
MOST_STEPS = 200
MOST_AUTO_STEPS = 50  # that num_inference_steps="auto" may come to
MOST_TOKENS = 1024
MOST_PIXELS = 1024 * 1024  # of a picture to be made
MOST_WORK = 2**18  # patches and tokens to be made, times steps, times samples: minutes of a CPU's core
MOST_PARTS = 64  # of a request's messages, each a text of the tokenizer's limit or a picture
ANSWERS_DRAWN = 8  # of which an answer's share is its score


class EndpointHandler:
    """Loads the repository in `path` and answers requests with it.

    Args:
        path: Folder with the repository's files; their code is run.
    """

    def __init__(self, path: str = ""):
        self.pipe = pipeline(model=path, trust_remote_code=True)
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, data: dict[str, Any]) -> Any:
        """Answers a request.

        Args:
            data: The request's body, decoded.

        Returns:
            A PIL image where one picture alone is asked for, else a list of dicts.

        Raises:
            ValueError: a request that cannot be answered.
        """
        if not isinstance(data, dict):
            raise ValueError(f"Got a body of type {type(data).__name__}; need an object with 'inputs'.")
        if unknown := sorted(map(str, set(data) - set(FIELDS))):
            raise ValueError(
                f"Got the field(s) {', '.join(unknown)}; need inputs, question and parameters alone; put options, "
                "such as a seed, under 'parameters'."
            )
        inputs = data.get("inputs")
        is_picture = isinstance(inputs, bytes | Image.Image) or _is_picture(inputs)
        if isinstance(inputs, bytes):
            inputs = f"data:image/any;base64,{base64.b64encode(inputs).decode()}"
        if inputs is None or (isinstance(inputs, str) and not inputs.strip()):
            raise ValueError("Got no inputs; need a text, a picture or a dict of conditions under 'inputs'.")
        is_question, both = "question" in data, ("image", "text")
        usual = "text" if is_question or is_picture else "image" if isinstance(inputs, str) else both
        options = {"generate": usual} | _options(_parameters(data))
        if is_question:
            options = {"num_return_sequences": ANSWERS_DRAWN} | options
        check_sizes(options)
        check_work(self.pipe, options)
        if is_question:
            top_k = options.pop("top_k", ANSWERS_DRAWN)
            if options["generate"] not in ("text", ["text"]):
                raise ValueError(
                    f"Got a question with generate {options['generate']!r}; need 'text', or leave it out."
                )
            return self.answers(_image(data.get("image", inputs)), data["question"], options)[:top_k]
        if idle := {"top_k", "image"} & (set(data) | set(options)):
            raise ValueError(f"Got {min(idle)} without a question; need both; a picture alone goes under 'inputs'.")
        if is_picture:
            return self.described({"images": _image(inputs)}, options)
        if isinstance(inputs, str):
            return self.described({"text": _text(inputs)}, options)
        return self.described(_conditions(inputs), options)

    def described(self, conditions: dict, options: dict) -> Any:
        """Samples of MDMPipeline's one call: a picture where nothing else is made, else texts and pictures."""
        results = self.pipe(**conditions, **options)
        if len(results) == 1 and not results[0]["text"]:
            return results[0]["images"][0]
        texts = [{"generated_text": " ".join(one["text"])} for one in results]
        pictures = [[_as_base64(image) for image in one["images"]] for one in results]
        return [text | ({"images": some} if some else {}) for text, some in zip(texts, pictures, strict=True)]

    def answers(self, image: Image.Image | str, question: Any, options: dict) -> list[dict]:
        """Answers to a question about a picture, the likeliest first; an answer's score is its share of the draws."""
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"Got the question {question!r}; need a text.")
        texts = [one["text"][0] for one in self.pipe(text=_text(question), images=image, **options)]
        return [{"answer": text, "score": count / len(texts)} for text, count in Counter(texts).most_common()]


def check_sizes(options: dict) -> None:
    """Raises ValueError for sizes of what is not made."""
    for name, kind in (("image_size", "image"), ("max_new_tokens", "text")):
        if name in options and not _makes(kind, options["generate"]):
            given = "height and width" if name == "image_size" else name
            raise ValueError(
                f"Got {given} with generate {options['generate']!r}, where they would do nothing; need them where "
                f"{'a picture' if kind == 'image' else 'a text'} is made; leave them out, or ask for {kind!r} too."
            )


def check_work(pipe: Any, options: dict) -> None:
    """Raises ValueError for more than one request may take of a machine that others wait for.

    Args:
        pipe: A pipeline of MDM.
        options: Of a call, `generate` among them; what they leave out is as the pipeline has it.
    """
    options = pipe._preprocess_params | pipe._forward_params | options
    processor, generation = pipe.processor, pipe.model.generation_config
    size = processor.image_processor.size
    height, width = options.get("image_size") or processor.image_size or (size.height, size.width)
    made = _makes("image", options["generate"]) * (height * width // processor.patch_size**2)
    made += _makes("text", options["generate"]) * options.get("max_new_tokens", processor.max_new_tokens)
    steps = options.get("num_inference_steps", generation.num_inference_steps)
    steps = MOST_AUTO_STEPS if steps == "auto" else steps
    samples = options.get("num_return_sequences", 1)
    if made * steps * samples > MOST_WORK:
        raise ValueError(
            f"Got {samples} sample(s) of {made} patches and tokens in {steps} steps, {made * steps * samples} looks "
            f"at one; need {MOST_WORK} at most; ask for a smaller picture, fewer steps or fewer samples."
        )


def _makes(kind: str, generate: Any) -> bool:
    return generate == "auto" or kind in generate


def _parameters(data: dict) -> Any:
    given = data.get("parameters")
    return {} if given is None else given


def _text(text: str) -> str:
    """A text that says something, without half of a character, which JSON lets through and no tokenizer reads."""
    if not text.strip():
        raise ValueError("Got an empty text; need one with something in it; leave it out where there is none.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("Got a text with half a character (a lone surrogate) in it; need whole ones.")
    return text


def _options(given: Any) -> dict:
    """The parameters of a request as options of a call, within what one request may ask for."""
    if not isinstance(given, dict):
        raise ValueError(
            f"Got parameters of type {type(given).__name__}; need a dict of some of {', '.join(PARAMETERS)}."
        )
    options = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(map(str, set(options) - set(PARAMETERS))):
        raise ValueError(f"Got the parameter(s) {', '.join(unknown)}; need some of {', '.join(PARAMETERS)}.")
    if not isinstance(options.get("generate", ""), str | list):
        raise ValueError(f"Got generate {options['generate']!r:.80}; need 'image', 'text', a list of both, or 'auto'.")
    for name, most in (
        ("num_return_sequences", MOST_SAMPLES),
        ("num_inference_steps", MOST_STEPS),
        ("max_new_tokens", MOST_TOKENS),
        ("top_k", ANSWERS_DRAWN),
    ):
        value = options.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"Got {name} {value!r}; need a whole number from 1 to {most}.")
    height, width = (options.pop(name, None) for name in ("height", "width"))
    if (height is None) != (width is None):
        raise ValueError("Got one of height and width; need both, in pixels, or neither.")
    if height is not None:
        if not all(isinstance(side, int) and side > 0 for side in (height, width)) or height * width > MOST_PIXELS:
            raise ValueError(
                f"Got a picture of {height!r} x {width!r}; need whole numbers, {MOST_PIXELS} pixels at most."
            )
        options["image_size"] = (height, width)
    return options


def _conditions(inputs: Any) -> dict:
    """A dict of conditions as the pipeline takes them."""
    if not isinstance(inputs, dict) or not inputs or set(inputs) - set(CONDITIONS):
        raise ValueError(
            f"Got inputs {str(inputs)[:80]}; need a text, a picture, or a dict of {', '.join(CONDITIONS)}."
        )
    if "messages" not in inputs:
        names = {"text": "text", "image": "images", "class": "class_ids"}
        given = {names[kind]: _checked(kind, value) for kind, value in inputs.items() if value is not None}
        if not given:
            raise ValueError(f"Got inputs {inputs} with null alone; need some of {', '.join(CONDITIONS)}; give one.")
        return given
    if len(inputs) > 1:
        raise ValueError("Got messages and other conditions; need the messages alone, which may hold the others.")
    if not isinstance(inputs["messages"], list):
        raise ValueError(f"Got the messages {inputs['messages']!r}; need a list of dicts with role and content.")
    messages = [_message(message) for message in inputs["messages"][: MOST_PARTS + 1]]
    parts = sum(len(one["content"]) if isinstance(one["content"], list) else 1 for one in messages)
    if parts > MOST_PARTS or len(messages) > MOST_PARTS:
        raise ValueError(
            f"Got messages of more than {MOST_PARTS} texts, pictures and classes; need {MOST_PARTS} at most in all; "
            "leave out the earliest."
        )
    return {"messages": messages}


def _message(message: Any) -> dict:
    """A message whose parts hold nothing but what the request itself brings."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), str | list):
        raise ValueError(f"Got the message {str(message)[:80]}; need a dict with role and content.")
    if unknown := sorted(map(str, set(message) - {"role", "content"})):
        raise ValueError(f"Got a message with {', '.join(unknown):.80}; need role and content alone; leave it out.")
    content = message["content"]
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in CONDITIONS[:3] or set(part) != {"type", kind}:
                raise ValueError(
                    f"Got the part {str(part)[:80]}; need a dict with its type and, under the same name, its text, "
                    "its image in base64 or its class."
                )
        content = [part | {part["type"]: _checked(part["type"], part[part["type"]])} for part in content]
    else:
        content = _text(content)
    return {"role": message.get("role"), "content": content}


def _checked(kind: str, value: Any) -> Any:
    """One text, picture or class; the pipeline itself would take lists, files and addresses."""
    if kind == "image":
        return _image(value)
    if isinstance(value, bool) or not isinstance(value, str if kind == "text" else int):
        need = "a string" if kind == "text" else "a whole number"
        raise ValueError(f"Got the {kind} {value!r:.80}; need {need}.")
    return _text(value) if isinstance(value, str) else value


def _is_picture(inputs: Any) -> bool:
    """Whether a text is a picture in base64: longer than a prompt, and it starts as one of the usual formats does."""
    starts = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A", "data:image/")
    is_long = isinstance(inputs, str) and len(inputs) > 64
    return is_long and " " not in inputs[:64] and inputs.startswith(starts)


def _image(given: Any) -> Image.Image | str:
    """A picture that the server has decoded, or one in base64 as a data URL, which the processor checks and decodes.
    Never an address or a file: a request cannot make the server fetch one."""
    if isinstance(given, Image.Image):
        return given
    if not isinstance(given, str):
        raise ValueError(
            f"Got a picture of type {type(given).__name__}; need base64, or the picture's bytes as the body."
        )
    return f"data:image/any;base64,{given.rpartition('base64,')[2]}"


def _as_base64(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()
