import pytest
import torch

from rlinf.core.types import ActionOut, EnvStep
from rlinf.data.trajectory import TrajectoryBuilder, split_by_env

N, H, A = 2, 2, 3


def observation(value):
    value = torch.tensor(value, dtype=torch.float32)
    return {"state": value[:, None], "instruction": [f"say {v:g}" for v in value]}


def answer(value, version=0, log_prob=None):
    action = torch.full((N, H, A), float(value))
    return ActionOut(action=action, decision=action.flatten(1), log_prob=log_prob, version=version)


def outcome(obs, last_obs, terminated=(False, False), truncated=(False, False), value=0.0):
    flags = torch.zeros(N, H, dtype=torch.bool)
    flags[:, 1] = torch.tensor(terminated)
    return EnvStep(
        obs=obs,
        last_obs=last_obs,
        reward=torch.full((N, H), float(value)),
        terminated=flags,
        truncated=torch.tensor(truncated),
        executed=torch.full((N, H, A), 10.0 + value),
        intervened=torch.zeros(N, H, dtype=torch.bool),
    )


def three_steps(builder, obs, flags, *, continues, versions=(0, 0, 0)):
    """Observations count up by one; in step t the `flags[t]` environments terminate and go on at 100 + t."""
    builder.start(obs, continues=continues)
    for t, terminated in enumerate(flags):
        last_obs = observation([float(x) + 1 for x in obs["state"][:, 0]])
        following = last_obs
        if builder.auto_reset and any(terminated):
            values = torch.where(torch.tensor(terminated), 100.0 + t, last_obs["state"][:, 0])
            following = observation(values.tolist())
        builder.append(obs, answer(t, versions[t]), outcome(following, last_obs, terminated, value=t))
        obs = following
    return builder.build(), obs


def test_a_segment_is_time_major_and_ends_with_what_comes_next():
    builder = TrajectoryBuilder((4, 1), auto_reset=True)
    start = observation([0.0, 10.0])
    flags = [(False, False), (True, False), (False, True)]
    segment, _ = three_steps(builder, start, flags, continues=True, versions=(7, 5, 6))
    assert (segment.num_steps, segment.num_envs) == (3, N)
    assert segment.obs["state"][..., 0].tolist() == [[0, 10], [1, 11], [101, 12], [102, 102]]
    assert segment.obs["instruction"][2] == ["say 101", "say 12"]
    assert segment.last_index.tolist() == [[1, 0], [2, 1]]
    assert segment.last_obs["state"][:, 0].tolist() == [2, 13]
    assert segment.last_obs["instruction"] == ["say 2", "say 13"]
    assert segment.decision.shape == (3, N, H * A)
    assert segment.decision[:, 0, 0].tolist() == [0, 1, 2]
    assert segment.action[:, 0, 0, 0].tolist() == [10, 11, 12]
    assert segment.reward[:, 1, 1].tolist() == [0, 1, 2]
    assert segment.terminated[..., 1].tolist() == [list(flag) for flag in flags]
    assert segment.valid.all()
    assert (segment.version, segment.source, segment.continues) == (5, (4, 1), True)
    assert segment.log_prob is None


def test_a_time_limit_ends_an_episode_too():
    builder = TrajectoryBuilder((0, 0), auto_reset=True)
    start = observation([0.0, 10.0])
    builder.start(start, continues=False)
    builder.append(
        start, answer(0), outcome(observation([100.0, 11.0]), observation([1.0, 11.0]), truncated=(True, False))
    )
    segment = builder.build()
    assert segment.last_index.tolist() == [[0, 0]]
    assert segment.last_obs["state"].tolist() == [[1.0]]
    assert segment.truncated.tolist() == [[True, False]]
    assert not segment.terminated.any()


def test_without_an_end_the_last_observations_are_empty_leaves():
    segment, _ = three_steps(
        TrajectoryBuilder((0, 0), auto_reset=True), observation([0.0, 10.0]), [(False, False)] * 3, continues=False
    )
    assert segment.last_obs["state"].shape == (0, 1)
    assert segment.last_obs["instruction"] == []
    assert segment.last_index.shape == (0, 2)


def test_two_ends_in_one_step_are_in_order():
    segment, _ = three_steps(
        TrajectoryBuilder((0, 0), auto_reset=True),
        observation([0.0, 10.0]),
        [(False, False), (True, True)],
        continues=False,
    )
    assert segment.last_index.tolist() == [[1, 0], [1, 1]]
    assert segment.last_obs["state"][:, 0].tolist() == [2, 12]


def test_without_automatic_reset_all_after_an_end_is_invalid_until_a_fresh_start():
    builder = TrajectoryBuilder((0, 0), auto_reset=False)
    segment, obs = three_steps(
        builder, observation([0.0, 10.0]), [(False, False), (True, False), (True, False)], continues=False
    )
    assert segment.valid.tolist() == [[True, True], [True, True], [False, True]]
    assert segment.last_index.tolist() == [[1, 0]]  # what the environment says after its end is not a second end

    segment, obs = three_steps(builder, obs, [(False, False), (False, True), (True, False)], continues=True)
    assert segment.valid.tolist() == [[False, True], [False, True], [False, False]]
    assert segment.last_index.tolist() == [[1, 1]]

    segment, _ = three_steps(builder, observation([0.0, 10.0]), [(False, False)] * 3, continues=False)
    assert segment.valid.all()


def test_an_answer_to_another_observation_is_refused():
    builder = TrajectoryBuilder((3, 0), auto_reset=True)
    start, other = observation([0.0, 10.0]), observation([0.0, 10.0])
    with pytest.raises(ValueError, match=r"source \(3, 0\): the observation acted on at step 0"):
        builder.append(start, answer(0), outcome(other, other))
    builder.start(start, continues=False)
    builder.append(start, answer(0), outcome(other, other))
    with pytest.raises(ValueError, match="at step 1 of the segment is not the one"):
        builder.append(start, answer(0), outcome(other, other))


def test_log_probs_are_stacked_when_they_are_always_given():
    builder = TrajectoryBuilder((0, 0), auto_reset=True)
    obs = observation([0.0, 10.0])
    builder.start(obs, continues=False)
    builder.append(obs, answer(0, log_prob=torch.tensor([1.0, 2.0])), outcome(obs, obs))
    builder.append(obs, answer(0, log_prob=torch.tensor([3.0, 4.0])), outcome(obs, obs))
    assert builder.build().log_prob.tolist() == [[1, 2], [3, 4]]
    builder.start(obs, continues=True)
    builder.append(obs, answer(0, log_prob=torch.tensor([1.0, 2.0])), outcome(obs, obs))
    builder.append(obs, answer(0), outcome(obs, obs))
    with pytest.raises(ValueError, match="at 1 of 2 steps only"):
        builder.build()


def test_a_segment_needs_a_step():
    builder = TrajectoryBuilder((0, 0), auto_reset=True)
    builder.start(observation([0.0, 10.0]), continues=False)
    with pytest.raises(ValueError, match="needs at least one step"):
        builder.build()


def test_a_segment_is_shared_out_by_environments():
    builder = TrajectoryBuilder((4, 1), auto_reset=True)
    flags = [(False, False), (True, False), (False, True)]
    segment, _ = three_steps(builder, observation([0.0, 10.0]), flags, continues=True, versions=(7, 5, 6))
    assert split_by_env(segment, 1) == [segment]
    first, second = split_by_env(segment, 2)
    assert first.obs["state"][..., 0].tolist() == [[0], [1], [101], [102]]
    assert second.obs["state"][..., 0].tolist() == [[10], [11], [12], [102]]
    assert second.obs["instruction"] == [["say 10"], ["say 11"], ["say 12"], ["say 102"]]
    assert first.last_index.tolist() == [[1, 0]] and second.last_index.tolist() == [[2, 0]]
    assert first.last_obs["state"].tolist() == [[2.0]] and second.last_obs["instruction"] == ["say 13"]
    for part, column in ((first, 0), (second, 1)):
        assert (part.version, part.source, part.continues, part.num_envs) == (5, (4, 1), True, 1)
        for name in ("decision", "action", "reward", "terminated", "truncated", "intervened", "valid"):
            assert torch.equal(getattr(part, name), getattr(segment, name)[:, [column]]), name
        assert part.log_prob is None and part.value is None


def test_a_view_decides_what_of_observations_is_kept():
    seen = []

    def view(obs):
        seen.append(obs)
        return {"twice": 2 * obs["state"]}

    builder = TrajectoryBuilder((0, 0), True, view)
    segment, _ = three_steps(
        builder, observation([0.0, 10.0]), [(False, False), (True, False), (False, True)], continues=False
    )
    assert segment.obs.keys() == segment.last_obs.keys() == {"twice"}
    assert segment.obs["twice"][..., 0].tolist() == [[0, 20], [2, 22], [202, 24], [204, 204]]
    assert segment.last_obs["twice"][:, 0].tolist() == [4, 26]
    assert all(obs.keys() == {"state", "instruction"} for obs in seen), "each observation is looked at whole"
    # Where no episode ends, the observation before a reset is the one after it, and is looked at once.
    assert len(seen) == 4 + 2


def test_a_view_does_not_hide_that_another_observation_was_answered():
    builder = TrajectoryBuilder((0, 0), True, lambda obs: {"state": obs["state"]})
    start = observation([0.0, 10.0])
    builder.start(start, continues=False)
    with pytest.raises(ValueError, match="is not the one that the environment gave last"):
        builder.append(observation([0.0, 10.0]), answer(0), outcome(start, start))
    builder.append(start, answer(0), outcome(start, start))
