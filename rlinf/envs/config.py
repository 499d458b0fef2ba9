"""Keys that every environment has, whatever simulates it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlinf.core.config import Config


class VideoConfig(Config):
    """What is filmed."""

    save_video: bool = Field(
        False,
        description="Write an mp4 of evaluations. In env.train, for a robot cell alone: of its last episodes, as its "
        "cameras show them, under videos/train/.",
    )
    every: int = Field(
        1, ge=0, description="Film every n-th evaluation of a training run, and its last; 0 for the last alone."
    )
    info_on_video: bool = Field(True, description="Draw step, reward and success into the picture.")
    video_base_dir: str | None = Field(
        None, description="Folder of the videos; null puts them into the run directory, under videos/."
    )
    fps: PositiveInt = Field(20, description="Pictures per second of the film.")
    max_envs: PositiveInt = Field(
        4, description="At most so many environments are filmed, the first ones; they share one picture."
    )
    width: PositiveInt = Field(256, description="Width of one environment's picture in pixels.")
    height: PositiveInt = Field(256, description="Height of one environment's picture in pixels.")


class EnvConfig(Config):
    """One set of environments that are stepped together, for training or for evaluation."""

    env_type: str = Field(description="Which environment: the name under which it is registered.")
    total_num_envs: PositiveInt = Field(
        description="Number of environments over all environment workers and pipeline stages."
    )
    group_size: PositiveInt = Field(
        1, description="So many neighbouring environments begin every episode in the same state."
    )
    auto_reset: bool = Field(
        True,
        description="Begin a new episode as soon as one ends. If false, a finished environment waits for the "
        "next rollout segment and what it does meanwhile is no experience.",
    )
    ignore_terminations: bool = Field(
        False,
        description="Only the time limit ends an episode; success is recorded but the episode goes on.",
    )
    max_episode_steps: PositiveInt = Field(
        50, description="Time limit of an episode in environment steps; reaching it is a truncation."
    )
    max_steps_per_rollout_epoch: PositiveInt = Field(
        50, description="Environment steps that every environment makes in one rollout segment."
    )
    rollout_epoch: PositiveInt = Field(1, description="Rollout segments in one global step, or in one evaluation.")
    seed: int = Field(0, ge=0, description="Root seed of all initial states.")
    use_fixed_reset_state_ids: bool = Field(
        False,
        description="Every reset of all environments goes back to the first episode's seeds, so that each "
        "evaluation begins in the same states.",
    )
    use_rel_reward: bool = Field(False, description="Reward is the change of the task's reward since the step before.")
    use_step_penalty: bool = Field(
        False, description="Every step costs 1: with a reward of 1 for success alone, -1 until it and 0 at it."
    )
    reward_scale: PositiveFloat = Field(1.0, description="Factor on every reward, applied last.")
    num_workers: PositiveInt | Literal["auto"] | Literal[0] = Field(
        "auto",
        description="Processes that step a simulator which runs on the CPU. auto: the most that share the "
        "environments evenly, at most one per core, less one for a learner that works on the CPU meanwhile; 0: step in "
        "the calling process.",
    )
    video_cfg: VideoConfig = Field(default_factory=VideoConfig, description="Filming.")

    @model_validator(mode="after")
    def _groups_are_whole(self) -> EnvConfig:
        if self.total_num_envs % self.group_size:
            raise ValueError(
                f"total_num_envs ({self.total_num_envs}) must be a multiple of group_size ({self.group_size})"
            )
        return self

    def plays_a_list(self) -> bool:
        """Whether the environments share a list of initial states: any number of them plays each state once."""
        return False
