"""Running normalisation of observations."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningNorm(nn.Module):
    """(x − mean) / std, clipped, with the mean and variance of everything that `update` has seen.

    Statistics are buffers: they travel with the weights, and only the learner updates them. One instance is
    shared by the actor and all critics, so that they always see the same numbers.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, dim: int, clip: float = 10.0, epsilon: float = 1e-4) -> None:
        super().__init__()
        self.clip, self.epsilon = clip, epsilon
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, state: Tensor) -> None:
        """Take in rows [B, dim] (parallel variance, Chan et al. 1979)."""
        x = state.to(self.mean.device, torch.float32)
        rows = x.shape[0]
        batch_var, batch_mean = torch.var_mean(x, dim=0, correction=0)
        total = self.count + rows
        weight = (rows / total).to(torch.float32)
        delta = batch_mean - self.mean
        self.mean += delta * weight
        self.var.lerp_(batch_var, weight).add_(delta.square() * weight * (1 - weight))
        self.count.copy_(total)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised rows; the identity until the first update, up to clipping."""
        scale = torch.rsqrt(self.var + self.epsilon)
        return ((x - self.mean) * scale).clamp(-self.clip, self.clip)
