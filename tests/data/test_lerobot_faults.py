"""Recordings that are killed, disks that are full, files that are damaged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlinf.core.errors import DataError, MissingDependency
from rlinf.data.lerobot import packages
from rlinf.data.lerobot.check import check
from rlinf.data.lerobot.meta import read_meta
from rlinf.data.lerobot.reader import LeRobotDataset
from rlinf.data.lerobot.writer import LeRobotWriter
from tests.data.lerobot_sets import CAMERA, FPS, SIDE, assert_holds, episode, features, task_of, write

ROOT = Path(__file__).resolve().parents[2]
INFO, EPISODES = "meta/info.json", "meta/episodes/chunk-000/file-000.parquet"
DATA, VIDEO = "data/chunk-000/file-000.parquet", f"videos/{CAMERA}/chunk-000/file-000.mp4"


def quiet(text: str) -> None:
    pass


# --- crashes --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The program ends here."""


class Fuse:
    """Ends the program at one of the operations that change names on the disk, and lets it do nothing afterwards."""

    def __init__(self, monkeypatch, operations: int) -> None:
        self.left = operations
        replace, unlink = os.replace, Path.unlink
        monkeypatch.setattr(os, "replace", lambda *words: self.burn() or replace(*words))

        def unlink_there(path: Path, missing_ok: bool = False) -> None:
            if path.exists() or not missing_ok:
                self.burn()
                unlink(path, missing_ok)

        monkeypatch.setattr(Path, "unlink", unlink_there)

    def burn(self) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1


def as_lerobot_reads(root: Path) -> np.ndarray:
    """What lerobot takes for the frames: as many rows as info.json says of all parquet files in the order of names."""
    tables = [pq.read_table(path, columns=["index"]) for path in sorted(root.glob("data/*/*.parquet"))]
    total = json.loads((root / INFO).read_text())["total_frames"]
    return pa.concat_tables(tables)["index"].to_numpy()[:total]


@pytest.mark.parametrize(("kind", "step"), [(None, 1), ("video", 5)])
def test_wherever_a_recording_dies_the_finished_episodes_are_whole(tmp_path, monkeypatch, kind, step):
    monkeypatch.setattr("rlinf.data.lerobot.writer.MAX_PIECES", 2)
    monkeypatch.setattr("rlinf.data.lerobot.writer.EPISODES_PER_VOLUME", 3)
    monkeypatch.setattr("rlinf.data.lerobot.durable.sync_path", lambda path: None)  # no power is cut here
    lengths = [2, 3, 1, 2, 1]
    deaths, operations = 0, 0
    while True:
        root = tmp_path / str(operations)
        finished = 0
        with monkeypatch.context() as patched:
            fuse = Fuse(patched, operations)
            writer = LeRobotWriter(root, fps=FPS, features=features(kind))
            try:
                for number, length in enumerate(lengths):
                    writer.add_episode(episode(number, length, kind), task_of(number))
                    finished += 1
                writer.close()
            except Killed:
                deaths += 1
            writer._unlock()  # as the system does when a process ends
        committed = read_meta(root).num_episodes if (root / INFO).is_file() else 0
        assert finished <= committed <= finished + 1
        if committed:
            assert_holds(root, lengths[:committed], kind)
            assert np.array_equal(as_lerobot_reads(root), np.arange(sum(lengths[:committed])))
        if fuse.left:
            assert committed == len(lengths)
            break
        shutil.rmtree(root) if not committed else None
        with LeRobotWriter(root, fps=FPS, features=features(kind)) as writer:
            for number, length in list(enumerate(lengths))[committed:]:
                writer.add_episode(episode(number, length, kind), task_of(number))
                assert np.array_equal(as_lerobot_reads(root), np.arange(sum(lengths[: number + 1])))
        assert_holds(root, lengths, kind)
        assert check(root, quiet) == []
        assert np.array_equal(as_lerobot_reads(root), np.arange(sum(lengths)))
        operations += step
    assert deaths >= 34 // step


RECORD = """
import sys
from tests.data.lerobot_sets import FPS, episode, features, task_of
from rlinf.data.lerobot import writer
writer.MAX_PIECES = 3
with writer.LeRobotWriter(sys.argv[1], fps=FPS, features=features("video")) as recording:
    while True:
        number = recording.num_episodes
        recording.add_episode(episode(number, 6, "video"), task_of(number))
        print(number + 1, flush=True)
"""


def test_a_killed_recording_is_readable_and_goes_on(tmp_path):
    before = 0
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", RECORD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        said = 0
        while said < before + 3 * (attempt + 1):  # some commits, and some joins
            said = int(process.stdout.readline() or process.stderr.read())
        time.sleep(0.011 * attempt)
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -9
        before = read_meta(tmp_path).num_episodes
        assert before >= said
        assert_holds(tmp_path, [6] * before, "video")
        assert all("interrupted" in problem for problem in check(tmp_path, quiet))
    write(tmp_path, [6], "video", first=before)
    assert_holds(tmp_path, [6] * (before + 1), "video")
    assert check(tmp_path, quiet) == []
    assert not list(tmp_path.rglob("*.partial"))


# --- full disks -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    directory = tmp_path / "disk"
    directory.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(directory)]
    mounted = os.geteuid() == 0 and subprocess.run(words, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a small file system needs root")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_full_disk_is_told_in_one_line_and_keeps_what_was_recorded(small_disk: Path, kind):
    root, lengths = small_disk / "set", []
    with pytest.raises(DataError) as caught, LeRobotWriter(root, fps=FPS, features=features(kind)) as writer:
        while len(lengths) < 100:
            writer.add_episode(episode(len(lengths), 30, kind), task_of(len(lengths)))
            lengths.append(30)
    words = f"No space left on device.*the {len(lengths)} episodes committed before are unharmed, the last 1 are lost"
    assert caught.match(words)
    assert str(caught.value).count("\n") == 0
    assert 1 <= len(lengths) < 100
    assert_holds(root, lengths, kind)
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    write(root, [30], kind, first=len(lengths))
    assert_holds(root, [*lengths, 30], kind)
    assert check(root, quiet) == []


@pytest.mark.skipif(sys.platform != "linux", reason="uses /dev/full")
@pytest.mark.parametrize("name", [DATA, EPISODES, "meta/tasks.parquet", "meta/stats.json", INFO])
def test_no_file_is_left_half_written(tmp_path, name):
    write(tmp_path, [3])
    number = name.replace("file-000", "file-001") if name == DATA else name
    with LeRobotWriter(tmp_path, fps=FPS, features=features()) as writer:
        (tmp_path / f"{number}.partial").symlink_to("/dev/full")
        with pytest.raises(DataError, match=r"No space left on device; the 1 episodes committed before are unharmed"):
            writer.add_episode(episode(1, 2), task_of(1))
        assert_holds(tmp_path, [3])
        assert check(tmp_path, quiet) == []
        writer.add_episode(episode(1, 2), task_of(1))  # there is room again
    assert_holds(tmp_path, [3, 2])


# --- damaged files --------------------------------------------------------------------------------------------


def open_all(root: Path, **options) -> None:
    data = LeRobotDataset(root, **options)
    data.batch(np.arange(len(data)))


def edit_json(root: Path, **changes) -> None:
    raw = json.loads((root / INFO).read_text())
    (root / INFO).write_text(json.dumps({k: v for k, v in (raw | changes).items() if v != "absent"}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flip(path: Path, where: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 255
    path.write_bytes(bytes(data))


def rewrite(path: Path, change) -> None:
    table = pq.read_table(path, partitioning=None)
    pq.write_table(change(table), path)


def with_column(name: str, array) -> object:
    return lambda table: table.set_column(table.column_names.index(name), name, array)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for kind in ("image", "video"):
        write(folder / kind, [5, 4, 6], kind)
    return folder


@pytest.fixture
def images(originals, tmp_path):
    return Path(shutil.copytree(originals / "image", tmp_path / "set"))


@pytest.fixture
def videos(originals, tmp_path):
    return Path(shutil.copytree(originals / "video", tmp_path / "set"))


def assert_refused(root: Path, message: str) -> None:
    """Opening or reading says it in one line, and so does the check."""
    with pytest.raises(DataError, match=message) as caught:
        open_all(root)
    assert "\n" not in str(caught.value)
    assert any(str(caught.value) == problem for problem in check(root, quiet))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (INFO, r"info\.json is missing: .* is no LeRobot data set; name the folder that holds meta/"),
        ("meta/tasks.parquet", r"tasks\.parquet is missing: restore the file"),
        (EPISODES, "meta/episodes holds no file"),
        (DATA, r"file-000\.parquet is missing: restore the file, or record or copy the data set anew"),
        (VIDEO, r"file-000\.mp4 is missing: restore"),
    ],
)
def test_a_missing_file_is_named(videos, name, message):
    (videos / name).unlink()
    with pytest.raises(DataError, match=message):
        open_all(videos)
    with pytest.raises(DataError, match="nowhere is no directory"):
        open_all(videos / "nowhere")


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", [INFO, EPISODES, "meta/tasks.parquet", DATA, VIDEO])
def test_a_damaged_file_is_named(videos, name, damage):
    damage(videos / name)
    with pytest.raises(DataError, match=r"(cannot be read|is damaged).*; restore the file") as caught:
        open_all(videos)
    assert str(caught.value).startswith(str(videos / name))
    assert str(caught.value).count("\n") == 0
    assert check(videos, quiet)


def test_changed_numbers_are_noticed(images):
    # The first column's first page is at the beginning of the file.
    flip(images / DATA, 120 / (images / DATA).stat().st_size)
    assert_refused(images, r"file-000\.parquet is damaged or no parquet file \(.*(checksum|CRC)")


def changed_picture(change):
    def damage(table):
        bytes_, paths = (table[CAMERA].combine_chunks().field(name) for name in ("bytes", "path"))
        values = bytes_.to_pylist()
        values[7] = change(values[7])
        column = pa.StructArray.from_arrays([pa.array(values, pa.binary()), paths], ["bytes", "path"])
        return table.set_column(table.column_names.index(CAMERA), CAMERA, column)

    return damage


def smaller(data: bytes) -> bytes:
    from rlinf.data.lerobot.pictures import encode_png

    return encode_png(np.zeros((SIDE, SIDE - 2, 3), np.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-40], r"is damaged \("),
        (lambda data: data[:100] + bytes([data[100] ^ 255]) + data[101:], r"is damaged \("),
        (lambda data: b"no picture", r"is damaged \("),
        (smaller, "is 32 x 30 and should be 32 x 32 pixels"),
    ],
)
def test_a_damaged_picture_is_named(images, change, message):
    rewrite(images / DATA, changed_picture(change))
    assert_refused(images, rf"file-000\.parquet: {CAMERA} of episode 1, frame 2 {message}.*; restore")
    LeRobotDataset(images).batch([6, 8])  # its neighbours are well


def test_pictures_that_are_not_in_the_file_are_refused(images):
    rewrite(images / DATA, changed_picture(lambda data: None))
    assert_refused(images, "names picture files instead of holding pictures; embed them")


def test_a_damaged_stretch_of_a_video_is_named_with_its_time(videos):
    with open(videos / VIDEO, "r+b") as file:
        size = (videos / VIDEO).stat().st_size
        file.seek(size // 4)
        file.write(bytes(size // 2))
    problems = check(videos, quiet)
    assert len(problems) == 1
    assert f"{videos / VIDEO} " in problems[0]


def test_a_video_that_is_too_short_or_of_another_size_is_named(videos, tmp_path):
    write(tmp_path / "other", [5], "video")
    shutil.copy(tmp_path / "other" / VIDEO, videos / VIDEO)
    assert_refused(videos, r"file-000\.mp4 has no frame at 0\.[5-9]00 s; restore")
    raw = json.loads((videos / INFO).read_text())["features"]
    raw[CAMERA]["shape"] = [64, 64, 3]
    edit_json(videos, features=raw)
    assert_refused(videos, r"file-000\.mp4 is 32 x 32 pixels, meta/info\.json says 64 x 64")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebase_version": "v1.6"}, "has codebase_version 'v1.6'; v3.0 is read and written, v2.0 and v2.1 are read"),
        ({"codebase_version": "absent"}, "has codebase_version None"),
        ({"fps": "absent"}, "is damaged: fps is missing"),
        ({"fps": 0}, "is damaged: fps is 0"),
        ({"features": {}}, "is damaged: feature timestamp is missing"),
        ({"total_episodes": -1}, "is damaged: total_episodes is -1"),
        ({"total_frames": 16}, r"info\.json counts 16 frames, the episodes have 15"),
        ({"total_episodes": 4}, "episode 3 of 4 missing"),
        ({"data_path": "/etc/passwd"}, "is damaged: data_path is '/etc/passwd', which does not name files of the data"),
        ({"data_path": "../{chunk_index}.parquet"}, "which does not name files"),
        ({"data_path": "{chunk_index.__class__}"}, "which does not name files"),
        ({"video_path": None}, "is damaged: video_path is None"),
    ],
)
def test_a_description_that_cannot_be_is_refused(videos, changes, message):
    edit_json(videos, **changes)
    assert_refused(videos, message)


def test_a_version_from_the_future_is_named(images):
    edit_json(images, codebase_version="v4.0")
    assert_refused(images, r"meta/info\.json has codebase_version 'v4\.0'; .* with the lerobot package first")


@pytest.mark.parametrize(
    ("feature", "entry", "message"),
    [
        ("action", {"shape": [3]}, r"column action has shape \[2\], meta/info\.json says \[3\]"),
        ("grid", {"shape": [3, 2]}, r"column grid has shape \[2, 3\], meta/info\.json says \[3, 2\]"),
        ("action", {"dtype": "int64"}, "column action holds float32, meta/info.json says int64"),
        ("note", {"dtype": "float32"}, "column note holds string, meta/info.json says float32"),
        ("action", {"dtype": "string"}, "column action holds .* and should hold text"),
        ("action", {"dtype": "image", "shape": [32, 32, 3]}, "column action holds .* should hold embedded pictures"),
        (CAMERA, {"shape": [32, 32]}, "is damaged: feature .* of dtype image has shape"),
    ],
)
def test_a_feature_that_the_files_do_not_have_so_is_named(images, feature, entry, message):
    raw = json.loads((images / INFO).read_text())["features"]
    raw[feature] |= entry
    edit_json(images, features=raw)
    assert_refused(images, message)


def test_a_column_that_is_not_there_is_named(images):
    rewrite(images / DATA, lambda table: table.drop_columns(["action"]))
    assert_refused(images, r"file-000\.parquet has no column action: it does not fit meta/info\.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.slice(0, 14), "has 14 rows and should have 15"),
        (
            lambda t: pa.concat_tables([t.slice(5), t.slice(0, 5)]),
            "where frame 0 of episode 0 should be, is frame 0 of",
        ),
        (with_column("action", pa.array([[0.0, 1.0]] * 14 + [[0.0]])), "column action has rows of different lengths"),
        (with_column("count", pa.array([1] * 14 + [None])), "column count lacks values in 1 places"),
        (with_column("task_index", pa.array([9] * 15)), "task 9 has no text in meta/"),
    ],
)
def test_rows_that_are_not_what_the_description_says_are_named(images, change, message):
    rewrite(images / DATA, change)
    assert_refused(images, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.take([0, 2]), "episode 1 of 3 missing; restore the file"),
        (lambda t: t.take([0, 0, 1, 2]).slice(0, 3), "episode 2 of 3 missing"),
        (lambda t: t.take([1, 0, 2]), "holds other episodes than 0 to 2 in their order"),
        (with_column("length", pa.array([5, 0, 6])), "episode 1 does not begin where the one before it ends"),
        (with_column("dataset_from_index", pa.array([0, 5, None])), "dataset_from_index is missing in 1 episodes"),
        (lambda t: t.drop_columns(["length"]), "has no column length"),
    ],
)
def test_gaps_between_episodes_are_named(images, change, message):
    rewrite(images / EPISODES, change)
    assert_refused(images, message)


def test_the_check_reports_everything_that_it_finds(images):
    rewrite(images / DATA, with_column("timestamp", pa.array(np.arange(15, dtype=np.float32))))
    (images / "meta/stats.json").unlink()
    (images / "data/chunk-000/file-007.parquet").write_bytes(b"left over")
    problems = check(images, quiet)
    assert len(problems) == 3
    assert "frame 4 of episode 2 has timestamp 13.0000 s, which is no multiple" not in problems[0]
    assert "has timestamp" in problems[0] and "is no multiple of 1/10 s" in problems[0]
    assert "stats.json is missing" in problems[1]
    assert "file-007.parquet belongs to no episode: a recording was interrupted" in problems[2]


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r"need pyarrow \(.*\): pip install 'rlinf\[lerobot\]', or bash"):
        packages.require("pyarrow")
