"""Recording a data set: whole episodes, durable as soon as they are committed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rlinf.core.errors import DataError
from rlinf.data.lerobot.durable import remove_files, write_files
from rlinf.data.lerobot.features import checked_column, codec_of, continued_info, recorded_features, with_video_info
from rlinf.data.lerobot.layout import (
    DATA_FILE_MB,
    DATA_PATH,
    FILES_PER_CHUNK,
    FRAME_FEATURES,
    INFO_FILE,
    NOTES_FILE,
    STATS_FILE,
    TASKS_FILE,
    V3,
    VIDEO_FILE_MB,
    VIDEO_PATH,
    Feature,
    Info,
    read_info,
)
from rlinf.data.lerobot.meta import episode_table, read_tasks
from rlinf.data.lerobot.pictures import encode_png
from rlinf.data.lerobot.stats import NAMES, Stats, as_json, merge, number_stats, picture_stats
from rlinf.data.lerobot.tables import data_table, pa, parquet_bytes, tasks_table
from rlinf.data.lerobot.video import CODECS, VideoEncoder, kind_of
from rlinf.data.lerobot.volume import (
    EPISODES_PER_VOLUME,
    MAX_PIECES,
    Piece,
    Volume,
    data_file,
    joined,
    piece_files,
    reopened,
    stats_table,
    video_file,
)

MB = 1 << 20


@dataclass
class _Pending:
    """Episodes that no file has yet."""

    tables: list[Any] = field(default_factory=list)
    videos: dict[str, VideoEncoder] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    tasks: list[list[str]] = field(default_factory=list)
    stats: list[dict[str, Stats]] = field(default_factory=list)


class LeRobotWriter:
    """Adds episodes to a data set of v3.0, which is made when it is not there.

    A committed episode is on the disk and part of a readable data set, whatever happens to the program afterwards.
    `close` joins the files of the last commits; a recording that was killed before that is as readable, only in more
    files, and the next writer goes on from there. Use it as a context manager.

    Args:
        root: folder of the data set; a new or empty one, or one that holds a data set of the same features and fps.
        fps: frames per second, a whole number.
        features: what every frame holds, without the columns that every data set has (`layout.FRAME_FEATURES`).
            Pictures are uint8 [H, W, C]; as videos their sides must be even and C is 3.
        robot_type: name of the robot, for people.
        notes: what else is to be known of the recording, kept in `meta/rlinf.json`; a data set that is continued must
            have been begun with the same.
        codec: of videos, `h264` or `av1` (smaller, twice as slow). A data set that is continued keeps its own.
        commit_every: episodes after which `add_episode` commits; 0: only `commit` and `close` do.
        num_threads: of encoders.
        data_file_mb, video_file_mb: about how large a file may become, in units of 2²⁰ bytes.
        files_per_chunk: files in a folder.

    Raises:
        DataError: the folder holds something else, another program records into it, features are not possible, or the
            disk refuses.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        fps: int,
        features: Mapping[str, Feature],
        robot_type: str | None = None,
        notes: Mapping[str, Any] | None = None,
        codec: str = "h264",
        commit_every: int = 1,
        num_threads: int = 1,
        data_file_mb: int = DATA_FILE_MB,
        video_file_mb: int = VIDEO_FILE_MB,
        files_per_chunk: int = FILES_PER_CHUNK,
    ) -> None:
        self.root, self._notes = Path(root), dict(notes or {})
        self._commit_every, self._num_threads = commit_every, max(1, num_threads)
        self._pending = _Pending()
        self._lock: int | None = None
        self._volume: Volume | None = None
        self._reopened: Volume | None = None
        self._next_number = 0
        self._tasks: dict[str, int] = {}
        self._stats: dict[str, Stats] = {}
        wanted = Info(
            version=V3,
            fps=fps,
            features=recorded_features(features, fps, codec),
            robot_type=robot_type,
            chunks_size=files_per_chunk,
            data_files_size_in_mb=data_file_mb,
            video_files_size_in_mb=video_file_mb,
            data_path=DATA_PATH,
            video_path=VIDEO_PATH if any(feature.dtype == "video" for feature in features.values()) else None,
        )
        self.info = wanted
        if (self.root / INFO_FILE).is_file():
            self.info = continued_info(self.root, wanted, self._notes)
        elif self.root.is_dir() and any(self.root.iterdir()):
            raise DataError(
                f"{self.root} holds something else than a data set (there is no {INFO_FILE}): record into another "
                "folder, or remove what a recording left that died in its first episode"
            )
        # A data set of other software may have another codec, and its videos go on in that one.
        self._codecs = {key: codec_of(self.root, key, self.info.features[key]) for key in self.info.keys("video")}
        if self.info.total_episodes:
            self._lock_root()
            try:
                self._go_on()
            except BaseException:
                self._unlock()
                raise

    # ---- recording

    @property
    def num_episodes(self) -> int:
        """Episodes in the data set, those that are not committed yet included."""
        return self.info.total_episodes + len(self._pending.lengths)

    def add_episode(self, data: Mapping[str, Any], task: str | Sequence[str]) -> None:
        """Add an episode of T frames.

        Args:
            data: for every feature an array [T, *shape] (or [T] for shape (1,)), for text a list of T str.
            task: what the robot is told to do, for the whole episode or for every frame.

        Raises DataError when something is missing, misshapen or not finite, or the disk refuses.
        """
        columns, length = self._columns(data)
        texts = [task] * length if isinstance(task, str) else list(task)
        if len(texts) != length or not all(isinstance(text, str) and text for text in texts):
            raise DataError(f"an episode of {length} frames needs one task text, or {length}")
        episode, begin = self.num_episodes, self.info.total_frames + sum(self._pending.lengths)
        tasks = list(dict.fromkeys(texts))
        for text in tasks:
            self._tasks.setdefault(text, len(self._tasks))
        frames = np.arange(length)
        columns |= {
            "timestamp": (frames / self.info.fps).astype(np.float32)[:, None],
            "frame_index": frames[:, None],
            "episode_index": np.full((length, 1), episode),
            "index": (begin + frames)[:, None],
            "task_index": np.array([self._tasks[text] for text in texts])[:, None],
        }
        features = self.info.features
        stats = {}
        for key, feature in features.items():
            if feature.dtype != "string":
                stats[key] = picture_stats(columns[key]) if feature.is_picture else number_stats(columns[key])
        for key in self.info.keys("image"):
            columns[key] = self._packed(columns[key])
        for key in self.info.keys("video"):
            self._encoder(key).write(columns[key])
        pending = self._pending
        pending.tables.append(data_table(features, columns))
        pending.lengths.append(length)
        pending.tasks.append(tasks)
        pending.stats.append(stats)
        if self._commit_every and len(pending.lengths) >= self._commit_every:
            self.commit()

    def commit(self) -> None:
        """Make the episodes that were added part of the data set on the disk. Raises DataError when it refuses."""
        pending, self._pending = self._pending, _Pending()
        if not pending.lengths:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock_root()
            self._commit(pending)
        except OSError as error:
            raise self._refused(error, len(pending.lengths)) from error

    def close(self) -> None:
        """Commit, and join the files of many commits. Calling it twice is allowed. Raises DataError."""
        try:
            self.commit()
            if self._volume is not None:
                self._volume = joined(self.root, self.info, self._volume)
        except OSError as error:
            raise self._refused(error, 0) from error
        finally:
            self._unlock()

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except DataError:
            if kind is None:  # what went wrong before is what matters
                raise

    # ---- an episode

    def _columns(self, data: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Checked arrays [T, *shape] of the features, and T."""
        own = {key: feature for key, feature in self.info.features.items() if key not in FRAME_FEATURES}
        absent, unknown = own.keys() - data.keys(), data.keys() - own.keys()
        if absent or unknown:
            problems = [f"lacks {', '.join(sorted(absent))}"] if absent else []
            problems += [f"has {', '.join(sorted(unknown))}, which are no features"] if unknown else []
            raise DataError(f"an episode {' and '.join(problems)}")
        columns = {key: checked_column(key, feature, data[key]) for key, feature in own.items()}
        lengths = {len(values) for values in columns.values()}
        if len(lengths) != 1 or lengths == {0}:
            raise DataError(f"an episode needs one length of all features, at least 1, and has {sorted(lengths)}")
        return columns, lengths.pop()

    def _packed(self, frames: np.ndarray) -> list[bytes]:
        if self._num_threads == 1:
            return [encode_png(frame) for frame in frames]
        with ThreadPoolExecutor(self._num_threads) as pool:
            return list(pool.map(encode_png, frames))

    def _encoder(self, key: str) -> VideoEncoder:
        if key not in self._pending.videos:
            height, width, _ = self.info.features[key].picture_shape
            codec = CODECS[self._codecs[key]]
            self._pending.videos[key] = VideoEncoder(codec, int(self.info.fps), height, width, self._num_threads)
        return self._pending.videos[key]

    # ---- a commit

    def _commit(self, pending: _Pending) -> None:
        table = parquet_bytes(pa.concat_tables(pending.tables), self.info.keys("image"))
        videos = {key: encoder.finish() for key, encoder in pending.videos.items()}
        size = (len(table), max(map(len, videos.values()), default=0))
        self._leave_foreign_volume(videos)
        self._make_room(size, len(pending.lengths))
        number = self._next_number
        piece = Piece(number, tuple(pending.lengths), size)
        volume = self._volume or Volume(self.info.total_episodes, self.info.total_frames)
        stats = pa.concat_tables([stats_table(episode) for episode in pending.stats])
        volume = volume.with_piece(piece, pending.tasks, stats.combine_chunks())
        info = replace(
            self.info,
            total_episodes=self.info.total_episodes + len(pending.lengths),
            total_frames=self.info.total_frames + sum(pending.lengths),
            total_tasks=len(self._tasks),
        )
        if not self.info.total_episodes:
            info = replace(info, features=with_video_info(info, self._codecs))
        merged = _merged([self._stats] if self._stats else [], pending.stats)
        files: dict[str, bytes | memoryview] = {data_file(info, number): table}
        files |= {video_file(info, key, number): content for key, content in videos.items()}
        files[TASKS_FILE] = parquet_bytes(tasks_table(list(self._tasks)))
        files[volume.episodes_file(info)] = parquet_bytes(volume.episodes_table(info))
        if self._notes and not self.info.total_episodes:
            files[NOTES_FILE] = _json(self._notes)
        files[STATS_FILE] = _json(as_json(merged))
        files[INFO_FILE] = _json(info.as_json())  # last: from now on the episodes count
        try:
            write_files(self.root, files)
        except OSError:
            remove_files(self.root, piece_files(info, number))
            raise
        self.info, self._volume, self._stats, self._next_number = info, volume, merged, number + 1

    def _leave_foreign_volume(self, videos: Mapping[str, memoryview]) -> None:
        """Close a volume of an earlier recording whose videos another encoder made: these could not be joined to it."""
        volume, self._reopened = self._reopened, None
        if volume is not None and volume is self._volume:
            theirs = (self.root / video_file(self.info, key, volume.number) for key in videos)
            if any(kind_of(path) != kind_of(video) for path, video in zip(theirs, videos.values(), strict=True)):
                self._volume = None

    def _make_room(self, size: tuple[int, int], num_episodes: int) -> None:
        """Join the pieces of the open volume when they are many; close it when it has no room for these."""
        volume = self._volume
        if volume is None:
            return
        data, video = volume.num_bytes
        full = (
            data + size[0] > self.info.data_files_size_in_mb * MB
            or video + size[1] > self.info.video_files_size_in_mb * MB
            or len(volume.tasks) + num_episodes > EPISODES_PER_VOLUME
        )
        if full or len(volume.pieces) >= MAX_PIECES:
            whole = joined(self.root, self.info, volume)
            self._volume = whole if len(whole.pieces) == 1 and not full else None
            self._next_number = whole.pieces[-1].number + 1

    def _refused(self, error: OSError, lost: int) -> DataError:
        safe = f"the {self.info.total_episodes} episodes committed before are unharmed"
        these = f", the last {lost} are lost" if lost else ""
        return DataError(
            f"{self.root} could not be written: {error}; {safe}{these}. Make room and record on into the same folder"
        )

    # ---- what was there before

    def _go_on(self) -> None:
        try:
            self._volume, self._next_number = reopened(self.root, self.info)
            self._reopened = self._volume
        except OSError as error:
            raise self._refused(error, 0) from error
        known = read_tasks(self.root)
        if sorted(known) != list(range(len(known))):
            raise DataError(f"{self.root / TASKS_FILE} does not number its tasks from 0: record into another folder")
        self._tasks = {known[number]: number for number in sorted(known)}
        table = episode_table(self.root, self.info.total_episodes)
        episodes = []
        for row in table.select([name for name in table.column_names if name.startswith("stats/")]).to_pylist():
            stats: dict[str, Stats] = {}
            for name, value in row.items():
                _, key, statistic = name.split("/")
                if statistic in NAMES and value is not None:
                    stats.setdefault(key, {})[statistic] = np.asarray(value)
            episodes.append(stats)
        self._stats = _merged([], episodes)

    def _lock_root(self) -> None:
        """Make sure that nobody else records into the folder."""
        if self._lock is not None:
            return
        self._lock = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._unlock()
            raise DataError(
                f"another program records into {self.root}: wait for it, or choose another folder"
            ) from error
        there = read_info(self.root).total_episodes if (self.root / INFO_FILE).is_file() else 0
        if there != self.info.total_episodes:
            self._unlock()
            raise DataError(f"another program has recorded into {self.root} meanwhile: record into another folder")

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _merged(before: list[dict[str, Stats]], episodes: list[dict[str, Stats]]) -> dict[str, Stats]:
    """Statistics of all episodes, from those of the ones before and of each that is new; in whatever portions."""
    merged = before[0] if before else None
    for stats in episodes:
        merged = stats if merged is None else {key: merge([merged[key], stats[key]]) for key in merged}
    return merged or {}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=4, ensure_ascii=False) + "\n").encode()
