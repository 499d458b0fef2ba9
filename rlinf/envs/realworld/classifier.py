"""A small network that says from pictures whether the task is solved, for tasks that no pose describes.

As in SERL (Luo et al. 2024, arXiv:2401.16013) it is binary: success or not. It sees single pictures, so what it is
paid for should be visible in one. It is trained in `launch.reward_classifier`.

    B batch, C cameras, H and W size of their pictures
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rlinf.core.errors import CheckpointError

WIDTHS = (16, 32, 32)
PLACES = 4
"""The last map is pooled to so many places each way: where something is counts, to a quarter of the picture."""
HIDDEN = 64
FORMAT = "rlinf success classifier"
REMEDY = "train one on recorded episodes: python -m rlinf reward_classifier FOLDER"

Pictures = Mapping[str, np.ndarray]
"""Camera → uint8 [..., H, W, 3]."""
Sizes = Mapping[str, Tuple[int, int]]
"""Camera → (H, W)."""


class SuccessClassifier(nn.Module):
    """P(success | pictures) of so many cameras, stacked in the order of their names."""

    def __init__(self, num_cameras: int = 1) -> None:
        super().__init__()
        widths = (3 * num_cameras, *WIDTHS)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:]))
        self.hidden = nn.Linear(PLACES**2 * WIDTHS[-1], HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, stacked: Tensor) -> Tensor:
        """Log odds [B] of pictures, float32 [B, 3 C, H, W] in [0, 1]."""
        x = stacked - 0.5
        for layer in self.layers:
            x = F.relu(layer(x))
        places = F.adaptive_avg_pool2d(x, PLACES).flatten(1)
        return self.head(F.relu(self.hidden(places)))[:, 0]

    @torch.no_grad()
    def probability(self, pictures: Pictures) -> float:
        """Of success in one picture of each camera, [H, W, 3]."""
        single = {name: torch.from_numpy(picture[None].copy()) for name, picture in pictures.items()}
        return float(torch.sigmoid(self(stack(single))))


def stack(pictures: Mapping[str, Tensor]) -> Tensor:
    """float32 [B, 3 C, H, W] in [0, 1] of pictures uint8 [B, H, W, 3], cameras in the order of their names."""
    return torch.cat([pictures[name].movedim(-1, 1) for name in sorted(pictures)], 1).float() / 255


def pack_classifier(network: SuccessClassifier, sizes: Sizes, about: dict[str, Any]) -> bytes:
    """The content of a safetensors file: weights, the pictures that they are for, and notes for people."""
    notes = {"format": FORMAT, "cameras": json.dumps(dict(sizes)), "about": json.dumps(about)}
    return save(network.state_dict(), notes)


def load_classifier(path: str | Path, sizes: Sizes) -> SuccessClassifier:
    """Read what `pack_classifier` made. Raises CheckpointError when it is not there, or for other pictures."""
    try:
        with safe_open(str(path), framework="pt") as file:
            notes = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        if notes.get("format") != FORMAT:
            raise CheckpointError(f"{path} holds no success classifier; {REMEDY}")
        trained = {name: tuple(size) for name, size in json.loads(notes["cameras"]).items()}
        if trained != dict(sizes):
            raise CheckpointError(
                f"{path} is for pictures of {_listed(trained)}, and the cell has {_listed(sizes)}; name and size its "
                f"cameras alike, or {REMEDY}"
            )
        network = SuccessClassifier(len(trained))
        network.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no success classifier ({str(error).splitlines()[0]}); {REMEDY}") from error
    return network


def _listed(sizes: Sizes) -> str:
    return ", ".join(f"{name} ({height} x {width})" for name, (height, width) in sorted(sizes.items()))
