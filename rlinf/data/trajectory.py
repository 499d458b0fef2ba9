"""Collects the steps of one source into time-major segments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlinf.core import tree
from rlinf.core.types import ActionOut, EnvStep, Obs, Trajectory

View = Callable[[Obs], Obs]
"""Whole observations → what of them is kept."""


def whole(obs: Obs) -> Obs:
    """The observation itself."""
    return obs


class TrajectoryBuilder:
    """Builds the trajectories of one source, segment after segment.

    Keeps references while a segment runs and stacks once in `build`, so a step costs nothing here; it relies on
    records being frozen (see `core.types`).

    Args:
        source: who plays, (env worker rank, pipeline stage).
        auto_reset: whether the environment begins a new episode in the very step that ends one. Without it,
            everything after the end of an episode is marked invalid until a segment starts that does not
            continue.
        view: what of the observations goes into trajectories. The rest is not held for longer than a step.
    """

    def __init__(self, source: tuple[int, int], auto_reset: bool, view: View = whole) -> None:
        self.source = source
        self.auto_reset = auto_reset
        self._view = view
        self._continues = False
        self._finished: Tensor | None = None  # bool [N]; only without automatic reset
        self._clear()

    def _clear(self) -> None:
        self._newest: Obs | None = None
        self._obs: list[Obs] = []
        self._outs: list[ActionOut] = []
        self._steps: list[EnvStep] = []

    def start(self, obs: Obs, *, continues: bool) -> None:
        """Begin a segment at `obs`. `continues`: it is what the previous segment ended with."""
        self._clear()
        self._newest = obs
        self._obs.append(self._view(obs))
        self._continues = continues
        if not continues:
            self._finished = None

    def append(self, obs: Obs, out: ActionOut, step: EnvStep) -> None:
        """Record that `out` answered `obs` and led to `step`.

        Raises ValueError when `obs` is not the very object that `start` or the last step gave: then somebody
        answered another observation.
        """
        if obs is not self._newest:
            raise ValueError(
                f"source {self.source}: the observation acted on at step {len(self._steps)} of the segment is "
                "not the one that the environment gave last."
            )
        seen = self._view(step.obs)
        last = seen if step.last_obs is step.obs else self._view(step.last_obs)
        self._newest = step.obs
        self._obs.append(seen)
        self._outs.append(out)
        self._steps.append(replace(step, obs=seen, last_obs=last))

    @property
    def num_steps(self) -> int:
        """Of the segment so far."""
        return len(self._steps)

    def discard(self) -> None:
        """Forget the segment so far."""
        self._clear()

    def build(self) -> Trajectory:
        """The segment so far; `start` begins the next one. Raises ValueError when it has no step."""
        steps, outs = self._steps, self._outs
        if not steps:
            raise ValueError(f"source {self.source}: a trajectory needs at least one step.")
        terminated = torch.stack([step.terminated for step in steps])
        truncated = torch.stack([step.truncated for step in steps])
        done = terminated.any(-1) | truncated
        valid = torch.ones_like(done) if self.auto_reset else self._unfinished(done)
        last_obs, last_index = self._last(done & valid)
        trajectory = Trajectory(
            obs=tree.stack(self._obs),
            last_obs=last_obs,
            last_index=last_index,
            decision=torch.stack([out.decision for out in outs]),
            action=torch.stack([step.executed for step in steps]),
            reward=torch.stack([step.reward for step in steps]),
            terminated=terminated,
            truncated=truncated,
            intervened=torch.stack([step.intervened for step in steps]),
            valid=valid,
            log_prob=_stack_optional([out.log_prob for out in outs]),
            value=_stack_optional([out.value for out in outs]),
            version=min(out.version for out in outs),
            source=self.source,
            continues=self._continues,
        )
        self._clear()
        return trajectory

    def _unfinished(self, done: Tensor) -> Tensor:
        """bool [T, N], whether the first episode was still running before each step; remembers how it ends."""
        before = torch.zeros_like(done[0]) if self._finished is None else self._finished
        finished = torch.cat([before[None], done]).cummax(0).values  # a logical "or" over time
        self._finished = finished[-1]
        return ~finished[:-1]

    def _last(self, ended: Tensor) -> tuple[Obs, Tensor]:
        """True last observations of the episodes that ended, and their (t, n), in time-major order."""
        index = ended.nonzero()
        if not len(index):
            return tree.index(self._steps[0].last_obs, slice(0, 0)), index
        moments, counts = index[:, 0].unique_consecutive(return_counts=True)
        envs = index[:, 1].split(counts.tolist())
        return tree.cat(
            [tree.index(self._steps[t].last_obs, n) for t, n in zip(moments.tolist(), envs, strict=True)]
        ), index


def split_by_env(trajectory: Trajectory, parts: int) -> list[Trajectory]:
    """The trajectories of `parts` groups of neighbouring environments, as even as can be; itself for one part."""
    if parts == 1:
        return [trajectory]
    bounds = [trajectory.num_envs * part // parts for part in range(parts + 1)]
    return [_of_envs(trajectory, first, end) for first, end in pairwise(bounds)]


def select_envs(trajectory: Trajectory, envs: Tensor) -> Trajectory:
    """The part of a segment that was played in the environments `envs`, int64 [K], ascending."""
    place = torch.full((trajectory.num_envs,), -1, dtype=torch.int64)
    place[envs] = torch.arange(len(envs))
    rows = (place[trajectory.last_index[:, 1]] >= 0).nonzero().flatten()
    last_index = trajectory.last_index[rows]
    chosen = envs.tolist()

    def columns(leaf: Any) -> Any:
        return [[row[n] for n in chosen] for row in leaf] if isinstance(leaf, list) else leaf[:, envs]

    return replace(
        trajectory,
        obs=tree.tree_map(columns, trajectory.obs),
        last_obs=tree.index(trajectory.last_obs, rows),
        last_index=torch.stack([last_index[:, 0], place[last_index[:, 1]]], 1),
        decision=trajectory.decision[:, envs],
        action=trajectory.action[:, envs],
        reward=trajectory.reward[:, envs],
        terminated=trajectory.terminated[:, envs],
        truncated=trajectory.truncated[:, envs],
        intervened=trajectory.intervened[:, envs],
        valid=trajectory.valid[:, envs],
        log_prob=None,
        value=None,
    )


def select_rows(trajectory: Trajectory, rows: Tensor, end: int) -> Trajectory:
    """The decisions `rows`, int64 [K], ascending, of the one episode of one environment that ends with row `end` - 1.

    Raises ValueError for other trajectories.
    """
    ended = (trajectory.last_index[:, 0] == end - 1).nonzero().flatten()
    if trajectory.num_envs != 1 or len(ended) != 1:
        raise ValueError(f"{trajectory.num_envs} environments, of which {len(ended)} end an episode in row {end - 1}")
    seen = torch.cat([rows, torch.tensor([end])])

    def observed(leaf: Any) -> Any:
        return [leaf[row] for row in seen.tolist()] if isinstance(leaf, list) else leaf[seen]

    chosen = {name: getattr(trajectory, name)[rows] for name in BY_ENV}
    return replace(
        trajectory,
        obs=tree.tree_map(observed, trajectory.obs),
        last_obs=tree.index(trajectory.last_obs, ended),
        last_index=torch.tensor([[len(rows) - 1, 0]]),
        log_prob=None if trajectory.log_prob is None else trajectory.log_prob[rows],
        value=None if trajectory.value is None else trajectory.value[rows],
        **chosen,
    )


def _of_envs(trajectory: Trajectory, first: int, end: int) -> Trajectory:
    """The trajectory of environments `first` to `end` - 1."""
    ended = ((trajectory.last_index[:, 1] >= first) & (trajectory.last_index[:, 1] < end)).nonzero()[:, 0]

    def columns(leaf: Any) -> Any:
        return [row[first:end] for row in leaf] if isinstance(leaf, list) else leaf[:, first:end]

    changed = {name: columns(getattr(trajectory, name)) for name in BY_ENV}
    return replace(
        trajectory,
        obs=tree.tree_map(columns, trajectory.obs),
        last_obs=tree.index(trajectory.last_obs, ended),
        last_index=trajectory.last_index[ended] - trajectory.last_index.new_tensor([0, first]),
        log_prob=None if trajectory.log_prob is None else columns(trajectory.log_prob),
        value=None if trajectory.value is None else columns(trajectory.value),
        **changed,
    )


BY_ENV = ("decision", "action", "reward", "terminated", "truncated", "intervened", "valid")
"""Fields of a trajectory with axes [T, N, ...]."""


def _stack_optional(values: list[Tensor | None]) -> Tensor | None:
    present = [value for value in values if value is not None]
    if present and len(present) < len(values):
        raise ValueError(f"the policy gave a log_prob or value at {len(present)} of {len(values)} steps only.")
    return torch.stack(present) if present else None
