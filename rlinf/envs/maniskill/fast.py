"""Step a ManiSkill scene of the Panda arm without tensors.

A ManiSkill step of one world spends nine tenths of its time on tensors with a batch of one; the physics is the
rest. Here the same scene, built by ManiSkill, is begun and driven through SAPIEN's own objects: initial state,
controller, observation and reward are computed with numpy and floats, from the constants of ManiSkill's
controllers. `tests/envs/test_maniskill_fast.py` holds both against each other.

Tasks are in `TASKS`; a further one is a class with `place` and `read`. Initial states and reward formulas are those
of mani_skill/envs/tasks/tabletop/{pick_cube,push_cube}.py and mani_skill/utils/scene_builder/table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from rlinf.envs.maniskill.scene import SceneSpec, open_world, render_world, renew_physics

ARM_JOINTS = 7
CONTROL_MODES = ("pd_ee_delta_pos", "pd_joint_delta_pos")
GRASP_FORCE_N = 0.5
GRASP_ANGLE_DEG = 85.0
STATIC_SPEED_RAD_PER_S = 0.2
FINGER_REACH_M = 0.15
"""Beyond this distance between tool centre and object no finger can touch it, so contacts are not asked for."""
REST_QPOS = (0.0, math.pi / 8, 0.0, -math.pi * 5 / 8, 0.0, math.pi * 3 / 4, math.pi / 4, 0.04, 0.04)
OPEN_FINGER_M = 0.04
BASE_PLACE = (-0.615, 0.0, 0.0)


@dataclass(frozen=True)
class Reading:
    """State float32 [S], dense reward and success after a step."""

    state: np.ndarray
    reward: float
    success: bool


class FastTask(Protocol):
    """A task's initial state, observation and dense reward, from the robot's reading."""

    num_draws: int
    max_reward: float

    def place(self, draws: np.ndarray) -> None:
        """Lay out the objects of an episode, at rest, from float32 [num_draws] in [0, 1)."""
        ...

    def read(self, panda: Panda) -> Reading:
        """State, reward and success now."""
        ...


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return math.dist(a.tolist(), b.tolist())


def _closeness(distance: float) -> float:
    """1 − tanh(5 d): one at no distance, none far away."""
    return 1.0 - math.tanh(5.0 * distance)


def _turned_about_z(angle: np.float32) -> np.ndarray:
    """Quaternion, float32 [4], to the bit as ManiSkill's `random_quaternions` makes it by way of a matrix."""
    # numpy's sine, cosine and square root differ from torch's in the last bit.
    turn = torch.tensor([angle])
    cos, sin = np.float32(turn.cos().item()), np.float32(turn.sin().item())
    one = np.float32(1)
    w, z = torch.tensor([one + cos + cos + one, one - cos - cos + one]).clamp(min=0).sqrt().numpy()
    if w >= z:
        return np.array((w * w, 0, 0, sin + sin), np.float32) / (2 * w)
    quaternion = np.array((sin + sin, 0, 0, z * z), np.float32) / (2 * z)
    return -quaternion if sin < 0 else quaternion


def _stop(body: Any) -> None:
    body.linear_velocity = body.angular_velocity = np.zeros(3, np.float32)


class PickCube:
    """Grasp the cube and hold it still at the goal.

    S = 42: qpos 9, qvel 9, grasped 1, tcp pose 7, goal 3, cube pose 7, cube − tcp 3, goal − cube 3.
    """

    num_draws = 2 + 3 + 2 + 1
    max_reward = 5.0

    def __init__(self, world: Any) -> None:
        import sapien

        self._pose = sapien.Pose
        self._cube, self._goal_site = world.cube._objs[0], world.goal_site._objs[0]
        self._body = world.cube._bodies[0]
        self._goal_radius = world.goal_thresh
        self._half_size, self._max_height = world.cube_half_size, world.max_goal_height
        self._spawn_half_size = world.cube_spawn_half_size
        self._spawn_center = np.array(world.cube_spawn_center, np.float32)
        self._goal = np.zeros(3, np.float32)

    def place(self, draws: np.ndarray) -> None:
        """As `FastTask.place`; draws: cube x y, three angles of which only the last counts, goal x y z."""
        _stop(self._body)
        height = np.float32(self._half_size)
        turn = _turned_about_z(draws[4] * np.float32(2 * math.pi))
        self._cube.pose = self._pose(np.append(self._spot(draws[:2]), height), turn)
        goal = np.append(self._spot(draws[5:7]), draws[7] * np.float32(self._max_height) + height)
        self._goal_site.pose = self._pose(goal)
        self._goal = self._goal_site.pose.p

    def _spot(self, draws: np.ndarray) -> np.ndarray:
        return draws * self._spawn_half_size * 2 - self._spawn_half_size + self._spawn_center

    def read(self, panda: Panda) -> Reading:
        """As `FastTask.read`."""
        qpos, qvel, tcp, cube = panda.qpos, panda.qvel, panda.tcp.entity_pose, self._cube.pose
        to_cube, to_goal = cube.p - tcp.p, self._goal - cube.p
        reach, left = math.hypot(*to_cube.tolist()), math.hypot(*to_goal.tolist())
        grasped = reach < FINGER_REACH_M and panda.grasps(self._cube)
        placed = left <= self._goal_radius
        speeds = qvel[:ARM_JOINTS].tolist()
        success = placed and max(map(abs, speeds)) <= STATIC_SPEED_RAD_PER_S
        if success:
            reward = self.max_reward
        else:
            reward = _closeness(reach)
            if grasped:
                reward += 1.0 + _closeness(left)
            if placed:
                reward += _closeness(math.hypot(*speeds))
        parts = (qpos, qvel, (grasped,), tcp.p, tcp.q, self._goal, cube.p, cube.q, to_cube, to_goal)
        return Reading(np.concatenate(parts, dtype=np.float32), reward, success)


class PushCube:
    """Push the cube into the circle before it.

    S = 35: qpos 9, qvel 9, tcp pose 7, goal 3, cube pose 7.
    """

    num_draws = 2
    max_reward = 4.0

    def __init__(self, world: Any) -> None:
        import sapien

        self._pose = sapien.Pose
        self._cube, self._region = world.obj._objs[0], world.goal_region._objs[0]
        self._body = world.obj._bodies[0]
        self._radius, self._half_size = world.goal_radius, world.cube_half_size
        self._goal = np.zeros(3, np.float32)

    def place(self, draws: np.ndarray) -> None:
        """As `FastTask.place`; draws are cube x y."""
        _stop(self._body)
        spot = np.append(draws * 0.2 - 0.1, np.float32(self._half_size))
        self._cube.pose = self._pose(spot, (1, 0, 0, 0))
        goal = (spot[0] + np.float32(0.1 + self._radius), spot[1], 1e-3)
        # The disc's axis is its x; a quarter turn about y lays it flat.
        self._region.pose = self._pose(goal, (math.cos(math.pi / 4), 0, math.sin(math.pi / 4), 0))
        self._goal = self._region.pose.p

    def read(self, panda: Panda) -> Reading:
        """As `FastTask.read`."""
        tcp, cube = panda.tcp.entity_pose, self._cube.pose
        behind = cube.p + np.array([-self._half_size - 0.005, 0, 0], np.float32)
        reach = _distance(behind, tcp.p)
        left = _distance(cube.p[:2], self._goal[:2])
        height = float(cube.p[2])
        success = left < self._radius and height < self._half_size + 5e-3
        if success:
            reward = self.max_reward
        else:
            reward = _closeness(reach)
            if reach < 0.01:
                reward += _closeness(left) * (1 + _closeness(abs(height - self._half_size)))
        parts = (panda.qpos, panda.qvel, tcp.p, tcp.q, self._goal, cube.p, cube.q)
        return Reading(np.concatenate(parts, dtype=np.float32), reward, success)


TASKS: dict[str, Callable[[Any], FastTask]] = {"PickCube-v1": PickCube, "PushCube-v1": PushCube}
"""ManiSkill id → task."""


def why_not_fast(spec: SceneSpec) -> str | None:
    """Why this scene cannot be stepped here, or None if it can."""
    if spec.task not in TASKS:
        return f"it is written for {' and '.join(TASKS)} only, not for {spec.task}"
    if spec.obs_mode == "rgb":
        return "it draws no pictures"
    if spec.control_mode not in CONTROL_MODES:
        return f"it drives {' and '.join(CONTROL_MODES)} only, not {spec.control_mode}"
    if spec.robot not in (None, "panda"):
        return f"it drives the panda only, not {spec.robot}"
    return None


class Touch:
    """What presses on what in a world with a Panda."""

    def __init__(self, agent: Any) -> None:
        self._fingers = tuple(
            (link._objs[0], sign) for link, sign in ((agent.finger1_link, 1.0), (agent.finger2_link, -1.0))
        )

    def grasps(self, physics: Any, thing: Any) -> bool:
        """Whether both fingers press on `thing` from inside: force and angle as ManiSkill's `is_grasping`."""
        pairs = _touching(physics)
        for finger, sign in self._fingers:
            force = _force(pairs, finger.entity, thing, physics.timestep)
            strength = math.hypot(*force)
            if strength < GRASP_FORCE_N:
                return False
            opening = (sign * finger.entity_pose.to_transformation_matrix()[:3, 1]).tolist()
            cosine = sum(f * o for f, o in zip(force, opening, strict=True)) / strength
            if math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) > GRASP_ANGLE_DEG:
                return False
        return True

    def force(self, physics: Any, one: Any, other: Any) -> tuple[float, float, float]:
        """Force between two entities in N."""
        return _force(_touching(physics), one, other, physics.timestep)


def _touching(physics: Any) -> list[Any]:
    return [(*(body.entity for body in contact.bodies), contact.points) for contact in physics.get_contacts()]


def _force(pairs: list[Any], one: Any, other: Any, period: float) -> tuple[float, float, float]:
    x = y = z = 0.0
    for first, second, points in pairs:
        if first == one and second == other:
            sign = 1.0
        elif first == other and second == one:
            sign = -1.0
        else:
            continue
        for point in points:
            impulse = point.impulse
            x, y, z = x + sign * impulse[0], y + sign * impulse[1], z + sign * impulse[2]
    return x / period, y / period, z / period


class Panda:
    """The arm of a ManiSkill world through SAPIEN's objects: drives, physics steps, readings, grasp test.

    SAPIEN's objects live as long as the world is not rebuilt.
    """

    def __init__(self, world: Any, control_mode: str) -> None:
        import sapien

        self._pose = sapien.Pose
        self._world = world
        agent, controllers = world.agent, world.agent.controller.controllers
        self._arm = agent.robot._objs[0]
        self._joints = self._arm.active_joints
        self._root = self._arm.links[0]
        self.tcp = agent.tcp._objs[0]
        self._touch = Touch(agent)
        self._physics_steps = world._sim_steps_per_control
        self._noise_std = world.table_scene.robot_init_qpos_noise
        arm, gripper = controllers["arm"].config, controllers["gripper"].config
        self._grip_middle, self._grip_half_range = _middle_and_half_range(gripper.lower, gripper.upper)
        if control_mode == "pd_joint_delta_pos":
            self._targets = self._joint_targets
            self.action_dim = ARM_JOINTS + 1
            self._middle, self._half_range = _middle_and_half_range(arm.lower, arm.upper)
        else:
            self._targets = self._tool_targets
            self.action_dim = 3 + 1
            self._middle, self._half_range = _middle_and_half_range(arm.pos_lower, arm.pos_upper)
            solver = controllers["arm"].kinematics
            self._solver, self._tool_index = solver.pmodel, solver.end_link_idx
            self._solved_joints = solver.qmask.numpy().astype(np.int32)
        self.qpos = self.qvel = np.zeros(ARM_JOINTS + 2, np.float32)

    def place(self, noise: np.random.RandomState) -> None:
        """Put the arm near its rest pose, without velocity."""
        self._physics = self._world.scene.px
        qpos = noise.normal(0, self._noise_std, len(REST_QPOS)) + REST_QPOS
        qpos[ARM_JOINTS:] = OPEN_FINGER_M
        nothing, still = np.zeros(len(REST_QPOS), np.float32), np.zeros(3, np.float32)
        self._arm.qpos, self._arm.qvel, self._arm.qf = qpos, nothing, nothing
        self._arm.set_root_linear_velocity(still)
        self._arm.set_root_angular_velocity(still)
        self._arm.set_root_pose(self._pose(BASE_PLACE))
        self._sense()

    def move(self, action: np.ndarray) -> None:
        """Set the drives for an action, float32 [A], and let the physics run for one control period."""
        action = action.clip(-1, 1)
        grip = float(self._grip_middle + self._grip_half_range * action[-1])
        for joint, target in zip(self._joints, (*self._targets(action), grip, grip), strict=True):
            joint.set_drive_target(target)
        step = self._physics.step
        for _ in range(self._physics_steps):
            step()
        self._sense()

    def grasps(self, thing: Any) -> bool:
        """Whether both fingers press on `thing` from inside."""
        return self._touch.grasps(self._physics, thing)

    def _joint_targets(self, action: np.ndarray) -> list[float]:
        return (self.qpos[:ARM_JOINTS] + (self._middle + self._half_range * action[:ARM_JOINTS])).tolist()

    def _tool_targets(self, action: np.ndarray) -> list[float]:
        """Joint angles that move the tool by action[:3]; the present ones where no solution is found.

        The base is not turned in any of `TASKS`. Its quaternion is (w, 0, 0, 0) with w = 1 up to rounding, and
        rotating by it is w (w v); kept because contacts amplify a difference in the last bit.
        """
        tool, base = self.tcp.entity_pose, self._root.entity_pose
        w = base.q[0]
        place = w * (w * -base.p) + w * (w * tool.p)
        turn = w * tool.q if tool.q[0] >= 0 else -w * tool.q
        wanted = self._pose(self._middle + self._half_range * action[:3] + place, turn)
        angles, found, _ = self._solver.compute_inverse_kinematics(
            self._tool_index,
            wanted,
            initial_qpos=self.qpos,
            active_qmask=self._solved_joints,
            max_iterations=100,
        )
        return (angles if found else self.qpos)[:ARM_JOINTS].tolist()

    def _sense(self) -> None:
        self.qpos, self.qvel = self._arm.qpos, self._arm.qvel


def _middle_and_half_range(lower: float, upper: float) -> tuple[np.float32, np.float32]:
    """In single precision throughout, as ManiSkill computes them: contacts amplify a difference in the last bit."""
    low, high, half = np.float32(lower), np.float32(upper), np.float32(0.5)
    return half * (high + low), half * (high - low)


class FastScene:
    """A `Scene` of one of `TASKS`."""

    cameras: dict[str, tuple[int, int, int]] = {}  # noqa: RUF012  # no instance has others
    instruction: str | None = None

    def __init__(self, spec: SceneSpec) -> None:
        self._world = open_world(spec)
        self._spec = spec
        self._panda = Panda(self._world, spec.control_mode)
        self._task = TASKS[spec.task](self._world)
        # ManiSkill draws from two generators that it makes anew from the seed; seeding one again is far cheaper.
        self._noise, self._generator = np.random.RandomState(0), torch.Generator()
        self.begin(seed=0)
        self.action_dim, self.state_dim = self._panda.action_dim, len(self._reading.state)

    def begin(self, seed: int) -> None:
        """As `Scene.begin`."""
        renew_physics(self._world)
        self._noise.seed(seed)
        self._generator.manual_seed(seed)
        self._panda.place(self._noise)
        self._task.place(torch.rand(self._task.num_draws, generator=self._generator).numpy())
        self._reading = self._task.read(self._panda)

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """As `Scene.advance`."""
        self._panda.move(action)
        self._reading = self._task.read(self._panda)
        success = self._reading.success
        return self._reward(), success, False

    def observe(self) -> np.ndarray:
        """As `Scene.observe`."""
        return self._reading.state

    def see(self) -> dict[str, np.ndarray]:
        """As `Scene.see`: nothing."""
        return {}

    def render(self) -> np.ndarray:
        """As `Scene.render`."""
        return render_world(self._world)[0]

    def _reward(self) -> float:
        if self._spec.reward in ("sparse", "only_success"):
            return float(self._reading.success)
        if self._spec.reward == "dense":
            return self._reading.reward
        return self._reading.reward / self._task.max_reward
