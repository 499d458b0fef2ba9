"""Statistics by hand, and the order of batches."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlinf.core.errors import DataError
from rlinf.data.lerobot.order import ShuffledBatches
from rlinf.data.lerobot.reader import LeRobotDataset
from rlinf.data.lerobot.stats import NAMES, merge, number_stats, picture_stats
from tests.data.lerobot_sets import CAMERA, episode, write

# --- statistics -----------------------------------------------------------------------------------------------


def test_statistics_of_numbers_by_hand():
    stats = number_stats(np.array([[0.0, 5], [1, 5], [2, 5], [3, 5], [4, 5]], np.float32))
    assert list(stats) == list(NAMES)
    assert stats["min"].tolist() == [0, 5]
    assert stats["max"].tolist() == [4, 5]
    assert stats["mean"].tolist() == [2, 5]
    np.testing.assert_allclose(stats["std"], [np.sqrt(2), 0])
    assert stats["count"].tolist() == [5]
    np.testing.assert_allclose(stats["q01"], [0.04, 5])
    np.testing.assert_allclose(stats["q10"], [0.4, 5])
    assert stats["q50"].tolist() == [2, 5]
    np.testing.assert_allclose(stats["q99"], [3.96, 5])


def test_whole_numbers_stay_whole_flags_stay_flags_and_matrices_keep_their_last_axis():
    whole = number_stats(np.array([[3], [1]]))
    assert (whole["min"].dtype, whole["min"].tolist(), whole["mean"].tolist()) == (np.int64, [1], [2])
    flags = number_stats(np.array([[True], [False], [True], [True]]))
    assert (flags["max"].dtype, flags["max"].tolist(), flags["mean"].tolist()) == (bool, [True], [0.75])
    matrix = number_stats(np.arange(12, dtype=np.float32).reshape(2, 2, 3))
    assert (matrix["mean"].tolist(), matrix["count"].tolist()) == ([4.5, 5.5, 6.5], [2])


def test_statistics_of_pictures_by_hand():
    frames = np.zeros((2, 2, 2, 3), np.uint8)
    frames[..., 0] = [[[0, 51], [102, 153]], [[0, 51], [102, 153]]]  # 0, 0.2, 0.4, 0.6
    frames[1, ..., 1] = 255
    stats = picture_stats(frames)
    assert {name: value.shape for name, value in stats.items()} == dict.fromkeys(NAMES, (3, 1, 1)) | {"count": (1,)}
    np.testing.assert_allclose(stats["mean"][:, 0, 0], [0.3, 0.5, 0])
    np.testing.assert_allclose(stats["std"][:, 0, 0], [np.sqrt(0.05), 0.5, 0])
    np.testing.assert_allclose(stats["max"][:, 0, 0], [0.6, 1, 0])
    np.testing.assert_allclose(stats["q50"][:, 0, 0], [0.2, 0, 0])
    np.testing.assert_allclose(stats["q90"][:, 0, 0], [0.6, 1, 0])
    assert stats["count"].tolist() == [2]


def test_pictures_are_sampled_evenly():
    frames = np.zeros((200, 128, 96, 3), np.uint8)
    frames[100:] = 200
    frames[:, :64] += 50
    stats = picture_stats(frames)
    assert stats["count"].tolist() == [64]
    np.testing.assert_allclose(stats["mean"][:, 0, 0], 125 / 255)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(0, 99))
def test_merged_statistics_are_those_of_all_frames(lengths, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(rng.normal(), 2, (length, 3)) for length in lengths]
    every = np.concatenate(parts)
    merged, direct = merge([number_stats(part) for part in parts]), number_stats(every)
    for name in ("min", "max", "mean", "std", "count"):
        np.testing.assert_allclose(merged[name], direct[name], atol=1e-12)
    # Of quantiles the format wants the mean over episodes, weighted by frames.
    weighted = sum(length * np.quantile(part, 0.1, axis=0) for length, part in zip(lengths, parts, strict=True))
    np.testing.assert_allclose(merged["q10"], weighted / sum(lengths))


def test_a_data_set_carries_statistics_of_all_its_features(tmp_path):
    lengths = [4, 2, 5]
    write(tmp_path, lengths[:2])
    write(tmp_path, lengths[2:], first=2)
    stats = json.loads((tmp_path / "meta/stats.json").read_text())
    assert set(stats) == set(LeRobotDataset(tmp_path).info.features) - {"note"}
    action = np.concatenate([episode(n, length)["action"] for n, length in enumerate(lengths)])
    np.testing.assert_allclose(stats["action"]["mean"], action.mean(0, dtype=float))
    np.testing.assert_allclose(stats["action"]["std"], action.std(0, dtype=float))
    assert (stats["index"]["min"], stats["index"]["max"], stats["index"]["count"]) == ([0], [10], [11])
    assert (stats["next.done"]["min"], stats["next.done"]["mean"]) == ([False], [pytest.approx(3 / 11)])
    assert np.shape(stats[CAMERA]["q99"]) == (3, 1, 1)
    assert 0 <= np.min(stats[CAMERA]["min"]) <= np.max(stats[CAMERA]["max"]) <= 1


# --- order ----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 3))
def test_every_epoch_visits_every_frame_once(num_items, batch_size, seed):
    batches = ShuffledBatches(num_items, batch_size, seed=seed)
    drawn = np.concatenate([batches(number) for number in range(3 * num_items)])
    for epoch in range(3):
        visited = drawn[epoch * num_items : (epoch + 1) * num_items]
        assert sorted(visited.tolist()) == list(range(num_items))


def test_a_run_goes_on_where_it_was_and_another_seed_goes_elsewhere():
    whole = ShuffledBatches(10, 4, seed=3)
    every = [whole(number).tolist() for number in range(9)]
    resumed = ShuffledBatches(10, 4, seed=3, begin=5, end=9)
    assert [batch.tolist() for batch in resumed] == every[5:]
    assert len(resumed) == 4
    assert [batch.tolist() for batch in resumed] == every[5:]
    assert [ShuffledBatches(10, 4, seed=4)(number).tolist() for number in range(9)] != every
    assert every[0] + every[1] != every[5] + every[6]
    assert [b.tolist() for b in itertools.islice(ShuffledBatches(10, 4, seed=3, shuffle=False), 3)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1],
    ]  # fmt: skip


def test_ranks_share_the_batches_of_one():
    alone = ShuffledBatches(11, 6, seed=0)
    shares = [ShuffledBatches(11, 6, seed=0, rank=rank, num_ranks=3) for rank in range(3)]
    for number in (0, 1, 7):
        assert np.concatenate([share(number) for share in shares]).tolist() == alone(number).tolist()
    with pytest.raises(DataError, match="a batch of 6 cannot be shared evenly by 4 ranks"):
        ShuffledBatches(11, 6, seed=0, num_ranks=4)
    with pytest.raises(DataError, match="there are no frames"):
        ShuffledBatches(0, 6, seed=0)


def test_a_data_loader_gives_the_same_batches_in_its_workers(tmp_path):
    from torch.utils.data import DataLoader

    write(tmp_path, [6, 5], "video")
    data = LeRobotDataset(tmp_path, windows={"action": range(2)})
    order = ShuffledBatches(len(data), 4, seed=1, begin=2, end=6)
    loader = DataLoader(data, sampler=order, batch_size=None, num_workers=2)
    seen = list(loader)
    assert len(seen) == 4
    for number, batch in enumerate(seen, 2):
        expected = data.batch(order(number))
        assert np.array_equal(batch[CAMERA], expected[CAMERA])
        assert np.array_equal(batch["action"], expected["action"])
        assert batch["task"] == expected["task"]
