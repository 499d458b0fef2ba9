"""A gamepad through the joystick interface of Linux, read with the standard library alone.

The kernel gives events of 8 bytes [1]: time in ms (u32), value (s16), type (u8: 1 button, 2 axis, 0x80 beside them for
the state at the beginning) and number (u8). Axes and buttons are those of pads that the drivers xpad and
hid-playstation know:

    left stick    x, y          (away from oneself and to the side, as `stands` says)
    right stick   z, and turning about it
    cross         leans the hand that way
    shoulders     left closes the gripper, right opens it
    A (cross)     success       B (circle)  failure       Y or X (triangle, square)  stop

Not tried with a device here; `jstest /dev/input/js0` (package joystick) shows the numbers of yours.

[1] Documentation/input/joydev/joystick-api.rst of the Linux kernel.
"""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import numpy as np

from rlinf.envs.realworld.teleop.operator import Command, TeleopError, later_mark

DEVICE = "/dev/input/js0"
EVENT = struct.Struct("<IhBB")
BUTTON, AXIS, INITIAL = 1, 2, 0x80
FULL = 32767.0
LEFT_X, LEFT_Y, RIGHT_X, RIGHT_Y, CROSS_X, CROSS_Y = 0, 1, 3, 4, 6, 7
MARKS = {0: "success", 1: "failure", 2: "stop", 3: "stop"}
CLOSE, OPEN = 4, 5


class Gamepad:
    """The gamepad behind a joystick device.

    Args:
        stands: where the person stands: `facing` the robot or `behind` it.
        device: file to read.
        dead_zone: deflections below this share are none: sticks do not rest exactly at zero.

    Raises:
        TeleopError: there is none, or it may not be opened.
    """

    def __init__(self, stands: str = "facing", device: str = DEVICE, dead_zone: float = 0.12) -> None:
        if stands not in ("facing", "behind"):
            raise TeleopError(f"a person stands facing the robot or behind it, not {stands}")
        self._side, self._dead_zone, self._device = 1.0 if stands == "facing" else -1.0, dead_zone, device
        self._axes: dict[int, float] = {}
        self._buttons: set[int] = set()
        self._rest = b""
        try:
            self._fd: int | None = os.open(device, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError as error:
            others = ", ".join(sorted(str(path) for path in Path("/dev/input").glob("js*"))) or "none"
            raise TeleopError(
                f"no gamepad at {device} (there: {others}); plug it in, and `modprobe joydev` if it does not appear"
            ) from error
        except OSError as error:
            raise TeleopError(f"{device} may not be read ({error}); add yourself to the group input") from error

    def read(self) -> Command:
        """What the hands want now. Raises TeleopError when the pad was unplugged or switched off."""
        mark = self._take_events()
        axes = [self._axis(number) for number in (LEFT_X, LEFT_Y, RIGHT_X, RIGHT_Y, CROSS_X, CROSS_Y)]
        left_x, left_y, right_x, right_y, cross_x, cross_y = axes
        # Sticks count positive to the right and towards oneself. Facing the robot, its +x points at the person.
        forth, side = self._side * left_y, self._side * left_x
        lean_forth, lean_side = self._side * cross_y, self._side * cross_x
        # Leaning towards d is turning about z × d.
        motion = np.array([forth, side, -right_y, -lean_side, lean_forth, -right_x])
        return Command(motion, float(OPEN in self._buttons) - float(CLOSE in self._buttons), mark)

    def close(self) -> None:
        """Let go of the device."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _axis(self, number: int) -> float:
        value = self._axes.get(number, 0.0)
        return 0.0 if abs(value) < self._dead_zone else value

    def _take_events(self) -> str:
        """Bring the state up to date; what was pressed, a stop before all else."""
        mark = ""
        while chunk := self._read_some():
            data = self._rest + chunk
            whole = len(data) - len(data) % EVENT.size
            self._rest = data[whole:]
            for _, value, kind, number in EVENT.iter_unpack(data[:whole]):
                if kind & ~INITIAL == AXIS:
                    self._axes[number] = max(-1.0, value / FULL)
                elif kind & ~INITIAL == BUTTON and value:
                    self._buttons.add(number)
                    mark = mark if kind & INITIAL else later_mark(mark, MARKS.get(number, ""))
                elif kind & ~INITIAL == BUTTON:
                    self._buttons.discard(number)
        return mark

    def _read_some(self) -> bytes:
        if self._fd is None:
            raise TeleopError("the gamepad was closed")
        try:
            chunk = os.read(self._fd, 64 * EVENT.size)
        except BlockingIOError:
            return b""
        except OSError as error:
            reason = "it is gone" if error.errno == errno.ENODEV else str(error)
            raise TeleopError(f"the gamepad at {self._device} was lost ({reason}); start again with it") from error
        if not chunk:
            raise TeleopError(f"the gamepad at {self._device} was lost (end of file); start again with it")
        return chunk
