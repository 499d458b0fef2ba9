"""A Gaussian policy on the state: the classic actor of SAC, squashed by tanh.

B batch, N environments, H actions per chunk, A action size, S state size
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from rlinf.core.protocols import Mode
from rlinf.core.types import ActionOut, Obs
from rlinf.functional.squash import tanh_log_det, unit_gaussian_log_prob
from rlinf.models.embodiment.state_policy import ActivationKey, QPolicyConfig
from rlinf.models.modules.mlp import mlp
from rlinf.models.modules.running_norm import RunningNorm


class MlpPolicyConfig(QPolicyConfig):
    """Keys of `actor.model` for `model_type: mlp_policy`."""

    model_type: Literal["mlp_policy"] = Field("mlp_policy", description="Selects this policy.")
    hidden_dims: tuple[PositiveInt, ...] = Field((256, 256, 256), description="Widths of the actor's hidden layers.")
    activation: ActivationKey = Field("relu", description="Actor's activation.")
    log_std_min: float = Field(-5.0, description="Lower end of the log deviation before the tanh.")
    log_std_max: float = Field(2.0, description="Upper end of the log deviation before the tanh.")


class MlpPolicy(nn.Module):
    """Actor: a = tanh(μ(s) + σ(s) ε), with log σ kept in its range by a tanh.

    Args:
        obs_dim: S.
        action_dim: H·A.
        hidden_dims: widths of the hidden layers.
        activation: of the hidden layers.
        log_std_min, log_std_max: range of log σ.
        normalizer: running normalisation of the state, shared with the critics; None for none.
        num_action_chunks: H.
    """

    noise_shape: tuple[int, ...]

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_dims: tuple[int, ...],
        *,
        activation: ActivationKey = "relu",
        log_std_min: float = -5.0,
        log_std_max: float = 2.0,
        normalizer: RunningNorm | None = None,
        num_action_chunks: int = 1,
    ) -> None:
        super().__init__()
        self.action_dim, self.num_action_chunks = action_dim, num_action_chunks
        self.log_std_min, self.log_std_max = log_std_min, log_std_max
        self.normalizer, self.noise_shape = normalizer, (action_dim,)
        self.net = mlp(obs_dim, hidden_dims, 2 * action_dim, activation=activation)

    def _gaussian(self, obs: Obs) -> tuple[Tensor, Tensor]:
        state = obs["state"] if self.normalizer is None else self.normalizer(obs["state"])
        mean, raw = self.net(state).float().chunk(2, -1)
        log_std = self.log_std_min + 0.5 * (self.log_std_max - self.log_std_min) * (torch.tanh(raw) + 1)
        return mean, log_std

    def sample(self, obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [B, H·A] in (−1, 1) and their log densities [B]; noise ε [B, H·A]."""
        mean, log_std = self._gaussian(obs)
        x = mean + log_std.exp() * noise
        # log N(x; μ, σ²) at x = μ + σ ε depends on ε and σ alone.
        return torch.tanh(x), unit_gaussian_log_prob(noise) - log_std.sum(-1) - tanh_log_det(x)

    @torch.no_grad()
    def act(self, obs: Obs, mode: Mode, noise: Tensor | None = None) -> ActionOut:
        """`train`: a sample. `eval`: tanh of the mean."""
        log_prob: Tensor | None
        if mode == "train":
            if noise is None:
                raise ValueError(f"mode='train' explores: give noise [N, {self.noise_shape}]")
            decision, log_prob = self.sample(obs, noise)
        else:
            decision, log_prob = torch.tanh(self._gaussian(obs)[0]), None
        action = decision.unflatten(-1, (self.num_action_chunks, -1))
        return ActionOut(action=action, decision=decision, log_prob=log_prob)

    def default_target_entropy(self) -> float:
        """−H·A, the usual target for a squashed Gaussian (Haarnoja et al. 2018, arXiv:1812.05905, appendix D)."""
        return -float(self.action_dim)


def build_mlp_policy(
    config: MlpPolicyConfig, *, obs_dim: int, action_dim: int, normalizer: RunningNorm | None
) -> MlpPolicy:
    """The policy that `config` describes, for states of size `obs_dim` and actions of size `action_dim`."""
    return MlpPolicy(
        obs_dim,
        action_dim * config.num_action_chunks,
        config.hidden_dims,
        activation=config.activation,
        log_std_min=config.log_std_min,
        log_std_max=config.log_std_max,
        normalizer=normalizer,
        num_action_chunks=config.num_action_chunks,
    )
