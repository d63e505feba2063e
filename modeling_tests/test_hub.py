"""Claims about the Hub, over real HTTP: what one process pushes, another pulls and samples the same.

A process costs seconds before it does anything, so each does all that it is there for and prints what it saw as one
line of JSON: `pusher` (with the package and a token), `stranger` (with neither, and an empty cache), `friend` (with
both, and an empty cache), `breakages` and `breakages_without_package` (one broken repository after another).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
from loopback_hub import WRITE_TOKEN, LoopbackHub, Repository


CARD = Path(__file__).parents[1] / "model_cards" / "mdm-digits"
COMMON = """
import hashlib, json, sys, torch
from transformers import AutoModel, AutoProcessor, pipeline
OPTIONS = {"num_inference_steps": 6}
seen = {}

def digest(results):
    return hashlib.sha256(repr([(r["text"], r["images"][0].tobytes()) for r in results]).encode()).hexdigest()

def sample(model, processor):
    inputs = processor(class_ids=[3, 7], generate=("image", "text"), return_tensors="pt")
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    out = model.eval().generate(**inputs, generator=generator, **OPTIONS)
    return digest(processor.post_process_multimodal_output(out))

def call(pipe):
    pipe.set_progress_bar_config(disable=True)
    return digest(pipe(class_ids=[3, 7], seed=0, **OPTIONS))

def error_of(action):
    try:
        action()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
"""
PUSH = """
from pathlib import Path
from diffusers import DDIMScheduler
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from mdm_hf import MDMPipeline
card = sys.argv[1]
pipe = MDMPipeline.from_pretrained(card)
pipe.push_to_hub("org/mdm-digits")
HfApi().upload_folder(repo_id="org/mdm-digits", folder_path=card, allow_patterns=["*.md", "*.png", "scores.json"])
seen["model"], seen["pipe"] = sample(pipe.model, pipe.processor), call(pipe)

pipe.model.push_to_hub("org/shards", max_shard_size="1MB")
pipe.processor.push_to_hub("org/shards")
HfApi().create_repo("org/card")
HfApi().upload_folder(repo_id="org/card", folder_path=card)

pipe.model.model.push_to_hub("org/base")
pipe.model.model.vae.push_to_hub("org/vae")
pipe.save_pretrained(sys.argv[2] + "/pipe", push_to_hub=True, repo_id="org/saved", commit_message="all")

pipe.scheduler = pipe.model.scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False)
pipe.push_to_hub("org/private", private=True)
pipe.model.save_pretrained(sys.argv[2] + "/model", push_to_hub=True, repo_id="org/saved-model")
zeros = {name: torch.zeros_like(weight) for name, weight in pipe.model.state_dict().items()}
other = {"state_dict": zeros, "variant": "ema", "tags": ["averaged"], "revision": "ema", "private": True}
(Path(sys.argv[2]) / "ema").mkdir()
(Path(sys.argv[2]) / "ema" / "README.md").write_text("Mine.")
(Path(sys.argv[2]) / "ema" / "optimizer.pt").write_text("not to be shared")
pipe.model.save_pretrained(sys.argv[2] + "/ema", push_to_hub=True, repo_id="org/ema", **other)
seen["ddim"] = call(pipe)
pipe.scheduler.push_to_hub("org/solver")

base = AutoModel.from_pretrained("org/mdm-digits")
torch.manual_seed(0)
adapted = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, task_type="FEATURE_EXTRACTION"))
adapted.push_to_hub("org/adapter")
seen["adapted"] = sample(adapted, pipe.processor)
"""
PULL_WITHOUT_PACKAGE = """
sys.modules["mdm_hf"] = None  # any import of the installed package fails
from peft import AutoPeftModelForFeatureExtraction, LoraConfig, get_peft_model
trust = {"trust_remote_code": True}
pipe = pipeline(model="org/mdm-digits", **trust)
seen["class"], seen["task"] = type(pipe).__module__.split(".")[0], pipe.task
seen["pipe"] = call(pipe)
processor = AutoProcessor.from_pretrained("org/mdm-digits", **trust)
seen["model"] = sample(AutoModel.from_pretrained("org/mdm-digits", **trust), processor)
shards = AutoModel.from_pretrained("org/shards", **trust)
seen["shards"] = sample(shards, AutoProcessor.from_pretrained("org/shards", **trust))

import transformers.pipelines.any_to_any as any_to_any
seen["torchvision"] = error_of(lambda: pipeline("any-to-any", model="org/mdm-digits", **trust))
any_to_any.requires_backends = lambda *_: None
theirs = pipeline("any-to-any", model="org/mdm-digits", **trust)
drawn = theirs(text="a three", generate="image", generation_mode="image", generate_kwargs=dict(OPTIONS))
seen["any-to-any"] = drawn[0]["generated_image"].size
theirs = pipeline("image-text-to-text", model="org/mdm-digits", **trust)
answer = theirs(drawn[0]["generated_image"], text="which digit is this?", return_full_text=False)
seen["image-text-to-text"] = len(answer[0]["generated_text"].split())

adapted = AutoPeftModelForFeatureExtraction.from_pretrained("org/adapter", **trust)
seen["adapted"] = sample(adapted, processor)
pipe.load_adapter("org/adapter")
seen["adapted pipe"] = sample(pipe.model, pipe.processor)
fresh = get_peft_model(shards, LoraConfig(r=2))
seen["targets"] = sorted({name.split(".")[-2] for name, _ in fresh.named_modules() if name.endswith("lora_A")})

again = sys.argv[2]
pipeline(model="org/mdm-digits", **trust).save_pretrained(again)
seen["saved again"] = call(pipeline(model=again, **trust))
seen["untrusted"] = error_of(lambda: AutoModel.from_pretrained("org/mdm-digits", trust_remote_code=False))
seen["untrusted pipe"] = error_of(lambda: pipeline(model="org/mdm-digits", trust_remote_code=False))
seen["private"] = error_of(lambda: pipeline(model="org/private", **trust))
seen["card alone"] = error_of(lambda: AutoModel.from_pretrained("org/card", **trust))
seen["parts"] = [type(AutoModel.from_pretrained(f"org/{name}", **trust)).__name__ for name in ("base", "vae")]
seen["pushed"] = error_of(lambda: pipe.push_to_hub("org/other"))
"""
PULL_WITH_PACKAGE = """
import os
from pathlib import Path
from diffusers import DDIMScheduler
from huggingface_hub import HfApi
from mdm_hf import MDMPipeline
name, sha, stale = "org/mdm-digits", sys.argv[2], sys.argv[3]
pipe = MDMPipeline.from_pretrained(name)
seen["model"], seen["pipe"] = sample(AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)), call(pipe)
found = pipeline("any-to-any-diffusion", model=name)
seen["class"], seen["by task"], seen["by name"] = type(found).__module__, call(found), call(pipeline(model=name))
seen["card alone"] = call(MDMPipeline.from_pretrained("org/card"))
seen["by sha"] = call(pipeline(model="org/shards", task="any-to-any-diffusion", revision=sha))
seen["ddim"] = call(pipeline(model="org/private"))
solver = DDIMScheduler.from_pretrained("org/solver")
pipe.load_adapter("org/adapter")
seen["adapted"] = sample(pipe.model, pipe.processor)
pipe.model.disable_adapters()
pipe.scheduler = solver
seen["solver"] = call(pipe)
upload = lambda: HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=name, parent_commit=stale)
seen["stale"] = error_of(upload)

on_base = MDMPipeline.from_pretrained("org/adapter")
seen["adapter pipe"] = sample(on_base.model, on_base.processor)
[cached] = Path(os.environ["HF_HOME"]).glob("hub/models--org--mdm-digits/snapshots/*/tokenizer.json")
cached.resolve().write_bytes(cached.read_bytes()[:500])
seen["broken cache"] = error_of(lambda: MDMPipeline.from_pretrained(name))
seen["downloaded again"] = call(MDMPipeline.from_pretrained(name, force_download=True))
seen["remote code"] = [name for name in sys.modules if name.startswith("transformers_modules.")]
"""
BREAK_WITH_PACKAGE = """
import mdm_hf
pipe = mdm_hf.MDMPipeline.from_pretrained("org/mdm-digits")
for name in sys.argv[2:]:
    if "adapter" in name:
        seen[name] = error_of(lambda: pipe.load_adapter(f"org/{name}"))
    else:
        seen[name] = error_of(lambda: mdm_hf.MDMPipeline.from_pretrained(f"org/{name}"))
pipe.load_adapter("org/adapter")  # what was half loaded is gone
"""
BREAK_WITHOUT_PACKAGE = """
sys.modules["mdm_hf"] = None
for name in sys.argv[2:]:
    task = "image-text-to-text" if "shard" in name else "any-to-any-diffusion"
    seen[name] = error_of(lambda: pipeline(task, model=f"org/{name}", trust_remote_code=True))
"""
BROKEN = {
    "missing-config": ("config.json", "config.json"),
    "missing-shard": ("model-00002-of-00003.safetensors", "model-00002-of-00003.safetensors"),
    "missing-weights": ("model.safetensors", "model.safetensors"),
    "missing-tokenizer": ("tokenizer.json", "tokenizer.json, whole; push"),
    "missing-processor": ("processor_config.json", "processor_config.json"),
    "missing-code": ("ssd.py", "ssd.py"),
    "missing-pipeline": ("pipeline_mdm.py", "pipeline_mdm.py"),
    "truncated-weights": ("model.safetensors", "with a .safetensors file or a model.safetensors.index.json"),
    "truncated-shard": (
        "model-00002-of-00003.safetensors",
        "with a .safetensors file or a model.safetensors.index.json",
    ),
    "truncated-tokenizer": ("tokenizer.json", "tokenizer.json, whole; push"),
    "truncated-config": ("config.json", "config.json"),
    "missing-solver": (
        "scheduler/scheduler_config.json",
        "scheduler/scheduler_config.json, which its config.json says",
    ),
    "truncated-solver": ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json that is not whole JSON"),
    "missing-generation": ("generation_config.json", "generation_config.json, which its config.json says"),
    "truncated-generation": ("generation_config.json", "generation_config.json that is not whole JSON"),
    "missing-template": ("chat_template.jinja", "without chat_template.jinja"),
    "truncated-template": ("chat_template.jinja", "chat_template.jinja that cannot be read"),
    "truncated-processor": ("processor_config.json", "processor_config.json"),
    "truncated-shard-index": ("model.safetensors.index.json", "model.safetensors.index.json that cannot be read"),
}
BROKEN_ADAPTERS = {
    "truncated-adapter-weights": ("adapter_model.safetensors", "adapter_model.safetensors that cannot be read"),
    "truncated-adapter-config": ("adapter_config.json", "Got the adapter org/truncated-adapter-config"),
}


def run(code: str, hub: LoopbackHub, cache: Path, *arguments: str, token: str | None = None) -> dict:
    """What a process that runs `code` with an empty cache prints."""
    environment = os.environ | hub.environment(cache, token)
    command = [sys.executable, "-c", f"{COMMON}{code}\nprint(json.dumps(seen))", str(CARD), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pusher(hub, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("pusher")
    return run(PUSH, hub, folder, str(folder), token=WRITE_TOKEN)


@pytest.fixture(scope="module")
def stranger(hub, pusher, tmp_path_factory) -> dict:
    cache = tmp_path_factory.mktemp("stranger")
    return run(PULL_WITHOUT_PACKAGE, hub, cache, str(cache / "again"))


@pytest.fixture(scope="module")
def friend(hub, pusher, tmp_path_factory) -> dict:
    sha, stale = (hub.repositories[name].commits[at][0] for name, at in (("org/shards", -1), ("org/mdm-digits", 0)))
    return run(PULL_WITH_PACKAGE, hub, tmp_path_factory.mktemp("friend"), sha, stale, token=WRITE_TOKEN)


@pytest.fixture(scope="module")
def broken(hub, pusher) -> None:
    """Repositories that miss a file, or have half of one."""
    for name, (file, _) in (BROKEN | BROKEN_ADAPTERS).items():
        whole = "shards" if "shard" in name else "adapter" if name in BROKEN_ADAPTERS else "mdm-digits"
        tree = dict(files(hub, whole))
        content = tree.pop(file)
        if name.startswith("truncated"):
            tree[file] = content[: len(content) // 2]
        hub.repositories[f"org/{name}"] = Repository(is_private=False)
        hub.repositories[f"org/{name}"].commit(tree)


@pytest.fixture(scope="module")
def breakages(hub, broken, tmp_path_factory) -> dict:
    return run(BREAK_WITH_PACKAGE, hub, tmp_path_factory.mktemp("breakages"), *BROKEN, *BROKEN_ADAPTERS)


@pytest.fixture(scope="module")
def breakages_without_package(hub, broken, tmp_path_factory) -> dict:
    return run(BREAK_WITHOUT_PACKAGE, hub, tmp_path_factory.mktemp("breakages"), *BROKEN)


def files(hub: LoopbackHub, name: str) -> dict[str, bytes]:
    return hub.repositories[f"org/{name}"].commits[-1][1]


def test_what_is_pushed_is_one_repository_with_everything_in_it(hub, pusher):
    pushed = files(hub, "mdm-digits")
    assert {"config.json", "generation_config.json", "processor_config.json", "tokenizer.json"} <= set(pushed)
    assert {"modeling_mdm.py", "processing_mdm.py", "pipeline_mdm.py"} <= set(pushed)
    assert pushed["scheduler/scheduler_config.json"]
    assert pushed["README.md"] == (CARD / "README.md").read_bytes()
    assert sum(name.endswith(".safetensors") for name in files(hub, "shards")) > 1
    assert set(files(hub, "adapter")) >= {"adapter_config.json", "adapter_model.safetensors"}
    assert len(files(hub, "adapter")["adapter_model.safetensors"]) < 0.05 * len(pushed["model.safetensors"])


def test_saving_with_push_to_hub_pushes_all_that_it_wrote_in_one_commit(hub, pusher):
    told = {name for name in files(hub, "mdm-digits") if name.endswith((".png", ".md", "scores.json"))}
    assert set(files(hub, "saved")) - {"README.md"} == set(files(hub, "mdm-digits")) - told
    assert b"custom_pipelines" in files(hub, "saved")["config.json"]
    assert len(hub.repositories["org/saved"].commits) == 2  # with that of its creation
    assert b"DDIMScheduler" in files(hub, "saved-model")["scheduler/scheduler_config.json"]


def test_saving_with_push_to_hub_pushes_what_was_saved_and_not_the_model_as_it_is(hub, pusher):
    repository = hub.repositories["org/ema"]
    _, pushed = repository.at("ema")
    assert set(repository.at("main")[1]) == {".gitattributes"}
    assert repository.is_private
    assert "model.safetensors" not in pushed
    assert not any(weight.any() for weight in safetensors.torch.load(pushed["model.ema.safetensors"]).values())
    assert "optimizer.pt" not in pushed
    assert pushed["README.md"].endswith(b"Mine.")
    assert b"averaged" in pushed["README.md"]


def test_the_parts_of_the_model_load_without_the_package_too(stranger):
    assert stranger["parts"] == ["MDMModel", "MDMVAEModel"]


@pytest.mark.parametrize(
    ("what", "as_pushed"),
    [
        ("model", "model"),
        ("pipe", "pipe"),
        ("shards", "model"),
        ("adapted", "adapted"),
        ("adapted pipe", "adapted"),
        ("saved again", "pipe"),
    ],
)
def test_a_process_without_the_package_samples_the_same_bytes(pusher, stranger, what, as_pushed):
    assert stranger[what] == pusher[as_pushed]


def test_without_the_package_the_pipeline_and_its_default_lora_targets_come_from_the_repository(stranger):
    assert (stranger["class"], stranger["task"]) == ("transformers_modules", "any-to-any-diffusion")
    assert stranger["targets"] == ["in_proj", "out_proj"]


def test_the_pipelines_of_transformers_find_the_code_but_one_asks_for_torchvision(stranger):
    assert stranger["any-to-any"] == [8, 8]
    assert stranger["image-text-to-text"] > 0
    assert "requires the Torchvision library" in stranger["torchvision"]


@pytest.mark.parametrize(
    ("what", "as_pushed"),
    [
        ("model", "model"),
        ("pipe", "pipe"),
        ("by task", "pipe"),
        ("by name", "pipe"),
        ("by sha", "pipe"),
        ("card alone", "pipe"),
        ("adapted", "adapted"),
        ("adapter pipe", "adapted"),
        ("downloaded again", "pipe"),
        ("ddim", "ddim"),
        ("solver", "ddim"),
    ],
)
def test_with_the_package_the_same_bytes_come_without_remote_code(pusher, friend, what, as_pushed):
    assert friend[what] == pusher[as_pushed]
    assert friend["class"] == "mdm_hf.pipeline_mdm"
    assert friend["remote code"] == []


def test_a_broken_cache_is_told_with_the_remedy_that_works(friend):
    assert "tokenizer.json, whole; push or download them again, with force_download=True" in friend["broken cache"]


def test_the_samples_that_should_differ_do(pusher):
    assert len({pusher[name] for name in ("pipe", "ddim", "adapted")}) == 3


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("untrusted", "contains custom code which must be executed"),
        ("untrusted pipe", "trust_remote_code"),
        ("private", "org/private is not a local folder and is not a valid model identifier"),
        ("card alone", "model type `mdm` but Transformers does not recognize this architecture"),
        ("pushed", "401"),
    ],
)
def test_what_needs_trust_a_token_or_the_package_is_refused(hub, stranger, what, message):
    assert message in stranger[what]
    assert "org/other" not in hub.repositories


def test_a_stale_parent_commit_is_refused_and_changes_nothing(hub, friend):
    assert "412" in friend["stale"]
    assert "x" not in files(hub, "mdm-digits")


@pytest.mark.parametrize("name", BROKEN)
def test_a_half_uploaded_repository_is_named_with_the_file_that_is_wrong(breakages, breakages_without_package, name):
    for errors in (breakages, breakages_without_package):
        if errors is breakages and BROKEN[name][0].endswith(".py"):
            assert errors[name] is None  # with the package, code in a repository is not looked at
        else:
            assert f"org/{name}" in errors[name].replace("--", "/")  # transformers may name the file in the cache
            assert BROKEN[name][1] in errors[name]


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_a_half_uploaded_adapter_is_named_with_the_file_that_is_wrong(breakages, name):
    assert f"org/{name}" in breakages[name]
    assert BROKEN_ADAPTERS[name][1] in breakages[name]
