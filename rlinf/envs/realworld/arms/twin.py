"""The software twin of a peg-insertion station: MuJoCo, under the impedance law of a real one.

    F = K clip(x* − x) − D ẋ + K_i ∫ e,   τ = Jᵀ F + N (k (q₀ − q) − d q̇) + h

with the gains of `arm.Compliance` in SI units, the error clipped axis by axis, the target low-passed, and N the
projector onto the null space of J. The law is that of SERL's controller; what a real arm adds (torque rate limits,
friction, the sensors' noise) is not here.

Forces are what a Franka estimates: the contact's torques in the joints, low-passed, solved for the wrench at the tool.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from rlinf.envs.frankasim.scene import ARM_JOINTS, FULL_OPENING, import_mujoco
from rlinf.envs.realworld import frames
from rlinf.envs.realworld.arm import ArmError, ArmState, Compliance
from rlinf.envs.realworld.arms.twin_scene import ARM_START_RAD, START_POSE, joints_at, station_model

TARGET_LAG_S = 0.03
"""Time constant of the low pass on the target."""
FORCE_LAG_S = 0.02
"""Time constant of the estimate of external torques: 8 Hz, a choice."""
NULL_STIFFNESS = 10.0
NULL_DAMPING = 2 * np.sqrt(NULL_STIFFNESS)
REGULARISATION = 1e-6 * np.eye(6)
MAX_INTEGRAL = np.repeat((0.1, 0.3), 3)
"""Largest ∫ e in m s and rad s."""
JOINT_STIFFNESS, JOINT_DAMPING, JOINT_SPEED_RAD_S = 400.0, 40.0, 1.0
RESET_TIMEOUT_S, RESET_TOLERANCE_RAD = 20.0, 0.01
REST_CONTROL = 160.0
"""Command of the fingers around the peg; see `frankasim.scene.FULL_OPENING`."""
CLOSING_S = 0.6
"""In this time the fingers close around the peg."""
BATCH_S = 0.01
MAX_LAG_S = 0.1
"""A twin that is further behind the clock gives up catching up."""

ARM = slice(0, ARM_JOINTS)
SCALAR_FIRST = [6, 3, 4, 5]
"""MuJoCo's order of a pose's quaternion."""


class TwinArm:
    """The station as an arm.

    Args:
        realtime: step by itself, at the pace of the clock; otherwise time passes in `advance` alone, and `time_s` of
            states counts the simulated seconds.
        start: pose [7] of the tool at the start and after a joint reset.

    Raises:
        MissingDependency: MuJoCo or gym-hil are not installed.
    """

    def __init__(self, realtime: bool = True, start: tuple[float, ...] = START_POSE) -> None:
        self._mujoco = import_mujoco()
        self.model = model = station_model()
        self.data = self._mujoco.MjData(model)
        self.painters: dict[Any, Any] = {}  # of its cameras; see `cameras.twin`
        self._site, self._finger = model.site("pinch").id, model.actuator("fingers_actuator").id
        self._tip = model.site("tip").id
        self._home = joints_at(model, np.array(start, float), np.array(ARM_START_RAD))
        self._jacobian = np.zeros((6, model.nv))
        self._lock = threading.RLock()
        self._realtime, self._ended = realtime, threading.Event()
        self._thread: threading.Thread | None = None
        self._followed = np.zeros(7)
        self._gains = _Gains(Compliance())
        self._here, self._turn = np.zeros(4), np.zeros(4)
        self.fault = ""
        self._hand: np.ndarray | None = None  # joints of the fingers around the peg
        self.restart()
        self.advance(CLOSING_S)
        self._hand = self.data.qpos[ARM_JOINTS:].copy()
        self.restart()

    # ---- of the twin alone

    def restart(self, pose: np.ndarray | None = None) -> None:
        """Be at the start, or at a pose [7], at rest, at once."""
        with self._lock:
            q = self._home if pose is None else joints_at(self.model, pose, self._home)
            self._mujoco.mj_resetData(self.model, self.data)
            self.data.qpos[ARM] = q
            if self._hand is not None:
                self.data.qpos[ARM_JOINTS:] = self._hand
            self.data.ctrl[self._finger] = REST_CONTROL
            self._opening = 1.0 - REST_CONTROL / FULL_OPENING
            self._mujoco.mj_forward(self.model, self.data)
            self._external = np.zeros(ARM_JOINTS)
            self._joint_goal: np.ndarray | None = None
            self._hold()

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        steps = max(1, round(seconds / self.model.opt.timestep))
        for _ in range(steps):
            with self._lock:
                self._step()

    def tip(self) -> np.ndarray:
        """Position [3] of the peg's tip in m."""
        with self._lock:
            return self.data.site_xpos[self._tip].copy()

    def snapshot(self) -> Any:
        """What a picture of this moment needs, as `frankasim.pictures.Painter` takes it."""
        with self._lock:
            return _Snapshot(self.data.qpos.copy(), self.data.mocap_pos.copy(), self.data.mocap_quat.copy())

    # ---- the arm's interface

    def connect(self) -> None:
        """Begin to live, if it is to by itself."""
        with self._lock:
            self._hold()
        if self._realtime and self._thread is None:
            self._ended.clear()
            self._thread = threading.Thread(target=self._live, name="twin", daemon=True)
            self._thread.start()

    def state(self) -> ArmState:
        """What a Franka would measure."""
        with self._lock:
            data, pose, jacobian = self.data, self._pose(), self._arm_jacobian()
            wrench = np.linalg.lstsq(jacobian.T, self._external, rcond=None)[0]
            local = frames.in_tool_axes(wrench, pose)
            return ArmState(
                pose=pose,
                velocity=jacobian @ data.qvel[ARM],
                force_n=local[:3],
                torque_nm=local[3:],
                q=data.qpos[ARM].copy(),
                dq=data.qvel[ARM].copy(),
                jacobian=jacobian.copy(),
                gripper=self._opening,
                time_s=time.monotonic() if self._realtime else float(data.time),
                error=self.fault,
            )

    def set_target_pose(self, pose: np.ndarray) -> None:
        """Pull the tool to a pose [7]."""
        self._refuse_faulty()
        with self._lock:
            target = frames.pose_of(pose[:3], pose[3:])
            if target[3:] @ self._followed[3:] < 0:
                target[3:] *= -1  # the same turn, on the side of the one that follows it
            self._target = target

    def set_compliance(self, compliance: Compliance) -> None:
        """The gains from the next physics step on."""
        with self._lock:
            self._gains = _Gains(compliance)
            self._integral = np.zeros(6)

    def joint_reset(self, q: np.ndarray | None = None) -> None:
        """Move the joints there, at most at 1 rad/s. Raises ArmError if something is in the way."""
        self._refuse_faulty()
        goal = self._home if q is None else np.asarray(q, float)
        if goal.shape != (ARM_JOINTS,) or not np.isfinite(goal).all():
            raise ArmError(f"twin: joint_reset needs {ARM_JOINTS} finite angles")
        with self._lock:
            self._joint_goal, self._joint_target = goal, self.data.qpos[ARM].copy()
        waited = 0.0
        try:
            while not self._arrived(goal):
                if waited > RESET_TIMEOUT_S or self.fault:
                    raise ArmError(f"twin: joint_reset did not arrive{f' ({self.fault})' if self.fault else ''}")
                if self._thread is None:
                    self.advance(0.02)
                else:
                    time.sleep(0.02)
                waited += 0.02
        finally:
            with self._lock:
                self._joint_goal = None
                self._hold()

    def recover(self) -> None:
        """Forget the fault and hold."""
        with self._lock:
            self.fault = ""
            self._hold()

    def gripper(self, opening: float) -> None:
        """Move the fingers. The peg stays where it is: it is part of the hand."""
        self._refuse_faulty()
        with self._lock:
            self._opening = float(np.clip(opening, 0.0, 1.0))
            self.data.ctrl[self._finger] = (1.0 - self._opening) * FULL_OPENING

    def close(self) -> None:
        """Hold, and stop living."""
        with self._lock:
            self._hold()
        thread, self._thread = self._thread, None
        if thread is not None:
            self._ended.set()
            thread.join()
        for painter in self.painters.values():
            painter.close()
        self.painters.clear()

    # ---- inside

    def _refuse_faulty(self) -> None:
        if self.fault:
            raise ArmError(f"twin: {self.fault}")

    def _hold(self) -> None:
        self._target = self._pose()
        self._followed = self._target.copy()
        self._integral = np.zeros(6)

    def _arrived(self, goal: np.ndarray) -> bool:
        with self._lock:
            near = np.abs(self.data.qpos[ARM] - goal).max() < RESET_TOLERANCE_RAD
            return bool(near and np.abs(self.data.qvel[ARM]).max() < 0.02)

    def _live(self) -> None:
        """Keep up with the clock, in batches of physics steps."""
        due = time.monotonic()
        while not self._ended.is_set():
            self.advance(BATCH_S)
            due += BATCH_S
            ahead = due - time.monotonic()
            if ahead > 0:
                self._ended.wait(ahead)
            elif ahead < -MAX_LAG_S:
                due = time.monotonic()

    def _pose(self) -> np.ndarray:
        scalar_first = np.zeros(4)
        self._mujoco.mju_mat2Quat(scalar_first, self.data.site_xmat[self._site])
        return np.concatenate((self.data.site_xpos[self._site], scalar_first[[1, 2, 3, 0]]))

    def _arm_jacobian(self) -> np.ndarray:
        self._mujoco.mj_jacSite(self.model, self.data, self._jacobian[:3], self._jacobian[3:], self._site)
        return self._jacobian[:, ARM]

    def _step(self) -> None:
        data, period = self.data, self.model.opt.timestep
        torque = self._joint_torque(period) if self._joint_goal is not None else self._impedance_torque(period)
        data.ctrl[ARM] = torque + data.qfrc_bias[ARM]
        self._mujoco.mj_step(self.model, data)
        self._external += min(period / FORCE_LAG_S, 1.0) * (data.qfrc_constraint[ARM] - self._external)

    def _joint_torque(self, period: float) -> np.ndarray:
        assert self._joint_goal is not None
        way = self._joint_goal - self._joint_target
        self._joint_target += np.clip(way, -JOINT_SPEED_RAD_S * period, JOINT_SPEED_RAD_S * period)
        return JOINT_STIFFNESS * (self._joint_target - self.data.qpos[ARM]) - JOINT_DAMPING * self.data.qvel[ARM]

    def _impedance_torque(self, period: float) -> np.ndarray:
        mujoco, data, jacobian, gains = self._mujoco, self.data, self._arm_jacobian(), self._gains
        share = min(period / TARGET_LAG_S, 1.0)
        # A share of the way, in the components too: between two periods the turn is small.
        self._followed += share * (self._target - self._followed)
        self._followed[3:] /= np.linalg.norm(self._followed[3:])
        error, here, turn = np.empty(6), self._here, self._turn
        np.subtract(self._followed[:3], data.site_xpos[self._site], out=error[:3])
        mujoco.mju_mat2Quat(here, data.site_xmat[self._site])
        mujoco.mju_negQuat(here, here)
        mujoco.mju_mulQuat(turn, self._followed[SCALAR_FIRST], here)
        mujoco.mju_quat2Vel(error[3:], turn, 1.0)  # the shorter way round
        error = np.minimum(np.maximum(error, -gains.clip_neg), gains.clip)
        self._integral = np.clip(self._integral + period * error, -MAX_INTEGRAL, MAX_INTEGRAL)
        velocity = jacobian @ data.qvel[ARM]
        force = gains.stiffness * error - gains.damping * velocity + gains.ki * self._integral
        rest = NULL_STIFFNESS * (self._home - data.qpos[ARM]) - NULL_DAMPING * data.qvel[ARM]
        rest -= jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + REGULARISATION, jacobian @ rest)
        return jacobian.T @ force + rest


class _Gains:
    """The compliance as arrays [6], linear before angular."""

    def __init__(self, gains: Compliance) -> None:
        def both(linear: float, angular: float) -> np.ndarray:
            return np.repeat((linear, angular), 3)

        self.stiffness = both(gains.translational_stiffness, gains.rotational_stiffness)
        self.damping = both(gains.translational_damping, gains.rotational_damping)
        self.ki = both(gains.translational_ki, gains.rotational_ki)
        self.clip = np.array((*gains.translational_clip, *gains.rotational_clip))
        self.clip_neg = np.array((*gains.translational_clip_neg, *gains.rotational_clip_neg))


class _Snapshot:
    """Positions of everything, as a picture needs them."""

    def __init__(self, qpos: np.ndarray, mocap_pos: np.ndarray, mocap_quat: np.ndarray) -> None:
        self.qpos, self.mocap_pos, self.mocap_quat = qpos, mocap_pos, mocap_quat
