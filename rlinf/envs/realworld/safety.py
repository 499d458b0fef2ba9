"""The gate that every command to an arm passes: on the robot's computer, and again in the environment.

It is arithmetic on poses and times, without a clock, a thread or a connection of its own, so that it can be tested
with any of them. Per command, `submit` judges the wish; per control period, `target` says where the arm is to be
pulled now, and watches the arm:

- A wish outside the workspace box or the orientation limits is brought to the nearest pose inside (kinds `box`,
  `orientation`). One that is no pose at all, or too old, is refused, and the arm holds (`refuse_kinds`).
- The target walks towards the wish no faster than the speed limits, and stays within a step of the measured pose, so
  that the controller's springs never store more than that step, whatever stands in the way.
- An arm that was not heard of for a while, and is found farther from its target than that, is held where it is found.
- No wish for `watchdog_s`: the target stands still (`watchdog`).
- Too much force or torque, an arm that is too fast, an error of the arm, numbers that are none: a *stop*. The target
  becomes the pose where the arm is, so that it presses no more, and stays there until `clear` names a person.

Orientation. A target's orientation is written as the rotation vector r (base axes) from `orientation`, the middle of
what is allowed; |r_i| ≤ `max_rotation_rad[i]`. This set is a box, so steps between two of its points stay inside, and
since exp is no expansion on SO(3), the tool never turns faster than r moves.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from rlinf.envs.realworld import frames
from rlinf.envs.realworld.arm import ArmState, Compliance

QUATERNION_LENGTHS = (0.5, 2.0)
"""Shorter or longer is nonsense. Between them it is normalised: clients interpolate components."""
NUM_EVENTS = 200

LIMIT_KINDS = ("box", "orientation", "speed", "step")
REFUSE_KINDS = ("shape", "not_finite", "quaternion", "stale_target", "out_of_order", "stale_state", "outside", "busy",
                "compliance", "stopped")  # fmt: skip
STOP_KINDS = ("force", "torque", "overspeed", "arm_error", "state", "person")
KINDS = (*LIMIT_KINDS, *REFUSE_KINDS, "watchdog", *STOP_KINDS)
"""Everything that is counted."""


@dataclass(frozen=True)
class SafetyLimits:
    """What the arm may do. Lengths in m, angles in rad, of the tool in the base frame.

    Attributes:
        box_low, box_high: corners of the workspace.
        orientation: middle of the allowed orientations, x y z w; the default is a tool that points down.
        max_rotation_rad: largest rotation from it about the base's x, y and z.
        max_speed: of the target in m/s.
        max_turn_rate: of the target in rad/s.
        max_step: how far the target may lie from where the arm is.
        max_step_rad: the same for the orientation.
        stop_speed: an arm that moves faster is stopped.
        stop_turn_rate: an arm that turns faster is stopped.
        max_force_n, max_torque_nm: measured lengths above these stop the arm.
        margin: how far outside the box the arm itself may be found and still take targets.
        margin_rad: the same for the orientation.
        watchdog_s: silence after which the target stands still.
        max_state_age_s: an older measurement is none.
        max_target_age_s: a target that was chosen on an older measurement is refused.
    """

    box_low: tuple[float, float, float]
    box_high: tuple[float, float, float]
    orientation: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0)
    max_rotation_rad: tuple[float, float, float] = (0.3, 0.3, 0.8)
    max_speed: float = 0.25
    max_turn_rate: float = 1.0
    max_step: float = 0.03
    max_step_rad: float = 0.2
    stop_speed: float = 0.6
    stop_turn_rate: float = 3.0
    max_force_n: float = 50.0
    max_torque_nm: float = 20.0
    margin: float = 0.02
    margin_rad: float = 0.1
    watchdog_s: float = 0.5
    max_state_age_s: float = 0.25
    max_target_age_s: float = 0.5

    def __post_init__(self) -> None:
        for name, length in (("box_low", 3), ("box_high", 3), ("orientation", 4), ("max_rotation_rad", 3)):
            values = np.asarray(getattr(self, name), float)
            if values.shape != (length,) or not np.isfinite(values).all():
                raise ValueError(f"safety.{name} must be {length} finite numbers, not {getattr(self, name)}")
        if not (np.asarray(self.box_low) < np.asarray(self.box_high)).all():
            raise ValueError(f"safety: box_low {self.box_low} must be below box_high {self.box_high} in all three axes")
        if abs(np.linalg.norm(self.orientation) - 1) > 1e-3:
            raise ValueError(f"safety.orientation {self.orientation} must have length 1; its order is x, y, z, w")
        if min(self.max_rotation_rad) < 0 or np.linalg.norm(self.max_rotation_rad) > 3.0:
            raise ValueError(f"safety.max_rotation_rad {self.max_rotation_rad}: not negative, and together at most 3.0")
        for name in ("max_speed", "max_turn_rate", "max_step", "max_step_rad", "stop_speed", "stop_turn_rate",
                     "max_force_n", "max_torque_nm", "margin", "margin_rad", "watchdog_s", "max_state_age_s",
                     "max_target_age_s"):  # fmt: skip
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"safety.{name} must be a positive number, not {value}")
        if self.stop_speed < self.max_speed or self.stop_turn_rate < self.max_turn_rate:
            raise ValueError("safety: stop_speed and stop_turn_rate must not be below max_speed and max_turn_rate")


@dataclass(frozen=True)
class Verdict:
    """What became of a wish.

    Attributes:
        accepted: whether the arm goes for it, be it for the nearest allowed one.
        kind: why not, one of `REFUSE_KINDS`; empty when accepted.
        reason: the same for a person to read.
        limited: the limits that changed it, of `LIMIT_KINDS`.
    """

    accepted: bool
    kind: str = ""
    reason: str = ""
    limited: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """Something that the gate did, for the log.

    Attributes:
        time_s: when, on the clock of the caller.
        kind: one of `KINDS`, or `clear`.
        reason: for a person to read.
    """

    time_s: float
    kind: str
    reason: str


class SafetyGate:
    """The limits in force and the little that must be remembered between commands.

    Not safe for threads: its owner calls it under one lock. All times are of one clock, the owner's.

    Args:
        limits: what the arm may do.
        max_period_s: a longer pause between two calls of `target` counts as this: the arm does not make up for lost
            time with a jump. One or two control periods of the owner.

    Attributes:
        limits: what the arm may do.
        counts: how often each of `KINDS` happened.
        events: the last of them but for limits, oldest first; refusals of one kind in a row are one.
        num_events: how many events there were.
        stopped: why the arm is stopped; empty if it is not.
        slowed: whether the speed limits kept the last target from going as far as it would have.
    """

    def __init__(self, limits: SafetyLimits, max_period_s: float = 0.1) -> None:
        self.limits, self._max_period_s = limits, max_period_s
        self.counts: Counter[str] = Counter()
        self.events: deque[Event] = deque(maxlen=NUM_EVENTS)
        self.num_events = 0
        self.stopped, self.slowed = "", False
        turn = np.array(limits.max_rotation_rad, float)
        self._low, self._high = np.append(limits.box_low, -turn), np.append(limits.box_high, turn)  # [6]
        self._middle = frames.normalized(np.array(limits.orientation, float))
        self._held: np.ndarray | None = None  # [7], where the arm is told to be
        self._goal: np.ndarray | None = None  # [6]: position and rotation from the middle; None: hold
        self._asked: np.ndarray | None = None  # [6], the last goal, for the speed that was asked for
        self._asked_s = -math.inf
        self._based_on_s = -math.inf
        self._last_s = self._seen_s = -math.inf
        self._stale = False

    # ---- commands

    def start(self, state: ArmState, now: float) -> None:
        """Hold where the arm is: at the beginning, after a joint reset, after a person moved it."""
        if np.isfinite(state.pose).all():
            self._held = state.pose.copy()
        self._goal = self._asked = None
        self._asked_s, self._last_s, self._seen_s = -math.inf, now, state.time_s

    def submit(self, wish: np.ndarray, state: ArmState, now: float, *, based_on_s: float | None = None) -> Verdict:
        """Judge a wished pose [7]; if it is accepted, `target` goes for it from now on.

        Args:
            wish: the pose.
            state: the newest measurement.
            now: the time.
            based_on_s: when the measurement was made on which the wish was chosen, if that is known.
        """
        problem = self._problem(wish, state, now, based_on_s)
        if problem is not None:
            kind, reason = problem
            self._count(kind, reason, now)
            if kind != "out_of_order":  # a newer one is being followed
                self._goal = None
            return Verdict(False, kind, reason)
        wish = np.asarray(wish, float)
        raw = self._coordinates(frames.pose_of(wish[:3], wish[3:]))
        goal = self._inside(raw)
        limited = []
        if not np.array_equal(goal[:3], raw[:3]):
            limited.append("box")
        if not np.array_equal(goal[3:], raw[3:]):
            limited.append("orientation")
        limits, here = self.limits, self._coordinates(state.pose)
        if _length(goal[:3] - here[:3]) > limits.max_step or _length(goal[3:] - here[3:]) > limits.max_step_rad:
            limited.append("step")
        if self._asked is not None and now > self._asked_s:
            way, span = goal - self._asked, (now - self._asked_s) * 1.001
            if _length(way[:3]) > limits.max_speed * span or _length(way[3:]) > limits.max_turn_rate * span:
                limited.append("speed")
        for kind in limited:
            self._count(kind, "", now)
        self._goal, self._asked, self._asked_s = goal, goal, now
        if based_on_s is not None:
            self._based_on_s = based_on_s
        return Verdict(True, limited=tuple(limited))

    def refuse(self, kind: str, reason: str, now: float) -> Verdict:
        """Count a refusal that the owner decided upon (`busy`, `compliance`)."""
        self._count(kind, reason, now)
        return Verdict(False, kind, reason)

    def check_compliance(self, compliance: Compliance) -> str:
        """Why these gains could press harder than the limits allow; empty if they cannot."""
        force, torque = compliance.largest_force_n(), compliance.largest_torque_nm()
        if force > self.limits.max_force_n:
            return f"stiffness times clip is {force:.1f} N, more than max_force_n {self.limits.max_force_n:g}"
        if torque > self.limits.max_torque_nm:
            return f"stiffness times clip is {torque:.1f} N m, more than max_torque_nm {self.limits.max_torque_nm:g}"
        return ""

    # ---- every control period

    def target(self, state: ArmState, now: float) -> np.ndarray:
        """Where the arm is to be pulled now, [7]. Raises RuntimeError before `start` saw a finite pose."""
        period = min(max(now - self._last_s, 0.0), self._max_period_s)
        self._last_s, self.slowed = max(now, self._last_s), False
        self.watch(state, now)
        if self._held is None:
            raise RuntimeError("the safety gate was not started with a finite pose")
        self._hold_where_found(state)
        if self.stopped or self._goal is None:
            return self._held.copy()
        if now - self._asked_s > self.limits.watchdog_s:
            self._count("watchdog", f"no target for {now - self._asked_s:.2f} s: the arm holds", now)
            self._goal = None
            return self._held.copy()
        if self._stale:
            return self._held.copy()
        self._held = self._pose(self._walk(self._coordinates(self._held), self._coordinates(state.pose), period))
        return self._held.copy()

    def _hold_where_found(self, state: ArmState) -> None:
        """After a gap in the measurements: whoever moved the arm meanwhile, it is not pulled back."""
        unseen_s, self._seen_s = state.time_s - self._seen_s, max(state.time_s, self._seen_s)
        if not unseen_s > self.limits.max_state_age_s or not np.isfinite(state.pose).all():
            return
        assert self._held is not None
        away = self._coordinates(self._held) - self._coordinates(state.pose)
        if _length(away[:3]) > self.limits.max_step or _length(away[3:]) > self.limits.max_step_rad:
            self._held = frames.pose_of(state.pose[:3], state.pose[3:])

    def _walk(self, held: np.ndarray, here: np.ndarray, period: float) -> np.ndarray:
        """One period from what is held towards the goal, [6]: first the step limit, then the box, last the speed."""
        limits = self.limits
        assert self._goal is not None
        wanted = np.concatenate(
            (
                here[:3] + _shortened(self._goal[:3] - here[:3], limits.max_step),
                here[3:] + _shortened(self._goal[3:] - here[3:], limits.max_step_rad),
            )
        )
        way = self._inside(wanted) - held
        share = 1.001 * period
        self.slowed = _length(way[:3]) > limits.max_speed * share or _length(way[3:]) > limits.max_turn_rate * share
        way[:3] = _shortened(way[:3], limits.max_speed * period)
        way[3:] = _shortened(way[3:], limits.max_turn_rate * period)
        return held + way

    def watch(self, state: ArmState, now: float) -> None:
        """Stop the arm for what it measures. `target` calls it; whoever measures more often may, too."""
        limits = self.limits
        stale = now - state.time_s > limits.max_state_age_s
        if stale and not self._stale:
            self._count("stale_state", f"the arm was last heard of {now - state.time_s:.2f} s ago: it holds", now)
        self._stale = stale
        if self.stopped:
            return
        if state.error:
            self.stop("arm_error", state.error, state, now)
        elif not state.is_finite():
            self.stop("state", "the arm measures numbers that are none", state, now)
        elif (force := _length(state.force_n)) > limits.max_force_n:
            self.stop("force", f"force {force:.1f} N is above {limits.max_force_n:g} N", state, now)
        elif (torque := _length(state.torque_nm)) > limits.max_torque_nm:
            self.stop("torque", f"torque {torque:.1f} N m is above {limits.max_torque_nm:g} N m", state, now)
        elif (speed := _length(state.velocity[:3])) > limits.stop_speed:
            self.stop("overspeed", f"the tool moves at {speed:.2f} m/s, above {limits.stop_speed:g}", state, now)
        elif (rate := _length(state.velocity[3:])) > limits.stop_turn_rate:
            self.stop("overspeed", f"the tool turns at {rate:.2f} rad/s, above {limits.stop_turn_rate:g}", state, now)

    # ---- stops

    def stop(self, kind: str, reason: str, state: ArmState | None, now: float) -> None:
        """Stop the arm where it is, until `clear`. The first reason is kept, every one is counted."""
        self._count(kind, reason, now)
        self._goal = self._asked = None
        if not self.stopped:
            self.stopped = f"{kind}: {reason}"
            if state is not None and np.isfinite(state.pose).all():
                self._held = frames.pose_of(state.pose[:3], state.pose[3:])

    def clear(self, person: str, state: ArmState, now: float) -> str:
        """End a stop in the name of a person who has looked. Returns why not; empty when it is done.

        An error of the arm must be gone before (`Arm.recover`), and so must force and torque above their limits.
        """
        if not person.strip():
            return "name the person who has looked at the arm"
        if now - state.time_s > self.limits.max_state_age_s:
            return "the arm is not heard of"
        if state.error:
            return f"the arm still reports: {state.error}"
        if not state.is_finite():
            return "the arm still measures numbers that are none"
        if _length(state.force_n) > self.limits.max_force_n or _length(state.torque_nm) > self.limits.max_torque_nm:
            return "the arm still feels more force than its limit: free it by hand"
        self.events.append(Event(now, "clear", f"{person.strip()} cleared: {self.stopped or 'nothing'}"))
        self.num_events += 1
        self.stopped, self._stale = "", False
        self.start(state, now)
        return ""

    # ---- inside

    def _problem(
        self, wish: np.ndarray, state: ArmState, now: float, based_on_s: float | None
    ) -> tuple[str, str] | None:
        """Why a wish is refused: kind and reason."""
        if self.stopped:
            return "stopped", f"the arm is stopped ({self.stopped}); a person must look and clear it"
        try:
            numbers = np.asarray(wish, float)
        except (TypeError, ValueError, OverflowError):
            return "shape", "a target is 7 numbers: x, y, z, then the quaternion x, y, z, w"
        if numbers.shape != (7,):
            return "shape", f"a target is 7 numbers, not an array of shape {list(numbers.shape)}"
        if not np.isfinite(numbers).all():
            return "not_finite", f"the target {_text(numbers)} is not finite"
        low, high = QUATERNION_LENGTHS
        # float64's largest numbers have squares that are none
        if not (np.abs(numbers[3:]) <= high).all() or not low <= _length(numbers[3:]) <= high:
            return "quaternion", f"the target's quaternion {_text(numbers[3:])} is far from length 1"
        if based_on_s is not None:
            if not math.isfinite(based_on_s) or now - based_on_s > self.limits.max_target_age_s:
                return "stale_target", f"the target was chosen on a measurement {now - based_on_s:.2f} s old"
            if based_on_s > now:  # and nothing would ever be newer
                return "stale_target", "the target was chosen on a measurement that is still to be made: another clock"
            if based_on_s < self._based_on_s:
                return "out_of_order", "the target was chosen on an older measurement than the one before"
        if now - state.time_s > self.limits.max_state_age_s:
            return "stale_state", f"the arm was last heard of {now - state.time_s:.2f} s ago"
        if not state.is_finite():
            return "state", "the arm measures numbers that are none"
        here = self._coordinates(state.pose)
        out = here - self._inside(here)
        if _length(out[:3]) > self.limits.margin or _length(out[3:]) > self.limits.margin_rad:
            far = f"{_length(out[:3]):.3f} m and {_length(out[3:]):.2f} rad"
            return "outside", f"the arm is {far} outside its limits: move it back by hand or by jointreset"
        return None

    def _coordinates(self, pose: np.ndarray) -> np.ndarray:
        """Position, and rotation vector from the middle orientation, [6]."""
        turn = frames.multiply(pose[3:], frames.conjugate(self._middle))
        return np.concatenate((pose[:3], frames.rotation_vector(turn)))

    def _pose(self, coordinates: np.ndarray) -> np.ndarray:
        turn = frames.quaternion_from_rotation_vector(coordinates[3:])
        return frames.pose_of(coordinates[:3], frames.multiply(turn, self._middle))

    def _inside(self, coordinates: np.ndarray) -> np.ndarray:
        """The nearest allowed coordinates [6]."""
        return np.minimum(np.maximum(coordinates, self._low), self._high)

    def _count(self, kind: str, reason: str, now: float) -> None:
        """Count it, and note it for the log; ten refusals a second of one kind are one note, with the last reason."""
        self.counts[kind] += 1
        if kind in LIMIT_KINDS:  # exploration touches them all the time
            return
        if kind in REFUSE_KINDS and self.events and self.events[-1].kind == kind:
            self.events.pop()
        else:
            self.num_events += 1
        self.events.append(Event(now, kind, reason))


def _length(vector: np.ndarray) -> float:
    return math.sqrt(float(vector @ vector))


def _shortened(vector: np.ndarray, length: float) -> np.ndarray:
    """The vector, or the one of this length in its direction if it is longer."""
    norm = _length(vector)
    return vector * (length / norm) if norm > length else vector


def _text(numbers: np.ndarray) -> str:
    return "[" + ", ".join(f"{number:.4g}" for number in numbers) + "]"
