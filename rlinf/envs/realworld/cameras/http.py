"""A camera of a robot server: `/camera/NAME`."""

from __future__ import annotations

import time

import numpy as np

from rlinf.envs.realworld.arm import ArmError
from rlinf.envs.realworld.arms.serl_http import HttpLink
from rlinf.envs.realworld.cameras.camera import CameraError


class HttpSource:
    """Pictures as the server gives them, already cropped and scaled there, without loss.

    Args:
        url: of the server.
        name: of the camera there.
        token: for the server, if it wants one.
        fps: how often to ask.
    """

    def __init__(self, url: str, name: str, token: str = "", fps: float = 30.0) -> None:
        self._url, self._name, self._token, self._period_s = url, name, token, 1 / fps
        self._link: HttpLink | None = None
        self._last = ("", 0.0)  # number of the last picture, and when it was asked for

    def open(self) -> None:
        """Connect with the first question."""
        try:
            self._link = HttpLink(self._url, self._token)
        except ArmError as error:
            raise CameraError(str(error)) from error

    def read(self) -> np.ndarray:
        """The server's next picture. Raises CameraError if it has none, or does not answer."""
        if self._link is None:
            raise CameraError(f"{self._url}/camera/{self._name} is not open")
        deadline = time.monotonic() + 1.0
        while True:
            pause = self._last[1] + self._period_s - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            asked = time.monotonic()
            try:
                data, headers = self._link.post(f"camera/{self._name}?format=raw")
            except ArmError as error:
                raise CameraError(str(error)) from error
            number, self._last = headers.get("x-number", ""), (self._last[0], asked)
            if number != self._last[0] or not number:
                self._last = (number, asked)
                return self._picture(data, headers)
            if asked > deadline:
                raise CameraError(f"{self._url}/camera/{self._name}: the picture does not change")

    def close(self) -> None:
        """Close the connection."""
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _picture(self, data: bytes, headers: dict[str, str]) -> np.ndarray:
        try:
            shape = (int(headers["x-height"]), int(headers["x-width"]), 3)
            return np.frombuffer(data, np.uint8).reshape(shape)
        except (KeyError, ValueError) as error:
            raise CameraError(f"{self._url}/camera/{self._name}: not a picture of a robot server") from error
