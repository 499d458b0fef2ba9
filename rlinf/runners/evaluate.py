"""Evaluation: the deterministic policy, an exact number of episodes, the same initial states every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlinf.core.protocols import Mode
from rlinf.core.seeding import derive_seed
from rlinf.metrics.video import tile
from rlinf.runners.crew import Reporter
from rlinf.runtime.local import PLAY_TIMEOUT_S, STOP_TIMEOUT_S, Group, Handle, Weights
from rlinf.workers.env_worker import EnvWorker, Evaluation, merge_episode_means, task_prefix
from rlinf.workers.rollout_worker import RolloutWorker


class Evaluating:
    """An evaluation under way, begun after global step `step`."""

    def __init__(
        self, step: int, version: int, playing: Handle[Evaluation], serving: Handle[int], name: str, fps: float
    ) -> None:
        self.step = step
        self._version, self._playing, self._serving, self._name, self._fps = version, playing, serving, name, fps

    @property
    def handles(self) -> tuple[Handle[Any], ...]:
        """What to watch while doing something else."""
        return self._playing, self._serving

    @property
    def done(self) -> bool:
        """Whether `finish` would return or raise at once."""
        return self._playing.done and self._serving.done

    def finish(self, reporter: Reporter) -> dict[str, float]:
        """Wait for the end. Means over the episodes and which weights they are of, with the prefix `eval/`."""
        parts = self._playing.wait(PLAY_TIMEOUT_S, watching=[self._serving])
        self._serving.wait()
        if (frames := parts[0].frames) is not None:
            reporter.video(self._name, np.stack([tile(frame) for frame in frames]), self._fps)
        means = merge_episode_means([part.episodes for part in parts])
        means["weights_version"] = float(self._version)
        return {f"eval/{name}": value for name, value in means.items()}


@dataclass(frozen=True)
class Evaluator:
    """The environments of evaluation with a policy of their own, and how much they play.

    Attributes:
        env, rollout: groups with channels of their own, but with the `stop` flag of the crew.
        weights: what `rollout` acts with. A synchronous run gives those that the learner publishes on; an
            asynchronous one others, onto which `pin` takes over what is to be evaluated.
        episodes_per_env: every environment plays exactly so many episodes, or so often all of its list of initial
            states where it has one.
        chunks: the most action chunks that an episode may take.
        seed: derives the initial states.
        same_episodes: whether every evaluation starts from the same initial states, which makes evaluations
            comparable; otherwise from new ones at every global step.
        num_recorded: pictures of so many environments of the first worker become a video; 0 for none.
        fps: pictures per second of that video; one picture is taken per action chunk.
        mode: `eval`: the deterministic policy; `train`: with its exploration.
        tasks: their names, where episodes are of several; success is then also counted for each.
    """

    env: Group[EnvWorker]
    rollout: Group[RolloutWorker]
    weights: Weights
    episodes_per_env: int
    chunks: int
    seed: int
    same_episodes: bool = True
    num_recorded: int = 0
    fps: float = 20.0
    mode: Mode = "eval"
    tasks: Sequence[str] = ()

    def pin(self, weights: Weights) -> None:
        """Evaluate from now on what is published on `weights` at this moment."""
        self.weights.take_over(weights)

    def start(self, step: int, *, film: bool = True) -> Evaluating:
        """Begin to evaluate the published weights, after global step `step`.

        Without `film` nothing is recorded, whatever `num_recorded` says.
        """
        version = self.weights.version
        seed = self.seed if self.same_episodes else derive_seed(self.seed, f"step/{step}")
        serving = self.rollout.run(RolloutWorker.serve, self.mode)
        recorded = [self.num_recorded if film else 0] + [0] * (len(self.env) - 1)
        jobs = [(self.episodes_per_env, self.chunks, seed, number) for number in recorded]
        playing = self.env.run_each(_evaluate, jobs)
        return Evaluating(step, version, playing, serving, f"eval_step_{step:06d}", self.fps)

    def run(self, reporter: Reporter, step: int, *, film: bool = True) -> dict[str, float]:
        """Evaluate the published weights. Returns what `Evaluating.finish` does."""
        return self.start(step, film=film).finish(reporter)

    def close(self) -> list[str]:
        """Close the environments and let the groups end. Returns what went wrong with that, in words."""
        problems = self.env.run(EnvWorker.close).failures(STOP_TIMEOUT_S)
        for group in (self.env, self.rollout):
            group.end()
        return problems


def run_eval(evaluator: Evaluator, reporter: Reporter, *, step: int) -> dict[str, float]:
    """Evaluate the published weights once, log the result as that of `step`, and close the environments.

    To evaluate a file, publish it first: `weights.publish(*load_weights(path))`.
    """
    try:
        metrics = evaluator.run(reporter, step)
        reporter.log(step, metrics)
        for line in task_table(metrics, evaluator.tasks):
            reporter.note(line)
    finally:
        for problem in evaluator.close():
            reporter.note(problem)
    return metrics


def task_table(metrics: Mapping[str, float], tasks: Sequence[str]) -> list[str]:
    """One line for each task that was played: how many of its episodes were a success."""
    lines = []
    for task, name in enumerate(tasks):
        played = metrics.get(f"eval/{task_prefix(task)}num_episodes", 0.0)
        if played:
            solved = metrics[f"eval/{task_prefix(task)}success_once"] * played
            lines.append(f"task {task:02d}: {solved:.0f} of {played:.0f} solved: {name}")
    return lines


def _evaluate(worker: EnvWorker, job: tuple[int, int, int, int]) -> Evaluation:
    return worker.evaluate(*job)
