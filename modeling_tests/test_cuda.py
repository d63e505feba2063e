"""Claims about a GPU, where there is one: the kernels against float64, the model against itself on the CPU.

MDM_TEST_DEVICE=cpu runs them without one, which shows that they run; docs/performance.md says what a GPU has shown.
mamba-ssm tunes its kernels for each shape first, which takes minutes: set TRITON_CACHE_AUTOTUNING=1 to pay them once.
"""

import os

import pytest
import torch
from gradients import assert_near, gradients, weights_like
from tiny import KINDS, batch, fixed_noise, generators, tiny_model
from torch.nn import functional as F

from mdm_hf import fused_scan, ssd_kernels
from mdm_hf.ssd import ssd, ssd_oracle


DEVICE = os.environ.get("MDM_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU; see docs/performance.md"
)
# Of mamba-ssm's products in fp32 Triton keeps ten bits of each factor; ours add up in fp32.
SCAN_TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 4e-2}
FUSED_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def only_ours(monkeypatch):
    monkeypatch.delenv("MDM_FORCE_TORCH", raising=False)


def leaves(dtype, **shapes):
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value.to(DEVICE, dtype).requires_grad_() for name, value in drawn.items()}


def doubles(values):
    return {name: value.detach().cpu().double().requires_grad_() for name, value in values.items()}


def on_cpu(tensors):
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def orders(b, length, k):
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(b, length, k, generator=generator).argsort(dim=1)
    return order, order.argsort(dim=1)


def compare(values, run, exact, run_exactly, tolerance):
    got, expected = run(**values), run_exactly(**exact)
    assert_near(on_cpu(dict(enumerate(got))), on_cpu(dict(enumerate(expected))), tolerance)
    weights = weights_like(*got)
    found = gradients(values, got, [w.to(DEVICE) for w in weights])
    assert_near(on_cpu(found), gradients(exact, expected, [w.double() for w in weights]), tolerance)


@pytest.mark.parametrize("has_mamba", [True, False], ids=["mamba-ssm", "plain"])
@pytest.mark.parametrize("dtype", SCAN_TOLERANCES, ids=str)
@pytest.mark.parametrize(("length", "p", "n"), [(1, 64, 128), (50, 32, 96), (333, 64, 128)])
def test_the_scan_equals_the_recurrence_in_float64(length, p, n, dtype, has_mamba, monkeypatch):
    if DEVICE == "cuda" and has_mamba and ssd_kernels.mamba_ssd() is None:
        pytest.skip("mamba-ssm is not installed")
    monkeypatch.setenv("MDM_FORCE_TORCH", "0" if has_mamba else "1")
    h, g = 4, 2
    values = leaves(dtype, x=(2, length, h, p), B=(2, length, g, n), C=(2, length, g, n))
    values |= leaves(torch.float32, dt=(2, length, h), A=(h,), D=(h,), initial_states=(2, h, p, n))
    values["dt"] = F.softplus(values["dt"].detach() - 2).requires_grad_()
    values["dt"].data[:, length - length // 10 :] = 0  # padding
    values["A"] = (-values["A"].detach().exp()).requires_grad_()

    compare(
        values,
        lambda **v: ssd(**v, return_final_states=True),
        doubles(values),
        lambda **v: ssd_oracle(**v, return_final_states=True),
        SCAN_TOLERANCES[dtype],
    )


@pytest.mark.parametrize("dtype", FUSED_TOLERANCES, ids=str)
@pytest.mark.parametrize(("length", "k"), [(1, 1), (50, 4), (333, 2)])
def test_the_fused_kernels_equal_the_plain_operations_in_float64(length, k, dtype):
    b, c = 2, 200
    order, rank = orders(b, length, k)
    values = leaves(dtype, x=(b, length, c + 6), weight=(k, c, 4), bias=(k, c), history=(b, 3, k, c))
    values |= leaves(dtype, z=(b, length, c + 5), scale=(c,))

    def run(x, weight, bias, history, z, scale):
        at, back = order.to(x.device), rank.to(x.device)
        y = fused_scan.scan_conv(x[..., 3:-3], at, back, weight, bias, history)
        return y, fused_scan.merge_gate_norm(y, at, back, z[..., 2:-3], scale, 1e-5)

    compare(values, run, doubles(values), run, FUSED_TOLERANCES[dtype])


@pytest.mark.parametrize("backbone", ["mamba", "transformer"])
def test_a_training_step_equals_that_of_the_cpu_in_float64(backbone):
    model = tiny_model(backbone=backbone, state_size=16)
    inputs = batch(KINDS, is_training=True)
    inputs |= {"timesteps": torch.rand(5, 2, generator=torch.Generator().manual_seed(0)), "noise": fixed_noise(inputs)}

    def step(device, dtype):
        one = model.to(device, dtype)
        one.zero_grad()
        moved = {name: value.to(device) for name, value in inputs.items()}
        loss = one(**moved).loss
        loss.backward()
        found = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
        return on_cpu({"loss": loss} | found)

    expected = step("cpu", torch.float64)
    assert_near(step(DEVICE, torch.float32), expected, 5e-3)


def test_what_a_row_draws_is_the_same_as_on_the_cpu():
    model, inputs = tiny_model(), batch(KINDS, is_training=True) | {"seeds": torch.arange(5) + 2**60}
    expected = model(**inputs)
    moved = {name: value.to(DEVICE) for name, value in inputs.items()}
    got = model.to(DEVICE)(**moved)
    torch.testing.assert_close(got.timesteps.cpu(), expected.timesteps, atol=0, rtol=0)
    torch.testing.assert_close(got.row_losses.cpu(), expected.row_losses, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sample_does_not_depend_on_its_batch(dtype):
    model = tiny_model(state_size=16).to(DEVICE, dtype)

    def sample(kinds, seeds):
        inputs = {name: value.to(DEVICE) for name, value in batch(kinds).items()}
        return model.generate(**inputs, generator=generators(seeds), num_inference_steps=5, guidance_scale=2.0)

    together = sample(["text_to_image", "caption", "both"], [0, 1, 2])
    for i, kind in enumerate(["text_to_image", "caption", "both"]):
        alone = sample([kind], [i])
        length = alone.latents.shape[1]
        tolerance = 2e-2 if dtype == torch.float32 else 0.3
        torch.testing.assert_close(together.latents[i, :length], alone.latents[0], atol=tolerance, rtol=tolerance)


def test_a_step_of_the_loop_never_waits_for_the_device():
    if DEVICE != "cuda":
        pytest.skip("nothing to wait for")
    model = tiny_model(state_size=16).to(DEVICE)
    inputs = {name: value.to(DEVICE) for name, value in batch(["text_to_image", "both"]).items()}
    waits = []

    def watch(pipe, step, timestep, values):
        torch.cuda.set_sync_debug_mode("error" if step + 1 < 4 else "default")
        waits.append(step)
        return {}

    try:
        model.generate(
            **inputs, generator=generators([0, 1]), num_inference_steps=5, guidance_scale=2.0,
            callback_on_step_end=watch,
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits
