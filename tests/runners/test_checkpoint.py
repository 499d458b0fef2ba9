import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlinf.core.errors import CheckpointError
from rlinf.runners.checkpoint import MANIFEST, CheckpointStore, find, verify
from rlinf.workers.learner_worker import Progress


def fill_with(text):
    def fill(directory):
        (directory / "inner").mkdir()
        (directory / "inner" / "file.txt").write_text(text)
        return Progress(env_steps=10, updates=2)

    return fill


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "run" / "checkpoints", config={"actor": {"seed": 1}})


def names(store):
    return sorted(path.name for path in store.directory.iterdir())


def test_a_checkpoint_is_found_by_every_name_it_has(store, tmp_path):
    assert store.latest() is None
    store.write(5, fill_with("five"))
    written = store.write(12, fill_with("twelve"))
    run = store.directory.parent
    for path in (run, store.directory, store.directory / "latest", written, f"{run}/", f"{written}/"):
        assert find(path) == written.resolve()
    assert find(f"{store.directory}/global_step_5/").name == "global_step_5"
    manifest = verify(written)
    assert manifest.global_step == 12
    assert manifest.progress == Progress(10, 2)
    assert set(manifest.files) == {"inner/file.txt", "config.json"}
    assert json.loads((written / "config.json").read_text()) == {"actor": {"seed": 1}}


def test_the_link_is_relative_so_that_a_run_may_be_moved(store, tmp_path):
    store.write(1, fill_with("one"))
    moved = tmp_path / "elsewhere"
    shutil.move(store.directory.parent, moved)
    assert find(moved) == (moved / "checkpoints" / "global_step_1").resolve()


def test_without_a_link_the_one_saved_last_is_found(store):
    store.write(9, fill_with("an earlier run in the same directory"))
    store.write(2, fill_with("two"))
    (store.directory / "latest").unlink()
    assert find(store.directory).name == "global_step_2"


def test_only_the_newest_are_kept(store):
    store.keep = 2
    for step in (50, 1, 2, 3):
        store.write(step, fill_with(str(step)))
    assert names(store) == ["global_step_2", "global_step_3", "latest"]


def test_keeping_one_keeps_one(store):
    store.keep = 1
    for step in (1, 2):
        store.write(step, fill_with(str(step)))
    assert names(store) == ["global_step_2", "latest"]


def test_a_step_saved_again_replaces_itself(store):
    store.write(3, fill_with("old"))
    written = store.write(3, fill_with("new"))
    assert (written / "inner" / "file.txt").read_text() == "new"
    assert names(store) == ["global_step_3", "latest"]


def test_a_crash_between_the_two_renames_of_a_replacement_loses_nothing(store):
    written = store.write(3, fill_with("old"))
    written.rename(store.directory / ".replaced-global_step_3")
    assert (find(store.directory) / "inner" / "file.txt").read_text() == "old"
    store.write(4, fill_with("four"))
    assert names(store) == ["global_step_3", "global_step_4", "latest"]


def test_a_failure_while_writing_changes_nothing(store):
    store.write(1, fill_with("one"))

    def fill(directory):
        fill_with("half")(directory)
        raise OSError(28, "No space left on device", "file.txt")

    with pytest.raises(CheckpointError, match=r"no checkpoint was written for step 2: .*No space left.*MiB are free"):
        store.write(2, fill)
    assert names(store) == ["global_step_1", "latest"]
    assert find(store.directory).name == "global_step_1"


def test_an_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        CheckpointStore(tmp_path / "file" / "checkpoints").write(1, fill_with("one"))


def damaged(store, how):
    written = store.write(1, fill_with("0123456789"))
    path = written / "inner" / "file.txt"
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_text("01234")
    elif how == "changed":
        path.write_text("0123x56789")
    elif how == "no manifest":
        (written / MANIFEST).unlink()
    elif how == "broken manifest":
        (written / MANIFEST).write_text('{"format": ')
    elif how == "foreign":
        (written / MANIFEST).write_text('{"weights": []}')
    else:
        content = json.loads((written / MANIFEST).read_text())
        if how == "newer":
            content["format_version"] = 99
        else:
            del content["files"]
        (written / MANIFEST).write_text(json.dumps(content))
    return written


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"inner/file\.txt is missing; choose another checkpoint in"),
        ("cut", r"inner/file\.txt has 5 bytes instead of 10: it was cut off or changed; choose another"),
        ("changed", r"inner/file\.txt does not have the content that was saved; choose another"),
        ("no manifest", r"global_step_1 has no manifest\.json: it is incomplete or was not written by rlinf"),
        ("broken manifest", r"manifest\.json cannot be read .*; choose another checkpoint"),
        ("foreign", r"manifest\.json was not written by rlinf; choose another checkpoint"),
        ("newer", r"format version 99, this rlinf reads 1; use the version that wrote it: .*'rlinf'"),
        ("incomplete manifest", r"manifest\.json is damaged \('files'\)"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(store, how, message):
    written = damaged(store, how)
    with pytest.raises(CheckpointError, match=message):
        verify(find(written))


def test_missing_places_are_named_with_the_remedy(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist or is no directory; give a run's directory"):
        find(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint; choose another run or train"):
        find(tmp_path)
    (tmp_path / "file.pt").write_text("")
    with pytest.raises(CheckpointError, match=r"file\.pt does not exist or is no directory"):
        find(tmp_path / "file.pt")


WRITER = """
import sys, time
from pathlib import Path
from rlinf.runners.checkpoint import CheckpointStore
from rlinf.workers.learner_worker import Progress

def fill(directory):
    for i in range(40):
        (directory / f"{i}.bin").write_bytes(bytes(20_000))
    return Progress()

store = CheckpointStore(sys.argv[1], keep=2)
for step in range(1, 10_000):
    store.write(step, fill)
"""


def test_kill_9_at_any_moment_leaves_a_loadable_latest(tmp_path):
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not any(tmp_path.glob(".writing-*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        while not (tmp_path / "latest").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.017 * attempt)
        process.kill()
        assert process.wait(10) == -9, process.stderr.read().decode()
        assert len(verify(find(tmp_path)).files) == 40
        for path in tmp_path.glob("global_step_*"):
            verify(path)


@pytest.fixture
def small_disk(tmp_path):
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = os.geteuid() == 0 and (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(directory)], capture_output=True
        ).returncode == 0
    )  # fmt: skip
    if not mounted:
        pytest.skip("mounting a small file system needs root")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_full_disk_leaves_the_old_checkpoint(small_disk: Path):
    store = CheckpointStore(small_disk)
    store.write(1, fill_with("small"))
    with pytest.raises(CheckpointError, match=r"No space left on device.*MiB are free"):
        store.write(2, fill_with("x" * 300_000))
    assert verify(find(small_disk)).global_step == 1
    store.write(3, fill_with("small again"))
    assert verify(find(small_disk)).global_step == 3
