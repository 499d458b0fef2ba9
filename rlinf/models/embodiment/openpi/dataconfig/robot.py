"""A robot's data configuration, and the transforms that it amounts to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlinf.core.errors import ConfigError
from rlinf.core.types import EnvSpaces, Obs
from rlinf.models.embodiment.openpi.config import Pi0Config
from rlinf.models.embodiment.openpi.model import Pi0Inputs
from rlinf.models.embodiment.openpi.norm_stats import NormStats
from rlinf.models.embodiment.openpi.tokenizer import Tokenizer
from rlinf.models.embodiment.openpi.transforms import (
    SLOTS,
    AbsoluteActions,
    CropActions,
    DeltaActions,
    Normalize,
    PadStatesAndActions,
    PickCameras,
    ResizeImages,
    TokenizePrompt,
    Transform,
    Unnormalize,
    compose,
    model_inputs,
)


@dataclass(frozen=True)
class Pipeline:
    """From observations to the model and from its actions to the robot.

    Attributes:
        inputs: transforms of a sample, with or without actions, into the model's.
        outputs: transforms of the model's actions into the robot's, given the robot's state.
    """

    inputs: tuple[Transform, ...]
    outputs: tuple[Transform, ...]

    @property
    def stats(self) -> Mapping[str, NormStats]:
        """What states and actions are normalised by."""
        return next(transform.stats for transform in self.inputs if isinstance(transform, Normalize))

    @property
    def tokenizer(self) -> Tokenizer:
        """What reads the prompts."""
        return next(transform.tokenizer for transform in self.inputs if isinstance(transform, TokenizePrompt))

    def encode(self, obs: Obs, device: torch.device | str = "cpu") -> Pi0Inputs:
        """Observations as the environment gives them → the model's inputs on a device."""
        return model_inputs(compose(self.inputs)(obs), device)

    def encode_with_actions(
        self, obs: Obs, actions: Tensor, device: torch.device | str = "cpu"
    ) -> tuple[Pi0Inputs, Tensor]:
        """Demonstrated chunks [B, H, A] beside their first observations → what `Pi0.loss` takes."""
        sample = compose(self.inputs)({**obs, "actions": actions})
        return model_inputs(sample, device), sample["actions"].to(device)

    def decode(self, actions: Tensor, state: Tensor) -> Tensor:
        """The model's actions [B, H, 32] and the raw state [B, S] → the robot's actions float32 [B, H, A]."""
        return compose(self.outputs)({"actions": actions, "state": state})["actions"]


@dataclass(frozen=True)
class DataConfig:
    """What a checkpoint expects of a robot.

    Attributes:
        name: as recipes write it (`config_name`).
        model: sizes; `action_horizon` belongs to the checkpoint.
        asset_id: the folder of norm_stats.json in the checkpoint.
        cameras: slot of the model → names by which the camera may go. Slots left out are absent.
        columns: path in an observation, and `actions` → column of the data set.
        action_dim: numbers of the robot's action.
        delta_mask: which numbers of an action are relative to the state; None for none.
        state_in_prompt: write the state into π0.5's prompt.
        pad_first: pad before normalising, so that the statistics are of the padded vectors. Padding is then not zero
            for the model: by quantiles it is −1.

    Raises ConfigError for a slot that the model has not, and for π0 with the state in its prompt.
    """

    name: str
    model: Pi0Config
    asset_id: str
    cameras: Mapping[str, tuple[str, ...]]
    columns: Mapping[str, str]
    action_dim: int = 7
    delta_mask: tuple[bool, ...] | None = None
    state_in_prompt: bool = False
    pad_first: bool = False

    def __post_init__(self) -> None:
        if strange := sorted(self.cameras.keys() - set(SLOTS)):
            raise ConfigError(f"{self.name}: no camera slot is called {strange[0]!r}; there are {', '.join(SLOTS)}")
        if self.state_in_prompt and not self.model.pi05:
            raise ConfigError(f"{self.name}: pi0 takes the state as numbers, not in its prompt")

    @property
    def quantiles(self) -> bool:
        """Whether states and actions are normalised by quantiles."""
        return self.model.pi05

    def misfits(self, spaces: EnvSpaces) -> list[str]:
        """Every way in which the robot differs from an environment, in words."""
        there = spaces.obs_shapes
        cameras = [path.removeprefix("images/") for path in there if path.startswith("images/")]
        seen = ", ".join(cameras) or "none"
        wrong = [f"it looks for a camera called {' or '.join(names)}, and the environment has {seen}"
                 for names in self.cameras.values() if not set(names) & set(cameras)]  # fmt: skip
        if "instruction" not in there:
            wrong.append("it reads an instruction, and the environment gives none")
        if self.action_dim != spaces.action_dim:
            wrong.append(f"its actions have {self.action_dim} numbers, the environment's {spaces.action_dim}")
        if (size := there["state"][0]) > self.model.action_dim:
            wrong.append(f"it takes a state of {self.model.action_dim} numbers at most, and there are {size}")
        return wrong

    def pipeline(self, stats: Mapping[str, NormStats], tokenizer: Tokenizer) -> Pipeline:
        """The transforms, with the checkpoint's statistics. Raises ConfigError for a tokenizer too large for it."""
        if tokenizer.vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model {self.model.vocab_size} embeddings"
            )
        pad: tuple[Transform, ...] = (PadStatesAndActions(self.model.action_dim),)
        delta: tuple[Transform, ...] = () if self.delta_mask is None else (DeltaActions(self.delta_mask),)
        absolute: tuple[Transform, ...] = () if self.delta_mask is None else (AbsoluteActions(self.delta_mask),)
        inputs: tuple[Transform, ...] = (
            PickCameras(self.cameras),
            *delta,
            *(pad if self.pad_first else ()),
            Normalize(stats, self.quantiles),
            ResizeImages(self.model.vision.image_size),
            TokenizePrompt(tokenizer, self.model.max_token_len, self.state_in_prompt),
            *(() if self.pad_first else pad),
        )
        outputs: tuple[Transform, ...] = (Unnormalize(stats, self.quantiles), *absolute, CropActions(self.action_dim))
        return Pipeline(inputs, outputs)
