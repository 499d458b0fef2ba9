"""Rows of named arrays in memory or in memory-mapped files, and the files that they are saved to."""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlinf.core.errors import CheckpointError, ConfigError

_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Column:
    """One value per row.

    Attributes:
        dtype: numpy dtype name.
        shape: shape of one value.
        text: the values are ids of strings.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    text: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes that one row of this column takes."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


Arrays = dict[str, np.ndarray]
"""Column name → array [rows, *shape]. Names are paths ("obs/images/front")."""


def file_name(column: str) -> str:
    """Name of the file of a column: `obs/images/front` → `obs.images.front.npy`."""
    return column.replace("/", ".") + ".npy"


def gigabytes(num_bytes: float) -> str:
    """`num_bytes` for people, in units of 10⁹ bytes."""
    return f"{num_bytes / 1e9:.3g} GB"


def available_memory() -> int | None:
    """Bytes that this process may still take, or None where the system does not say.

    The kernel's MemAvailable, and no more than the limit of the container.
    """
    limits: list[int] = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    limits.extend(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits, default=None)


def allocate(columns: dict[str, Column], capacity: int, config_key: str) -> Arrays:
    """Zeroed arrays [capacity, *shape] in memory; the system hands out pages when they are first written.

    Raises ConfigError naming `<config_key>.capacity` when they would not fit.
    """
    row_bytes = sum(column.row_bytes for column in columns.values())
    available = available_memory()
    if available is not None and capacity * row_bytes > available:
        raise ConfigError(
            f"{config_key}.capacity={capacity} needs {gigabytes(capacity * row_bytes)} of memory "
            f"({row_bytes} bytes per row) and {gigabytes(available)} are available. Set it to at most "
            f"{available // row_bytes}, or set {config_key}.storage_dir to keep the rows on disk."
        )
    return {name: np.zeros((capacity, *column.shape), column.dtype) for name, column in columns.items()}


def create_mapped(columns: dict[str, Column], capacity: int, directory: Path, config_key: str) -> Arrays:
    """Zeroed memory-mapped arrays [capacity, *shape] in new .npy files of `directory`.

    All disk blocks are reserved here, so that a disk that fills up later cannot kill the process in the
    middle of a write. Raises ConfigError naming `<config_key>.storage_dir` when they cannot be.
    """
    need = capacity * sum(column.row_bytes for column in columns.values())
    arrays: Arrays = {}
    created: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        if need > free:
            raise ConfigError(
                f"{config_key}.storage_dir={directory} needs {gigabytes(need)} of disk for {capacity} rows "
                f"and {gigabytes(free)} are free: lower {config_key}.capacity or choose another disk."
            )
        for name, column in columns.items():
            path = directory / file_name(name)
            created.append(path)
            mapped = np.lib.format.open_memmap(
                path, mode="w+", dtype=np.dtype(column.dtype), shape=(capacity, *column.shape)
            )
            arrays[name] = np.asarray(mapped)  # plain arrays are quicker to index than their memmap subclass
            if hasattr(os, "posix_fallocate"):
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    except OSError as error:
        for path in created:
            path.unlink(missing_ok=True)
        raise ConfigError(
            f"{config_key}.storage_dir={directory} cannot hold {gigabytes(need)}: {error}. "
            f"Choose a writable directory with enough space, or lower {config_key}.capacity."
        ) from error
    return arrays


def open_array(path: Path, column: Column, rows: int, mode: Literal["r", "r+"] = "r") -> np.ndarray:
    """Memory-map an existing .npy file that must hold `rows` values of `column`, else CheckpointError."""
    try:
        array = np.asarray(np.lib.format.open_memmap(path, mode=mode))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.") from error
    except (OSError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is truncated, corrupt or no array file: {error}") from error
    expected = (np.dtype(column.dtype), (rows, *column.shape))
    if (array.dtype, array.shape) != expected:
        raise CheckpointError(
            f"{path} holds {array.dtype} {list(array.shape)}; expected {expected[0]} {list(expected[1])}."
        )
    return array


def save_array(path: Path, array: np.ndarray) -> int:
    """CRC-32 of the values of `array`, after writing them to a new .npy file and to the disk beneath it."""
    array = np.ascontiguousarray(array)
    data = array.reshape(-1).view(np.uint8).data
    crc = 0
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        for begin in range(0, len(data), _CHUNK_BYTES):
            chunk = data[begin : begin + _CHUNK_BYTES]
            crc = zlib.crc32(chunk, crc)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return crc


def load_array(path: Path, column: Column, out: np.ndarray, crc: int) -> None:
    """Fill `out` from a file of `save_array`. Raises CheckpointError naming it if its CRC-32 differs."""
    stored = open_array(path, column, len(out))
    rows = max(1, _CHUNK_BYTES // max(1, column.row_bytes))
    seen = 0
    for begin in range(0, len(out), rows):
        out[begin : begin + rows] = stored[begin : begin + rows]
        seen = zlib.crc32(out[begin : begin + rows].reshape(-1).view(np.uint8).data, seen)
    if seen != crc:
        raise CheckpointError(f"{path} is corrupt: its values do not have the checksum of when they were saved.")


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Put `data` under the name `path` in one step: readers and crashes see the old file or the new one."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, in one step as `write_atomic`."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def sync_path(path: Path) -> None:
    """Make the content of a file, or the renames inside a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, format_name: str, version: int) -> dict[str, Any]:
    """The JSON object of a file that says it is `format_name`, `version`; else CheckpointError naming it."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: the directory is no {format_name}, or an incomplete one.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict) or value.get("format") != format_name:
        raise CheckpointError(f"{path} does not describe a {format_name}.")
    if value.get("version") != version:
        raise CheckpointError(
            f"{path} has version {value.get('version')} of the format; this program reads version {version}."
        )
    return value
