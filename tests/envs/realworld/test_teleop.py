"""The operator's devices and the rule of taking over."""

import os
import pty
import struct
import threading
import time

import numpy as np
import pytest

from rlinf.core.errors import MissingDependency
from rlinf.envs.realworld import frames
from rlinf.envs.realworld.arms.fake import FakeArm
from rlinf.envs.realworld.safety import SafetyGate
from rlinf.envs.realworld.teleop import spacemouse
from rlinf.envs.realworld.teleop.keyboard import KEY_HOLD_S, Keyboard
from rlinf.envs.realworld.teleop.operator import Command, ScriptedOperator, Takeover, TeleopError
from rlinf.envs.realworld.teleop.spacemouse import BEHIND, FACING, Puck, SpaceMouse, after_report, command_of
from tests.envs.realworld.cell import LIMITS, Clock, pose


def motion(*values):
    return Command(np.array([*values, *[0.0] * (6 - len(values))]))


STILL, RIGHT = motion(0), motion(0, 1)


# ---- taking over


def test_the_person_acts_while_moving_and_half_a_second_after():
    takeover = Takeover(hold_s=0.5)
    decided = [takeover.decide(RIGHT if 3 <= k < 6 else STILL, k / 10) for k in range(14)]
    assert [d is None for d in decided] == [True] * 3 + [False] * 7 + [True] * 4
    assert [bool(d.any()) for d in decided[3:10]] == [True] * 3 + [False] * 4
    np.testing.assert_array_equal(decided[3], [0, 1, 0, 0, 0, 0])


def test_a_new_episode_lets_go():
    takeover = Takeover()
    takeover.decide(RIGHT, 0.0)
    takeover.reset()
    assert takeover.decide(STILL, 0.1) is None


def test_the_gripper_alone_is_an_intervention_and_has_its_place_in_the_action():
    decided = Takeover(action_dim=7).decide(Command(np.zeros(6), gripper=-1.0), 0.0)
    np.testing.assert_array_equal(decided, [0, 0, 0, 0, 0, 0, -1])
    assert Takeover().decide(motion(1e-4), 0.0) is None


def test_a_scripted_operator_drives_an_arm_through_the_gate():
    clock = Clock()
    arm, gate, goal = FakeArm(clock=clock), SafetyGate(LIMITS), pose(0.54, -0.03, 0.15)
    gate.start(arm.state(), clock())
    operator = ScriptedOperator(
        lambda: Command(np.append(np.clip((goal - arm.state().pose)[:3] / 0.02, -1, 1), [0, 0, 0]))
    )
    takeover = Takeover()
    for _ in range(60):
        decided = takeover.decide(operator.read(), clock())
        if decided is None:
            break
        state = arm.state()
        wish = frames.moved(state.pose, decided * np.repeat((0.02, 0.1), 3))
        assert gate.submit(wish, state, clock()).accepted
        arm.set_target_pose(gate.target(state, clock()))
        clock.advance(0.1)
    assert decided is None  # it is there, and has let go
    np.testing.assert_allclose(arm.state().pose[:3], goal[:3], atol=1e-3)


# ---- SpaceMouse


def report(number, *values):
    return bytes([number]) + struct.pack(f"<{len(values)}h", *values)


def test_reports_of_old_and_new_devices():
    puck = after_report(Puck(), report(1, 350, -175, 0))
    assert puck == Puck(linear=(1.0, -0.5, 0.0))
    puck = after_report(puck, report(2, 0, 700, -350))
    assert puck == Puck((1.0, -0.5, 0.0), (0.0, 1.0, -1.0))  # never beyond 1
    assert after_report(Puck(), report(1, 0, 0, 35, 0, 0, 70)) == Puck((0, 0, 0.1), (0, 0, 0.2))
    assert after_report(Puck(), bytes([3, 2, 0])).buttons == 2
    for nonsense in (b"", b"\x01", b"\x01\x00", b"\x17\x01\x02\x03", b"\x02\x00\x00"):
        assert after_report(puck, nonsense) == puck


@pytest.mark.parametrize(
    ("axes", "linear", "moves"),
    [
        (FACING, (0, 1, 0), [1, 0, 0]),  # pulled towards oneself
        (FACING, (1, 0, 0), [0, 1, 0]),  # to the right
        (FACING, (0, 0, -1), [0, 0, 1]),  # lifted
        (BEHIND, (0, -1, 0), [1, 0, 0]),  # pushed away
        (BEHIND, (-1, 0, 0), [0, 1, 0]),  # to the left
        (BEHIND, (0, 0, -1), [0, 0, 1]),
    ],
)
def test_the_hand_moves_the_arm_the_way_the_person_sees_it(axes, linear, moves):
    np.testing.assert_array_equal(command_of(Puck(linear=linear), axes, 0.05).motion[:3], moves)
    np.testing.assert_array_equal(command_of(Puck(angular=linear), axes, 0.05).motion[3:], moves)
    assert np.linalg.det(axes) == pytest.approx(1)  # a turn: rotations keep their sense


def test_small_deflections_and_buttons():
    command = command_of(Puck((0.04, 0.06, 0), buttons=1), FACING, 0.05)
    np.testing.assert_allclose(command.motion, [0.06, 0, 0, 0, 0, 0])
    assert command.gripper == -1 and command_of(Puck(buttons=2), FACING, 0.05).gripper == 1


class Device:
    """Stands in for hidapi's."""

    def __init__(self):
        self.reports, self.gone, self.closed = [], threading.Event(), False

    def read(self, size, timeout_ms):
        if self.gone.is_set():
            raise OSError("read error")
        if self.reports:
            return list(self.reports.pop(0))
        time.sleep(0.005)
        return []

    def close(self):
        self.closed = True


def wait_until(condition):
    deadline = time.monotonic() + 3
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_silent_device_counts_as_released_and_a_lost_one_is_said():
    device = Device()
    mouse = SpaceMouse(device=device)
    assert not mouse.read().is_active()
    device.reports.append(report(1, 0, 350, 0))
    wait_until(lambda: mouse.read().motion[0] == 1)
    time.sleep(spacemouse.SILENCE_S + 0.05)
    assert not mouse.read().is_active()  # a radio link that broke must not move an arm
    device.gone.set()
    wait_until(lambda: mouse._lost)
    with pytest.raises(TeleopError, match=r"was lost \(read error\)"):
        mouse.read()
    mouse.close()
    mouse.close()
    assert device.closed


def test_a_spacemouse_that_is_not_there(monkeypatch):
    import types

    found = []
    hid = types.SimpleNamespace(enumerate=lambda vendor, product: [e for e in found if e["vendor_id"] == vendor])
    monkeypatch.setitem(__import__("sys").modules, "hid", hid)
    found.append({"vendor_id": 0x046D, "product_id": 0xC52F, "path": b"receiver of a usual mouse"})
    with pytest.raises(TeleopError, match="no SpaceMouse is plugged in"):
        SpaceMouse()

    def refuse(path):
        raise OSError("open failed")

    hid.device = lambda: types.SimpleNamespace(open_path=refuse)
    found.append({"vendor_id": 0x256F, "product_id": 0xC635, "path": b"1", "product_string": "SpaceMouse Compact"})
    with pytest.raises(TeleopError, match=r"SpaceMouse Compact may not be opened .*udev"):
        SpaceMouse()
    monkeypatch.setitem(__import__("sys").modules, "hid", None)
    with pytest.raises(MissingDependency, match="run `pip install hidapi`"):
        SpaceMouse()
    with pytest.raises(TeleopError, match="not above"):
        SpaceMouse(stands="above")


# ---- keyboard


@pytest.fixture
def keys():
    person, terminal = pty.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as file:
        clock = Clock()
        board = Keyboard(speed=0.5, file=file, clock=clock)
        yield board, clock, lambda text: os.write(person, text.encode())
        board.close()
        board.close()
    os.close(person)


def read_something(board):
    deadline = time.monotonic() + 3
    while True:
        command = board.read()
        if command.is_active() or command.mark:
            return command
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_keys_move_as_long_as_they_are_held(keys):
    board, clock, press = keys
    assert not board.read().is_active()
    press("wF")
    np.testing.assert_array_equal(read_something(board).motion, [0.5, 0, -0.5, 0, 0, 0])
    clock.advance(KEY_HOLD_S - 0.01)
    assert board.read().is_active()
    clock.advance(0.02)
    assert not board.read().is_active()


def test_keys_for_the_gripper_and_the_episode(keys):
    board, clock, press = keys
    press("g")
    assert read_something(board).gripper == -1
    clock.advance(1)
    for key, mark in (("\n", "success"), ("\x7f", "failure"), (" ", "stop")):
        press(key)
        assert read_something(board).mark == mark
        assert board.read().mark == ""  # said once


def test_a_stop_is_not_taken_back_by_the_next_key(keys):
    board, _, press = keys
    press(" \n")
    assert read_something(board).mark == "stop"


def test_without_a_terminal_there_is_no_keyboard(tmp_path):
    with (tmp_path / "file").open("w") as file, pytest.raises(TeleopError, match="needs a terminal"):
        Keyboard(file=file)
