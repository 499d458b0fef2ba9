"""A point that is to be moved onto a target: the smallest task on which a continuous policy can be seen to learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from rlinf.core.types import EnvSpaces, Obs
from rlinf.envs.action_noise import ActionNoise
from rlinf.envs.config import EnvConfig
from rlinf.envs.episodes import Outcome, ReplayedEnv, episode_rules


class ReachConfig(EnvConfig):
    """A point in a box that is to be moved onto a target."""

    env_type: Literal["reach"] = Field("reach", description="Which environment: the point in a box.")
    max_episode_steps: PositiveInt = Field(
        20, description="Time limit of an episode in environment steps; reaching it is a truncation."
    )
    dim: PositiveInt = Field(1, description="Dimensions of the box.")
    max_speed: PositiveFloat = Field(0.2, description="Distance that the largest action moves the point by.")
    tolerance: PositiveFloat = Field(0.05, description="The task is solved within this distance of the target.")


class ReachWorlds:
    """x ← clip(x + max_speed · clip(a, −1, 1), −1, 1); the reward is −‖x − target‖ after the move.

    The state [2 · dim] is the point followed by the target, both uniform in [−1, 1]^dim at first.
    """

    device = torch.device("cpu")

    def __init__(self, num_envs: int, *, dim: int = 1, max_speed: float = 0.2, tolerance: float = 0.05) -> None:
        self.num_envs = num_envs
        self.spaces = EnvSpaces({"state": (2 * dim,)}, {"state": "float32"}, action_dim=dim)
        self._max_speed, self._tolerance = max_speed, tolerance
        self._point = torch.zeros(num_envs, dim)
        self._target = torch.zeros(num_envs, dim)

    def begin(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """Draw point and target of each row from its own seed."""
        for row, seed in zip(rows, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            both = 2 * torch.rand(2, self._point.shape[1], generator=generator) - 1
            self._point[row], self._target[row] = both

    def advance(self, action: Tensor, active: Tensor) -> Outcome:
        """Move the active points."""
        moved = (self._point + self._max_speed * action.clamp(-1, 1)).clamp(-1, 1)
        self._point = torch.where(active[:, None], moved, self._point)
        distance = (self._point - self._target).norm(dim=1)
        return Outcome(-distance, distance <= self._tolerance, torch.zeros_like(active))

    def observe(self) -> Obs:
        """{"state": float32 [N, 2 · dim]}."""
        return {"state": torch.cat((self._point, self._target), 1)}

    def render(self) -> np.ndarray | None:
        """None: there is no picture."""
        return None

    def close(self) -> None:
        """Nothing to free."""


class ReachExpert:
    """π(state): straight to the target. A function of the present state alone.

    Args:
        noise_std: standard deviation of Gaussian noise on the action, before clipping.
        generator: source of the noise; needed if there is any.
        max_speed: as that of the environment.
    """

    def __init__(
        self, noise_std: float = 0.0, generator: np.random.Generator | None = None, *, max_speed: float = 0.2
    ) -> None:
        self._noise, self._max_speed = ActionNoise(noise_std, generator), max_speed

    def act(self, state: np.ndarray) -> np.ndarray:
        """Actions float32 [N, dim] in [−1, 1] for states float32 [N, 2 · dim]."""
        point, target = np.split(state, 2, axis=1)
        return self._noise((target - point) / self._max_speed)


def make(
    config: ReachConfig, *, num_envs: int, seed: int, control_mode: str | None, num_workers: int, render: bool
) -> ReplayedEnv:
    """Environments as configured. `control_mode`, `num_workers` and `render` mean nothing here."""
    worlds = ReachWorlds(num_envs, dim=config.dim, max_speed=config.max_speed, tolerance=config.tolerance)
    return ReplayedEnv(worlds, episode_rules(config), seed=seed)
