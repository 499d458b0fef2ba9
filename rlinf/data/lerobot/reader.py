"""Frames of a data set by their numbers, in batches."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rlinf.core.errors import DataError
from rlinf.data.columns import available_memory, gigabytes
from rlinf.data.lerobot.layout import RESTORE, Info
from rlinf.data.lerobot.meta import Meta, read_meta
from rlinf.data.lerobot.packed import PackedPictures, check_memory
from rlinf.data.lerobot.pictures import decode
from rlinf.data.lerobot.tables import as_numpy, read_table
from rlinf.data.lerobot.video import VideoReader

Batch = dict[str, Any]
"""Feature → numpy array with a leading [B]; `task` → list of B texts."""


class LeRobotDataset:
    """The frames of a data set, any of them at any time.

    Frames of the chosen episodes are numbered 0 … len − 1. Numbers are read into memory once; pictures stay packed, in
    memory or in memory-mapped files, and are unpacked when they are asked for, or all at once by `preload`. Instances
    can be pickled and used after a fork, as data loaders do.

    Args:
        root: folder that holds `meta/`.
        episodes: numbers of the episodes to be used, in any order; None for all.
        keys: features to be read; None for all. `timestamp`, `frame_index`, `episode_index`, `task_index` always are.
        windows: feature → offsets in frames. Its values then have a further axis behind the batch's, one entry per
            offset, and beside them is `<feature>_is_pad`, bool, true where the offset leads out of the episode; there
            the value is that of the episode's first or last frame.
        map_to: folder in which packed pictures are kept as memory-mapped files; None keeps them in memory.
        num_threads: so many pictures, or videos, are unpacked at a time.
        max_open_videos: so many video files at most are open.

    Raises:
        DataError: a file is missing or damaged or does not hold what `meta/` says, or something is asked for that the
            data set does not have.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        episodes: Sequence[int] | None = None,
        keys: Collection[str] | None = None,
        windows: Mapping[str, Sequence[int]] | None = None,
        map_to: str | Path | None = None,
        num_threads: int = 1,
        max_open_videos: int = 16,
    ) -> None:
        self._arguments = {
            **{"root": root, "episodes": episodes, "keys": keys, "windows": windows, "map_to": map_to},
            **{"num_threads": num_threads, "max_open_videos": max_open_videos},
        }
        self.meta: Meta = read_meta(root)
        self.info: Info = self.meta.info
        self.episodes = self._choose(episodes)
        features = self.info.features
        self._check_known("keys", keys or ())
        self._check_known("windows", windows or ())
        texts = [key for key in windows or () if features[key].dtype == "string"]
        if texts:
            raise DataError(f"{self.meta.root}: {texts[0]} holds texts, of which there are no windows")
        always = ("timestamp", "frame_index", "episode_index", "task_index")
        self.keys = [key for key in features if keys is None or key in keys or key in always]
        self._windows = {key: np.asarray(list(offsets), np.int64) for key, offsets in (windows or {}).items()}
        self._num_threads = max(1, num_threads)
        self._pool: ThreadPoolExecutor | None = None
        self._pool_pid = os.getpid()

        length = self.meta.length[self.episodes]
        self.ends = length.cumsum()  # of each chosen episode, in frames
        self.begins = self.ends - length
        self._episode = np.repeat(np.arange(len(length)), length)  # place of each frame's episode among the chosen
        self._numbers = self._read_numbers()
        self._check_frames()
        self._images = self._read_images(None if map_to is None else Path(map_to))
        self._videos = VideoReader(self.info.fps, max_open=max_open_videos)
        self._unpacked: dict[str, np.ndarray] = {}

    # ---- what is there

    def __len__(self) -> int:
        return len(self._episode)

    def column(self, key: str) -> Any:
        """All values [len, *shape] of a feature of numbers (scalars: [len]); a list of text. Not to be written into."""
        if key not in self._numbers:
            raise DataError(f"{self.meta.root}: {key} is no column of numbers or text that was read")
        return self._numbers[key]

    def preload(self, keys: Collection[str] | None = None) -> None:
        """Unpack all pictures of some cameras (None: all that are read) into memory; batches then only copy.

        Raises DataError when they would not fit.
        """
        cameras = [key for key in self.keys if self.info.features[key].is_picture and (keys is None or key in keys)]
        shapes = {key: (len(self), *self.info.features[key].picture_shape) for key in cameras}
        need, available = sum(int(np.prod(shape)) for shape in shapes.values()), available_memory()
        if available is not None and need > available:
            raise DataError(
                f"{self.meta.root}: the unpacked pictures need {gigabytes(need)} of memory and {gigabytes(available)} "
                "are available; choose fewer episodes or cameras, or do not preload"
            )
        for key in cameras:
            self._unpacked[key] = self.pictures(key, np.arange(len(self)))

    # ---- frames

    def __getitem__(self, index: int | Sequence[int] | np.ndarray) -> Batch:
        """One frame, without the batch's axis, or the batch of several."""
        if isinstance(index, int | np.integer):
            row = self.batch([int(index)])
            return {key: value[0] for key, value in row.items()}
        return self.batch(index)

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Frames by their numbers, and the windows around them.

        Numbers come in the dtype of the feature, [B, *shape], scalars [B]; pictures uint8 [B, H, W, C]; `task` is the
        text of each frame's task. Raises IndexError for a number that is not there, DataError for a damaged picture.
        """
        chosen = np.asarray(indices, np.int64).reshape(-1)
        if len(chosen) and (int(chosen.min()) < -len(self) or int(chosen.max()) >= len(self)):
            raise IndexError(f"frame {int(np.abs(chosen).max())} of {len(self)}")
        chosen = np.where(chosen < 0, chosen + len(self), chosen)
        result: Batch = {}
        for key in self.keys:
            rows, padded = chosen, None
            if key in self._windows:
                rows, padded = self._window(chosen, self._windows[key])
            result[key] = self._values(key, rows)
            if padded is not None:
                result[f"{key}_is_pad"] = padded
        result["task"] = [self.meta.tasks[number] for number in self._numbers["task_index"][chosen].tolist()]
        return result

    def _window(self, chosen: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Frames int64 [B, W], kept inside their episode, and where they had to be, bool [B, W]."""
        wanted = chosen[:, None] + offsets
        episode = self._episode[chosen]
        first, last = self.begins[episode][:, None], self.ends[episode][:, None] - 1
        kept = wanted.clip(first, last)
        return kept, kept != wanted

    def _values(self, key: str, rows: np.ndarray) -> Any:
        if key in self._unpacked:
            return self._unpacked[key][rows]
        if self.info.features[key].is_picture:
            return self.pictures(key, rows)
        numbers = self._numbers[key]
        if isinstance(numbers, list):
            return [numbers[row] for row in rows.reshape(-1).tolist()]
        return numbers[rows]

    def pictures(self, key: str, rows: np.ndarray) -> np.ndarray:
        """Pictures of one camera in some frames, uint8 [*rows.shape, H, W, C]; as `batch`."""
        flat = rows.reshape(-1)
        out = np.empty((len(flat), *self.info.features[key].picture_shape), np.uint8)
        if key in self._images:
            self._unpack_images(key, flat, out)
        else:
            self._unpack_videos(key, flat, out)
        return out.reshape(*rows.shape, *out.shape[1:])

    def _unpack_images(self, key: str, rows: np.ndarray, out: np.ndarray) -> None:
        store = self._images[key]

        def unpack(part: np.ndarray) -> None:
            for place in part.tolist():
                row = int(rows[place])
                try:
                    decode(store[row], out[place])
                except DataError as problem:
                    number = self.episodes[self._episode[row]]
                    frame = int(self._numbers["frame_index"][row])
                    file = self.meta.data.files[self.meta.data.file[number]]
                    raise DataError(
                        f"{self.meta.root / file}: {key} of episode {number}, frame {frame} {problem}; {RESTORE}"
                    ) from problem

        self._in_threads(unpack, np.array_split(np.arange(len(rows)), min(self._num_threads, max(1, len(rows)))))

    def _unpack_videos(self, key: str, rows: np.ndarray, out: np.ndarray) -> None:
        places = self.meta.videos[key]
        number = self.episodes[self._episode[rows]]
        times_s = places.begin[number] + self._numbers["timestamp"][rows].astype(np.float64)
        # Times are stored in single precision; the frames are where whole multiples of 1 / fps say.
        times_s = np.round(times_s * self.info.fps) / self.info.fps
        file = places.file[number]

        def unpack(index: int) -> None:
            part = np.flatnonzero(file == index)
            self._videos.read(self.meta.root / places.files[index], times_s[part], out, part)

        self._in_threads(unpack, np.unique(file).tolist())

    def _in_threads(self, work: Any, parts: Sequence[Any]) -> None:
        if self._num_threads == 1 or len(parts) < 2:
            for part in parts:
                work(part)
            return
        if self._pool is None or self._pool_pid != os.getpid():  # threads do not survive a fork
            self._pool, self._pool_pid = ThreadPoolExecutor(self._num_threads), os.getpid()
        list(self._pool.map(work, parts))

    # ---- reading

    def _choose(self, episodes: Sequence[int] | None) -> np.ndarray:
        total = self.meta.num_episodes
        chosen = np.arange(total) if episodes is None else np.asarray(list(episodes), np.int64)
        wrong = [number for number in chosen.tolist() if not 0 <= number < total]
        if wrong:
            raise DataError(f"{self.meta.root} has the episodes 0 to {total - 1}; episode {wrong[0]} was asked for")
        return chosen

    def _check_known(self, what: str, keys: Collection[str]) -> None:
        unknown = [key for key in keys if key not in self.info.features]
        if unknown:
            known = ", ".join(self.info.features)
            raise DataError(f"{self.meta.root} has no feature {unknown[0]!r} for `{what}`; there are {known}")

    def _parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each needed parquet file, and which of the chosen episodes it holds."""
        file = self.meta.data.file[self.episodes]
        for index in np.unique(file).tolist():
            yield index, np.flatnonzero(file == index)

    def _rows(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the file in which the chosen episodes `places` are, and their frames' numbers here."""
        numbers = self.episodes[places]
        length, begin = self.meta.length[numbers], self.meta.data.begin[numbers].astype(np.int64)
        within = np.concatenate([np.arange(n) for n in length])
        return np.repeat(begin, length) + within, np.repeat(self.begins[places], length) + within

    def _read_numbers(self) -> dict[str, Any]:
        features = self.info.features
        keys = [key for key in self.keys if not features[key].is_picture]
        scalar = [key for key in keys if features[key].shape == (1,)]
        result: dict[str, Any] = {}
        for key in keys:
            feature = features[key]
            text = feature.dtype == "string"
            result[key] = [""] * len(self) if text else np.empty((len(self), *feature.shape), feature.dtype)
        for index, places in self._parts():
            path = self.meta.root / self.meta.data.files[index]
            table = read_table(path, keys)
            rows, here = self._rows(places)
            if int(rows.max()) >= table.num_rows:
                raise DataError(f"{path} has {table.num_rows} rows and should have {int(rows.max()) + 1}; {RESTORE}")
            for key in keys:
                values = as_numpy(table[key], key, features[key], path)
                if isinstance(values, list):
                    for source, target in zip(rows.tolist(), here.tolist(), strict=True):
                        result[key][target] = values[source]
                else:
                    result[key][here] = values[rows]
        return result | {key: result[key][:, 0] for key in scalar if not isinstance(result[key], list)}

    def _check_frames(self) -> None:
        """Raise DataError where a row is another than `meta/` says."""
        numbers = self._numbers
        within = np.arange(len(self)) - self.begins[self._episode]
        wrong = (numbers["episode_index"] != self.episodes[self._episode]) | (numbers["frame_index"] != within)
        if wrong.any():
            place = int(wrong.argmax())
            number = int(self.episodes[self._episode[place]])
            file = self.meta.root / self.meta.data.files[self.meta.data.file[number]]
            raise DataError(
                f"{file}: where frame {int(within[place])} of episode {number} should be, is frame "
                f"{int(numbers['frame_index'][place])} of episode {int(numbers['episode_index'][place])}; {RESTORE}"
            )
        unknown = set(np.unique(numbers["task_index"]).tolist()) - self.meta.tasks.keys()
        if unknown:
            raise DataError(f"{self.meta.root}: task {min(unknown)} has no text in meta/; {RESTORE}")

    def _read_images(self, map_to: Path | None) -> dict[str, PackedPictures]:
        keys = [key for key in self.keys if self.info.features[key].dtype == "image"]
        paths = {index: self.meta.root / self.meta.data.files[index] for index, _ in self._parts()}
        if keys and map_to is None:
            check_memory(self.meta.root, list(paths.values()))
        packed = {key: PackedPictures(len(self), map_to) for key in keys}
        for index, places in self._parts():
            rows, here = self._rows(places)
            for key in keys:
                packed[key].add(paths[index], key, rows, here)
        return packed

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._arguments, list(self._unpacked))


def _reopen(arguments: dict[str, Any], preloaded: list[str]) -> LeRobotDataset:
    dataset = LeRobotDataset(**arguments)
    dataset.preload(preloaded)
    return dataset
