"""Where each recipe saturates with 1, 8 and 64 GPUs: the model of docs/scaling.md, computed.

    python benchmarks/saturation.py

Nothing is measured here. Sizes are those of the recipes (`profile=gpu`), constants come from benchmarks/RESULTS.md,
from counted FLOPs and from what makers publish; ASSUMED marks those that nobody has measured for this code. GPUs come
eight to a machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlinf.launch.config import updates_per_step
from rlinf.launch.parse import load_config
from rlinf.launch.run import schedule_of

CONFIG_DIR = Path(__file__).parents[1] / "examples/embodiment/config"
GPUS = (1, 8, 64)

OVERHEAD_S = 0.22e-3
"""Of a step, in one process under Ray. Measured ("Runtime")."""
SYNC_S_PER_BYTE = 0.126 / 100e6
"""New weights to the processes of a machine, through its object store. Measured ("Runtime")."""
PEAK_FLOPS = 989e12
"""Dense bfloat16 of an H100 or H200, published by NVIDIA."""
NVLINK_BYTES_S, FABRIC_BYTES_S = 450e9, 50e9
"""One direction, for each GPU: NVLink 4, and InfiniBand at 400 Gbit/s. Published."""
NETWORK_BYTES_S = 1.25e9
"""Between machines for Ray's object store: 10 Gbit/s. ASSUMED."""
CORES_PER_GPU = 16
"""ASSUMED: 128 cores beside eight GPUs."""
LARGE_SHARE, SMALL_SHARE = 0.4, 0.05
"""Of the peak that a VLA and a network of a few million weights reach. ASSUMED."""
LINK_SHARE = 0.8
"""Of a link that an all-reduce reaches. ASSUMED."""
KERNEL_S = 6e-6
"""From one kernel to the next where none is long. ASSUMED."""


@dataclass(frozen=True)
class Recipe:
    """What a recipe's step, answer and update cost.

    Attributes:
        step_s: of one environment on one core; or, with `on_gpu`, of each environment of a batch.
        gpu_step_s: of a batch of any size on a GPU, beside that.
        draw_s: its pictures, once for each action chunk; on its core where environments are on cores.
        answer_flops, answer_kernels: of one decision; of one answer, however many rows it has.
        update_flops, update_kernels: of a row of the batch; of an update.
        large: whether it is a VLA.
        gradients, weights: bytes that an optimizer step exchanges, and that acting needs anew.
        optimizer_steps: of an update.
        control_hz: a robot's rate.
        extra_rows: demonstrations beside each row of the batch.
    """

    step_s: float
    draw_s: float
    answer_flops: float
    answer_kernels: int
    update_flops: float
    update_kernels: int
    gradients: float
    weights: float
    on_gpu: bool = False
    gpu_step_s: float = 0.0
    large: bool = False
    optimizer_steps: int = 1
    control_hz: float | None = None
    extra_rows: float = 0.0


MB, GFLOP, TFLOP = 1e6, 1e9, 1e12
PI0_LAUNCHES = 700 + 10 * 300
"""Kernels of pi0's prefix and of ten denoising steps. ASSUMED."""

RECIPES = {
    "maniskill_sac_flow_state": Recipe(
        step_s=10e-6, draw_s=0, on_gpu=True, gpu_step_s=10e-3,  # ASSUMED
        answer_flops=2e6, answer_kernels=100,
        update_flops=2.80 * GFLOP / 512, update_kernels=1000,  # counted ("Learner updates"); ASSUMED
        gradients=2 * MB, weights=0.4 * MB, optimizer_steps=3,
    ),
    "maniskill_ppo_mlp": Recipe(
        step_s=10e-6, draw_s=0, on_gpu=True, gpu_step_s=10e-3,  # ASSUMED
        answer_flops=1e6, answer_kernels=30,
        update_flops=0.43 * GFLOP / 256, update_kernels=250,  # counted; ASSUMED
        gradients=1 * MB, weights=0.5 * MB,
    ),
    "frankasim_ppo_mlp": Recipe(
        step_s=1 / 2271, draw_s=0,  # measured ("Franka-Sim")
        answer_flops=1e6, answer_kernels=30,
        update_flops=0.43 * GFLOP / 256, update_kernels=250,  # counted; ASSUMED
        gradients=1 * MB, weights=0.5 * MB,
    ),
    "frankasim_sac_cnn_async": Recipe(
        step_s=1 / 2271, draw_s=2e-3,  # measured; ASSUMED: 1 ms a picture where a GPU draws
        answer_flops=40e6, answer_kernels=150,
        update_flops=120e6, update_kernels=1500,  # from 12 updates/s of 128 rows on a CPU; ASSUMED
        gradients=20 * MB, weights=10 * MB, optimizer_steps=3,
    ),
    "libero_spatial_dsrl_openpi": Recipe(
        step_s=7.5e-3, draw_s=2e-3,  # measured ("LIBERO"); ASSUMED: 1 ms a picture where a GPU draws
        answer_flops=2.95 * TFLOP, answer_kernels=PI0_LAUNCHES, large=True,  # counted: pi0, two pictures
        update_flops=225e6, update_kernels=1700,  # from 1.55 updates of 512 rows per CPU-s; ASSUMED
        gradients=17 * MB, weights=9 * MB, optimizer_steps=2,
    ),
    "maniskill_ppo_co_training_openpi_pi05": Recipe(
        step_s=10e-6, draw_s=100e-6, on_gpu=True, gpu_step_s=20e-3,  # ASSUMED
        answer_flops=2.31 * TFLOP, answer_kernels=PI0_LAUNCHES, large=True,  # counted: pi0.5, one picture
        update_flops=2.3 * TFLOP, update_kernels=20_000,  # counted: forward of all, backward of the expert; ASSUMED
        gradients=430e6 * 4, weights=430e6 * 4, extra_rows=16 / 40,
    ),
    "realworld_sac_flow_image": Recipe(
        step_s=0, draw_s=0, control_hz=10.0,
        answer_flops=100e6, answer_kernels=300,
        update_flops=150e6, update_kernels=2000,  # ASSUMED
        gradients=30 * MB, weights=12 * MB, optimizer_steps=3,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Of a global step: environments, env steps of an action chunk, decisions of each environment, updates, rows."""

    envs: int
    chunk: int
    decisions: int
    updates: int
    batch: int
    in_turns: bool
    asynchronous: bool

    def grown(self, times: int) -> Sizes:
        """With as many times the environments and rows."""
        return replace(self, envs=self.envs * times, batch=self.batch * times)


@dataclass(frozen=True)
class Expected:
    """Environment steps per second, seconds of a global step by what it waits for, and how many GPUs have work."""

    rate: float
    parts: dict[str, float]
    used: int

    def narrow(self) -> str:
        """The part that takes longest, and its share of the step."""
        name = max(self.parts, key=lambda part: self.parts[part])
        return f"{name} {self.parts[name] / sum(self.parts.values()):.0%}"


def sizes_of(name: str) -> Sizes:
    """Of a recipe for GPUs."""
    config = load_config(name, ["profile=gpu"], CONFIG_DIR, has_gpu=lambda: True)
    schedule = schedule_of(config)
    return Sizes(
        config.env.train.total_num_envs,
        config.actor.model.num_action_chunks,
        schedule.chunks * schedule.segments,
        updates_per_step(config),
        config.actor.global_batch_size,
        in_turns=not (config.runner.overlap or config.runner.asynchronous),
        asynchronous=config.runner.asynchronous,
    )


def expect(recipe: Recipe, sizes: Sizes, gpus: int) -> Expected:
    """Every GPU with a process of each role, but no more than there are environments (a run refuses more)."""
    used = min(gpus, sizes.envs)
    rows = math.ceil(sizes.envs / used)
    if recipe.control_hz is not None:
        simulating, drawing = sizes.chunk / recipe.control_hz, 0.0
    elif recipe.on_gpu:
        simulating, drawing = sizes.chunk * (recipe.gpu_step_s + rows * recipe.step_s), rows * recipe.draw_s
    else:
        turns = math.ceil(rows / CORES_PER_GPU)
        simulating, drawing = sizes.chunk * turns * recipe.step_s, turns * recipe.draw_s
    share = LARGE_SHARE if recipe.large else SMALL_SHARE
    answer = max(recipe.answer_kernels * KERNEL_S, rows * recipe.answer_flops / (PEAK_FLOPS * share)) + OVERHEAD_S
    large_update = recipe.update_flops > TFLOP
    speed = PEAK_FLOPS * (LARGE_SHARE if large_update else SMALL_SHARE)
    computing = sizes.batch / used * (1 + recipe.extra_rows) * recipe.update_flops / speed
    collect = {"env stepping": simulating, "rendering": drawing, "policy": answer}
    if recipe.control_hz is not None:  # the policy answers within the period
        collect = {"robot": simulating}
    collect = {part: sizes.decisions * seconds for part, seconds in collect.items()}
    learn = {
        "learner": sizes.updates * max(recipe.update_kernels * KERNEL_S, computing),
        "interconnect": sizes.updates * recipe.optimizer_steps * all_reduce_s(recipe.gradients, used),
    }
    # Where both go on at the same time, the faster one costs nothing.
    parts = collect | learn if sizes.in_turns else max(collect, learn, key=lambda side: sum(side.values()))
    if not sizes.asynchronous:
        parts = parts | {"weight sync": sync_s(recipe.weights, used)}
    return Expected(sizes.envs * sizes.chunk * sizes.decisions / sum(parts.values()), parts, used)


def all_reduce_s(size: float, gpus: int) -> float:
    """A ring over all of them; its slowest link counts."""
    if gpus == 1:
        return 0.0
    link = NVLINK_BYTES_S if gpus <= 8 else FABRIC_BYTES_S
    return 2 * (gpus - 1) / gpus * size / (link * LINK_SHARE) + 2 * KERNEL_S * math.ceil(math.log2(gpus))


def sync_s(size: float, gpus: int) -> float:
    """New weights into the object store and out of it, and on to other machines, which pass them on."""
    machines = math.ceil(gpus / 8)
    return size * (SYNC_S_PER_BYTE + math.ceil(math.log2(machines)) / NETWORK_BYTES_S)


def table(gpus: Sequence[int] = GPUS) -> list[str]:
    """Lines of Markdown: the sizes as they are, and grown with the GPUs."""
    head = ["recipe, GPUs", *(f"{count}" for count in gpus), *(f"{count}, sizes × {count}" for count in gpus[1:])]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, recipe in RECIPES.items():
        sizes = sizes_of(name)
        found = [(count, expect(recipe, sizes, count)) for count in gpus]
        found += [(count, expect(recipe, sizes.grown(count), count)) for count in gpus[1:]]
        idle = [f" ({one.used} used)" if one.used < count else "" for count, one in found]
        cells = [f"{rounded(one.rate)}/s, {one.narrow()}{less}" for (_, one), less in zip(found, idle, strict=True)]
        lines.append(f"| {' | '.join([f'`{name}`', *cells])} |")
    return lines


def rounded(rate: float) -> str:
    """Two digits, as nothing here is better known."""
    digits = 1 - math.floor(math.log10(rate))
    return f"{round(rate, digits):,.{max(0, digits)}f}"


if __name__ == "__main__":
    print("\n".join(table()))
