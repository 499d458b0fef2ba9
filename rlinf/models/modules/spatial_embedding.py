"""Pooling of a feature map that keeps where things are, as in SERL (Luo et al. 2024, arXiv:2401.16013).

B batch, C channels, H and W size of the map, n features per channel
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SpatialLearnedEmbeddings(nn.Module):
    """out[b, c·n + f] = Σ_hw map[b, c, h, w] · kernel[c, h, w, f].

    Every channel is read through n learned masks of its own. Begun at variance 1 / (H·W), so that the features are
    as large as the map.
    """

    def __init__(self, channels: int, height: int, width: int, num_features: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels, height, width, num_features) / math.sqrt(height * width))

    def forward(self, feature_map: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C·n]."""
        return torch.einsum("bchw,chwf->bcf", feature_map, self.kernel).flatten(1)
