"""Whether every frame of a data set can be read and is what the data set says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from rlinf.core.errors import DataError
from rlinf.data.lerobot.layout import STATS_FILE
from rlinf.data.lerobot.reader import LeRobotDataset
from rlinf.data.lerobot.tables import read_schema

BATCH = 256
TIMESTAMP_TOLERANCE_S = 1e-4


def check(root: str | Path, note: Callable[[str], None], *, num_threads: int = 1) -> list[str]:
    """What is wrong with a data set, a line each; nothing when all is well. Reads all of it.

    Args:
        note: gets a line for each camera before its pictures are unpacked.
        num_threads: so many pictures or videos are unpacked at a time.
    """
    try:
        numbers = LeRobotDataset(root, keys=_not_pictures(root))
    except DataError as problem:
        return [str(problem)]
    problems = [*_numbers(numbers), *_leftovers(numbers)]
    for key in numbers.info.keys("image", "video"):
        note(f"{key}: {len(numbers):,} pictures")
        problems += _pictures(root, key, num_threads)
    return problems


def _not_pictures(root: str | Path) -> list[str]:
    from rlinf.data.lerobot.layout import read_info

    return [key for key, feature in read_info(Path(root)).features.items() if not feature.is_picture]


def _numbers(data: LeRobotDataset) -> list[str]:
    root, info = data.meta.root, data.info
    problems = []
    if "index" in data.keys and not np.array_equal(data.column("index"), np.arange(len(data))):
        place = int((data.column("index") != np.arange(len(data))).argmax())
        problems.append(f"{root}: frame {place} has index {data.column('index')[place]}")
    late = np.abs(data.column("timestamp") - data.column("frame_index") / info.fps)
    if len(late) and late.max() > TIMESTAMP_TOLERANCE_S:
        place = int(late.argmax())
        problems.append(
            f"{root}: frame {data.column('frame_index')[place]} of episode {data.column('episode_index')[place]} has "
            f"timestamp {data.column('timestamp')[place]:.4f} s, which is no multiple of 1/{info.fps:g} s"
        )
    for key in data.keys:
        values = data.column(key)
        if isinstance(values, np.ndarray) and values.dtype.kind == "f" and not np.isfinite(values).all():
            place = int((~np.isfinite(values)).nonzero()[0][0])
            problems.append(f"{root}: {key} of frame {place} holds NaN or infinity")
    if not data.meta.stats:
        problems.append(f"{root / STATS_FILE} is missing: policies that normalise by it cannot be trained")
    absent = [key for key, f in info.features.items() if data.meta.stats and f.dtype != "string"]
    absent = [key for key in absent if key not in data.meta.stats]
    if absent:
        problems.append(f"{root / STATS_FILE} has no statistics of {', '.join(absent)}")
    return problems


def _leftovers(data: LeRobotDataset) -> list[str]:
    """Rows and files that no episode uses."""
    meta, problems = data.meta, []
    for index, file in enumerate(meta.data.files):
        expected, found = int(meta.length[meta.data.file == index].sum()), read_schema(meta.root / file)[1]
        if found != expected:
            problems.append(
                f"{meta.root / file} has {found} rows, the episodes in it {expected}: a recording was interrupted; "
                "record on, and they go"
            )
    used = set(meta.files())
    patterns = ("data/**/*.parquet", "videos/**/*.mp4", "**/*.partial")
    found_files = {path.relative_to(meta.root).as_posix() for pattern in patterns for path in meta.root.glob(pattern)}
    problems += [
        f"{meta.root / file} belongs to no episode: a recording was interrupted; record on, and it goes"
        for file in sorted(found_files - used)
    ]
    return problems


def _pictures(root: str | Path, key: str, num_threads: int) -> list[str]:
    problems: dict[str, str] = {}  # by file: of those with many only the first
    try:
        data = LeRobotDataset(root, keys=[key], num_threads=num_threads)
    except DataError as problem:
        return [str(problem)]
    for begin in range(0, len(data), BATCH):
        found = _problem(data, np.arange(begin, min(begin + BATCH, len(data))))
        if found is not None:
            problems.setdefault(found.split(" ", 1)[0], found)
    return list(problems.values())


def _problem(data: LeRobotDataset, frames: np.ndarray) -> str | None:
    try:
        data.batch(frames)
    except DataError as error:
        return str(error)
    return None
