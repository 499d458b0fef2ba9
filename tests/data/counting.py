"""Sources whose every frame says which it is, so that a mixed-up transition shows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rlinf.core.types import ActionOut, EnvStep, Trajectory, Transition
from rlinf.data.replay import ReplayBuffer
from rlinf.data.trajectory import TrajectoryBuilder

PIXELS = torch.arange(12, dtype=torch.uint8).reshape(2, 2, 3)


class CountingSource:
    """N environments that show (source, environment, episode, step) as state, picture and sentence."""

    def __init__(self, number: int, num_envs: int, rng: np.random.Generator, auto_reset: bool = True) -> None:
        self.number, self.num_envs, self.rng, self.auto_reset = number, num_envs, rng, auto_reset
        self.builder = TrajectoryBuilder((number, 0), auto_reset)
        self.episode = torch.zeros(num_envs)
        self.step = torch.zeros(num_envs)
        self.obs = self.observe()

    def observe(self) -> dict:
        number = torch.full((self.num_envs,), float(self.number))
        state = torch.stack([number, torch.arange(self.num_envs).float(), self.episode, self.step], -1)
        return {
            "state": state,
            "images": {"front": picture(state)},
            "instruction": [sentence(row) for row in state],
        }

    def restart(self) -> None:
        """Leave the present episodes unfinished and begin new ones."""
        self.episode, self.step = self.episode + 1, torch.zeros(self.num_envs)
        self.obs = self.observe()

    def segment(self, steps: int, *, continues: bool, end_probability: float = 0.3) -> Trajectory:
        if not continues:
            self.restart()
        self.builder.start(self.obs, continues=continues)
        for _ in range(steps):
            state = self.obs["state"]
            out = ActionOut(action=state[:, None].clone(), decision=state.clone(), version=int(self.rng.integers(9)))
            self.step = self.step + 1
            last_obs = self.observe()
            ends = torch.from_numpy(self.rng.random((2, self.num_envs)) < end_probability / 2)
            if self.auto_reset and ends.any():
                done = ends.any(0)
                self.episode, self.step = self.episode + done, self.step * ~done
            following = self.observe() if self.auto_reset and ends.any() else last_obs
            result = EnvStep(
                obs=following,
                last_obs=last_obs,
                reward=reward_of(state)[:, None],
                terminated=ends[0][:, None],
                truncated=ends[1],
                executed=out.action,
                intervened=torch.zeros(self.num_envs, 1, dtype=torch.bool),
            )
            self.builder.append(self.obs, out, result)
            self.obs = following
        return self.builder.build()


def picture(state: Tensor) -> Tensor:
    tone = (state @ torch.tensor([101.0, 41.0, 13.0, 7.0])).long() % 200
    return tone.to(torch.uint8)[:, None, None, None] + PIXELS


def sentence(row: Tensor) -> str:
    return f"source {int(row[0])}, attempt {int(row[2]) % 5}"


def reward_of(state: Tensor) -> Tensor:
    return state @ torch.tensor([0.5, 0.25, 2.0, 1.0])


def discount_of(state: Tensor) -> Tensor:
    return (state.sum(-1) % 11) / 11


def add(buffer: ReplayBuffer, trajectory: Trajectory) -> None:
    buffer.add(trajectory, trajectory.reward[..., 0], discount_of(trajectory.obs["state"][:-1]))


def assert_whole(batch: Transition) -> None:
    """Every row is one step of one episode of one environment, in all of its leaves."""
    state, following = batch.obs["state"], batch.next_obs["state"]
    assert torch.equal(following, state + torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert torch.equal(batch.decision, state)
    assert torch.equal(batch.reward, reward_of(state))
    assert torch.equal(batch.discount, discount_of(state))
    for obs in (batch.obs, batch.next_obs):
        assert torch.equal(obs["images"]["front"], picture(obs["state"]))
        assert obs["instruction"] == [sentence(row) for row in obs["state"]]


def transitions(trajectory: Trajectory) -> set[tuple[float, ...]]:
    """The states from which the segment's valid transitions start."""
    return {tuple(state) for state in trajectory.obs["state"][:-1][trajectory.valid].tolist()}


def stored(buffer: ReplayBuffer) -> set[tuple[float, ...]]:
    """The states from which the stored transitions start, found by sampling."""
    draws = 12 * len(buffer) + 200
    batch = buffer.sample(draws)
    assert_whole(batch)
    return {tuple(state) for state in batch.obs["state"].tolist()}
