"""Where a run came from: configuration, command, code, packages and machine, kept in its directory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

import rlinf
from rlinf.core.errors import ConfigError
from rlinf.launch.config import Root

CONFIG_FILE = "config.yaml"
PROVENANCE_FILE = "provenance.json"
LOG_PATH_KEY = "runner.logger.log_path"
TRIAL_BYTES = 1 << 20
GIT_TIMEOUT_S = 10
PACKAGES = (
    "torch",
    "numpy",
    "mani_skill",
    "sapien",
    "gymnasium",
    "hydra-core",
    "pydantic",
    "safetensors",
    "tensorboard",
    "wandb",
    "swanlab",
)
# What may differ between two runs of one recipe: runs that agree in all else are averaged in plots.
INCIDENTAL_KEYS = {
    "seed",
    "logger",
    "resume_dir",
    "save_interval",
    "keep_checkpoints",
    "video_cfg",
    "storage_dir",
}


def run_directory(config: Root) -> Path:
    """Where everything of a run goes: <log_path>/<experiment_name>."""
    return Path(config.runner.logger.log_path).expanduser().resolve() / config.runner.logger.experiment_name


def prepare_run_dir(run_dir: Path) -> None:
    """Make the run directory, and write and delete a trial file of 1 MiB there.

    Raises: ConfigError naming the directory and the key when there is no right, no room or no folder.
    """
    trial = run_dir / ".trial"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with trial.open("wb") as file:
            file.write(bytes(TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        make_room = "make room there or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise ConfigError(
            f"cannot write into the run directory {run_dir}: {error.strerror or type(error).__name__}; "
            f"{make_room}choose another place with {LOG_PATH_KEY}=PATH"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)


def write_provenance(run_dir: Path, config: Mapping[str, Any], *, seed: int) -> None:
    """Write `config.yaml` (the resolved configuration) and `provenance.json` (the rest) into `run_dir`.

    A resumed run writes both anew; what stood there before moves to `config.1.yaml`, `provenance.1.json`, ...
    """
    plain = json.loads(json.dumps(config, default=str))
    record = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "working_directory": os.getcwd(),
        "seed": seed,
        "recipe": recipe_digest(plain),
        "code": git_state(Path(rlinf.__file__).parents[1]),
        "versions": versions(),
        "machine": machine(),
    }
    _write(run_dir / CONFIG_FILE, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110))
    _write(run_dir / PROVENANCE_FILE, json.dumps(record, indent=2) + "\n")


def recipe_digest(config: Mapping[str, Any]) -> str:
    """Hash of everything in a configuration that changes what is learned, seeds and places apart."""
    text = json.dumps(_essential(config), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def git_state(folder: Path) -> dict[str, Any]:
    """`commit` (None where there is none) and `modified`, whether files differ from it."""
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return {"commit": None, "modified": None}
    return {"commit": commit, "modified": bool(_git(folder, "status", "--porcelain"))}


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the installed packages that can change results."""
    known = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known[package] = importlib.metadata.version(package)
    return {"python": platform.python_version(), "rlinf": rlinf.__version__, **known}


def machine() -> dict[str, Any]:
    """System, processor, cores that this process may use, memory in GiB, GPUs."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpus": gpus,
        "torch_threads": torch.get_num_threads(),
    }


def cpu_model() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _essential(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _essential(child) for key, child in tree.items() if key not in INCIDENTAL_KEYS}
    return tree


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command in `folder`; None where it fails or there is no git."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _write(path: Path, text: str) -> None:
    """Write in one step; another text that stood there is kept under a number."""
    if path.exists() and path.read_text() != text:
        number = 1
        while (aside := path.with_suffix(f".{number}{path.suffix}")).exists():
            number += 1
        path.rename(aside)
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text)
    unfinished.replace(path)
