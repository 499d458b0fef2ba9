"""Cameras of the twin: drawn when somebody looks."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlinf.envs.realworld.arms.twin import TwinArm
from rlinf.envs.realworld.cameras.camera import CameraError

VIEWS = {"wrist": "peg_view", "front": "front"}
"""Name of a view → camera of the scene."""


class TwinSource:
    """What one camera of the station sees.

    Args:
        twin: the station.
        view: `wrist` or `front`.
        height, width: of the picture in pixels.
        rendering: `auto`, `cheap` or `full`; see `frankasim.pictures`.
    """

    on_demand = True

    def __init__(
        self, twin: TwinArm, view: str = "wrist", height: int = 128, width: int = 128, rendering: str = "auto"
    ) -> None:
        if view not in VIEWS:
            raise CameraError(f"the twin has no view {view}; it has {', '.join(VIEWS)}")
        self._twin, self._view, self._size, self._rendering = twin, VIEWS[view], (height, width), rendering

    def open(self) -> None:
        """Nothing yet: OpenGL starts with the first picture."""

    def read(self) -> np.ndarray:
        """The picture of this moment. Raises MissingDependency where nothing draws."""
        picture = np.empty((1, *self._size, 3), np.uint8)
        _painter_of(self._twin, *self._size, self._rendering).draw([self._twin.snapshot()], self._view, picture)
        return picture[0]

    def close(self) -> None:
        """Nothing: the painter belongs to the station."""


def _painter_of(twin: TwinArm, height: int, width: int, rendering: str) -> Any:
    """The one that draws all views of a station at one size; kept with the station."""
    from rlinf.envs.frankasim.pictures import Painter
    from rlinf.envs.realworld.arms.twin_scene import station_spec

    key = (height, width, rendering)
    painters = twin.painters
    if key not in painters:
        painters[key] = Painter(twin.model, width, height, rendering, station_spec)  # type: ignore[arg-type]
    return painters[key]
