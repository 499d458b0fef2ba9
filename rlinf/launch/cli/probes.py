"""The checks of the doctor, each in a process of its own: `python -m rlinf.launch.cli.probes NAME`.

A check returns what it found in a few words. It raises MissingError for what is not there, and anything else (or
dies) for what is there and does not work. Packages are imported by name, since none is certain to exist.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from multiprocessing import shared_memory
from pathlib import Path
from types import ModuleType

from rlinf.launch.cpu import CPU_FLAGS, cpu_flags

REQUIREMENTS = (
    "numpy", "hydra", "omegaconf", "pydantic", "safetensors", "tensorboard", "rich", "matplotlib", "imageio", "yaml"
)  # fmt: skip
MIN_PYTHON = (3, 10)
MIN_DISK_GIB = 5.0
MIN_SHARED_MIB = 64.0


class MissingError(Exception):
    """The thing that was looked for is not installed or not in this machine."""


def python() -> str:
    """Interpreter and its version."""
    if sys.version_info < MIN_PYTHON:
        raise RuntimeError(f"{sys.version.split()[0]} is too old; 3.10 or newer is needed")
    return f"{sys.version.split()[0]}, {sys.executable}"


def packages() -> str:
    """Everything that the package itself needs besides torch."""
    for name in REQUIREMENTS:
        load(name)
    return f"{len(REQUIREMENTS)} required packages can be imported"


def torch() -> str:
    """Build, threads and the instructions of the processor that make bf16 fast."""
    module = load("torch")
    total = (module.ones(8, 8) @ module.ones(8, 8)).sum().item()
    if total != 512:
        raise RuntimeError(f"a product of matrices came out as {total}, not 512")
    build = f"CUDA {module.version.cuda}" if module.version.cuda else "CPU build"
    return f"{module.__version__} ({build}), {module.get_num_threads()} threads, {_cpu_flags()}"


def gpu() -> str:
    """CUDA device through torch."""
    module = load("torch")
    if not module.cuda.is_available():
        if shutil.which("nvidia-smi") is None and not Path("/proc/driver/nvidia").exists():
            raise MissingError("no NVIDIA GPU; the CPU profile is used")
        raise RuntimeError(f"there is an NVIDIA driver, but torch {module.__version__} cannot use it")
    device = module.cuda.get_device_properties(0)
    module.ones(8, device="cuda").sum().item()
    count = module.cuda.device_count()
    more = f" and {count - 1} more" if count > 1 else ""
    return f"{device.name}, {device.total_memory / 2**30:.0f} GiB{more}"


def vulkan() -> str:
    """A renderer of SAPIEN, through the driver that the environments would take."""
    from rlinf.envs.maniskill.vulkan import find_icd, use_icd

    sapien = load("sapien")
    cuda = importlib.util.find_spec("torch") is not None and load("torch").cuda.is_available()
    icd = find_icd(cuda)
    if icd is None:
        raise MissingError("no Vulkan driver; training works, eval videos do not")
    use_icd(cuda)
    sapien.render.RenderSystem(sapien.Device("cuda" if cuda else "cpu"))
    return f"{'GPU' if cuda else 'software'} rendering through {icd}"


def mujoco() -> str:
    """MuJoCo and an OpenGL context to draw with, through the code that the environments use."""
    if importlib.util.find_spec("mujoco") is None:
        raise MissingError("not installed; only Franka-Sim and LIBERO need it")
    from rlinf.envs.opengl import import_mujoco, open_context, release_context, renderer_name

    module = import_mujoco("bash requirements/install.sh embodied --env frankasim")
    context = open_context(32, 32)
    name = renderer_name()
    release_context()
    context.free()
    return f"{module.__version__}, draws through {os.environ.get('MUJOCO_GL', 'its default')} on {name}"


def frankasim() -> str:
    """The robot's model of Franka-Sim and the compiler of its controller."""
    if importlib.util.find_spec("gym_hil") is None:
        raise MissingError("not installed; only its recipes need it")
    from rlinf.envs.frankasim.scene import scene_file

    scene_file()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("gym-hil", "mujoco")]
    if importlib.util.find_spec("numba") is None:
        return f"{', '.join(versions)}; without numba, half as fast"
    return f"{', '.join(versions)}, numba {importlib.metadata.version('numba')}"


def maniskill() -> str:
    """ManiSkill with the task of the first recipe among those that it registers."""
    load("mani_skill")
    load("mani_skill.envs")
    if "PickCube-v1" not in load("mani_skill.utils.registration").REGISTERED_ENVS:
        raise RuntimeError("PickCube-v1 is not among its tasks")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("mani_skill", "sapien")]
    return ", ".join(versions)


def libero() -> str:
    """LIBERO's tasks, and where its scenes and objects are."""
    if importlib.util.find_spec("libero") is None:
        raise MissingError("not installed; only its recipes need it")
    from rlinf.core.errors import MissingDependency
    from rlinf.envs.libero.config import LiberoConfig
    from rlinf.envs.libero.package import find_assets, import_problems, open_suite

    import_problems()
    suite = open_suite(LiberoConfig(total_num_envs=1, use_standin_assets=True))
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("hf-libero", "robosuite")]
    try:
        assets = f"assets in {find_assets(LiberoConfig(total_num_envs=1))}"
    except MissingDependency:
        assets = "no assets: env.*.use_standin_assets=True for simple shapes, or see the message of a run without"
    return f"{', '.join(versions)}, {len(suite.tasks)} tasks in {suite.name}; {assets}"


def ray() -> str:
    """Ray, which runs on several machines need."""
    if importlib.util.find_spec("ray") is None:
        raise MissingError("not installed; no recipe of this version needs it")
    return str(load("ray").__version__)


def wandb() -> str:
    """Weights & Biases."""
    return service("wandb")


def swanlab() -> str:
    """SwanLab."""
    return service("swanlab")


def ffmpeg() -> str:
    """A short H.264 video."""
    import numpy as np

    from rlinf.metrics.video import write_video

    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder) / "trial.mp4", np.zeros((2, 16, 16, 3), np.uint8), 10)
    return f"writes H.264, version {load('imageio_ffmpeg').get_ffmpeg_version()}"


def disk() -> str:
    """Free space where the logs go."""
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    with tempfile.TemporaryFile(dir=Path.cwd()) as file:
        file.write(b"trial")
    if free_gib < MIN_DISK_GIB:
        raise RuntimeError(f"{free_gib:.1f} GiB free in {Path.cwd()}, which will soon be full")
    return f"{free_gib:.0f} GiB free in {Path.cwd()}"


def shared() -> str:
    """Shared memory, over which simulators talk to the learner."""
    usage = shutil.disk_usage("/dev/shm")
    free_mib = usage.free / 2**20
    block = shared_memory.SharedMemory(create=True, size=1 << 20)
    block.close()
    block.unlink()
    if free_mib < MIN_SHARED_MIB:
        raise RuntimeError(f"{free_mib:.0f} of {usage.total / 2**20:.0f} MiB free in /dev/shm")
    return f"{free_mib:,.0f} MiB free in /dev/shm"


PROBES = {
    probe.__name__: probe
    for probe in (
        python, packages, torch, gpu, disk, shared, maniskill, vulkan, ffmpeg, frankasim, mujoco,
        libero, ray, wandb, swanlab,
    )
}  # fmt: skip


def service(name: str) -> str:
    """Version of a logging service."""
    if importlib.util.find_spec(name) is None:
        raise MissingError(f"not installed; only for runner.logger.logger_backends=[{name}]")
    return str(load(name).__version__)


def load(name: str) -> ModuleType:
    """Import a module by name. Raises MissingError when it, and not something inside it, is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name.split(".")[0]:
            raise MissingError("not installed") from error
        raise


def _cpu_flags() -> str:
    if not (flags := cpu_flags()):
        return "processor unknown"
    return ", ".join(label for flag, label in CPU_FLAGS.items() if flag in flags) or "no AVX"


def main(name: str) -> None:
    """Run one check; the last line on stdout is its answer as JSON."""
    try:
        state, detail = "works", PROBES[name]()
    except MissingError as error:
        state, detail = "missing", str(error)
    except Exception as error:  # whatever is wrong with it is the answer
        state, detail = "broken", " ".join(f"{type(error).__name__}: {error}".split())
    print(json.dumps({"state": state, "detail": detail}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)  # freeing what was imported would take as long again
