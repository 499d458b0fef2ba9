"""What an arm is to everything above it: eight methods, a state, and the gains of its compliance.

`arms/` holds the drivers. Those that reach a robot import their library when they connect.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

import numpy as np

from rlinf.core.errors import RlinfError

NUM_JOINTS = 7


class ArmError(RlinfError):
    """The arm cannot be reached, reports an error, or does not do what it is told; the message says which."""


@dataclass(frozen=True, eq=False)
class ArmState:
    """What the arm measures at one moment.

    Attributes:
        pose: [7], of the tool in the base frame: position in m, then quaternion x, y, z, w.
        velocity: [6], of the tool's point in base axes: m/s, then rad/s.
        force_n: [3], external force on the tool, in the tool's axes.
        torque_nm: [3], external torque on the tool, in the tool's axes.
        q: [7], joint angles in rad.
        dq: [7], joint velocities in rad/s.
        jacobian: [6, 7], velocity = jacobian · dq.
        gripper: opening, 0 closed to 1 open.
        time_s: when it was measured, on the clock `time.monotonic` of this process (simulated time where the arm is).
        error: what the arm complains about; empty if it does not.
    """

    pose: np.ndarray
    velocity: np.ndarray
    force_n: np.ndarray
    torque_nm: np.ndarray
    q: np.ndarray
    dq: np.ndarray
    jacobian: np.ndarray
    gripper: float
    time_s: float
    error: str = ""

    def is_finite(self) -> bool:
        """Whether every number of it is one."""
        parts = (self.pose, self.velocity, self.force_n, self.torque_nm, self.q, self.dq, self.jacobian)
        return all(bool(np.isfinite(part).all()) for part in parts) and math.isfinite(self.gripper)


AXES = ("x", "y", "z")


@dataclass(frozen=True)
class Compliance:
    """Gains of a Cartesian impedance controller, F = K clip(e) − D v + K_i ∫ e, in base axes.

    The clips bound the error e, and with it the force that the arm presses with: K · clip. Names and meaning are
    those of SERL's controller; `to_serl` and `from_serl` speak its dictionaries. The defaults are those of its peg
    insertion.

    Attributes:
        translational_stiffness: K in N/m.
        translational_damping: D in N s/m.
        translational_ki: K_i in N/(m s).
        translational_clip: largest error in m towards +x, +y, +z.
        translational_clip_neg: the same towards −x, −y, −z.
        rotational_stiffness: in N m/rad.
        rotational_damping: in N m s/rad.
        rotational_ki: in N m/(rad s).
        rotational_clip: largest error in rad about +x, +y, +z.
        rotational_clip_neg: the same about −x, −y, −z.
    """

    translational_stiffness: float = 2000.0
    translational_damping: float = 89.0
    translational_ki: float = 0.0
    translational_clip: tuple[float, float, float] = (0.003, 0.003, 0.01)
    translational_clip_neg: tuple[float, float, float] = (0.003, 0.003, 0.01)
    rotational_stiffness: float = 150.0
    rotational_damping: float = 7.0
    rotational_ki: float = 0.0
    rotational_clip: tuple[float, float, float] = (0.02, 0.02, 0.02)
    rotational_clip_neg: tuple[float, float, float] = (0.02, 0.02, 0.02)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            values = value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(number) and number >= 0 for number in values):
                raise ArmError(f"compliance: {field.name} is {value}; it must be finite and not negative")

    def largest_force_n(self) -> float:
        """The most that the springs press with along one axis."""
        return self.translational_stiffness * _largest(self.translational_clip, self.translational_clip_neg)

    def largest_torque_nm(self) -> float:
        """The most that the springs twist with about one axis."""
        return self.rotational_stiffness * _largest(self.rotational_clip, self.rotational_clip_neg)

    def to_serl(self) -> dict[str, float]:
        """As SERL's servers take it by `/update_param`."""
        names = {}
        for kind in ("translational", "rotational"):
            for gain in ("stiffness", "damping"):
                names[f"{kind}_{gain}"] = getattr(self, f"{kind}_{gain}")
            names[f"{kind}_Ki"] = getattr(self, f"{kind}_ki")
            for i, axis in enumerate(AXES):
                names[f"{kind}_clip_{axis}"] = getattr(self, f"{kind}_clip")[i]
                names[f"{kind}_clip_neg_{axis}"] = getattr(self, f"{kind}_clip_neg")[i]
        return names

    def from_serl(self, given: Mapping[str, Any]) -> Compliance:
        """These gains with those replaced that SERL's dictionary names. Raises ArmError for unknown ones."""
        names = self.to_serl()
        for name, value in given.items():
            if name not in names:
                near = get_close_matches(name, names, 1)
                raise ArmError(f"compliance: unknown {name}" + (f"; did you mean {near[0]}?" if near else ""))
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ArmError(f"compliance: {name} is {value!r} and no number")
            try:
                names[name] = float(value)
            except OverflowError as error:
                raise ArmError(f"compliance: {name} is beyond every number") from error
        merged: dict[str, Any] = {}
        for kind in ("translational", "rotational"):
            for gain in ("stiffness", "damping"):
                merged[f"{kind}_{gain}"] = names[f"{kind}_{gain}"]
            merged[f"{kind}_ki"] = names[f"{kind}_Ki"]
            for clip in ("clip", "clip_neg"):
                merged[f"{kind}_{clip}"] = tuple(names[f"{kind}_{clip}_{axis}"] for axis in AXES)
        return Compliance(**merged)


def _largest(positive: tuple[float, ...], negative: tuple[float, ...]) -> float:
    return max((*positive, *negative))


class Arm(Protocol):
    """One arm with its gripper and its compliance controller.

    Every method raises ArmError when the arm cannot be reached or refuses. No method clears an error of the arm but
    `recover`, and nothing calls that but a person's wish.
    """

    def connect(self) -> None:
        """Reach the arm and make it hold where it is. Called once, before anything else."""
        ...

    def state(self) -> ArmState:
        """The newest measurement. Quick; may be called while `joint_reset` runs in another thread."""
        ...

    def set_target_pose(self, pose: np.ndarray) -> None:
        """Where the compliance controller is to pull the tool, [7] in the base frame. Returns at once.

        The driver does not check it; `safety.SafetyGate` does.
        """
        ...

    def set_compliance(self, compliance: Compliance) -> None:
        """The gains from now on. A driver whose controller lacks some of them says which in its docstring."""
        ...

    def joint_reset(self, q: np.ndarray | None = None) -> None:
        """Move the joints to q [7], or to the driver's own reset, and hold there. Returns when it has arrived."""
        ...

    def recover(self) -> None:
        """Clear the arm's error, and hold where it is."""
        ...

    def gripper(self, opening: float) -> None:
        """Move the fingers: 0 closes and grasps, 1 opens. Returns at once."""
        ...

    def close(self) -> None:
        """Hold where it is, and let go of the connection. Calling it twice is allowed."""
        ...
