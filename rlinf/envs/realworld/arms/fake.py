"""An arm without a robot, for tests and dry runs: the tool follows its target by a first-order lag."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from rlinf.envs.realworld import frames
from rlinf.envs.realworld.arm import NUM_JOINTS, ArmError, ArmState, Compliance

HOME = (0.5, 0.0, 0.2, 1.0, 0.0, 0.0, 0.0)


class FakeArm:
    """A tool that moves through empty space.

    Its seven "joints" are x, y, z, the rotation vector from home, and one that does nothing.

    Args:
        home: pose [7] of the tool at the start and after a joint reset.
        lag_s: time constant with which the tool follows.
        clock: what says how much time has passed.

    Attributes:
        compliance: the last gains given.
        load: [6], external force and torque that it reports in the tool's axes; for tests.
        fault: an error that it reports until `recover`; for tests.
        unreachable: every method but `close` raises; for tests.
    """

    def __init__(
        self,
        home: tuple[float, ...] = HOME,
        lag_s: float = 0.05,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._home = frames.pose_of(np.array(home[:3], float), np.array(home[3:], float))
        self._lag_s, self._clock = lag_s, clock
        self._lock = threading.Lock()
        self._pose, self._target, self._time_s = self._home.copy(), self._home.copy(), clock()
        self._gripper = 1.0
        self.compliance = Compliance()
        self.load = np.zeros(6)
        self.fault = ""
        self.unreachable = False

    def connect(self) -> None:
        """Hold where it is."""
        self._reach()
        with self._lock:
            self._follow()
            self._target = self._pose.copy()

    def state(self) -> ArmState:
        """Where the tool is now."""
        self._reach()
        with self._lock:
            self._follow()
            way, turn = self._to_target()
            velocity = np.concatenate((way, turn)) / self._lag_s
            from_home = frames.multiply(self._pose[3:], frames.conjugate(self._home[3:]))
            q = np.concatenate((self._pose[:3], frames.rotation_vector(from_home), [0.0]))
            jacobian = np.eye(6, NUM_JOINTS)
            return ArmState(
                pose=self._pose.copy(),
                velocity=velocity,
                force_n=self.load[:3].copy(),
                torque_nm=self.load[3:].copy(),
                q=q,
                dq=np.append(velocity, 0.0),
                jacobian=jacobian,
                gripper=self._gripper,
                time_s=self._time_s,
                error=self.fault,
            )

    def set_target_pose(self, pose: np.ndarray) -> None:
        """Move towards a pose [7]."""
        self._reach()
        self._refuse_faulty()
        with self._lock:
            self._follow()
            self._target = frames.pose_of(pose[:3], pose[3:])

    def set_compliance(self, compliance: Compliance) -> None:
        """Remembered, without effect: nothing pushes in empty space."""
        self._reach()
        self.compliance = compliance

    def joint_reset(self, q: np.ndarray | None = None) -> None:
        """Be at home, or at the joints q, at once."""
        self._reach()
        self._refuse_faulty()
        with self._lock:
            self._follow()
            if q is None:
                self._pose = self._home.copy()
            else:
                q = np.asarray(q, float)
                turn = frames.quaternion_from_rotation_vector(q[3:6])
                self._pose = frames.pose_of(q[:3], frames.multiply(turn, self._home[3:]))
            self._target = self._pose.copy()

    def restart(self, pose: np.ndarray) -> None:
        """Be at a pose [7], at rest and without a fault, at once."""
        with self._lock:
            self._follow()
            self._pose, self.fault = frames.pose_of(pose[:3], pose[3:]), ""
            self._target = self._pose.copy()

    def recover(self) -> None:
        """Forget the fault."""
        self._reach()
        with self._lock:
            self._follow()
            self._target = self._pose.copy()
            self.fault = ""

    def gripper(self, opening: float) -> None:
        """Fingers as wide as asked, at once."""
        self._reach()
        self._refuse_faulty()
        self._gripper = float(np.clip(opening, 0.0, 1.0))

    def close(self) -> None:
        """Hold where it is."""
        with self._lock:
            self._follow()
            self._target = self._pose.copy()

    def _reach(self) -> None:
        if self.unreachable:
            raise ArmError("fake arm: unreachable, as asked")

    def _refuse_faulty(self) -> None:
        if self.fault:
            raise ArmError(f"fake arm: {self.fault}")

    def _to_target(self) -> tuple[np.ndarray, np.ndarray]:
        turn = frames.multiply(self._target[3:], frames.conjugate(self._pose[3:]))
        return self._target[:3] - self._pose[:3], frames.rotation_vector(turn)

    def _follow(self) -> None:
        """Bring the pose up to the clock: what is left of the way shrinks by e^(−t / lag)."""
        now = self._clock()
        passed, self._time_s = max(now - self._time_s, 0.0), now
        if not self.fault:
            self._pose = frames.interpolate(self._pose, self._target, 1 - np.exp(-passed / self._lag_s))
