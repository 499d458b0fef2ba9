"""Keys of the Franka-Sim environments."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from rlinf.envs.config import EnvConfig

GymId = Literal["PandaPickCube-v0", "PandaPickCubeVision-v0"]
ObsMode = Literal["state", "rgb"]
Rendering = Literal["auto", "cheap", "full"]
Stepping = Literal["auto", "compiled", "numpy"]

OBS_MODES: dict[GymId, ObsMode] = {"PandaPickCube-v0": "state", "PandaPickCubeVision-v0": "rgb"}


class FrankaSimConfig(EnvConfig):
    """SERL's PandaPickCube on MuJoCo: a Franka arm is to lift a block."""

    env_type: Literal["frankasim"] = Field("frankasim", description="Which environment: Franka-Sim.")
    gym_id: GymId = Field(
        "PandaPickCube-v0",
        description="Which task. PandaPickCube-v0 is observed through its state with the block's position, "
        "PandaPickCubeVision-v0 through two cameras and the robot's own state.",
    )
    obs_mode: ObsMode | None = Field(
        None, description="What is observed: state or rgb. null: as gym_id says; anything else must agree with it."
    )
    ignore_terminations: bool = Field(
        True,
        description="Only the time limit ends an episode. If false, success ends it, and with it the reward that "
        "every step with a lifted block earns.",
    )
    max_episode_steps: PositiveInt = Field(
        100, description="Time limit of an episode in environment steps of 0.02 s; reaching it is a truncation."
    )
    max_steps_per_rollout_epoch: PositiveInt = Field(
        100, description="Environment steps that every environment makes in one rollout segment."
    )
    image_size: PositiveInt = Field(128, description="Height and width of the cameras' pictures in pixels.")
    rendering: Rendering = Field(
        "auto",
        description="How pictures are drawn. full: the scene as it is, with shadows and smoothed edges; cheap: "
        "without them and with coarse meshes, a hundred times faster where no GPU draws; auto: cheap where none does.",
    )
    stepping: Stepping = Field(
        "auto",
        description="How the arm's controller runs. compiled: numba's machine code; numpy: the readable form, half "
        "as fast; auto: compiled where numba is installed.",
    )

    @model_validator(mode="after")
    def _mode_is_the_tasks(self) -> FrankaSimConfig:
        mode = OBS_MODES[self.gym_id]
        if self.obs_mode not in (None, mode):
            raise ValueError(f"obs_mode is {self.obs_mode} but {self.gym_id} is observed by {mode}; leave it out")
        return self
