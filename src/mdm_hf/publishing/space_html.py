"""Samples and messages as HTML, for the pages of `space.py`: every picture is there to the bit, and shown enlarged."""

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image


SHOWN_SIDE = 208  # a smaller picture is shown so large, every pixel of it a square
CANVAS_SIDE = 384  # the same, where a brush is to be used on it
CSS = """
.mdm-cards { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; min-height: 120px; padding: 4px; }
.mdm-cards figure { margin: 0; padding: 10px; border: 1px solid var(--border-color-primary); border-radius: 10px;
  background: var(--background-fill-primary); display: flex; flex-direction: column; gap: 6px; max-width: 100%; }
.mdm-cards img { max-width: 100%; height: auto; border-radius: 4px; display: block; }
#chat_messages .mdm-bubble img { max-width: min(100%, 320px); width: auto; border-radius: 4px; display: block; }
#chat_messages .mdm-bubble img.mdm-small { width: 144px; height: auto; }
#chat_messages .prose.chatbot { opacity: 1; }
.mdm-cards figcaption { max-width: 240px; font-weight: 600; overflow-wrap: anywhere; }
.mdm-cards small { color: var(--body-text-color-subdued); }
.mdm-cards[data-done="0"] figcaption { font-style: italic; opacity: 0.7; }
.mdm-small { image-rendering: pixelated; }
.mdm-bubble p { margin: 0; overflow-wrap: anywhere; }
.mdm-bubble img + p { margin-top: 8px; }
#canvas canvas { image-rendering: pixelated; }
footer { opacity: 0.6; }
"""
EMPTY = '<div class="mdm-cards"><small>What is made appears here, step by step.</small></div>'


def enlarged_to(image: Image.Image, side: int) -> Image.Image:
    """A picture at least `side` pixels wide and high, every pixel of it a square."""
    factor = max(1, -(-side // min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def on_canvas(picture: Image.Image) -> Image.Image:
    """A picture in the size in which it is painted on."""
    return enlarged_to(picture, CANVAS_SIDE)


def shaded(picture: Image.Image, mask: np.ndarray | None) -> Image.Image:
    """A picture with what is to be made anew in orange."""
    colour = np.asarray(picture.convert("RGB")).astype(np.float32)
    marked = np.ones(colour.shape[:2], bool) if mask is None else mask
    colour[marked] = colour[marked] * 0.35 + np.array([255, 140, 0], np.float32) * 0.65
    return Image.fromarray(colour.round().astype(np.uint8))


class Card(NamedTuple):
    """A picture, what stands below it, a note in small letters, and whether the picture is offered as a file."""

    image: Image.Image | None
    caption: str
    note: str
    is_offered: bool = True


def cards_as_html(cards: Sequence[Card], is_done: bool) -> str:
    """Cards side by side."""
    figures = []
    for image, caption, note, is_offered in cards:
        shown = "" if image is None else _img(image, caption or note)
        words = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        save = ""
        if image is not None and is_offered and is_done:
            save = f' <a download="mdm.png" href="{_data_url(image)}">save</a>'
        figures.append(f"<figure>{shown}{words}<small>{html.escape(note)}{save}</small></figure>")
    return f'<div class="mdm-cards" data-done="{int(is_done)}">{"".join(figures)}</div>'


def bubble(text: str | None, images: Sequence[Image.Image], is_done: bool = True) -> str:
    """A message, or what there is of it yet, as HTML of one line, which Markdown leaves as it is."""
    words = f"<p>{html.escape(text)}</p>" if text else ""
    kind = "mdm-bubble mdm-said" if is_done else "mdm-bubble"
    return f'<div class="{kind}">{"".join(_img(image, "a picture") for image in images)}{words}</div>'


def _img(image: Image.Image, alt: str) -> str:
    side = min(image.size)
    factor = max(1, -(-SHOWN_SIDE // side))
    kind = ' class="mdm-small"' if factor > 1 else ""
    size = f'width="{image.width * factor}" height="{image.height * factor}"'
    return f'<img{kind} src="{_data_url(image)}" {size} alt="{html.escape(alt, quote=True)}">'


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
