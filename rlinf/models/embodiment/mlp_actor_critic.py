"""A Gaussian policy on the state with a value function of its own: the classic networks of PPO.

The deviation does not depend on the state, and the Gaussian is not squashed: actions beyond (−1, 1) are cut off on
their way to the robot, while the losses reason about what was drawn.

B batch, N environments, H actions per chunk, A action size, S state size
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from rlinf.core.protocols import Mode
from rlinf.core.types import ActionOut, Obs
from rlinf.functional.squash import LOG_SQRT_TAU, UNIT_GAUSSIAN_ENTROPY
from rlinf.models.embodiment.state_policy import ActivationKey, StatePolicyConfig
from rlinf.models.modules.mlp import mlp
from rlinf.models.modules.running_norm import RunningNorm

MEAN_GAIN = 0.01
"""Of the mean's last layer: the first actions are almost pure noise, wherever the policy starts."""


class MlpActorCriticConfig(StatePolicyConfig):
    """Keys of `actor.model` for `model_type: mlp_actor_critic`."""

    model_type: Literal["mlp_actor_critic"] = Field(
        "mlp_actor_critic", description="Selects this policy; `mlp_policy` means it where the algorithm is PPO."
    )
    hidden_dims: tuple[PositiveInt, ...] = Field((256, 256, 256), description="Widths of the policy's hidden layers.")
    value_hidden_dims: tuple[PositiveInt, ...] = Field(
        (256, 256, 256), description="Widths of the value function's hidden layers."
    )
    activation: ActivationKey = Field("tanh", description="Activation of both.")
    log_std_init: float = Field(-0.5, description="Log deviation of the actions before training.")


class MlpActorCritic(nn.Module):
    """ActorCritic: a = μ(s) + σ ε, and V(s).

    Args:
        obs_dim: S.
        action_dim: H·A.
        hidden_dims, value_hidden_dims: widths of the hidden layers of policy and value function.
        activation: of both.
        log_std_init: log σ before training, in units of the action range.
        normalizer: running normalisation of the state, shared by both; None for none.
        num_action_chunks: H.
    """

    noise_shape: tuple[int, ...]

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_dims: tuple[int, ...],
        value_hidden_dims: tuple[int, ...],
        *,
        activation: ActivationKey = "tanh",
        log_std_init: float = -0.5,
        normalizer: RunningNorm | None = None,
        num_action_chunks: int = 1,
    ) -> None:
        super().__init__()
        self.action_dim, self.num_action_chunks = action_dim, num_action_chunks
        self.normalizer, self.noise_shape = normalizer, (action_dim,)
        self.net = mlp(obs_dim, hidden_dims, action_dim, activation=activation)
        self.log_std = nn.Parameter(torch.full((action_dim,), log_std_init))
        self.value_net = mlp(obs_dim, value_hidden_dims, 1, activation=activation)
        for net, last_gain in ((self.net, MEAN_GAIN), (self.value_net, 1.0)):
            linears = [layer for layer in net if isinstance(layer, nn.Linear)]
            for layer in linears:
                nn.init.orthogonal_(layer.weight, last_gain if layer is linears[-1] else math.sqrt(2))
                nn.init.zeros_(layer.bias)

    def policy_parameters(self) -> list[nn.Parameter]:
        """Of the mean and the deviation."""
        return [*self.net.parameters(), self.log_std]

    def value_parameters(self) -> list[nn.Parameter]:
        """Of the value function."""
        return list(self.value_net.parameters())

    def _state(self, obs: Obs) -> Tensor:
        return obs["state"] if self.normalizer is None else self.normalizer(obs["state"])

    def value(self, obs: Obs) -> Tensor:
        """V(s) [B]."""
        return self.value_net(self._state(obs)).squeeze(-1)

    def evaluate(self, obs: Obs, decision: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log densities [B, H, A], entropies [B, H, A] and values [B] of decisions [B, H·A]."""
        state = self._state(obs)
        log_prob = self._log_prob(state, decision)
        entropy = self._per_element((self.log_std + UNIT_GAUSSIAN_ENTROPY).expand_as(decision))
        return log_prob, entropy, self.value_net(state).squeeze(-1)

    def log_prob(self, obs: Obs, decision: Tensor) -> Tensor:
        """Log densities [B, H, A] alone."""
        return self._log_prob(self._state(obs), decision)

    def _log_prob(self, state: Tensor, decision: Tensor) -> Tensor:
        deviations = (decision - self.net(state).float()) * torch.exp(-self.log_std)
        return self._per_element(-0.5 * deviations.square() - self.log_std - LOG_SQRT_TAU)

    @torch.no_grad()
    def act(self, obs: Obs, mode: Mode, noise: Tensor | None = None) -> ActionOut:
        """`train`: a sample. `eval`: the mean. The action is the decision, cut off at ±1."""
        state = self._state(obs)
        decision, log_prob = self.net(state).float(), None
        if mode == "train":
            if noise is None:
                raise ValueError(f"mode='train' explores: give noise [N, {self.noise_shape}]")
            decision = decision + self.log_std.exp() * noise
            log_prob = self._per_element(-0.5 * noise.square() - self.log_std - LOG_SQRT_TAU)
        action = self._per_element(decision.clamp(-1, 1))
        return ActionOut(action, decision, log_prob, self.value_net(state).squeeze(-1).float())

    def _per_element(self, x: Tensor) -> Tensor:
        """[B, H·A] → [B, H, A]."""
        return x.unflatten(-1, (self.num_action_chunks, -1))


def build_mlp_actor_critic(
    config: MlpActorCriticConfig, *, obs_dim: int, action_dim: int, normalizer: RunningNorm | None
) -> MlpActorCritic:
    """The networks that `config` describes, for states of size `obs_dim` and actions of size `action_dim`."""
    return MlpActorCritic(
        obs_dim,
        action_dim * config.num_action_chunks,
        config.hidden_dims,
        config.value_hidden_dims,
        activation=config.activation,
        log_std_init=config.log_std_init,
        normalizer=normalizer,
        num_action_chunks=config.num_action_chunks,
    )
