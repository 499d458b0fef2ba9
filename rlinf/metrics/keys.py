"""Single keys of the terminal, while something else is going on in it."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import threading
from collections.abc import Callable
from typing import Any

LOG = logging.getLogger("rlinf.keys")
POLL_S = 0.1


class TerminalKeys:
    """Calls `press` for every key, from a thread of its own, until `close`.

    Args:
        press: gets one character. What it raises ends nothing.
        file: a terminal; None: standard input.

    Raises OSError where there is no terminal, or where this process is in its background.
    """

    def __init__(self, press: Callable[[str], None], file: Any = None) -> None:
        import termios
        import tty

        self._termios, self._press = termios, press
        file = sys.stdin if file is None else file
        try:
            self._fd = file.fileno()
            self._before: list[Any] | None = termios.tcgetattr(self._fd)
        except (AttributeError, ValueError, termios.error) as error:
            raise OSError("standard input is no terminal") from error
        if not self._is_ours():
            raise OSError("this process is in the background of its terminal")
        tty.setcbreak(self._fd)  # Ctrl-C stays Ctrl-C
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="keys", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the terminal back as it was. Calling it twice is allowed."""
        self._ended.set()
        self._thread.join()
        before, self._before = self._before, None
        if before is not None and self._is_ours():
            with contextlib.suppress(self._termios.error):  # a terminal that is gone needs nothing back
                self._termios.tcsetattr(self._fd, self._termios.TCSADRAIN, before)

    def _is_ours(self) -> bool:
        """Whether reading would not stop this process, as it does in the background."""
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return True  # a terminal that nobody controls, such as that of a test

    def _listen(self) -> None:
        while not self._ended.is_set():
            if not select.select([self._fd], [], [], POLL_S)[0]:
                continue
            if not self._is_ours():
                self._ended.wait(POLL_S)
                continue
            try:
                text = os.read(self._fd, 64).decode(errors="ignore")
            except OSError:
                return
            if not text:
                return  # the terminal was closed
            for key in text:
                try:
                    self._press(key)
                except Exception:  # noqa: PERF203  # the next key may be the stop
                    LOG.exception("key %r", key)
