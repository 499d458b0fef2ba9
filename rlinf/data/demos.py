"""Demonstrations on disk: a directory with `index.json` and one .npz file per recorded segment.

    index.json        format, version, what was recorded where and how, and one entry per file: its name, the
                      transitions and episodes in it, and, where that is known, the success of each of them
    000000.npz        obs/<leaf> [T + 1, N, ...], last_obs/<leaf> [M, ...], last_index, action, reward,
                      terminated, truncated, intervened, valid, source, continues  (fields of `Trajectory`)

Rewards and ends of episodes are stored raw, so a reader chooses its own discount and bootstrapping. A file gets
its name when it is complete and enters the index after that: whenever a recording dies, what the index lists is
whole. Writing into a directory that has an index appends.
"""

from __future__ import annotations

import fcntl
import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlinf.core import tree
from rlinf.core.errors import CheckpointError, DataError
from rlinf.core.types import EnvSpaces, Trajectory
from rlinf.data.columns import read_json, write_atomic, write_json

_FORMAT = "rlinf demonstrations"
_VERSION = 1
INDEX = "index.json"
_REMEDY = "Restore it, or record the demonstrations into another directory."
_ENTRIES = {  # of the index, with the kinds that JSON gives
    "env_id": str,
    "control_mode": str,
    "action_dim": int,
    "obs_shapes": dict,
    "obs_dtypes": dict,
    "recorded_by": str,
    "num_successes": int,
    "files": list,
}
_FLAGS = ("terminated", "truncated", "intervened", "valid")


@dataclass(frozen=True)
class DemoMeta:
    """What a directory of demonstrations holds.

    Attributes:
        env_id: task, as the simulator calls it.
        control_mode: what an action means to the robot.
        action_dim: A.
        obs_shapes: leaf path → shape of one observation.
        obs_dtypes: leaf path → numpy dtype name; "str" for strings.
        recorded_by: who played and with what, for people.
        num_transitions, num_episodes, num_successes: totals over all files. `write_demos` counts the first two
            itself, and reads `num_successes` as the successful episodes among the trajectories that it is given.
    """

    env_id: str
    control_mode: str
    action_dim: int
    obs_shapes: dict[str, tuple[int, ...]]
    obs_dtypes: dict[str, str]
    recorded_by: str
    num_transitions: int = 0
    num_episodes: int = 0
    num_successes: int = 0


def write_demos(
    directory: str,
    trajectories: Sequence[Trajectory],
    meta: DemoMeta,
    success: Sequence[Sequence[bool]] | None = None,
) -> DemoMeta:
    """Add one file per trajectory to `directory` (created when needed); returns the totals of all its files.

    Args:
        success: of each trajectory, whether each episode that ends in it was a success, in the order of
            `Trajectory.last_index`; `meta.num_successes` is not read then. None: it is not known of each.

    Raises:
        DataError: a trajectory does not fit `meta`, `meta` does not fit what the directory holds, or the disk
            refuses. What was recorded before is as it was.
    """
    target = Path(directory)
    described = _described(meta)
    arrays = [arrays_of(trajectory) for trajectory in trajectories]
    for number, fields in enumerate(arrays):
        _check_fields(fields, meta, f"trajectory {number}")
    entries = [_entry(fields, None if success is None else success[i]) for i, fields in enumerate(arrays)]
    num_successes = meta.num_successes if success is None else sum(map(sum, success))
    try:
        target.mkdir(parents=True, exist_ok=True)
        with locked(target):
            files: list[dict[str, Any]] = []
            if (target / INDEX).exists():
                index = read_index(target)
                files = index["files"]
                num_successes += index["num_successes"]
                for key, value in described.items():
                    if key != "recorded_by" and index[key] != value:
                        raise DataError(
                            f"{target} holds demonstrations with {key}={index[key]}, and these have {key}={value}: "
                            "record them into another directory."
                        )
            for fields, entry in zip(arrays, entries, strict=True):
                name = next_name(files)
                write_atomic(target / name, npz(fields))
                files = [*files, {"file": name, **entry}]
            write_index(target, {**described, "num_successes": num_successes, "files": files})
    except OSError as error:
        raise DataError(
            f"{target} could not be written: {error}. The demonstrations recorded there before are unharmed."
        ) from error
    return _with_totals(meta, num_successes, files)


def read_demos(directory: str) -> tuple[list[Trajectory], DemoMeta]:
    """All recorded segments in the order of recording, and what is known about them.

    `decision` is the executed action, flattened [T, N, H·A]; `log_prob` and `value` are None, `version` is -1.

    Raises DataError naming the directory or file that is missing, empty, corrupt or misshapen.
    """
    source = Path(directory)
    if not source.is_dir():
        raise DataError(f"{source} is no directory: record demonstrations into it first, or mend the path.")
    if not any(source.iterdir()):
        raise DataError(f"{source} is empty: record demonstrations into it first.")
    index = read_index(source)
    if not index["files"]:
        raise DataError(f"{source / INDEX} lists no demonstration: record some first.")
    meta = meta_of(index)
    return [read_file(source / entry["file"], meta) for entry in index["files"]], meta


def meta_of(index: dict[str, Any]) -> DemoMeta:
    """What an index says of its directory."""
    meta = DemoMeta(
        env_id=index["env_id"],
        control_mode=index["control_mode"],
        action_dim=index["action_dim"],
        obs_shapes={path: tuple(shape) for path, shape in index["obs_shapes"].items()},
        obs_dtypes=index["obs_dtypes"],
        recorded_by=index["recorded_by"],
    )
    return _with_totals(meta, index["num_successes"], index["files"])


def check_demos(meta: DemoMeta, spaces: EnvSpaces, control_mode: str | None = None) -> None:
    """Raise one DataError with every way in which demonstrations do not fit an environment.

    Args:
        meta: from `read_demos`.
        spaces: what the environment emits and takes.
        control_mode: the environment's; None skips its comparison.
    """
    problems = []
    if meta.action_dim != spaces.action_dim:
        problems.append(f"actions have {meta.action_dim} elements, the environment takes {spaces.action_dim}")
    if control_mode is not None and meta.control_mode != control_mode:
        problems.append(f"control mode is {meta.control_mode}, the environment's is {control_mode}")
    for path in sorted(meta.obs_shapes.keys() | spaces.obs_shapes.keys()):
        recorded, given = (
            f"{dtypes[path]} {list(shapes[path])}" if path in shapes else "absent"
            for shapes, dtypes in (
                (meta.obs_shapes, meta.obs_dtypes),
                (spaces.obs_shapes, spaces.obs_dtypes),
            )
        )
        if recorded != given:
            problems.append(f"observation leaf '{path}' is {recorded}, the environment's is {given}")
    if problems:
        raise DataError(
            f"The demonstrations of {meta.env_id} ({meta.recorded_by}) do not fit this environment: "
            + "; ".join(problems)
            + ". Record them again with this environment, or change the environment to theirs."
        )


# ---- the index


def write_index(directory: Path, content: dict[str, Any]) -> None:
    """Replace the index, in one step. Raises OSError."""
    write_json(directory / INDEX, {"format": _FORMAT, "version": _VERSION, **content})


def next_name(files: Sequence[dict[str, Any]]) -> str:
    """A name that no file of the index has."""
    numbers = [int(stem) for entry in files if (stem := Path(entry["file"]).stem).isdecimal()]
    return f"{max(numbers, default=-1) + 1:06d}.npz"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Nobody else changes the index meanwhile. Raises DataError when another program does right now."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another program is writing into {directory}: run this again when it is done") from error
        yield
    finally:
        os.close(descriptor)


def _entry(fields: dict[str, np.ndarray], success: Sequence[bool] | None) -> dict[str, Any]:
    """What the index says of a file, without its name."""
    done = (fields["terminated"].any(-1) | fields["truncated"]) & fields["valid"]
    entry: dict[str, Any] = {"transitions": int(fields["valid"].sum()), "episodes": int(done.sum())}
    if success is None:
        return entry
    if len(success) != entry["episodes"]:
        raise DataError(f"{len(success)} successes were given for {entry['episodes']} episodes")
    return entry | {"success": [bool(flag) for flag in success]}


def _described(meta: DemoMeta) -> dict[str, Any]:
    """The part of the index that all its files share, as JSON gives it back."""
    described = asdict(meta)
    for total in ("num_transitions", "num_episodes", "num_successes"):
        del described[total]
    return described | {"obs_shapes": {path: list(shape) for path, shape in meta.obs_shapes.items()}}


def _with_totals(meta: DemoMeta, num_successes: int, files: list[dict[str, Any]]) -> DemoMeta:
    return replace(
        meta,
        num_transitions=sum(entry["transitions"] for entry in files),
        num_episodes=sum(entry["episodes"] for entry in files),
        num_successes=num_successes,
    )


def read_index(directory: Path) -> dict[str, Any]:
    """The index, checked. Raises DataError naming what is wrong with it."""
    try:
        index = read_json(directory / INDEX, _FORMAT, _VERSION)
    except CheckpointError as error:
        raise DataError(f"{error} {_REMEDY}") from error
    missing = [entry for entry in _ENTRIES if entry not in index]
    if missing:
        raise DataError(f"{directory / INDEX} lacks {', '.join(missing)}. {_REMEDY}")
    wrong = [entry for entry, kind in _ENTRIES.items() if not isinstance(index[entry], kind)]
    if wrong:
        raise DataError(f"{directory / INDEX} is damaged: {', '.join(wrong)} cannot be understood. {_REMEDY}")
    files = index["files"]
    needed = {"file", "transitions", "episodes"}
    if not all(isinstance(entry, dict) and needed <= entry.keys() <= needed | {"success"} for entry in files):
        raise DataError(f"{directory / INDEX} lacks part of its list of files. {_REMEDY}")
    return index


def npz(fields: dict[str, np.ndarray]) -> memoryview:
    """An .npz archive; its members have checksums, and none can hold a pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in fields.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return stream.getbuffer()


def arrays_of(trajectory: Trajectory) -> dict[str, np.ndarray]:
    """The fields of one file."""
    named: dict[str, Any] = {"obs": trajectory.obs, "last_obs": trajectory.last_obs}
    for name in ("last_index", "action", "reward", *_FLAGS):
        named[name] = getattr(trajectory, name)
    fields = {
        path: leaf.cpu().numpy() if isinstance(leaf, Tensor) else np.array(leaf, dtype=str)
        for path, leaf in tree.leaves(named)
    }
    return fields | {"source": np.array(trajectory.source), "continues": np.array(trajectory.continues)}


def read_file(path: Path, meta: DemoMeta) -> Trajectory:
    """The trajectory in a file. Raises DataError naming the file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            fields = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is listed in {INDEX} and missing. Put it back, or remove its entry to go on without it."
        ) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is corrupt: {error}. Remove its entry from {INDEX} to go on without it.") from error
    _check_fields(fields, meta, str(path))
    action = torch.from_numpy(fields["action"])
    obs, last_obs = (
        tree.from_leaves({leaf: _leaf(fields[f"{group}/{leaf}"]) for leaf in meta.obs_shapes})
        for group in ("obs", "last_obs")
    )
    terminated, truncated, intervened, valid = (torch.from_numpy(fields[name]) for name in _FLAGS)
    worker, stage = fields["source"].tolist()
    return Trajectory(
        obs=obs,
        last_obs=last_obs,
        last_index=torch.from_numpy(fields["last_index"]),
        decision=action.flatten(2),
        action=action,
        reward=torch.from_numpy(fields["reward"]),
        terminated=terminated,
        truncated=truncated,
        intervened=intervened,
        valid=valid,
        source=(worker, stage),
        continues=bool(fields["continues"]),
    )


def _leaf(array: np.ndarray) -> Tensor | list[Any]:
    return array.tolist() if array.dtype.kind == "U" else torch.from_numpy(array)


def _check_fields(fields: dict[str, np.ndarray], meta: DemoMeta, where: str) -> None:
    """Raise DataError naming `where` and every field that is missing, misshapen or not finite."""
    reward = fields.get("reward", np.zeros(0))
    if reward.ndim != 3:
        raise DataError(f"{where}: reward must be an array [T, N, H] and is {list(reward.shape)}.")
    steps, envs, chunk = reward.shape
    ended = len(fields.get("last_index", ()))
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "reward": ("float32", (steps, envs, chunk)),
        "action": ("float32", (steps, envs, chunk, meta.action_dim)),
        "terminated": ("bool", (steps, envs, chunk)),
        "intervened": ("bool", (steps, envs, chunk)),
        "truncated": ("bool", (steps, envs)),
        "valid": ("bool", (steps, envs)),
        "last_index": ("int64", (ended, 2)),
        "source": ("int64", (2,)),
        "continues": ("bool", ()),
    }
    for leaf, shape in meta.obs_shapes.items():
        expected[f"obs/{leaf}"] = (meta.obs_dtypes[leaf], (steps + 1, envs, *shape))
        expected[f"last_obs/{leaf}"] = (meta.obs_dtypes[leaf], (ended, *shape))
    problems = [f"{name} is not described" for name in fields.keys() - expected.keys()]
    for name, (dtype, shape) in expected.items():
        array = fields.get(name)
        if array is None:
            problems.append(f"{name} is missing")
            continue
        found = "str" if array.dtype.kind == "U" else str(array.dtype)
        if (found, array.shape) != (dtype, shape):
            problems.append(f"{name} is {found} {list(array.shape)}, expected {dtype} {list(shape)}")
        elif array.dtype.kind == "f" and not np.isfinite(array).all():
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        raise DataError(f"{where} does not hold a demonstration: {'; '.join(problems)}.")
