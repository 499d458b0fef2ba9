"""Time of one batch from the replay buffer, against Stable-Baselines3's and against bare memory copies.

    python benchmarks/replay.py            # 200,000 state and 8,000 image transitions, about two minutes
    python benchmarks/replay.py --quick    # 20,000 and 1,000, a few seconds

Every row is the median over repetitions, one thread, caches as they come. "copy" moves as many bytes as a batch
holds from one place in memory to another: nothing that returns batches of its own can be much faster. State
batches of both buffers are so small that the interpreter is most of their time.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rlinf.core.types import Trajectory
from rlinf.data.mix import MixedReplay
from rlinf.data.replay import ReplayBuffer

STATE, ACTION, CAMERAS, PIXELS = 42, 4, 2, 128
SEGMENT = (2, 16)  # T, N of what is added at once


def median_us(call: Callable[[], Any], budget_s: float) -> float:
    """Median time of a call in microseconds, after a warm-up."""
    for _ in range(3):
        call()
    times = []
    end = time.perf_counter() + budget_s
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 5000):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1e6


def trajectory(steps: int, envs: int, images: bool, rng: np.random.Generator) -> Trajectory:
    """A random segment without episode ends."""
    obs: dict[str, Any] = {"state": torch.from_numpy(rng.standard_normal((steps + 1, envs, STATE), np.float32))}
    if images:
        shape = (steps + 1, envs, PIXELS, PIXELS, 3)
        obs["images"] = {f"camera{i}": torch.from_numpy(rng.integers(0, 256, shape, np.uint8)) for i in range(CAMERAS)}
    last = {"state": obs["state"][0, :0]}
    if images:
        last["images"] = {name: leaf[0, :0] for name, leaf in obs["images"].items()}
    flags = torch.zeros(steps, envs, 1, dtype=torch.bool)
    action = torch.from_numpy(rng.standard_normal((steps, envs, ACTION), np.float32))
    return Trajectory(
        obs=obs,
        last_obs=last,
        last_index=torch.zeros(0, 2, dtype=torch.int64),
        decision=action,
        action=action[:, :, None],
        reward=torch.from_numpy(rng.standard_normal((steps, envs, 1), np.float32)),
        terminated=flags,
        truncated=flags[..., 0],
        intervened=flags,
        valid=~flags[..., 0],
    )


def ours(size: int, images: bool, seed: int) -> ReplayBuffer:
    """A full buffer of this project."""
    rng = np.random.default_rng(seed)
    buffer = ReplayBuffer(size, generator=rng)
    piece = trajectory(50, 16, images, rng) if not images else trajectory(5, 16, images, rng)
    while buffer.statistics()["utilization"] < 1:
        buffer.add(piece, piece.reward[..., 0], piece.reward[..., 0])
    return buffer


def peer(size: int, images: bool) -> Any:
    """A full buffer of Stable-Baselines3, or None with the reason printed."""
    try:
        buffers = importlib.import_module("stable_baselines3.common.buffers")
        spaces = importlib.import_module("gymnasium.spaces")
    except ImportError as error:
        print(f"(stable_baselines3 skipped: {error}; `pip install rlinf[bench]` adds it)")
        return None
    state = spaces.Box(-np.inf, np.inf, (STATE,), np.float32)
    action = spaces.Box(-1, 1, (ACTION,), np.float32)
    rng = np.random.default_rng(0)
    if not images:
        buffer = buffers.ReplayBuffer(size, state, action, device="cpu")
        stores = [buffer.observations, buffer.next_observations]
    else:
        camera = spaces.Box(0, 255, (PIXELS, PIXELS, 3), np.uint8)
        space = spaces.Dict({"state": state, **{f"camera{i}": camera for i in range(CAMERAS)}})
        buffer = buffers.DictReplayBuffer(size, space, action, device="cpu")
        stores = [*buffer.observations.values(), *buffer.next_observations.values()]
    for store in stores:
        store[:] = rng.integers(0, 100, store.shape[1:]).astype(store.dtype)
    buffer.full = True
    return buffer


def report(images: bool, size: int, batch_sizes: tuple[int, ...], budget_s: float) -> None:
    """Print the table of one kind of observation."""
    row_bytes = STATE * 4 + images * CAMERAS * PIXELS * PIXELS * 3
    buffer = ours(size, images, 0)
    mixed = MixedReplay(buffer, ours(size // 2, images, 1))
    samplers: list[tuple[str, Callable[[int], Any], float]] = [
        ("rlinf", buffer.sample, row_bytes + ACTION * 4 + 17),
        ("rlinf, half prior data", mixed.sample, row_bytes + ACTION * 4 + 17),
    ]
    if (other := peer(size, images)) is not None:
        samplers.append(("stable_baselines3", other.sample, 2 * row_bytes + ACTION * 4 + 12))

    kind = f"{CAMERAS} x {PIXELS}x{PIXELS}x3 uint8 + state" if images else f"state {STATE}, action {ACTION}"
    print(f"\n{kind}; {size:,} transitions stored; microseconds per batch")
    print(f"{'':26}" + "".join(f"{f'batch {b}':>12}" for b in batch_sizes) + f"{'bytes/transition':>18}")
    for name, sample, stored_bytes in samplers:
        times = "".join(f"{median_us(lambda b=b, s=sample: s(b), budget_s):12,.0f}" for b in batch_sizes)
        print(f"{name:26}{times}{stored_bytes:18,.0f}")
    times = ""
    for b in batch_sizes:
        source = np.ones(b * (2 * row_bytes + ACTION * 4 + 8), np.uint8)
        target = np.zeros_like(source)
        times += f"{median_us(lambda t=target, s=source: np.copyto(t, s), budget_s):12,.0f}"
    print(f"{'copy':26}{times}{'':>18}")

    rng = np.random.default_rng(2)
    segment = trajectory(*SEGMENT, images, rng)
    add = median_us(lambda: buffer.add(segment, segment.reward[..., 0], segment.reward[..., 0]), budget_s)
    statistics = median_us(buffer.statistics, budget_s)
    print(f"rlinf: add {SEGMENT[0]} x {SEGMENT[1]} transitions {add:,.0f} us; statistics {statistics:,.0f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller buffers and fewer repetitions")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}"
    )
    budget_s = 0.02 if quick else 2.0
    report(False, 20_000 if quick else 200_000, (256, 512), budget_s)
    report(True, 1_000 if quick else 8_000, (256, 512), budget_s)


if __name__ == "__main__":
    main()
