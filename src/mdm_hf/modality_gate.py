"""The scan switch's decision what a prompt calls for: an image, a text, or both (paper Sec. 1, Fig. 2h).

The gate reads the state of the last condition, the `<|assistant|>` token, when all conditions are read and no target
is. It is read as if an image followed: in as many directions whatever is decided.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .configuration_mdm import MDMConfig
from .input_checks import check_inputs
from .sequence_layout import pick, positions


class MDMModalityGateMixin:
    """Gives the model `predict_modalities`. Knows the model only through `self`."""

    config: MDMConfig
    model: Any
    modality_gate: nn.Linear | None  # (hidden_size) -> log-odds of an image and of a text

    @torch.no_grad()
    def gate_states(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        class_ids: Tensor | None = None,
        image_latents: Tensor | None = None,
        state=None,
    ) -> Tensor:
        """What the gate sees of each row, whatever its targets: (b, hidden_size). The arguments are `generate`'s."""
        fixed = image_grid_hw, attention_mask, target_mask
        check_inputs(self.config, input_ids, pixel_values, *fixed, class_ids, image_latents=image_latents)
        if state is not None:
            state.check(self, len(input_ids), input_ids)
        layout = self.model.layout(input_ids.long(), *fixed)
        images = self.model.known_images(layout, pixel_values, image_latents)
        latents = self.model.encode(layout, layout.input_ids, images).mean.float()
        index, is_real = positions(~layout.in_target_group & ~layout.is_padding)
        prefix, has_image = layout.select(index, is_real), torch.ones_like(is_real[:, 0])
        cache = None if state is None else state.to(latents.device).cache(has_image)
        states = self.model.read_conditions(pick(latents, index), prefix, has_image, class_ids, cache)
        return states[torch.arange(len(states), device=states.device), is_real.sum(1) - 1]

    @torch.no_grad()
    def predict_modalities(self, **inputs: Any) -> list[tuple[str, ...]]:
        """What each row calls for: ("image",), ("text",) or ("image", "text").

        Args:
            inputs: As of `generate`; what they target does not matter.

        Raises:
            ValueError: the model has no gate; inputs that do not fit together.
        """
        if self.modality_gate is None:
            raise ValueError(
                "Got a model without a modality gate, which cannot tell what a prompt calls for; need "
                "generate='image', 'text' or both; or train a gate with a recipe's stage `gate`."
            )
        odds = self.modality_gate(self.gate_states(**inputs).to(self.modality_gate.weight.dtype)).float()
        likelier = odds == odds.amax(1, keepdim=True)  # something is always made
        wanted = ((odds > 0) | likelier).tolist()
        return [tuple(name for name, is_on in zip(("image", "text"), row, strict=True) if is_on) for row in wanted]
