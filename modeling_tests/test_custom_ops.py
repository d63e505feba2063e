"""Claims about what the custom ops cannot do: they say so."""

import pytest
import torch

from mdm_hf.causal_conv import causal_conv
from mdm_hf.fused_scan import merge_gate_norm, scan_conv
from mdm_hf.scan_switch import scan, unscan
from mdm_hf.ssd import ssd


ORDER = torch.arange(5).view(1, 5, 1)
STEPS, READ = torch.ones(1, 5, 3), torch.ones(1, 5, 1, 3)
OPS = {  # each as a function of one of its tensors, and that tensor
    "ssd": (lambda B: ssd(READ, torch.ones(1, 5, 1), -torch.ones(1), B, B), READ),
    "causal_conv": (lambda x: causal_conv(x, torch.ones(3, 2)), STEPS),
    "scan": (lambda x: scan(x, ORDER, ORDER), STEPS),
    "unscan": (lambda y: unscan(y, ORDER, ORDER), READ),
    "scan_conv": (lambda w: scan_conv(STEPS, ORDER, ORDER, w, torch.ones(1, 3)), torch.ones(1, 3, 2)),
    "merge_gate_norm": (lambda z: merge_gate_norm(READ, ORDER, ORDER, z, torch.ones(3), 1e-5), STEPS),
}


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused_and_backward_is_not(op):
    function, value = OPS[op]
    with pytest.raises(RuntimeError, match=rf"Got a tangent.* in {op};.* use torch.func.vjp or backward"):
        torch.func.jvp(function, (value,), (value,))
    assert torch.autograd.functional.vjp(lambda v: function(v).sum(), value)[1].abs().sum() > 0
