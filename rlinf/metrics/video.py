"""Frames to H.264 videos, grids and captions."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlinf.core.errors import ShapeError

TIMEOUT_S = 600.0


def write_video(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Write uint8 [T, height, width, 3] as an H.264 mp4 that browsers play; folders are made.

    Odd sizes, which the codec cannot store, are padded by repeating the last row or column. The file appears
    only when it is complete.

    Raises: ShapeError without frames or with frames of another form; OSError with ffmpeg's last words.
    """
    from imageio_ffmpeg import get_ffmpeg_exe

    _check("frames", frames)
    if len(frames) == 0:
        raise ShapeError(f"there are no frames to write to {path}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames.shape[1:3]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    unfinished = path.with_suffix(".part.mp4")
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{even.shape[2]}x{even.shape[1]}", "-r", str(fps)]
    coded = ["-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
    command = [get_ffmpeg_exe(), "-y", "-loglevel", "error", *raw, "-i", "-", *coded, str(unfinished)]
    try:
        # One process that gets all frames at once: imageio's own writer does not notice when ffmpeg fails.
        done = subprocess.run(command, input=even.reshape(-1).data, capture_output=True, timeout=TIMEOUT_S)
        if done.returncode != 0:
            words = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            raise OSError(f"ffmpeg could not write {path}: {words[-1]}")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def tile(frames: np.ndarray) -> np.ndarray:
    """One picture [rows·height, columns·width, 3] from uint8 [N, height, width, 3], as square as N allows.

    Read row by row; cells that are left over stay black.
    """
    _check("frames", frames)
    if len(frames) == 0:
        raise ShapeError("there are no frames to tile")
    number, height, width, _ = frames.shape
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    cells = np.zeros((rows * columns, height, width, 3), np.uint8)
    cells[:number] = frames
    return cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def overlay(frames: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Copies of uint8 [N, height, width, 3] with a caption each, upper left on a dark ground.

    Lines of a caption are separated by newlines; an empty one leaves its frame as it is. Text that is
    too wide is cut at the border.
    """
    from PIL import Image, ImageDraw, ImageFont

    _check("frames", frames)
    if len(captions) != len(frames):
        raise ShapeError(f"{len(frames)} frames but {len(captions)} captions")
    number, height, width, _ = frames.shape
    size = max(9, height // 18)
    font = ImageFont.load_default(size=size)
    result = np.empty((number, height, width, 3), np.uint8)
    for row, (frame, caption) in enumerate(zip(frames, captions, strict=True)):
        picture = Image.fromarray(frame)
        if caption:
            draw = ImageDraw.Draw(picture, "RGBA")
            *_, right, bottom = draw.multiline_textbbox((size // 2, size // 3), caption, font=font)
            draw.rectangle((0, 0, right + size // 2, bottom + size // 3), fill=(0, 0, 0, 150))
            draw.multiline_text((size // 2, size // 3), caption, font=font, fill=(255, 255, 255))
        result[row] = np.asarray(picture)
    return result


def _check(name: str, frames: np.ndarray) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ShapeError(f"{name} must be uint8 [N, height, width, 3], not {frames.dtype} {list(frames.shape)}")
