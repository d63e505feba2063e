"""Claims about the selective scan (paper Eq. 10-13)."""

import importlib
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from gradients import assert_near, gradients, weights_like
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from mdm_hf import ssd as ssd_module
from mdm_hf import ssd_chunks
from mdm_hf.causal_conv import causal_conv
from mdm_hf.ssd import kernel_chunk, ssd, ssd_oracle


def inputs(l, *, b=2, h=4, g=2, p=5, n=3, dtype=torch.float64, skip=True, initial=True, softplus=False, seed=0):
    """Arguments of `ssd` as leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = {
        "x": normal(b, l, h, p),
        "dt": normal(b, l, h) - 1 if softplus else F.softplus(normal(b, l, h) - 1),
        "A": -normal(h).exp(),
        "B": normal(b, l, g, n),
        "C": normal(b, l, g, n),
    }
    if skip:
        values["D"] = normal(h)
    if softplus:
        values["dt_bias"] = normal(h)
    if initial:
        values["initial_states"] = normal(b, h, p, n)
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


def oracle_of(values):
    """Output, final state and the leaves of the oracle on the same numbers."""
    leaves = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    arguments = dict(leaves)
    if "dt_bias" in arguments:
        arguments["dt"] = F.softplus(arguments["dt"] + arguments.pop("dt_bias"))
    return *ssd_oracle(**arguments, return_final_states=True), leaves


def assert_equals_oracle(values, tolerance, **options):
    y, state = ssd(**values, return_final_states=True, **options)
    y_oracle, state_oracle, leaves = oracle_of(values)
    assert_near({"y": y, "state": state}, {"y": y_oracle, "state": state_oracle}, tolerance)
    weights = weights_like(y, state)
    expected = gradients(leaves, (y_oracle, state_oracle), [weight.double() for weight in weights])
    assert_near(gradients(values, (y, state), weights), expected, tolerance)


def test_the_oracle_is_the_closed_form_of_a_scalar_recurrence():
    l, decay = 6, 0.8
    one = torch.ones(1, l, 1, 1)
    y, state = ssd_oracle(
        one, torch.full((1, l, 1), 0.5), torch.tensor([decay]).log() / 0.5, one, one, return_final_states=True
    )
    expected = 0.5 * (1 - decay ** torch.arange(1, l + 1, dtype=torch.float64)) / (1 - decay)
    torch.testing.assert_close(y.flatten(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(state.flatten(), expected[-1:], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("extras", ["bare", "skip", "initial", "skip+initial+softplus"])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=lambda g: f"g{g}")
@pytest.mark.parametrize("length", [1, 7, 33, 64, 65, 130], ids=lambda l: f"l{l}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_outputs_final_state_and_every_gradient_equal_the_oracle(dtype, length, groups, extras):
    has = {name: name in extras for name in ("skip", "initial", "softplus")}
    values = inputs(length, g=groups, dtype=dtype, **has)
    assert_equals_oracle(values, 1e-4 if dtype == torch.float32 else 1e-9, dt_softplus=has["softplus"])


@pytest.mark.parametrize("chunk_size", [1, 16, 21, 32, 64, 200], ids=lambda q: f"q{q}")
@pytest.mark.parametrize("length", [7, 65], ids=lambda l: f"l{l}")
def test_the_chunk_size_does_not_change_the_result(length, chunk_size):
    assert_equals_oracle(inputs(length), 1e-9, chunk_size=chunk_size)


@pytest.mark.parametrize("elements", [1, 2_000, 10_000], ids=lambda e: f"blocks-of-{e}")
def test_how_the_work_is_cut_into_blocks_does_not_change_the_result(monkeypatch, elements):
    monkeypatch.setattr(ssd_chunks, "BLOCK_ELEMENTS_CPU", elements)
    assert_equals_oracle(inputs(65, b=5), 1e-9, chunk_size=16)


@pytest.mark.parametrize("which", ["y", "state"])
@pytest.mark.parametrize("length", [20, 70], ids=["one-chunk", "two-chunks"])
@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-a-state"])
def test_gradients_are_right_if_only_one_output_is_used(which, length, initial):
    values = inputs(length, initial=initial)
    y, state = ssd(**values, return_final_states=True)
    y_oracle, state_oracle, leaves = oracle_of(values)
    outputs = (y,) if which == "y" else (state,)
    expected = (y_oracle,) if which == "y" else (state_oracle,)
    assert_near(gradients(values, outputs), gradients(leaves, expected), 1e-9)


@pytest.mark.parametrize("cut", [1, 30, 64, 99])
def test_two_runs_with_the_state_handed_over_equal_one_run(cut):
    values = inputs(100)
    y, state = ssd(**values, return_final_states=True)
    over_time = ("x", "dt", "B", "C")
    first = values | {name: values[name][:, :cut] for name in over_time}
    second = values | {name: values[name][:, cut:] for name in over_time}
    y_first, handed_over = ssd(**first, return_final_states=True)
    y_second, state_second = ssd(**second | {"initial_states": handed_over}, return_final_states=True)
    joined = torch.cat([y_first, y_second], dim=1)
    assert_near({"y": joined, "state": state_second}, {"y": y, "state": state}, 1e-12)
    assert_near(gradients(values, (joined, state_second)), gradients(values, (y, state)), 1e-12)


def test_steps_with_dt_zero_leave_the_state_untouched():
    values = {name: value.detach() for name, value in inputs(40, dtype=torch.float32).items()}
    padded = dict(values)
    for name in ("x", "dt", "B", "C"):  # ten pads in the middle, thirty at the end, across a chunk's border
        pad = values[name].new_zeros(2, 30, *values[name].shape[2:])
        padded[name] = torch.cat([values[name][:, :25], pad[:, :10], values[name][:, 25:], pad], dim=1)
    y, state = ssd(**values, return_final_states=True)
    y_padded, state_padded = ssd(**padded, return_final_states=True)
    real = torch.cat([y_padded[:, :25], y_padded[:, 35:50]], dim=1)
    assert_near({"y": real, "state": state_padded}, {"y": y, "state": state}, 1e-5)
    assert y_padded[:, 50:].abs().max() == 0


def test_dt_zero_alone_keeps_x_out_of_the_state_and_still_has_a_gradient():
    values = inputs(70, skip=False, dtype=torch.float32)
    with torch.no_grad():
        values["dt"][:, 3:9] = 0
        values["dt"][:, -1] = 0
    assert_equals_oracle(values, 1e-4)


def test_negative_dt_counts_as_zero():
    values = inputs(20)
    with torch.no_grad():
        values["dt"][:, 5:9] *= -1
    assert_equals_oracle(values, 1e-9)


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8], ids=lambda s: f"{s:.0e}")
def test_steps_that_forget_everything_stay_finite_and_right(scale):
    values = inputs(100, dtype=torch.float32)
    with torch.no_grad():
        values["dt"][:, ::3] *= scale
        values["dt"][:, 1::7] = 0
    y, state = ssd(**values, return_final_states=True)
    y_oracle, state_oracle, leaves = oracle_of(values)
    assert_near({"y": y, "state": state}, {"y": y_oracle, "state": state_oracle}, 1e-3)
    assert_near(gradients(values, (y, state)), gradients(leaves, (y_oracle, state_oracle)), 1e-3)


def test_inputs_may_be_views_with_any_strides():
    values = inputs(40)
    packed = torch.cat([values["x"].flatten(2), values["B"].flatten(2), values["C"].flatten(2)], dim=-1)
    x, B, C = packed.split([20, 6, 6], dim=-1)
    views = values | {"x": x.view(2, 40, 4, 5), "B": B.view(2, 40, 2, 3), "C": C.view(2, 40, 2, 3)}
    views["dt"] = values["dt"].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert_near(gradients(values, (ssd(**views),)), gradients(values, (ssd(**values),)), 1e-12)


@pytest.mark.parametrize("chunk_size", [None, 4], ids=["one-chunk", "chunks"])
def test_gradcheck_passes(chunk_size):
    values = inputs(9, b=1, h=2, g=1, p=2, n=2, softplus=True)

    def scan(*tensors):
        named = dict(zip(values, tensors, strict=True))
        return ssd(**named, chunk_size=chunk_size, dt_softplus=True, return_final_states=True)

    assert torch.autograd.gradcheck(scan, tuple(values.values()))


@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-a-state"])
def test_what_was_traced_without_gradients_differentiates_as_well(initial):
    """The trace keeps no states for a backward; the backward computes them."""
    values = inputs(130, skip=False, initial=initial)
    traced = make_fx(lambda tensors: ssd(**tensors))({name: value.detach() for name, value in values.items()})
    assert_near(gradients(values, (traced(values),)), gradients(values, (ssd(**values),)), 1e-12)


@pytest.mark.parametrize("forgetful", [0.01, 1.0], ids=["little-forgetting", "much-forgetting"])
def test_a_device_without_float64_loses_digits_at_most(monkeypatch, forgetful):
    monkeypatch.setattr(ssd_chunks, "WITHOUT_FLOAT64", ("cpu",))
    values = inputs(100, dtype=torch.float32)
    with torch.no_grad():
        values["A"].fill_(-16)
        values["dt"].fill_(forgetful)
    assert_equals_oracle(values, 1e-4)


def test_a_second_derivative_is_refused():
    values = inputs(6, initial=False)
    (first,) = torch.autograd.grad(ssd(**values).square().sum(), values["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("length", [40, 256], ids=lambda l: f"l{l}")
def test_backward_keeps_only_the_inputs_and_one_state_per_chunk(length):
    values = inputs(length, initial=False, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ssd(**values)
    ours = {tensor.data_ptr(): tensor.numel() for tensor in kept}
    states = 0 if length == 40 else 4 * 2 * 4 * 5 * 3
    clamp = 2 * length * 4  # dt once more, clamped at zero
    assert sum(ours.values()) <= sum(value.numel() for value in values.values()) + states + clamp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_rounded_only_at_the_ends(dtype):
    values = inputs(100, dtype=dtype)
    y, state = ssd(**values, return_final_states=True)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    y_oracle, state_oracle, leaves = oracle_of(values)
    assert_near({"y": y, "state": state}, {"y": y_oracle, "state": state_oracle}, torch.finfo(dtype).eps)
    got = gradients(values, (y, state), [torch.ones_like(y), torch.ones_like(state)])
    expected = gradients(leaves, (y_oracle, state_oracle), [torch.ones_like(y_oracle), torch.ones_like(state_oracle)])
    assert all(gradient.dtype == dtype for gradient in got.values())
    assert_near(got, expected, 2 * torch.finfo(dtype).eps)


def test_autocast_does_not_touch_the_arithmetic():
    values = inputs(70, dtype=torch.float32)

    def run():
        y = ssd(**values)
        return [y, *gradients(values, (y,)).values()]

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_compiled_in_one_graph_equals_eager():
    values = inputs(40, b=1, h=2, g=1, initial=False, dtype=torch.float32, softplus=True)
    weight = torch.randn(10, 3, generator=torch.Generator().manual_seed(2), requires_grad=True)

    def layer(x, dt, A, B, C, D, dt_bias, weight):
        x = F.silu(causal_conv(x.flatten(2), weight)).view(x.shape)
        return ssd(x, dt, A, B, C, 16, D, dt_bias, dt_softplus=True, return_final_states=True)

    arguments = values | {"weight": weight}
    eager = layer(*arguments.values())
    compiled = torch.compile(layer, fullgraph=True)(*arguments.values())
    assert_near(dict(enumerate(compiled)), dict(enumerate(eager)), 1e-6)
    assert_near(gradients(arguments, compiled), gradients(arguments, eager), 1e-5)


@pytest.mark.parametrize("length", [5, 20], ids=["one-chunk", "chunks"])
def test_the_custom_op_passes_torchs_own_check(length):
    values = inputs(length, dtype=torch.float32)
    tensors = [values[name] for name in ("x", "dt", "A", "B", "C", "D", "initial_states")]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ssd_module.ssd_forward, (*tensors, 8, True, True), test_utils=checks)
    tensors[-1] = tensors[-1].mT.contiguous().mT.detach().requires_grad_()  # a state of other strides
    torch.library.opcheck(ssd_module.ssd_forward, (*tensors, 8, True, True), test_utils=checks)
    y, _, states = (value.detach() for value in ssd_module.ssd_forward(*tensors, 8, True, True))
    leaves = [value.detach() for value in tensors]
    torch.library.opcheck(ssd_module.ssd_backward, (y, leaves[-1], *leaves, states, 8), test_utils=checks[::2])


@pytest.mark.parametrize("forgetful", [1.0, 10.0, 100.0])
def test_what_follows_after_much_forgetting_in_a_chunk_is_as_exact_as_ever(forgetful):
    """The decay's running logarithm is large then, and differences of it must not lose their digits."""
    exact = inputs(64, h=4, p=5, n=3, skip=False, initial=False)
    with torch.no_grad():
        exact["A"].fill_(-16)
        exact["dt"].fill_(0.01)
        exact["dt"][:, :40] = forgetful
    single = {name: value.detach().float().requires_grad_() for name, value in exact.items()}
    assert_near({"y": ssd(**single, chunk_size=64)}, {"y": ssd_oracle(**exact)}, 1e-6)
    found, wanted = gradients(single, (ssd(**single, chunk_size=64),)), gradients(exact, (ssd_oracle(**exact),))
    assert_near(found, wanted, 1e-4)


def test_a_second_copy_of_the_file_leaves_the_first_alone():
    package = types.ModuleType("copy-of.hub")
    package.__path__ = [str(Path(ssd_module.__file__).parent)]
    with mock.patch.dict(sys.modules, {package.__name__: package}):
        values = inputs(20)
        before = ssd(**values)
        copy = importlib.import_module(f"{package.__name__}.ssd")
        assert ssd_module.NAMESPACE != copy.NAMESPACE
        assert_near(gradients(values, (copy.ssd(**values),)), gradients(values, (before,)), 1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 6, 20)}, r"`x` has shape \(2, 6, 20\); ssd needs \(b, l, h, p\)"),
        ({"x": (2, 0, 4, 5)}, r"at least one element: skip the call"),
        ({"B": (2, 6, 3)}, r"`B` has shape \(2, 6, 3\); `x` needs \(2, 6, g, n\)"),
        ({"B": (2, 6, 3, 3), "C": (2, 6, 3, 3)}, r"4 heads, not a multiple of the 3 groups"),
        ({"C": (2, 6, 2, 4)}, r"`C` has shape \(2, 6, 2, 4\).* need \(2, 6, 2, 3\)"),
        (
            {"B": (2, 6, 2, 0), "C": (2, 6, 2, 0)},
            r"`B` has shape \(2, 6, 2, 0\); ssd needs at least one",
        ),
        ({"dt": (2, 6, 1)}, r"`dt` has shape \(2, 6, 1\).* need \(2, 6, 4\)"),
        ({"A": (4, 3)}, r"`A` has shape \(4, 3\).* need \(4,\)"),
        ({"D": (4, 5)}, r"`D` has shape \(4, 5\).* need \(4,\)"),
        ({"dt_bias": (1,)}, r"`dt_bias` has shape \(1,\).* need \(4,\)"),
        ({"initial_states": (2, 4, 3, 5)}, r"`initial_states` has shape .* need \(2, 4, 5, 3\)"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_shape_that_does_not_fit_is_refused_with_the_one_needed(change, message):
    values = {name: value.detach() for name, value in inputs(6).items()}
    values |= {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        ssd(**values)


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "initial_states"])
def test_whole_numbers_and_another_device_are_refused(name):
    values = {n: value.detach() for n, value in inputs(6).items()}
    with pytest.raises(ValueError, match=rf"`{name}` is torch.int64; ssd needs floating point: pass `{name}"):
        ssd(**values | {name: values[name].long()})
    if name != "x":
        with pytest.raises(ValueError, match=rf"`{name}` is on meta, `x` on cpu; move `{name}`"):
            ssd(**values | {name: values[name].to("meta")})


def test_a_chunk_size_below_one_is_refused():
    with pytest.raises(ValueError, match="`chunk_size` is 0; ssd needs at least 1"):
        ssd(**inputs(6), chunk_size=0)


@pytest.mark.parametrize(
    ("length", "chunk_size", "expected"),
    [(1, None, 16), (16, None, 16), (50, None, 64), (64, None, 64), (65, None, 128), (9999, None, 128), (50, 32, 32)],
)
def test_a_kernels_chunk_is_no_longer_than_a_short_sequence_needs(length, chunk_size, expected):
    assert kernel_chunk(torch.empty(1, length, 1, 1), chunk_size) == expected
