"""Environment steps per second of Franka-Sim on the CPU, against the usual controller in numpy and bare MuJoCo.

    python benchmarks/frankasim_steps.py            # about five minutes
    python benchmarks/frankasim_steps.py --quick    # some seconds: one process, no full meshes, shows that it works

rlinf        `rlinf.envs.frankasim.env.make`: one or two worker processes, 16 environments each, chunks of H actions,
             automatic resets, observations and rewards of all environments in one process
numpy        the same worlds with the controller in numpy, free running: nothing is gathered and nobody waits
mj_step      limit: MuJoCo's ten physics steps of an environment step, free running, no controller at all
pictures     rlinf with two cameras of 128 x 128; its peer draws the scene as it is (shadows, all triangles)

All play random actions from the same distribution; episodes end after 100 steps, which is in the time. Peer and
limit of a row are those with as many processes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from measure import Contender, in_turns, parser, print_setting, print_table, repeat

from rlinf.core.protocols import VectorEnv
from rlinf.envs.frankasim.config import FrankaSimConfig
from rlinf.envs.frankasim.env import make
from rlinf.envs.frankasim.worlds import ACTION_DIM, PickCubeWorlds

STATE, VISION = "PandaPickCube-v0", "PandaPickCubeVision-v0"
ENVS_PER_PROCESS, PICTURED_PER_PROCESS = 16, 2
EPISODE_STEPS = 100
HORIZONS = (1, 5)
ANSWER_TIMEOUT_S = 300.0


def random_actions(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


# ---- what is stepped in a process of its own


def usual(seed: int) -> Callable[[], object]:
    """One step of one world, the controller in numpy."""
    worlds = PickCubeWorlds(1, stepping="numpy")
    actions = itertools.cycle(torch.from_numpy(random_actions(1000, 1, ACTION_DIM, seed=seed)))
    count, active = itertools.count(), torch.ones(1, dtype=torch.bool)

    def step() -> None:
        if (steps := next(count)) % EPISODE_STEPS == 0:
            worlds.begin([0], [seed + steps])
        worlds.advance(next(actions), active)
        worlds.observe()

    return step


def bare(seed: int) -> Callable[[], object]:
    """Ten physics steps with the torques that held the arm at home."""
    import mujoco

    worlds = PickCubeWorlds(1)
    model, data, count = worlds._model, worlds._worlds[0], itertools.count()

    def step() -> None:
        if next(count) % EPISODE_STEPS == 0:
            worlds.begin([0], [seed])
            data.ctrl[:7] = data.qfrc_bias[:7]
        mujoco.mj_step(model, data, nstep=10)

    return step


OPENERS = {"numpy": usual, "mj_step": bare}


def serve(pipe: Connection, kind: str, seed: int) -> None:
    """Step for the seconds that are asked for and answer the number of steps, until None or the end of the pipe."""
    torch.set_num_threads(1)
    run = repeat(OPENERS[kind](seed))
    pipe.send(0.0)
    try:
        while (budget_s := pipe.recv()) is not None:
            pipe.send(run(budget_s))
    except EOFError:
        return


class FreeRunners:
    """Processes that each step one world, without waiting for each other."""

    def __init__(self, kind: str, count: int) -> None:
        self.kind = kind
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for seed in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, kind, seed), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            self._receive(pipe)

    def pids(self, count: int) -> list[int]:
        """Of the first `count` processes."""
        return [process.pid for process in self._processes[:count]]

    def run(self, count: int, budget_s: float) -> float:
        """Steps that the first `count` processes make in this time, all at once."""
        for pipe in self._pipes[:count]:
            pipe.send(budget_s)
        return sum(self._receive(pipe) for pipe in self._pipes[:count])

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join(2.0)
            process.kill()

    def _receive(self, pipe: Connection) -> float:
        if not pipe.poll(ANSWER_TIMEOUT_S):
            raise SystemExit(f"error: a process of '{self.kind}' gave no answer for {ANSWER_TIMEOUT_S:g} s")
        try:
            return pipe.recv()
        except EOFError:
            raise SystemExit(f"error: a process of '{self.kind}' died; its message stands above") from None


# ---- what is stepped through the adapter


def adapter(task: str, num_envs: int, num_workers: int, rendering: str = "cheap") -> VectorEnv:
    """The environments of a training run."""
    config = FrankaSimConfig(gym_id=task, total_num_envs=num_envs, max_episode_steps=EPISODE_STEPS, rendering=rendering)
    env = make(config, num_envs=num_envs, seed=0, control_mode=None, num_workers=num_workers, render=False)
    env.reset()
    return env


def chunk_player(env: VectorEnv, horizon: int) -> Callable[[], object]:
    """Plays one chunk of `horizon` actions in all environments."""
    pool = torch.from_numpy(random_actions(100, env.num_envs, horizon, ACTION_DIM, seed=0))
    chunks = itertools.cycle(pool)
    return lambda: env.step(next(chunks))


def adapted(name: str, env: VectorEnv, horizon: int, peer: str | None, limit: str | None = None) -> Contender:
    """A row for stepping these environments."""
    run = repeat(chunk_player(env, horizon), env.num_envs * horizon)
    return Contender(name, run, env.pids, peer=peer, limit=limit)  # type: ignore[attr-defined]


def row_name(kind: str, count: int) -> str:
    """As in the table."""
    return f"{kind:10} {count} proc, free running"


def report_state(processes: tuple[int, ...], rounds: int, budget_s: float) -> None:
    """Measure the state environment and print its table."""
    began = time.monotonic()
    runners = [FreeRunners(kind, max(processes)) for kind in OPENERS]
    envs: list[VectorEnv] = []
    contenders: list[Contender] = []
    try:
        for workers in processes:
            size = ENVS_PER_PROCESS * workers
            env = adapter(STATE, size, workers)
            envs.append(env)
            contenders += [
                adapted(
                    f"rlinf      {workers} proc, {size} envs, H={horizon}",
                    env,
                    horizon,
                    row_name("numpy", workers),
                    row_name("mj_step", workers),
                )
                for horizon in HORIZONS
            ]
        for runner in runners:
            for count in processes:
                peer = row_name("numpy", count) if runner.kind != "numpy" else None
                name = row_name(runner.kind, count)
                contenders.append(Contender(name, partial(runner.run, count), runner.pids(count), peer=peer))
        results = in_turns(contenders, rounds=rounds, budget_s=budget_s)
        took = f"{rounds} rounds of {budget_s:g} s, {time.monotonic() - began:.0f} s in all"
        print_table(f"{STATE}, {took}", "env steps", contenders, results)
    finally:
        for env in envs:
            env.close()
        for runner in runners:
            runner.close()


def report_vision(processes: tuple[int, ...], renderings: tuple[str, ...], rounds: int, budget_s: float) -> None:
    """Measure the environment with pictures and print its table."""
    began = time.monotonic()
    envs: list[VectorEnv] = []
    contenders: list[Contender] = []
    try:
        for workers, rendering in itertools.product(processes, renderings):
            size = PICTURED_PER_PROCESS * workers
            env = adapter(VISION, size, workers, rendering)
            envs.append(env)
            peer = f"full       {workers} proc, {size} envs" if "full" in renderings else None
            contenders.append(adapted(f"{rendering:10} {workers} proc, {size} envs", env, 1, peer))
        results = in_turns(contenders, rounds=rounds, budget_s=budget_s)
        took = f"{rounds} rounds of {budget_s:g} s, {time.monotonic() - began:.0f} s in all"
        print_table(f"{VISION}, 2 cameras of 128 x 128, {took}", "env steps", contenders, results)
    finally:
        for env in envs:
            env.close()


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    print_setting(arguments.threads)
    processes, rounds, budget_s = ((1,), 1, 0.05) if arguments.quick else ((1, 2), arguments.rounds, arguments.seconds)
    report_state(processes, rounds, budget_s)
    # A picture of the full meshes takes half a second: too long to show that it works.
    report_vision(processes, ("cheap",) if arguments.quick else ("cheap", "full"), rounds, budget_s)


if __name__ == "__main__":
    main()
