"""A small network that says from pictures whether the task is solved, for tasks that no pose describes.

As in SERL (Luo et al. 2024, arXiv:2401.16013): binary cross-entropy on pictures of success and of failure. It sees
single pictures, so what it is paid for should be visible in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlinf.core.errors import CheckpointError

WIDTHS = (16, 32, 32)
STEPS, BATCH, LEARNING_RATE = 300, 64, 1e-3
Pictures = Mapping[str, np.ndarray]
"""Camera → uint8 [..., H, W, 3]."""


class SuccessClassifier(nn.Module):
    """P(success | pictures) of so many cameras, stacked in the order of their names."""

    def __init__(self, num_cameras: int = 1) -> None:
        super().__init__()
        widths = (3 * num_cameras, *WIDTHS)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:]))
        self.head = nn.Linear(2 * WIDTHS[-1], 1)

    def forward(self, stacked: Tensor) -> Tensor:
        """Log odds [B] of pictures, float32 [B, 3 C, H, W] in [0, 1]."""
        x = stacked
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1))[:, 0]

    @torch.no_grad()
    def probability(self, pictures: Pictures) -> float:
        """Of success in one picture of each camera, [H, W, 3]."""
        return float(torch.sigmoid(self(stack({name: picture[None] for name, picture in pictures.items()}))))


def stack(pictures: Pictures) -> Tensor:
    """float32 [B, 3 C, H, W] in [0, 1] of pictures [B, H, W, 3], cameras in the order of their names."""
    parts = [torch.from_numpy(pictures[name].copy()).movedim(-1, 1) for name in sorted(pictures)]
    return torch.cat(parts, 1).float() / 255


def fit_classifier(success: Pictures, failure: Pictures, *, seed: int = 0, steps: int = STEPS) -> SuccessClassifier:
    """Train on pictures [B, H, W, 3] of success and of failure; every batch has as many of both."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SuccessClassifier(len(success))
    optimizer, generator = torch.optim.Adam(network.parameters(), LEARNING_RATE), torch.Generator().manual_seed(seed)
    kinds = (stack(failure), stack(success))
    label = torch.arange(2).repeat_interleave(BATCH // 2).float()
    for _ in range(steps):
        drawn = [kind[torch.randint(len(kind), (BATCH // 2,), generator=generator)] for kind in kinds]
        loss = F.binary_cross_entropy_with_logits(network(torch.cat(drawn)), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def save_classifier(network: SuccessClassifier, path: str | Path) -> None:
    """Write the weights as safetensors."""
    save_file(network.state_dict(), str(path))


def load_classifier(path: str | Path, num_cameras: int) -> SuccessClassifier:
    """Read what `save_classifier` wrote. Raises CheckpointError when it is not there or of other cameras."""
    network = SuccessClassifier(num_cameras)
    try:
        network.load_state_dict(load_file(str(path)))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} holds no success classifier for {num_cameras} cameras ({str(error).splitlines()[0]}); make one "
            "with rlinf.envs.realworld.classifier.fit_classifier and save_classifier"
        ) from error
    return network
