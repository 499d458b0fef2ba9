"""A scripted expert for libero_spatial with stand-in assets, to record demonstrations with."""

from __future__ import annotations

import numpy as np

from rlinf.core.errors import ShapeError
from rlinf.envs.action_noise import ActionNoise
from rlinf.envs.libero.scene import FULL_STATE_DIM, OBJECT, PLACE

TOOL, FINGERS = slice(0, 3), slice(6, 8)
RIM_RADIUS_M, RIM_HEIGHT_M = 0.042, 0.016
"""Where the bowl is gripped, from its middle: the wall of the stand-in, towards the tool's side."""
AT_RIM_M, DEEP_M = 0.01, 0.012
ABOVE_M, CARRY_M = 0.09, 0.2
"""Heights over the rim while approaching, and over the plate while carrying."""
HELD_OPENING_M = 0.018
OVER_PLATE_M, ON_PLATE_M = 0.02, 0.045
MOVE_M = 0.05
"""What an action of 1 stands for."""


class BowlExpert:
    """π(state): over the rim of the bowl, down, close, up, over the plate, down, open; of the present state alone.

    Args:
        noise_std: standard deviation of Gaussian noise on the tool's motion, before clipping.
        generator: source of the noise; needed if there is any.
    """

    def __init__(self, noise_std: float = 0.0, generator: np.random.Generator | None = None) -> None:
        self._noise = ActionNoise(noise_std, generator)

    def act(self, state: np.ndarray) -> np.ndarray:
        """Actions float32 [N, 7] in [−1, 1] for full states float32 [N, 14]. Raises ShapeError for other states."""
        if state.ndim != 2 or state.shape[1] != FULL_STATE_DIM:
            raise ShapeError(f"the expert takes full states [N, {FULL_STATE_DIM}] of LIBERO, not {list(state.shape)}")
        return self._noise(np.stack([self._one(row) for row in state.astype(np.float64)]), size=6)

    def _one(self, state: np.ndarray) -> np.ndarray:
        tool, bowl, plate = state[TOOL], state[OBJECT], state[PLACE]
        opening = state[FINGERS][0] - state[FINGERS][1]
        side = 1.0 if tool[1] >= bowl[1] else -1.0
        to_rim = bowl + np.array([0.0, side * RIM_RADIUS_M, RIM_HEIGHT_M]) - tool
        to_plate = plate - bowl
        over = bool(np.linalg.norm(to_plate[:2]) < OVER_PLATE_M)
        gripped = np.linalg.norm(to_rim[:2]) < 2 * AT_RIM_M and abs(to_rim[2]) < 2 * DEEP_M
        if over and -to_plate[2] < ON_PLATE_M:
            return _action(np.array([0.0, 0.0, 0.03]), -1)
        if gripped and opening < HELD_OPENING_M:
            return _action(_carry(to_plate, over), 1)
        if gripped and abs(to_rim[2]) < DEEP_M:
            return _action(to_rim, 1)
        if np.linalg.norm(to_rim[:2]) > AT_RIM_M:
            to_rim = to_rim + np.array([0.0, 0.0, ABOVE_M])
            if to_rim[2] > ABOVE_M / 2:
                to_rim[:2] = 0  # first out of what stands around
        return _action(to_rim, -1)


def _carry(to_plate: np.ndarray, over: bool) -> np.ndarray:
    """Up, then sideways, then down."""
    height = -to_plate[2]
    if over:
        return np.array([to_plate[0], to_plate[1], -min(0.03, height)])
    sideways = to_plate[:2] if height > CARRY_M - 0.05 else np.zeros(2)
    return np.array([*sideways, CARRY_M - height])


def _action(move: np.ndarray, grip: float) -> np.ndarray:
    return np.array([*(move / MOVE_M), 0.0, 0.0, 0.0, grip])
