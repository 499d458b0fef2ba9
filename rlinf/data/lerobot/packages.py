"""The optional packages behind the files, or one line that says how to get them."""

from __future__ import annotations

import importlib
from typing import Any

from rlinf.core.errors import MissingDependency

PACKAGES = ("pyarrow", "av")
INSTALL_COMMAND = "bash requirements/install.sh embodied --lerobot"


def require(module: str) -> Any:
    """The module `module`. Raises MissingDependency with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f"LeRobot data sets need {module.partition('.')[0]} ({error}): pip install 'rlinf[lerobot]', or "
            f"{INSTALL_COMMAND}"
        ) from error


def check_packages() -> None:
    """Raise MissingDependency unless data sets can be read and written here."""
    for package in PACKAGES:
        require(package)
