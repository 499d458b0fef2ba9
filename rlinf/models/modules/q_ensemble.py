"""E action values evaluated as one batched network.

Every layer is one batched product: on a GPU that is E times fewer kernels than a loop over heads, in bfloat16 on a
CPU 1.5 to 3 times faster.

    E critics, B batch, D hidden width
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlinf.models.modules.mlp import ACTIVATIONS, ActivationName


class EnsembleLinear(nn.Module):
    """E independent linear layers: [E, B, in] → [E, B, out], begun like `torch.nn.Linear`.

    That start is 2.4 times smaller than He's. It matters: under layer normalisation the effective step goes with
    1/‖w‖², and without it a large start makes Q rough in the action (docs/LOG.md).
    """

    def __init__(self, num_heads: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_dim)
        self.weight = nn.Parameter(torch.empty(num_heads, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_heads, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """One product per head; an input without head axis [B, in] is shared by all heads."""
        if self.weight.shape[-1] == 1:
            # A product with a column is memory traffic: on CPUs a third of a batched product's time.
            # Under autocast x is bfloat16; the terms are then multiplied in it and added in float32, as in a product.
            terms = x * self.weight.mT.to(x.dtype)
            return terms.sum(-1, keepdim=True, dtype=self.bias.dtype) + self.bias
        return torch.baddbmm(self.bias, x.expand(len(self.weight), *x.shape[-2:]), self.weight)


class EnsembleLayerNorm(nn.Module):
    """Layer normalisation over the last axis with a scale and shift per head."""

    ones: Tensor

    def __init__(self, num_heads: int, dim: int) -> None:
        super().__init__()
        # Torch's kernel for CPUs takes twice as long when it is given no scale.
        self.register_buffer("ones", torch.ones(dim), persistent=False)
        self.weight = nn.Parameter(torch.ones(num_heads, 1, dim))
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[E, B, D] → [E, B, D]."""
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], self.ones), self.weight)


class QEnsemble(nn.Module):
    """Q_e(features, action) for e = 1 … E: hidden layers [linear, layer norm, activation], then a scalar.

    Each head has the weights it would have alone; no parameter is shared.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dims: Sequence[int],
        num_heads: int,
        *,
        activation: ActivationName = "relu",
        layer_norm: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        layers: list[nn.Module] = []
        for width in hidden_dims:
            linear = EnsembleLinear(num_heads, in_dim, width)
            layers.append(linear)
            if layer_norm:
                layers.append(EnsembleLayerNorm(num_heads, width))
            layers.append(ACTIVATIONS[activation]())
            in_dim = width
        self.net = nn.Sequential(*layers, EnsembleLinear(num_heads, in_dim, 1))

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        """Q values [E, B] in float32."""
        return self.net(torch.cat([features, action], -1)).squeeze(-1).float()
