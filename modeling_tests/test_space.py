"""Claims about the Space: what its tabs answer, what it says to bad requests, that its users do not meet, and that
each tab works in a browser.

The first half needs no gradio. The second needs the extra `serve`, the last tests selenium and Debian's packages
chromium and chromium-driver too; what is not there skips them. With MDM_SCREENSHOTS=docs/images the browser's pictures
are those of docs/space.md.
"""

import base64
import importlib.util
import io
import os
import re
import runpy
import shutil
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from mdm_hf import MDMPipeline
from mdm_hf.publishing import handler
from mdm_hf.publishing import space_answers as module
from mdm_hf.publishing.space_answers import Answers, Talk, look_as_html, model_of, read_marks
from mdm_hf.publishing.space_html import Card, bubble, cards_as_html, on_canvas, shaded


ROOT = Path(__file__).parents[1]
CARD = ROOT / "model_cards" / "mdm-digits"
SPACE = ROOT / "examples" / "space"
USERS = 20
FEW = 4  # steps
needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")


@pytest.fixture(scope="module")
def pipe() -> MDMPipeline:
    return MDMPipeline.from_pretrained(CARD, num_inference_steps=FEW)


@pytest.fixture(scope="module")
def answers(pipe) -> Answers:
    return Answers(pipe)


@pytest.fixture(scope="module")
def three(pipe) -> Image.Image:
    return pipe(text="a handwritten three", generate="image", seed=0, num_inference_steps=20)[0]["images"][0]


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


NOISE = as_png(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)))
BAD_UPLOADS = {
    "a text named .png": (b"a handwritten three", "holds no image that Pillow can read"),
    "a PNG cut in half": (NOISE[: len(NOISE) // 2], "Got a corrupt image"),
    "a decompression bomb": (
        png_of_size(60_000, 60_000),
        "too many pixels, 3600000000; need at most max_pixels",
    ),
    "a picture too large": (png_of_size(5_000, 4_000), "need at most max_pixels"),
    "an empty file": (b"", "holds no image that Pillow can read"),
}


def pictures_in(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(one))) for one in found]


def test_samples_are_seen_forming_and_end_as_those_of_the_pipeline(answers, pipe, monkeypatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOOKS", 0)
    looks = list(answers.draw("a handwritten three", make="both", seed=3, samples=2))
    assert [look.is_done for look in looks] == [False] * (len(looks) - 1) + [True]
    assert len(looks) == looks[-1].calls == 2 * FEW
    expected = pipe(text="a handwritten three", generate=("image", "text"), seed=3, num_return_sequences=2)
    for got, one in zip(looks[-1].results, expected, strict=True):
        assert got["text"] == one["text"]
        assert got["images"][0].tobytes() == one["images"][0].tobytes()
    assert looks[0].results[0]["images"][0].tobytes() != expected[0]["images"][0].tobytes()


def test_a_seed_at_random_is_shown_and_draws_the_same_again(answers) -> None:
    first = list(answers.draw(class_id=3, make="image", seed=-1))[-1]
    other = list(answers.draw(class_id=3, make="image", seed=None))[-1]
    again = list(answers.draw(class_id=3, make="image", seed=first.seed))[-1]
    assert first.seed != other.seed
    assert first.results[0]["images"][0].tobytes() == again.results[0]["images"][0].tobytes()
    assert f"seed {first.seed}" in look_as_html(first)


def test_the_model_decides_what_a_prompt_calls_for(answers, three) -> None:
    picture = list(answers.draw("a handwritten three", make="auto", seed=0))[-1]
    assert (picture.decided, len(picture.results[0]["images"])) == ("image", 1)
    asked = list(answers.draw("which digit is this?", as_png(three), make="auto", seed=0))[-1]
    assert (asked.decided, asked.results[0]["images"]) == ("text", [])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"make": "a film"}, "Got 'a film' to make; need one of both, image, text, auto"),
        ({"text": 3}, "Got a prompt of type int; need a text"),
        ({"text": "x" * 2001}, "Got a prompt of 2001 characters; need 2000 at most; shorten it"),
        ({"text": "z" * 1500}, "need at most the tokenizer's model_max_length = 512; shorten it"),
        ({"text": "a \ud800 three"}, "half a character"),
        ({"text": "<|image_start|>"}, "Got the control token <|image_start|>"),
        ({"class_id": 12}, "12"),
        ({"samples": 17}, "Got 17 samples; need a whole number from 1 to 16"),
        ({"samples": 1.5}, "Got 1.5 samples"),
        ({"samples": "many"}, "Got 'many' samples"),
        ({"steps": 201}, "Got 201 steps; need a whole number from 1 to 200"),
        ({"steps": 0}, "Got 0 steps"),
        ({"steps": float("nan")}, "Got nan steps"),
        ({"guidance": -1}, "Got the guidance -1; need a number from 0 to 10"),
        ({"guidance": float("nan")}, "Got the guidance nan"),
        ({"seed": 2**40}, "need a whole number, 4294967295 at most"),
        ({"seed": float("inf")}, "Got the seed inf"),
        ({"seed": 1.5}, "Got the seed 1.5"),
    ],
)
def test_a_bad_request_is_refused_with_what_to_do(answers, request_, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        list(answers.draw(**{"text": "a three", "make": "image"} | request_))


def test_one_request_takes_no_more_than_one_of_an_endpoint_may(answers, three, monkeypatch) -> None:
    monkeypatch.setattr(handler, "MOST_WORK", 24 * FEW)  # 16 patches and 8 tokens
    assert list(answers.draw(class_id=3))[-1].is_done
    for ask, looks in (
        (lambda: answers.draw(class_id=3, samples=2), 48 * FEW),
        (lambda: answers.draw(class_id=3, make="image", steps=2 * FEW), 32 * FEW),
        (lambda: answers.edit(three, None, steps=2 * FEW), 32 * FEW),
        (lambda: answers.rewrite("a [small] three", steps=4 * FEW), 32 * FEW),
    ):
        with pytest.raises(ValueError, match=rf"{looks} looks at one; need {24 * FEW} at most; ask for a smaller"):
            list(ask())
    monkeypatch.setattr(handler, "MOST_WORK", 7 * FEW)
    with pytest.raises(ValueError, match=rf"{8 * FEW} looks at one; need {7 * FEW} at most"):
        list(answers.talk(Talk(), "hello", []))


@pytest.mark.parametrize("kind", BAD_UPLOADS)
def test_a_bad_upload_is_refused_with_what_to_do(answers, tmp_path, kind) -> None:
    data, message = BAD_UPLOADS[kind]
    (tmp_path / "picture.png").write_bytes(data)
    with pytest.raises(ValueError, match=message) as refused:
        answers.picture(str(tmp_path / "picture.png"))
    assert str(tmp_path) not in str(refused.value)


def test_what_was_uploaded_is_read_as_a_file_and_never_fetched(answers) -> None:
    with pytest.raises(FileNotFoundError):
        answers.picture("http://127.0.0.1:9/three.png")


def test_characters_that_the_model_cannot_read_are_named(answers) -> None:
    assert answers.unknown_to_model("a handwritten three?") == ""
    assert answers.unknown_to_model("a 三 three 🙂, 三") == "三🙂"
    assert answers.words("  a\n\tthree ") == "a three"
    assert answers.words(" \n") is None


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a [handwritten] three", ("a handwritten three", [(2, 13)])),
        ("[a] small [three]", ("a small three", [(0, 1), (8, 13)])),
        ("a small [...]", ("a small", [(7, None)])),
        ("a [small] one […]", ("a small one", [(2, 7), (11, None)])),
    ],
)
def test_marks_say_which_characters_are_to_be_written_anew(caption, expected) -> None:
    assert read_marks(caption) == expected


@pytest.mark.parametrize(
    "caption", ["", "a three", "a [] three", "a [ ] three", "a [...] three", "a [small three", "a ]["]
)
def test_a_caption_without_a_readable_mark_is_refused(caption) -> None:
    with pytest.raises(ValueError, match="Got .* need "):
        read_marks(caption)


def test_a_caption_is_rewritten_where_it_is_marked_and_nowhere_else(answers, three) -> None:
    for seed in range(3):
        last = list(answers.rewrite("a [handwritten] three", three, seed=seed))[-1]
        [text] = last.results[0]["text"]
        assert text.startswith("a ")
        assert text.endswith(" three")


def painted(picture: Image.Image, left: int, top: int, right: int, bottom: int) -> bytes:
    """What a brush leaves on the canvas over the pixels of a picture."""
    size = on_canvas(picture).size
    scale = size[0] // picture.width
    layer = np.zeros((size[1], size[0], 4), np.uint8)
    layer[top * scale : bottom * scale, left * scale : right * scale] = (255, 140, 0, 255)
    return as_png(Image.fromarray(layer))


def test_what_is_not_painted_stays_bit_by_bit(answers, three) -> None:
    mask = answers.marked_by([painted(three, 1, 0, 4, 3), painted(three, 6, 6, 8, 8)], three)
    expected = np.zeros((8, 8), bool)
    expected[:4, :4] = expected[6:, 6:] = True  # whole patches of 2 x 2
    assert (mask == expected).all()
    assert answers.marked_by([painted(three, 0, 0, 0, 0)], three) is None
    for strength in (1.0, 0.5):
        last = list(answers.edit(three, mask, "a handwritten five", strength, seed=1))[-1]
        before, after = np.asarray(three), np.asarray(last.results[0]["images"][0])
        assert (before[~mask] == after[~mask]).all()
        assert (before[mask] != after[mask]).any()


def test_a_mask_of_another_size_or_none_at_all_is_refused(answers, three) -> None:
    with pytest.raises(ValueError, match="Got a mask of 64x64 over a picture of 384x384; need both of one size"):
        answers.marked_by([NOISE], three)
    whole = painted(three, 0, 0, 4, 4)
    with pytest.raises(ValueError, match="Got a broken mask"):
        answers.marked_by([whole[: len(whole) // 2]], three)
    with pytest.raises(ValueError, match="holds no image"):
        answers.marked_by([b"a mask"], three)
    with pytest.raises(ValueError, match="Got no picture to change"):
        list(answers.edit(None, None))
    with pytest.raises(ValueError, match="Got the strength 0; need a number above 0"):
        list(answers.edit(three, None, strength=0))


def test_a_conversation_is_the_one_that_the_pipeline_holds(answers, pipe, three) -> None:
    chat, talk = pipe.chat(), Talk()
    for text, images, make in (("a handwritten three", [], "image"), ("which digit is this?", [three], "text")):
        asked, *forming, talk = answers.talk(talk, text, [as_png(one) for one in images], make, seed=5)
        expected = chat(text, images or None, generate=make, seed=5)
        assert asked.messages[-1]["role"] == "user"
        assert forming
        assert all("mdm-said" not in look.messages[-1]["content"] for look in forming)
        assert all(look.memory is asked.memory for look in forming)
        assert talk.messages[-1] == {
            "role": "assistant",
            "content": bubble(" ".join(expected["text"]), expected["images"]),
        }
    assert talk.memory.nbytes() == chat.state.nbytes()
    assert [one["role"] for one in talk.messages] == ["user", "assistant"] * 2


def test_a_message_that_cannot_be_answered_leaves_the_conversation_as_it_was(answers, three) -> None:
    *_, talk = answers.talk(Talk(), "a handwritten three", [], "image", seed=0)
    for text, images, message in (
        (None, [], "Got an empty message"),
        ("z" * 1500, [], "shorten it"),
        ("what?", [b"no picture"], "holds no image"),
        ("what?", [as_png(three)] * 5, "Got 5 pictures in a message; need 4 at most"),
    ):
        with pytest.raises(ValueError, match=message):
            list(answers.talk(talk, text, images))
    *_, after = answers.talk(talk, "which digit is this?", [], "text", seed=0)
    *_, same = answers.talk(talk, "which digit is this?", [], "text", seed=0)
    assert after.messages == same.messages
    assert len(after.with_messages(*[{}] * 100).messages) == module.MESSAGES_SHOWN


def test_what_is_shown_is_escaped_and_holds_the_pictures_to_the_bit(three) -> None:
    page = cards_as_html([Card(three, "<script>", 'a "note"'), Card(None, "words", "")], is_done=True)
    assert "<script>" not in page
    assert pictures_in(page)[0].tobytes() == three.tobytes()
    assert 'width="208"' in page
    assert page.count("download=") == 1
    assert "download=" not in cards_as_html([Card(three, "", "")], is_done=False)
    assert "<b>" not in bubble("<b>", [three])
    assert "\n" not in bubble("a", [three])
    half = np.arange(64).reshape(8, 8) < 32
    tinted = np.asarray(shaded(three, half))
    assert (tinted[4:] == np.asarray(three.convert("RGB"))[4:]).all()
    assert (tinted[:4, :, 0] > tinted[:4, :, 2]).all()


def test_examples_are_those_of_the_models_card_or_its_classes(pipe) -> None:
    model = model_of(pipe)
    assert (model.name, model.examples[0]) == ("mdm-digits", {"text": "a handwritten three", "generate": "image"})
    assert Path(next(one["image"] for one in model.examples if "image" in one)).is_file()
    without = SimpleNamespace(model=SimpleNamespace(name_or_path=""), processor=SimpleNamespace(num_classes=2))
    assert model_of(without).examples == [{"class_id": 0}, {"class_id": 1}, {"seed": 1}]
    without.processor.num_classes = None
    assert model_of(without).examples == [{"seed": 1}]


def test_a_name_and_lists_of_kinds_in_card_yaml_are_shown_as_they_are_there(tmp_path) -> None:
    examples = [{"text": "a three", "generate": kinds} for kinds in (["image", "text"], ["text"], "image")]
    (tmp_path / "card.yaml").write_text(yaml.safe_dump({"name": "Digits, drawn", "examples": examples}))
    place = SimpleNamespace(model=SimpleNamespace(name_or_path=str(tmp_path)))
    assert model_of(place).name == "Digits, drawn"
    assert [one["generate"] for one in model_of(place).examples] == ["both", "text", "image"]
    (tmp_path / "card.yaml").write_text("examples: [three]")
    with pytest.raises(ValueError, match="Got the example 'three'; need a mapping"):
        model_of(place)


def test_classes_have_names_where_the_model_has_them(pipe, answers, monkeypatch) -> None:
    assert answers.classes == [str(number) for number in range(10)]
    monkeypatch.setattr(pipe.model.config, "id2label", {number: f"kind {number}" for number in range(10)})
    assert answers.classes[3] == "kind 3"


def test_without_gradio_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "mdm_hf.publishing.space", raising=False)
    with pytest.raises(ImportError, match=r'run: pip install "mdm-hf\[serve\]"'):
        importlib.import_module("mdm_hf.publishing.space")


def test_the_folder_of_the_space_has_what_the_hub_asks_for() -> None:
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    needed = {"title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "app_file", "python_version", "models"}
    assert needed <= set(front)
    assert front["sdk"] == "gradio"
    assert (SPACE / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60
    assert "mdm-hf[serve]" in (SPACE / "requirements.txt").read_text()


# From here on gradio serves.


@pytest.fixture(scope="module")
def space():
    return pytest.importorskip("mdm_hf.publishing.space", reason="gradio is not installed", exc_type=ImportError)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def url(space, pipe, tmp_path_factory) -> Iterator[str]:
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    app = space.build(pipe)
    place = {"server_name": "127.0.0.1", "server_port": free_port(), "quiet": True, "prevent_thread_lock": True}
    _, local, _ = space.launch(app, concurrency=2, **place)  # two at a time, so that they could meet
    yield local
    app.close(verbose=False)


def new_client(url: str):
    from gradio_client import Client

    return Client(url, verbose=False, httpx_kwargs={"timeout": 120})


def drawn(client, text: str | None, seed: int, image=None, class_id: int = -1, make: str = "both", steps: int = FEW):
    page, status, *_ = client.predict(text, image, class_id, make, seed, steps, 1.15, 1, api_name="/generate")
    return page


def test_twenty_users_at_once_get_what_each_would_get_alone(url, answers, pipe) -> None:
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    got: dict[int, tuple] = {}

    def user(number: int) -> None:
        client = new_client(url)
        page = drawn(client, f"a handwritten {names[number % 10]}", seed=number)
        said = {"text": f"a small {names[-1 - number % 10]}", "files": []}
        client.predict(said, "image", number, api_name="/chat")
        messages, *_ = client.predict({"text": "which digit is this?", "files": []}, "text", number, api_name="/chat")
        got[number] = page, messages

    threads = [threading.Thread(target=user, args=(number,)) for number in range(USERS)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{USERS} users, three requests each: {time.monotonic() - started:.1f} s")
    assert sorted(got) == list(range(USERS))
    for number, (page, messages) in got.items():
        look = list(answers.draw(f"a handwritten {names[number % 10]}", seed=number, steps=FEW, guidance=1.15))[-1]
        assert page == look_as_html(look)
        *_, talk = answers.talk(Talk(), f"a small {names[-1 - number % 10]}", [], "image", number)
        *_, talk = answers.talk(talk, "which digit is this?", [], "text", number)
        shown = [(one["role"], one["content"][0]["text"]) for one in messages]
        assert shown == [(one["role"], one["content"]) for one in talk.messages]


def test_one_is_served_at_a_time_and_a_full_queue_refuses_with_a_message(space, pipe, answers, monkeypatch) -> None:
    running, most, stream = [0], [0], pipe.stream

    def counted(*args, **kwargs):
        running[0] += 1
        most[0] = max(most[0], running[0])
        try:
            yield from stream(*args, **kwargs)
        finally:
            running[0] -= 1

    monkeypatch.setattr(pipe, "stream", counted)

    app = space.build(pipe)
    _, local, _ = space.launch(
        app, max_queue=2, server_name="127.0.0.1", server_port=free_port(), quiet=True, prevent_thread_lock=True
    )
    clients = [new_client(local) for _ in range(5)]
    got: list = [None] * 5

    def user(number: int) -> None:
        try:
            got[number] = drawn(clients[number], "a small two", seed=number, make="image", steps=20)
        except Exception as error:
            got[number] = error

    threads = [threading.Thread(target=user, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    app.close(verbose=False)
    monkeypatch.undo()
    assert most == [1]
    refused = [one for one in got if not isinstance(one, str)]
    assert 1 <= len(refused) <= 3
    assert all("ueue is full" in str(one) for one in refused), refused
    for number, page in enumerate(got):
        if isinstance(page, str):
            look = list(answers.draw("a small two", make="image", seed=number, steps=20, guidance=1.15))[-1]
            assert page == look_as_html(look)


@needs_gradio
@pytest.mark.parametrize("tab", ["generate", "chat", "edit"])
@pytest.mark.parametrize("kind", BAD_UPLOADS)
def test_a_bad_upload_gets_a_message_and_the_page_goes_on(client, tmp_path, tab, kind) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    data, message = BAD_UPLOADS[kind]
    (tmp_path / "picture.png").write_bytes(data)
    bad = handle_file(tmp_path / "picture.png")
    send = {
        "generate": lambda: drawn(client, "what is this?", 0, bad, make="text"),
        "chat": lambda: client.predict({"text": "what is this?", "files": [bad]}, "text", 0, api_name="/chat"),
        "edit": lambda: client.predict(bad, api_name="/receive"),
    }
    with pytest.raises(AppError, match=message) as refused:
        send[tab]()
    assert "Traceback" not in str(refused.value)
    assert len(pictures_in(drawn(client, "a three", 0, make="image", steps=1))) == 1


@pytest.fixture
def client(url):
    return new_client(url)


@needs_gradio
def test_a_failure_of_ours_is_logged_and_said_without_a_trace(client, answers, monkeypatch, caplog) -> None:
    from gradio_client.exceptions import AppError

    def broken(*args, **kwargs):
        raise RuntimeError("the secret reason")

    monkeypatch.setattr(answers.pipe, "stream", broken)
    with pytest.raises(AppError, match="Got a failure of the server") as refused:
        drawn(client, "a three", 0, make="image")
    assert "secret" not in str(refused.value)
    assert "the secret reason" in caplog.text
    monkeypatch.undo()
    assert drawn(client, "a three", 0, make="image")


@needs_gradio
def test_limits_hold_for_those_who_call_the_server_without_its_page(client) -> None:
    from gradio_client.exceptions import AppError

    for place, value in ((5, 100_000), (7, 100_000), (6, -1), (4, 2**50)):
        asked = ["a three", None, -1, "image", 0, FEW, 1.15, 1]
        asked[place] = value
        with pytest.raises((AppError, ValueError), match="[Ss]eed|[Vv]alue|need"):
            client.predict(*asked, api_name="/generate")


@needs_gradio
def test_a_picture_is_edited_and_a_caption_rewritten_through_the_server(client, answers, three, tmp_path) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    three.save(tmp_path / "three.png")
    (tmp_path / "mask.png").write_bytes(painted(three, 0, 0, 8, 4))
    (tmp_path / "wrong.png").write_bytes(NOISE)

    def edited(mask: str):
        layers = {"background": None, "layers": [handle_file(tmp_path / mask)], "composite": None}
        return client.predict(layers, "a three", 1.0, 7, FEW, 1.15, api_name="/edit")[0]

    with pytest.raises(AppError, match="Got no picture to change"):
        edited("mask.png")
    client.predict(handle_file(tmp_path / "three.png"), api_name="/receive")
    _, after = pictures_in(edited("mask.png"))
    assert (np.asarray(after)[4:] == np.asarray(three)[4:]).all()
    assert (np.asarray(after)[:4] != np.asarray(three)[:4]).any()
    with pytest.raises(AppError, match="Got a mask of 64x64 over a picture of 384x384"):
        edited("wrong.png")
    text, _ = client.predict("a [handwritten] three", 0, FEW, api_name="/rewrite")
    [expected] = list(answers.rewrite("a [handwritten] three", three, 0, FEW))[-1].results[0]["text"]
    assert text == expected


@needs_gradio
def test_the_file_of_the_space_serves_the_model_that_its_variable_names(space, monkeypatch) -> None:
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert front["sdk_version"] == space.gr.__version__  # what these tests ran with
    shown = []
    monkeypatch.setenv("MDM_MODEL", str(CARD))
    monkeypatch.setattr(space, "launch", shown.append)
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    assert shown[0].title == "mdm-digits"


@needs_gradio
def test_a_port_that_is_taken_is_an_error_that_names_it(space, url) -> None:
    port = int(url.rstrip("/").rpartition(":")[2])
    with pytest.raises(OSError, match=f"{port}"):
        space.serve(str(CARD), port=port)


# From here on a browser looks.


class Page:
    """A page in headless Chromium, asked for what it shows until it shows it."""

    def __init__(self, driver, folder: Path):
        self.driver, self.folder = driver, folder

    def all(self, selector: str) -> list:
        from selenium.webdriver.common.by import By

        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, selector: str, count: int = 1, seconds: float = 90):
        from selenium.webdriver.support.ui import WebDriverWait

        found = WebDriverWait(self.driver, seconds, 0.1).until(
            lambda _: len(self.all(selector)) >= count and self.all(selector),
            f"{count} of {selector}",
        )
        return found[count - 1]

    def wait_for_text(self, selector: str, part: str = "", seconds: float = 90) -> str:
        """The text or value of the first that `selector` finds with `part` in it."""
        from selenium.webdriver.support.ui import WebDriverWait

        def found(_) -> str:
            there = self.all(selector)
            said = [one.get_attribute("value") or one.get_attribute("textContent") for one in there]
            return next((one for one in said if one and part in one), "")

        return WebDriverWait(self.driver, seconds, 0.1).until(found, f"{part!r} in {selector}")

    def write(self, selector: str, text: str) -> None:
        self.wait(f"{selector} textarea, {selector} input[type=text], {selector} input:not([type])").send_keys(text)

    def click(self, selector: str, count: int = 1) -> None:
        self.driver.execute_script("arguments[0].click()", self.wait(selector, count))

    def shot(self, name: str) -> Path:
        self.driver.execute_script("window.scrollTo(0, 0)")
        height = self.driver.execute_script("return document.body.scrollHeight")
        self.driver.set_window_size(1200, min(1700, height + 160))
        time.sleep(0.7)  # what slides into its place
        path = self.folder / f"space_{name}.png"
        assert self.driver.save_screenshot(str(path))
        with Image.open(path) as image:
            image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(path, optimize=True)
        return path


@pytest.fixture(scope="module")
def page(url, tmp_path_factory) -> Iterator[Page]:
    pytest.importorskip("selenium")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("chromium and chromium-driver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars", "window-size=1200,1000"):
        options.add_argument(f"--{argument}")
    folder = os.environ.get("MDM_SCREENSHOTS")
    window = webdriver.Chrome(options, webdriver.ChromeService(driver))
    window.get(url)
    yield Page(window, Path(folder) if folder else tmp_path_factory.mktemp("shots"))
    window.quit()


def test_the_first_tab_draws_in_a_browser(page) -> None:
    page.write("#generate_prompt", "a handwritten three")
    page.click("#make input", 2)  # picture and text
    page.click("#generate_run")
    page.wait("#generate_shown .mdm-cards[data-done='1'] img")
    assert page.all("#generate_shown figcaption")[0].text
    assert page.wait("#generate_shown img").size["width"] > 150  # enlarged
    assert "Done: seed" in page.wait("#generate_status").text
    page.shot("generate")


def test_a_bad_upload_shows_a_message_in_a_browser_and_the_tab_goes_on(page, tmp_path) -> None:
    (tmp_path / "bad.png").write_bytes(BAD_UPLOADS["a text named .png"][0])
    page.wait("#generate_image input[type=file]").send_keys(str(tmp_path / "bad.png"))
    page.wait("#generate_image img[src*='bad.png']")
    page.click("#generate_run")
    page.wait_for_text(".toast-body", "holds no image that Pillow can read")
    assert "Traceback" not in page.driver.page_source
    page.click(".toast-close")
    page.click("#generate_image button[aria-label='Remove Image']")
    page.click("#generate_run")
    page.wait("#generate_shown .mdm-cards[data-done='1'] img")


def test_the_second_tab_talks_in_a_browser(page, three, tmp_path) -> None:
    from selenium.webdriver.common.keys import Keys

    three.resize((256, 256), 0).save(tmp_path / "three.png")
    page.click("#tabs button[role=tab]", 2)
    for turn, (text, file) in enumerate(
        (("a handwritten seven", None), ("which digit is this?", None), ("is this a seven?", "three.png")), start=1
    ):
        if file:
            page.wait("#chat_message input[type=file]").send_keys(str(tmp_path / file))
            page.wait("#chat_message .thumbnail-item img, #chat_message img")
        page.write("#chat_message", text)
        page.write("#chat_message", Keys.ENTER)
        page.wait("#chat_messages .mdm-said", 2 * turn)
    assert page.all("#chat_messages .mdm-said")[1].find_elements("css selector", "img")
    assert page.all("#chat_messages .mdm-said p")[-1].text
    page.shot("chat")
    page.click("#chat_clear")
    page.wait("#chat_messages .placeholder")


def test_the_third_tab_changes_what_a_brush_marks_in_a_browser(page, answers, three, tmp_path) -> None:
    from selenium.webdriver import ActionChains

    three.resize((256, 256), 0).save(tmp_path / "three.png")
    page.click("#tabs button[role=tab]", 3)
    page.wait("#edit_image input[type=file]").send_keys(str(tmp_path / "three.png"))
    canvas = page.wait("#canvas canvas")
    time.sleep(3)
    stroke = ActionChains(page.driver, duration=50).move_to_element_with_offset(canvas, -120, -120).click_and_hold()
    for _ in range(4):
        stroke.move_by_offset(50, 5)
    stroke.release().perform()
    page.write("#edit_prompt", "a handwritten five")
    page.click("#edit_run")
    page.wait("#edit_shown .mdm-cards[data-done='1'] img", 2)
    before, after = (pictures_in(one.get_attribute("outerHTML"))[0] for one in page.all("#edit_shown img"))
    marked = (np.asarray(before)[..., 0].astype(int) - np.asarray(before)[..., 2]) > 60  # orange
    assert 0 < marked.sum() < 64
    sent = np.asarray(answers.picture(str(tmp_path / "three.png")))
    assert (np.asarray(after)[~marked] == sent[~marked]).all()
    page.write("#rewrite_caption", "a [handwritten] three")
    page.click("#rewrite_run")
    text = page.wait_for_text("#rewritten textarea, #rewritten input", "three")
    assert text.startswith("a ")
    assert not page.all(".toast-body")  # brackets are no characters of the caption
    page.shot("edit")
