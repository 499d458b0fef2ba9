"""What the runtime costs for each action, and how long new weights travel, on every backend.

    python benchmarks/runtime.py            # about two minutes, needs Ray
    python benchmarks/runtime.py --quick    # some seconds

16 environments that cost nothing are played by a small policy (42-256-256-4) through `EnvWorker` and `RolloutWorker`.
"alone" is the same environment and policy in one loop: the limit. The peer passes every observation and every action
through a queue that is an actor of Ray, as frameworks on Ray do. Overhead is the time of a step above that of "alone".
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import ray
import torch
from measure import Contender, in_turns, parser, print_setting, print_table, repeat
from players import IdleEnv, SmallPolicy, Team

from rlinf.launch.crew import Layout
from rlinf.runtime.cluster import joined
from rlinf.runtime.local import LocalRuntime
from rlinf.runtime.ray_backend import RayRuntime, Seat

ENVS = 16
WEIGHTS_MB = 100


# ---- contenders: each plays a number of steps


def alone() -> Callable[[], object]:
    torch.set_num_threads(1)
    env, policy = IdleEnv(ENVS), SmallPolicy()

    @torch.no_grad()
    def play() -> None:
        env.step(policy.act(env.obs, "eval").action)

    return play


class Queue:
    """A channel that is an actor: what the peer passes everything through."""

    def __init__(self) -> None:
        import asyncio

        self.items: asyncio.Queue[Any] = asyncio.Queue()

    async def put(self, item: Any) -> None:
        await self.items.put(item)

    async def get(self) -> Any:
        return await self.items.get()

    async def pid(self) -> int:
        return os.getpid()


class QueuedEnv:
    def __init__(self, obs: Any, actions: Any) -> None:
        self.obs, self.actions, self.env = obs, actions, IdleEnv(ENVS)
        torch.set_num_threads(1)

    def pid(self) -> int:
        return os.getpid()

    def play(self, steps: int) -> None:
        for _ in range(steps):
            ray.get(self.obs.put.remote({"state": self.env.obs["state"].numpy()}))
            self.env.step(torch.from_numpy(ray.get(self.actions.get.remote())))


class QueuedPolicy:
    def __init__(self, obs: Any, actions: Any) -> None:
        self.obs, self.actions, self.policy = obs, actions, SmallPolicy()
        torch.set_num_threads(1)

    def pid(self) -> int:
        return os.getpid()

    @torch.no_grad()
    def serve(self, steps: int) -> None:
        for _ in range(steps):
            obs = {"state": torch.from_numpy(ray.get(self.obs.get.remote()).get("state").copy())}
            ray.get(self.actions.put.remote(self.policy.act(obs, "eval").action.numpy()))


def queued(steps: int) -> tuple[Callable[[], object], list[int]]:
    """What plays so many steps, and the processes that do it."""
    queues = [ray.remote(Queue).options(num_cpus=0).remote() for _ in range(2)]
    env = ray.remote(QueuedEnv).options(num_cpus=0).remote(*queues)
    policy = ray.remote(QueuedPolicy).options(num_cpus=0).remote(*queues)

    def play() -> None:
        ray.get([env.play.remote(steps), policy.serve.remote(steps)])

    return play, ray.get([actor.pid.remote() for actor in (*queues, env, policy)])


# ---- weights


class Publisher:
    """Makes weights of a hundred megabytes."""

    def __init__(self, weights: Any) -> None:
        self.weights, self.version = weights, 0
        self.state = {f"layer {i}": torch.zeros(WEIGHTS_MB * 2**20 // 4 // 25) for i in range(25)}

    def publish(self) -> float:
        self.version += 1
        began = time.perf_counter()
        self.weights.publish(self.version, self.state)
        return time.perf_counter() - began


class Taker:
    """Takes them over as a policy does."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights
        self.state = {f"layer {i}": torch.zeros(WEIGHTS_MB * 2**20 // 4 // 25) for i in range(25)}

    def take(self) -> float:
        began = time.perf_counter()
        _, state = self.weights.newer_than(-1)
        for name, tensor in state.items():
            self.state[name].copy_(tensor)
        return time.perf_counter() - began


def weight_times(runtime: Any, number: int) -> tuple[list[float], list[float]]:
    weights = runtime.weights("large", [1])
    publisher = runtime.group("publisher", [partial(Publisher, weights)], [0])
    taker = runtime.group("taker", [partial(Taker, weights)], [1])
    published, taken = [], []
    for _ in range(number):
        published += publisher.run(Publisher.publish).wait()
        taken += taker.run(Taker.take).wait()
    return published, taken


@contextmanager
def ray_runtime() -> Iterator[RayRuntime]:
    with joined() as [machine]:
        runtime = RayRuntime([Seat(f"process {i}", machine.node_id, "127.0.0.1") for i in range(2)])
        yield runtime
        runtime.close()


def main() -> None:
    arguments = parser(__doc__).parse_args()
    print_setting(arguments.threads)
    rounds, budget_s, steps = (1, 0.2, 50) if arguments.quick else (arguments.rounds, arguments.seconds, 500)
    with ray_runtime() as runtime:
        pair = partial(Team, make_env=lambda number: IdleEnv(ENVS), make_policy=SmallPolicy, chunks=steps)
        pairs = {
            "threads of one process": pair(LocalRuntime(), Layout()),
            "Ray, in the same process": pair(runtime, Layout((0,), (0,))),
            "Ray, in two processes": pair(runtime, Layout((0,), (1,))),
        }
        peer = "Ray, through queue actors"
        play_queued, queue_pids = queued(steps)
        contenders = [
            Contender("alone", repeat(alone())),
            *(Contender(name, repeat(pair.play, steps), [*pair.pids], peer, "alone") for name, pair in pairs.items()),
            Contender(peer, repeat(play_queued, steps), queue_pids, limit="alone"),
        ]
        results = in_turns(contenders, rounds=rounds, budget_s=budget_s)
        print_table(f"steps of {ENVS} environments, each answered by the policy", "steps", contenders, results)
        print("\noverhead of a step, milliseconds")
        bare = results["alone"].wall
        for contender in contenders[1:]:
            rates = results[contender.name].wall
            overhead = median(1e3 / rate - 1e3 / limit for rate, limit in zip(rates, bare, strict=True))
            print(f"{contender.name:37}{overhead:8.2f}")
        published, taken = weight_times(runtime, 3 if arguments.quick else 15)
    print(f"\n{WEIGHTS_MB} MB of weights to another process, seconds: median (lowest-highest), the first apart")
    for what, times in (("published, until it has arrived", published), ("taken over by the policy", taken)):
        later = times[1:]
        print(f"{what:37}{median(later):8.3f} ({min(later):.3f}-{max(later):.3f}), first {times[0]:.3f}")


if __name__ == "__main__":
    main()
