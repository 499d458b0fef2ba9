"""Step the digital twin without tensors: `twin_task` and `twin_robot` again, for one world, with floats.

Three quarters of the time that ManiSkill's own step of one world takes is spent on tensors with a batch of one.
Episodes are begun by ManiSkill. `tests/envs/test_maniskill_twin.py` holds both ways against each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rlinf.envs.maniskill.config import TWIN_TASKS
from rlinf.envs.maniskill.fast import ARM_JOINTS, Touch
from rlinf.envs.maniskill.scene import (
    SceneSpec,
    begin_world,
    instruction_of,
    open_world,
    picture_shapes,
    render_world,
    take_pictures,
)

CONTROL_MODE = "pd_ee_body_target_delta_pose_real_root_frame"


def why_not_fast(spec: SceneSpec) -> str | None:
    """Why this scene cannot be stepped here, or None if it can."""
    if spec.task not in TWIN_TASKS:
        return f"it is written for {' and '.join(TWIN_TASKS)} only, not for {spec.task}"
    if spec.control_mode != CONTROL_MODE:
        return f"it drives {CONTROL_MODE} only, not {spec.control_mode}"
    if spec.robot not in (None, "panda_twin"):
        return f"it drives the panda_twin only, not {spec.robot}"
    return None


@dataclass(frozen=True)
class Reading:
    """What is the case after a step: the full state, float32 [17], and what rewards are made of."""

    state: np.ndarray
    grasped: bool
    success: bool
    reach: float
    left: float


class TwinScene:
    """A `Scene` of a digital twin."""

    def __init__(self, spec: SceneSpec) -> None:
        import sapien

        from rlinf.envs.maniskill import twin_robot, twin_task

        self._task, self._robot, self._pose = twin_task, twin_robot, sapien.Pose
        self._world = open_world(spec)
        self._spec = spec
        agent = self._world.agent
        self._arm = agent.robot._objs[0]
        self._joints = self._arm.active_joints
        self._tool = agent.tcp._objs[0]
        arm, gripper = (agent.controller.controllers[name] for name in ("arm", "gripper"))
        self._late, self._steps = arm.latency_steps, self._world._sim_steps_per_control
        self._grip_low, self._grip_high = gripper.config.lower, gripper.config.upper
        solver = arm.kinematics
        self._solver, self._tool_index = solver.pmodel, solver.end_link_idx
        self._solved_joints = solver.qmask.numpy().astype(np.int32)
        self._tray = self._world.tray._objs[0]
        self._touch = Touch(agent)
        self.begin(seed=0)
        self.state_dim, self.action_dim = len(self.observe()), twin_robot.ACTION_DIM
        sees = spec.obs_mode == "rgb"
        self.cameras = picture_shapes(self._world) if sees else {}
        self.instruction = instruction_of(self._world) if sees else None

    def begin(self, seed: int) -> None:
        """As `Scene.begin`."""
        begin_world(self._world, seed)
        self._physics = self._world.scene.px
        self._step_physics = self._physics.step
        kind = int(self._world._chosen[0])
        self._thing = self._world.objects[kind]._objs[0]
        self._half_height = np.float32(self._world.half_heights[kind])
        tool = self._tool.entity_pose
        self._target_place, self._target_turn = tool.p, tool.q
        self._was_grasped = self._was_solved = self._is_solved = self._was_lost = False
        self._reading = self._read()

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """As `Scene.advance`."""
        action = action.clip(-1, 1)
        turn = _turn(*(self._robot.TURN_RAD * action[3:6]).tolist())
        # In single precision, as ManiSkill has them: contacts amplify a difference in the last bit.
        self._target_place = self._target_place + np.float32(self._robot.MOVE_M) * action[:3]
        self._target_turn = _product(turn, self._target_turn).astype(np.float32)
        angles = self._solve()
        grip = float((self._grip_low + self._grip_high) / 2 + (self._grip_high - self._grip_low) / 2 * action[6])
        step = self._step_physics
        for _ in range(self._late):
            step()
        for joint, target in zip(self._joints, (*angles, grip, grip), strict=True):
            joint.set_drive_target(target)
        for _ in range(self._steps - self._late):
            step()
        self._reading = self._read()
        return self._reward(), self._reading.success, False

    def observe(self) -> np.ndarray:
        """As `Scene.observe`."""
        state = self._reading.state
        return state[: self._task.TOOL_DIM] if self._spec.obs_mode == "rgb" else state

    def see(self) -> dict[str, np.ndarray]:
        """As `Scene.see`."""
        return {name: picture[0].numpy() for name, picture in take_pictures(self._world).items()}

    def render(self) -> np.ndarray:
        """As `Scene.render`."""
        return render_world(self._world)[0]

    def _solve(self) -> list[float]:
        """Joint angles that bring the tool to its target; the present ones where no solution is found."""
        qpos = self._arm.qpos
        wanted = self._pose(self._target_place, self._target_turn)
        angles, found, _ = self._solver.compute_inverse_kinematics(
            self._tool_index, wanted, initial_qpos=qpos, active_qmask=self._solved_joints, max_iterations=100
        )
        solved: list[float] = (angles if found else qpos)[:ARM_JOINTS].tolist()
        return solved

    def _read(self) -> Reading:
        task, tool, thing, tray = self._task, self._tool.entity_pose, self._thing.pose, self._tray.pose
        offset = (thing.p - tray.p).tolist()
        reach = math.dist(thing.p.tolist(), tool.p.tolist())
        grasped = reach < task.REACH_M and self._touch.grasps(self._physics, self._thing)
        floor = self._world.tray_floor
        gap = offset[2] - float(self._half_height) - floor
        inner_x, inner_y = self._world.tray_inner
        inside = abs(offset[0]) <= inner_x and abs(offset[1]) <= inner_y and offset[2] > 0 and gap <= task.MAX_GAP_M
        success = inside and math.hypot(*self._touch.force(self._physics, self._thing, self._tray)) > task.MIN_FORCE_N
        yaw = 2 * math.atan2(thing.q[3], thing.q[0])
        turns, opening = _turns(tool.q.tolist()), 2 * self._arm.qpos[-1]
        facing = math.cos(yaw), math.sin(yaw)
        on_tray = tray.p + np.array((0, 0, floor), np.float32)
        state = np.array(
            [*tool.p, *turns, opening, grasped, *thing.p, *facing, self._half_height, *on_tray], np.float32
        )
        return Reading(state, grasped, success, reach, math.hypot(offset[0], offset[1]))

    def _reward(self) -> float:
        now, mode, task = self._reading, self._spec.reward or "normalized_dense", self._task
        if mode == "only_success":
            return float(now.success)
        if mode == "sparse":
            return self._sparse_reward() / task.MAX_REWARD
        reward = task.MAX_REWARD
        if not now.success:
            reward = 1 - math.tanh(10 * now.reach) + (2 - math.tanh(10 * now.left) if now.grasped else 0)
        return reward if mode == "dense" else reward / task.MAX_REWARD

    def _sparse_reward(self) -> float:
        now, task = self._reading, self._task
        lost = self._is_solved and not now.success
        reward = 0.0
        if now.grasped and not self._was_grasped:
            reward += task.FIRST_GRASP
        if now.success and not self._was_solved:
            reward += task.FIRST_SUCCESS
        if lost and not self._was_lost:
            reward += task.LOST_SUCCESS
        self._was_grasped |= now.grasped
        self._was_solved |= now.success
        self._was_lost |= lost
        self._is_solved = now.success
        return reward


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quaternion of first the turn b, then a; w first."""
    aw, ax, ay, az = a.tolist()
    bw, bx, by, bz = b.tolist()
    return np.array(
        (
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        )
    )


def _turn(about_x: float, about_y: float, about_z: float) -> np.ndarray:
    """Quaternion of R_x R_y R_z."""
    turns = [
        np.array((math.cos(angle / 2), *(math.sin(angle / 2) * unit)))
        for angle, unit in zip((about_x, about_y, about_z), np.eye(3), strict=True)
    ]
    return _product(_product(turns[0], turns[1]), turns[2])


def _turns(quaternion: list[float]) -> tuple[float, float, float]:
    """Angles about the fixed axes x, y, z in this order (R_z R_y R_x), in rad, the first in [0, 2π)."""
    w, x, y, z = quaternion
    about_x = math.atan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y))
    about_y = math.asin(max(-1.0, min(1.0, 2 * (w * y - z * x))))
    about_z = math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return about_x % (2 * math.pi), about_y, about_z
