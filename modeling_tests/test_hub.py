"""Claims about the Hub, over real HTTP: what one process pushes, another pulls and samples the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import WRITE_TOKEN, LoopbackHub


CARD = Path(__file__).parents[1] / "model_cards" / "mdm-digits"
SAMPLE = """
inputs = processor(class_ids=[3, 7], generate=("image", "text"), return_tensors="pt")
generator = [torch.Generator().manual_seed(i) for i in range(2)]
out = model.generate(**inputs, generator=generator, num_inference_steps=3)
results = processor.post_process_multimodal_output(out)
print(hashlib.sha256(repr([(r["text"], r["images"][0].tobytes()) for r in results]).encode()).hexdigest())
"""
TINY = """
import hashlib, sys, torch
from huggingface_hub import HfApi
from mdm_hf import MDMConfig, MDMForMultiModalGeneration, MDMPipeline, MDMProcessor
torch.manual_seed(0)
config = MDMConfig.from_preset("mdm-digits", hidden_size=32, num_hidden_layers=2)
model = MDMForMultiModalGeneration(config).eval()
torch.nn.init.normal_(model.latent_head.weight, std=0.3)
processor = MDMProcessor.from_pretrained(sys.argv[1])
"""
WITHOUT_PACKAGE = """
import hashlib, sys, torch
sys.modules["mdm_hf"] = None  # any import of the installed package fails
"""


def run(code: str, hub: LoopbackHub, cache: Path, token: str | None = None) -> str:
    environment = os.environ | hub.environment(cache, token)
    command = [sys.executable, "-c", code, str(CARD)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.stdout.strip() if done.returncode == 0 else f"FAILED {done.stderr}"


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory) -> str:
    """Pushes model and processor to org/tiny in shards, and the pipeline to org/pipe: the pusher's own sample."""
    code = (
        TINY
        + SAMPLE
        + """
model.push_to_hub("org/tiny", max_shard_size="200KB")
processor.push_to_hub("org/tiny")
MDMPipeline(model, processor).push_to_hub("org/pipe", private=True)
"""
    )
    printed = run(code, hub, tmp_path_factory.mktemp("pusher"), WRITE_TOKEN)
    assert not printed.startswith("FAILED"), printed
    return printed


def pull(how: str, name: str = "org/tiny", options: str = "") -> str:
    return (
        f"""
{how}
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained("{name}"{options}).eval()
processor = AutoProcessor.from_pretrained("{name}"{options})
"""
        + SAMPLE
    )


def test_a_process_without_the_package_pulls_code_and_shards_and_samples_the_same(hub, pushed, tmp_path):
    files = hub.repositories["org/tiny"].commits[-1][1]
    assert sum(name.endswith(".safetensors") for name in files) > 1
    assert "modeling_mdm.py" in files
    assert run(pull(WITHOUT_PACKAGE, options=", trust_remote_code=True"), hub, tmp_path) == pushed


def test_with_the_package_imported_no_remote_code_is_trusted_or_needed(hub, pushed, tmp_path):
    assert run(pull("import hashlib, torch, mdm_hf"), hub, tmp_path) == pushed


def test_a_commit_can_be_asked_for_by_its_sha(hub, pushed, tmp_path):
    sha, _ = hub.repositories["org/tiny"].commits[-1]
    assert run(pull("import hashlib, torch, mdm_hf", options=f", revision='{sha}'"), hub, tmp_path) == pushed


def test_a_pushed_pipeline_is_one_repository_with_everything_in_it(hub, pushed, tmp_path):
    files = hub.repositories["org/pipe"].commits[-1][1]
    assert {"config.json", "generation_config.json", "processor_config.json", "README.md"} <= set(files)
    assert "scheduler/scheduler_config.json" in files
    code = (
        """
import hashlib, torch
from mdm_hf import MDMPipeline
pipe = MDMPipeline.from_pretrained("org/pipe")
model, processor = pipe.model, pipe.processor
"""
        + SAMPLE
    )
    assert run(code, hub, tmp_path, WRITE_TOKEN) == pushed


def test_a_private_repository_is_hidden_without_a_token(hub, pushed, tmp_path):
    printed = run(pull("import hashlib, torch, mdm_hf", "org/pipe"), hub, tmp_path)
    assert printed.startswith("FAILED")
    assert "is not a local folder and is not a valid model identifier" in printed


def test_pushing_without_a_token_is_refused(hub, pushed, tmp_path):
    printed = run(TINY + 'model.push_to_hub("org/other")', hub, tmp_path)
    assert "401" in printed
    assert "org/other" not in hub.repositories


def test_a_stale_parent_commit_is_refused_and_changes_nothing(hub, pushed, tmp_path):
    before = hub.repositories["org/tiny"].commits[-1]
    stale = hub.repositories["org/tiny"].commits[0][0]
    code = f"""
from huggingface_hub import HfApi
HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="org/tiny", parent_commit="{stale}")
"""
    printed = run(code, hub, tmp_path, WRITE_TOKEN)
    assert "412" in printed
    assert hub.repositories["org/tiny"].commits[-1] == before


def test_a_half_uploaded_repository_is_named_as_such(hub, pushed, tmp_path):
    files = dict(hub.repositories["org/tiny"].commits[-1][1])
    shard = next(name for name in files if name.endswith(".safetensors"))
    del files[shard]
    hub.repositories["org/half"] = type(hub.repositories["org/tiny"])(False)
    hub.repositories["org/half"].commit(files)
    printed = run(pull("import hashlib, torch, mdm_hf", "org/half"), hub, tmp_path)
    assert printed.startswith("FAILED")
    assert shard in printed
