"""Any camera that OpenCV opens: V4L2 devices (UVC webcams, the colour half of a RealSense), files, streams."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from rlinf.core.errors import MissingDependency
from rlinf.envs.realworld.cameras.camera import CameraError

INSTALL_COMMAND = "pip install opencv-python-headless"
REMEDY = (
    f"run `{INSTALL_COMMAND}`, or in the repository "
    "`bash requirements/install.sh embodied --env realworld --hardware usbcam`"
)
TIMEOUT_MS = 1000


class OpencvSource:
    """One device.

    Args:
        device: a path such as /dev/v4l/by-id/…, which stays when others are plugged in; a number; a file; a URL.
        height, width, fps: asked of the device; it may choose otherwise.
        fourcc: pixel format asked of the device. MJPG lets two webcams share one USB 2 bus.
    """

    def __init__(
        self, device: str, height: int = 480, width: int = 640, fps: float = 30.0, fourcc: str = "MJPG"
    ) -> None:
        self._device, self._height, self._width, self._fps, self._fourcc = str(device), height, width, fps, fourcc
        self._capture: Any = None

    def open(self) -> None:
        """Open the device. Raises MissingDependency without OpenCV, CameraError if the device does not open."""
        try:
            import cv2
        except ImportError as error:
            raise MissingDependency(f"OpenCV cannot be imported ({error}); {REMEDY}") from error
        self._cv2 = cv2
        is_device = self._device.isdigit() or self._device.startswith("/dev/")
        place: Any = int(self._device) if self._device.isdigit() else self._device
        backend = cv2.CAP_V4L2 if is_device and sys.platform == "linux" else cv2.CAP_ANY
        capture = cv2.VideoCapture(place, backend)
        if is_device:
            # The pixel format before the size: V4L2 chooses sizes by format.
            for name, value in (
                (cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*self._fourcc)),
                (cv2.CAP_PROP_FRAME_WIDTH, self._width),
                (cv2.CAP_PROP_FRAME_HEIGHT, self._height),
                (cv2.CAP_PROP_FPS, self._fps),
                (cv2.CAP_PROP_BUFFERSIZE, 1),  # else the newest picture is some old one
                (cv2.CAP_PROP_READ_TIMEOUT_MSEC, TIMEOUT_MS),
            ):
                capture.set(name, value)
        if not capture.isOpened():
            capture.release()
            raise CameraError(f"{self._device} does not open; see `v4l2-ctl --list-devices`, and the group `video`")
        self._capture = capture

    def read(self) -> np.ndarray:
        """The next picture. Raises CameraError if there is none."""
        if self._capture is None:
            raise CameraError(f"{self._device} is not open")
        fine, picture = self._capture.read()
        if not fine:
            raise CameraError(f"{self._device} gave no picture; was it unplugged?")
        return np.ascontiguousarray(picture[..., ::-1])  # OpenCV puts blue first

    def close(self) -> None:
        """Let go of the device."""
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.release()
