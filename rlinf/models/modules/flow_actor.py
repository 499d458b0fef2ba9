"""Velocity networks of the flow policy: Flow-T (a transformer decoder) and Flow-G (a gated unit).

A K-step Euler walk is a recurrent network whose hidden state is the action being denoised; gradients of Q
through it explode or vanish with a plain velocity network. Both networks here are recurrent units made for
that [1]: Flow-T decodes the velocity from one query token (action and time) attending to one observation token;
Flow-G gates it, v = g (v̂ − x), so that a step is the convex update x + g/K (v̂ − x).

Each has `bind(features, rollout)`, which does everything that depends on the observation once and returns the
velocity of `functional.flow`.

Noise. `s_k`, the noise that step k adds to x, is
    fixed     s = noise_std                         (`noise_std_head` off)
    learned   s = exp(log σ(x, t, o)) / K           (`noise_std_head` on): noise of std σ on the velocity
with a range of their own in training (losses) and in rollouts (acting).

References:
    [1] SAC Flow, arXiv:2509.25756.

    B batch, A flattened action, D width, K denoising steps
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from rlinf.functional.flow import Velocity
from rlinf.models.modules.batch_renorm import BatchRenorm
from rlinf.models.modules.transformer import DecoderLayer


@dataclass(frozen=True)
class NoiseRange:
    """How much noise a step may carry, in training or in rollouts.

    Attributes:
        std: s of every step when the noise is fixed; None when it is learned.
        log_std_min, log_std_max: range of the learned log σ of the velocity.
    """

    std: float | None
    log_std_min: float = -5.0
    log_std_max: float = 2.0

    def largest_step_std(self, steps: int) -> float:
        """The largest s that a step can reach."""
        return self.std if self.std is not None else math.exp(self.log_std_max) / steps

    def reference_step_std(self, steps: int) -> float:
        """The fixed s, or the learned one in the middle of its log range."""
        return self.std if self.std is not None else math.exp((self.log_std_min + self.log_std_max) / 2) / steps


class StepNoise(nn.Module):
    """s_k from the decoder's hidden state, or a constant."""

    def __init__(self, width: int, action_dim: int, steps: int, train: NoiseRange, rollout: NoiseRange) -> None:
        super().__init__()
        self.steps, self.train_range, self.rollout_range = steps, train, rollout
        self.head = nn.Linear(width, action_dim) if train.std is None else None

    def forward(self, hidden: Tensor, rollout: bool, dtype: torch.dtype) -> Tensor:
        """[B, A] when learned, else a scalar tensor; computed in `dtype`, the walk's own (not autocast's)."""
        noise = self.rollout_range if rollout else self.train_range
        if self.head is None:
            return hidden.new_tensor(noise.std, dtype=dtype)
        half_range = 0.5 * (noise.log_std_max - noise.log_std_min)
        log_std = noise.log_std_min + half_range * (torch.tanh(self.head(hidden).to(dtype)) + 1)
        return (log_std - math.log(self.steps)).exp()


class FlowTransformer(nn.Module):
    """Flow-T: velocity decoded from [action + time] attending to the observation.

    Parameter names follow `torch.nn.TransformerDecoderLayer`, see `modules.transformer` for what is left out and
    why checkpoints of the full layout load all the same.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        steps: int,
        width: int,
        num_layers: int,
        train_noise: NoiseRange,
        rollout_noise: NoiseRange,
        batch_norm_momentum: float | None = None,
    ) -> None:
        super().__init__()
        self.steps, self.action_dim = steps, action_dim
        self.obs_encoder = nn.Sequential(nn.Linear(obs_dim, width // 2), nn.SiLU(), nn.Linear(width // 2, width))
        self.action_proj = nn.Linear(action_dim, width)
        self.time_embedding = nn.Sequential(
            nn.Linear(1, width // 4),
            nn.SiLU(),
            nn.Linear(width // 4, width // 2),
            nn.SiLU(),
            nn.Linear(width // 2, width),
        )
        self.transformer_layers = nn.ModuleList(DecoderLayer(width) for _ in range(num_layers))
        self.velocity_mean_head = nn.Linear(width, action_dim)
        self.step_noise = StepNoise(width, action_dim, steps, train_noise, rollout_noise)
        self.bn_obs = BatchRenorm(obs_dim, batch_norm_momentum) if batch_norm_momentum else None
        self.bn_action = BatchRenorm(action_dim, batch_norm_momentum) if batch_norm_momentum else None
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def bind(self, features: Tensor, rollout: bool) -> Velocity:
        """The velocity field given observation features [B, S]."""
        if self.bn_obs is not None:
            features = self.bn_obs(features)
        memory = self.obs_encoder(features)
        layers = cast(list[DecoderLayer], list(self.transformer_layers))
        fused = [layer.self_attn.fused() for layer in layers]
        cross = [layer.multihead_attn(memory) for layer in layers]
        times = torch.arange(self.steps, device=features.device, dtype=features.dtype)[:, None] / self.steps
        return partial(self._velocity, fused, cross, self.time_embedding(times), rollout)

    def _velocity(
        self,
        fused: list[tuple[Tensor, Tensor]],
        cross: list[Tensor],
        time: Tensor,
        rollout: bool,
        x: Tensor,
        k: int,
    ) -> tuple[Tensor, Tensor]:
        if self.bn_action is not None:
            x = self.bn_action(x)
        hidden = self.action_proj(x) + time[k]
        for layer, weights, constant in zip(self.transformer_layers, fused, cross, strict=True):
            hidden = layer(hidden, weights, constant)
        return self.velocity_mean_head(hidden).to(x.dtype), self.step_noise(hidden, rollout, x.dtype)


class FlowGate(nn.Module):
    """Flow-G: v = g (v̂ − x) with a gate g = sigmoid(z) that starts almost open (bias +5)."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        steps: int,
        width: int,
        num_layers: int,
        train_noise: NoiseRange,
        rollout_noise: NoiseRange,
        batch_norm_momentum: float | None = None,
        time_dim: int = 32,
    ) -> None:
        super().__init__()
        self.steps, self.action_dim, self.time_dim = steps, action_dim, time_dim
        self.time_embedding = nn.Sequential(nn.Linear(time_dim, 64), nn.SiLU(), nn.Linear(64, time_dim))
        in_dim = obs_dim + action_dim + time_dim
        self.bn_obs = BatchRenorm(obs_dim, batch_norm_momentum) if batch_norm_momentum else None
        self.bn_action = BatchRenorm(action_dim, batch_norm_momentum) if batch_norm_momentum else None
        self.candidate_net = _swish_mlp(in_dim, width, num_layers)
        self.velocity_mean_head = nn.Linear(width, action_dim)
        gate = nn.Linear(width, action_dim)
        nn.init.zeros_(gate.weight)
        nn.init.constant_(gate.bias, 5.0)
        self.gate_net = nn.Sequential(_swish_mlp(in_dim, width, 1), gate)
        self.step_noise = StepNoise(width, action_dim, steps, train_noise, rollout_noise)

    def bind(self, features: Tensor, rollout: bool) -> Velocity:
        """The velocity field given observation features [B, S]."""
        if self.bn_obs is not None:
            features = self.bn_obs(features)
        time = self.time_embedding(self._sinusoid(features.device))
        return partial(self._velocity, features, time, rollout)

    def _sinusoid(self, device: torch.device) -> Tensor:
        """sin and cos of t at geometric frequencies, [K, time_dim]."""
        half = self.time_dim // 2
        rates = torch.exp(-math.log(10_000.0) * torch.arange(half, device=device) / (half - 1))
        angle = torch.arange(self.steps, device=device)[:, None] / self.steps * rates
        return torch.cat([angle.sin(), angle.cos()], -1)

    def _velocity(self, features: Tensor, time: Tensor, rollout: bool, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        seen = self.bn_action(x) if self.bn_action is not None else x
        inputs = torch.cat([features, seen, time[k].expand(len(x), -1)], -1)
        hidden = self.candidate_net(inputs)
        gate = torch.sigmoid(self.gate_net(inputs).to(x.dtype))
        velocity = gate * (self.velocity_mean_head(hidden).to(x.dtype) - x)
        return velocity, self.step_noise(hidden, rollout, x.dtype)


def _swish_mlp(in_dim: int, width: int, num_layers: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(num_layers):
        layers += [nn.Linear(in_dim, width), nn.SiLU()]
        in_dim = width
    return nn.Sequential(*layers)
