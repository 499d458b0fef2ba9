"""The digital twin with RLinf-Co's published objects, plate and table.

MANISKILL_ASSET_DIR names a folder that holds, itself or one level down,

    more_carrot/model_db.json, more_carrot/<name>/    the objects: collision.obj and textured.glb, .obj or .dae
    more_plate/model_db.json, more_plate/<name>/      plates, of which the first is used
    bridge_table_long.glb                             the table

`model_db.json` maps names to `bbox` {min, max} in m, and possibly `density` in kg/m³ and `scale`, a list of which the
first is taken. The photographs that the published task lays behind its pictures (`more_table`) are not used.

The file of the table is only drawn; things lie on the twin's own. Written from what is known of these files: run with
stand-ins of that form, never with the published ones.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mani_skill.utils.registration import register_env

from rlinf.core.errors import DataError, MissingDependency
from rlinf.envs.maniskill.config import PUBLISHED_TWIN_TASK, TWIN_TASK
from rlinf.envs.maniskill.twin_task import PickAndPlace, pose_of

VARIABLE = "MANISKILL_ASSET_DIR"
OBJECTS, PLATES, TABLE, MODELS = "more_carrot", "more_plate", "bridge_table_long.glb", "model_db.json"
VISUALS = ("textured.glb", "textured.obj", "textured.dae")

BASE_PLACE = np.array((0.3, 0.028, 0.870))
"""The robot's base in the published world, in which it looks along −x."""
TABLE_PLACE = np.array((2.0634, 2.8313, 0.0))
"""Origin of the table's file in that world; the file's y is up, as in all of its kind."""


@dataclass(frozen=True)
class Model:
    """One object's files and sizes in m."""

    folder: Path
    half_size: tuple[float, float, float]
    density: float
    scale: float


@dataclass(frozen=True)
class Assets:
    """What the published task is built of."""

    objects: list[Model]
    plate: Model
    table: Path


def find_assets() -> Assets:
    """The published objects, plate and table.

    Raises:
        MissingDependency: the variable is not set, or what it names lacks some of them.
        DataError: a `model_db.json` cannot be understood.
    """
    root = os.environ.get(VARIABLE, "")
    instead = f"for the task that needs no download set env.*.init_params.id to {TWIN_TASK}"
    if not root:
        raise MissingDependency(
            f"{PUBLISHED_TWIN_TASK} needs RLinf-Co's objects: set {VARIABLE} to the folder with {OBJECTS}, {PLATES} "
            f"and {TABLE}; {instead}"
        )
    wanted = (f"{OBJECTS}/{MODELS}", f"{PLATES}/{MODELS}", TABLE)
    found = {name: _find(Path(root), name) for name in wanted}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise MissingDependency(f"{VARIABLE}={root} holds no {', no '.join(missing)}; {instead}")
    objects, plates, table = (path for path in found.values() if path is not None)
    return Assets(_models(objects), _models(plates)[0], table)


def _find(root: Path, name: str) -> Path | None:
    """A file of the folder or of one of the folders in it."""
    candidates = [root / name, *sorted(root.glob(f"*/{name}"))]
    return next((path for path in candidates if path.is_file()), None)


def _models(database: Path) -> list[Model]:
    try:
        entries = json.loads(database.read_text())
        models = []
        for name, entry in entries.items():
            scale = float((entry.get("scale") or [1.0])[0])
            size = (np.array(entry["bbox"]["max"], float) - np.array(entry["bbox"]["min"], float)) * scale
            x, y, z = (size / 2).tolist()
            models.append(Model(database.parent / name, (x, y, z), float(entry.get("density", 1000.0)), scale))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{database} is not a table of models with bbox, density and scale: {error!r}") from error
    if not models:
        raise DataError(f"{database} names no models")
    return models


@register_env(PUBLISHED_TWIN_TASK, max_episode_steps=80)
class PublishedTwin(PickAndPlace):
    """The published objects, one of them per episode, and the published plate as the tray."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self._assets = find_assets()
        x, y, z = self._assets.plate.half_size
        self.tray_inner, self.tray_floor, self.tray_height = (x, y), z, z
        self.half_heights = [model.half_size[2] for model in self._assets.objects]
        super().__init__(*arguments, **keywords)

    def _load_things(self) -> None:
        builder = self.scene.create_actor_builder()
        # Half a turn about z into the frame of the robot, and a quarter about x to lay the file's y upward.
        place = (TABLE_PLACE - BASE_PLACE) * (-1, -1, 1)
        half = np.sqrt(0.5)
        builder.add_visual_from_file(str(self._assets.table), pose=pose_of((0, 0, 0), (half, half, 0, 0)))
        builder.initial_pose = pose_of(place, (0, 0, 0, 1))
        builder.build_static(name="arena")

        self.tray = self._build(self._assets.plate, "tray", pose_of((0.45, -0.1, self.tray_height)), fixed=True)
        self.objects = [
            self._build(model, model.folder.name, pose_of(self._stored_at(i)), fixed=False)
            for i, model in enumerate(self._assets.objects)
        ]

    def _build(self, model: Model, name: str, place: Any, *, fixed: bool) -> Any:
        visual = next((model.folder / file for file in VISUALS if (model.folder / file).is_file()), None)
        collision = model.folder / "collision.obj"
        if visual is None or not collision.is_file():
            raise DataError(f"{model.folder} needs collision.obj and one of {', '.join(VISUALS)}")
        scale = (model.scale,) * 3
        builder = self.scene.create_actor_builder()
        builder.add_multiple_convex_collisions_from_file(
            str(collision), scale=scale, material=self._surface(), density=model.density
        )
        builder.add_visual_from_file(str(visual), scale=scale)
        builder.initial_pose = place
        return builder.build_kinematic(name=name) if fixed else builder.build(name=name)
