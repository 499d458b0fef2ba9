"""Asynchronous training: environments and policy never wait for the learner, nor the learner for them.

    play      | segment | segment | segment | segment | ...      always one under way and one in the queue
    learn     | step 1       | step 2       | step 3       | ... each takes in all that has arrived
    evaluate  |                    | the weights of step 1  |    in environments of its own

A global step is `updates` updates. The learner waits only while there is too little experience to learn from: before
the algorithm is ready, and where `max_updates_per_env_step` or `max_staleness` limits it; the environments only while
`WAITING` segments wait for a learner that makes a long step. The policy takes up newer weights, when there
are any, between two actions; how old the weights were that a segment was played by is logged as `train/staleness/`.
The result depends on timing: two runs of one seed differ. To be repeated exactly, a run must be synchronous.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlinf.core.errors import ProcessDied
from rlinf.runners.checkpoint import CheckpointStore
from rlinf.runners.crew import Collection, Crew, Reporter
from rlinf.runners.evaluate import Evaluating, Evaluator
from rlinf.runners.run import Run, drive, rates
from rlinf.runners.schedule import Schedule
from rlinf.runtime.local import PLAY_TIMEOUT_S, Handle, wait_for_one
from rlinf.workers.env_worker import merge_episode_means
from rlinf.workers.learner_worker import LearnerWorker

IN_FLIGHT = 2
"""Segments asked for at any time: the next one waits in the environments' own queue when one ends."""
WAITING = 64
"""Segments that may wait for the learner: memory has an end."""


def run_async(
    crew: Crew,
    schedule: Schedule,
    store: CheckpointStore,
    reporter: Reporter,
    *,
    evaluator: Evaluator | None = None,
    last_step: int = 0,
) -> int:
    """Train asynchronously from the step after `last_step` to `schedule.num_steps`; see `run.drive`.

    The evaluator must read from weights of its own: each evaluation keeps those that it began with.
    """
    if evaluator is not None and evaluator.weights is crew.weights:
        raise ValueError("the evaluator of an asynchronous run needs Weights of its own")
    return drive(Asynchronous(Run(crew, schedule, store, reporter, evaluator)), last_step)


class Asynchronous:
    """What plays, what is being evaluated, and the episodes that ended since the last report."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.playing: deque[Collection] = deque()
        self.evaluating: Evaluating | None = None
        self._episodes: list[dict[str, float]] = []
        self._waiting = 0
        # No segment that is being played began with older weights than the first; the second is its value at a moment
        # when the first of these segments was not over yet.
        self._oldest = self._published_before_its_end = run.published
        self._arrival = (time.perf_counter(), run.crew.progress().env_steps)
        self._env_steps_per_s = 0.0

    def step(self, step: int) -> None:
        """Make the updates of one global step with the experience that is there; report what has come in."""
        run, crew, schedule = self.run, self.run.crew, self.run.schedule
        run.times, last = {}, step == schedule.num_steps
        before = crew.progress()
        with run.timed("step"):
            run.publish_if_due(wait=schedule.max_staleness is not None)
            self._wait_for_experience()
            updating = crew.learner.run(LearnerWorker.update, schedule.updates)
            self._wait_for(updating)
            learned = updating.wait()[0]
            after = crew.progress()
            evaluation = self._finished_evaluation()
            if schedule.saves(step) and not crew.stop.is_set():
                self._save(step)
            if schedule.evaluates(step) and not crew.stop.is_set():
                evaluation |= self._last_evaluation(step) if last else self._begin_evaluation(step)
        speeds = rates(before, after, run.times["step"], updating.seconds)
        speeds["env_steps_per_s"] = self._env_rate(after.env_steps)
        speeds |= {"waiting_segments": float(self._waiting), "weights_version": float(run.published)}
        run.log(step, episodes=self._ended_episodes(), evaluation=evaluation, learned=learned, rates=speeds)

    def settle(self) -> None:
        """Wait until the environments play no more, and take in what they have played."""
        while self.playing:
            with self._replacing_who_dies():
                self._episodes.append(self.playing[0].wait())
                self.playing.popleft()
        self.run.crew.ingest()

    def _save(self, step: int) -> None:
        """Write a checkpoint with the environments of training at rest; an evaluation goes on meanwhile."""
        saved = False
        while not saved:
            self.settle()
            with self._replacing_who_dies():
                self.run.save(step)
                saved = True

    def _keep_playing(self) -> None:
        """See to it that `IN_FLIGHT` segments are asked for. Raises what went wrong with those that are over."""
        while self.playing and self.playing[0].done:
            self._episodes.append(self.playing[0].wait())
            self.playing.popleft()
            self._waiting += 1
            if self.playing:
                self._oldest = self._published_before_its_end
        if not self.playing:
            self._oldest = self._published_before_its_end = self.run.published
        elif not self.playing[0].playing.any_done:  # one that has ended it plays the next already
            self._published_before_its_end = self.run.published
        while len(self.playing) < IN_FLIGHT and self._waiting < WAITING and not self.run.crew.stop.is_set():
            self.playing.append(self.run.crew.collect(self.run.schedule.chunks, 1))

    @contextmanager
    def _replacing_who_dies(self) -> Iterator[None]:
        """Go on without the segments and the evaluation that a death has interrupted."""
        try:
            yield
        except ProcessDied as error:
            self.run.recover(error, self._watched())
            self.playing.clear()
            if self.evaluating is not None:
                self.run.reporter.note(f"the evaluation of step {self.evaluating.step} was interrupted by that")
                self.evaluating = None

    def _wait_for_experience(self) -> None:
        """Give the learner what has arrived, and wait for more while it may not go on learning."""
        crew = self.run.crew
        with self.run.timed("wait_for_experience"):
            while not crew.stop.is_set():
                with self._replacing_who_dies():
                    self._keep_playing()
                    may_learn = self._may_learn()
                    self._keep_playing()  # there is room again: the learner took in what waited
                    if may_learn:
                        return
                    if self.playing:
                        wait_for_one(self.playing[0].handles, watching=self._watched(), timeout_s=PLAY_TIMEOUT_S)

    def _may_learn(self) -> bool:
        crew, schedule = self.run.crew, self.run.schedule
        progress, self._waiting = crew.ingest(), 0
        if not crew.ready():
            return False
        limit, then = schedule.max_updates_per_env_step, progress.updates + schedule.updates
        if limit is not None and then > limit * progress.env_steps:
            return False
        if schedule.max_staleness is None or then - self._oldest <= schedule.max_staleness:
            return True
        if self.run.published < progress.updates:
            self.run.publish()  # so that what is played next is not too old again
        return False

    def _wait_for(self, handle: Handle[Any]) -> None:
        """Wait for `handle` and keep the environments busy meanwhile; not to its end when the run is to stop."""
        while not handle.done and not self.run.crew.stop.is_set():
            with self._replacing_who_dies():
                awaited = [handle, *(self.playing[0].handles if self.playing else ())]
                wait_for_one(awaited, watching=self._watched())
                self._keep_playing()

    def _watched(self) -> list[Handle[Any]]:
        handles = [handle for collection in self.playing for handle in collection.handles]
        return handles + list(self.evaluating.handles if self.evaluating else ())

    def _begin_evaluation(self, step: int) -> dict[str, float]:
        """Start evaluating the weights of now, unless the evaluation before is still under way."""
        run = self.run
        if run.evaluator is None:
            return {}
        if self.evaluating is not None:
            run.reporter.note(
                f"step {step} is not evaluated: the evaluation of step {self.evaluating.step} is still under way; "
                "raise runner.val_check_interval or lower env.eval.rollout_epoch"
            )
            return {}
        while self.evaluating is None and not run.crew.stop.is_set():
            with self._replacing_who_dies():
                run.publish()
                run.evaluator.pin(run.crew.weights)
                self.evaluating = run.evaluator.start(step, film=run.schedule.films(step))
        return {}

    def _finished_evaluation(self) -> dict[str, float]:
        """The metrics of the evaluation that has ended meanwhile, if one has."""
        metrics: dict[str, float] = {}
        if self.evaluating is not None and self.evaluating.done:
            with self._replacing_who_dies():
                metrics = self.evaluating.finish(self.run.reporter)
                self.evaluating = None
        return metrics

    def _last_evaluation(self, step: int) -> dict[str, float]:
        """That of the final weights, with the environments of training at rest."""
        run = self.run
        if run.evaluator is None:
            return {}
        with run.timed("eval"):
            if self.evaluating is not None:
                with self._replacing_who_dies():
                    unreported = self.evaluating.finish(run.reporter)
                    self.evaluating = None
                    run.log(step - 1, evaluation=unreported)
            while not run.crew.stop.is_set():
                with self._replacing_who_dies():
                    run.publish()
                    run.evaluator.pin(run.crew.weights)
                    self.evaluating = run.evaluator.start(step, film=run.schedule.films(step))
                    metrics = self.evaluating.finish(run.reporter)
                    self.evaluating = None
                    return metrics
            return {}

    def _env_rate(self, env_steps: int) -> float:
        """Environment steps per second between the last two arrivals; segments may take longer than a global step."""
        (then, steps_then), now = self._arrival, time.perf_counter()
        if env_steps > steps_then:
            self._env_steps_per_s = (env_steps - steps_then) / (now - then)
            self._arrival = (now, env_steps)
        return self._env_steps_per_s

    def _ended_episodes(self) -> dict[str, float]:
        ended, self._episodes = self._episodes, []
        return merge_episode_means(ended)
