"""What an action does: it moves a target, and torques at every physics step pull the tool after it.

This is the readable form, in numpy. `kernel.py` computes the same in machine code, and a test holds one against
the other.

Operational-space control [1] of the tool's pose (x, R), with J = ∂(x, R)/∂q and the arm's inertia M:

    a = k_p e − k_d J q̇                          acceleration that closes the pose error e, critically damped
    Λ = (J M⁻¹ Jᵀ)⁻¹                              inertia felt at the tool
    τ = Jᵀ Λ a + (I − Jᵀ Λ J M⁻¹) a₀ + h          a₀ pulls towards the home pose in the null space; h is the bias

Near a singular pose Λ is the pseudo-inverse without the directions in which the tool is a hundred times heavier
than in the lightest.

[1] O. Khatib, "A unified approach for motion and force control of robot manipulators", 1987, eq. 51 and 52.
The constants are those of SERL's `franka_sim`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlinf.envs.frankasim.scene import ARM_HOME_RAD, ARM_JOINTS, FULL_OPENING, PHYSICS_STEPS, Places, import_mujoco

MOVE_M = 0.1
"""Move of the target that the action 1 asks for."""
TARGET_LOW_M, TARGET_HIGH_M = (0.2, -0.3, 0.0), (0.6, 0.3, 0.5)

STIFFNESS = 200.0
"""k_p in 1/s², of position and of orientation; k_d = 2 √k_p."""
NULL_STIFFNESS = 0.5
SINGULAR_DETERMINANT = 1e-2
SINGULAR_RATIO = 1e-2

LIFT_M = 0.2
"""Height over its start at which the block earns the whole reward."""
SUCCESS_LIFT_M = 0.1
REACH_REWARD, REACH_RATE_PER_M, LIFT_REWARD = 0.3, 20.0, 0.7

STATE_DIM = 10
TOOL_POS, TOOL_VEL, GRIPPER, BLOCK_POS = slice(0, 3), slice(3, 6), 6, slice(7, 10)
"""Where the state holds what."""
PROPRIOCEPTION = slice(0, 7)


def reward_and_success(state: np.ndarray, start_height_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """r = 0.3 e^(−20 d) + 0.7 clip(lift / 0.2 m, 0, 1) [N], and whether lift ≥ 0.1 m [N].

    Args:
        state: [N, 10]; d is the distance between tool and block.
        start_height_m: [N], height of the block when the episode began.
    """
    distance = np.linalg.norm(state[:, BLOCK_POS] - state[:, TOOL_POS], axis=1)
    lift = state[:, BLOCK_POS][:, 2] - start_height_m
    reward = REACH_REWARD * np.exp(-REACH_RATE_PER_M * distance) + LIFT_REWARD * np.clip(lift / LIFT_M, 0, 1)
    return reward, lift >= SUCCESS_LIFT_M


class NumpyControl:
    """Steps worlds one after the other, the controller in numpy.

    Args:
        model: the scene.
        worlds: its N states (`MjData`).
    """

    def __init__(self, model: Any, worlds: list[Any]) -> None:
        self._mujoco = import_mujoco()
        self._model, self._worlds, self._places = model, worlds, Places.of(model)
        self._jacobian = np.zeros((6, model.nv))
        self._inertia = np.zeros((model.nv, model.nv))

    def advance(self, action: np.ndarray, active: np.ndarray) -> None:
        """Apply one action, [N, 4] in [−1, 1], to the worlds that are active, [N]."""
        for row in np.flatnonzero(active):
            self._advance(self._worlds[row], action[row].astype(np.float64))

    def _advance(self, data: Any, action: np.ndarray) -> None:
        data.mocap_pos[0] = np.clip(data.mocap_pos[0] + MOVE_M * action[:3], TARGET_LOW_M, TARGET_HIGH_M)
        gripper = self._places.gripper
        data.ctrl[gripper] = np.clip(data.ctrl[gripper] / FULL_OPENING + action[3], 0, 1) * FULL_OPENING
        for _ in range(PHYSICS_STEPS):
            data.ctrl[:ARM_JOINTS] = self.torques(data)
            self._mujoco.mj_step(self._model, data)

    def torques(self, data: Any) -> np.ndarray:
        """τ [7] that pulls the tool to the target, from positions as of the last physics step."""
        mujoco, model, arm = self._mujoco, self._model, slice(0, ARM_JOINTS)
        mujoco.mj_jacSite(model, data, self._jacobian[:3], self._jacobian[3:], self._places.tool)
        mujoco.mj_fullM(model, self._inertia, data.qM)
        j, dq = self._jacobian[:, arm], data.qvel[arm]

        acceleration = STIFFNESS * self._pose_error(data) - 2 * np.sqrt(STIFFNESS) * (j @ dq)
        to_home = NULL_STIFFNESS * (np.array(ARM_HOME_RAD) - data.qpos[arm]) - 2 * np.sqrt(NULL_STIFFNESS) * dq
        inverse = np.linalg.inv(self._inertia[arm, arm])
        mobility = j @ inverse @ j.T
        if abs(np.linalg.det(mobility)) >= SINGULAR_DETERMINANT:
            tool_inertia = np.linalg.inv(mobility)
        else:
            tool_inertia = np.linalg.pinv(mobility, rcond=SINGULAR_RATIO)
        torque = j.T @ tool_inertia @ (acceleration - j @ inverse @ to_home) + to_home
        return torque + data.qfrc_bias[arm]

    def _pose_error(self, data: Any) -> np.ndarray:
        """[6]: way to the target, then the rotation vector to its orientation, the shorter way round."""
        mujoco, tool = self._mujoco, self._places.tool
        turn, now, rotation = np.zeros(4), np.zeros(4), np.zeros(3)
        mujoco.mju_mat2Quat(now, data.site_xmat[tool])
        mujoco.mju_negQuat(now, now)
        mujoco.mju_mulQuat(turn, data.mocap_quat[0], now)
        mujoco.mju_quat2Vel(rotation, turn, 1.0)
        return np.concatenate((data.mocap_pos[0] - data.site_xpos[tool], rotation))
