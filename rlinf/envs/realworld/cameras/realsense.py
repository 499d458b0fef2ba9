"""Intel RealSense, colour stream. Written against pyrealsense2 2.5x; not run with a camera here."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlinf.core.errors import MissingDependency
from rlinf.envs.realworld.cameras.camera import CameraError

INSTALL_COMMAND = "pip install pyrealsense2"
REMEDY = (
    f"run `{INSTALL_COMMAND}` and `apt-get install libusb-1.0-0`, or in the repository "
    "`bash requirements/install.sh embodied --env realworld --hardware realsense`"
)
TIMEOUT_MS = 1000


class RealsenseSource:
    """One camera.

    Args:
        serial: as `rs-enumerate-devices -s` prints it; empty for the only one.
        height, width, fps: of the colour stream; the pair must be one that the camera offers.
    """

    def __init__(self, serial: str = "", height: int = 480, width: int = 640, fps: int = 15) -> None:
        self._serial, self._height, self._width, self._fps = str(serial), height, width, fps
        self._pipeline: Any = None

    def open(self) -> None:
        """Start the stream. Raises MissingDependency without the library, CameraError without the camera."""
        try:
            import pyrealsense2
        except ImportError as error:  # the wheel needs the system's libusb-1.0
            raise MissingDependency(f"pyrealsense2 cannot be imported ({error}); {REMEDY}") from error
        config, pipeline = pyrealsense2.config(), pyrealsense2.pipeline()
        if self._serial:
            config.enable_device(self._serial)
        config.enable_stream(pyrealsense2.stream.color, self._width, self._height, pyrealsense2.format.rgb8, self._fps)
        try:
            pipeline.start(config)
        except RuntimeError as error:
            name = f"RealSense {self._serial}".strip()
            raise CameraError(f"{name} does not start ({error}); see `rs-enumerate-devices -s`") from error
        self._pipeline = pipeline

    def read(self) -> np.ndarray:
        """The next picture. Raises CameraError if none comes within a second."""
        if self._pipeline is None:
            raise CameraError(f"RealSense {self._serial} is not open")
        try:
            picture = self._pipeline.wait_for_frames(TIMEOUT_MS).get_color_frame()
        except RuntimeError as error:
            raise CameraError(f"RealSense {self._serial}: {error}") from error
        if not picture:
            raise CameraError(f"RealSense {self._serial}: a frame without colour")
        return np.array(picture.get_data())  # a copy: the library uses the memory again

    def close(self) -> None:
        """Stop the stream."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            try:
                pipeline.stop()
            except RuntimeError:  # unplugged
                return
