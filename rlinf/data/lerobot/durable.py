"""Groups of files that appear one after another, each of them whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rlinf.data.columns import sync_path


def write_files(root: Path, files: Mapping[str, bytes | memoryview]) -> None:
    """Put contents under names below `root`, in their order, replacing what is there; folders are made.

    Everything is on the disk before the first name appears. A crash in between leaves the first so many of them, each
    old or new but never in part. Raises OSError; then no name has changed, unless renaming itself failed.
    """
    folders = {root / name for name in files for name in [str(Path(name).parent)]}
    made = [folder for folder in folders if not folder.is_dir()]
    partial = {root / name: root / f"{name}.partial" for name in files}
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for unfinished, content in zip(partial.values(), files.values(), strict=True):
            with open(unfinished, "wb") as file:
                file.write(content)
        for unfinished in partial.values():  # together: the disk then need not wait for every one of them alone
            sync_path(unfinished)
        for path, unfinished in partial.items():
            os.replace(unfinished, path)
    finally:
        for unfinished in partial.values():
            unfinished.unlink(missing_ok=True)
    for folder in made:
        folders |= {parent for parent in folder.parents if parent.is_relative_to(root)}
    for folder in folders:
        sync_path(folder)


def remove_files(root: Path, names: list[str]) -> None:
    """Remove files below `root`; those that are not there are ignored."""
    for name in names:
        (root / name).unlink(missing_ok=True)
