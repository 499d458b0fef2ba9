"""A small convolutional network that SAC can train from scratch on a CPU.

B batch, H and W size of the image
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallCnn(nn.Module):
    """Images to a map of an eighth of their size: convolutions and relus, no normalisation.

    The first layer looks at windows of 8 pixels in steps of 4, the second in steps of 2, the others leave the map's
    size as it is. Of the 5 M multiply-adds that a 128 × 128 image costs with the default widths, the first layer has
    the most; it is also where what is small in the picture must survive.

    Args:
        channels: width of every layer.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.out_channels = channels[-1]
        self.convs = nn.ModuleList()
        in_channels = 3
        for layer, out_channels in enumerate(channels):
            kernel, stride, padding = ((8, 4, 2), (3, 2, 1))[layer] if layer < 2 else (3, 1, 1)
            conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding)
            nn.init.orthogonal_(conv.weight, nn.init.calculate_gain("relu"))
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
            self.convs.append(conv)
            in_channels = out_channels

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """(H / 4, W / 4) rounded down, then halved and rounded up unless there is only one layer."""
        sizes = (height // 4, width // 4)
        return sizes if len(self.convs) == 1 else (-(-sizes[0] // 2), -(-sizes[1] // 2))

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
            x = F.conv2d(x, weight, bias, conv.stride, conv.padding).relu_()
        return x


def _compute_dtype(images: Tensor) -> torch.dtype:
    """What convolutions compute in here: autocast's type where it is on."""
    kind = images.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
