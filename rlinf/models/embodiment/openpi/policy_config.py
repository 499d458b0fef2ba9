"""What `actor.model` says about π0 and π0.5 as the frozen decoder of a steered policy (DSRL)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlinf.core.config import Config
from rlinf.core.errors import ConfigError
from rlinf.models.embodiment.dsrl_keys import DsrlKeys
from rlinf.models.embodiment.openpi.config import TINY, TINY_PI05
from rlinf.models.embodiment.openpi.dataconfig import DataConfig, data_config


class OpenpiKeys(DsrlKeys):
    """Keys of `actor.model.openpi`."""

    config_name: str = Field(
        "pi0_libero",
        description="Robot and checkpoint: cameras, normalisation, meaning of actions and length of the chunk. "
        "pi0_libero, pi0_libero_horizon10, pi05_libero, pi0_maniskill, pi05_maniskill and others.",
    )
    size: Literal["full", "tiny"] = Field(
        "full",
        description="full: the published sizes, 3.3 billion weights; tiny: half a million, for tries without a GPU.",
    )
    use_dsrl: bool = Field(
        False, description="Learn to choose the noise; the model stays as it is. The one way to train it so far."
    )
    dsrl_camera: str | None = Field(
        "main",
        description="Camera that policy and critics look at, at 64 x 64 pixels; null: they see the state alone.",
    )

    @field_validator("config_name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            return data_config(name).name
        except ConfigError as error:
            raise ValueError(str(error)) from error


class OpenpiConfig(Config):
    """Keys of `actor.model` for `model_type: openpi`: π0 or π0.5."""

    model_type: Literal["openpi"] = Field("openpi", description="Selects this policy.")
    model_path: str | None = Field(
        None,
        description="File or folder with the weights in safetensors, as openpi and LeRobot publish them, and with the "
        "statistics (norm_stats.json). null: random weights, for openpi.size: tiny alone.",
    )
    tokenizer_path: str | None = Field(
        None,
        description="PaliGemma's tokenizer. null: tokenizer.model or paligemma_tokenizer.model in model_path; a tiny "
        "model reads bytes.",
    )
    precision: Literal["fp32", "bf16"] | None = Field(
        None, description="Type of the frozen weights; null: bf16 on a GPU and fp32 on a CPU. What learns is float32."
    )
    policy_setup: str | None = Field(
        None, description="Robot and action convention; fixes the control mode of simulators that have several."
    )
    obs_dim: int | None = Field(None, gt=0, description="Expected size of the state; checked against the env.")
    action_dim: int | None = Field(None, gt=0, description="Expected size of an action; checked against the env.")
    num_action_chunks: int = Field(5, gt=0, description="So many actions of the model's chunk are played.")
    num_steps: int = Field(4, gt=0, description="K, Euler steps from noise to actions.")
    normalize_obs: bool = Field(
        False, description="Normalise the state that policy and critics see by its running mean and deviation."
    )
    openpi: OpenpiKeys = Field(default_factory=OpenpiKeys, description="Checkpoint, and what is learned.")

    @model_validator(mode="after")
    def _has_weights(self) -> OpenpiConfig:
        if self.model_path is None and self.openpi.size == "full":
            raise ValueError(
                "model_path must name the folder with the weights of pi0; random ones are for openpi.size: tiny alone"
            )
        return self

    def robot(self) -> DataConfig:
        """The data configuration, with the sizes of the model that is asked for."""
        data = data_config(self.openpi.config_name)
        if self.openpi.size == "full":
            return data
        tiny = TINY_PI05 if data.model.pi05 else TINY
        horizon, length = data.model.action_horizon, data.model.max_token_len
        return replace(data, model=replace(tiny, action_horizon=horizon, max_token_len=length))
