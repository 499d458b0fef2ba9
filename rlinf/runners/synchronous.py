"""Synchronous training. Everything that decides *when* is in `run_sync`.

With `overlap`, segment k + 1 is collected while the learner makes the updates of step k, by the policy from
before these updates. Joins come at fixed places, so the run remains a function of its seeds:

    collect  | segment 1 | segment 2 | segment 3 | ...
    learn    |           | step 1    | step 2    | ...

At a checkpoint nothing is in flight; the segment after it is played by the newest weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rlinf.core.errors import CheckpointError
from rlinf.runners.checkpoint import CheckpointStore, save_run
from rlinf.runners.crew import Collection, Crew, Reporter
from rlinf.runners.evaluate import Evaluator
from rlinf.runners.interrupt import StopOnSignals
from rlinf.workers.learner_worker import LearnerWorker, Progress


@dataclass(frozen=True)
class Schedule:
    """How much of what, and how often.

    Attributes:
        num_steps: global step at which training ends.
        chunks: action chunks per environment and segment.
        segments: segments collected per global step.
        updates: calls of `Algorithm.update` per global step, once the algorithm is ready.
        eval_interval: global steps between evaluations, also at the end; 0 or less for none.
        film_every: evaluations per filmed one, also at the end; 0 for the last alone.
        save_interval: global steps between checkpoints; 0 or less for one at the end only.
        overlap: collect the next segments while learning.
    """

    num_steps: int
    chunks: int
    segments: int = 1
    updates: int = 1
    eval_interval: int = 0
    film_every: int = 1
    save_interval: int = 0
    overlap: bool = False

    def evaluates(self, step: int) -> bool:
        """Whether `step` ends with an evaluation."""
        return self.eval_interval > 0 and (step % self.eval_interval == 0 or step == self.num_steps)

    def films(self, step: int) -> bool:
        """Whether the evaluation at the end of `step` is filmed."""
        if step == self.num_steps:
            return True
        return self.film_every > 0 and step // self.eval_interval % self.film_every == 0

    def saves(self, step: int) -> bool:
        """Whether `step` ends with a checkpoint."""
        return step == self.num_steps or (self.save_interval > 0 and step % self.save_interval == 0)


def run_sync(
    crew: Crew,
    schedule: Schedule,
    store: CheckpointStore,
    reporter: Reporter,
    *,
    evaluator: Evaluator | None = None,
    last_step: int = 0,
) -> int:
    """Train from the step after `last_step` to `schedule.num_steps`. Returns the last step that was begun.

    It is smaller than `num_steps` when a signal stopped the run (`crew.stop`). However the run ends, what was
    learned and recorded is in a checkpoint, unless it holds NaN, and the environments are closed. A worker's
    exception is raised here.
    """
    run = _Run(crew, schedule, store, reporter, evaluator)
    step = last_step
    if step >= schedule.num_steps:
        reporter.note(f"nothing to do: step {step} of {schedule.num_steps} is done; raise runner.max_epochs")
    try:
        with StopOnSignals(crew.stop):
            while step < schedule.num_steps and not crew.stop.is_set():
                step += 1
                run.step(step)
            if crew.stop.is_set():
                run.stop(step)
    except BaseException as error:  # whatever it is, what was learned is saved before it goes on its way
        run.rescue(step, error)
        raise
    finally:
        for problem in crew.close() + (evaluator.close() if evaluator else []):
            reporter.note(problem)
    return step


class _Run:
    """The state between two global steps: what is being collected ahead, and what is safe on disk."""

    def __init__(
        self,
        crew: Crew,
        schedule: Schedule,
        store: CheckpointStore,
        reporter: Reporter,
        evaluator: Evaluator | None,
    ) -> None:
        self.crew, self.schedule, self.store = crew, schedule, store
        self.reporter, self.evaluator = reporter, evaluator
        self.ahead: Collection | None = None
        self.kept = crew.progress()  # of the checkpoint written or read last
        self.times: dict[str, float] = {}

    def step(self, step: int) -> None:
        crew, schedule, self.times = self.crew, self.schedule, {}
        evaluation: dict[str, float] = {}
        before = crew.progress()
        with self._timed("step"):
            collection = self.ahead or self._collect()
            self.ahead = None
            episodes = collection.wait()
            crew.ingest()
            if schedule.overlap and not schedule.saves(step):
                self.ahead = self._collect()
            updating = crew.learner.run(LearnerWorker.update, schedule.updates)
            [metrics] = updating.wait(watching=self.ahead.handles if self.ahead else ())
            after = crew.progress()
            if self.evaluator is not None and schedule.evaluates(step):
                evaluation = self._evaluate(self.evaluator, step)
            if schedule.saves(step) and not crew.stop.is_set():
                self._save(step)
        if not crew.stop.is_set():
            rates = self._rates(before, after, collection.seconds, updating.seconds)
            env = {f"env/{name}": value for name, value in episodes.items()}
            train = {name if name.startswith("rollout/") else f"train/{name}": x for name, x in metrics.items()}
            self.reporter.log(step, env | evaluation | train | rates)

    def stop(self, step: int) -> None:
        """End in the middle of `step`: keep what was played and learned."""
        if self.ahead is not None:
            self.ahead.wait()
        if self.crew.ingest() != self.kept:
            save_run(self.store, self.crew, step)
        self._tell(f"stopped by {self.crew.stop.reason} in step {step}; nothing is lost")

    def rescue(self, step: int, error: BaseException) -> None:
        """Save what was learned although the run has failed. Raises nothing."""
        if isinstance(error, CheckpointError):
            return
        self.crew.stop.set("a failure")
        try:
            if self.crew.ingest() != self.kept:  # a learner that hangs is found out here
                save_run(self.store, self.crew, step, exact=False)
            self._tell(f"the run failed in step {step}")
        except Exception as problem:  # it must not hide the error that ended the run
            self._tell(f"the run failed in step {step} and could not be saved: {problem}")

    def _tell(self, what: str) -> None:
        latest = self.store.latest()
        remedy = f"Go on with: runner.resume_dir={latest}" if latest else "There is no checkpoint yet"
        self.reporter.note(f"{what}. {remedy}")

    def _collect(self) -> Collection:
        with self._timed("sync_weights"):
            self.crew.publish()
        return self.crew.collect(self.schedule.chunks, self.schedule.segments)

    def _evaluate(self, evaluator: Evaluator, step: int) -> dict[str, float]:
        """Evaluate the weights of now; what is collected ahead keeps those that it began with."""
        with self._timed("eval"):
            if self.ahead is not None:
                self.ahead.wait()
            self.crew.publish()
            if self.crew.stop.is_set():
                return {}
            return evaluator.run(self.reporter, step, film=self.schedule.films(step))

    def _save(self, step: int) -> None:
        with self._timed("checkpoint"):
            try:
                save_run(self.store, self.crew, step)
                self.kept = self.crew.progress()
            except CheckpointError as error:
                if step == self.schedule.num_steps:
                    raise
                self.reporter.note(f"training goes on, but {error}")

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.times[part] = self.times.get(part, 0.0) + time.perf_counter() - started

    def _rates(self, before: Progress, after: Progress, collecting_s: float, learning_s: float) -> dict[str, float]:
        metrics = {
            "env_steps": float(after.env_steps),
            "updates": float(after.updates),
            "generate_rollouts": collecting_s,
            "actor_training": learning_s,
            "env_steps_per_s": (after.env_steps - before.env_steps) / collecting_s,
            "updates_per_s": (after.updates - before.updates) / learning_s,
            **self.times,
        }
        return {f"time/{name}": value for name, value in metrics.items()}
