"""The small encoder of DSRL: one camera image and the robot's state to a few dozen features each.

    image 64 × 64   conv 3 × 3 to 32 channels, relu, four times → linear → layer norm → tanh
    state           linear → layer norm → tanh

Differs from dsrl_pi0, the reference implementation of DSRL (Wagenmaker et al. 2025, arXiv:2506.15799): every
convolution halves the map by default, which ends at 4 × 4 places instead of 32 × 32. The linear layer behind it has 33
thousand weights then instead of two million, four times as many as all ten critics together.

    B batch, S state size, F features, H and W size of an image
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlinf.core.errors import ShapeError
from rlinf.core.types import Obs
from rlinf.models.modules.compact_view import IMAGE_SIZE, CompactView
from rlinf.models.modules.running_norm import RunningNorm

CHANNELS, KERNEL, PADDING = 32, 3, 1


class CompactImageEncoder(nn.Module):
    """uint8 [B, H, W, 3] → [B, feature_dim] in (−1, 1).

    Args:
        size: (H, W).
        feature_dim: F.
        strides: of the convolutions, one for each.
    """

    def __init__(self, size: tuple[int, int], feature_dim: int, strides: Sequence[int] = (2, 2, 2, 2)) -> None:
        super().__init__()
        self.size, self.strides = tuple(size), tuple(strides)
        widths = [3] + [CHANNELS] * len(self.strides)
        self.convs = nn.ModuleList(
            nn.Conv2d(fan_in, fan_out, KERNEL, stride, PADDING)
            for fan_in, fan_out, stride in zip(widths, widths[1:], self.strides, strict=False)
        )
        places = math.prod(self._places(side) for side in size)
        self.project = _squashed_linear(CHANNELS * places, feature_dim)
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            nn.init.orthogonal_(conv.weight, math.sqrt(2))
            nn.init.zeros_(conv.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Raises ShapeError for images of another size or type."""
        if tuple(image.shape[1:]) != (*self.size, 3) or image.dtype != torch.uint8:
            raise ShapeError(
                f"the encoder was built for images uint8 {[*self.size, 3]}, not for {image.dtype} "
                f"{list(image.shape[1:])}"
            )
        x = image.permute(0, 3, 1, 2).float() / 127.5 - 1
        for conv in self.convs:
            x = F.relu(conv(x), inplace=True)
        return self.project(x.flatten(1))

    def _places(self, side: int) -> int:
        for stride in self.strides:
            side = (side + 2 * PADDING - KERNEL) // stride + 1
        return side


class CompactEncoder(nn.Module):
    """Observations, whole or as `CompactView` leaves them → [B, out_dim].

    Args:
        state_dim: S.
        state_feature_dim: features of the state.
        camera: whose image is looked at; None for the state alone.
        image_feature_dim: features of the image.
        image_strides: see `CompactImageEncoder`.
        normalizer: running normalisation of the state, shared with other networks; None for none.

    Attributes:
        out_dim: all features together.
    """

    def __init__(
        self,
        state_dim: int,
        state_feature_dim: int,
        *,
        camera: str | None = None,
        image_feature_dim: int = 64,
        image_strides: Sequence[int] = (2, 2, 2, 2),
        normalizer: RunningNorm | None = None,
    ) -> None:
        super().__init__()
        self.normalizer, self.view, self.camera = normalizer, CompactView(camera), camera
        self.state = _squashed_linear(state_dim, state_feature_dim)
        self.out_dim = state_feature_dim
        self.image: CompactImageEncoder | None = None
        if camera is not None:
            self.image = CompactImageEncoder((IMAGE_SIZE, IMAGE_SIZE), image_feature_dim, image_strides)
            self.out_dim += image_feature_dim

    def forward(self, obs: Obs) -> Tensor:
        """The features, the state's first. Raises ShapeError where the camera is missing."""
        seen = self.view(obs)
        state = seen["state"] if self.normalizer is None else self.normalizer(seen["state"])
        features = self.state(state)
        if self.image is None or self.camera is None:
            return features
        return torch.cat([features, self.image(seen["images"][self.camera])], -1)


def _squashed_linear(in_dim: int, out_dim: int) -> nn.Sequential:
    linear = nn.Linear(in_dim, out_dim)
    nn.init.xavier_normal_(linear.weight)
    nn.init.zeros_(linear.bias)
    # Torch's own tanh: of so few features it takes less time than `mlp.Tanh`, a function in Python, takes to be called.
    return nn.Sequential(linear, nn.LayerNorm(out_dim), nn.Tanh())
