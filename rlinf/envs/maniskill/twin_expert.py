"""A scripted expert for the digital twin, to record demonstrations with."""

from __future__ import annotations

import numpy as np

from rlinf.core.errors import ShapeError
from rlinf.envs.action_noise import ActionNoise

STATE_DIM = 17
ACTION_DIM = 7
TOOL, ABOUT_Z, OPENING = slice(0, 3), 5, 6
GRASPED, OBJECT, FACING, HALF_HEIGHT, TRAY = 7, slice(8, 11), slice(11, 13), 13, slice(14, 17)
"""Where the state holds what; see `twin_task`."""

MOVE_M, TURN_RAD = 0.05, 0.2
"""What the action 1 asks for; as `twin_robot` has them, which cannot be imported without ManiSkill."""
GAIN = 0.8
"""Share of the remaining way that is asked for at once. The arm is still on its way to the last target."""
CARRY_M = 0.07
"""Objects are carried with their underside so high above the table: over the tray's rim."""
APPROACH_M = 0.06
ALIGNED_M, ALIGNED_RAD, AT_OBJECT_M = 0.014, 0.18, 0.014
STILL_AT_OBJECT_M = 0.03
"""Fingers that close upon an object go on closing within this distance."""
OPEN_M = 0.070
OVER_TRAY_M, IN_TRAY_M = 0.025, 0.065
RELEASE_M = 0.012
"""The object is let go with its underside so high above the tray's floor."""
RETREAT_M = 0.18


class PutOnTrayExpert:
    """π(state): over the object, down, close, up, over the tray, down, open, up; of the present state alone.

    Args:
        noise_std: standard deviation of Gaussian noise on the six numbers that move the tool, before clipping. The
            gripper has none: half open, it would drop what it carries.
        generator: source of the noise; needed if there is any.
    """

    def __init__(self, noise_std: float = 0.0, generator: np.random.Generator | None = None) -> None:
        self._noise = ActionNoise(noise_std, generator)

    def act(self, state: np.ndarray) -> np.ndarray:
        """Actions float32 [N, 7] in [−1, 1] for states float32 [N, 17]. Raises ShapeError for other states."""
        if state.ndim != 2 or state.shape[1] != STATE_DIM:
            raise ShapeError(f"the expert takes states [N, {STATE_DIM}] of the digital twin, not {list(state.shape)}")
        tool, thing, tray = state[:, TOOL], state[:, OBJECT], state[:, TRAY]
        grasped = state[:, GRASPED] > 0.5
        underside = thing[:, 2] - state[:, HALF_HEIGHT]
        to_thing, to_tray = thing - tool, tray - thing
        off_tray = np.abs(to_tray[:, :2]).max(1)
        turn = np.arctan2(state[:, 12], state[:, 11]) - state[:, ABOUT_Z]
        turn = (turn + np.pi / 2) % np.pi - np.pi / 2  # the fingers are alike

        beside = np.linalg.norm(to_thing[:, :2], axis=1)
        aligned = (beside < ALIGNED_M) & (np.abs(turn) < ALIGNED_RAD)
        at_thing = aligned & (np.abs(to_thing[:, 2]) < AT_OBJECT_M)
        closing = (state[:, OPENING] < OPEN_M) & (np.linalg.norm(to_thing, axis=1) < STILL_AT_OBJECT_M)
        placed = (off_tray < IN_TRAY_M) & (underside < tray[:, 2] + RELEASE_M)
        over = grasped & (off_tray < OVER_TRAY_M)

        # Empty-handed: come down inside a funnel.
        move = to_thing.copy()
        move[:, 2] += np.where(aligned, 0.0, np.clip(beside * 3, APPROACH_M / 2, APPROACH_M))
        carry = np.where(underside > CARRY_M - 0.02, 1.0, 0.0)[:, None]
        carried = np.concatenate((to_tray[:, :2] * carry, (CARRY_M - underside)[:, None]), 1)
        move[grasped] = carried[grasped]
        lowered = np.concatenate((to_tray[:, :2], (tray[:, 2] - underside)[:, None]), 1)
        move[over] = lowered[over]
        move[placed] = 0.0
        move[placed, 2] = RETREAT_M - tool[placed, 2]

        # What is let go must be out of the fingers before they move up.
        move[placed & (state[:, OPENING] < OPEN_M)] = 0.0
        turn[grasped | placed] = 0.0
        grip = np.where(~placed & (grasped | at_thing | closing), -1.0, 1.0)

        turns = np.zeros_like(move)
        turns[:, 2] = turn
        action = np.concatenate((GAIN * move / MOVE_M, GAIN * turns / TURN_RAD, grip[:, None]), 1)
        return self._noise(action, OPENING)
