"""Fits a model's modality gate to conversations: logistic regression on the states of their conditions.

The blocks stay as they are. What a conversation's last answer holds says what its prompt called for.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modeling_mdm import MDMForMultiModalGeneration


HELD_OUT = 5  # every fifth conversation
PENALTY = 1e-4  # of the squared weights, for states at unit variance


def gate_examples(model: MDMForMultiModalGeneration, batches: Iterable[dict]) -> tuple[Tensor, Tensor]:
    """The gate's inputs (n, hidden_size) and whether an image and a text were the answer (n, 2)."""
    states, wanted = [], []
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        states.append(model.gate_states(**inputs))
        layout = model.model.layout(
            *(inputs.get(n) for n in ("input_ids", "image_grid_hw", "attention_mask", "target_mask"))
        )
        kinds = [(layout.is_target & kind).any(1) for kind in (layout.is_patch, layout.is_text)]
        wanted.append(torch.stack(kinds, dim=1))
    return torch.cat(states), torch.cat(wanted)


def fit_gate(model: MDMForMultiModalGeneration, batches: Iterable[dict]) -> float:
    """Fits the gate; returns how many of the conversations that were held out have both modalities decided right.

    Args:
        model: With a gate.
        batches: Inputs of the model with targets.

    Raises:
        ValueError: too few conversations.
    """
    states, wanted = gate_examples(model, batches)
    if len(states) < 2 * HELD_OUT:
        raise ValueError(
            f"Got {len(states)} conversations to fit a modality gate to; need at least {2 * HELD_OUT}, better 2,000; "
            "raise stages.gate.num_samples."
        )
    x, y = states.double(), wanted.double()
    is_held_out = torch.arange(len(x), device=x.device) % HELD_OUT == HELD_OUT - 1
    mean, scale = x[~is_held_out].mean(0), x[~is_held_out].std(0).clamp(min=1e-6)
    x = (x - mean) / scale
    gate = nn.Linear(x.shape[1], 2, dtype=torch.float64, device=x.device)
    nn.init.zeros_(gate.weight)
    nn.init.zeros_(gate.bias)
    solver = torch.optim.LBFGS(gate.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        fit = F.binary_cross_entropy_with_logits(gate(x[~is_held_out]), y[~is_held_out])
        value = fit + PENALTY * gate.weight.square().sum()
        value.backward()
        return value

    solver.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        right = ((gate(x[is_held_out]) > 0) == wanted[is_held_out]).all(1).double().mean()
        weight = gate.weight / scale
        model.modality_gate.weight.copy_(weight)
        model.modality_gate.bias.copy_(gate.bias - weight @ mean)
    return float(right)
