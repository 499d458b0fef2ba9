"""Statistics of features, per episode and of a whole data set, as LeRobot data sets carry them.

Of every feature: min, max, mean, standard deviation (that of the population), count, and the quantiles 1, 10, 50, 90
and 99 %. Numbers have one value per element of the last axis; pictures one per channel, shape [C, 1, 1], of pixels in
[0, 1]. Text has none.

What `merge` gives for a data set is exact except for the quantiles: those of a data set are the mean of its episodes',
weighted by their frames, which is what the format defines. `number_stats` of a whole column gives the true ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
NAMES = ("min", "max", "mean", "std", "count", *QUANTILES)
SAMPLED_FRAMES, SAMPLED_SIDE = 64, 64
"""At most so many frames of an episode, and rows and columns of a picture, enter the statistics of its camera."""

Stats = dict[str, np.ndarray]


def number_stats(values: np.ndarray) -> Stats:
    """Statistics of frames [T, ..., D] over all axes but the last; of [T, 1] or [T, D] that is over time.

    `min` and `max` keep whole numbers whole and flags flags; `count` is T.
    """
    rows = values.reshape(-1, values.shape[-1])
    exact = rows.astype(np.float64)
    extremes = np.float64 if rows.dtype.kind == "f" else bool if rows.dtype.kind == "b" else np.int64
    quantiles = np.quantile(exact, list(QUANTILES.values()), axis=0)
    return {
        "min": rows.min(0).astype(extremes),
        "max": rows.max(0).astype(extremes),
        "mean": exact.mean(0),
        "std": exact.std(0),
        "count": np.array([len(values)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def picture_stats(frames: np.ndarray) -> Stats:
    """Statistics [C, 1, 1] of uint8 frames [T, H, W, C], from an even sample of frames and pixels.

    `count` is the number of frames that were looked at.
    """
    number, height, width, channels = frames.shape
    chosen = np.unique(np.linspace(0, number - 1, min(number, SAMPLED_FRAMES)).round().astype(np.int64))
    pixels = frames[chosen, :: math.ceil(height / SAMPLED_SIDE), :: math.ceil(width / SAMPLED_SIDE)]
    counts = np.stack([np.bincount(pixels[..., c].reshape(-1), minlength=256) for c in range(channels)])
    tones = np.arange(256) / 255
    total = counts.sum(1, keepdims=True)
    mean = counts @ tones / total[:, 0]
    variance = (counts * (tones - mean[:, None]) ** 2).sum(1) / total[:, 0]
    below = counts.cumsum(1)
    seen = counts > 0
    result = {
        "min": tones[seen.argmax(1)],
        "max": tones[255 - seen[:, ::-1].argmax(1)],
        "mean": mean,
        "std": np.sqrt(variance),
    }
    for name, share in QUANTILES.items():
        result[name] = tones[(below >= share * total).argmax(1)]
    shaped = {name: value.reshape(channels, 1, 1) for name, value in result.items()}
    return shaped | {"count": np.array([len(chosen)])}


def merge(parts: Sequence[Stats]) -> Stats:
    """Statistics of all frames from those of disjoint groups of them; quantiles as the module says."""
    count = np.stack([part["count"] for part in parts]).astype(np.int64)  # [P, 1]
    weight = count.reshape(-1, *[1] * parts[0]["mean"].ndim) / count.sum()

    def stacked(name: str) -> np.ndarray:
        return np.stack([part[name] for part in parts])

    means = stacked("mean")
    mean = (weight * means).sum(0)
    variance = (weight * (stacked("std") ** 2 + (means - mean) ** 2)).sum(0)
    result = {
        "min": stacked("min").min(0),
        "max": stacked("max").max(0),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": count.sum(0),
    }
    shared = [name for name in QUANTILES if all(name in part for part in parts)]  # older data sets have none
    return result | {name: (weight * stacked(name)).sum(0) for name in shared}


def as_json(stats: Mapping[str, Stats]) -> dict[str, dict[str, list]]:
    """Lists instead of arrays."""
    return {key: {name: value.tolist() for name, value in entry.items()} for key, entry in stats.items()}


def from_json(raw: Mapping[str, Mapping[str, list]]) -> dict[str, Stats]:
    """Inverse of `as_json`."""
    return {key: {name: np.asarray(value) for name, value in entry.items()} for key, entry in raw.items()}
