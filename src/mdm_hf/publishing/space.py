"""A model in the browser: the Gradio Space and `mdm serve`.

Three tabs: samples of any conditions as they form; a conversation; a picture with a brush over it, and captions with
marked parts. What is answered is in `space_answers.py`; here is what is shown, and how many may ask at once.

- One call of the network at a time, as it uses every core or the whole of a GPU: the others wait in a queue, are told
  their place in it, and are refused when it is full. What a person says is kept by session, and every request is
  drawn with a seed of its own, so that it makes no difference who else asks.
- Whatever is wrong with a request is said in a message. What is wrong with us goes to the log, and the person is told
  so; neither ends the page.
"""

import html
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


try:
    import gradio as gr
except ImportError as error:
    raise ImportError(
        'Got no gradio; need it to show a model in the browser; run: pip install "mdm-hf[serve]"'
    ) from error

from ..pipeline_mdm import MDMPipeline
from .handler import MOST_SAMPLES, MOST_STEPS
from .space_answers import (
    AUTO,
    MOST_GUIDANCE,
    Answers,
    Look,
    Talk,
    look_as_html,
    model_of,
    read_marks,
)
from .space_html import CSS, EMPTY, Card, cards_as_html, on_canvas, shaded


logger = logging.getLogger(__name__)

QUEUE = 64  # requests that may wait; more are refused
LARGEST_FILE = "10mb"
SESSIONS = 256  # whose conversations are kept, the latest
SECONDS_KEPT = 3600  # conversations and uploads of those who left
MAKE = {"both": "picture and text", "image": "picture", "text": "text", AUTO: "let the model decide"}
ANY = -1  # class
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif"]


def _upload(**options: Any) -> gr.Image:
    """A picture that is handed on as the path of its file: opened where a bad one gets a message."""
    image = gr.Image(type="filepath", sources=["upload", "clipboard"], **options)
    image.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return image


def _painting(**options: Any) -> gr.ImageEditor:
    """A canvas that hands on what was painted, as paths or bytes: opened where a bad one gets a message."""
    editor = gr.ImageEditor(type="filepath", format="png", **options)

    def layers(payload: Any) -> list[str | bytes]:
        if payload is not None and payload.id is not None:  # the browser has sent it ahead
            payload = editor.blob_storage.pop(payload.id, None)
        found = [] if payload is None else payload.layers or []
        return [layer if isinstance(layer, bytes) else layer.path for layer in found if layer is not None]

    editor.preprocess = layers  # type: ignore[method-assign]
    return editor


@contextmanager
def told() -> Iterator[None]:
    """Turns what went wrong into a message to the person who asked."""
    try:
        yield
    except ValueError as error:
        logger.info("Refused: %s", error)
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None
    except Exception as error:
        logger.exception("Failed at a request")
        raise gr.Error(
            f"Got a failure of the server ({type(error).__name__}); its log has the reason; try again, or something "
            "else.",
            print_exception=False,
        ) from None


def build(pipe: MDMPipeline) -> gr.Blocks:
    """The pages of a model; `launch` starts them.

    Args:
        pipe: The pipeline. Examples and description are those of the card.yaml where it was loaded from.
    """
    answers, model = Answers(pipe), model_of(pipe)
    with gr.Blocks(title=model.name, analytics_enabled=False, delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as app:
        gr.Markdown(f"# {model.name}\n{model.summary}\n\n{_facts(pipe)}", elem_id="about")
        made = gr.State([], time_to_live=SECONDS_KEPT)  # the last pictures of the first tab
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Generate", id="generate"):
                take = _generate_tab(answers, model.examples, made)
            with gr.Tab("Chat", id="chat"):
                _chat_tab(answers, model.examples)
            with gr.Tab("Edit", id="edit"):
                placed, canvas, kept = _edit_tab(answers)
        gr.on([take.click], lambda: gr.Tabs(selected="edit"), None, tabs, show_progress="hidden", queue=False).then(
            placed, made, [canvas, kept], show_progress="hidden", api_visibility="private"
        )
    return app


def launch(app: gr.Blocks, concurrency: int = 1, max_queue: int = QUEUE, **options: Any):
    """Starts the pages that `build` made.

    Args:
        app: What `build` returned.
        concurrency: Calls of the network at a time.
        max_queue: Requests that may wait.
        options: Of `gradio.Blocks.launch`: server_name, server_port, share, prevent_thread_lock, ...

    Returns:
        What `gradio.Blocks.launch` returns: the app, its local address, its public one.
    """
    for function in app.fns.values():
        if function.concurrency_id == "network":
            function.concurrency_limit = concurrency
    app.queue(max_size=max_queue, default_concurrency_limit=8)
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONT, font_mono=["monospace"])
    fixed = {"theme": theme, "css": CSS, "max_file_size": LARGEST_FILE, "state_session_capacity": SESSIONS}
    return app.launch(**fixed | {"ssr_mode": False, "footer_links": ["api", "settings"]} | options)


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    device: str | None = None,
    concurrency: int = 1,
    max_queue: int = QUEUE,
) -> None:
    """Loads a model and shows it in the browser, until it is stopped.

    Args:
        model: Folder or Hub repository.
        host, port: Where; 0.0.0.0 for other machines too.
        share: Also under a public address, for three days.
        device: The first accelerator if None.
        concurrency, max_queue: As in `launch`.

    Raises:
        ValueError: files of the model that are missing or not whole.
        OSError: the port is taken.
    """
    app = build(MDMPipeline.from_pretrained(model, device=device))
    place = {"server_name": host, "server_port": port, "share": share}
    _, local, public = launch(app, concurrency, max_queue, quiet=True, prevent_thread_lock=True, **place)
    print(f"{model} is at {public or local} until Ctrl+C.", flush=True)
    app.block_thread()


def _facts(pipe: MDMPipeline) -> str:
    size, classes = pipe.processor.image_processor.size, pipe.processor.num_classes
    millions = sum(weight.numel() for weight in pipe.model.parameters()) / 1e6
    facts = [
        f"{millions:,.1f}M parameters",
        f"{size.width}x{size.height} pictures",
        f"texts of up to {pipe.processor.max_new_tokens} tokens",
    ]
    facts += [f"{classes} classes"] if classes else []
    return " · ".join(facts)


def _warn_of(answers: Answers, text: str | None) -> None:
    if unknown := answers.unknown_to_model(text):
        letters = html.escape(unknown[:20], quote=False)
        gr.Warning(f"This model has no token for: {letters}. It reads them as bytes that mean nothing to it.")


def _settings(answers: Answers) -> tuple[gr.Number, gr.Slider, gr.Slider]:
    """Seed, steps and guidance, as two of the tabs have them."""
    config = answers.pipe.model.generation_config
    with gr.Row():
        seed = gr.Number(-1, label="Seed", info="-1: any; the one used is shown", precision=0, min_width=110, scale=2)
        dice = gr.Button("Any seed", size="sm", min_width=90, scale=1)
    dice.click(lambda: -1, None, seed, queue=False, show_progress="hidden", api_visibility="private")
    steps = config.num_inference_steps if isinstance(config.num_inference_steps, int) else 20
    steps = gr.Slider(1, MOST_STEPS, steps, step=1, label="Steps")
    scale = min(MOST_GUIDANCE, config.guidance_scale)
    guidance = gr.Slider(0, MOST_GUIDANCE, scale, step=0.05, label="Guidance", info="1 is none")
    return seed, steps, guidance


def _status(look: Look) -> str:
    decided = f" The model chose to make: {look.decided}." if look.decided else ""
    if not look.is_done:
        return f"Forming: network call {look.calls}.{decided}"
    return f"Done: seed {look.seed}, {look.calls} network calls.{decided}"


def _run_row(name: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        run = gr.Button(name, variant="primary", elem_id=f"{name.lower()}_run", scale=3)
        stop = gr.Button("Stop", elem_id=f"{name.lower()}_stop", scale=1, min_width=80)
    return run, stop


def _generate_tab(answers: Answers, examples: list[dict], made: gr.State) -> gr.Button:
    makes = [name for name in (AUTO, "both", "image", "text") if name != AUTO or answers.decides]
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            prompt = gr.Textbox(
                label="Prompt",
                placeholder="a description, or a question about the picture",
                lines=2,
                max_lines=6,
                elem_id="generate_prompt",
            )
            class_id = gr.Dropdown(
                [("any", ANY), *((name, number) for number, name in enumerate(answers.classes))],
                value=ANY,
                label="Class",
                visible=bool(answers.classes),
                elem_id="generate_class",
            )
            image = _upload(
                label="Picture to describe or ask about",
                height=170,
                elem_id="generate_image",
            )
            make = gr.Radio([(MAKE[name], name) for name in makes], value=makes[0], label="Make", elem_id="make")
            with gr.Accordion("Settings", open=False):
                seed, steps, guidance = _settings(answers)
                samples = gr.Slider(1, MOST_SAMPLES, 1, step=1, label="Samples")
            run, stop = _run_row("Generate")
        with gr.Column(scale=3, min_width=320):
            shown = gr.HTML(EMPTY, elem_id="generate_shown")
            with gr.Row(equal_height=True):
                status = gr.Markdown("", elem_id="generate_status")
                take = gr.Button("Edit the first picture", size="sm", elem_id="take", scale=0, min_width=180)
            rows = [
                [one.get("text"), one.get("image"), one.get("class_id", ANY), _make_of(one, makes)] for one in examples
            ]
            gr.Examples(
                rows,
                [prompt, image, class_id, make],
                example_labels=[_label(one) for one in examples],
                elem_id="generate_examples",
                preload=False,
            )
    inputs = [prompt, image, class_id, make, seed, steps, guidance, samples]

    def generate(text, image, class_id, make, seed, steps, guidance, samples):
        with told():
            _warn_of(answers, answers.words(text))
            category = None if class_id == ANY else class_id
            for look in answers.draw(text, image, category, make, seed, steps, guidance, samples):
                pictures = [picture for one in look.results for picture in one["images"]] if look.is_done else []
                yield look_as_html(look), _status(look), pictures if look.is_done else gr.skip()

    event = gr.on(
        [run.click, prompt.submit],
        generate,
        inputs,
        [shown, status, made],
        concurrency_id="network",
        concurrency_limit=1,
        show_progress="minimal",
        api_name="generate",
    )
    stop.click(None, cancels=[event])
    return take


def _chat_tab(answers: Answers, examples: list[dict]) -> None:
    makes = [name for name in (AUTO, "text", "image", "both") if name != AUTO or answers.decides]
    talk = gr.State(Talk(), time_to_live=SECONDS_KEPT)
    chatbot = gr.Chatbot(
        height=520,
        elem_id="chat_messages",
        latex_delimiters=[],
        label="Conversation",
        placeholder="Say something, show a picture, ask about it: what was said is remembered.",
        buttons=[],
    )
    message = gr.MultimodalTextbox(
        placeholder="a message, with pictures if you like",
        file_types=["image"],
        file_count="multiple",
        sources=["upload"],
        show_label=False,
        elem_id="chat_message",
    )
    with gr.Row():
        make = gr.Radio([(MAKE[name], name) for name in makes], value=makes[0], label="Answer with", scale=3)
        seed = gr.Number(-1, label="Seed", info="-1: any", precision=0, min_width=110, scale=1)
        clear = gr.Button("Clear", elem_id="chat_clear", min_width=80, scale=1)
    texts = [one for one in examples if one.get("text")]
    if texts:
        rows = [[{"text": one["text"], "files": [one["image"]] if "image" in one else []}] for one in texts]
        gr.Examples(rows, [message], example_labels=[_label(one) for one in texts], elem_id="chat_examples")

    def say(message, talk, make, seed):
        with told():
            message = message or {}
            text, files = message.get("text"), message.get("files") or []
            _warn_of(answers, answers.words(text))
            turns = answers.talk(talk, text, files, make, seed)
            asked = next(turns)
            yield list(asked.messages), talk, None
            answered = talk
            try:
                for answered in turns:
                    yield list(answered.messages), talk, None
            except Exception:
                yield list(talk.messages), talk, message
                raise
            yield list(answered.messages), answered, None

    def forget():
        return [], Talk(), None

    event = message.submit(
        say,
        [message, talk, make, seed],
        [chatbot, talk, message],
        concurrency_id="network",
        concurrency_limit=1,
        show_progress="minimal",
        api_name="chat",
    )
    gr.on(
        [clear.click, chatbot.clear],
        forget,
        None,
        [chatbot, talk, message],
        cancels=[event],
        queue=False,
        show_progress="hidden",
        api_name="forget",
    )


def _edit_tab(answers: Answers):
    """Returns what puts a picture there, and the two components that it sets."""
    kept = gr.State(None, time_to_live=SECONDS_KEPT)  # the picture itself: what the canvas shows is a copy
    with gr.Row():
        with gr.Column(scale=2, min_width=420):
            upload = _upload(
                label="Picture to change",
                height=130,
                elem_id="edit_image",
            )
            gr.Markdown("Paint over what is to be made anew; where nothing is painted, it is all of it.")
            canvas = _painting(
                label="Canvas",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=40, colors=["#ff8c00"], color_mode="fixed"),
                canvas_size=(384, 384),
                height=520,
                buttons=[],
                elem_id="canvas",
            )
        with gr.Column(scale=3, min_width=320):
            prompt = gr.Textbox(label="Prompt", placeholder="what the whole picture shows", elem_id="edit_prompt")
            strength = gr.Slider(
                0.05, 1, 1, step=0.05, label="Strength", info="1 keeps nothing of what is made anew; 0.5 half of it"
            )
            with gr.Accordion("Settings", open=False):
                seed, steps, guidance = _settings(answers)
            run, stop = _run_row("Edit")
            shown = gr.HTML(EMPTY, elem_id="edit_shown")
            status = gr.Markdown("", elem_id="edit_status")
            gr.Markdown(
                "### Rewrite a caption\nThe [marked] part is written anew, to fit the picture if there is one."
            )
            caption = gr.Textbox(
                label="Caption", placeholder="a [handwritten] three, or: a small [...]", elem_id="rewrite_caption"
            )
            rewrite = gr.Button("Rewrite", elem_id="rewrite_run")
            rewritten = gr.Textbox(label="Rewritten", interactive=False, elem_id="rewritten")
            written = gr.Markdown("")

    def place(pictures):
        """The first picture onto the canvas: as it is shown there, and itself."""
        with told():
            if not pictures:
                raise ValueError(
                    "Got no picture; need one that was made in the first tab; generate it, or upload one."
                )
            return on_canvas(pictures[0]), pictures[0]

    def receive(path):
        with told():
            picture = answers.picture(path)
            return (None, None) if picture is None else (on_canvas(picture), picture)

    def edit(layers, picture, text, strength, seed, steps, guidance):
        with told():
            _warn_of(answers, answers.words(text))
            mask = None if picture is None else answers.marked_by(layers, picture)
            for look in answers.edit(picture, mask, text, strength, seed, steps, guidance):
                image = look.results[0]["images"][0]
                before = Card(shaded(picture, mask), "before", "orange: what is made anew", is_offered=False)
                after = Card(image, "after", f"seed {look.seed}")
                yield cards_as_html([before, after], look.is_done), _status(look)

    def write(caption, picture, seed, steps):
        with told():
            _warn_of(answers, read_marks(answers.words(caption) or "")[0])
            for look in answers.rewrite(caption, picture, seed, steps):
                yield " ".join(look.results[0]["text"]), _status(look)

    network = {"concurrency_id": "network", "concurrency_limit": 1, "show_progress": "minimal"}
    upload.change(receive, upload, [canvas, kept], show_progress="hidden", api_name="receive")
    event = run.click(
        edit,
        [canvas, kept, prompt, strength, seed, steps, guidance],
        [shown, status],
        api_name="edit",
        **network,
    )
    stop.click(None, cancels=[event])
    gr.on(
        [rewrite.click, caption.submit],
        write,
        [caption, kept, seed, steps],
        [rewritten, written],
        api_name="rewrite",
        **network,
    )
    return place, canvas, kept


def _make_of(example: dict, makes: list[str]) -> str:
    """What an example makes, among what the model can."""
    wanted = example.get("generate", "both")
    return wanted if wanted in makes else "both"


def _label(example: dict) -> str:
    """An example in words."""
    given = [f"class {example['class_id']}"] if example.get("class_id") is not None else []
    given += ["a picture"] if "image" in example else []
    given += [f"“{example['text']}”"] if example.get("text") else []
    made = {"image": "picture", "text": "text", AUTO: "what it calls for"}.get(example.get("generate"), "both")
    return f"{', '.join(given) or 'nothing'} → {made}"
