"""Batches of chunks from several data sets, in fixed proportions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from rlinf.core import tree
from rlinf.core.errors import DataError
from rlinf.core.types import Obs
from rlinf.data.chunks import ChunkBatch, ChunkDataset
from rlinf.data.mixture import MixedBatches


class MixedChunks:
    """Batch number k of one or several data sets, a function of k and the arguments; see `MixedBatches`.

    In a batch the examples of the first data set come first. Nothing needs to be saved: training that goes on asks for
    the next number.

    Args:
        datasets: D of them, which show the same leaves of an observation.
        shares: positive, only their ratios count; None for the numbers of examples.
        batch_size: over all ranks.
        seed, rank, num_ranks: as of `MixedBatches`.

    Raises DataError where the data sets differ in horizon or action size, or cannot be mixed so.
    """

    def __init__(
        self,
        datasets: Sequence[ChunkDataset],
        shares: Sequence[float] | None,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        kinds = sorted({(data.horizon, data.action_dim) for data in datasets})
        if len(kinds) > 1:
            raise DataError(f"the data sets have chunks of {' and '.join(f'{h} x {a}' for h, a in kinds)} numbers")
        self.datasets = list(datasets)
        self.order = MixedBatches(
            [len(data) for data in datasets], shares, batch_size, seed=seed, rank=rank, num_ranks=num_ranks
        )

    def __call__(self, number: int) -> ChunkBatch:
        """This rank's part of batch `number`, on the CPU."""
        chosen = zip(self.datasets, self.order(number), strict=True)
        parts = [data.batch(rows) for data, rows in chosen if len(rows)]
        if len(parts) == 1:
            return parts[0]
        return ChunkBatch(
            _joined([part.obs for part in parts]),
            torch.cat([part.action for part in parts]),
            torch.cat([part.valid for part in parts]),
        )


def _joined(parts: Sequence[Obs]) -> Obs:
    shown = [{path: _kind(leaf) for path, leaf in tree.leaves(part)} for part in parts]
    for other in shown[1:]:
        if other != shown[0]:
            different = sorted(set(shown[0].items()) ^ set(other.items()))[0][0]
            raise DataError(
                f"the data sets show {different} differently: {shown[0].get(different, 'not at all')} and "
                f"{other.get(different, 'not at all')}; give them one size, and the same columns"
            )
    return tree.cat(parts)


def _kind(leaf: object) -> str:
    return f"{leaf.dtype} {list(leaf.shape[1:])}" if isinstance(leaf, torch.Tensor) else "text"


class Ahead:
    """Batches of `batch`, of which the next is made while the caller works on this one.

    Args:
        batch: number → batch. It is called by one thread of its own.
    """

    def __init__(self, batch: Callable[[int], ChunkBatch]) -> None:
        self._batch, self._thread = batch, ThreadPoolExecutor(1)
        self._number = -1
        self._coming: Future[ChunkBatch] | None = None

    def __call__(self, number: int) -> ChunkBatch:
        """Batch `number`; that of `number` + 1 is begun. Raises what making it raised."""
        coming = self._coming if self._number == number and self._coming is not None else self._begin(number)
        result = coming.result()
        self._number, self._coming = number + 1, self._begin(number + 1)
        return result

    def _begin(self, number: int) -> Future[ChunkBatch]:
        return self._thread.submit(self._batch, number)
