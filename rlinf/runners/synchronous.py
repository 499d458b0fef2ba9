"""Synchronous training. Everything that decides *when* is in `Synchronous.step`.

With `overlap`, segment k + 1 is collected while the learner makes the updates of step k, by the policy from
before these updates. Joins come at fixed places, so the run remains a function of its seeds:

    collect  | segment 1 | segment 2 | segment 3 | ...
    learn    |           | step 1    | step 2    | ...

At a checkpoint nothing is in flight; the segment after it is played by the newest weights.
"""

from __future__ import annotations

from typing import Any

from rlinf.core.errors import ProcessDied
from rlinf.runners.checkpoint import CheckpointStore
from rlinf.runners.crew import Collection, Crew, Reporter
from rlinf.runners.evaluate import Evaluating, Evaluator
from rlinf.runners.run import Run, drive, rates
from rlinf.runners.schedule import Schedule
from rlinf.runtime.local import Handle
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
            collection, self.ahead = self.ahead or self._collect(), None
            while not (episodes := self._episodes(collection)):
                collection = self._collect()
            crew.ingest()
            if schedule.overlap and not schedule.saves(step):
                self.ahead = self._collect()
            updating = crew.learner.run(LearnerWorker.update, schedule.updates)
            learned = self._learned(updating)
            after = crew.progress()
            if run.evaluator is not None and schedule.evaluates(step):
                evaluation = self._evaluate(run.evaluator, step)
            if schedule.saves(step) and not crew.stop.is_set():
                self._save(step)
        speeds = rates(before, after, collection.seconds, updating.seconds)
        run.log(step, episodes=episodes, evaluation=evaluation, learned=learned, rates=speeds)

    def settle(self) -> None:
        """Wait for what is collected ahead."""
        if self.ahead is not None:
            self.ahead.wait()

    def _episodes(self, collection: Collection) -> dict[str, float]:
        """What `Collection.wait` returns; nothing if it has to be collected again, because a process died."""
        try:
            return collection.wait()
        except ProcessDied as error:
            self._recover(error, collection)
            return {}

    def _learned(self, updating: Handle[dict[str, float]]) -> dict[str, float]:
        """The metrics of the updates, which are the same on all ranks."""
        try:
            return updating.wait(watching=self.ahead.handles if self.ahead else ())[0]
        except ProcessDied as error:
            self._recover_ahead(error)
            return updating.wait()[0]

    def _recover(self, error: ProcessDied, collection: Collection | None, *others: Handle[Any]) -> None:
        """Replace who died. Of a collection that will be played anew nothing is kept: a step learns from one."""
        self.run.recover(error, [*(collection.handles if collection else ()), *others])
        if collection is not None:
            self.run.crew.discard()

    def _recover_ahead(self, error: ProcessDied, *others: Handle[Any]) -> None:
        """Replace who died. What is collected ahead, unless it is there already, is collected when its turn comes."""
        interrupted = None if self.ahead is None or self.ahead.succeeded else self.ahead
        self._recover(error, interrupted, *others)
        if interrupted is not None:
            self.ahead = None

    def _save(self, step: int) -> None:
        while True:
            try:
                self.run.save(step)
                break
            except ProcessDied as error:
                self._recover(error, None)  # nobody plays

    def _collect(self) -> Collection:
        self.run.publish_if_due()
        return self.run.crew.collect(self.run.schedule.chunks, self.run.schedule.segments)

    def _evaluate(self, evaluator: Evaluator, step: int) -> dict[str, float]:
        """Evaluate the weights of now; what is collected ahead keeps those that it began with."""
        run = self.run
        with run.timed("eval"):
            evaluating: Evaluating | None = None
            while not run.crew.stop.is_set():
                try:
                    self.settle()
                    run.publish()
                    if run.crew.stop.is_set():
                        break
                    evaluating = evaluator.start(step, film=run.schedule.films(step))
                    return evaluating.finish(run.reporter)
                except ProcessDied as error:
                    self._recover_ahead(error, *(evaluating.handles if evaluating else ()))
            return {}
