"""Policies on camera images and the robot's state: `ImageEncoder`, then a policy on its features, Gaussian or a flow.

For acting and saving. Losses use the two parts one by one: the encoder is trained by the critic's loss, and the head
sees its features detached, as in SERL (Luo et al. 2024, arXiv:2401.16013).

B batch, N environments, H actions per chunk, A action size
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from rlinf.core.errors import ConfigError
from rlinf.core.protocols import Mode
from rlinf.core.types import ActionOut, Obs
from rlinf.models.embodiment.flow_policy import FlowPolicy, FlowPolicyConfig, build_flow_policy
from rlinf.models.embodiment.image_encoder import ImageEncoder, ImageEncoderKeys, build_image_encoder
from rlinf.models.embodiment.mlp_policy import MlpPolicy
from rlinf.models.embodiment.state_policy import ActivationKey, QPolicyConfig
from rlinf.models.modules.running_norm import RunningNorm


class CnnPolicyConfig(ImageEncoderKeys, QPolicyConfig):
    """Keys of `actor.model` for `model_type: cnn_policy`."""

    model_type: Literal["cnn_policy"] = Field("cnn_policy", description="Selects this policy.")
    input_type: Literal["mixed"] = Field(  # type: ignore[assignment]
        "mixed", description="What the policy sees: all cameras and the robot's state."
    )
    policy_setup: str | None = Field(
        None, description="Robot and action convention, for simulators that have several; null: the only one."
    )
    obs_dim: int | None = Field(None, gt=0, description="Expected size of the robot's state; checked against the env.")
    normalize_obs: bool = Field(True, description="Normalise the robot's state by its running mean and deviation.")
    hidden_dims: tuple[PositiveInt, ...] = Field((256, 256), description="Widths of the actor's hidden layers.")
    activation: ActivationKey = Field("tanh", description="Actor's activation.")
    log_std_min: float = Field(-5.0, description="Lower end of the log deviation before the tanh.")
    log_std_max: float = Field(2.0, description="Upper end of the log deviation before the tanh.")
    num_q_heads: int = Field(10, gt=0, description="E, critics in the ensemble.")
    q_hidden_dims: tuple[PositiveInt, ...] = Field((256, 256), description="Widths of the critics' hidden layers.")
    q_activation: ActivationKey = Field("tanh", description="Critics' activation.")


class CnnPolicy(nn.Module):
    """Actor on raw observations.

    Args:
        encoder: observations to features.
        head: policy on the features.
    """

    noise_shape: tuple[int, ...]

    def __init__(self, encoder: ImageEncoder, head: MlpPolicy | FlowPolicy) -> None:
        super().__init__()
        self.encoder, self.head, self.noise_shape = encoder, head, head.noise_shape

    def sample(self, obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [B, H·A] in (−1, 1) and log densities [B], as the head's; noise [B, *noise_shape]. No dropout."""
        return self.head.sample(self.encoder(obs), noise)

    @torch.no_grad()
    def act(self, obs: Obs, mode: Mode, noise: Tensor | None = None) -> ActionOut:
        """As the head's. Nothing is dropped, whether exploring or not."""
        return self.head.act(self.encoder(obs), mode, noise)

    def default_target_entropy(self) -> float:
        """The head's."""
        return self.head.default_target_entropy()


def build_cnn_policy(
    config: CnnPolicyConfig | FlowPolicyConfig,
    *,
    obs_shapes: Mapping[str, tuple[int, ...]],
    action_dim: int,
    normalizer: RunningNorm | None,
) -> CnnPolicy:
    """The policy that `config` describes: a Gaussian, or with `input_type: mixed` a flow.

    Args:
        obs_shapes: leaf path ("state", "images/front") → shape without the leading N.
        action_dim: A.
        normalizer: running normalisation of the robot's state; None for none.

    Raises:
        ConfigError: the environment's observations are not what the keys say.
        CheckpointError: `model_path` does not hold the backbone's weights.
    """
    encoder = build_image_encoder(config, obs_shapes=obs_shapes, normalizer=normalizer)
    state_dim = obs_shapes["state"][0]
    if config.obs_dim not in (None, state_dim):
        raise ConfigError(
            f"actor.model.obs_dim is {config.obs_dim}, but the environment's robot state has {state_dim}; write "
            f"{state_dim} or remove the key"
        )
    if isinstance(config, FlowPolicyConfig):
        flow = build_flow_policy(config, obs_dim=encoder.out_dim, action_dim=action_dim, normalizer=None)
        return CnnPolicy(encoder, flow)
    head = MlpPolicy(
        encoder.out_dim,
        action_dim * config.num_action_chunks,
        config.hidden_dims,
        activation=config.activation,
        log_std_min=config.log_std_min,
        log_std_max=config.log_std_max,
        num_action_chunks=config.num_action_chunks,
    )
    return CnnPolicy(encoder, head)
