"""LeRobot data sets: what is written is read, and lies where the layout says."""

import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlinf.core.errors import DataError
from rlinf.data.lerobot import volume as volumes
from rlinf.data.lerobot.check import check
from rlinf.data.lerobot.layout import Feature, find_root, frame_offsets
from rlinf.data.lerobot.pictures import decode, encode_png
from rlinf.data.lerobot.reader import LeRobotDataset
from rlinf.data.lerobot.writer import LeRobotWriter
from tests.data.lerobot_sets import CAMERA, FPS, SIDE, assert_holds, episode, features, picture, task_of, write

LENGTHS = [5, 1, 7, 4]


def names(root: Path, pattern: str = "**/*") -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern) if path.is_file())


def quiet(text: str) -> None:
    pass


# --- what is written is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "video", None])
def test_what_was_written_is_read(tmp_path, kind):
    write(tmp_path, LENGTHS, kind)
    data = assert_holds(tmp_path, LENGTHS, kind)
    assert (data.info.fps, data.info.total_tasks, data.info.robot_type) == (FPS, 3, None)
    assert check(tmp_path, quiet) == []


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_every_video_frame_is_found_in_any_order(tmp_path, codec):
    """The frame that is read is nearer to its original than to the frames beside it, wherever one comes from."""
    write(tmp_path, [20, 15], "video", codec=codec)
    data = LeRobotDataset(tmp_path)
    assert data.info.features[CAMERA].info["video.codec"] == codec
    rng = np.random.default_rng(0)
    for _ in range(5):
        chosen = rng.integers(0, 35, 9)
        for row, seen in zip(chosen, data.batch(chosen)[CAMERA], strict=True):
            number, frame = (0, row) if row < 20 else (1, row - 20)
            tone = seen[8:, 8:].reshape(-1, 3).mean(0)
            assert abs(tone[0] - 40 * number) < 20 and abs(tone[1] - 11 * frame) < 5.5, (row, tone)


def test_an_episode_may_have_a_task_for_every_frame(tmp_path):
    with LeRobotWriter(tmp_path, fps=FPS, features=features(None)) as writer:
        writer.add_episode(episode(0, 3, None), ["first", "then", "then"])
        writer.add_episode(episode(1, 2, None), "first")
    data = LeRobotDataset(tmp_path)
    assert data.batch(range(5))["task"] == ["first", "then", "then", "first", "first"]
    assert data.meta.episode_tasks == [["first", "then"], ["first"]]
    assert data.meta.tasks == {0: "first", 1: "then"}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (32, 48)])
def test_png_is_exact_and_what_pillow_writes_is_read(channels, shape):
    import io

    from PIL import Image

    frame = np.random.default_rng(0).integers(0, 256, (*shape, channels), np.uint8)
    out = np.empty_like(frame)
    decode(encode_png(frame), out)
    assert np.array_equal(out, frame)
    stream = io.BytesIO()
    Image.fromarray(frame.squeeze(-1) if channels == 1 else frame).save(stream, "PNG")
    out[:] = 0
    decode(stream.getvalue(), out)
    assert np.array_equal(out, frame)


# --- access ---------------------------------------------------------------------------------------------------


def test_windows_are_kept_inside_the_episode_and_marked(tmp_path):
    write(tmp_path, [4, 3])
    data = LeRobotDataset(tmp_path, windows={"action": range(3), "observation.state": [-2, 0], CAMERA: [0, 5]})
    batch = data.batch([0, 2, 3, 4, 6])
    assert (7 * batch["action"][..., 0]).round().astype(int).tolist() == [
        [0, 1, 2], [2, 3, 3], [3, 3, 3], [0, 1, 2], [2, 2, 2],
    ]  # fmt: skip
    assert batch["action_is_pad"].astype(int).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0], [0, 1, 1]]
    assert batch["observation.state"][..., 1].astype(int).tolist() == [[0, 0], [0, 2], [1, 3], [0, 0], [0, 2]]
    assert batch["observation.state_is_pad"].astype(int).tolist() == [[1, 0], [0, 0], [0, 0], [1, 0], [0, 0]]
    assert np.array_equal(batch[CAMERA][1], [picture(0, 2), picture(0, 3)])
    assert np.array_equal(batch[CAMERA][4], [picture(1, 2), picture(1, 2)])
    assert batch["timestamp"].shape == (5,)


def test_windows_in_seconds_are_whole_frames():
    assert frame_offsets({"action": [0, 0.1, 0.2], "state": [-0.1]}, 10) == {"action": [0, 1, 2], "state": [-1]}
    assert frame_offsets({"action": [1 / 30, 2 / 30]}, 30) == {"action": [1, 2]}
    with pytest.raises(DataError, match=r"delta_timestamps of action: 0\.15 s is no multiple of a frame's 1/10 s"):
        frame_offsets({"action": [0, 0.15]}, 10)


def test_one_frame_has_no_batch_axis_and_may_be_counted_from_the_end(tmp_path):
    write(tmp_path, LENGTHS)
    data = LeRobotDataset(tmp_path)
    last = data[-1]
    assert last["observation.state"].tolist() == [3, 3, 3003]
    assert (last["task"], last["note"], last["next.done"]) == (task_of(3), "3/3", True)
    assert np.array_equal(last[CAMERA], picture(3, 3))
    assert data[np.array([1, 2])]["count"].tolist() == [1, 2]
    for wrong in (17, -18):
        with pytest.raises(IndexError):
            data[wrong]


def test_some_episodes_are_numbered_anew(tmp_path):
    write(tmp_path, LENGTHS)
    data = LeRobotDataset(tmp_path, episodes=[2, 0], windows={"action": [0, 1]})
    assert len(data) == 12
    batch = data.batch(range(12))
    assert batch["episode_index"].tolist() == [2] * 7 + [0] * 5
    assert np.array_equal(batch[CAMERA][6:8], [picture(2, 6), picture(0, 0)])
    assert batch["action_is_pad"][:, 1].nonzero()[0].tolist() == [6, 11]
    with pytest.raises(DataError, match="has the episodes 0 to 3; episode 4 was asked for"):
        LeRobotDataset(tmp_path, episodes=[1, 4])


def test_only_what_is_asked_for_is_read(tmp_path):
    write(tmp_path, LENGTHS)
    data = LeRobotDataset(tmp_path, keys=["action"])
    always = ["timestamp", "frame_index", "episode_index", "task_index", "task"]
    assert list(data.batch([0])) == ["action", *always]
    with pytest.raises(DataError, match=r"has no feature 'reward' for `keys`; there are observation.state, action"):
        LeRobotDataset(tmp_path, keys=["reward"])
    with pytest.raises(DataError, match="note holds texts, of which there are no windows"):
        LeRobotDataset(tmp_path, windows={"note": [0]})


@pytest.mark.parametrize("kind", ["image", "video"])
def test_however_pictures_are_kept_they_are_the_same(tmp_path, kind):
    write(tmp_path / "set", LENGTHS, kind, commit_every=2)
    plain = LeRobotDataset(tmp_path / "set").batch(range(17))[CAMERA]
    threads = LeRobotDataset(tmp_path / "set", num_threads=3, max_open_videos=1)
    assert np.array_equal(threads.batch(range(17))[CAMERA], plain)
    mapped = LeRobotDataset(tmp_path / "set", map_to=tmp_path / "cache")
    assert np.array_equal(mapped.batch(range(17))[CAMERA], plain)
    files = names(tmp_path / "cache")
    assert len(files) == (kind == "image")
    LeRobotDataset(tmp_path / "set", map_to=tmp_path / "cache")
    assert names(tmp_path / "cache") == files
    plain_set = LeRobotDataset(tmp_path / "set")
    plain_set.preload()
    assert np.array_equal(plain_set.batch([3, 3, 16])[CAMERA], plain[[3, 3, 16]])


def test_pictures_that_do_not_fit_into_memory_are_refused_with_the_remedy(tmp_path, monkeypatch):
    write(tmp_path, LENGTHS)
    monkeypatch.setattr("rlinf.data.lerobot.packed.available_memory", lambda: 1000)
    with pytest.raises(DataError, match="are available; choose fewer episodes, or a folder to map them to"):
        LeRobotDataset(tmp_path)
    data = LeRobotDataset(tmp_path, map_to=tmp_path / "cache")
    monkeypatch.setattr("rlinf.data.lerobot.reader.available_memory", lambda: 1000)
    with pytest.raises(DataError, match=r"the unpacked pictures need .* or do not preload"):
        data.preload()


def read_in_child(data: LeRobotDataset, rows: list[int], results) -> None:
    results.put(data.batch(rows)[CAMERA])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_what_their_parent_reads(tmp_path, method):
    write(tmp_path, [8, 8], "video")
    data = LeRobotDataset(tmp_path, num_threads=2)
    expected = data.batch([12, 3])[CAMERA]  # files are open and threads run when the child begins
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=read_in_child, args=(data, [12, 3], results))
    child.start()
    assert np.array_equal(results.get(timeout=60), expected)
    child.join(60)
    assert np.array_equal(data.batch([12, 3])[CAMERA], expected)


def test_a_copy_has_the_same_frames(tmp_path):
    write(tmp_path, LENGTHS)
    data = LeRobotDataset(tmp_path, episodes=[1, 2], windows={"action": [0, 1]})
    data.preload()
    one, other = data.batch(range(8)), pickle.loads(pickle.dumps(data)).batch(range(8))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)


# --- the layout -----------------------------------------------------------------------------------------------


def test_info_and_files_are_those_of_the_layout(tmp_path):
    write(tmp_path, LENGTHS, "video", robot_type="panda")
    assert names(tmp_path) == [
        "data/chunk-000/file-000.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
        f"videos/{CAMERA}/chunk-000/file-000.mp4",
    ]
    info = json.loads((tmp_path / "meta/info.json").read_text())
    described = info.pop("features")
    assert info == {
        "codebase_version": "v3.0",
        "robot_type": "panda",
        "total_episodes": 4,
        "total_frames": 17,
        "total_tasks": 3,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": 10,
        "splits": {"train": "0:4"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    assert described["action"] == {"dtype": "float32", "shape": [2], "names": None}
    assert described["task_index"] == {"dtype": "int64", "shape": [1], "names": None}
    assert list(described)[-5:] == ["timestamp", "frame_index", "episode_index", "index", "task_index"]
    assert described[CAMERA] == {
        "dtype": "video",
        "shape": [SIDE, SIDE, 3],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": SIDE,
            "video.width": SIDE,
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": 10,
            "video.channels": 3,
            "has_audio": False,
        },
    }


def test_columns_have_the_types_of_the_layout(tmp_path):
    write(tmp_path, LENGTHS)
    schema = pq.read_schema(tmp_path / "data/chunk-000/file-000.parquet")
    types = {name: str(kind).replace("item", "element") for name, kind in zip(schema.names, schema.types, strict=True)}
    assert types == {
        "observation.state": "fixed_size_list<element: float>[3]",
        "action": "fixed_size_list<element: float>[2]",
        "next.done": "bool",
        "grid": "list<element: list<element: float>>",
        "count": "int64",
        "note": "string",
        CAMERA: "struct<bytes: binary, path: string>",
        "timestamp": "float",
        **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64"),
    }
    described = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert described["action"] == {"feature": {"dtype": "float32", "_type": "Value"}, "length": 2, "_type": "List"}
    assert described["next.done"] == {"dtype": "bool", "_type": "Value"}
    assert described["grid"] == {"shape": [2, 3], "dtype": "float32", "_type": "Array2D"}
    assert described[CAMERA] == {"_type": "Image"}
    assert json.loads(schema.field("grid").metadata[b"ARROW:extension:metadata"]) == [[2, 3], "float32"]

    tasks = pq.read_table(tmp_path / "meta/tasks.parquet")
    assert tasks.to_pydict() == {"task_index": [0, 1, 2], "__index_level_0__": [task_of(n) for n in range(3)]}
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["__index_level_0__"]


def test_episodes_are_described_as_in_the_layout(tmp_path):
    write(tmp_path, LENGTHS, "video")
    table = pq.read_table(tmp_path / "meta/episodes/chunk-000/file-000.parquet")
    third = table.slice(2, 1).to_pylist()[0]
    assert {key: value for key, value in third.items() if not key.startswith("stats/")} == {
        "episode_index": 2,
        "tasks": ["wait"],
        "length": 7,
        "data/chunk_index": 0,
        "data/file_index": 0,
        "dataset_from_index": 6,
        "dataset_to_index": 13,
        f"videos/{CAMERA}/chunk_index": 0,
        f"videos/{CAMERA}/file_index": 0,
        f"videos/{CAMERA}/from_timestamp": 0.6,
        f"videos/{CAMERA}/to_timestamp": 1.3,
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }
    number, numbers = pa.float64(), pa.list_(pa.float64())
    types = {name: str(table.schema.field(f"stats/{name}").type).replace("item", "element") for name in (
        "action/mean", "count/min", "next.done/max", f"{CAMERA}/q99", "grid/count")}  # fmt: skip
    assert str(numbers).replace("item", "element") == types["action/mean"]
    assert types["count/min"] == types["grid/count"] == "list<element: int64>"
    assert types["next.done/max"] == "list<element: bool>"
    assert types[f"{CAMERA}/q99"] == f"list<element: list<element: list<element: {number}>>>"
    assert third["stats/grid/count"] == [7]
    assert "stats/note/min" not in third


def test_files_are_begun_anew_when_they_are_full_and_folders_too(tmp_path):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (12, 128, 128, 3), np.uint8) for _ in range(6)]  # 0.6 MB each
    with LeRobotWriter(
        tmp_path, fps=10, features={"cam": Feature("image", (128, 128, 3))}, data_file_mb=1, files_per_chunk=2
    ) as writer:
        for number, pictures in enumerate(frames):
            writer.add_episode({"cam": pictures}, "look")
            # Of the open file and the finished ones, none is larger than allowed.
            assert max(path.stat().st_size for path in tmp_path.glob("data/*/*")) < 1.1e6, number
    assert names(tmp_path, "data/**/*") == [
        f"data/chunk-{chunk:03d}/file-{file:03d}.parquet" for chunk in range(3) for file in range(2)
    ]
    assert names(tmp_path, "meta/episodes/**/*") == [name.replace("data", "meta/episodes") for name in names(
        tmp_path, "data/**/*")]  # fmt: skip
    data = LeRobotDataset(tmp_path)
    assert np.array_equal(data.batch(range(72))["cam"].reshape(6, 12, 128, 128, 3), frames)
    assert data.info.data_files_size_in_mb == 1


@pytest.mark.parametrize("kind", ["image", "video"])
def test_many_commits_become_one_file(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("rlinf.data.lerobot.writer.MAX_PIECES", 3)
    seen = []
    with LeRobotWriter(tmp_path, fps=FPS, features=features(kind)) as writer:
        for number in range(8):
            writer.add_episode(episode(number, 3, kind), task_of(number))
            seen.append(len(names(tmp_path, "data/**/*")))
            assert_holds(tmp_path, [3] * (number + 1), kind)
    assert seen == [1, 2, 3, 2, 3, 2, 3, 2]
    assert names(tmp_path, "data/**/*") == ["data/chunk-000/file-000.parquet"]
    assert len(names(tmp_path, "videos/**/*")) == (kind == "video")
    assert_holds(tmp_path, [3] * 8, kind)
    assert check(tmp_path, quiet) == []


def test_joining_videos_decodes_nothing(tmp_path):
    """The same frames come out of one file of two encoders' output as out of the two."""
    write(tmp_path / "two", [6], "video")
    write(tmp_path / "two", [6], "video", first=1)
    write(tmp_path / "one", [6, 6], "video", commit_every=1)
    one, two = (LeRobotDataset(tmp_path / name).batch(range(12))[CAMERA] for name in ("one", "two"))
    assert np.array_equal(one, two)
    assert names(tmp_path / "two", "videos/**/*") == [f"videos/{CAMERA}/chunk-000/file-000.mp4"]


# --- going on -------------------------------------------------------------------------------------------------


def contents(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in names(root) if not name.endswith(".mp4")}


@pytest.mark.parametrize("kind", ["image", "video", None])
def test_a_recording_in_two_parts_is_the_same_as_in_one(tmp_path, kind):
    write(tmp_path / "whole", LENGTHS, kind)
    write(tmp_path / "parts", LENGTHS[:2], kind)
    write(tmp_path / "parts", LENGTHS[2:], kind, first=2)
    assert_holds(tmp_path / "parts", LENGTHS, kind)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_nothing_is_there_before_the_first_commit(tmp_path):
    root = tmp_path / "set"
    with LeRobotWriter(root, fps=FPS, features=features(None), commit_every=0) as writer:
        writer.add_episode(episode(0, 3, None), "wait")
        assert not root.exists()
        assert writer.num_episodes == 1
        writer.commit()
        assert_holds_none_else(root, 1)
        writer.add_episode(episode(1, 3, None), "wait")
        assert_holds_none_else(root, 1)
    assert_holds_none_else(root, 2)
    with LeRobotWriter(tmp_path / "empty", fps=FPS, features=features(None)):
        pass
    assert not (tmp_path / "empty").exists()


def assert_holds_none_else(root: Path, episodes: int) -> None:
    assert LeRobotDataset(root).meta.num_episodes == episodes


def test_an_interrupted_recording_keeps_its_finished_episodes(tmp_path):
    with pytest.raises(KeyboardInterrupt), LeRobotWriter(tmp_path, fps=FPS, features=features(), commit_every=0) as w:
        w.add_episode(episode(0, 5), task_of(0))
        raise KeyboardInterrupt
    assert_holds(tmp_path, [5])


def test_another_kind_of_data_set_is_not_continued(tmp_path):
    write(tmp_path, [3], notes={"env_id": "Pick"})
    kept = contents(tmp_path)

    def attempt(fps=FPS, wanted=None, notes=None):
        return LeRobotWriter(
            tmp_path, fps=fps, features=features() if wanted is None else wanted, notes=notes or {"env_id": "Pick"}
        )

    with pytest.raises(DataError, match="has 10 frames per second, not 20: record into another folder"):
        attempt(fps=20)
    with pytest.raises(DataError, match=r"feature action is float32 \[2\] there and float32 \[7\] here"):
        attempt(wanted=features() | {"action": Feature("float32", (7,))})
    with pytest.raises(DataError, match=r"feature observation\.images\.front is image \[32, 32, 3\] there and absent"):
        attempt(wanted=features(None))
    with pytest.raises(DataError, match="was recorded with env_id 'Pick', not 'Push'"):
        attempt(notes={"env_id": "Push"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds something else than a data set .* record into another folder"):
        LeRobotWriter(tmp_path / "other", fps=FPS, features=features())
    assert contents(tmp_path / "other") == {"thesis.txt": b"mine"}
    (tmp_path / "other" / "thesis.txt").unlink()
    (tmp_path / "other").rmdir()
    assert contents(tmp_path) == kept


def test_features_that_cannot_be_stored_are_refused_at_once(tmp_path):
    for wanted, message in [
        ({"cam": Feature("video", (31, 32, 3))}, r"cam: videos have an even height .* record images instead"),
        ({"cam": Feature("image", (3, 32, 32))}, r"cam: pictures have shape \[height, width, 1 or 3\]"),
        ({"a/b": Feature("float32", (1,))}, "'a/b' is no name of a feature"),
        ({"a": Feature("complex64", (1,))}, "feature a has the unknown dtype 'complex64'"),
        ({"a": Feature("float32", ())}, r"feature a of dtype float32 has shape \(\)"),
        ({"index": Feature("int64", (1,))}, "index is written by itself"),
    ]:
        with pytest.raises(DataError, match=message):
            LeRobotWriter(tmp_path / "set", fps=FPS, features=wanted)
    for options, message in [({"fps": 0}, "fps is 0"), ({"codec": "h266"}, "there is no codec 'h266'; there are h264")]:
        with pytest.raises(DataError, match=message):
            LeRobotWriter(tmp_path / "set", **{"fps": FPS, "features": features(), **options})


def test_an_episode_that_does_not_fit_is_refused_and_the_others_kept(tmp_path):
    good = episode(0, 4)
    nan = good["action"].copy()
    nan[2, 1] = np.nan
    deep = good[CAMERA].astype(np.uint16)
    deep[3, 0, 0] = 256
    with LeRobotWriter(tmp_path, fps=FPS, features=features()) as writer:
        writer.add_episode(good, task_of(0))
        for change, message in [
            ({"action": None}, "an episode lacks action"),
            ({"reward": good["action"]}, "an episode has reward, which are no features"),
            ({"action": good["action"][:3]}, r"one length of all features, at least 1, and has \[3, 4\]"),
            ({"action": good["action"][:, :1]}, r"action is float32 \[4, 1\] and should be float32 \[T, 2\]"),
            ({"count": good["action"][:, 0]}, r"count is float32 \[4, 1\] and should be int64 \[T, 1\]"),
            ({"action": nan}, "action holds NaN or infinity, first in frame 2"),
            ({"action": np.full((4, 2), 1e300)}, "action holds NaN or infinity, first in frame 0"),
            ({CAMERA: deep}, "holds uint16 numbers that are none of uint8, first in frame 3"),
            ({"note": [1, 2, 3, 4]}, "note must be a list of texts"),
            ({CAMERA: good[CAMERA][:, :8]}, r"is uint8 \[4, 8, 32, 3\] and should be uint8 \[T, 32, 32, 3\]"),
        ]:
            bad = {key: value for key, value in (good | change).items() if value is not None}
            with pytest.raises(DataError, match=message):
                writer.add_episode(bad, "wait")
        with pytest.raises(DataError, match="an episode of 4 frames needs one task text, or 4"):
            writer.add_episode(good, ["wait"] * 3)
        with pytest.raises(DataError, match="needs one task text"):
            writer.add_episode(good, "")
    assert_holds(tmp_path, [4])


def test_only_one_program_records_into_a_folder(tmp_path):
    write(tmp_path, [2])
    with LeRobotWriter(tmp_path, fps=FPS, features=features()) as first:
        with pytest.raises(DataError, match=r"another program records into .*: wait for it"):
            LeRobotWriter(tmp_path, fps=FPS, features=features())
        first.add_episode(episode(1, 2), task_of(1))
    write(tmp_path, [2], first=2)
    assert_holds(tmp_path, [2, 2, 2])
    one = LeRobotWriter(tmp_path / "new", fps=FPS, features=features(None))
    write(tmp_path / "new", [3], None)
    with pytest.raises(DataError, match="another program has recorded into"):
        one.add_episode(episode(0, 1, None), "wait")


def test_a_name_is_looked_for_below_the_home_of_data_sets(tmp_path, monkeypatch):
    write(tmp_path / "me" / "set", [2], None)
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    assert find_root("me/set") == tmp_path / "me" / "set"
    assert find_root(tmp_path / "me") == tmp_path / "me"
    with pytest.raises(DataError, match=r"me/sit is no folder and .*me/sit is none either"):
        find_root("me/sit")
    monkeypatch.delenv("HF_LEROBOT_HOME")
    with pytest.raises(DataError, match="and HF_LEROBOT_HOME is not set"):
        find_root("me/sit")


# --- any lengths, any portions ----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3),
    commit_every=st.integers(0, 3),
    per_volume=st.integers(1, 6),
    max_pieces=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_any_portions_give_the_same_frames(
    tmp_path_factory, monkeypatch, parts, commit_every, per_volume, max_pieces, seed
):
    root = tmp_path_factory.mktemp("set")
    with monkeypatch.context() as patched:
        patched.setattr("rlinf.data.lerobot.writer.EPISODES_PER_VOLUME", per_volume)
        patched.setattr("rlinf.data.lerobot.writer.MAX_PIECES", max_pieces)
        done: list[int] = []
        for lengths in parts:
            write(root, lengths, None, first=len(done), commit_every=commit_every, files_per_chunk=3)
            done += lengths
    data = assert_holds(root, done, None)
    rows = np.random.default_rng(seed).permutation(len(data))
    windowed = LeRobotDataset(root, windows={"count": [-1, 0, 4]}).batch(rows)
    for row, window, padded in zip(rows, windowed["count"], windowed["count_is_pad"], strict=True):
        number = int(np.searchsorted(np.cumsum(done), row, side="right"))
        frame = int(row - sum(done[:number]))
        wanted = [frame - 1, frame, frame + 4]
        assert window.tolist() == [1000 * number + min(max(f, 0), done[number] - 1) for f in wanted]
        assert padded.tolist() == [not 0 <= f < done[number] for f in wanted]
    assert check(root, quiet) == []
    files = np.array([int(name[-11:-8]) + 3 * int(name[-20:-17]) for name in names(root, "data/**/*")])
    assert np.array_equal(files, np.arange(len(files)))  # numbered without gaps
    assert volumes.EPISODES_PER_VOLUME == 500
