"""LeRobot data sets that a recipe names: recorded where they are missing, opened, measured for normalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlinf.core.errors import ConfigError
from rlinf.data.lerobot.chunks import LeRobotChunks
from rlinf.data.lerobot.layout import INFO_FILE, find_root, read_info
from rlinf.launch.record import expert_stage
from rlinf.launch.record_lerobot import DatasetOptions, record_episodes
from rlinf.launch.sft_config import DatasetConfig, SourcesConfig
from rlinf.models.embodiment.openpi.dataconfig import DataConfig
from rlinf.models.embodiment.openpi.norm_stats import NormStats, mixed_norm_stats
from rlinf.models.embodiment.openpi.transforms import DeltaActions, pad_to, resize_with_pad


def open_datasets(
    sources: SourcesConfig, robot: DataConfig, policy_setup: str | None, note: Callable[[str], None]
) -> dict[str, LeRobotChunks]:
    """All data sets by name, their pictures at the size of the model's.

    Raises DataError naming file and feature where one is missing, damaged or of another robot.
    """
    assert sources.datasets is not None
    for name, part in sources.datasets.items():
        if part.record is not None:
            _record(name, part, policy_setup, note)
    roots = {name: find_root(part.path) for name, part in sources.datasets.items()}
    frames = {name: max(1, read_info(root).total_frames) for name, root in roots.items()}
    size = robot.model.vision.image_size
    opened = {}
    for name, part in sources.datasets.items():
        opened[name] = chunks = LeRobotChunks(
            roots[name],
            _columns(name, robot, part),
            robot.model.action_horizon,
            action_dim=robot.action_dim,
            episodes=None if part.num_episodes is None else range(part.num_episodes),
            resize=partial(resize_with_pad, height=size, width=size),
            cache_bytes=int(sources.cache_gb * 1e9 * frames[name] / sum(frames.values())),
            num_threads=sources.num_threads,
        )
        weight = "" if part.weight is None else f", weight {part.weight:g}"
        note(f"{name}: {chunks.num_episodes} episodes, {len(chunks)} frames of {part.path}{weight}")
    return opened


def shares_of(sources: SourcesConfig) -> list[float] | None:
    """How often each data set is drawn from; None for as often as it has frames."""
    weights = [part.weight for part in (sources.datasets or {}).values()]
    return [weight for weight in weights if weight is not None] or None


def norm_stats_of(
    robot: DataConfig, datasets: Sequence[LeRobotChunks], shares: Sequence[float] | None
) -> dict[str, NormStats]:
    """Statistics of states and actions, as the robot's pipeline normalises them, in the proportions of training.

    Actions are those that chunks hold, relative to the state where the robot's are; none behind an episode's end.
    """
    states, actions = [], []
    for data in datasets:
        state, action = _rows(robot, data)
        states.append(state)
        actions.append(action)
    return {"state": mixed_norm_stats(states, shares), "actions": mixed_norm_stats(actions, shares)}


def _rows(robot: DataConfig, data: LeRobotChunks) -> tuple[Tensor, Tensor]:
    vectors, action, valid = data.numbers(np.arange(len(data)))
    state = vectors["state"]
    if robot.delta_mask is None:
        action, valid = action[:, :1], valid[:, :1]  # all others are the first of another chunk
    else:
        action = DeltaActions(robot.delta_mask)({"state": state, "actions": action})["actions"]
    size = robot.model.action_dim
    action = action[valid]
    return (pad_to(state, size), pad_to(action, size)) if robot.pad_first else (state, action)


def _columns(name: str, robot: DataConfig, part: DatasetConfig) -> Mapping[str, str]:
    if strange := sorted(part.columns.keys() - robot.columns.keys()):
        raise ConfigError(
            f"data.datasets.{name}.columns: {robot.name} has no {strange[0]!r}; it has {', '.join(robot.columns)}"
        )
    return {**robot.columns, **part.columns}


def _record(name: str, part: DatasetConfig, policy_setup: str | None, note: Callable[[str], None]) -> None:
    wanted = part.record
    assert wanted is not None
    root = Path(part.path).expanduser()
    if (root / INFO_FILE).is_file() and read_info(root).total_episodes >= wanted.episodes:
        return
    note(f"{name}: {wanted.episodes} episodes are to be recorded into {root}")
    section = wanted.env.model_copy(update={"auto_reset": False})
    with expert_stage(section, policy_setup, wanted.noise) as (env, expert):
        record_episodes(
            section,
            env,
            expert,
            root,
            DatasetOptions(pictures=wanted.pictures),
            episodes=wanted.episodes,
            policy_setup=policy_setup,
            seed=wanted.seed,
            only_successes=wanted.only_successes,
            note=note,
        )


def same_stats(one: Mapping[str, NormStats], other: Mapping[str, NormStats]) -> bool:
    """Whether two sets of statistics hold the same numbers."""

    def equal(a: NormStats, b: NormStats) -> bool:
        return all(
            (x is None) == (y is None) and (x is None or y is None or torch.equal(x, y))
            for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
        )

    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
