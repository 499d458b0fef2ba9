"""Deal saved replay rows out anew: which rows of a saved buffer go to one of several, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Every share gets so many stretches of a buffer, from its oldest to its newest transitions. At the end of a stretch
# there are frames that two shares need.
_STRETCHES = 8


@dataclass(frozen=True)
class Share:
    """M rows of a saved buffer, oldest first: some transitions and the frames that they lead to.

    Attributes:
        positions: int64 [M], where the rows lie in the files.
        start: bool [M], whether a transition of this share starts there.
        next: int64 [M], which of the M rows a transition leads to; a later one. 0 where none starts.
        age: float64 [M], 0 for the oldest row of the saved buffer, rising to 1.
    """

    positions: np.ndarray
    start: np.ndarray
    next: np.ndarray
    age: np.ndarray


def share_rows(start: np.ndarray, following: np.ndarray, oldest: int, rank: int, size: int) -> Share:
    """Share `rank` of `size` of a ring of rows.

    Args:
        start: bool [rows], whether a transition starts there.
        following: int64 [rows], the position of its next observation.
        oldest: position of the oldest row.
    """
    used = len(start)
    position = (np.arange(used) + oldest) % used
    stretches = np.array_split(np.flatnonzero(start[position]), size * _STRETCHES)
    starts = np.concatenate(stretches[rank::size])
    nexts = (following[position[starts]] - oldest) % used
    kept = np.union1d(starts, nexts)
    is_start, leads_to = np.zeros(len(kept), bool), np.zeros(len(kept), np.int64)
    places = np.searchsorted(kept, starts)
    is_start[places] = True
    leads_to[places] = np.searchsorted(kept, nexts)
    return Share(position[kept], is_start, leads_to, kept / used)


def join_rows(shares: Sequence[Share], capacity: int) -> list[np.ndarray]:
    """The new place of every row of every share, by age; negative for the oldest, where they are too many."""
    age = np.concatenate([share.age for share in shares])
    places = np.empty(len(age), np.int64)
    # Stable, so that rows of one buffer keep their order: a frame stays behind the start that leads to it.
    places[np.argsort(age, kind="stable")] = np.arange(len(age))
    places -= max(0, len(age) - capacity)
    return np.split(places, np.cumsum([len(share.age) for share in shares])[:-1])
