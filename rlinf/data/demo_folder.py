"""Episodes in a directory of demonstrations: which there are, whether they are whole, and how to take some out.

An episode has a number, its place in the order of recording. Numbers close up when an episode before them goes.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlinf.core import tree
from rlinf.core.errors import DataError
from rlinf.core.types import Trajectory
from rlinf.data.columns import write_atomic
from rlinf.data.demos import (
    INDEX,
    DemoMeta,
    arrays_of,
    locked,
    meta_of,
    next_name,
    npz,
    read_file,
    read_index,
    write_index,
)
from rlinf.data.trajectory import select_envs, select_rows

_PARTS = ("reward", "terminated", "truncated", "intervened", "valid", "last_index", "continues")


@dataclass(frozen=True)
class Episode:
    """One episode, without its observations.

    Attributes:
        file: that holds it.
        env: column of the file in which it was played.
        begin, end: its decisions, rows [begin, end) of that column.
        length: environment steps.
        total_reward: sum of its rewards.
        success: whether the task was solved; None where that was not recorded.
        intervened: share of its steps in which a person acted.
        whole: whether it also begins in this file.
        damage: what is wrong with the file; the rest is then as the index says.
    """

    file: str
    env: int
    begin: int
    end: int
    length: int
    total_reward: float
    success: bool | None
    intervened: float
    whole: bool
    damage: str = ""


def list_episodes(directory: str | Path) -> tuple[DemoMeta, list[Episode]]:
    """What a directory holds, in the order of recording; observations are not read.

    Raises DataError naming what is wrong with the directory or its index.
    """
    source = Path(directory)
    if not source.is_dir():
        raise DataError(f"{source} is no directory: record demonstrations into it first, or mend the path.")
    index = read_index(source)
    meta, episodes = meta_of(index), []
    all_successful = meta.num_episodes == meta.num_successes
    for entry in index["files"]:
        success = _flags_of(entry, all_successful)
        try:
            episodes += _episodes_of(source / entry["file"], success)
        except DataError as problem:
            episodes += _damaged(entry, success, str(problem))
    return meta, episodes


def read_episode(directory: str | Path, episode: Episode) -> Trajectory:
    """One episode as a trajectory of its own, [T, 1, ...]. Raises DataError naming a file that is corrupt."""
    index = read_index(Path(directory))
    trajectory = read_file(Path(directory) / episode.file, meta_of(index))
    column = select_envs(trajectory, torch.tensor([episode.env]))
    rows = torch.arange(episode.begin, episode.end)
    return replace(select_rows(column, rows, episode.end), source=(0, 0), continues=not episode.whole)


def read_pictures(directory: str | Path, episode: Episode) -> dict[str, np.ndarray]:
    """Pictures by camera, uint8 [T + 1, H, W, 3]. Raises DataError where there are none."""
    trajectory = read_episode(directory, episode)
    last, pictures = dict(tree.leaves(trajectory.last_obs)), {}
    for path, leaf in tree.leaves(trajectory.obs):
        if path.startswith("images/"):
            pictures[path.removeprefix("images/")] = torch.cat([leaf[:-1, 0], last[path]]).numpy()
    if not pictures:
        raise DataError(f"{directory} holds no pictures, so there is nothing to show")
    return pictures


def check_folder(directory: str | Path) -> list[str]:
    """What is wrong with a directory, a line each; nothing when all is well. Reads all of it.

    Raises DataError when there is no index to go by.
    """
    source = Path(directory)
    index = read_index(source)
    meta, problems = meta_of(index), []
    for entry in index["files"]:
        try:
            trajectory = read_file(source / entry["file"], meta)
        except DataError as problem:
            problems.append(str(problem))
            continue
        found = (int(trajectory.valid.sum()), len(trajectory.last_index))
        if found != (entry["transitions"], entry["episodes"]):
            problems.append(
                f"{source / entry['file']} holds {found[0]} transitions and {found[1]} episodes, {INDEX} says "
                f"{entry['transitions']} and {entry['episodes']}. Record the demonstrations anew."
            )
    known = [entry["success"] for entry in index["files"] if "success" in entry]
    counted = sum(map(sum, known))
    if len(known) == len(index["files"]) and counted != meta.num_successes:
        problems.append(f"{source / INDEX} counts {meta.num_successes} successes, its entries {counted}.")
    listed = {entry["file"] for entry in index["files"]}
    problems += [
        f"{path} belongs to no episode: a recording or a deletion was interrupted. Remove it; nothing else needs it."
        for path in sorted([*source.glob("*.npz"), *source.glob("*.partial")])
        if path.name not in listed
    ]
    return problems


def delete_episodes(directory: str | Path, numbers: Collection[int]) -> DemoMeta:
    """Take episodes out for ever; returns the totals of the others. Interrupted at any moment, all or none are gone.

    A file of which something stays is written anew under another name; the index then changes in one step, and only
    after that files go.

    Raises:
        DataError: there is no such episode, an episode shares its column with others that are to stay, another
            program records into the directory, or the disk refuses. Then nothing has changed.
    """
    source, doomed = Path(directory), set(numbers)
    if not source.is_dir():
        raise DataError(f"{source} is no directory: mend the path.")
    with locked(source):
        index = read_index(source)
        meta, episodes = list_episodes(source)
        if wrong := sorted(number for number in doomed if not 0 <= number < len(episodes)):
            there = f"the episodes 0 to {len(episodes) - 1}" if episodes else "no episode"
            raise DataError(f"{source} has {there}; {', '.join(map(str, wrong))} cannot be deleted")
        by_file: dict[str, list[tuple[int, Episode]]] = {}
        for number, episode in enumerate(episodes):
            by_file.setdefault(episode.file, []).append((number, episode))
        kept_files: list[dict[str, Any]] = []
        written: list[Path] = []
        successes = meta.num_successes - sum(bool(episodes[number].success) for number in doomed)
        try:
            for entry in index["files"]:
                here = by_file.get(entry["file"], [])
                gone = [episode for number, episode in here if number in doomed]
                if not gone:
                    kept_files.append(entry)
                elif len(gone) < len(here):
                    kept = [episode for number, episode in here if number not in doomed]
                    name = next_name([*index["files"], *kept_files])
                    trajectory = _without(read_file(source / entry["file"], meta), gone, kept, source / entry["file"])
                    written.append(source / name)
                    write_atomic(source / name, npz(arrays_of(trajectory)))
                    kept_files.append(_rewritten(entry, name, trajectory, kept))
                elif not all(episode.whole for episode in gone):
                    raise DataError(f"{source / entry['file']} holds the end of an episode that began in another file")
            described = {key: value for key, value in index.items() if key not in ("format", "version")}
            write_index(source, {**described, "num_successes": max(successes, 0), "files": kept_files})
        except BaseException as error:
            if isinstance(error, Exception):  # after another interruption, the index may be the new one
                _discard(source, written)
            if isinstance(error, OSError):
                raise DataError(f"{source} could not be written: {error}. Nothing was deleted.") from error
            raise
        left = {entry["file"] for entry in kept_files}
        for entry in index["files"]:
            if entry["file"] not in left:
                (source / entry["file"]).unlink(missing_ok=True)
        return meta_of(read_index(source))


def _discard(directory: Path, files: list[Path]) -> None:
    """Remove what was written and is in no index."""
    listed = {entry["file"] for entry in read_index(directory)["files"]}
    for path in files:
        if path.name not in listed:
            path.unlink(missing_ok=True)


def _flags_of(entry: dict[str, Any], all_successful: bool) -> list[bool] | None:
    """Success of the episodes of a file, as far as the index tells."""
    if "success" in entry:
        return list(entry["success"])
    return [True] * entry["episodes"] if all_successful else None


def _damaged(entry: dict[str, Any], success: list[bool] | None, damage: str) -> list[Episode]:
    """The episodes of a file that cannot be read."""
    count = entry["episodes"]
    flags: list[bool | None] = [None] * count if success is None or len(success) != count else [*success]
    length = entry["transitions"] // max(1, count)
    return [Episode(entry["file"], -1, 0, 0, length, math.nan, flag, 0.0, True, damage) for flag in flags]


def _episodes_of(path: Path, success: list[bool] | None) -> list[Episode]:
    parts = _read_parts(path)
    reward, valid, ends = parts["reward"], parts["valid"], parts["last_index"]
    if success is not None and len(success) != len(ends):
        raise DataError(f"{path} holds {len(ends)} episodes and {INDEX} tells the success of {len(success)}.")
    episodes: list[Episode] = []
    begun: dict[int, int] = {}
    for place, (last, env) in enumerate(ends.tolist()):
        begin, whole = begun.get(env, 0), env in begun or not bool(parts["continues"])
        begun[env] = last + 1
        steps = slice(begin, last + 1)
        played = valid[steps, env]
        episodes.append(
            Episode(
                file=path.name,
                env=env,
                begin=begin,
                end=last + 1,
                length=int(played.sum()) * reward.shape[-1],
                total_reward=float(reward[steps, env][played].astype(np.float64).sum()),
                success=None if success is None else success[place],
                intervened=float(parts["intervened"][steps, env][played].mean()),
                whole=whole,
            )
        )
    return episodes


def _read_parts(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in _PARTS}
    except FileNotFoundError as error:
        raise DataError(f"{path} is listed in {INDEX} and missing. Put it back, or remove its entry.") from error
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is corrupt: {error}. Remove its entry from {INDEX} to go on without it.") from error


def _without(trajectory: Trajectory, gone: list[Episode], kept: list[Episode], path: Path) -> Trajectory:
    """The columns of a file in which nothing is deleted. Raises DataError where a column holds both."""
    columns = {episode.env for episode in gone}
    shared = columns & {episode.env for episode in kept}
    unfinished = [env for env in columns if _goes_on(trajectory, env)]
    if shared or unfinished:
        alone = [episode.begin for episode in kept if episode.env in shared]
        raise DataError(
            f"{path}: an episode to be deleted shares its column with {len(alone)} others and cannot go alone; delete "
            "all episodes of the file"
        )
    stay = [env for env in range(trajectory.num_envs) if env not in columns]
    return select_envs(trajectory, torch.tensor(stay, dtype=torch.int64))


def _goes_on(trajectory: Trajectory, env: int) -> bool:
    """Whether a column holds steps behind its last end."""
    last = max(t for t, n in trajectory.last_index.tolist() if n == env)
    return bool(trajectory.valid[last + 1 :, env].any())


def _rewritten(entry: dict[str, Any], name: str, trajectory: Trajectory, kept: list[Episode]) -> dict[str, Any]:
    """The index's entry of what stays of a file."""
    counts = {"transitions": int(trajectory.valid.sum()), "episodes": len(trajectory.last_index)}
    known = {"success": [bool(episode.success) for episode in kept]} if "success" in entry else {}
    return {"file": name, **counts, **known}
