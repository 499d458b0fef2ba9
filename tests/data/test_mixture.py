"""Mixtures of data sets: their proportions, their orders, and their parts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlinf.core.errors import DataError
from rlinf.data.mixture import MixedBatches


def test_proportions_by_hand():
    """A share of 0.3 of batches of 4 is 1.2 examples: 1, 1, 2, 1, 1 and from the start."""
    batches = MixedBatches([100, 100], [7, 3], 4, seed=0)
    assert [[len(part) for part in batches(k)] for k in range(5)] == [[3, 1], [3, 1], [2, 2], [3, 1], [3, 1]]
    assert batches.given(5).tolist() == [14, 6]


def test_without_shares_every_example_counts_alike():
    batches = MixedBatches([50, 150], None, 20, seed=0)
    assert [len(part) for part in batches(7)] == [5, 15]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0.05, 1)), min_size=1, max_size=4),
    st.integers(8, 24),
    st.integers(0, 30),
)
def test_shares_are_kept_and_examples_visited_evenly(data_sets, batch_size, number):
    items, shares = zip(*data_sets, strict=True)
    batches = MixedBatches(items, shares, batch_size, seed=3)
    seen = [np.concatenate(parts) for parts in zip(*(batches(k) for k in range(number + 1)), strict=True)]
    total = (number + 1) * batch_size
    assert sum(map(len, seen)) == total
    for d, indices in enumerate(seen):
        assert abs(len(indices) - shares[d] / sum(shares) * total) <= max(1, len(items))
        visits = np.bincount(indices, minlength=items[d])
        assert visits.max() - visits.min() <= 1
    assert all(np.array_equal(a, b) for a, b in zip(batches(number), batches(number), strict=True))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_share_a_batch_without_overlap(num_ranks):
    whole = MixedBatches([40, 9], [1, 1], 12, seed=0)(5)
    parts = [MixedBatches([40, 9], [1, 1], 12, seed=0, rank=r, num_ranks=num_ranks)(5) for r in range(num_ranks)]
    assert all(sum(map(len, part)) == 12 // num_ranks for part in parts)
    for d, expected in enumerate(whole):
        assert sorted(np.concatenate([part[d] for part in parts])) == sorted(expected)
        assert np.ptp([len(part[d]) for part in parts]) <= 1


def test_mistakes_are_named():
    with pytest.raises(DataError, match="2 data sets need as many positive shares"):
        MixedBatches([3, 4], [1.0, 0.0], 8, seed=0)
    with pytest.raises(DataError, match="2 data sets need as many positive shares"):
        MixedBatches([3, 4], [1.0], 8, seed=0)
    with pytest.raises(DataError, match="cannot be shared evenly by 3 ranks"):
        MixedBatches([3], None, 8, seed=0, num_ranks=3)
    with pytest.raises(DataError, match="a batch of 3 is too small for 6 data sets"):
        MixedBatches([9] * 6, None, 3, seed=0)
    with pytest.raises(DataError, match="no frames"):
        MixedBatches([3, 0], [1, 1], 8, seed=0)
