"""What people see of an evaluation: captions in the pictures of an environment."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rlinf.core.protocols import VectorEnv
from rlinf.core.types import EnvStep, Obs
from rlinf.metrics.video import overlay


class CaptionedEnv:
    """A `VectorEnv` that writes step, reward and success into its pictures; otherwise the one that it wraps."""

    def __init__(self, env: VectorEnv) -> None:
        self._env = env
        self.num_envs, self.spaces = env.num_envs, env.spaces
        self._begin(torch.ones(env.num_envs, dtype=torch.bool))

    def reset(self, seed: int | None = None) -> Obs:
        """As `VectorEnv.reset`."""
        self._begin(torch.ones(self.num_envs, dtype=torch.bool))
        return self._env.reset(seed)

    def step(self, action: Tensor) -> EnvStep:
        """As `VectorEnv.step`."""
        step = self._env.step(action)
        self._steps += action.shape[1]
        self._reward = step.reward.sum(-1).cpu()
        self._success = step.info["success"].cpu().clone()
        self._begin(step.done.cpu())
        return step

    def render(self) -> np.ndarray | None:
        """As `VectorEnv.render`, with captions."""
        pictures = self._env.render()
        if pictures is None:
            return None
        return overlay(pictures, [self._caption(row) for row in range(len(pictures))])

    def close(self) -> None:
        """As `VectorEnv.close`."""
        self._env.close()

    def _begin(self, rows: Tensor) -> None:
        """Rows whose picture is, from now on, that of a new episode."""
        if bool(rows.all()):
            self._steps = torch.zeros(self.num_envs, dtype=torch.int64)
            self._reward, self._success = torch.zeros(self.num_envs), torch.zeros_like(rows)
        else:
            self._steps[rows] = 0
            self._reward[rows] = 0
            self._success[rows] = False

    def _caption(self, row: int) -> str:
        success = "\nsuccess" if self._success[row] else ""
        return f"step {int(self._steps[row])}\nreward {self._reward[row]:.3f}{success}"
