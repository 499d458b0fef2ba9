"""Small LeRobot data sets whose every frame says which it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rlinf.data.lerobot.layout import Feature
from rlinf.data.lerobot.reader import LeRobotDataset
from rlinf.data.lerobot.writer import LeRobotWriter

FPS, SIDE = 10, 32
CAMERA = "observation.images.front"
CODEC_ERROR = 6.0  # largest mean difference of a picture after H.264


def features(kind: str | None = "image") -> dict[str, Feature]:
    numbers = {
        "observation.state": Feature("float32", (3,), ["episode", "frame", "both"]),
        "action": Feature("float32", (2,)),
        "next.done": Feature("bool", (1,)),
        "grid": Feature("float32", (2, 3)),
        "count": Feature("int64", (1,)),
        "note": Feature("string", (1,)),
    }
    return numbers if kind is None else numbers | {CAMERA: Feature(kind, (SIDE, SIDE, 3))}


def task_of(number: int) -> str:
    return ("pick up the cube", "push the cube", "wait")[number % 3]


def episode(number: int, length: int, kind: str | None = "image") -> dict:
    """Frame t of episode e shows e and t in every feature."""
    t = np.arange(length, dtype=np.float32)
    e = np.full(length, number, np.float32)
    data = {
        "observation.state": np.stack([e, t, 1000 * e + t], 1),
        "action": np.stack([t, -t], 1) / 7,
        "next.done": t == length - 1,
        "grid": (100 * e + t)[:, None, None] + np.arange(6, dtype=np.float32).reshape(2, 3),
        "count": (1000 * e + t).astype(np.int64),
        "note": [f"{number}/{frame}" for frame in range(length)],
    }
    if kind is not None:
        data[CAMERA] = np.stack([picture(number, frame) for frame in range(length)])
    return data


def picture(number: int, frame: int) -> np.ndarray:
    """A field whose colours are the numbers of episode and frame, with a corner that no codec leaves as it is."""
    field = np.full((SIDE, SIDE, 3), ((40 * number) % 240, (11 * frame) % 250, 120), np.uint8)
    field[:8, :8] = np.random.default_rng(1000 * number + frame).integers(0, 255, (8, 8, 3), np.uint8)
    return field


def write(root: Path, lengths: list[int], kind: str | None = "image", *, first: int = 0, **options) -> None:
    """A data set of episodes first, first + 1, …"""
    with LeRobotWriter(root, fps=FPS, features=features(kind), **options) as writer:
        for number, length in enumerate(lengths, first):
            writer.add_episode(episode(number, length, kind), task_of(number))


def assert_holds(root: Path, lengths: list[int], kind: str | None = "image", **options) -> LeRobotDataset:
    """The data set's frames are those of `write`, all of them and in order."""
    data = LeRobotDataset(root, **options)
    assert data.meta.length.tolist() == lengths
    batch = data.batch(np.arange(len(data)))
    begin = 0
    for number, length in enumerate(lengths):
        rows = slice(begin, begin + length)
        for key, values in episode(number, length, kind).items():
            if key == CAMERA and kind == "video":
                error = np.abs(batch[key][rows].astype(float) - values).mean((1, 2, 3))
                assert error.max() < CODEC_ERROR
            elif key == "note":
                assert batch[key][rows] == values
            else:
                assert np.array_equal(batch[key][rows], values), key
        assert np.array_equal(batch["timestamp"][rows], np.arange(length, dtype=np.float32) / FPS)
        assert set(batch["task"][rows]) == {task_of(number)}
        begin += length
    assert np.array_equal(batch["index"], np.arange(begin))
    return data
