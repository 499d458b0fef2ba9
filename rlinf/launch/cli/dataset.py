"""`python -m rlinf dataset`: what a LeRobot data set holds, and whether it is whole."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlinf.data.lerobot.layout import Feature, find_root

if TYPE_CHECKING:
    from rlinf.data.lerobot.meta import Meta

MAX_TASKS = 10


def show(path: str, *, check: bool, num_threads: int) -> int:
    """Print what a data set holds; the exit code is 1 when the check finds something."""
    from rlinf.data.lerobot.meta import read_meta

    meta = read_meta(find_root(path))
    width = shutil.get_terminal_size((80, 24)).columns
    for line in describe(meta):
        print(line if len(line) <= width else line[: width - 1] + "…")
    if not check:
        return 0
    from rlinf.data.lerobot.check import check as find_problems

    problems = find_problems(meta.root, lambda text: print(f"checking {text}", flush=True), num_threads=num_threads)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    found = (
        "everything can be read" if not problems else "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    )
    print(found)
    return 1 if problems else 0


def describe(meta: Meta) -> list[str]:
    """Lines of a table."""
    info, length = meta.info, meta.length
    lines = [str(meta.root)]
    seconds = info.total_frames / info.fps
    facts = {
        "version": info.version,
        "robot": info.robot_type or "not named",
        "episodes": f"{info.total_episodes:,}",
        "frames": f"{info.total_frames:,}, {duration(seconds)} at {info.fps:g} per second",
        "size": size_of(meta.root),
    }
    if len(length):
        facts["lengths"] = f"{length.min()} to {length.max()} frames, median {int(np.median(length))}"
    lines += [f"  {name:<9} {value}" for name, value in facts.items()]

    played = Counter(text for texts in meta.episode_tasks for text in texts)
    lines.append(f"{len(played)} tasks" if len(played) != 1 else "1 task")
    lines += [f"  {number:>7,}  {text}" for text, number in played.most_common(MAX_TASKS)]
    if len(played) > MAX_TASKS:
        lines.append(f"           and {len(played) - MAX_TASKS} more")

    rows = [(key, feature.dtype, shape_of(feature), about(feature)) for key, feature in info.features.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines.append(f"{len(rows)} features")
    for row in rows:
        cells = [text.ljust(column) for text, column in zip(row, (*widths, 0), strict=True)]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def shape_of(feature: Feature) -> str:
    """The shape for people."""
    return " x ".join(map(str, feature.shape))


def about(feature: Feature) -> str:
    """Names of a vector's elements, or how a video is packed."""
    if feature.dtype == "video":
        info = feature.info or {}
        return " ".join(str(info[key]) for key in ("video.codec", "video.pix_fmt") if key in info)
    names = feature.names
    if isinstance(names, dict):  # some data sets group them
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    return ", ".join(map(str, names)) if isinstance(names, list) and not feature.is_picture else ""


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds, or seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {int(seconds % 60)} s"


def size_of(root: Path) -> str:
    """Bytes and files below a folder."""
    sizes = [path.stat().st_size for path in root.rglob("*") if path.is_file()]
    total, unit = float(sum(sizes)), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if total < 1000:
            break
        total, unit = total / 1000, larger
    return f"{total:.3g} {unit} in {len(sizes)} files"
