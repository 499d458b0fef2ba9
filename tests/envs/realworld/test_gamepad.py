"""A gamepad, by events written into a pipe."""

import os

import numpy as np
import pytest

from rlinf.envs.realworld.teleop.devices import open_operator
from rlinf.envs.realworld.teleop.gamepad import (
    AXIS,
    BUTTON,
    CROSS_X,
    CROSS_Y,
    EVENT,
    INITIAL,
    LEFT_X,
    LEFT_Y,
    RIGHT_X,
    RIGHT_Y,
    Gamepad,
)
from rlinf.envs.realworld.teleop.operator import TeleopError


class Pad:
    """The other end of a joystick device."""

    def __init__(self, path) -> None:
        self.path = str(path)
        os.mkfifo(path)
        self._fd: int | None = os.open(path, os.O_RDWR)

    def write(self, data: bytes) -> None:
        os.write(self._fd, data)

    def says(self, kind: int, number: int, value: int) -> None:
        self.write(EVENT.pack(1, value, kind, number))

    def unplug(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None


@pytest.fixture
def pad(tmp_path):
    device = Pad(tmp_path / "js0")
    yield device
    device.unplug()


def test_events_are_those_of_the_kernel():
    # time 0x01020304, value -2, axis 2, number 5: struct js_event on a little-endian machine.
    assert EVENT.pack(0x01020304, -2, AXIS, 5) == bytes([4, 3, 2, 1, 0xFE, 0xFF, 2, 5])


FULL = 32767


@pytest.mark.parametrize(
    ("stands", "axis", "value", "moves"),
    [
        ("facing", LEFT_Y, FULL, [1, 0, 0, 0, 0, 0]),  # towards oneself is the base's +x
        ("facing", LEFT_X, FULL, [0, 1, 0, 0, 0, 0]),
        ("facing", RIGHT_Y, -FULL, [0, 0, 1, 0, 0, 0]),  # pushed away: up
        ("facing", RIGHT_X, FULL, [0, 0, 0, 0, 0, -1]),  # to the right: clockwise seen from above
        ("facing", CROSS_X, FULL, [0, 0, 0, -1, 0, 0]),  # leans to +y: z × y = -x
        ("facing", CROSS_Y, FULL, [0, 0, 0, 0, 1, 0]),  # leans to +x: z × x = y
        ("behind", LEFT_Y, -FULL, [1, 0, 0, 0, 0, 0]),  # away from oneself
        ("behind", LEFT_X, -FULL, [0, 1, 0, 0, 0, 0]),
        ("behind", RIGHT_Y, -FULL, [0, 0, 1, 0, 0, 0]),
        ("behind", RIGHT_X, FULL, [0, 0, 0, 0, 0, -1]),
        ("behind", CROSS_Y, -FULL, [0, 0, 0, 0, 1, 0]),
    ],
)
def test_sticks_move_the_arm_the_way_the_person_sees_it(pad, stands, axis, value, moves):
    gamepad = Gamepad(stands, pad.path)
    pad.says(AXIS, axis, value)
    command = gamepad.read()
    np.testing.assert_allclose(command.motion, moves)
    assert command.is_active()
    np.testing.assert_allclose(gamepad.read().motion, moves)  # it is still held there
    pad.says(AXIS, axis, 1500)
    assert not gamepad.read().is_active()  # sticks do not rest exactly at zero
    gamepad.close()


def test_shoulders_close_and_open(pad):
    gamepad = Gamepad(device=pad.path)
    pad.says(BUTTON, 4, 1)
    assert gamepad.read().gripper == -1
    pad.says(BUTTON, 4, 0)
    pad.says(BUTTON, 5, 1)
    assert gamepad.read().gripper == 1
    assert gamepad.read().is_active()
    pad.says(BUTTON, 5, 0)
    assert gamepad.read().gripper == 0
    gamepad.close()


@pytest.mark.parametrize(("button", "mark"), [(0, "success"), (1, "failure"), (2, "stop"), (3, "stop")])
def test_a_press_is_one_mark(pad, button, mark):
    gamepad = Gamepad(device=pad.path)
    pad.says(BUTTON | INITIAL, button, 1)
    assert gamepad.read().mark == ""  # held down while it was plugged in: nobody said anything
    pad.says(BUTTON, button, 1)
    assert [gamepad.read().mark, gamepad.read().mark] == [mark, ""]
    pad.says(BUTTON, button, 0)
    assert gamepad.read().mark == ""
    gamepad.close()


def test_a_stop_is_not_taken_back_by_the_next_button(pad):
    gamepad = Gamepad(device=pad.path)
    pad.says(BUTTON, 2, 1)
    pad.says(BUTTON, 0, 1)
    assert gamepad.read().mark == "stop"
    gamepad.close()


def test_the_state_at_the_beginning_and_events_in_pieces(pad):
    gamepad = Gamepad(device=pad.path)
    pad.says(AXIS | INITIAL, LEFT_Y, FULL)
    assert gamepad.read().motion[0] == 1
    event = EVENT.pack(1, -32768, AXIS, LEFT_Y)
    pad.write(event[:3])
    assert gamepad.read().motion[0] == 1
    pad.write(event[3:])
    assert gamepad.read().motion[0] == -1  # no farther than −1
    gamepad.close()


def test_a_pad_that_is_gone_is_told(pad, tmp_path):
    gamepad = Gamepad(device=pad.path)
    gamepad.read()
    pad.unplug()
    with pytest.raises(TeleopError, match="was lost"):
        gamepad.read()
    gamepad.close()
    gamepad.close()
    with pytest.raises(TeleopError, match=r"no gamepad at .*js7 .*modprobe joydev"):
        Gamepad(device=str(tmp_path / "js7"))
    with pytest.raises(TeleopError, match="not beside"):
        Gamepad("beside", pad.path)


def test_devices_have_names(pad):
    with pytest.raises(TeleopError, match="'mouse'; there are spacemouse, keyboard, gamepad"):
        open_operator("mouse")
    operator = open_operator("gamepad", {"device": pad.path, "stands": "behind"})
    pad.says(AXIS, LEFT_Y, -FULL)
    assert operator.read().motion[0] == 1
    operator.close()
    with pytest.raises(TeleopError, match="the gamepad does not know speed; it knows stands, device, dead_zone"):
        open_operator("gamepad", {"speed": 2.0})
