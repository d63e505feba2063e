"""Does a run survive kill -9 at any moment? It is killed again and again, in its steps and in its saves, and resumed.

What has to hold, or this ends with an error: after every kill each checkpoint is whole and loads, and the run that
was killed ends in the same weights, averages and optimiser states, bit for bit, as one that never was.

A kill comes a random time after a random checkpoint appears; every step saves, and the count says how many kills fell
in a save.

    python benchmarks/kill_and_resume.py --small
    python benchmarks/kill_and_resume.py --kills 10 --output docs/kill_and_resume.json
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from mdm_hf import MDMForMultiModalGeneration
from mdm_hf.training.trainer import EMA_FILE, UNFINISHED


ROOT = Path(__file__).resolve().parents[1]
FILES = (EMA_FILE, "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def command(folder: Path, steps: int) -> list[str]:
    """A small run of the digits recipe that saves every step."""
    stage = {
        "max_steps": steps,
        "save_steps": 1,
        "per_device_train_batch_size": 8,
        "sample_every": 10_000,
        "report_to": "none",
        "disable_tqdm": "true",
    }
    changes = [f"stages.diffusion.{key}={value}" for key, value in stage.items()]
    changes += [f"output_dir={folder}", "model.config={hidden_size: 32, num_hidden_layers: 1}"]
    recipe = str(ROOT / "recipes" / "digits.yaml")
    return [sys.executable, "-m", "mdm_hf.cli", "train", recipe, *changes, "--resume"]


def newest(run: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*")), default=0)


def kill(folder: Path, steps: int, at: int) -> dict:
    """Starts or resumes the run, kills it soon after checkpoint `at`, and looks at what is left."""
    run = folder / "diffusion"
    process = subprocess.Popen(command(folder, steps), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and newest(run) < at:
        time.sleep(0.001)
    time.sleep(random.random() * 0.15)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"The run ended before it was killed:\n{process.stderr.read()}")
    checkpoints = sorted(run.glob("checkpoint-*"))
    for checkpoint in checkpoints:
        MDMForMultiModalGeneration.from_pretrained(checkpoint)
        load_file(checkpoint / EMA_FILE)
        torch.load(checkpoint / "optimizer.pt", weights_only=True)
        json.loads((checkpoint / "trainer_state.json").read_text())
        if missing := [name for name in FILES if not (checkpoint / name).stat().st_size]:
            raise RuntimeError(f"{checkpoint} lacks {', '.join(missing)}.")
    return {"after": newest(run), "in_a_save": (run / UNFINISHED).exists(), "whole_checkpoints": len(checkpoints)}


def differences(folder: Path, other: Path, steps: int) -> list[str]:
    """What differs between two finished runs."""
    different = []
    last = f"diffusion/checkpoint-{steps}"
    for name in (f"{last}/model.safetensors", f"{last}/{EMA_FILE}", "final/model.safetensors"):
        one, two = load_file(folder / name), load_file(other / name)
        different += [f"{name}: {key}" for key in one if key not in two or not torch.equal(one[key], two[key])]
    one, two = (torch.load(path / last / "optimizer.pt", weights_only=True)["state"] for path in (folder, other))
    different += [f"optimizer: {i}" for i in one for key in one[i] if not torch.equal(one[i][key], two[i][key])]
    return different


def kill_and_resume(root: Path, kills: int, steps: int) -> dict:
    """Runs it all under `root`; raises RuntimeError where something does not hold."""
    moments = sorted(random.sample(range(1, steps - 2), kills))
    found = [kill(root / "killed", steps, at) for at in moments]
    for folder in ("killed", "whole"):
        subprocess.run(command(root / folder, steps), check=True, capture_output=True)
    if different := differences(root / "whole", root / "killed", steps):
        raise RuntimeError(f"Not the same after {kills} kills: {', '.join(different[:5])}.")
    return {"kills": found, "steps": steps, "in_a_save": sum(one["in_a_save"] for one in found), "different": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one kill")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, help="of the moments; others every time if absent")
    parser.add_argument("--plot", type=Path, help="not used: there is nothing to draw")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    if options.small:
        options.kills, options.steps = 1, 10
    random.seed(options.seed)
    root = Path(tempfile.mkdtemp())
    try:
        result = kill_and_resume(root, options.kills, options.steps)
    finally:
        shutil.rmtree(root)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
