"""Between a robot's numbers and the model's: small callables on batches, to be put together as `dataconfig` does.

Each takes a sample and returns another; nothing is changed in place. A sample holds

    images         {name: uint8 [B, height, width, 3]}
    state          float32 [B, S]
    actions        float32 [B, H, A]; absent when acting
    prompt         list[str] of length B
    tokens         int64 [B, L], and token_mask, bool [B, L]: the prompt, once it is tokenised

and is an observation of `core.types`, but for its `instruction`, until the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlinf.core.errors import DataError, ShapeError
from rlinf.models.embodiment.openpi.model import Pi0Inputs, stack_cameras
from rlinf.models.embodiment.openpi.norm_stats import NormStats
from rlinf.models.embodiment.openpi.tokenizer import Tokenizer, tokenize

Sample = dict[str, Any]
Transform = Callable[[Sample], Sample]

SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""The model's cameras, in the order of their tokens."""

RESIZED_AT_ONCE = 256
"""A whole collection of camera pictures would be 10 GB in float32, and more numbers than kernels can count."""


def compose(transforms: Sequence[Transform]) -> Transform:
    """One after another."""

    def run(sample: Sample) -> Sample:
        for transform in transforms:
            sample = transform(sample)
        return sample

    return run


@dataclass(frozen=True)
class PickCameras:
    """Fill the model's slots; other cameras are left out.

    Attributes:
        cameras: slot → names by which the robot's camera may go, in environments and data sets.

    Raises DataError where a slot stays empty, and ShapeError where its images are none.
    """

    cameras: Mapping[str, tuple[str, ...]]

    def __call__(self, sample: Sample) -> Sample:
        """`images` by slot."""
        images = sample.get("images", {})
        picked = {}
        for slot, names in self.cameras.items():
            name = next((name for name in names if name in images), None)
            if name is None:
                there = ", ".join(images) or "none"
                raise DataError(f"no camera for {slot}: looked for {' or '.join(names)}, there is {there}")
            picked[slot] = image = images[name]
            if image.ndim != 4 or image.shape[-1] != 3 or image.dtype != torch.uint8:
                raise ShapeError(f"camera {name} gives {image.dtype} {list(image.shape)}, not uint8 [B, h, w, 3]")
        return {**sample, "images": picked}


@dataclass(frozen=True)
class ResizeImages:
    """Resize all images to a square, without distortion; see `resize_with_pad`."""

    size: int

    def __call__(self, sample: Sample) -> Sample:
        """`images` of the new size."""
        images = {slot: resize_with_pad(image, self.size, self.size) for slot, image in sample["images"].items()}
        return {**sample, "images": images}


@dataclass(frozen=True)
class PadStatesAndActions:
    """Append zeros to state and actions up to a size."""

    size: int

    def __call__(self, sample: Sample) -> Sample:
        """`state` and `actions` of that size. Raises ShapeError where one is larger."""
        return _each(sample, lambda _, x: pad_to(x, self.size))


@dataclass(frozen=True)
class Normalize:
    """(x − offset) / scale of state and actions, as `NormStats.affine` says.

    Attributes:
        stats: by name; what has none stays as it is. Longer vectors than the data's are cut.
        quantiles: normalise by quantiles (π0.5) or by mean and standard deviation (π0).

    Raises ShapeError where there are fewer statistics than numbers.
    """

    stats: Mapping[str, NormStats]
    quantiles: bool

    def __call__(self, sample: Sample) -> Sample:
        """`state` and `actions`, normalised."""
        return _each(sample, self._apply)

    def _apply(self, name: str, x: Tensor) -> Tensor:
        if name not in self.stats:
            return x
        offset, scale = self.stats[name].affine(self.quantiles)
        size = x.shape[-1]
        if len(offset) < size:
            raise ShapeError(f"{name} has {size} numbers, but norm_stats.json only {len(offset)}")
        return ((x.double() - offset[:size].to(x.device)) / scale[:size].to(x.device)).float()


@dataclass(frozen=True)
class Unnormalize:
    """Inverse of `Normalize` for actions, which may have more numbers than there are statistics: padding stays."""

    stats: Mapping[str, NormStats]
    quantiles: bool

    def __call__(self, sample: Sample) -> Sample:
        """`actions` in the robot's units. Raises DataError where there are no statistics of actions."""
        if "actions" not in self.stats:
            raise DataError(f"the statistics have no 'actions', only {', '.join(self.stats) or 'nothing'}")
        x = sample["actions"]
        offset, scale = (part[: x.shape[-1]].to(x.device) for part in self.stats["actions"].affine(self.quantiles))
        size = len(offset)
        actions = x[..., :size].double() * scale + offset
        return {**sample, "actions": torch.cat([actions.float(), x[..., size:]], -1)}


@dataclass(frozen=True)
class DeltaActions:
    """actions − state where `mask` is true, the state being that at the beginning of the chunk."""

    mask: tuple[bool, ...]

    def __call__(self, sample: Sample) -> Sample:
        """`actions` relative to `state`; nothing where there are none."""
        return _shift(sample, self.mask, -1.0)


@dataclass(frozen=True)
class AbsoluteActions:
    """Inverse of `DeltaActions`; `state` in the robot's units."""

    mask: tuple[bool, ...]

    def __call__(self, sample: Sample) -> Sample:
        """`actions` without the state's part."""
        return _shift(sample, self.mask, 1.0)


@dataclass(frozen=True)
class CropActions:
    """Keep the first numbers of every action: what the robot has."""

    size: int

    def __call__(self, sample: Sample) -> Sample:
        """`actions` [B, H, size]."""
        return {**sample, "actions": sample["actions"][..., : self.size]}


@dataclass(frozen=True)
class TokenizePrompt:
    """`instruction` or `prompt` → tokens and token_mask.

    Attributes:
        tokenizer: text to numbers.
        max_len: longest prompt in tokens.
        with_state: write the normalised state into the prompt (π0.5's format).
    """

    tokenizer: Tokenizer
    max_len: int
    with_state: bool

    def __call__(self, sample: Sample) -> Sample:
        """`tokens` and `token_mask` on the CPU."""
        prompts = sample["instruction"] if "instruction" in sample else sample["prompt"]
        state = sample["state"] if self.with_state else None
        tokens, mask = tokenize(self.tokenizer, prompts, state, max_len=self.max_len)
        return {**sample, "tokens": tokens, "token_mask": mask}


def model_inputs(sample: Sample, device: torch.device | str) -> Pi0Inputs:
    """The sample on a device, after all transforms.

    Cameras that the robot has not are not there at all. openpi gives black images that are masked: masked tokens are
    never seen and take no position, so the result is the same and their part of the work is saved.
    """
    images = [sample["images"][slot].to(device) for slot in SLOTS if slot in sample["images"]]
    return Pi0Inputs(
        images=stack_cameras(images),
        image_mask=torch.ones(images[0].shape[0], len(images), dtype=torch.bool, device=device),
        tokens=sample["tokens"].to(device),
        token_mask=sample["token_mask"].to(device),
        state=sample["state"].to(device),
    )


def resize_with_pad(images: Tensor, height: int, width: int) -> Tensor:
    """uint8 [B, h, w, 3] → uint8 [B, height, width, 3], as large as fits and in the middle of black.

    Bilinear, with the filter widened when shrinking, as Pillow does it for openpi; numbers differ from Pillow's by one
    level at most, in a few of a thousand pixels.
    """
    current_height, current_width = images.shape[1:3]
    if (current_height, current_width) == (height, width):
        return images
    if len(images) > RESIZED_AT_ONCE:
        return torch.cat([resize_with_pad(part, height, width) for part in images.split(RESIZED_AT_ONCE)])
    ratio = max(current_width / width, current_height / height)
    new_height, new_width = int(current_height / ratio), int(current_width / ratio)
    x = images.permute(0, 3, 1, 2)
    on_cpu = images.device.type == "cpu"
    x = F.interpolate(x if on_cpu else x.float(), (new_height, new_width), mode="bilinear", antialias=True)
    if not on_cpu:
        x = x.round().clamp(0, 255).to(torch.uint8)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    x = F.pad(x, (left, width - new_width - left, top, height - new_height - top))
    return x.permute(0, 2, 3, 1)


def pad_to(x: Tensor, size: int) -> Tensor:
    """[..., D] → [..., size] by zeros behind. Raises ShapeError where D is larger."""
    if x.shape[-1] > size:
        raise ShapeError(f"{x.shape[-1]} numbers do not fit into the model's {size}")
    return F.pad(x, (0, size - x.shape[-1]))


def _each(sample: Sample, change: Callable[[str, Tensor], Tensor]) -> Sample:
    """The sample with `state` and, where there are any, `actions` changed."""
    return {**sample, **{name: change(name, sample[name]) for name in ("state", "actions") if name in sample}}


def _shift(sample: Sample, mask: tuple[bool, ...], sign: float) -> Sample:
    if "actions" not in sample:
        return sample
    actions, state, size = sample["actions"], sample["state"], len(mask)
    if min(actions.shape[-1], state.shape[-1]) < size:
        raise ShapeError(f"{size} numbers are relative to the state, but it has {state.shape[-1]}")
    change = sign * state[:, None, :size] * torch.tensor(mask, device=state.device)
    return {**sample, "actions": torch.cat([actions[..., :size] + change, actions[..., size:]], -1)}
