"""Configuration that all policies on the state share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from rlinf.core.config import Config

ActivationKey = Literal["relu", "tanh", "silu", "gelu"]


class StatePolicyConfig(Config):
    """Keys of `actor.model` that do not depend on the kind of policy: its inputs and its outputs."""

    input_type: Literal["state"] = Field("state", description="What the policy sees: the state vector.")
    policy_setup: str | None = Field(
        "panda-ee-dpos",
        description="Robot and action convention; fixes the simulator's control mode. `panda-ee-dpos`: end-effector "
        "position change and gripper (4). `panda-qpos`: joint changes and gripper (8).",
    )
    obs_dim: int | None = Field(None, gt=0, description="Expected size of the state; checked against the env.")
    action_dim: int | None = Field(None, gt=0, description="Expected size of an action; checked against the env.")
    num_action_chunks: int = Field(1, gt=0, description="H, actions per decision, played open loop.")
    normalize_obs: bool = Field(True, description="Normalise the state by its running mean and deviation.")


class QPolicyConfig(StatePolicyConfig):
    """Keys of `actor.model` for a policy that is trained against an ensemble of action values."""

    num_q_heads: int = Field(2, gt=0, description="E, critics in the ensemble.")
    q_hidden_dims: tuple[PositiveInt, ...] = Field((256, 256, 256), description="Widths of the critics' hidden layers.")
    q_activation: ActivationKey = Field("relu", description="Critics' activation.")
    q_layer_norm: bool = Field(True, description="Layer normalisation after every hidden layer of the critics.")
