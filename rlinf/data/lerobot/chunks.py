"""A LeRobot data set as what a policy of action chunks learns from: an observation and the H actions that follow it.

    chunks = LeRobotChunks("datasets/real", {"images/front": "image", "state": "state", "actions": "actions"}, 8)
    batch = chunks.batch(np.array([3, 14, 15]))           a ChunkBatch of these frames

Examples are numbered as the frames are. Which of them a training step sees is not decided here but by `data.mixture`
or `lerobot.order`, whose batches are functions of a seed and the number of the step: training that goes on at step k
sees what it would have seen. `data.chunk_mixture.MixedChunks` puts both together, for one data set or for several.

    B batch, H actions per chunk, A action size, S state size
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlinf.core import tree
from rlinf.core.errors import DataError
from rlinf.data.chunks import ChunkBatch
from rlinf.data.lerobot.layout import INFO_FILE, Feature, find_root, read_info
from rlinf.data.lerobot.reader import LeRobotDataset

ACTIONS = "actions"
"""How actions are called among the columns; all other names are paths in an observation."""
IMAGES = "images/"
CACHE_BYTES = 2 << 30
SMALLEST_DEVIATION = 1e-2

Resize = Callable[[Tensor], Tensor]
"""uint8 [B, h, w, 3] → uint8 [B, h', w', 3]."""


class LeRobotChunks:
    """Chunks of one data set (v2.1 or v3.0), one for every frame. Chunks end with their episodes. A `ChunkDataset`.

    An observation has `state` float32 [B, S], `images/<camera>` uint8 [B, h, w, 3] and `instruction`, the text of the
    frame's task. Unpacked pictures are kept, as many as fit into `cache_bytes`, and the others unpacked every time:
    where all frames are visited equally often, no cache of that size is hit more often.

    Args:
        root: folder of the data set, or its name below HF_LEROBOT_HOME.
        columns: path in an observation, and `actions` → feature. Where the data set does not have a feature by this
            name, it may be called as `rlinf record` calls it: `observation.state`, `observation.images.<camera>` and
            `action`.
        horizon: H.
        action_dim: A that the robot has; None for whatever the data set has.
        state_dim: S; likewise.
        episodes: those to be used; None for all.
        resize: applied to pictures when they are unpacked, before they are kept. All must come out equally large.
        cache_bytes: for unpacked pictures of all cameras together.
        map_to: folder for packed pictures as memory-mapped files; None keeps them in memory.
        num_threads: so many pictures or videos are unpacked at a time.

    Raises DataError naming the file and the feature that is missing, of another size or damaged. Damaged pictures are
    found when they are unpacked, by `batch`.
    """

    def __init__(
        self,
        root: str | Path,
        columns: Mapping[str, str],
        horizon: int,
        *,
        action_dim: int | None = None,
        state_dim: int | None = None,
        episodes: Sequence[int] | None = None,
        resize: Resize | None = None,
        cache_bytes: int = CACHE_BYTES,
        map_to: Path | None = None,
        num_threads: int = 1,
    ) -> None:
        self.root, self.horizon = find_root(root), horizon
        features = read_info(self.root).features
        self._feature = {path: _named(self.root, features, path, name) for path, name in columns.items()}
        self._cameras = [path for path in columns if path.startswith(IMAGES)]
        self._vectors = [path for path in columns if path not in (*self._cameras, ACTIONS)]
        self._check_kinds(features)
        self.action_dim = self._size(features, ACTIONS, action_dim, "the robot's actions have")
        if "state" in self._feature:
            self._size(features, "state", state_dim, "the robot's state has")
        self._data = LeRobotDataset(
            self.root,
            episodes=episodes,
            keys=list(self._feature.values()),
            map_to=map_to,
            num_threads=num_threads,
        )
        if not len(self._data):
            raise DataError(f"{self.root} holds no frame to learn from; record some first")
        for path in (ACTIONS, *self._vectors):
            self._check_finite(self._feature[path])
        share = cache_bytes // max(1, len(self._cameras))
        self._pictures = {
            path: _Pictures(partial(self._data.pictures, self._feature[path]), len(self._data), share, resize)
            for path in self._cameras
        }

    def __len__(self) -> int:
        """Number of frames."""
        return len(self._data)

    @property
    def num_episodes(self) -> int:
        """Episodes that are used."""
        return len(self._data.episodes)

    @property
    def tasks(self) -> list[str]:
        """The different instructions of the data set."""
        return sorted(set(self._data.meta.tasks.values()))

    def batch(self, rows: np.ndarray) -> ChunkBatch:
        """The examples with these numbers, int64 [B], on the CPU. Raises DataError for a damaged picture."""
        state, action, valid = self.numbers(rows)
        leaves: dict[str, Tensor | list[str]] = {path: values for path, values in state.items()}
        for path in self._cameras:
            leaves[path] = self._pictures[path].rows(rows)
        task, texts = self._data.column("task_index"), self._data.meta.tasks
        leaves["instruction"] = [texts[number] for number in task[rows].tolist()]
        return ChunkBatch(tree.from_leaves(leaves), action, valid)

    def numbers(self, rows: np.ndarray) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """(vectors by path [B, S], actions [B, H, A], valid [B, H]) of the same examples: `batch` without pictures."""
        name = self._feature[ACTIONS]
        wanted = rows[:, None] + np.arange(self.horizon)
        ends = self._data.ends
        last = ends[np.searchsorted(ends, rows, side="right")][:, None] - 1
        action = self._data.column(name)[np.minimum(wanted, last)]
        vectors = {path: _float(self._data.column(self._feature[path])[rows]) for path in self._vectors}
        return vectors, _float(action), torch.from_numpy(wanted <= last)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [S] of the state over all frames; deviations are at least 0.01."""
        state = _float(self._data.column(self._feature["state"]))
        deviation, mean = torch.std_mean(state, 0, correction=0)
        return mean, deviation.clamp(min=SMALLEST_DEVIATION)

    # ---- checks

    def _check_kinds(self, features: Mapping[str, Feature]) -> None:
        for path, name in self._feature.items():
            feature = features[name]
            if path in self._cameras:
                fits = feature.is_picture and feature.picture_shape[2] == 3
                wanted = "a picture of three colours"
            else:
                fits = feature.dtype in ("float16", "float32", "float64") and len(feature.shape) == 1
                wanted = "a vector of floats"
            if not fits:
                raise DataError(
                    f"{self.root / INFO_FILE}: feature {name} is {feature.dtype} {list(feature.shape)} and {path} must "
                    f"be {wanted}; name another column"
                )

    def _size(self, features: Mapping[str, Feature], path: str, wanted: int | None, whose: str) -> int:
        name = self._feature[path]
        found = features[name].shape[0]
        if wanted is not None and found != wanted:
            raise DataError(
                f"{self.root / INFO_FILE}: feature {name} has {found} numbers and {whose} {wanted}; choose the data "
                "set of this robot, or another column"
            )
        return found

    def _check_finite(self, name: str) -> None:
        values = self._data.column(name)
        bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)
        if not bad.any():
            return
        row, meta = int(bad.argmax()), self._data.meta
        episode = int(self._data.column("episode_index")[row])
        frame = int(self._data.column("frame_index")[row])
        file = meta.root / meta.data.files[meta.data.file[episode]]
        raise DataError(
            f"{file}: {name} of episode {episode}, frame {frame} holds NaN or infinity; leave the episode out, or "
            "record the data set anew"
        )


class _Pictures:
    """Pictures of one camera. Unpacked ones are kept as they come, until there is no more room.

    Args:
        unpack: frames int64 [K] → uint8 [K, h, w, 3].
        num_frames: of the data set.
        max_bytes: for kept pictures.
        resize: see `LeRobotChunks`.
    """

    def __init__(
        self, unpack: Callable[[np.ndarray], np.ndarray], num_frames: int, max_bytes: int, resize: Resize | None
    ) -> None:
        self._unpack, self._max_bytes, self._resize = unpack, max_bytes, resize
        self._place = np.full(num_frames, -1, np.int64)  # among the kept
        self._kept: np.ndarray | None = None
        self._used = 0

    def rows(self, rows: np.ndarray) -> Tensor:
        """uint8 [B, h, w, 3] of the frames `rows`."""
        place = self._place[rows]
        kept = place >= 0
        absent = np.unique(rows[~kept])
        if self._kept is None or len(absent):
            fresh = self._unpack(absent)
            if self._resize is not None:
                fresh = self._resize(torch.from_numpy(fresh)).numpy()
            if self._kept is None:
                room = min(len(self._place), self._max_bytes // max(1, fresh[:1].nbytes))
                self._kept = np.empty((room, *fresh.shape[1:]), np.uint8)  # memory is taken when it is written
        out = np.empty((len(rows), *self._kept.shape[1:]), np.uint8)
        out[kept] = self._kept[place[kept]]
        if len(absent):
            out[~kept] = fresh[np.searchsorted(absent, rows[~kept])]
            self._keep(absent, fresh)
        return torch.from_numpy(out)

    def _keep(self, absent: np.ndarray, fresh: np.ndarray) -> None:
        assert self._kept is not None
        count = min(len(absent), len(self._kept) - self._used)
        here = slice(self._used, self._used + count)
        self._kept[here] = fresh[:count]
        self._place[absent[:count]] = np.arange(here.start, here.stop)
        self._used += count


def _named(root: Path, features: Mapping[str, Feature], path: str, name: str) -> str:
    """The feature that stands for a path. Raises DataError where there is none."""
    ours = "action" if path == ACTIONS else "observation." + path.replace("/", ".")
    for candidate in (name, ours):
        if candidate in features:
            return candidate
    kind = "camera" if path.startswith(IMAGES) else "numbers"
    there = [key for key, f in features.items() if f.is_picture == (kind == "camera")]
    raise DataError(
        f"{root / INFO_FILE}: there is no feature {' or '.join(dict.fromkeys((name, ours)))} for {path}; its "
        f"{'cameras' if kind == 'camera' else 'numbers'} are {', '.join(there) or 'none'}"
    )


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
