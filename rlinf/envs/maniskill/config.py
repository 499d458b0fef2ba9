"""Keys of the ManiSkill environments."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from rlinf.core.config import Config
from rlinf.envs.config import EnvConfig

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


class InitParams(Config):
    """What ManiSkill itself is asked to build."""

    id: str = Field("PickCube-v1", description="ManiSkill's name of the task.")
    obs_mode: Literal["state"] = Field(
        "state", description="What is observed. state: the task's full state as one vector."
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
        default_factory=dict, description="Passed on to ManiSkill's cameras, e.g. {shader_pack: default}."
    )
    render_mode: Literal["rgb_array", "sensors", "all"] = Field(
        "rgb_array",
        description="What is filmed. rgb_array: the view for people; sensors: the robot's cameras; all: both.",
    )


class ManiSkillConfig(EnvConfig):
    """ManiSkill3 tasks on PhysX."""

    env_type: Literal["maniskill"] = Field("maniskill", description="Which environment: ManiSkill3.")
    init_params: InitParams = Field(default_factory=InitParams, description="What ManiSkill is asked to build.")
    wrap_obs_mode: Literal["simple"] = Field(
        "simple", description="How observations are named. simple: the state vector becomes `state`."
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
