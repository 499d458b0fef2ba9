"""What processes pass to each other: arrays that several see at once, and messages."""

from __future__ import annotations

import math
import mmap
import os
import pickle
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

_ALIGNMENT = 64

TEXT_BYTES = 512
TEXT_DTYPE = f"S{TEXT_BYTES}"
"""Room for one text, an instruction for example, as UTF-8."""

Layout = dict[str, tuple[tuple[int, ...], str]]
"""Name → (shape, numpy dtype name)."""


@dataclass
class SharedArrays:
    """Named arrays in memory that has no name: it is gone with the last process that holds it, even a killed one.

    `file` is the descriptor that another process needs to see the same memory.
    """

    file: int
    arrays: dict[str, np.ndarray]

    @classmethod
    def create(cls, layout: Layout) -> SharedArrays:
        """New zeroed arrays."""
        size = max(_offsets(layout)[1], 1)
        if hasattr(os, "memfd_create"):
            file = os.memfd_create("rlinf-env")
        else:
            with tempfile.TemporaryFile() as unnamed:
                file = os.dup(unnamed.fileno())
        os.ftruncate(file, size)
        return cls.open(file, layout)

    @classmethod
    def open(cls, file: int, layout: Layout) -> SharedArrays:
        """The arrays of `layout` in memory that another process created. Takes over the descriptor."""
        offsets, size = _offsets(layout)
        memory = mmap.mmap(file, max(size, 1))
        arrays = {
            name: np.ndarray(shape, np.dtype(dtype), buffer=memory, offset=offsets[name])
            for name, (shape, dtype) in layout.items()
        }
        return cls(file, arrays)

    def close(self) -> None:
        """Let go of the descriptor; the memory goes with the last array. Calling it twice is allowed."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def _offsets(layout: Layout) -> tuple[dict[str, int], int]:
    """Byte offset of every array, and the size of all."""
    offsets, end = {}, 0
    for name, (shape, dtype) in layout.items():
        offsets[name] = end
        size = math.prod(shape) * np.dtype(dtype).itemsize
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def send(pipe: Connection, message: Any) -> None:
    """Send any picklable object, tensors by value (`Connection.send` would open shared files for them)."""
    pipe.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def receive(pipe: Connection) -> Any:
    """The next object that was sent at the other end; waits for it. Raises EOFError when that end is closed."""
    return pickle.loads(pipe.recv_bytes())
