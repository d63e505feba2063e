"""The block of MDM with a Transformer in Mamba's place (paper Table 3's ablation): `backbone="transformer"`.

Embeddings, heads, losses and the sampling loop are the same. Every position sees what the scans of all directions
together let it see: the prefix itself alone, the target group everything. So the keys and values of the conditions are
the same in every denoising step and are computed once, as the state of the scans is.

Symbols
    h          hidden state of a position                                            (b, l, hidden_size)
    q, k, v    queries, keys, values                                                 (b, heads, l, head_dim)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_mdm import MDMConfig
from .modeling_mdm_block import MDMConditionCache, MDMLayer, MDMRMSNorm
from .sequence_layout import AttentionPlan


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i + d / 2}) of `x` (b, heads, l, d) by the angles of `cos`, `sin` (b, 1, l, d / 2)."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class MDMAttention(nn.Module):
    """Attention over places in their segments: queries and keys are normalised and turned by row and column.

    It is always torch's `scaled_dot_product_attention`: transformers' `attn_implementation` is not heeded, and one
    that is neither None nor "eager" is refused on loading, as of a model without attention.
    """

    def __init__(self, config: MDMConfig):
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.in_proj = nn.Linear(size, 3 * size, bias=False)
        self.query_norm = MDMRMSNorm(config.head_dim, config.rms_norm_eps)
        self.key_norm = MDMRMSNorm(config.head_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(size, size, bias=False)

    def forward(self, hidden_states: Tensor, plan: AttentionPlan, cache: MDMConditionCache | None = None) -> Tensor:
        projected = self.in_proj(hidden_states)
        live = None if cache is None else cache.live
        if live is not None:
            [projected] = cache.complete([projected])
        b, l, _ = projected.shape
        q, k, v = projected.view(b, l, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.query_norm(q), plan.cos, plan.sin), rotate(self.key_norm(k), plan.cos, plan.sin)
        sees, is_real = plan.sees, plan.is_real
        if live is not None:  # only they ask
            places = live[:, None, :, None]
            q = q.gather(2, places.expand(-1, self.num_heads, -1, self.head_dim))
            sees = sees.gather(2, places.expand(-1, -1, -1, l))
        if cache is not None and cache.keys is not None:
            k, v = torch.cat([cache.keys, k], dim=2), torch.cat([cache.values, v], dim=2)
            asks = plan.is_real if live is None else cache.live_is_real
            sees_prefix = asks & cache.is_real.transpose(1, 2)
            sees = torch.cat([sees_prefix.unsqueeze(1), sees], dim=-1)
            is_real = torch.cat([cache.is_real, is_real], dim=1)
        if cache is not None and cache.is_open:
            cache.keys, cache.values, cache.is_real = k, v, is_real
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=sees)
        return self.out_proj(y.transpose(1, 2).reshape(*hidden_states.shape))


class MDMGatedMLP(nn.Module):
    """out_proj(silu(gate) * x), both of one projection: (b, l, hidden_size)."""

    def __init__(self, config: MDMConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, 2 * config.mlp_size, bias=False)
        self.out_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, x = self.in_proj(hidden_states).chunk(2, dim=-1)
        return self.out_proj(F.silu(gate) * x)


class MDMAttentionBlock(MDMLayer):
    """h + attention(norm(h)), then h + mlp(norm(h)); padding, which sees itself alone, stays zero."""

    def __init__(self, config: MDMConfig):
        super().__init__(config)
        self.norm = MDMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = MDMAttention(config)
        self.mlp_norm = MDMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MDMGatedMLP(config)

    def forward(self, hidden_states: Tensor, plan: AttentionPlan, cache: MDMConditionCache | None = None) -> Tensor:
        hidden_states = self.with_condition(hidden_states, plan, cache)
        hidden_states = hidden_states + self.mixer(self.norm(hidden_states), plan, cache)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))
