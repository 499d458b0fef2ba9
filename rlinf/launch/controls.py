"""What the keys of the terminal do while a robot cell is trained."""

from __future__ import annotations

import getpass
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rlinf.core.desk import DESK
from rlinf.core.errors import RlinfError
from rlinf.envs.realworld.config import RealWorldConfig
from rlinf.launch.config import Root
from rlinf.metrics.keys import TerminalKeys

HELP = "s success   f failure   Space stop   c, then y: clear the stop   Ctrl-C end"
SURE_S = 5.0
"""A person who means to clear a stop says so within this time."""


class Server(Protocol):
    """A robot server, for a person."""

    def stop(self, reason: str) -> None:
        """Stop the arm until a person clears it."""
        ...

    def recover(self) -> None:
        """Clear the stop in the person's name."""
        ...


class Teller(Protocol):
    """Shows a person what happened, and which keys there are."""

    def note(self, text: str) -> None:
        """A line."""
        ...

    def keys(self, text: str) -> None:
        """Which keys there are."""
        ...


class Controls:
    """Keys → what they do.

    Args:
        say: leaves a word at the desk.
        server: of the robot, None where the arm is moved by this process.
        note: shows a line.
        clock: seconds.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        server: Server | None,
        note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._server, self._note, self._clock = say, server, note, clock
        self._asked_s = -SURE_S

    def press(self, key: str) -> None:
        """What a key does. Clearing a stop takes two, one after the other."""
        sure = key == "y" and self._clock() - self._asked_s < SURE_S
        self._asked_s = -SURE_S
        if key == "s":
            self._say("success")
        elif key == "f":
            self._say("failure")
        elif key == " ":
            self._stop()
        elif key == "c":
            self._ask()
        elif sure:
            self._clear()

    def _stop(self) -> None:
        self._say("stop")
        self._note("STOP: the arm is held where it is; c, then y, clears it")
        self._with_server("stop", lambda server: server.stop("the operator pressed stop"))

    def _ask(self) -> None:
        if self._server is None:
            self._note("there is no robot server to clear a stop at: a simulated arm is cleared by the next episode")
            return
        self._asked_s = self._clock()
        self._note(f"clear the stop? Look at the arm; if it may move, press y within {SURE_S:.0f} s")

    def _clear(self) -> None:
        self._with_server("clear", lambda server: server.recover(), "the stop is cleared")

    def _with_server(self, what: str, act: Callable[[Server], None], done: str = "") -> None:
        """In a thread: an answer may take a second, and the next key may be the stop."""
        server = self._server
        if server is None:
            return

        def run() -> None:
            try:
                act(server)
                if done:
                    self._note(done)
            except RlinfError as error:
                self._note(f"{what}: {error}")

        threading.Thread(target=run, name=what, daemon=True).start()


@contextmanager
def operator_keys(config: Root, teller: Teller) -> Iterator[None]:
    """Keys while a robot cell is trained from a terminal; nothing elsewhere, or where the operator's device is it."""
    env = config.env.train
    if not isinstance(env, RealWorldConfig) or env.teleop == "keyboard":
        yield
        return
    controls = Controls(lambda word: DESK.say(word, time.monotonic()), server_of(env), teller.note)
    try:
        keys = TerminalKeys(controls.press)
    except OSError:
        yield
        return
    try:
        teller.keys(HELP)
        yield
    finally:
        teller.keys("")
        keys.close()


class RobotServer:
    """The robot server of a cell, for the person at this terminal.

    Stopping takes the token that every request carries, clearing the operator's, where the terminal has been given one.
    """

    def __init__(self, url: str) -> None:
        from rlinf.envs.realworld.arms.serl_http import SerlHttpArm
        from rlinf.envs.realworld.server.run import OPERATOR_TOKEN, TOKEN

        token, person = os.environ.get(TOKEN, ""), f"{getpass.getuser()} at the training terminal"
        self._stops = SerlHttpArm(url, token)
        self._clears = SerlHttpArm(url, os.environ.get(OPERATOR_TOKEN) or token, person=person)

    def stop(self, reason: str) -> None:
        """As `Server.stop`."""
        self._stops.stop(reason)

    def recover(self) -> None:
        """As `Server.recover`."""
        self._clears.recover()


def server_of(env: RealWorldConfig) -> Server | None:
    """The robot server of a cell; None where the arm is moved by this process."""
    return RobotServer(env.override_cfg.server_url()) if env.override_cfg.driver == "serl_http" else None
