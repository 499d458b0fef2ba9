"""π0 and π0.5 as a frozen decoder: observations and noise → a chunk of the robot's actions.

`latent_policy` puts a small policy before it that chooses the noise (DSRL). The walk from noise to actions has no noise
of its own, and the prefix (images and prompt) is computed once for all of its steps.

    N environments, H actions per chunk, A action size of the robot, K steps
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlinf.core.errors import CheckpointError, DataError
from rlinf.core.types import Obs
from rlinf.models.embodiment.openpi.checkpoint import find_files, load_pi0, save_pi0
from rlinf.models.embodiment.openpi.dataconfig import DataConfig, Pipeline
from rlinf.models.embodiment.openpi.model import Pi0, build_pi0
from rlinf.models.embodiment.openpi.norm_stats import NormStats, read_norm_stats, write_norm_stats
from rlinf.models.embodiment.openpi.tokenizer import WHERE, SentencePieceTokenizer, Tokenizer, WordTokenizer

TOKENIZER_FILES = ("tokenizer.model", "paligemma_tokenizer.model")
SAMPLE_BYTES, SAMPLES = 1 << 16, 64


class OpenpiDecoder:
    """A model without gradients, and the robot's transforms around it; see `latent_policy.Decoder`.

    Args:
        model: π0 or π0.5; its parameters are frozen here.
        pipeline: of the robot and the checkpoint.
        num_steps: K.

    Attributes:
        noise_shape: (H, 32) of the noise that makes one chunk.
    """

    def __init__(self, model: Pi0, pipeline: Pipeline, *, num_steps: int) -> None:
        self.model = model.requires_grad_(False).eval()
        self.pipeline, self.num_steps = pipeline, num_steps
        self.noise_shape = (model.config.action_horizon, model.config.action_dim)

    @torch.no_grad()
    def decode(self, obs: Obs, noise: Tensor) -> Tensor:
        """Actions [N, H, A] in the robot's units from noise [N, H, 32]. Raises DataError where a camera is missing."""
        inputs = self.pipeline.encode(obs, noise.device)
        actions = self.model.sample_actions(inputs, noise=noise, num_steps=self.num_steps)
        return self.pipeline.decode(actions, obs["state"].to(noise.device))

    def to(self, device: torch.device | str) -> OpenpiDecoder:
        """Move to a device, in place."""
        self.model.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The model's tensors themselves."""
        return self.model.state_dict()


def load_openpi(robot: DataConfig, path: Path, tokenizer: Tokenizer, *, dtype: torch.dtype) -> tuple[Pi0, Pipeline]:
    """A published checkpoint, with the statistics beside its weights.

    Raises CheckpointError or DataError naming the file that is missing or does not fit.
    """
    find_files(path)  # says so where there are none
    folder = path if path.is_dir() else path.parent
    pipeline = robot.pipeline(read_norm_stats(folder, robot.asset_id), tokenizer)
    return load_pi0(path, robot.model, dtype=dtype)[0], pipeline


def save_openpi(model: Pi0, pipeline: Pipeline, folder: Path) -> None:
    """Inverse of `load_openpi`: openpi's model.safetensors and config.json, norm_stats.json, and the tokenizer's file.

    Raises CheckpointError or DataError where they cannot be written.
    """
    save_pi0(model, folder)
    write_norm_stats(pipeline.stats, folder)
    if isinstance(pipeline.tokenizer, SentencePieceTokenizer):
        try:
            shutil.copyfile(pipeline.tokenizer.path, folder / TOKENIZER_FILES[0])
        except OSError as error:
            raise CheckpointError(f"the tokenizer could not be written into {folder}: {error}") from error


def random_openpi(robot: DataConfig, *, dtype: torch.dtype = torch.float32) -> tuple[Pi0, Pipeline]:
    """Random weights, always the same, a tokenizer of words, and statistics that change nothing: for tries."""
    one = torch.ones(robot.model.action_dim if robot.pad_first else robot.action_dim, dtype=torch.float64)
    pipeline = robot.pipeline({"actions": NormStats(0 * one, one, -one, one)}, WordTokenizer())
    return build_pi0(robot.model, dtype=dtype, generator=torch.Generator().manual_seed(0)), pipeline


def load_openpi_decoder(
    robot: DataConfig, path: Path, tokenizer: Tokenizer, *, num_steps: int, dtype: torch.dtype
) -> OpenpiDecoder:
    """The decoder of a published checkpoint; see `load_openpi`."""
    model, pipeline = load_openpi(robot, path, tokenizer, dtype=dtype)
    return OpenpiDecoder(model, pipeline, num_steps=num_steps)


def random_openpi_decoder(robot: DataConfig, *, num_steps: int, dtype: torch.dtype = torch.float32) -> OpenpiDecoder:
    """A decoder with random weights; see `random_openpi`."""
    model, pipeline = random_openpi(robot, dtype=dtype)
    return OpenpiDecoder(model, pipeline, num_steps=num_steps)


def find_tokenizer(path: Path | None, weights: Path, *, tiny: bool) -> Tokenizer:
    """The tokenizer in a file, or beside the weights; words for tiny models without any.

    Raises DataError where there is none, MissingDependency where sentencepiece is not installed.
    """
    if path is not None:
        return SentencePieceTokenizer(path)
    folder = weights if weights.is_dir() else weights.parent
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            return SentencePieceTokenizer(folder / name)
    if tiny:
        return WordTokenizer()
    raise DataError(f"there is no tokenizer in {folder}; write its path in actor.model.tokenizer_path: {WHERE}")


def weights_mark(path: Path) -> int:
    """A number that tells one checkpoint from others: CRC-32 of sizes, headers and samples of its files.

    Reading all of it would take seconds of every start. Raises CheckpointError where there is none.
    """
    return _mark(find_files(path))


def _mark(files: Sequence[Path]) -> int:
    mark = 0
    for file in files:
        try:
            size = file.stat().st_size
            with file.open("rb") as stream:
                for k in range(SAMPLES):
                    stream.seek(max(0, size - SAMPLE_BYTES) * k // (SAMPLES - 1))
                    mark = zlib.crc32(stream.read(SAMPLE_BYTES), mark)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        mark = zlib.crc32(str(size).encode(), mark)
    return mark
