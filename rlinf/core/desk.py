"""What a person says at this process's terminal, for whoever moves the robot in it.

A process has one terminal, so there is one desk, `DESK`. What is said at it reaches environments in the same process;
those elsewhere have an operator's device, or the robot server, beside them.
"""

from __future__ import annotations

import threading

MAX_AGE_S = 2.0
"""What was said longer ago was about something else."""


class Desk:
    """The last word said and not yet heard. May be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._word, self._said_s = "", 0.0

    def say(self, word: str, now: float) -> None:
        """Leave a word; a stop is not overwritten by anything else."""
        with self._lock:
            if self._word != "stop" or now - self._said_s > MAX_AGE_S:
                self._word, self._said_s = word, now

    def hear(self, now: float) -> str:
        """Take the word, or nothing. One that is old is forgotten, except a stop."""
        with self._lock:
            word, self._word = self._word, ""
            return word if word == "stop" or now - self._said_s <= MAX_AGE_S else ""


DESK = Desk()
