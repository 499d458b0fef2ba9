"""Batch renormalisation: batch statistics in training, corrected towards the running ones.

Reference: Ioffe 2017, arXiv:1702.03275; used by CrossQ and SAC Flow (momentum 0.99, r ≤ 3, |d| ≤ 5, ε 1e-3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BatchRenorm(nn.Module):
    """y = ((x − μ_B)/σ_B · r + d) · weight + bias, with r = σ_B/σ and d = (μ_B − μ)/σ clipped and constant.

    Batch statistics are used, and running ones updated, only in training mode with gradients enabled; anywhere
    else (acting, Bellman targets) the layer normalises by its running statistics. During the first
    `warmup_steps` updates r = 1 and d = 0, which is plain batch normalisation.
    """

    running_mean: Tensor
    running_var: Tensor
    steps: Tensor

    def __init__(
        self,
        dim: int,
        momentum: float = 0.99,
        *,
        epsilon: float = 1e-3,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.momentum, self.epsilon, self.r_max, self.d_max = momentum, epsilon, r_max, d_max
        self.warmup_steps = warmup_steps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise rows [B, dim]."""
        running_std = (self.running_var + self.epsilon).sqrt()
        if not (self.training and torch.is_grad_enabled()):
            return (x - self.running_mean) / running_std * self.weight + self.bias
        var, mean = torch.var_mean(x, dim=0, correction=0)
        std = (var + self.epsilon).sqrt()
        with torch.no_grad():
            warm = self.steps < self.warmup_steps
            r = (std / running_std).clamp(1 / self.r_max, self.r_max).masked_fill(warm, 1.0)
            d = ((mean - self.running_mean) / running_std).clamp(-self.d_max, self.d_max).masked_fill(warm, 0.0)
            self.running_mean.lerp_(mean, 1 - self.momentum)
            self.running_var.lerp_(var, 1 - self.momentum)
            self.steps += 1
        return ((x - mean) / std * r + d) * self.weight + self.bias
