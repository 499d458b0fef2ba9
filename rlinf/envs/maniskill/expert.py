"""A scripted expert for PickCube-v1 under `pd_ee_delta_pos`, to record demonstrations with."""

from __future__ import annotations

import numpy as np

from rlinf.core.errors import ShapeError

STATE_DIM = 42
GRASPED, TO_CUBE, TO_GOAL = 18, slice(36, 39), slice(39, 42)
"""Where the state holds whether the cube is grasped, cube − tcp and goal − cube in m."""

MAX_MOVE_M = 0.1
"""Move of the tool that the action 1 asks for."""
APPROACH_HEIGHT_M = 0.08
ALIGNED_M = 0.012
AT_CUBE_M = 0.012


class PickCubeExpert:
    """π(state): over the cube, down, close, to the goal; a function of the present state alone.

    Args:
        noise_std: standard deviation of Gaussian noise on every action element, before clipping.
        generator: source of the noise; needed if there is any.
    """

    def __init__(self, noise_std: float = 0.0, generator: np.random.Generator | None = None) -> None:
        if noise_std > 0 and generator is None:
            raise ValueError("a noisy expert needs a generator")
        self._noise_std, self._generator = noise_std, generator

    def act(self, state: np.ndarray) -> np.ndarray:
        """Actions float32 [N, 4] in [−1, 1] for states float32 [N, 42]. Raises ShapeError for other states."""
        if state.ndim != 2 or state.shape[1] != STATE_DIM:
            raise ShapeError(f"the expert takes states [N, {STATE_DIM}] of PickCube-v1, not {list(state.shape)}")
        to_cube, to_goal = state[:, TO_CUBE], state[:, TO_GOAL]
        grasped = state[:, GRASPED] > 0.5
        aligned = np.linalg.norm(to_cube[:, :2], axis=1) < ALIGNED_M
        at_cube = np.linalg.norm(to_cube, axis=1) < AT_CUBE_M

        move = to_cube.copy()
        move[~aligned, 2] += APPROACH_HEIGHT_M
        move[grasped] = to_goal[grasped]
        grip = np.where(grasped | at_cube, -1.0, 1.0)
        action = np.concatenate((move / MAX_MOVE_M, grip[:, None]), 1)
        if self._generator is not None:
            action += self._noise_std * self._generator.standard_normal(action.shape)
        return np.clip(action, -1, 1).astype(np.float32)
