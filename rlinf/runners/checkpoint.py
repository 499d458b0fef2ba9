"""Checkpoints on disk: written completely or not at all, found again, verified before they are read.

    <directory>/global_step_120/    manifest.json      what follows, with sizes and checksums
                                    model.safetensors  the acting policy
                                    learner.pt         networks, optimizers, counters, generators
                                    buffers/<name>/    experience; of several learner ranks in rank_<r>/ each
                                    workers.pt         environments and exploration noise
    <directory>/latest              link to the newest complete one

A checkpoint is written into `.writing-*` and renamed when every byte is on the disk, so whatever is called
`global_step_<N>` is complete, and a crash at any moment leaves the one before as `latest`.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rlinf
from rlinf.core.errors import CheckpointError
from rlinf.data.columns import sync_path
from rlinf.runners.crew import Crew
from rlinf.workers.env_worker import EnvWorker
from rlinf.workers.learner_worker import POLICY_FILE, LearnerWorker, Progress
from rlinf.workers.rollout_worker import RolloutWorker
from rlinf.workers.state_files import load_state, load_weights, save_state

_LOG = logging.getLogger(__name__)

FORMAT = "rlinf-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
WORKERS_FILE = "workers.pt"
NAME = re.compile(r"(?:\.replaced-)?global_step_(\d+)")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself. `files` are relative paths with (bytes, CRC-32)."""

    global_step: int
    progress: Progress
    saved_at: float
    versions: dict[str, str]
    files: dict[str, tuple[int, int]]


class CheckpointStore:
    """The checkpoints of one run in `directory`; the newest `keep` stay, all of them if it is 0.

    `config` goes into every checkpoint as config.json, so that one copied elsewhere explains itself.
    """

    def __init__(self, directory: str | Path, *, keep: int = 0, config: dict[str, Any] | None = None) -> None:
        self.directory, self.keep, self.config = Path(directory), keep, config

    def write(self, global_step: int, fill: Callable[[Path], Progress]) -> Path:
        """Make a checkpoint of what `fill` writes into the directory that it is given.

        Raises CheckpointError when it cannot be written; then nothing has changed.
        """
        target = self.directory / f"global_step_{global_step}"
        writing = self.directory / f".writing-{target.name}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._sweep()
            writing.mkdir()
            progress = fill(writing)
            if self.config is not None:
                (writing / "config.json").write_text(json.dumps(self.config, indent=1))
            _write_manifest(writing, global_step, progress)
            _sync_tree(writing)
            self._move_in(writing, target)
        except (OSError, CheckpointError) as error:
            shutil.rmtree(writing, ignore_errors=True)
            raise CheckpointError(
                f"no checkpoint was written for step {global_step}: {error}. Checkpoints written before are "
                f"intact. {self._free_space()}"
            ) from error
        self._prune(target)
        return target

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        link = self.directory / LATEST
        if (link / MANIFEST).is_file():
            return link.resolve()
        complete = [path for path in self._named() if (path / MANIFEST).is_file()]
        return max(complete, key=_saved_at) if complete else None

    def _named(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return [path for path in self.directory.iterdir() if NAME.fullmatch(path.name)]

    def _move_in(self, writing: Path, target: Path) -> None:
        replaced = self.directory / f".replaced-{target.name}"
        if target.exists():
            target.rename(replaced)
        writing.rename(target)
        link = self.directory / f".{LATEST}"
        link.symlink_to(target.name)
        link.replace(self.directory / LATEST)
        sync_path(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what a killed run left half done."""
        for path in self.directory.glob(".writing-*"):
            shutil.rmtree(path)
        (self.directory / f".{LATEST}").unlink(missing_ok=True)
        for path in self.directory.glob(".replaced-*"):
            whole = self.directory / path.name.removeprefix(".replaced-")
            if whole.exists():
                shutil.rmtree(path)
            else:
                path.rename(whole)

    def _prune(self, newest: Path) -> None:
        if not self.keep:
            return
        others = sorted((path for path in self._named() if path != newest), key=_saved_at, reverse=True)
        for path in others[self.keep - 1 :]:
            # Renamed first: a deletion cut short must not leave something that looks complete.
            trash = path.with_name(f".writing-{path.name}")
            path.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)

    def _free_space(self) -> str:
        directory = next(path for path in (self.directory, *self.directory.parents) if path.exists())
        return f"{shutil.disk_usage(directory).free / 2**20:,.0f} MiB are free in {directory}"


def save_run(store: CheckpointStore, crew: Crew, global_step: int, *, exact: bool = True) -> Path:
    """Write a checkpoint of the whole run; every worker then goes on as if it had been resumed from it.

    Without `exact` only the learner is asked, because the others have failed or hang: a resumed run then
    begins fresh episodes with fresh noise. Raises CheckpointError.
    """

    def fill(directory: Path) -> Progress:
        workers: dict[str, Any] = {"env": [], "rollout": []}
        if exact:
            workers["env"] = crew.env.run(EnvWorker.checkpoint, global_step).wait()
            workers["rollout"] = crew.rollout.run(RolloutWorker.checkpoint).wait()
        # Without hurry: a large replay buffer may take longer to write than a stop may take otherwise.
        results = crew.learner.run(_try_to_save, directory).wait(hurry=False)
        for result in results:
            if not isinstance(result, Progress):
                raise result
        save_state(directory / WORKERS_FILE, workers)
        assert isinstance(results[0], Progress)
        return results[0]

    return store.write(global_step, fill)


def _try_to_save(worker: LearnerWorker, directory: Path) -> Progress | OSError | CheckpointError:
    """What went wrong as a result: all ranks come to an end, and the run may go on without this checkpoint."""
    try:
        return worker.save(directory)
    except (OSError, CheckpointError) as error:
        return error


def load_run(crew: Crew, path: str | Path) -> int:
    """Bring every worker to the state of the checkpoint at `path` (see `find`). Returns its global step.

    Where another number of workers wrote it, environments begin fresh episodes and policies new noise; a warning says
    so. Another number of learners deals out its buffers anew.

    Raises CheckpointError naming the file and the remedy when it is missing, damaged or does not fit.
    """
    directory = find(path)
    step = verify(directory).global_step
    crew.learner.run(LearnerWorker.load, directory).wait()
    workers = load_state(directory / WORKERS_FILE)
    env = _states(directory, "env", workers, len(crew.env))
    crew.env.run_each(EnvWorker.restore, [(step, state) for state in env]).wait()
    rollout = _states(directory, "rollout", workers, len(crew.rollout))
    crew.rollout.run_each(RolloutWorker.restore, [(step, state) for state in rollout]).wait()
    return step


def _states(directory: Path, role: str, workers: dict[str, Any], number: int) -> list[dict[str, Any]]:
    states = workers.get(role) or [{}] * number
    if len(states) == number:
        return states
    _LOG.warning(
        "%s was saved by a run with %d %s workers and this one has %d: they begin anew",
        directory,
        len(states),
        role,
        number,
    )
    return [{}] * number


def load_policy(path: str | Path) -> tuple[int, dict[str, Tensor]]:
    """(version, acting weights) of the checkpoint at `path`, which may also be a safetensors file itself.

    Raises CheckpointError naming the file and the remedy.
    """
    path = Path(path)
    if path.is_file():
        return load_weights(path)
    directory = find(path)
    verify(directory, only=POLICY_FILE)
    return load_weights(directory / POLICY_FILE)


def find(path: str | Path) -> Path:
    """The checkpoint meant by a run directory, its `checkpoints`, `latest` or a `global_step_<N>`.

    Raises CheckpointError when there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path.resolve()
    if not path.is_dir():
        raise CheckpointError(
            f"{path} does not exist or is no directory; give a run's directory, its checkpoints/ or one "
            "checkpoints/global_step_<N>"
        )
    if NAME.fullmatch(path.name):
        raise CheckpointError(
            f"{path} has no {MANIFEST}: it is incomplete or was not written by rlinf; choose another "
            f"checkpoint in {path.parent}"
        )
    inner = path / "checkpoints"
    latest = CheckpointStore(inner if inner.is_dir() else path).latest()
    if latest is None:
        raise CheckpointError(f"{path} holds no complete checkpoint; choose another run or train from the start")
    return latest


def verify(directory: Path, *, only: str | None = None) -> Manifest:
    """The manifest, after every file (or just `only`) was compared with it. Raises CheckpointError."""
    manifest = _read_manifest(directory)
    for name, (size, checksum) in manifest.files.items():
        path = directory / name
        if only is not None and name != only:
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; choose another checkpoint in {directory.parent}")
        if (found := path.stat().st_size) != size:
            raise CheckpointError(
                f"{path} has {found} bytes instead of {size}: it was cut off or changed; choose another "
                f"checkpoint in {directory.parent}"
            )
        if _checksum(path) != checksum:
            raise CheckpointError(
                f"{path} does not have the content that was saved; choose another checkpoint in {directory.parent}"
            )
    return manifest


def _write_manifest(directory: Path, global_step: int, progress: Progress) -> None:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    manifest = Manifest(
        global_step=global_step,
        progress=progress,
        saved_at=time.time(),
        versions={"rlinf": rlinf.__version__, "torch": torch.__version__, "numpy": np.__version__},
        files={path.relative_to(directory).as_posix(): (path.stat().st_size, _checksum(path)) for path in paths},
    )
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest)}
    (directory / MANIFEST).write_text(json.dumps(content, indent=1))


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; choose another checkpoint") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); choose another checkpoint") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} was not written by rlinf; choose another checkpoint")
    if (version := content.pop("format_version", None)) != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this rlinf reads {FORMAT_VERSION}; use the version that "
            f"wrote it: {content.get('versions')}"
        )
    try:
        files = {name: (int(size), int(checksum)) for name, (size, checksum) in content.pop("files").items()}
        return Manifest(progress=Progress(**content.pop("progress")), files=files, **content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); choose another checkpoint") from error


def _saved_at(directory: Path) -> float:
    try:
        return _read_manifest(directory).saved_at
    except CheckpointError:
        return 0.0


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        sync_path(path)
    sync_path(directory)
