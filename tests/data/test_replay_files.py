import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rlinf.core.errors import CheckpointError, ConfigError
from rlinf.data.replay import ReplayBuffer
from tests.data.counting import CountingSource, add, assert_whole, stored, transitions

linux = pytest.mark.skipif(sys.platform != "linux", reason="uses /dev/full and kill -9")


def rng(seed=0):
    return np.random.default_rng(seed)


def filled(capacity=60, adds=12, storage_dir=None):
    source = CountingSource(0, 3, rng())
    buffer = ReplayBuffer(capacity, generator=rng(1), storage_dir=storage_dir)
    for i in range(adds):
        add(buffer, source.segment(3, continues=i > 0))
    return buffer, source


def same_batches(first, second, count=5):
    for _ in range(count):
        a, b = first.sample(16), second.sample(16)
        for name in ("decision", "reward", "discount"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        for side in ("obs", "next_obs"):
            left, right = getattr(a, side), getattr(b, side)
            assert torch.equal(left["state"], right["state"])
            assert torch.equal(left["images"]["front"], right["images"]["front"])
            assert left["instruction"] == right["instruction"]


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir()) if path.is_file()}


@pytest.mark.parametrize("adds", [1, 3, 40], ids=["part full", "just wrapped", "wrapped often"])
def test_a_loaded_buffer_goes_on_exactly_as_the_saved_one(tmp_path, adds):
    buffer, source = filled(adds=adds)
    buffer.sample(16)
    buffer.save(str(tmp_path))
    loaded = ReplayBuffer(60, generator=rng(99))
    loaded.load(str(tmp_path))
    assert len(loaded) == len(buffer)
    assert loaded.statistics() == buffer.statistics()
    same_batches(buffer, loaded)
    for _ in range(30):  # adding goes on alike, too: the frame between two segments is known
        segment = source.segment(2, continues=True)
        add(buffer, segment)
        add(loaded, segment)
        assert loaded.statistics() == buffer.statistics()
        same_batches(buffer, loaded, 1)


def test_only_rows_in_use_are_written(tmp_path):
    buffer, _ = filled(capacity=100_000, adds=2)
    buffer.save(str(tmp_path))
    assert sum(len(data) for data in contents(tmp_path).values()) < 20_000


def test_an_empty_buffer_can_be_saved_and_loaded(tmp_path):
    ReplayBuffer(60, generator=rng()).save(str(tmp_path))
    loaded, _ = filled()
    loaded.load(str(tmp_path))
    assert len(loaded) == 0
    add(loaded, CountingSource(0, 3, rng()).segment(3, continues=False))
    assert_whole(loaded.sample(8))


@pytest.mark.parametrize("capacity", [30, 61, 500])
def test_another_capacity_takes_over_the_newest_that_fits(tmp_path, capacity):
    saved, source = filled(adds=40)
    saved.save(str(tmp_path))
    loaded = ReplayBuffer(capacity, generator=rng())
    loaded.load(str(tmp_path))
    held, left = stored(saved), stored(loaded)
    assert left == held if capacity > 60 else left < held
    gone, kept = ([state[2] for state in states if state[1] == 0] for states in (held - left, left))
    assert not gone or max(gone) <= min(kept), "of each environment, the oldest"
    add(loaded, source.segment(3, continues=True))
    assert_whole(loaded.sample(8))


def test_rows_of_another_kind_are_refused(tmp_path):
    filled()[0].save(str(tmp_path))
    other = ReplayBuffer(60, generator=rng())
    segment = CountingSource(0, 1, rng()).segment(2, continues=False)
    object.__setattr__(segment, "decision", torch.zeros(2, 1, 9))
    add(other, segment)
    with pytest.raises(CheckpointError, match=r"index\.json describes rows of another kind"):
        other.load(str(tmp_path))
    assert len(other) == 2


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def cut_header(path):
    path.write_bytes(path.read_bytes()[:40])


def empty(path):
    path.write_bytes(b"")


def scribble(path):
    path.write_bytes(b"not an array" * 100)


def lengthen(path):
    array = np.load(path)
    np.save(path, np.concatenate([array, array]))


def retype(path):
    np.save(path, np.load(path).astype(np.float16))


@pytest.mark.parametrize("damage", [Path.unlink, truncate, cut_header, empty, scribble, lengthen, retype, flip])
@pytest.mark.parametrize("name", ["obs.images.front.npy", "reward.npy", "next.npy"])
def test_a_damaged_file_is_named(tmp_path, damage, name):
    filled()[0].save(str(tmp_path))
    damage(tmp_path / name)
    loaded, _ = filled(adds=2)
    before = stored(loaded)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        loaded.load(str(tmp_path))
    if damage is flip:
        assert len(loaded) == 0  # a checksum fails only after the old rows have gone
    else:
        assert stored(loaded) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "index.json is missing"),
        ("{", "index.json cannot be read"),
        ("[]", "does not describe a rlinf replay buffer"),
        ('{"format": "rlinf demonstrations", "version": 1}', "does not describe a rlinf replay buffer"),
        ('{"format": "rlinf replay buffer", "version": 9}', "has version 9 of the format"),
        ('{"format": "rlinf replay buffer", "version": 1}', "lacks the entry 'capacity'"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, text, message):
    filled()[0].save(str(tmp_path))
    if text is None:
        (tmp_path / "index.json").unlink()
    else:
        (tmp_path / "index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        ReplayBuffer(60, generator=rng()).load(str(tmp_path))


def test_a_foreign_generator_state_is_refused(tmp_path):
    filled()[0].save(str(tmp_path))
    index = json.loads((tmp_path / "index.json").read_text())
    index["generator"]["bit_generator"] = "MT19937"
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="holds no state for this generator"):
        ReplayBuffer(60, generator=rng()).load(str(tmp_path))


@linux
@pytest.mark.parametrize("name", ["next.npy", "index.json.partial"])
def test_a_full_disk_is_told_and_harms_nothing(tmp_path, name):
    buffer, _ = filled()
    older, newer = tmp_path / "older", tmp_path / "newer"
    older.mkdir()
    newer.mkdir()
    buffer.save(str(older))
    kept = contents(older)
    (newer / name).symlink_to("/dev/full")
    before = buffer.statistics()
    with pytest.raises(CheckpointError, match=r"could not be saved in .*newer: .*No space left on device"):
        buffer.save(str(newer))
    assert contents(newer) == {}
    assert contents(older) == kept
    assert buffer.statistics() == before
    stored(buffer)


# Rows in memory-mapped files


def test_mapped_rows_behave_like_rows_in_memory(tmp_path):
    in_memory, _ = filled(adds=30)
    mapped, _ = filled(adds=30, storage_dir=str(tmp_path / "rows"))
    same_batches(in_memory, mapped)
    assert mapped.statistics() == in_memory.statistics()


def test_mapped_rows_can_be_taken_up_again(tmp_path):
    buffer, source = filled(adds=30, storage_dir=str(tmp_path))
    expected = stored(buffer)
    buffer.flush()
    del buffer
    reopened = ReplayBuffer.reopen(str(tmp_path), generator=rng(3))
    assert stored(reopened) == expected
    segment = source.segment(4, continues=True)
    add(reopened, segment)
    assert transitions(segment) <= stored(reopened)


def test_a_used_storage_directory_is_not_overwritten(tmp_path):
    filled(storage_dir=str(tmp_path))
    kept = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"storage_dir=.* already holds the experience of another run"):
        filled(storage_dir=str(tmp_path))
    assert contents(tmp_path) == kept


def test_loading_moves_the_rows_of_an_earlier_run_aside(tmp_path):
    rows, saved = tmp_path / "rows", tmp_path / "saved"
    saved.mkdir()
    buffer, source = filled(storage_dir=str(rows))
    buffer.save(str(saved))
    add(buffer, source.segment(5, continues=True))
    newest = stored(buffer)
    for n in (1, 2):
        resumed = ReplayBuffer(60, generator=rng(), storage_dir=str(rows))
        resumed.load(str(saved))
        unsaved = ReplayBuffer(60, generator=rng())
        unsaved.load(str(saved))
        same_batches(resumed, unsaved)
        assert (rows / f"before_load_{n}").is_dir()
    aside = ReplayBuffer.reopen(str(rows / "before_load_1"), generator=rng())
    assert stored(aside) == newest


def test_a_storage_directory_that_cannot_be_made_names_the_key(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"algorithm\.replay_buffer\.storage_dir=.*cannot hold"):
        filled(storage_dir=str(tmp_path / "file"))


def test_a_disk_that_is_too_small_names_the_key(tmp_path):
    with pytest.raises(ConfigError, match=r"storage_dir=.* needs .* of disk for 1000000000000 rows"):
        filled(capacity=10**12, storage_dir=str(tmp_path))
    assert contents(tmp_path) == {}


def test_reopening_names_what_is_missing(tmp_path):
    filled(storage_dir=str(tmp_path))
    (tmp_path / "reward.npy").unlink()
    with pytest.raises(CheckpointError, match=r"reward\.npy is missing"):
        ReplayBuffer.reopen(str(tmp_path), generator=rng())
    with pytest.raises(CheckpointError, match=r"index\.json is missing"):
        ReplayBuffer.reopen(str(tmp_path / "nowhere"), generator=rng())


class _Death(BaseException):
    pass


def test_a_death_at_any_line_of_writing_leaves_only_whole_transitions(tmp_path):
    source = CountingSource(0, 3, rng())
    segments = [source.segment(3, continues=i > 0) for i in range(9)]
    for line in range(1000):
        directory = str(tmp_path / str(line))
        buffer = ReplayBuffer(40, generator=rng(1), storage_dir=directory)
        for segment in segments[:-1]:
            add(buffer, segment)
        if not dies_at_line(line, lambda: add(buffer, segments[-1])):  # noqa: B023
            break
        reopened = ReplayBuffer.reopen(directory, generator=rng(2))
        before = stored(reopened)
        assert len(before) == len(reopened) >= 8
        add(reopened, segments[0])
        assert transitions(segments[0]) <= stored(reopened)
    assert 20 < line < 999


def dies_at_line(number, call):
    """Whether `call` reached the `number`-th line inside the writing functions; it stops there for good."""
    left = number

    def watch(frame, event, _):
        nonlocal left
        if frame.f_code.co_name not in ("_write", "_put"):
            return watch if event == "call" and frame.f_code.co_name == "add" else None
        if event == "line":
            left -= 1
            if left < 0:
                raise _Death
        return watch

    previous = sys.gettrace()
    sys.settrace(watch)
    try:
        call()
    except _Death:
        return True
    finally:
        sys.settrace(previous)
    return False


RECORDER = """
import sys
import numpy as np
from rlinf.data.replay import ReplayBuffer
from tests.data.counting import CountingSource, add

buffer = ReplayBuffer(3000, generator=np.random.default_rng(0), storage_dir=sys.argv[1])
source = CountingSource(0, 40, np.random.default_rng(0))
segments = [source.segment(20, continues=i > 0) for i in range(8)]
for i in range(10**9):
    add(buffer, segments[i % len(segments)])
    if i == 10:
        print("recording", flush=True)
"""


@linux
def test_rows_survive_kill_9(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    recorders = []
    for n in range(2):
        command = [sys.executable, "-c", RECORDER, str(tmp_path / str(n))]
        recorders.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=root, text=True))
    try:
        for n, recorder in enumerate(recorders):
            assert recorder.stdout.readline() == "recording\n"
            time.sleep(0.05 + 0.04 * n)
            recorder.send_signal(signal.SIGKILL)
            assert recorder.wait(timeout=60) == -signal.SIGKILL
    finally:
        for recorder in recorders:
            recorder.kill()
            recorder.wait()
            recorder.stdout.close()
    for n in range(2):
        reopened = ReplayBuffer.reopen(str(tmp_path / str(n)), generator=rng())
        assert len(reopened) > 1000
        for _ in range(20):
            assert_whole(reopened.sample(256))
