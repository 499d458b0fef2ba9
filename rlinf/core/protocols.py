"""The roles. A class plays one by having its methods; nothing here is meant to be inherited.

An environment, a policy and an algorithm never see each other's classes: they meet in `launch/build.py`
and talk in the records of `core.types`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from rlinf.core.ranks import ONE_RANK, Ranks
from rlinf.core.types import ActionOut, EnvSpaces, EnvStep, Metrics, Obs, Trajectory

Mode = Literal["train", "eval"]


@runtime_checkable
class VectorEnv(Protocol):
    """N environments that are stepped together."""

    num_envs: int
    spaces: EnvSpaces

    def reset(self, seed: int | None = None) -> Obs:
        """Start a fresh episode in every environment.

        With a seed, everything that happens until the next seeded reset is a function of it and of the
        actions. Without one, the environment goes on with its own generator.
        """
        ...

    def step(self, action: Tensor) -> EnvStep:
        """Play one chunk of actions, float32 [N, H, A]. Raises ShapeError on another shape."""
        ...

    def render(self) -> np.ndarray | None:
        """uint8 [N, height, width, 3] of the present state for people, or None where there is no picture."""
        ...

    def close(self) -> None:
        """Free processes, simulators and shared memory. Calling it twice is allowed."""
        ...


class Actor(Protocol):
    """A policy network: acts, and gives reparameterised samples to an algorithm.

    A pure function of observation and noise: whoever calls draws the noise, so that tests can inject it, rollouts
    can correlate it over time, and a compiled loss holds no generator.

    Attributes:
        noise_shape: shape of the standard normal numbers that one decision consumes.
    """

    noise_shape: tuple[int, ...]

    def act(self, obs: Obs, mode: Mode, noise: Tensor | None = None) -> ActionOut:
        """Answer N observations. `train` explores by `noise` [N, *noise_shape]; `eval` needs none."""
        ...

    def sample(self, obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Decisions [B, ...] and log densities [B], differentiable in the parameters; noise [B, *noise_shape]."""
        ...

    def default_target_entropy(self) -> float:
        """Target for the temperature when none is configured, in the units of this policy's `log_prob`."""
        ...


@runtime_checkable
class LearnsLater(Protocol):
    """An actor that acts by something else until learning begins."""

    def begin_learning(self) -> None:
        """Called once, before the first update."""
        ...


class Critic(Protocol):
    """An ensemble of E action values."""

    num_heads: int

    def __call__(self, obs: Obs, decision: Tensor) -> Tensor:
        """Q values [E, B]."""
        ...


class Network(Protocol):
    """What an algorithm needs of a module to train it: the part of `torch.nn.Module` that it calls."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that is trained."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same by name."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Parameters and buffers by name."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Inverse of `state_dict`; strict."""
        ...


class RunningStatistics(Protocol):
    """Statistics of the observations that networks normalise by."""

    def update(self, state: Tensor, ranks: Ranks = ONE_RANK) -> None:
        """Take in the states [B, S] of all ranks; one that has none gives a tensor without elements."""
        ...


@runtime_checkable
class ShardUnits(Protocol):
    """A network that is so large that it should be brought together in parts where its weights are shared out.

    One without this method is one unit: all of it is on every device while it is computed.
    """

    def shard_units(self) -> Sequence[nn.Module]:
        """The blocks, such as transformer layers, inner ones before outer ones. Each is only called: nobody else reads
        its parameters. What belongs to none is a unit of its own.
        """
        ...


class ActorNetwork(Actor, Network, Protocol):
    """A trainable actor."""


class CriticNetwork(Critic, Network, Protocol):
    """A trainable ensemble of critics."""


class ActorCritic(Protocol):
    """A policy with a value head, for on-policy algorithms. Densities are given per element of the decision."""

    noise_shape: tuple[int, ...]

    def act(self, obs: Obs, mode: Mode, noise: Tensor | None = None) -> ActionOut:
        """As `Actor.act`, with `value` [N] and, when exploring, `log_prob` [N, H, A]."""
        ...

    def evaluate(self, obs: Obs, decision: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log densities [B, H, A], entropies [B, H, A] and values [B] of given decisions."""
        ...

    def log_prob(self, obs: Obs, decision: Tensor) -> Tensor:
        """The log densities of `evaluate`, the same numbers, without what the others take."""
        ...

    def value(self, obs: Obs) -> Tensor:
        """V(s) [B]."""
        ...


@runtime_checkable
class Prepares(Protocol):
    """A policy that can do beforehand, once for many passes, what does not depend on its weights."""

    def prepare(self, obs: Obs) -> Obs:
        """What its methods take instead of the observations; of tensors alone."""
        ...


class ActorCriticNetwork(ActorCritic, Network, Protocol):
    """A trainable policy with a value head; each loss trains parameters of its own."""

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trained by the policy's optimizer."""
        ...

    def value_parameters(self) -> list[nn.Parameter]:
        """Trained by the value function's optimizer; none of the policy's."""
        ...


class Algorithm(Protocol):
    """Turns experience into better weights. Owns networks, optimizers, buffers and counters.

    Where several ranks learn together, all of them call `ready`, `update`, `acting_weights` and `state_dict` at the
    same time; see `core.ranks`. Of weights that are shared out among them, rank 0 alone is given a whole copy.
    """

    def observe(self, trajectory: Trajectory) -> None:
        """Take in one segment of experience."""
        ...

    def ready(self) -> bool:
        """Whether there is enough experience for `update`."""
        ...

    def update(self) -> Metrics:
        """One gradient step of the schedule; nothing (no metrics) when there is no more to learn from.

        Metric tags come without the `train/` prefix, which all but `rollout/...` get.
        """
        ...

    def acting_weights(self) -> tuple[int, dict[str, Tensor]]:
        """(version, state dict of the actor): what rollout workers need, copied so that it may not change."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, except the buffers: weights, optimizers, counters, generators."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`. Raises CheckpointError naming missing, extra or misshapen entries."""
        ...

    def held(self) -> dict[str, Any]:
        """The very tensors that this rank keeps between updates, to be moved elsewhere and back."""
        ...

    def trained(self) -> dict[str, Sequence[tuple[str, Tensor]]]:
        """Named parameters of everything that an optimizer moves, by network; to be told to people."""
        ...

    def buffers(self) -> dict[str, Buffer]:
        """Stores of experience by name (`replay_buffer`, `demo_buffer`), saved beside the state."""
        ...


class Buffer(Protocol):
    """A store of experience that survives a restart."""

    def save(self, directory: str) -> None:
        """Write everything, generator state included, into an existing empty directory."""
        ...

    def load(self, directory: str) -> None:
        """Inverse of `save`. Raises CheckpointError naming the file that is missing or does not fit."""
        ...

    def load_share(self, directories: Sequence[str], rank: int, size: int) -> None:
        """Become share `rank` of `size` equal ones of what several buffers saved. Raises CheckpointError."""
        ...

    def statistics(self) -> dict[str, float]:
        """`size`, `utilization`, `max_reward`, `min_reward`, `mean_reward`, `std_reward`."""
        ...
