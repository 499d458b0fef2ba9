"""What an operator did becomes the decision that is learned from."""

import dataclasses

import pytest
import torch

from rlinf.core.errors import DataError
from rlinf.core.types import Trajectory
from rlinf.data.interventions import with_operators_decisions

T, N, H, A = 3, 2, 2, 2


def trajectory(intervened, decision=None):
    done = torch.arange(T * N * H * A, dtype=torch.float32).reshape(T, N, H, A)
    flag = torch.zeros(T, N, H, dtype=torch.bool)
    for t, n, h in intervened:
        flag[t, n, h] = True
    none = torch.zeros(T, N, dtype=torch.bool)
    return Trajectory(
        obs={"state": torch.zeros(T + 1, N, 1)},
        last_obs={"state": torch.zeros(0, 1)},
        last_index=torch.zeros(0, 2, dtype=torch.int64),
        decision=-torch.ones(T, N, H * A) if decision is None else decision,
        action=done,
        reward=torch.zeros(T, N, H),
        terminated=flag & False,
        truncated=none,
        intervened=flag,
        valid=~none,
    )


def test_only_chunks_that_were_taken_over_change():
    before = trajectory([(1, 0, 1)])
    after, taken_over = with_operators_decisions(before)
    assert taken_over.nonzero().tolist() == [[1, 0]]
    assert after.decision[1, 0].tolist() == before.action[1, 0].flatten().tolist()
    unchanged = ~taken_over
    assert (after.decision[unchanged] == -1).all()
    assert (before.decision == -1).all()


def test_holding_still_is_no_demonstration_unless_the_episode_ends_with_it():
    before = trajectory([(0, 1, 0), (1, 0, 1), (2, 0, 0), (2, 1, 0)])
    action, terminated = before.action.clone(), before.terminated.clone()
    action[1, 0, 1] = action[2, 0, 0] = action[2, 1] = 0.0  # (2, 0) moves in its other action, the policy's
    terminated[2, 1, 0] = True
    after, shown = with_operators_decisions(dataclasses.replace(before, action=action, terminated=terminated))
    assert shown.nonzero().tolist() == [[0, 1], [2, 1]]
    assert (after.decision[1, 0, 2:] == 0).all()  # it was done all the same


def test_without_an_operator_nothing_is_copied():
    before = trajectory([])
    after, taken_over = with_operators_decisions(before)
    assert after is before and not taken_over.any()


def test_a_policy_whose_decisions_are_no_actions_cannot_learn_from_hands():
    latent = dataclasses.replace(trajectory([(0, 0, 0)]), decision=torch.zeros(T, N, 32))
    with pytest.raises(DataError, match="teleop: none"):
        with_operators_decisions(latent)
