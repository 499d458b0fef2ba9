"""The installed package `hf-libero`: where it lies, what it lacks, and how it is imported without side effects.

The wheel holds the tasks and their stored initial states. Scenes and objects it downloads when an environment is
built; here nothing is downloaded, and one message says what to fetch.
"""

from __future__ import annotations

import codecs
import importlib.util
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import yaml

from rlinf.core.errors import MissingDependency
from rlinf.envs.libero.config import LiberoConfig, SuiteName
from rlinf.envs.libero.reset_ids import Trials
from rlinf.envs.opengl import import_mujoco

INSTALL_COMMAND = "bash requirements/install.sh embodied --env libero"
ASSET_FOLDERS = ("scenes", "articulated_objects", "stable_scanned_objects", "stable_hope_objects", "turbosquid_objects")

BUILDING = threading.Lock()
"""LIBERO and robosuite keep what they build from in variables of their modules, and draw from numpy's old generator."""


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    Attributes:
        name: as LIBERO calls it.
        language: what the arm is told.
        problem_file: its description in BDDL.
        states: stored initial states, float64 [trials, 1 + nq + nv]: time, positions, velocities.
    """

    name: str
    language: str
    problem_file: Path
    states: np.ndarray


@dataclass(frozen=True)
class Suite:
    """The tasks of a suite and what their scenes are built from."""

    name: SuiteName
    tasks: tuple[Task, ...]
    assets: Path

    @property
    def trials(self) -> Trials:
        """Its reset ids."""
        return Trials(tuple(len(task.states) for task in self.tasks))


def package_folder() -> Path:
    """Where LIBERO is installed. Raises MissingDependency where it is not."""
    found = importlib.util.find_spec("libero")
    for place in (found.submodule_search_locations or []) if found else []:
        if (folder := Path(place) / "libero" / "bddl_files").is_dir():
            return folder.parent
    raise MissingDependency(f"LIBERO is not installed; run `{INSTALL_COMMAND}`")


def open_suite(config: LiberoConfig) -> Suite:
    """The suite of a configuration, with everything that its tasks need to be built.

    Raises:
        MissingDependency: the package or its assets are not here.
    """
    folder = package_folder()
    assets = find_assets(config)
    prepare_import()
    try:
        from libero.libero.benchmark import task_maps
    except ImportError as error:
        raise MissingDependency(f"LIBERO cannot be imported ({error}); run `{INSTALL_COMMAND}`") from error
    tasks = tuple(
        Task(
            name=task.name,
            language=task.language,
            problem_file=folder / "bddl_files" / task.problem_folder / task.bddl_file,
            states=read_states(folder / "init_files" / task.problem_folder / task.init_states_file),
        )
        for task in task_maps[config.task_suite_name].values()
    )
    return Suite(config.task_suite_name, tasks, assets)


def read_states(path: Path) -> np.ndarray:
    """Stored initial states, float64 [trials, 1 + nq + nv]. No code in the file is run.

    Raises:
        MissingDependency: the file is not there or holds something else.
    """
    # What numpy's arrays are pickled with, under the present names and those of numpy 1.
    reconstruct = np.empty(0).__reduce__()[0]
    harmless: list[Any] = [
        reconstruct,
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (codecs.encode, "_codecs.encode"),
        np.ndarray,
        np.dtype,
        type(np.dtype(np.float64)),
    ]
    try:
        with torch.serialization.safe_globals(harmless):
            states = torch.load(path, weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingDependency(f"{path} cannot be read ({reason}); run `{INSTALL_COMMAND}`") from error
    if not isinstance(states, np.ndarray) or states.ndim != 2 or len(states) == 0:
        raise MissingDependency(f"{path} holds no initial states; run `{INSTALL_COMMAND}`")
    return states


# ---- scenes and objects


def find_assets(config: LiberoConfig) -> Path:
    """Folder of the scenes and objects.

    Raises:
        MissingDependency: it is not here; with what to fetch and where to put it.
    """
    if config.use_standin_assets:
        from rlinf.envs.libero.standin import standin_folder

        return standin_folder()
    if config.assets_dir is not None:
        places = [Path(config.assets_dir).expanduser()]
    else:
        places = [package_folder() / "assets", Path.home() / ".cache" / "libero" / "assets"]
    for place in places:
        if all((place / folder).is_dir() for folder in ASSET_FOLDERS):
            return place
    raise MissingDependency(
        f"LIBERO's scenes and objects are not here (looked in {' and '.join(map(str, places))}; the package brings "
        f"none): run `hf download lerobot/libero-assets --repo-type dataset --local-dir {places[-1]}` (206 MB; `hf` "
        "comes with the package huggingface_hub), or name a folder that holds them with env.*.assets_dir, or set "
        "env.*.use_standin_assets: True for simple shapes of our own, which trained policies do not know"
    )


# ---- imports


def prepare_import() -> None:
    """Write what LIBERO's first import would otherwise ask for on the terminal."""
    folder = package_folder()
    named = os.environ.get("LIBERO_CONFIG_PATH")
    if named and (Path(named) / "config.yaml").is_file():
        return  # somebody answered already
    content = yaml.safe_dump(
        {
            "benchmark_root": str(folder),
            "bddl_files": str(folder / "bddl_files"),
            "init_states": str(folder / "init_files"),
            "datasets": str(folder.parent / "datasets"),
            "assets": str(folder / "assets"),
        }
    )
    place = Path(named) if named else own_folder()
    try:
        keep_file(place / "config.yaml", content.encode())
    except OSError as error:
        raise MissingDependency(f"{error}; set LIBERO_CONFIG_PATH to a folder that can be written") from error
    os.environ["LIBERO_CONFIG_PATH"] = str(place)


def import_problems() -> Any:
    """LIBERO's environments by lower-case name of their class (`TASK_MAPPING`).

    Raises:
        MissingDependency: LIBERO, robosuite or MuJoCo cannot be imported.
    """
    import_mujoco(INSTALL_COMMAND)
    prepare_import()
    try:
        with BUILDING:
            if "robosuite" not in sys.modules:
                _import_robosuite()
            from libero.libero.envs import TASK_MAPPING
    except ImportError as error:
        raise MissingDependency(f"LIBERO cannot be imported ({error}); run `{INSTALL_COMMAND}`") from error
    return TASK_MAPPING


def _import_robosuite() -> None:
    """Import robosuite without its advice, its choice of OpenGL, and its log in /tmp, which may be another user's."""
    package = importlib.util.find_spec("robosuite")
    if package is None or not package.submodule_search_locations:
        raise ImportError("robosuite is not installed")
    path = Path(package.submodule_search_locations[0]) / "macros.py"
    spec = importlib.util.spec_from_file_location("robosuite.macros", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"robosuite has no {path}")
    macros = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL = None  # type: ignore[attr-defined]
    macros.CONSOLE_LOGGING_LEVEL = "ERROR"  # type: ignore[attr-defined]
    sys.modules.setdefault(
        "robosuite.macros_private", ModuleType("robosuite.macros_private")
    )  # it advises to write one
    macros.MUJOCO_GPU_RENDERING = False  # type: ignore[attr-defined]
    # Compiled functions are kept beside the package or in the user's cache; where neither is, asking for it fails.
    macros.CACHE_NUMBA = os.access(path.parent, os.W_OK) or os.access(Path.home(), os.W_OK)  # type: ignore[attr-defined]
    chosen = os.environ.get("MUJOCO_GL")
    sys.modules["robosuite.macros"] = macros
    try:
        os.environ["MUJOCO_GL"] = "disabled"  # we draw; and without OpenGL robosuite could not be imported
        import robosuite

        robosuite.macros = macros
        logging.getLogger("robosuite_logs").propagate = False
    finally:
        if chosen is None:
            del os.environ["MUJOCO_GL"]
        else:
            os.environ["MUJOCO_GL"] = chosen
        if "robosuite" not in sys.modules:
            del sys.modules["robosuite.macros"]


@contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """Numpy's old generator, from which LIBERO draws, begins at `seed`; afterwards it is as it was."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def own_folder() -> Path:
    """A folder that only this installation or this user can write: where small files are kept between runs."""
    shared = Path(sys.prefix) / "share" / "libero"
    try:
        shared.mkdir(parents=True, exist_ok=True)
        if os.access(shared, os.W_OK):
            return shared
    except OSError:
        pass
    private = Path(tempfile.gettempdir()) / f"rlinf-libero-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    if private.stat().st_uid != os.getuid():
        raise MissingDependency(f"{private} belongs to somebody else; remove it, or set TMPDIR to another folder")
    return private


def keep_file(path: Path, content: bytes) -> None:
    """Write the file unless it says so already; other processes see it whole or not at all."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
        part.write(content)
    os.chmod(part.name, 0o644)  # others may use the same environment
    os.replace(part.name, path)


if __name__ == "__main__":
    prepare_import()
