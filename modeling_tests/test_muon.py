"""Claims about Muon, by an SVD in float64 and by what schedules and checkpoints see of it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_config
from transformers.optimization import get_scheduler

from mdm_hf import MDMForMultiModalGeneration
from mdm_hf.training.muon import MuonWithAdamW, muon_for
from mdm_hf.training.stages import check_arguments


def two_parameters(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((12, 20), (7,))]


def give_gradients(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for one in parameters:
        one.grad = torch.randn(one.shape, generator=generator)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_a_matrix_moves_along_the_orthogonal_factor_of_its_gradient_as_far_as_adamw_would(shape):
    weight = torch.nn.Parameter(torch.zeros(shape))
    other = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    MuonWithAdamW([weight], [other], lr=0.01).step()
    u, _, vh = torch.linalg.svd(weight.grad.double(), full_matrices=False)
    step = -weight.detach().double()
    assert torch.nn.functional.cosine_similarity(step.flatten(), (u @ vh).flatten(), dim=0) > 0.97
    assert step.pow(2).mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.25)  # AdamW's, by Liu et al. 2025


def test_all_but_the_matrices_moves_as_with_adamw_alone():
    (matrix, other), (_, alone) = two_parameters(), two_parameters()
    ours = MuonWithAdamW([matrix], [other], lr=0.01, betas=(0.9, 0.99))
    adamw = torch.optim.AdamW([alone], lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    for seed in range(3):
        give_gradients([matrix, other], seed)
        alone.grad = other.grad.clone()
        ours.step()
        adamw.step()
    assert torch.equal(other, alone)


def test_a_checkpoint_goes_on_to_the_same_weights_and_a_schedule_reaches_both_parts():
    parameters = two_parameters()
    optimizer = MuonWithAdamW(parameters[:1], parameters[1:], lr=0.01)
    for seed in range(3):
        give_gradients(parameters, seed)
        optimizer.step()
    copies = [torch.nn.Parameter(one.detach().clone()) for one in parameters]
    resumed = MuonWithAdamW(copies[:1], copies[1:], lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedules = [get_scheduler("cosine", one, 0, 10) for one in (optimizer, resumed)]
    for seed in range(3, 6):
        for one, held in ((optimizer, parameters), (resumed, copies)):
            give_gradients(held, seed)
            one.step()
        for schedule in schedules:
            schedule.step()
    assert all(torch.equal(one, other) for one, other in zip(parameters, copies, strict=True))
    rates = {group["lr"] for one in (optimizer.muon, optimizer.adamw) for group in one.param_groups}
    assert len(rates) == 1
    assert rates.pop() < 0.01


@pytest.mark.parametrize("backbone", ["mamba", "transformer"])
def test_muon_takes_the_projections_of_the_blocks_and_adamw_all_else_that_is_trained(backbone):
    model = MDMForMultiModalGeneration(tiny_config(backbone=backbone))
    model.model.vae.requires_grad_(False)
    optimizer = muon_for(model, model.model.layers, 0.25, betas=(0.9, 0.9))
    muon, adamw = ([id(p) for p in group["params"]] for group in optimizer.param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[one].split(".")[-2] for one in muon} == {"in_proj", "out_proj", "projection"}
    assert all(names[one].startswith("model.layers.") for one in muon)
    assert not any(
        names[one].endswith(("proj.weight", "projection.weight")) and "layers" in names[one] for one in adamw
    )
    assert sorted(muon + adamw) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert optimizer.adamw.param_groups[0]["betas"] == (0.9, 0.9)


def test_muon_is_refused_where_shards_would_have_to_be_orthogonal():
    arguments = SimpleNamespace(report_to=[], fsdp=True, world_size=2, n_gpu=1)
    with pytest.raises(ValueError, match=r"Got stages.diffusion.optim muon with fsdp, .* need whole matrices; leave"):
        check_arguments("diffusion", arguments, "muon")


def test_a_model_without_trained_blocks_is_refused():
    model = MDMForMultiModalGeneration(tiny_config()).requires_grad_(False)
    with pytest.raises(
        ValueError, match="Got a model with no trained block for muon; need .* leave out `optim: muon`"
    ):
        muon_for(model, model.model.layers, 0.1)


def test_a_step_is_that_of_torchs_muon_up_to_its_half_precision():
    (matrix, other), (theirs, _) = two_parameters(), two_parameters()
    ours = MuonWithAdamW([matrix], [other], lr=0.01, weight_decay=0.1)
    torchs = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(4):
        give_gradients([matrix, other], seed)
        theirs.grad = matrix.grad.clone()
        ours.step()
        torchs.step()
    torch.testing.assert_close(matrix, theirs, atol=4e-4, rtol=0)  # of steps of 0.002 each
    assert ours.state[matrix].keys() == torchs.state[theirs].keys()
