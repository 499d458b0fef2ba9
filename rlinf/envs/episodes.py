"""Episodes over any simulator: time limits, automatic resets, rewards as learned from, bookkeeping, seeds.

A `Simulator` moves N worlds and knows nothing of episodes. `EpisodicEnv` turns it into a `VectorEnv`, so that
every environment of this package treats truncation, last observations and seeds alike. Where N worlds are
spread over processes is not known here either; see `subproc.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from rlinf.core import tree
from rlinf.core.errors import CheckpointError, NonFiniteError, RunEnding, ShapeError
from rlinf.core.seeding import derive_seed
from rlinf.core.types import EnvSpaces, EnvStep, Obs
from rlinf.envs.config import EnvConfig

INFO_DTYPES = {
    "success": torch.bool,
    "episode/success_once": torch.bool,
    "episode/success_at_end": torch.bool,
    "episode/return": torch.float32,
    "episode/episode_len": torch.float32,
    "episode/reward": torch.float32,
    "task": torch.int64,
    "goes_on": torch.bool,
}
"""Entries of `EnvStep.info` that every environment of this package gives."""

MAX_SIMULATOR_SEED = 2**31
"""Simulators seed numpy's old generator, which takes no more bits."""


@dataclass(frozen=True)
class Outcome:
    """What one action did to N worlds: reward float32 [N], success and failure bool [N], before any scaling.

    Where an operator may act in the policy's place, `executed` [N, A] is what was done and `intervened` bool [N] in
    which worlds it was theirs; None where everything was done as told.
    """

    reward: Tensor
    success: Tensor
    failure: Tensor
    executed: Tensor | None = None
    intervened: Tensor | None = None


@runtime_checkable
class Reporting(Protocol):
    """A simulator that has more to tell of the running episodes than reward and success."""

    def report(self) -> dict[str, Tensor]:
        """Entries [N] for `EnvStep.info`; those of an episode are called `episode/<name>`."""
        ...


@runtime_checkable
class Patient(Protocol):
    """An environment or simulator that may wait for what is outside of it: a robot, a camera, a person."""

    def give_up_when(self, asked: Callable[[], bool]) -> None:
        """From now on every wait ends with RunEnding once `asked` says so; it is asked often, in the waiting thread."""
        ...


class Simulator(Protocol):
    """N worlds that are stepped together and begun anew one by one."""

    num_envs: int
    spaces: EnvSpaces
    device: torch.device

    def begin(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """Put the worlds `rows` into initial states that are functions of their seeds alone."""
        ...

    def advance(self, action: Tensor, active: Tensor) -> Outcome:
        """Apply one action, float32 [N, A], to the worlds that are `active`, bool [N].

        An inactive world keeps its observation; its row of the outcome is not read.
        """
        ...

    def observe(self) -> Obs:
        """Observation of the present state, in memory that the simulator does not touch again."""
        ...

    def render(self) -> np.ndarray | None:
        """uint8 [M ≤ N, height, width, 3] of the first worlds, or None where there is no picture."""
        ...

    def close(self) -> None:
        """Free everything. Calling it twice is allowed."""
        ...


@dataclass(frozen=True)
class EpisodeRules:
    """When episodes end and begin, and what the learner is paid.

    Attributes:
        max_episode_steps: time limit; reaching it truncates.
        auto_reset: begin a new episode in rows that ended. Otherwise they stand still, earn nothing and are
            not `done` again until the next `reset`.
        ignore_terminations: neither success nor failure ends an episode.
        use_rel_reward: r_t − r_{t−1} with r_{−1} = 0, so that the return is the last reward.
        use_step_penalty: r − 1 in place of r, after `use_rel_reward`.
        reward_scale: factor on the reward, applied last. `episode/return` is counted before it.
        group_size: so many neighbouring rows share their episodes' seeds.
        fixed_resets: an unseeded `reset` goes back to the first episodes instead of on to new ones.
    """

    max_episode_steps: int
    auto_reset: bool = True
    ignore_terminations: bool = False
    use_rel_reward: bool = False
    use_step_penalty: bool = False
    reward_scale: float = 1.0
    group_size: int = 1
    fixed_resets: bool = False


def episode_rules(config: EnvConfig) -> EpisodeRules:
    """The rules that a configuration asks for."""
    return EpisodeRules(
        max_episode_steps=config.max_episode_steps,
        auto_reset=config.auto_reset,
        ignore_terminations=config.ignore_terminations,
        use_rel_reward=config.use_rel_reward,
        use_step_penalty=config.use_step_penalty,
        reward_scale=config.reward_scale,
        group_size=config.group_size,
        fixed_resets=config.use_fixed_reset_state_ids,
    )


class Starts(Protocol):
    """Which initial state the e-th episode of environment `row` has, counted over all environments of its group."""

    def seed(self, root: int, row: int, episode: int) -> int:
        """What the simulator makes the initial state of, at most 31 bits."""
        ...

    def task(self, seed: int) -> int:
        """Which of `EnvSpaces.tasks` begins with that seed; 0 where there is only one."""
        ...

    def length(self, row: int) -> int | None:
        """After so many episodes the environment has had its share of a list of starts; None where there is no list.

        An evaluation counts every episode of a list; the next one would begin the list again.
        """
        ...


@dataclass(frozen=True)
class DrawnStarts:
    """Initial states that are drawn: derive_seed(root, "episode/<row // group_size>/<episode>")."""

    group_size: int = 1

    def seed(self, root: int, row: int, episode: int) -> int:
        """As `Starts.seed`."""
        return derive_seed(root, f"episode/{row // self.group_size}/{episode}") % MAX_SIMULATOR_SEED

    def task(self, seed: int) -> int:
        """As `Starts.task`."""
        return 0

    def length(self, row: int) -> int | None:
        """As `Starts.length`."""
        return None


class EpisodicEnv:
    """A `VectorEnv` made of a simulator and the rules of an episode.

    What the e-th episode of an environment begins with is a function of the root seed, of the environment's number and
    of e: initial states depend neither on how environments are spread over processes nor on what happened before. An
    environment that has come to the end of its list of starts stands still until the next `reset`.

    Args:
        simulator: the N worlds.
        rules: of an episode.
        seed: root seed until the first seeded reset.
        first_row: index of the first row among all environments, for seeds and messages.
        starts: initial states; drawn ones where nothing is said.
    """

    def __init__(
        self,
        simulator: Simulator,
        rules: EpisodeRules,
        *,
        seed: int,
        first_row: int = 0,
        starts: Starts | None = None,
    ) -> None:
        n, device = simulator.num_envs, simulator.device
        self._starts = starts or DrawnStarts(rules.group_size)
        self.num_envs = n
        self.spaces = replace(simulator.spaces, max_episode_steps=rules.max_episode_steps)
        self._simulator, self._rules, self._first_row = simulator, rules, first_row
        self._root = seed
        self._next_episode = [0] * n
        self._episode_seed = [0] * n
        self._length = [self._starts.length(first_row + row) for row in range(n)]
        self._endless = torch.tensor([length is None for length in self._length], device=device)
        self._goes_on = torch.zeros(n, dtype=torch.bool, device=device)
        self._task = torch.zeros(n, dtype=torch.int64, device=device)
        self._begun = self._closed = False
        self._ending: RunEnding | None = None
        self._running = torch.zeros(n, dtype=torch.bool, device=device)
        self._steps = torch.zeros(n, dtype=torch.int64, device=device)
        self._success = torch.zeros(n, dtype=torch.bool, device=device)
        self._success_once = torch.zeros(n, dtype=torch.bool, device=device)
        self._return = torch.zeros(n, device=device)
        self._task_reward = torch.zeros(n, device=device)

    def reset(self, seed: int | None = None) -> Obs:
        """Observation of fresh episodes in all rows; see `core.protocols.VectorEnv.reset`."""
        self._check_open()
        if seed is not None:
            self._root = seed
        self._ending = None
        if seed is not None or self._rules.fixed_resets:
            self._next_episode = [0] * self.num_envs
        self._begin(torch.ones_like(self._running))
        return self._observe()

    def step(self, action: Tensor) -> EnvStep:
        """Play a chunk, float32 [N, H, A]; see `core.protocols.VectorEnv.step`.

        Raises:
            ShapeError: the action has another shape.
            NonFiniteError: an action, a reward or an observation holds NaN or infinity.
            RunEnding: the run is to end, and something outside was waited for. When that is so between two episodes,
                the step that ended the first is returned, and the next call raises.
        """
        self._check_open()
        if self._ending is not None:
            raise self._ending
        if not self._begun:
            raise RuntimeError("step() before the first reset()")
        action = check_action(action, self.num_envs, self.spaces.action_dim, self._first_row)
        action = action.to(self._simulator.device)
        n, horizon, _ = action.shape
        reward = torch.zeros(n, horizon, device=action.device)
        terminated = torch.zeros(n, horizon, dtype=torch.bool, device=action.device)
        truncated = torch.zeros(n, dtype=torch.bool, device=action.device)
        intervened = torch.zeros(n, horizon, dtype=torch.bool, device=action.device)
        executed = action
        for h in range(horizon):
            outcome, reward[:, h], terminated[:, h], now_truncated = self._advance(action[:, h])
            truncated |= now_truncated
            if outcome.executed is not None and outcome.intervened is not None:
                executed = executed.clone() if executed is action else executed
                executed[:, h] = torch.where(outcome.intervened[:, None], outcome.executed, action[:, h])
                intervened[:, h] = outcome.intervened
        last_obs = self._observe()
        info = self._info()
        beginning = (terminated.any(1) | truncated) & (self._endless | self._goes_on)
        obs = last_obs
        if self._rules.auto_reset and bool(beginning.any()):
            try:
                self._begin(beginning)
                obs = self._observe()
            except RunEnding as ending:  # what was played is worth keeping
                self._ending = ending
        return EnvStep(obs, last_obs, reward, terminated, truncated, executed, intervened, info)

    def render(self) -> np.ndarray | None:
        """uint8 [M ≤ N, height, width, 3] of the present state, or None where there is no picture."""
        self._check_open()
        return self._simulator.render()

    def give_up_when(self, asked: Callable[[], bool]) -> None:
        """As `Patient.give_up_when`; nothing where the simulator never waits."""
        if isinstance(self._simulator, Patient):
            self._simulator.give_up_when(asked)

    def close(self) -> None:
        """Free the simulator. Calling it twice is allowed."""
        if not self._closed:
            self._closed = True
            self._simulator.close()

    def _advance(self, action: Tensor) -> tuple[Outcome, Tensor, Tensor, Tensor]:
        """What one action did; reward, termination and truncation [N], in the rows whose episode still runs."""
        running = self._running.clone()
        outcome = self._simulator.advance(action, running)
        task_reward = torch.where(running, outcome.reward, 0.0)
        if not bool(torch.isfinite(task_reward).all()):
            self._raise_non_finite("reward", task_reward)
        reward = task_reward - self._task_reward if self._rules.use_rel_reward else task_reward
        reward = torch.where(running, reward - float(self._rules.use_step_penalty), 0.0)
        self._task_reward = torch.where(running, task_reward, self._task_reward)
        self._success = torch.where(running, outcome.success, self._success)
        self._success_once |= self._success & running
        self._return += reward
        self._steps += running

        terminated = torch.zeros_like(running)
        if not self._rules.ignore_terminations:
            terminated = running & (outcome.success | outcome.failure)
        truncated = running & ~terminated & (self._steps >= self._rules.max_episode_steps)
        self._running = running & ~(terminated | truncated)
        return outcome, reward * self._rules.reward_scale, terminated, truncated

    def _begin(self, rows: Tensor) -> None:
        chosen = rows.nonzero().flatten().tolist()
        for row in chosen:
            self._episode_seed[row] = self._starts.seed(self._root, self._first_row + row, self._next_episode[row])
            self._next_episode[row] += 1
        self._simulator.begin(chosen, [self._episode_seed[row] for row in chosen])
        self._know_starts()
        self._begun = True
        self._running = self._running | rows
        self._steps = torch.where(rows, 0, self._steps)
        self._success = self._success & ~rows
        self._success_once = self._success_once & ~rows
        self._return = torch.where(rows, 0.0, self._return)
        self._task_reward = torch.where(rows, 0.0, self._task_reward)

    def _know_starts(self) -> None:
        """What follows from the present episodes' seeds and numbers."""
        if bool(self._endless.all()) and not self.spaces.tasks:
            return  # nothing ever changes
        tasks = [self._starts.task(seed) for seed in self._episode_seed]
        going = [
            length is not None and done % length > 0
            for length, done in zip(self._length, self._next_episode, strict=True)
        ]
        self._task, self._goes_on = (torch.tensor(values, device=self._task.device) for values in (tasks, going))

    def _info(self) -> dict[str, Tensor]:
        length = self._steps.to(torch.float32)
        more = self._simulator.report() if isinstance(self._simulator, Reporting) else {}
        return more | {
            "success": self._success.clone(),
            "episode/success_once": self._success_once.clone(),
            "episode/success_at_end": self._success.clone(),
            "episode/return": self._return.clone(),
            "episode/episode_len": length,
            "episode/reward": self._return / length.clamp(min=1),
            "task": self._task.clone(),
            "goes_on": self._goes_on.clone(),
        }

    def _observe(self) -> Obs:
        obs = self._simulator.observe()
        for path, leaf in tree.leaves(obs):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                self._raise_non_finite(f"observation '{path}'", leaf)
        return obs

    def _raise_non_finite(self, quantity: str, values: Tensor) -> NoReturn:
        row = int((~torch.isfinite(values)).reshape(len(values), -1).any(1).nonzero()[0])
        raise NonFiniteError(
            f"{quantity} of environment {self._first_row + row} is not finite, at step {int(self._steps[row])} of "
            f"the episode with seed {self._episode_seed[row]}: {values[row].tolist()}"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this environment is closed")


def check_action(action: Tensor, num_envs: int, action_dim: int, first_row: int = 0) -> Tensor:
    """The action as float32 without gradient.

    Raises:
        ShapeError: it is not [num_envs, H ≥ 1, action_dim].
        NonFiniteError: it holds NaN or infinity; names the environment, counted from `first_row`.
    """
    if action.ndim != 3 or action.shape[1] == 0 or (action.shape[0], action.shape[2]) != (num_envs, action_dim):
        raise ShapeError(
            f"action has shape {tuple(action.shape)}, expected [N, H, A] = [{num_envs}, H ≥ 1, {action_dim}]"
        )
    action = action.detach().to(torch.float32)
    finite = torch.isfinite(action)
    if not bool(finite.all()):
        row = int((~finite).flatten(1).any(1).nonzero()[0])
        raise NonFiniteError(f"action of environment {first_row + row} is not finite: {action[row].tolist()}")
    return action


class ReplayedEnv(EpisodicEnv):
    """An `EpisodicEnv` whose exact state can be saved, over a simulator that is a function of seed and actions.

    The state is the seed and the actions of every running episode: loading it plays them again. That costs at
    most one episode per row and is exact where copying a simulator's variables is not (a physics engine keeps
    contact caches that it neither shows nor takes back).
    """

    _TRACKED = ("_running", "_steps", "_success", "_success_once", "_return", "_task_reward")

    def __init__(
        self,
        simulator: Simulator,
        rules: EpisodeRules,
        *,
        seed: int,
        first_row: int = 0,
        starts: Starts | None = None,
    ) -> None:
        super().__init__(simulator, rules, seed=seed, first_row=first_row, starts=starts)
        self._played = torch.zeros(rules.max_episode_steps, self.num_envs, self.spaces.action_dim)

    def state_dict(self) -> dict[str, Any]:
        """Seeds, counters and the actions since each row's last reset."""
        longest = int(self._steps.max())
        return {
            "root": self._root,
            "next_episode": list(self._next_episode),
            "episode_seed": list(self._episode_seed),
            "played": self._played[:longest].clone(),
            "tracked": {name: getattr(self, name).clone() for name in self._TRACKED},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; the simulator is where it was.

        Raises:
            CheckpointError: the state is of another number of environments or another action size.
        """
        self._check_open()
        played = state["played"]
        if played.shape[1:] != self._played.shape[1:] or played.shape[0] > self._rules.max_episode_steps:
            raise CheckpointError(
                f"saved environment state holds actions {list(played.shape)} (steps, environments, action size); "
                f"this configuration has at most {list(self._played.shape)}"
            )
        self._root = state["root"]
        self._next_episode, self._episode_seed = list(state["next_episode"]), list(state["episode_seed"])
        self._simulator.begin(range(self.num_envs), self._episode_seed)
        self._know_starts()
        self._begun = True
        steps = state["tracked"]["_steps"]
        for t, action in enumerate(played):
            self._simulator.advance(action, steps > t)
        self._played[: len(played)] = played
        for name in self._TRACKED:
            setattr(self, name, state["tracked"][name].clone())

    def _advance(self, action: Tensor) -> tuple[Outcome, Tensor, Tensor, Tensor]:
        rows = self._running.nonzero().flatten()
        self._played[self._steps[rows], rows] = action[rows]
        return super()._advance(action)


def join_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state of `ReplayedEnv` for the rows of several, in their order."""
    longest = max(len(state["played"]) for state in states)
    played = [
        torch.cat(
            (state["played"], state["played"].new_zeros(longest - len(state["played"]), *state["played"].shape[1:]))
        )
        for state in states
    ]
    return {
        "root": states[0]["root"],
        "next_episode": [episode for state in states for episode in state["next_episode"]],
        "episode_seed": [seed for state in states for seed in state["episode_seed"]],
        "played": torch.cat(played, 1),
        "tracked": tree.cat([state["tracked"] for state in states]),
    }


def split_state(state: dict[str, Any], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Inverse of `join_states`: states for shares of `sizes` rows.

    Raises:
        CheckpointError: the state has another number of rows.
    """
    saved = len(state["next_episode"])
    if saved != sum(sizes):
        raise CheckpointError(f"saved state is of {saved} environments; this configuration has {sum(sizes)}")
    parts, first = [], 0
    for size in sizes:
        rows = slice(first, first + size)
        parts.append(
            {
                "root": state["root"],
                "next_episode": state["next_episode"][rows],
                "episode_seed": state["episode_seed"][rows],
                "played": state["played"][:, rows].clone(),
                "tracked": tree.index(state["tracked"], rows),
            }
        )
        first += size
    return parts
