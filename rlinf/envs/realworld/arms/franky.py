"""A Franka through franky, for the FR3 and, with franky's wheel for its firmware, the Panda.

franky runs the 1 kHz loop in C++: a Cartesian impedance controller with the error clipped axis by axis. Written for
franky-control 2.0; run against its protocol simulator franky-sim, never on hardware.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import numpy as np

from rlinf.core.errors import MissingDependency
from rlinf.envs.realworld import frames
from rlinf.envs.realworld.arm import NUM_JOINTS, ArmError, ArmState, Compliance

INSTALL_COMMAND = "pip install franky-control"
REMEDY = (
    f"run `{INSTALL_COMMAND}`, or in the repository "
    "`bash requirements/install.sh embodied --env realworld --hardware franky`"
)
RESET_RAD = (0.0, 0.0, 0.0, -1.9, 0.0, 2.0, 0.0)
"""SERL's joints of a reset."""
HAND_WIDTH_M, HAND_SPEED, GRASP_FORCE_N = 0.08, 0.1, 40.0
GRIPPER_PERIOD_S = 0.05
HALT_S = 5.0
PREEMPTED = "Move command preempted"
"""libfranka's words for a motion that another one replaced."""
LOG = logging.getLogger("rlinf.franky")


class FrankyArm:
    """One arm, and the Franka hand if there is one.

    Of the compliance it uses stiffness, damping and the larger clip of each axis; it knows no integral gains.
    New clips take effect by a new controller, which starts from where the arm is.

    Args:
        host: address of the robot's controller.
        hand: whether a Franka hand is mounted.
        reset_q: joints [7] of a reset in rad.
        speed: share of the arm's top speed at which it moves its joints, 0 to 1.
        realtime: refuse to run without a real-time kernel (libfranka's "enforce").
    """

    def __init__(
        self,
        host: str,
        hand: bool = True,
        reset_q: tuple[float, ...] = RESET_RAD,
        speed: float = 0.1,
        realtime: bool = False,
    ) -> None:
        self._host, self._hand, self._reset_q = host, hand, tuple(reset_q)
        self._speed, self._realtime = speed, realtime
        self._lock = threading.RLock()
        self._robot: Any = None
        self._tracker: Any = None
        self._fingers: Any = None
        self._wish: float | None = None
        self._opening, self._ended = 1.0, threading.Event()
        self._compliance = Compliance()
        self._ended_by = ""
        self._trouble: tuple[type[BaseException], ...] = ()  # franky's exceptions, which have no common base

    def connect(self) -> None:
        """Reach the robot and start the controller where it is.

        Raises:
            MissingDependency: franky is not installed.
            ArmError: no robot answers, or it reports an error.
        """
        self._franky = franky = _import_franky()
        self._trouble = (
            franky.Exception,
            franky.GripperException,
            franky.InvalidMotionTypeException,
            franky.TorqueSignalTimeoutException,
        )
        config = franky.RealtimeConfig.Enforce if self._realtime else franky.RealtimeConfig.Ignore
        try:
            self._robot = franky.Robot(self._host, realtime_config=config)
            self._robot.relative_dynamics_factor = self._speed
            if self._hand:
                self._fingers = franky.Gripper(self._host)
                self._opening = self._fingers.width / HAND_WIDTH_M
        except self._trouble as error:
            raise ArmError(
                f"franky: no robot at {self._host} ({_line(error)}); is FCI active, the arm unlocked?"
            ) from error
        self._ended.clear()
        if self._hand:
            threading.Thread(target=self._work_fingers, name="franky-hand", daemon=True).start()
        if not self._robot.has_errors:  # otherwise the state says so, and a person recovers
            try:
                self._start()
            except self._trouble as error:
                raise ArmError(f"franky: the impedance controller does not start: {_line(error)}") from error

    def state(self) -> ArmState:
        """libfranka's newest state; force and torque are K_F_ext_hat_K, in the stiffness frame K."""
        robot = self._reach()
        try:
            state = robot.state
            jacobian = np.asarray(robot.model.zero_jacobian(self._franky.Frame.EndEffector, state))
            # Not an error flag of the robot: the arm braked because a command came late, or somebody pressed stop.
            error = self._errors(state)
        except self._trouble as problem:
            raise ArmError(f"franky: {_line(problem)}") from problem
        wrench, dq = np.asarray(state.K_F_ext_hat_K, float), np.asarray(state.dq, float)
        pose = state.O_T_EE
        return ArmState(
            pose=frames.pose_of(np.asarray(pose.translation), np.asarray(pose.quaternion)),
            velocity=jacobian @ dq,
            force_n=wrench[:3],
            torque_nm=wrench[3:],
            q=np.asarray(state.q, float),
            dq=dq,
            jacobian=jacobian,
            gripper=float(np.clip(self._opening, 0.0, 1.0)),
            time_s=time.monotonic(),
            error=error,
        )

    def set_target_pose(self, pose: np.ndarray) -> None:
        """The controller's target from its next period on."""
        franky = self._franky
        with self._lock:
            if self._tracker is None or not self._tracker.is_running:
                raise ArmError("franky: the impedance controller does not run; a person must look and recover the arm")
            try:
                self._tracker.set_target(franky.Affine(np.asarray(pose[:3], float), frames.normalized(pose[3:])))
            except self._trouble as error:
                raise ArmError(f"franky: {_line(error)}") from error

    def set_compliance(self, compliance: Compliance) -> None:
        """Stiffness and damping glide there within a tenth of a second; clips by a new controller."""
        with self._lock:
            old, self._compliance = self._compliance, compliance
            if self._tracker is None:
                return
            same = _clips(old)[0] == _clips(compliance)[0] and _clips(old)[1] == _clips(compliance)[1]
            try:
                if same:
                    self._tracker.set_gains(gains=self._gains())
                else:
                    self._halt()
                    self._start()
            except self._trouble as error:
                raise ArmError(f"franky: {_line(error)}") from error

    def joint_reset(self, q: np.ndarray | None = None) -> None:
        """Stop the controller, move the joints by franky's planner, start the controller again."""
        franky, goal = self._franky, np.asarray(self._reset_q if q is None else q, float)
        if goal.shape != (NUM_JOINTS,) or not np.isfinite(goal).all():
            raise ArmError(f"franky: joint_reset needs {NUM_JOINTS} finite angles")
        with self._lock:
            try:
                self._halt()
                self._reach().move(franky.JointMotion(list(goal)))
                self._start()
            except self._trouble as error:
                raise ArmError(f"franky: joint_reset: {_line(error)}") from error

    def recover(self) -> None:
        """libfranka's error recovery, then the controller again."""
        with self._lock:
            try:
                robot = self._reach()
                if robot.has_errors and not robot.recover_from_errors():
                    raise ArmError("franky: the robot did not recover; look at its display")
                if self._tracker is None or not self._tracker.is_running:
                    self._why_ended()  # franky would throw it at the next motion
                    self._start()
            except self._trouble as error:
                raise ArmError(f"franky: {_line(error)}") from error

    def gripper(self, opening: float) -> None:
        """Open, grasp, or move to a width, after what the fingers do now; of several wishes the last."""
        if self._fingers is None:
            raise ArmError("franky: no hand was configured (hand: false)")
        self._wish = float(np.clip(opening, 0.0, 1.0))

    def close(self) -> None:
        """Ramp the torques down to standstill; the robot then holds by itself."""
        self._ended.set()
        with self._lock:
            if self._robot is not None:
                try:
                    self._halt()
                except self._trouble as error:
                    raise ArmError(f"franky: while stopping: {_line(error)}") from error
                finally:
                    self._robot = None

    # ---- inside

    def _reach(self) -> Any:
        if self._robot is None:
            raise ArmError("franky: not connected")
        return self._robot

    def _start(self) -> None:
        gains, self._ended_by = self._compliance, ""
        translational, rotational = _clips(gains)
        self._tracker = self._franky.CartesianImpedanceTracker(
            self._robot,
            translational_stiffness=gains.translational_stiffness,
            rotational_stiffness=gains.rotational_stiffness,
            translational_error_clip=np.array(translational),
            rotational_error_clip=np.array(rotational),
        )
        self._tracker.set_gains(gains=self._gains())

    def _gains(self) -> Any:
        gains = self._compliance
        return self._franky.CartesianImpedanceGains.isotropic(
            gains.translational_stiffness,
            gains.rotational_stiffness,
            gains.translational_damping,
            gains.rotational_damping,
        )

    def _halt(self) -> None:
        """Ramp the controller's torques down to standstill. Raises ArmError if the arm does not come to rest.

        The tracker's own `stop` waits without end.
        """
        tracker, self._tracker = self._tracker, None
        if tracker is None or not tracker.is_running:
            return
        self._robot.move(self._franky.TorqueStopMotion(), asynchronous=True)
        try:
            rests = self._robot.join_motion(HALT_S)
        except self._trouble as error:
            if PREEMPTED not in str(error):
                raise
            rests = True  # the controller gave way to the stop
        if not rests:
            raise ArmError(f"franky: the arm did not come to rest within {HALT_S:g} s; use its own stop")

    def _errors(self, state: Any) -> str:
        if self._robot.has_errors:
            names = str(state.current_errors) if state.current_errors else str(state.last_motion_errors)
            return f"the robot is in {state.robot_mode}: {' '.join(names.split())}"
        tracker = self._tracker
        if tracker is not None and not tracker.is_running:
            return f"the impedance controller ended by itself ({self._why_ended() or 'no reason given'})"
        return ""

    def _why_ended(self) -> str:
        """What ended the last motion. franky keeps it and throws it once, so it is kept here too."""
        try:
            self._robot.poll_motion()
        except self._trouble as error:
            self._ended_by = _line(error)
        return self._ended_by

    def _work_fingers(self) -> None:
        """Command and read the hand: slowly, and one command at a time.

        A second command while the first is under way, and a future that is dropped before its end, block inside
        franky with the interpreter's lock held, and nobody else would move the arm meanwhile.
        """
        while not self._ended.is_set():
            wish, self._wish = self._wish, None
            try:
                if wish is not None:
                    moving = self._move_fingers(wish)
                    while not moving.wait(GRIPPER_PERIOD_S):
                        self._opening = self._fingers.width / HAND_WIDTH_M
                self._opening = self._fingers.width / HAND_WIDTH_M
            except self._trouble as error:  # fingers that could not; the arm goes on
                LOG.warning("franky: gripper: %s", _line(error))
            self._ended.wait(GRIPPER_PERIOD_S)

    def _move_fingers(self, opening: float) -> Any:
        if opening <= 0.0:  # any width that stops the fingers counts as a grasp
            return self._fingers.grasp_async(0.0, HAND_SPEED, GRASP_FORCE_N, 1.0, 1.0)
        return self._fingers.move_async(opening * HAND_WIDTH_M, HAND_SPEED)


def _clips(gains: Compliance) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per axis, the larger of both directions: franky clips symmetrically."""
    translational = tuple(map(max, gains.translational_clip, gains.translational_clip_neg))
    return translational, tuple(map(max, gains.rotational_clip, gains.rotational_clip_neg))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _import_franky() -> Any:
    try:
        import franky
    except ImportError as error:
        raise MissingDependency(f"franky cannot be imported ({error}); {REMEDY}") from error
    return franky
