"""Environment steps per second of PickCube-v1 on CPU scenes, against ManiSkill as shipped and the bare scene.

    python benchmarks/env_steps.py            # about eight minutes
    python benchmarks/env_steps.py --quick    # half a minute: one controller, one process

rlinf        `rlinf.envs.maniskill.env.make`: one or two worker processes, 16 or 32 environments, chunks of H
             actions, automatic resets, observations and rewards of all environments in one process
as shipped   ManiSkill's step behind its CPUGymWrapper, one environment per process; two processes run free, so
             nothing is gathered and nobody waits
scene loop   limit: the stepping of rlinf without adapter, batch and synchronisation, free running
physics      what no Python around it can beat: drive targets and physics steps, nothing read but the joints

All play random actions from the same distribution and begin a new episode after 50 steps, which is in the time.
Peer and limit of a row are those with as many processes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from measure import Contender, in_turns, parser, print_setting, print_table, repeat

from rlinf.core.protocols import VectorEnv
from rlinf.envs.maniskill.config import InitParams, ManiSkillConfig
from rlinf.envs.maniskill.env import make
from rlinf.envs.maniskill.fast import ARM_JOINTS, FastScene
from rlinf.envs.maniskill.novulkan import no_visuals
from rlinf.envs.maniskill.scene import SceneSpec

TASK = "PickCube-v1"
CONTROL = {"pd_ee_delta_pos": ("end-effector control", 4), "pd_joint_delta_pos": ("joint control", 8)}
EPISODE_STEPS = 50
HORIZONS = (1, 5)
JOINT_STEP_RAD = 0.087
START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 120.0


def random_actions(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


# ---- what is stepped in a process of its own


def shipped(control_mode: str, seed: int) -> Callable[[], object]:
    """One step of ManiSkill's environment as it comes."""
    import gymnasium
    import mani_skill.envs  # noqa: F401  # registers the tasks
    from mani_skill.utils.wrappers import CPUGymWrapper

    with no_visuals():
        env = gymnasium.make(
            TASK,
            num_envs=1,
            obs_mode="state",
            control_mode=control_mode,
            sim_backend="physx_cpu",
            render_backend="none",
        )
    env = CPUGymWrapper(env, ignore_terminations=True)
    env.reset(seed=seed)
    actions = itertools.cycle(random_actions(1000, *env.action_space.shape, seed=seed))

    def step() -> None:
        _, _, terminated, truncated, _ = env.step(next(actions))
        if terminated or truncated:
            env.reset()

    return step


def scene_loop(control_mode: str, seed: int) -> Callable[[], object]:
    """One step of the scene as rlinf steps it, read by nobody."""
    scene = FastScene(SceneSpec(TASK, control_mode))
    actions = itertools.cycle(random_actions(1000, scene.action_dim, seed=seed))
    count = itertools.count()

    def step() -> None:
        if (steps := next(count)) % EPISODE_STEPS == 0:
            scene.begin(seed + steps)
        scene.advance(next(actions))
        scene.observe()

    return step


def physics(control_mode: str, seed: int) -> Callable[[], object]:
    """Drive targets near the present joints, then the physics steps of one action."""
    scene = FastScene(SceneSpec(TASK, control_mode))
    world = scene._world
    arm = world.agent.robot._objs[0]
    joints = arm.active_joints[:ARM_JOINTS]
    moves = itertools.cycle(JOINT_STEP_RAD * random_actions(1000, ARM_JOINTS, seed=seed))
    count = itertools.count()

    def step() -> None:
        if (steps := next(count)) % EPISODE_STEPS == 0:
            scene.begin(seed + steps)
        for joint, target in zip(joints, (arm.qpos[:ARM_JOINTS] + next(moves)).tolist(), strict=True):
            joint.set_drive_target(target)
        for _ in range(world._sim_steps_per_control):
            world.scene.px.step()

    return step


OPENERS = {"as shipped": shipped, "scene loop": scene_loop, "physics": physics}


def serve(pipe: Connection, kind: str, control_mode: str, seed: int) -> None:
    """Step for the seconds that are asked for and answer the number of steps, until None or the end of the pipe."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Failed to find system libvulkan")
    run = repeat(OPENERS[kind](control_mode, seed))
    pipe.send(0.0)
    try:
        while (budget_s := pipe.recv()) is not None:
            pipe.send(run(budget_s))
    except EOFError:
        return


class FreeRunners:
    """Processes that each step one environment, without waiting for each other."""

    def __init__(self, kind: str, control_mode: str, count: int) -> None:
        self.kind = kind
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for seed in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, kind, control_mode, seed), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def wait_until_built(self) -> None:
        """Wait until all environments exist."""
        for pipe in self._pipes:
            self._receive(pipe, START_TIMEOUT_S)

    def pids(self, count: int) -> list[int]:
        """Of the first `count` processes."""
        return [process.pid for process in self._processes[:count]]

    def run(self, count: int, budget_s: float) -> float:
        """Steps that the first `count` processes make in this time, all at once."""
        pipes = self._pipes[:count]
        for pipe in pipes:
            pipe.send(budget_s)
        return sum(self._receive(pipe, budget_s + ANSWER_TIMEOUT_S) for pipe in pipes)

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join(2.0)
            process.kill()

    def _receive(self, pipe: Connection, timeout_s: float) -> float:
        if not pipe.poll(timeout_s):
            raise SystemExit(f"error: a process of '{self.kind}' gave no answer for {timeout_s:g} s")
        try:
            return pipe.recv()
        except EOFError:
            raise SystemExit(f"error: a process of '{self.kind}' died; its message stands above") from None


# ---- what is stepped through the adapter


def adapter(control_mode: str, num_envs: int, num_workers: int) -> VectorEnv:
    """The environments of a training run."""
    config = ManiSkillConfig(
        total_num_envs=num_envs,
        ignore_terminations=True,
        max_episode_steps=EPISODE_STEPS,
        init_params=InitParams(id=TASK, sim_backend="cpu"),
    )
    env = make(config, num_envs=num_envs, seed=0, control_mode=control_mode, num_workers=num_workers, render=False)
    env.reset()
    return env


def chunk_player(env: VectorEnv, horizon: int) -> Callable[[], object]:
    """Plays one chunk of `horizon` actions in all environments."""
    pool = torch.from_numpy(random_actions(100, env.num_envs, horizon, env.spaces.action_dim, seed=0))
    chunks = itertools.cycle(pool)
    return lambda: env.step(next(chunks))


def report(control_mode: str, processes: tuple[int, ...], sizes: tuple[int, ...], rounds: int, budget_s: float) -> None:
    """Measure one controller and print its table."""
    began = time.monotonic()
    runners = [FreeRunners(kind, control_mode, max(processes)) for kind in OPENERS]
    envs: list[VectorEnv] = []
    contenders: list[Contender] = []
    try:
        for workers, size in itertools.product(processes, sizes):
            env = adapter(control_mode, size, workers)
            envs.append(env)
            contenders += [
                Contender(
                    f"rlinf      {workers} proc, {size} envs, H={horizon}",
                    repeat(chunk_player(env, horizon), size * horizon),
                    env.pids,  # type: ignore[attr-defined]
                    peer=row_name("as shipped", workers),
                    limit=row_name("scene loop", workers),
                )
                for horizon in HORIZONS
            ]
        for runner in runners:
            runner.wait_until_built()
            contenders += [
                Contender(
                    row_name(runner.kind, count),
                    partial(runner.run, count),
                    runner.pids(count),
                    peer=None if runner.kind == "as shipped" else row_name("as shipped", count),
                )
                for count in processes
            ]
        title, action_dim = CONTROL[control_mode]
        results = in_turns(contenders, rounds=rounds, budget_s=budget_s)
        took = f"{rounds} rounds of {budget_s:g} s, {time.monotonic() - began:.0f} s in all"
        print_table(f"{TASK}, {title} ({action_dim} numbers), {took}", "env steps", contenders, results)
    finally:
        for env in envs:
            env.close()
        for runner in runners:
            runner.close()


def row_name(kind: str, count: int) -> str:
    """As in the table."""
    return f"{kind:10} {count} proc, free running"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--control", choices=sorted(CONTROL), help="only this controller (default: both)")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    print_setting(arguments.threads)
    controls = [arguments.control] if arguments.control else list(CONTROL)
    for control_mode in controls[:1] if arguments.quick else controls:
        if arguments.quick:
            report(control_mode, (1,), (2,), rounds=1, budget_s=0.1)
        else:
            report(control_mode, (1, 2), (16, 32), arguments.rounds, arguments.seconds)


if __name__ == "__main__":
    main()
