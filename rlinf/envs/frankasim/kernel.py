"""`control.py` in machine code: one call moves a batch of worlds by one environment step.

The controller runs at every physics step, and numpy needs longer for its small matrices than MuJoCo for the
physics. Here numba compiles controller and loop, and calls MuJoCo's `mj_step` by its symbol; the arrays of each
world are reached through their addresses. The interpreter's lock is not held meanwhile.

Numba keeps the machine code in `__pycache__` or, where that cannot be written, in the user's cache folder
(NUMBA_CACHE_DIR names another); where no folder can be written every process compiles anew.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numba
import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from rlinf.envs.frankasim.control import (
    MOVE_M,
    NULL_STIFFNESS,
    SINGULAR_DETERMINANT,
    SINGULAR_RATIO,
    STIFFNESS,
    TARGET_HIGH_M,
    TARGET_LOW_M,
)
from rlinf.envs.frankasim.scene import (
    ARM_HOME_RAD,
    ARM_JOINTS,
    FULL_OPENING,
    PHYSICS_STEPS,
    Places,
    import_mujoco,
)

MAX_SWEEPS, SWEEP_TOLERANCE = 30, 1e-30
"""Of Jacobi's method for eigenvalues; six rows need about five sweeps."""


class Gains(NamedTuple):
    """Constants of `control.py` and `scene.py`, given to compiled code as an argument.

    As globals they would be frozen into the cached machine code, which knows only of changes to this file.
    """

    stiffness: float = STIFFNESS
    damping: float = 2 * math.sqrt(STIFFNESS)
    null_stiffness: float = NULL_STIFFNESS
    null_damping: float = 2 * math.sqrt(NULL_STIFFNESS)
    singular_determinant: float = SINGULAR_DETERMINANT
    singular_ratio: float = SINGULAR_RATIO
    move_m: float = MOVE_M
    full_opening: float = FULL_OPENING
    physics_steps: int = PHYSICS_STEPS


FIELDS = ("qpos", "qvel", "ctrl", "qM", "qfrc_bias", "xanchor", "xaxis", "mocap_pos", "mocap_quat")
QPOS, QVEL, CTRL, INERTIA, BIAS, ANCHOR, AXIS, GOAL, GOAL_QUAT, TOOL, TOOL_MATRIX, DATA = range(12)
"""Columns of a world's addresses: `FIELDS` of its MjData, position and rotation of the tool's site, the MjData."""


def _load_mujoco() -> None:
    """Make the symbols of the loaded MuJoCo known to the linker of compiled code."""
    folder = Path(import_mujoco().__file__).parent
    library = next(path for path in sorted(folder.glob("*mujoco*")) if path.suffix == ".dylib" or ".so." in path.name)
    llvm.load_library_permanently(str(library))


_load_mujoco()
_mj_step = types.ExternalFunction("mj_step", types.void(types.uintp, types.uintp))


def _pointer_to_numbers(typing_context: Any, address: Any) -> Any:  # numba's signature
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float64)(types.uintp), generate


_numbers: Any = intrinsic(_pointer_to_numbers)
"""For compiled code: the address as a pointer to float64."""


def _compiled(function: Any) -> Any:
    """The function compiled on its first call, from the cache if there is one."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no folder that it can write to
        return numba.njit(nogil=True)(function)


@_compiled
def _invert(matrix, inverse):  # noqa: ANN001, ANN202  # numba infers the types
    """Write the inverse of a symmetric positive definite matrix [n, n]; returns its determinant."""
    n = matrix.shape[0]
    low = np.zeros((n, n))  # L of matrix = L Lᵀ, then its inverse
    determinant = 1.0
    for i in range(n):
        for j in range(i + 1):
            value = matrix[i, j]
            for k in range(j):
                value -= low[i, k] * low[j, k]
            if i == j:
                determinant *= value
                low[i, i] = math.sqrt(value)
            else:
                low[i, j] = value / low[j, j]
    for i in range(n):
        low[i, i] = 1.0 / low[i, i]
        for j in range(i):
            value = 0.0
            for k in range(j, i):
                value -= low[i, k] * low[k, j]
            low[i, j] = value * low[i, i]
    for i in range(n):
        for j in range(i + 1):
            value = 0.0
            for k in range(i, n):
                value += low[k, i] * low[k, j]
            inverse[i, j] = inverse[j, i] = value
    return determinant


@_compiled
def _pseudo_invert(matrix, smallest, inverse):  # noqa: ANN001, ANN202
    """Write the inverse of a symmetric matrix [n, n] without eigenvalues below smallest · the largest."""
    n = matrix.shape[0]
    values, vectors = matrix.copy(), np.eye(n)
    for _ in range(MAX_SWEEPS):  # Jacobi's method: turn one off-diagonal element after the other to zero
        rest = 0.0
        for p in range(n):
            for q in range(p + 1, n):
                rest += values[p, q] ** 2
        if rest < SWEEP_TOLERANCE:
            break
        for p in range(n):
            for q in range(p + 1, n):
                if values[p, q] == 0.0:
                    continue
                ratio = (values[q, q] - values[p, p]) / (2 * values[p, q])
                tangent = math.copysign(1.0, ratio) / (abs(ratio) + math.sqrt(ratio * ratio + 1))
                cos = 1 / math.sqrt(tangent * tangent + 1)
                sin = tangent * cos
                for k in range(n):
                    a, b = values[k, p], values[k, q]
                    values[k, p], values[k, q] = cos * a - sin * b, sin * a + cos * b
                for k in range(n):
                    a, b = values[p, k], values[q, k]
                    values[p, k], values[q, k] = cos * a - sin * b, sin * a + cos * b
                    a, b = vectors[k, p], vectors[k, q]
                    vectors[k, p], vectors[k, q] = cos * a - sin * b, sin * a + cos * b
    largest = 0.0
    for k in range(n):
        largest = max(largest, abs(values[k, k]))
    inverse[:] = 0.0
    for k in range(n):
        if abs(values[k, k]) > smallest * largest:
            for i in range(n):
                for j in range(n):
                    inverse[i, j] += vectors[i, k] * vectors[j, k] / values[k, k]


@_compiled
def _orientation_error(goal, matrix, error):  # noqa: ANN001, ANN202
    """Write into error[3:] the rotation vector from a rotation matrix [9] to a quaternion [4], the shorter way."""
    # Quaternion of the matrix, from its largest element: never a division by nearly nothing.
    m00, m11, m22 = matrix[0], matrix[4], matrix[8]
    w2, x2, y2, z2 = 1 + m00 + m11 + m22, 1 + m00 - m11 - m22, 1 - m00 + m11 - m22, 1 - m00 - m11 + m22
    if w2 >= x2 and w2 >= y2 and w2 >= z2:
        w, x, y, z = w2, matrix[7] - matrix[5], matrix[2] - matrix[6], matrix[3] - matrix[1]
    elif x2 >= y2 and x2 >= z2:
        w, x, y, z = matrix[7] - matrix[5], x2, matrix[1] + matrix[3], matrix[2] + matrix[6]
    elif y2 >= z2:
        w, x, y, z = matrix[2] - matrix[6], matrix[1] + matrix[3], y2, matrix[5] + matrix[7]
    else:
        w, x, y, z = matrix[3] - matrix[1], matrix[2] + matrix[6], matrix[5] + matrix[7], z2
    norm = math.sqrt(w * w + x * x + y * y + z * z)
    w, x, y, z = w / norm, -x / norm, -y / norm, -z / norm  # of the inverse turn
    a, b, c, d = goal[0], goal[1], goal[2], goal[3]
    tw = a * w - b * x - c * y - d * z
    tx = a * x + b * w + c * z - d * y
    ty = a * y - b * z + c * w + d * x
    tz = a * z + b * y - c * x + d * w
    if tw < 0:
        tw, tx, ty, tz = -tw, -tx, -ty, -tz
    sine = math.sqrt(tx * tx + ty * ty + tz * tz)
    scale = 2 * math.atan2(sine, tw) / sine if sine > 1e-12 else 2.0
    error[3], error[4], error[5] = scale * tx, scale * ty, scale * tz


@_compiled
def _torques(addresses, inertia_rows, home, gains, torque):  # noqa: ANN001, ANN202
    """Write τ [7] of one world; see `control.NumpyControl.torques`."""
    n = ARM_JOINTS
    qpos, qvel = carray(_numbers(addresses[QPOS]), n), carray(_numbers(addresses[QVEL]), n)
    packed, bias = carray(_numbers(addresses[INERTIA]), 28), carray(_numbers(addresses[BIAS]), n)
    anchor, axis = carray(_numbers(addresses[ANCHOR]), (n, 3)), carray(_numbers(addresses[AXIS]), (n, 3))
    goal, goal_quat = carray(_numbers(addresses[GOAL]), 3), carray(_numbers(addresses[GOAL_QUAT]), 4)
    tool, matrix = carray(_numbers(addresses[TOOL]), 3), carray(_numbers(addresses[TOOL_MATRIX]), 9)

    jacobian, inertia = np.empty((6, n)), np.empty((n, n))
    for j in range(n):
        x, y, z = axis[j, 0], axis[j, 1], axis[j, 2]
        rx, ry, rz = tool[0] - anchor[j, 0], tool[1] - anchor[j, 1], tool[2] - anchor[j, 2]
        jacobian[0, j], jacobian[1, j], jacobian[2, j] = y * rz - z * ry, z * rx - x * rz, x * ry - y * rx
        jacobian[3, j], jacobian[4, j], jacobian[5, j] = x, y, z
        for i in range(j + 1):  # a row of `qM` holds the diagonal and then the ancestors, nearest first
            inertia[i, j] = inertia[j, i] = packed[inertia_rows[j] + j - i]

    error = np.empty(6)
    for k in range(3):
        error[k] = goal[k] - tool[k]
    _orientation_error(goal_quat, matrix, error)

    inverse = np.empty((n, n))
    _invert(inertia, inverse)
    spread = np.zeros((6, n))  # J M⁻¹
    for i in range(6):
        for k in range(n):
            for j in range(n):
                spread[i, j] += jacobian[i, k] * inverse[k, j]
    mobility, tool_inertia = np.empty((6, 6)), np.empty((6, 6))
    for i in range(6):
        for j in range(i + 1):
            value = 0.0
            for k in range(n):
                value += spread[i, k] * jacobian[j, k]
            mobility[i, j] = mobility[j, i] = value
    # `not` rather than `<`: at a singular pose rounding may leave a root of a negative number.
    if not _invert(mobility, tool_inertia) >= gains.singular_determinant:
        _pseudo_invert(mobility, gains.singular_ratio, tool_inertia)

    to_home = np.empty(n)
    for j in range(n):
        to_home[j] = gains.null_stiffness * (home[j] - qpos[j]) - gains.null_damping * qvel[j]
    wanted = np.empty(6)
    for i in range(6):
        speed, pulled = 0.0, 0.0
        for j in range(n):
            speed += jacobian[i, j] * qvel[j]
            pulled += spread[i, j] * to_home[j]
        wanted[i] = gains.stiffness * error[i] - gains.damping * speed - pulled
    force = np.zeros(6)
    for i in range(6):
        for j in range(6):
            force[i] += tool_inertia[i, j] * wanted[j]
    for j in range(n):
        value = to_home[j] + bias[j]
        for i in range(6):
            value += jacobian[i, j] * force[i]
        torque[j] = value


@_compiled
def _advance(model, addresses, inertia_rows, gripper, home, low, high, gains, action, active):  # noqa: ANN001, ANN202
    """Move the active worlds by one environment step each."""
    for row in range(addresses.shape[0]):
        if not active[row]:
            continue
        world = addresses[row]
        ctrl, goal = carray(_numbers(world[CTRL]), gripper + 1), carray(_numbers(world[GOAL]), 3)
        for k in range(3):
            goal[k] = min(max(goal[k] + gains.move_m * action[row, k], low[k]), high[k])
        full = gains.full_opening
        ctrl[gripper] = min(max(ctrl[gripper] / full + action[row, 3], 0.0), 1.0) * full
        for _ in range(gains.physics_steps):
            _torques(world, inertia_rows, home, gains, ctrl)
            _mj_step(model, world[DATA])


class CompiledControl:
    """As `control.NumpyControl`, for all worlds in one call."""

    def __init__(self, model: Any, worlds: list[Any]) -> None:
        places = Places.of(model)
        self._kept = (model, worlds)  # the addresses are theirs
        self._model = np.uint64(model._address)
        self._addresses = np.array([_addresses(data, places.tool) for data in worlds], np.uint64)
        self._inertia_rows = np.array(places.inertia_rows, np.int64)
        self._gripper, self._gains = places.gripper, Gains()
        self._home, self._low, self._high = (np.array(x) for x in (ARM_HOME_RAD, TARGET_LOW_M, TARGET_HIGH_M))

    def advance(self, action: np.ndarray, active: np.ndarray) -> None:
        """Apply one action, [N, 4] in [−1, 1], to the worlds that are active, bool [N]."""
        box = self._low, self._high
        _advance(
            self._model, self._addresses, self._inertia_rows, self._gripper, self._home, *box, self._gains,
            action.astype(np.float64), active,
        )  # fmt: skip

    def torques(self, row: int) -> np.ndarray:
        """τ [7] of one world."""
        torque = np.empty(ARM_JOINTS)
        _torques(self._addresses[row], self._inertia_rows, self._home, self._gains, torque)
        return torque


def _addresses(data: Any, tool: int) -> list[int]:
    """In the order of the columns."""
    arrays = [getattr(data, name) for name in FIELDS] + [data.site_xpos[tool], data.site_xmat[tool]]
    assert all(array.dtype == np.float64 and array.flags.c_contiguous for array in arrays)
    return [array.ctypes.data_as(ctypes.c_void_p).value or 0 for array in arrays] + [data._address]
