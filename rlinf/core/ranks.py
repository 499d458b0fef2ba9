"""The ranks of a learner: one, or several processes that learn together, each from its own part of the experience.

All ranks learn the same weights, of which each has all or its share, and make the same updates at the same time.
Whoever computes something that has to be that of all experience calls a `Ranks`; with `ONE_RANK`, the default
everywhere, that costs nothing and changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from rlinf.core.errors import ConfigError

T = TypeVar("T")


class Ranks(Protocol):
    """Every method is collective: all ranks call it, in the same order, or those that do wait in vain.

    They raise WorkerDied when another rank has failed or does not come in time. Names ending in `_` write into
    their argument, which has the same shape and type on all ranks, and return it.
    """

    @property
    def rank(self) -> int:
        """Which one this is, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each."""
        ...

    def mean_(self, tensor: Tensor) -> Tensor:
        """The mean over all ranks, the same bits on each."""
        ...

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """What rank 0 has."""
        ...

    def cat(self, rows: Tensor, numbers: Sequence[int] | None = None) -> Tensor:
        """The rows [M, ...] of all ranks, in the order of ranks; their numbers may differ, and are asked for where
        `numbers` does not give them.
        """
        ...

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in the order of ranks. For small plain values: they are pickled."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        ...

    def all(self, flag: bool) -> bool:
        """Whether it is true on every rank."""
        ...

    def meeting(self) -> contextlib.AbstractContextManager[None]:
        """Around calls in which others than this class talk to the other ranks, so that they raise WorkerDied too."""
        ...


@dataclass(frozen=True)
class OneRank:
    """A learner alone: what it has is all there is."""

    rank: int = 0
    size: int = 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor` as it is."""
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """`tensor` as it is."""
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """`tensor` as it is."""
        return tensor

    def cat(self, rows: Tensor, numbers: Sequence[int] | None = None) -> Tensor:
        """`rows` as they are."""
        return rows

    def gather(self, value: T) -> list[T]:
        """[value]."""
        return [value]

    def any(self, flag: bool) -> bool:
        """`flag`."""
        return flag

    def all(self, flag: bool) -> bool:
        """`flag`."""
        return flag

    def meeting(self) -> contextlib.AbstractContextManager[None]:
        """Nothing can go wrong."""
        return contextlib.nullcontext()


ONE_RANK = OneRank()


def share_of(number: int, ranks: Ranks, name: str) -> int:
    """What falls to each rank. Raises ConfigError naming the quantity `name` when it cannot be dealt out evenly."""
    if number % ranks.size:
        raise ConfigError(f"{name}={number} cannot be dealt out evenly over {ranks.size} ranks: choose a multiple")
    return number // ranks.size
