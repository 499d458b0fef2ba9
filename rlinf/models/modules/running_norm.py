"""Running normalisation of observations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlinf.core.ranks import ONE_RANK, Ranks


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
    def update(self, state: Tensor, ranks: Ranks = ONE_RANK) -> None:
        """Take in rows [B, dim] of every rank (parallel variance, Chan et al. 1979), the same way on all.

        Collective. B may differ between ranks; one without rows gives any tensor without elements.
        """
        x = state.to(self.mean)
        var, mean = torch.var_mean(x, dim=0, correction=0) if len(x) else (self.var, self.mean)
        parts = zip(ranks.gather(len(x)), ranks.cat(mean[None]), ranks.cat(var[None]), strict=True)
        for rows, batch_mean, batch_var in parts:
            if not rows:
                continue
            total = self.count + rows
            weight = (rows / total).to(self.mean.dtype)
            delta = batch_mean - self.mean
            self.mean += delta * weight
            self.var.lerp_(batch_var, weight).add_(delta.square() * weight * (1 - weight))
            self.count.copy_(total)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised rows; the identity until the first update, up to clipping."""
        scale = torch.rsqrt(self.var + self.epsilon)
        return ((x - self.mean) * scale).clamp(-self.clip, self.clip)
