"""Claims about handler.py: huggingface_hub's own client gets pictures, captions and answers; a bad request gets a
reason."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from loopback_endpoint import LoopbackEndpoint, as_png
from PIL import Image

from mdm_hf import MDMPipeline, step_calibration
from mdm_hf.publishing import handler as module
from mdm_hf.training.digits import digit_named_in, load_digits_split


CARD = Path(__file__).parents[1] / "model_cards" / "mdm-digits"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory) -> Iterator[LoopbackEndpoint]:
    folder = tmp_path_factory.mktemp("endpoint")
    MDMPipeline.from_pretrained(CARD).save_pretrained(folder)
    shutil.copy(module.__file__, folder / "handler.py")
    with LoopbackEndpoint(folder) as running:
        yield running


@pytest.fixture(scope="module")
def handler(tmp_path_factory) -> module.EndpointHandler:
    folder = tmp_path_factory.mktemp("handler")
    MDMPipeline.from_pretrained(CARD).save_pretrained(folder)
    return module.EndpointHandler(str(folder))


@pytest.fixture
def client(endpoint, monkeypatch) -> InferenceClient:
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)  # what is asked is this machine
    return InferenceClient(model=endpoint.url)


@pytest.fixture(scope="module")
def three() -> bytes:
    images, labels = load_digits_split("heldout")
    return as_png(next(image for image, label in zip(images, labels, strict=True) if label == 3))


def post(endpoint: LoopbackEndpoint, body: dict) -> list[dict]:
    request = urllib.request.Request(endpoint.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def said(*parts: dict) -> dict:
    """A request with one message of these parts."""
    return {"inputs": {"messages": [{"role": "user", "content": list(parts)}]}}


def test_the_client_draws_from_text_and_its_seed_decides(client) -> None:
    one, same, other = (
        client.text_to_image("a handwritten three", num_inference_steps=8, seed=seed) for seed in (0, 0, 1)
    )
    assert one.size == (8, 8)
    assert one.tobytes() == same.tobytes() != other.tobytes()
    wide = client.text_to_image("a handwritten three", height=8, width=16, num_inference_steps=2, guidance_scale=1.0)
    assert wide.size == (16, 8)


def test_the_client_describes_and_asks_about_a_picture(client, three, tmp_path) -> None:
    (tmp_path / "three.png").write_bytes(three)
    assert digit_named_in(client.image_to_text(tmp_path / "three.png").generated_text) == 3
    answers = client.visual_question_answering(tmp_path / "three.png", "which digit is this?", top_k=2)
    assert digit_named_in(answers[0].answer) == 3
    assert len(answers) <= 2
    assert 0 < answers[-1].score <= answers[0].score <= 1


def test_json_gets_texts_and_pictures_of_any_conditions(endpoint, three) -> None:
    picture = base64.b64encode(three).decode()
    few = {"num_inference_steps": 4, "seed": 0}
    both = post(endpoint, {"inputs": {"class": 3}, "parameters": few | {"num_return_sequences": 2}})
    assert len(both) == 2
    with Image.open(io.BytesIO(base64.b64decode(both[0]["images"][0]))) as drawn:
        assert drawn.size == (8, 8)
    assert both[0]["generated_text"]
    [caption] = post(endpoint, {"inputs": picture, "parameters": few})
    assert caption.keys() == {"generated_text"}
    asked = {"image": f"data:image/png;base64,{picture}", "text": "which digit is this?"}
    [said] = post(endpoint, {"inputs": asked, "parameters": {"generate": "text", "seed": 0}})
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "which digit is this?"}]
    messages = [{"role": "user", "content": content}]
    [again] = post(endpoint, {"inputs": {"messages": messages}, "parameters": {"generate": "text", "seed": 0}})
    assert said == again
    assert digit_named_in(said["generated_text"]) == 3


def block_of_hub_md(kind: str) -> str:
    """The one block of docs/hub.md that asks an endpoint in a language."""
    text = (CARD.parents[1] / "docs" / "hub.md").read_text(encoding="utf-8")
    [block] = [one for one in re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL) if "ENDPOINT" in one]
    return block


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_what_hub_md_asks_with_curl_is_answered_as_it_says(endpoint, tmp_path) -> None:
    environment = os.environ | {"ENDPOINT": endpoint.url, "HF_TOKEN": "hf_x", "no_proxy": "127.0.0.1"}
    command = ["bash", "-euc", block_of_hub_md("bash")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    with Image.open(tmp_path / "three.png") as three:
        assert three.size == (8, 8)
    [caption], answers = json.loads("[" + done.stdout.replace("][", "],[") + "]")
    assert digit_named_in(caption["generated_text"]) == digit_named_in(answers[0]["answer"]) == 3
    assert 0 < answers[0]["score"] <= 1


def test_what_hub_md_asks_with_the_client_is_answered_as_it_says(endpoint, client, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENDPOINT", endpoint.url)
    names: dict = {}
    exec(block_of_hub_md("python"), names)
    assert names["three"].size == (8, 8)
    assert digit_named_in(names["caption"]) == digit_named_in(names["answers"][0].answer) == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "Body needs to provide a inputs key"),
        ({"inputs": ""}, "Got no inputs; need a text, a picture or a dict"),
        ({"inputs": " "}, "Got no inputs; need a text, a picture or a dict"),
        ({"inputs": {"text": None}}, "Got inputs {'text': None} with null alone; need some of text, image, class"),
        ({"inputs": {"text": " "}}, "Got an empty text; need one with something in it; leave it out"),
        (said({"type": "text", "text": ""}), "Got an empty text; need one with something in it; leave it out"),
        ({"inputs": "a three", "parameters": {"generate": {"image": 1}}}, "Got generate {'image': 1}; need 'image', "),
        (
            {"inputs": "a three", "parameters": {"max_new_tokens": 3}},
            "Got max_new_tokens with generate 'image', where they would do nothing; need them where a text is made",
        ),
        (
            {"inputs": {"class": 3}, "parameters": {"generate": ["text"], "height": 8, "width": 8}},
            "Got height and width with generate ['text'], where they would do nothing; need them where a picture is",
        ),
        ({"inputs": 3}, "Got inputs 3; need a text, a picture, or a dict of text, image, class, messages"),
        ({"inputs": {"video": "x"}}, "need a text, a picture, or a dict of text"),
        ({"inputs": {"image": "https://example.org/three.png"}}, "which holds no image that Pillow can read"),
        ({"inputs": {"text": {"images": "/etc/passwd"}}}, "Got the text {'images': '/etc/passwd'}; need a string"),
        ({"inputs": {"text": ["a three"] * 1000}}, "Got the text ['a three', 'a three'"),
        ({"inputs": {"class": [3] * 1000}}, "Got the class [3, 3"),
        (said({"type": "image", "path": "/etc/passwd"}), "Got the part {'type': 'image', 'path': '/etc/passwd'}"),
        (
            said({"type": "image", "url": "http://127.0.0.1/"}),
            "need a dict with its type and, under the same name, its",
        ),
        (said({"type": "image", "image": "/etc/passwd"}), "which holds no image that Pillow can read"),
        (said({"type": "image", "image": "", "mask": "/etc/passwd"}), "Got the part {'type': 'image', 'image': ''"),
        (said({"type": "text", "text": 3}), "Got the text 3; need a string"),
        ({"inputs": {"messages": 3}}, "Got the messages 3; need a list of dicts with role and content"),
        ({"inputs": {"image": 3}}, "Got a picture of type int; need base64"),
        ({"inputs": {"messages": ["hello"]}}, "Got the message hello; need a dict with role and content"),
        (
            {"inputs": {"messages": [{"role": "user", "content": "a three", "generate": "text"}]}},
            "Got a message with generate; need role and content alone",
        ),
        (
            said(*[{"type": "text", "text": "a three"}] * 65),
            "Got messages of more than 64 texts, pictures and classes",
        ),
        ({"inputs": {"messages": [{"role": "user", "content": "a"}] * 65}}, "Got messages of more than 64 texts"),
        ({"inputs": {"messages": [{"role": "user", "content": []}] * 65}}, "Got messages of more than 64 texts"),
        ({"inputs": {"messages": [], "text": "a three"}}, "Got messages and other conditions"),
        ({"inputs": "a three", "parameters": [1]}, "Got parameters of type list; need a dict"),
        ({"inputs": "a three", "parameters": {"sampler": "euler"}}, "Got the parameter(s) sampler; need some of"),
        ({"inputs": "a three", "parameters": {"num_return_sequences": 1000}}, "need a whole number from 1 to 16"),
        ({"inputs": "a three", "parameters": {"num_inference_steps": 0}}, "need a whole number from 1 to 200"),
        ({"inputs": "a three", "parameters": {"height": 8}}, "Got one of height and width; need both"),
        ({"inputs": "a three", "parameters": {"height": 8192, "width": 8192}}, "1048576 pixels at most"),
        (
            {"inputs": "a three", "parameters": {"height": 1024, "width": 1024}},
            "looks at one; need 262144 at most; ask for a smaller picture, fewer steps or fewer samples",
        ),
        (
            {"question": "a", "parameters": {"max_new_tokens": 1024, "num_inference_steps": 200}}
            | {"inputs": "a three"},
            "Got 8 sample(s) of 1024 patches and tokens in 200 steps",
        ),
        ({"inputs": "a three", "parameters": {"height": 7, "width": 7}}, "7"),
        ({"inputs": "a three", "parameters": {"negative_prompt": "a four"}}, "Got the parameter(s) negative_prompt"),
        ({"inputs": {"class": 12}}, "12"),
        ({"inputs": "<|image_start|>"}, "<|image_start|>"),
        ({"inputs": "a", "question": "which digit?"}, "which holds no image that Pillow can read"),
        ({"inputs": "a three", "parameters": {"max_new_tokens": 10**12}}, "need a whole number from 1 to 1024"),
        ({"inputs": "a \ud800 b"}, "Got a text with half a character"),
        (said({"type": "text", "text": "a \ud800 b"}), "Got a text with half a character"),
        ({"inputs": "a three", "parameters": []}, "Got parameters of type list; need a dict"),
        ({"inputs": "a three", "parameters": {"height": "8", "width": 8}}, "Got a picture of '8' x 8; need whole"),
        ({"inputs": {"class": "3"}}, "Got the class '3'; need a whole number"),
        ({"inputs": "a three", "seed": 3}, "Got the field(s) seed; need inputs, question and parameters alone"),
        ({"inputs": "a three", "parameters": {"top_k": 3}}, "Got top_k without a question; need both"),
        ({"inputs": "a three", "image": "iVBORw0KGgo"}, "Got image without a question; need both"),
        (
            {"inputs": "x", "question": "which digit?", "parameters": {"generate": "image"}},
            "Got a question with generate 'image'; need 'text'",
        ),
        (
            {"inputs": "a three", "parameters": {"scheduler": "VQDiffusionScheduler"}},
            "`scheduler` is 'VQDiffusionScheduler', which cannot be made from the model's betas",
        ),
    ],
)
def test_a_bad_request_is_refused_with_what_to_send_instead(endpoint, body, message) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(endpoint, body)
    assert refused.value.code == 400
    assert message in json.load(refused.value)["error"]


@pytest.mark.parametrize(
    ("size", "message"), [((5000, 4000), "Got an image of 4000x5000 = 20000000"), ((30_000, 30_000), "900000000")]
)
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(endpoint, monkeypatch, size, message) -> None:
    bomb = as_png(Image.new("1", size))
    assert len(bomb) < 150_000
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(endpoint, {"inputs": {"image": base64.b64encode(bomb).decode()}})
    said = json.load(refused.value)["error"]
    assert message in said
    assert "pixels" in said
    assert "need at most max_pixels = 16777216" in said


def test_an_empty_question_is_refused_and_the_client_says_why(client, three, tmp_path) -> None:
    (tmp_path / "three.png").write_bytes(three)
    with pytest.raises(HfHubHTTPError) as refused:
        client.visual_question_answering(tmp_path / "three.png", " ")
    assert refused.value.response.json() == {"error": "Got the question ' '; need a text."}


def test_a_broken_picture_is_refused_wherever_it_breaks(handler) -> None:
    noise = np.random.default_rng(0).integers(256, size=(32, 32), dtype=np.uint8)
    whole = as_png(Image.fromarray(noise))
    for at in (*range(8, 60), *range(60, len(whole), 97)):
        broken = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
        with contextlib.suppress(ValueError):  # what can be read after all is answered
            handler({"inputs": base64.b64encode(broken).decode(), "parameters": {"num_inference_steps": 1}})


@pytest.mark.parametrize("body", [[1], None, "x"])
def test_a_body_that_is_no_object_is_refused(handler, body) -> None:
    with pytest.raises(ValueError, match="Got a body of type .*; need an object with 'inputs'"):
        handler(body)


def test_a_pictures_bytes_are_a_request(handler) -> None:
    [answer] = handler({"inputs": as_png(Image.new("L", (8, 8)))})
    assert answer["generated_text"]
    with pytest.raises(ValueError, match="which holds no image that Pillow can read"):
        handler({"inputs": b""})


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_picture_in_base64_is_known_in_every_usual_format(handler, form) -> None:
    file = io.BytesIO()
    Image.effect_noise((16, 16), 90).save(file, format=form)
    [answer] = handler({"inputs": base64.b64encode(file.getvalue()).decode()})
    assert answer["generated_text"]


def test_steps_that_the_model_finds_itself_count_as_the_most_they_may_come_to(handler, monkeypatch) -> None:
    assert module.MOST_AUTO_STEPS == step_calibration.MOST_STEPS
    monkeypatch.setattr(handler.pipe.model.generation_config, "num_inference_steps", "auto")
    large = {"inputs": "a three", "parameters": {"height": 256, "width": 256}}
    with pytest.raises(
        ValueError, match=r"^Got 1 sample\(s\) of 16384 patches and tokens in 50 steps, 819200 looks at"
    ):
        handler(large)
