"""A 3Dconnexion SpaceMouse through hidapi.

Reports [1]: number 1 carries x, y, z as signed 16-bit numbers, low byte first, and, on newer devices, the three
rotations behind them; number 2 carries the rotations on older ones; number 3 the buttons, a bit each. Full deflection
is about 350. The device's axes are x to the right, y towards the person, z down.

Not tried with a device here; run `python -c "import hid; print(hid.enumerate())"` to see what is plugged in.

[1] devices.toml of PySpaceMouse (github.com/JakubAndrysek/PySpaceMouse), which lists the devices one by one.
"""

from __future__ import annotations

import struct
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rlinf.core.errors import MissingDependency
from rlinf.envs.realworld.teleop.operator import Command, TeleopError

INSTALL_COMMAND = "pip install hidapi"
REMEDY = (
    f"run `{INSTALL_COMMAND}`, or in the repository "
    "`bash requirements/install.sh embodied --env realworld --hardware spacemouse`"
)
VENDORS = (0x256F, 0x046D)
"""3Dconnexion, and Logitech, under whose number the older ones came."""
LOGITECH_PRODUCTS = (0xC625, 0xC626, 0xC627, 0xC628, 0xC629, 0xC62B)
UDEV_RULE = 'SUBSYSTEM=="hidraw", ATTRS{idVendor}=="256f", MODE="0660", GROUP="plugdev"'
FULL = 350.0
SILENCE_S = 0.2
"""A deflected device reports about a hundred times a second; one that is silent for so long counts as released."""
READ_MS = 50

# Rows: the base's x, y, z in the device's axes. Both are turns, so rotations go through them as well.
FACING = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, -1]])
"""The person stands opposite the robot: pulling towards oneself moves along the base's +x."""
BEHIND = np.array([[0.0, -1, 0], [-1, 0, 0], [0, 0, -1]])
"""The person stands behind the robot: pushing away moves along the base's +x."""


@dataclass(frozen=True)
class Puck:
    """What the device says of itself.

    Attributes:
        linear, angular: deflections along and about its axes, −1 … 1.
        buttons: a bit for each; 1 is the left one, 2 the right one.
    """

    linear: tuple[float, float, float] = (0.0, 0.0, 0.0)
    angular: tuple[float, float, float] = (0.0, 0.0, 0.0)
    buttons: int = 0


def after_report(puck: Puck, report: bytes) -> Puck:
    """The device's state after a report; reports that are not understood change nothing."""
    if len(report) < 2:
        return puck
    number, body = report[0], report[1:]
    if number == 1 and len(body) >= 12:
        return replace(puck, linear=_three(body[:6]), angular=_three(body[6:12]))
    if number == 1 and len(body) >= 6:
        return replace(puck, linear=_three(body[:6]))
    if number == 2 and len(body) >= 6:
        return replace(puck, angular=_three(body[:6]))
    if number == 3:
        return replace(puck, buttons=int.from_bytes(body[:4], "little"))
    return puck


def _three(body: bytes) -> tuple[float, float, float]:
    x, y, z = (max(-1.0, min(1.0, value / FULL)) for value in struct.unpack("<3h", body))
    return x, y, z


def command_of(puck: Puck, axes: np.ndarray, dead_zone: float) -> Command:
    """The wish behind a state: left button closes, right button opens, small deflections are none."""
    motion = np.concatenate((axes @ np.array(puck.linear), axes @ np.array(puck.angular)))
    motion[np.abs(motion) < dead_zone] = 0.0
    return Command(motion, gripper=float(bool(puck.buttons & 2)) - float(bool(puck.buttons & 1)))


class SpaceMouse:
    """The first SpaceMouse that is plugged in.

    Args:
        stands: where the person stands: `facing` the robot or `behind` it.
        dead_zone: deflections below this share are none.
        device: an opened hidapi device; None: find one.

    Raises:
        MissingDependency: hidapi is not installed.
        TeleopError: there is none, or it may not be opened.
    """

    def __init__(self, stands: str = "facing", dead_zone: float = 0.05, device: Any = None) -> None:
        if stands not in ("facing", "behind"):
            raise TeleopError(f"a person stands facing the robot or behind it, not {stands}")
        self._axes, self._dead_zone = FACING if stands == "facing" else BEHIND, dead_zone
        self._device = open_device() if device is None else device
        self._lock, self._puck, self._heard_s, self._lost = threading.Lock(), Puck(), 0.0, ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="spacemouse", daemon=True)
        self._thread.start()

    def read(self) -> Command:
        """What the hand wants now. Raises TeleopError when the device was unplugged."""
        with self._lock:
            if self._lost:
                raise TeleopError(f"the SpaceMouse was lost ({self._lost}); plug it in and start again")
            if time.monotonic() - self._heard_s > SILENCE_S:
                self._puck = Puck(buttons=self._puck.buttons)  # buttons report changes alone
            return command_of(self._puck, self._axes, self._dead_zone)

    def close(self) -> None:
        """Let go of the device."""
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join()
            self._device.close()

    def _listen(self) -> None:
        while not self._ended.is_set():
            try:
                report = bytes(self._device.read(64, READ_MS))
            except (OSError, ValueError) as error:  # hidapi's words for a device that is gone
                with self._lock:
                    self._lost = " ".join(str(error).split()) or type(error).__name__
                return
            if report:
                with self._lock:
                    self._puck, self._heard_s = after_report(self._puck, report), time.monotonic()


def open_device() -> Any:
    """The first SpaceMouse, opened. Raises MissingDependency, TeleopError."""
    try:
        import hid
    except ImportError as error:
        raise MissingDependency(f"hidapi cannot be imported ({error}); {REMEDY}") from error
    found = [
        entry
        for vendor in VENDORS
        for entry in hid.enumerate(vendor, 0)
        if vendor == VENDORS[0] or entry["product_id"] in LOGITECH_PRODUCTS
    ]
    if not found:
        raise TeleopError("no SpaceMouse is plugged in (USB, or its receiver); see `lsusb`")
    device = hid.device()
    try:
        device.open_path(found[0]["path"])
    except OSError as error:
        name = found[0].get("product_string") or "SpaceMouse"
        raise TeleopError(
            f"{name} may not be opened ({error}); put this line into /etc/udev/rules.d/99-spacemouse.rules and plug it "
            f"in again: {UDEV_RULE}"
        ) from error
    return device
