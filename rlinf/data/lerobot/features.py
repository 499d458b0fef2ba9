"""What a recording writes: its features, and episodes that fit them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlinf.core.errors import DataError
from rlinf.data.lerobot.layout import FRAME_FEATURES, NOTES_FILE, V3, Feature, Info, parse_feature, read_info, read_json
from rlinf.data.lerobot.video import CODECS, PIXEL_FORMAT


def recorded_features(features: Mapping[str, Feature], fps: int, codec: str) -> dict[str, Feature]:
    """The features with the columns that every data set has. Raises DataError."""
    if not isinstance(fps, int) or fps < 1:
        raise DataError(f"fps is {fps!r} and must be a whole number of frames per second")
    if codec not in CODECS:
        raise DataError(f"there is no codec {codec!r}; there are {', '.join(CODECS)}")
    for key, feature in features.items():
        try:
            parse_feature(key, {"dtype": feature.dtype, "shape": feature.shape})
        except ValueError as error:
            raise DataError(str(error)) from error
        if key in FRAME_FEATURES:
            raise DataError(f"{key} is written by itself and is no feature to be given")
        height, width, channels = feature.shape if feature.is_picture else (2, 2, 3)
        if channels not in (1, 3):
            raise DataError(f"{key}: pictures have shape [height, width, 1 or 3], not {list(feature.shape)}")
        if feature.dtype == "video" and (height % 2 or width % 2 or channels != 3):
            raise DataError(
                f"{key}: videos have an even height and width and three channels, not {list(feature.shape)}; "
                "record images instead"
            )
    named = {
        key: replace(feature, names=feature.names or ["height", "width", "channels"]) if feature.is_picture else feature
        for key, feature in features.items()
    }
    with_codec = {
        key: replace(feature, info={"video.codec": codec}) if feature.dtype == "video" else feature
        for key, feature in named.items()
    }
    return with_codec | FRAME_FEATURES


def with_video_info(info: Info, codecs: Mapping[str, str]) -> dict[str, Feature]:
    """The features, in which videos are described."""
    features = dict(info.features)
    for key in info.keys("video"):
        height, width, channels = features[key].picture_shape
        described = {
            "video.height": height,
            "video.width": width,
            "video.codec": codecs[key],
            "video.pix_fmt": PIXEL_FORMAT,
            "video.is_depth_map": False,
            "video.fps": int(info.fps),
            "video.channels": channels,
            "has_audio": False,
        }
        features[key] = replace(features[key], info=described)
    return features


def codec_of(root: Path, key: str, feature: Feature) -> str:
    """Name of the codec of a camera's videos. Raises DataError when there is no encoder for it."""
    name = (feature.info or {}).get("video.codec")
    if name not in CODECS:
        raise DataError(
            f"{root}: videos of {key} are encoded as {name}, which is read only: record into another folder"
        )
    return name


def continued_info(root: Path, wanted: Info, notes: Mapping[str, Any]) -> Info:
    """What the data set in `root` says of itself. Raises DataError when it is not of the wanted kind."""
    found = read_info(root)
    if found.version != V3:
        raise DataError(f"{root} is a data set of {found.version}, which is read only: record into another folder")
    if found.fps != wanted.fps:
        raise DataError(f"{root} has {found.fps:g} frames per second, not {wanted.fps:g}: record into another folder")
    for key in [*wanted.features, *found.features]:
        theirs, ours = (info.features.get(key) for info in (found, wanted))
        if theirs is None or ours is None or (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
            said = [f"{f.dtype} {list(f.shape)}" if f else "absent" for f in (theirs, ours)]
            raise DataError(f"{root}: feature {key} is {said[0]} there and {said[1]} here: record into another folder")
    there = read_json(root / NOTES_FILE) if (root / NOTES_FILE).is_file() else {}
    for key in [*notes, *there]:
        if notes.get(key) != there.get(key):
            raise DataError(
                f"{root} was recorded with {key} {there.get(key)!r}, not {notes.get(key)!r}: record into another folder"
            )
    return found if found.total_episodes else replace(found, features=wanted.features)


def checked_column(key: str, feature: Feature, values: Any) -> Any:
    """A feature's values as they are stored, [T, *shape]. Raises DataError."""
    if feature.dtype == "string":
        if not isinstance(values, Sequence) or not all(isinstance(value, str) for value in values):
            raise DataError(f"{key} must be a list of texts")
        return list(values)
    array = np.asarray(values)
    if feature.shape == (1,) and array.ndim == 1:
        array = array[:, None]
    dtype = np.dtype("uint8" if feature.is_picture else feature.dtype)
    if array.shape[1:] != feature.shape or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise DataError(
            f"{key} is {array.dtype} {list(array.shape)} and should be {dtype} {['T', *feature.shape]}".replace("'", "")
        )
    with np.errstate(over="ignore"):  # said below
        stored = array.astype(dtype, copy=False)
    if dtype.kind == "f" and not np.isfinite(stored).all():
        raise DataError(f"{key} holds NaN or infinity, first in frame {int((~np.isfinite(stored)).nonzero()[0][0])}")
    if stored is not array and dtype.kind in "iu" and not np.array_equal(stored, array):
        raise DataError(
            f"{key} holds {array.dtype} numbers that are none of {dtype}, first in frame "
            f"{int((stored != array).nonzero()[0][0])}"
        )
    return stored
