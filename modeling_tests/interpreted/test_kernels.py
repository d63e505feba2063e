"""Claims about the Triton kernels, ours and mamba-ssm's, against float64. Run by ../test_ssd_kernels.py."""

import sys

import pytest
import torch
from gradients import assert_near, gradients, weights_like
from peft import LoraConfig, get_peft_model
from tiny import batch, fixed_noise, generators, tiny_model
from torch.nn import functional as F

from mdm_hf import fused_scan, ssd_kernels
from mdm_hf.ssd import ssd, ssd_oracle


TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCES)


@pytest.fixture
def kernels(monkeypatch):
    """Every call takes the kernels, on whatever device."""
    for module in (fused_scan, ssd_kernels):
        monkeypatch.setattr(module, "takes_kernels", lambda x: x.dtype in ssd_kernels.KERNEL_DTYPES)
    assert ssd_kernels.mamba_ssd() is not None


def leaves(dtype=torch.float64, **shapes):
    generator = torch.Generator().manual_seed(0)
    values = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


def orders(b, l, k):
    order = torch.stack([torch.stack([torch.randperm(l) for _ in range(k)], -1) for _ in range(b)])
    return order, torch.argsort(order, dim=1)


def doubles(values):
    return {name: value.detach().double().requires_grad_() for name, value in values.items()}


@pytest.mark.parametrize("length", [5, 32, 45], ids=lambda l: f"l{l}")
@pytest.mark.parametrize("options", ["plain", "initial", "skip+initial+groups"])
def test_mamba_ssm_called_as_we_call_it_equals_the_oracle(kernels, length, options):
    h, g, p, n = 4, 2 if "groups" in options else 1, 16, 16
    values = leaves(
        torch.float32, x=(2, length, h, p), dt=(2, length, h), A=(h,), B=(2, length, g, n), C=(2, length, g, n)
    )
    values["dt"] = F.softplus(values["dt"].detach() - 1).requires_grad_()
    values["dt"].data[:, -2:] = 0  # padding
    values["A"] = (-values["A"].detach().exp()).requires_grad_()
    if "initial" in options:
        values |= leaves(torch.float32, initial_states=(2, h, p, n))
    if "skip" in options:
        values |= leaves(torch.float32, D=(h,))
    exact = doubles(values)
    got = ssd(**values, chunk_size=16, return_final_states=True)
    expected = ssd_oracle(**exact, return_final_states=True)
    assert_near(dict(enumerate(got)), dict(enumerate(expected)), 1e-5)
    weights = weights_like(*got)
    assert_near(gradients(values, got, weights), gradients(exact, expected, [w.double() for w in weights]), 1e-5)


@pytest.mark.parametrize("has_mamba", [True, False], ids=["mamba-ssm", "no-mamba-ssm"])
def test_compiled_in_one_graph_the_kernels_run_forward_and_backward(kernels, monkeypatch, has_mamba):
    if not has_mamba:
        monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    ssd_kernels.mamba_ssd.cache_clear()  # as in a fresh process: the compiled call is the first to look
    h, p, n, length = 2, 16, 16, 20
    order, rank = orders(1, length, 1)
    shapes = {"x": (1, length, h, p), "dt": (1, length, h), "A": (h,), "B": (1, length, 1, n), "C": (1, length, 1, n)}
    shapes |= {"weight": (1, h * p, 4), "bias": (1, h * p), "z": (1, length, h * p), "scale": (h * p,)}
    values = leaves(torch.float32, **shapes)

    def layer(x, dt, A, B, C, weight, bias, z, scale):
        x = fused_scan.scan_conv(x.flatten(2), order, rank, weight, bias).view(x.shape)
        y, state = ssd(x, F.softplus(dt), -A.exp(), B, C, 16, return_final_states=True)
        return fused_scan.merge_gate_norm(y.flatten(2).unsqueeze(2), order, rank, z, scale, 1e-5), state

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(**values)
    found = {"y": compiled[0], "state": compiled[1]} | gradients(values, compiled)
    assert (ssd_kernels.mamba_ssd() is not None) is has_mamba
    eager = layer(**values)
    assert_near(found, {"y": eager[0], "state": eager[1]} | gradients(values, eager), 1e-6)
    ssd_kernels.mamba_ssd.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 4, 6], ids=lambda w: f"w{w}")
@pytest.mark.parametrize(("length", "k"), [(1, 1), (3, 4), (45, 2)])
@pytest.mark.parametrize("has_history", [False, True], ids=["from-zeros", "history"])
def test_the_fused_scan_and_convolution_equal_the_plain_ops(kernels, length, k, width, has_history, dtype):
    b, c = 2, 70
    order, rank = orders(b, length, k)
    values = leaves(dtype, x=(b, length, c + 6), weight=(k, c, width), bias=(k, c))
    if has_history:
        values |= leaves(dtype, history=(b, width - 1, k, c))
    exact = doubles(values)

    def run(x, weight, bias, history=None):  # of a slice, as the mixer has it
        return (fused_scan.scan_conv(x[..., 3:-3], order, rank, weight, bias, history),)

    tolerance = TOLERANCES[dtype]
    got, expected = run(**values), run(**exact)
    assert got[0].dtype == dtype
    assert_near(dict(enumerate(got)), dict(enumerate(expected)), tolerance)
    weights = weights_like(*got)
    assert_near(gradients(values, got, weights), gradients(exact, expected, [w.double() for w in weights]), tolerance)


@pytest.mark.parametrize("is_mixed", [False, True], ids=["one-dtype", "fp32-weight"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "k", "c"), [(1, 1, 8), (5, 4, 70), (33, 2, 64)])
def test_the_fused_merge_gate_and_norm_equal_the_plain_ops(kernels, length, k, c, dtype, is_mixed):
    b = 2
    order, rank = orders(b, length, k)
    values = leaves(dtype, y=(b, length, k, c), z=(b, length, c + 5), weight=(c,))
    if is_mixed:
        values |= leaves(torch.float32, weight=(c,))
    exact = doubles(values)

    def run(y, z, weight):
        return (fused_scan.merge_gate_norm(y, order, rank, z[..., 2:-3], weight, 1e-5),)

    tolerance = TOLERANCES[dtype]
    got, expected = run(**values), run(**exact)
    assert got[0].dtype == dtype
    assert_near(dict(enumerate(got)), dict(enumerate(expected)), tolerance)
    weights = weights_like(*got)
    assert_near(gradients(values, got, weights), gradients(exact, expected, [w.double() for w in weights]), tolerance)


@pytest.mark.parametrize("op", ["scan_conv", "merge_gate_norm"])
def test_the_custom_ops_pass_torchs_own_check(op):
    order, rank = orders(1, 4, 2)
    if op == "scan_conv":
        values = leaves(torch.float32, x=(1, 4, 8), weight=(2, 8, 3), bias=(2, 8), history=(1, 2, 2, 8))
        arguments = (values["x"], order, rank, values["weight"], values["bias"], values["history"])
    else:
        values = leaves(torch.float32, y=(1, 4, 2, 8), z=(1, 4, 8), weight=(8,))
        arguments = (values["y"], rank, values["z"], values["weight"], 1e-5)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(ssd_kernels, f"{op}_kernel"), arguments, test_utils=checks)


def small_model(sharing="shared"):
    return tiny_model(scan_sharing=sharing, state_size=16, chunk_size=16, num_hidden_layers=1, scan_directions=(2, 2))


@pytest.mark.parametrize("sharing", ["shared", "independent", "alternate"])
def test_a_training_step_of_the_whole_model_is_the_same_with_kernels(sharing, request):
    model = small_model(sharing)
    inputs = batch(["both"], is_training=True)
    steps = {"timesteps": torch.full((1, 2), 0.5), "noise": fixed_noise(inputs)}

    def step():
        model.zero_grad()
        loss = model(**inputs, **steps).loss
        loss.backward()
        return {"loss": loss} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain = step()
    request.getfixturevalue("kernels")
    fused = step()
    a_log = "model.layers.0.mixer.ssm.A_log"
    assert not torch.equal(fused[a_log], plain[a_log])  # took kernels
    assert_near(fused, plain, 1e-4)


def test_lora_trains_every_target_the_same_with_kernels(request):
    model = get_peft_model(small_model(), LoraConfig(r=2, init_lora_weights=False)).train()
    inputs = batch(["both"], is_training=True)
    steps = {"timesteps": torch.full((1, 2), 0.5), "noise": fixed_noise(inputs)}

    def step():
        torch.manual_seed(0)
        model.zero_grad()
        model(**inputs, **steps).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain = step()
    request.getfixturevalue("kernels")
    fused = step()
    assert {name.split(".")[-4] for name in fused} == {"in_proj", "out_proj"}
    assert all(float(gradient.abs().sum()) > 0 for gradient in fused.values())
    assert_near(fused, plain, 1e-4)


def test_sampling_with_condition_cache_and_guidance_is_the_same_with_kernels(request):
    model = small_model()
    options = {"num_inference_steps": 1, "guidance_scale": 2.0}

    def sample():
        return model.generate(**batch(["text_to_image"]), generator=generators([0]), **options).latents

    plain = sample()
    request.getfixturevalue("kernels")
    torch.testing.assert_close(sample(), plain, atol=1e-4, rtol=1e-4)


def test_no_kernel_sees_a_float64_tensor(kernels):
    assert ssd_kernels.find_ssd_kernel(torch.zeros(1, dtype=torch.float64)) is None
