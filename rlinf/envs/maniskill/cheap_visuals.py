"""What software can draw quickly: a robot of a few thousand triangles instead of a hundred thousand.

On a CPU a picture of the Panda as its wheel has it takes 40 ms, at any size, nine tenths of it for vertices that are
smaller than a pixel. Welded into cells of a centimetre and a half (the hand: half a centimetre) it looks the same at
128 pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlinf.envs.coarse_mesh import vertex_normals, weld

CELL_M, FINE_CELL_M = 0.015, 0.006
MIN_FACES = 4

_welded: dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray, np.ndarray] | None] = {}
"""Coarse meshes of this process, by link and part: every further world has the same robot."""


def weld_visuals(entity: Any, *, fine: bool) -> None:
    """Replace the triangle meshes that an entity is drawn with by coarser ones of the same material.

    Args:
        entity: SAPIEN's, of one link.
        fine: for small parts.
    """
    import sapien

    old = entity.find_component_by_type(sapien.render.RenderBodyComponent)
    if old is None:
        return
    new = sapien.render.RenderBodyComponent()
    for i, shape in enumerate(old.render_shapes):
        for j, part in enumerate(shape.parts):
            # Worlds name the same link alike; parts of other robots differ in size.
            key = (entity.name, i, j, len(part.vertices), len(part.triangles))
            if key not in _welded:
                _welded[key] = _coarse(part, np.asarray(shape.scale), FINE_CELL_M if fine else CELL_M)
            mesh = _welded[key]
            if mesh is None:
                continue
            vertices, faces, normals = mesh
            no_texture = np.zeros((len(vertices), 2), np.float32)
            drawn = sapien.render.RenderShapeTriangleMesh(vertices, faces, normals, no_texture, part.material)
            drawn.local_pose = shape.local_pose
            new.attach(drawn)
    entity.remove_component(old)
    entity.add_component(new)


def _coarse(part: Any, scale: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    vertices, faces = weld(np.asarray(part.vertices, np.float64) * scale, np.asarray(part.triangles), cell)
    if len(faces) < MIN_FACES:
        return None
    normals = vertex_normals(vertices, faces)
    return vertices.astype(np.float32), faces.astype(np.uint32), normals.astype(np.float32)
