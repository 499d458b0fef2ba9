"""Which π0 or π0.5, for which robot: the keys that every recipe with one has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlinf.core.config import Config
from rlinf.core.errors import ConfigError
from rlinf.models.embodiment.openpi.config import TINY, TINY_PI05
from rlinf.models.embodiment.openpi.dataconfig import DataConfig, data_config


class RobotKeys(Config):
    """Robot and size."""

    config_name: str = Field(
        "pi0_libero",
        description="Robot and checkpoint: cameras, columns of data sets, normalisation, meaning of actions and length "
        "of the chunk. pi0_libero, pi0_libero_horizon10, pi05_libero, pi0_maniskill, pi05_maniskill and others.",
    )
    size: Literal["full", "tiny"] = Field(
        "full",
        description="full: the published sizes, 3.3 billion weights; tiny: a million, for tries without a GPU.",
    )

    @field_validator("config_name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            return data_config(name).name
        except ConfigError as error:
            raise ValueError(str(error)) from error

    def robot(self, action_horizon: int | None = None) -> DataConfig:
        """The data configuration, with the sizes of the model that is asked for; the checkpoint's horizon for None."""
        data = data_config(self.config_name)
        sizes = data.model
        if self.size == "tiny":
            sizes = replace(TINY_PI05 if sizes.pi05 else TINY, max_token_len=sizes.max_token_len)
        return replace(data, model=replace(sizes, action_horizon=action_horizon or data.model.action_horizon))


class CheckpointKeys(Config):
    """Keys of `model` for `model_type: openpi`: the weights to begin with, and all that belongs to them."""

    model_type: Literal["openpi"] = Field("openpi", description="Selects this policy.")
    model_path: str | None = Field(
        None,
        description="File or folder with the weights in safetensors, as openpi and LeRobot publish them or as "
        "run_sft.sh and `python -m rlinf export` write them, with the statistics (norm_stats.json) beside them. null: "
        "random weights, for openpi.size: tiny alone.",
    )
    tokenizer_path: str | None = Field(
        None,
        description="PaliGemma's tokenizer. null: tokenizer.model or paligemma_tokenizer.model in model_path; a tiny "
        "model reads words as numbers that their letters make.",
    )
    precision: Literal["fp32", "bf16"] | None = Field(
        None,
        description="Type of weights that act, are frozen or are exported; null: bf16 on a GPU and fp32 on a CPU. What "
        "learns is float32; under PPO actor.precision is what it computes in, in supervised training this.",
    )
    policy_setup: str | None = Field(
        None, description="Robot and action convention; fixes the control mode of simulators that have several."
    )
    openpi: RobotKeys = Field(default_factory=RobotKeys, description="Robot and size.")

    @model_validator(mode="after")
    def _has_weights(self) -> CheckpointKeys:
        if self.model_path is None and self.openpi.size == "full":
            raise ValueError(
                "model_path must name the folder with the weights of pi0; random ones are for openpi.size: tiny alone"
            )
        return self

    def robot(self) -> DataConfig:
        """The data configuration, with the sizes of the model that is asked for."""
        return self.openpi.robot()

    def weights(self) -> Path | None:
        """What `model_path` names."""
        return None if self.model_path is None else Path(self.model_path).expanduser()

    def folder(self) -> Path | None:
        """Where statistics and tokenizer lie beside the weights."""
        path = self.weights()
        return path if path is None or path.is_dir() else path.parent

    def in_bf16(self, profile: str) -> bool:
        """What `precision` comes to."""
        return self.precision == "bf16" or (self.precision is None and profile == "gpu")
