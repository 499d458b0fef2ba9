"""The newest picture of a camera, with its time; a camera that fails is opened again, alone, and not for ever.

A *source* is a driver: it opens, blocks until the next picture, and closes. `Camera` runs one in a thread of its own,
so that a slow or dead camera never delays an arm or another camera. Whoever needs a picture asks for the newest and
gets an error when that is too old; what then happens to the arm is theirs to decide (hold it).
"""

from __future__ import annotations

import functools
import threading
import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rlinf.core.errors import RlinfError

JOIN_S = 2.0


class CameraError(RlinfError):
    """A camera gives no pictures; the message names it and says what to do."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture.

    Attributes:
        image: uint8 [H, W, 3], red first.
        time_s: when it came, on the clock `time.monotonic` of this process.
        number: counts the pictures of this camera from 1.
    """

    image: np.ndarray
    time_s: float
    number: int


class Source(Protocol):
    """A driver of one camera."""

    def open(self) -> None:
        """Begin to capture. Raises CameraError, or MissingDependency for a library that is not there."""
        ...

    def read(self) -> np.ndarray:
        """The next picture, uint8 [H, W, 3], red first; waits for it a second or so. Raises CameraError."""
        ...

    def close(self) -> None:
        """Let go of the device. Allowed at any time, and twice."""
        ...


class Camera:
    """The newest picture of a source.

    Args:
        name: for messages.
        source: the driver. One with `on_demand = True` (drawn pictures) is read when somebody asks, without a
            thread, and its picture is new however long the drawing took.
        crop, size, stale_s, retries, retry_s: see `settings.CameraSettings`.

    Attributes:
        restarts: how often the source was opened again.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        *,
        crop: tuple[float, float, float, float] | None = None,
        size: tuple[int, int] = (128, 128),
        stale_s: float = 0.5,
        retries: int = 5,
        retry_s: float = 0.5,
    ) -> None:
        check_crop(name, crop)
        self.name, self.restarts = name, 0
        self._source, self._crop, self._size = source, crop, (int(size[0]), int(size[1]))
        self._stale_s, self._retries, self._retry_s = stale_s, retries, retry_s
        self._on_demand = bool(getattr(source, "on_demand", False))
        self._news = threading.Condition()
        self._frame: Frame | None = None
        self._problem, self._given_up = "", False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Open the source, which must work this once. Raises CameraError, MissingDependency."""
        self._source.open()
        self._ended.clear()
        self._given_up = False
        if not self._on_demand:
            self._thread = threading.Thread(target=self._capture, name=f"camera {self.name}", daemon=True)
            self._thread.start()

    def newest(self, wait_s: float = 0.0) -> Frame:
        """The newest picture, cropped and scaled.

        Args:
            wait_s: so long to wait for a picture that is not stale.

        Raises:
            CameraError: the newest one is stale, there is none yet, or the camera was given up.
        """
        if self._on_demand:
            return self._take(self._source.read())
        deadline = time.monotonic() + wait_s
        with self._news:
            while True:
                frame, now = self._frame, time.monotonic()
                if frame is not None and now - frame.time_s <= self._stale_s:
                    return frame
                if self._given_up or now >= deadline:
                    raise CameraError(self._complaint(frame, now))
                self._news.wait(deadline - now)

    def close(self) -> None:
        """End the thread and let go of the device. Calling it twice is allowed."""
        self._ended.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(JOIN_S)
        self._source.close()

    def _complaint(self, frame: Frame | None, now: float) -> str:
        age = "it never gave a picture" if frame is None else f"its newest picture is {now - frame.time_s:.1f} s old"
        last = f"; last problem: {self._problem}" if self._problem else ""
        todo = f" after {self._retries} attempts; check its cable and start it again" if self._given_up else ""
        return f"camera {self.name}: {'given up' if self._given_up else 'no picture'}{todo}: {age}{last}"

    def _capture(self) -> None:
        """Read for ever; on a failure open again, with pauses that double, until too many in a row fail."""
        failures = 0
        while not self._ended.is_set():
            try:
                if failures:
                    self._source.close()
                    if self._ended.wait(self._retry_s * 2 ** (failures - 1)):
                        return
                    self.restarts += 1
                    self._source.open()
                while not self._ended.is_set():
                    self._take(self._source.read())
                    failures = 0
            except Exception as error:  # noqa: PERF203  # whatever a driver throws: else nobody would read any more
                failures += 1
                with self._news:
                    self._problem = str(error) if isinstance(error, RlinfError) else f"{type(error).__name__}: {error}"
                    self._given_up = failures > self._retries
                    self._news.notify_all()
                if self._given_up:
                    self._source.close()
                    return

    def _take(self, picture: np.ndarray) -> Frame:
        now = time.monotonic()
        image = scaled(cropped(picture, self._crop), *self._size)
        with self._news:
            number = 1 if self._frame is None else self._frame.number + 1
            self._frame = frame = Frame(image, now, number)
            self._problem = ""
            self._news.notify_all()
        return frame


def check_crop(name: str, crop: tuple[float, float, float, float] | None) -> None:
    """Raises CameraError unless crop is None or top < bottom and left < right, all in [0, 1]."""
    if crop is None:
        return
    if len(crop) != 4 or not (0 <= crop[0] < crop[2] <= 1 and 0 <= crop[1] < crop[3] <= 1):
        raise CameraError(f"camera {name}: crop {crop} must be top, left, bottom, right as fractions from 0 to 1")


def cropped(picture: np.ndarray, crop: tuple[float, float, float, float] | None) -> np.ndarray:
    """The part [h, w, 3] of a picture [H, W, 3]: by fractions, or the largest square in the middle."""
    height, width = picture.shape[:2]
    if crop is None:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return picture[top : top + side, left : left + side]
    top, left, bottom, right = (round(f * n) for f, n in zip(crop, (height, width, height, width)))
    return picture[top : max(bottom, top + 1), left : max(right, left + 1)]


def scaled(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """The picture at another size, uint8 [height, width, 3]: each pixel is the mean over the area it covers."""
    if picture.shape[:2] == (height, width):
        return np.ascontiguousarray(picture)
    down, across = _area_weights(picture.shape[0], height), _area_weights(picture.shape[1], width)
    small = np.einsum("hH,Hwc->hwc", down, picture.astype(np.float32), optimize=True)
    small = np.einsum("wW,hWc->hwc", across, small, optimize=True)
    return np.rint(small).astype(np.uint8)


@functools.lru_cache(maxsize=32)
def _area_weights(size: int, new: int) -> np.ndarray:
    """Rows [new, size] that average: how much of each old pixel lies in each new one. Rows add up to 1."""
    edges = np.linspace(0, size, new + 1)
    low, high = edges[:-1, None], edges[1:, None]
    pixel = np.arange(size)[None]
    overlap = np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0, None)
    return (overlap / (high - low)).astype(np.float32)
