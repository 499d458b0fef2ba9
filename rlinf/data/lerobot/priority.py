"""Threads keep the priority that they had, whatever a library makes of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def kept_priority() -> Iterator[None]:
    """Take back real-time scheduling that the block gave to threads of this process (Linux).

    The AV1 encoder gives it to the thread that opens it, for good, and to all of its own, where it runs as root: in
    containers, say. Such a thread is never interrupted by an ordinary one, so two of them stop a machine of two cores.
    """
    if not hasattr(os, "sched_setscheduler"):
        yield
        return
    before = _policies()
    try:
        yield
    finally:
        for thread, policy in _policies().items():
            wanted = before.get(thread, os.SCHED_OTHER)
            if policy in (os.SCHED_FIFO, os.SCHED_RR) and wanted == os.SCHED_OTHER:
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def _policies() -> dict[int, int]:
    """Scheduling policy of every thread by its number; threads that end meanwhile are left out."""
    found = {}
    for path in Path("/proc/self/task").glob("*"):
        with suppress(ProcessLookupError):
            found[int(path.name)] = os.sched_getscheduler(int(path.name))
    return found
