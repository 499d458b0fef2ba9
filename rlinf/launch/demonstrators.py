"""Who plays the episodes that are recorded."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from rlinf.core import tree
from rlinf.core.protocols import VectorEnv
from rlinf.core.seeding import numpy_generator, torch_generator
from rlinf.core.types import ActionOut, EnvSpaces, Obs
from rlinf.launch.build import build_networks, load_weights_into
from rlinf.launch.config import Root
from rlinf.launch.registry import EXPERTS, lookup
from rlinf.runners.checkpoint import load_policy


class Demonstrator(Protocol):
    """Whoever plays the episodes; `about` says who that is, for people."""

    about: str

    def begin(self, seed: int) -> None:
        """Before an episode: everything random until the next one follows from `seed`."""
        ...

    def act(self, obs: Obs) -> ActionOut:
        """Answer N observations."""
        ...


class ScriptedExpert:
    """A hand-written rule for a task, with Gaussian noise on its actions.

    Args:
        task: the simulator's name of the task.
        noise_std: standard deviation of the noise.
    """

    def __init__(self, task: str, noise_std: float) -> None:
        self._expert_class = lookup("scripted expert", task, EXPERTS)
        self._noise_std = noise_std
        self.about = f"scripted expert for {task}, noise {noise_std:g}"

    def begin(self, seed: int) -> None:
        """As `Demonstrator.begin`."""
        self._expert = self._expert_class(self._noise_std, numpy_generator(seed, "expert"))

    def act(self, obs: Obs) -> ActionOut:
        """As `Demonstrator.act`; one action per decision."""
        action = torch.from_numpy(self._expert.act(obs["state"].cpu().numpy()))
        return ActionOut(action=action[:, None], decision=action)


class SeeingExpert:
    """A demonstrator who needs to see more than the environment shows.

    The same episodes are played in a second environment, which begins with the same seeds and gets the same actions;
    its observations are what the demonstrator acts on.

    Args:
        expert: who acts.
        env: shows everything; otherwise it is the environment that is recorded.
    """

    def __init__(self, expert: Demonstrator, env: VectorEnv) -> None:
        self._expert, self._env = expert, env
        self.about = expert.about

    def begin(self, seed: int) -> None:
        """As `Demonstrator.begin`."""
        self._expert.begin(seed)
        self._obs = self._env.reset(seed=env_seed(seed))

    def act(self, obs: Obs) -> ActionOut:
        """As `Demonstrator.act`."""
        out = self._expert.act(self._obs)
        self._obs = self._env.step(out.action).obs
        return out


class TrainedPolicy:
    """The policy of a checkpoint, which must fit `config.actor.model`.

    Args:
        explore: act with the policy's own exploration noise.
    """

    def __init__(self, config: Root, spaces: EnvSpaces, checkpoint: str, *, explore: bool) -> None:
        self._actor = build_networks(config, spaces).actor
        load_weights_into(self._actor, load_policy(checkpoint)[1], checkpoint)
        self._explore = explore
        self.about = f"{config.actor.model.model_type} of {checkpoint}{', exploring' if explore else ''}"

    def begin(self, seed: int) -> None:
        """As `Demonstrator.begin`."""
        self._generator = torch_generator(seed, "expert")

    def act(self, obs: Obs) -> ActionOut:
        """As `Demonstrator.act`."""
        obs = tree.to(obs, "cpu")
        if not self._explore:
            return self._actor.act(obs, "eval")
        noise = torch.randn(len(obs["state"]), *self._actor.noise_shape, generator=self._generator)
        return self._actor.act(obs, "train", noise)


class StepByStep:
    """A demonstrator whose chunks are played one action at a time, so that every step is observed."""

    def __init__(self, player: Demonstrator) -> None:
        self._player, self.about = player, player.about
        self._left: list[Tensor] = []

    def begin(self, seed: int) -> None:
        """As `Demonstrator.begin`."""
        self._player.begin(seed)
        self._left = []

    def act(self, obs: Obs) -> ActionOut:
        """As `Demonstrator.act`; the next action of the chunk."""
        if not self._left:
            self._out = self._player.act(obs)
            self._left = list(self._out.action.unbind(1))
        action = self._left.pop(0)
        return replace(self._out, action=action[:, None], decision=action, log_prob=None, value=None)


def env_seed(seed: int) -> int:
    """The seed of a round's episodes in the environment."""
    return seed % 2**31
