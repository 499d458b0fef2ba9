"""LeRobot data sets that a recipe names: recorded where they are missing, opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlinf.core.errors import ConfigError, DataError
from rlinf.data.lerobot.layout import INFO_FILE, find_root, read_info
from rlinf.launch.record import expert_stage
from rlinf.launch.record_lerobot import DatasetOptions, record_episodes
from rlinf.launch.sft_config import DatasetConfig, SourcesConfig
from rlinf.models.embodiment.openpi.dataconfig import DataConfig
from rlinf.models.embodiment.openpi.transforms import resize_with_pad

if TYPE_CHECKING:
    from rlinf.data.lerobot.chunks import LeRobotChunks


def open_datasets(
    sources: SourcesConfig,
    robot: DataConfig,
    policy_setup: str | None,
    note: Callable[[str], None],
    *,
    may_record: bool = True,
) -> dict[str, LeRobotChunks]:
    """All data sets by name, their pictures at the size of the model's.

    Args:
        may_record: record what is missing, where the configuration says how; otherwise that is an error, too.

    Raises DataError naming file and feature where one is missing, damaged or of another robot.
    """
    from rlinf.data.lerobot.chunks import LeRobotChunks

    assert sources.datasets is not None
    for name, part in sources.datasets.items():
        if part.record is not None:
            _record(name, part, policy_setup, note, may_record)
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
            map_to=None if sources.map_to is None else Path(sources.map_to).expanduser(),
        )
        weight = "" if part.weight is None else f", weight {part.weight:g}"
        note(f"{name}: {chunks.num_episodes} episodes, {len(chunks)} frames of {part.path}{weight}")
    return opened


def shares_of(sources: SourcesConfig) -> list[float] | None:
    """How often each data set is drawn from; None for as often as it has frames."""
    weights = [part.weight for part in (sources.datasets or {}).values()]
    return [weight for weight in weights if weight is not None] or None


def _columns(name: str, robot: DataConfig, part: DatasetConfig) -> Mapping[str, str]:
    if strange := sorted(part.columns.keys() - robot.columns.keys()):
        raise ConfigError(
            f"data.datasets.{name}.columns: {robot.name} has no {strange[0]!r}; it has {', '.join(robot.columns)}"
        )
    return {**robot.columns, **part.columns}


def _record(
    name: str, part: DatasetConfig, policy_setup: str | None, note: Callable[[str], None], may_record: bool
) -> None:
    wanted = part.record
    assert wanted is not None
    try:
        root = find_root(part.path)
    except DataError:  # it is to be made
        root = Path(part.path).expanduser()
    if (root / INFO_FILE).is_file() and read_info(root).total_episodes >= wanted.episodes:
        return
    if not may_record:
        raise DataError(
            f"{name}: {root} lacks some of {wanted.episodes} episodes, which run_sft.sh records first; train with this "
            f"recipe, or take the data as they are: data.datasets.{name}.record=null"
        )
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
