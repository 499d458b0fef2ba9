"""Record demonstrations: whole episodes of a scripted expert or of a trained policy, successful ones by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rlinf.core import tree
from rlinf.core.errors import ConfigError, DataError
from rlinf.core.protocols import VectorEnv
from rlinf.core.seeding import derive_seed, numpy_generator, torch_generator
from rlinf.core.types import ActionOut, EnvSpaces, Obs, Trajectory
from rlinf.data.demos import DemoMeta, check_demos, read_demos, write_demos
from rlinf.data.trajectory import TrajectoryBuilder
from rlinf.envs.config import EnvConfig
from rlinf.envs.maniskill.config import ManiSkillConfig
from rlinf.launch.build import build_networks, control_mode_of, load_weights_into, make_env
from rlinf.launch.config import Root
from rlinf.launch.registry import EXPERTS, lookup
from rlinf.runners.checkpoint import load_policy

MAX_FAILED_ROUNDS = 20


class Demonstrator(Protocol):
    """Whoever plays the episodes; `about` says who that is, for people."""

    about: str

    def begin(self, seed: int) -> None:
        """Before an episode: everything random until the next one follows from `seed`."""
        ...

    def act(self, obs: Obs) -> ActionOut:
        """Answer N observations."""
        ...


class ScriptedExpert:
    """A hand-written rule for a task, with Gaussian noise on its actions.

    Args:
        task: the simulator's name of the task.
        noise_std: standard deviation of the noise.
    """

    def __init__(self, task: str, noise_std: float) -> None:
        self._expert_class = lookup("scripted expert", task, EXPERTS)
        self._noise_std = noise_std
        self.about = f"scripted expert for {task}, noise {noise_std:g}"

    def begin(self, seed: int) -> None:
        """As `Demonstrator.begin`."""
        self._expert = self._expert_class(self._noise_std, numpy_generator(seed, "expert"))

    def act(self, obs: Obs) -> ActionOut:
        """As `Demonstrator.act`; one action per decision."""
        action = torch.from_numpy(self._expert.act(obs["state"].cpu().numpy()))
        return ActionOut(action=action[:, None], decision=action)


class TrainedPolicy:
    """The policy of a checkpoint, which must fit `config.actor.model`.

    Args:
        explore: act with the policy's own exploration noise.
    """

    def __init__(self, config: Root, spaces: EnvSpaces, checkpoint: str, *, explore: bool) -> None:
        self._actor = build_networks(config, spaces).actor
        load_weights_into(self._actor, load_policy(checkpoint)[1], checkpoint)
        self._explore = explore
        self.about = f"{config.actor.model.model_type} of {checkpoint}{', exploring' if explore else ''}"

    def begin(self, seed: int) -> None:
        """As `Demonstrator.begin`."""
        self._generator = torch_generator(seed, "expert")

    def act(self, obs: Obs) -> ActionOut:
        """As `Demonstrator.act`."""
        obs = tree.to(obs, "cpu")
        if not self._explore:
            return self._actor.act(obs, "eval")
        noise = torch.randn(len(obs["state"]), *self._actor.noise_shape, generator=self._generator)
        return self._actor.act(obs, "train", noise)


def record(
    config: Root,
    output: str | Path,
    *,
    episodes: int,
    checkpoint: str | None = None,
    noise_std: float = 0.1,
    only_successes: bool = True,
    note: Callable[[str], None],
) -> DemoMeta:
    """Record into `output` until it holds `episodes` episodes, and return what it holds.

    Every round plays one episode in each training environment and is on disk before the next begins. A recording
    that was stopped goes on where it was, with the same episodes.

    Args:
        checkpoint: play with this policy; None for the task's scripted expert.
        noise_std: of the scripted expert; for a policy, whether it explores (any value above 0).
        only_successes: forget episodes without success.
        note: gets a line per round.

    Raises:
        ConfigError: there is no expert for the task, or none for action chunks.
        DataError: `output` holds something else, or `MAX_FAILED_ROUNDS` rounds without a success.
    """
    section = config.env.train.model_copy(update={"auto_reset": False})
    setup = config.actor.model.policy_setup
    if checkpoint is None and config.actor.model.num_action_chunks != 1:
        raise ConfigError(
            "a scripted expert answers one action at a time; set actor.model.num_action_chunks=1 or give --checkpoint"
        )
    env = make_env(section, num_envs=section.total_num_envs, seed=section.seed, policy_setup=setup, render=False)
    try:
        expert: Demonstrator
        if checkpoint is None:
            expert = ScriptedExpert(task_of(section), noise_std)
        else:
            expert = TrainedPolicy(config, env.spaces, checkpoint, explore=noise_std > 0)
        meta = DemoMeta(
            env_id=task_of(section),
            control_mode=control_mode_of(section, setup) or "",
            action_dim=env.spaces.action_dim,
            obs_shapes=env.spaces.obs_shapes,
            obs_dtypes=env.spaces.obs_dtypes,
            recorded_by=expert.about,
        )
        chunks = section.max_episode_steps // config.actor.model.num_action_chunks
        return _record(env, expert, meta, Path(output), episodes, chunks, config.runner.seed, only_successes, note)
    finally:
        env.close()


def _record(
    env: VectorEnv,
    expert: Demonstrator,
    meta: DemoMeta,
    output: Path,
    episodes: int,
    chunks: int,
    seed: int,
    only_successes: bool,
    note: Callable[[str], None],
) -> DemoMeta:
    totals = meta
    if output.is_dir() and any(output.iterdir()):
        totals = read_demos(str(output))[1]
        check_demos(totals, env.spaces, meta.control_mode)
        note(f"{output} holds {totals.num_episodes} episodes already")
    failed = 0
    while totals.num_episodes < episodes:
        # A function of what is recorded, so that a stopped recording goes on as if it had not been stopped.
        round_seed = derive_seed(seed, f"demos/{totals.num_episodes}/{failed}")
        expert.begin(round_seed)
        trajectory, success = play(env, expert, round_seed, chunks)
        kept = success.nonzero().flatten() if only_successes else torch.arange(env.num_envs)
        kept = kept[: episodes - totals.num_episodes]
        if not len(kept):
            failed += 1
            if failed == MAX_FAILED_ROUNDS:
                raise DataError(
                    f"{expert.about}: no success in {failed * env.num_envs} episodes; lower --noise, choose another "
                    "--checkpoint, or keep failures with --all"
                )
            continue
        failed = 0
        chosen = select_envs(trajectory, kept)
        totals = write_demos(str(output), [chosen], replace(meta, num_successes=int(success[kept].sum())))
        share = success.float().mean().item()
        note(f"{totals.num_episodes}/{episodes} episodes, {totals.num_transitions} transitions; success {share:.0%}")
    return totals


def play(env: VectorEnv, expert: Demonstrator, seed: int, chunks: int) -> tuple[Trajectory, Tensor]:
    """One episode in every environment, and whether it was a success, bool [N]."""
    builder = TrajectoryBuilder((0, 0), auto_reset=False)
    obs = env.reset(seed=seed % 2**31)
    builder.start(obs, continues=False)
    success = torch.zeros(env.num_envs, dtype=torch.bool)
    playing = ~success
    for _ in range(chunks):
        out = expert.act(obs)
        step = env.step(out.action)
        builder.append(obs, out, step)
        done = step.done.cpu() & playing
        success |= done & step.info["episode/success_once"].cpu()
        playing &= ~done
        obs = step.obs
        if not bool(playing.any()):
            break
    return builder.build(), success


def select_envs(trajectory: Trajectory, envs: Tensor) -> Trajectory:
    """The part of a segment that was played in the environments `envs`, int64 [K], ascending."""
    place = torch.full((trajectory.num_envs,), -1, dtype=torch.int64)
    place[envs] = torch.arange(len(envs))
    rows = place[trajectory.last_index[:, 1]] >= 0
    last_index = trajectory.last_index[rows]
    return replace(
        trajectory,
        obs=tree.tree_map(lambda leaf: leaf[:, envs], trajectory.obs),
        last_obs=tree.index(trajectory.last_obs, rows),
        last_index=torch.stack([last_index[:, 0], place[last_index[:, 1]]], 1),
        decision=trajectory.decision[:, envs],
        action=trajectory.action[:, envs],
        reward=trajectory.reward[:, envs],
        terminated=trajectory.terminated[:, envs],
        truncated=trajectory.truncated[:, envs],
        intervened=trajectory.intervened[:, envs],
        valid=trajectory.valid[:, envs],
        log_prob=None,
        value=None,
    )


def task_of(env: EnvConfig) -> str:
    """What the simulator calls the task."""
    return env.init_params.id if isinstance(env, ManiSkillConfig) else env.env_type
