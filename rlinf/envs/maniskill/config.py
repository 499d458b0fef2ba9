"""Keys of the ManiSkill environments."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlinf.core.config import Config
from rlinf.envs.config import EnvConfig

TWIN_TASK = "PandaPutOnTrayDigitalTwin-v1"
"""Pick and place with a Panda in a scene of our own that needs no download."""
PUBLISHED_TWIN_TASK = "PandaPutOnPlateInScene25DigitalTwin-v1"
"""The same with RLinf-Co's published objects, which lie in the folder that MANISKILL_ASSET_DIR names."""
TWIN_TASKS = (TWIN_TASK, PUBLISHED_TWIN_TASK)

Vector = tuple[float, float, float]
SimRewardMode = Literal["normalized_dense", "dense", "sparse"]
RewardMode = Literal["raw", "normalized_dense", "dense", "sparse", "only_success"]


class SimConfig(Config):
    """Rates of the physics."""

    sim_freq: PositiveInt = Field(100, description="Physics steps per simulated second.")
    control_freq: PositiveInt = Field(20, description="Actions (environment steps) per simulated second.")

    @model_validator(mode="after")
    def _steps_are_whole(self) -> SimConfig:
        if self.sim_freq % self.control_freq:
            raise ValueError(f"sim_freq ({self.sim_freq}) must be a multiple of control_freq ({self.control_freq})")
        return self


class TwinWorld(Config):
    """The digital twin's world in numbers. Two sets of them are a simulation and a "reality" that differ.

    Places are in m in the frame of the robot's base: x forward, y to its left, z up; the table's surface is z = 0.
    """

    object_friction: PositiveFloat = Field(1.0, description="Coefficient of friction of objects, tray and table.")
    object_density: PositiveFloat = Field(400.0, description="Density of the objects in kg/m³.")
    object_yaw_rad: float = Field(
        0.5, ge=0, description="Objects are turned about the vertical by at most this angle, either way."
    )
    arm_noise_rad: float = Field(
        0.02, ge=0, description="Standard deviation of the arm's joint angles about home when an episode begins."
    )
    arm_stiffness: PositiveFloat = Field(1000.0, description="Position gain of the arm's joints in N m/rad.")
    arm_damping: PositiveFloat = Field(100.0, description="Velocity gain of the arm's joints in N m s/rad.")
    latency_s: float = Field(
        0.0, ge=0, description="An action reaches the joints so much later; less than a control period."
    )
    camera_position: Vector = Field((0.98, 0.08, 0.52), description="Where the front camera is.")
    camera_target: Vector = Field((0.38, 0.08, 0.13), description="What it looks at.")
    camera_fov_rad: PositiveFloat = Field(0.70, description="Its vertical field of view.")
    ambient_light: Vector = Field((0.45, 0.45, 0.45), description="Colour of the light from everywhere.")
    sun_light: Vector = Field((1.1, 1.1, 1.1), description="Colour of the one directional light.")
    sun_direction: Vector = Field((-0.5, 0.4, -1.0), description="Whither it shines.")
    table_colour: Vector = Field((0.45, 0.36, 0.28), description="Colour of the table, 0 to 1.")


class InitParams(Config):
    """What ManiSkill itself is asked to build."""

    id: str = Field("PickCube-v1", description="ManiSkill's name of the task.")
    obs_mode: Literal["state", "rgb"] = Field(
        "state",
        description="What is observed. state: the task's full state as one vector; rgb: the pictures of the task's "
        "cameras, what the robot knows of itself as `state`, and the instruction where the task has one.",
    )
    control_mode: str | None = Field(
        None,
        description="ManiSkill's controller, e.g. pd_ee_delta_pos. null: follows from actor.model.policy_setup.",
    )
    reward_mode: SimRewardMode | None = Field(
        None, description="ManiSkill's own reward, meant by `reward_mode: raw`; null: the task's default."
    )
    robot_uids: str | None = Field(None, description="ManiSkill's name of the robot; null: the task's default.")
    sim_backend: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="Where PhysX runs. auto: on the GPU when there is a CUDA device, else on the CPU."
    )
    sim_config: SimConfig = Field(default_factory=SimConfig, description="Rates of the physics.")
    sensor_configs: dict[str, Any] = Field(
        default_factory=dict,
        description="Passed on to ManiSkill's cameras, e.g. {width: 128, height: 128, shader_pack: default}.",
    )
    twin: TwinWorld | None = Field(None, description="The world of a digital twin; null for other tasks.")
    render_mode: Literal["rgb_array", "sensors", "all"] = Field(
        "rgb_array",
        description="What is filmed. rgb_array: the view for people; sensors: the robot's cameras; all: both.",
    )

    @model_validator(mode="after")
    def _twin_has_a_world(self) -> InitParams:
        if self.twin is not None and self.id not in TWIN_TASKS:
            raise ValueError(f"twin describes the world of {' or '.join(TWIN_TASKS)}, not of {self.id}; leave it out")
        period = 1 / self.sim_config.control_freq
        if self.twin is not None and self.twin.latency_s >= period:
            raise ValueError(f"twin.latency_s ({self.twin.latency_s}) must be less than a control period ({period} s)")
        return self


class ManiSkillConfig(EnvConfig):
    """ManiSkill3 tasks on PhysX."""

    env_type: Literal["maniskill"] = Field("maniskill", description="Which environment: ManiSkill3.")
    init_params: InitParams = Field(default_factory=InitParams, description="What ManiSkill is asked to build.")
    wrap_obs_mode: Literal["simple"] = Field(
        "simple", description="How observations are named. simple: `state`, `images/<camera>` and `instruction`."
    )
    reward_mode: RewardMode = Field(
        "raw",
        description="Reward of a step. raw: as ManiSkill gives it; normalized_dense, dense, sparse: that one of "
        "ManiSkill's rewards; only_success: 1 while the task is solved, else 0.",
    )
    stepping: Literal["auto", "fast", "maniskill"] = Field(
        "auto",
        description="How a CPU scene is stepped. fast: without ManiSkill's per-step tensor bookkeeping, for the "
        "tasks that have it; maniskill: by ManiSkill's own step; auto: fast where it exists.",
    )

    @model_validator(mode="after")
    def _one_reward(self) -> ManiSkillConfig:
        inner = self.init_params.reward_mode
        if inner is not None and self.reward_mode not in ("raw", inner):
            raise ValueError(
                f"reward_mode is {self.reward_mode} but init_params.reward_mode is {inner}; set only one of them"
            )
        return self


CONTROL_MODES = {
    "panda-ee-dpos": "pd_ee_delta_pos",
    "panda-qpos": "pd_joint_delta_pos",
    "panda-ee-target-dpos": "pd_ee_target_delta_pose",
    "panda_wristcam": "pd_ee_body_target_delta_pose_real_root_frame",
}
"""Controller that belongs to each `actor.model.policy_setup`."""


def control_mode(init_params: InitParams, policy_setup: str | None) -> str:
    """ManiSkill's controller: the explicit one, or the one that the policy's setup stands for.

    Raises:
        ValueError: neither is given, or the setup is not one of `CONTROL_MODES`.
    """
    if init_params.control_mode is not None:
        return init_params.control_mode
    if policy_setup is None:
        raise ValueError(
            "no controller: set actor.model.policy_setup (panda-ee-dpos for end-effector moves) "
            "or env.*.init_params.control_mode"
        )
    if policy_setup not in CONTROL_MODES:
        raise ValueError(
            f"actor.model.policy_setup {policy_setup!r} stands for no ManiSkill controller; known are "
            f"{', '.join(sorted(CONTROL_MODES))}; or set env.*.init_params.control_mode"
        )
    return CONTROL_MODES[policy_setup]
