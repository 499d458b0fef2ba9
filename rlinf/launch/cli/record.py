"""`python -m rlinf record`: demonstrations from the training environments of a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlinf.core.errors import ConfigError
from rlinf.launch.config import Root
from rlinf.launch.parse import load_config

LEROBOT_OPTIONS = ("fps", "pictures", "codec", "task", "robot")


def run(chosen: argparse.Namespace, recipe: str, config_dir: Path) -> None:
    """Record as `options.add_recording_options` says, and print what is there in the end. Raises RlinfError."""
    given = [name for name in LEROBOT_OPTIONS if getattr(chosen, name) is not None]
    if chosen.format != "lerobot" and given:
        raise ConfigError(f"--{given[0]} needs --format lerobot")
    for name in ("episodes", "fps"):
        if getattr(chosen, name) is not None and getattr(chosen, name) < 1:
            raise ConfigError(f"--{name} must be at least 1")
    config = load_config(recipe, chosen.overrides, config_dir)
    print((_record_lerobot if chosen.format == "lerobot" else _record_demos)(chosen, recipe, config), flush=True)


def _note(text: str) -> None:
    print(text, flush=True)


def _record_demos(chosen: argparse.Namespace, recipe: str, config: Root) -> str:
    from rlinf.launch.record import record

    demo_buffer = getattr(config.algorithm, "demo_buffer", None)  # PPO has none
    output = chosen.output or (demo_buffer.load_path if demo_buffer else "demos")
    meta = record(
        config,
        output,
        episodes=chosen.episodes,
        checkpoint=chosen.checkpoint,
        noise_std=chosen.noise,
        only_successes=not chosen.all,
        note=_note,
    )
    return f"{output}: {meta.num_episodes} episodes, {meta.num_successes} of them successful"


def _record_lerobot(chosen: argparse.Namespace, recipe: str, config: Root) -> str:
    from rlinf.launch.record_lerobot import DatasetOptions, record_dataset

    output = chosen.output or f"datasets/{recipe}"
    options = DatasetOptions(
        fps=chosen.fps,
        pictures=chosen.pictures or "video",
        task=chosen.task,
        robot_type=chosen.robot,
        codec=chosen.codec or "h264",
    )
    recorded = record_dataset(
        config,
        output,
        options,
        episodes=chosen.episodes,
        checkpoint=chosen.checkpoint,
        noise_std=chosen.noise,
        only_successes=not chosen.all,
        note=_note,
    )
    held = f"{recorded.num_episodes} episodes, {recorded.num_frames} frames"
    return f"{output}: {held}; to look at it: python -m rlinf dataset info {output}"
