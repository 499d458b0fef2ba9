"""The digital twin's Panda: seven numbers move its tool, and an action may reach the joints late.

Action [7] in [−1, 1]: three moves of the tool, `MOVE_M` each, and three turns, `TURN_RAD` each, about the axes of the
robot's base; the opening of the gripper, of which −1 is closed and 1 open. Moves and turns are those of a target, not
of the tool, so that the arm catches up with what it could not do within one control period.

ManiSkill multiplies turns by their lower bound, which is negative; here they turn the way they say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseController, PDEEPoseControllerConfig
from mani_skill.agents.controllers.pd_joint_pos import PDJointPosMimicController, PDJointPosMimicControllerConfig
from mani_skill.agents.registration import register_agent
from mani_skill.agents.robots.panda import Panda

from rlinf.envs.maniskill.cheap_visuals import weld_visuals

CONTROL_MODE = "pd_ee_body_target_delta_pose_real_root_frame"
MOVE_M = 0.05
TURN_RAD = 0.2
ACTION_DIM = 7
HOME_QPOS = np.array([0.0, 0.259, 0.0, -2.289, 0.0, 2.515, np.pi / 4, 0.04, 0.04])
"""rad, and m for the two fingers."""


class _Late:
    """Mixed into a joint controller: its drives get their targets `latency_steps` physics steps late."""

    latency_steps = 0
    scene: Any
    _due: Any = None
    _steps_left = 0
    _driven: Any = None
    _begins: Any = None

    def begin_in(self, worlds: torch.Tensor) -> None:
        """The next `reset` is of these worlds, bool [N], alone.

        ManiSkill knows them while it places robots and objects, and has forgotten them when it resets controllers:
        tools in all worlds would then be aimed at where they are.
        """
        self._begins = worlds.clone()

    def reset(self) -> None:
        """Drives rest where the joints are: until a late action arrives, no target of another episode is left.

        Worlds in which no episode begins keep their targets, those that are due too.
        """
        everywhere = self.scene._reset_mask
        begins = everywhere if self._begins is None else self._begins
        self._begins = None
        self.scene._reset_mask = begins
        try:
            super().reset()  # type: ignore[misc]
        finally:
            self.scene._reset_mask = everywhere
        here, mask = self.qpos, begins[:, None]  # type: ignore[attr-defined]
        if self._due is not None:
            self._due = None if begins.all() else torch.where(mask, here, self._due)
        if self._driven is None or self._driven.shape != here.shape:
            self._driven = here.clone()
        self._drive(torch.where(mask, here, self._driven))

    def set_drive_targets(self, targets: torch.Tensor) -> None:
        """Joint targets in rad or m, [N, J]."""
        if self.latency_steps == 0:
            self._drive(targets)
        else:
            self._due, self._steps_left = targets.clone(), self.latency_steps

    def before_simulation_step(self) -> None:
        """Hand over targets that are due."""
        super().before_simulation_step()  # type: ignore[misc]
        if self._due is not None:
            if self._steps_left == 0:
                self._drive(self._due)
                self._due = None
            self._steps_left -= 1

    def _drive(self, targets: torch.Tensor) -> None:
        if self._driven is not None and targets.shape == self._driven.shape:
            self._driven = targets.clone()
        super().set_drive_targets(targets)  # type: ignore[misc]


class TwinArm(_Late, PDEEPoseController):
    """Moves the target of the tool."""

    def _clip_and_scale_action(self, action: torch.Tensor) -> torch.Tensor:
        scale = action.new_tensor([MOVE_M] * 3 + [TURN_RAD] * 3)
        return action.clamp(-1, 1) * scale


class TwinGripper(_Late, PDJointPosMimicController):
    """Opens and closes both fingers alike."""


@register_agent()
class TwinPanda(Panda):
    """ManiSkill's Panda with the twin's controller and coarser meshes to look at."""

    uid = "panda_twin"

    @property
    def _controller_configs(self) -> dict[str, Any]:
        arm = PDEEPoseControllerConfig(
            joint_names=self.arm_joint_names,
            pos_lower=-MOVE_M,
            pos_upper=MOVE_M,
            rot_lower=-TURN_RAD,
            rot_upper=TURN_RAD,
            stiffness=self.arm_stiffness,
            damping=self.arm_damping,
            force_limit=self.arm_force_limit,
            ee_link=self.ee_link_name,
            urdf_path=self.urdf_path,
            use_target=True,
        )
        gripper = PDJointPosMimicControllerConfig(
            self.gripper_joint_names,
            lower=-0.01,  # below closed, so that thin things are pressed too
            upper=0.04,
            stiffness=self.gripper_stiffness,
            damping=self.gripper_damping,
            force_limit=self.gripper_force_limit,
            mimic={"panda_finger_joint2": {"joint": "panda_finger_joint1"}},
        )
        arm.controller_cls, gripper.controller_cls = TwinArm, TwinGripper
        return {CONTROL_MODE: {"arm": arm, "gripper": gripper}}

    def _after_loading_articulation(self) -> None:
        super()._after_loading_articulation()
        if self.scene.can_render() and not self.scene.backend.render_device.is_cuda():
            for link in self.robot.links:
                for body in link._objs:
                    weld_visuals(body.entity, fine="hand" in link.name or "finger" in link.name)

    def reset(self, init_qpos: torch.Tensor | None = None) -> None:
        """As ManiSkill's, of the worlds in which an episode begins; controllers are told which."""
        super().reset(init_qpos)
        for controller in self.controller.controllers.values():
            controller.begin_in(self.scene._reset_mask)

    def tune(self, *, stiffness: float, damping: float, latency_steps: int) -> None:
        """Set the gains of the arm's joints, and how many physics steps late arm and gripper are."""
        controllers = self.controller.controllers
        controllers["arm"].config.stiffness, controllers["arm"].config.damping = stiffness, damping
        controllers["arm"].set_drive_property()
        for controller in controllers.values():
            controller.latency_steps = latency_steps
