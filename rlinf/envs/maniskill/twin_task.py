"""Pick and place before one camera: the digital twin, with primitive objects and without any download.

A Panda is to put the object on the table into the white tray. Lengths are in m, in the frame of the robot's base: x
forward, y to its left, z up; the table's surface is z = 0. Object and tray lie where RLinf-Co has them before its
robot, a little closer together at most, so that they never touch.

What the robot knows of itself, `TOOL` [7]: tool position 3; its turn about x, y, z 3 in rad (extrinsic, the first in
[0, 2π), as a tool that points down is turned by π); opening of the gripper 1. The full state goes on, `STATE_DIM`
numbers in all:

    7  grasped    8-10  object    11-12  cos, sin of its yaw    13  half its height    14-16  floor of the tray

Rewards are RLinf-Co's, each divided by 5 (`normalized_dense` and `sparse`), with memory in the latter:

    dense   5 if solved, else 1 − tanh(10 d(tool, object)) + grasped (2 − tanh(10 d_xy(object, tray)))
    sparse  1 for the first grasp, 5 for the first success, −2 the first time that a success is lost

Differs from RLinf-Co: the object must lie inside the tray's rim (there: nearer to its centre than half of its longer
side and a centimetre), as ours is so low that things beside it touch it; primitive objects; fewer physics steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils import sapien_utils
from mani_skill.utils.geometry.rotation_conversions import matrix_to_euler_angles, quaternion_to_matrix
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs.actor import Actor
from mani_skill.utils.structs.pose import Pose
from torch import Tensor

from rlinf.envs.maniskill.config import TWIN_TASK, TwinWorld
from rlinf.envs.maniskill.twin_robot import HOME_QPOS, TwinPanda

INSTRUCTION = "Pick up the object on the table and place it into the white tray."
TOOL_DIM, STATE_DIM = 7, 17
MAX_REWARD = 5.0
FIRST_GRASP, FIRST_SUCCESS, LOST_SUCCESS = 1.0, 5.0, -2.0

OBJECT_LOW, OBJECT_HIGH = (0.34, 0.12), (0.50, 0.27)
TRAY_LOW, TRAY_HIGH = (0.40, -0.105), (0.50, -0.01)
TRAY_HALF_M, TRAY_RIM_M, TRAY_WALL_M, TRAY_FLOOR_M = 0.075, 0.02, 0.004, 0.004
MAX_GAP_M = 0.05
"""A solved object's underside is at most so high above the tray's floor."""
MIN_FORCE_N = 0.03
REACH_M = 0.15
"""Beyond this distance between tool and object no finger touches it, so contacts are not asked for."""

TABLE_HALF, TABLE_CENTRE = (0.55, 0.65, 0.02), (0.40, 0.0, -0.02)
FLOOR_Z = -0.6
STORE_X, STORE_SPACING_M = 0.2, 0.12
"""Objects that an episode has no use for rest on the floor under the table, so far apart in y."""
WALL_X = -0.75
COLOURS = (
    (0.80, 0.10, 0.10),
    (0.10, 0.50, 0.15),
    (0.10, 0.20, 0.75),
    (0.90, 0.65, 0.05),
    (0.50, 0.15, 0.60),
    (0.05, 0.55, 0.60),
)
WHITE, WALL_COLOUR, FLOOR_COLOUR = (0.95, 0.95, 0.95), (0.60, 0.64, 0.68), (0.25, 0.25, 0.27)


@dataclass(frozen=True)
class Thing:
    """An object: a box by its half sizes, or an upright cylinder by its radius, twice, and half its height."""

    name: str
    kind: Literal["box", "cylinder"]
    half_size: tuple[float, float, float]


THINGS = (
    Thing("cube", "box", (0.022, 0.022, 0.022)),
    Thing("bar", "box", (0.034, 0.017, 0.020)),
    Thing("can", "cylinder", (0.021, 0.021, 0.026)),
)


class PickAndPlace(BaseEnv):
    """The task over objects and a tray that a subclass brings."""

    SUPPORTED_ROBOTS = ["panda_twin"]  # noqa: RUF012  # ManiSkill's
    SUPPORTED_REWARD_MODES = ("normalized_dense", "dense", "sparse", "none")
    agent: TwinPanda
    objects: list[Actor]
    """All objects; `half_heights` are theirs. An episode has one of them on the table."""
    half_heights: list[float]
    tray: Actor
    tray_inner: tuple[float, float]
    """Half sizes of the tray's floor along x and y."""
    tray_floor = TRAY_FLOOR_M
    """Height of that floor above the tray's origin."""
    tray_height = 0.0
    """Height of the tray's origin above the table."""

    def __init__(
        self, *arguments: Any, robot_uids: str = "panda_twin", twin: TwinWorld | None = None, **keywords: Any
    ) -> None:
        self.numbers = TwinWorld() if twin is None else twin
        super().__init__(*arguments, robot_uids=robot_uids, **keywords)

    def get_language_instruction(self) -> list[str]:
        """What the robot is told, once per world."""
        return [INSTRUCTION] * self.num_envs

    # ---- cameras and light

    @property
    def _default_sensor_configs(self) -> list[CameraConfig]:
        numbers = self.numbers
        pose = sapien_utils.look_at(numbers.camera_position, numbers.camera_target)
        return [CameraConfig("front", pose, 128, 128, numbers.camera_fov_rad, 0.01, 10.0)]

    @property
    def _default_human_render_camera_configs(self) -> CameraConfig:
        pose = sapien_utils.look_at((1.0, 0.25, 0.5), (0.38, 0.05, 0.13))
        return CameraConfig("render_camera", pose, 512, 512, 0.85, 0.01, 10.0)

    def _load_lighting(self, options: dict[str, Any]) -> None:
        self.scene.set_ambient_light(list(self.numbers.ambient_light))
        self.scene.add_directional_light(list(self.numbers.sun_direction), list(self.numbers.sun_light))

    # ---- scene

    def _load_agent(self, options: dict[str, Any]) -> None:
        import sapien

        super()._load_agent(options, sapien.Pose())
        numbers = self.numbers
        self.agent.tune(
            stiffness=numbers.arm_stiffness,
            damping=numbers.arm_damping,
            latency_steps=round(numbers.latency_s * self._sim_freq),
        )

    def _load_scene(self, options: dict[str, Any]) -> None:
        self._load_room()
        self._load_things()
        n, device = self.num_envs, self.device
        self._chosen = torch.zeros(n, dtype=torch.int64, device=device)
        self._heights = torch.tensor(self.half_heights, device=device)
        self._inner = torch.tensor(self.tray_inner, device=device)
        self._was_grasped = torch.zeros(n, dtype=torch.bool, device=device)
        self._was_solved, self._is_solved, self._was_lost = (torch.zeros_like(self._was_grasped) for _ in range(3))

    def _load_room(self) -> None:
        """Table, floor and a wall behind the robot."""
        room: list[tuple[str, tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]] = [
            ("table", TABLE_CENTRE, TABLE_HALF, self.numbers.table_colour),
            ("floor", (0.4, 0.0, FLOOR_Z - 0.02), (1.5, 1.5, 0.02), FLOOR_COLOUR),
            ("wall", (WALL_X, 0.0, 0.4), (0.02, 1.5, 1.0), WALL_COLOUR),
        ]
        for name, place, half_size, colour in room:
            builder = self.scene.create_actor_builder()
            self._add_box(builder, (0, 0, 0), half_size, colour)
            builder.initial_pose = pose_of(place)
            builder.build_static(name=name)

    def _load_things(self) -> None:
        """Build `objects` and `tray`."""
        raise NotImplementedError

    def _stored_at(self, index: int) -> tuple[float, float, float]:
        """Where one of `objects` rests while it is not used."""
        y = (index - (len(self.half_heights) - 1) / 2) * STORE_SPACING_M
        return STORE_X, y, FLOOR_Z + self.half_heights[index]

    def _add_box(self, builder: Any, place: Any, half_size: Any, colour: Any) -> None:
        builder.add_box_collision(
            pose_of(place), half_size, material=self._surface(), density=self.numbers.object_density
        )
        builder.add_box_visual(pose_of(place), half_size, material=_paint(colour))

    def _surface(self) -> Any:
        import sapien

        friction = self.numbers.object_friction
        return sapien.physx.PhysxMaterial(friction, friction, 0.0)

    # ---- episodes

    def _initialize_episode(self, env_idx: Tensor, options: dict[str, Any]) -> None:
        with torch.device(self.device):
            # Every draw is made in every episode, whatever is drawn with it: the same seed, the same episode.
            draws = torch.rand(len(env_idx), 7)
            noise = torch.randn(len(env_idx), 7) * self.numbers.arm_noise_rad
            qpos = torch.tensor(HOME_QPOS, dtype=torch.float32).repeat(len(env_idx), 1)
            qpos[:, :7] += noise
            self.agent.reset(qpos)
            self.agent.robot.set_pose(pose_of((0, 0, 0)))

            kind = (draws[:, 0] * len(self.objects)).long()
            self._chosen[env_idx] = kind
            low, high = torch.tensor(OBJECT_LOW), torch.tensor(OBJECT_HIGH)
            places = torch.cat((low + draws[:, 2:4] * (high - low), self._heights[kind][:, None]), 1)
            yaw = (2 * draws[:, 4] - 1) * self.numbers.object_yaw_rad
            turn = torch.zeros(len(env_idx), 4)
            turn[:, 0], turn[:, 3] = torch.cos(yaw / 2), torch.sin(yaw / 2)
            for i, thing in enumerate(self.objects):
                stored = torch.tensor(self._stored_at(i))
                used = (kind == i)[:, None]
                upright = torch.tensor((1.0, 0.0, 0.0, 0.0))
                thing.set_pose(Pose.create_from_pq(torch.where(used, places, stored), torch.where(used, turn, upright)))
                thing.set_linear_velocity(torch.zeros(len(env_idx), 3))
                thing.set_angular_velocity(torch.zeros(len(env_idx), 3))
            low, high = torch.tensor(TRAY_LOW), torch.tensor(TRAY_HIGH)
            tray = torch.cat((low + draws[:, 5:7] * (high - low), torch.full((len(env_idx), 1), self.tray_height)), 1)
            self.tray.set_pose(Pose.create_from_pq(tray))
            for flags in (self._was_grasped, self._was_solved, self._is_solved, self._was_lost):
                flags[env_idx] = False
        if self.scene.can_render():
            self._paint_things(env_idx.tolist(), kind.tolist(), (draws[:, 1] * len(COLOURS)).long().tolist())

    def _paint_things(self, rows: list[int], kinds: list[int], colours: list[int]) -> None:
        """Give the objects on the tables, [rows], their episodes' colours; nothing where objects have textures."""

    def _before_simulation_step(self) -> None:
        # ManiSkill sends drive targets to the GPU once per action, before any that are late.
        if self.gpu_sim_enabled and self.numbers.latency_s > 0:
            self.scene.px.gpu_apply_articulation_target_position()

    # ---- what there is to know

    def _of_object(self, quantity: Any) -> Tensor:
        """[N, ...] of each world's object, of a function that gives it for one of `objects` in all worlds."""
        kinds = self._chosen.unique().tolist()
        values = quantity(self.objects[kinds[0]])
        for kind in kinds[1:]:
            mask = (self._chosen == kind).reshape(-1, *[1] * (values.ndim - 1))
            values = torch.where(mask, quantity(self.objects[kind]), values)
        return values

    def evaluate(self) -> dict[str, Tensor]:
        """Flags and distances after a step; see the module."""
        pose = self._of_object(lambda thing: thing.pose.raw_pose)
        tray = self.tray.pose.p
        offset = pose[:, :3] - tray
        reach = torch.linalg.norm(pose[:, :3] - self.agent.tcp_pos, dim=1)
        gap = offset[:, 2] - self._heights[self._chosen] - self.tray_floor
        inside = (offset[:, :2].abs() <= self._inner).all(1) & (offset[:, 2] > 0) & (gap <= MAX_GAP_M)
        nothing = torch.zeros_like(inside)
        grasped = self._of_object(self.agent.is_grasping) if bool((reach < REACH_M).any()) else nothing
        success = nothing
        if bool(inside.any()):
            force = self._of_object(lambda thing: self.scene.get_pairwise_contact_forces(thing, self.tray))
            success = inside & (torch.linalg.norm(force, dim=1) > MIN_FORCE_N)
        return {
            "success": success,
            "is_grasped": grasped,
            "object_pose": pose,
            "reach": reach,
            "left": torch.linalg.norm(offset[:, :2], dim=1),
        }

    def _get_obs_agent(self) -> dict[str, Tensor]:
        tool = self.agent.tcp_pose
        turns = matrix_to_euler_angles(quaternion_to_matrix(tool.q), "ZYX").flip(1)
        about_x = torch.remainder(turns[:, :1], 2 * math.pi)
        opening = 2 * self.agent.robot.get_qpos()[:, -1:]
        return {"tool": torch.cat((tool.p, about_x, turns[:, 1:], opening), 1)}

    def _get_obs_extra(self, info: dict[str, Tensor]) -> dict[str, Tensor]:
        if "state" not in self.obs_mode:
            return {}
        pose = info["object_pose"]
        w, z = pose[:, 3], pose[:, 6]
        yaw = 2 * torch.atan2(z, w)
        floor = self.tray.pose.p.clone()
        floor[:, 2] += self.tray_floor
        return {
            "grasped": info["is_grasped"].float(),
            "object": pose[:, :3],
            "facing": torch.stack((yaw.cos(), yaw.sin()), 1),
            "half_height": self._heights[self._chosen],
            "tray": floor,
        }

    # ---- rewards

    def compute_dense_reward(self, obs: Any, action: Tensor, info: dict[str, Tensor]) -> Tensor:
        """As in the module, float32 [N] up to 5."""
        placing = 2 - torch.tanh(10 * info["left"])
        reward = 1 - torch.tanh(10 * info["reach"]) + torch.where(info["is_grasped"], placing, 0.0)
        return torch.where(info["success"], MAX_REWARD, reward)

    def compute_normalized_dense_reward(self, obs: Any, action: Tensor, info: dict[str, Tensor]) -> Tensor:
        """The dense reward over 5."""
        return self.compute_dense_reward(obs, action, info) / MAX_REWARD

    def compute_sparse_reward(self, obs: Any, action: Tensor, info: dict[str, Tensor]) -> Tensor:
        """What happened for the first time in this episode, over 5; called once per step, for it remembers."""
        grasped, success = info["is_grasped"], info["success"]
        lost = self._is_solved & ~success
        reward = FIRST_GRASP * (grasped & ~self._was_grasped).float()
        reward += FIRST_SUCCESS * (success & ~self._was_solved).float()
        reward += LOST_SUCCESS * (lost & ~self._was_lost).float()
        self._was_grasped |= grasped
        self._was_solved |= success
        self._was_lost |= lost
        self._is_solved = success.clone()
        return reward / MAX_REWARD


@register_env(TWIN_TASK, max_episode_steps=80)
class PrimitiveTwin(PickAndPlace):
    """Boxes and cans in six colours, and a tray of five boxes."""

    tray_inner = (TRAY_HALF_M - TRAY_WALL_M, TRAY_HALF_M - TRAY_WALL_M)
    half_heights = [thing.half_size[2] for thing in THINGS]  # noqa: RUF012  # ManiSkill's classes have one instance

    def _load_things(self) -> None:
        builder = self.scene.create_actor_builder()
        half, wall, rim = TRAY_HALF_M, TRAY_WALL_M / 2, TRAY_RIM_M / 2
        self._add_box(builder, (0, 0, TRAY_FLOOR_M / 2), (half, half, TRAY_FLOOR_M / 2), WHITE)
        for side in (-1, 1):
            self._add_box(builder, (side * (half - wall), 0, rim), (wall, half, rim), WHITE)
            self._add_box(builder, (0, side * (half - wall), rim), (half, wall, rim), WHITE)
        builder.initial_pose = pose_of((0.45, -0.1, 0))
        self.tray = builder.build_kinematic(name="tray")

        self.objects = []
        for i, thing in enumerate(THINGS):
            stored = pose_of(self._stored_at(i))
            # One builder per world: bodies of one builder share their material, and worlds differ in colour.
            bodies = [self._build_thing(thing, world, stored) for world in range(self.num_envs)]
            self.objects.append(Actor.merge(bodies, name=thing.name))

    def _build_thing(self, thing: Thing, world: int, place: Any) -> Actor:
        builder = self.scene.create_actor_builder()
        builder.set_scene_idxs([world])
        builder.initial_pose = place
        if thing.kind == "box":
            self._add_box(builder, (0, 0, 0), thing.half_size, COLOURS[0])
        else:
            radius, _, half_length = thing.half_size
            surface, density = self._surface(), self.numbers.object_density
            upright = pose_of((0, 0, 0), (math.cos(math.pi / 4), 0, math.sin(math.pi / 4), 0))  # its axis is x
            builder.add_cylinder_collision(upright, radius, half_length, material=surface, density=density)
            builder.add_cylinder_visual(upright, radius, half_length, material=_paint(COLOURS[0]))
        return builder.build(name=f"{thing.name}-{world}")

    def _paint_things(self, rows: list[int], kinds: list[int], colours: list[int]) -> None:
        import sapien

        for row, kind, colour in zip(rows, kinds, colours, strict=True):
            body = self.objects[kind]._objs[row].find_component_by_type(sapien.render.RenderBodyComponent)
            for shape in body.render_shapes:
                shape.material.set_base_color([*COLOURS[colour], 1.0])


def pose_of(place: Any, turn: Any = (1, 0, 0, 0)) -> Any:
    """SAPIEN's pose of a place [3] and a turn [4], quaternion w first."""
    import sapien

    return sapien.Pose(np.asarray(place, np.float32), np.asarray(turn, np.float32))


def _paint(colour: Any) -> Any:
    import sapien

    return sapien.render.RenderMaterial(base_color=[*colour, 1.0], roughness=0.9, specular=0.2)
