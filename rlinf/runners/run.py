"""What every run does around its global steps: signals, checkpoints, and saving what can be saved when it fails."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rlinf.core.errors import CheckpointError, ProcessDied
from rlinf.runners.checkpoint import CheckpointStore, save_run
from rlinf.runners.crew import Crew, Reporter
from rlinf.runners.evaluate import Evaluator
from rlinf.runners.interrupt import StopOnSignals
from rlinf.runners.schedule import Schedule
from rlinf.runtime.local import GRACE_S, Handle
from rlinf.workers.learner_worker import LearnerWorker, Progress

UNPREFIXED = ("rollout/", "actor/total_loss")
"""Beginnings of the learner's metrics that are reported without `train/`."""

LARGEST_LOSS_RATIO = 1e5
"""Of β |L_SFT| / |L_RL|, beyond which there is a warning."""


class Stepper(Protocol):
    """One way to make a global step."""

    run: Run

    def step(self, step: int) -> None:
        """Make global step number `step` and log it."""
        ...

    def settle(self) -> None:
        """Wait until no environment plays. Raises what went wrong with that."""
        ...


class Run:
    """Who takes part in a run, what is safe on disk, and how long the parts of the present step took."""

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
        self.kept = crew.progress()  # of the checkpoint written or read last
        self.times: dict[str, float] = {}
        self._steps_since_publication = schedule.sync_interval
        self.published = -1

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time spent inside as `time/<part>` of the present step."""
        started = time.perf_counter()
        yield
        self.times[part] = self.times.get(part, 0.0) + time.perf_counter() - started

    def publish(self, *, wait: bool = True) -> int:
        """Publish the newest weights now; their version. Without `wait`, training goes on while they travel."""
        with self.timed("sync_weights"):
            self._steps_since_publication = 0
            self.published = self.crew.publish(wait=wait)
            return self.published

    def publish_if_due(self, *, wait: bool = True) -> None:
        """Publish the newest weights once in `sync_interval` calls, the first one included."""
        if self._steps_since_publication >= self.schedule.sync_interval:
            self.publish(wait=wait)
        self._steps_since_publication += 1

    def recover(self, error: ProcessDied, interrupted: Iterable[Handle[Any]]) -> None:
        """Replace what died and say so; see `Crew.recover`. Raises `error` where that cannot be."""
        with self.timed("recovery"):
            self.reporter.note(self.crew.recover(error, interrupted))

    def save(self, step: int) -> None:
        """Write a checkpoint, with nothing in flight. Only the last one must succeed: others are tried again later.

        Raises ProcessDied when somebody died meanwhile; there is no new checkpoint then.
        """
        with self.timed("checkpoint"):
            try:
                save_run(self.store, self.crew, step)
                self.kept = self.crew.progress()
                # A resumed run begins by publishing; this one must go on alike.
                self._steps_since_publication = self.schedule.sync_interval
            except CheckpointError as error:
                if step == self.schedule.num_steps:
                    raise
                self.reporter.note(f"training goes on, but {error}")

    def log(
        self,
        step: int,
        *,
        evaluation: dict[str, float],
        episodes: dict[str, float] | None = None,
        learned: dict[str, float] | None = None,
        rates: dict[str, float] | None = None,
    ) -> None:
        """Report a global step, each part under its prefix; nothing when the run was asked to stop in it."""
        if self.crew.stop.is_set():
            return
        env = {f"env/{name}": value for name, value in (episodes or {}).items()}
        train = {name if name.startswith(UNPREFIXED) else f"train/{name}": x for name, x in (learned or {}).items()}
        times = {f"time/{name}": value for name, value in ((rates | self.times) if rates else {}).items()}
        self.reporter.log(step, env | evaluation | train | times)
        ratio = train.get("train/loss_ratio", 0.0)
        if ratio > LARGEST_LOSS_RATIO:
            self.reporter.note(
                f"train/loss_ratio is {ratio:.3g}: demonstrations outweigh the reward; lower actor.sft_loss_weight"
            )

    def stop(self, step: int) -> None:
        """End in the middle of `step`, with nothing in flight: keep what was played and learned."""
        if self.crew.ingest() != self.kept:
            save_run(self.store, self.crew, step)
        self._tell(f"stopped by {self.crew.stop.reason} in step {step}; nothing is lost")

    def rescue(self, step: int, error: BaseException) -> None:
        """Save what was learned although the run has failed. Raises nothing."""
        if isinstance(error, CheckpointError):
            return
        self.crew.stop.set("a failure")
        learner = self.crew.learner
        (busy := learner.run(LearnerWorker.report)).failures(GRACE_S)
        if not busy.done:
            self.reporter.note(
                f"the run has failed; waiting up to {learner.stop_timeout_s:g} s for the update under way, to save it"
            )
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


def drive(stepper: Stepper, last_step: int) -> int:
    """Train from the step after `last_step` to the end of the schedule. Returns the last step that was begun.

    It is smaller than `num_steps` when a signal stopped the run (`crew.stop`). However the run ends, what was
    learned and recorded is in a checkpoint, unless it holds NaN, and the environments are closed. A worker's
    exception is raised here.
    """
    run, step = stepper.run, last_step
    schedule, stop = run.schedule, run.crew.stop
    if step >= schedule.num_steps:
        run.reporter.note(f"nothing to do: step {step} of {schedule.num_steps} is done; raise runner.max_epochs")
    try:
        with StopOnSignals(stop, run.crew.learner.stop_timeout_s):
            while step < schedule.num_steps and not stop.is_set():
                step += 1
                stepper.step(step)
            if stop.is_set():
                stepper.settle()
                run.stop(step)
    except BaseException as error:  # whatever it is, what was learned is saved before it goes on its way
        run.rescue(step, error)
        raise
    finally:
        for problem in run.crew.close() + (run.evaluator.close() if run.evaluator else []):
            run.reporter.note(problem)
    return step


def rates(before: Progress, after: Progress, collecting_s: float, learning_s: float) -> dict[str, float]:
    """What was done between two reports, and how fast."""
    return {
        "env_steps": float(after.env_steps),
        "updates": float(after.updates),
        "generate_rollouts": collecting_s,
        "actor_training": learning_s,
        "env_steps_per_s": (after.env_steps - before.env_steps) / collecting_s,
        "updates_per_s": (after.updates - before.updates) / learning_s,
    }
