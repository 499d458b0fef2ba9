"""Run a configuration: train, evaluate, or evaluate what an earlier run has learned."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from rlinf.core.errors import CheckpointError, ConfigError
from rlinf.core.protocols import Mode
from rlinf.envs.realworld.config import RealWorldConfig, check_said
from rlinf.launch.algorithm_config import SacConfig
from rlinf.launch.build import describe_replay
from rlinf.launch.config import Root, updates_per_step
from rlinf.launch.controls import operator_keys
from rlinf.launch.crew import Layout, build_crew, build_evaluator, spaces_of
from rlinf.launch.decoders import remark_on_decoder
from rlinf.launch.demonstrations import describe_batches
from rlinf.launch.machine import (
    cores_for_training_envs,
    num_cores,
    num_learner_threads,
    num_simulator_processes,
    prepare_process,
    simulates_on_cpu,
)
from rlinf.launch.parameters import describe_memory, describe_parameters
from rlinf.launch.parse import load_config
from rlinf.launch.prerequisites import check_pi0, make_missing_decoder, record_missing_demos
from rlinf.launch.processes import Venue, open_runtime, open_venue
from rlinf.launch.provenance import CONFIG_FILE, prepare_run_dir, run_directory, write_provenance
from rlinf.launch.twin_objects import remark_on_objects
from rlinf.metrics.journal import FILE_NAME as JOURNAL
from rlinf.metrics.report import Reporter
from rlinf.metrics.video import write_video
from rlinf.runners.asynchronous import run_async
from rlinf.runners.checkpoint import CheckpointStore, find, load_policy, load_run, verify
from rlinf.runners.crew import Crew
from rlinf.runners.crew import Reporter as AnyReporter
from rlinf.runners.evaluate import run_eval
from rlinf.runners.schedule import Schedule
from rlinf.runners.synchronous import run_sync
from rlinf.runtime.interface import Runtime
from rlinf.runtime.local import LocalRuntime, Weights
from rlinf.workers.learner_worker import POLICY_FILE


def train(config: Root) -> int:
    """Do what `config.runner` says and return the exit code: 0, or 128 + the number of the signal that stopped it.

    Raises RlinfError with one line for whatever the user can mend; what was learned until then is saved.
    """
    if isinstance(config.env.train, RealWorldConfig):
        check_said(config.env.train, here=config.cluster.num_nodes == 1)
    if (code := make_missing_decoder(config)) != 0:
        return code
    check_pi0(config)
    if not config.runner.only_eval:
        record_missing_demos(config)
    run_dir = run_directory(config)
    checkpoint = find(config.runner.resume_dir) if config.runner.resume_dir is not None else None
    resume_step = verify(checkpoint, only=POLICY_FILE).global_step if checkpoint is not None else 0
    refuse_to_overwrite(run_dir, checkpoint)
    # First, so that a placement which is impossible leaves nothing behind.
    with open_venue(config, _say) as venue:
        return _train_at(venue, config, run_dir, checkpoint, resume_step)


def _train_at(venue: Venue, config: Root, run_dir: Path, checkpoint: Path | None, resume_step: int) -> int:
    prepare_run_dir(run_dir)
    resolved = config.model_dump(mode="json")
    logger = config.runner.logger
    with (
        unused_if_it_never_began(run_dir),
        Reporter(
            run_dir,
            backends=logger.logger_backends,
            project_name=logger.project_name,
            experiment_name=logger.experiment_name,
            config=resolved,
            total_steps=config.runner.total_steps,
            resume_step=resume_step,
            video_dir=video_directory(config, run_dir),
        ) as reporter,
        open_runtime(config, venue, reporter.note) as (runtime, layout),
        operator_keys(config, reporter, here=layout.backend == "local"),
    ):
        reporter.note(describe(config, layout))
        if isinstance(config.env.train, RealWorldConfig):
            reporter.note(config.env.train.describe())
        if config.runner.only_eval:
            weights = runtime.weights("evaluated", layout.rollout)
            if path := config.runner.resume_dir or config.runner.ckpt_path:  # else the model's own file is evaluated
                publish_file(weights, path)
            evaluator = build_evaluator(config, runtime, layout, weights)
            write_provenance(run_dir, resolved, seed=config.runner.seed)
            run_eval(evaluator, reporter, step=resume_step)
            return 0
        store = CheckpointStore(run_dir / "checkpoints", keep=config.runner.keep_checkpoints, config=resolved)
        return _train(config, runtime, layout, store, reporter, checkpoint)


def _train(
    config: Root,
    runtime: Runtime,
    layout: Layout,
    store: CheckpointStore,
    reporter: Reporter,
    checkpoint: Path | None,
) -> int:
    crew = build_crew(config, runtime, layout)
    with _closing_on_failure(crew, reporter):
        if (memory := describe_replay(config, spaces_of(crew.env))) is not None:
            reporter.note(memory)
        reporter.note(describe_parameters(crew.learner))
        objects = remark_on_objects({"env.train": config.env.train, "env.eval": config.env.eval})
        memory = describe_memory(crew.learner, crew.rollout)
        for remark in (memory, objects, remark_on_decoder(config), describe_batches(config, len(layout.learner))):
            if remark is not None:
                reporter.note(remark)
        last_step = _resume(crew, checkpoint, config) if checkpoint is not None else 0
        evaluator = None
        if config.runner.val_check_interval > 0:
            shared = None if config.runner.asynchronous else crew.weights
            evaluator = build_evaluator(config, runtime, layout, shared, crew.stop)
        # Not before: a resumption that fails must leave the record of its run as it was.
        write_provenance(reporter.run_dir, store.config or {}, seed=config.runner.seed)
    run = run_async if config.runner.asynchronous else run_sync
    last_step = run(crew, schedule_of(config), store, reporter, evaluator=evaluator, last_step=last_step)
    return 128 + signal.Signals[crew.stop.reason] if crew.stop.is_set() else 0


def evaluate_run(
    run_dir: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    reporter: AnyReporter | None = None,
    mode: Mode = "eval",
) -> dict[str, float]:
    """Evaluate the newest checkpoint of a run, or the one in `runner.ckpt_path`; `eval/...` means.

    A video is written into the run directory if the configuration says so; nothing else there changes.

    Args:
        reporter: gets the video instead.
        mode: `train` explores as in training.

    Raises ConfigError or CheckpointError when the directory holds no run.
    """
    run_dir = Path(run_dir)
    config = load_run_config(run_dir, overrides)
    path = find(config.runner.ckpt_path or run_dir)
    prepare_process(config)
    evaluator = build_evaluator(config, LocalRuntime(), weights=publish_file(Weights(), path), mode=mode)
    reporter = reporter or _Aside(video_directory(config, run_dir))
    return run_eval(evaluator, reporter, step=verify(path, only=POLICY_FILE).global_step)


AS_STARTED = ("runner.resume_dir=null", "runner.ckpt_path=null", "runner.only_eval=False", "~cluster")


def load_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> Root:
    """The configuration that a run kept, with changes. Raises ConfigError where it is no run or they do not fit."""
    if not (run_dir / CONFIG_FILE).is_file():
        raise ConfigError(f"{run_dir} holds no {CONFIG_FILE}; name a run directory, <log_path>/<experiment_name>")
    # How it was started, and over which processes, says nothing about what is evaluated now, and where.
    return load_config("config", [*AS_STARTED, *overrides], run_dir)


def video_directory(config: Root, run_dir: Path) -> Path:
    """Where films of evaluations go: env.eval.video_cfg.video_base_dir, or videos/ in the run directory."""
    base = config.env.eval.video_cfg.video_base_dir if config.env.eval is not None else None
    return Path(base).expanduser() if base is not None else run_dir / "videos"


def schedule_of(config: Root) -> Schedule:
    """How much of what, and how often."""
    runner, train = config.runner, config.env.train
    return Schedule(
        num_steps=runner.total_steps,
        chunks=train.max_steps_per_rollout_epoch // config.actor.model.num_action_chunks,
        segments=train.rollout_epoch,
        updates=updates_per_step(config),
        eval_interval=runner.val_check_interval,
        film_every=config.env.eval.video_cfg.every if config.env.eval is not None else 0,
        save_interval=runner.save_interval,
        overlap=runner.overlap,
        sync_interval=runner.weight_sync_interval,
        max_updates_per_env_step=_max_updates_per_env_step(config),
        max_staleness=runner.max_staleness,
    )


def _max_updates_per_env_step(config: Root) -> float | None:
    """`samples_per_insert` in other units: each update samples a batch, each environment step inserts 1 / H."""
    if not isinstance(config.algorithm, SacConfig):
        return None
    limit = config.algorithm.replay_buffer.samples_per_insert
    per_insert = config.actor.global_batch_size * config.actor.model.num_action_chunks
    return None if limit is None else limit / per_insert


def describe(config: Root, layout: Layout) -> str:
    """One line that says what this run does with the machine."""
    train, schedule = config.env.train, schedule_of(config)
    transitions = train.total_num_envs * schedule.chunks * schedule.segments
    threads = num_learner_threads(config, layout.beside(layout.learner[0]))
    stages = config.rollout.pipeline_stage_num
    cores = [cores_for_training_envs(config, layout.beside(host)) for host in layout.env]
    num_envs = train.total_num_envs // (stages * len(cores))
    workers = sum(stages * num_simulator_processes(train, num_envs, own) for own in cores)
    stepping = f"stepped by {workers} processes" if simulates_on_cpu(train) else "in one batch"
    if config.runner.asynchronous:
        work = f"collects on and on while each global step makes {schedule.updates} updates"
    else:
        work = f"each global step collects {transitions} transitions and makes {schedule.updates} updates"
    return (
        f"profile {config.profile}, {layout.describe()}, {num_cores()} cores: {threads} learner threads, "
        f"{train.total_num_envs} {train.env_type} environments {stepping}; {work}"
    )


def publish_file(weights: Weights, path: str | Path) -> Weights:
    """Publish a checkpoint's policy. Returns `weights`."""
    weights.publish(*load_policy(path))
    return weights


def _say(text: str) -> None:
    """For what has to be said before there is a reporter."""
    print(text, file=sys.stderr, flush=True)


def _resume(crew: Crew, checkpoint: Path, config: Root) -> int:
    try:
        return load_run(crew, checkpoint)
    except CheckpointError as problem:
        if not (differences := _model_differences(checkpoint, config)):
            raise
        brief = textwrap.shorten(str(problem), 150, placeholder=" ...")  # torch lists every tensor
        raise CheckpointError(
            f"{checkpoint}: {brief} What differs: {'; '.join(differences)}. Resume with the configuration that wrote "
            "it, kept as config.yaml in its run directory"
        ) from problem


def _model_differences(checkpoint: Path, config: Root) -> list[str]:
    """What a checkpoint's own record says otherwise about the networks than `config`."""
    try:
        there = json.loads((checkpoint / "config.json").read_text())["actor"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    here = config.actor.model.model_dump(mode="json")
    if there.get("model_type") != here["model_type"]:
        there, here = ({"model_type": model.get("model_type")} for model in (there, here))
    return [
        f"actor.model.{key} is {there.get(key)} there and {here.get(key)} here"
        for key in here | there
        if there.get(key) != here.get(key)
    ]


def refuse_to_overwrite(run_dir: Path, checkpoint: Path | None) -> None:
    """A directory that holds a run may only be used by one that goes on from it."""
    used = (run_dir / JOURNAL).is_file() or (run_dir / "checkpoints").is_dir()
    if used and (checkpoint is None or run_dir not in checkpoint.parents):
        resumable = CheckpointStore(run_dir / "checkpoints").latest() is not None
        otherwise = (
            f"go on from it with runner.resume_dir={run_dir}" if resumable else "remove it: it has no checkpoint"
        )
        raise ConfigError(f"{run_dir} already holds a run; choose another runner.logger.log_path, or {otherwise}")


@contextlib.contextmanager
def unused_if_it_never_began(run_dir: Path) -> Iterator[None]:
    """Take back the empty journal of a run that failed before it began: the mended command may use the directory."""
    try:
        yield
    except BaseException:
        journal = run_dir / JOURNAL
        if not (run_dir / CONFIG_FILE).exists() and journal.is_file() and journal.stat().st_size == 0:
            journal.unlink()
        raise


@contextlib.contextmanager
def _closing_on_failure(crew: Crew, reporter: Reporter) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for problem in crew.close():
            reporter.note(problem)
        raise


class _Aside:
    """Reporter of an evaluation beside a run: its record is left alone."""

    def __init__(self, video_dir: Path) -> None:
        self._video_dir = video_dir

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing: the caller gets the metrics."""

    def note(self, text: str) -> None:
        """Print to stderr."""
        _say(text)

    def video(self, name: str, frames: np.ndarray, fps: float) -> None:
        """Write the video and say where."""
        path = self._video_dir / f"{name}.mp4"
        write_video(path, frames, fps)
        self.note(f"video: {path}")
