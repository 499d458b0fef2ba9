"""What DSRL's small networks need of an observation: the robot's state and, if they see, one camera at 64 × 64 pixels.

The frozen decoder acts on the whole observation; only this much of it is kept for learning.

    N environments, H and W size of an image
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rlinf.core import tree
from rlinf.core.errors import ShapeError
from rlinf.core.types import EnvSpaces, Obs

IMAGE_SIZE = 64


class CompactView:
    """{"state", "images": {camera, …}, …} → {"state", "images": {camera: uint8 [N, 64, 64, 3]}}; idempotent.

    Args:
        camera: whose image is kept; None for no image.
    """

    def __init__(self, camera: str | None = None) -> None:
        self.camera = camera

    def __call__(self, obs: Obs) -> Obs:
        """Raises ShapeError when the camera is missing."""
        if self.camera is None:
            return {"state": obs["state"]}
        images = obs.get("images", {})
        if self.camera not in images:
            raise ShapeError(
                f"camera {self.camera!r} is missing: the observation has {', '.join(images) or 'no images'}"
            )
        return {"state": obs["state"], "images": {self.camera: shrink(images[self.camera], IMAGE_SIZE)}}


def shrink(images: Tensor, size: int) -> Tensor:
    """uint8 [N, H, W, 3] → uint8 [N, size, size, 3], a pixel is the mean of what it covers; the same if it fits."""
    if tuple(images.shape[1:3]) == (size, size):
        return images
    x = images.permute(0, 3, 1, 2).float()
    # Antialiased: plain bilinear interpolation of 256 pixels to 64 would leave three quarters of them out.
    x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def viewed_spaces(spaces: EnvSpaces, view: Callable[[Obs], Obs]) -> EnvSpaces:
    """`spaces` with the observations that `view` makes of theirs."""
    seen = dict(tree.leaves(view(_blank(spaces.obs_shapes, spaces.obs_dtypes))))
    tensors = {path: leaf for path, leaf in seen.items() if isinstance(leaf, Tensor)}
    return replace(
        spaces,
        obs_shapes={path: tuple(tensors[path].shape[1:]) if path in tensors else () for path in seen},
        obs_dtypes={
            path: str(tensors[path].dtype).removeprefix("torch.") if path in tensors else "str" for path in seen
        },
    )


def _blank(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> Obs:
    return tree.from_leaves(
        {
            path: [""] if dtypes[path] == "str" else torch.zeros(1, *shape, dtype=getattr(torch, dtypes[path]))
            for path, shape in shapes.items()
        }
    )
