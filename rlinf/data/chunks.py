"""Demonstrations as pairs of an observation and the H actions that followed it: what behaviour cloning learns from.

T time, N environments, C actions per recorded decision, H actions per chunk, A action size, B batch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlinf.core import tree
from rlinf.core.errors import DataError
from rlinf.core.types import Obs, Trajectory


@dataclass(frozen=True)
class ChunkBatch:
    """B examples.

    Attributes:
        obs: leaves [B, ...].
        action: float32 [B, H, A]; anything where `valid` is false.
        valid: bool [B, H]; false behind the end of the episode. The first action of a chunk is always valid.
    """

    obs: Obs
    action: Tensor
    valid: Tensor


class ChunkDataset(Protocol):
    """Examples that can be asked for by their numbers."""

    horizon: int
    action_dim: int

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batch(self, rows: np.ndarray) -> ChunkBatch:
        """The examples with these numbers, int64 [B], on the CPU."""
        ...

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the state over all examples, each [S]."""
        ...


class RecordedChunks:
    """Chunks of recorded segments, one for every recorded observation. Chunks end with their episodes.

    Args:
        trajectories: with the actions that were executed; at least one valid step.
        horizon: H.

    Raises DataError where there is nothing to learn from.
    """

    def __init__(self, trajectories: Sequence[Trajectory], horizon: int) -> None:
        self.horizon = horizon
        parts = [_chunks_of(trajectory, horizon) for trajectory in trajectories]
        if not sum(len(part.valid) for part in parts):
            raise DataError("the demonstrations hold no step to learn from; record some first")
        self._all = ChunkBatch(
            tree.cat([part.obs for part in parts]),
            torch.cat([part.action for part in parts]),
            torch.cat([part.valid for part in parts]),
        )
        self.action_dim = self._all.action.shape[-1]

    def __len__(self) -> int:
        """Number of recorded observations."""
        return len(self._all.valid)

    def batch(self, rows: np.ndarray) -> ChunkBatch:
        """As `ChunkDataset.batch`."""
        index = torch.from_numpy(rows)
        return ChunkBatch(tree.index(self._all.obs, index), self._all.action[index], self._all.valid[index])

    def moments(self) -> tuple[Tensor, Tensor]:
        """As `ChunkDataset.moments`; a deviation is at least 0.01, so that a constant is not blown up."""
        deviation, mean = torch.std_mean(self._all.obs["state"], 0, correction=0)
        return mean, deviation.clamp(min=1e-2)


def _chunks_of(trajectory: Trajectory, horizon: int) -> ChunkBatch:
    """The chunks of a segment, in time-major order."""
    steps, envs, per_decision, size = trajectory.action.shape
    action = trajectory.action.transpose(1, 2).reshape(steps * per_decision, envs, size)
    terminated = trajectory.terminated.transpose(1, 2).reshape(-1, envs)
    ends = terminated.clone()
    ends.view(steps, per_decision, envs)[:, -1] |= trajectory.truncated
    # Actions behind a termination inside a recorded decision were not executed.
    before = trajectory.terminated.cumsum(-1) - trajectory.terminated.to(torch.int64)
    played = (trajectory.valid[..., None] & (before == 0)).transpose(1, 2).reshape(-1, envs)

    starts = torch.arange(steps) * per_decision
    running = torch.ones(steps, envs, dtype=torch.bool)
    actions, valid = [], []
    for h in range(horizon):
        place = starts + h
        inside = (place < len(action))[:, None]
        place = place.clamp(max=len(action) - 1)
        running = running & inside & played[place]
        actions.append(action[place])
        valid.append(running)
        running = running & ~ends[place]
    chosen = trajectory.valid
    obs = tree.tree_map(lambda leaf: _rows(leaf[:-1], chosen), trajectory.obs)
    return ChunkBatch(obs, torch.stack(actions, 2)[chosen], torch.stack(valid, 2)[chosen])


def _rows(leaf: Tensor | list[list[str]], chosen: Tensor) -> Tensor | list[str]:
    if isinstance(leaf, Tensor):
        return leaf[chosen]
    return [
        text
        for row, keep in zip(leaf, chosen.tolist(), strict=True)
        for text, kept in zip(row, keep, strict=True)
        if kept
    ]
