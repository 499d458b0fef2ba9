"""Poses, rotations and the frames that velocities and actions are written in.

A pose is [7]: position x, y, z in m, then a unit quaternion x, y, z, w (the scalar last, as in SERL, ROS and scipy).
T_ab takes points of frame b to frame a. A twist is [6]: linear velocity of the tool's point, then angular velocity.

Two transformations of twists exist and are easily confused [1, §3.3.2]:

- `adjoint` changes the frame *and the point* whose velocity is meant: what a body twist is as a spatial twist.
- `in_base_axes`, `in_tool_axes` change the axes alone, diag(R, R): the same point, written in other axes.

The velocity that Franka reports is that of the tool's point in base axes, and a small action moves that same point;
so the second is what relative actions and observations need. Through the adjoint, a pure translation of the tool would
also turn it, by p × v, at half a metre from the base half as much as it moves.

[1] K. Lynch, F. Park, "Modern Robotics", Cambridge University Press, 2017.
"""

from __future__ import annotations

import math

import numpy as np

SMALL_ANGLE_RAD = 1e-9


# ---- quaternions, x y z w


# Plain numbers: they run in a control loop, and numpy needs ten times as long for so few.


def normalized(quaternion: np.ndarray) -> np.ndarray:
    """The unit quaternion [4] in the same direction. Raises ValueError for (nearly) zero."""
    x, y, z, w = map(float, quaternion)
    norm = math.sqrt(x * x + y * y + z * z + w * w)
    if not norm > 1e-9:
        raise ValueError(f"a quaternion of length {norm:g} is no rotation")
    return np.array((x / norm, y / norm, z / norm, w / norm))


def conjugate(quaternion: np.ndarray) -> np.ndarray:
    """The inverse rotation [4] of a unit quaternion."""
    x, y, z, w = quaternion
    return np.array((-x, -y, -z, w))


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The rotation [4] that first does b, then a."""
    ax, ay, az, aw = map(float, a)
    bx, by, bz, bw = map(float, b)
    return np.array(
        (
            aw * bx + bw * ax + ay * bz - az * by,
            aw * by + bw * ay + az * bx - ax * bz,
            aw * bz + bw * az + ax * by - ay * bx,
            aw * bw - ax * bx - ay * by - az * bz,
        )
    )


def matrix_from_quaternion(quaternion: np.ndarray) -> np.ndarray:
    """The rotation matrix [3, 3] of a unit quaternion."""
    x, y, z, w = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def quaternion_from_matrix(matrix: np.ndarray) -> np.ndarray:
    """The unit quaternion [4], w ≥ 0, of a rotation matrix [3, 3]."""
    m = np.asarray(matrix, float)
    # 4 q qᵀ is linear in the matrix; its longest column is never a division by nearly nothing.
    t = np.trace(m)
    square = np.empty((4, 4))
    square[:3, :3] = m + m.T + (1 - t) * np.eye(3)
    square[3, :3] = square[:3, 3] = [m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]]
    square[3, 3] = 1 + t
    quaternion = normalized(square[:, np.argmax(np.diag(square))])
    return -quaternion if quaternion[3] < 0 else quaternion


def rotation_vector(quaternion: np.ndarray) -> np.ndarray:
    """Axis times angle in rad [3], the shorter way round: its length is at most π."""
    x, y, z, w = map(float, quaternion)
    if w < 0:
        x, y, z, w = -x, -y, -z, -w
    sine = math.sqrt(x * x + y * y + z * z)
    scale = 2 * math.atan2(sine, w) / sine if sine > SMALL_ANGLE_RAD else 2.0
    return np.array((x * scale, y * scale, z * scale))


def quaternion_from_rotation_vector(vector: np.ndarray) -> np.ndarray:
    """The unit quaternion [4] of axis times angle [3]."""
    x, y, z = map(float, vector)
    angle = math.sqrt(x * x + y * y + z * z)
    scale = math.sin(angle / 2) / angle if angle > SMALL_ANGLE_RAD else 0.5
    return normalized(np.array((x * scale, y * scale, z * scale, math.cos(angle / 2))))


def quaternion_from_euler(angles: np.ndarray) -> np.ndarray:
    """The unit quaternion [4] of turns in rad about the fixed axes x, then y, then z (roll, pitch, yaw)."""
    x, y, z = (quaternion_from_rotation_vector(axis * angle) for axis, angle in zip(np.eye(3), angles))
    return multiply(z, multiply(y, x))


def euler_from_quaternion(quaternion: np.ndarray) -> np.ndarray:
    """Turns in rad [3] about the fixed axes x, then y, then z; y in [−π/2, π/2]. Where y is ±π/2, z is 0."""
    m = matrix_from_quaternion(quaternion)
    cosine = np.hypot(m[0, 0], m[1, 0])
    y = np.arctan2(-m[2, 0], cosine)
    if cosine < 1e-7:  # x and z turn about one axis
        return np.array([np.arctan2(-m[1, 2], m[1, 1]), y, 0.0])
    return np.array([np.arctan2(m[2, 1], m[2, 2]), y, np.arctan2(m[1, 0], m[0, 0])])


def angle_between(a: np.ndarray, b: np.ndarray) -> float:
    """Angle in rad, 0 to π, of the turn between two orientations."""
    return float(np.linalg.norm(rotation_vector(multiply(a, conjugate(b)))))


def slerp(a: np.ndarray, b: np.ndarray, fraction: float) -> np.ndarray:
    """The orientation [4] at a fraction of the shortest turn from a to b."""
    turn = rotation_vector(multiply(b, conjugate(a)))
    return normalized(multiply(quaternion_from_rotation_vector(fraction * turn), a))


# ---- poses


def pose_of(position: np.ndarray, quaternion: np.ndarray) -> np.ndarray:
    """The pose [7] of a position [3] and a quaternion [4], which is normalised."""
    return np.concatenate((np.asarray(position, float), normalized(quaternion)))


def pose_from_euler(values: np.ndarray) -> np.ndarray:
    """The pose [7] of x, y, z in m and roll, pitch, yaw in rad [6]."""
    return pose_of(values[:3], quaternion_from_euler(values[3:]))


def compose(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """T_a T_b [7]: the pose b, given in frame a, in the frame that a is given in."""
    return pose_of(a[:3] + matrix_from_quaternion(a[3:]) @ b[:3], multiply(a[3:], b[3:]))


def inverse(pose: np.ndarray) -> np.ndarray:
    """T⁻¹ [7]."""
    turn = conjugate(pose[3:])
    return pose_of(-(matrix_from_quaternion(turn) @ pose[:3]), turn)


def interpolate(a: np.ndarray, b: np.ndarray, fraction: float) -> np.ndarray:
    """The pose [7] at a fraction of the way from a to b: straight line and shortest turn."""
    return pose_of((1 - fraction) * a[:3] + fraction * b[:3], slerp(a[3:], b[3:], fraction))


def relative_pose(pose: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """T_origin⁻¹ T_pose [7]: the pose as seen from the origin, both given in the base frame."""
    return compose(inverse(origin), pose)


# ---- twists and actions


def skew(vector: np.ndarray) -> np.ndarray:
    """The matrix [3, 3] that takes b to a × b, for the vector a."""
    x, y, z = vector
    return np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]], float)


def adjoint(pose: np.ndarray) -> np.ndarray:
    """Ad_T = [[R, [p] R], [0, R]] [6, 6], linear before angular: a body twist as a spatial twist. [1, Def. 3.20]

    The spatial twist's linear part is the velocity of the point of the body that is just at the base's origin, and
    not that of the tool; see above.
    """
    rotation = matrix_from_quaternion(pose[3:])
    top = np.hstack((rotation, skew(pose[:3]) @ rotation))
    return np.vstack((top, np.hstack((np.zeros((3, 3)), rotation))))


def in_base_axes(twist: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """R on both halves [6]: a twist, or a small motion, of the tool's point given in the tool's axes."""
    rotation = matrix_from_quaternion(pose[3:])
    return np.concatenate((rotation @ twist[:3], rotation @ twist[3:6]))


def in_tool_axes(twist: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Rᵀ on both halves [6]: the inverse of `in_base_axes`."""
    rotation = matrix_from_quaternion(pose[3:]).T
    return np.concatenate((rotation @ twist[:3], rotation @ twist[3:6]))


def moved(pose: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """The pose [7] after a motion [6] in base axes: way in m, then rotation vector in rad about the tool's point."""
    turn = quaternion_from_rotation_vector(motion[3:6])
    return pose_of(pose[:3] + motion[:3], multiply(turn, pose[3:]))
