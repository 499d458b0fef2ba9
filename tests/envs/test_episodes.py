"""Rules of an episode, on a simulator whose numbers are written by hand."""

import numpy as np
import pytest
import torch

from rlinf.core.errors import NonFiniteError
from rlinf.core.types import EnvSpaces
from rlinf.envs.episodes import EpisodeRules, EpisodicEnv, Outcome, ReplayedEnv, join_states, split_state


class ScriptedWorlds:
    """Counts the actions of each world; reward, success and failure are read from the action itself."""

    device = torch.device("cpu")

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.spaces = EnvSpaces({"state": (2,)}, {"state": "float32"}, action_dim=3)
        self.state = torch.zeros(num_envs, 2)
        self.begun = []
        self.closed = 0

    def begin(self, rows, seeds):
        self.begun.append((list(rows), list(seeds)))
        for row, seed in zip(rows, seeds, strict=True):
            self.state[row] = torch.tensor([0.0, seed % 97])

    def advance(self, action, active):
        self.state[:, 0] += active
        return Outcome(action[:, 0].clone(), action[:, 1] > 0, action[:, 2] > 0)

    def observe(self):
        return {"state": self.state.clone()}

    def render(self):
        return np.zeros((self.num_envs, 2, 2, 3), np.uint8)

    def close(self):
        self.closed += 1


def chunk(*rows):
    """Rows of (reward, success, failure) per action → [N, H, 3]."""
    return torch.tensor(rows, dtype=torch.float32)


IDLE, WIN, LOSE = (1.0, 0, 0), (3.0, 1, 0), (-1.0, 0, 1)


def env_of(num_envs=2, seed=0, **rules):
    return EpisodicEnv(ScriptedWorlds(num_envs), EpisodeRules(**{"max_episode_steps": 4} | rules), seed=seed)


def test_success_and_failure_terminate_where_they_happen():
    env = env_of(3)
    env.reset()
    step = env.step(chunk([IDLE, WIN, IDLE], [LOSE, WIN, IDLE], [IDLE, IDLE, IDLE]))
    assert step.terminated.tolist() == [[False, True, False], [True, False, False], [False, False, False]]
    assert step.reward.tolist() == [[1, 3, 0], [-1, 0, 0], [1, 1, 1]]
    assert step.truncated.tolist() == [False] * 3
    assert step.info["success"].tolist() == [True, False, False]
    assert step.info["episode/success_once"].tolist() == [True, False, False]
    assert step.info["episode/return"].tolist() == [4, -1, 3]
    assert step.info["episode/episode_len"].tolist() == [2, 1, 3]
    assert step.info["episode/reward"].tolist() == [2, -1, 1]
    assert step.last_obs["state"][:, 0].tolist() == [2, 1, 3]
    assert step.obs["state"][:, 0].tolist() == [0, 0, 3]


def test_terminating_at_the_time_limit_is_no_truncation():
    env = env_of(max_episode_steps=2)
    env.reset()
    step = env.step(chunk([IDLE, WIN], [IDLE, IDLE]))
    assert step.terminated[:, 1].tolist() == [True, False]
    assert step.truncated.tolist() == [False, True]


def test_every_step_costs_one_until_success():
    env = env_of(2, use_step_penalty=True, max_episode_steps=3)
    env.reset()
    nothing, success = (0.0, 0, 0), (1.0, 1, 0)
    step = env.step(chunk([nothing, success, nothing], [nothing, nothing, nothing]))
    assert step.reward.tolist() == [[-1, 0, 0], [-1, -1, -1]], "nothing is paid for what is not played"
    assert step.info["episode/return"].tolist() == [-1, -3]
    assert (step.terminated.any(1).tolist(), step.truncated.tolist()) == ([True, False], [False, True])


def test_the_penalty_comes_after_differences_and_before_the_scale():
    env = env_of(1, use_step_penalty=True, use_rel_reward=True, reward_scale=0.5)
    env.reset()
    step = env.step(chunk([(3.0, 0, 0), (5.0, 0, 0)]))
    assert step.reward.tolist() == [[0.5 * (3 - 1), 0.5 * (2 - 1)]]


def test_ignored_terminations_are_recorded():
    env = env_of(1, ignore_terminations=True)
    env.reset()
    first, second = env.step(chunk([WIN, LOSE])), env.step(chunk([IDLE, IDLE]))
    assert not first.terminated.any() and not second.terminated.any()
    assert second.truncated.all()
    assert second.info["episode/success_once"].all()
    assert not second.info["episode/success_at_end"].any()


def test_relative_reward_is_the_change_and_begins_at_zero():
    env = env_of(1, use_rel_reward=True, reward_scale=10.0)
    env.reset()
    step = env.step(chunk([(0.5, 0, 0), (2.0, 0, 0), (1.5, 0, 0), (1.0, 0, 0)]))
    assert step.reward.tolist() == [[5.0, 15.0, -5.0, -5.0]]
    assert step.info["episode/return"].tolist() == [1.0]
    assert env.step(chunk([(0.5, 0, 0)])).reward.tolist() == [[5.0]]


def test_seeds_of_episodes_depend_on_row_number_and_episode_only():
    whole = env_of(4, seed=9)
    parts = [EpisodicEnv(ScriptedWorlds(2), EpisodeRules(max_episode_steps=4), seed=9, first_row=row) for row in (0, 2)]
    for env in (whole, *parts):
        env.reset()
        env.reset()
    seeds = [seeds for _, seeds in whole._simulator.begun]
    assert seeds[0] != seeds[1]
    for number in range(2):
        assert seeds[number] == [seed for part in parts for seed in part._simulator.begun[number][1]]
    assert all(0 <= seed < 2**31 for seed in seeds[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_reward_names_row_step_and_seed(bad):
    env = EpisodicEnv(ScriptedWorlds(2), EpisodeRules(max_episode_steps=9), seed=0, first_row=6)
    env.reset()
    env.step(chunk([IDLE], [IDLE]))
    env._simulator.advance = lambda action, active: Outcome(torch.tensor([0.0, bad]), active, active)
    seed = env._simulator.begun[0][1][1]
    with pytest.raises(NonFiniteError, match=f"reward of environment 7 .* at step 1 of the episode with seed {seed}"):
        env.step(chunk([IDLE], [IDLE]))


def test_stepping_comes_after_resetting_and_closing_happens_once():
    env = env_of()
    with pytest.raises(RuntimeError, match="before the first reset"):
        env.step(chunk([IDLE], [IDLE]))
    env.close()
    env.close()
    assert env._simulator.closed == 1


def test_states_are_joined_and_split_by_rows():
    rules = EpisodeRules(max_episode_steps=4, ignore_terminations=True)
    parts = [ReplayedEnv(ScriptedWorlds(size), rules, seed=1, first_row=row) for size, row in ((1, 0), (2, 1))]
    for length, env in zip((3, 1), parts, strict=True):
        env.reset()
        env.step(chunk(*[[IDLE] * length] * env.num_envs))
    joined = join_states([env.state_dict() for env in parts])
    assert joined["played"].shape == (3, 3, 3)
    assert joined["tracked"]["_steps"].tolist() == [3, 1, 1]
    pieces = split_state(joined, [2, 1])
    assert [piece["next_episode"] for piece in pieces] == [[1, 1], [1]]
    again = ReplayedEnv(ScriptedWorlds(2), rules, seed=0)
    again.load_state_dict(pieces[0])
    assert again._simulator.state[:, 0].tolist() == [3, 1]
    step = again.step(chunk([IDLE], [IDLE]))
    assert step.info["episode/episode_len"].tolist() == [4, 2]
    assert step.truncated.tolist() == [True, False]
