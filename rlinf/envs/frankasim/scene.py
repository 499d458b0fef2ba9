"""The scene: a Franka Panda with a Robotiq 2F-85 gripper, a block on the floor, two cameras.

It is read from the wheel of gym-hil, which carries the scene of SERL's `franka_sim` (the meshes are those of
MuJoCo Menagerie). Nothing is copied, and none of gym-hil's code is imported.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlinf.core.errors import MissingDependency
from rlinf.envs import opengl

INSTALL_COMMAND = "bash requirements/install.sh embodied --env frankasim"

ARM_JOINTS = 7
ARM_HOME_RAD = (0.0, -0.785, 0.0, -2.35, 0.0, 1.57, np.pi / 4)
BLOCK_LOW_M, BLOCK_HIGH_M = (0.25, -0.25), (0.55, 0.25)
"""The block starts anywhere in this rectangle of the floor."""

PHYSICS_STEPS = 10
"""Physics steps of 0.002 s in one environment step of 0.02 s."""

FULL_OPENING = 255.0
"""Range of the gripper's command in the model; 0 is open."""


def scene_file() -> Path:
    """Where gym-hil keeps the scene. Raises MissingDependency where it does not."""
    package = importlib.util.find_spec("gym_hil")
    if package is None or not package.submodule_search_locations:
        raise MissingDependency(f"the robot's model is not here: gym-hil is not installed; run `{INSTALL_COMMAND}`")
    path = Path(package.submodule_search_locations[0]) / "assets" / "scene.xml"
    if not path.is_file():
        raise MissingDependency(f"gym-hil holds no {path}; run `{INSTALL_COMMAND}` for the version that does")
    return path


def import_mujoco() -> Any:
    """The module `mujoco`; see `opengl.import_mujoco`."""
    return opengl.import_mujoco(INSTALL_COMMAND)


def read_scene() -> Any:
    """The scene as an `MjSpec`, fresh, for whoever edits it."""
    return import_mujoco().MjSpec.from_file(str(scene_file()))


@functools.cache
def physics_model() -> Any:
    """The compiled scene (`MjModel`) without its torque and force sensors; one for all, so nobody may write into it.

    Nobody reads those, and for them MuJoCo computes the inverse dynamics in every physics step.
    """
    mujoco = import_mujoco()
    spec = read_scene()
    unread = (mujoco.mjtSensor.mjSENS_TORQUE, mujoco.mjtSensor.mjSENS_FORCE)
    for sensor in [sensor for sensor in spec.sensors if sensor.type in unread]:
        spec.delete(sensor)
    return spec.compile()


@dataclass(frozen=True)
class Places:
    """Where in MuJoCo's arrays the parts of the scene lie.

    Attributes:
        gripper: index of the fingers' command in `ctrl`. Those of the arm are 0 to 6, as are its joints.
        tool: the site between the finger tips.
        block_qpos: first index of the block's pose in `qpos`.
        tool_pos, tool_vel, block_pos: first indices in `sensordata`; each is three numbers in the world frame.
        inertia_rows: address of each arm joint's diagonal element in `qM`.
    """

    gripper: int
    tool: int
    block_qpos: int
    tool_pos: int
    tool_vel: int
    block_pos: int
    inertia_rows: tuple[int, ...]

    @classmethod
    def of(cls, model: Any) -> Places:
        """The places in a compiled scene."""
        arm = [model.joint(f"joint{i + 1}") for i in range(ARM_JOINTS)]
        motors = [model.actuator(f"actuator{i + 1}").id for i in range(ARM_JOINTS)]
        chain = list(range(ARM_JOINTS))
        # The controllers rely on it: slices in place of index lists, and a packed inertia that is one chain.
        found = ([int(joint.dofadr[0]) for joint in arm], [int(joint.qposadr[0]) for joint in arm], motors)
        if any(indices != chain for indices in found) or list(model.dof_parentid[:ARM_JOINTS]) != [-1, *chain[:-1]]:
            raise MissingDependency(f"gym-hil's scene numbers the arm otherwise than expected; run `{INSTALL_COMMAND}`")
        return cls(
            gripper=model.actuator("fingers_actuator").id,
            tool=model.site("pinch").id,
            block_qpos=int(model.joint("block").qposadr[0]),
            tool_pos=int(model.sensor("2f85/pinch_pos").adr[0]),
            tool_vel=int(model.sensor("2f85/pinch_vel").adr[0]),
            block_pos=int(model.sensor("block_pos").adr[0]),
            inertia_rows=tuple(int(address) for address in model.dof_Madr[:ARM_JOINTS]),
        )
