"""`PegInsertionEnv-v1` as a `Simulator` of one world: a robot cell, or its twin.

A step: the policy's action, or that of the operator who took over, becomes a wished pose, near the measured one; the
gate and the arm take it; when the next step is due, the arm is measured and pictured. See `observation` for the
vectors, `task` for the reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rlinf.core.types import EnvSpaces, Obs
from rlinf.envs.episodes import Outcome
from rlinf.envs.realworld import frames
from rlinf.envs.realworld.arm import Compliance
from rlinf.envs.realworld.observation import action_of, motion_of, proprioception, state_dim
from rlinf.envs.realworld.pacing import Pace
from rlinf.envs.realworld.robot_cell import RobotCell
from rlinf.envs.realworld.task import PoseGoal
from rlinf.envs.realworld.teleop.operator import Operator, Takeover

INSTRUCTION = "Insert the peg into the hole."
ARM_DIM = 6
Judge = Callable[[dict[str, np.ndarray]], bool]
"""Pictures → whether they show success."""


@dataclass(frozen=True)
class PegTask:
    """Numbers of the task; see `PegInsertionConfig`.

    Attributes:
        start: pose [7] where episodes begin.
        random_xy_m, random_rz_rad: by up to so much it is randomised.
        action_scale: m, rad, and the gripper's.
        relative, rotation, show_goal: what is observed; see `observation`.
        acting, moving: gains while the policy acts, and on the way to where an episode begins.
        joint_reset_cycle: joint reset before every n-th episode; 0: never.
        reset_s: time for that way.
        gripper: whether actions have a seventh element.
        gripper_threshold, gripper_s, gripper_penalty: what it means, takes and costs.
        judged_by: `pose`, `keyboard` or `classifier`.
        teleport: begin at once where the episode begins, in simulated time.
    """

    start: np.ndarray
    random_xy_m: float = 0.05
    random_rz_rad: float = np.pi / 6
    action_scale: tuple[float, float, float] = (0.02, 0.1, 1.0)
    relative: bool = True
    rotation: str = "euler"
    show_goal: bool = False
    acting: Compliance = field(default_factory=Compliance)
    moving: Compliance = field(default_factory=Compliance)
    joint_reset_cycle: int = 0
    reset_s: float = 1.5
    gripper: bool = False
    gripper_threshold: float = 0.5
    gripper_s: float = 0.6
    gripper_penalty: float = 0.1
    judged_by: str = "pose"
    teleport: bool = False


class PegInsertion:
    """One cell under the task.

    Args:
        cell: opened.
        goal: what counts as solved.
        task: the rest of the task.
        pace: the cell's, for the operator's clock.
        image_shapes: camera → (H, W, 3).
        operator: whose commands may replace actions; None for nobody.
        classifier: says from pictures whether the task is solved; needed for `judged_by: classifier`.
        film: draws a picture for people; None: nobody looks.
    """

    num_envs = 1
    device = torch.device("cpu")

    def __init__(
        self,
        cell: RobotCell,
        goal: PoseGoal,
        task: PegTask,
        pace: Pace,
        image_shapes: dict[str, tuple[int, int, int]],
        *,
        operator: Operator | None = None,
        classifier: Judge | None = None,
        film: Callable[[], np.ndarray] | None = None,
    ) -> None:
        self.cell, self.goal, self.operator = cell, goal, operator
        self._task, self._pace, self._film, self._classifier = task, pace, film, classifier
        self._takeover = Takeover(ARM_DIM + task.gripper)
        self._episodes = 0
        self._origin = cell.state.pose
        self._open = True  # the fingers, as last commanded
        cell.asked_to_stop = self._is_asked_to_stop
        self._wants_pictures = bool(image_shapes)
        self._begun_with: dict[str, float] = {}
        self._interventions, self._strongest_n, self._reached = 0, 0.0, False
        self.spaces = _spaces(state_dim(task.rotation, task.show_goal), image_shapes, ARM_DIM + task.gripper)

    # ---- the simulator's methods

    def begin(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """Bring the arm to a start that is drawn from the seed, and let the policy's gains hold."""
        if not len(rows):
            return
        cell, task = self.cell, self._task
        start, before = self._draw_start(np.random.default_rng(seeds[0])), cell.counts()
        if task.teleport:
            cell.put(start)
        else:
            self._bring_to(start)
        cell.set_compliance(task.acting)
        self._episodes += 1
        self._origin = cell.state.pose.copy()
        self.goal.begin()
        self._takeover.reset()
        self._interventions, self._strongest_n, self._reached = 0, 0.0, False
        self._begun_with = before | {"limited": cell.counts()["limited"]}
        cell.listen()  # what the operator said of the episode before is over, but for a stop
        cell.metronome.begin()

    def advance(self, action: Tensor, active: Tensor) -> Outcome:
        """One step of the arm: `action` [1, A], clipped to [−1, 1], unless the operator acts."""
        none = torch.zeros(1, dtype=torch.bool)
        if not bool(active[0]):
            return Outcome(torch.zeros(1), none, none)
        cell, task = self.cell, self._task
        cell.refresh()  # before anything is chosen on it
        intervention, mark = self._ask_operator()
        if mark == "stop":
            cell.stop_as_asked()
        given = action[0].numpy().clip(-1, 1) if intervention is None else intervention
        motion = motion_of(given.astype(float), cell.state.pose, task.action_scale, task.relative)
        cell.command(frames.moved(cell.state.pose, motion))
        fingers = task.gripper and not cell.gate.stopped
        cost = self._move_gripper(float(given[ARM_DIM]) * task.action_scale[2]) if fingers else 0.0
        state = cell.wait()
        self._strongest_n = max(self._strongest_n, float(np.linalg.norm(state.force_n)))
        reward, success, failure = self._judge(mark)
        if cell.gate.stopped:  # what a stop ends is paid nothing, wherever the arm is then
            reward, success, failure = 0.0, False, True
        taken = intervention is not None
        self._interventions += taken
        executed = torch.from_numpy(given.astype(np.float32))[None] if taken else None
        return Outcome(
            torch.tensor([reward - cost], dtype=torch.float32),
            torch.tensor([success]),
            torch.tensor([failure]),
            executed,
            torch.tensor([taken]),
        )

    def observe(self) -> Obs:
        """The state, the pictures of all cameras, and the instruction."""
        pictures = self.cell.pictures() if self._wants_pictures else {}
        obs: Obs = {"state": torch.from_numpy(self._state_vector().astype(np.float32))[None]}
        if pictures:
            obs["images"] = {name: torch.from_numpy(picture.copy())[None] for name, picture in pictures.items()}
        obs["instruction"] = [INSTRUCTION]
        return obs

    def report(self) -> dict[str, Tensor]:
        """What `EnvStep.info` tells of the episode so far, besides the usual; see docs/metrics.md."""
        cell, begun = self.cell, self._begun_with
        counts = {name: count - begun.get(name, 0.0) for name, count in cell.counts().items()}
        numbers = {
            "episode/interventions": float(self._interventions),
            "episode/force_max_n": self._strongest_n,
            "episode/gate_limited": counts["limited"],
            "episode/gate_refused": counts["refused"],
            "episode/stops": counts["stops"],
            "episode/missed_deadlines": float(cell.metronome.missed),
            "episode/camera_restarts": float(cell.camera_restarts),
        }
        if self._task.judged_by != "pose":
            numbers["episode/target_reached"] = float(self._reached)
        numbers |= {f"episode/jitter_{name}_ms": value for name, value in cell.metronome.jitter_ms().items()}
        return {name: torch.tensor([number], dtype=torch.float32) for name, number in numbers.items()}

    def give_up_when(self, asked: Callable[[], bool]) -> None:
        """As `Patient.give_up_when`."""
        self.cell.asked_to_end = asked

    def render(self) -> np.ndarray | None:
        """uint8 [1, height, width, 3], or None if nobody looks."""
        return None if self._film is None else self._film()[None]

    def close(self) -> None:
        """Hold the arm or park it, and let go of everything."""
        try:
            self.cell.close()  # which may still move, and is stopped by the operator then
        finally:
            if self.operator is not None:
                self.operator.close()

    # ---- for an operator who is a script

    def full_state(self) -> np.ndarray:
        """The state [1, S] with the way to the target, along the base's axes: what a scripted operator moves along."""
        way = self.goal.way(self.cell.state.pose)
        return np.concatenate((proprioception(self.cell.state, None, "euler"), way))[None]

    # ---- inside

    def _state_vector(self) -> np.ndarray:
        task, state = self._task, self.cell.state
        vector = proprioception(state, self._origin if task.relative else None, task.rotation)
        if task.show_goal:
            way = self.goal.way(state.pose)
            vector = np.append(vector, frames.in_tool_axes(way, state.pose) if task.relative else way)
        return vector

    def _draw_start(self, generator: np.random.Generator) -> np.ndarray:
        task = self._task
        x, y, turn = generator.uniform(-1, 1, 3) * (task.random_xy_m, task.random_xy_m, task.random_rz_rad)
        return frames.moved(task.start, np.array([x, y, 0, 0, 0, turn]))

    def _bring_to(self, start: np.ndarray) -> None:
        """Move there. A robot that is stopped on its way begins anew when a person has cleared it."""
        cell = self.cell
        while True:
            cell.end_if_asked("the next episode did not begin")
            cell.clear_stop()
            cell.set_compliance(self._task.moving)
            self._go_to(start)
            if cell.simulated or not cell.gate.stopped:
                return

    def _go_to(self, start: np.ndarray) -> None:
        cell, task = self.cell, self._task
        if not task.gripper and self._episodes == 0:
            cell.gripper(0.0, task.gripper_s)  # the peg is between the fingers
        cycle = task.joint_reset_cycle
        if cycle and self._episodes and self._episodes % cycle == 0:
            cell.lift()
            if not cell.gate.stopped:
                cell.joint_reset()
        cell.go(start, task.reset_s)

    def _is_asked_to_stop(self) -> bool:
        return self.operator is not None and self.operator.read().mark == "stop"

    def _ask_operator(self) -> tuple[np.ndarray | None, str]:
        """What the operator does, [A] along the axes of actions, and the mark; None: the policy acts."""
        if self.operator is None:
            return None, ""
        command = self.operator.read()
        intervention = self._takeover.decide(command, self._pace.now())
        if intervention is not None:
            intervention[:ARM_DIM] = action_of(
                intervention[:ARM_DIM].astype(float), self.cell.state.pose, self._task.relative
            )
        return intervention, command.mark

    def _judge(self, mark: str) -> tuple[float, bool, bool]:
        """Reward, success and failure of the step."""
        reward, success = self.goal.judge(self.cell.state.pose)
        self._reached |= success
        if self._task.judged_by == "keyboard":
            success = mark == "success"
            reward = float(success)
        elif self._task.judged_by == "classifier":
            assert self._classifier is not None
            success = self._classifier(self.cell.pictures())
            reward = float(success)
        return reward, success, mark in ("failure", "stop")

    def _move_gripper(self, value: float) -> float:
        """Close or open the fingers if they are not; what that costs."""
        task = self._task
        wanted = value >= task.gripper_threshold if not self._open else value > -task.gripper_threshold
        if wanted == self._open:
            return 0.0
        self._open = wanted
        self.cell.gripper(float(wanted), task.gripper_s)
        return task.gripper_penalty


def _spaces(state_size: int, image_shapes: dict[str, tuple[int, int, int]], action_dim: int) -> EnvSpaces:
    images: dict[str, tuple[int, ...]] = {f"images/{name}": shape for name, shape in sorted(image_shapes.items())}
    shapes: dict[str, tuple[int, ...]] = {"state": (state_size,), **images, "instruction": ()}
    dtypes = {"state": "float32", **dict.fromkeys(images, "uint8"), "instruction": "str"}
    return EnvSpaces(shapes, dtypes, action_dim)
