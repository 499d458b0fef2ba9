"""A Franka Emika Panda (FER) through panda-py, whose wheels carry the libfranka that its firmware speaks.

panda-py runs the 1 kHz loop in C++. Written against the interface of panda-python 1.1; never run on hardware, and
there is no simulator for it here.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import numpy as np

from rlinf.core.errors import MissingDependency
from rlinf.envs.realworld import frames
from rlinf.envs.realworld.arm import NUM_JOINTS, ArmError, ArmState, Compliance

INSTALL_COMMAND = "pip install panda-python"
REMEDY = (
    f"run `{INSTALL_COMMAND}`, or in the repository "
    "`bash requirements/install.sh embodied --env realworld --hardware panda`"
)
RESET_RAD = (0.0, 0.0, 0.0, -1.9, 0.0, 2.0, 0.0)
HAND_WIDTH_M, HAND_SPEED, GRASP_FORCE_N = 0.08, 0.1, 40.0
NULL_STIFFNESS = 0.5


class PandaPyArm:
    """One arm, and the Franka hand if there is one.

    panda-py's impedance controller has no error clips, integral gains or damping in SI units: of the compliance it
    uses the stiffness, and a damping ratio of 1. What bounds the force then is the safety gate's largest step times
    the stiffness; 2000 N/m and 0.03 m are 60 N.

    Args:
        host: address of the robot's controller.
        hand: whether a Franka hand is mounted.
        reset_q: joints [7] of a reset in rad.
        speed: share of the arm's top speed at which it moves its joints, 0 to 1.
    """

    def __init__(
        self, host: str, hand: bool = True, reset_q: tuple[float, ...] = RESET_RAD, speed: float = 0.1
    ) -> None:
        self._host, self._hand, self._reset_q, self._speed = host, hand, tuple(reset_q), speed
        self._lock = threading.RLock()
        self._panda: Any = None
        self._controller: Any = None
        self._fingers: Any = None
        self._opening = 1.0
        self._wishes: queue.Queue[float | None] = queue.Queue()
        self._compliance = Compliance()

    def connect(self) -> None:
        """Reach the robot and start the controller where it is.

        Raises:
            MissingDependency: panda-py is not installed.
            ArmError: no robot answers.
        """
        panda_py = _import_panda_py()
        from panda_py import controllers, libfranka

        self._controllers, self._libfranka = controllers, libfranka
        try:
            self._panda = panda_py.Panda(self._host)
            if self._hand:
                self._fingers = libfranka.Gripper(self._host)
                self._opening = self._fingers.read_once().width / HAND_WIDTH_M
        except RuntimeError as error:  # libfranka's exceptions arrive as this
            raise ArmError(
                f"panda_py: no robot at {self._host} ({_line(error)}); is FCI active, the arm unlocked?"
            ) from error
        if self._hand:
            threading.Thread(target=self._move_fingers, name="panda-hand", daemon=True).start()
        if not self._error():
            self._start()

    def state(self) -> ArmState:
        """libfranka's newest state; force and torque are K_F_ext_hat_K, in the stiffness frame K."""
        panda = self._reach()
        try:
            panda.refresh_state()
            state = panda.get_state()
            column_major = panda.get_model().zero_jacobian(self._libfranka.Frame.kEndEffector, state)
        except RuntimeError as error:
            raise ArmError(f"panda_py: {_line(error)}") from error
        jacobian = np.array(column_major, float).reshape(6, NUM_JOINTS, order="F")
        matrix = np.array(state.O_T_EE, float).reshape(4, 4, order="F")
        wrench, dq = np.array(state.K_F_ext_hat_K, float), np.array(state.dq, float)
        return ArmState(
            pose=frames.pose_of(matrix[:3, 3], frames.quaternion_from_matrix(matrix[:3, :3])),
            velocity=jacobian @ dq,
            force_n=wrench[:3],
            torque_nm=wrench[3:],
            q=np.array(state.q, float),
            dq=dq,
            jacobian=jacobian,
            gripper=float(np.clip(self._opening, 0.0, 1.0)),
            time_s=time.monotonic(),
            error=self._error(),
        )

    def set_target_pose(self, pose: np.ndarray) -> None:
        """The controller's target from its next period on."""
        with self._lock:
            if self._controller is None or not self._panda.is_moving():
                raise ArmError(
                    "panda_py: the impedance controller does not run; a person must look and recover the arm"
                )
            self._controller.set_control(np.asarray(pose[:3], float), frames.normalized(pose[3:]))

    def set_compliance(self, compliance: Compliance) -> None:
        """The stiffness, at once; see the class for the rest."""
        with self._lock:
            self._compliance = compliance
            if self._controller is not None:
                self._controller.set_impedance(self._impedance())

    def joint_reset(self, q: np.ndarray | None = None) -> None:
        """Stop the controller, move the joints by panda-py's planner, start the controller again."""
        goal = np.asarray(self._reset_q if q is None else q, float)
        if goal.shape != (NUM_JOINTS,) or not np.isfinite(goal).all():
            raise ArmError(f"panda_py: joint_reset needs {NUM_JOINTS} finite angles")
        with self._lock:
            try:
                self._halt()
                if not self._reach().move_to_joint_position(goal, speed_factor=self._speed):
                    raise ArmError("panda_py: joint_reset did not arrive; is something in the way?")
                self._start()
            except RuntimeError as error:
                raise ArmError(f"panda_py: joint_reset: {_line(error)}") from error

    def recover(self) -> None:
        """libfranka's error recovery, then the controller again."""
        with self._lock:
            try:
                panda = self._reach()
                panda.recover()
                if self._controller is None or not panda.is_moving():
                    self._start()
            except RuntimeError as error:
                raise ArmError(f"panda_py: {_line(error)}") from error

    def gripper(self, opening: float) -> None:
        """Start to open, to grasp, or to move to a width, after what the fingers do now."""
        if self._fingers is None:
            raise ArmError("panda_py: no hand was configured (hand: false)")
        self._wishes.put(float(np.clip(opening, 0.0, 1.0)))

    def close(self) -> None:
        """Stop the controller; the robot then holds by itself."""
        self._wishes.put(None)
        with self._lock:
            if self._panda is not None:
                try:
                    self._halt()
                except RuntimeError as error:
                    raise ArmError(f"panda_py: while stopping: {_line(error)}") from error
                finally:
                    self._panda = None

    # ---- inside

    def _reach(self) -> Any:
        if self._panda is None:
            raise ArmError("panda_py: not connected")
        return self._panda

    def _start(self) -> None:
        self._controller = self._controllers.CartesianImpedance(
            impedance=self._impedance(), damping_ratio=1.0, nullspace_stiffness=NULL_STIFFNESS
        )
        panda = self._panda
        self._controller.set_control(panda.get_position(), panda.get_orientation())
        panda.start_controller(self._controller)

    def _impedance(self) -> np.ndarray:
        gains = self._compliance
        return np.diag([gains.translational_stiffness] * 3 + [gains.rotational_stiffness] * 3)

    def _halt(self) -> None:
        if self._controller is not None:
            self._panda.stop_controller()
            self._controller = None

    def _error(self) -> str:
        try:
            self._panda.raise_error()
        except RuntimeError as error:
            return _line(error)
        return ""

    def _move_fingers(self) -> None:
        """libfranka's commands to the hand return when it has arrived; nobody waits for that."""
        while (opening := self._wishes.get()) is not None:
            try:
                if opening <= 0.0:
                    self._fingers.grasp(0.0, HAND_SPEED, GRASP_FORCE_N, 1.0, 1.0)
                else:
                    self._fingers.move(opening * HAND_WIDTH_M, HAND_SPEED)
                self._opening = self._fingers.read_once().width / HAND_WIDTH_M
            except RuntimeError:  # noqa: PERF203  # fingers that could not move; the state shows where they are
                continue


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _import_panda_py() -> Any:
    try:
        import panda_py
    except ImportError as error:
        raise MissingDependency(f"panda-py cannot be imported ({error}); {REMEDY}") from error
    return panda_py
