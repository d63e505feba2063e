"""Claims about the causal convolution in front of the selective scan."""

import pytest
import torch
from gradients import assert_near, gradients
from torch.nn import functional as F

from mdm_hf import causal_conv as conv_module
from mdm_hf.causal_conv import causal_conv


def conv_inputs(l, width, *, b=3, c=6, bias=True, history=True):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (b, l, c), "weight": (c, width)}
    if bias:
        shapes["bias"] = (c,)
    if history:
        shapes["history"] = (b, width - 1, c)
    values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: value.requires_grad_() for name, value in values.items()}


def conv_oracle(x, weight, bias=None, history=None):
    b, _, c = x.shape
    history = x.new_zeros(b, weight.shape[1] - 1, c) if history is None else history
    padded = torch.cat([history, x], dim=1).transpose(1, 2)
    return F.conv1d(padded, weight.unsqueeze(1), bias, groups=c).transpose(1, 2)


@pytest.mark.parametrize("elements", [1, 60, 1 << 17], ids=lambda e: f"tiles-of-{e}")
@pytest.mark.parametrize("extras", ["", "bias", "history", "bias+history"])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 17], ids=lambda l: f"l{l}")
def test_causal_conv_and_every_gradient_equal_conv1d(monkeypatch, length, width, extras, elements):
    monkeypatch.setattr(conv_module, "TILE_ELEMENTS_CPU", elements)
    values = conv_inputs(length, width, bias="bias" in extras, history="history" in extras)
    y, expected = causal_conv(**values), conv_oracle(**values)
    assert_near({"y": y}, {"y": expected}, 1e-12)
    assert_near(gradients(values, (y,)), gradients(values, (expected,)), 1e-12)


def test_causal_conv_of_two_parts_with_the_tail_handed_over_equals_one_run():
    values = conv_inputs(12, 4, history=False)
    x = values["x"]
    second = causal_conv(**values | {"x": x[:, 5:]}, history=x[:, 2:5])
    joined = torch.cat([causal_conv(**values | {"x": x[:, :5]}), second], dim=1)
    assert_near({"y": joined}, {"y": causal_conv(**values)}, 1e-12)
    assert_near(gradients(values, (joined,)), gradients(values, (causal_conv(**values),)), 1e-12)


def test_causal_conv_in_bf16_is_rounded_only_at_the_end():
    values = {name: value.detach().bfloat16().requires_grad_() for name, value in conv_inputs(17, 4).items()}
    doubles = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    y, expected = causal_conv(**values), conv_oracle(**doubles)
    assert y.dtype == torch.bfloat16
    ones = torch.ones_like(y)
    assert_near({"y": y}, {"y": expected}, torch.finfo(torch.bfloat16).eps)
    got = gradients(values, (y,), [ones])
    assert_near(got, gradients(doubles, (expected,), [ones.double()]), torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (3, 6)}, r"`x` has shape \(3, 6\); causal_conv needs \(b, l, c\)"),
        ({"x": (3, 0, 6)}, "at least one element"),
        ({"weight": (6, 1, 4)}, r"`weight` has shape \(6, 1, 4\).* needs \(6, w\)"),
        ({"bias": (4,)}, r"`bias` has shape \(4,\).* need \(6,\)"),
        ({"history": (3, 4, 6)}, r"`history` has shape \(3, 4, 6\).* need \(3, 3, 6\)"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_causal_conv_refuses_a_shape_that_does_not_fit(change, message):
    values = {name: value.detach() for name, value in conv_inputs(5, 4).items()}
    values |= {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        causal_conv(**values)


def test_a_second_derivative_is_refused():
    x = torch.randn(1, 6, 3, requires_grad=True)
    (first,) = torch.autograd.grad(causal_conv(x, torch.randn(3, 2)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


def test_autocast_does_not_touch_the_arithmetic():
    values = {name: value.detach().float().requires_grad_() for name, value in conv_inputs(9, 3).items()}

    def run():
        y = causal_conv(**values)
        return [y, *gradients(values, (y,)).values()]

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("length", [1, 5, 20])
@pytest.mark.parametrize("has_history", [False, True], ids=["from-zeros", "history"])
def test_the_custom_op_passes_torchs_own_check(length, has_history):
    history = torch.randn(2, 2, 4) if has_history else None
    conv = (torch.randn(2, length, 4, requires_grad=True), torch.randn(4, 3), torch.randn(4), history)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(conv_module.conv_forward, conv, test_utils=checks)
