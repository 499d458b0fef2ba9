"""Ctrl-C and SIGTERM: the first asks the run to end well, the second ends the process at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from rlinf.runtime.local import Flag

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignals:
    """A context in which SIGINT and SIGTERM throw `stop`. Outside the main thread it does nothing.

    `update_timeout_s` is how long an update under way is waited for then, to say so; None where it is not limited.
    """

    def __init__(self, stop: Flag, update_timeout_s: float | None = None) -> None:
        self._stop, self._update_timeout_s = stop, update_timeout_s
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._stop.is_set():
            _end_now(name, number)
        self._stop.set(name)
        # Written directly: the reporter may be in the middle of a line, holding its lock.
        _write(f"\n{name}: stopping and saving a checkpoint; once more to end at once\n")
        if self._update_timeout_s is not None:
            _write(f"waiting up to {self._update_timeout_s:g} s for the update under way\n")


def _end_now(name: str, number: int) -> None:
    for child in multiprocessing.active_children():
        child.kill()
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    _write(f"{show_cursor}\n{name} again: ended without saving; the last complete checkpoint is intact\n")
    os._exit(128 + number)


def _write(text: str) -> None:
    os.write(2, text.encode())
