"""Which episodes a data set has and where their frames are; one form for both versions of the layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlinf.core.errors import DataError
from rlinf.data.lerobot.layout import (
    INFO_FILE,
    RESTORE,
    STATS_FILE,
    TASKS_FILE,
    V3,
    V20,
    Info,
    read_info,
    read_json,
    read_json_lines,
)
from rlinf.data.lerobot.stats import Stats, from_json, merge
from rlinf.data.lerobot.tables import pa, read_table


@dataclass(frozen=True)
class Places:
    """Where the episodes' frames are in one series of files.

    Attributes:
        files: names of the files below the data set's folder.
        file: int64 [E], which of them holds an episode.
        begin: [E], where the episode begins there: a row of a parquet file, or a time of a video in seconds.
    """

    files: list[str]
    file: np.ndarray
    begin: np.ndarray


@dataclass(frozen=True)
class Meta:
    """Everything that a data set says about its frames.

    Attributes:
        root: its folder.
        info: content of `meta/info.json`.
        tasks: number → text.
        length: int64 [E], frames of each episode.
        episode_tasks: texts of each episode.
        data: places in the parquet files.
        videos: the same in the videos of each camera; empty without videos.
        stats: statistics of each feature; empty where the data set has none.
    """

    root: Path
    info: Info
    tasks: dict[int, str]
    length: np.ndarray
    episode_tasks: list[list[str]]
    data: Places
    videos: dict[str, Places]
    stats: dict[str, Stats]

    @property
    def num_episodes(self) -> int:
        """E."""
        return len(self.length)

    def files(self) -> list[str]:
        """Names of all files that hold frames."""
        return [*self.data.files, *(file for places in self.videos.values() for file in places.files)]


def read_meta(root: str | Path) -> Meta:
    """What the data set in `root` holds. Reads no frames, but looks whether the files that hold them are there.

    A recording that was interrupted may have left files and rows behind its last finished episode: they are not seen.

    Raises:
        DataError: a file is missing or damaged, episodes are missing, or the version is another one.
    """
    root = Path(root)
    info = read_info(root)
    meta = (_read_v3 if info.version == V3 else _read_v2)(root, info)
    found = int(meta.length.sum())
    if found != info.total_frames:
        raise DataError(f"{root / INFO_FILE} counts {info.total_frames} frames, the episodes have {found}; {RESTORE}")
    for file in meta.files():
        if not (root / file).is_file():
            raise DataError(f"{root / file} is missing: {RESTORE}")
    return meta


# ---- v3.0


def _read_v3(root: Path, info: Info) -> Meta:
    names = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"]
    names += ["dataset_from_index", "dataset_to_index"]
    for key in info.keys("video"):
        names += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    rows = _columns(root, episode_table(root, info.total_episodes, names))
    _check_numbers(root / "meta/episodes", rows["episode_index"], info.total_episodes)
    length = rows["length"]
    begin = rows["dataset_from_index"]
    gaps = np.flatnonzero((begin != np.r_[0, length.cumsum()[:-1]]) | (rows["dataset_to_index"] != begin + length))
    if len(gaps):
        raise DataError(
            f"{root}/meta/episodes: episode {gaps[0]} does not begin where the one before it ends; {RESTORE}"
        )
    _check_lengths(root, length)
    files, file = _series(rows["data/chunk_index"], rows["data/file_index"])
    first = np.full(len(files), len(length))  # episode of each file
    np.minimum.at(first, file, np.arange(len(length)))
    videos = {}
    for key in info.keys("video"):
        of_key = {name: rows[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index", "from_timestamp")}
        video_files, video_file = _series(of_key["chunk_index"], of_key["file_index"])
        paths = [info.video_file(key, *place) for place in video_files]
        videos[key] = Places(paths, video_file, of_key["from_timestamp"])
    return Meta(
        root=root,
        info=info,
        tasks=read_tasks(root) if info.total_episodes else {},
        length=length,
        episode_tasks=list(rows["tasks"]),
        data=Places([info.data_file(*place) for place in files], file, begin - begin[first[file]]),
        videos=videos,
        stats=_read_stats(root),
    )


def episode_table(root: Path, total: int, names: list[str] | None = None) -> Any:
    """Columns (None: all) of `meta/episodes` for the first `total` episodes. Raises DataError."""
    paths = sorted((root / "meta/episodes").glob("chunk-*/file-*.parquet"))
    tables = [read_table(path, names).replace_schema_metadata(None) for path in paths]
    if not tables:
        if total:
            raise DataError(f"{root}/meta/episodes holds no file: {RESTORE}")
        return pa.table({name: pa.array([], pa.int64()) for name in names or []})
    try:
        return pa.concat_tables(tables, promote_options="permissive").slice(0, total)
    except pa.ArrowException as error:
        raise DataError(f"{root}/meta/episodes: files do not fit together ({error}); {RESTORE}") from error


def _columns(root: Path, table: Any) -> dict[str, Any]:
    """Numbers as arrays [E], others as lists."""
    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name]
        if column.null_count:
            raise DataError(f"{root}/meta/episodes: {name} is missing in {column.null_count} episodes; {RESTORE}")
        nested = pa.types.is_nested(column.type)
        columns[name] = column.to_pylist() if nested else column.to_numpy(zero_copy_only=False)
    return columns


def read_tasks(root: Path) -> dict[int, str]:
    """Number → text, from `meta/tasks.parquet`. Raises DataError."""
    path = root / TASKS_FILE
    table = read_table(path)
    texts = [name for name in table.column_names if name != "task_index"]
    if len(texts) != 1 or "task_index" not in table.column_names:
        raise DataError(f"{path} has the columns {', '.join(table.column_names)}, not task_index and a text; {RESTORE}")
    return dict(zip(table["task_index"].to_pylist(), table[texts[0]].to_pylist(), strict=True))


def _read_stats(root: Path) -> dict[str, Stats]:
    path = root / STATS_FILE
    if not path.is_file():
        return {}
    try:
        return from_json(read_json(path))
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}; {RESTORE}") from error


def _series(chunk: np.ndarray, file: np.ndarray) -> tuple[list[tuple[int, int]], np.ndarray]:
    """The different (chunk, file) pairs in their order, and the index [E] of each episode's pair among them."""
    pairs = np.stack([chunk, file], 1).astype(np.int64).reshape(-1, 2)
    unique, inverse = np.unique(pairs, axis=0, return_inverse=True)
    return [(c, f) for c, f in unique.tolist()], inverse.reshape(-1)


# ---- v2.0 and v2.1


def _read_v2(root: Path, info: Info) -> Meta:
    meta = root / "meta"
    rows = read_json_lines(meta / "episodes.jsonl", ("episode_index", "tasks", "length"))
    rows.sort(key=lambda row: row["episode_index"])
    numbers = np.array([row["episode_index"] for row in rows], np.int64)
    _check_numbers(meta / "episodes.jsonl", numbers, info.total_episodes)
    tasks = read_json_lines(meta / "tasks.jsonl", ("task_index", "task"))
    length = np.array([row["length"] for row in rows], np.int64)
    _check_lengths(root, length)

    def files(template: str, key: str) -> list[str]:
        return [
            template.format(episode_chunk=number // info.chunks_size, episode_index=number, video_key=key)
            for number in range(len(rows))
        ]

    own = np.arange(len(rows))
    video_path = info.video_path or ""
    return Meta(
        root=root,
        info=info,
        tasks={row["task_index"]: row["task"] for row in tasks},
        length=length,
        episode_tasks=[list(row["tasks"]) for row in rows],
        data=Places(files(info.data_path, ""), own, np.zeros(len(rows), np.int64)),
        videos={key: Places(files(video_path, key), own, np.zeros(len(rows))) for key in info.keys("video")},
        stats=_read_stats(root) if info.version == V20 else _merged_stats(meta / "episodes_stats.jsonl"),
    )


def _merged_stats(path: Path) -> dict[str, Stats]:
    if not path.is_file():
        return {}
    rows = read_json_lines(path, ("episode_index", "stats"))
    try:
        parts = [from_json(row["stats"]) for row in rows]
        return {key: merge([part[key] for part in parts]) for key in parts[0]} if parts else {}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}; {RESTORE}") from error


# ---- both


def _check_numbers(where: Path, numbers: np.ndarray, total: int) -> None:
    """Raise DataError unless the episodes are 0, 1, … total − 1."""
    expected = np.arange(total)
    if np.array_equal(numbers, expected):
        return
    absent = np.setdiff1d(expected, numbers)
    if len(absent):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise DataError(f"{where}: episode {absent[0]}{more} of {total} missing; {RESTORE}")
    raise DataError(f"{where}: holds other episodes than 0 to {total - 1} in their order; {RESTORE}")


def _check_lengths(root: Path, length: np.ndarray) -> None:
    if len(length) and int(length.min()) < 1:
        raise DataError(f"{root}: episode {int(length.argmin())} has {int(length.min())} frames; {RESTORE}")
