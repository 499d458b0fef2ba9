"""What makes a scripted demonstrator less than perfect."""

from __future__ import annotations

import numpy as np


class ActionNoise:
    """Gaussian noise on actions, which are then cut off at ±1.

    Args:
        std: standard deviation of the noise; 0 for none.
        generator: its source; needed if there is any.
    """

    def __init__(self, std: float, generator: np.random.Generator | None) -> None:
        if std > 0 and generator is None:
            raise ValueError("a noisy expert needs a generator")
        self._std, self._generator = std, generator

    def __call__(self, action: np.ndarray, size: int | None = None) -> np.ndarray:
        """float32 [N, A] in [−1, 1]; noise on the first `size` elements of each action, on all where it is None."""
        if self._generator is not None:
            noisy = action[:, :size]
            noise = self._std * self._generator.standard_normal(noisy.shape)
            action = np.concatenate((noisy + noise, action[:, noisy.shape[1] :]), 1)
        return np.clip(action, -1, 1).astype(np.float32)
