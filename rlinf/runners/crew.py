"""The groups of one run, and the calls on them that every runner needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from rlinf.core.errors import ProcessDied
from rlinf.runtime.interface import Runtime
from rlinf.runtime.local import PLAY_TIMEOUT_S, STOP_TIMEOUT_S, Flag, Group, Handle, Weights
from rlinf.workers.env_worker import EnvWorker, merge_episode_means
from rlinf.workers.learner_worker import LearnerWorker, Progress
from rlinf.workers.rollout_worker import RolloutWorker

INTERRUPT_TIMEOUT_S = 60.0
"""For calls to notice that their channels were closed; a step of a simulator comes to its end before."""


class Reporter(Protocol):
    """Where numbers and messages go; `metrics.report.Reporter` is the real one."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a global step."""
        ...

    def note(self, text: str) -> None:
        """Show one line to the people who watch."""
        ...

    def video(self, name: str, frames: Any, fps: float) -> None:
        """Write uint8 [T, height, width, 3] as a video called `name`."""
        ...


class Collection:
    """Experience being collected: environments play while policies answer them."""

    def __init__(self, playing: Handle[dict[str, float]], serving: Handle[int]) -> None:
        self.playing, self.serving = playing, serving

    def wait(self) -> dict[str, float]:
        """Means over the episodes that ended, once everything is played. May be asked again."""
        parts = self.playing.wait(PLAY_TIMEOUT_S, watching=[self.serving])
        self.serving.wait()
        return merge_episode_means(parts)

    @property
    def handles(self) -> tuple[Handle[Any], ...]:
        """What to watch while doing something else."""
        return self.playing, self.serving

    @property
    def done(self) -> bool:
        """Whether `wait` would return or raise at once."""
        return self.playing.done and self.serving.done

    @property
    def succeeded(self) -> bool:
        """Whether everything is played and has arrived."""
        return all(handle.succeeded for handle in self.handles)

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.playing.seconds


@dataclass
class Crew:
    """Who takes part in training. All look at the flag `stop`; the learner publishes on `weights`.

    `runtime` replaces processes that die, up to `max_restarts` times; None where that is not wanted.
    """

    env: Group[EnvWorker]
    rollout: Group[RolloutWorker]
    learner: Group[LearnerWorker]
    stop: Flag
    weights: Weights
    runtime: Runtime | None = None
    max_restarts: int = 0
    restarts: int = 0

    def collect(self, chunks: int, segments: int) -> Collection:
        """Start playing `segments` times `chunks` action chunks in every environment."""
        serving = self.rollout.run(RolloutWorker.serve, "train")
        return Collection(self.env.run(EnvWorker.interact, chunks, segments), serving)

    def publish(self, *, wait: bool = True) -> int:
        """Publish the newest weights; their version. With `wait` they have arrived wherever a policy acts."""
        return self.learner.run(LearnerWorker.publish, wait).wait()[0]

    def ingest(self) -> Progress:
        """Give the learner all experience that has arrived."""
        return self.learner.run(LearnerWorker.ingest).wait()[0]

    def discard(self) -> None:
        """Forget the experience that has arrived and was not given to the learner yet."""
        self.learner.run(LearnerWorker.discard).wait()

    def ready(self) -> bool:
        """Whether the learner has enough experience to learn from."""
        return all(self.learner.run(LearnerWorker.ready).wait())

    def progress(self) -> Progress:
        """How far the learner has come."""
        return self.learner.run(LearnerWorker.report).wait()[0]

    def recover(self, error: ProcessDied, interrupted: Iterable[Handle[Any]]) -> str:
        """Replace the environments and policies that died, so that playing can begin anew. Says what was done.

        What was being played is lost; what was shipped before and all that was learned is there.

        Args:
            error: that showed it.
            interrupted: calls on environments and policies that it interrupted; their ends are waited for.

        Raises `error` when a learner died, when there were too many deaths, or when the run is to end.
        """
        interrupted = list(interrupted)
        self._replacing(error).interrupt(error)  # also those who have no business with the process that died
        for handle in interrupted:
            handle.failures(INTERRUPT_TIMEOUT_S)
        if any(not handle.done for handle in interrupted):
            raise error  # somebody plays on and would be in the way of the new ones
        while not self._replaced(error):
            pass
        left = self.max_restarts - self.restarts
        return f"{error}. It was replaced; what was being played is played anew. Restarts left: {left}"

    def _replaced(self, error: ProcessDied) -> bool:
        """Replace whoever is dead now; False when another one died meanwhile. Raises `error` where that cannot be."""
        runtime = self._replacing(error)
        dead = runtime.dead()
        if lost := set(dead) & set(self.learner.hosts):
            where = " and ".join(runtime.describe(process) for process in sorted(lost))
            raise ProcessDied(f"the learner is gone: the process {where} ended", min(lost)) from error
        if not dead:
            raise error
        self.restarts += 1
        try:
            runtime.replace(dead)
            self.env.run(EnvWorker.abandon, f"restart/{self.restarts}").wait()
            self.rollout.run(RolloutWorker.abandon, f"restart/{self.restarts}").wait()
            self.publish()
        except ProcessDied:
            return False
        return True

    def _replacing(self, error: ProcessDied) -> Runtime:
        """The runtime, if it may replace a process now. Raises `error` otherwise."""
        if self.runtime is None or self.restarts >= self.max_restarts or self.stop.is_set():
            raise error
        return self.runtime

    def close(self) -> list[str]:
        """Close the environments and let the groups end. Returns what went wrong with that, in words."""
        problems = self.env.run(EnvWorker.close).failures(STOP_TIMEOUT_S)
        for group in (self.env, self.rollout, self.learner):
            group.end()
        return problems
