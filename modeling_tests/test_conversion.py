"""Claims about `mdm convert`: what goes out and comes back has every bit, a block that starts from a Mamba-2 is one,
and a checkpoint that is damaged or hostile is refused in words, runs nothing, and leaves nothing half-written."""

import json
import logging
import os
import pickle
import re
import shutil
import string
import zipfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from tiny import model_with, save_autoencoder, tiny_config, tiny_model
from transformers import AutoTokenizer, Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import Mamba2Block

from mdm_hf import MDMForMultiModalGeneration, MDMImageProcessorPil, MDMPipeline, MDMProcessor
from mdm_hf.cli import main
from mdm_hf.conversion.build_tokenizer import digits_corpus
from mdm_hf.conversion.convert import convert
from mdm_hf.conversion.files import new_file, new_folder, read_folder
from mdm_hf.conversion.keys import KeyTable, check_weights
from mdm_hf.conversion.mamba2 import start_from_mamba2, to_mamba2
from mdm_hf.publishing.examples import checkpoint_hash
from mdm_hf.sequence_layout import ScanPlan
from mdm_hf.training.assembly import freeze
from mdm_hf.training.tokenizer import train_sentencepiece
from mdm_hf.training.trainer import trained_parameters


DIGITS = Path(__file__).parents[1] / "model_cards" / "mdm-digits"
WORDS = (
    "héllo",
    "日本語",
    "🙂",
    "e\u0301",
    "<0x4F>",
    "naïve",
    "a\u200bb",
    "שלום",
    "مرحبا",
    "ﬁne",
    "½",
    "x²",
    "\u00a0",
    "A\tB",
    "12.5%",
)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Same names, dtypes and bits."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def model() -> MDMForMultiModalGeneration:
    return tiny_model()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


def loop_checkpoint(model, path: Path, prefix: str = "module.", strip: str = "model.", **more) -> dict:
    """What a training loop around a wrapped module saves."""
    state = {prefix + name.removeprefix(strip): value for name, value in model.state_dict().items()}
    averaged = {name: value * 0.5 for name, value in state.items()}
    optimizer = {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(3)}}, "param_groups": [{"lr": 1e-4}]}
    fields = {key: value for key, value in model.config.to_dict().items() if key != "transformers_version"}
    held = {"model": state, "ema": averaged, "optimizer": optimizer, "step": 7, "config": fields} | more
    torch.save(held, path)
    return held


def test_a_folder_goes_to_a_pt_and_back_with_every_bit(model, folder, tmp_path) -> None:
    model.model.layers[1].norm.weight.data = model.model.layers[1].norm.weight.data.bfloat16()
    model.save_pretrained(folder)
    convert(folder, tmp_path / "out.pt")
    convert(tmp_path / "out.pt", tmp_path / "back")
    assert equal(load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors"))
    ours, back = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "back"))
    assert ours == back


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("strip", ["", "model."])
def test_a_loops_checkpoint_loads_under_any_wrapper_and_goes_back_whole(model, tmp_path, prefix, strip) -> None:
    held = loop_checkpoint(model, tmp_path / "step.pt", prefix, strip)
    convert(tmp_path / "step.pt", tmp_path / "ours")
    state = MDMForMultiModalGeneration.from_pretrained(tmp_path / "ours").state_dict()
    assert equal(state, {name: value * 0.5 for name, value in model.state_dict().items()})  # the average
    convert(tmp_path / "ours", tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    bare = {f"{name.removeprefix('model.')}": value for name, value in model.state_dict().items()}
    assert equal(again["model"], bare)
    assert equal(again["ema"], {name: value * 0.5 for name, value in bare.items()})
    assert again["step"] == 7
    assert torch.equal(again["optimizer"]["state"][0]["exp_avg"], held["optimizer"]["state"][0]["exp_avg"])
    assert again["optimizer"]["param_groups"] == held["optimizer"]["param_groups"]


@pytest.mark.parametrize(
    "wrapped", [lambda ema: {"shadow": ema, "decay": 0.9}, lambda ema: ema | {"n_averaged": torch.tensor(3)}]
)
def test_averages_are_found_in_their_usual_wrappings(model, tmp_path, wrapped) -> None:
    held = loop_checkpoint(model, tmp_path / "step.pt")
    torch.save(held | {"ema": wrapped(held["ema"])}, tmp_path / "step.pt")
    convert(tmp_path / "step.pt", tmp_path / "ema")
    convert(tmp_path / "step.pt", tmp_path / "raw", use="model")
    ema, raw = (MDMForMultiModalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("ema", "raw"))
    assert equal(raw, model.state_dict())
    assert equal(ema, {name: value * 0.5 for name, value in raw.items()})


def test_bare_weights_take_the_config_and_the_processor_of_a_folder(tmp_path) -> None:
    pipe = MDMPipeline.from_pretrained(DIGITS)
    torch.save(pipe.model.state_dict(), tmp_path / "bare.pt")
    assert main(["convert", str(tmp_path / "bare.pt"), "--to", str(tmp_path / "ours"), "--like", str(DIGITS)]) == 0
    ours = MDMPipeline.from_pretrained(tmp_path / "ours")
    one, other = (p(text="a three", generate="image", num_inference_steps=2, seed=0)[0] for p in (pipe, ours))
    assert one["images"][0].tobytes() == other["images"][0].tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["model"].pop("module.norm.weight"), "weights without model.norm.weight; need all of the model's"),
        (lambda h: h["model"].update({"module.mystery": torch.ones(1)}), "unknown names: mystery; need those of"),
        (lambda h: h["model"].update({"module.layers.0.extra": torch.ones(1)}), "does not have: model.layers.0.extra"),
        (
            lambda h: h["model"].update({"module.norm.weight": torch.ones(5)}),
            r"of shape \[5\]; the config makes it \[32\]",
        ),
        (
            lambda h: h["model"].update({"module.norm.weight": torch.ones(32).int()}),
            "torch.int32; need a dense floating-point",
        ),
        (
            lambda h: h["model"]["module.norm.weight"].fill_(float("nan")),
            "model.norm.weight with values that are not finite",
        ),
        (lambda h: h["config"].update(num_hidden_layers=300_000_000), "weights of 3 blocks and a config of 300000000"),
        (lambda h: h["config"].update(hidden_size=-1), "with a config that is refused"),
        (lambda h: h.pop("config"), "without a config; need one; give a preset or a model's folder with --like"),
        (lambda h: h["model"].update({"module.x": 3}), "'module.x': int; need tensors by name"),
    ],
)
def test_what_does_not_fit_is_named(model, tmp_path, change, message) -> None:
    held = loop_checkpoint(model, tmp_path / "step.pt")
    change(held)
    torch.save(held, tmp_path / "step.pt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "step.pt", tmp_path / "ours", use="model")
    assert [path.name for path in tmp_path.iterdir()] == ["step.pt"]


def test_only_options_that_are_none_of_ours_are_warned_about_in_one_line(model, tmp_path, caplog) -> None:
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        loop_checkpoint(model, tmp_path / "own.pt", config=model.config.to_dict())
        convert(DIGITS, tmp_path / "digits.pt")
        for name in ("own", "digits"):
            convert(tmp_path / f"{name}.pt", tmp_path / name)
        assert caplog.messages == []
        options = {f"option_{i}": i for i in range(9)}
        loop_checkpoint(model, tmp_path / "loop.pt", config=model.config.to_dict() | options)
        convert(tmp_path / "loop.pt", tmp_path / "loop")
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    [said] = caplog.messages
    assert said.endswith(
        "loop.pt: left options that are none of MDMConfig: " + ", ".join(sorted(options)[:5]) + " and 4 more."
    )


def test_an_average_that_is_not_taken_comes_back_as_well(model, tmp_path) -> None:
    weights = model.state_dict()
    average = {name: weight * 0.5 for name, weight in weights.items()}
    torch.save({"model": weights, "ema": {"shadow": average}, "config": model.config.to_dict()}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "ours", use="model")
    convert(tmp_path / "ours", tmp_path / "b.pt")
    back = torch.load(tmp_path / "b.pt", weights_only=True)["ema"]["shadow"]
    assert all(torch.equal(back[name], average[name]) for name in average)


def test_an_average_that_is_not_there_is_not_taken(model, tmp_path) -> None:
    held = loop_checkpoint(model, tmp_path / "step.pt")
    del held["ema"]
    torch.save(held, tmp_path / "step.pt")
    with pytest.raises(ValueError, match="without an average; need one of ema, model_ema in it; use the model"):
        convert(tmp_path / "step.pt", tmp_path / "ours", use="ema")


class Hostile:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["alone", "in optimizer", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(model, tmp_path, where, capsys) -> None:
    path, mark = tmp_path / "step.pt", tmp_path / "mark"
    held = loop_checkpoint(model, path)
    hostile = Hostile(mark) if where == "alone" else held | {"optimizer": {"state": Hostile(mark)}}
    if where == "plain pickle":
        path.write_bytes(pickle.dumps(hostile))
    else:
        torch.save(hostile, path)
    assert main(["convert", str(path), "--to", str(tmp_path / "ours")]) == 2
    said = capsys.readouterr().err
    assert (
        "no archive of torch.save" if where == "plain pickle" else "which could run code, and was not loaded"
    ) in said
    assert [one.name for one in tmp_path.iterdir()] == ["step.pt"]
    with open(path, "rb") as file:  # the test's own: it is hostile
        torch.load(file, weights_only=False) if where != "plain pickle" else pickle.load(file)
    assert mark.is_dir()


def test_an_archive_that_would_unpack_to_more_than_itself_is_refused_unread(model, tmp_path) -> None:
    loop_checkpoint(model, tmp_path / "step.pt")
    with zipfile.ZipFile(tmp_path / "step.pt") as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content + bytes(2**22) if "/data/" in name else content)
    with pytest.raises(ValueError, match="bomb.pt with records of .* bytes in all, more than the file has"):
        convert(tmp_path / "bomb.pt", tmp_path / "ours")


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, cut off, put in or taken out."""
    data = bytearray(content)
    kind = rng.integers(4)
    if kind == 0:
        for place in rng.integers(len(data), size=rng.integers(1, 9)):
            data[place] = rng.integers(256)
    elif kind == 1:
        del data[rng.integers(len(data)) :]
    elif kind == 2:
        place = rng.integers(len(data))
        data[place:place] = rng.bytes(rng.integers(1, 64))
    else:
        place = rng.integers(len(data))
        del data[place : place + rng.integers(1, 64)]
    return bytes(data)


def renamed(held: dict, rng: np.random.Generator) -> dict:
    """A weight renamed, dropped, of another shape or dtype, or a field of the config made something else."""
    state, fields = dict(held["model"]), dict(held["config"])
    name = sorted(state)[rng.integers(len(state))]
    kind = rng.integers(6)
    if kind == 0:
        state[name[: rng.integers(len(name))] + "x" * rng.integers(4)] = state.pop(name)
    elif kind == 1:
        del state[name]
    elif kind == 2:
        state[name] = torch.randn(tuple(rng.integers(1, 9, size=rng.integers(4))))
    elif kind == 3:
        state[name] = state[name].to([torch.int8, torch.complex64, torch.bool][rng.integers(3)])
    elif kind == 4:
        state[name] = [None, "text", 3, [1, 2], {"a": torch.ones(1)}][rng.integers(5)]
    else:
        field = sorted(fields)[rng.integers(len(fields))]
        fields[field] = [None, -1, 0, 2**40, "text", [], {"a": 1}, 1e300][rng.integers(8)]
    return held | {"model": state, "config": fields}


def refusal(source: Path, target: Path, **more) -> str | None:
    """What a conversion was refused with; None of one that was made. Other errors are the test's."""
    try:
        convert(source, target, **more)
    except (ValueError, OSError) as error:
        return str(error) or "no word"
    return None


def test_a_thousand_damaged_checkpoints_crash_nothing_run_nothing_and_leave_nothing_half(tmp_path) -> None:
    torch.manual_seed(0)
    model = MDMForMultiModalGeneration(
        tiny_config(
            hidden_size=16,
            num_hidden_layers=1,
            vae_config={
                "vocab_size": 20,
                "num_channels": 1,
                "latent_size": 2,
                "hidden_size": 4,
                "num_hidden_layers": 1,
            },
        )
    )
    place = tmp_path / "place"
    place.mkdir()
    path = place / "step.pt"
    held = loop_checkpoint(model, path)
    del held["ema"]
    torch.save(held, path)
    content, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for trial in range(1000):
        if trial % 2:
            torch.save(renamed(held, rng), path)
        else:
            path.write_bytes(mutated(content, rng))
        if error := refusal(path, place / "ours"):
            refused += 1
            assert [one.name for one in place.iterdir()] == ["step.pt"], (trial, error)
        else:
            back = load_file(place / "ours" / "model.safetensors")
            assert len(back) == len(held["model"])
            for one in sorted((place / "ours").rglob("*"), reverse=True):
                one.unlink() if one.is_file() else one.rmdir()
            (place / "ours").rmdir()
    assert 300 < refused < 1000
    assert [one.name for one in tmp_path.iterdir()] == ["place"]


def test_damaged_safetensors_and_tokenizers_are_refused_in_words(model, tmp_path) -> None:
    save_file(to_mamba2(model), tmp_path / "mamba.safetensors")
    (tmp_path / "spm.model").write_bytes(train_sentencepiece(digits_corpus(), 384, "jq!'-:;", 1))
    model.config.save_pretrained(tmp_path / "like")
    rng, here = np.random.default_rng(0), sorted(one.name for one in tmp_path.iterdir())
    for name, more in (("mamba.safetensors", {"like": str(tmp_path / "like"), "kind": "mdm"}), ("spm.model", {})):
        content = (tmp_path / name).read_bytes()
        for trial in range(60):
            (tmp_path / name).write_bytes(mutated(content, rng))
            error = refusal(tmp_path / name, tmp_path / "ours", overwrite=True, **more)
            left = sorted(one.name for one in tmp_path.iterdir() if one.name != "ours")
            assert left == here, (name, trial, error)


def mamba2() -> Mamba2ForCausalLM:
    """transformers' own, of the tiny model's sizes."""
    torch.manual_seed(1)
    config = Mamba2Config(
        hidden_size=32,
        num_hidden_layers=3,
        state_size=8,
        head_dim=16,
        num_heads=4,
        n_groups=1,
        expand=2,
        vocab_size=20,
    )
    other = Mamba2ForCausalLM(config)
    for name, value in other.named_parameters():
        if not name.endswith("A_log"):
            torch.nn.init.normal_(value, std=0.3)
    return other


@pytest.mark.parametrize("form", ["folder", "pt"])
def test_a_block_that_starts_from_a_mamba2_computes_what_it_does(tmp_path, form) -> None:
    other = mamba2()
    tiny_model(scan_directions=[1, 1]).save_pretrained(tmp_path / "like")
    source = tmp_path / ("theirs" if form == "folder" else "theirs.pt")
    if form == "folder":
        other.save_pretrained(source)
    else:
        torch.save(other.state_dict(), source)
    assert main(["convert", str(source), "--to", str(tmp_path / "ours"), "--like", str(tmp_path / "like")]) == 0
    ours = MDMForMultiModalGeneration.from_pretrained(tmp_path / "ours").double()
    length = 37
    x = torch.randn(2, length, 32, dtype=torch.float64)
    steps = torch.arange(length).view(1, -1, 1).expand(2, -1, 1)
    real = torch.ones(2, length, 1, dtype=torch.bool)
    plan = ScanPlan(steps, steps, real, real, ~real, ~real, torch.full((2,), length - 1), None)
    for i in range(3):
        block = other.double().backbone.layers[i]
        assert isinstance(block, Mamba2Block)
        theirs, mine = block(x), ours.model.layers[i](x, plan)
        assert torch.allclose(theirs, mine, rtol=1e-4, atol=1e-5), (theirs - mine).abs().max()
    assert torch.equal(other.float().backbone.norm_f.weight, ours.float().model.norm.weight)
    like = load_file(tmp_path / "like" / "model.safetensors")
    assert torch.equal(like["latent_head.weight"], ours.latent_head.weight)


def test_every_direction_of_a_mamba2_start_gives_the_mamba2_back_with_every_bit(tmp_path) -> None:
    other = mamba2()
    weights = {n: v for n, v in other.state_dict().items() if "embeddings" not in n and "lm_head" not in n}
    model = tiny_model()
    start_from_mamba2(model, weights)
    model.save_pretrained(tmp_path / "ours")
    for direction in range(4):
        target = tmp_path / f"{direction}.safetensors"
        convert(tmp_path / "ours", target, direction=direction)
        assert equal(load_file(target), weights)
    with pytest.raises(ValueError, match="Got direction 4 of a model with 4 .*; need one of its directions"):
        convert(tmp_path / "ours", tmp_path / "4.safetensors", direction=4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 64}, r"model.layers.\d.*of shape .*; the config makes it"),
        ({"num_hidden_layers": 4}, "weights without model.layers.3"),
        ({"num_hidden_layers": 2}, "does not have: model.layers.2"),
        ({"state_size": 16}, "of shape .*; the config makes it"),
        ({"scan_sharing": "independent"}, "need 'mamba' blocks whose directions share their projections"),
        ({"backbone": "transformer"}, "Got a model with backbone 'transformer'"),
    ],
)
def test_a_mamba2_of_other_sizes_is_refused_by_name(overrides, message) -> None:
    weights = {n: v for n, v in mamba2().state_dict().items() if "embeddings" not in n and "lm_head" not in n}
    with pytest.raises(ValueError, match=message):
        start_from_mamba2(tiny_model(**overrides), weights)


def test_a_mamba2_with_more_groups_is_refused(tmp_path) -> None:
    mamba2().save_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"n_groups": 2}))
    with pytest.raises(ValueError, match="with n_groups 2; a block of MDM computes with 1"):
        convert(tmp_path / "theirs", tmp_path / "ours", like="mdm-digits")


@pytest.mark.parametrize("class_name", ["AutoencoderKL", "VQModel"])
def test_an_autoencoder_goes_in_and_comes_out_with_every_bit(tmp_path, class_name) -> None:
    save_autoencoder(tmp_path / "vae", class_name)
    model_with(tmp_path / "vae", vae_config=tiny_config().vae_config.to_dict()).save_pretrained(tmp_path / "like")
    convert(tmp_path / "vae", tmp_path / "ours", like=str(tmp_path / "like"))
    ours = MDMForMultiModalGeneration.from_pretrained(tmp_path / "ours")
    assert equal(ours.state_dict(), MDMForMultiModalGeneration.from_pretrained(tmp_path / "like").state_dict())
    convert(tmp_path / "ours", tmp_path / "out", kind="autoencoder")
    name = "diffusion_pytorch_model.safetensors"
    assert equal(load_file(tmp_path / "vae" / name), load_file(tmp_path / "out" / name))
    theirs, back = (json.loads((tmp_path / at / "config.json").read_text()) for at in ("vae", "out"))
    assert {k: v for k, v in theirs.items() if k[0] != "_"} == {k: v for k, v in back.items() if k[0] != "_"}


def save_deeper_autoencoder(folder) -> None:
    """One of 4 pixels to a latent, twice those of `save_autoencoder`."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    save_autoencoder(folder, block_out_channels=(8, 8, 8), **blocks)


def save_with_processor(model, folder, side: int) -> None:
    """A model with the tokenizer of mdm-digits and pictures of its own size."""
    images = MDMImageProcessorPil.for_model(model.config, size={"height": side, "width": 2 * side})
    tokenizer = AutoTokenizer.from_pretrained(DIGITS)
    MDMPipeline(model, MDMProcessor(images, tokenizer, max_new_tokens=4, num_classes=10)).save_pretrained(folder)


@pytest.mark.parametrize("way", ["deeper", "shallower"])
def test_another_autoencoder_takes_the_place_of_one_and_the_processor_fits_it(tmp_path, way) -> None:
    save_autoencoder(tmp_path / "shallow")
    save_deeper_autoencoder(tmp_path / "deep")
    old, new = ("shallow", "deep") if way == "deeper" else ("deep", "shallow")
    model = model_with(tmp_path / old, vae_config=tiny_config().vae_config.to_dict() | {"vocab_size": 384})
    save_with_processor(model, tmp_path / "like", side=model.config.pixel_patch_size * 3)
    convert(tmp_path / new, tmp_path / "ours", like=str(tmp_path / "like"))
    pipe = MDMPipeline.from_pretrained(tmp_path / "ours")
    images, patch = pipe.processor.image_processor, 8 if way == "deeper" else 4
    assert images.patch_size == pipe.model.config.pixel_patch_size == patch
    assert images.downsampling == pipe.model.config.pixel_downsampling == patch // 2
    assert (images.size.height, images.size.width) == (3 * patch, 6 * patch)
    made = pipe(generate="image", num_inference_steps=1, seed=0)[0]["images"][0]
    assert made.size == (6 * patch, 3 * patch)
    ours, theirs = pipe.model.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if ".pixel_autoencoder." not in name)


def test_an_autoencoder_of_other_channels_than_the_weights_take_says_what_to_give_instead(tmp_path) -> None:
    save_autoencoder(tmp_path / "vae")
    message = "vae with latents of 4 channels and --like .*mdm-digits, whose weights take patches of 1; need as many; "
    with pytest.raises(ValueError, match=message + "give --like a preset or a folder without weights, or another"):
        convert(tmp_path / "vae", tmp_path / "ours", like=str(DIGITS))
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    shutil.copytree(DIGITS, tmp_path / "untrained", ignore=shutil.ignore_patterns("*.safetensors"))
    convert(tmp_path / "vae", tmp_path / "ours", like=str(tmp_path / "untrained"))
    images = MDMProcessor.from_pretrained(tmp_path / "ours").image_processor
    assert (images.num_channels, images.patch_size, images.size.height) == (3, 4, 16)


VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def like(tmp_path) -> str:
    """A model that an autoencoder of 4 latent channels may go into."""
    tiny_model(vae_config=tiny_config().vae_config.to_dict() | {"num_channels": 4}).save_pretrained(tmp_path / "like")
    return str(tmp_path / "like")


@pytest.mark.parametrize("class_name", ["AutoencoderKL", "VQModel"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("decoder.conv_in.bias"),
            r"vae without the weights decoder\.conv_in\.bias; need those of",
        ),
        (lambda w: w.update(mystery=torch.ones(1)), r"vae with weights of unknown names: mystery; need those of its"),
        (lambda w: w["decoder.conv_in.bias"].fill_(float("nan")), r"not finite in decoder\.conv_in\.bias; need those"),
        (lambda w: w["decoder.conv_in.bias"][:1].fill_(float("inf")), r"not finite in decoder\.conv_in\.bias; need"),
        (lambda w: w.update({"decoder.conv_in.bias": torch.ones(3)}), r"of which no .* can be loaded .*shape"),
    ],
)
def test_an_autoencoder_whose_weights_are_not_whole_is_refused(tmp_path, like, class_name, change, message) -> None:
    save_autoencoder(tmp_path / "vae", class_name)
    weights = load_file(tmp_path / "vae" / VAE_WEIGHTS)
    change(weights)
    save_file(weights, tmp_path / "vae" / VAE_WEIGHTS)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "vae", tmp_path / "ours", like=like)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["like", "vae"]


@pytest.mark.parametrize("class_name", ["AutoencoderKL", "VQModel"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"scaling_factor": "text"},
            "scaling_factor 'text'; it must be a finite number above 0; take the config.json",
        ),
        ({"scaling_factor": float("nan")}, "scaling_factor nan; it must be a finite number above 0"),
        ({"scaling_factor": 0}, "scaling_factor 0; it must be a finite number above 0"),
        ({"scaling_factor": -0.5}, "scaling_factor -0.5; it must be a finite number above 0"),
        ({"scaling_factor": True}, "scaling_factor True; it must be a finite number above 0"),
        ({"scaling_factor": None}, "a config without scaling_factor"),
        ({"latent_channels": "4"}, "latent_channels '4'; it must be a whole number, 1 or more"),
        ({"norm_num_groups": 0}, "of whose config no .* can be built .ZeroDivisionError"),
    ],
)
def test_an_autoencoder_with_a_setting_that_cannot_be_is_refused(
    tmp_path, like, class_name, setting, message, capsys
) -> None:
    save_autoencoder(tmp_path / "vae", class_name)
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | setting))
    assert main(["convert", str(tmp_path / "vae"), "--to", str(tmp_path / "ours"), "--like", like]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["like", "vae"]


def texts() -> list[str]:
    """315 strings: words, odd characters, and mixtures with white space of all sorts."""
    rng = np.random.default_rng(0)
    parts = [*WORDS, *string.punctuation, *(sentence for sentence in digits_corpus()[:40])]
    joints = (" ", "  ", "\n", "\t", "", " ▁ ")
    made = list(parts)
    while len(made) < 315:
        some = [parts[i] for i in rng.integers(len(parts), size=rng.integers(1, 5))]
        made.append(joints[rng.integers(len(joints))].join(some) + joints[rng.integers(len(joints))])
    return made[:315]


def test_a_tokenizer_goes_to_sentencepiece_and_back_and_315_strings_have_the_same_ids(tmp_path) -> None:
    convert(DIGITS, tmp_path / "spm.model")
    convert(tmp_path / "spm.model", tmp_path / "back")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    ours, back = AutoTokenizer.from_pretrained(DIGITS), AutoTokenizer.from_pretrained(tmp_path / "back")
    assert ours.backend_tokenizer.to_str() == back.backend_tokenizer.to_str()
    strings = texts()
    assert len(strings) == 315
    for text in strings:
        ids = ours(text)["input_ids"]
        assert theirs.encode(text) == ids == back(text)["input_ids"], text
        assert theirs.decode(ids) == ours.decode(ids), text


def test_a_sentencepiece_model_without_our_control_tokens_is_refused(tmp_path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(digits_corpus()), model_prefix=str(tmp_path / "plain"), vocab_size=90, minloglevel=2
    )
    with pytest.raises(ValueError, match="no unigram model that begins with the control tokens <pad>"):
        convert(tmp_path / "plain.model", tmp_path / "ours")


def test_bfloat16_rounds_what_may_be_rounded_and_keeps_the_rest(tmp_path) -> None:
    convert(DIGITS, tmp_path / "half", dtype="bfloat16")
    whole, half = load_file(DIGITS / "model.safetensors"), load_file(tmp_path / "half" / "model.safetensors")
    for name, value in half.items():
        in_float = name.endswith(("A_log", "dt_bias", ".D"))
        assert value.dtype == (torch.float32 if in_float else torch.bfloat16), name
        assert torch.equal(value, whole[name].to(value.dtype)), name
    assert {"tokenizer.json", "card.yaml", "demo.png"} <= {p.name for p in (tmp_path / "half").iterdir()}
    made = MDMPipeline.from_pretrained(tmp_path / "half")(text="a three", num_inference_steps=2, seed=0)
    assert made[0]["images"]


MEASURED = {"README.md", "examples", "examples.json", "scores.json"}


def test_a_copy_in_another_dtype_claims_nothing_that_the_other_weights_were_measured_to_do(tmp_path, capsys) -> None:
    half = tmp_path / "half"
    assert main(["convert", str(DIGITS), "--to", str(half), "--dtype", "bfloat16"]) == 0
    assert not MEASURED & {path.name for path in half.iterdir()}
    said = capsys.readouterr().out
    assert "left out README.md, examples, examples.json, scores.json" in said
    assert "which are of the other weights: `mdm card` tells of these" in said
    assert main(["card", str(half)]) == 0
    text = (half / "README.md").read_text()
    assert "## Scores" not in text
    assert "## What it makes" in text


@pytest.mark.parametrize("options", [{"max_shard_size": "500KB"}, {"dtype": "float32"}])
def test_a_copy_of_the_same_weights_keeps_their_card(tmp_path, options) -> None:
    assert "left out" not in convert(DIGITS, tmp_path / "copy", **options)
    assert {path.name for path in (tmp_path / "copy").iterdir()} >= MEASURED


def test_the_average_of_a_training_stays_with_its_weights_and_is_no_part_of_their_hash(folder, tmp_path) -> None:
    before = checkpoint_hash(folder)
    save_file({"0": torch.zeros(3)}, folder / "ema.safetensors")
    assert checkpoint_hash(folder) == before
    convert(folder, tmp_path / "shards", max_shard_size="50KB")
    assert (tmp_path / "shards" / "ema.safetensors").is_file()
    assert checkpoint_hash(tmp_path / "shards") == before
    assert "left out ema.safetensors" in convert(folder, tmp_path / "half", dtype="bfloat16")
    assert not (tmp_path / "half" / "ema.safetensors").exists()


def test_shards_hold_the_same_bits_and_become_one_file_again(tmp_path) -> None:
    convert(DIGITS, tmp_path / "shards", max_shard_size="500KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    convert(tmp_path / "shards", tmp_path / "one")
    assert equal(load_file(DIGITS / "model.safetensors"), load_file(tmp_path / "one" / "model.safetensors"))
    assert not list((tmp_path / "one").glob("*index.json"))


def test_a_table_of_names_reads_the_same_both_ways() -> None:
    table = KeyTable(("a.{i}.w", "b.{i}.weight"), ("c.{rest}", "d.{rest}"))
    names = ["a.0.w", "a.12.w", "c.x.y"]
    assert table.to_ours(names) == {"a.0.w": "b.0.weight", "a.12.w": "b.12.weight", "c.x.y": "d.x.y"}
    assert list(table.to_theirs(table.to_ours(names).values()).values()) == names
    with pytest.raises(ValueError, match="unknown names: a.x.w, e; need those of a.{i}.w"):
        table.to_ours(["a.x.w", "e"])
    with pytest.raises(ValueError, match="several become d.x"):
        KeyTable(("a.{rest}", "d.{rest}"), ("c.{rest}", "d.{rest}")).to_ours(["a.x", "c.x"])


def test_many_wrong_names_are_counted() -> None:
    with pytest.raises(ValueError, match="weights without w0, w1, w2, w3, w4 and 3 more"):
        check_weights({}, {f"w{i}": torch.ones(1) for i in range(8)})


@pytest.mark.parametrize("make", [new_folder, new_file])
def test_what_fails_halfway_leaves_what_was_there(tmp_path, make: Callable) -> None:
    target = tmp_path / "target"
    if make is new_folder:
        target.mkdir()
        (target / "old").write_text("old")
    else:
        target.write_text("old")
    with pytest.raises(ValueError, match="which is there; need a new name; give one, or --overwrite"), make(target):
        pass

    def write_half() -> None:
        with make(target, overwrite=True) as unfinished:
            (unfinished / "new" if unfinished.is_dir() else unfinished).write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert [one.name for one in tmp_path.iterdir()] == ["target"]
    assert (target / "old" if target.is_dir() else target).read_text() == "old"


@pytest.mark.parametrize("name", ["out", "out.pt"])
def test_a_place_where_nothing_can_be_made_is_refused_by_its_name(folder, tmp_path, name) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match=f"Got .*{name} to write, but nothing can be made in .*file .*; need a place"):
        convert(folder, tmp_path / "file" / name)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_file_of_a_kind_that_nothing_becomes_is_refused_unless_a_folder_is_meant(folder, tmp_path) -> None:
    target = tmp_path / "weights.json"
    with pytest.raises(
        ValueError, match=r"weights.json, a file of a kind .* or a file in .pt, .*--as mdm for a folder"
    ):
        convert(folder, target)
    assert not target.exists()
    convert(folder, target, kind="mdm")
    assert (target / "model.safetensors").is_file()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("goes", ["folder", "file", "nowhere"])
def test_a_symbolic_link_is_no_place_and_the_message_says_why(folder, tmp_path, goes, overwrite) -> None:
    there = tmp_path / "there"
    if goes == "folder":
        there.mkdir()
        (there / "kept.txt").write_text("kept")
    elif goes == "file":
        there.write_text("kept")
    link = tmp_path / ("link.pt" if goes == "file" else "link")
    link.symlink_to(there)
    message = "which is a symbolic link to .*there; need a fi|which is a symbolic link to .*there; need a fo"
    with pytest.raises(ValueError, match=message) as refused:
        convert(folder, link, overwrite=overwrite)
    assert f"would replace the link and leave what it points to as it was; give {there}, or" in str(refused.value)
    assert link.readlink() == there
    assert {path.name for path in tmp_path.iterdir()} - {"there"} == {"ours", link.name}
    assert there.exists() == (goes != "nowhere")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_everything_that_is_written_has_the_mode_that_the_umask_asks_for(tmp_path, umask) -> None:
    before = os.umask(umask)
    try:
        convert(DIGITS, tmp_path / "shards", max_shard_size="1MB")
        for name in ("out.pt", "out.safetensors", "out.model"):
            convert(DIGITS, tmp_path / name)
    finally:
        os.umask(before)
    made = list(tmp_path.rglob("*"))
    assert len([path for path in made if path.suffix == ".safetensors"]) > 2
    for path in made:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, "nothing, which is not there; check the spelling"),
        ("folder/x", b"", "folder, which is nothing that is known here; need a .pt, a .model"),
        ("folder/config.json", b"{", "config.json, which is no JSON"),
        ("step.pt", b"", "step.pt, which is no archive of torch.save"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, capsys, name, content, message) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    source = path.parent if path.parent != tmp_path else path
    assert main(["convert", str(source), "--to", str(tmp_path / "ours")]) == 2
    assert message in capsys.readouterr().err


def test_a_conversion_that_there_is_not_is_refused(tmp_path, folder) -> None:
    mamba2().save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="for which there is no conversion; need one end of it to be a model of ours"):
        convert(tmp_path / "theirs", tmp_path / "out.pt")
    with pytest.raises(ValueError, match="a part of a model; need the rest; give --like FOLDER or PRESET"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(ValueError, match="without a pixel autoencoder; need a model that has one"):
        convert(folder, tmp_path / "out", kind="autoencoder")


@pytest.mark.parametrize("frozen", [None, "encoder", "vae"])
def test_the_trainers_own_average_goes_out_with_its_weights(model, folder, tmp_path, frozen) -> None:
    trained = freeze(tiny_model(), "diffusion", {"freeze": frozen})
    averaged = [parameter * 0.5 for parameter in trained_parameters(trained)]
    save_file({str(i): value.detach().contiguous() for i, value in enumerate(averaged)}, folder / "ema.safetensors")
    convert(folder, tmp_path / "out.pt")
    held = torch.load(tmp_path / "out.pt", weights_only=True)
    is_trained = {name.removeprefix("model."): p.requires_grad for name, p in trained.named_parameters()}
    assert {name for name, value in held["ema"].items() if not torch.equal(value, held["model"][name])} <= {
        name for name, yes in is_trained.items() if yes
    }
    for name, yes in is_trained.items():
        assert torch.equal(held["ema"][name], held["model"][name] * (0.5 if yes else 1.0)), name


def test_an_average_of_another_model_is_refused(folder, tmp_path) -> None:
    save_file({"0": torch.zeros(3), "1": torch.zeros(2, 2)}, folder / "ema.safetensors")
    with pytest.raises(ValueError, match="2 numbered weights, which are those of no stage of this model"):
        convert(folder, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_weights_of_an_earlier_saving_beside_the_models_are_not_read(model, folder, tmp_path) -> None:
    stale = {name: value + 1 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(stale, folder / "model-00001-of-00001.safetensors")
    convert(folder, tmp_path / "out.pt")
    held = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    assert equal(held, {name.removeprefix("model."): value for name, value in model.state_dict().items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["weight_map"].popitem(), "without"),
        (
            lambda index: index["weight_map"].update({"model.norm.weight": "../elsewhere.safetensors"}),
            "no file beside",
        ),
        (lambda index: index["weight_map"].update({"model.norm.weight": "lost.safetensors"}), "no file beside"),
        (
            lambda index: index["weight_map"].update({"other": index["weight_map"]["model.norm.weight"]}),
            "other, which",
        ),
        (lambda index: index.pop("weight_map"), "cannot be followed"),
        (lambda index: index["weight_map"].clear(), "cannot be followed .it names no weights"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(model, tmp_path, change, message) -> None:
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    path = tmp_path / "shards" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "shards", tmp_path / "out.pt")


def test_two_files_that_could_be_meant_are_refused(tmp_path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="with a.safetensors, b.safetensors; need model.safetensors, its shards"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; a block of MDM computes with 'silu'"),
        ({"use_bias": True}, "use_bias True; a block of MDM computes with False"),
        ({"use_conv_bias": False}, "use_conv_bias False"),
        ({"time_step_limit": [0.001, 0.1]}, r"time_step_limit \[0.001, 0.1\]"),
        ({"time_step_limit": "text"}, r"time_step_limit 'text'; a block of MDM computes with \[0.0, inf\]"),
        ({"time_step_limit": [0.0, 1.0, 2.0]}, r"time_step_limit \[0.0, 1.0, 2.0\]; a block"),
        ({"time_step_limit": [float("nan"), float("inf")]}, r"time_step_limit \[nan, inf\]; a block"),
        ({"time_step_limit": [1.0, 0.5]}, r"time_step_limit \[1.0, 0.5\]; a block"),
        (
            {"time_step_limit": [0.0, {"__float__": "x"}]},
            r"time_step_limit \[0.0, {'__float__': 'x'}\]; a block",
        ),
        ({"time_step_limit": [0.0, {"__float__": None}]}, r"time_step_limit \[0.0, {'__float__': None}\]; a block"),
        ({"n_groups": {"__float__": []}}, r"n_groups {'__float__': \[\]}; a block of MDM computes with 1"),
        (
            {"layer_norm_epsilon": 1e-6},
            "layer_norm_epsilon 1e-06; a block of MDM computes with 1e-05.*or a model with",
        ),
        ({"ssm_cfg": {"norm_before_gate": True}}, "norm_before_gate True"),
        ({"ssm_cfg": {"D_has_hdim": True}}, "D_has_hdim True"),
        ({"attn_layer_idx": [3]}, r"attn_layer_idx \[3\]"),
        ({"d_intermediate": 64}, "d_intermediate 64"),
    ],
)
def test_a_mamba2_that_computes_something_else_is_refused_by_the_settings_name(tmp_path, setting, message) -> None:
    theirs = Mamba2Config(
        vocab_size=8, hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1, num_hidden_layers=3
    )
    Mamba2ForCausalLM(theirs).save_pretrained(tmp_path / "theirs")
    tiny_model().save_pretrained(tmp_path / "like")
    convert(tmp_path / "theirs", tmp_path / "fine", like=str(tmp_path / "like"))
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "theirs", tmp_path / "made", like=str(tmp_path / "like"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda proto: setattr(proto.normalizer_spec, "add_dummy_prefix", False),
            "normalizer_spec.add_dummy_prefix Fal",
        ),
        (lambda proto: setattr(proto.normalizer_spec, "remove_extra_whitespaces", False), "remove_extra_whitespaces"),
        (lambda proto: setattr(proto.normalizer_spec, "escape_whitespaces", False), "escape_whitespaces False"),
        (lambda proto: setattr(proto.trainer_spec, "byte_fallback", False), "trainer_spec.byte_fallback False"),
        (lambda proto: setattr(proto.trainer_spec, "treat_whitespace_as_suffix", True), "treat_whitespace_as_suffix"),
        (lambda proto: setattr(proto.pieces[-1], "type", 4), "a user-defined or unused piece"),
        (lambda proto: setattr(proto.pieces[-1], "type", 5), "a user-defined or unused piece"),
        (
            lambda proto: proto.normalizer_spec.ClearField("precompiled_charsmap"),
            "need one with a table of characters",
        ),
        (lambda proto: setattr(proto.denormalizer_spec, "precompiled_charsmap", b"x"), "and none for decoding"),
    ],
)
def test_a_sentencepiece_model_that_reads_texts_otherwise_is_refused(tmp_path, change, message) -> None:
    convert(DIGITS, tmp_path / "digits.model")
    proto = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "digits.model").read_bytes())
    change(proto)
    (tmp_path / "other.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "other.model", tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize("target", ["", ".", "..", "box", "box/digits", "box/digits/../digits"])
def test_what_holds_the_source_or_the_current_folder_is_never_overwritten(
    model, tmp_path, monkeypatch, target
) -> None:
    here = tmp_path / "work"
    model.save_pretrained(here / "box" / "digits")
    (here / "thesis.txt").write_text("years")
    monkeypatch.chdir(here)
    with pytest.raises(ValueError, match="need a place beside it|need the name of a new file"):
        convert(Path("box/digits"), Path(target) if target else Path(), overwrite=True)
    assert (here / "thesis.txt").read_text() == "years"
    assert (here / "box" / "digits" / "model.safetensors").is_file()


def test_an_old_folder_comes_back_where_its_place_cannot_be_taken(folder, tmp_path, monkeypatch) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "kept.txt").write_text("kept")
    rename = Path.rename

    def refuse(self, target):
        if Path(target) == old and "-before" not in self.name:
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        convert(folder, old, overwrite=True)
    assert [path.name for path in old.iterdir()] == ["kept.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "ours"]


@pytest.mark.parametrize("goes", ["file over folder", "folder over file"])
def test_a_file_takes_no_folders_place_and_the_reverse(folder, tmp_path, goes) -> None:
    there = tmp_path / "there"
    if goes == "file over folder":
        there.mkdir()
        (there / "a").write_text("a")
    else:
        there.write_text("a")
    kind = "training" if goes == "file over folder" else "mdm"
    with pytest.raises(ValueError, match="which is there and no fi|which is there and no fo"):
        convert(folder, there, kind=kind, overwrite=True)
    assert (there / "a" if there.is_dir() else there).read_text() == "a"


def test_a_folder_saved_with_a_processor_goes_to_a_pt_and_back(tmp_path) -> None:
    MDMPipeline.from_pretrained(DIGITS).save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "out.pt")
    convert(tmp_path / "out.pt", tmp_path / "back", like=str(DIGITS))
    assert equal(load_file(DIGITS / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors"))


def test_another_dtype_is_refused_where_weights_are_missing_or_too_large_for_it(model, folder, tmp_path) -> None:
    weights = load_file(folder / "model.safetensors")
    lost = {name: value for name, value in weights.items() if name != "latent_head.weight"}
    save_file(lost, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="without latent_head.weight"):
        convert(folder, tmp_path / "half", dtype="bfloat16")
    weights["latent_head.weight"][0, 0] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="latent_head.weight with values too large for float16; .*take bfloat16"):
        convert(folder, tmp_path / "half", dtype="float16")
    convert(folder, tmp_path / "half", dtype="bfloat16")


def test_the_state_of_a_trainer_comes_along_with_its_weights_and_is_left_out_by_name_in_another_dtype(
    folder, tmp_path, capsys
) -> None:
    state, stale = ("optimizer.pt", "rng_state.pth", "training_args.bin", "ema.safetensors"), "pytorch_model.bin"
    for name in (*state, stale):
        (folder / name).write_bytes(b"as it was")
    assert main(["convert", str(folder), "--to", str(tmp_path / "shards"), "--max-shard-size", "20KB"]) == 0
    assert all((tmp_path / "shards" / name).read_bytes() == b"as it was" for name in state)
    capsys.readouterr()
    assert main(["convert", str(folder), "--to", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert f"left out {', '.join(sorted(state))}, which are of the other weights" in capsys.readouterr().out
    for made in ("shards", "half"):
        assert not (tmp_path / made / stale).exists()
    assert not any((tmp_path / "half" / name).exists() for name in state)


def test_the_state_of_a_training_comes_along_to_another_dtype(model, tmp_path) -> None:
    loop_checkpoint(model, tmp_path / "step.pt")
    convert(tmp_path / "step.pt", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "half", dtype="bfloat16")
    convert(tmp_path / "half", tmp_path / "again.pt")
    assert torch.load(tmp_path / "again.pt", weights_only=True)["step"] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16", "target": "out.pt"}, "--dtype bfloat16 for .*; convert to a folder first"),
        ({"use": "ema"}, "--use ema for .*; need a training loop's .pt"),
        ({"like": "mdm-digits"}, "--like mdm-digits for .*, which has all of its own"),
        ({"direction": 1}, "--direction 1 for .*, where it would do nothing"),
        ({"seed": 4}, "--seed 4 for .*, where it would do nothing"),
        ({"max_shard_size": "1MB", "target": "out.pt"}, "--max-shard-size 1MB for .*, where it would do nothing"),
    ],
)
def test_an_option_that_does_nothing_is_refused(folder, tmp_path, options, message) -> None:
    target = tmp_path / options.pop("target", "out")
    with pytest.raises(ValueError, match=message):
        convert(folder, target, **options)
    assert not target.exists()


def test_what_a_pickle_asks_for_is_named_and_how_to_run_it_is_not(model, tmp_path) -> None:
    torch.save({"model": model.state_dict(), "args": Namespace(lr=1)}, tmp_path / "step.pt")
    with pytest.raises(ValueError, match="it asks for argparse.Namespace, which could run code") as refused:
        convert(tmp_path / "step.pt", tmp_path / "out")
    assert "weights_only" not in str(refused.value)


@pytest.mark.parametrize("kind", ["float8", "sparse", "meta"])
def test_a_weight_that_is_no_dense_number_is_refused_by_name(model, tmp_path, kind) -> None:
    state = model.state_dict()
    made = {
        "float8": lambda weight: weight.to(torch.float8_e4m3fn),
        "sparse": lambda weight: weight.to_sparse(),
        "meta": lambda weight: weight.to("meta"),
    }[kind]
    state["latent_head.weight"] = made(state["latent_head.weight"])
    fields = {key: value for key, value in model.config.to_dict().items() if key != "transformers_version"}
    torch.save({"model": state, "config": fields}, tmp_path / "step.pt")
    with pytest.raises(ValueError, match="latent_head.weight of .*; need a dense floating-point weight|not whole"):
        convert(tmp_path / "step.pt", tmp_path / "out")


def test_an_average_of_part_of_the_weights_says_how_to_do_without(model, tmp_path) -> None:
    held = loop_checkpoint(model, tmp_path / "step.pt")
    torch.save(held | {"ema": dict(list(held["ema"].items())[:3])}, tmp_path / "step.pt")
    with pytest.raises(ValueError, match="with an average that lacks .*; --use model takes the weights"):
        convert(tmp_path / "step.pt", tmp_path / "out")
    convert(tmp_path / "step.pt", tmp_path / "out", use="model")


def test_a_folder_without_a_generation_config_that_notes_none_is_read_with_a_warning(folder, tmp_path, caplog) -> None:
    fields = json.loads((folder / "config.json").read_text())
    del fields["saved_with"]
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "generation_config.json").unlink()
    logging.getLogger("transformers").addHandler(caplog.handler)
    convert(folder, tmp_path / "out.pt")
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "without generation_config.json; sampling as MDMGenerationConfig's defaults say" in caplog.text


def test_a_config_that_is_no_mapping_is_refused(folder, tmp_path) -> None:
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json with list; need a mapping of settings"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "with a processor that cannot be made"),
        ("processor_config.json", "[]", "with a processor that cannot be made"),
        ("generation_config.json", "[]", "with a generation_config.json that holds a list; need a mapping"),
        ("scheduler/scheduler_config.json", "[]", "scheduler_config.json that holds a list; need a mapping"),
        ("scheduler/scheduler_config.json", '{"_class_name": 5}', "was saved with the scheduler 5"),
    ],
)
def test_a_file_of_other_json_than_ours_is_refused_in_words(tmp_path, name, content, message) -> None:
    source = Path(shutil.copytree(DIGITS, tmp_path / "source"))
    (source / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_under_two_names_is_refused(model, tmp_path) -> None:
    held = loop_checkpoint(model, tmp_path / "step.pt")
    name, value = next(iter(held["model"].items()))
    held["model"][name.removeprefix("module.")] = value + 1
    torch.save(held, tmp_path / "step.pt")
    with pytest.raises(ValueError, match="with two of module.*, with and without a wrapper's name"):
        convert(tmp_path / "step.pt", tmp_path / "out", use="model")


def test_settings_that_stand_under_a_state_dicts_name_do_not_displace_the_weights(model, tmp_path) -> None:
    held = loop_checkpoint(model, tmp_path / "plain.pt")
    clash = {"model": "mdm-tiny", "state_dict": held["model"], "ema": 0.999, "model_ema": held["ema"]}
    torch.save(clash | {"config": "tiny.yaml", "args": held["config"]}, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out.pt")
    back = torch.load(tmp_path / "out.pt", weights_only=True)
    assert (back["model"], back["ema"], back["config"]) == ("mdm-tiny", 0.999, "tiny.yaml")
    assert isinstance(back["args"], dict)
    for key in ("state_dict", "model_ema"):
        assert equal(back[key], {name.removeprefix("module."): value for name, value in clash[key].items()})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([1], "with a list; need a dict"),
        (3, "with a int; need a dict"),
        ({"mdm_hf.raw_model": 7}, "with int for weights"),
        ({"mdm_hf.raw_model": {}}, "with dict for weights"),
        ({"model": 1, "state_dict": 2}, "one of which is to hold what the folder has"),
    ],
)
def test_a_kept_state_that_is_none_is_refused_in_words(folder, tmp_path, capsys, state, message) -> None:
    torch.save(state, folder / "training_state.pt")
    assert main(["convert", str(folder), "--to", str(tmp_path / "out.pt")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("way", ["tied", "overlapping"])
def test_weights_that_share_memory_are_converted_with_every_bit(model, tmp_path, way) -> None:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = "model.layers.0.norm.weight", "model.layers.1.norm.weight"
    line = torch.randn(len(weights[first]) + 1)
    weights[first], weights[second] = line[1:], line[1:] if way == "tied" else line[:-1]
    torch.save({"model": weights, "config": model.config.to_dict()}, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", tmp_path / "ours")
    assert equal(MDMForMultiModalGeneration.from_pretrained(tmp_path / "ours").state_dict(), weights)


def test_a_few_bytes_told_to_repeat_as_a_weight_of_petabytes_are_refused(model, tmp_path, capsys) -> None:
    weights = dict(model.state_dict())
    name = next(name for name in weights if name.endswith("class_embedding.weight"))
    weights[name] = torch.zeros(1).expand(2**50, weights[name].shape[1])
    fields = model.config.to_dict() | {"num_classes": 2**50 - 1}
    torch.save({"model": weights, "config": fields}, tmp_path / "in.pt")
    assert main(["convert", str(tmp_path / "in.pt"), "--to", str(tmp_path / "ours")]) == 2
    assert f"{name} of shape" in (said := capsys.readouterr().err)
    assert "told to repeat" in said
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", ["step-9.ckpt", "mine.model", "mine.safetensors"])
def test_a_folder_is_read_as_one_whatever_its_name_ends_in(folder, tmp_path, name) -> None:
    convert(folder, tmp_path / name, kind="mdm")
    convert(tmp_path / name, tmp_path / "back")
    assert equal(load_file(tmp_path / "back" / "model.safetensors"), load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("name", ["OUT.PT", "Digits.Model"])
def test_an_ending_in_capitals_is_read_as_it_is_written(tmp_path, name) -> None:
    convert(DIGITS, tmp_path / name)
    convert(tmp_path / name, tmp_path / "back")
    assert (tmp_path / "back" / ("config.json" if name == "OUT.PT" else "tokenizer.json")).is_file()


@pytest.mark.parametrize("make", [new_folder, new_file])
@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_that_write_one_place_at_once_neither_mixes_with_or_replaces_the_other_unasked(
    tmp_path, make: Callable, overwrite
) -> None:
    def write(place: Path, text: str) -> None:
        (place if make is new_file else place / "weights").write_text(text)

    held = tmp_path / "out" if make is new_file else tmp_path / "out" / "weights"
    refused = nullcontext() if overwrite else pytest.raises(ValueError, match="which is there")
    with refused, make(tmp_path / "out", overwrite) as slow:
        write(slow, "slow")
        with make(tmp_path / "out", overwrite) as fast:
            write(fast, "fast")
        assert held.read_text() == "fast"
    assert held.read_text() == ("slow" if overwrite else "fast")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("[null, -1.0]", "is no text with a finite score"),
        ('["piece", NaN]', "is no text with a finite score"),
        ('["piece", 1e999]', "is no text with a finite score"),
        ('["\\ud800", -1.0]', "surrogates not allowed"),
    ],
)
def test_a_vocabulary_of_other_than_texts_with_finite_scores_is_refused(tmp_path, entry, message) -> None:
    held = json.loads((DIGITS / "tokenizer.json").read_text())
    last = json.dumps(held["model"]["vocab"][-1])
    (tmp_path / "tokenizer.json").write_text(json.dumps(held).replace(last, entry))
    with pytest.raises(ValueError, match=f"tokenizer.json, no tokenizer of ours .*{message}"):
        convert(tmp_path, tmp_path / "out.model")


def test_a_sentencepiece_model_with_a_score_that_is_not_finite_is_refused(tmp_path) -> None:
    convert(DIGITS, tmp_path / "digits.model")
    proto = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "digits.model").read_bytes())
    proto.pieces[-1].score = float("nan")
    (tmp_path / "digits.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="that is not finite"):
        convert(tmp_path / "digits.model", tmp_path / "out")
