"""`python -m rlinf collect`: a person's demonstrations in the environment of a recipe."""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
from pathlib import Path
from typing import TextIO

from rlinf.core.errors import ConfigError
from rlinf.envs.realworld.config import RealWorldConfig
from rlinf.launch.cli.record import LEROBOT_OPTIONS
from rlinf.launch.collect import CollectOptions, collect
from rlinf.launch.config import Root
from rlinf.launch.controls import operator_keys
from rlinf.launch.parse import load_config
from rlinf.launch.record_lerobot import DatasetOptions

MAX_FAILED_SCRIPTS = 20
"""A scripted operator that fails so often in a row will not learn it."""


def run(chosen: argparse.Namespace, recipe: str, config_dir: Path) -> None:
    """Collect as `options.add_collection_options` says, and print what is there in the end. Raises RlinfError."""
    given = [name for name in LEROBOT_OPTIONS if getattr(chosen, name) is not None]
    if chosen.format == "demos" and given:
        raise ConfigError(f"--{given[0]} needs --format lerobot or --format both")
    for name in ("episodes", "keep_idle"):
        if getattr(chosen, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
    config = load_config(recipe, chosen.overrides, config_dir)
    operator = chosen.operator
    if isinstance(config.env.train, RealWorldConfig):
        config = load_config(recipe, [*cell_overrides(operator, chosen.noise), *chosen.overrides], config_dir)
        operator = None  # the cell asks its operator itself
        if getattr(config.env.train, "teleop", "none") == "none":
            raise ConfigError("nobody would move the robot: say --operator spacemouse, keyboard, gamepad or scripted")
    elif operator is None:
        raise ConfigError("say who moves the robot: --operator spacemouse, keyboard, gamepad or scripted")
    demos, dataset = folders(chosen, recipe, config)
    options = CollectOptions(
        operator=operator,
        episodes=chosen.episodes,
        demos=demos,
        dataset=dataset,
        lerobot=DatasetOptions(
            fps=chosen.fps,
            pictures=chosen.pictures or "video",
            task=chosen.task,
            robot_type=chosen.robot,
            codec=chosen.codec or "h264",
        ),
        only_successes=not chosen.all,
        keep_idle=chosen.keep_idle,
        checkpoint=chosen.checkpoint,
        noise_std=chosen.noise,
        patience=MAX_FAILED_SCRIPTS if chosen.operator == "scripted" else None,
    )
    line = StatusLine(sys.stdout)
    if chosen.operator == "keyboard":
        from rlinf.envs.realworld.teleop.keyboard import HELP

        line.note(HELP)
    if isinstance(config.env.train, RealWorldConfig):
        line.note(config.env.train.describe())
    with operator_keys(config, line, here=True):
        tally = collect(config, options, line)
    line.note(f"this session: {tally}")
    for folder in (demos, dataset):
        if folder is not None:
            line.note(f"{folder}: to look at it: python -m rlinf demos {folder}")


def cell_overrides(operator: str | None, noise_std: float = 0.0) -> list[str]:
    """What a person at a robot cell, or a script with noise, changes of its recipe."""
    if operator is None:
        return []
    if operator == "scripted":
        noise = [f"env.train.teleop_options={{noise_std: {noise_std:g}}}"] if noise_std else []
        return ["env.train.teleop=scripted", *noise]
    # A person cannot keep up with simulated time.
    return [f"env.train.teleop={operator}", "env.train.pace=realtime"]


def folders(chosen: argparse.Namespace, recipe: str, config: Root) -> tuple[str | None, str | None]:
    """Where demonstrations and data set go; None for a form that is not asked for."""
    demo_buffer = getattr(config.algorithm, "demo_buffer", None)  # PPO has none
    demos = demo_buffer.load_path if demo_buffer else "demos"
    dataset = f"datasets/{recipe}"
    if chosen.output is not None:
        both = chosen.format == "both"
        demos, dataset = (f"{chosen.output}/{part}" if both else chosen.output for part in ("demos", "lerobot"))
    return demos if chosen.format != "lerobot" else None, dataset if chosen.format != "demos" else None


class StatusLine:
    """Lines that stay, and below them, on a terminal, one that changes. May be used from several threads."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._live, self._shown = stream, stream.isatty(), False
        self._lock = threading.Lock()

    def note(self, text: str) -> None:
        """A line that stays."""
        with self._lock:
            self._wipe()
            print(text, file=self._stream, flush=True)

    def keys(self, text: str) -> None:
        """Which keys do what; empty: none do any more."""
        if text:
            self.note(text)

    def status(self, text: str) -> None:
        """The line that changes; nothing without a terminal."""
        if self._live:
            width = shutil.get_terminal_size((80, 24)).columns
            with self._lock:
                self._wipe()
                self._stream.write(text[: width - 1])
                self._stream.flush()
                self._shown = True

    def _wipe(self) -> None:
        if self._shown:
            self._stream.write("\r\x1b[2K")
            self._shown = False
