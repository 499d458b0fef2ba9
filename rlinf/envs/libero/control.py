"""The arm's controller: what robosuite's OSC_POSE does, in a third of its time.

Operational space control (Khatib 1987) with fixed gains. With p and R the tool's pose, J its Jacobian and M the arm's
inertia,

    F = Λ_p (k_p (p* − p) − k_d ṗ),    T = Λ_r (k_p e_r − k_d ω),    Λ = (J M⁻¹ Jᵀ)⁻¹ for each half of J,
    τ = Jᵀ [F, T] + c(q, q̇) + Nᵀ M (10 (q_home − q) − 2 √10 q̇)

with e_r the rotation from R to R*, c the Coriolis, centrifugal and gravity forces and N the projection onto motions
that leave the tool where it is. An action sets p* and R* once; τ is computed anew before each of 25 physics steps.

The formulas are robosuite's own functions, so the motion is robosuite's to the last bits of a float. The time is saved
around them: robosuite computes the forces of every physics step three times where once suffices, and looks up names.

Differs from: robosuite shows an observation that is one physics step (2 ms) older than the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

ACTION_DIM = 7
PHYSICS_STEPS = 25
"""Physics steps of 0.002 s in one environment step of 0.05 s."""

KP = 150.0
KD = 2 * np.sqrt(KP)
LARGEST_MOVE = np.array([0.05, 0.05, 0.05, 0.5, 0.5, 0.5])
"""What an action of 1 stands for: 5 cm, and 0.5 rad about each axis."""

FINGER_SPEED = 0.01
"""Part of its half range that a finger's command changes by in one physics step: 0.4 s from open to closed."""

OPEN, CLOSE = -1.0, 1.0


@dataclass(frozen=True)
class Arm:
    """Where in MuJoCo's arrays the arm lies.

    Attributes:
        qpos, dof, motors: of its seven joints, as slices.
        fingers: first index of the two fingers in `qpos`.
        finger_motors: first index of their commands in `ctrl`.
        tool: the site between the finger tips.
        hand: the body whose orientation is observed.
        home: joint angles that it is drawn to where the tool's pose leaves a choice, [7].
    """

    qpos: slice
    dof: slice
    motors: slice
    fingers: slice
    finger_motors: slice
    tool: int
    hand: int
    home: np.ndarray

    @classmethod
    def of(cls, problem: Any) -> Arm:
        """The arm of a built problem of LIBERO."""
        robot, model = problem.robots[0], problem.sim.model._model
        return cls(
            qpos=_chain(robot._ref_joint_pos_indexes),
            dof=_chain(robot._ref_joint_vel_indexes),
            motors=_chain(robot._ref_joint_actuator_indexes),
            fingers=_chain(robot._ref_gripper_joint_pos_indexes),
            finger_motors=_chain(robot._ref_joint_gripper_actuator_indexes),
            tool=model.site(robot.controller.eef_name).id,
            hand=model.body(robot.robot_model.eef_name).id,
            home=np.array(robot.init_qpos, np.float64),
        )


@dataclass(frozen=True)
class Sight:
    """The arm as its controller sees it: tool position [3] and orientation [3, 3], J [6, 7], M [7, 7], q and q̇ [7]."""

    pos: np.ndarray
    turn: np.ndarray
    jacobian: np.ndarray
    inertia: np.ndarray
    joints: np.ndarray
    velocity: np.ndarray


@dataclass
class Target:
    """Where an arm is told to be.

    Attributes:
        pos, turn: of the tool; [3] and [3, 3].
        fingers: commands in [−1, 1], of which one is the other's negative; [2].
        sight: what is seen in the first physics step after a reset. robosuite sees the arm at home there, although the
            initial state has moved it a little: its controller looks anew only once it has computed something.
    """

    pos: np.ndarray
    turn: np.ndarray
    fingers: np.ndarray
    sight: Sight | None = None


class PoseControl:
    """Moves the arm of one scene, in any of its worlds.

    Args:
        model: the compiled scene.
        arm: where it lies.
    """

    def __init__(self, model: Any, arm: Arm) -> None:
        import mujoco
        from robosuite.utils import control_utils, transform_utils

        self._mujoco, self._formulas, self._rotations = mujoco, control_utils, transform_utils
        self._model, self._arm = model, arm
        self._low, self._high = model.actuator_ctrlrange[arm.motors].T.copy()
        low, high = model.actuator_ctrlrange[arm.finger_motors].T
        self._finger_middle, self._finger_range = (low + high) / 2, (high - low) / 2
        self._linear, self._angular = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        self._inertia = np.zeros((model.nv, model.nv))

    def look(self, data: Any) -> Sight:
        """The arm in a world whose positions and velocities are worked out (`mj_step1` or `mj_forward`)."""
        arm = self._arm
        self._mujoco.mj_jacSite(self._model, data, self._linear, self._angular, arm.tool)
        self._mujoco.mj_fullM(self._model, self._inertia, data.qM)
        return Sight(
            pos=data.site_xpos[arm.tool].copy(),
            turn=data.site_xmat[arm.tool].reshape(3, 3).copy(),
            jacobian=np.concatenate([self._linear[:, arm.dof], self._angular[:, arm.dof]]),
            inertia=self._inertia[arm.dof, arm.dof].copy(),
            joints=data.qpos[arm.qpos].copy(),
            velocity=data.qvel[arm.dof].copy(),
        )

    def at_rest(self, data: Any) -> Target:
        """To stay where it is; `data` shows the arm at home."""
        sight = self.look(data)
        return Target(sight.pos, sight.turn, np.zeros(2), sight)

    def advance(self, data: Any, target: Target, action: np.ndarray) -> None:
        """Apply one action, [7] in [−1, 1], for 0.05 s; `data` is then as at the start of the last physics step."""
        arm, closing = self._arm, np.array([-1.0, 1.0]) * np.sign(action[6])
        for step in range(PHYSICS_STEPS):
            self._mujoco.mj_step1(self._model, data)
            sight, target.sight = target.sight or self.look(data), None
            if step == 0:
                self._aim(target, sight, np.clip(action[:6], -1, 1) * LARGEST_MOVE)
            torques = self._torques(sight, target) + data.qfrc_bias[arm.dof]
            data.ctrl[arm.motors] = np.clip(torques, self._low, self._high)
            target.fingers = np.clip(target.fingers + FINGER_SPEED * closing, -1, 1)
            data.ctrl[arm.finger_motors] = self._finger_middle + self._finger_range * target.fingers
            self._mujoco.mj_step2(self._model, data)

    def _aim(self, target: Target, sight: Sight, move: np.ndarray) -> None:
        target.pos = sight.pos + move[:3]
        if move[3:].any():  # without a rotation the last one stays the aim
            rotations = self._rotations
            target.turn = rotations.quat2mat(rotations.axisangle2quat(move[3:])) @ sight.turn

    def _torques(self, sight: Sight, target: Target) -> np.ndarray:
        """τ − c, [7]; see the module."""
        formulas, j, inertia = self._formulas, sight.jacobian, sight.inertia
        linear, angular = np.ascontiguousarray(j[:3]), np.ascontiguousarray(j[3:])
        force = KP * (target.pos - sight.pos) - KD * (linear @ sight.velocity)
        torque = KP * formulas.orientation_error(target.turn, sight.turn) - KD * (angular @ sight.velocity)
        _, lambda_p, lambda_r, nullspace = formulas.opspace_matrices(inertia, j, linear, angular)
        at_home = formulas.nullspace_torques(inertia, nullspace, self._arm.home, sight.joints, sight.velocity)
        return j.T @ np.concatenate([lambda_p @ force, lambda_r @ torque]) + at_home


def _chain(indices: Any) -> slice:
    """Consecutive indices as a slice. Raises ValueError where they are not."""
    first, count = int(indices[0]), len(indices)
    if [int(i) for i in indices] != list(range(first, first + count)):
        raise ValueError(f"robosuite numbers the arm otherwise than expected: {list(indices)}")
    return slice(first, first + count)
