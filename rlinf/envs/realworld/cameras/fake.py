"""A camera without a device: a picture that moves, and faults on demand. For tests and dry runs."""

from __future__ import annotations

import time

import numpy as np

from rlinf.envs.realworld.cameras.camera import CameraError


class FakeSource:
    """A bright column wanders over a grey slope, one pixel per picture.

    Args:
        height, width: of the picture in pixels.
        fps: pictures per second.

    Attributes:
        dead: every call raises; for tests.
        frozen: `read` waits for ever; for tests.
        opened: how often it was opened.
    """

    def __init__(self, height: int = 480, width: int = 640, fps: float = 30.0) -> None:
        self._height, self._width, self._period_s = height, width, 1 / fps
        self._number, self._closed = 0, True
        self.dead = self.frozen = False
        self.opened = 0

    def open(self) -> None:
        """Begin."""
        if self.dead:
            raise CameraError("fake camera: dead, as asked")
        self.opened += 1
        self._closed = False

    def read(self) -> np.ndarray:
        """The next picture, a period later."""
        deadline = time.monotonic() + (1.0 if self.frozen else self._period_s)
        while time.monotonic() < deadline and not self._closed:
            time.sleep(min(0.01, self._period_s))
        if self.dead or self.frozen or self._closed:
            raise CameraError(f"fake camera: {'dead' if self.dead else 'no picture'}, as asked")
        self._number += 1
        slope = np.linspace(0, 200, self._height, dtype=np.uint8)[:, None, None]
        picture = np.broadcast_to(slope, (self._height, self._width, 3)).copy()
        picture[:, self._number % self._width] = (255, 128, 0)
        return picture

    def close(self) -> None:
        """End."""
        self._closed = True
