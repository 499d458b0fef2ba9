"""The augmentation of DrQ: every image is moved by a few pixels, its border pixels repeated into the gap.

It is what lets SAC learn from pixels without a representation trained beforehand [1, Section 4.1].

    [1] DrQ, Kostrikov et al. 2020, arXiv:2004.13649

    B batch, H height, W width, C channels
"""

from __future__ import annotations

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor


def draw_offsets(batch: int, pad: int, generator: torch.Generator) -> Int64[Tensor, "B 2"]:
    """Offsets for `random_shift`, uniform over all (2·pad + 1)² of them, on the generator's device."""
    return torch.randint(2 * pad + 1, (batch, 2), generator=generator, device=generator.device)


def random_shift(
    images: Shaped[Tensor, "B H W C"], offsets: Int64[Tensor, "B 2"], pad: int
) -> Shaped[Tensor, "B H W C"]:
    """y[b, i, j] = x[b, i + dy − pad, j + dx − pad], indices clamped into the image.

    That is padding by `pad` repeated border pixels on all sides, then cropping at (dy, dx). One offset per image:
    the views of several cameras are given one by one.

    Args:
        images: contiguous, uint8 or floating point.
        offsets: (dy, dx) in 0 … 2·pad; (pad, pad) leaves an image as it is.
        pad: largest shift in pixels.
    """
    batch, height, width, channels = images.shape
    offsets = offsets.to(images.device)
    # Once the rows are padded, a shifted row is a run of neighbouring numbers that may begin at any pixel: rows are
    # then copied whole, and no index is computed for single pixels.
    left = images[:, :, :1].expand(-1, -1, pad, -1)
    right = images[:, :, -1:].expand(-1, -1, pad, -1)
    padded = torch.cat([left, images, right], 2)
    num_pixels = padded.numel() // channels
    runs = padded.as_strided((num_pixels - width + 1, width * channels), (channels, 1))
    row = torch.arange(height, device=images.device) + offsets[:, :1] - pad
    first_row = height * torch.arange(batch, device=images.device)[:, None]
    start = (first_row + row.clamp(0, height - 1)) * (width + 2 * pad) + offsets[:, 1:]
    return runs.index_select(0, start.flatten()).view(images.shape)
