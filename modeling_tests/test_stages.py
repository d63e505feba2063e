"""Claims about whole runs: a folder of pictures with captions becomes a model, stage by stage, and can be resumed."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from transformers.utils import logging

from mdm_hf import MDMForMultiModalGeneration, MDMPipeline, MDMProcessor
from mdm_hf.cli import main
from mdm_hf.training.assembly import make_arguments, make_eval_mix, make_mix, make_model, make_processor
from mdm_hf.training.dry_run import dry_run
from mdm_hf.training.recipe import load_recipe
from mdm_hf.training.records import BadRow
from mdm_hf.training.stages import check_arguments, publish, run_recipe
from mdm_hf.training.trainer import ConversationCollator, MDMTrainer


ROOT = Path(__file__).parents[1]
FOLDER_RECIPE = ROOT / "recipes" / "folder.yaml"
TINY = [
    "model.config={hidden_size: 32, num_hidden_layers: 1, vae_config: {latent_size: 4, hidden_size: 32}}",
    "processor={image_size: [8, 16], patch_size: 4, num_channels: 3}",
    "stages.vae={max_steps: 2, per_device_train_batch_size: 4, disable_tqdm: true, report_to: none}",
    "stages.diffusion={max_steps: 3, per_device_train_batch_size: 4, disable_tqdm: true, save_steps: 2}",
    "generation={num_inference_steps: 2}",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Ten pictures with captions: two of them broken, one without a caption."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        for i in range(10):
            Image.fromarray(rng.integers(0, 255, (12, 20, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            writer.writerow([f"{i}.png", "" if i == 3 else f"a picture of {'noise' if i % 2 else 'colours'}"])
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:60])
    (folder / "5.png").write_bytes(b"no picture")
    return folder


def recipe(pictures, output_dir, *changes) -> dict:
    return load_recipe(FOLDER_RECIPE, [*TINY, f"data.pictures.path={pictures}", f"output_dir={output_dir}", *changes])


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    return run_recipe(recipe(pictures, tmp_path_factory.mktemp("runs") / "run")).parent


def test_a_folder_of_pictures_with_captions_becomes_a_model_that_draws_and_writes(run):
    assert yaml.safe_load((run / "recipe.yaml").read_text())["model"]["preset"] == "mdm-digits"
    for stage, steps in (("vae", 2), ("diffusion", 3)):
        assert (run / stage / f"checkpoint-{steps}" / "ema.safetensors").is_file()
        assert [path.name for path in (run / stage / "samples").iterdir()] == [f"step-{steps:07d}.png"]
    pipe = MDMPipeline.from_pretrained(run / "final", device="cpu")
    assert pipe.model.generation_config.num_inference_steps == 2
    [result] = pipe(text="a picture of noise", generate=("image", "text"), seed=0)
    assert result["images"][0].size == (16, 8)
    assert result["images"][0].mode == "RGB"
    assert pipe.processor.max_new_tokens < 30


def test_the_vae_stage_trains_the_vae_alone_and_the_diffusion_stage_starts_from_it(pictures, run, tmp_path):
    first = MDMForMultiModalGeneration.from_pretrained(run / "vae" / "final")
    assert first.config.diffusion_weight == 1.0
    weights = load_file(run / "vae" / "checkpoint-2" / "model.safetensors")
    assert float(weights["latent_head.weight"].abs().max()) == 0  # as at the start
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for later in ("diffusion", "final"):
        shutil.rmtree(again / later)
    still = [f"stages.diffusion.{key}" for key in ("max_steps=1", "learning_rate=0", "sample_every=9")]
    after = load_file(run_recipe(recipe(pictures, again, *still), resume=True) / "model.safetensors")
    before = load_file(run / "vae" / "final" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("model.vae."))


def test_a_frozen_encoder_keeps_the_latents_while_the_decoder_learns(pictures, run, tmp_path):
    start = [f"model={{from: {run / 'vae' / 'final'}}}", f"processor={run / 'processor'}", "stages.tokenizer="]
    changes = [*start, "stages.vae=", "stages.diffusion.freeze=encoder"]
    given = recipe(pictures, tmp_path / "run", *changes)
    before = load_file(run / "vae" / "final" / "model.safetensors")
    after = load_file(run_recipe(given) / "model.safetensors")
    for name, weight in before.items():
        part = name.removeprefix("model.vae.").split(".")[0]
        is_kept = part in ("patch_embedding", "token_embedding", "encoder")
        if is_kept or part in ("decoder", "pixel_head", "token_head"):
            assert torch.equal(weight, after[name]) == is_kept, name


def test_a_model_that_is_trained_further_keeps_its_sampling_settings_unless_the_recipe_has_some(
    pictures, run, tmp_path
):
    start = [f"model={{from: {run / 'final'}}}", f"processor={run / 'processor'}", "stages.tokenizer=", "stages.vae="]
    short = ["stages.diffusion.max_steps=1", "stages.diffusion.sample_every=9"]
    for given, steps in (("", 2), ("{guidance_scale: 3.0}", 20)):
        folder = tmp_path / f"run-{steps}"
        final = run_recipe(recipe(pictures, folder, *start, *short, f"generation={given}"))
        assert MDMForMultiModalGeneration.from_pretrained(final).generation_config.num_inference_steps == steps


def test_a_folder_of_another_run_is_refused_and_left_as_it_is(pictures, run):
    before = sorted(run.rglob("*"))
    with pytest.raises(ValueError, match=r"which holds final of an earlier run; need a new folder, or --resume"):
        run_recipe(recipe(pictures, run))
    assert sorted(run.rglob("*")) == before


def test_resuming_leaves_finished_stages_alone_and_goes_on_where_more_steps_are_asked_for(pictures, run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    stamp = (again / "vae" / "final" / "model.safetensors").stat().st_mtime_ns
    before = load_file(again / "final" / "model.safetensors")
    run_recipe(recipe(pictures, again), resume=True)
    assert all(torch.equal(before[k], v) for k, v in load_file(again / "final" / "model.safetensors").items())
    run_recipe(recipe(pictures, again, "stages.diffusion.max_steps=5"), resume=True)
    assert (again / "vae" / "final" / "model.safetensors").stat().st_mtime_ns == stamp
    assert (again / "diffusion" / "checkpoint-5").is_dir()
    after = load_file(again / "final" / "model.safetensors")
    assert any(not torch.equal(before[k], v) for k, v in after.items())


def test_a_run_killed_as_it_publishes_leaves_the_old_model_whole_or_none_and_a_whole_recipe(
    pictures, run, tmp_path, monkeypatch
):
    final = tmp_path / "final"
    model, processor = (kind.from_pretrained(run / "final") for kind in (MDMForMultiModalGeneration, MDMProcessor))
    publish(model, processor, final, {})
    files = sorted(path.name for path in final.rglob("*"))

    rmtree = shutil.rmtree

    def killed_at_a_model(folder, *given, **options):
        if (Path(folder) / "model.safetensors").is_file():
            (Path(folder) / "model.safetensors").unlink()
            raise KeyboardInterrupt
        rmtree(folder, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed_at_a_model)
        with pytest.raises(KeyboardInterrupt):
            publish(model, processor, final, {})
    assert sorted(path.name for path in final.rglob("*")) == files
    publish(model, processor, final, {})
    assert [path.name for path in tmp_path.iterdir()] == ["final"]

    again = tmp_path / "again"
    shutil.copytree(run, again)
    before, write_text = (again / "recipe.yaml").read_text(), Path.write_text

    def half(path, text, **options):
        write_text(path, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(pictures, again), resume=True)
    assert (again / "recipe.yaml").read_text() == before


def test_what_an_earlier_stage_made_does_not_pass_for_the_last_stages_model(pictures, tmp_path):
    root = tmp_path / "run"
    run_recipe(recipe(pictures, root, "stages.diffusion="))
    with pytest.raises(ValueError, match="final, which is not of stage diffusion, .*; move it away to resume"):
        run_recipe(recipe(pictures, root), resume=True)
    (root / "final").rename(root / "of-vae")
    run_recipe(recipe(pictures, root), resume=True)
    assert (root / "diffusion" / "checkpoint-3").is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=1", "Got seed 1 to resume a run with 0; need the same"),
        ("model.config.num_hidden_layers=2", "to resume a run with {'preset'"),
        (
            "stages.vae.max_steps=9",
            "Got stages.vae.max_steps 9, more than made the model that stage diffusion",
        ),
    ],
)
def test_resuming_another_recipe_is_refused_and_the_old_one_kept(pictures, run, change, message):
    kept = (run / "recipe.yaml").read_text()
    with pytest.raises(ValueError, match="Got ") as error:
        run_recipe(recipe(pictures, run, change), resume=True)
    assert message in str(error.value)
    assert (run / "recipe.yaml").read_text() == kept


def test_a_model_of_another_tokenizer_is_refused(pictures, run, tmp_path):
    from_run = [f"model={{from: {run / 'final'}}}", "stages.tokenizer=", "stages.vae="]
    digits = f"processor={ROOT / 'model_cards' / 'mdm-digits'}"
    with pytest.raises(ValueError, match="Got the model .* tokens and a processor with 384; need one made for the"):
        run_recipe(recipe(pictures, tmp_path / "run", *from_run, digits))
    renamed = tmp_path / "renamed"
    shutil.copytree(run / "processor", renamed)
    text = (renamed / "tokenizer.json").read_text()
    (renamed / "tokenizer.json").write_text(
        text.replace('"▁a"', '"▁aa"').replace('"a"', '"▁a"').replace('"▁aa"', '"a"')
    )
    with pytest.raises(ValueError, match="whose tokenizer has as many tokens as the processor's, but others"):
        run_recipe(recipe(pictures, tmp_path / "run", *from_run, f"processor={renamed}"))
    assert not (tmp_path / "run").exists()


def test_a_preset_starts_with_the_vae_of_another_run_and_refuses_one_of_other_sizes(pictures, run, tmp_path):
    given = ["stages.tokenizer=", "stages.vae=", f"processor={run / 'processor'}", f"model.vae_from={run / 'final'}"]
    still = ["stages.diffusion.max_steps=1", "stages.diffusion.save_steps=1", "stages.diffusion.freeze=vae"]
    other = "model.config.hidden_size=64"  # of the blocks: the VAE does not mind
    final = run_recipe(recipe(pictures, tmp_path / "run", *given, *still, other))
    before, after = (load_file(folder / "model.safetensors") for folder in (run / "final", final))
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("model.vae."))
    with pytest.raises(
        ValueError, match=r"with hidden_size 32 for a model with 48; need a VAE of the same sizes; set"
    ):
        run_recipe(recipe(pictures, tmp_path / "other", *given, "model.config.vae_config.hidden_size=48"))
    both = f"model={{from: {run / 'final'}, vae_from: {run / 'final'}}}"
    with pytest.raises(ValueError, match="Got model.vae_from beside 'from', which has a VAE"):
        recipe(pictures, tmp_path / "both", *given[:3], both)


def test_a_caption_beyond_the_limit_does_not_widen_every_canvas(pictures, tmp_path):
    long = tmp_path / "long"
    shutil.copytree(pictures, long)
    lines = (long / "metadata.csv").read_text().replace("0.png,a picture of colours", "0.png," + "long words " * 400)
    (long / "metadata.csv").write_text(lines)
    assert make_processor(recipe(long, tmp_path / "run")).max_new_tokens < 100


def test_a_large_source_leaves_room_for_the_words_of_others_and_one_that_shows_no_text_is_not_read(
    pictures, tmp_path, monkeypatch
):
    for name, word in (("large", "alpha"), ("small", "omega"), ("unread", "delta")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{word}"}}\n' * (200 if name == "large" else 4))
    sources = [f"data.{name}={{path: {tmp_path / name}.jsonl, adapter: text}}" for name in ("large", "small")]
    sources.append(
        f"data.unread={{path: {tmp_path / 'unread.jsonl'}, adapter: captions, tasks: {{class_to_image: 1}}}}"
    )
    seen = []
    monkeypatch.setattr(
        "mdm_hf.training.assembly.build_tokenizer", lambda texts, *_, **__: seen.extend(texts) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        make_processor(recipe(pictures, tmp_path / "run", *sources, "stages.tokenizer.max_texts=18"))
    pictured = [text for text in seen if text.startswith("a picture")]
    assert (len(pictured), seen.count("alpha"), seen.count("omega"), seen.count("delta")) == (7, 7, 4, 0)


def test_data_without_texts_says_what_its_first_row_lacks(pictures, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(pictures, bare)
    (bare / "metadata.csv").write_text(
        (bare / "metadata.csv").read_text().replace("file_name,text", "file_name,about")
    )
    with pytest.raises(ValueError, match="Got no text .* the first row of pictures: Got a row with the fields about"):
        run_recipe(recipe(bare, tmp_path / "run"))


def in_two_processes(pictures, output_dir, *changes) -> subprocess.CompletedProcess:
    """`mdm train` with the recipe of a folder."""
    changes = (*TINY, f"data.pictures.path={pictures}", f"output_dir={output_dir}", *changes)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "mdm_hf.cli", "train", str(FOLDER_RECIPE), *changes]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


def test_two_processes_with_a_sharded_model_draw_the_same_samples_of_streams_and_nothing_of_the_vae(
    pictures, run, tmp_path
):
    shards = [f"processor={run / 'processor'}", "stages.tokenizer=", "data.pictures.streaming=true", "seed=0"]
    shards += [f"stages.{name}.fsdp=true" for name in ("vae", "diffusion")]
    # The second process sees pictures with texts among its first batches, the first one does not.
    shards += ["stages.diffusion.max_steps=1", "stages.diffusion.per_device_train_batch_size=128"]
    done = in_two_processes(pictures, tmp_path / "run", *shards)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.parts[-3] for path in (tmp_path / "run").rglob("samples/*.png")] == ["diffusion"]


def test_two_processes_of_the_command_line_build_one_tokenizer_and_one_model(pictures, tmp_path):
    done = in_two_processes(pictures, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Wrote ") == done.stdout.count("Built a tokenizer of ") == 1
    assert MDMPipeline.from_pretrained(tmp_path / "run" / "final", device="cpu")(generate="text", seed=0)
    refused = in_two_processes(pictures, tmp_path / "run")
    assert refused.returncode != 0
    assert "which holds final of an earlier run" in refused.stderr


def test_bad_rows_are_counted_by_kind_and_refused_where_the_recipe_says_so(pictures, run):
    processor = make_processor(recipe(pictures, run))
    mix = make_mix(recipe(pictures, run), "diffusion", 64, 4, processor)
    assert len([mix[i] for i in range(64)]) == 64
    assert set(mix.report()["pictures"]) == {"corrupt image", "missing field"}
    strict = make_mix(recipe(pictures, run, "data.pictures.on_bad=refuse"), "diffusion", 64, 4, processor)
    with pytest.raises(ValueError, match="Bad row: .*on_bad='skip'"):
        [strict[i] for i in range(64)]


def test_a_recipe_has_the_processor_of_a_folder_with_what_it_says_otherwise():
    spec = load_recipe(ROOT / "recipes" / "digits_mosaics.yaml", [f"processor.from={ROOT / 'model_cards/mdm-digits'}"])
    processor = make_processor(spec)
    pictures = [Image.new("L", size) for size in ((8, 8), (16, 8), (24, 24))]
    rows = processor(images=pictures, generate="text", return_tensors="pt")
    assert rows["image_grid_hw"].tolist() == [[4, 4], [4, 8], [12, 12]]
    as_it_is = make_processor(spec | {"processor": spec["processor"]["from"]})
    assert processor.tokenizer.get_vocab() == as_it_is.tokenizer.get_vocab()
    assert as_it_is(images=pictures, generate="text", return_tensors="pt")["image_grid_hw"].tolist() == [[4, 4]] * 3


def test_what_a_recipe_adds_to_a_trained_model_changes_nothing_at_first(pictures, run):
    added = {"condition_broadcast": True, "position_periods": [2, 4]}
    spec = recipe(pictures, run, f"model={{from: {run / 'final'}, config: {json.dumps(added)}}}")
    made, before = make_model(spec, make_processor(spec), run / "final"), MDMPipeline.from_pretrained(run / "final")
    assert {name: getattr(made.config, name) for name in added} == added
    prompt = before.processor(text="a picture of noise", generate="image", return_tensors="pt")
    a, b = (
        model.eval().generate(**prompt, generator=torch.Generator().manual_seed(0)).images[0][0]
        for model in (made, before.model.cpu())
    )
    assert torch.equal(a, b)
    fresh = make_model(recipe(pictures, run, f"model.config={json.dumps(added)}"), before.processor, None)
    assert all(weight.any() for name, weight in fresh.named_parameters() if "period" in name or "broadcast" in name)


def test_a_text_that_the_processor_refuses_is_a_bad_row(pictures, run, tmp_path):
    long = tmp_path / "long"
    shutil.copytree(pictures, long)
    lines = (long / "metadata.csv").read_text().replace("a picture of noise", "word " * 200)
    (long / "metadata.csv").write_text(lines)
    processor = make_processor(recipe(pictures, run))
    mix = make_mix(recipe(long, run), "diffusion", 64, 4, processor)
    [mix[i] for i in range(64)]
    assert mix.report()["pictures"]["refused"] > 0


def test_a_picture_or_a_class_that_the_processor_refuses_is_a_bad_row(pictures, tmp_path):
    Image.new("L", (40, 40)).save(tmp_path / "large.png")
    Image.fromarray(np.full((8, 8), 1e6, dtype=np.float32)).save(tmp_path / "numbers.tiff")
    Image.new("RGBA", (9, 8)).save(tmp_path / "odd.png")
    good = pictures / "0.png"
    refused = {
        "need at most max_pixels = 1000": (tmp_path / "large.png", 1),
        "pixels from 1e\\+06 to 1e\\+06, where 0 to 255": (tmp_path / "numbers.tiff", 1),
        "Image width 9 is not a multiple of patch_size 2": (tmp_path / "odd.png", 1),
        "Got class 12; need a whole number of at least 0 and at most 9": (good, 12),
    }
    rows = [*refused.values(), (good, 9)]
    lines = [json.dumps({"image": str(image), "label": label}) for image, label in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    card = ROOT / "model_cards" / "mdm-digits"
    changes = [
        "stages={diffusion: {max_steps: 1}}",
        f"processor={{from: {card}, do_resize: false, max_pixels: 1000}}",
        f"data={{rows: {{path: {tmp_path / 'rows.jsonl'}, adapter: imagenet, condition_dropout: 0}}}}",
    ]
    spec = load_recipe(FOLDER_RECIPE, [*changes, f"output_dir={tmp_path / 'run'}"])
    processor = make_processor(spec)
    mix = make_mix(spec, "diffusion", 8, 8, processor)
    for i, message in enumerate(refused):
        with pytest.raises(BadRow, match=message) as caught:
            mix.sources["rows"].sample(i, "class_to_image", np.random.default_rng(0))
        assert caught.value.kind == "refused"
    assert len(ConversationCollator(processor)([mix[i] for i in range(8)])["input_ids"]) == 8
    assert set(mix.report()["rows"]) == {"refused"}


def test_a_stream_of_the_same_folder_trains_too(pictures, tmp_path):
    changes = ["data.pictures.streaming=true", "stages.diffusion.max_steps=1", "stages.vae.max_steps=1"]
    final = run_recipe(recipe(pictures, tmp_path / "run", *changes))
    assert (final / "model.safetensors").is_file()


def test_a_recipe_with_a_pixel_autoencoder_trains_behind_it_and_leaves_it_as_it_was(pictures, tmp_path):
    torch.manual_seed(0)
    channels = {"block_out_channels": (8, 8), "norm_num_groups": 2, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    autoencoder = AutoencoderKL(**channels, **blocks)
    autoencoder.save_pretrained(tmp_path / "ae")
    changes = [
        f"model.pixel_autoencoder={{repo_id: {tmp_path / 'ae'}}}",
        "processor={image_size: [8, 16], patch_size: 4, downsampling: 2, num_channels: 3}",
    ]
    final = run_recipe(recipe(pictures, tmp_path / "run", *changes))
    saved = load_file(final / "model.safetensors")
    kept = {k.partition("autoencoder.autoencoder.")[2]: v for k, v in saved.items() if "autoencoder.autoencoder" in k}
    assert kept.keys() == autoencoder.state_dict().keys()
    assert all(torch.equal(value, kept[name]) for name, value in autoencoder.state_dict().items())
    [result] = MDMPipeline.from_pretrained(final, device="cpu")(generate="image", seed=0)
    assert result["images"][0].size == (16, 8)

    for described, estimate in dry_run(recipe(pictures, tmp_path / "run", *changes)):
        assert "rows like the longest of " in described
        assert estimate.tokens_per_step > 0

    whole = tmp_path / "whole"  # the two broken pictures cannot be encoded
    shutil.copytree(pictures, whole)
    (whole / "4.png").unlink()
    (whole / "5.png").unlink()
    (whole / "metadata.csv").write_text(
        "".join(line for line in (whole / "metadata.csv").open() if not line.startswith(("4", "5")))
    )
    assert main(["cache-latents", "--model", str(final), "--images", str(whole), "--output", str(tmp_path / "y")]) == 0
    cached = [*changes, f"data.pictures.latents={tmp_path / 'y'}", f"model={{from: {final}}}"]
    processor = make_processor(recipe(whole, tmp_path / "run", *cached))
    mix = make_mix(recipe(whole, tmp_path / "run", *cached), "diffusion", 64, 4, processor)
    parts = [part for i in range(64) for message in mix[i]["messages"] for part in message["content"]]
    images = [part for part in parts if part["type"] == "image"]
    assert images
    assert all(part["latents"].shape == (4, 4, 8) for part in images)
    run_recipe(recipe(whole, tmp_path / "cached", *cached, f"processor={final}", "stages={diffusion: {max_steps: 1}}"))

    AutoencoderKL(**channels, **blocks).save_pretrained(tmp_path / "other")
    other = [f"model.pixel_autoencoder={{repo_id: {tmp_path / 'other'}}}", f"processor={final}", "stages.tokenizer="]
    with pytest.raises(ValueError, match=r"Got the latent cache .*/y with autoencoder .*; need the same; use the mod"):
        run_recipe(recipe(whole, tmp_path / "other-run", *other, f"data.pictures.latents={tmp_path / 'y'}"))
    assert not list((tmp_path / "other-run").rglob("checkpoint-*"))

    wrong = [changes[0], "processor={image_size: [8, 16], patch_size: 2, downsampling: 2, num_channels: 3}"]
    with pytest.raises(ValueError, match="Got processor.patch_size 2 for an autoencoder with 2 pixels a latent"):
        run_recipe(recipe(pictures, tmp_path / "wrong", *wrong))


@pytest.mark.parametrize("option", ["bf16", "gradient_checkpointing"])
def test_a_stage_trains_in_bf16_or_with_checkpointing_and_keeps_its_weights_in_fp32(pictures, run, tmp_path, option):
    changes = [f"stages.diffusion.{option}=true", f"processor={run / 'processor'}", "stages.tokenizer=", "stages.vae="]
    weights = load_file(run_recipe(recipe(pictures, tmp_path / "run", *changes)) / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(bool(value.isfinite().all()) for value in weights.values())
    steps = json.loads((tmp_path / "run" / "diffusion" / "checkpoint-3" / "trainer_state.json").read_text())
    assert steps["global_step"] == 3


def test_a_run_with_muon_that_was_stopped_goes_on_to_the_same_weights(pictures, run, tmp_path):
    changes = [f"processor={run / 'processor'}", "stages.tokenizer=", "stages.vae=", "stages.diffusion.optim=muon"]
    whole = run_recipe(recipe(pictures, tmp_path / "whole", *changes, "stages.diffusion.max_steps=4"))
    run_recipe(recipe(pictures, tmp_path / "run", *changes, "stages.diffusion.max_steps=2"))
    gone_on = recipe(pictures, tmp_path / "run", *changes, "stages.diffusion.max_steps=4")
    resumed = load_file(run_recipe(gone_on, resume=True) / "model.safetensors")
    expected = load_file(whole / "model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in expected.items())
    state = torch.load(tmp_path / "run" / "diffusion" / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    assert {"momentum_buffer" in one for one in state.values()} == {True, False}


def test_losses_on_eval_data_are_logged_and_do_not_change_the_run(pictures, run, tmp_path):
    def trained(folder, *changes):
        alone = [f"processor={run / 'processor'}", "stages.tokenizer=", "stages.vae="]
        return run_recipe(recipe(pictures, folder, *alone, *changes))

    plain = load_file(trained(tmp_path / "plain") / "model.safetensors")
    held_out = f"{{pictures: {{path: {pictures}, adapter: captions}}}}"
    final = trained(tmp_path / "evaluated", f"eval_data={held_out}", "eval_samples=8")
    assert all(torch.equal(plain[name], value) for name, value in load_file(final / "model.safetensors").items())
    log = json.loads((tmp_path / "evaluated" / "diffusion" / "checkpoint-3" / "trainer_state.json").read_text())
    evaluated = [entry for entry in log["log_history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 3]
    assert evaluated[0]["eval_loss_se_text"] > 0


def test_what_is_evaluated_and_kept_as_the_best_is_the_average_that_is_published(pictures, run, tmp_path):
    alone = [f"processor={run / 'processor'}", "stages.tokenizer=", "stages.vae="]
    held_out = [f"eval_data={{pictures: {{path: {pictures}, adapter: captions}}}}", "eval_samples=8"]
    best = ["stages.diffusion.load_best_model_at_end=true", "stages.diffusion.greater_is_better=true"]
    steps = ["stages.diffusion.save_steps=1", "stages.diffusion.learning_rate=0.1"]
    spec = recipe(pictures, tmp_path / "run", *alone, *held_out, *best, *steps)
    final, folder = run_recipe(spec), tmp_path / "run" / "diffusion"
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert len(set(losses.values())) == len(losses) == 3
    step = max(losses, key=lambda one: losses[one])  # a step before the last one, here
    assert step < 3
    processor = make_processor(spec)
    again = MDMTrainer(
        model=MDMForMultiModalGeneration.from_pretrained(final),
        args=make_arguments(spec, "diffusion", tmp_path / "again"),
        eval_dataset=make_eval_mix(spec, 8, processor),
        data_collator=ConversationCollator(processor),
    )
    assert again.evaluate()["eval_loss"] == pytest.approx(losses[step], abs=1e-5)


def test_a_dry_run_says_what_each_stage_takes_and_writes_nothing(pictures, tmp_path, capsys):
    arguments = [*TINY, f"data.pictures.path={pictures}", f"output_dir={tmp_path / 'run'}"]
    assert main(["train", str(FOLDER_RECIPE), *arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.index("vae, rows like an image of 2x4 patches") < out.index("diffusion, rows like")
    for line in ("parameters ", "tokens per step ", "memory ", "activations ", "time per step "):
        assert out.count(line) >= 2
    assert not (tmp_path / "run").exists()


def test_a_dry_run_takes_the_longest_rows_of_the_data_once_there_is_a_processor(pictures, run):
    described, estimate = list(dry_run(recipe(pictures, run)))[-1]
    assert described.startswith("diffusion, rows like the longest of ")
    assert estimate.tokens_per_step % 4 == 0
    assert estimate.trainable == estimate.parameters
    assert estimate.peak > estimate.weights + estimate.optimizer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.pictures.path=/no/such/folder", "which cannot be read"),
        ("data.pictures.adapter=", "Got data.pictures without 'adapter'; need it"),
        ("data.pictures.adaptor=captions", "Got data.pictures with the key 'adaptor'; need among"),
        ("model.preset=mdm-huge", "Got model.preset 'mdm-huge'; need one of mdm-digits"),
        ("stages.diffusion.fsdp=true", "Got stages.diffusion.fsdp on one process; need several"),
        ("stages.vae.optim=muon", "Got a model with no trained block for muon"),
        ("stages.diffusion.report_to=nonsense", "Got stages.diffusion.report_to"),
        ("generation.guidance_scale=-3", "guidance_scale"),
        ("data.more={path: digits, tasks: {class_to_image: 1}}", "need all of one kind; set `streaming` alike"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_step(pictures, tmp_path, change, message, run):
    streaming = ["data.pictures.streaming=true"] if "more" in change else []
    with pytest.raises(ValueError, match="Got |must be") as error:
        run_recipe(recipe(pictures, tmp_path / "run", *streaming, change))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists() or "adapter" not in change
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


def test_several_gpus_of_one_process_are_refused(pictures, tmp_path):
    arguments = make_arguments(recipe(pictures, tmp_path), "diffusion", tmp_path)
    check_arguments("diffusion", arguments, None)
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="with 2 GPUs for one process, .*; need a process for each; start wi"):
        check_arguments("diffusion", arguments, None)


def test_the_shipped_recipes_can_be_dry_run_without_their_data(tmp_path, monkeypatch):
    logging.set_verbosity_error()
    for name in ("digits", "folder"):
        monkeypatch.chdir(ROOT)
        found = load_recipe(ROOT / "recipes" / f"{name}.yaml", [f"output_dir={tmp_path / name}"])
        for stage in found["stages"].values():
            stage["per_device_train_batch_size"] = stage.get("per_device_train_batch_size", 0) and 2
        found["stages"] = {k: {n: v for n, v in s.items() if v != 0} for k, s in found["stages"].items()}
        assert [estimate.parameters for _, estimate in dry_run(found)]


@pytest.mark.parametrize("is_mixed", [False, True], ids=["one-task-a-batch", "mixed"])
def test_a_batch_is_of_one_task_or_with_mixed_batches_each_row_of_its_own(is_mixed):
    changes = [f"processor={ROOT / 'model_cards/mdm-digits'}", f"stages.instruct.mixed_batches={is_mixed}"]
    spec = load_recipe(ROOT / "recipes" / "digits_mosaics.yaml", changes)
    mix = make_mix(spec, "instruct", 8 * 64, 64, make_processor(spec))
    tasks = [{mix.task_of(i) for i in range(first, first + 64)} for first in range(0, 8 * 64, 64)]
    assert min(map(len, tasks)) >= 3 if is_mixed else max(map(len, tasks)) == 1
    rows = ConversationCollator(make_processor(spec))([mix[i] for i in range(64)])
    assert len(rows["input_ids"]) == 64
