"""What an operator did in the policy's place, as decisions to learn from.

B batch, T time, N environments, H actions per chunk, A action size
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rlinf.core.errors import DataError
from rlinf.core.types import Trajectory
from rlinf.data.trim import STILL


def with_operators_decisions(trajectory: Trajectory) -> tuple[Trajectory, Tensor]:
    """The segment with what was really done as the decision where an operator took over; and what of it is to be
    imitated, bool [T, N].

    A chunk in which any action was replaced counts as the operator's; its other actions stay as the policy had them.
    Where the operator only held still, as after every motion, nothing is shown that is worth imitating, unless the
    episode ended with it.

    Raises DataError where decisions are no actions (a policy that steers another one): what noise would have led to an
    operator's action is not known.
    """
    taken_over = trajectory.intervened.any(-1)
    if not bool(taken_over.any()):
        return trajectory, taken_over
    done = trajectory.action.flatten(2)
    if trajectory.decision.shape != done.shape:
        raise DataError(
            f"an operator took over, but this policy's decisions {list(trajectory.decision.shape[2:])} are no actions "
            f"{list(trajectory.action.shape[2:])}: it cannot learn from that; write env.train.teleop: none"
        )
    decision = torch.where(taken_over[..., None], done.to(trajectory.decision.dtype), trajectory.decision)
    moved = ((trajectory.action.abs() > STILL).any(-1) & trajectory.intervened).any(-1)
    shown = taken_over & (moved | trajectory.terminated.any(-1))
    return replace(trajectory, decision=decision, log_prob=None), shown
