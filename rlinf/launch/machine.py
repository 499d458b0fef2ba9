"""What a run does with the machine it is on: device, precision, memory, and who gets which CPU cores."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlinf.core.errors import MissingDependency
from rlinf.envs.config import EnvConfig
from rlinf.envs.frankasim.config import FrankaSimConfig
from rlinf.envs.libero.config import LiberoConfig
from rlinf.envs.maniskill.config import ManiSkillConfig
from rlinf.envs.realworld.config import RealWorldConfig
from rlinf.launch.config import Root
from rlinf.launch.cpu import BF16_FLAGS, cpu_flags
from rlinf.runtime.placement import Node

if TYPE_CHECKING:
    from rlinf.launch.sft_config import SftConfig

SWITCH_INTERVAL_S = 0.5e-3
"""Python's own 5 ms cost an update of some milliseconds a tenth."""

FLOAT32_ERROR = 1e-5
"""Products of some hundred terms err by less than 1e-6 in float32 and by more than 1e-3 in bfloat16."""


@dataclass(frozen=True)
class Neighbours:
    """Processes of a run that share the cores of a machine: `envs` and `learners`, of `all_envs` on all machines."""

    envs: int = 1
    learners: int = 1
    all_envs: int = 1


ALONE = Neighbours()

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def device_of(config: Root | SftConfig) -> torch.device:
    """Where networks live. Raises MissingDependency when the GPU profile finds no CUDA device."""
    if config.profile == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise MissingDependency(
            "profile=gpu, but torch sees no CUDA device; write profile=cpu, or look at `python -m rlinf doctor`"
        )
    return torch.device("cuda")


def this_node(config: Root) -> Node:
    """This machine as the first node of a run, with the accelerators that torch sees; none for the CPU profile."""
    accelerators = torch.cuda.device_count() if config.profile == "gpu" else 0
    return Node(0, platform.node(), "127.0.0.1", accelerators, num_cores())


def choose_float32_products() -> bool:
    """Let oneDNN compute float32 products on the CPU where it does so in float32. Returns whether it does now.

    Torch leaves them to MKL, which keeps to AVX2 on other processors than Intel's: half of what a Zen 5 can do. The
    way to oneDNN is the permission to multiply in bfloat16 (`medium`). Processors with AMX take it at its word, others
    have nothing to gain from it and stay with float32; so the result decides. A setting of the process.
    """
    torch.set_float32_matmul_precision("medium")
    exact = _product_error() < FLOAT32_ERROR
    torch.set_float32_matmul_precision("medium" if exact else "highest")
    return exact


def _product_error() -> float:
    """The largest error of a few products of the sizes of RL networks, relative to their largest element."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for rows, inner, columns in ((1, 256, 256), (32, 48, 256), (256, 256, 256), (512, 96, 384)):
        x, w = (torch.randn(shape, generator=generator) for shape in ((2, rows, inner), (2, inner, columns)))
        exact = x.double() @ w.double()
        for product in (torch.bmm(x, w), torch.stack([a @ b for a, b in zip(x, w, strict=True)])):
            worst = max(worst, float((product - exact).abs().max() / exact.abs().max()))
    return worst


def runs_in_bf16(config: Root, device: torch.device) -> bool:
    """Whether networks learn under autocast: where the configuration says bf16 and the device gains by it."""
    return config.actor.precision == "bf16" and (device.type != "cpu" or bool(cpu_flags() & BF16_FLAGS))


def prepare_process(config: Root, *, needs_device: bool = True) -> None:
    """Set what holds for a whole process.

    A process of environments alone needs no device; a machine without GPU may hold it in a run of the GPU profile.
    Raises MissingDependency where there is none for a process that needs one.
    """
    if needs_device:
        device_of(config)
    if config.profile == "cpu":
        choose_float32_products()
    keep_freed_memory()
    # The learner's thread waits for up to one interval whenever another one holds the interpreter.
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors instead of handing it back (glibc; elsewhere nothing).

    An update frees and takes megabytes many times over, and memory that comes back from the kernel is cleared page
    by page: a tenth to a fifth of an update of the flow recipe on a CPU. A setting of the process.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    for option, size in ((M_TRIM_THRESHOLD, 512 << 20), (M_TOP_PAD, 64 << 20), (M_MMAP_THRESHOLD, 32 << 20)):
        libc.mallopt(option, size)


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_simulator_processes(env: EnvConfig, num_envs: int, cores: int | None = None) -> int:
    """`num_workers` with auto resolved: the most that share `num_envs` evenly, at most one per core (None: all).

    Evenly or not, where the environments play a list of initial states: their numbers may be odd then.
    """
    if env.num_workers != "auto":
        return env.num_workers
    most = min(cores or num_cores(), num_envs)
    if env.plays_a_list():
        return most
    return max(count for count in range(1, most + 1) if num_envs % count == 0)


def learns_while_collecting(config: Root) -> bool:
    """Whether learner and simulators work at the same time."""
    return config.runner.overlap or config.runner.asynchronous


def cores_for_training_envs(config: Root, here: Neighbours = ALONE) -> int:
    """CPU cores on which a process steps simulators in training: its share of all, or of all but one when a learner on
    the CPU works meanwhile.

    With a simulator on its core too, an update took a quarter longer (docs/LOG.md).
    """
    busy = learns_while_collecting(config) and config.profile == "cpu" and here.learners > 0
    return max(1, (num_cores() - busy) // max(1, here.envs))


def simulates_on_cpu(env: EnvConfig) -> bool:
    """Whether stepping keeps CPU cores busy."""
    if not isinstance(env, ManiSkillConfig):
        twin = isinstance(env, RealWorldConfig) and env.override_cfg.driver == "twin"
        return twin or isinstance(env, FrankaSimConfig | LiberoConfig)
    backend = env.init_params.sim_backend
    return backend == "cpu" or (backend == "auto" and not torch.cuda.is_available())


def num_learner_threads(config: Root, here: Neighbours = ALONE) -> int:
    """`actor.num_threads` with auto resolved.

    Half of the cores at most: the products of a recipe's networks are small, and a thread that waits for its share
    of them costs more than it brings (on two cores an update took 14 ms with one thread and 17 to 29 with two).
    """
    if config.actor.num_threads != "auto":
        return config.actor.num_threads
    train, free = config.env.train, num_cores()
    if learns_while_collecting(config) and simulates_on_cpu(train):
        num_envs = train.total_num_envs // (here.all_envs * config.rollout.pipeline_stage_num)
        free -= here.envs * num_simulator_processes(train, num_envs, cores_for_training_envs(config, here))
    return max(1, min(free, num_cores() // 2) // max(1, here.learners))
