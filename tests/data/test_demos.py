import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rlinf.core import tree
from rlinf.core.errors import DataError
from rlinf.core.types import EnvSpaces
from rlinf.data.demos import DemoMeta, check_demos, read_demos, write_demos
from rlinf.data.replay import ReplayBuffer
from tests.data.counting import CountingSource, add, stored, transitions

META = DemoMeta(
    env_id="Count-v1",
    control_mode="pd_ee_delta_pos",
    action_dim=4,
    obs_shapes={"state": (4,), "images/front": (2, 2, 3), "instruction": ()},
    obs_dtypes={"state": "float32", "images/front": "uint8", "instruction": "str"},
    recorded_by="scripted expert",
    num_successes=2,
)


def segments(count=3, seed=0):
    source = CountingSource(0, 2, np.random.default_rng(seed))
    return [source.segment(5, continues=i > 0) for i in range(count)]


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir()) if path.is_file()}


def test_what_was_written_is_read(tmp_path):
    written = segments()
    meta = write_demos(str(tmp_path), written, META)
    read, read_meta = read_demos(str(tmp_path))
    assert read_meta == meta
    ends = sum(len(segment.last_index) for segment in written)
    assert (meta.num_transitions, meta.num_episodes, meta.num_successes) == (3 * 5 * 2, ends, 2)
    for before, after in zip(written, read, strict=True):
        for name in ("obs", "last_obs"):
            left, right = (dict(tree.leaves(getattr(t, name))) for t in (before, after))
            assert left.keys() == right.keys()
            for path, leaf in left.items():
                assert leaf == right[path] if isinstance(leaf, list) else torch.equal(leaf, right[path])
        for name in ("last_index", "action", "reward", "terminated", "truncated", "intervened", "valid"):
            assert torch.equal(getattr(before, name), getattr(after, name))
        assert (after.source, after.continues) == (before.source, before.continues)
        assert torch.equal(after.decision, before.action.flatten(2))


def test_read_demonstrations_fill_a_buffer(tmp_path):
    written = segments()
    write_demos(str(tmp_path), written, META)
    buffer = ReplayBuffer(200, generator=np.random.default_rng(0))
    for segment in read_demos(str(tmp_path))[0]:
        add(buffer, segment)
    assert stored(buffer) == set().union(*(transitions(segment) for segment in written))


def test_a_later_recording_appends(tmp_path):
    first, second = segments(2), segments(3, seed=1)
    write_demos(str(tmp_path), first, META)
    kept = contents(tmp_path)
    meta = write_demos(str(tmp_path), second, dataclasses.replace(META, num_successes=5))
    read, read_meta = read_demos(str(tmp_path))
    assert len(read) == 5
    assert (meta.num_transitions, meta.num_successes) == (50, 7)
    assert read_meta == meta
    assert torch.equal(read[2].reward, second[0].reward)
    assert all(contents(tmp_path)[name] == data for name, data in kept.items() if name.endswith("npz"))


@pytest.mark.parametrize("change", [{"env_id": "Push-v1"}, {"control_mode": "pd_joint_delta_pos"}])
def test_appending_another_kind_is_refused(tmp_path, change):
    write_demos(str(tmp_path), segments(1), META)
    kept = contents(tmp_path)
    key, value = next(iter(change.items()))
    with pytest.raises(DataError, match=f"these have {key}={value}: record them into another directory"):
        write_demos(str(tmp_path), segments(1), dataclasses.replace(META, **change))
    assert contents(tmp_path) == kept


def test_a_file_that_never_reached_the_index_is_ignored_and_replaced(tmp_path):
    write_demos(str(tmp_path), segments(1), META)
    (tmp_path / "000001.npz").write_bytes(b"half a recording")
    assert len(read_demos(str(tmp_path))[0]) == 1
    write_demos(str(tmp_path), segments(2, seed=1), META)
    assert len(read_demos(str(tmp_path))[0]) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="uses /dev/full")
@pytest.mark.parametrize("name", ["000001.npz.partial", "index.json.partial"])
def test_a_full_disk_is_told_and_keeps_what_was_recorded(tmp_path, name):
    write_demos(str(tmp_path), segments(1), META)
    index = (tmp_path / "index.json").read_bytes()
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"No space left on device.*recorded there before are unharmed"):
        write_demos(str(tmp_path), segments(2), META)
    assert (tmp_path / "index.json").read_bytes() == index
    assert len(read_demos(str(tmp_path))[0]) == 1


def test_a_recording_that_does_not_fit_its_description_is_refused(tmp_path):
    bad = dataclasses.replace(META, action_dim=7)
    with pytest.raises(
        DataError, match=r"trajectory 0 .*action is float32 \[5, 2, 1, 4\], expected float32 \[5, 2, 1, 7\]"
    ):
        write_demos(str(tmp_path / "demos"), segments(1), bad)
    nan = segments(1)
    nan[0].obs["state"][1, 0, 0] = float("nan")
    with pytest.raises(DataError, match="obs/state holds NaN or infinity"):
        write_demos(str(tmp_path / "demos"), nan, META)
    assert not (tmp_path / "demos").exists()


def test_a_missing_or_empty_directory_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere is no directory: record demonstrations into it first"):
        read_demos(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="is empty: record demonstrations into it first"):
        read_demos(str(tmp_path))
    write_demos(str(tmp_path), [], META)
    with pytest.raises(DataError, match=r"index\.json lists no demonstration"):
        read_demos(str(tmp_path))


def test_a_missing_or_damaged_index_is_named(tmp_path):
    write_demos(str(tmp_path), segments(1), META)
    index = json.loads((tmp_path / "index.json").read_text())
    for entry in ("env_id", "files"):
        (tmp_path / "index.json").write_text(json.dumps({k: v for k, v in index.items() if k != entry}))
        with pytest.raises(DataError, match=rf"index\.json lacks {entry}"):
            read_demos(str(tmp_path))
    (tmp_path / "index.json").write_text(json.dumps(index | {"files": [{"file": "000000.npz"}]}))
    with pytest.raises(DataError, match="lacks part of its list of files"):
        read_demos(str(tmp_path))
    for damage in ({"files": None}, {"obs_shapes": []}, {"action_dim": "four"}, {"num_successes": None}):
        (tmp_path / "index.json").write_text(json.dumps(index | damage))
        with pytest.raises(DataError, match=rf"is damaged: {next(iter(damage))} .* record the demonstrations into"):
            read_demos(str(tmp_path))
    (tmp_path / "index.json").write_text(json.dumps(index | {"files": ["000000.npz"]}))
    with pytest.raises(DataError, match="lacks part of its list of files"):
        read_demos(str(tmp_path))
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DataError, match="does not describe a rlinf demonstrations"):
        read_demos(str(tmp_path))
    (tmp_path / "index.json").unlink()
    with pytest.raises(DataError, match=r"index\.json is missing"):
        read_demos(str(tmp_path))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 255
    path.write_bytes(bytes(data))


def empty(path):
    path.write_bytes(b"")


def pickled(path):
    np.save(path.with_suffix(".npy"), np.array([{"not": "allowed"}]), allow_pickle=True)
    path.with_suffix(".npy").rename(path)


@pytest.mark.parametrize("damage", [truncate, flip, empty, pickled])
def test_a_corrupt_file_is_named(tmp_path, damage):
    write_demos(str(tmp_path), segments(2), META)
    damage(tmp_path / "000001.npz")
    with pytest.raises(DataError, match=r"000001\.npz is corrupt"):
        read_demos(str(tmp_path))


def test_a_file_that_is_gone_is_named(tmp_path):
    write_demos(str(tmp_path), segments(2), META)
    (tmp_path / "000001.npz").unlink()
    with pytest.raises(DataError, match=r"000001\.npz is listed in index\.json and missing\. .*remove its entry"):
        read_demos(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": None}, r"000000\.npz: reward must be an array \[T, N, H\]"),
        ({"action": None}, "action is missing"),
        ({"action": np.zeros((5, 2, 1, 4))}, r"action is float64 \[5, 2, 1, 4\], expected float32"),
        ({"obs/state": np.zeros((5, 2, 4), np.float32)}, r"obs/state is .*\[5, 2, 4\], expected float32 \[6, 2, 4\]"),
        ({"truncated": np.zeros((5, 1), bool)}, r"truncated is bool \[5, 1\], expected bool \[5, 2\]"),
        ({"extra": np.zeros(3)}, "extra is not described"),
    ],
)
def test_wrong_fields_are_named(tmp_path, change, message):
    write_demos(str(tmp_path), segments(1), META)
    with np.load(tmp_path / "000000.npz") as archive:
        fields = dict(archive) | change
    np.savez(tmp_path / "000000.npz", **{name: array for name, array in fields.items() if array is not None})
    with pytest.raises(DataError, match=message):
        read_demos(str(tmp_path))


def test_demonstrations_are_checked_against_an_environment_all_at_once():
    fits = EnvSpaces(META.obs_shapes, META.obs_dtypes, action_dim=4)
    check_demos(META, fits, control_mode="pd_ee_delta_pos")
    other = EnvSpaces({"state": (42,), "wrist": (3,)}, {"state": "float32", "wrist": "float32"}, action_dim=7)
    with pytest.raises(DataError) as caught:
        check_demos(META, other, control_mode="pd_joint_delta_pos")
    for part in (
        "actions have 4 elements, the environment takes 7",
        "control mode is pd_ee_delta_pos, the environment's is pd_joint_delta_pos",
        "'state' is float32 [4], the environment's is float32 [42]",
        "'wrist' is absent, the environment's is float32 [3]",
        "'images/front' is uint8 [2, 2, 3], the environment's is absent",
    ):
        assert part in str(caught.value)
