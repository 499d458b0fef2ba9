"""Supervised fine-tuning of π0 and π0.5 on LeRobot data sets: Stage I of sim-real co-training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rlinf.algorithms.supervised import SupervisedTuning
from rlinf.core.errors import CheckpointError, ConfigError
from rlinf.core.protocols import VectorEnv
from rlinf.core.seeding import torch_generator
from rlinf.core.types import EnvSpaces, Metrics, Obs
from rlinf.data.chunk_mixture import Ahead, MixedChunks
from rlinf.launch.build import optimizer_settings
from rlinf.launch.decoders import tokenizer_of
from rlinf.launch.lerobot_sources import open_datasets, shares_of
from rlinf.launch.lerobot_stats import check_normalised, norm_stats_of, same_stats
from rlinf.launch.machine import device_of
from rlinf.launch.sft_config import SftConfig
from rlinf.launch.sft_evaluate import ActingDecoder
from rlinf.models.embodiment.openpi.checkpoint import load_pi0
from rlinf.models.embodiment.openpi.cloning import OpenpiCloningConfig, Pi0Cloning, freeze
from rlinf.models.embodiment.openpi.dataconfig import DataConfig
from rlinf.models.embodiment.openpi.decoder import save_openpi, weights_mark
from rlinf.models.embodiment.openpi.model import Pi0, build_pi0, empty_pi0, stays_float32, training_time
from rlinf.models.embodiment.openpi.norm_stats import find_norm_stats, read_norm_stats
from rlinf.models.embodiment.openpi.tokenizer import Tokenizer, WordTokenizer
from rlinf.workers.state_files import load_state, save_state

TRAINER_FILE = "trainer.pt"


class OpenpiTrainee:
    """A `sft.Trainee`: the model, its optimizer and its data sets.

    Args:
        config: with `model_type: openpi`.
        env: in which it is evaluated, or None.
        note: gets lines about data and model.

    Raises DataError, CheckpointError or ConfigError where data, weights or environment do not fit the robot.
    """

    loss_tag = "sft_loss"

    def __init__(self, config: SftConfig, env: VectorEnv | None, note: Callable[[str], None]) -> None:
        model = config.model
        assert isinstance(model, OpenpiCloningConfig)
        self._model_config, self.robot, seed = model, model.robot(), config.runner.seed
        if env is not None:
            check_fit(self.robot, env.spaces)
        device = device_of(config)
        self._bf16 = model.in_bf16(config.profile)

        datasets, shares = open_datasets(config.data, self.robot, model.policy_setup, note), shares_of(config.data)
        self._names = list(datasets)
        self._mixture = MixedChunks(list(datasets.values()), shares, config.global_batch_size, seed=seed)
        self._ahead = Ahead(self._mixture)
        file = given_stats(model, self.robot)
        if file is not None and model.norm_stats_path is None:
            note(f"normalised as the weights are, by {file}; model.norm_stats_path names other statistics")
        self.stats = (
            norm_stats_of(self.robot, list(datasets.values()), shares)
            if file is None
            else read_norm_stats(file, self.robot.asset_id)
        )
        for data in datasets.values():
            check_normalised(self.robot, data, self.stats, "those of these data sets" if file is None else str(file))

        pi0 = _start(model, self.robot, seed).to(device)
        freeze(pi0, model.train)
        pi0.recompute_layers(model.gradient_checkpointing)
        self.network = Pi0Cloning(
            pi0,
            self.robot.pipeline(self.stats, _tokenizer(model)),
            action_dim=self.robot.action_dim,
            noises_per_example=model.noises_per_example,
            padding_weight=model.padding_weight,
        )
        weights, frozen = model.weights(), any(not p.requires_grad for p in pi0.parameters())
        self._frozen_mark = weights_mark(weights) if frozen and weights is not None else 0
        self.tuning = SupervisedTuning(
            self.network,
            optimizer_settings(config.optim, config.runner.max_steps),
            lambda count, generator: training_time(count, generator, device),
            micro_batch_size=config.micro_batch_size,
            ema_decay=config.ema_decay,
            autocast=self._bf16,
            device=device,
            generator=torch_generator(seed, "noise", device),
        )
        total, learn = (sum(p.numel() for p in some) for some in (pi0.parameters(), self.tuning.trained))
        note(f"{self.robot.name} ({model.openpi.size}): {total:,} weights, {learn:,} of them learn")

    def update(self, step: int) -> Metrics:
        """As `sft.Trainee.update`."""
        number = step - 1
        counts = self._mixture.order.given(step) - self._mixture.order.given(number)
        groups, begin = {}, 0
        for name, count in zip(self._names, counts.tolist(), strict=True):
            if count and len(self._names) > 1:
                groups[name] = slice(begin, begin + count)
            begin += count
        return self.tuning.update(self._ahead(number), groups)

    @contextmanager
    def acting(self) -> Iterator[ActingDecoder]:
        """As `sft.Trainee.acting`: the averaged weights, where there are such."""
        robot, model, pipeline = self._model_config, self.network.model, self.network.pipeline
        device = self.tuning.device

        def decode(obs: Obs, noise: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
                actions = model.sample_actions(pipeline.encode(obs, device), noise=noise, num_steps=robot.num_steps)
            return pipeline.decode(actions.float(), obs["state"].to(device))

        with self.tuning.averaged():
            yield ActingDecoder(decode, self.network.noise_shape[1:], device, robot.num_action_chunks)

    def save(self, directory: Path) -> None:
        """As `sft.Trainee.save`."""
        self.export(directory)
        save_state(directory / TRAINER_FILE, self.tuning.state_dict() | {"frozen_mark": self._frozen_mark})

    def resume(self, checkpoint: Path) -> None:
        """As `sft.Trainee.resume`. What is frozen comes from `model_path` again."""
        if not same_stats(read_norm_stats(checkpoint), self.stats):
            raise CheckpointError(
                f"{checkpoint} normalises by other statistics: the data sets or their weights have changed since; "
                "restore them, or start from these weights and their statistics: "
                f"model.model_path={checkpoint} model.norm_stats_path={checkpoint}"
            )
        state = load_state(checkpoint / TRAINER_FILE)
        if state.get("frozen_mark", self._frozen_mark) != self._frozen_mark:  # older checkpoints have none
            raise CheckpointError(
                f"{checkpoint} was trained beside other frozen weights than those of model.model_path="
                f"{self._model_config.model_path}; name those"
            )
        self.tuning.load_state_dict(state)

    def export(self, folder: Path) -> None:
        """As `sft.Trainee.export`: openpi's model.safetensors and config.json, norm_stats.json, and the tokenizer."""
        with self.tuning.averaged():
            model = _in_bf16(self.network.model) if self._bf16 else self.network.model
            save_openpi(model, self.network.pipeline, folder)


def check_fit(robot: DataConfig, spaces: EnvSpaces) -> None:
    """Raise ConfigError with every way in which a robot's model does not fit an environment."""
    if wrong := robot.misfits(spaces):
        raise ConfigError(f"model.openpi.config_name {robot.name} does not fit the environment: {'; '.join(wrong)}")


def given_stats(model: OpenpiCloningConfig, robot: DataConfig) -> Path | None:
    """The file by which to normalise: what `norm_stats_path` names, or this robot's beside the weights to start from.

    None where they are to be computed. Raises DataError where they are named and not there.
    """
    if model.norm_stats_path is not None:
        named = Path(model.norm_stats_path).expanduser()
        return find_norm_stats(named, robot.asset_id) or named  # reading it says what is missing
    folder = model.folder()
    return None if folder is None else find_norm_stats(folder, robot.asset_id)


def _tokenizer(model: OpenpiCloningConfig) -> Tokenizer:
    weights = model.weights()
    if weights is None and model.tokenizer_path is None:
        return WordTokenizer()
    return tokenizer_of(model, weights or Path())


def _start(model: OpenpiCloningConfig, robot: DataConfig, seed: int) -> Pi0:
    """The weights before the first update, float32 on the CPU."""
    weights = model.weights()
    if weights is None:
        return build_pi0(robot.model, generator=torch_generator(seed, "networks"))
    return load_pi0(weights, robot.model, dtype=torch.float32)[0]


@torch.no_grad()
def _in_bf16(model: Pi0) -> Pi0:
    """A copy in bfloat16 but for what stays float32."""
    copy = empty_pi0(model.config)
    tensors = {
        name: p.detach() if stays_float32(name) else p.detach().to(torch.bfloat16)
        for name, p in model.named_parameters()
    }
    copy.load_state_dict(tensors, assign=True)
    return copy
