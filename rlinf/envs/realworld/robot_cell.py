"""An arm behind the environment's own safety gate, with its cameras: what an environment step is made of.

Whatever fails, the arm is told to stay where it is, and the environment waits for a bounded time:

- the robot is not heard of: nothing can be told to it; its server holds it once its watchdog has expired. When it is
  back, it is held where it then is.
- a camera gives no picture: the arm is held; the camera alone is opened again by its own thread.
- the gate stopped, or the arm reports an error: the arm is held until a person has looked and cleared it at the
  robot's server. Without a robot nobody has to look.
"""

from __future__ import annotations

import atexit
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from rlinf.core.errors import RlinfError, RunEnding
from rlinf.envs.realworld import frames
from rlinf.envs.realworld.arm import Arm, ArmError, ArmState, Compliance
from rlinf.envs.realworld.arms.serl_http import HttpRefusal
from rlinf.envs.realworld.cameras.camera import Camera, CameraError
from rlinf.envs.realworld.pacing import Metronome, Pace, SimulatedTime
from rlinf.envs.realworld.safety import LIMIT_KINDS, STOP_KINDS, SafetyGate, SafetyLimits, Verdict

LOG = logging.getLogger("rlinf.robot_cell")
FIRST_PICTURE_S = 5.0
ASK_AGAIN_S = 0.2
"""A robot, a camera or a person that is waited for is looked at this often."""
FRESH_S = 0.05
"""A measurement older than this is taken anew before a target is judged."""
SPEED_SHARE = 0.8
"""Ways to where an episode begins use this share of the gate's speed."""
TRIES, ARRIVED_M, ARRIVED_RAD, SETTLE_S = 3, 0.005, 0.05, 0.3
ASKED = "the operator pressed stop"
NOBODY = "nobody: there is no robot"


class RobotCell:
    """One arm and its cameras.

    Args:
        arm: the driver; not yet connected.
        cameras: by name; not yet started.
        limits: of the environment's gate.
        pace: how time passes.
        period_s: between two environment steps.
        robot_wait_s: so long a robot or camera that is not heard of is waited for.
        stop_wait_s: so long a stopped arm waits for a person.
        at_end: `hold` or `joints`, see `close`.
        lift_m, lift_s: how far up `lift` goes, and in which time.
        simulated: there is no robot, so nobody has to look at a stopped arm.

    Attributes:
        gate: the environment's gate.
        state: the newest measurement.
        metronome: the beat of the environment's steps.
        refused_by_robot: targets that the robot's own gate refused.
        asked_to_stop: whether the operator has asked for a stop since it was last called; polled while the arm moves or
            is waited for between the steps of an episode.
        asked_to_end: whether the run is to end; polled likewise, and nothing is waited for any more then.
    """

    def __init__(
        self,
        arm: Arm,
        cameras: Mapping[str, Camera],
        limits: SafetyLimits,
        pace: Pace,
        *,
        period_s: float,
        robot_wait_s: float = 30.0,
        stop_wait_s: float = 300.0,
        at_end: str = "hold",
        lift_m: float = 0.1,
        lift_s: float = 1.0,
        simulated: bool = False,
    ) -> None:
        self.arm, self.cameras = arm, dict(cameras)
        self.gate = SafetyGate(limits, 2 * period_s)
        self.metronome = Metronome(pace, period_s)
        self.refused_by_robot = 0
        self.asked_to_stop: Callable[[], bool] = lambda: False
        self.asked_to_end: Callable[[], bool] = lambda: False
        self.simulated = simulated
        self._pace, self._robot_wait_s, self._stop_wait_s = pace, robot_wait_s, stop_wait_s
        self._at_end, self._lift_m, self._lift_s = at_end, lift_m, lift_s
        self._verdict = Verdict(True)
        self._closed = self._connected = self._leaving = False
        self._told_stop = False

    # ---- life

    def open(self) -> None:
        """Connect, hold where the arm is, and wait for the first pictures.

        Raises:
            ArmError, CameraError, MissingDependency: the cell is not all there; what was opened is closed.
        """
        try:
            self.arm.connect()
            self._connected = True
            atexit.register(self._leave_quietly)  # should whoever made this end without closing it
            self.state = self.arm.state()
            self._start_gate()
            for camera in self.cameras.values():
                camera.start()
                camera.newest(FIRST_PICTURE_S)
        except BaseException:
            self.close()
            raise

    def close(self) -> str:
        """Hold the arm, or lift it and move it to its reset joints, and let go. May be called twice.

        Returns what was done. The arm is let go of, whatever else fails.
        """
        if self._closed:
            return ""
        self._closed = True
        atexit.unregister(self._leave_quietly)
        with ExitStack() as stack:
            stack.callback(self.arm.close)
            for camera in self.cameras.values():
                stack.callback(camera.close)
            return self._leave_quietly() if self._connected else "never connected"

    def _leave_quietly(self) -> str:
        try:
            return self._leave()
        except RlinfError as error:  # the robot's own watchdog holds it
            LOG.warning("the arm was let go, but: %s", error)
            return f"let go, but: {error}"

    def _leave(self) -> str:
        self._leaving = True
        state = self.arm.state()
        if state.error:
            return f"left in error: {state.error}"
        if not np.isfinite(state.pose).all():
            return "left where it is; it measures no pose"
        self.arm.set_target_pose(state.pose)
        if self._at_end != "joints" or self.gate.stopped:
            return "held"
        self.state = state
        self._start_gate()
        self.lift()
        if self.gate.stopped:
            return f"held; stopped on the way: {self.gate.stopped}"
        self.arm.joint_reset()
        return "parked at the reset joints"

    # ---- a step

    def command(self, wish: np.ndarray) -> tuple[str, ...]:
        """Send the arm towards a wished pose [7], as far as the gate lets it. Returns the limits that changed it.

        A wish that a gate refuses leaves the arm where it is, and is counted.
        """
        self.refresh()
        now = self._pace.now()
        self._verdict = verdict = self.gate.submit(wish, self.state, now)
        self._send(self.gate.target(self.state, now))
        if not self.gate.slowed or "speed" in verdict.limited:
            return verdict.limited
        self.gate.counts["speed"] += 1  # the gate itself knows of no step that the target should have arrived in
        return (*verdict.limited, "speed")

    def refresh(self) -> ArmState:
        """The newest measurement, taken anew if it is old: what a wish should be chosen on."""
        return self.measure() if self._pace.now() - self.state.time_s > FRESH_S else self.state

    def hold(self) -> None:
        """Stay where the arm is."""
        self._start_gate()
        if not self.state.error:
            self._send(self.state.pose)

    def wait(self) -> ArmState:
        """Wait for the next step's time, and measure."""
        self.metronome.wait()
        return self.measure()

    def measure(self) -> ArmState:
        """The newest measurement; a robot that is not heard of is waited for.

        Raises ArmError after `robot_wait_s`, RunEnding when the run is to end meanwhile.
        """
        try:
            self.state = self.arm.state()
        except ArmError as error:
            self.state = self._wait_for("the robot", error, self.arm.state, self._hear)
            self.hold()  # wherever it is by now
        self.gate.watch(self.state, self._pace.now())
        if self.gate.stopped and not self._told_stop:
            self._tell_stop()
        return self.state

    def pictures(self) -> dict[str, np.ndarray]:
        """The newest picture of every camera, uint8 [H, W, 3]; one that gives none is waited for, with the arm held.

        Raises CameraError after `robot_wait_s`, RunEnding when the run is to end meanwhile.
        """
        found = {}
        for name, camera in self.cameras.items():
            try:
                found[name] = camera.newest().image
            except CameraError as error:  # noqa: PERF203  # one camera at a time
                self.hold()
                found[name] = self._wait_for(f"camera {name}", error, camera.newest, self.listen).image
                self.measure()
        return found

    def gripper(self, opening: float, seconds: float) -> None:
        """Move the fingers, 0 closed to 1 open, and give them time."""
        self._try(lambda: self.arm.gripper(opening))
        self._pass(seconds)
        self.metronome.pause()

    # ---- where episodes begin

    def set_compliance(self, gains: Compliance) -> None:
        """Gains from now on. Raises ArmError if they press harder than the gate allows, or the robot refuses them."""
        problem = self.gate.check_compliance(gains)
        if problem:
            raise ArmError(f"compliance: {problem}")
        self._again(lambda: self.arm.set_compliance(gains))

    def put(self, pose: np.ndarray) -> ArmState:
        """A simulated arm at rest at a pose [7], at once: what then happens is a function of the pose alone."""
        if isinstance(self._pace, SimulatedTime):
            self._pace.restart()
        self.arm.restart(pose)  # type: ignore[attr-defined]  # twin and fake have it
        self.gate.stopped, self._told_stop = "", False
        self.state = self.arm.state()
        self._start_gate()
        return self.state

    def lift(self) -> None:
        """Straight up, as far as the box goes: out of a hole, and over what stands around."""
        if self._lift_m > 0:
            above = self.state.pose + np.array([0, 0, self._lift_m, 0, 0, 0, 0])
            self._glide(np.array([*np.minimum(above[:3], self.gate.limits.box_high), *above[3:]]), self._lift_s)

    def go(self, pose: np.ndarray, seconds: float) -> ArmState:
        """Lift, then move to a pose [7] along a straight line; slower where the gate's speed demands it.

        After some tries that do not arrive, it stays where it is: the next episode begins there, and a line says so.
        A stop, the operator's too, ends the way.

        Raises ArmError when the arm is outside of the gate's box: no target would be taken; RunEnding when the run is
        to end: the arm is then held where it is.
        """
        if not self.gate.stopped:
            self.lift()
        for _ in range(TRIES):
            if self.gate.stopped:
                break
            self._glide(pose, seconds)
            if self._verdict.kind == "outside":
                raise ArmError(
                    f"{self._verdict.reason} (of the environment: ee_pose_limit_min and _max; where the reset joints "
                    "are outside of them, joint_reset_cycle must be 0)"
                )
            self._settle(pose)
            if self._is_at(pose):
                break
        else:
            off = np.linalg.norm(self.state.pose[:3] - pose[:3])
            LOG.warning("the arm is %.1f mm from where the episode should begin; something is in its way", 1000 * off)
        return self.state

    def joint_reset(self) -> None:
        """Move the joints to their reset, by the driver's own planner."""
        self._try(self.arm.joint_reset)
        self.measure()
        self._start_gate()

    def clear_stop(self) -> None:
        """Wait until a stopped arm has been cleared by a person at the robot's server. Stops asked for before are over.

        Raises ArmError when nobody does in `stop_wait_s`, or where there is no server to clear it at; RunEnding when
        the run is to end meanwhile.
        """
        if not self.gate.stopped and not self.state.error:
            return
        reason = self.gate.stopped or self.state.error
        if self.simulated:
            self.asked_to_stop()
            self._try(self.arm.recover)
            self.measure()
            problem = self.gate.clear(NOBODY, self.state, self._pace.now())
            self._told_stop = False
            if problem:
                LOG.info("not cleared: %s", problem)
            return
        if not self._told_stop:
            raise ArmError(f"the arm was stopped and is held ({reason}); look at it, free it, and start again")
        LOG.warning(
            "the arm is stopped (%s). Look at it, free it, then clear it at its server: curl -s -X POST "
            'http://ROBOT:5000/recover -d \'{"person": "NAME"}\'',
            reason,
        )
        deadline = self._pace.now() + self._stop_wait_s
        while True:
            self.asked_to_stop()  # whoever pressed it knows that the arm is stopped
            state = self.measure()
            if not state.error and not self.gate.clear("cleared at the robot's server", state, self._pace.now()):
                self._told_stop = False
                return
            if self._pace.now() > deadline:
                raise ArmError(f"the arm is stopped ({reason}) and nobody cleared it in {self._stop_wait_s:g} s")
            self._pass(ASK_AGAIN_S)
            self.end_if_asked(f"a person was waited for ({reason})")

    def end_if_asked(self, what: str) -> None:
        """Raise RunEnding if the run is to end; `what` is what it then was about."""
        if self.asked_to_end():
            raise RunEnding(f"the run is to end; {what}")

    def listen(self) -> bool:
        """Stop if the operator asks for it. Whether the arm is stopped."""
        if self._hear():
            self.measure()  # holds it where it is, and tells its server
        return bool(self.gate.stopped)

    def stop_as_asked(self) -> None:
        """The operator wants a stop: hold the arm where it is, and stop its server, until a person clears both."""
        self.gate.stop("person", ASKED, self.state, self._pace.now())
        self.measure()

    # ---- books

    def counts(self) -> dict[str, float]:
        """What the gates did since the beginning: `limited`, `refused`, `stops`."""
        counts: Counter[str] = self.gate.counts
        limited = sum(counts[kind] for kind in LIMIT_KINDS)
        stops = sum(counts[kind] for kind in STOP_KINDS)
        return {
            "limited": float(limited),
            "refused": float(sum(counts.values()) - limited - stops + self.refused_by_robot),
            "stops": float(stops),
        }

    @property
    def camera_restarts(self) -> int:
        """How often a camera was opened again."""
        return sum(camera.restarts for camera in self.cameras.values())

    # ---- inside

    def _start_gate(self) -> None:
        """Hold where the arm is. The next target is for the end of a step, so it may walk for a whole period."""
        self.gate.start(self.state, self._pace.now() - self.metronome.period_s)

    def _hear(self) -> bool:
        """Whether the operator has asked for a stop just now; the gate is stopped then, and nobody told yet."""
        if not self.asked_to_stop() or self.gate.stopped:
            return False
        self.gate.stop("person", ASKED, self.state, self._pace.now())
        return True

    def _send(self, target: np.ndarray) -> None:
        if not np.isfinite(target).all():
            LOG.warning("not sent: %s is no pose", target)
            return
        try:
            self.arm.set_target_pose(target)
        except HttpRefusal as error:
            self.refused_by_robot += 1
            LOG.debug("refused by the robot: %s", error)
        except ArmError as error:  # a lost link, or an error of the arm: the next measurement tells
            LOG.debug("not sent: %s", error)

    def _tell_stop(self) -> None:
        """Stop the robot's server too, so that a person clears both in one place."""
        LOG.warning("the arm is stopped: %s", self.gate.stopped)
        self.hold()
        stop: Callable[[str], None] | None = getattr(self.arm, "stop", None)
        if stop is None:
            return
        try:
            stop(f"the environment's gate: {self.gate.stopped}")
            self._told_stop = True
        except ArmError as error:
            LOG.warning("the robot's server cannot be stopped: %s", error)

    def _try(self, what: Callable[[], Any]) -> None:
        """Do something that the arm may refuse: then it is held, and the next measurement tells."""
        try:
            self._again(what)
        except HttpRefusal as error:
            self.refused_by_robot += 1
            LOG.warning("refused by the robot: %s", error)

    def _again(self, what: Callable[[], Any]) -> None:
        """Do something, and once more if the link was lost meanwhile; an arm that then has an error stays stopped."""
        try:
            what()
        except HttpRefusal:
            raise
        except ArmError as error:
            LOG.warning("%s", error)
            self.measure()  # waits for the link, and holds
            if self.gate.stopped:
                return
            what()

    def _wait_for(self, what: str, problem: RlinfError, look: Callable[[], Any], hear: Callable[[], object]) -> Any:
        """What `look` returns, once it does; `hear` is called meanwhile.

        Raises its error after `robot_wait_s`, RunEnding when the run is to end.
        """
        LOG.warning("%s is waited for: %s", what, problem)
        deadline = self._pace.now() + self._robot_wait_s
        while True:
            self._pass(ASK_AGAIN_S)
            self.end_if_asked(f"{what} was waited for: {problem}")
            hear()
            try:
                found = look()
            except (ArmError, CameraError) as error:
                if self._pace.now() >= deadline:
                    raise type(error)(
                        f"{what} did not come back in {self._robot_wait_s:g} s (robot_wait_s): {error}"
                    ) from error
            else:
                self.metronome.pause()
                LOG.warning("%s is back", what)
                return found

    def _pass(self, seconds: float) -> None:
        self._pace.wait_until(self._pace.now() + seconds)

    def _glide(self, pose: np.ndarray, seconds: float) -> None:
        """Waypoints on the straight way to a pose, at the rate of steps."""
        begin, limits, period = self.state.pose, self.gate.limits, self.metronome.period_s
        way = float(np.linalg.norm(pose[:3] - begin[:3])) / (SPEED_SHARE * limits.max_speed)
        turn = frames.angle_between(pose[3:], begin[3:]) / (SPEED_SHARE * limits.max_turn_rate)
        count = max(1, round(max(seconds, way, turn) / period))
        self.metronome.pause()
        for k in range(1, count + 1):
            self.command(frames.interpolate(begin, pose, k / count))
            self.wait()
            self._stay_if_asked_to_end()
            if self.listen() or self._verdict.kind == "outside":
                return

    def _settle(self, pose: np.ndarray) -> None:
        for _ in range(max(1, round(SETTLE_S / self.metronome.period_s))):
            self.command(pose)
            self.wait()
            self._stay_if_asked_to_end()
            if self.listen():
                return

    def _stay_if_asked_to_end(self) -> None:
        """On the way to an episode that nobody will play; the way that ends the run is gone to its end."""
        if not self._leaving and self.asked_to_end():
            self.hold()
            self.end_if_asked("the arm was on its way to the next episode")

    def _is_at(self, pose: np.ndarray) -> bool:
        away = float(np.linalg.norm(self.state.pose[:3] - pose[:3]))
        return away < ARRIVED_M and frames.angle_between(self.state.pose[3:], pose[3:]) < ARRIVED_RAD
