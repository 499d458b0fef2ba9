"""Chunks of LeRobot data sets and their mixtures, by hand."""

import numpy as np
import pytest
import torch

from rlinf.core.errors import DataError
from rlinf.data.chunk_mixture import Ahead, MixedChunks
from rlinf.data.lerobot.chunks import LeRobotChunks
from rlinf.data.lerobot.layout import Feature
from rlinf.data.lerobot.writer import LeRobotWriter
from tests.data import lerobot_sets as sets

COLUMNS = {"images/front": sets.CAMERA, "state": "observation.state", "actions": "action"}
LENGTHS = [5, 3, 7]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "set"
    sets.write(folder, LENGTHS)
    return folder


def test_a_frame_comes_with_the_actions_of_its_episode(root):
    chunks = LeRobotChunks(root, COLUMNS, 4, action_dim=2, state_dim=3)
    assert len(chunks) == 15 and (chunks.horizon, chunks.action_dim, chunks.num_episodes) == (4, 2, 3)
    batch = chunks.batch(np.array([3, 5, 14, 0, 3]))
    assert batch.obs["state"][:, :2].tolist() == [[0, 3], [1, 0], [2, 6], [0, 0], [0, 3]]
    assert batch.valid.sum(1).tolist() == [2, 3, 1, 4, 2]
    assert torch.allclose(batch.action[3], torch.tensor([[t, -t] for t in range(4)]) / 7)
    assert batch.obs["instruction"] == [sets.task_of(number) for number in (0, 1, 2, 0, 0)]
    for row, (episode, frame) in enumerate([(0, 3), (1, 0), (2, 6), (0, 0), (0, 3)]):
        assert np.array_equal(batch.obs["images"]["front"][row].numpy(), sets.picture(episode, frame))


def test_chosen_episodes_are_alone(root):
    chunks = LeRobotChunks(root, COLUMNS, 4, episodes=[2, 0])
    assert len(chunks) == 12
    batch = chunks.batch(np.array([6, 7]))
    assert batch.obs["state"][:, :2].tolist() == [[2, 6], [0, 0]] and batch.valid.sum(1).tolist() == [1, 4]


@pytest.mark.parametrize("kept", [0, 4, 100])
def test_no_size_of_the_cache_changes_a_picture(root, kept, monkeypatch):
    size = sets.SIDE * sets.SIDE * 3
    chunks = LeRobotChunks(root, COLUMNS, 2, cache_bytes=kept * size)
    asked = []
    pictures = chunks._data.pictures
    monkeypatch.setattr(
        chunks._pictures["images/front"], "_unpack", lambda rows: asked.append(len(rows)) or pictures(sets.CAMERA, rows)
    )
    everything = pictures(sets.CAMERA, np.arange(15))
    order = np.random.default_rng(0)
    for _ in range(6):
        rows = order.integers(15, size=9)
        assert np.array_equal(chunks.batch(rows).obs["images"]["front"].numpy(), everything[rows])
    if kept == 100:
        assert sum(asked) <= 15, "every picture is unpacked once"
    else:
        assert sum(asked) > 15


def test_pictures_are_resized_before_they_are_kept(root):
    chunks = LeRobotChunks(root, COLUMNS, 2, resize=lambda pictures: pictures[:, ::4, ::4].contiguous())
    shapes = {tuple(chunks.batch(np.array([1, 9])).obs["images"]["front"].shape) for _ in range(2)}
    assert shapes == {(2, 8, 8, 3)}


def test_names_of_our_own_recorder_are_found_where_the_robots_are_not_there(root):
    chunks = LeRobotChunks(root, {"images/front": "image", "state": "state", "actions": "actions"}, 2)
    assert chunks.batch(np.array([0])).obs["state"].tolist() == [[0, 0, 0]]


def test_what_does_not_fit_is_named_with_file_and_feature(root):
    info = root / "meta" / "info.json"
    with pytest.raises(DataError) as caught:
        LeRobotChunks(root, COLUMNS | {"images/wrist": "wrist_image"}, 2)
    assert str(caught.value) == (
        f"{info}: there is no feature wrist_image or observation.images.wrist for images/wrist; its cameras are "
        f"{sets.CAMERA}"
    )
    with pytest.raises(DataError) as caught:
        LeRobotChunks(root, COLUMNS, 2, action_dim=7)
    assert str(caught.value) == (
        f"{info}: feature action has 2 numbers and the robot's actions have 7; choose the data set of this robot, or "
        "another column"
    )
    with pytest.raises(DataError) as caught:
        LeRobotChunks(root, COLUMNS | {"state": "count"}, 2)
    assert str(caught.value) == (
        f"{info}: feature count is int64 [1] and state must be a vector of floats; name another column"
    )


def test_a_corrupt_episode_is_named(root, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(root, broken)
    data = LeRobotChunks(broken, COLUMNS, 2)
    (store,) = data._data._images.values()
    store._end[6] = store._begin[6] + 40  # frame 1 of episode 1 is cut off
    with pytest.raises(DataError, match=rf"file-000\.parquet: {sets.CAMERA} of episode 1, frame 1 is damaged"):
        data.batch(np.arange(15))
    assert data.batch(np.array([5, 7])).valid.all(0)[0], "its neighbours can be read"

    column = data._data.column("action")
    column[13, 1] = np.nan
    with pytest.raises(DataError, match=r"file-000\.parquet: action of episode 2, frame 5 holds NaN or infinity"):
        data._check_finite("action")


def mixture(root, **options):
    two = [LeRobotChunks(root, COLUMNS, 2), LeRobotChunks(root, COLUMNS, 2, episodes=[1])]
    return MixedChunks(two, [3, 1], 8, seed=4, **options)


def test_every_batch_has_its_proportions_and_is_a_function_of_its_number(root):
    mixed, again = mixture(root), mixture(root)
    for number in (5, 0, 2):
        batch, same = mixed(number), again(number)
        assert len(batch.valid) == 8 and batch.obs["state"][6:, 0].tolist() == [1, 1]
        assert torch.equal(batch.obs["state"], same.obs["state"]) and torch.equal(batch.action, same.action)
    halves = [mixture(root, rank=rank, num_ranks=2)(3) for rank in range(2)]
    whole = sorted(mixed(3).obs["state"][:, 2].tolist())
    assert sorted(torch.cat([half.obs["state"][:, 2] for half in halves]).tolist()) == whole


def test_batches_made_ahead_are_the_same(root):
    mixed, ahead = mixture(root), Ahead(mixture(root))
    for number in (0, 1, 2, 7, 8, 3):
        assert torch.equal(ahead(number).obs["state"], mixed(number).obs["state"])

    def fails(number):
        raise DataError(f"batch {number}")

    with pytest.raises(DataError, match="batch 1"):
        Ahead(fails)(1)


def test_data_sets_that_show_different_things_do_not_mix(root, tmp_path):
    features = {"observation.state": Feature("float32", (4,)), "action": Feature("float32", (2,))}
    with LeRobotWriter(tmp_path / "other", fps=10, features=features) as writer:
        writer.add_episode({key: np.zeros((4, f.shape[0]), np.float32) for key, f in features.items()}, "wait")
    columns = {"state": "observation.state", "actions": "action"}
    pair = [LeRobotChunks(root, columns, 2), LeRobotChunks(tmp_path / "other", columns, 2)]
    with pytest.raises(DataError, match=r"the data sets show state differently: torch\.float32 \[3\] and .* \[4\]"):
        MixedChunks(pair, None, 8, seed=0)(0)
    with pytest.raises(DataError, match=r"chunks of 2 x 2 and 3 x 2 numbers"):
        MixedChunks([pair[0], LeRobotChunks(root, columns, 3)], None, 8, seed=0)
