"""The order in which a training run visits frames."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rlinf.core.errors import DataError
from rlinf.core.seeding import numpy_generator


class ShuffledBatches:
    """Batches of indices without end: epoch after epoch, each in an order of its own.

    Batch number k is a function of k and the arguments alone, so that a run resumes exactly by going on with the next
    number, and a `DataLoader` may take an instance as its `sampler` with `batch_size=None`. A batch may reach from one
    epoch into the next; so every index is visited equally often.

    Args:
        num_items: indices are 0 to `num_items` − 1.
        batch_size: indices in a batch of all ranks together.
        seed: root of the epochs' orders.
        shuffle: if false, every epoch has the natural order.
        rank, num_ranks: which share of each batch this is; the shares are disjoint.
        begin: number of the first batch that iteration gives.
        end: number behind the last one; None to go on for ever.

    Raises DataError where there is nothing to draw from or the ranks cannot share a batch evenly.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        num_ranks: int = 1,
        begin: int = 0,
        end: int | None = None,
    ) -> None:
        if num_items < 1:
            raise DataError("there are no frames to draw batches from; choose other episodes")
        if batch_size < 1 or batch_size % num_ranks:
            raise DataError(f"a batch of {batch_size} cannot be shared evenly by {num_ranks} ranks")
        self.num_items, self.batch_size, self.seed, self.shuffle = num_items, batch_size, seed, shuffle
        self.rank, self.num_ranks, self.begin, self.end = rank, num_ranks, begin, end
        self._epoch, self._permutation = -1, np.zeros(0, np.int64)

    def __call__(self, number: int) -> np.ndarray:
        """Indices int64 [batch_size / num_ranks] of batch `number`."""
        size = self.batch_size // self.num_ranks
        first = number * self.batch_size + self.rank * size
        positions = np.arange(first, first + size)
        epochs = positions // self.num_items
        result = np.empty(size, np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            result[chosen] = self._order(epoch)[positions[chosen] % self.num_items]
        return result

    def __iter__(self) -> Iterator[np.ndarray]:
        number = self.begin
        while self.end is None or number < self.end:
            yield self(number)
            number += 1

    def __len__(self) -> int:
        if self.end is None:
            raise TypeError("endless batches have no length")
        return max(0, self.end - self.begin)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            natural = np.arange(self.num_items)
            generator = numpy_generator(self.seed, f"epoch/{epoch}")
            self._permutation = generator.permutation(natural) if self.shuffle else natural
            self._epoch = epoch
        return self._permutation
