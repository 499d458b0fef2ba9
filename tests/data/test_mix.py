import numpy as np
import pytest
import torch

from rlinf.core.errors import ConfigError, DataError, ShapeError
from rlinf.data.mix import MixedReplay, interleave
from rlinf.data.replay import ReplayBuffer
from tests.data.counting import CountingSource, add, assert_whole


def buffer_of(number, steps=20, seed=0):
    buffer = ReplayBuffer(200, generator=np.random.default_rng(seed))
    add(buffer, CountingSource(number, 3, np.random.default_rng(seed)).segment(steps, continues=False))
    return buffer


def origin(batch):
    return batch.obs["state"][:, 0]


def test_half_of_a_batch_is_prior_data_row_by_row():
    mixed = MixedReplay(buffer_of(1), buffer_of(2))
    for _ in range(3):
        batch = mixed.sample(8)
        assert origin(batch).tolist() == [1, 2] * 4
        assert_whole(batch)


@pytest.mark.parametrize(("fraction", "size"), [(0.5, 512), (0.25, 256), (0.1, 250), (0.7, 77), (1 / 3, 96)])
def test_counts_are_exact_and_every_slice_is_balanced(fraction, size):
    batch = MixedReplay(buffer_of(0), buffer_of(1), fraction).sample(size)
    prior = origin(batch)
    k = round(size * fraction)
    assert int(prior.sum()) == k
    for length in (2, 5, 16, size // 2):
        windows = prior.unfold(0, length, 1).sum(-1)
        assert (windows - length * k / size).abs().max() < 1


def test_places_are_as_by_hand():
    online, prior = interleave(10, 0.3)
    assert prior.tolist() == [3, 6, 9]
    assert online.tolist() == [0, 1, 2, 4, 5, 7, 8]


def test_a_batch_stays_until_the_second_next_one():
    mixed = MixedReplay(buffer_of(1), buffer_of(2))
    first = mixed.sample(32)
    state, texts = first.obs["state"].clone(), list(first.next_obs["instruction"])
    mixed.sample(32)
    assert torch.equal(first.obs["state"], state)
    assert first.next_obs["instruction"] == texts
    assert mixed.sample(32).obs["state"].data_ptr() == first.obs["state"].data_ptr()


def test_few_demonstrations_are_drawn_again_and_again():
    batch = MixedReplay(buffer_of(1), buffer_of(2, steps=1)).sample(64)
    assert int((origin(batch) == 2).sum()) == 32


def test_an_empty_store_is_named():
    empty = ReplayBuffer(200, generator=np.random.default_rng(0))
    with pytest.raises(DataError, match="the online replay buffer is empty"):
        MixedReplay(empty, buffer_of(1)).sample(8)
    with pytest.raises(DataError, match="the demonstration buffer is empty"):
        MixedReplay(buffer_of(1), empty).sample(8)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_a_fraction_that_leaves_out_one_store_is_refused(fraction):
    with pytest.raises(ConfigError, match=r"algorithm\.demo_buffer\.fraction=.* must lie between 0 and 1"):
        MixedReplay(buffer_of(1), buffer_of(2), fraction)


def test_a_batch_too_small_for_both_is_refused():
    with pytest.raises(ConfigError, match="leaves no row for one of the two in a batch of 1"):
        MixedReplay(buffer_of(1), buffer_of(2)).sample(1)


def test_stores_of_different_kinds_are_refused_with_the_difference():
    other = ReplayBuffer(200, generator=np.random.default_rng(0))
    segment = CountingSource(0, 3, np.random.default_rng(0)).segment(5, continues=False)
    object.__setattr__(segment, "decision", torch.zeros(5, 3, 7))
    add(other, segment)
    with pytest.raises(ShapeError, match=r"demonstrations do not fit .*: decision is .*\(7,\).* there and .*\(4,\)"):
        MixedReplay(buffer_of(1), other).sample(8)
