"""Data sets that other programs made, written here by hand with pyarrow, pillow and PyAV alone."""

import io
import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlinf.core.errors import DataError
from rlinf.data.lerobot.check import check
from rlinf.data.lerobot.layout import Feature
from rlinf.data.lerobot.reader import LeRobotDataset
from rlinf.data.lerobot.writer import LeRobotWriter

SIDE, FPS = 16, 5
LENGTHS = [4, 3, 5]
TASKS = ["put the block into the bowl", "open the drawer"]
EPISODE_TASKS = [0, 1, 0]


def quiet(text: str) -> None:
    pass


def png(number: int, frame: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (40 * number, 20 * frame, 7)).save(stream, "PNG")
    return stream.getvalue()


def mp4(path: Path, frames: list[tuple[int, int]]) -> None:
    """One key frame and differences that lean on it, as a recorder without random access in mind writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "250", "crf": "10", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for number, frame in frames:
            pixels = np.full((SIDE, SIDE, 3), (40 * number, 20 * frame, 7), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def columns(number: int, first: int) -> dict:
    length = LENGTHS[number]
    frames = np.arange(length)
    return {
        "image": pa.array([{"bytes": png(number, t), "path": f"frame_{t:06d}.png"} for t in range(length)]),
        # Lists of any length, as the datasets package has them after a cast.
        "state": pa.array([[number, t, 0.5] for t in range(length)], pa.list_(pa.float32())),
        "actions": pa.array([[t, number] for t in range(length)], pa.list_(pa.float32(), 2)),
        "timestamp": pa.array((frames / FPS).astype(np.float32)),
        "frame_index": pa.array(frames),
        "episode_index": pa.array(np.full(length, number)),
        "index": pa.array(first + frames),
        "task_index": pa.array(np.full(length, EPISODE_TASKS[number])),
    }


def info(version: str, **more) -> dict:
    scalar = {"shape": [1], "names": None}
    features = {
        "image": {"dtype": "image", "shape": [SIDE, SIDE, 3], "names": ["height", "width", "channel"]},
        "wrist": {"dtype": "video", "shape": [3, SIDE, SIDE], "names": ["channels", "height", "width"]},
        "state": {"dtype": "float32", "shape": [3], "names": {"motors": ["a", "b", "c"]}},
        "actions": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
        "timestamp": {"dtype": "float32", **scalar},
        **{key: {"dtype": "int64", **scalar} for key in ("frame_index", "episode_index", "index", "task_index")},
    }
    counts = {"total_episodes": 3, "total_frames": 12, "total_tasks": 2, "chunks_size": 2}
    return {"codebase_version": version, "robot_type": "franka", "fps": FPS, **counts, "features": features, **more}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def old_set(tmp_path) -> Path:
    """A data set of v2.1: one file per episode, two episodes per folder."""
    meta = tmp_path / "meta"
    meta.mkdir()
    paths = {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    more = {"total_videos": 3, "total_chunks": 2, "splits": {"train": "0:3"}, **paths}
    (meta / "info.json").write_text(json.dumps(info("v2.1", **more)))
    first = 0
    for number, length in enumerate(LENGTHS):
        folder = f"chunk-{number // 2:03d}"
        file = tmp_path / "data" / folder / f"episode_{number:06d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns(number, first)), file)
        mp4(tmp_path / "videos" / folder / "wrist" / f"episode_{number:06d}.mp4", [(number, t) for t in range(length)])
        first += length
    write_lines(meta / "tasks.jsonl", [{"task_index": n, "task": text} for n, text in enumerate(TASKS)])
    write_lines(meta / "episodes.jsonl", [
        {"episode_index": n, "tasks": [TASKS[EPISODE_TASKS[n]]], "length": length} for n, length in enumerate(LENGTHS)
    ])  # fmt: skip
    write_lines(meta / "episodes_stats.jsonl", [
        {"episode_index": n, "stats": {
            "actions": {"min": [0, n], "max": [length - 1, n], "mean": [(length - 1) / 2, n],
                        "std": [float(np.arange(length).std()), 0], "count": [length]},
            "image": {"min": [[[0.0]]] * 3, "max": [[[1.0]]] * 3, "mean": [[[0.5]]] * 3, "std": [[[0.1]]] * 3,
                      "count": [length]}}}
        for n, length in enumerate(LENGTHS)
    ])  # fmt: skip
    return tmp_path


@pytest.fixture
def new_set(tmp_path) -> Path:
    """The same frames as v3.0: all episodes in one parquet file, the last one in a video of its own."""
    meta = tmp_path / "meta"
    (meta / "episodes/chunk-000").mkdir(parents=True)
    paths = {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (meta / "info.json").write_text(json.dumps(info("v3.0", **paths)))
    begins = np.cumsum([0, *LENGTHS])
    tables = [pa.table(columns(number, int(begins[number]))) for number in range(3)]
    (tmp_path / "data/chunk-000").mkdir(parents=True)
    pq.write_table(pa.concat_tables(tables), tmp_path / "data/chunk-000/file-000.parquet")
    mp4(tmp_path / "videos/wrist/chunk-000/file-000.mp4", [(n, t) for n in range(2) for t in range(LENGTHS[n])])
    mp4(tmp_path / "videos/wrist/chunk-000/file-001.mp4", [(2, t) for t in range(LENGTHS[2])])
    pq.write_table(pa.table({
        "episode_index": [0, 1, 2],
        "tasks": [[TASKS[n]] for n in EPISODE_TASKS],
        "length": LENGTHS,
        "data/chunk_index": [0, 0, 0],
        "data/file_index": [0, 0, 0],
        "dataset_from_index": begins[:-1],
        "dataset_to_index": begins[1:],
        "videos/wrist/chunk_index": [0, 0, 0],
        "videos/wrist/file_index": [0, 0, 1],
        "videos/wrist/from_timestamp": [0.0, 0.8, 0.0],
        "videos/wrist/to_timestamp": [0.8, 1.4, 1.0],
        "meta/episodes/chunk_index": [0, 0, 0],
        "meta/episodes/file_index": [0, 0, 0],
    }), meta / "episodes/chunk-000/file-000.parquet")  # fmt: skip
    pq.write_table(pa.table({"task_index": [1, 0], "task": TASKS[::-1]}), meta / "tasks.parquet")
    return tmp_path


@pytest.mark.parametrize("version", ["old_set", "new_set"])
def test_every_frame_is_read(version, request):
    data = LeRobotDataset(request.getfixturevalue(version), windows={"actions": [0, 1]})
    assert (len(data), data.info.fps, data.info.robot_type) == (12, FPS, "franka")
    for rows in (np.arange(12), np.array([11, 3, 3, 5, 0])):
        batch = data.batch(rows)
        numbers, frames = batch["episode_index"], batch["frame_index"]
        tones = np.stack([40 * numbers, 20 * frames, np.full_like(frames, 7)], 1)[:, None, None]
        assert np.array_equal(batch["image"], np.broadcast_to(tones, batch["image"].shape).astype(np.uint8))
        assert batch["wrist"].shape == (len(rows), SIDE, SIDE, 3)
        assert np.abs(batch["wrist"].astype(float) - tones).max() <= 4  # of the codec
        assert np.array_equal(batch["state"], np.stack([numbers, frames, np.full(len(rows), 0.5)], 1).astype("float32"))
        last = np.array(LENGTHS)[numbers] - 1
        assert np.array_equal(batch["actions"][:, 1, 0], np.minimum(frames + 1, last).astype(np.float32))
        assert batch["actions_is_pad"][:, 1].tolist() == (frames == last).tolist()
        assert batch["task"] == [TASKS[EPISODE_TASKS[n]] for n in numbers]
    assert [problem for problem in check(data.meta.root, quiet) if "stats" not in problem] == []


def test_statistics_of_old_episodes_are_merged(old_set):
    stats = LeRobotDataset(old_set).meta.stats
    every = np.concatenate([np.arange(length) for length in LENGTHS])
    actions = stats["actions"]
    assert (actions["min"].tolist(), actions["max"].tolist(), actions["count"].tolist()) == ([0, 0], [4, 2], [12])
    np.testing.assert_allclose([actions["mean"][0], actions["std"][0]], [every.mean(), every.std()])
    assert stats["image"]["mean"].shape == (3, 1, 1)


def test_sets_of_v20_have_one_file_of_statistics(old_set):
    path, before = old_set / "meta" / "info.json", LeRobotDataset(old_set)
    path.write_text(path.read_text().replace('"v2.1"', '"v2.0"'))
    (old_set / "meta" / "episodes_stats.jsonl").unlink()
    stats = {key: {"mean": [0.5], "std": [1.0]} for key in before.info.features}
    (old_set / "meta" / "stats.json").write_text(json.dumps(stats))
    data = LeRobotDataset(old_set)
    assert (data.info.version, data.meta.stats["actions"]["mean"].tolist()) == ("v2.0", [0.5])
    one, other = data.batch([0, 5, 11]), before.batch([0, 5, 11])
    assert one["task"] == other["task"] and all(np.array_equal(one[key], other[key]) for key in ("actions", "image"))
    assert check(old_set, quiet) == []


def test_old_data_sets_are_not_added_to(old_set):
    features = {key: f for key, f in LeRobotDataset(old_set).info.features.items() if f.dtype == "float32"}
    features = {key: Feature(f.dtype, f.shape) for key, f in features.items() if key != "timestamp"}
    with pytest.raises(DataError, match=r"is a data set of v2\.1, which is read only: record into another folder"):
        LeRobotWriter(old_set, fps=FPS, features=features)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("episodes.jsonl", '{"episode_index": 0, "tasks": [], "length": 4}\n', "episode 1 and 1 more of 3 missing"),
        ("episodes.jsonl", '{"episode_index": 0}\n', r"episodes\.jsonl:1 lacks episode_index, tasks, length; restore"),
        ("episodes.jsonl", "{}\nhalf a li", r"episodes\.jsonl:1 lacks"),
        ("tasks.jsonl", '{"task_index": 0, "task": "put', r"tasks\.jsonl:1 is damaged: .*; restore"),
        ("tasks.jsonl", '{"task_index": 0, "task": "put"}\n', "task 1 has no text in meta/"),
        ("episodes_stats.jsonl", '{"episode_index": 0, "stats": {"a": 3}}\n', r"episodes_stats\.jsonl is damaged"),
    ],
)
def test_damaged_lines_are_named(old_set, file, content, message):
    (old_set / "meta" / file).write_text(content)
    with pytest.raises(DataError, match=message):
        LeRobotDataset(old_set)


@pytest.mark.parametrize("file", ["data/chunk-001/episode_000002.parquet", "videos/chunk-000/wrist/episode_000001.mp4"])
def test_the_file_of_an_episode_that_is_missing_is_named(old_set, file):
    (old_set / file).unlink()
    with pytest.raises(DataError, match=rf"{file} is missing"):
        LeRobotDataset(old_set)


def test_a_data_set_that_is_still_empty_has_no_frames_and_is_begun(tmp_path):
    (tmp_path / "meta").mkdir()
    paths = {"data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", "video_path": None}
    empty = info("v3.0", **paths, splits={}) | {"total_episodes": 0, "total_frames": 0, "total_tasks": 0}
    del empty["features"]["image"], empty["features"]["wrist"]
    (tmp_path / "meta/info.json").write_text(json.dumps(empty))
    data = LeRobotDataset(tmp_path, windows={"actions": [0, 1]})
    assert (len(data), data.batch([])["actions"].shape) == (0, (0, 2, 2))
    with pytest.raises(IndexError):
        data[0]
    features = {"state": Feature("float32", (3,)), "actions": Feature("float32", (2,))}
    with LeRobotWriter(tmp_path, fps=FPS, features=features) as writer:
        writer.add_episode({"state": np.ones((2, 3)), "actions": np.zeros((2, 2))}, "begin")
    data = LeRobotDataset(tmp_path)
    assert (len(data), data[1]["task"], data.info.chunks_size) == (2, "begin", 2)
    assert check(tmp_path, quiet) == []
