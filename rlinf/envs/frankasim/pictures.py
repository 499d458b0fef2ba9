"""Pictures of the scene: one OpenGL context per process draws all worlds, and only when somebody looks.

Where no GPU draws, the scene as it is takes half a second for the two cameras of one world: shadow maps, eight
samples per pixel, 190,000 triangles of the robot and 360,000 of the floor, whose grid is a centimetre wide. The
cheap scene leaves out the first two, welds the vertices of the meshes into cells of some millimetres, which at 128
pixels are hardly seen, and gives the floor a coarse grid: four milliseconds. Light adds up over the passes that draw
shadows; in a single pass the floor's texture saturates, so it is made brighter.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlinf.envs.coarse_mesh import mesh_of, put_mesh, weld
from rlinf.envs.frankasim.config import Rendering
from rlinf.envs.frankasim.scene import import_mujoco, read_scene
from rlinf.envs.opengl import draws_in_software, free_context, open_context, release_context

CAMERAS = {"front": "front", "wrist": "handcam_rgb"}
"""Name in the observation → camera of the scene."""

COLLISION_GROUP = 3
GRIPPER_MESHES = ("base_mount", "base", "driver", "coupler", "follower", "pad", "silicone_pad", "spring_link")
ARM_CELL_M, GRIPPER_CELL_M = 0.015, 0.005
FLOOR_GRID_M = 0.25
FLOOR_BRIGHTNESS = 1.8
MAX_DRAWN = 200
"""Geometries in one picture; the scene has 62."""


class Painter:
    """Draws worlds of the scene.

    The context is current in no thread between calls, so any thread may draw, one at a time.

    Args:
        physics: the compiled scene.
        width, height: largest picture in pixels.
        rendering: `auto`, `cheap` or `full`.
        read: the scene from which `physics` was compiled, as a fresh `MjSpec`.

    Raises:
        MissingDependency: no OpenGL context can be made here.
    """

    def __init__(
        self, physics: Any, width: int, height: int, rendering: Rendering, read: Callable[[], Any] = read_scene
    ) -> None:
        self._mujoco = mujoco = import_mujoco()
        self._lock = threading.Lock()
        context = open_context(width, height, "take the state: gym_id: PandaPickCube-v0")
        self.cheap = rendering == "cheap" or (rendering == "auto" and draws_in_software())
        self._model = model = cheap_model(physics, read) if self.cheap else read().compile()
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        self._data = mujoco.MjData(model)
        self._scene = mujoco.MjvScene(model, MAX_DRAWN)
        self._options, self._perturbation = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._buffers = buffers = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, buffers)
        self._context = context
        release_context()
        self._finalizer = weakref.finalize(self, free_context, context, [buffers])

    def draw(self, worlds: Sequence[Any], camera: str, pictures: np.ndarray) -> None:
        """Fill `pictures`, uint8 [len(worlds), height, width, 3], with what a camera of the scene sees."""
        mujoco, model, data = self._mujoco, self._model, self._data
        height, width = pictures.shape[1:3]
        view = mujoco.MjrRect(0, 0, width, height)
        upside_down = np.empty((height, width, 3), np.uint8)
        self._camera.fixedcamid = model.camera(camera).id
        with self._lock:
            self._context.make_current()
            for world, picture in zip(worlds, pictures, strict=True):
                data.qpos[:], data.mocap_pos[:], data.mocap_quat[:] = world.qpos, world.mocap_pos, world.mocap_quat
                mujoco.mj_kinematics(model, data)
                mujoco.mj_comPos(model, data)
                mujoco.mj_camlight(model, data)
                everything = mujoco.mjtCatBit.mjCAT_ALL
                mujoco.mjv_updateScene(
                    model, data, self._options, self._perturbation, self._camera, everything, self._scene
                )
                mujoco.mjr_render(view, self._scene, self._buffers)
                mujoco.mjr_readPixels(upside_down, None, view, self._buffers)
                picture[:] = upside_down[::-1]
            release_context()

    def close(self) -> None:
        """Free the context. Calling it twice is allowed."""
        self._finalizer()


# ---- the scene


def cheap_model(physics: Any, read: Callable[[], Any] = read_scene) -> Any:
    """The scene without shadows, smoothed edges, small parts and what is not seen.

    Args:
        physics: the compiled scene, for its meshes.
        read: the scene from which it was compiled.
    """
    spec = read()
    for unseen in [*spec.sensors, *(geom for geom in spec.geoms if geom.group == COLLISION_GROUP)]:
        spec.delete(unseen)
    for mesh in list(spec.meshes):
        mesh.name = mesh.name or Path(mesh.file).stem
        cell = GRIPPER_CELL_M if mesh.name in GRIPPER_MESHES else ARM_CELL_M
        vertices, faces = weld(*mesh_of(physics, mesh.name), cell)
        put_mesh(spec, mesh, vertices, faces)
    spec.geom("floor").size[2] = FLOOR_GRID_M
    model = spec.compile()
    model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
    model.light_castshadow[:] = 0
    model.mat_reflectance[:] = 0
    _brighten(model, "grid", FLOOR_BRIGHTNESS)
    return model


def _brighten(model: Any, texture: str, factor: float) -> None:
    i = model.texture(texture).id
    size = model.tex_height[i] * model.tex_width[i] * model.tex_nchannel[i]
    pixels = model.tex_data[model.tex_adr[i] :][:size]
    pixels[:] = np.minimum(pixels * factor, 255).astype(np.uint8)
