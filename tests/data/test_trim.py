"""Waiting at the ends of an episode, by hand."""

import pytest
import torch

from rlinf.core.types import Trajectory
from rlinf.data.trim import idle_steps, trim_idle


def played(moves: str, end: str = "terminated") -> Trajectory:
    """An episode of one step per character: `.` waits, anything else moves. States count from 0; success at its end."""
    steps = len(moves)
    action = torch.tensor([[[[0.0, 5e-4] if move == "." else [0.5, 0.0]]] for move in moves])
    last = torch.arange(steps)[:, None] == steps - 1
    return Trajectory(
        obs={"state": torch.arange(steps + 1).float()[:, None, None], "instruction": [["go"]] * (steps + 1)},
        last_obs={"state": torch.tensor([[float(steps)]]), "instruction": ["go"]},
        last_index=torch.tensor([[steps - 1, 0]]),
        decision=action.flatten(2),
        action=action,
        reward=last.float()[..., None],
        terminated=(last if end == "terminated" else ~last & False)[..., None],
        truncated=last if end == "truncated" else last & False,
        intervened=torch.ones(steps, 1, 1, dtype=torch.bool),
        valid=torch.ones(steps, 1, dtype=torch.bool),
    )


@pytest.mark.parametrize(
    ("moves", "keep", "states"),
    [
        ("mmm", 5, [0, 1, 2, 3]),
        ("..mm.m", 5, [2, 3, 4, 5, 6]),  # what is between motions stays
        ("m..", 5, [0, 1, 2, 3]),  # no longer than what may stay
        (".m.....", 2, [1, 2, 6, 7]),
        ("m......", 3, [0, 1, 2, 6, 7]),
        ("mm...", 1, [0, 1, 4, 5]),
        (".....m", 1, [5, 6]),
    ],
)
@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_only_waiting_goes(moves, keep, states, end):
    before = played(moves, end)
    trimmed = trim_idle(before, keep)
    after = trimmed.trajectory
    assert after.obs["state"].flatten().tolist() == states
    assert len(after.obs["instruction"]) == len(states) == after.num_steps + 1
    assert trimmed.start + trimmed.end == len(moves) - after.num_steps
    assert trimmed.start == len(moves) - len(moves.lstrip("."))
    # Reward and end belong to the action that was really the last one.
    assert after.reward.flatten().tolist() == [0.0] * (after.num_steps - 1) + [1.0]
    assert getattr(after, end)[-1].item() and not getattr(after, end)[:-1].any()
    assert after.last_index.tolist() == [[after.num_steps - 1, 0]]
    assert after.last_obs["state"].tolist() == [[len(moves)]]
    assert torch.equal(after.action, after.decision[:, :, None])


def test_nothing_is_left_where_nobody_moved():
    assert trim_idle(played("....")) is None
    assert idle_steps(played(".m")).tolist() == [[True], [False]]


def test_one_environment_and_a_step_are_needed():
    with pytest.raises(ValueError, match="not 1 and 0"):
        trim_idle(played("m"), keep=0)
