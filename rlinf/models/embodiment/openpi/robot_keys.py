"""Which robot and which size of π0 or π0.5: the keys of `openpi` that every recipe with them has."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, field_validator

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
