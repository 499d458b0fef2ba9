"""The terminal's keyboard as an operator: keys that move a little, for as long as they are held."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rlinf.envs.realworld.teleop.operator import Command, TeleopError, later_mark

KEY_HOLD_S = 0.15
"""A press counts so long. Terminals report no release; a held key repeats about thirty times a second."""
MOVES = {
    "w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1), "r": (2, 1), "f": (2, -1),
    "j": (3, 1), "l": (3, -1), "i": (4, 1), "k": (4, -1), "u": (5, 1), "o": (5, -1),
}  # fmt: skip
"""Key → element of the motion and its sign: x, y, z, then about x, y, z."""
GRIPPER = {"g": -1.0, "h": 1.0}
MARKS = {"\n": "success", "\r": "success", "\x7f": "failure", " ": "stop"}
HELP = (
    "w s: x   a d: y   r f: z   j l, i k, u o: turn about x, y, z   g h: close, open   "
    "Enter: success   Backspace: failure   Space: stop"
)


class Keyboard:
    """Reads the terminal of this process, without waiting for Enter.

    Args:
        speed: share of the full motion that a key asks for.
        file: a terminal; None: standard input.
        clock: seconds.

    Raises:
        TeleopError: there is no terminal.
    """

    def __init__(self, speed: float = 0.5, file: Any = None, clock: Callable[[], float] = time.monotonic) -> None:
        import termios
        import tty

        self._termios, self._clock, self._speed = termios, clock, speed
        file = sys.stdin if file is None else file
        try:
            self._fd = file.fileno()
            self._before: list[Any] | None = termios.tcgetattr(self._fd)
        except (OSError, ValueError, termios.error) as error:
            raise TeleopError("the keyboard needs a terminal; start this in one, not in the background") from error
        tty.setcbreak(self._fd)  # Ctrl-C stays Ctrl-C
        self._pressed: dict[str, float] = {}

    def read(self) -> Command:
        """What the keys of the last moment want."""
        now, mark = self._clock(), ""
        while select.select([self._fd], [], [], 0)[0]:
            keys = os.read(self._fd, 256).decode(errors="ignore")
            if not keys:
                raise TeleopError("the terminal was closed")
            for key in keys:
                self._pressed[key.lower()] = now
                mark = later_mark(mark, MARKS.get(key, ""))
        motion, gripper = np.zeros(6), 0.0
        for key, pressed_s in self._pressed.items():
            if now - pressed_s <= KEY_HOLD_S:
                if key in MOVES:
                    element, sign = MOVES[key]
                    motion[element] += sign * self._speed
                gripper = GRIPPER.get(key, gripper)
        return Command(motion, gripper, mark)

    def close(self) -> None:
        """Give the terminal back as it was."""
        before, self._before = self._before, None
        if before is not None:
            self._termios.tcsetattr(self._fd, self._termios.TCSADRAIN, before)
