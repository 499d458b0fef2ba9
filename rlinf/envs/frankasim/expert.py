"""A scripted expert for PandaPickCube-v0, to record demonstrations with."""

from __future__ import annotations

import numpy as np

from rlinf.core.errors import ShapeError
from rlinf.envs.action_noise import ActionNoise
from rlinf.envs.frankasim.control import BLOCK_POS, GRIPPER, MOVE_M, STATE_DIM, STIFFNESS, TOOL_POS, TOOL_VEL

LAG_S = 1.2 / np.sqrt(STIFFNESS)
"""The tool follows its target by ẍ = k (target − x) − 2 √k ẋ, at steady speed 2/√k late; less makes it hurry."""
APPROACH_SLOPE, ALIGNED_M = 1.0, 0.03
"""The tool comes down inside a funnel: so much higher than the block for every metre that it is beside the axis."""
AT_BLOCK_M, HELD_M = 0.02, 0.04
CLOSED = 0.5
LIFT_PER_STEP_M = 0.03
"""Slow enough for the fingers to close before the tool has left the block."""


class PickCubeExpert:
    """π(state): over the block, down, close, up; a function of the present state alone.

    Args:
        noise_std: standard deviation of Gaussian noise on every action element, before clipping.
        generator: source of the noise; needed if there is any.
    """

    def __init__(self, noise_std: float = 0.0, generator: np.random.Generator | None = None) -> None:
        self._noise = ActionNoise(noise_std, generator)

    def act(self, state: np.ndarray) -> np.ndarray:
        """Actions float32 [N, 4] in [−1, 1] for states float32 [N, 10]. Raises ShapeError for other states."""
        if state.ndim != 2 or state.shape[1] != STATE_DIM:
            raise ShapeError(f"the expert takes states [N, {STATE_DIM}] of PandaPickCube-v0, not {list(state.shape)}")
        tool, block = state[:, TOOL_POS], state[:, BLOCK_POS]
        target = tool + LAG_S * state[:, TOOL_VEL]  # where the arm is being pulled to
        away = block - tool
        beside, distance = np.linalg.norm(away[:, :2], axis=1), np.linalg.norm(away, axis=1)
        at_block = distance < AT_BLOCK_M
        held = (state[:, GRIPPER] > CLOSED) & (distance < HELD_M)

        move = block - target
        move[:, 2] += APPROACH_SLOPE * np.maximum(beside - ALIGNED_M, 0)
        move[held] = (0, 0, LIFT_PER_STEP_M)
        grip = np.where(held | at_block, 1.0, -1.0)
        return self._noise(np.concatenate((move / MOVE_M, grip[:, None]), 1))
