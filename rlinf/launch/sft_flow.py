"""Behaviour cloning of a small flow policy on the state, from demonstrations of our own format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rlinf.algorithms.bc import FlowCloning
from rlinf.core.errors import CheckpointError, DataError
from rlinf.core.protocols import VectorEnv
from rlinf.core.seeding import derive_seed, numpy_generator, torch_generator
from rlinf.core.types import EnvSpaces, Metrics
from rlinf.data.chunks import ChunkDataset, RecordedChunks
from rlinf.data.demos import check_demos, read_demos
from rlinf.launch.build import control_mode_of, optimizer_settings
from rlinf.launch.demonstrators import ScriptedExpert
from rlinf.launch.machine import device_of
from rlinf.launch.record import record_demos, task_of
from rlinf.launch.sft_config import SftConfig
from rlinf.launch.sft_evaluate import ActingDecoder
from rlinf.models.embodiment.flow_decoder import (
    FlowDecoder,
    FlowDecoderConfig,
    FlowDecoderSpec,
    read_flow_decoder_spec,
    save_flow_decoder,
)
from rlinf.workers.state_files import load_state, save_state

TRAINER_FILE = "trainer.pt"


class FlowTrainee:
    """A `sft.Trainee`: the decoder, its optimizer and its demonstrations.

    Args:
        config: with `model_type: flow_decoder`.
        env: in which demonstrations are recorded where they are missing.
        note: gets a line about the demonstrations.

    Raises DataError where the demonstrations do not fit.
    """

    loss_tag = "bc/flow_loss"

    def __init__(self, config: SftConfig, env: VectorEnv, note: Callable[[str], None]) -> None:
        self._config = config
        self._dataset = open_dataset(config, env, note)
        self._cloning = build_cloning(config, self._dataset, env.spaces)

    def update(self, step: int) -> Metrics:
        """As `sft.Trainee.update`."""
        config, dataset = self._config, self._dataset
        draws = numpy_generator(config.runner.seed, f"batch/{step}")
        return self._cloning.update(dataset.batch(draws.integers(len(dataset), size=config.global_batch_size)))

    @contextmanager
    def acting(self) -> Iterator[ActingDecoder]:
        """As `sft.Trainee.acting`."""
        decoder = self._decoder
        yield ActingDecoder(decoder.decode, decoder.noise_shape, decoder.state_mean.device, decoder.noise_shape[0])

    def save(self, directory: Path) -> None:
        """As `sft.Trainee.save`."""
        self.export(directory)
        save_state(directory / TRAINER_FILE, self._cloning.state_dict())

    def resume(self, checkpoint: Path) -> None:
        """As `sft.Trainee.resume`."""
        there, here = read_flow_decoder_spec(checkpoint), self._decoder.spec
        if there != here:
            raise CheckpointError(f"{checkpoint} holds another policy ({there}) than the configuration's ({here})")
        self._cloning.load_state_dict(load_state(checkpoint / TRAINER_FILE))

    def export(self, folder: Path) -> None:
        """As `sft.Trainee.export`."""
        save_flow_decoder(self._decoder, folder)

    @property
    def _decoder(self) -> FlowDecoder:
        assert isinstance(self._cloning.model, FlowDecoder)
        return self._cloning.model


def open_dataset(config: SftConfig, env: VectorEnv, note: Callable[[str], None]) -> ChunkDataset:
    """The demonstrations, recorded in `env` first where they are missing. Raises DataError where they do not fit."""
    data, setup, spaces, section = config.data, config.model.policy_setup, env.spaces, config.env
    assert data.path is not None and section is not None and isinstance(config.model, FlowDecoderConfig)
    if data.record is not None:
        wanted = data.record
        record_demos(
            section,
            env,
            ScriptedExpert(task_of(section), wanted.noise),
            data.path,
            episodes=wanted.episodes,
            policy_setup=setup,
            seed=config.runner.seed,
            only_successes=wanted.only_successes,
            note=note,
        )
    trajectories, meta = read_demos(data.path)
    check_demos(meta, spaces, control_mode_of(section, setup))
    if "state" not in spaces.obs_shapes:
        raise DataError(f"the demonstrations in {data.path} hold no state, which the policy sees")
    share = meta.num_successes / max(1, meta.num_episodes)
    note(
        f"{meta.num_episodes} demonstrations of {meta.env_id} by {meta.recorded_by}: {meta.num_transitions} steps, "
        f"{share:.0%} successful"
    )
    return RecordedChunks(trajectories, config.model.num_action_chunks)


def build_cloning(config: SftConfig, dataset: ChunkDataset, spaces: EnvSpaces) -> FlowCloning:
    """The policy and its optimizer, before the first update."""
    seed, device = config.runner.seed, device_of(config)
    assert config.env is not None and isinstance(config.model, FlowDecoderConfig)
    spec = FlowDecoderSpec(
        obs_dim=spaces.obs_shapes["state"][0],
        action_dim=dataset.action_dim,
        horizon=dataset.horizon,
        hidden_dims=config.model.hidden_dims,
        denoising_steps=config.model.denoising_steps,
        env_id=task_of(config.env),
        control_mode=control_mode_of(config.env, config.model.policy_setup) or "",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "networks"))
        decoder = FlowDecoder(spec)
    mean, deviation = dataset.moments()
    decoder.state_mean.copy_(mean)
    decoder.state_std.copy_(deviation)
    settings = optimizer_settings(config.optim, config.runner.max_steps)
    generator = torch_generator(seed, "noise", device)
    return FlowCloning(decoder.to(device), settings, device=device, generator=generator)
