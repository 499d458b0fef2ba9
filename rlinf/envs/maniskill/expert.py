"""Scripted experts for PickCube-v1 and StackCube-v1 under `pd_ee_delta_pos`, to record demonstrations with."""

from __future__ import annotations

import numpy as np

from rlinf.core.errors import ShapeError
from rlinf.envs.action_noise import ActionNoise

STATE_DIM = 42
GRASPED, TO_CUBE, TO_GOAL = 18, slice(36, 39), slice(39, 42)
"""Where the state holds whether the cube is grasped, cube − tcp and goal − cube in m."""

MAX_MOVE_M = 0.1
"""Move of the tool that the action 1 asks for."""
APPROACH_HEIGHT_M = 0.08
ALIGNED_M = 0.012
AT_CUBE_M = 0.012

STACK_STATE_DIM = 48
FINGERS, STACK_TO_CUBE, STACK_TO_BASE = slice(7, 9), slice(39, 42), slice(45, 48)
"""Where StackCube's state holds the fingers' places, red cube − tcp and green cube − red cube in m."""
CUBE_M = 0.04
STACKED_M, STACKED_HEIGHT_M = 0.012, 0.006
HELD_M, HELD_OPENING_M, RELEASED_OPENING_M = 0.025, 0.065, 0.07
LIFTED_M = 0.02


class PickCubeExpert:
    """π(state): over the cube, down, close, to the goal; a function of the present state alone.

    Args:
        noise_std: standard deviation of Gaussian noise on every action element, before clipping.
        generator: source of the noise; needed if there is any.
    """

    def __init__(self, noise_std: float = 0.0, generator: np.random.Generator | None = None) -> None:
        self._noise = ActionNoise(noise_std, generator)

    def act(self, state: np.ndarray) -> np.ndarray:
        """Actions float32 [N, 4] in [−1, 1] for states float32 [N, 42]. Raises ShapeError for other states."""
        _check_states(state, STATE_DIM, "PickCube-v1")
        to_cube, to_goal = state[:, TO_CUBE], state[:, TO_GOAL]
        grasped = state[:, GRASPED] > 0.5
        aligned = np.linalg.norm(to_cube[:, :2], axis=1) < ALIGNED_M
        at_cube = np.linalg.norm(to_cube, axis=1) < AT_CUBE_M

        move = to_cube.copy()
        move[~aligned, 2] += APPROACH_HEIGHT_M
        move[grasped] = to_goal[grasped]
        grip = np.where(grasped | at_cube, -1.0, 1.0)
        return self._noise(_action(move, grip))


class StackCubeExpert:
    """π(state): over the red cube, down, close, up, over the green cube, down, open, up; of the present state alone.

    Args:
        noise_std: standard deviation of Gaussian noise on every action element, before clipping.
        generator: source of the noise; needed if there is any.
    """

    def __init__(self, noise_std: float = 0.0, generator: np.random.Generator | None = None) -> None:
        self._noise = ActionNoise(noise_std, generator)

    def act(self, state: np.ndarray) -> np.ndarray:
        """Actions float32 [N, 4] in [−1, 1] for states float32 [N, 48]. Raises ShapeError for other states."""
        _check_states(state, STACK_STATE_DIM, "StackCube-v1")
        to_cube, to_base = state[:, STACK_TO_CUBE], state[:, STACK_TO_BASE]
        opening = state[:, FINGERS].sum(1)
        to_place = to_base + np.array([0, 0, CUBE_M])  # from where the cube is to where it belongs
        over = np.linalg.norm(to_place[:, :2], axis=1) < STACKED_M
        stacked = over & (np.abs(to_place[:, 2]) < STACKED_HEIGHT_M)
        at_cube = np.linalg.norm(to_cube, axis=1) < AT_CUBE_M
        held = (np.linalg.norm(to_cube, axis=1) < HELD_M) & (opening < HELD_OPENING_M) & ~stacked

        aligned = np.linalg.norm(to_cube[:, :2], axis=1) < ALIGNED_M
        move = to_cube.copy()
        move[~aligned, 2] += APPROACH_HEIGHT_M
        carry = to_place.copy()
        carry[~over, 2] += APPROACH_HEIGHT_M
        move[held] = carry[held]
        # Sideways only when the cube is high enough to pass over the other one.
        low = held & ~over & (carry[:, 2] > LIFTED_M)
        move[low, :2] = 0
        move[stacked] = (0, 0, 0)
        away = stacked & (opening > RELEASED_OPENING_M)
        move[away] = (0, 0, APPROACH_HEIGHT_M)
        grip = np.where((held | at_cube) & ~stacked, -1.0, 1.0)
        return self._noise(_action(move, grip))


def _check_states(state: np.ndarray, size: int, task: str) -> None:
    if state.ndim != 2 or state.shape[1] != size:
        raise ShapeError(f"the expert takes states [N, {size}] of {task}, not {list(state.shape)}")


def _action(move: np.ndarray, grip: np.ndarray) -> np.ndarray:
    """[N, 4] from moves in m [N, 3] and grip [N]."""
    return np.concatenate((move / MAX_MOVE_M, grip[:, None]), 1)
