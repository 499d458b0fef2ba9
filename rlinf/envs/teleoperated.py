"""A person's hands on any environment: the operator acts while moving, the policy otherwise.

Environments of the robot cell ask their operator themselves; this gives the same to simulators, so that whoever
will stand at the cell can practise, and demonstrations of both are recorded by one path.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlinf.core.errors import ConfigError, RlinfError
from rlinf.core.protocols import VectorEnv
from rlinf.core.types import EnvStep, Obs
from rlinf.envs.realworld.teleop.operator import Command, Operator, ScriptedOperator, Takeover

STOPPED = "the operator said stop"
WITH_GRIPPER = (4, 7)
"""Sizes of actions whose last element is a gripper."""


class OperatorStopped(RlinfError):
    """The operator said stop."""


class TeleoperatedEnv:
    """A `VectorEnv` of one environment whose actions an operator may replace; otherwise the one that it wraps.

    `success` and `failure` of the operator end the episode: the first as a termination with a reward of at least 1,
    the second as a truncation. The next episode must begin by `reset`. One action at a time.

    Args:
        env: one environment without automatic reset.
        operator: see `open_operator`.
        closing: sign of the action's last element that closes the gripper, where it is one.
        rate_hz: steps per second, kept by waiting; None for environments that keep their own time.
        hold_s: see `Takeover`.

    Raises ConfigError for several environments.
    """

    def __init__(
        self,
        env: VectorEnv,
        operator: Operator,
        *,
        closing: int = -1,
        rate_hz: float | None = None,
        hold_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if env.num_envs != 1:
            raise ConfigError(f"a person moves one robot at a time, not {env.num_envs}: set env.train.total_num_envs=1")
        self.num_envs, self.spaces = env.num_envs, env.spaces
        self._env, self._operator, self._clock, self._sleep = env, operator, clock, sleep
        self._takeover, self._closing = Takeover(7, hold_s), closing
        self._period_s = None if rate_hz is None else 1.0 / rate_hz
        self._due_s = clock()

    def reset(self, seed: int | None = None) -> Obs:
        """As `VectorEnv.reset`; nobody holds the arm then. Raises as `step`."""
        self._takeover.reset()
        if self._operator.read().mark == "stop":  # other marks belong to the episode before
            raise OperatorStopped(STOPPED)
        obs = self._env.reset(seed)
        self._due_s = self._clock()
        return obs

    def step(self, action: Tensor) -> EnvStep:
        """As `VectorEnv.step`, with what was done in `executed` and by whom in `intervened`.

        Raises TeleopError when the device was lost, OperatorStopped.
        """
        self._wait()
        command = self._operator.read()
        if command.mark == "stop":
            raise OperatorStopped(STOPPED)
        taken = self._takeover.decide(command, self._clock())
        if taken is not None:
            hand = action_from(taken, self.spaces.action_dim, self._closing)
            action = torch.from_numpy(hand).expand_as(action).clone()
        step = self._env.step(action)
        if taken is not None:
            step = replace(step, intervened=torch.ones_like(step.intervened))
        return self._judged(step, command.mark) if command.mark and not bool(step.done.any()) else step

    def render(self) -> np.ndarray | None:
        """As `VectorEnv.render`."""
        return self._env.render()

    def close(self) -> None:
        """Let go of the device and close the environment."""
        self._operator.close()
        self._env.close()

    def _judged(self, step: EnvStep, mark: str) -> EnvStep:
        """The step by which the operator ended the episode."""
        if mark != "success":
            return replace(step, truncated=torch.ones_like(step.truncated))
        info = dict(step.info)
        for name in ("success", "episode/success_once", "episode/success_at_end"):
            info[name] = torch.ones(1, dtype=torch.bool)
        terminated = step.terminated.clone()
        terminated[:, -1] = True
        reward = step.reward.clone()
        paid = float((1.0 - reward[0, -1]).clamp(min=0))
        reward[:, -1] += paid
        if "episode/return" in info:
            info["episode/return"] = info["episode/return"] + paid
        return replace(step, terminated=terminated, reward=reward, info=info)

    def _wait(self) -> None:
        if self._period_s is None:
            return
        if (left := self._due_s - self._clock()) > 0:
            self._sleep(left)
        self._due_s = max(self._due_s, self._clock()) + self._period_s


def action_from(hand: np.ndarray, action_dim: int, closing: int = -1) -> np.ndarray:
    """A motion [6] and a gripper (−1 closes) as an action of `action_dim` elements, float32.

    7: all of them; 6: without the gripper; 4: x, y, z and the gripper; fewer than 4: the first of them.
    Raises ConfigError for other sizes.
    """
    if action_dim > 7 or action_dim == 5:
        raise ConfigError(f"a hand moves at most seven elements of an action, and here are {action_dim}")
    action = hand[_places(action_dim)].astype(np.float32)
    if action_dim in WITH_GRIPPER:
        action[-1] *= -closing
    return action


def hand_from(action: np.ndarray, closing: int = -1) -> Command:
    """Inverse of `action_from`: the command of a hand that would act so."""
    hand = np.zeros(7)
    hand[_places(len(action))] = np.clip(action, -1, 1)
    return Command(hand[:6], float(hand[6]) * -closing)


def _places(action_dim: int) -> list[int]:
    return [0, 1, 2, 6] if action_dim == 4 else list(range(action_dim))


class Expert(Protocol):
    """A scripted demonstrator."""

    def act(self, state: np.ndarray) -> np.ndarray:
        """Actions [N, A] for states [N, S]."""
        ...


class Rule:
    """A scripted operator's hand: acts on the newest observation, as a person does.

    Args:
        expert: act(state [N, S]) → actions [N, A].
        closing: as that of the environment.
    """

    def __init__(self, expert: Expert, closing: int = -1) -> None:
        self._expert, self._closing = expert, closing
        self._state: np.ndarray | None = None

    def see(self, obs: Obs) -> None:
        """Look at the present observation."""
        self._state = obs["state"].cpu().numpy()

    def wish(self) -> Command:
        """What the hand does now; nothing before it has seen anything."""
        return (
            Command(np.zeros(6)) if self._state is None else hand_from(self._expert.act(self._state)[0], self._closing)
        )

    def operator(self) -> ScriptedOperator:
        """This hand as an operator."""
        return ScriptedOperator(self.wish)
