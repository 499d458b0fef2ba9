"""Frames as mp4 files and back, with PyAV: many episodes in a file, any frame by its time."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from rlinf.core.errors import DataError
from rlinf.data.lerobot.layout import RESTORE
from rlinf.data.lerobot.packages import require
from rlinf.data.lerobot.priority import kept_priority

av = require("av")
reformatter = require("av.video.reformatter")

PIXEL_FORMAT = "yuv420p"
TOLERANCE_FRAMES = 0.25
"""A frame is the one of a moment if it is no further away than this share of the time between frames."""
FORWARD_FRAMES = 4
"""Targets at most so many frames ahead are reached by decoding on instead of seeking."""


@dataclass(frozen=True)
class Codec:
    """How frames are packed.

    Attributes:
        name: as `info.json` has it.
        encoder: FFmpeg's name.
        options: of the encoder. Every second frame stands alone, so that any frame is at most one away from one that
            does, and none is predicted from a later one, so that files can be joined without decoding.
    """

    name: str
    encoder: str
    options: dict[str, str]


CODECS = {
    "h264": Codec("h264", "libx264", {"crf": "23", "g": "2", "bf": "0", "preset": "veryfast"}),
    "av1": Codec("av1", "libsvtav1", {"crf": "30", "g": "2", "preset": "12"}),
}


class VideoEncoder:
    """Packs frames into one mp4 file in memory.

    Args:
        codec: how.
        fps: frames per second, a whole number.
        height, width: of the frames; even, as the pixel format wants.
        num_threads: of the encoder.
    """

    def __init__(self, codec: Codec, fps: int, height: int, width: int, num_threads: int = 1) -> None:
        os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder prints its settings otherwise
        self._sink = io.BytesIO()
        self._container = av.open(self._sink, "w", format="mp4")
        try:
            self._stream = self._container.add_stream(codec.encoder, rate=fps, options=codec.options)
        except (av.error.FFmpegError, ValueError) as error:
            raise DataError(f"PyAV cannot encode {codec.name} here ({error}): choose another codec") from error
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, PIXEL_FORMAT
        self._stream.codec_context.thread_count = num_threads
        self._time_base = Fraction(1, fps)
        self._stream.codec_context.time_base = self._time_base
        self._reformat = reformatter.VideoReformatter()
        self.num_frames = 0

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 [T, H, W, 3]."""
        stream = self._stream
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = self._reformat.reformat(frame, stream.width, stream.height, PIXEL_FORMAT)
            frame.pts, frame.time_base = self.num_frames, self._time_base
            # The first frame opens the encoder, and that may make this thread a real-time one.
            with contextlib.nullcontext() if self.num_frames else kept_priority():
                packets = stream.encode(frame)
            self._container.mux(packets)
            self.num_frames += 1

    def finish(self) -> memoryview:
        """The whole file. Nothing can be written afterwards."""
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._sink.getbuffer()


def join(parts: Sequence[tuple[Path, int]], fps: int) -> memoryview:
    """One mp4 file of the first frames of several by the same encoder, without decoding them.

    Args:
        parts: file and number of its frames.
        fps: frames per second.

    Raises DataError when a file is missing, damaged, shorter than that, or of another kind than the first.
    """
    sink = io.BytesIO()
    target: Any = None
    begin, kind = 0, None
    with av.open(sink, "w", format="mp4") as container:
        for path, num_frames in parts:
            with _opened(path) as source:
                stream = source.streams.video[0]
                if target is None:
                    target, kind = container.add_stream_from_template(stream, opaque=True), _kind(stream)
                    target.time_base = stream.time_base
                if _kind(stream) != kind:
                    raise DataError(f"{path} is encoded otherwise than the video before it; {RESTORE}")
                copied = _copy_packets(container, target, source, stream, begin, num_frames, fps)
                if copied != num_frames:
                    raise DataError(f"{path} holds {copied} frames and should hold {num_frames}; {RESTORE}")
            begin += num_frames
    return sink.getbuffer()


def kind_of(video: Path | memoryview) -> tuple[Any, ...]:
    """What videos have in common that can be joined. Raises DataError when the file is missing or damaged."""
    with _opened(video) if isinstance(video, Path) else av.open(io.BytesIO(video)) as source:
        return _kind(source.streams.video[0])


def _kind(stream: Any) -> tuple[Any, ...]:
    context = stream.codec_context
    return context.name, context.width, context.height, stream.time_base, bytes(context.extradata or b"")


def _copy_packets(container: Any, target: Any, source: Any, stream: Any, begin: int, num_frames: int, fps: int) -> int:
    """Append the packets of the first frames so that they begin with frame number `begin`; returns their number."""
    ticks = Fraction(1, fps) / stream.time_base  # of a frame
    shift, copied = round(begin * ticks), 0
    for packet in source.demux(stream):
        if packet.dts is None or packet.pts is None or packet.pts >= num_frames * ticks:
            continue
        packet.pts, packet.dts, packet.duration = packet.pts + shift, packet.dts + shift, round(ticks)
        packet.stream = target
        container.mux(packet)
        copied += 1
    return copied


def _opened(path: Path) -> Any:
    """An open container with a video in it. Raises DataError naming the file that is missing or damaged."""
    if not path.is_file():
        raise DataError(f"{path} is missing: {RESTORE}")
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or no video ({_words(error)}); {RESTORE}") from error
    if not container.streams.video:
        container.close()
        raise DataError(f"{path} holds no video; {RESTORE}")
    return container


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class _OpenVideo:
    """One file that is being decoded."""

    def __init__(self, path: Path, size: tuple[int, ...], fps: float, num_threads: int) -> None:
        self._path, self._fps = path, fps
        self._container = _opened(path)
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = num_threads
        found = (self._stream.height, self._stream.width)
        if found != size:
            self.close()
            raise DataError(
                f"{path} is {found[0]} x {found[1]} pixels, meta/info.json says {size[0]} x {size[1]}; {RESTORE}"
            )
        self._reformat = reformatter.VideoReformatter()
        self._frames: Any = None
        self._frame: Any = None  # the last one that was decoded
        self._forward = FORWARD_FRAMES

    def read(self, times_s: np.ndarray, out: np.ndarray, rows: np.ndarray) -> None:
        """Write the frames of `times_s` (ascending) into the `rows` of uint8 [N, H, W, 3]."""
        height, width = out.shape[1:3]
        for number, (time_s, row) in enumerate(zip(times_s.tolist(), rows.tolist(), strict=True)):
            if number and time_s == times_s[number - 1]:
                out[row] = out[rows[number - 1]]
                continue
            frame = self._find(time_s)
            out[row] = self._reformat.reformat(frame, width, height, "rgb24").to_ndarray()

    def _find(self, time_s: float) -> Any:
        """The frame of a moment. Raises DataError when there is none."""
        try:
            ahead = None if self._frame is None else (time_s - self._frame.time) * self._fps
            if ahead is None or ahead < -TOLERANCE_FRAMES or ahead > self._forward + TOLERANCE_FRAMES:
                self._seek(time_s)
                skipped = self._decode_until(time_s)
                # What lay between the key frame and the target lies between others too: worth decoding through.
                self._forward = max(self._forward, skipped)
            else:
                self._decode_until(time_s)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise DataError(f"{self._path} is damaged at {time_s:.3f} s ({_words(error)}); {RESTORE}") from error
        if self._frame is None or abs(self._frame.time - time_s) * self._fps > TOLERANCE_FRAMES:
            self._frame = None
            raise DataError(f"{self._path} has no frame at {time_s:.3f} s; {RESTORE}")
        return self._frame

    def _seek(self, time_s: float) -> None:
        position = round(time_s / self._stream.time_base)
        self._container.seek(position, stream=self._stream, backward=True)
        self._frames, self._frame = self._container.decode(self._stream), None

    def _decode_until(self, time_s: float) -> int:
        """Make the first frame that is not before the moment the present one; returns how many were decoded."""
        earliest, decoded = time_s - TOLERANCE_FRAMES / self._fps, 0
        while self._frame is None or self._frame.time < earliest:
            frame = next(self._frames, None)
            if frame is None:
                self._frame = None
                break
            self._frame = frame
            decoded += 1
        return decoded

    def close(self) -> None:
        self._container.close()


class VideoReader:
    """Frames of many files by their times; keeps the files that it used last open.

    Threads may read different files at a time. After a fork each process has open files of its own.

    Args:
        fps: frames per second of the files.
        max_open: so many files at most are kept open.
        num_threads: of a decoder.
    """

    def __init__(self, fps: float, *, max_open: int = 16, num_threads: int = 1) -> None:
        self._fps, self._max_open, self._num_threads = fps, max_open, num_threads
        self._idle: OrderedDict[Path, _OpenVideo] = OrderedDict()
        self._inherited: OrderedDict[Path, _OpenVideo] = OrderedDict()
        self._lock, self._pid = threading.Lock(), os.getpid()

    def read(self, path: Path, times_s: np.ndarray, out: np.ndarray, rows: np.ndarray) -> None:
        """Write the frames at `times_s` of a file into the `rows` of uint8 [N, H, W, 3].

        Raises DataError naming the file that is missing, damaged, of another size, or has no frame then.
        """
        if self._pid != os.getpid():
            # Kept, not closed: their positions in the files and their threads are the parent's.
            self._inherited, self._idle = self._idle, OrderedDict()
            self._lock, self._pid = threading.Lock(), os.getpid()
        with self._lock:
            video = self._idle.pop(path, None)
        if video is None:
            video = _OpenVideo(path, out.shape[1:3], self._fps, self._num_threads)
        order = np.argsort(times_s, kind="stable")
        try:
            video.read(times_s[order], out, rows[order])
        except DataError:
            video.close()
            raise
        with self._lock:
            self._idle[path] = video
            surplus = [self._idle.popitem(last=False)[1] for _ in range(len(self._idle) - self._max_open)]
        for old in surplus:
            old.close()
