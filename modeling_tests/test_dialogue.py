"""Claims about conversations that are remembered as a state, and about texts of any length."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import CARD, KINDS, batch, generators, tiny_model, tiny_pipeline
from transformers import TextIteratorStreamer, TextStreamer

from mdm_hf import MDMPipeline, MDMProcessor
from mdm_hf.conversation_state import MDMConversationState
from mdm_hf.sequence_layout import image_of_each_row, plan_scans, positions
from mdm_hf.training.assembly import text_splitter
from mdm_hf.training.blocks import split_text
from mdm_hf.training.records import Record, conversation_of, text_part


@pytest.fixture(scope="module")
def pipe() -> MDMPipeline:
    return tiny_pipeline(num_inference_steps=3)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8))


@pytest.mark.parametrize("sharing", ["shared", "independent", "alternate"])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_prefix_read_in_pieces_leaves_the_states_of_one_read_at_once(sharing, size) -> None:
    model, inputs = tiny_model(scan_sharing=sharing), batch(KINDS)
    layout = model.model.layout(inputs["input_ids"], inputs.get("image_grid_hw"), inputs["attention_mask"])
    known = model.model.known_images(layout, inputs.get("pixel_values"), None)
    latents = model.model.encode(layout, inputs["input_ids"], known).mean.float()
    time, has_image = torch.zeros(len(latents), 2), image_of_each_row(layout)

    def read(pieces):
        cache, hidden = model.new_condition_cache(), []
        for mask in pieces:
            index, is_real = positions(mask & ~layout.is_padding)
            part = layout.select(index, is_real)
            plan = plan_scans(model.config, part, has_image)
            held = latents.gather(1, index.unsqueeze(-1).expand(-1, -1, latents.shape[-1]))
            hidden.append(model.model.denoise(held, part, plan, time, inputs["class_ids"], cache)[is_real])
        return cache, hidden

    layout.is_padding = layout.is_padding | layout.is_header  # no condition has a time token
    segments = [layout.segment // size == n for n in range(int(layout.segment.max()) // size + 1)]
    whole, _ = read([torch.ones_like(layout.is_padding)])
    pieces, _ = read(segments)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one.ssm, other.ssm, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.conv, other.conv, atol=1e-5, rtol=1e-4)


TURNS = (
    ({"text": "a small three"}, "text"),
    ({"text": "draw it"}, "image"),
    ({"text": "which digit is this?", "images": picture(1)}, "text"),
    ({}, "text"),
)


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_an_answer_after_a_state_is_that_after_the_whole_conversation(pipe, guidance_scale) -> None:
    options = {"guidance_scale": guidance_scale, "seed": 3}
    chat, messages, sizes = pipe.chat(), [], set()
    for said, generate in TURNS:
        user = pipe.processor.as_messages(**{"text": None, "images": None} | said)
        pause = [] if user else [{"role": "user", "content": []}]
        [whole] = pipe(messages=[*messages, *user, *pause], generate=generate, **options)
        answer = chat(**said, generate=generate, **options)
        assert answer["text"] == whole["text"]
        for one, other in zip(answer["images"], whole["images"], strict=True):
            assert np.abs(np.asarray(one, dtype=int) - np.asarray(other)).max() <= 1
        parts = [{"type": "image", "image": one} for one in answer["images"]]
        parts += [{"type": "text", "text": one} for one in answer["text"]]
        messages += [*user, {"role": "assistant", "content": parts}]
        sizes.add(chat.state.nbytes())
    assert len(sizes) == 1
    read = pipe.processor.as_history(messages)
    assert chat.state.length.tolist() == [read["input_ids"].shape[1]]


def test_the_latents_after_a_state_are_those_after_the_whole_conversation() -> None:
    model, inputs = tiny_model(), batch(["text_to_image", "caption"])
    options = {"num_inference_steps": 4, "generator": generators([0, 1]), "modality_lag": 0.0}
    whole = model.generate(**inputs, **options)
    prefix = ~inputs["target_mask"].bool()
    prefix &= (inputs["target_mask"].flip(1).cumsum(1).flip(1) > 0) & (inputs["attention_mask"] == 1)
    for row in range(2):  # all before the last role is read first
        ids = inputs["input_ids"][row]
        start = int((ids == 15).nonzero()[-1])
        grids, kinds = inputs["image_grid_hw"], ("text_to_image", "caption")
        has_known = kinds[row] == "caption"
        state = model.read_conversation(
            ids[None, :start],
            pixel_values=inputs["pixel_values"] if has_known else None,
            image_grid_hw=grids[:1] if has_known else None,
            class_ids=inputs["class_ids"][row : row + 1],
        )
        real = int(inputs["attention_mask"][row].sum())
        rest = {"input_ids": ids[None, start:real], "target_mask": inputs["target_mask"][row : row + 1, start:real]}
        if not has_known:
            rest["image_grid_hw"] = grids[:1]
        out = model.generate(**rest, state=state, **options | {"generator": generators([row])})
        torch.testing.assert_close(out.latents[0], whole.latents[row, start:real], atol=1e-4, rtol=1e-4)


def test_a_dialogue_goes_on_from_a_file(pipe, tmp_path) -> None:
    chat = pipe.chat()
    with pytest.raises(ValueError, match="Got a dialogue without a turn; need at least one to save"):
        chat.save(tmp_path / "chat.safetensors")
    chat(text="a three", generate="image", seed=0)
    chat.save(tmp_path / "chat.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.safetensors"]
    again = pipe.chat(tmp_path / "chat.safetensors")
    assert again.state.nbytes() == chat.state.nbytes()
    assert again(text="what?", seed=1) == chat(text="what?", seed=1)
    forked = pipe.chat(tmp_path / "chat.safetensors")
    forked(text="what?", seed=1)
    assert forked.state.length.equal(chat.state.length)


def test_a_state_moves_to_another_device_as_a_whole() -> None:
    state = tiny_model().read_conversation(batch(["text"])["input_ids"][:, :2])
    moved = state.to("meta")
    assert {value.device.type for value in moved._tensors().values()} == {"meta"}
    assert {value.device.type for value in state._tensors().values()} == {"cpu"}
    assert moved._tensors().keys() == state._tensors().keys()


def test_a_state_that_fits_nothing_is_refused(pipe, tmp_path) -> None:
    (tmp_path / "broken").write_bytes(b"no tensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    for name in ("absent", "broken"):
        with pytest.raises(
            ValueError, match=f"Got .*{name}, which cannot be read .* that MDMConversationState.save wro"
        ):
            pipe.chat(tmp_path / name)
    with pytest.raises(ValueError, match="a safetensors file of another kind"):
        MDMConversationState.load(tmp_path / "other")
    state = tiny_model().read_conversation(batch(["text"])["input_ids"][:, :2])
    with pytest.raises(
        ValueError, match="Got the state of a model with num_hidden_layers 3 for one with 2; need that"
    ):
        pipe.chat(state)
    model, inputs = tiny_model(), batch(["both", "text"])
    with pytest.raises(ValueError, match=r"Got the state of 1 conversation\(s\) for a batch of 2; need one a row"):
        model.generate(**inputs, state=state)
    with pytest.raises(ValueError, match="`state` is of type str; it must be what `read_conversation` returned"):
        model.generate(**inputs, state="chat")
    with pytest.raises(ValueError, match="Got use_cache=False and a `state`, which is a cache"):
        model.generate(**batch(["text"]), state=state, use_cache=False)
    with pytest.raises(ValueError, match="Got a model with backbone 'transformer', whose conditions all see each"):
        tiny_model(backbone="transformer").read_conversation(batch(["text"])["input_ids"][:, :2])
    with pytest.raises(ValueError, match="Got messages without a part; need at least one to remember"):
        pipe.processor.as_history([{"role": "user", "content": []}])


def test_a_long_text_grows_no_memory_and_streams_what_it_returns(monkeypatch) -> None:
    monkeypatch.setattr(MDMProcessor, "continues", lambda self, sequence: True)  # a model that never ends
    pipe = MDMPipeline.from_pretrained(CARD, device="cpu", num_inference_steps=4)
    pipe.set_progress_bar_config(disable=True)
    chat, streamer = pipe.chat(), TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True)
    text = chat.write(text="a three", max_new_tokens=60, streamer=streamer, seed=0)
    size = chat.state.nbytes()
    assert "".join(streamer).split() == text.split()
    assert 10 < len(pipe.processor.tokenizer(text, add_special_tokens=False)["input_ids"]) <= 60
    chat.write(max_new_tokens=60, seed=1)
    assert chat.state.nbytes() == size
    assert pipe.chat().write(text="a three", max_new_tokens=60, seed=0) == text


def blocks_of(pipe, *blocks: str, last_continues: bool = False):
    """What `generate` would return for these blocks of a text, one after the other."""
    for number, block in enumerate(blocks):
        part = {"type": "text", "text": block, "continues": number < len(blocks) - 1 or last_continues}
        yield pipe.processor.apply_chat_template([{"role": "assistant", "content": [part]}])


def written(blocks) -> SimpleNamespace:
    """The next of the blocks, as `generate` returns it."""
    return SimpleNamespace(sequences=next(blocks)["input_ids"])


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        (None, "a small three draw it a six"),
        ("draw", "a small three draw"),
        ("three dr", "a small three dr"),
        (["never", "it a"], "a small three draw it a"),
    ],
)
def test_a_long_text_ends_where_the_model_ends_it_or_after_a_stop_string(pipe, monkeypatch, stop, wanted) -> None:
    chat, blocks = pipe.chat(), blocks_of(pipe, "a small three", "draw it", "a six")
    monkeypatch.setattr(chat, "_drawer", lambda *a, **o: lambda look: written(blocks))
    assert chat.write(max_new_tokens=100, stop_strings=stop) == wanted


def test_a_long_text_ends_with_its_last_token_and_may_end_in_an_empty_block(pipe, monkeypatch) -> None:
    chat, blocks, asked = pipe.chat(), blocks_of(pipe, "a small three", "draw it", last_continues=True), []

    def generate(*given, max_new_tokens, **options):
        asked.append(max_new_tokens)
        return lambda look: written(blocks)

    monkeypatch.setattr(chat, "_drawer", generate)
    assert chat.write(max_new_tokens=5, block_size=4) == "a small three draw it"
    assert asked == [4, 2]
    chat, blocks = pipe.chat(), blocks_of(pipe, "a small three", "")
    monkeypatch.setattr(chat, "_drawer", lambda *a, **o: lambda look: written(blocks))
    assert chat.write(max_new_tokens=100) == "a small three"
    with pytest.raises(ValueError, match="`max_new_tokens` is 0; it must be a whole number, 1 or more"):
        chat.write(max_new_tokens=0)


def test_a_long_text_has_at_least_its_fewest_tokens() -> None:
    pipe = MDMPipeline.from_pretrained(CARD, device="cpu")
    options = {"text": "which digit is this?", "max_new_tokens": 40, "seed": 0, "num_inference_steps": 4}
    numbers = []
    for least in (0, 40):
        text = pipe.chat().write(min_new_tokens=least, **options)
        numbers.append(len(pipe.processor.tokenizer(text, add_special_tokens=False)["input_ids"]))
    assert numbers[0] < 20
    assert numbers[1] >= 36  # pieces on either side of a block's end may come together


def test_what_the_user_said_is_remembered_where_the_answer_is_empty(pipe, monkeypatch) -> None:
    chat, blocks = pipe.chat(), blocks_of(pipe, "")
    monkeypatch.setattr(chat, "_drawer", lambda *a, **o: lambda look: written(blocks))
    assert chat.write(text="a small three") == ""
    read = pipe.processor.as_history(pipe.processor.as_messages("a small three", None))
    assert chat.state.length.tolist() == [read["input_ids"].shape[1]]


def test_long_answers_are_learnt_in_blocks_that_say_whether_more_comes(pipe) -> None:
    processor, split = pipe.processor, text_splitter(pipe.processor)
    long = "a handwritten three and a small grey six and a drawing of the number 2 and a zero"
    pieces = split(long)
    assert " ".join(pieces) == long
    sizes = [len(processor.tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces]
    assert len(pieces) > 2
    assert max(sizes) <= processor.max_new_tokens
    exact = split_text("b b b b", 2, lambda word: 1)
    assert exact == ["b b", "b b", ""]
    record = Record(messages=[{"role": "user", "content": [text_part("say")]}, {"role": "assistant", "content": []}])
    record.messages[1]["content"] = [text_part(long)]
    seen = set()
    for i in range(40):
        messages = conversation_of(record, "conversation", np.random.default_rng(i), split=split)["messages"]
        inputs = processor.apply_chat_template(messages)
        place = len(messages) - 2
        seen.add(place)
        assert [message["content"][0]["text"] for message in messages[1:]] == pieces[: place + 1]
        assert processor.continues(inputs["input_ids"][0]) == (place < len(pieces) - 1)
        assert (inputs["labels"] >= 0).sum() == processor.max_new_tokens
    assert seen == set(range(len(pieces)))
    plain = conversation_of(Record(captions=[long]), "text", np.random.default_rng(0), split=split)["messages"]
    assert plain[-1]["content"][0]["text"] in pieces


def test_an_answer_is_watched_as_it_forms_and_is_that_of_a_call(pipe) -> None:
    plain, chat, calls = pipe.chat(), pipe.chat(), []
    options = {"generate": "image", "seed": 3, "num_inference_steps": 4}
    looks = list(
        chat.stream("a handwritten three", callback_on_step_end=lambda *step: calls.append(step[1]), **options)
    )
    assert len(looks) == 4
    assert len(calls) == 4
    answer = plain("a handwritten three", **options)
    assert looks[-1]["images"][0].tobytes() == answer["images"][0].tobytes() != looks[0]["images"][0].tobytes()
    assert list(chat.stream("what?", seed=1))[-1] == plain("what?", seed=1)
    assert chat.state.length.equal(plain.state.length)


def test_of_an_answer_that_is_left_while_it_forms_nothing_is_remembered(pipe) -> None:
    chat = pipe.chat()
    chat("a handwritten three", generate="image", seed=3)
    before = chat.state
    looks = chat.stream("what?", seed=1)
    next(looks)
    looks.close()
    assert chat.state is before
    with pytest.raises(ValueError, match="num_inference_steps"):
        list(chat.stream("what?", num_inference_steps=0))
    assert chat.state is before
    looked = iter(range(2))  # two looks, then `next` raises StopIteration
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(chat.stream("what?", seed=1, callback_on_step_end=lambda *step: print(next(looked))))
    assert chat.state is before


def test_a_state_of_other_weights_of_the_same_sizes_is_refused(pipe) -> None:
    state = pipe.chat()
    state(text="a three", seed=0)
    other = copy.deepcopy(pipe.model)
    with torch.no_grad():
        other.latent_head.weight[0, 0] += 1e-3
    stranger = MDMPipeline(other, pipe.processor, device="cpu")
    need = "Got the state of a model with other weights .* need that of the same model"
    with pytest.raises(ValueError, match=need):
        stranger.chat(state.state)
    with pytest.raises(ValueError, match=need):
        other.generate(**batch(["text"]), state=state.state)
    assert pipe.chat(state.state).state is state.state


def renamed(facts, tensors):
    tensors["unseen.0.convs"] = tensors.pop("unseen.0.conv")


def with_nan(facts, tensors):
    tensors["seen.0.ssm"][0, 0, 0, 0] = torch.nan


DAMAGES = {
    "a layer missing": (lambda facts, tensors: tensors.pop("seen.0.ssm"), "'seen.0.ssm'"),
    "has_image missing": (lambda facts, tensors: tensors.pop("has_image"), "'has_image'"),
    "a layer too many": (lambda f, tensors: tensors.update({"seen.9.ssm": torch.zeros(1)}), "unknown seen.9.ssm"),
    "a name": (renamed, "'unseen.0.conv'"),
    "a shape": (lambda f, tensors: tensors.update({"seen.0.ssm": torch.zeros(1, 2)}), r"seen.0.ssm of shape \(1, 2\)"),
    "rows": (lambda f, tensors: tensors.update(length=torch.zeros(2).long()), r"length of shape \(2,\)"),
    "NaN": (with_nan, "seen.0.ssm that holds NaN"),
    "a kind": (lambda f, tensors: tensors.update(length=torch.zeros(1)), "length of torch.float32"),
    "other numbers": (lambda f, tensors: tensors["seen.0.ssm"].neg_(), "tensors that are not those that were written"),
    "a length": (lambda f, tensors: tensors["length"].neg_(), "tensors that are not those that were written"),
    "no sizes": (lambda facts, tensors: facts.pop("sizes"), "'sizes'"),
    "no weights": (lambda facts, tensors: facts.pop("weights"), "'weights'"),
    "no digest": (lambda facts, tensors: facts.pop("contents"), "'contents'"),
    "broken sizes": (lambda facts, tensors: facts.update(sizes="{"), "Expecting property name"),
    "a size missing": (
        lambda f, t: f.update(sizes=json.dumps({k: v for k, v in json.loads(f["sizes"]).items() if k != "expand"})),
        "unknown expand",
    ),
    "a flat tensor": (lambda f, t: t.update({"unseen.0.conv": torch.zeros(1)}), "damaged conversation state"),
    "heads of nothing": (
        lambda f, t: f.update(sizes=json.dumps(json.loads(f["sizes"]) | {"head_dim": 0})),
        "damaged conversation state",
    ),
    "no layers": (
        lambda f, t: f.update(sizes=json.dumps(json.loads(f["sizes"]) | {"num_hidden_layers": 0})),
        "damaged conversation state",
    ),
    "text for a size": (
        lambda f, t: f.update(sizes=json.dumps(json.loads(f["sizes"]) | {"expand": "two"})),
        "damaged conversation state",
    ),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_refused_with_what_is_wrong(pipe, tmp_path, damage, told) -> None:
    chat = pipe.chat()
    chat(text="a three", seed=0)
    chat.save(tmp_path / "chat")
    with safe_open(tmp_path / "chat", "pt") as file:
        facts, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    damage(facts, tensors)
    save_file(tensors, tmp_path / "chat", metadata=facts)
    with pytest.raises(ValueError, match=f"(?s){told}.*need a file that MDMConversationState.save"):
        pipe.chat(tmp_path / "chat")


def test_a_state_that_cannot_be_written_is_refused_and_leaves_nothing(pipe, tmp_path) -> None:
    chat = pipe.chat()
    chat(text="a three", seed=0)
    paths = [tmp_path / "absent" / "chat", tmp_path, tmp_path / ("x" * 300), "", "a\0b", None, 5]
    for path in paths:
        with pytest.raises(ValueError, match="to save a conversation in, which cannot be written .* that is there"):
            chat.save(path)
    assert not [*tmp_path.iterdir()]
    assert not [*tmp_path.parent.glob(".unfinished*")]


def test_a_link_stays_one_when_a_conversation_is_saved_onto_it(pipe, tmp_path) -> None:
    chat = pipe.chat()
    chat(text="a three", seed=0)
    (tmp_path / "link").symlink_to(tmp_path / "chat")
    chat.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert pipe.chat(tmp_path / "chat").state.length.equal(chat.state.length)


def test_a_state_belongs_to_the_adapters_that_are_switched_on(pipe) -> None:
    model = copy.deepcopy(pipe.model)
    adapted = MDMPipeline(model, pipe.processor, device="cpu", num_inference_steps=2)
    adapted.set_progress_bar_config(disable=True)

    def state():
        chat = adapted.chat()
        chat.read([{"role": "user", "content": "a three"}])
        return chat.state

    base = state()
    for name in ("a", "b"):
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False), adapter_name=name)
    model.set_adapter("a")
    of_a = state()
    adapted.chat(of_a)
    model.set_adapter("b")
    for other in (base, of_a):
        with pytest.raises(ValueError, match="Got the state of a model with other weights"):
            adapted.chat(other)
    model.disable_adapters()
    adapted.chat(base)
    with pytest.raises(ValueError, match="with other adapters switched on"):
        adapted.chat(of_a)


def test_what_goes_on_from_a_state_begins_no_conversation(pipe) -> None:
    said = [{"role": "user", "content": "a three"}]
    first = pipe.processor.as_history(said)
    state = pipe.model.read_conversation(**first)
    need = "Got a state and `input_ids` with a class token, which begins a conversation; need what goes on"
    with pytest.raises(ValueError, match=need):
        pipe.model.read_conversation(**first, state=state)
    with pytest.raises(ValueError, match=need):
        pipe.model.generate(**pipe.processor.apply_chat_template(said, generate="text"), state=state)


class Deaf:
    """A streamer that fails at its second `put`."""

    def __init__(self) -> None:
        self.puts = 0

    def put(self, value) -> None:
        self.puts += 1
        if self.puts == 2:
            raise RuntimeError("nobody listens")

    def end(self) -> None:
        raise AssertionError


def test_of_a_text_that_fails_half_way_nothing_is_remembered(pipe, monkeypatch) -> None:
    chat = pipe.chat()
    with pytest.raises(RuntimeError, match="nobody listens"):
        chat.write(text="a three", min_new_tokens=30, max_new_tokens=60, streamer=Deaf(), seed=0)
    assert chat.state is None
    chat(text="a three", seed=0)
    before = chat.state
    monkeypatch.setattr(pipe.model, "read_conversation", fails_at(2, pipe.model.read_conversation))
    with pytest.raises(RuntimeError, match="out of memory"):
        chat(text="which digit is this?", seed=0)  # read, then the answer to it
    assert chat.state is before


def fails_at(number: int, function):
    calls = iter(range(1, number + 1))

    def failing(*given, **options):
        if next(calls) == number:
            raise RuntimeError("out of memory")
        return function(*given, **options)

    return failing


def test_a_picture_is_remembered_at_the_size_that_it_was_drawn_in(pipe) -> None:
    chat, small = pipe.chat(), pipe.chat()
    chat(text="a three", generate="image", image_size=(8, 16), seed=0)
    small(text="a three", generate="image", seed=0)
    assert (chat.state.length - small.state.length).tolist() == [16]  # patches of 2x2 pixels


def test_a_streamer_gets_the_prompt_first_as_from_other_models(capsys) -> None:
    pipe = MDMPipeline.from_pretrained(CARD, device="cpu", num_inference_steps=4)
    pipe.set_progress_bar_config(disable=True)
    tokenizer, options = pipe.processor.tokenizer, {"max_new_tokens": 30, "seed": 0}
    for skips in (True, False):
        streamer = TextStreamer(tokenizer, skip_prompt=skips, skip_special_tokens=True)
        text = pipe.chat().write(text="a small three", streamer=streamer, **options)
        wanted = text if skips else f"a small three {text}"
        assert capsys.readouterr().out.split() == wanted.split()


def test_the_pipelines_own_default_is_that_of_its_conversations(pipe) -> None:
    painter = MDMPipeline(pipe.model, pipe.processor, device="cpu", num_inference_steps=2, generate="image")
    painter.set_progress_bar_config(disable=True)
    assert painter.chat()(text="a three", seed=0)["images"]
    assert painter.chat()(text="a three", generate="text", seed=0)["images"] == []


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda chat: chat(), "Got a first turn in which nothing is said; need a text, images or messages"),
        (
            lambda chat: chat(messages=[{"role": "user", "content": []}]),
            "Got a first turn in which nothing is said; need a text, images or messages",
        ),
        (lambda chat: chat(text="a", canvas={"type": "image"}), "Got canvas in a turn of a conversation; need one"),
        (lambda chat: chat(text="a", class_ids=3), "Got class_ids in a turn of a conversation; need one answer"),
        (lambda chat: chat(text="a", max_new_tokens=600), "Got max_new_tokens=600 .* need at most .* = 512; lower it"),
        (lambda chat: chat.write(text="a", block_size=600), "`block_size` is 600; it must be at most .* = 512, as"),
        (lambda chat: chat(text="a", seed="x"), "`seed` is 'x'; it must be a whole number, 0 or more"),
        (lambda chat: chat.write(text="a", seed=2**64 - 1), r"`seed` is \d+; it must be .*, below 2\*\*63"),
        (lambda chat: chat(text="a", messages=[]), "Got `messages` together with `text` or `images`; need one"),
        (lambda chat: chat(messages="a"), "Got messages of type str; need a list of messages, dicts with 'role'"),
        (lambda chat: chat.read({"role": "user", "content": "a"}), "Got messages of type dict; need a list"),
        (lambda chat: chat.read(["a"]), r"Got \['a'.* as a conversation; need messages"),
        (lambda chat: chat.read([]), "Got messages without a part; need at least one to remember"),
        (lambda chat: chat.pipe.chat(5), "`state` is of type int; it must be what .* name of a file that it was"),
        (lambda chat: chat.write(text="a", stop_strings=""), "`stop_strings` is ''; it must be a string or a list"),
        (lambda chat: chat.write(text="a", stop_strings=[5]), r"`stop_strings` is \[5\]; it must be a string or"),
        (lambda chat: chat.write(text="a", stop_strings=5), "`stop_strings` is 5; it must be a string or a list"),
        (lambda chat: chat.write(text="a", streamer=print), "`streamer` is of type .* it must have `put` and `end`"),
        (lambda chat: chat.write(text="a", generate="image"), "Got generate for a text of any length; need none of"),
        (lambda chat: chat.write(messages=[]), "Got messages for a text of any length; need none of them"),
        (lambda chat: chat.write(text="a", image_size=(8, 8)), "Got image_size for a text of any length; need none"),
        (lambda chat: chat.answer({"role": "user"}), "Got messages of type dict; need a list of messages"),
        (lambda chat: chat.stream(text="a", callback_on_step_end=5), "`callback_on_step_end` is 5; it must be a func"),
        (lambda chat: chat.write(text="a", min_new_tokens=9, max_new_tokens=4), "`min_new_tokens` is 9; it must be"),
        (lambda chat: chat.write(text="a \ud800"), "Got the text .* with half a character at 2 .*lone surrogate"),
        (lambda chat: chat.stream(text="a", generate="bad"), "Got generate with 'bad'; need 'image', 'text' or both"),
    ],
)
def test_a_turn_that_cannot_be_is_refused_before_anything_is_drawn(pipe, monkeypatch, call, told) -> None:
    monkeypatch.setattr(pipe.model, "generate", None)
    chat = pipe.chat()
    with pytest.raises(ValueError, match=told):
        call(chat)
    assert chat.state is None


def test_a_class_is_said_in_the_first_turn(pipe) -> None:
    said = [{"role": "user", "content": [{"type": "class", "class": 3}]}]
    chat = pipe.chat()
    assert chat(messages=said, generate="image", seed=0)["images"]
    with pytest.raises(ValueError, match="Got a class in a conversation that goes on; need it in the first turn"):
        chat(messages=said, generate="image", seed=0)
