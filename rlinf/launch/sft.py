"""Supervised training: demonstrations → a policy on disk, with a record, checkpoints and an evaluation.

One process and one loop: there is nothing to collect while learning. A run that was stopped goes on exactly; which
examples an update sees is a function of the seed and its number.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from rlinf.core.errors import NonFiniteError
from rlinf.core.protocols import VectorEnv
from rlinf.core.types import Metrics
from rlinf.envs.config import EnvConfig
from rlinf.launch.folders import put_whole, refuse_to_export_over
from rlinf.launch.machine import choose_float32_products, device_of, keep_freed_memory, num_cores
from rlinf.launch.provenance import prepare_run_dir, write_provenance
from rlinf.launch.run import refuse_to_overwrite, unused_if_it_never_began
from rlinf.launch.sft_config import SftConfig
from rlinf.launch.sft_evaluate import ActingDecoder, evaluate, evaluation_env
from rlinf.launch.sft_flow import FlowTrainee
from rlinf.launch.twin_objects import remark_on_objects
from rlinf.metrics.aggregate import MetricMean
from rlinf.metrics.report import Reporter
from rlinf.models.embodiment.openpi.cloning import OpenpiCloningConfig
from rlinf.runners.checkpoint import CheckpointStore, find, verify
from rlinf.runners.interrupt import StopOnSignals
from rlinf.runtime.local import Flag
from rlinf.workers.learner_worker import Progress


class Trainee(Protocol):
    """A policy with its data and its optimizer.

    Attributes:
        loss_tag: the metric that must stay finite.
    """

    loss_tag: str

    def update(self, step: int) -> Metrics:
        """Update number `step`, counted from 1."""
        ...

    def acting(self) -> AbstractContextManager[ActingDecoder]:
        """The policy as it acts in evaluations, while the context is open."""
        ...

    def save(self, directory: Path) -> None:
        """Write everything that `resume` needs, and what `export` writes."""
        ...

    def resume(self, checkpoint: Path) -> None:
        """Inverse of `save`. Raises CheckpointError where it holds another policy or is damaged."""
        ...

    def export(self, folder: Path) -> None:
        """Write the policy as other recipes load it."""
        ...


def run_sft(config: SftConfig) -> int:
    """Do what the configuration says; the exit code is 0, or 128 + the number of the signal that stopped it.

    Raises RlinfError with one line for whatever the user can mend.
    """
    runner = config.runner
    run_dir = Path(runner.logger.log_path).expanduser().resolve() / runner.logger.experiment_name
    checkpoint = find(runner.resume_dir) if runner.resume_dir is not None else None
    first_step = verify(checkpoint).global_step if checkpoint is not None else 0
    if runner.export_dir is not None:
        refuse_to_export_over(Path(runner.export_dir).expanduser(), "runner.export_dir")
    refuse_to_overwrite(run_dir, checkpoint)
    _prepare_process(config)
    prepare_run_dir(run_dir)
    resolved = config.model_dump(mode="json")
    video = None if config.env is None else config.env.video_cfg.video_base_dir
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
            video_dir=run_dir / "videos" if video is None else Path(video).expanduser(),
        ) as reporter,
        evaluation_env(_evaluated_in(config), config.model.policy_setup) as env,
    ):
        if (remark := remark_on_objects({"env": config.env})) is not None:
            reporter.note(remark)
        trainee = open_trainee(config, env, reporter.note)
        if checkpoint is not None:
            trainee.resume(checkpoint)
        write_provenance(run_dir, resolved, seed=runner.seed)
        stop = Flag()
        with StopOnSignals(stop):
            store = CheckpointStore(run_dir / "checkpoints", keep=runner.keep_checkpoints)
            _train(config, trainee, env, store, reporter, stop, first_step)
        if stop.is_set():
            reporter.note(f"stopped by {stop.reason}; go on with: runner.resume_dir={run_dir}")
            return 128 + signal.Signals[stop.reason]
        if runner.export_dir is not None:
            put_whole(Path(runner.export_dir).expanduser(), trainee.export)
            reporter.note(f"the policy is in {runner.export_dir}")
    return 0


def open_trainee(config: SftConfig, env: VectorEnv | None, note: Callable[[str], None]) -> Trainee:
    """The policy before its first update. Raises DataError or CheckpointError where data or weights do not fit."""
    if isinstance(config.model, OpenpiCloningConfig):
        from rlinf.launch.sft_openpi import OpenpiTrainee

        return OpenpiTrainee(config, env, note)
    assert env is not None  # the schema checks it
    return FlowTrainee(config, env, note)


def _train(
    config: SftConfig,
    trainee: Trainee,
    env: VectorEnv | None,
    store: CheckpointStore,
    reporter: Reporter,
    stop: Flag,
    step: int,
) -> None:
    runner, means = config.runner, MetricMean()
    while step < runner.max_steps and not stop.is_set():
        step += 1
        means.add(trainee.update(step))
        evaluation = {}
        if env is not None and runner.val_check_interval and _due(step, runner.val_check_interval, runner.max_steps):
            evaluation = _evaluate(config, trainee, env, reporter, step)
        if _due(step, runner.log_interval, runner.max_steps) or evaluation:
            learned, means = _finite(means, trainee, step), MetricMean()
            reporter.log(step, {f"train/{tag}": value for tag, value in learned.items()} | evaluation)
        if _due(step, runner.save_interval, runner.max_steps) or stop.is_set():
            _finite(means, trainee, step)  # older checkpoints give way to this one
            _save(store, trainee, step)


def _finite(means: MetricMean, trainee: Trainee, step: int) -> dict[str, float]:
    """What was learned since the last record. Raises NonFiniteError."""
    learned = means.mean()
    if not math.isfinite(loss := learned.get(trainee.loss_tag, 0.0)):
        raise NonFiniteError(f"the loss is {loss} at update {step}; lower optim.lr")
    return learned


def _evaluated_in(config: SftConfig) -> EnvConfig | None:
    """The environments that are to be opened."""
    needed = config.runner.val_check_interval != 0 or config.data.datasets is None
    return config.env if needed else None


def _due(step: int, interval: int, last: int) -> bool:
    return step == last or (interval > 0 and step % interval == 0)


def _evaluate(config: SftConfig, trainee: Trainee, env: VectorEnv, reporter: Reporter, step: int) -> dict[str, float]:
    assert config.env is not None
    video, interval, last = config.env.video_cfg, config.runner.val_check_interval, config.runner.max_steps
    film = video.save_video and _due(step, video.every * interval, last)
    with trainee.acting() as policy:
        means, pictures = evaluate(config.env, policy, env, film=film)
    if pictures is not None:
        reporter.video(f"eval_step_{step}", pictures, video.fps)
    return {f"eval/{tag}": value for tag, value in means.items()}


def _save(store: CheckpointStore, trainee: Trainee, step: int) -> None:
    def fill(directory: Path) -> Progress:
        trainee.save(directory)
        return Progress(updates=step)

    store.write(step, fill)


def _prepare_process(config: SftConfig) -> None:
    device_of(config)  # says what is missing before there is a run
    if config.profile == "cpu":
        choose_float32_products()
        torch.set_num_threads(max(1, num_cores() // 2))
    keep_freed_memory()
