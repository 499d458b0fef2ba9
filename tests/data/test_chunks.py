"""Chunks of demonstrations, by hand."""

import numpy as np
import pytest
import torch

from rlinf.core.errors import DataError
from rlinf.core.types import Trajectory
from rlinf.data.chunks import RecordedChunks


def segment(steps=4, envs=1, per_decision=1, *, terminated=(), truncated=(), valid=None):
    """Action number p of environment n is [p, n]; the state at decision t of n is [t, n]."""
    t, n = torch.meshgrid(torch.arange(steps + 1.0), torch.arange(envs + 0.0), indexing="ij")
    place = torch.arange(steps * per_decision + 0.0).view(steps, 1, per_decision).expand(-1, envs, -1)
    who = torch.arange(envs + 0.0).view(1, envs, 1).expand(steps, -1, per_decision)
    ends = torch.zeros(steps, envs, per_decision, dtype=torch.bool)
    for index in terminated:
        ends[index] = True
    limits = torch.zeros(steps, envs, dtype=torch.bool)
    for index in truncated:
        limits[index] = True
    action = torch.stack([place, who], -1)
    words = [[f"{t}/{n}" for n in range(envs)] for t in range(steps + 1)]
    return Trajectory(
        obs={"state": torch.stack([t, n], -1), "instruction": words},
        last_obs={"state": torch.zeros(0, 2), "instruction": []},
        last_index=torch.zeros(0, 2, dtype=torch.int64),
        decision=action.flatten(2),
        action=action,
        reward=torch.zeros(steps, envs, per_decision),
        terminated=ends,
        truncated=limits,
        intervened=torch.zeros_like(ends),
        valid=torch.ones(steps, envs, dtype=torch.bool) if valid is None else valid,
    )


def rows(dataset):
    """(state, actions that are valid) of every example."""
    batch = dataset.batch(np.arange(len(dataset)))
    return [
        (tuple(state.tolist()), [int(a) for a in action[valid][:, 0]])
        for state, action, valid in zip(batch.obs["state"], batch.action, batch.valid, strict=True)
    ]


def test_every_observation_has_the_actions_that_followed():
    dataset = RecordedChunks([segment(4, 2)], horizon=3)
    assert len(dataset) == 8 and (dataset.horizon, dataset.action_dim) == (3, 2)
    found = rows(dataset)
    assert found[0] == ((0, 0), [0, 1, 2]) and found[1] == ((0, 1), [0, 1, 2])
    assert found[4] == ((2, 0), [2, 3]), "a segment's end ends a chunk"
    assert found[6] == ((3, 0), [3])
    batch = dataset.batch(np.array([3]))
    assert batch.action[0, :, 1].tolist() == [1, 1, 1], "of the same environment"
    assert batch.obs["instruction"] == ["1/1"]


def test_a_chunk_ends_with_its_episode():
    after_success = rows(RecordedChunks([segment(4, terminated=[(1, 0, 0)])], horizon=3))
    assert [actions for _, actions in after_success] == [[0, 1], [1], [2, 3], [3]]
    after_limit = rows(RecordedChunks([segment(4, truncated=[(2, 0)])], horizon=3))
    assert [actions for _, actions in after_limit] == [[0, 1, 2], [1, 2], [2], [3]]


def test_what_was_played_after_the_end_is_no_example():
    valid = torch.tensor([[True], [True], [False], [False]])
    found = rows(RecordedChunks([segment(4, truncated=[(1, 0)], valid=valid)], horizon=3))
    assert found == [((0, 0), [0, 1]), ((1, 0), [1])]


def test_recorded_chunks_are_taken_apart():
    """Two actions per recorded decision: an observation at every second action only."""
    found = rows(RecordedChunks([segment(3, per_decision=2)], horizon=3))
    assert found == [((0, 0), [0, 1, 2]), ((1, 0), [2, 3, 4]), ((2, 0), [4, 5])]
    ended = rows(RecordedChunks([segment(3, per_decision=2, terminated=[(1, 0, 0)])], horizon=3))
    assert ended == [((0, 0), [0, 1, 2]), ((1, 0), [2]), ((2, 0), [4, 5])]


def test_segments_are_joined_and_their_moments_taken():
    dataset = RecordedChunks([segment(4), segment(2)], horizon=1)
    assert len(dataset) == 6
    mean, deviation = dataset.moments()
    times = torch.tensor([0.0, 1, 2, 3, 0, 1])
    torch.testing.assert_close(mean, torch.stack([times.mean(), torch.tensor(0.0)]))
    torch.testing.assert_close(deviation, torch.stack([times.std(correction=0), torch.tensor(0.01)]))


def test_nothing_to_learn_from_is_an_error():
    with pytest.raises(DataError, match="no step to learn from"):
        RecordedChunks([segment(2, valid=torch.zeros(2, 1, dtype=torch.bool))], horizon=2)
