"""What counts as solved, and what is paid for it: arithmetic on poses.

d = p − p*  in m,   r = the rotation vector from the target's orientation, in rad, both in base axes

solved for now      |d_i| ≤ threshold_i  and  |r_i| ≤ threshold_{3+i},  for all i
success             solved for now in `hold_steps` steps in a row
reward              1 while solved for now; else 0, or exp(−500 |d|²) if it is dense
"""

from __future__ import annotations

import math

import numpy as np

from rlinf.envs.realworld import frames

DENSE_SHARPNESS = 500.0


class PoseGoal:
    """A pose to be reached and held.

    Args:
        target: pose [7] of the tool in the base frame.
        threshold: [6], m and rad.
        hold_steps: so many steps in a row.
        dense: pay for being near, too.
    """

    def __init__(self, target: np.ndarray, threshold: tuple[float, ...], *, hold_steps: int = 1, dense: bool) -> None:
        self.target = target
        self._threshold, self._hold_steps, self._dense = np.asarray(threshold, float), hold_steps, dense
        self._held = 0

    def begin(self) -> None:
        """A new episode."""
        self._held = 0

    def way(self, pose: np.ndarray) -> np.ndarray:
        """[6], from a pose [7] to the target in base axes: m, then a rotation vector in rad."""
        turn = frames.multiply(self.target[3:], frames.conjugate(pose[3:]))
        return np.concatenate((self.target[:3] - pose[:3], frames.rotation_vector(turn)))

    def judge(self, pose: np.ndarray) -> tuple[float, bool]:
        """Reward of a step that ended at a pose [7], and whether the task is solved with it."""
        way = self.way(pose)
        if (np.abs(way) <= self._threshold).all():
            self._held += 1
            return 1.0, self._held >= self._hold_steps
        self._held = 0
        if self._dense:
            return math.exp(-DENSE_SHARPNESS * float(way[:3] @ way[:3])), False
        return 0.0, False
