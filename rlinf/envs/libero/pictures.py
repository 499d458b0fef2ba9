"""Pictures of scenes: one OpenGL context per process, in which every scene that is looked at has its textures.

Where no GPU draws, the two pictures of a world take a tenth of a second: shadow maps, four samples per pixel, 150,000
triangles of the arm. The cheap scene leaves out the first two and welds the vertices of the arm's meshes into cells of
some millimetres; LIBERO's own objects stay as they are.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlinf.envs.coarse_mesh import mesh_of, put_mesh, weld
from rlinf.envs.libero.config import Rendering
from rlinf.envs.libero.scene import Scene, World
from rlinf.envs.opengl import draws_in_software, free_context, open_context, release_context

CAMERAS = {"main": "agentview", "wrist": "robot0_eye_in_hand"}
"""Name in the observation → camera of the scene."""

COLLISION_GROUP, VISUAL_GROUP = 0, 1
ROBOT_PREFIXES = ("robot0_", "mount0_", "gripper0_")
ARM_CELL_M, GRIPPER_CELL_M = 0.015, 0.005
MAX_DRAWN = 2000
"""Geometries in one picture."""

_COARSE: dict[tuple[str, float], tuple[np.ndarray, np.ndarray]] = {}
"""(file, cell) → welded mesh: the arm is the same in every scene."""


@dataclass
class View:
    """What is drawn of a scene.

    Attributes:
        model: MuJoCo's model: the scene's own, or its cheap form.
        data: of the cheap form; None for the scene's own, of which every world has its data.
        items: the list of geometries in a picture, filled anew for each.
        buffers: textures, meshes and the picture, in OpenGL's memory.
    """

    model: Any
    data: Any
    items: Any
    buffers: Any


class Painter:
    """Draws worlds of several scenes.

    The context is current in no thread between calls, so any thread may draw, one at a time.

    Args:
        width, height: largest picture in pixels.
        rendering: `auto`, `cheap` or `full`.

    Raises:
        MissingDependency: no OpenGL context can be made here.
    """

    def __init__(self, width: int, height: int, rendering: Rendering) -> None:
        import mujoco

        self._mujoco, self._width, self._height = mujoco, width, height
        self._lock = threading.Lock()
        self._context = open_context(width, height)
        self.cheap = rendering == "cheap" or (rendering == "auto" and draws_in_software())
        release_context()
        self._views: dict[Scene, View] = {}
        self._buffers: list[Any] = []
        self._options, self._perturbation = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._options.geomgroup[COLLISION_GROUP], self._options.geomgroup[VISUAL_GROUP] = 0, 1
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._finalizer = weakref.finalize(self, free_context, self._context, self._buffers)
        # Of its own accord it would run at exit only after MuJoCo has closed the display.
        self._finalizer.atexit = False
        atexit.register(self._finalizer)

    def draw(self, scene: Scene, world: World, camera: str, picture: np.ndarray) -> None:
        """Fill `picture`, uint8 [height, width, 3], with what a camera of the scene sees, the right way up."""
        mujoco = self._mujoco
        height, width = picture.shape[:2]
        area = mujoco.MjrRect(0, 0, width, height)
        upside_down = np.empty((height, width, 3), np.uint8)
        scene.dress(world)
        with self._lock:
            self._context.make_current()
            view = self._view(scene)
            data = world.physics if view.data is None else self._follow(view, scene, world)
            self._camera.fixedcamid = view.model.camera(camera).id
            everything = mujoco.mjtCatBit.mjCAT_ALL
            mujoco.mjv_updateScene(
                view.model, data, self._options, self._perturbation, self._camera, everything, view.items
            )
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, view.buffers)
            mujoco.mjr_render(area, view.items, view.buffers)
            mujoco.mjr_readPixels(upside_down, None, area, view.buffers)
            release_context()
        picture[:] = upside_down[::-1]

    def forget(self, scene: Scene) -> None:
        """Free what is kept for a scene."""
        with self._lock:
            if (view := self._views.pop(scene, None)) is not None:
                self._context.make_current()
                self._buffers.remove(view.buffers)
                view.buffers.free()
                release_context()

    def close(self) -> None:
        """Free the context. Calling it twice is allowed."""
        self._views.clear()
        self._finalizer()
        atexit.unregister(self._finalizer)

    def _view(self, scene: Scene) -> View:
        """What is drawn of a scene, made when it is drawn for the first time; the context is current."""
        if scene not in self._views:
            mujoco, model = self._mujoco, cheap_model(scene) if self.cheap else scene.model
            model.vis.global_.offwidth, model.vis.global_.offheight = self._width, self._height
            data = mujoco.MjData(model) if self.cheap else None
            buffers = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
            self._buffers.append(buffers)
            self._views[scene] = View(model, data, mujoco.MjvScene(model, MAX_DRAWN), buffers)
        return self._views[scene]

    def _follow(self, view: View, scene: Scene, world: World) -> Any:
        """The cheap scene's data, in the pose of a world."""
        mujoco, model, data = self._mujoco, view.model, view.data
        for name in ("body_pos", "body_quat", "site_rgba"):
            getattr(model, name)[:] = getattr(scene.model, name)
        data.qpos[:] = world.physics.qpos
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_camlight(model, data)
        return data


def cheap_model(scene: Scene) -> Any:
    """The scene without shadows, smoothed edges, small parts of the arm and what is not seen."""
    import mujoco

    spec = mujoco.MjSpec.from_string(scene.xml)
    spec.memory, spec.nconmax, spec.njmax = 1 << 20, -1, -1
    for unseen in [*spec.sensors, *(geom for geom in spec.geoms if geom.group == COLLISION_GROUP)]:
        spec.delete(unseen)
    # Nothing moves by force here; but what was heavy by its unseen parts alone has to have some mass.
    spec.compiler.inertiagrouprange[:] = [0, 5]
    spec.compiler.boundmass = spec.compiler.boundinertia = 1e-6
    for mesh in [mesh for mesh in spec.meshes if mesh.name.startswith(ROBOT_PREFIXES)]:
        cell = GRIPPER_CELL_M if mesh.name.startswith("gripper0_") else ARM_CELL_M
        if (mesh.file, cell) not in _COARSE:
            _COARSE[mesh.file, cell] = weld(*mesh_of(scene.model, mesh.name), cell)
        vertices, faces = _COARSE[mesh.file, cell]
        put_mesh(spec, mesh, vertices, faces)
    model = spec.compile()
    model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
    model.light_castshadow[:] = 0
    model.mat_reflectance[:] = 0
    return model
