"""Uniform replay over a ring of frames, each stored once.

A row holds one observation. When a transition starts there, the row also holds its decision, reward and
discount, and `next`: the row of its next observation. So a transition costs one row, the end of an episode
one more.

A sampled transition never mixes rows, because rows are overwritten in the order in which they were written,
and the next observation of a transition is always written after the observation that it starts from. Hence
the start goes first, and while it is there its next row is too.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rlinf.core.errors import CheckpointError, ConfigError, DataError, ShapeError
from rlinf.core.types import Trajectory, Transition
from rlinf.data import columns as store
from rlinf.data.batches import Batches
from rlinf.data.columns import Arrays, Column
from rlinf.data.segment import Segment, read_segment
from rlinf.data.shares import join_rows, share_rows

_FORMAT = "rlinf replay buffer"
_VERSION = 1
_INDEX = "index.json"
_HEAD = "head"
_HEAD_COLUMN = Column("int64")
_FIXED = {
    "reward": Column("float32"),
    "discount": Column("float32"),
    "next": Column("int64"),
    "start": Column("bool"),
}

BOOKKEEPING_BYTES = sum(column.row_bytes for column in _FIXED.values())
"""Of a row, beside its observation and decision."""

_LOG = logging.getLogger(__name__)


class ReplayBuffer:
    """Experience of the last `capacity` rows, sampled uniformly with replacement. Not thread-safe.

    Memory is taken when the first trajectory shows what a row is, and touched page by page as rows are
    written.

    With `storage_dir` the rows live in memory-mapped .npy files there. They survive the death of the process
    at any instant (kill -9 included), and `reopen` takes them up again. Against a power cut, `flush` and
    `save` force them to the disk; otherwise the kernel does so within its usual half minute, and what was
    written after the last flush may be torn.

    Args:
        capacity: number of rows. A transition takes one; every episode end takes one more, and every segment
            that its source does not continue one more per environment.
        generator: where the draws come from; its state is saved. Its bit generator is numpy's default, PCG64.
        storage_dir: directory for the rows, created when needed; None keeps them in memory.
        config_key: the configuration node that errors name.
    """

    def __init__(
        self,
        capacity: int,
        *,
        generator: np.random.Generator,
        storage_dir: str | None = None,
        config_key: str = "algorithm.replay_buffer",
    ) -> None:
        if capacity < 1:
            raise ConfigError(f"{config_key}.capacity={capacity} must be at least 1.")
        self.capacity = capacity
        self._generator = generator
        self._storage_dir = None if storage_dir is None else Path(storage_dir)
        self._key = config_key
        self._columns: dict[str, Column] = {}
        self._arrays: Arrays = {}
        self._sentences: list[str] = []
        self._sentence_ids: dict[str, int] = {}
        self._head = np.zeros(1, np.int64)  # rows ever written; row number r lives at position r % capacity
        self._size = 0
        self._tails: dict[tuple[int, int], np.ndarray] = {}  # source → row number of obs[T] per environment, or -1
        self._batches: Batches | None = None

    @classmethod
    def reopen(
        cls, storage_dir: str, *, generator: np.random.Generator, config_key: str = "algorithm.replay_buffer"
    ) -> ReplayBuffer:
        """The buffer that a stopped or killed process left in its `storage_dir`, ready to go on.

        Raises CheckpointError naming the file that is missing or corrupt.
        """
        directory = Path(storage_dir)
        index = _read_index(directory)
        buffer = cls(index["capacity"], generator=generator, storage_dir=storage_dir, config_key=config_key)
        buffer._adopt(index)
        buffer._arrays = {
            name: store.open_array(directory / store.file_name(name), column, buffer.capacity, "r+")
            for name, column in buffer._columns.items()
        }
        buffer._head = store.open_array(directory / store.file_name(_HEAD), _HEAD_COLUMN, 1, "r+")
        buffer._size = int(np.count_nonzero(buffer._arrays["start"]))
        return buffer

    def __len__(self) -> int:
        """Number of transitions that can be sampled."""
        return self._size

    @property
    def _used(self) -> int:
        return min(int(self._head[0]), self.capacity)

    # Adding -------------------------------------------------------------------------------------------------

    def add(self, trajectory: Trajectory, reward: Tensor, discount: Tensor) -> None:
        """Store the valid transitions of a segment; the oldest rows make room. All or nothing.

        Where the segment continues the source's previous one, the frame between them is not stored again.

        Args:
            trajectory: the segment. Rows with `valid` false are no transitions and take no space.
            reward: float32 [T, N], reward of each decision (chunks folded).
            discount: float32 [T, N], discount of each decision's next value.

        Raises:
            ShapeError: leaves differ among themselves or from what is stored already.
            NonFiniteError: NaN or infinity, naming the leaf.
            ConfigError: the segment or the memory does not fit, naming the configuration key.
        """
        segment = read_segment(trajectory, reward, discount, self._encode)
        self._check_columns(segment)
        last_t, last_n = segment.last_index

        # A frame is needed where a transition starts, and where one arrives that does not end its episode.
        need = np.zeros((len(segment.valid) + 1, segment.valid.shape[1]), bool)
        need[:-1] = segment.valid
        need[1:] |= segment.valid & ~segment.ended
        most = int(np.count_nonzero(need)) + len(last_t)
        if most > self.capacity:
            raise ConfigError(
                f"{self._key}.capacity={self.capacity} is less than the {most} rows of one segment "
                f"({segment.valid.shape[0]} steps of {segment.valid.shape[1]} environments): raise it."
            )
        if not self._arrays:
            self._allocate()

        head = int(self._head[0])
        rows = np.full(need.shape, -1, np.int64)  # the row number of every frame
        tail = self._living_tail(trajectory, segment, need[0], oldest=head + most - self.capacity)
        rows[0] = tail
        need[0] &= tail < 0
        count = int(np.count_nonzero(need))
        rows[need] = np.arange(head, head + count)
        next_rows = rows[1:].copy()
        next_rows[last_t, last_n] = np.arange(head + count, head + count + len(last_t))

        self._write(segment, need, rows[:-1][segment.valid], next_rows[segment.valid], head + count + len(last_t))
        self._tails[trajectory.source] = rows[-1]

    def _living_tail(self, trajectory: Trajectory, segment: Segment, wanted: np.ndarray, oldest: int) -> np.ndarray:
        """Row numbers [N], `oldest` or later, of stored frames equal to `obs[0]`; -1 where there is none."""
        none = np.full(wanted.shape, -1, np.int64)
        tail = self._tails.get(trajectory.source) if trajectory.continues else None
        if tail is None or tail.shape != wanted.shape:
            return none
        envs = np.flatnonzero(wanted & (tail >= max(oldest, 0)))
        positions = tail[envs] % self.capacity
        same = np.ones(len(envs), bool)
        for path, leaf in segment.obs.items():
            equal = self._arrays[f"obs/{path}"][positions] == leaf[0, envs]
            same &= equal.all(axis=tuple(range(1, equal.ndim)))
        none[envs[same]] = tail[envs[same]]
        return none

    def _write(
        self, segment: Segment, need: np.ndarray, starts: np.ndarray, next_rows: np.ndarray, new_head: int
    ) -> None:
        """Frames, then the head, then the start flags: a death in between leaves only whole transitions."""
        head = int(self._head[0])
        arrays = self._arrays
        for part in self._positions(head, new_head):
            self._size -= int(np.count_nonzero(arrays["start"][part]))
            arrays["start"][part] = False
        frames = np.flatnonzero(need)
        gapless = len(frames) > 0 and frames[-1] - frames[0] + 1 == len(frames)
        for path, leaf in segment.obs.items():
            flat = leaf.reshape(-1, *leaf.shape[2:])
            flat = flat[frames[0] : frames[-1] + 1] if gapless else flat[frames]
            self._put(f"obs/{path}", head, flat)
            self._put(f"obs/{path}", head + len(frames), segment.last_obs[path])
        positions = starts % self.capacity
        arrays["next"][positions] = next_rows % self.capacity
        for name in ("decision", "reward", "discount"):
            arrays[name][positions] = getattr(segment, name)[segment.valid]
        self._head[0] = new_head
        arrays["start"][positions] = True
        self._size += len(positions)

    def _put(self, name: str, row: int, values: np.ndarray) -> None:
        done = 0
        for part in self._positions(row, row + len(values)):
            length = part.stop - part.start
            self._arrays[name][part] = values[done : done + length]
            done += length

    def _positions(self, begin: int, end: int) -> list[slice]:
        """Where the rows begin..end - 1 lie: one slice, or two where the ring closes."""
        first, length = begin % self.capacity, end - begin
        if first + length <= self.capacity:
            return [slice(first, first + length)]
        return [slice(first, self.capacity), slice(0, first + length - self.capacity)]

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        known = len(self._sentences)
        for text in texts:
            if text not in self._sentence_ids:
                self._sentence_ids[text] = len(self._sentences)
                self._sentences.append(text)
        if len(self._sentences) > known and self._storage_dir is not None and self._arrays:
            store.write_json(self._storage_dir / _INDEX, self._describe())
        return np.fromiter((self._sentence_ids[text] for text in texts), np.int32, len(texts))

    def _check_columns(self, segment: Segment) -> None:
        """Compare what a row is in `segment` with what is stored; the first segment decides it."""
        found = {
            f"obs/{path}": Column(str(leaf.dtype), leaf.shape[2:], path in segment.texts)
            for path, leaf in segment.obs.items()
        }
        for path, leaf in segment.last_obs.items():
            first = segment.obs[path]
            if len(leaf) and (leaf.dtype, leaf.shape[1:]) != (first.dtype, first.shape[2:]):
                raise ShapeError(f"last_obs leaf '{path}' is {leaf.dtype} {list(leaf.shape[1:])}, unlike obs.")
        found["decision"] = Column(str(segment.decision.dtype), segment.decision.shape[2:])
        found |= _FIXED
        self._columns = self._columns or found
        if found != self._columns:
            names = [n for n in found | self._columns if found.get(n) != self._columns.get(n)]
            there = ", ".join(f"{name}: {self._columns.get(name)}" for name in names)
            here = ", ".join(f"{name}: {found.get(name)}" for name in names)
            raise ShapeError(f"{self._key} holds rows with {there}; the segment has {here}.")

    def _allocate(self) -> None:
        if self._storage_dir is None:
            self._arrays = store.allocate(self._columns, self.capacity, self._key)
            return
        if (self._storage_dir / _INDEX).exists():
            raise ConfigError(
                f"{self._key}.storage_dir={self._storage_dir} already holds the experience of another run, "
                "which is left as it is: name another directory or move this one (ReplayBuffer.reopen reads it)."
            )
        arrays = store.create_mapped(self._columns, self.capacity, self._storage_dir, self._key)
        self._head = store.create_mapped({_HEAD: _HEAD_COLUMN}, 1, self._storage_dir, self._key)[_HEAD]
        self._arrays = arrays
        store.write_json(self._storage_dir / _INDEX, self._describe())

    # Sampling -----------------------------------------------------------------------------------------------

    def sample(self, batch_size: int) -> Transition:
        """`batch_size` transitions, each drawn uniformly from all that are stored, as CPU tensors.

        The tensors (and lists of strings) are written again by the second next call with the same
        `batch_size`: use them before, or copy them. Raises DataError when nothing is stored.
        """
        if self._size == 0:
            raise DataError(f"{self._key} holds no transition to sample: collect or load experience first.")
        if self._batches is None:
            obs = {name[4:]: column for name, column in self._columns.items() if name.startswith("obs/")}
            self._batches = Batches(obs, self._columns["decision"])
        batch = self._batches.next(batch_size)
        rows = self._draw(batch_size)
        places = {"obs": rows, "next_obs": self._arrays["next"].take(rows)}
        for name, out in batch.arrays.items():
            side, _, path = name.partition("/")
            # mode="clip" lets numpy write into `out` directly; the rows are all in range.
            self._arrays[f"obs/{path}" if path else side].take(places.get(side, rows), 0, out, "clip")
        for name, texts in batch.texts.items():
            side, _, path = name.partition("/")
            ids = self._arrays[f"obs/{path}"].take(places[side])
            texts[:] = [self._sentences[i] for i in ids.tolist()]
        return batch.transition

    def _draw(self, count: int) -> np.ndarray:
        """Positions of `count` transitions, uniform and independent."""
        used, start = self._used, self._arrays["start"]
        if self._size * 16 < used:
            starts = np.flatnonzero(start[:used])
            return starts[self._generator.integers(len(starts), size=count)]
        found = np.empty(0, np.int64)
        while len(found) < count:
            tries = int((count - len(found)) * used / self._size * 1.1) + 16
            drawn = self._generator.integers(used, size=tries)
            drawn = drawn[start[drawn]]
            found = np.concatenate([found, drawn]) if len(found) else drawn
        return found[:count]

    def statistics(self) -> dict[str, float]:
        """Number of transitions, share of rows in use, and moments of the stored rewards (0 without any).

        Looks at every stored reward: about 2 ms for a million.
        """
        used = self._used
        rewards = self._arrays["reward"][:used][self._arrays["start"][:used]] if self._size else np.zeros(1, np.float32)
        mean = rewards.mean(dtype=np.float64)
        deviation = rewards - np.float32(mean)
        return {
            "size": float(self._size),
            "utilization": used / self.capacity,
            "max_reward": float(rewards.max()),
            "min_reward": float(rewards.min()),
            "mean_reward": float(mean),
            "std_reward": float(np.sqrt(np.dot(deviation, deviation) / len(rewards))),
        }

    # Files --------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Force what `storage_dir` holds to the disk. Nothing to do for a buffer in memory."""
        for array in (*self._arrays.values(), self._head):
            if isinstance(array.base, np.memmap):
                array.base.flush()

    def save(self, directory: str) -> None:
        """Write the rows in use, one .npy file per column, and `index.json` into an existing empty directory.

        Raises CheckpointError when the disk is full or cannot be written; the buffer itself is not touched.
        """
        target = Path(directory)
        written: list[Path] = []
        try:
            self.flush()
            checksums = {}
            for name, array in self._arrays.items():
                written.append(target / store.file_name(name))
                checksums[name] = store.save_array(written[-1], array[: self._used])
            store.write_json(target / _INDEX, {**self._describe(), **self._progress(), "checksums": checksums})
        except OSError as error:
            for path in written:
                path.unlink(missing_ok=True)
            raise CheckpointError(
                f"The replay buffer could not be saved in {directory}: {error}. It is still whole in memory; "
                "free some space or choose another directory for the run."
            ) from error

    def load(self, directory: str) -> None:
        """Become what `save` wrote; sampling goes on with the same sequence of batches.

        What a buffer of another capacity saved is taken over as by `load_share`: all of it, or the newest that fits,
        and sampling begins anew.

        Everything is verified before anything is replaced, except checksums: when one of those fails, the
        buffer is left empty. Files that `storage_dir` holds already are not deleted but moved into its folder
        `before_load_<n>`.

        Raises CheckpointError naming the file that is missing, truncated, corrupt or does not fit.
        """
        source = Path(directory)
        index = _read_index(source, "head", "tails", "generator", "checksums")
        if index["capacity"] != self.capacity:
            self.load_share([directory], rank=0, size=1)
            return
        columns = _columns_of(index)
        if self._columns and columns and columns != self._columns:
            raise CheckpointError(f"{source / _INDEX} describes rows of another kind than {self._key} holds.")
        used = min(index["head"], self.capacity)
        for name, column in columns.items():
            store.open_array(source / store.file_name(name), column, used)
        try:
            self._generator.bit_generator.state = index["generator"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{source / _INDEX} holds no state for this generator: {error}") from error

        self._empty()
        self._adopt(index)
        if not columns:
            return
        self._allocate()
        start = np.zeros(used, bool)
        for name, column in columns.items():
            out = start if name == "start" else self._arrays[name][:used]
            store.load_array(source / store.file_name(name), column, out, index["checksums"][name])
        self._head[0] = index["head"]
        self._arrays["start"][:used] = start
        self._size = int(np.count_nonzero(start))
        self._tails = {tuple(tail["source"]): np.array(tail["rows"], np.int64) for tail in index["tails"]}

    def load_share(self, directories: Sequence[str], rank: int, size: int) -> None:
        """Become share `rank` of `size` of what several buffers saved, one in each of `directories`.

        The shares are equal but for a few transitions; each has its part of old and new ones. Where they are more than
        fit, the oldest are left out. Draws go on with this buffer's own generator. Checksums are not compared.

        Raises CheckpointError naming the file that is missing, truncated or does not fit.
        """
        found = [(Path(directory), _read_index(Path(directory), "head")) for directory in directories]
        found = [(source, index) for source, index in found if index["head"]]
        columns = _columns_of(found[0][1]) if found else {}
        saved, shares = [], []
        for source, index in found:
            if _columns_of(index) != columns:
                raise CheckpointError(f"{source / _INDEX} describes rows of another kind than {found[0][0] / _INDEX}.")
            used = min(index["head"], index["capacity"])
            saved.append({n: store.open_array(source / store.file_name(n), c, used) for n, c in columns.items()})
            shares.append(share_rows(saved[-1]["start"], saved[-1]["next"], index["head"] % used, rank, size))

        self._empty()
        if not found:
            return
        self._adopt({**found[0][1], "sentences": []})
        ids = [self._encode(index["sentences"]) for _, index in found]
        self._allocate()
        places = join_rows(shares, self.capacity)
        for arrays, share, to, known in zip(saved, shares, places, ids, strict=True):
            fits = to >= 0
            for name, column in columns.items():
                values = arrays[name][share.positions[fits]]
                self._arrays[name][to[fits]] = known[values] if column.text else values
            begins = fits & share.start
            self._arrays["start"][to[fits]] = begins[fits]
            self._arrays["next"][to[begins]] = to[share.next[begins]]
        self._head[0] = sum(int(np.count_nonzero(to >= 0)) for to in places)
        self._size = int(np.count_nonzero(self._arrays["start"]))

    def _empty(self) -> None:
        self._arrays, self._tails, self._size = {}, {}, 0
        self._head = np.zeros(1, np.int64)
        if self._storage_dir is None or not (self._storage_dir / _INDEX).exists():
            return
        aside = next(path for n in itertools.count(1) if not (path := self._storage_dir / f"before_load_{n}").exists())
        try:
            aside.mkdir()
            # The index goes last: while it is here, nothing will be written over what has not moved yet.
            for path in (*sorted(self._storage_dir.glob("*.npy")), self._storage_dir / _INDEX):
                os.replace(path, aside / path.name)
        except OSError as error:
            raise ConfigError(
                f"{self._key}.storage_dir={self._storage_dir} holds the experience of an earlier run, which could "
                f"not be moved aside: {error}. Make it writable or choose another directory."
            ) from error
        _LOG.warning("%s: the rows of an earlier run are now in %s.", self._key, aside)

    def _adopt(self, index: dict[str, Any]) -> None:
        self._columns = _columns_of(index)
        self._sentences = list(index["sentences"])
        self._sentence_ids = {sentence: i for i, sentence in enumerate(self._sentences)}
        self._batches = None

    def _describe(self) -> dict[str, Any]:
        """What a row is; with `storage_dir` this alone, the rest is in the mapped files."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "capacity": self.capacity,
            "columns": {name: asdict(self._columns[name]) for name in self._arrays},
            "sentences": self._sentences,
        }

    def _progress(self) -> dict[str, Any]:
        return {
            "head": int(self._head[0]),
            "tails": [{"source": list(source), "rows": rows.tolist()} for source, rows in self._tails.items()],
            "generator": self._generator.bit_generator.state,
        }


def _read_index(directory: Path, *more: str) -> dict[str, Any]:
    """The index of a saved or mapped buffer, with the entries that every index has and `more`."""
    index = store.read_json(directory / _INDEX, _FORMAT, _VERSION)
    for entry in ("capacity", "columns", "sentences", *more):
        if entry not in index:
            raise CheckpointError(f"{directory / _INDEX} lacks the entry '{entry}'.")
    return index


def _columns_of(index: dict[str, Any]) -> dict[str, Column]:
    return {
        name: Column(entry["dtype"], tuple(entry["shape"]), entry["text"]) for name, entry in index["columns"].items()
    }
