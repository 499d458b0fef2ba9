"""A scripted expert for peg insertion, to record demonstrations with and to take over by."""

from __future__ import annotations

import numpy as np

from rlinf.core.errors import ShapeError
from rlinf.envs.action_noise import ActionNoise
from rlinf.envs.realworld.observation import GOAL_DIM

MOVE_M, TURN_RAD = 0.02, 0.1
"""What an action of 1 means, as in `PegInsertionConfig.action_scale`."""
WAIT_M = 0.042
"""So far above the ground of the hole the tip waits until it is aligned; the rim is at 0.03 m."""
RIM_M, INSIDE_M = 0.03, 0.0292
"""Lower than this the peg is in the hole, which guides it."""
ALIGNED_M, ALIGNED_RAD = 0.003, 0.06
"""So well aligned it comes down to the rim, and slides on it into the hole."""
TOUCH_M = 0.0015
"""So far below the rim it then reaches: that presses with 3 N, and friction holds the peg less than it is pulled."""
GAIN = 0.7
"""Share of the way that it asks for in a step: with all of it, the arm swings about the goal."""


class PegInsertionExpert:
    """π(state): over the hole, turn, down; a function of the way to the target, the last six numbers of the state.

    The way is written along the axes that actions are, so the rule does not ask which these are; it takes the third as
    the vertical one.

    Args:
        noise_std: standard deviation of Gaussian noise on every action element, before clipping.
        generator: source of the noise; needed if there is any.
    """

    def __init__(self, noise_std: float = 0.0, generator: np.random.Generator | None = None) -> None:
        self._noise = ActionNoise(noise_std, generator)

    def act(self, state: np.ndarray) -> np.ndarray:
        """Actions float32 [N, 6] for states float32 [N, S ≥ 25] of an environment with `show_goal: True`.

        Raises ShapeError for states without the way.
        """
        if state.ndim != 2 or state.shape[1] < GOAL_DIM + 19:
            raise ShapeError(f"the expert needs the way to the target in the state, which {list(state.shape)} lacks; "
                             "set env.train.show_goal=True")  # fmt: skip
        way = state[:, -GOAL_DIM:].astype(float)
        beside, height = np.linalg.norm(way[:, :2], axis=1), np.abs(way[:, 2])
        turned = np.linalg.norm(way[:, 3:], axis=1)
        down = np.sign(way[:, 2])
        inside = height < INSIDE_M
        waiting = ~inside & ((beside > ALIGNED_M) | (turned > ALIGNED_RAD))
        floor = np.where(inside, 0.0, np.where(waiting, WAIT_M, RIM_M - TOUCH_M))
        move = GAIN * way[:, :3]
        move[:, 2] = way[:, 2] - down * floor
        return self._noise(np.concatenate((move / MOVE_M, GAIN * way[:, 3:] / TURN_RAD), 1))
