"""What a LeRobot data set says about itself: `meta/info.json`, its features, and where its files are.

    v3.0   meta/info.json  meta/stats.json  meta/tasks.parquet  meta/episodes/chunk-000/file-000.parquet
           data/chunk-000/file-000.parquet                       many episodes per file
           videos/<camera>/chunk-000/file-000.mp4                many episodes per file
    v2.1   meta/{info.json, episodes.jsonl, episodes_stats.jsonl, tasks.jsonl}
           data/chunk-000/episode_000000.parquet                 one episode per file
           videos/chunk-000/<camera>/episode_000000.mp4          one episode per file
    v2.0   as v2.1, with meta/stats.json in place of episodes_stats.jsonl

Pictures are `image` (encoded bytes in the parquet files) or `video`. The layout is that of Hugging Face's `lerobot`
package; nothing here needs it.
"""

from __future__ import annotations

import json
import math
import os
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from rlinf.core.errors import DataError

V20, V2, V3 = "v2.0", "v2.1", "v3.0"
INFO_FILE, STATS_FILE, TASKS_FILE = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
NOTES_FILE = "meta/rlinf.json"
"""Not of the layout: what this program remembers of a recording."""
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
FILES_PER_CHUNK, DATA_FILE_MB, VIDEO_FILE_MB = 1000, 100, 200

PICTURES = ("image", "video")
NUMBERS = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "bool")
TEXT = "string"
RESTORE = "restore the file, or record or copy the data set anew"


@dataclass(frozen=True)
class Feature:
    """One column of a data set.

    Attributes:
        dtype: a numpy dtype name, `string`, `image` or `video`.
        shape: of one frame's value; scalars have (1,).
        names: of its elements or axes, as the data set gives them.
        info: of a video: codec, pixel format and so on, as the data set gives them.
        extra: further keys that the data set gives.
    """

    dtype: str
    shape: tuple[int, ...]
    names: Any = None
    info: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_picture(self) -> bool:
        """Whether a value is a picture."""
        return self.dtype in PICTURES

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(height, width, channels), whichever way the shape is written."""
        a, b, c = self.shape
        first = self.names[0] if isinstance(self.names, list) and len(self.names) == 3 else None
        channels_first = first in ("channel", "channels") or (first is None and a in (1, 3) and c not in (1, 3))
        return (b, c, a) if channels_first else (a, b, c)


FRAME_FEATURES: dict[str, Feature] = {
    "timestamp": Feature("float32", (1,)),
    "frame_index": Feature("int64", (1,)),
    "episode_index": Feature("int64", (1,)),
    "index": Feature("int64", (1,)),
    "task_index": Feature("int64", (1,)),
}
"""Columns that every data set has: seconds and frames since the episode began, and the numbers of the episode, of the
frame in the data set and of the task."""


@dataclass(frozen=True)
class Info:
    """Content of `meta/info.json`.

    Attributes:
        version: `v2.0`, `v2.1` or `v3.0`.
        fps: frames per second.
        features: by name, in the order of the file.
        data_path, video_path: templates of file names; `video_path` is None without videos.
        extra: further keys of the file.
    """

    version: str
    fps: float
    features: dict[str, Feature]
    total_episodes: int = 0
    total_frames: int = 0
    total_tasks: int = 0
    robot_type: str | None = None
    chunks_size: int = FILES_PER_CHUNK
    data_files_size_in_mb: int = DATA_FILE_MB
    video_files_size_in_mb: int = VIDEO_FILE_MB
    data_path: str = DATA_PATH
    video_path: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def keys(self, *kinds: str) -> list[str]:
        """Names of the features whose dtype is one of `kinds`."""
        return [key for key, feature in self.features.items() if feature.dtype in kinds]

    def data_file(self, chunk: int, file: int) -> str:
        """Name of a data file of v3.0."""
        return self.data_path.format(chunk_index=chunk, file_index=file)

    def video_file(self, key: str, chunk: int, file: int) -> str:
        """Name of a video file of v3.0."""
        assert self.video_path is not None
        return self.video_path.format(video_key=key, chunk_index=chunk, file_index=file)

    def as_json(self) -> dict[str, Any]:
        """The object that `info.json` of v3.0 holds."""
        features = {}
        for key, feature in self.features.items():
            features[key] = {
                "dtype": feature.dtype,
                "shape": list(feature.shape),
                "names": feature.names,
                **feature.extra,
            }
            if feature.info is not None:
                features[key]["info"] = dict(feature.info)
        return {
            "codebase_version": self.version,
            "robot_type": self.robot_type,
            "total_episodes": self.total_episodes,
            "total_frames": self.total_frames,
            "total_tasks": self.total_tasks,
            "chunks_size": self.chunks_size,
            "data_files_size_in_mb": self.data_files_size_in_mb,
            "video_files_size_in_mb": self.video_files_size_in_mb,
            "fps": int(self.fps) if float(self.fps).is_integer() else self.fps,
            "splits": {"train": f"0:{self.total_episodes}"},
            "data_path": self.data_path,
            "video_path": self.video_path,
            "features": features,
            **self.extra,
        }


def find_root(name: str | Path) -> Path:
    """The folder of a data set: `name` itself or, where that is none, `name` below $HF_LEROBOT_HOME. Both may have ~.

    Raises DataError naming the places where it is not.
    """
    path, home = Path(name).expanduser(), os.environ.get("HF_LEROBOT_HOME")
    below = Path(home).expanduser() / path if home else None
    for place in (path, below):
        if place is not None and place.is_dir():
            return place
    beside = ", and HF_LEROBOT_HOME is not set" if below is None else f" and {below} is none either"
    raise DataError(f"{path} is no folder{beside}: mend the path, or record a data set into it first")


def read_info(root: Path) -> Info:
    """`meta/info.json` of a data set. Raises DataError when it is missing, damaged or of another version."""
    path = root / INFO_FILE
    if not root.is_dir():
        raise DataError(f"{root} is no directory: mend the path, or record a data set into it first")
    if not path.is_file():
        raise DataError(f"{path} is missing: {root} is no LeRobot data set; name the folder that holds meta/")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise DataError(f"{path} is damaged: it holds no object; {RESTORE}")
    version = raw.get("codebase_version")
    if version not in (V20, V2, V3):
        raise DataError(
            f"{path} has codebase_version {version!r}; {V3} is read and written, {V20} and {V2} are read: convert the "
            "data set with the lerobot package first"
        )
    try:
        return _info(raw, version)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise DataError(f"{path} is damaged: {problem}; {RESTORE}") from error


def _info(raw: dict[str, Any], version: str) -> Info:
    features = {key: parse_feature(key, entry) for key, entry in raw["features"].items()}
    for key, feature in FRAME_FEATURES.items():
        if key not in features:
            raise ValueError(f"feature {key} is missing")
        if features[key].shape != feature.shape:
            raise ValueError(f"feature {key} has shape {list(features[key].shape)} instead of [1]")
    fps = raw["fps"]
    if not isinstance(fps, int | float) or not math.isfinite(fps) or fps <= 0:
        raise ValueError(f"fps is {fps!r}")
    has_video = any(feature.dtype == "video" for feature in features.values())
    if version == V3:
        data_fields, video_fields = {"chunk_index", "file_index"}, {"video_key", "chunk_index", "file_index"}
    else:
        data_fields = {"episode_chunk", "episode_index"}
        video_fields = {"episode_chunk", "video_key", "episode_index"}
    video_path = raw.get("video_path")
    if has_video:
        video_path = check_template("video_path", raw["video_path"], video_fields)
    counts = {}
    for key in ("total_episodes", "total_frames", "total_tasks", "chunks_size"):
        value = raw[key]
        if not isinstance(value, int) or value < (key == "chunks_size"):
            raise ValueError(f"{key} is {value!r}")
        counts[key] = value
    known = {
        *("codebase_version", "robot_type", "fps", "features", "splits", "data_path", "video_path"),
        *("data_files_size_in_mb", "video_files_size_in_mb", *counts),
    }
    return Info(
        version=version,
        fps=fps,
        features=features,
        robot_type=raw.get("robot_type"),
        data_files_size_in_mb=raw.get("data_files_size_in_mb", DATA_FILE_MB),
        video_files_size_in_mb=raw.get("video_files_size_in_mb", VIDEO_FILE_MB),
        data_path=check_template("data_path", raw["data_path"], data_fields),
        video_path=video_path,
        extra={key: value for key, value in raw.items() if key not in known},
        **counts,
    )


def parse_feature(key: str, entry: Any) -> Feature:
    """A feature from its JSON object. Raises ValueError that names it."""
    if not isinstance(entry, dict) or "dtype" not in entry or "shape" not in entry:
        raise ValueError(f"feature {key} has no dtype and shape")
    dtype, shape = entry["dtype"], entry["shape"]
    if dtype not in (*NUMBERS, *PICTURES, TEXT):
        raise ValueError(f"feature {key} has the unknown dtype {dtype!r}")
    whole = isinstance(shape, list | tuple) and all(isinstance(n, int) and n > 0 for n in shape)
    if not whole or not 1 <= len(shape) <= 5 or (dtype in PICTURES and len(shape) != 3):
        raise ValueError(f"feature {key} of dtype {dtype} has shape {shape!r}")
    if "/" in key or not key or key.startswith("."):
        raise ValueError(f"{key!r} is no name of a feature")
    extra = {name: value for name, value in entry.items() if name not in ("dtype", "shape", "names", "info")}
    return Feature(dtype, tuple(shape), entry.get("names"), entry.get("info"), extra)


def check_template(name: str, template: Any, fields: Collection[str]) -> str:
    """The template if it names files inside the data set with these fields and nothing else, else ValueError."""
    if not isinstance(template, str):
        raise ValueError(f"{name} is {template!r}")
    used = {part for _, part, _, _ in string.Formatter().parse(template) if part is not None}
    path = PurePosixPath(template)
    if not used <= set(fields) or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name} is {template!r}, which does not name files of the data set by {', '.join(fields)}")
    return template


def read_json(path: Path) -> Any:
    """Content of a JSON file. Raises DataError naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {RESTORE}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; {RESTORE}") from error


def read_json_lines(path: Path, keys: Collection[str]) -> list[dict[str, Any]]:
    """Objects of a file with one JSON object per line, all of which have `keys`. Raises DataError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {RESTORE}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; {RESTORE}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is damaged: {error}; {RESTORE}") from error
        if not isinstance(row, dict) or not set(keys) <= row.keys():
            raise DataError(f"{path}:{number} lacks {', '.join(keys)}; {RESTORE}")
        rows.append(row)
    return rows


def frame_offsets(
    delta_timestamps: Mapping[str, Collection[float]], fps: float, tolerance_s: float = 1e-4
) -> dict[str, list[int]]:
    """Windows in frames from windows in seconds: {"action": [0, 0.1, 0.2]} at 10 fps → {"action": [0, 1, 2]}.

    Raises DataError for a time that is no multiple of 1 / fps within `tolerance_s`.
    """
    offsets = {}
    for key, times in delta_timestamps.items():
        frames = np.asarray(list(times), np.float64) * fps
        whole = np.round(frames)
        wrong = np.flatnonzero(np.abs(frames - whole) > tolerance_s * fps)
        if len(wrong):
            raise DataError(
                f"delta_timestamps of {key}: {frames[wrong[0]] / fps:g} s is no multiple of a frame's 1/{fps:g} s"
            )
        offsets[key] = whole.astype(np.int64).tolist()
    return offsets
