"""The arm of a server: one thread that reads it, asks the gate, and moves it; everybody else looks at copies.

Requests never touch the driver, so that a slow client or a flood of them cannot delay the control loop; `joint_reset`
and the gripper are the exceptions. While the joints are reset, the loop reads and does not command.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rlinf.core.errors import RlinfError
from rlinf.envs.realworld.arm import Arm, ArmError, ArmState, Compliance
from rlinf.envs.realworld.safety import SafetyGate, SafetyLimits, Verdict

LOG = logging.getLogger("rlinf.robot_server")
RECONNECT_PAUSE_S = 0.5
"""After a failed reading the arm is asked this often: a dead link should not be hammered."""
JOIN_S = 5.0
"""A driver that does not return for so long is left behind; the arm's own watchdog must end its motion."""
SETTLE_S = 0.2
"""How long `close` keeps telling the arm to stay, before it lets go."""


class Busy(RlinfError):
    """The arm resets its joints, or stands stopped; the message says which and what to do."""


class Station:
    """One arm under one gate.

    Args:
        arm: the driver; not yet connected.
        limits: what it may do.
        control_hz: how often the loop runs.
        clock: of the drivers' time stamps.

    Attributes:
        gate: the limits in force; look at it under `lock`.
        lock: of the gate, and of what this class remembers.
        late: control periods that began more than a period late.
    """

    def __init__(
        self, arm: Arm, limits: SafetyLimits, control_hz: float = 100.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.gate, self.lock, self.late = SafetyGate(limits, 2 / control_hz), threading.RLock(), 0
        self._arm, self._period_s, self._clock = arm, 1 / control_hz, clock
        self._driver = threading.RLock()  # one caller at a time moves the arm
        self._state: ArmState | None = None
        self._compliance = Compliance()
        self._busy, self._asleep_until = "", -np.inf
        self._logged = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.crashed = ""

    # ---- life

    def open(self) -> None:
        """Connect, and hold where the arm is; one in error waits for a person to recover it. Raises ArmError."""
        self._arm.connect()
        state = self._arm.state()
        with self.lock:
            self._state = state
            self.gate.start(state, self._clock())

    def start(self) -> None:
        """`open`, then run the control loop in a thread."""
        self.open()
        self._thread = threading.Thread(target=self._loop, name="control", daemon=True)
        self._thread.start()

    def close(self, *, park: bool = False) -> str:
        """Hold the arm where it is, or park it, and let go. Returns what was done. Calling it twice is allowed."""
        done = ""
        if park and not self.gate.stopped and not self.crashed:
            try:
                self.joint_reset()
                done = "parked at the reset joints"
            except RlinfError as error:
                LOG.error("not parked: %s", error)
        self._ended.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(JOIN_S)
        if thread is not None and thread.is_alive():
            return "let go, but: the driver does not answer"
        try:
            done = done or self._stand_still()
        except ArmError as error:
            done = f"let go, but: {error}"
        try:
            self._arm.close()
        except ArmError as error:
            return f"let go, but: {error}"
        return done

    def _stand_still(self) -> str:
        state = self._arm.state()
        if state.error:
            return f"left in error: {state.error}"
        if not np.isfinite(state.pose).all():
            return "left where it is; it measures no pose"
        self._arm.set_target_pose(state.pose)
        time.sleep(SETTLE_S if self._clock is time.monotonic else 0.0)
        return "held at " + ", ".join(f"{value:.3f}" for value in state.pose[:3]) + " m"

    def _loop(self) -> None:
        due = time.monotonic()
        try:
            while not self._ended.is_set():
                self.tick()
                due += self._period_s
                ahead = due - time.monotonic()
                if ahead > 0:
                    self._ended.wait(ahead)
                elif ahead < -self._period_s:
                    self.late += 1
                    due = time.monotonic()
        except Exception as error:  # whatever it is, somebody must learn that nobody moves the arm any more
            LOG.exception("the control loop ended")
            self.crashed = f"the control loop ended: {type(error).__name__}: {error}"
            with self.lock:
                self.gate.stop("state", self.crashed, self._state, self._clock())

    def tick(self) -> None:
        """One control period: read the arm, ask the gate, move the arm."""
        now = self._clock()
        if now < self._asleep_until:
            return
        try:
            state = self._arm.state()
        except ArmError as error:
            with self.lock:
                if not self.gate.stopped:
                    self.gate.stop("arm_error", f"not heard of: {error}", None, now)
                self._asleep_until = now + RECONNECT_PAUSE_S
                self._log_events()
            return
        # Whoever else moves the arm is not waited for: the target would then be that of before.
        free = self._driver.acquire(blocking=False)
        try:
            self._follow(state, free)
        finally:
            if free:
                self._driver.release()

    def _follow(self, state: ArmState, free: bool) -> None:
        """Ask the gate, and move the arm if nobody else does."""
        with self.lock:
            self._state = state
            if self._busy:
                return
            was_stopped, now = bool(self.gate.stopped), self._clock()
            if free:
                target = self.gate.target(state, now)
            else:
                self.gate.watch(state, now)
            self._log_events()
        if state.error or not free:
            return
        try:
            self._arm.set_target_pose(target)
        except ArmError as error:
            if not was_stopped:
                self.stop("arm_error", str(error))

    # ---- what requests do

    def state(self) -> ArmState:
        """The newest measurement. Raises ArmError before the first."""
        with self.lock:
            if self._state is None:
                raise ArmError("the arm was not read yet")
            return self._state

    def age_s(self, state: ArmState) -> float:
        """How long ago a state was measured."""
        return max(self._clock() - state.time_s, 0.0)

    def submit(self, wish: Any, based_on_s: float | None = None) -> Verdict:
        """A wished pose, for the gate to judge."""
        state = self.state()
        with self.lock:
            now = self._clock()
            if self._busy:
                return self.gate.refuse("busy", f"the arm is busy: {self._busy}", now)
            verdict = self.gate.submit(wish, state, now, based_on_s=based_on_s)
            self._log_events()
        return verdict

    def update_compliance(self, given: Mapping[str, Any]) -> None:
        """Gains in SERL's names. Raises ArmError for those that are none or that press too hard."""
        with self.lock:
            merged = self._compliance.from_serl(given)
            problem = self.gate.check_compliance(merged)
            if problem:
                self.gate.refuse("compliance", problem, self._clock())
                self._log_events()
                raise ArmError(problem)
        with self._driver:
            self._arm.set_compliance(merged)
        with self.lock:
            self._compliance = merged

    def joint_reset(self) -> None:
        """Move to the driver's reset joints; returns when there. Raises Busy, ArmError.

        The way there is the driver's own: neither box nor speed limit holds for it. A stop during it takes effect
        when it ends; the arm's own reflexes guard it meanwhile.
        """
        with self.lock:
            self._refuse_stopped()
            if self._busy:
                raise Busy(f"the arm is busy: {self._busy}")
            self._busy = "joint reset"
        try:
            with self._driver:
                self._arm.joint_reset()
        except ArmError as error:
            self.stop("arm_error", str(error))
            raise
        finally:
            self._resume()

    def move_gripper(self, opening: float) -> None:
        """0 closes, 1 opens. Raises Busy, ArmError."""
        with self.lock:
            self._refuse_stopped()
        self._arm.gripper(opening)

    def stop(self, kind: str, reason: str) -> None:
        """Stop the arm until a person clears it."""
        with self.lock:
            self.gate.stop(kind, reason, self._state, self._clock())
            self._log_events()

    def recover(self, person: str) -> None:
        """A person has looked: clear the arm's error, then the gate's stop. Raises Busy, ArmError."""
        if not person.strip():
            raise Busy('name who has looked at the arm: {"person": "NAME"}')
        with self._driver:
            # What stopped it may be over, and its controller still not run.
            if self._arm.state().error or self.gate.stopped.startswith("arm_error"):
                LOG.warning("%s recovers the arm", person)
                self._arm.recover()
            state = self._arm.state()
        with self.lock:
            self._state, self._asleep_until = state, -np.inf
            problem = self.crashed or self.gate.clear(person, state, self._clock())
            self._log_events()
        if problem:
            raise Busy(problem)

    def is_well(self) -> str:
        """What keeps the arm from taking targets; empty if nothing does."""
        state = self.state()
        with self.lock:
            return self.gate.stopped or state.error

    def report(self) -> dict[str, Any]:
        """The gate's books: stop, counts and last events, and how late the loop was."""
        with self.lock:
            now = self._clock()
            events = [{"age_s": now - e.time_s, "kind": e.kind, "reason": e.reason} for e in self.gate.events]
            return {
                "stopped": self.gate.stopped,
                "busy": self._busy,
                "counts": dict(self.gate.counts),
                "events": events[-50:],
                "late_periods": self.late,
            }

    # ---- inside

    def _refuse_stopped(self) -> None:
        if self.gate.stopped:
            raise Busy(f"the arm is stopped ({self.gate.stopped}); a person must look and clear it")

    def _resume(self) -> None:
        """Begin anew where the arm is."""
        try:
            state = self._arm.state()
        except ArmError:  # the loop will find out
            state = None
        with self.lock:
            if state is not None:
                self._state = state
                self.gate.start(state, self._clock())
            self._busy = ""

    def _log_events(self) -> None:
        """Print what is new in the gate's log."""
        fresh, self._logged = self.gate.num_events - self._logged, self.gate.num_events
        if fresh:
            for event in list(self.gate.events)[-fresh:]:
                LOG.warning("%s: %s", event.kind, event.reason)
