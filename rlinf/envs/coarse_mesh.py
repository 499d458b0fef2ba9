"""Meshes with fewer triangles, for pictures that a processor draws."""

from __future__ import annotations

from typing import Any

import numpy as np

FLAT_M = 1e-4
"""A welded mesh thinner than this has no volume left, and is left out: screws, lamps, labels."""


def mesh_of(model: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] in m in the frame of the mesh's file, and faces [F, 3], of a compiled scene."""
    import mujoco

    i = model.mesh(name).id
    vertices = model.mesh_vert[model.mesh_vertadr[i] :][: model.mesh_vertnum[i]].astype(np.float64)
    faces = model.mesh_face[model.mesh_faceadr[i] :][: model.mesh_facenum[i]]
    turn = np.zeros(9)
    mujoco.mju_quat2Mat(turn, model.mesh_quat[i])
    return vertices @ turn.reshape(3, 3).T + model.mesh_pos[i], faces


def weld(vertices: np.ndarray, faces: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """A coarser mesh: the vertices of each cubic cell become their mean, and what is no triangle then is dropped."""
    _, group = np.unique(np.round(vertices / cell).astype(np.int64), axis=0, return_inverse=True)
    group = group.ravel()
    sums = np.stack([np.bincount(group, vertices[:, k]) for k in range(3)], 1)
    welded = sums / np.bincount(group)[:, None]
    corners = group[faces]
    whole = (corners != np.roll(corners, 1, 1)).all(1)
    corners = corners[whole]
    _, once = np.unique(np.sort(corners, 1), axis=0, return_index=True)
    return welded, corners[np.sort(once)]


def put_mesh(spec: Any, mesh: Any, vertices: np.ndarray, faces: np.ndarray) -> None:
    """Give a mesh of an `MjSpec` this form; without users or volume it goes, and the geoms that show it, too."""
    import mujoco

    users = [geom for geom in spec.geoms if geom.meshname == mesh.name]
    if not users or len(faces) == 0 or is_flat(vertices):
        for geom in users:
            spec.delete(geom)
        spec.delete(mesh)
        return
    mesh.file, mesh.scale = "", (1, 1, 1)
    mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL  # welded meshes are not watertight
    mesh.uservert, mesh.userface = vertices.astype(np.float32).ravel(), faces.astype(np.int32).ravel()


def is_flat(vertices: np.ndarray) -> bool:
    """Whether points lie nearly in a plane, so that MuJoCo takes them for no mesh."""
    return len(vertices) < 4 or np.linalg.matrix_rank(vertices - vertices.mean(0), tol=FLAT_M) < 3


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit normals [V, 3]: the mean of those of the faces around each vertex, larger faces counting more."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    doubled = np.cross(b - a, c - a)
    normals = np.zeros_like(vertices)
    for k in range(3):
        np.add.at(normals, faces[:, k], doubled)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return normals / np.maximum(length, 1e-12)
