"""What tests of hand-written gradients share: a random weighting of outputs, its gradients, and how near is equal."""

import torch


def weights_like(*tensors):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype) for tensor in tensors]


def gradients(values, outputs, weights=None):
    """Gradients of a random weighting of `outputs`, by name; one that does not exist counts as zero."""
    weights = weights_like(*outputs) if weights is None else weights
    found = torch.autograd.grad(outputs, list(values.values()), weights, allow_unused=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(values.items(), found, strict=True)
    }


def assert_near(got, expected, tolerance):
    """Every named tensor is within `tolerance` of the expected one, relative to the latter's largest element."""
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert value.shape == expected[name].shape, name
        if value.numel():
            error = (value.double() - expected[name].double()).abs().max()
            assert error <= tolerance * max(1.0, expected[name].abs().max()), f"{name} is off by {error:.2e}"
