"""Synchronous training. Everything that decides *when* is in `Synchronous.step`.

With `overlap`, segment k + 1 is collected while the learner makes the updates of step k, by the policy from
before these updates. Joins come at fixed places, so the run remains a function of its seeds:

    collect  | segment 1 | segment 2 | segment 3 | ...
    learn    |           | step 1    | step 2    | ...

At a checkpoint nothing is in flight; the segment after it is played by the newest weights.
"""

from __future__ import annotations

from rlinf.runners.checkpoint import CheckpointStore
from rlinf.runners.crew import Collection, Crew, Reporter
from rlinf.runners.evaluate import Evaluator
from rlinf.runners.run import Run, drive, rates
from rlinf.runners.schedule import Schedule
from rlinf.workers.learner_worker import LearnerWorker


def run_sync(
    crew: Crew,
    schedule: Schedule,
    store: CheckpointStore,
    reporter: Reporter,
    *,
    evaluator: Evaluator | None = None,
    last_step: int = 0,
) -> int:
    """Train synchronously from the step after `last_step` to `schedule.num_steps`; see `run.drive`."""
    return drive(Synchronous(Run(crew, schedule, store, reporter, evaluator)), last_step)


class Synchronous:
    """Collect, then learn; with `overlap`, what is being collected ahead is kept between two global steps."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.ahead: Collection | None = None

    def step(self, step: int) -> None:
        """Take in the experience of this step, learn from it, evaluate and save if it is time."""
        run, crew, schedule = self.run, self.run.crew, self.run.schedule
        run.times = {}
        evaluation: dict[str, float] = {}
        before = crew.progress()
        with run.timed("step"):
            collection = self.ahead or self._collect()
            self.ahead = None
            episodes = collection.wait()
            crew.ingest()
            if schedule.overlap and not schedule.saves(step):
                self.ahead = self._collect()
            updating = crew.learner.run(LearnerWorker.update, schedule.updates)
            [learned] = updating.wait(watching=self.ahead.handles if self.ahead else ())
            after = crew.progress()
            if run.evaluator is not None and schedule.evaluates(step):
                evaluation = self._evaluate(run.evaluator, step)
            if schedule.saves(step) and not crew.stop.is_set():
                run.save(step)
        speeds = rates(before, after, collection.seconds, updating.seconds)
        run.log(step, episodes=episodes, evaluation=evaluation, learned=learned, rates=speeds)

    def settle(self) -> None:
        """Wait for what is collected ahead."""
        if self.ahead is not None:
            self.ahead.wait()

    def _collect(self) -> Collection:
        self.run.publish_if_due()
        return self.run.crew.collect(self.run.schedule.chunks, self.run.schedule.segments)

    def _evaluate(self, evaluator: Evaluator, step: int) -> dict[str, float]:
        """Evaluate the weights of now; what is collected ahead keeps those that it began with."""
        run = self.run
        with run.timed("eval"):
            self.settle()
            run.publish()
            if run.crew.stop.is_set():
                return {}
            return evaluator.run(run.reporter, step, film=run.schedule.films(step))
