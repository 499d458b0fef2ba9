"""What `actor.model` says about π0 and π0.5: as the policy that PPO trains, or frozen and steered (DSRL)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlinf.core.errors import ConfigError
from rlinf.functional.denoising import NoiseMethod
from rlinf.models.embodiment.dsrl_keys import DsrlKeys
from rlinf.models.embodiment.openpi.actor_critic import VALUE_HIDDEN_DIMS, Walk
from rlinf.models.embodiment.openpi.dataconfig import DataConfig
from rlinf.models.embodiment.openpi.robot_keys import CheckpointKeys, RobotKeys


class OpenpiKeys(RobotKeys, DsrlKeys):
    """Keys of `actor.model.openpi`; those that begin with dsrl_ belong to use_dsrl."""

    action_horizon: PositiveInt | None = Field(
        None,
        description="Actions that the model gives at once, of which num_action_chunks are played; null: config_name's.",
    )
    use_dsrl: bool = Field(
        False,
        description="SAC learns to choose the noise, and the model stays as it is. False: PPO trains the model itself.",
    )
    train_expert_only: bool = Field(
        True, description="PPO: train the action expert and keep image encoder and language model as they are."
    )
    noise_method: NoiseMethod = Field(
        "flow_sde",
        description="PPO: the noise that gives a denoising step its density. flow_sde and flow_cps: of noise_level; "
        "flow_noise: of a network that is learned with the policy.",
    )
    joint_logprob: bool = Field(
        False,
        description="PPO: noise in every denoising step, and the density of all of them. False: in one step, drawn for "
        "each decision, and the density of that one.",
    )
    logprob_reduction: Literal["sum", "mean"] = Field(
        "sum",
        description="PPO: how the terms of a joint density become one. sum: their product's logarithm, as it is "
        "defined; mean: divided by their number, as RLinf does, whose published settings are for it.",
    )
    noise_level: PositiveFloat = Field(0.5, description="PPO: the amount of noise of flow_sde and flow_cps.")
    noise_anneal: bool = Field(False, description="PPO: noise_level follows noise_params.")
    noise_params: tuple[PositiveFloat, PositiveFloat, PositiveInt] = Field(
        (0.7, 0.3, 400),
        description="With noise_anneal: noise_level at the beginning, at the end, and the global steps from one to "
        "the other.",
    )
    noise_logvar_range: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.08, 0.16),
        description="PPO: smallest and largest standard deviation that the network of flow_noise gives (the name is "
        "upstream's; the numbers are no variances).",
    )
    value_after_vlm: bool = Field(
        False,
        description="PPO: the value is read off the language model, the mean of its last output over the tokens that "
        "are there; False: off the action expert.",
    )
    value_hidden_dims: tuple[PositiveInt, ...] = Field(
        VALUE_HIDDEN_DIMS, min_length=1, description="PPO: widths of the hidden layers of the value head."
    )
    detach_critic_input: bool = Field(
        True, description="PPO: the value's gradient ends at its head; False: it trains what the head reads, too."
    )
    eval_noise: bool = Field(
        True,
        description="PPO: evaluation starts from random noise, the same in every evaluation; False: from zeros.",
    )
    dsrl_camera: str | None = Field(
        "main",
        description="Camera that policy and critics look at, at 64 x 64 pixels; null: they see the state alone.",
    )


class OpenpiConfig(CheckpointKeys):
    """Keys of `actor.model` for `model_type: openpi`: π0 or π0.5."""

    obs_dim: int | None = Field(None, gt=0, description="Expected size of the state; checked against the env.")
    action_dim: int | None = Field(None, gt=0, description="Expected size of an action; checked against the env.")
    num_action_chunks: int = Field(5, gt=0, description="So many actions of the model's chunk are played.")
    num_steps: int = Field(4, gt=0, description="K, Euler steps from noise to actions.")
    normalize_obs: bool = Field(
        False, description="Normalise the state that policy and critics see by its running mean and deviation."
    )
    openpi: OpenpiKeys = Field(default_factory=OpenpiKeys, description="Checkpoint, and what is learned.")

    @model_validator(mode="after")
    def _walks(self) -> OpenpiConfig:
        if self.openpi.use_dsrl:
            return self
        horizon = self.robot().model.action_horizon
        if self.num_action_chunks > horizon:
            raise ValueError(
                f"num_action_chunks is {self.num_action_chunks}, but {self.openpi.config_name} gives chunks of "
                f"{horizon} actions; lower it or write openpi.action_horizon"
            )
        if self.openpi.noise_anneal and self.openpi.noise_method == "flow_noise":
            raise ValueError(
                "openpi.noise_anneal: the noise of flow_noise is learned, within openpi.noise_logvar_range; write False"
            )
        try:
            self.walk()
        except ConfigError as error:
            raise ValueError(f"openpi: {error}") from error
        return self

    def walk(self) -> Walk:
        """How PPO's policy draws its actions, at first."""
        keys = self.openpi
        return Walk(
            num_steps=self.num_steps,
            method=keys.noise_method,
            executed=self.num_action_chunks,
            action_dim=self.robot().action_dim,
            joint=keys.joint_logprob,
            noise_level=keys.noise_params[0] if keys.noise_anneal else keys.noise_level,
            std_range=keys.noise_logvar_range,
            reduction=keys.logprob_reduction,
        )

    def robot(self) -> DataConfig:
        """The data configuration, with the sizes of the model that is asked for."""
        return self.openpi.robot(self.openpi.action_horizon)
