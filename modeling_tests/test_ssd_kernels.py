"""Claims about finding kernels; what they compute is claimed in interpreted/, run here under Triton's interpreter."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mdm_hf import ssd_kernels


HERE = Path(__file__).parent
FORWARD = "x, dt, A, B, C, chunk_size, D=None, initial_states=None"
BACKWARD = "dout, x, dt, A, B, C, out, chunk_size, D=None, initial_states=None, dfinal_states=None"


def fake_mamba(folder: Path, init: str = "", forward: str = FORWARD, backward: str = BACKWARD) -> None:
    """A package with mamba-ssm's layout."""
    kernels = folder / "mamba_ssm" / "ops" / "triton"
    kernels.mkdir(parents=True)
    for package in (kernels, kernels.parent):
        (package / "__init__.py").write_text("")
    (folder / "mamba_ssm" / "__init__.py").write_text(init)
    passes = {"fwd": forward, "bwd": backward}
    lines = [f"def _mamba_chunk_scan_combined_{name}({has}): return '{name}'" for name, has in passes.items()]
    (kernels / "ssd_combined.py").write_text("\n".join(lines))


@pytest.fixture
def search(monkeypatch, tmp_path, caplog):
    """Looks for mamba-ssm as a fresh process would, in `tmp_path` first: the kernel and what the log said."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "mamba_ssm"}
    for name in before:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(tmp_path))
    ssd_kernels.logger.addHandler(caplog.handler)

    def look():
        importlib.invalidate_caches()
        ssd_kernels.mamba_ssd.cache_clear()
        return ssd_kernels.mamba_ssd(), caplog.text

    yield look
    ssd_kernels.logger.removeHandler(caplog.handler)
    ssd_kernels.mamba_ssd.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]
    sys.modules.update(before)


def test_a_whole_mamba_ssm_is_found_and_its_tuning_announced(search, tmp_path):
    fake_mamba(tmp_path)
    kernel, log = search()
    assert kernel.forward_function(*range(6)) == "fwd"
    assert "tune themselves in the first call" in log


def test_a_wheel_without_compiled_extensions_is_found_and_stays_to_others_what_it_was(search, tmp_path):
    fake_mamba(tmp_path, init="import selective_scan_cuda")
    kernel, _ = search()
    assert kernel.forward_function(*range(6)) == "fwd"
    with pytest.raises(ImportError, match="selective_scan_cuda"):
        importlib.import_module("mamba_ssm")


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "ImportError: undefined symbol: _ZN3c10"),
        ("raise OSError('libcudart.so.12: cannot open')", "OSError: libcudart.so.12: cannot open"),
        ("raise RuntimeError('0 active drivers')", "RuntimeError: 0 active drivers"),
        ("def (", "SyntaxError: invalid syntax"),
        ("x = y", "NameError: name 'y' is not defined"),
        ("__path__ = []", "ModuleNotFoundError: No module named 'mamba_ssm.ops'"),
    ],
    ids=lambda value: value.partition(":")[0].replace(" ", "-") if ": " in value else "",
)
def test_a_broken_mamba_ssm_is_left_alone_and_the_reason_said(search, tmp_path, init, reason):
    fake_mamba(tmp_path, init=init)
    kernel, log = search()
    assert kernel is None
    assert f"cannot be used ({reason}" in log


def test_a_bare_module_of_that_name_is_left_alone(search, monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", ModuleType("mamba_ssm"))
    kernel, log = search()
    assert kernel is None
    assert "cannot be used (ValueError: mamba_ssm.__spec__ is None)" in log


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_kernel_without_an_argument_we_need_is_not_used(search, tmp_path, which):
    whole = {"forward": FORWARD, "backward": BACKWARD}[which]
    fake_mamba(tmp_path, **{which: whole.replace(", initial_states=None", "")})
    kernel, log = search()
    assert kernel is None
    assert "lacks ['initial_states']" in log


def test_without_mamba_ssm_the_log_says_what_runs_instead(search, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    kernel, log = search()
    assert kernel is None
    assert "mamba-ssm is not installed: the SSD on the GPU runs in plain PyTorch" in log


@pytest.mark.parametrize(
    ("device", "dtype", "switch", "expected"),
    [
        ("cpu", torch.float32, "", False),
        ("cuda", torch.float32, "", True),
        ("cuda", torch.bfloat16, "0", True),
        ("cuda", torch.float64, "", False),
        ("cuda", torch.float32, "1", False),
        ("cuda", torch.float32, "no", True),
        ("cuda", torch.float32, "Off", True),
    ],
)
def test_kernels_take_cuda_tensors_of_their_dtypes_unless_switched_off(monkeypatch, device, dtype, switch, expected):
    monkeypatch.setattr(ssd_kernels, "triton", object())
    monkeypatch.setenv("MDM_FORCE_TORCH", switch)
    assert ssd_kernels.takes_kernels(SimpleNamespace(is_cuda=device == "cuda", dtype=dtype)) is expected


@pytest.mark.skipif(ssd_kernels.triton is None, reason="triton is not installed")
def test_the_dimension_of_a_grid_that_may_be_long_counts_the_rows():
    rows, steps, channels = ssd_kernels._conv_grid(100_000, 65, 130)
    assert (rows, steps, channels) == (100_000, 3, 3)


def test_without_triton_no_kernel_is_taken(monkeypatch):
    monkeypatch.setattr(ssd_kernels, "triton", None)
    assert not ssd_kernels.takes_kernels(SimpleNamespace(is_cuda=True, dtype=torch.float32))


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "einops", "mamba_ssm")),
    reason="the extra `kernels` and mamba-ssm are not installed; `make kernels` installs them on Linux",
)
def test_the_kernels_keep_their_claims_under_tritons_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "MAMBA_DETERMINISTIC": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout
