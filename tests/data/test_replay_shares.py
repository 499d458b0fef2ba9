"""What some buffers saved is dealt out to others: every transition once, whole, old and new ones to each."""

import itertools

import numpy as np
import pytest

from rlinf.core.errors import CheckpointError
from rlinf.data.replay import ReplayBuffer
from tests.data.counting import CountingSource, add, stored, transitions


def rng(seed=0):
    return np.random.default_rng(seed)


def saved(directory, number, capacity=200, adds=12):
    """A buffer with what source `number` played, saved; and what it holds."""
    source = CountingSource(number, 3, rng(number))
    buffer = ReplayBuffer(capacity, generator=rng(1))
    for i in range(adds):
        add(buffer, source.segment(4, continues=i > 0))
    target = directory / f"rank_{number}"
    target.mkdir()
    buffer.save(str(target))
    return str(target), (stored(buffer) if adds else set())


def dealt(directories, size, capacity=500, **settings):
    buffers = [ReplayBuffer(capacity, generator=rng(5), **settings) for _ in range(size)]
    for rank, buffer in enumerate(buffers):
        buffer.load_share(directories, rank, size)
    return buffers


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("capacity", [50, 200], ids=["wrapped", "part full"])
def test_every_transition_is_dealt_once(tmp_path, before, after, capacity):
    directories, held = zip(*(saved(tmp_path, number, capacity) for number in range(before)), strict=True)
    shares = [stored(buffer) for buffer in dealt(directories, after)]
    assert set.union(*shares) == set.union(*held)
    assert not any(one & other for one, other in itertools.combinations(shares, 2))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 8 * before


def test_every_share_has_old_and_new_transitions(tmp_path):
    directory, held = saved(tmp_path, 0, adds=40, capacity=1000)
    for share in map(stored, dealt([directory], 2)):
        episodes = [state[2] for state in share]
        last = max(state[2] for state in held)
        assert min(episodes) < 0.15 * last and max(episodes) > 0.85 * last


def test_where_too_much_was_saved_the_oldest_go(tmp_path):
    directories, held = zip(*(saved(tmp_path, number) for number in range(2)), strict=True)
    (buffer,) = dealt(directories, 1, capacity=100)
    left = stored(buffer)
    assert left < set.union(*held)
    for number in (0, 1):
        gone = [state[2] for state in held[number] - left if state[1] == 0]
        kept = [state[2] for state in held[number] & left if state[1] == 0]
        assert max(gone) <= min(kept)
    assert buffer.statistics()["utilization"] == 1.0


def test_adding_goes_on(tmp_path):
    directory, held = saved(tmp_path, 0)
    for buffer in dealt([directory], 2, capacity=160):
        source, added = CountingSource(7, 3, rng(7)), set()
        share = stored(buffer)
        for i in range(3):
            segment = source.segment(4, continues=i > 0)
            add(buffer, segment)
            added |= transitions(segment)
        assert stored(buffer) == share | added
        for _ in range(20):
            add(buffer, source.segment(4, continues=True))
        assert not stored(buffer) & held, "what was dealt is overwritten like anything else"


def test_a_dealt_buffer_can_be_saved_and_mapped(tmp_path):
    directory, _ = saved(tmp_path, 0)
    (buffer,) = dealt([directory], 1, storage_dir=str(tmp_path / "rows"))
    again = ReplayBuffer.reopen(str(tmp_path / "rows"), generator=rng())
    assert stored(again) == stored(buffer)
    (tmp_path / "again").mkdir()
    buffer.save(str(tmp_path / "again"))
    loaded = ReplayBuffer(500, generator=rng())
    loaded.load(str(tmp_path / "again"))
    assert stored(loaded) == stored(buffer)


def test_buffers_that_held_nothing_are_nothing(tmp_path):
    empty, _ = saved(tmp_path, 0, adds=0)
    full, held = saved(tmp_path, 1)
    assert len(dealt([empty], 2)[1]) == 0
    assert set.union(*map(stored, dealt([empty, full], 2))) == held


def test_rows_of_another_kind_are_refused_before_anything_is_replaced(tmp_path):
    directories = [saved(tmp_path, number)[0] for number in range(2)]
    (buffer,) = dealt(directories[:1], 1)
    before = stored(buffer)
    index = tmp_path / "rank_1" / "index.json"
    index.write_text(index.read_text().replace('"float32"', '"float64"'))
    with pytest.raises(CheckpointError, match=r"rank_1/index\.json describes rows of another kind than .*rank_0"):
        buffer.load_share(directories, 0, 1)
    (tmp_path / "rank_0" / "reward.npy").unlink()
    with pytest.raises(CheckpointError, match=r"reward\.npy is missing"):
        buffer.load_share(directories[:1], 0, 1)
    assert stored(buffer) == before
