"""Which examples of several data sets a batch holds, in fixed proportions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rlinf.core.errors import DataError
from rlinf.core.seeding import derive_seed
from rlinf.data.lerobot.order import ShuffledBatches


class MixedBatches:
    """Batches of examples from D data sets, each with its share of every batch.

    Up to rounding, that is: what is too little for one batch is made good in a later one, so that after k batches of B
    each data set has given its share of k B examples to within one (the largest: to within D). Within a data set the
    examples come epoch after epoch, each in an order of its own. Batch number k is a function of k and the arguments.

    Args:
        num_items: examples in each data set.
        shares: positive numbers; only their ratios count. None for the numbers of examples.
        batch_size: B, over all ranks.
        seed: root of the orders.
        rank, num_ranks: which part of each batch this is; parts are disjoint and have the same proportions to within
            one example.

    Raises DataError where a data set is empty, a share is not positive, a batch is too small or ranks cannot share it.
    """

    def __init__(
        self,
        num_items: Sequence[int],
        shares: Sequence[float] | None,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        wanted = np.asarray(num_items if shares is None else shares, np.float64)
        if len(wanted) != len(num_items) or not (np.isfinite(wanted) & (wanted > 0)).all():
            raise DataError(f"{len(num_items)} data sets need as many positive shares, not {list(shares or [])}")
        if batch_size < 1 or batch_size % num_ranks:
            raise DataError(f"a batch of {batch_size} cannot be shared evenly by {num_ranks} ranks")
        self.shares = wanted / wanted.sum()
        most = np.ceil(self.shares * batch_size - 1e-9)  # that each may get of one batch
        if most.sum() - most.max() > batch_size:
            raise DataError(f"a batch of {batch_size} is too small for {len(wanted)} data sets")
        self.batch_size, self.rank, self.num_ranks = batch_size, rank, num_ranks
        self._orders = [
            ShuffledBatches(items, 1, seed=derive_seed(seed, f"data set {d}")) for d, items in enumerate(num_items)
        ]
        self._largest = int(self.shares.argmax())

    def given(self, number: int) -> np.ndarray:
        """How many examples of each data set, int64 [D], the batches before `number` hold."""
        total = number * self.batch_size
        counts = np.array([math.floor(share * total + 0.5) for share in self.shares], np.int64)
        counts[self._largest] = 0
        counts[self._largest] = total - counts.sum()
        return counts

    def __call__(self, number: int) -> list[np.ndarray]:
        """This rank's part of batch `number`: indices int64 into each of the D data sets, some perhaps empty."""
        first, last = self.given(number), self.given(number + 1)
        owner = np.repeat(np.arange(len(first)), last - first)  # of every example of the batch
        place = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        mine = slice(self.rank, None, self.num_ranks)  # every so many, so that each rank gets of all data sets
        owner, place = owner[mine], place[mine]
        return [
            np.array([self._orders[d](k)[0] for k in place[owner == d].tolist()], np.int64)
            for d in range(len(self._orders))
        ]
