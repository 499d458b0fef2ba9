"""`metrics.jsonl`: one JSON object per global step, the record from which every curve is drawn.

A line holds `step` (global step), `elapsed_s` (wall clock of the run, all its sessions together) and the
metrics of the step by tag. A value that is not finite is written as null, since JSON has no word for it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlinf.core.errors import DataError

FILE_NAME = "metrics.jsonl"

Row = dict[str, Any]
"""One line of the journal."""


class AppendFile:
    """A file that only grows by whole records, also when the disk is full in between.

    What could not be written is kept and tried again with the next record; a record that was cut short is
    first taken back. So the file never holds half a record in its middle.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._good_size = path.stat().st_size
        self._torn = False
        self._waiting: list[bytes] = []

    def append(self, record: bytes) -> None:
        """Write `record` behind all that came before. After an OSError the record is still waiting."""
        self._waiting.append(record)
        while self._waiting:
            if self._torn:
                os.ftruncate(self._file.fileno(), self._good_size)
            self._torn = True
            written = self._file.write(self._waiting[0])
            if written != len(self._waiting[0]):
                raise OSError(f"only {written} of {len(self._waiting[0])} bytes fitted into {self.path}")
            self._torn = False
            self._good_size += written
            del self._waiting[0]

    def close(self) -> None:
        """Free the file, without half a record at its end. Calling it twice is allowed."""
        if self._torn and not self._file.closed:
            os.ftruncate(self._file.fileno(), self._good_size)
        self._file.close()


class MetricsFile:
    """Logger that writes the journal of a run directory; see the module's text for the format."""

    name = FILE_NAME

    def __init__(self, run_dir: Path, resume_step: int = 0) -> None:
        """Continue the journal behind `resume_step`, or begin a new one when that is 0.

        Lines behind `resume_step` belong to steps that will be played again, and are dropped. A journal that
        is not continued is moved aside (`metrics.1.jsonl`, ...), never overwritten.
        """
        path = run_dir / FILE_NAME
        self.elapsed_before_s = 0.0
        if path.exists() and resume_step > 0:
            kept = [row for row in read_rows(path) if row["step"] <= resume_step]
            self.elapsed_before_s = max((row["elapsed_s"] for row in kept), default=0.0)
            _rewrite(path, kept)
        elif path.exists():
            path.rename(_free_name(path))
        self._file = AppendFile(path)

    def log(self, step: int, metrics: Mapping[str, float], elapsed_s: float) -> None:
        """Append the line of `step`."""
        row = {"step": step, "elapsed_s": round(elapsed_s, 3), **metrics}
        self._file.append(_line(row))

    def close(self) -> None:
        """Free the file."""
        self._file.close()


def read_rows(path: Path) -> Iterator[Row]:
    """Lines of a journal, null read as NaN. A last line that was cut short by a crash is left out.

    Raises: DataError naming file and line where another line is not a record of this format.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not {"step", "elapsed_s"} <= row.keys():
                raise ValueError("`step` or `elapsed_s` is missing")
        except (ValueError, AttributeError) as error:
            if number == len(lines):  # whole lines end in a newline, so that only a cut one can be the last
                return
            raise DataError(f"{path}:{number} is not a line of metrics ({error}); remove that line") from error
        yield {key: math.nan if value is None else value for key, value in row.items()}


def _line(row: Mapping[str, Any]) -> bytes:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


def _rewrite(path: Path, rows: list[Row]) -> None:
    """Replace the file in one step, so that a crash leaves either the old or the new one."""
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        file.writelines(map(_line, rows))
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    return aside
