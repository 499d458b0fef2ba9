"""Augmentation of image observations."""

from __future__ import annotations

import torch

from rlinf.core.types import Obs
from rlinf.functional.random_shift import draw_offsets, random_shift


class RandomShift:
    """DrQ: every image is shifted by up to `pad` pixels each way, each camera's by its own draw.

    Kostrikov et al. 2020, "Image Augmentation Is All You Need", arXiv:2004.13649.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, obs: Obs, generator: torch.Generator) -> Obs:
        """Observations with shifted `images`; all else is the same object."""
        shifted = {
            camera: random_shift(images, draw_offsets(len(images), self.pad, generator), self.pad)
            for camera, images in obs["images"].items()
        }
        return obs | {"images": shifted}
