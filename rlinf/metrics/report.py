"""The one object to which a run reports: journal, services, terminal and learning curve.

What fails before training begins raises. What fails during training is told once and then borne: recording
must never end a run, whose weights are worth more than its curves.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rlinf.metrics.journal import MetricsFile
from rlinf.metrics.logger import Logger, one_line, open_loggers
from rlinf.metrics.view import View, clock, open_view

CLOSE_TIMEOUT_S = 60.0
CURVE_SHARE = 0.05


class LearningCurve:
    """Logger that redraws `learning_curve.png` from the journal after evaluations and at the end."""

    name = "learning curve"

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._cost_s = 0.0
        self._drawn_at_s = -float("inf")
        self._is_new = False  # what was logged since it was drawn

    def log(self, step: int, metrics: Mapping[str, float], elapsed_s: float) -> None:
        """Redraw if `step` was evaluated, unless drawing would take a twentieth of the run's time."""
        self._is_new = True
        due = time.monotonic() - self._drawn_at_s > self._cost_s / CURVE_SHARE
        if due and any(tag.startswith("eval/") for tag in metrics):
            self._draw()

    def close(self) -> None:
        """Draw the final curve, if that was not the last thing that happened."""
        if self._is_new:
            self._draw()

    def _draw(self) -> None:
        from rlinf.metrics.plot import plot_runs  # matplotlib is slow to import

        began_s = time.monotonic()
        plot_runs([self._run_dir], self._run_dir / "learning_curve.png")
        self._is_new = False
        self._drawn_at_s = time.monotonic()
        self._cost_s = self._drawn_at_s - began_s


class Reporter:
    """Reports a run to the files of its directory, to the chosen services and to the terminal.

    Use it as a context manager, so that the terminal is left in order whatever happens. `log` belongs to one
    thread; `note` may be called from any.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        backends: Sequence[str],
        project_name: str,
        experiment_name: str,
        config: Mapping[str, Any],
        total_steps: int,
        resume_step: int = 0,
        video_dir: str | Path | None = None,
    ) -> None:
        """Open everything; `run_dir` must exist.

        Args:
            backends: names out of tensorboard, wandb, swanlab.
            config: resolved configuration, for the services that show it.
            total_steps: global steps of the whole run, those before `resume_step` included.
            resume_step: the global step of the checkpoint from which the run goes on; 0 for a fresh run.
            video_dir: folder of the videos; None for videos/ in `run_dir`.

        Raises: MissingDependency, ConfigError as `open_loggers`; OSError where `run_dir` cannot be written.
        """
        self.run_dir = Path(run_dir)
        self._video_dir = Path(video_dir) if video_dir is not None else self.run_dir / "videos"
        self._lock = threading.RLock()
        self._told: set[str] = set()
        self._closed = False
        self._began_s = time.monotonic()
        self._view: View = open_view(experiment_name, self.run_dir, total_steps, resume_step)
        try:
            journal = MetricsFile(self.run_dir, resume_step)
            services = open_loggers(
                backends,
                self.run_dir,
                project_name=project_name,
                experiment_name=experiment_name,
                config=config,
                resume_step=resume_step,
                note=self.note,
            )
        except BaseException:
            self._view.close()
            raise
        self._began_s -= journal.elapsed_before_s
        self._step, self._first_step = resume_step, resume_step
        self._loggers: list[Logger] = [journal, *services, self._view, LearningCurve(self.run_dir)]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report the metrics of global step `step`, by complete tags (`train/sac/critic_loss`)."""
        elapsed_s = self.elapsed_s()
        self._step = step
        for logger in self._loggers:
            self._guard(logger.name, partial(logger.log, step, metrics, elapsed_s))

    def note(self, text: str) -> None:
        """Tell the person at the terminal something, in one line."""
        with self._lock:
            self._guard("terminal", partial(self._view.note, text))

    def keys(self, text: str) -> None:
        """Show the person at the terminal which keys do what; empty: none do."""
        with self._lock:
            self._guard("terminal", partial(self._view.keys, text))

    def video(self, name: str, frames: np.ndarray, fps: float) -> None:
        """Write `<video_dir>/<name>.mp4` from uint8 [T, height, width, 3]."""
        from rlinf.metrics.video import write_video

        path = self._video_dir / f"{name}.mp4"
        self._guard("video", partial(write_video, path, frames, fps))

    def elapsed_s(self) -> float:
        """Wall clock of the run in seconds, earlier sessions included."""
        return time.monotonic() - self._began_s

    def close(self) -> None:
        """Finish every logger, waiting a minute at most for a service. Calling it twice is allowed."""
        if self._closed:
            return
        self._closed = True
        for logger in self._loggers:
            if logger is not self._view:
                self._guard(logger.name, partial(_in_time, logger.close, CLOSE_TIMEOUT_S))
        self._guard(self._view.name, self._view.close)
        steps = self._step - self._first_step
        self.note(f"{steps:,} global steps in this session, {clock(self.elapsed_s())} in all; see {self.run_dir}")

    def __enter__(self) -> Reporter:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _guard(self, name: str, action: Callable[[], Any]) -> None:
        """Do `action`; tell its first failure, by the name of who failed, and go on."""
        try:
            action()
        except Exception as error:  # the one place where anything is borne: no logger may end a run
            if name in self._told:
                return
            self._told.add(name)
            text = f"{name} failed ({type(error).__name__}: {one_line(error)}); training goes on"
            if name == "terminal":
                print(text, file=sys.stderr)
            else:
                self.note(text)


def _in_time(action: Callable[[], Any], timeout_s: float) -> None:
    """Do `action` in a thread of its own. Raises TimeoutError when it takes too long, and what it raised."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True, name="close-logger")
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise TimeoutError(f"did not finish within {timeout_s:.0f} s")
    if failures:
        raise failures[0]
