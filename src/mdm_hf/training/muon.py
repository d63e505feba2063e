"""Muon for the weight matrices of the blocks, AdamW for all else, as one optimiser.

Muon (Jordan et al. 2024) makes the momentum of a matrix orthogonal before it is applied: no direction of the update
outweighs the others, however seldom the data ask for it. The step of a matrix has the root mean square of AdamW's (Liu
et al. 2025), so that one learning rate serves both. docs/training.md has what it gains.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Near the orthogonal factor of a matrix (m, n), by the quintic Newton-Schulz iteration of Jordan et al.

    In bfloat16 on a GPU; in float32 on a CPU, where half precision has products of its own on few machines and is
    sixteen times slower on the others.
    """
    a, b, c = coefficients
    x = matrix if matrix.device.type == "cpu" else matrix.bfloat16()
    x = x.mT if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


class _Muon(Muon):
    """torch's Muon, with `orthogonal`."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, momentum = self.state[parameter], group["momentum"]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                ahead = parameter.grad.lerp(mean, momentum) if group["nesterov"] else mean
                update = orthogonal(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)


class MuonWithAdamW(Optimizer):
    """Two optimisers over the same groups and states as this one's: schedules and checkpoints see one.

    Args:
        matrices: Parameters (m, n) for Muon.
        others: Parameters for AdamW.
        lr: Learning rate of both.
        betas, eps: AdamW's.
        weight_decay: Of both, decoupled.
    """

    def __init__(
        self,
        matrices: list[Tensor],
        others: list[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        self.muon = _Muon(matrices, lr=lr, weight_decay=weight_decay)
        self.adamw = AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of `load_state_dict`, which puts other groups and states in the place of the old ones."""
        super().__setstate__(state)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        self.muon.step()
        self.adamw.step()
        return loss


def muon_for(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> MuonWithAdamW:
    """The optimiser of a model: Muon takes the trained weights of the linear projections in its `blocks`.

    Args:
        model: Whose trained parameters are optimised.
        blocks: Its blocks.
        lr, betas, eps, weight_decay: See [`MuonWithAdamW`].

    Raises:
        ValueError: none of them is trained.
    """
    linear = [module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)]
    matrices = [module.weight for module in linear if module.weight.requires_grad]
    if not matrices:
        raise ValueError(
            "Got a model with no trained block for muon; need a stage that trains the blocks; leave out `optim: muon`."
        )
    taken = {id(weight) for weight in matrices}
    others = [one for one in model.parameters() if one.requires_grad and id(one) not in taken]
    return MuonWithAdamW(matrices, others, lr, betas, eps, weight_decay)
