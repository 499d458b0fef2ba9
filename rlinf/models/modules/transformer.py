"""A post-norm transformer decoder over one query token and one memory token.

With a single key the softmax is over one element and equals 1, whatever query and key are. So

    self-attention   = out_proj(v_proj(x)), an affine map whose two matrices are multiplied once per observation
    cross-attention  = out_proj(v_proj(memory)), a constant of the observation, computed once for all K steps

Query and key projections never touch the output and receive no gradient: they are not held here. Checkpoints
in the layout of `torch.nn.TransformerDecoderLayer` still load (`in_proj_weight` is [3D, D]; its value rows are
taken), and `full_layout` writes them.

    B batch, D width
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SingleTokenAttention(nn.Module):
    """Multi-head attention to exactly one token: out_proj(v_proj(token))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, token: Tensor) -> Tensor:
        """[B, D] → [B, D]."""
        return self.out_proj(self.v_proj(token))

    def fused(self) -> tuple[Tensor, Tensor]:
        """Weight [D, D] and bias [D] of the one affine map that both projections make, differentiable."""
        weight = self.out_proj.weight @ self.v_proj.weight
        bias = torch.addmv(self.out_proj.bias, self.out_proj.weight, self.v_proj.bias)
        return weight, bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.pop(f"{prefix}in_proj_weight", None)
        bias = state_dict.pop(f"{prefix}in_proj_bias", None)
        if weight is not None and bias is not None:
            state_dict[f"{prefix}v_proj.weight"] = weight[-self.width :]
            state_dict[f"{prefix}v_proj.bias"] = bias[-self.width :]
        super()._load_from_state_dict(state_dict, prefix, *args)


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward (4 D, GELU), each followed by a layer norm of the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn = SingleTokenAttention(width)
        self.multihead_attn = SingleTokenAttention(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, fused: tuple[Tensor, Tensor], cross: Tensor) -> Tensor:
        """[B, D] → [B, D], with `self_attn.fused()` and `multihead_attn(memory)` given by the caller."""
        x = self.norm1(x + F.linear(x, *fused))
        x = self.norm2(x + cross)
        return self.norm3(x + self.linear2(F.gelu(self.linear1(x))))


def full_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the layout of `torch.nn.TransformerDecoderLayer`, with zero query and key rows."""
    full: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".v_proj." not in name:
            full[name] = tensor
            continue
        stem, _, kind = name.rpartition(".v_proj.")
        full[f"{stem}.in_proj_{kind}"] = torch.cat([torch.zeros_like(tensor), torch.zeros_like(tensor), tensor])
    return full
