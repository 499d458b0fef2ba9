"""LeRobot data sets: frames per second written and read, against the lerobot package where it can be imported.

    python benchmarks/lerobot_datasets.py            # 50 episodes of 100 frames; with the peer about 15 minutes
    python benchmarks/lerobot_datasets.py --quick    # 3 short episodes, some seconds

A frame has one picture of 128 x 128 x 3, a state of 8 and an action of 4. Written is from arrays in memory to a closed
data set; rlinf makes every episode durable before it takes the next (fsync), lerobot does not. Videos are H.264 and
AV1; lerobot writes AV1. Read are random batches of 64 frames with chunks of 8 actions, without workers. "float CHW"
rows end with what lerobot gives, torch float32 [B, 3, H, W] in [0, 1]; the others with uint8 [B, H, W, 3]. "memory"
follows `preload`.

The peer is no dependency and its requirements contradict ours (docs/datasets.md); where it is not installed its rows
are left out.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Contender, Run, in_turns, parser, print_setting, print_table

from rlinf.data.lerobot.layout import Feature
from rlinf.data.lerobot.order import ShuffledBatches
from rlinf.data.lerobot.reader import LeRobotDataset
from rlinf.data.lerobot.writer import LeRobotWriter

EPISODES, LENGTH, PIXELS, STATE, ACTION, FPS = 50, 100, 128, 8, 4, 10
BATCH, CHUNK = 64, 8
CAMERA, TASK = "observation.images.front", "pick up the cube"


def episodes(number: int, length: int) -> list[dict[str, np.ndarray]]:
    """Episodes of a square that moves over a shaded table, with a little noise as a camera's sensor has it."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:PIXELS, :PIXELS]
    table = np.stack([x * 255 // PIXELS, y * 255 // PIXELS, (x + y) % 256], -1)
    made = []
    for _ in range(number):
        frames = table + rng.integers(-1, 2, (length, *table.shape))
        begin, speed = rng.uniform(10, 40, 2), rng.uniform(-0.3, 0.6, 2)
        for t in range(length):
            row, column = (begin + speed * t).clip(0, PIXELS - 20).astype(int)
            frames[t, row : row + 20, column : column + 20] += np.subtract((200, 30, 40), table[row, column])
        frames = frames.clip(0, 255).astype(np.uint8)
        state = rng.standard_normal((length, STATE), np.float32)
        action = rng.standard_normal((length, ACTION), np.float32)
        made.append({CAMERA: frames, "observation.state": state, "action": action})
    return made


# ---- writing


def features(kind: str) -> dict[str, Feature]:
    """What a frame holds."""
    return {
        "observation.state": Feature("float32", (STATE,)),
        "action": Feature("float32", (ACTION,)),
        CAMERA: Feature(kind, (PIXELS, PIXELS, 3), ["height", "width", "channels"]),
    }


def write_ours(root: Path, data: list[dict[str, np.ndarray]], kind: str, codec: str = "h264") -> None:
    """A whole data set."""
    shutil.rmtree(root, ignore_errors=True)
    with LeRobotWriter(root, fps=FPS, features=features(kind), codec=codec) as writer:
        for episode in data:
            writer.add_episode(episode, TASK)


def write_theirs(peer: Any, root: Path, data: list[dict[str, np.ndarray]], kind: str) -> None:
    """The same by lerobot, as its documentation shows."""
    shutil.rmtree(root, ignore_errors=True)
    described = {
        key: {"dtype": feature.dtype, "shape": feature.shape, "names": feature.names}
        for key, feature in features(kind).items()
    }
    dataset = peer.create("bench/bench", FPS, described, root=root, use_videos=kind == "video")
    for episode in data:
        for t in range(len(episode["action"])):
            dataset.add_frame({key: values[t] for key, values in episode.items()} | {"task": TASK})
        dataset.save_episode()
    dataset.finalize()


def whole(call: Callable[[], None], frames: int) -> Run:
    """A `Run` that writes once, however long that takes."""

    def run(budget_s: float) -> float:
        call()
        return frames

    return run


# ---- reading


def read_ours(root: Path, *, preload: bool = False, as_float: bool = False) -> Run:
    """Random batches."""
    data = LeRobotDataset(root, windows={"action": range(CHUNK)})
    if preload:
        data.preload()
    order, state = ShuffledBatches(len(data), BATCH, seed=0), {"number": 0}

    def one() -> int:
        batch = data.batch(order(state["number"]))
        state["number"] += 1
        if as_float:
            pictures = torch.from_numpy(batch[CAMERA]).permute(0, 3, 1, 2).contiguous().float().div_(255)
            torch.from_numpy(batch["action"])
            return len(pictures)
        return len(batch[CAMERA])

    return until(one)


def read_theirs(peer: Any, root: Path) -> Run:
    """Random batches by torch's loader."""
    data = peer("bench/bench", root=root, delta_timestamps={"action": [i / FPS for i in range(CHUNK)]})

    def batches() -> Iterator[Any]:
        while True:
            yield from torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=0)

    endless = batches()
    return until(lambda: len(next(endless)[CAMERA]))


def until(one: Callable[[], int]) -> Run:
    """A `Run` that works through batches until its time is over."""
    import time

    def run(budget_s: float) -> float:
        done, end = 0, time.perf_counter() + budget_s
        while done == 0 or time.perf_counter() < end:
            done += one()
        return done

    return run


# ---- the peer


def import_peer() -> Any:
    """lerobot's LeRobotDataset, or None with the reason printed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        _import_torchvision()
        peer = importlib.import_module("lerobot.datasets.lerobot_dataset").LeRobotDataset
    except (ImportError, RuntimeError) as error:
        print(f"(lerobot left out: {(str(error).splitlines() or [''])[0]}; docs/datasets.md says how to install it)")
        return None
    version = importlib.import_module("importlib.metadata").version("lerobot")
    print(f"peer: lerobot {version}")
    return peer


def _import_torchvision() -> None:
    """Import torchvision, which beside a CPU build of torch does not find the operators that it compiled for CUDA."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        global _operators  # as long as it lives, so do they
        _operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def decodes_video(peer: Any, root: Path) -> bool:
    """Whether lerobot's decoder works here; it needs libraries of FFmpeg that no wheel brings."""
    try:
        peer("bench/bench", root=root)[0]
    except Exception as error:  # whatever its libraries raise
        print(f"(lerobot reads no video here: {(str(error).splitlines() or [''])[0]})")
        return False
    return True


def main() -> None:
    """Print both tables."""
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    print_setting(options.threads)
    number, length = (3, 12) if options.quick else (EPISODES, LENGTH)
    rounds, budget_s = (1, 0.05) if options.quick else (options.rounds, options.seconds)
    data, frames = episodes(number, length), number * length
    peer = import_peer()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        root = Path(folder)
        roots = {name: root / name for name in ("images", "h264", "av1", "their images", "their av1")}
        rows = [
            ("images rlinf", lambda: write_ours(roots["images"], data, "image"), "images lerobot"),
            ("video  rlinf, H.264", lambda: write_ours(roots["h264"], data, "video"), "video  lerobot, AV1"),
            ("video  rlinf, AV1", lambda: write_ours(roots["av1"], data, "video", "av1"), "video  lerobot, AV1"),
        ]
        if peer is not None:
            rows += [
                ("images lerobot", lambda: write_theirs(peer, roots["their images"], data, "image"), None),
                ("video  lerobot, AV1", lambda: write_theirs(peer, roots["their av1"], data, "video"), None),
            ]
        writers = [Contender(name, whole(call, frames), peer=other) for name, call, other in rows]
        results = in_turns(writers, rounds=rounds, budget_s=budget_s)
        print_table(f"written: {number} episodes of {length} frames", "frames", writers, results)
        for name, path in roots.items():
            if path.is_dir():
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                print(f"{name:12} {size / 1e6:8.2f} MB, {size / frames / 1e3:.2f} kB per frame")

        ours = [
            ("images rlinf", read_ours(roots["images"]), "images lerobot"),
            ("images rlinf, float CHW", read_ours(roots["images"], as_float=True), "images lerobot"),
            ("H.264  rlinf", read_ours(roots["h264"]), "AV1    lerobot"),
            ("AV1    rlinf", read_ours(roots["av1"]), "AV1    lerobot"),
            ("memory rlinf, float CHW", read_ours(roots["images"], preload=True, as_float=True), "images lerobot"),
        ]
        if peer is not None:
            theirs_images, theirs_video = roots["their images"], roots["their av1"]
            ours += [
                ("images rlinf, lerobot's files", read_ours(theirs_images, as_float=True), "images lerobot"),
                ("AV1    rlinf, lerobot's files", read_ours(theirs_video, as_float=True), "AV1    lerobot"),
                ("images lerobot", read_theirs(peer, theirs_images), None),
            ]
            if decodes_video(peer, theirs_video):
                ours.append(("AV1    lerobot", read_theirs(peer, theirs_video), None))
        readers = [Contender(name, run, peer=other) for name, run, other in ours]
        results = in_turns(readers, rounds=rounds, budget_s=budget_s)
        print_table(f"read: random batches of {BATCH} with chunks of {CHUNK} actions", "frames", readers, results)


if __name__ == "__main__":
    main()
