"""Claims about what stands around the scan, in plain PyTorch; the kernels are held against it in interpreted/."""

import pytest
import torch

from mdm_hf.fused_scan import merge_gate_norm


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=["fp32-weight", "bf16-weight"])
@pytest.mark.parametrize("y", [torch.float32, torch.bfloat16], ids=["fp32-y", "bf16-y"])
@pytest.mark.parametrize("z", [torch.float32, torch.bfloat16], ids=["fp32-z", "bf16-z"])
def test_the_output_has_the_dtype_of_the_gate(y, z, weight):
    order = torch.arange(5).view(1, 5, 1)
    out = merge_gate_norm(
        torch.ones(1, 5, 1, 8, dtype=y), order, order, torch.ones(1, 5, 8, dtype=z), torch.ones(8, dtype=weight), 1e-5
    )
    assert out.dtype == z
