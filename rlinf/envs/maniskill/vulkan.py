"""Find a Vulkan driver for rendering, and say what to do when there is none."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Literal

from rlinf.core.errors import MissingDependency

INSTALL_COMMAND = "bash requirements/install.sh embodied --env maniskill"
"""Installs ManiSkill and, on machines without a GPU, a software Vulkan into the environment."""

WITHOUT_FILM = "env.eval.video_cfg.save_video=False"

_VARIABLES = ("VK_ICD_FILENAMES", "VK_DRIVER_FILES")
_SYSTEM = ("/etc/vulkan/icd.d", "/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d")


def find_icd(cuda: bool = False) -> Path | None:
    """Description file (JSON) of the Vulkan driver to render with, or None where there is none.

    The files named by VK_ICD_FILENAMES or VK_DRIVER_FILES, and nothing else if one of them is set. Otherwise
    NVIDIA's driver if `cuda`, the software driver that the installer puts into this Python environment, any
    driver of the system. The environment's own goes before the system's, which may be too old for SAPIEN:
    Debian 12's is.
    """
    for variable in _VARIABLES:
        named = [Path(name) for name in os.environ.get(variable, "").split(os.pathsep) if name]
        if named:
            return next((path for path in named if path.is_file()), None)
    system = [path for folder in _SYSTEM for path in sorted(Path(folder).glob("*.json"))]
    nvidia = [path for path in system if "nvidia" in path.name] + _sapiens_nvidia() if cuda else []
    own = Path(sys.prefix) / "share" / "lavapipe" / "lvp.json"
    return next((path for path in (*nvidia, own, *system) if path.is_file()), None)


def use_icd(cuda: bool = False) -> Literal["sapien_cpu", "sapien_cuda"]:
    """Make this process render with the driver of `find_icd`, before SAPIEN makes a device.

    Returns the name by which ManiSkill knows the renderer. On CUDA it draws on the first device that the process sees,
    which in a run over several is the one where its environments were placed.

    Raises:
        MissingDependency: there is no Vulkan driver.
    """
    icd = find_icd(cuda)
    if icd is None:
        wrong = next((f"{name}={os.environ[name]} names no file; " for name in _VARIABLES if name in os.environ), "")
        raise MissingDependency(
            f"no Vulkan driver to render with: {wrong}run `{INSTALL_COMMAND}`, or do without films: {WITHOUT_FILM}"
        )
    os.environ["VK_ICD_FILENAMES"] = str(icd)
    return "sapien_cuda" if "nvidia" in icd.name else "sapien_cpu"


def _sapiens_nvidia() -> list[Path]:
    """SAPIEN brings a description of NVIDIA's driver, for containers that lack one."""
    found = importlib.util.find_spec("sapien")
    if found is None or found.origin is None:
        return []
    return [Path(found.origin).parent / "vulkan_library" / "nvidia_icd.json"]
