"""Environment steps per second of LIBERO with two cameras, against LIBERO's own environment.

    python benchmarks/libero_steps.py            # about three minutes
    python benchmarks/libero_steps.py --quick    # one process, tiny pictures, no peer: shows that it works

rlinf        `rlinf.envs.libero.env.make`: one or two worker processes of two environments each, chunks of H actions,
             after which pictures are drawn; observations of all environments in one process
LIBERO       `libero.libero.envs.OffScreenRenderEnv` as the package has it, one environment, free running

All play random actions in the first task of libero_spatial with stand-in assets, from the same distribution.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from measure import Contender, in_turns, parser, print_setting, print_table, repeat

from rlinf.core.protocols import VectorEnv
from rlinf.envs.libero.config import LiberoConfig
from rlinf.envs.libero.control import ACTION_DIM
from rlinf.envs.libero.env import make
from rlinf.envs.libero.package import open_suite, prepare_import

ENVS_PER_PROCESS = 2
HORIZONS = (1, 5)
ANSWER_TIMEOUT_S = 300.0
PEER = "LIBERO     1 proc, 1 env"


def config(num_envs: int, image_size: int) -> LiberoConfig:
    """The first task, in episodes that do not end meanwhile."""
    return LiberoConfig(
        total_num_envs=num_envs,
        image_size=image_size,
        specific_reset_id=0,
        max_episode_steps=100_000,
        use_standin_assets=True,
    )


def random_actions(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (*shape, ACTION_DIM)).astype(np.float32)


def adapter(num_workers: int, image_size: int) -> VectorEnv:
    """The environments of a training run."""
    num_envs = ENVS_PER_PROCESS * num_workers
    settings = config(num_envs, image_size)
    env = make(settings, num_envs=num_envs, seed=0, control_mode=None, num_workers=num_workers, render=False)
    env.reset()
    return env


def chunk_player(env: VectorEnv, horizon: int) -> Callable[[], object]:
    """Plays one chunk of `horizon` actions in all environments."""
    chunks = itertools.cycle(torch.from_numpy(random_actions(100, env.num_envs, horizon)))
    return lambda: env.step(next(chunks))


def serve(pipe: Connection, image_size: int) -> None:
    """Step LIBERO's own environment for the seconds that are asked for, and answer the number of steps."""
    torch.set_num_threads(1)
    os.environ.setdefault("MUJOCO_GL", "egl")
    suite = open_suite(config(1, image_size))
    prepare_import()
    import libero.libero

    libero.libero._assets_path_cache = str(suite.assets)
    from libero.libero.envs import OffScreenRenderEnv

    sizes = {"camera_heights": image_size, "camera_widths": image_size}
    env = OffScreenRenderEnv(bddl_file_name=str(suite.tasks[0].problem_file), ignore_done=True, **sizes)
    env.seed(0)
    env.reset()
    env.set_init_state(suite.tasks[0].states[0])
    actions = itertools.cycle(random_actions(100))
    run = repeat(lambda: env.step(next(actions).tolist()))
    pipe.send(0.0)
    try:
        while True:
            pipe.send(run(pipe.recv()))
    except EOFError:
        os._exit(0)  # in the usual way robosuite would free its pictures after MuJoCo has closed the display


class Peer:
    """A process that steps LIBERO's own environment; its choice of OpenGL is not ours."""

    def __init__(self, image_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process: Any = context.Process(target=serve, args=(theirs, image_size), daemon=True)
        self.process.start()
        theirs.close()
        self._receive()

    def run(self, budget_s: float) -> float:
        """Steps made in this time."""
        self._pipe.send(budget_s)
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self.process.join(2.0)
        self.process.kill()

    def _receive(self) -> float:
        if not self._pipe.poll(ANSWER_TIMEOUT_S):
            raise SystemExit(f"error: LIBERO's own environment gave no answer for {ANSWER_TIMEOUT_S:g} s")
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit("error: LIBERO's own environment failed; its message stands above") from None


def report(processes: tuple[int, ...], image_size: int, rounds: int, budget_s: float, *, with_peer: bool) -> None:
    """Measure one size of pictures and print its table."""
    began = time.monotonic()
    envs: list[VectorEnv] = []
    contenders: list[Contender] = []
    peer = Peer(image_size) if with_peer else None
    try:
        for workers in processes:
            env = adapter(workers, image_size)
            envs.append(env)
            for horizon in HORIZONS:
                run = repeat(chunk_player(env, horizon), env.num_envs * horizon)
                name = f"rlinf      {workers} proc, {env.num_envs} envs, H={horizon}"
                contenders.append(Contender(name, run, env.pids, peer=PEER))  # type: ignore[attr-defined]
        if peer is not None:
            contenders.append(Contender(PEER, peer.run, [peer.process.pid]))
        results = in_turns(contenders, rounds=rounds, budget_s=budget_s)
        took = f"{rounds} rounds of {budget_s:g} s, {time.monotonic() - began:.0f} s in all"
        print_table(
            f"libero_spatial, 2 cameras of {image_size} x {image_size}, {took}", "env steps", contenders, results
        )
    finally:
        for env in envs:
            env.close()
        if peer is not None:
            peer.close()


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    print_setting(arguments.threads)
    if arguments.quick:
        report((1,), 32, 1, 0.2, with_peer=False)
        return
    for image_size in (128, 256):
        report((1, 2), image_size, arguments.rounds, arguments.seconds, with_peer=True)


if __name__ == "__main__":
    main()
