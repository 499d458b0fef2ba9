"""What an operator wants, from whatever device, and the rule by which it replaces the policy's action.

A device is an `Operator`; `Takeover` decides from its commands, one per control period, whether the person or the
policy acts. A script is an operator too, so that tests and demonstrations run the same path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rlinf.core.errors import RlinfError

STILL = 1e-3
"""A motion shorter than this is none: devices do not rest exactly at zero."""


class TeleopError(RlinfError):
    """The operator's device is missing, may not be opened, or was lost; the message says what to do."""


def later_mark(mark: str, new: str) -> str:
    """What counts of two marks of one control period: the later one, but nothing takes back a stop."""
    return mark if mark == "stop" or not new else new


@dataclass(frozen=True, eq=False)
class Command:
    """What the operator wants in this control period.

    Attributes:
        motion: [6] in [−1, 1]: along, then about the base's x, y, z. The environment scales it as it does actions.
        gripper: −1 close, 0 leave, 1 open.
        mark: `success`, `failure`, `stop` or empty: what the operator says about the episode.
    """

    motion: np.ndarray
    gripper: float = 0.0
    mark: str = ""

    def is_active(self) -> bool:
        """Whether the operator moves anything."""
        return bool(np.linalg.norm(self.motion) > STILL or self.gripper != 0)

    def action(self, size: int) -> np.ndarray:
        """As an action: [6], or [7] with the gripper."""
        return np.append(self.motion, self.gripper)[:size].astype(np.float32)


class Operator(Protocol):
    """A device in a person's hands, or a script."""

    def read(self) -> Command:
        """What is wanted now. Returns at once. Raises TeleopError when the device is lost."""
        ...

    def close(self) -> None:
        """Let go of the device. Calling it twice is allowed."""
        ...


class Takeover:
    """The person acts while moving, and holds still for a while after, so that the policy does not snatch back at once.

    Args:
        action_dim: 6, or 7 with a gripper.
        hold_s: so long after the last motion the person still holds the arm.
    """

    def __init__(self, action_dim: int = 6, hold_s: float = 0.5) -> None:
        self._size, self._hold_s = action_dim, hold_s
        self._last_s = -math.inf

    def decide(self, command: Command, now: float) -> np.ndarray | None:
        """The person's action, float32 [A], zero while holding still; or None: the policy's holds."""
        if command.is_active():
            self._last_s = now
            return command.action(self._size)
        return np.zeros(self._size, np.float32) if now - self._last_s < self._hold_s else None

    def reset(self) -> None:
        """A new episode begins: nobody holds the arm."""
        self._last_s = -math.inf


class ScriptedOperator:
    """An operator that follows a rule.

    Args:
        wish: called once per `read`; returns a command.
    """

    def __init__(self, wish: Callable[[], Command]) -> None:
        self._wish = wish

    def read(self) -> Command:
        """The rule's next command."""
        return self._wish()

    def close(self) -> None:
        """Nothing to let go of."""
