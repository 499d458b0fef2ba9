"""Behaviour cloning: demonstrations → a policy on disk, with a record, checkpoints and an evaluation.

One process and one loop: there is nothing to collect while learning. A run that was stopped goes on exactly; which
examples an update sees is a function of the seed and its number.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import torch

from rlinf.algorithms.bc import FlowCloning
from rlinf.core import tree
from rlinf.core.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from rlinf.core.protocols import VectorEnv
from rlinf.core.seeding import derive_seed, numpy_generator, torch_generator
from rlinf.core.types import EnvSpaces
from rlinf.data.chunks import ChunkDataset, RecordedChunks
from rlinf.data.demos import check_demos, read_demos
from rlinf.launch.build import control_mode_of, make_env, optimizer_settings
from rlinf.launch.demonstrators import ScriptedExpert
from rlinf.launch.machine import choose_float32_products, keep_freed_memory, num_cores
from rlinf.launch.provenance import prepare_run_dir, write_provenance
from rlinf.launch.record import record_demos, task_of
from rlinf.launch.run import refuse_to_overwrite, unused_if_it_never_began
from rlinf.launch.sft_config import SftConfig
from rlinf.metrics.aggregate import MetricMean
from rlinf.metrics.report import Reporter
from rlinf.models.embodiment.flow_decoder import (
    FlowDecoder,
    FlowDecoderSpec,
    read_flow_decoder_spec,
    save_flow_decoder,
)
from rlinf.runners.checkpoint import CheckpointStore, find, verify
from rlinf.runners.interrupt import StopOnSignals
from rlinf.runtime.local import Flag
from rlinf.workers.env_worker import EpisodeMean
from rlinf.workers.learner_worker import Progress
from rlinf.workers.state_files import load_state, save_state

TRAINER_FILE = "trainer.pt"


def run_sft(config: SftConfig) -> int:
    """Do what the configuration says; the exit code is 0, or 128 + the number of the signal that stopped it.

    Raises RlinfError with one line for whatever the user can mend.
    """
    runner = config.runner
    run_dir = Path(runner.logger.log_path).expanduser().resolve() / runner.logger.experiment_name
    checkpoint = find(runner.resume_dir) if runner.resume_dir is not None else None
    first_step = verify(checkpoint).global_step if checkpoint is not None else 0
    _refuse_to_export_over(runner.export_dir)
    refuse_to_overwrite(run_dir, checkpoint)
    _prepare_process(config)
    prepare_run_dir(run_dir)
    resolved = config.model_dump(mode="json")
    with (
        unused_if_it_never_began(run_dir),
        Reporter(
            run_dir,
            backends=runner.logger.logger_backends,
            project_name=runner.logger.project_name,
            experiment_name=runner.logger.experiment_name,
            config=resolved,
            total_steps=runner.max_steps,
            resume_step=first_step,
        ) as reporter,
        _evaluation_env(config) as env,
    ):
        dataset = open_dataset(config, env, reporter)
        cloning = build_cloning(config, dataset, env.spaces)
        if checkpoint is not None:
            _resume(cloning, checkpoint)
        write_provenance(run_dir, resolved, seed=runner.seed)
        stop = Flag()
        with StopOnSignals(stop):
            store = CheckpointStore(run_dir / "checkpoints", keep=runner.keep_checkpoints)
            _train(config, cloning, dataset, env, store, reporter, stop, first_step)
        if stop.is_set():
            reporter.note(f"stopped by {stop.reason}; go on with: runner.resume_dir={run_dir}")
            return 128 + signal.Signals[stop.reason]
        if runner.export_dir is not None:
            _export(_decoder(cloning), Path(runner.export_dir).expanduser())
            reporter.note(f"the policy is in {runner.export_dir}")
    return 0


def open_dataset(config: SftConfig, env: VectorEnv, reporter: Reporter) -> ChunkDataset:
    """The demonstrations, recorded in `env` first where they are missing. Raises DataError where they do not fit."""
    data, setup, spaces = config.data, config.model.policy_setup, env.spaces
    if data.record is not None:
        wanted = data.record
        record_demos(
            config.env,
            env,
            ScriptedExpert(task_of(config.env), wanted.noise),
            data.path,
            episodes=wanted.episodes,
            policy_setup=setup,
            seed=config.runner.seed,
            only_successes=wanted.only_successes,
            note=reporter.note,
        )
    trajectories, meta = read_demos(data.path)
    check_demos(meta, spaces, control_mode_of(config.env, setup))
    if "state" not in spaces.obs_shapes:
        raise DataError(f"the demonstrations in {data.path} hold no state, which the policy sees")
    share = meta.num_successes / max(1, meta.num_episodes)
    reporter.note(
        f"{meta.num_episodes} demonstrations of {meta.env_id} by {meta.recorded_by}: {meta.num_transitions} steps, "
        f"{share:.0%} successful"
    )
    return RecordedChunks(trajectories, config.model.num_action_chunks)


def build_cloning(config: SftConfig, dataset: ChunkDataset, spaces: EnvSpaces) -> FlowCloning:
    """The policy and its optimizer, before the first update."""
    seed, device = config.runner.seed, torch.device("cuda" if config.profile == "gpu" else "cpu")
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


def _train(
    config: SftConfig,
    cloning: FlowCloning,
    dataset: ChunkDataset,
    env: VectorEnv,
    store: CheckpointStore,
    reporter: Reporter,
    stop: Flag,
    step: int,
) -> None:
    runner, means = config.runner, MetricMean()
    while step < runner.max_steps and not stop.is_set():
        step += 1
        rows = numpy_generator(runner.seed, f"batch/{step}").integers(len(dataset), size=config.global_batch_size)
        means.add(cloning.update(dataset.batch(rows)))
        evaluation = {}
        if _due(step, runner.val_check_interval, runner.max_steps):
            evaluation = {f"eval/{tag}": value for tag, value in evaluate(config, _decoder(cloning), env).items()}
        if _due(step, runner.log_interval, runner.max_steps) or evaluation:
            learned, means = means.mean(), MetricMean()
            if not math.isfinite(learned["bc/flow_loss"]):
                raise NonFiniteError(f"the loss is {learned['bc/flow_loss']} at update {step}; lower optim.lr")
            reporter.log(step, {f"train/{tag}": value for tag, value in learned.items()} | evaluation)
        if _due(step, runner.save_interval, runner.max_steps) or stop.is_set():
            _save(store, cloning, step)


def _due(step: int, interval: int, last: int) -> bool:
    return step == last or (interval > 0 and step % interval == 0)


@torch.no_grad()
def evaluate(config: SftConfig, decoder: FlowDecoder, env: VectorEnv) -> dict[str, float]:
    """Means over `rollout_epoch` episodes in every environment, with noise drawn from N(0, I); the same every time."""
    env_config, episodes = config.env, EpisodeMean()
    generator = torch_generator(env_config.seed, "evaluation")
    for epoch in range(env_config.rollout_epoch):
        obs = env.reset(seed=derive_seed(env_config.seed, f"evaluation/{epoch}") % 2**31)
        playing = torch.ones(env.num_envs, dtype=torch.bool)
        while bool(playing.any()):
            noise = torch.randn(env.num_envs, *decoder.noise_shape, generator=generator)
            obs = tree.to(obs, decoder.state_mean.device)
            step = env.step(decoder.decode(obs, noise.to(decoder.state_mean.device)))
            done, obs = step.done.cpu(), step.obs
            episodes.add(step.info, done & playing)
            playing &= ~done
    return episodes.mean()


@contextlib.contextmanager
def _evaluation_env(config: SftConfig) -> Iterator[VectorEnv]:
    section = config.env.model_copy(update={"auto_reset": False})
    setup = config.model.policy_setup
    env = make_env(section, num_envs=section.total_num_envs, seed=section.seed, policy_setup=setup, render=False)
    try:
        yield env
    finally:
        env.close()


def _decoder(cloning: FlowCloning) -> FlowDecoder:
    assert isinstance(cloning.model, FlowDecoder)
    return cloning.model


def _save(store: CheckpointStore, cloning: FlowCloning, step: int) -> None:
    def fill(directory: Path) -> Progress:
        save_flow_decoder(_decoder(cloning), directory)
        save_state(directory / TRAINER_FILE, cloning.state_dict())
        return Progress(updates=step)

    store.write(step, fill)


def _resume(cloning: FlowCloning, checkpoint: Path) -> None:
    there, here = read_flow_decoder_spec(checkpoint), _decoder(cloning).spec
    if there != here:
        raise CheckpointError(f"{checkpoint} holds another policy ({there}) than the configuration's ({here})")
    cloning.load_state_dict(load_state(checkpoint / TRAINER_FILE))


def _export(decoder: FlowDecoder, folder: Path) -> None:
    """Put the policy there in one step."""
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_flow_decoder(decoder, unfinished)
    unfinished.rename(folder)


def _refuse_to_export_over(folder: str | None) -> None:
    if folder is not None and Path(folder).expanduser().exists():
        raise ConfigError(
            f"runner.export_dir: {folder} is there already, and runs may depend on it; move it away or name "
            "another folder"
        )


def _prepare_process(config: SftConfig) -> None:
    if config.profile == "cpu":
        choose_float32_products()
        torch.set_num_threads(max(1, num_cores() // 2))
    keep_freed_memory()
