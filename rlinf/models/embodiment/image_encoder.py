"""Camera images and the robot's state to one feature vector, for networks that know nothing but a state.

Each camera: backbone → map → pooling → linear → layer norm → tanh. The robot's state: linear → layer norm → tanh. The
features are their concatenation, cameras in the order of their names, the state last. This is the encoder of SERL (Luo
et al. 2024, arXiv:2401.16013), whose backbone is a pretrained and frozen ResNet-10 pooled by a learned spatial
embedding. Without its weights a small network is trained from scratch, and its map is flattened.

What is trained besides a backbone (`pooling_layer`, `mlp`, `state_proj`) is named and shaped as in RLinf's checkpoints.

    B batch, N environments, S state size, F features, H and W size of an image
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from rlinf.core.config import Config
from rlinf.core.errors import ConfigError, ShapeError
from rlinf.core.types import Obs
from rlinf.models.modules.mlp import Tanh
from rlinf.models.modules.resnet10 import ResNet10, load_resnet10
from rlinf.models.modules.running_norm import RunningNorm
from rlinf.models.modules.small_cnn import SmallCnn
from rlinf.models.modules.spatial_embedding import SpatialLearnedEmbeddings

IMAGES = "images/"
"""Prefix of the cameras among an observation's leaves."""


class ImageEncoderKeys(Config):
    """Keys of `actor.model` that describe how images are encoded."""

    image_num: int | None = Field(None, gt=0, description="Expected number of cameras; checked against the env.")
    model_path: str | None = Field(
        None,
        description="Folder with resnet10_pretrained.pt, or such a file: the pretrained ResNet-10 is the backbone. "
        "null: a small network, trained from scratch.",
    )
    freeze_backbone: bool = Field(
        True,
        description="Keep the pretrained backbone as it is, one for all cameras. false: train one for each camera. "
        "Without model_path it means nothing: the small network is always trained.",
    )
    small_channels: tuple[PositiveInt, ...] = Field(
        (16, 32, 32), min_length=1, description="Widths of the small network's layers; used without model_path."
    )
    spatial_embeddings: int = Field(
        8, gt=0, description="Features read from each channel of the pretrained backbone's map; used with model_path."
    )
    image_feature_dim: int = Field(256, gt=0, description="Features of a camera.")
    state_feature_dim: int = Field(64, gt=0, description="Features of the robot's state.")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the values read from a camera's map that the critic's loss drops; acting drops none. "
        "SERL: 0.1, with the pretrained backbone.",
    )


class CameraEncoder(nn.Module):
    """Images, or their maps where the backbone is shared, to a camera's features.

    Args:
        backbone: of this camera alone; None for a shared one.
        pooling: map to a vector.
        pooled_dim: its size.
        feature_dim: features of the camera.
        dropout: share of the pooled values that may be dropped.
    """

    def __init__(
        self, backbone: nn.Module | None, pooling: nn.Module, pooled_dim: int, feature_dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.backbone, self.pooling_layer, self.dropout = backbone, pooling, dropout
        self.mlp = _squashed_linear(pooled_dim, feature_dim)

    def forward(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Image uint8 [B, H, W, 3] or map [B, C, h, w] → [B, feature_dim]; drops values only by a generator."""
        x = self.pooling_layer(x if self.backbone is None else self.backbone(x))
        if generator is not None and self.dropout > 0:
            kept = torch.empty_like(x).bernoulli_(1 - self.dropout, generator=generator)
            x = x * kept / (1 - self.dropout)
        return self.mlp(x)


class ImageEncoder(nn.Module):
    """{"state": [N, S], "images": {camera: uint8 [N, H, W, 3]}, …} → {"state": float32 [N, F]}.

    It behaves alike in training and evaluation mode, which nobody here switches: whoever wants dropout, a loss, gives
    the generator that draws it.

    Args:
        image_shapes: camera → (H, W, 3).
        state_dim: S.
        resnet: pretrained backbone, which becomes part of this module; None for the small network.
        freeze_backbone: whether `resnet` stays as it is, shared by all cameras.
        small_channels: widths of the small network.
        spatial_embeddings, image_feature_dim, state_feature_dim, dropout: see `ImageEncoderKeys`.
        normalizer: running normalisation of the robot's state; None for none.

    Attributes:
        out_dim: F.
    """

    def __init__(
        self,
        image_shapes: Mapping[str, tuple[int, ...]],
        state_dim: int,
        *,
        resnet: ResNet10 | None = None,
        freeze_backbone: bool = True,
        small_channels: tuple[int, ...] = (16, 32, 32),
        spatial_embeddings: int = 8,
        image_feature_dim: int = 256,
        state_feature_dim: int = 64,
        dropout: float = 0.0,
        normalizer: RunningNorm | None = None,
    ) -> None:
        super().__init__()
        self.image_shapes = {camera: tuple(image_shapes[camera]) for camera in sorted(image_shapes)}
        self.out_dim = image_feature_dim * len(self.image_shapes) + state_feature_dim
        self.normalizer = normalizer
        frozen = resnet is not None and freeze_backbone
        self.backbone = resnet.requires_grad_(False) if resnet is not None and frozen else None
        self.encoders = nn.ModuleDict()
        for camera, (height, width, _) in self.image_shapes.items():
            backbone = SmallCnn(small_channels) if resnet is None else resnet if frozen else copy.deepcopy(resnet)
            size, channels = backbone.map_size(height, width), backbone.out_channels
            pooling = nn.Flatten() if resnet is None else SpatialLearnedEmbeddings(channels, *size, spatial_embeddings)
            self.encoders[camera] = CameraEncoder(
                None if frozen else backbone,
                pooling,
                channels * (math.prod(size) if resnet is None else spatial_embeddings),
                image_feature_dim,
                dropout,
            )
        self.state_proj = _squashed_linear(state_dim, state_feature_dim)

    def forward(self, obs: Obs, generator: torch.Generator | None = None) -> Obs:
        """The features of raw observations; other leaves than state and images are ignored.

        Args:
            obs: as the environment gives it, on this module's device.
            generator: draws the dropout, on the same device; None for no dropout.

        Raises ShapeError when a camera is missing or its images are not of the size or type that this was built for.
        """
        images = obs.get("images", {})
        features = [
            encoder(self._map(self._checked(camera, images)), generator) for camera, encoder in self.encoders.items()
        ]
        state = obs["state"] if self.normalizer is None else self.normalizer(obs["state"])
        return {"state": torch.cat([*features, self.state_proj(state)], -1).float()}

    def trained_parameters(self) -> list[nn.Parameter]:
        """All but a frozen backbone's, in an order that a target's are in too."""
        frozen = set(self.backbone.parameters()) if self.backbone is not None else set()
        return [parameter for parameter in self.parameters() if parameter not in frozen]

    def make_target(self) -> ImageEncoder:
        """A frozen copy with the same weights that goes on sharing the normaliser and a frozen backbone."""
        shared = {id(part): part for part in (self.normalizer, self.backbone) if part is not None}
        return copy.deepcopy(self, shared).requires_grad_(False)

    def _checked(self, camera: str, images: Mapping[str, Tensor]) -> Tensor:
        """The images of a camera, uint8 [N, H, W, 3]."""
        if camera not in images:
            present = ", ".join(images) or "no images"
            raise ShapeError(f"camera {camera!r} is missing: the observation has {present}")
        image, shape = images[camera], self.image_shapes[camera]
        if tuple(image.shape[1:]) != shape or image.dtype != torch.uint8:
            raise ShapeError(
                f"images of camera {camera!r} are {_describe(image.dtype, image.shape[1:])}, but the encoder was built "
                f"for {_describe(torch.uint8, shape)}"
            )
        return image

    def _map(self, image: Tensor) -> Tensor:
        """The shared backbone's map of an image; the image itself where each camera has a backbone of its own."""
        if self.backbone is None:
            return image
        with torch.no_grad():
            return self.backbone(image)


def build_image_encoder(
    config: ImageEncoderKeys, *, obs_shapes: Mapping[str, tuple[int, ...]], normalizer: RunningNorm | None
) -> ImageEncoder:
    """The encoder that `config` describes, for observations of these shapes (leaf path → shape without N).

    Raises:
        ConfigError: there are no cameras, others than expected, or no state.
        CheckpointError: `model_path` does not hold the backbone's weights.
    """
    cameras = {path.removeprefix(IMAGES): shape for path, shape in obs_shapes.items() if path.startswith(IMAGES)}
    if not cameras or "state" not in obs_shapes:
        absent = "no camera" if not cameras else "no robot state"
        raise ConfigError(
            f"actor.model.input_type is mixed, but the environment has {absent}; choose an environment with both, or "
            "a policy on the state (model_type: mlp_policy)"
        )
    if config.image_num not in (None, len(cameras)):
        raise ConfigError(
            f"actor.model.image_num is {config.image_num}, but the environment has cameras "
            f"{', '.join(sorted(cameras))}; write {len(cameras)} or remove the key"
        )
    return ImageEncoder(
        cameras,
        obs_shapes["state"][0],
        resnet=load_resnet10(config.model_path) if config.model_path is not None else None,
        freeze_backbone=config.freeze_backbone,
        small_channels=config.small_channels,
        spatial_embeddings=config.spatial_embeddings,
        image_feature_dim=config.image_feature_dim,
        state_feature_dim=config.state_feature_dim,
        dropout=config.dropout,
        normalizer=normalizer,
    )


def _squashed_linear(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, out_dim), nn.LayerNorm(out_dim), Tanh())


def _describe(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
