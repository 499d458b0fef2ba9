import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlinf.core.errors import ConfigError, DataError, NonFiniteError, ShapeError
from rlinf.data.replay import ReplayBuffer
from tests.data.counting import CountingSource, add, assert_whole, stored, transitions


def rng(seed=0):
    return np.random.default_rng(seed)


def rows_used(buffer):
    return round(buffer.statistics()["utilization"] * buffer.capacity)


def replaced(trajectory, **changes):
    return dataclasses.replace(trajectory, **changes)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    capacity=st.integers(30, 120),
    envs=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    auto_reset=st.booleans(),
    steps=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6), st.booleans()), min_size=20, max_size=40),
)
def test_any_interleaving_of_sources_ends_and_wraps_keeps_transitions_whole(seed, capacity, envs, auto_reset, steps):
    generator = rng(seed)
    sources = [CountingSource(i, n, generator, auto_reset) for i, n in enumerate(envs)]
    buffer = ReplayBuffer(capacity, generator=rng(1))
    played = [False] * len(sources)
    for which, length, goes_on in steps:
        i = which % len(sources)
        segment = sources[i].segment(length, continues=goes_on and played[i])
        played[i] = True
        add(buffer, segment)
        if len(buffer):
            assert_whole(buffer.sample(16))
    assert transitions(segment) <= (stored(buffer) if len(buffer) else set())
    assert len(buffer) == (len(stored(buffer)) if len(buffer) else 0)


def test_many_wraps_with_segments_of_two_steps():
    source = CountingSource(0, 3, rng())
    buffer = ReplayBuffer(50, generator=rng())
    for i in range(400):
        add(buffer, source.segment(2, continues=i > 0))
        assert_whole(buffer.sample(16))
    assert buffer.statistics()["utilization"] == 1.0


def test_a_frame_between_two_segments_is_stored_once():
    source = CountingSource(0, 4, rng())
    buffer = ReplayBuffer(1000, generator=rng())
    for i in range(10):
        add(buffer, source.segment(2, continues=i > 0, end_probability=0))
    assert len(buffer) == 10 * 2 * 4
    assert rows_used(buffer) == 10 * 2 * 4 + 4


def test_sources_in_turns_find_their_own_frames_again():
    sources = [CountingSource(i, 2, rng(i)) for i in range(3)]
    buffer = ReplayBuffer(1000, generator=rng())
    for turn in range(10):
        for source in sources:
            add(buffer, source.segment(2, continues=turn > 0, end_probability=0))
    assert len(buffer) == 3 * 10 * 2 * 2
    assert rows_used(buffer) == 3 * (10 * 2 * 2 + 2)


def test_an_episode_end_costs_one_row_more():
    source = CountingSource(0, 1, rng())
    buffer = ReplayBuffer(1000, generator=rng())
    add(buffer, source.segment(5, continues=False, end_probability=0))
    add(buffer, source.segment(1, continues=True, end_probability=2))
    add(buffer, source.segment(4, continues=True, end_probability=0))
    assert len(buffer) == 10
    assert rows_used(buffer) == 10 + 1 + 1  # transitions, the end of the first episode, the newest frame


def test_a_segment_that_does_not_continue_starts_with_its_own_frame():
    source = CountingSource(0, 2, rng())
    buffer = ReplayBuffer(100, generator=rng())
    add(buffer, source.segment(3, continues=False, end_probability=0))
    add(buffer, source.segment(3, continues=False, end_probability=0))
    assert rows_used(buffer) == 2 * (3 * 2 + 2)
    assert len(stored(buffer)) == 12


def test_a_false_claim_to_continue_stores_the_frame_that_was_given():
    source, other = CountingSource(0, 2, rng()), CountingSource(0, 2, rng(1))
    buffer = ReplayBuffer(100, generator=rng())
    add(buffer, source.segment(3, continues=False, end_probability=0))
    other.restart()
    add(buffer, other.segment(3, continues=True, end_probability=0))
    assert rows_used(buffer) == 2 * (3 * 2 + 2)
    stored(buffer)


def test_a_continued_frame_that_was_overwritten_meanwhile_is_stored_again():
    first, second = CountingSource(0, 2, rng()), CountingSource(1, 2, rng(1))
    buffer = ReplayBuffer(20, generator=rng())
    add(buffer, first.segment(3, continues=False, end_probability=0))
    for i in range(3):
        add(buffer, second.segment(4, continues=i > 0, end_probability=0))
    segment = first.segment(3, continues=True, end_probability=0)
    add(buffer, segment)
    assert transitions(segment) <= stored(buffer)


def test_invalid_rows_are_no_transitions_and_take_no_space():
    source = CountingSource(0, 3, rng(), auto_reset=False)
    buffer = ReplayBuffer(200, generator=rng())
    ended = source.segment(1, continues=False, end_probability=2)
    add(buffer, ended)
    assert (len(buffer), rows_used(buffer)) == (3, 6)
    add(buffer, source.segment(20, continues=True))
    assert (len(buffer), rows_used(buffer)) == (3, 6)
    assert stored(buffer) == transitions(ended)


def test_a_part_of_a_segment_can_be_stored_by_masking_the_rest():
    source = CountingSource(0, 3, rng(3))
    segment = source.segment(30, continues=False)
    chosen = torch.from_numpy(rng(4).random((30, 3)) < 0.2)
    segment = replaced(segment, valid=chosen)
    buffer = ReplayBuffer(200, generator=rng())
    add(buffer, segment)
    assert stored(buffer) == transitions(segment)
    assert rows_used(buffer) <= 2 * int(chosen.sum())


def test_every_transition_is_drawn_equally_often():
    source = CountingSource(0, 2, rng())
    buffer = ReplayBuffer(40, generator=rng(7))
    for i in range(9):
        add(buffer, source.segment(3, continues=i > 0))
    size, draws = len(buffer), 200_000
    assert size < buffer.capacity  # some rows are no starts
    _, counts = np.unique(buffer.sample(draws).obs["state"].numpy(), axis=0, return_counts=True)
    expected = draws / size
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert len(counts) == size
    assert abs(chi_square - (size - 1)) < 5 * np.sqrt(2 * (size - 1))


def test_a_few_transitions_among_many_rows_are_drawn_equally_often():
    source = CountingSource(0, 50, rng())
    buffer = ReplayBuffer(20_000, generator=rng())
    buffer.add(*folded(source.segment(100, continues=False, end_probability=0)))
    buffer._arrays["start"][:] = False
    buffer._arrays["start"][[17, 400]] = True
    buffer._size = 2
    batch = buffer.sample(4096)
    assert_whole(batch)
    assert 1800 < int((batch.obs["state"] == batch.obs["state"][0]).all(-1).sum()) < 2300


def folded(trajectory):
    return trajectory, trajectory.reward[..., 0], (trajectory.obs["state"][:-1].sum(-1) % 11) / 11


def test_leaves_keep_their_types():
    buffer = ReplayBuffer(50, generator=rng())
    add(buffer, CountingSource(0, 2, rng()).segment(3, continues=False))
    batch = buffer.sample(5)
    assert batch.obs["images"]["front"].dtype == torch.uint8
    assert batch.next_obs["images"]["front"].shape == (5, 2, 2, 3)
    assert batch.obs["state"].dtype == torch.float32
    assert (batch.reward.dtype, batch.discount.dtype) == (torch.float32, torch.float32)
    assert isinstance(batch.obs["instruction"], list)


def test_a_batch_stays_until_the_second_next_one_of_its_size():
    buffer = ReplayBuffer(200, generator=rng())
    add(buffer, CountingSource(0, 5, rng()).segment(20, continues=False))
    first = buffer.sample(64)
    state = first.obs["state"].clone()
    texts = list(first.obs["instruction"])
    buffer.sample(64)
    buffer.sample(32)
    buffer.sample(32)
    assert torch.equal(first.obs["state"], state)
    assert first.obs["instruction"] == texts
    assert buffer.sample(64).obs["state"].data_ptr() == first.obs["state"].data_ptr()
    assert not torch.equal(first.obs["state"], state)


def test_equal_generators_draw_equal_batches():
    segment = CountingSource(0, 3, rng()).segment(10, continues=False)
    first, second = ReplayBuffer(60, generator=rng(5)), ReplayBuffer(60, generator=rng(5))
    add(first, segment)
    add(second, segment)
    for _ in range(5):
        assert torch.equal(first.sample(16).obs["state"], second.sample(16).obs["state"])


def test_statistics_count_the_stored_transitions_only():
    source = CountingSource(0, 1, rng())
    buffer = ReplayBuffer(10, generator=rng())
    assert buffer.statistics() == {
        "size": 0,
        "utilization": 0,
        "max_reward": 0,
        "min_reward": 0,
        "mean_reward": 0,
        "std_reward": 0,
    }
    segment = source.segment(4, continues=False, end_probability=0)
    buffer.add(segment, torch.tensor([[1.0], [-2.0], [3.0], [6.0]]), torch.ones(4, 1))
    statistics = buffer.statistics()
    assert statistics["size"] == 4
    assert statistics["utilization"] == 0.5
    assert (statistics["max_reward"], statistics["min_reward"]) == (6.0, -2.0)
    assert statistics["mean_reward"] == pytest.approx(2.0)
    assert statistics["std_reward"] == pytest.approx(np.sqrt((1 + 16 + 1 + 16) / 4))
    segment = source.segment(8, continues=True, end_probability=0)
    buffer.add(segment, torch.arange(8.0)[:, None], torch.ones(8, 1))
    statistics = buffer.statistics()  # eight new frames on top of five: the first three are gone
    assert statistics["size"] == 1 + 8
    assert (statistics["max_reward"], statistics["min_reward"]) == (7.0, 0.0)
    assert statistics["mean_reward"] == pytest.approx((6 + 28) / 9)


def test_statistics_of_rewards_far_from_zero_keep_their_spread():
    segment = CountingSource(0, 1, rng()).segment(2000, continues=False, end_probability=0)
    buffer = ReplayBuffer(3000, generator=rng())
    reward = 1000 + torch.linspace(-0.5, 0.5, 2000)[:, None]
    buffer.add(segment, reward, torch.ones(2000, 1))
    assert buffer.statistics()["std_reward"] == pytest.approx(float(reward.double().std(correction=0)), rel=1e-3)


@pytest.mark.parametrize("leaf", ["state", "decision", "reward", "discount", "last_obs"])
def test_a_number_that_is_not_finite_is_refused_by_name_and_nothing_is_stored(leaf):
    source = CountingSource(3, 2, rng())
    buffer = ReplayBuffer(50, generator=rng())
    add(buffer, source.segment(2, continues=False, end_probability=0))
    before = stored(buffer)
    segment, reward, discount = folded(source.segment(3, continues=True, end_probability=2))
    reward, discount = reward.clone(), discount.clone()
    target, name = {
        "state": (segment.obs["state"], "observation leaf 'state' is nan at step 1 of environment 0"),
        "decision": (segment.decision, "decision is nan at step 1 of environment 0"),
        "reward": (reward, "reward is nan at step 1 of environment 0"),
        "discount": (discount, "discount is nan at step 1 of environment 0"),
        "last_obs": (segment.last_obs["state"], "last observation leaf 'state' is nan at step 0 of environment 1"),
    }[leaf]
    target[1].view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteError, match=name):
        buffer.add(segment, reward, discount)
    assert stored(buffer) == before


def test_infinity_is_refused_too():
    segment, reward, discount = folded(CountingSource(0, 2, rng()).segment(3, continues=False))
    with pytest.raises(NonFiniteError, match=r"reward is inf .* source \(0, 0\)"):
        ReplayBuffer(50, generator=rng()).add(segment, reward.fill_(float("inf")), discount)


def test_an_end_without_its_last_observation_is_refused():
    segment = CountingSource(0, 2, rng()).segment(3, continues=False, end_probability=2)
    cut = replaced(
        segment,
        last_index=segment.last_index[:-1],
        last_obs={**segment.last_obs, "state": segment.last_obs["state"][:-1]},
    )
    buffer = ReplayBuffer(50, generator=rng())
    with pytest.raises(ShapeError, match="last_obs leaf"):
        add(buffer, cut)
    cut = replaced(segment, truncated=torch.zeros_like(segment.truncated), terminated=segment.terminated & False)
    with pytest.raises(ShapeError, match="ends 0 episodes, and its last_index \\(6 rows\\)"):
        add(buffer, cut)


def test_rows_of_another_kind_are_refused_by_name():
    source = CountingSource(0, 2, rng())
    buffer = ReplayBuffer(50, generator=rng())
    add(buffer, source.segment(2, continues=False))
    segment = source.segment(2, continues=True)
    wide = replaced(segment, decision=torch.zeros(2, 2, 7))
    with pytest.raises(ShapeError, match=r"decision: Column\(dtype='float32', shape=\(4,\).*shape=\(7,\)"):
        buffer.add(wide, segment.reward[..., 0], segment.reward[..., 0])
    with pytest.raises(ShapeError, match="decision has the shape"):
        buffer.add(replaced(segment, decision=torch.zeros(3, 2, 4)), segment.reward[..., 0], segment.reward[..., 0])


def test_a_type_that_numpy_lacks_is_refused_by_name():
    segment, reward, discount = folded(CountingSource(0, 2, rng()).segment(3, continues=False))
    with pytest.raises(DataError, match="decision cannot be stored"):
        ReplayBuffer(50, generator=rng()).add(replaced(segment, decision=segment.decision.bfloat16()), reward, discount)


def test_sampling_from_nothing_says_so():
    with pytest.raises(DataError, match=r"algorithm\.replay_buffer holds no transition"):
        ReplayBuffer(50, generator=rng()).sample(4)


def test_a_segment_larger_than_the_buffer_names_the_key():
    source = CountingSource(0, 4, rng())
    buffer = ReplayBuffer(20, generator=rng())
    with pytest.raises(ConfigError, match=r"algorithm\.replay_buffer\.capacity=20 is less than the 24 rows"):
        add(buffer, source.segment(5, continues=False, end_probability=0))
    assert len(buffer) == 0


def test_memory_that_is_not_there_names_the_key_and_what_would_fit():
    buffer = ReplayBuffer(10**13, generator=rng(), config_key="algorithm.demo_buffer")
    with pytest.raises(
        ConfigError, match=r"algorithm\.demo_buffer\.capacity=10000000000000 needs .* Set it to at most"
    ):
        add(buffer, CountingSource(0, 2, rng()).segment(3, continues=False))


def test_a_large_buffer_takes_memory_only_for_what_it_holds():
    def resident_bytes():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident_bytes()
    # Every column is larger than the 32 MB up to which malloc may reuse memory that earlier tests have touched.
    buffer = ReplayBuffer(50_000_000, generator=rng())
    add(buffer, CountingSource(0, 2, rng()).segment(3, continues=False))
    assert resident_bytes() - before < 100e6 < 50_000_000 * 30
    assert len(buffer) == 6


def test_capacity_must_be_positive():
    with pytest.raises(ConfigError, match="capacity=0 must be at least 1"):
        ReplayBuffer(0, generator=rng())
