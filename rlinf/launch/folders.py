"""Folders that are there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from rlinf.core.errors import CheckpointError, ConfigError
from rlinf.data.columns import sync_path


def put_whole(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a folder that gets its name when everything is on the disk. Raises CheckpointError."""
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fill(unfinished)
        for path in (*unfinished.iterdir(), unfinished):
            sync_path(path)
        unfinished.rename(folder)
        sync_path(folder.parent)
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def refuse_to_export_over(folder: Path, key: str) -> None:
    """Raise ConfigError where something is there."""
    if folder.exists():
        raise ConfigError(
            f"{key}: {folder} is there already, and runs may depend on it; move it away or name another folder"
        )
