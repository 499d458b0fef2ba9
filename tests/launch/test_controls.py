"""The operator's keys, and what they reach."""

import os
import pty
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rlinf.core.desk import MAX_AGE_S, Desk
from rlinf.core.errors import ConfigError, RlinfError
from rlinf.envs.realworld.config import RealWorldConfig
from rlinf.envs.realworld.env import make
from rlinf.envs.realworld.teleop.at_desk import AtDesk
from rlinf.envs.realworld.teleop.operator import Command, ScriptedOperator
from rlinf.launch.controls import NOT_STOPPED, SURE_S, Controls, RobotServer, server_of
from rlinf.launch.parse import load_config
from rlinf.metrics.keys import TerminalKeys


class Robot:
    """A robot server that remembers what it was told."""

    def __init__(self, problem: str = "") -> None:
        self.told, self.problem = [], problem

    def stop(self, reason: str) -> None:
        self._take("stop")

    def recover(self) -> None:
        self._take("recover")

    def _take(self, what: str) -> None:
        if self.problem:
            raise RlinfError(self.problem)
        self.told.append(what)


def soon(what) -> bool:
    deadline = time.monotonic() + 5
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(what())


def controls(robot=None):
    said, notes, now = [], [], [100.0]
    return Controls(said.append, robot, notes.append, lambda: now[0]), said, notes, now


def test_keys_say_how_it_went():
    panel, said, notes, _ = controls()
    for key in "sfxQ":
        panel.press(key)
    assert said == ["success", "failure"] and not notes


def test_space_stops_at_once_by_both_ways():
    robot = Robot()
    panel, said, notes, _ = controls(robot)
    panel.press(" ")
    assert said == ["stop"] and notes[0] == "stop asked…"
    assert soon(lambda: robot.told == ["stop"] and notes[-1].startswith("stopped: the arm is held"))
    deaf = Robot("no answer from the robot server")
    panel, said, notes, _ = controls(deaf)
    panel.press(" ")
    assert said == ["stop"]
    assert soon(lambda: notes[-1] == f"{NOT_STOPPED} (no answer from the robot server)")
    panel, said, notes, _ = controls()
    panel.press(" ")
    assert said == ["stop"] and notes == ["stop asked: the environment holds the arm in its next step, and says so"]


def test_a_stop_is_cleared_on_purpose_only():
    robot = Robot()
    panel, _, notes, now = controls(robot)
    for keys in ("y", "cc", "csy", "c y", "cfy"):
        for key in keys:
            panel.press(key)
    panel.press("c")
    now[0] += SURE_S + 0.1
    panel.press("y")
    time.sleep(0.1)
    assert "recover" not in robot.told
    panel.press("c")
    assert notes[-1].startswith("clear the stop?")
    now[0] += SURE_S - 0.1
    panel.press("y")
    assert soon(lambda: robot.told.count("recover") == 1)
    assert soon(lambda: notes[-1] == "the stop is cleared")
    panel.press("y")
    time.sleep(0.1)
    assert robot.told.count("recover") == 1


def test_without_a_server_there_is_nothing_to_clear():
    panel, _, notes, _ = controls()
    panel.press("c")
    panel.press("y")
    assert len(notes) == 1 and notes[0].startswith("there is no robot server to clear a stop at")


def test_a_word_is_heard_once_and_while_it_is_new():
    desk = Desk()
    assert desk.hear(0.0) == ""
    desk.say("success", 0.0)
    assert [desk.hear(1.0), desk.hear(1.0)] == ["success", ""]
    desk.say("success", 0.0)
    assert desk.hear(MAX_AGE_S + 0.1) == ""
    desk.say("stop", 0.0)
    desk.say("success", 0.1)
    assert desk.hear(100.0) == "stop"  # however late


def test_what_is_said_at_the_terminal_is_the_operators_mark():
    desk, moving = Desk(), Command(np.ones(6), 1.0)
    operator = AtDesk(ScriptedOperator(lambda: moving), desk, lambda: 0.0)
    desk.say("failure", 0.0)
    first, second = operator.read(), operator.read()
    assert (first.mark, second.mark) == ("failure", "")
    np.testing.assert_array_equal(first.motion, 1)
    desk.say("success", 0.0)
    assert AtDesk(ScriptedOperator(lambda: Command(np.zeros(6), mark="stop")), desk, lambda: 0.0).read().mark == "stop"
    nobody = AtDesk(None, desk, lambda: 0.0)
    assert not nobody.read().is_active()
    nobody.close()


def test_a_word_ends_the_episode_of_a_cell():
    import torch

    desk = Desk()
    env = make(
        RealWorldConfig(override_cfg={"driver": "fake"}), num_envs=1, seed=0, control_mode=None, num_workers=0,
        render=False,
    )  # fmt: skip
    env._simulator.operator = AtDesk(None, desk)
    env.reset(seed=0)
    still = torch.zeros(1, 1, 6)
    assert not bool(env.step(still).done)
    desk.say("failure", time.monotonic())
    step = env.step(still)
    assert bool(step.terminated.any()) and not bool(step.info["episode/success_once"])
    assert not bool(step.intervened.any())
    env.close()


# ---- the terminal


def test_keys_are_read_while_something_else_goes_on():
    import termios

    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    pressed: list[str] = []
    with open(slave, "rb", buffering=0, closefd=False) as terminal:
        keys = TerminalKeys(pressed.append, terminal)
        os.write(master, b"s ")
        assert soon(lambda: pressed == ["s", " "])
        os.write(master, b"c")
        assert soon(lambda: pressed == ["s", " ", "c"])  # no Enter needed
        keys.close()
        keys.close()
    assert termios.tcgetattr(slave) == before
    assert not any(thread.name == "keys" for thread in threading.enumerate())
    os.close(master)
    os.close(slave)


def test_a_key_that_fails_does_not_take_the_others_with_it(caplog):
    master, slave = pty.openpty()
    pressed: list[str] = []

    def press(key: str) -> None:
        if key == "x":
            raise ValueError("no such thing")
        pressed.append(key)

    with open(slave, "rb", buffering=0, closefd=False) as terminal:
        keys = TerminalKeys(press, terminal)
        os.write(master, b"x ")
        assert soon(lambda: pressed == [" "])
        os.close(master)  # and the terminal goes away
        os.close(slave)
        keys.close()
    assert "no such thing" in caplog.text


def test_no_terminal_no_keys(tmp_path):
    with open(tmp_path / "file", "w+") as file, pytest.raises(OSError, match="no terminal"):
        TerminalKeys(print, file)


# ---- keys of another set-up

RECIPES = Path(__file__).parents[2] / "examples/embodiment/config"


def test_other_spellings_of_a_cells_keys_are_taken_or_answered():
    cell, buffer = "env.train.override_cfg", "algorithm.demo_buffer"
    given = [f"{cell}.max_num_steps=50", "env.train.no_gripper=False"]
    train = load_config("realworld_rlpd_cnn", given, RECIPES, has_gpu=lambda: False).env.train
    assert (train.max_episode_steps, train.override_cfg.no_gripper, train.override_cfg.driver) == (50, False, "twin")
    dummy = [f"{cell}.is_dummy=True", f"{cell}.cameras=null"]
    assert (
        load_config("realworld_rlpd_cnn", dummy, RECIPES, has_gpu=lambda: False).env.train.override_cfg.driver == "fake"
    )
    for key, said in {
        f"{cell}.is_dummy=False": "remove the key",
        f"{cell}.camera_serials=[1]": "driver: realsense",
        f"{buffer}.cache_size=20": "algorithm.demo_buffer.capacity",
        f"{buffer}.sample_window_size=20": "algorithm.demo_buffer.capacity",
        f"{buffer}.min_buffer_size=1": "replay_buffer.min_buffer_size",
        f"{buffer}.auto_save=True": "load_path",
        "env.train.use_spacemouse=True": "teleop: spacemouse",
        "env.train.keyboard_reward_wrapper=single_stage": "reward: keyboard",
    }.items():
        with pytest.raises(ConfigError) as error:
            load_config("realworld_rlpd_cnn", [key], RECIPES, has_gpu=lambda: False)
        assert said in str(error.value) and key.split("=")[0] in str(error.value)


# ---- with our server


def test_a_server_is_stopped_and_cleared_with_the_right_tokens(monkeypatch):
    assert server_of(RealWorldConfig(override_cfg={"driver": "fake"})) is None
    asked: list[tuple[str, ...]] = []

    class Link:
        def __init__(self, url: str, token: str = "", timeout_s: float = 1.0) -> None:
            self.url, self.token = url, token

        def post(self, route: str, body=None, timeout_s=None) -> None:
            asked.append((route, self.token, *(body or {}).keys()))

    monkeypatch.setattr("rlinf.envs.realworld.arms.serl_http.HttpLink", Link)
    monkeypatch.setenv("RLINF_ROBOT_TOKEN", "all")
    monkeypatch.setenv("RLINF_OPERATOR_TOKEN", "person")
    server = RobotServer("http://127.0.0.1:5000")
    server.stop("x")
    server.recover()
    assert asked == [("stop", "all", "reason"), ("recover", "person", "person")]


def test_keys_while_a_cell_is_trained(reach_configs, monkeypatch):
    from rlinf.core.desk import DESK
    from rlinf.launch import controls as panel

    class Keys:
        def __init__(self, press) -> None:
            press("f")

        def close(self) -> None:
            seen.append("closed")

    class Teller:
        def note(self, text: str) -> None:
            seen.append(text)

        def keys(self, text: str) -> None:
            seen.append(text)

    config = load_config("reach", [], reach_configs, has_gpu=lambda: False)
    cell = RealWorldConfig(override_cfg={"driver": "fake"}, pace="realtime")
    monkeypatch.setattr(panel, "TerminalKeys", Keys)
    monkeypatch.delenv("RLINF_ROBOT_URL", raising=False)

    def heard(train, here=True):
        seen.clear()
        changed = {"env": config.env.model_copy(update={"train": train})}
        with panel.operator_keys(config.model_copy(update=changed), Teller(), here=here):
            pass
        return list(seen), DESK.hear(time.monotonic())

    seen: list[str] = []
    both, none = ([panel.HELP, "", "closed"], "failure"), ([], "")
    assert heard(cell) == both
    assert heard(cell.model_copy(update={"teleop": "keyboard"})) == none
    assert heard(cell.model_copy(update={"pace": "free"})) == none  # nothing hears them in simulated time
    assert heard(config.env.train) == none
    assert heard(cell, here=False) == none and heard(cell.model_copy(update={"total_num_envs": 2})) == none
    served = cell.model_copy(update={"override_cfg": cell.override_cfg.model_copy(update={"driver": "serl_http"})})
    assert heard(served) == both  # its address is not known here: no server, and no error
    assert server_of(served) is None and heard(served, here=False) == none
    monkeypatch.setenv("RLINF_ROBOT_URL", "http://127.0.0.1:5000")
    assert heard(served, here=False) == ([panel.HELP_ELSEWHERE, "", "closed"], "")


@pytest.mark.parametrize("backend", ["local", "ray"])
def test_whether_the_environment_hears_the_terminal_is_read_off_the_layout(reach_configs, monkeypatch, backend):
    """Also where the backend is `auto` and turns out to be Ray, as with an env process that is set up."""
    import contextlib

    from rlinf.launch import run
    from rlinf.launch.crew import Layout
    from rlinf.launch.processes import Venue
    from rlinf.runtime.local import LocalRuntime

    asked = []

    @contextlib.contextmanager
    def keys(config, teller, *, here):
        asked.append(here)
        yield

    class Enough(Exception):
        pass

    def enough(*arguments):
        raise Enough

    @contextlib.contextmanager
    def runtime(*arguments):
        yield LocalRuntime(), Layout(backend=backend)

    monkeypatch.setattr(run, "operator_keys", keys)
    monkeypatch.setattr(run, "open_venue", lambda config, note: contextlib.nullcontext(Venue(None)))
    monkeypatch.setattr(run, "open_runtime", runtime)
    monkeypatch.setattr(run, "build_crew", enough)
    with pytest.raises(Enough):
        run.train(load_config("reach", [], reach_configs, has_gpu=lambda: False))
    assert asked == [backend == "local"]
