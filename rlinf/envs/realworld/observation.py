"""What the robot tells of itself, as one vector; and what an action means.

State [19], in SERL's order (its dictionary sorted by name):

    0      gripper opening, 0 … 1
    1-3    force on the tool in N, along its axes
    4-9    tool pose: position in m, then roll, pitch, yaw in rad     (quaternion x, y, z, w: 4-10, and 20 in all)
    -      torque on the tool in N m, about its axes
    -      velocity of the tool's point: m/s, then rad/s

With the relative frame, poses are as seen from where the episode began, T_begin⁻¹ T, and velocities are along the
tool's axes; otherwise both are the base's. There, a tool that points down has a roll of π, which is written in [0, 2π)
so that it does not jump.

With the goal shown, six more: the way to the target, m and a rotation vector in rad, along the axes of actions.

An action [6] in [−1, 1] is a small motion of the tool's point: a step along and a rotation vector about the tool's axes
with the relative frame, the base's without. A pure translation is one in either: see `frames`.
"""

from __future__ import annotations

import math

import numpy as np

from rlinf.envs.realworld import frames
from rlinf.envs.realworld.arm import ArmState

POSE_DIM = {"euler": 6, "quaternion": 7}
GOAL_DIM = 6


def state_dim(rotation: str, show_goal: bool) -> int:
    """Length of the state."""
    return 13 + POSE_DIM[rotation] + GOAL_DIM * show_goal


def proprioception(state: ArmState, origin: np.ndarray | None, rotation: str) -> np.ndarray:
    """The state [19] or [20]; poses from `origin` [7] with the relative frame, in the base without one (None)."""
    pose, velocity = state.pose, state.velocity
    if origin is not None:
        pose, velocity = frames.relative_pose(pose, origin), frames.in_tool_axes(velocity, pose)
    turn = pose[3:] if pose[6] >= 0 else -pose[3:]  # one of the two that are the same rotation
    if rotation == "euler":
        turn = frames.euler_from_quaternion(pose[3:])
        if origin is None:
            turn[0] %= 2 * math.pi
    return np.concatenate(([state.gripper], state.force_n, pose[:3], turn, state.torque_nm, velocity))


def motion_of(action: np.ndarray, pose: np.ndarray, scale: tuple[float, ...], relative: bool) -> np.ndarray:
    """The motion [6] in base axes, m and rad, that an action [6] asks of a tool at a pose [7]."""
    motion = np.concatenate((action[:3] * scale[0], action[3:6] * scale[1]))
    return frames.in_base_axes(motion, pose) if relative else motion


def action_of(motion: np.ndarray, pose: np.ndarray, relative: bool) -> np.ndarray:
    """The action [6] that moves as an operator's command [6] in [−1, 1] along base axes, in the same direction.

    A command along a diagonal of the tool's axes may be longer than actions go: then it is shortened.
    """
    action = frames.in_tool_axes(motion, pose) if relative else np.array(motion, float)
    for half in (slice(0, 3), slice(3, 6)):
        action[half] /= max(1.0, float(np.abs(action[half]).max()))
    return action
