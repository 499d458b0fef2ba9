"""ResNet-10 with group normalisation: SERL's image backbone, here to be loaded with pretrained weights.

The ResNet of He et al. 2015 (arXiv:1512.03385) with one basic block per stage. Parameters are named as torchvision
names them, with the group norms under `bn*`: the names in the published file.

Frameworks pad a stride-2 convolution of an even-sized map differently: torch by one pixel on both sides, flax
(`SAME`) by one at the bottom and the right. The windows then lie one pixel apart, at each of four places in this
network, so weights have to be run with the padding that they were trained with; a file may name it in its metadata.

    B batch, H and W size of the image
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rlinf.core.errors import CheckpointError, first_line

Padding = Literal["symmetric", "same"]

WIDTHS = (64, 128, 256, 512)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FILE_STEM = "resnet10_pretrained"
REMEDY = (
    "get the weights with `hf download RLinf/RLinf-ResNet10-pretrained --local-dir RLinf-ResNet10-pretrained`, or "
    "write model_path: null for the small encoder trained from scratch"
)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(4, channels, eps=1e-5)


def _pad_same(x: Tensor) -> Tensor:
    """Zeros as flax adds them for a window of 3 and a stride of 2: 2 in all along an odd side, 1 along an even."""
    (top, bottom), (left, right) = (((size % 2), 1) for size in x.shape[-2:])
    return F.pad(x, (left, right, top, bottom))


class BasicBlock(nn.Module):
    """relu(x′ + norm(conv(relu(norm(conv(x)))))), with x′ = norm(1×1 conv(x)) where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int, padding: Padding) -> None:
        super().__init__()
        self.pads_itself = padding == "same" and stride == 2
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 0 if self.pads_itself else 1, bias=False)
        self.bn1 = _group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = _group_norm(channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), _group_norm(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, ⌈H / stride⌉, ⌈W / stride⌉]."""
        y = self.conv1(_pad_same(x) if self.pads_itself else x)
        y = self.bn2(self.conv2(F.relu(self.bn1(y))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet10(nn.Module):
    """Images to the map before pooling; there is no classifier.

    Args:
        padding: `symmetric` as in torchvision, `same` for weights trained in flax.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, padding: Padding = "symmetric") -> None:
        super().__init__()
        self.padding, self.out_channels = padding, WIDTHS[-1]
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 7, 2, 3, bias=False)
        self.bn1 = _group_norm(WIDTHS[0])
        for stage, (in_channels, channels) in enumerate(zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False), 1):
            block = BasicBlock(in_channels, channels, 1 if stage == 1 else 2, padding)
            self.add_module(f"layer{stage}", nn.Sequential(block))
        # Not persistent: the published file has the parameters alone.
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def map_size(height: int, width: int) -> tuple[int, int]:
        """(⌈H / 32⌉, ⌈W / 32⌉), whatever the padding."""
        return -(-height // 32), -(-width // 32)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] → [B, 512, ⌈H / 32⌉, ⌈W / 32⌉]."""
        # Seen as channels first, the image lies in memory as torch's channels_last format, which convolutions keep.
        x = (images.permute(0, 3, 1, 2).to(torch.float32) - self.mean) / self.std
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(_pad_same(x), 3, 2) if self.padding == "same" else F.max_pool2d(x, 3, 2, 1)
        for stage in range(1, len(WIDTHS) + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return x


def load_resnet10(path: str | Path) -> ResNet10:
    """The network with the weights of a file, or of the resnet10_pretrained.pt (or .safetensors) in a folder.

    A classifier in the file (`fc.*`) is ignored. Nothing in a .pt file is executed. Raises CheckpointError when the
    file is missing, not readable or not a ResNet-10's.
    """
    file = _find(Path(path))
    weights, padding = _read(file)
    network = ResNet10(padding)
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
    if problem := first_mismatch(weights, network.state_dict()):
        raise CheckpointError(f"{file} is not a ResNet-10 with group norms: {problem}; {REMEDY}")
    network.load_state_dict(weights)
    return network


def first_mismatch(found: Mapping[str, object], expected: Mapping[str, Tensor]) -> str | None:
    """What first keeps `found` from being `expected`'s names and shapes, in words; None when it is."""
    for name, tensor in expected.items():
        if name not in found:
            return f"{name} is missing"
        value = found[name]
        if not isinstance(value, Tensor):
            return f"{name} is a {type(value).__name__}"
        if value.shape != tensor.shape:
            return f"{name} is {list(value.shape)} instead of {list(tensor.shape)}"
    unknown = [name for name in found if name not in expected]
    return f"{unknown[0]} is unknown" if unknown else None


def _find(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; {REMEDY}")
    if not path.is_dir():
        return path
    for suffix in (".pt", ".safetensors"):
        if (file := path / f"{FILE_STEM}{suffix}").is_file():
            return file
    raise CheckpointError(f"{path} holds no {FILE_STEM}.pt; {REMEDY}")


def _read(file: Path) -> tuple[dict[str, Tensor], Padding]:
    """(tensors by name, padding that they were trained with)."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as tensors:
                same = (tensors.metadata() or {}).get("padding") == "same"
                padding: Padding = "same" if same else "symmetric"
                return {name: tensors.get_tensor(name) for name in tensors.keys()}, padding  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise _unreadable(file, error) from error
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    # The unpickler raises whatever a damaged or forbidden byte stream leads to; all of it means the same here.
    except Exception as error:
        raise _unreadable(file, error) from error
    if not isinstance(weights, dict):
        raise CheckpointError(f"{file} holds a {type(weights).__name__}, not weights by name; {REMEDY}")
    return weights, "symmetric"


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    with file.open("rb") as stream:
        if stream.read(7) == b"version":  # how a git-lfs pointer begins
            return CheckpointError(
                f"{file} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder, or {REMEDY}"
            )
    return CheckpointError(f"{file} cannot be read ({first_line(error)}); {REMEDY}")
