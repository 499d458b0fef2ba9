"""Packed pictures of many files as one sequence, in memory or memory-mapped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlinf.core.errors import DataError
from rlinf.data.columns import available_memory, gigabytes
from rlinf.data.lerobot.tables import encoded_pictures, pa, read_table


class PackedPictures:
    """Encoded pictures by their row, without copies.

    Args:
        num_rows: rows that will be added.
        folder: keeps the pictures in memory-mapped files; None keeps them in memory. Files are named after what they
            were made from, and are found again by the next program that maps the same data set.
    """

    def __init__(self, num_rows: int, folder: Path | None) -> None:
        self._folder = folder
        self._buffers: list[memoryview] = []
        self._buffer = np.zeros(num_rows, np.int32)  # which buffer a row is in, from `begin` to `end`
        self._begin = np.zeros(num_rows, np.int64)
        self._end = np.zeros(num_rows, np.int64)

    def __getitem__(self, row: int) -> memoryview:
        return self._buffers[self._buffer[row]][self._begin[row] : self._end[row]]

    def add(self, path: Path, key: str, rows: np.ndarray, here: np.ndarray) -> None:
        """Let `here` be the pictures that column `key` of a parquet file has in `rows`.

        Raises DataError naming the file that is damaged or holds no pictures.
        """
        if self._folder is None:
            chunks = _read(path, key)
            if len(rows) < sum(map(len, chunks)):  # keep only what is used
                chunks = pa.chunked_array(chunks).take(pa.array(rows)).chunks
                rows = np.arange(len(rows))
        else:
            chunks = _mapped(path, key, self._folder)
        ends = np.cumsum([len(chunk) for chunk in chunks])
        of_chunk = np.searchsorted(ends, rows, side="right")
        for index, chunk in enumerate(chunks):
            chosen = of_chunk == index
            within = rows[chosen] - (ends[index] - len(chunk))
            begins, stops, data = _layout(chunk)
            self._buffer[here[chosen]] = len(self._buffers)
            self._begin[here[chosen]], self._end[here[chosen]] = begins[within], stops[within]
            self._buffers.append(data)


def check_memory(root: Path, paths: Sequence[Path]) -> None:
    """Raise DataError when the packed pictures in some files, which are most of them, would not fit into memory."""
    need, available = sum(path.stat().st_size for path in paths), available_memory()
    if available is not None and need > available:
        raise DataError(
            f"{root}: the pictures need {gigabytes(need)} of memory and {gigabytes(available)} are available; "
            "choose fewer episodes, or a folder to map them to (map_to)"
        )


def _read(path: Path, key: str) -> list[Any]:
    return encoded_pictures(read_table(path, [key])[key], key, path)


def _layout(chunk: Any) -> tuple[np.ndarray, np.ndarray, memoryview]:
    """Where each value of a binary array begins and ends in the buffer behind it."""
    wide = pa.types.is_large_binary(chunk.type)
    _, offsets, data = chunk.buffers()
    kind = np.int64 if wide else np.int32
    bounds = np.frombuffer(offsets, kind)[chunk.offset : chunk.offset + len(chunk) + 1].astype(np.int64)
    return bounds[:-1], bounds[1:], memoryview(data)


def _mapped(path: Path, key: str, folder: Path) -> list[Any]:
    """The chunks of a column in a memory-mapped file, which is made when it is not there yet."""
    if not path.is_file():
        return _read(path, key)  # says so
    state = path.stat()
    made_from = f"{path.resolve()}\n{key}\n{state.st_size}\n{state.st_mtime_ns}"
    file = folder / f"{hashlib.sha256(made_from.encode()).hexdigest()[:32]}.arrow"
    try:
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}.partial")
            try:
                schema = pa.schema([("bytes", pa.binary())])
                with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                    for chunk in _read(path, key):
                        writer.write_batch(pa.record_batch([chunk], schema=schema))
                os.replace(unfinished, file)
            finally:
                unfinished.unlink(missing_ok=True)
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()["bytes"].chunks
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be written or read ({error}); map the pictures to another folder") from error
