"""Statistics by which states and actions are normalised: openpi's norm_stats.json.

{"norm_stats": {"state": {"mean": […], "std": […], "q01": […], "q99": […]}, "actions": {…}}}

D size of the normalised vector
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlinf.core.errors import DataError

FILE = "norm_stats.json"
EPS = 1e-6


@dataclass(frozen=True)
class NormStats:
    """Of one vector, over all of a data set. Kept in float64: ranges of a few 1e-6 occur.

    Attributes:
        mean, std: float64 [D].
        q01, q99: float64 [D], the 1 % and 99 % quantiles; None in files that have none.
    """

    mean: Tensor
    std: Tensor
    q01: Tensor | None = None
    q99: Tensor | None = None

    @property
    def size(self) -> int:
        """D."""
        return len(self.mean)

    def affine(self, quantiles: bool) -> tuple[Tensor, Tensor]:
        """(offset, scale) float64 [D] of normal = (x − offset) / scale.

        z-score: mean and std + 1e-6. Quantiles, which map [q01, q99] to [−1, 1]: the middle and half the range, with
        1e-6 added to the range. Values outside are not clipped.

        Raises DataError where quantiles are asked for and there are none.
        """
        if not quantiles:
            return self.mean, self.std + EPS
        if self.q01 is None or self.q99 is None:
            raise DataError("this model normalises by quantiles, but the statistics have no q01 and q99")
        half = (self.q99 - self.q01 + EPS) / 2
        return self.q01 + half, half


def compute_norm_stats(x: Tensor) -> NormStats:
    """Statistics of the rows of x [..., D]. Raises DataError for fewer than two rows or numbers that are not finite."""
    rows = x.reshape(-1, x.shape[-1]).double()
    if len(rows) < 2 or not rows.isfinite().all():
        raise DataError(f"statistics need two rows or more of finite numbers; these are {list(x.shape)}")
    ordered = rows.sort(0).values
    return NormStats(rows.mean(0), rows.std(0, correction=0), _quantile(ordered, 0.01), _quantile(ordered, 0.99))


def _quantile(ordered: Tensor, q: float) -> Tensor:
    """Linear between sorted rows; torch.quantile takes no more than 16 million numbers."""
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)


def mixed_norm_stats(parts: Sequence[Tensor], shares: Sequence[float] | None = None) -> NormStats:
    """Statistics of several data sets that are seen in fixed proportions.

    Args:
        parts: rows [n_d, D] of each data set.
        shares: positive, only their ratios count: how often a row is drawn from each. None for as often as it has rows.

    Quantiles are linear between rows whose distance is the mean of their weights; equal weights give those of
    `compute_norm_stats`. Raises DataError as it does, and where sizes differ.
    """
    if len({part.shape[-1] for part in parts}) > 1:
        sizes = " and ".join(str(part.shape[-1]) for part in parts)
        raise DataError(f"statistics of vectors of {sizes} numbers cannot be joined")
    if shares is None or len(parts) == 1:
        return compute_norm_stats(torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]))
    each = [compute_norm_stats(part) for part in parts]
    share = torch.tensor(shares, dtype=torch.float64) / sum(shares)
    mean = sum((w * one.mean for w, one in zip(share, each, strict=True)), torch.zeros(()))
    square = sum(
        (w * (one.std**2 + (one.mean - mean) ** 2) for w, one in zip(share, each, strict=True)), torch.zeros(())
    )
    rows = torch.cat([part.reshape(-1, part.shape[-1]).double() for part in parts])
    weight = torch.cat(
        [
            (w / n).expand(n)
            for w, n in ((w, part.numel() // part.shape[-1]) for w, part in zip(share, parts, strict=True))
        ]
    )
    return NormStats(mean, square.sqrt(), *_weighted_quantiles(rows, weight, (0.01, 0.99)))


def _weighted_quantiles(rows: Tensor, weight: Tensor, wanted: tuple[float, ...]) -> list[Tensor]:
    ordered, order = rows.sort(0)
    step = weight[order]
    place = ((step[1:] + step[:-1]) / 2).cumsum(0)
    place = torch.cat([torch.zeros_like(place[:1]), place / place[-1:]])  # of every row in [0, 1]
    result = []
    for q in wanted:
        above = (place < q).sum(0, keepdim=True).clamp(1, len(rows) - 1)
        low, high = place.gather(0, above - 1), place.gather(0, above)
        between = torch.lerp(ordered.gather(0, above - 1), ordered.gather(0, above), (q - low) / (high - low))
        result.append(between[0])
    return result


def read_norm_stats(path: str | Path, asset_id: str | None = None) -> dict[str, NormStats]:
    """Statistics by name ("state", "actions").

    Args:
        path: a norm_stats.json; a folder that holds it; or a checkpoint, which holds it under `<asset_id>/` or
            `assets/<asset_id>/`.
        asset_id: the data set's name in a checkpoint, e.g. "physical-intelligence/libero".

    Raises DataError, which names the places that were tried, or what is wrong in the file.
    """
    file = find_norm_stats(path, asset_id)
    if file is None:
        places = " or ".join(map(str, _places(Path(path), asset_id)))
        raise DataError(f"there are no statistics at {places}; write the path of {FILE}")
    try:
        content = json.loads(file.read_text())["norm_stats"]
        return {name: _parse(file, name, entry) for name, entry in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is not openpi's norm_stats.json ({error})") from error


def find_norm_stats(path: str | Path, asset_id: str | None = None) -> Path | None:
    """The file that `read_norm_stats` would read; None where there is none."""
    return next((place for place in _places(Path(path), asset_id) if place.is_file()), None)


def _places(path: Path, asset_id: str | None) -> list[Path]:
    if path.is_file():
        return [path]
    below = () if asset_id is None else (path / asset_id, path / "assets" / asset_id)
    return [folder / FILE for folder in (path, *below)]


def _parse(file: Path, name: str, entry: Mapping[str, Any]) -> NormStats:
    vectors: dict[str, Tensor | None] = {}
    for key in ("mean", "std", "q01", "q99"):
        numbers = entry.get(key)
        vectors[key] = None if numbers is None else torch.tensor(numbers, dtype=torch.float64)
    mean, std = vectors["mean"], vectors["std"]
    if mean is None or std is None:
        raise DataError(f"{file}: {name} lacks mean or std")
    for key, vector in vectors.items():
        if vector is not None and (vector.ndim != 1 or len(vector) != len(mean) or not vector.isfinite().all()):
            raise DataError(f"{file}: {name}.{key} is not a list of {len(mean)} finite numbers")
    return NormStats(mean, std, vectors["q01"], vectors["q99"])


def write_norm_stats(stats: Mapping[str, NormStats], path: str | Path) -> Path:
    """Write them as openpi's norm_stats.json, into the folder or as the file `path`. Returns the file."""
    file = Path(path) if Path(path).suffix == ".json" else Path(path) / FILE
    content = {
        name: {key: None if vector is None else vector.tolist() for key, vector in vars(entry).items()}
        for name, entry in stats.items()
    }
    part = file.with_suffix(".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"norm_stats": content}, indent=2) + "\n")
        os.replace(part, file)
    except OSError as error:
        raise DataError(f"{file} could not be written: {error}") from error
    return file
