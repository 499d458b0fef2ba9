"""A small convolutional network that SAC can train from scratch on a CPU.

B batch, H and W size of the image
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEM = (5, 4, 1)
"""Kernel, stride and padding of the first layer: windows that overlap by a pixel."""
LAYER = (3, 2, 1)


class SmallCnn(nn.Module):
    """Images to small maps: convolutions and relus, no normalisation; a map with every layer half the size.

    With the default widths a 128 × 128 image costs 3 M multiply-adds and becomes 8 × 8 places. What is read from them
    has to know the places: the flattened map, rather than a pooled one.

    The weights begin as `torch.nn.Conv2d`'s do. That start is 2.4 times smaller than the orthogonal one of DrQ, and
    a block in Franka-Sim's pictures was found a fifth more exactly for it (docs/LOG.md).

    Args:
        channels: width of every layer.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.out_channels = channels[-1]
        self.convs = nn.ModuleList()
        for layer, (in_channels, out_channels) in enumerate(zip((3, *channels), channels, strict=False)):
            self.convs.append(nn.Conv2d(in_channels, out_channels, *(LAYER if layer else STEM)))

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the map of an image."""
        return self._places(height), self._places(width)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] → [B, out_channels, *map_size(H, W)]."""
        # Seen as channels first, the image lies in memory as torch's channels_last format, which convolutions keep.
        # Numbers up to 255 are exact in bfloat16 too.
        x = images.permute(0, 3, 1, 2).to(_compute_dtype(images))
        for number, conv in enumerate(self.convs):
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            weight, bias = conv.weight, conv.bias
            if number == 0:
                # Pixels as p / 255 - 1/2, by scaling the weights instead of the images; around the image it is black.
                weight, bias = weight / 255, bias - 0.5 * weight.sum((1, 2, 3))
            # In place: a convolution does not need its output to compute gradients.
            x = F.conv2d(x, weight, bias, conv.stride, conv.padding).relu_()  # type: ignore[arg-type]
        return x

    def _places(self, size: int) -> int:
        for layer in range(len(self.convs)):
            kernel, stride, padding = LAYER if layer else STEM
            size = (size + 2 * padding - kernel) // stride + 1
        return size


def _compute_dtype(images: Tensor) -> torch.dtype:
    """What convolutions compute in here: autocast's type where it is on."""
    kind = images.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
