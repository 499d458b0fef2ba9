"""An operator who also hears what is said at the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from rlinf.core.desk import DESK, Desk
from rlinf.envs.realworld.teleop.operator import Command, Operator


class AtDesk:
    """A device, or none, whose marks are those of the terminal where it gives none itself.

    Args:
        device: in a person's hands; None: nobody's, who moves nothing.
        desk: where words are left.
        clock: seconds, that of the desk's words.
    """

    def __init__(self, device: Operator | None, desk: Desk = DESK, clock: Callable[[], float] = time.monotonic) -> None:
        self._device, self._desk, self._clock = device, desk, clock

    def read(self) -> Command:
        """As `Operator.read`."""
        command = Command(np.zeros(6)) if self._device is None else self._device.read()
        word = self._desk.hear(self._clock())
        return replace(command, mark=word) if word and command.mark != "stop" else command

    def close(self) -> None:
        """Let go of the device."""
        if self._device is not None:
            self._device.close()
