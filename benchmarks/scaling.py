"""What a second process of environments brings, and what a second pipeline stage does.

    python benchmarks/scaling.py                  # some minutes; needs Ray, and Franka-Sim for the first table
    python benchmarks/scaling.py --only stages
    python benchmarks/scaling.py --quick

scale-out   Franka-Sim's state, 16 environments to a process, a small policy (x-256-256-4) beside it. "bare" is
            environment and policy in one loop, as many at a time as there are processes, which do not wait for each
            other: the limit. A row's peer is the same with one process.
stages      16 environments in one process, the policy in another, one or two pipeline stages. Environments and policies
            are stand-ins that wait, as for a GPU or another machine: what has a device of its own. A step takes a time
            for each environment; an answer one for each too ("for 16"), or the same for any number.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from measure import Contender, Run, in_turns, parser, print_setting, print_table, repeat
from players import IdleEnv, SmallPolicy, Team

from rlinf.core.protocols import VectorEnv
from rlinf.launch.crew import Layout
from rlinf.runtime.cluster import joined
from rlinf.runtime.local import LocalRuntime
from rlinf.runtime.ray_backend import RayRuntime, Seat
from rlinf.workers.env_worker import EnvWorker

ENVS = 16
TABLES = ("scale-out", "stages")
PAIRED = Layout((0, 1), (0, 1), answered_by={(0, 0): 0, (1, 0): 1})
"""Two processes, each with environments and the policy that answers them."""
APART = Layout((0,), (1,))


def franka(seed: int, *, num_envs: int = ENVS, num_workers: int = 0) -> VectorEnv:
    """Franka-Sim's state, stepped here or in so many processes."""
    from rlinf.envs.frankasim.config import FrankaSimConfig
    from rlinf.envs.frankasim.env import make

    config = FrankaSimConfig(total_num_envs=num_envs)
    return make(config, num_envs=num_envs, seed=seed, control_mode=None, num_workers=num_workers, render=False)


def policy_for(make_env: Callable[[int], VectorEnv]) -> SmallPolicy:
    """A small policy for its states and actions."""
    env = make_env(0)
    sizes = env.spaces.obs_shapes["state"][0], env.spaces.action_dim
    env.close()
    return SmallPolicy(*sizes)


class Bare:
    """Environments and their policy in one loop."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.env, self.policy = franka(0), policy_for(franka)
        self.obs = self.env.reset(seed=0)

    @torch.no_grad()
    def play(self, steps: int) -> None:
        for _ in range(steps):
            self.obs = self.env.step(self.policy.act(self.obs, "eval").action).obs


def scale_out(runtime: RayRuntime, steps: int) -> list[Contender]:
    """The rows of the first table; all that work are processes of `runtime`, but for two rows."""
    contenders, names = [], {}
    for count in (1, 2):
        hosts = tuple(range(count))
        kind = f"{count} process{'es' * (count > 1)}"
        bare = runtime.group("bare", [Bare] * count, hosts)
        pids = bare.run(_pid).wait()
        limit = f"bare, {kind}"
        names[count, "bare"] = limit
        play = repeat(lambda bare=bare: bare.run(Bare.play, steps).wait(), ENVS * steps * count)
        contenders.append(Contender(limit, play, pids, names.get((1, "bare")) if count > 1 else None))
        layout = Layout((0,), (0,)) if count == 1 else PAIRED
        locally = partial(franka, num_envs=ENVS * count, num_workers=count)
        teams = {
            "Ray": Team(runtime, layout, franka, partial(policy_for, franka), chunks=steps),
            "threads, envs in": Team(LocalRuntime(), Layout(), locally, partial(policy_for, franka), chunks=steps),
        }
        for where, team in teams.items():
            names[count, where] = name = f"{where}, {kind}"
            workers = [pid for part in team.env.run(_worker_pids).wait() for pid in part]
            peer = names[1, where] if count > 1 else None
            contenders.append(
                Contender(name, repeat(team.play, steps * team.num_envs), [*team.pids, *workers], peer, limit)
            )
    return contenders


def stages(runtime: RayRuntime, steps: int) -> list[Contender]:
    """The rows of the second table: times in ms for all 16 environments."""
    contenders = []
    for env_ms, answer_ms, per_row in (
        (8, 1, True),
        (20, 20, True),
        (20, 20, False),
        (20, 10, False),
        (100, 50, False),
    ):
        for count in (1, 2):
            rows, seconds = ENVS // count, answer_ms / 1e3 / (ENVS if per_row else 1)
            make_env = partial(_idle_env, rows, env_ms / 1e3 / count)
            make_policy = partial(SmallPolicy, seconds=seconds, per_row=per_row)
            played = max(1, steps // env_ms)
            team = Team(runtime, APART, make_env, make_policy, chunks=played, stages=count)
            what = f"step {env_ms}, answer {answer_ms}{' for 16' if per_row else ''}"
            name, peer = f"{what}, {count} stage{'s' * (count > 1)}", f"{what}, 1 stage"
            run: Run = repeat(team.play, played * team.num_envs)
            contenders.append(Contender(name, run, [*team.pids], peer if count > 1 else None))
    return contenders


def _idle_env(num_envs: int, seconds: float, number: int) -> IdleEnv:
    return IdleEnv(num_envs, seconds)


def _worker_pids(worker: EnvWorker) -> list[int]:
    return [pid for stage in worker.stages for pid in getattr(stage, "pids", [])]


def _pid(worker: object) -> int:
    return os.getpid()


@contextmanager
def two_processes() -> Iterator[RayRuntime]:
    with joined() as [machine]:
        runtime = RayRuntime([Seat(f"process {i}", machine.node_id, "127.0.0.1") for i in range(2)])
        yield runtime
        runtime.close()


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--only", choices=TABLES, action="append", help="this table alone; may be given twice")
    arguments = made.parse_args()
    print_setting(arguments.threads)
    tables: dict[str, tuple[str, str, Callable[[Any, int], list[Contender]]]] = {
        "scale-out": ("one process of environments and two, each with its policy", "env steps", scale_out),
        "stages": ("one pipeline stage and two; times in ms", "env steps", stages),
    }
    rounds, budget_s, steps = (1, 0.2, 20) if arguments.quick else (arguments.rounds, arguments.seconds, 200)
    for table in arguments.only or TABLES:
        title, unit, rows = tables[table]
        if table == "scale-out" and importlib.util.find_spec("gym_hil") is None:
            print("\n(scale-out left out: it needs Franka-Sim)")
            continue
        with two_processes() as runtime:
            contenders = rows(runtime, steps)
            print_table(title, unit, contenders, in_turns(contenders, rounds=rounds, budget_s=budget_s))


if __name__ == "__main__":
    main()
