"""What a person records before the first and after the last motion is waiting, and nothing to be learned from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlinf.core.types import Trajectory
from rlinf.data.trajectory import select_rows

STILL = 1e-3
"""An action whose elements are all smaller is none."""


@dataclass(frozen=True)
class Trimmed:
    """An episode without its idle ends, and how many of its steps went at each."""

    trajectory: Trajectory
    start: int
    end: int


def idle_steps(trajectory: Trajectory) -> Tensor:
    """bool [T, N]: nothing was moved in any action of the decision."""
    return (trajectory.action.abs() <= STILL).flatten(2).all(-1)


def trim_idle(trajectory: Trajectory, keep: int = 5) -> Trimmed | None:
    """One whole episode of one environment, without the waiting at its ends; None when nothing was moved at all.

    Steps before the first motion go. Of those after the last one `keep` stay: the first ones and the very last, to
    which reward and end belong; an arm at rest looks alike before and after what is left out between them. So a success
    that had to be held is held in the recording too, and no action is paid for what another one did.

    Args:
        trajectory: [T, 1, ...], begins with the episode.
        keep: at least 1.
    """
    if trajectory.num_envs != 1 or keep < 1:
        raise ValueError(f"one environment and one step to keep, not {trajectory.num_envs} and {keep}")
    steps = int(trajectory.valid[:, 0].sum())
    moving = (~idle_steps(trajectory)[:steps, 0]).nonzero().flatten().tolist()
    if not moving:
        return None
    first, after = moving[0], moving[-1] + 1
    tail = list(range(after, steps))
    if len(tail) > keep:
        tail = [*tail[: keep - 1], steps - 1]
    rows = torch.tensor([*range(first, after), *tail])
    return Trimmed(select_rows(trajectory, rows, steps), first, steps - after - len(tail))
