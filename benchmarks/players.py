"""Whom the benchmarks of the runtime let play: environments and policies that cost what is asked for, and teams."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlinf.core.protocols import Mode, VectorEnv
from rlinf.core.types import ActionOut, EnvSpaces, EnvStep
from rlinf.launch.crew import Layout
from rlinf.runtime.local import Group
from rlinf.workers.env_worker import EnvWorker
from rlinf.workers.rollout_worker import RolloutWorker

STATE, ACTION, WIDTH = 42, 4, 256
NUMBERS = itertools.count()


class IdleEnv:
    """Shows the same observation again and again; a step takes `seconds` in which no core works."""

    def __init__(self, num_envs: int, seconds: float = 0.0) -> None:
        self.num_envs, self.seconds = num_envs, seconds
        self.spaces = EnvSpaces({"state": (STATE,)}, {"state": "float32"}, ACTION)
        self.obs = {"state": torch.randn(num_envs, STATE)}

    def reset(self, seed: int | None = None) -> dict[str, Tensor]:
        return self.obs

    def step(self, action: Tensor) -> EnvStep:
        if self.seconds:
            time.sleep(self.seconds)
        none = torch.zeros(self.num_envs, 1, dtype=torch.bool)
        return EnvStep(self.obs, self.obs, torch.zeros(self.num_envs, 1), none, none[:, 0], action, none)

    def render(self) -> None:
        return None

    def close(self) -> None:
        pass


class SmallPolicy(nn.Module):
    """A deterministic multilayer perceptron.

    Before it answers it waits `seconds`, in which no core works, as for a GPU; with `per_row`, so long for each row.
    """

    def __init__(
        self, state: int = STATE, action: int = ACTION, *, seconds: float = 0.0, per_row: bool = False
    ) -> None:
        super().__init__()
        layers = [nn.Linear(state, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, action)]
        self.net, self.seconds, self.per_row, self.noise_shape = nn.Sequential(*layers), seconds, per_row, (action,)

    def act(self, obs: dict[str, Tensor], mode: str, noise: Tensor | None = None) -> ActionOut:
        if self.seconds:
            time.sleep(self.seconds * (len(obs["state"]) if self.per_row else 1))
        action = self.net(obs["state"])
        return ActionOut(action[:, None], action)


class Team:
    """Workers of environments and policies on a runtime.

    Args:
        make_env: number → the environments of a pipeline stage.
        chunks: steps of each environment in one `play`.
        stages: pipeline stages of each environment worker.
        actions_per_answer: so many actions in each of the policy's answers.
        mode: of the policy.
    """

    def __init__(
        self,
        runtime: Any,
        layout: Layout,
        make_env: Callable[[int], VectorEnv],
        make_policy: Callable[[], Any],
        *,
        chunks: int,
        stages: int = 1,
        actions_per_answer: int = 1,
        mode: Mode = "eval",
    ) -> None:
        self.mode = mode
        self.chunks, name = chunks, f"team {next(NUMBERS)}"
        ranks = range(len(layout.env))
        sources = [(rank, stage) for rank in ranks for stage in range(stages)]
        asked = {source: layout.rollout[layout.answerer(source)] for source in sources}
        obs = runtime.channel(f"{name} obs", asked)
        actions = runtime.channel(f"{name} actions", {source: layout.env[source[0]] for source in sources})
        # Nobody learns: each environment worker throws away what it has played.
        experience = runtime.channel(f"{name} experience", dict(enumerate(layout.env)))
        weights, stop = runtime.weights(f"{name} policy", layout.rollout), runtime.flag()
        envs = [
            partial(_env_worker, rank, make_env, stages, actions_per_answer, obs, actions, experience, stop)
            for rank in ranks
        ]
        rollouts = [
            partial(
                _rollout_worker, make_policy, obs, actions, weights, [s for s in sources if layout.answerer(s) == r]
            )
            for r in range(len(layout.rollout))
        ]
        self.env: Group[EnvWorker] = runtime.group("env", envs, layout.env)
        self.rollout: Group[RolloutWorker] = runtime.group("rollout", rollouts, layout.rollout)
        self.num_envs = sum(self.env.run(_num_envs).wait())
        self.pids = {pid for group in (self.env, self.rollout) for pid in group.run(_pid).wait()} - {os.getpid()}

    def play(self) -> None:
        """Make `chunks` steps with every environment."""
        serving = self.rollout.run(RolloutWorker.serve, self.mode)
        self.env.run(_play, self.chunks).wait()
        serving.wait()

    def close(self) -> None:
        self.env.run(EnvWorker.close).wait()


def _env_worker(
    rank: int,
    make_env: Callable[[int], VectorEnv],
    stages: int,
    chunk: int,
    obs: Any,
    actions: Any,
    experience: Any,
    stop: Any,
) -> EnvWorker:
    envs = [make_env(rank * stages + stage) for stage in range(stages)]
    keys = [(rank,)] * stages
    return EnvWorker(rank, envs, obs, actions, experience, stop, num_action_chunks=chunk, seed=rank, learners=keys)


def _rollout_worker(
    make_policy: Callable[[], Any], obs: Any, actions: Any, weights: Any, sources: list[tuple[int, int]]
) -> RolloutWorker:
    return RolloutWorker(make_policy(), obs, actions, weights, sources=sources, generator=torch.Generator())


def _play(worker: EnvWorker, chunks: int) -> None:
    worker.interact(chunks)
    worker.experience.drain(worker.rank)


def _num_envs(worker: EnvWorker) -> int:
    return sum(stage.num_envs for stage in worker.stages)


def _pid(worker: object) -> int:
    return os.getpid()
