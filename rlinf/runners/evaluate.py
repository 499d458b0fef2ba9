"""Evaluation: the deterministic policy, an exact number of episodes, the same initial states every time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlinf.core.seeding import derive_seed
from rlinf.metrics.video import tile
from rlinf.runners.crew import Reporter
from rlinf.runtime.local import STOP_TIMEOUT_S, Group
from rlinf.workers.env_worker import EnvWorker, Evaluation, merge_episode_means
from rlinf.workers.rollout_worker import RolloutWorker


@dataclass(frozen=True)
class Evaluator:
    """The environments of evaluation with a policy of their own, and how much they play.

    Attributes:
        env, rollout: groups with channels of their own, but with the `stop` flag of the crew; `rollout` reads
            what the learner publishes.
        episodes_per_env: every environment plays exactly so many episodes.
        chunks: the most action chunks that an episode may take.
        seed: derives the initial states.
        same_episodes: whether every evaluation starts from the same initial states, which makes evaluations
            comparable; otherwise from new ones at every global step.
        num_recorded: pictures of so many environments of the first worker become a video; 0 for none.
        fps: pictures per second of that video; one picture is taken per action chunk.
    """

    env: Group[EnvWorker]
    rollout: Group[RolloutWorker]
    episodes_per_env: int
    chunks: int
    seed: int
    same_episodes: bool = True
    num_recorded: int = 0
    fps: float = 20.0

    def run(self, reporter: Reporter, step: int, *, film: bool = True) -> dict[str, float]:
        """Evaluate the published weights. Returns means over the episodes, with the prefix `eval/`.

        Without `film` nothing is recorded, whatever `num_recorded` says.
        """
        seed = self.seed if self.same_episodes else derive_seed(self.seed, f"step/{step}")
        serving = self.rollout.run(RolloutWorker.serve, "eval")
        recorded = [self.num_recorded if film else 0] + [0] * (len(self.env) - 1)
        jobs = [(self.episodes_per_env, self.chunks, seed, number) for number in recorded]
        parts = self.env.run_each(_evaluate, jobs).wait(watching=[serving])
        serving.wait()
        if (frames := parts[0].frames) is not None:
            reporter.video(f"eval_step_{step:06d}", np.stack([tile(frame) for frame in frames]), self.fps)
        means = merge_episode_means([part.episodes for part in parts])
        return {f"eval/{name}": value for name, value in means.items()}

    def close(self) -> list[str]:
        """Close the environments and let the threads end. Returns what went wrong with that, in words."""
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
    finally:
        for problem in evaluator.close():
            reporter.note(problem)
    return metrics


def _evaluate(worker: EnvWorker, job: tuple[int, int, int, int]) -> Evaluation:
    return worker.evaluate(*job)
