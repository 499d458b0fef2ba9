"""What the keys of the terminal do while a robot cell is trained, or demonstrated to."""

from __future__ import annotations

import getpass
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rlinf.core.desk import DESK
from rlinf.envs.realworld.config import RealWorldConfig
from rlinf.launch.config import Root
from rlinf.metrics.keys import TerminalKeys

HELP = "s success   f failure   Space stop   c, then y: clear the stop   Ctrl-C end"
HELP_ELSEWHERE = "Space stop   c, then y: clear the stop   Ctrl-C end"
"""Where the environment does not hear this terminal."""
NOT_STOPPED = "NOT STOPPED by its server: use the robot's own stop"
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
        say: leaves a word at the desk; None where the environment is in another process.
        server: of the robot; None where there is none, or none is known.
        note: shows a line.
        clock: seconds.
    """

    def __init__(
        self,
        say: Callable[[str], None] | None,
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
        if key in ("s", "f"):
            if self._say is not None:
                self._say("success" if key == "s" else "failure")
        elif key == " ":
            self._stop()
        elif key == "c":
            self._ask()
        elif sure:
            self._clear()

    def _stop(self) -> None:
        if self._say is not None:
            self._say("stop")
        if self._server is None:
            self._note("stop asked: the environment holds the arm in its next step, and says so")
            return
        self._note("stop asked…")
        self._with_server(
            lambda server: server.stop("the operator pressed stop"),
            "stopped: the arm is held where it is; c, then y, clears it",
            NOT_STOPPED,
        )

    def _ask(self) -> None:
        if self._server is None:
            self._note(
                "there is no robot server to clear a stop at: a simulated arm is cleared by the next episode, a robot "
                "is looked at and the run begun again"
            )
            return
        self._asked_s = self._clock()
        self._note(f"clear the stop? Look at the arm; if it may move, press y within {SURE_S:.0f} s")

    def _clear(self) -> None:
        self._with_server(lambda server: server.recover(), "the stop is cleared", "the stop is not cleared")

    def _with_server(self, act: Callable[[Server], None], done: str, failed: str) -> None:
        """In a thread: an answer may take a second, and the next key may be the stop."""
        server = self._server
        if server is None:
            return

        def run() -> None:
            try:
                act(server)
            except Exception as error:  # whatever it is, the person must learn that it was not done
                self._note(f"{failed} ({error})")
            else:
                self._note(done)

        threading.Thread(target=run, name="robot server", daemon=True).start()


@contextmanager
def operator_keys(config: Root, teller: Teller, *, here: bool) -> Iterator[None]:
    """Keys while a robot cell is moved from a terminal by the clock.

    There are none elsewhere, where the operator's device is the terminal, and where a key would reach nobody.

    Args:
        config: of the run.
        teller: shows what the keys did.
        here: whether environments are in this process: then the one that there is hears the keys.
    """
    env = config.env.train
    if not isinstance(env, RealWorldConfig) or env.teleop == "keyboard" or not env.paced_by_clock():
        yield
        return
    here = here and env.total_num_envs == 1  # of several, nobody could say which is meant
    server = server_of(env)
    if server is None and not here:
        yield
        return
    say = (lambda word: DESK.say(word, time.monotonic())) if here else None
    controls = Controls(say, server, teller.note)
    try:
        keys = TerminalKeys(controls.press)
    except OSError:
        yield
        return
    try:
        teller.keys(HELP if here else HELP_ELSEWHERE)
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
    """The robot server of a cell; None where the arm is moved by this process, or only its own machine knows where."""
    url = env.override_cfg.server_url() if env.override_cfg.driver == "serl_http" else ""
    return RobotServer(url) if url else None
