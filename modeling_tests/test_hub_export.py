"""The exported folder is whole: code, weights and processor work where the package is not installed."""

import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
CARD = ROOT / "model_cards" / "mdm-digits"
SAMPLE = """
inputs = processor(class_ids=[3], generate=("image", "text"), return_tensors="pt")
out = model.generate(**inputs, generator=torch.Generator().manual_seed(0), num_inference_steps=3)
print(model.config.model_type, out.latents.sum().item())
"""
WRITE = f"""
import sys, torch
from mdm_hf import MDMConfig, MDMForMultiModalGeneration, MDMImageProcessorPil, MDMProcessor

MDMConfig.register_for_auto_class()
MDMForMultiModalGeneration.register_for_auto_class("AutoModel")
MDMImageProcessorPil.register_for_auto_class("AutoImageProcessor")
MDMProcessor.register_for_auto_class("AutoProcessor")
torch.manual_seed(0)
config = MDMConfig.from_preset("mdm-digits", hidden_size=32, num_hidden_layers=1)
model, processor = MDMForMultiModalGeneration(config).eval(), MDMProcessor.from_pretrained({str(CARD)!r})
model.save_pretrained(sys.argv[1])
processor.save_pretrained(sys.argv[1])
{SAMPLE}
"""
READ = f"""
import sys, torch
sys.modules["mdm_hf"] = None  # any import of the installed package fails
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
{SAMPLE}
"""


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=folder.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_exported_model_samples_the_same_without_the_package(tmp_path):
    written = run(WRITE, tmp_path / "exported")
    assert run(READ, tmp_path / "exported") == written
    assert written.startswith("mdm ")
