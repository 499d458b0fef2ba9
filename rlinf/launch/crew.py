"""A configuration and a layout → the groups of a run.

Each worker is built where it works, from the configuration alone: what is built there is a function of the seeds and of
the worker's rank, not of where it sits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch

from rlinf.core.errors import ConfigError
from rlinf.core.protocols import Mode, VectorEnv
from rlinf.core.ranks import ONE_RANK, Ranks
from rlinf.core.seeding import derive_seed, torch_generator
from rlinf.core.types import EnvSpaces
from rlinf.envs.config import EnvConfig
from rlinf.envs.episodes import Patient
from rlinf.envs.realworld.config import RealWorldConfig
from rlinf.launch.algorithm_config import SacConfig
from rlinf.launch.build import (
    Policy,
    build_algorithm,
    build_demo_buffer,
    build_networks,
    check_spaces,
    load_weights_into,
    make_env,
)
from rlinf.launch.config import Root
from rlinf.launch.film import CaptionedEnv, film_last_episodes
from rlinf.launch.machine import Neighbours, cores_for_training_envs, device_of, num_cores, num_learner_threads
from rlinf.launch.provenance import run_directory
from rlinf.launch.steering import learner_view
from rlinf.runners.checkpoint import load_policy
from rlinf.runners.crew import Crew
from rlinf.runners.evaluate import Evaluator
from rlinf.runtime.interface import Runtime
from rlinf.runtime.local import (
    CHANNEL_TIMEOUT_S,
    LEARNER_STOP_TIMEOUT_S,
    STOP_TIMEOUT_S,
    Channel,
    Flag,
    Group,
    Weights,
)
from rlinf.runtime.ranks import join_ranks
from rlinf.workers.env_worker import EnvWorker, Source
from rlinf.workers.learner_worker import LearnerWorker
from rlinf.workers.rollout_worker import RolloutWorker


@dataclass(frozen=True)
class Layout:
    """Who sits in which process, and who talks to whom.

    Attributes:
        env, rollout, learner: number of the process of each rank of the role.
        answered_by: (env rank, stage) → rank of the policy that answers it.
        learned_by: (env rank, stage) → ranks of the learners among which its experience is shared out by environments.
        machines: number of the machine of each process; () for one machine.
        backend: what the processes are.
    """

    env: tuple[int, ...] = (0,)
    rollout: tuple[int, ...] = (0,)
    learner: tuple[int, ...] = (0,)
    answered_by: dict[Source, int] | None = None
    learned_by: dict[Source, tuple[int, ...]] | None = None
    machines: tuple[int, ...] = ()
    backend: Literal["local", "ray"] = "local"

    def describe(self) -> str:
        """In a few words."""
        if self.backend == "local":
            return "local backend"
        counts = f"{len(self.env)} env, {len(self.rollout)} rollout, {len(self.learner)} actor"
        return f"ray backend with {len({*self.env, *self.rollout, *self.learner})} processes ({counts})"

    def beside(self, host: int) -> Neighbours:
        """Who shares the cores of the machine of process number `host`, itself included."""
        machine_of = dict(enumerate(self.machines))
        envs, learners = (
            [machine_of.get(other) == machine_of.get(host) for other in role] for role in (self.env, self.learner)
        )
        return Neighbours(sum(envs), sum(learners), len(envs))

    def answerer(self, source: Source) -> int:
        """Rank of the policy that answers `source`; of 0 where nothing is said."""
        return self.answered_by[source] if self.answered_by is not None else 0

    def learners_of(self, source: Source) -> tuple[int, ...]:
        """Ranks of the learners that share what `source` has played; 0 alone where nothing is said."""
        return self.learned_by[source] if self.learned_by is not None else (0,)


@dataclass(frozen=True)
class Talk:
    """What the workers of a run, or of an evaluation, talk by.

    Attributes:
        obs: from environments to policies.
        actions: back.
        experience: from environments to learners.
        stop: says to all that the run is to end.
    """

    obs: Channel
    actions: Channel
    experience: Channel
    stop: Flag

    @property
    def channels(self) -> tuple[Channel, ...]:
        """Those that are closed when a worker fails."""
        return self.obs, self.actions, self.experience


def build_crew(
    config: Root, runtime: Runtime, layout: Layout | None = None, *, device: torch.device | None = None
) -> Crew:
    """Everyone who takes part in training; networks on `device`, or on that which the configuration asks for."""
    layout = layout or Layout()
    stages = config.rollout.pipeline_stage_num
    sources = [(rank, stage) for rank in range(len(layout.env)) for stage in range(stages)]
    weights = runtime.weights("policy", layout.rollout)
    talk = _open_talk(runtime, layout, sources, runtime.flag(), "", dict(enumerate(layout.learner)))
    group = partial(runtime.group, channels=talk.channels, stop=talk.stop)
    envs = [partial(_env_worker, config, rank, layout, talk) for rank in range(len(layout.env))]
    env: Group[EnvWorker] = group(config.env.group_name, envs, layout.env)
    try:
        spaces = spaces_of(env)
        rollouts = [
            partial(_rollout_worker, config, spaces, talk, weights, device, name=str(rank), env=config.env.train,
                    sources=[source for source in sources if layout.answerer(source) == rank],
                    noise_correlation=config.rollout.noise_correlation)
            for rank in range(len(layout.rollout))
        ]  # fmt: skip
        meeting_point = runtime.meeting_point(layout.learner[0])
        learners = [
            partial(_learner_worker, config, spaces, talk, weights, device, rank, layout, meeting_point)
            for rank in range(len(layout.learner))
        ]
        # The learner first: what is wrong with its checkpoint or demonstrations should be said first.
        learner: Group[LearnerWorker] = group(
            config.actor.group_name, learners, layout.learner, stop_timeout_s=LEARNER_STOP_TIMEOUT_S
        )
        rollout: Group[RolloutWorker] = group(config.rollout.group_name, rollouts, layout.rollout)
    except BaseException:
        close_envs(env)
        raise
    return Crew(env, rollout, learner, talk.stop, weights, runtime, config.cluster.max_restarts)


def build_evaluator(
    config: Root,
    runtime: Runtime,
    layout: Layout | None = None,
    weights: Weights | None = None,
    stop: Flag | None = None,
    *,
    mode: Mode = "eval",
    device: torch.device | None = None,
) -> Evaluator:
    """The environments of `env.eval` with policies that act with what is published on `weights`.

    Without `weights` there are new ones, on which nothing is published yet. In `mode` train the policy explores.

    Raises ConfigError when there is no `env.eval` or the model does not fit it, CheckpointError when what is already
    published does not fit the networks.
    """
    if config.env.eval is None:
        raise ConfigError("there is no env.eval to evaluate in; add it to the configuration")
    layout, section = layout or Layout(), config.env.eval
    weights = weights or runtime.weights("evaluated", layout.rollout)
    sources = [(rank, 0) for rank in range(len(layout.env))]
    talk = _open_talk(runtime, layout, sources, stop or runtime.flag(), "eval ", {})  # nothing is learned from it
    group = partial(runtime.group, channels=talk.channels, stop=talk.stop)
    envs = [partial(_eval_worker, config, rank, layout, talk) for rank in range(len(layout.env))]
    env: Group[EnvWorker] = group(f"{config.env.group_name} for evaluation", envs, layout.env)
    try:
        spaces = spaces_of(env)
        check_spaces(config, spaces)
        rollouts = [
            partial(_rollout_worker, config, spaces, talk, weights, device, name="eval", env=section,
                    sources=[source for source in sources if layout.answerer(source) == rank])
            for rank in range(len(layout.rollout))
        ]  # fmt: skip
        name = f"{config.rollout.group_name} for evaluation"
        rollout: Group[RolloutWorker] = group(name, rollouts, layout.rollout)
    except BaseException:
        close_envs(env)
        raise
    filming = section.video_cfg.save_video
    envs_per_worker = section.total_num_envs // len(layout.env)
    return Evaluator(
        env,
        rollout,
        weights,
        episodes_per_env=section.rollout_epoch,
        chunks=section.max_steps_per_rollout_epoch // config.actor.model.num_action_chunks,
        seed=section.seed,
        same_episodes=section.use_fixed_reset_state_ids,
        num_recorded=min(section.video_cfg.max_envs, envs_per_worker) if filming else 0,
        fps=section.video_cfg.fps,
        mode=mode,
        tasks=spaces.tasks,
    )


def spaces_of(env: Group[EnvWorker]) -> EnvSpaces:
    """What the environments of a group emit and take."""
    return env.run(_spaces_of_worker).wait()[0]


def close_envs(env: Group[EnvWorker]) -> None:
    """Close the environments of a run that did not come to start."""
    env.run(EnvWorker.close).failures(STOP_TIMEOUT_S)
    env.end()


def _open_talk(
    runtime: Runtime, layout: Layout, sources: Sequence[Source], stop: Flag, prefix: str, learners: Mapping[int, int]
) -> Talk:
    """New channels whose names begin with `prefix`; `learners` is the process of each rank that takes experience."""
    obs = {source: layout.rollout[layout.answerer(source)] for source in sources}
    actions = {source: layout.env[source[0]] for source in sources}
    return Talk(
        runtime.channel(f"{prefix}obs", obs),
        runtime.channel(f"{prefix}actions", actions),
        runtime.channel(f"{prefix}experience", learners, confirm=bool(learners)),
        stop,
    )


# ---- builders: called in the process of the worker


def _env_worker(config: Root, rank: int, layout: Layout, talk: Talk) -> EnvWorker:
    train, stages = config.env.train, config.rollout.pipeline_stage_num
    seed = _seed_of_rank(derive_seed(config.runner.seed, f"env/{train.seed}"), rank)
    cores = cores_for_training_envs(config, layout.beside(layout.env[rank]))
    envs = _make_stages(config, train, rank, len(layout.env), seed, stages, render=False, cores=cores)
    _give_up_at(talk.stop, envs)
    if train.video_cfg.save_video:
        folder = run_directory(config) / "videos" / ("train" if rank == 0 else f"train_{rank}")
        envs[0] = film_last_episodes(envs[0], folder, train.video_cfg.fps)
    return EnvWorker(
        rank,
        envs,
        talk.obs,
        talk.actions,
        talk.experience,
        talk.stop,
        num_action_chunks=config.actor.model.num_action_chunks,
        seed=seed,
        auto_reset=train.auto_reset,
        learners=[layout.learners_of((rank, stage)) for stage in range(stages)],
        view=learner_view(config),
    )


def _eval_worker(config: Root, rank: int, layout: Layout, talk: Talk) -> EnvWorker:
    section = config.env.eval
    assert section is not None
    filming, seed = section.video_cfg.save_video, _seed_of_rank(section.seed, rank)
    cores = max(1, num_cores() // layout.beside(layout.env[rank]).envs)
    envs = _make_stages(config, section, rank, len(layout.env), seed, 1, render=filming, cores=cores)
    _give_up_at(talk.stop, envs)
    if filming and section.video_cfg.info_on_video:
        envs = [CaptionedEnv(env) for env in envs]
    return EnvWorker(
        rank,
        envs,
        talk.obs,
        talk.actions,
        talk.experience,
        talk.stop,
        num_action_chunks=config.actor.model.num_action_chunks,
        seed=section.seed,
        auto_reset=True,
    )


def _rollout_worker(
    config: Root,
    spaces: EnvSpaces,
    talk: Talk,
    weights: Weights,
    device: torch.device | None,
    *,
    name: str,
    env: EnvConfig,
    sources: Sequence[Source],
    noise_correlation: float = 0.0,
) -> RolloutWorker:
    device = device or device_of(config)
    acting: Policy = build_networks(config, spaces).actor
    if (published := weights.newer_than(-1)) is not None:
        load_weights_into(acting, published[1], "the checkpoint")
    return RolloutWorker(
        acting.to(device),
        talk.obs,
        talk.actions,
        weights,
        sources=sources,
        generator=torch_generator(config.runner.seed, f"policy/{name}", device),
        noise_correlation=noise_correlation,
        device=device,
        timeout_s=_patience_s(env),
        offload=config.rollout.enable_offload,
    )


def _patience_s(env: EnvConfig) -> float:
    """So long a policy waits to be asked: an environment that waits for a person hangs no sooner for that."""
    return CHANNEL_TIMEOUT_S + (env.longest_wait_s() if isinstance(env, RealWorldConfig) else 0.0)


def _learner_worker(
    config: Root,
    spaces: EnvSpaces,
    talk: Talk,
    weights: Weights,
    device: torch.device | None,
    rank: int,
    layout: Layout,
    meeting_point: str,
) -> LearnerWorker:
    device, size, ranks = device or device_of(config), len(layout.learner), cast(Ranks, ONE_RANK)
    if size > 1:
        ranks = join_ranks(rank, size, meeting_point, backend="nccl" if device.type == "cuda" else "gloo")
    networks = build_networks(config, spaces, acts=False)
    if config.runner.ckpt_path is not None:
        load_weights_into(networks.actor, load_policy(config.runner.ckpt_path)[1], config.runner.ckpt_path)
    demo = config.algorithm.demo_buffer if isinstance(config.algorithm, SacConfig) else None
    demos = build_demo_buffer(config, demo, spaces, ranks) if demo is not None else None
    algorithm = build_algorithm(config, networks, device, demos, ranks)
    num_threads = num_learner_threads(config, layout.beside(layout.learner[rank]))
    return LearnerWorker(
        algorithm,
        talk.experience,
        weights,
        talk.stop,
        ranks=ranks,
        num_threads=num_threads,
        offload_from=device if config.actor.enable_offload else None,
    )


def _seed_of_rank(seed: int, rank: int) -> int:
    """The seed itself for the first worker, so that one worker is what it was without ranks."""
    return seed if rank == 0 else derive_seed(seed, f"rank/{rank}")


def _make_stages(
    config: Root, env: EnvConfig, rank: int, ranks: int, seed: int, stages: int, *, render: bool, cores: int
) -> list[VectorEnv]:
    made: list[VectorEnv] = []
    try:
        for stage in range(stages):
            rows = _rows(rank * stages + stage, ranks * stages, env.total_num_envs)
            made.append(
                make_env(
                    env,
                    num_envs=len(rows),
                    first_row=rows.start,
                    seed=derive_seed(seed, f"stage/{stage}"),
                    policy_setup=config.actor.model.policy_setup,
                    render=render,
                    cores=cores,
                )
            )
    except BaseException:
        for other in made:
            other.close()
        raise
    return made


def _rows(part: int, parts: int, total: int) -> range:
    """The environments of one part of `parts`; only where a list of initial states is played they may differ by one."""
    return range(part * total // parts, (part + 1) * total // parts)


def _give_up_at(stop: Flag, envs: Sequence[VectorEnv]) -> None:
    """Environments that wait for something outside hear in there that the run is to end."""
    for env in envs:
        if isinstance(env, Patient):
            env.give_up_when(stop.is_set)


def _spaces_of_worker(worker: EnvWorker) -> EnvSpaces:
    return worker.stages[0].spaces
