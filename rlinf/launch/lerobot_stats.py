"""Statistics by which the states and actions of data sets are normalised: measured, checked, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rlinf.core.errors import DataError
from rlinf.models.embodiment.openpi.dataconfig import DataConfig
from rlinf.models.embodiment.openpi.norm_stats import NormStats, mixed_norm_stats
from rlinf.models.embodiment.openpi.transforms import DeltaActions, pad_to

if TYPE_CHECKING:
    from rlinf.data.lerobot.chunks import LeRobotChunks

FARTHEST = 100.0
"""In units of the statistics; real outliers are below 10."""


def norm_stats_of(
    robot: DataConfig, datasets: Sequence[LeRobotChunks], shares: Sequence[float] | None
) -> dict[str, NormStats]:
    """Statistics of states and actions, as the robot's pipeline normalises them, in the proportions of training.

    Actions are those that chunks hold, relative to the state where the robot's are; none behind an episode's end.
    """
    states, actions = [], []
    for data in datasets:
        state, action = _rows(robot, data)
        states.append(state)
        actions.append(action)
    return {"state": mixed_norm_stats(states, shares), "actions": mixed_norm_stats(actions, shares)}


def check_normalised(robot: DataConfig, data: LeRobotChunks, stats: Mapping[str, NormStats], source: str) -> None:
    """Raise DataError where numbers of a data set are far outside of what the statistics, from `source`, are of.

    A squared error would be of this number alone: a loss of millions, and gradients that are nothing else.
    """
    for name, rows in zip(("state", "actions"), _rows(robot, data), strict=True):
        if name not in stats:
            continue
        offset, scale = stats[name].affine(robot.model.pi05)
        size = min(rows.shape[-1], len(offset))
        normal = (rows[:, :size].double() - offset[:size]) / scale[:size]
        farthest = normal.abs().amax(0)
        number = int(farthest.argmax())
        if farthest[number] > FARTHEST:
            low, high = (float(bound(rows[:, number])) for bound in (torch.min, torch.max))
            middle, half = float(offset[number]), float(scale[number])
            raise DataError(
                f"{data.root}: {name} number {number} (from 0) goes from {low:g} to {high:g} and by the statistics, "
                f"{source}, from about {middle - half:g} to {middle + half:g}: normalised, that is "
                f"{float(farthest[number]):.3g}; take statistics of data with such numbers, or leave the episodes out"
            )


def _rows(robot: DataConfig, data: LeRobotChunks) -> tuple[Tensor, Tensor]:
    vectors, action, valid = data.numbers(np.arange(len(data)))
    state = vectors["state"]
    if robot.delta_mask is None:
        action, valid = action[:, :1], valid[:, :1]  # all others are the first of another chunk
    else:
        action = DeltaActions(robot.delta_mask)({"state": state, "actions": action})["actions"]
    size = robot.model.action_dim
    action = action[valid]
    return (pad_to(state, size), pad_to(action, size)) if robot.pad_first else (state, action)


def same_stats(one: Mapping[str, NormStats], other: Mapping[str, NormStats]) -> bool:
    """Whether two sets of statistics hold the same numbers."""

    def equal(a: NormStats, b: NormStats) -> bool:
        return all(
            (x is None) == (y is None) and (x is None or y is None or torch.equal(x, y))
            for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
        )

    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
