"""Steps environments: sends observations out, takes actions in, ships trajectories to the learner.

The N environments of a worker may be split over several `stages`, each a VectorEnv of its own: while one is
being stepped, the policy answers another. A stage is nothing but a key, (rank, stage), on the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from rlinf.core.errors import NonFiniteError, RlinfError, RunEnding, ShapeError
from rlinf.core.protocols import VectorEnv
from rlinf.core.seeding import derive_seed
from rlinf.core.types import ActionOut, EnvStep, Obs
from rlinf.data.trajectory import TrajectoryBuilder, View, split_by_env, whole
from rlinf.runtime.local import CHANNEL_TIMEOUT_S, Channel, Flag
from rlinf.workers.finite import non_finite

EPISODE = "episode/"
"""Prefix of the entries of EnvStep.info that describe a finished episode."""
SUCCESS = f"{EPISODE}success_once"

Source = tuple[int, int]


@runtime_checkable
class Resumable(Protocol):
    """An environment whose exact state can be saved; others begin fresh episodes at every checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, generators included, as tensors, arrays, numbers and strings."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        ...


class EpisodeMean:
    """Mean of every `episode/<name>` over the episodes that were added; of success also for each of `num_tasks`."""

    def __init__(self, num_tasks: int = 0) -> None:
        self.num_episodes = 0
        self._sums: dict[str, float] = {}
        self._tasks = {task: EpisodeMean() for task in range(num_tasks)}

    def add(self, info: dict[str, Tensor], rows: Tensor) -> None:
        """Take in the episodes that ended in `rows`, bool [N]."""
        if not (count := int(rows.sum())):
            return
        self.num_episodes += count
        for key, value in info.items():
            if key.startswith(EPISODE):
                name = key.removeprefix(EPISODE)
                self._sums[name] = self._sums.get(name, 0.0) + float(value[rows].double().sum())
        if self._tasks:
            success, tasks = info[SUCCESS].cpu(), info["task"].cpu()
            for task in tasks[rows].unique().tolist():
                self._tasks[task].add({SUCCESS: success}, rows & (tasks == task))

    def mean(self) -> dict[str, float]:
        """Means by name, and `num_episodes`; nothing but that when there were none. Those of a task have a prefix."""
        means = {name: total / self.num_episodes for name, total in self._sums.items()}
        means["num_episodes"] = float(self.num_episodes)
        for task, episodes in self._tasks.items():
            if episodes.num_episodes:
                means |= {task_prefix(task) + name: value for name, value in episodes.mean().items()}
        return means


def task_prefix(task: int) -> str:
    """What the tags of one task of several begin with."""
    return f"task_{task:02d}/"


def merge_episode_means(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over all episodes from the means of several workers, each weighted by its `num_episodes`.

    Means with a prefix are weighted by the `num_episodes` of the same prefix.
    """
    totals: dict[str, float] = {}
    for part in parts:
        for name, count in part.items():
            if name.endswith("num_episodes"):
                totals[name] = totals.get(name, 0.0) + count
    merged = dict(totals)
    for part in parts:
        for name, mean in part.items():
            if name not in totals:
                prefix, slash, _ = name.rpartition("/")
                own = f"{prefix}{slash}num_episodes"
                merged[name] = merged.get(name, 0.0) + mean * part[own] / totals[own]
    return merged


@dataclass(frozen=True)
class Evaluation:
    """What a worker's environments did under evaluation.

    `episodes` are means by name and `num_episodes`. `frames` is uint8 [T, n, height, width, 3], the first n
    environments before each chunk of the first episode (its last picture is held once it is over), or None.
    """

    episodes: dict[str, float]
    frames: np.ndarray | None


class EnvWorker:
    """Plays the environments of one rank.

    Observations go out on `obs` and actions come back on `actions`, both under the key (rank, stage); None on
    `obs` says that this source asks no more for now. Trajectories go to `experience`, which evaluation does
    not use: those of stage i under the keys `learners[i]`, the ranks of the learners that share them by environments
    (None: all are for the first). Of observations they hold what `view` leaves. The order of everything that a source
    sends is fixed, so a run is a function of its seeds.
    """

    def __init__(
        self,
        rank: int,
        stages: Sequence[VectorEnv],
        obs: Channel,
        actions: Channel,
        experience: Channel,
        stop: Flag,
        *,
        num_action_chunks: int,
        seed: int,
        auto_reset: bool = True,
        learners: Sequence[Sequence[int]] | None = None,
        view: View = whole,
        timeout_s: float = CHANNEL_TIMEOUT_S,
    ) -> None:
        self._learners = list(learners) if learners is not None else [(0,)] * len(stages)
        self.rank, self.stages = rank, list(stages)
        self.obs, self.actions, self.experience, self.stop = obs, actions, experience, stop
        self.num_action_chunks, self.seed = num_action_chunks, seed
        self.auto_reset, self.timeout_s = auto_reset, timeout_s
        self._sources: list[Source] = [(rank, stage) for stage in range(len(stages))]
        self._builders = [TrajectoryBuilder(source, auto_reset, view) for source in self._sources]
        self._current: list[Obs] = []
        self._continues = False
        self._asking: set[int] = set()  # stages whose action has not come yet
        self._beginning = "step/0"
        # Records are small here, and a second OpenMP thread would spin against the learner's.
        torch.set_num_threads(1)

    def interact(self, chunks: int, segments: int = 1) -> dict[str, float]:
        """Play `segments` times `chunks` action chunks in every environment, one Trajectory each and stage.

        Returns means over the episodes that ended meanwhile, and `num_episodes`. When the run is asked to
        stop, what was played so far is shipped and the call returns, also out of an environment's wait.
        """
        episodes = EpisodeMean()
        try:
            if not self._current:
                self._begin_episodes()
            for _ in range(segments):
                if not self.auto_reset and self._continues:
                    self._current = [self._reset(stage) for stage in range(len(self.stages))]
                    self._continues = False
                self._play_segment(chunks, episodes)
                if self.stop.is_set():
                    break
        except RunEnding:
            self._give_up()
        self._finish()
        return episodes.mean()

    def _play_segment(self, chunks: int, episodes: EpisodeMean) -> None:
        playing = [torch.ones(env.num_envs, dtype=torch.bool) for env in self.stages]
        for stage, builder in enumerate(self._builders):
            builder.start(self._current[stage], continues=self._continues)
            self._ask(stage, self._current[stage])
        for chunk in range(chunks):
            last = chunk + 1 == chunks or self.stop.is_set()
            for stage, builder in enumerate(self._builders):
                out, step = self._step(stage)
                builder.append(self._current[stage], out, step)
                self._current[stage] = step.obs
                done = step.done.cpu()
                episodes.add(step.info, done & playing[stage])
                if not self.auto_reset:
                    playing[stage] &= ~done
                if not last:
                    self._ask(stage, step.obs)
            if last:
                break
        self._continues = True
        self._ship()

    def _ship(self) -> None:
        for builder, learners in zip(self._builders, self._learners, strict=True):
            if not builder.num_steps:
                continue
            for learner, part in zip(learners, split_by_env(builder.build(), len(learners)), strict=True):
                self.experience.put(part, key=learner)

    def _give_up(self) -> None:
        """In the middle of a segment, or before it: ship what was played; the next one begins fresh episodes."""
        for stage in sorted(self._asking):
            self._answer(stage)
        self._ship()
        self._current, self._continues = [], False

    def evaluate(self, episodes_per_env: int, chunks: int, seed: int, num_recorded: int = 0) -> Evaluation:
        """Play exactly `episodes_per_env` episodes in every environment, each begun by a seeded reset.

        The first episode that an environment finishes after a reset counts, so that short episodes are not
        counted more often than long ones; of an environment with a list of initial states (`goes_on`) each on the list
        does. The same seed gives the same initial states.

        An episode may take `chunks` action chunks; RlinfError is raised when one takes longer. The pictures
        of `num_recorded` environments of the first stage are returned too.
        """
        episodes, frames = EpisodeMean(len(self.stages[0].spaces.tasks)), []
        try:
            for epoch in range(episodes_per_env):
                seeds = [derive_seed(seed, f"{rank}/{stage}/{epoch}") for rank, stage in self._sources]
                self._current = [self._reset(stage, s) for stage, s in enumerate(seeds)]
                recorded = self._play_counted_episodes(chunks, episodes, num_recorded if epoch == 0 else 0)
                frames += recorded
                if self.stop.is_set():
                    break
        except RunEnding:
            self._give_up()
        self._finish()
        self._current, self._continues = [], False
        return Evaluation(episodes.mean(), np.stack(frames) if frames else None)

    def _play_counted_episodes(self, chunks: int, episodes: EpisodeMean, num_recorded: int) -> list[np.ndarray]:
        playing = [torch.ones(env.num_envs, dtype=torch.bool) for env in self.stages]
        taken = [torch.zeros(env.num_envs, dtype=torch.int64) for env in self.stages]  # chunks of this episode
        filmed = playing[0].clone()  # still in their first episode
        frames: list[np.ndarray] = []
        while True:
            if num_recorded and bool(filmed.any()):
                self._record(frames, num_recorded, filmed)
            # Every stage asks until the last one is through: the policy serves them in turn and would wait.
            for stage, obs in enumerate(self._current):
                self._ask(stage, obs)
            for stage in range(len(self.stages)):
                _, step = self._step(stage)
                self._current[stage] = step.obs
                done = step.done.cpu()
                episodes.add(step.info, done & playing[stage])
                playing[stage] &= ~done | _goes_on(step)
                taken[stage] = torch.where(done, 0, taken[stage] + 1)
                if stage == 0:
                    filmed &= ~done
            if self.stop.is_set() or not any(bool(rows.any()) for rows in playing):
                return frames
            late = sum(int((rows & (age >= chunks)).sum()) for rows, age in zip(playing, taken, strict=True))
            if late:
                raise RlinfError(
                    f"evaluation: {late} episodes of env worker {self.rank} did not end within "
                    f"{chunks * self.num_action_chunks} steps; raise env.eval.max_steps_per_rollout_epoch "
                    "to at least env.eval.max_episode_steps"
                )

    def _record(self, frames: list[np.ndarray], num_recorded: int, playing: Tensor) -> None:
        pictures = self.stages[0].render()
        if pictures is None:
            return
        picture = np.array(pictures[:num_recorded])
        if frames:
            over = ~playing[:num_recorded].numpy()
            picture[over] = frames[-1][over]
        frames.append(picture)

    def checkpoint(self, global_step: int) -> dict[str, Any]:
        """State of the environments after `global_step`, for `restore`.

        Environments that are not Resumable go on with fresh episodes, seeded by the step: the run that saves
        and the run that resumes continue alike.
        """
        self._beginning = f"step/{global_step}"
        self._continues = False
        exact = self._current and all(isinstance(env, Resumable) for env in self.stages)
        if not exact:
            self._current = []
            return {}
        states = [env.state_dict() for env in self.stages if isinstance(env, Resumable)]
        return {"stages": states, "current": self._current}

    def restore(self, saved: tuple[int, dict[str, Any]]) -> None:
        """Continue from (global step, what `checkpoint` returned at that step)."""
        global_step, state = saved
        self._beginning = f"step/{global_step}"
        self._continues = False
        self._current = []
        if not state:
            return
        for env, inner in zip(self.stages, state["stages"], strict=True):
            if not isinstance(env, Resumable):
                raise RlinfError(f"the checkpoint holds a state for {type(env).__name__}, which cannot load one")
            # A reset first: an environment may build its scene only then.
            env.reset()
            env.load_state_dict(inner)
        self._current = state["current"]

    def abandon(self, name: str) -> None:
        """Forget the segment that was interrupted; the next one begins fresh episodes, seeded by `name`."""
        self._current, self._continues, self._beginning = [], False, name
        self._asking.clear()
        for builder in self._builders:
            builder.discard()

    def close(self) -> None:
        """Close every environment."""
        for env in self.stages:
            env.close()

    def _begin_episodes(self) -> None:
        names = [f"stage/{stage}/{self._beginning}" for stage in range(len(self.stages))]
        seeds = [derive_seed(self.seed, name) for name in names]
        self._current = [self._reset(stage, seed) for stage, seed in enumerate(seeds)]

    def _ask(self, stage: int, obs: Obs) -> None:
        self.obs.put(obs, key=self._sources[stage])
        self._asking.add(stage)

    def _answer(self, stage: int) -> ActionOut:
        out: ActionOut = self.actions.get(key=self._sources[stage], timeout_s=self.timeout_s)
        self._asking.discard(stage)
        return out

    def _step(self, stage: int) -> tuple[ActionOut, EnvStep]:
        out = self._answer(stage)
        expected = (self.stages[stage].num_envs, self.num_action_chunks)
        if out.action.shape[:2] != expected:
            raise ShapeError(
                f"the policy answered with actions {tuple(out.action.shape)}, but env worker {self.rank} "
                f"needs [N={expected[0]}, H={expected[1]}, A]"
            )
        self._require_finite(stage, {"action": out.action})
        step = self.stages[stage].step(out.action)
        self._require_finite(stage, {"reward": step.reward, "observation": step.last_obs})
        if bool(step.done.any()):
            self._require_finite(stage, {"observation": step.obs})
        return out, step

    def _reset(self, stage: int, seed: int | None = None) -> Obs:
        obs = self.stages[stage].reset(seed=seed)
        self._require_finite(stage, {"observation": obs})
        return obs

    def _require_finite(self, stage: int, values: Obs) -> None:
        if (bad := non_finite(values)) is None:
            return
        what, value = bad
        row = int((~torch.isfinite(value)).flatten(1).any(1).nonzero()[0])
        raise NonFiniteError(
            f"{what} of environment {row} (env worker {self.rank}, stage {stage}) is not finite: {value[row].tolist()}"
        )

    def _finish(self) -> None:
        for source in self._sources:
            self.obs.put(None, key=source)


def _goes_on(step: EnvStep) -> Tensor:
    """bool [N] on the CPU: rows whose next episode counts, too."""
    goes_on = step.info.get("goes_on")
    return torch.zeros_like(step.done).cpu() if goes_on is None else goes_on.cpu()
