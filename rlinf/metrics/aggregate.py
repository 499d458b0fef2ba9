"""The mean of metrics over many updates, without waiting for the device in between; and over several ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlinf.core.types import Metrics


class MetricMean:
    """Mean of every tag over the calls of `add` in which the tag was present.

    Tensors are summed on the device on which they lie; numbers are summed in Python. Only `mean` waits.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._numbers: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Metrics) -> None:
        """Take in one update. Tensors must have one element; they are copied."""
        for tag, value in metrics.items():
            self._counts[tag] = self._counts.get(tag, 0) + 1
            if not isinstance(value, Tensor):
                self._numbers[tag] = self._numbers.get(tag, 0.0) + float(value)
            elif tag in self._tensors:
                self._tensors[tag].add_(value.detach().reshape(()))
            else:
                # A sum of thousands of float32 numbers would lose digits; MPS alone has no float64.
                wide = torch.float32 if value.device.type == "mps" else torch.float64
                self._tensors[tag] = value.detach().reshape(()).to(wide, copy=True)

    def mean(self) -> dict[str, float]:
        """Means by tag, in the order in which the tags first came; one transfer per device."""
        sums = dict.fromkeys(self._counts, 0.0)
        for device in {total.device for total in self._tensors.values()}:
            tags = [tag for tag, total in self._tensors.items() if total.device == device]
            values = torch.stack([self._tensors[tag] for tag in tags]).tolist()
            sums.update(zip(tags, values, strict=True))
        for tag, number in self._numbers.items():
            sums[tag] += number
        return {tag: sums[tag] / count for tag, count in self._counts.items()}


def mean_of_ranks(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of every tag over the ranks that have it, all with the same weight."""
    values: dict[str, list[float]] = {}
    for part in parts:
        for tag, value in part.items():
            values.setdefault(tag, []).append(value)
    return {tag: sum(numbers) / len(numbers) for tag, numbers in values.items()}


def whole_buffer(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Statistics of a buffer of which every rank has a part of equal capacity; see `core.protocols.Buffer`."""
    if len(parts) == 1:
        return parts[0]
    filled = [part for part in parts if part["size"]] or parts[:1]
    size = sum(part["size"] for part in filled)
    shares = [(part["size"] / size if size else 1.0, part) for part in filled]
    mean = sum(share * part["mean_reward"] for share, part in shares)
    variance = sum(share * (part["std_reward"] ** 2 + (part["mean_reward"] - mean) ** 2) for share, part in shares)
    return {
        "size": size,
        "utilization": sum(part["utilization"] for part in parts) / len(parts),
        "max_reward": max(part["max_reward"] for part in filled),
        "min_reward": min(part["min_reward"] for part in filled),
        "mean_reward": mean,
        "std_reward": math.sqrt(variance),
    }
