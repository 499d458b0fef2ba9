"""Keys of the LIBERO environments."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlinf.envs.config import EnvConfig

SuiteName = Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]
Rendering = Literal["auto", "cheap", "full"]


class LiberoConfig(EnvConfig):
    """LIBERO: a Franka arm does what a sentence says, in one of five suites of tasks.

    A reset id numbers the pairs (task, trial) of a suite: task 0 has the first ids, one for each of its stored initial
    states (50 in every task), task 1 the next, and so on. Without any of the keys below, every episode draws one.
    """

    env_type: Literal["libero"] = Field("libero", description="Which environment: LIBERO.")
    task_suite_name: SuiteName = Field("libero_spatial", description="Which suite of tasks.")
    max_episode_steps: PositiveInt = Field(
        240,
        description="Time limit of an episode in environment steps of 0.05 s; reaching it is a truncation. The longest "
        "demonstrations take 193 (spatial), 254 (object), 270 (goal), 505 (10) and 373 steps (90).",
    )
    max_steps_per_rollout_epoch: PositiveInt = Field(
        240, description="Environment steps that every environment makes in one rollout segment."
    )
    image_size: PositiveInt = Field(256, description="Height and width of the cameras' pictures in pixels.")
    num_steps_wait: NonNegativeInt = Field(
        10,
        description="Steps after a reset in which the arm rests with its gripper opening while the objects, which "
        "begin some centimetres above the table, come to lie. They are no part of the episode.",
    )
    show_objects: bool = Field(
        False,
        description="The state has six numbers more: where the thing is that the goal names first, and where it "
        "belongs. For scripted experts; policies for LIBERO do not know them.",
    )
    reward_coef: PositiveFloat = Field(1.0, description="Reward of a step after which the task is solved.")
    specific_reset_id: NonNegativeInt | None = Field(
        None, description="Every episode begins with this reset id; goes before use_ordered_reset_state_ids."
    )
    use_ordered_reset_state_ids: bool = Field(
        False,
        description="Episodes go through all reset ids, one after the other in an order that `seed` shuffles once, so "
        "that none comes twice before each came once.",
    )
    is_eval: bool = Field(
        False,
        description="Every reset id is played exactly once in an evaluation, whatever total_num_envs is: each "
        "environment plays its share, one after the other. Success is then also reported for each task.",
    )
    assets_dir: str | None = Field(
        None,
        description="Folder of LIBERO's scenes and objects. null: assets/ in the installed package, or where the "
        "package itself would download them to.",
    )
    use_standin_assets: bool = Field(
        False,
        description="Build scenes and objects from boxes and cylinders of our own instead, for tests and tries without "
        "LIBERO's assets. Policies that know the real pictures do not work on them.",
    )
    rendering: Rendering = Field(
        "auto",
        description="How pictures are drawn. full: the scene as it is, with shadows and smoothed edges; cheap: "
        "without them and with a coarse robot, many times faster where no GPU draws; auto: cheap where none does.",
    )
    max_scenes: PositiveInt = Field(
        16,
        description="Built scenes (one for each task, some hundred MB with LIBERO's assets) that a process keeps for "
        "when their task comes again. Those of running episodes do not count against it.",
    )

    @model_validator(mode="after")
    def _assets_are_chosen_once(self) -> LiberoConfig:
        if self.use_standin_assets and self.assets_dir is not None:
            raise ValueError("use_standin_assets needs no assets_dir; remove one of them")
        return self

    @model_validator(mode="after")
    def _evaluation_counts_once(self) -> LiberoConfig:
        if not self.is_eval:
            return self
        if self.specific_reset_id is not None:
            raise ValueError("is_eval plays every reset id; remove specific_reset_id, or write is_eval: False")
        if not self.auto_reset:
            raise ValueError("with is_eval an environment plays one episode after the other; write auto_reset: True")
        if self.group_size > 1 or self.rollout_epoch > 1:
            raise ValueError("is_eval plays every reset id once; write group_size: 1 and rollout_epoch: 1")
        return self

    def plays_a_list(self) -> bool:
        """See EnvConfig."""
        return self.is_eval
