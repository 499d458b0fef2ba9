"""The station of the twin: a Panda holds a square peg, a square hole stands on the table.

Built in code on the scene that gym-hil carries (see `frankasim.scene`); nothing is copied. The block is taken out, the
peg is fixed between the fingers, and four walls make the hole.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from rlinf.envs.frankasim.scene import import_mujoco, read_scene
from rlinf.envs.realworld.frames import quaternion_from_matrix

HOLE_M = (0.5, 0.0, 0.0)
"""Middle of the hole on the table."""
PEG_HALF_WIDTH_M, PEG_HALF_LENGTH_M = 0.010, 0.030
CLEARANCE_M = 0.001
"""By so much the hole is wider than the peg."""
HOLE_DEPTH_M, WALL_M = 0.03, 0.02
PEG_OVERLAP_M = 0.005
"""By so much the peg reaches back from the tool's point, between the fingers."""
TIP_M = 2 * PEG_HALF_LENGTH_M - PEG_OVERLAP_M
"""From the tool's point to the peg's tip, along the tool's z axis."""
FRICTION = (0.3, 0.005, 0.0001)
CONTACT = (0.01, 1.0)
"""Time constant in s and damping ratio of contacts (MuJoCo's solref)."""

TOOL_DOWN = (1.0, 0.0, 0.0, 0.0)
INSERTED_POSE = (*HOLE_M[:2], HOLE_M[2] + TIP_M, *TOOL_DOWN)
"""Pose of the tool when the peg stands on the ground of the hole."""
START_POSE = (*HOLE_M[:2], HOLE_M[2] + TIP_M + 0.1, *TOOL_DOWN)
ARM_START_RAD = (0.0, 0.1, 0.0, -2.43, 0.0, 2.53, 0.785)
"""Near the joints that belong to the start pose."""

WRIST_CAMERA_M = (0.09, 0.0, -0.04)
"""Where the wrist camera sits, in the tool's frame; it looks at the peg's tip from the front."""
WRIST_FOV_DEG = 60.0

FINGER_BIT, PEG_BIT = 1, 2
"""What collides with what: the peg with table and walls, and not with the fingers that hold it."""


def station_spec() -> Any:
    """The scene as an editable `MjSpec`."""
    mujoco = import_mujoco()
    spec = read_scene()
    for sensor in [sensor for sensor in spec.sensors if not sensor.name.startswith("2f85/pinch_pos")]:
        spec.delete(sensor)
    for light in spec.lights:
        if light.targetbody == "block":
            light.targetbody = "target"
    spec.delete(next(body for body in spec.bodies if body.name == "block"))
    contact = {"friction": FRICTION, "solref": CONTACT}
    box = mujoco.mjtGeom.mjGEOM_BOX

    pinch = next(site for site in spec.sites if site.name == "pinch")
    peg = pinch.parent.add_body(name="peg", pos=pinch.pos, quat=pinch.quat)
    size = [PEG_HALF_WIDTH_M, PEG_HALF_WIDTH_M, PEG_HALF_LENGTH_M]
    middle = [0, 0, PEG_HALF_LENGTH_M - PEG_OVERLAP_M]
    peg.add_geom(
        name="peg", type=box, size=size, pos=middle, rgba=[0.9, 0.7, 0.1, 1], mass=0.05,
        contype=PEG_BIT, conaffinity=PEG_BIT, **contact,
    )  # fmt: skip
    peg.add_site(name="tip", pos=[0, 0, TIP_M])

    pinch.parent.add_camera(
        name="peg_view", pos=np.add(pinch.pos, WRIST_CAMERA_M), quat=_looking(WRIST_CAMERA_M, (0, 0, TIP_M)),
        fovy=WRIST_FOV_DEG,
    )  # fmt: skip

    hole = spec.worldbody.add_body(name="hole", pos=HOLE_M)
    inner, half = PEG_HALF_WIDTH_M + CLEARANCE_M / 2, WALL_M / 2
    for k, (x, y, width, depth) in enumerate(
        (
            (inner + half, 0, half, inner + WALL_M),
            (-inner - half, 0, half, inner + WALL_M),
            (0, inner + half, inner, half),
            (0, -inner - half, inner, half),
        )
    ):
        hole.add_geom(
            name=f"wall{k}", type=box, size=[width, depth, HOLE_DEPTH_M / 2], pos=[x, y, HOLE_DEPTH_M / 2],
            rgba=[0.3, 0.3, 0.35, 1], contype=FINGER_BIT | PEG_BIT, conaffinity=FINGER_BIT | PEG_BIT, **contact,
        )  # fmt: skip
    floor = next(geom for geom in spec.geoms if geom.name == "floor")
    floor.contype = floor.conaffinity = FINGER_BIT | PEG_BIT
    return spec


def _looking(eye: tuple[float, ...], at: tuple[float, ...]) -> np.ndarray:
    """Quaternion [4], scalar first, of a camera: MuJoCo's look along −z, with y up; here the tool's −z is up."""
    back = np.subtract(eye, at) / np.linalg.norm(np.subtract(eye, at))
    right = np.cross((0.0, 0.0, -1.0), back)
    right /= np.linalg.norm(right)
    columns = np.stack((right, np.cross(back, right), back), 1)
    return quaternion_from_matrix(columns)[[3, 0, 1, 2]]


@functools.cache
def station_model() -> Any:
    """The compiled scene; one for all, so nobody may write into it."""
    return station_spec().compile()


def joints_at(model: Any, pose: np.ndarray, start: np.ndarray, *, steps: int = 200) -> np.ndarray:
    """Joint angles [7] that bring the tool to a pose [7], near others, by damped least squares."""
    mujoco = import_mujoco()
    data, site = mujoco.MjData(model), model.site("pinch").id
    jacobian, turn, here, error = np.zeros((6, model.nv)), np.zeros(4), np.zeros(4), np.zeros(6)
    wanted = np.array(pose)[[6, 3, 4, 5]]  # MuJoCo writes the scalar first
    data.qpos[:7] = start
    for _ in range(steps):
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], site)
        mujoco.mju_mat2Quat(here, data.site_xmat[site])
        mujoco.mju_negQuat(here, here)
        mujoco.mju_mulQuat(turn, wanted, here)
        mujoco.mju_quat2Vel(error[3:], turn, 1.0)
        error[:3] = np.array(pose[:3]) - data.site_xpos[site]
        if np.linalg.norm(error) < 1e-8:
            break
        j = jacobian[:, :7]
        data.qpos[:7] += j.T @ np.linalg.solve(j @ j.T + 1e-6 * np.eye(6), error)
    return data.qpos[:7].copy()
