"""When environment steps begin: by the clock, or in simulated time; and how late they were."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

LATE_SHARE = 0.1
"""A step that begins later than this share of a period after it was due has missed its deadline."""


class Pace(Protocol):
    """How time passes between two moments of an environment."""

    def now(self) -> float:
        """Seconds, on the clock of the arm's measurements."""
        ...

    def wait_until(self, due: float) -> None:
        """Return when it is `due`; at once where that is past."""
        ...


class RealTime:
    """The clock of this machine.

    Args:
        clock, sleep: `time.monotonic` and `time.sleep`; others for tests.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self._clock, self._sleep = clock, sleep

    def now(self) -> float:
        """As `Pace.now`."""
        return self._clock()

    def wait_until(self, due: float) -> None:
        """As `Pace.wait_until`."""
        left = due - self._clock()
        if left > 0:
            self._sleep(left)


class SimulatedTime:
    """Time that passes by being waited for, as fast as the simulation goes.

    Args:
        clock: seconds of the simulation.
        advance: let so many of them pass.
        restart: begin at zero again, so that an episode does not depend on those before, to the last bit.
    """

    def __init__(
        self, clock: Callable[[], float], advance: Callable[[float], None], restart: Callable[[], None] | None = None
    ) -> None:
        self._clock, self._advance = clock, advance
        self.restart = restart or (lambda: None)

    def now(self) -> float:
        """As `Pace.now`."""
        return self._clock()

    def wait_until(self, due: float) -> None:
        """As `Pace.wait_until`."""
        left = due - self._clock()
        if left > 1e-9:
            self._advance(left)


class Stopwatch:
    """A clock that is moved by hand: simulated time of an arm without physics."""

    def __init__(self, now: float = 0.0) -> None:
        self._now, self._lock = now, threading.Lock()

    def __call__(self) -> float:
        """Seconds."""
        with self._lock:
            return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        with self._lock:
            self._now += seconds

    def restart(self) -> None:
        """Begin at zero again."""
        with self._lock:
            self._now = 0.0


@dataclass
class Metronome:
    """Steps at a fixed rate.

    A step is due a period after the one before was. One that comes later has missed its deadline, if it is by more than
    `LATE_SHARE` of a period, and the next ones are counted from when it came: lost time is not made up for.

    Attributes:
        pace: how time passes.
        period_s: 1 / rate.
        late_s: how late each step since `begin` was.
        missed: deadlines missed since then.
    """

    pace: Pace
    period_s: float
    late_s: list[float] = field(default_factory=list)
    missed: int = 0
    _due: float = 0.0

    def begin(self) -> None:
        """An episode begins now."""
        self.late_s, self.missed = [], 0
        self._due = self.pace.now()

    def wait(self) -> None:
        """Wait for the next step's time."""
        self._due += self.period_s
        self.pace.wait_until(self._due)
        late = max(self.pace.now() - self._due, 0.0)
        self.late_s.append(late)
        if late > LATE_SHARE * self.period_s:
            self.missed += 1
            self._due += late

    def pause(self) -> None:
        """Something that takes time by design has happened: the next step is due a period from now."""
        self._due = self.pace.now()

    def jitter_ms(self) -> dict[str, float]:
        """How late steps were, in ms: `p50`, `p99` and `max`."""
        late = np.array(self.late_s or [0.0]) * 1000
        return {"p50": float(np.quantile(late, 0.5)), "p99": float(np.quantile(late, 0.99)), "max": float(late.max())}
