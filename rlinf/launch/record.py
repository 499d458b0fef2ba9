"""Record demonstrations: whole episodes of a scripted expert or of a trained policy, successful ones by default.

They become either `rlinf demonstrations` (`data.demos`, for `algorithm.demo_buffer`) or a LeRobot data set
(`launch.record_lerobot`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rlinf.core.errors import ConfigError, DataError
from rlinf.core.protocols import VectorEnv
from rlinf.core.seeding import derive_seed
from rlinf.core.types import EnvSpaces, EnvStep, Trajectory
from rlinf.data.demos import DemoMeta, check_demos, meta_of, read_index, write_demos
from rlinf.data.trajectory import TrajectoryBuilder, select_envs
from rlinf.envs.config import EnvConfig
from rlinf.envs.frankasim.config import FrankaSimConfig
from rlinf.envs.libero.config import LiberoConfig
from rlinf.envs.maniskill.config import ManiSkillConfig
from rlinf.envs.realworld.config import RealWorldConfig
from rlinf.launch.build import control_mode_of, make_env
from rlinf.launch.config import Root
from rlinf.launch.demonstrators import Demonstrator, ScriptedExpert, SeeingExpert, TrainedPolicy, env_seed

MAX_FAILED_ROUNDS = 20
UNSEEN_PIXELS = 8
"""Size of pictures that nobody looks at."""


class Store(Protocol):
    """Where episodes are recorded."""

    @property
    def num_episodes(self) -> int:
        """Episodes that it holds."""
        ...

    def add(self, trajectory: Trajectory, success: Tensor) -> str:
        """Keep the episodes of all environments, of which bool [N] are successful; they are on disk when this returns.

        Returns a line about what is there.
        """
        ...


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
    with stage(config, checkpoint, noise_std) as (env, expert):
        return record_demos(
            training_env(config),
            env,
            expert,
            output,
            episodes=episodes,
            policy_setup=config.actor.model.policy_setup,
            num_action_chunks=config.actor.model.num_action_chunks,
            seed=config.runner.seed,
            only_successes=only_successes,
            note=note,
        )


def record_demos(
    section: EnvConfig,
    env: VectorEnv,
    expert: Demonstrator,
    output: str | Path,
    *,
    episodes: int,
    policy_setup: str | None,
    num_action_chunks: int = 1,
    seed: int,
    only_successes: bool,
    note: Callable[[str], None],
) -> DemoMeta:
    """`record` of a demonstrator in an environment that was made from `section`, without auto-reset."""
    meta = describe(section, env.spaces, policy_setup, expert.about)
    store = DemoStore(Path(output), meta, env, note)
    chunks = section.max_episode_steps // num_action_chunks
    record_into(store, env, expert, episodes, chunks, seed, only_successes, note)
    return store.totals


def describe(section: EnvConfig, spaces: EnvSpaces, policy_setup: str | None, recorded_by: str) -> DemoMeta:
    """What demonstrations in an environment that was made from `section` are."""
    return DemoMeta(
        env_id=task_of(section),
        control_mode=control_mode_of(section, policy_setup) or "",
        action_dim=spaces.action_dim,
        obs_shapes=spaces.obs_shapes,
        obs_dtypes=spaces.obs_dtypes,
        recorded_by=recorded_by,
    )


class DemoStore:
    """A folder of demonstrations as a `Store`."""

    def __init__(self, output: Path, meta: DemoMeta, env: VectorEnv, note: Callable[[str], None]) -> None:
        self._output, self._meta = output, meta
        self.totals = meta
        if output.is_dir() and any(output.iterdir()):
            self.totals = meta_of(read_index(output))
            check_demos(self.totals, env.spaces, meta.control_mode)
            note(f"{output} holds {self.totals.num_episodes} episodes already")

    @property
    def num_episodes(self) -> int:
        """As `Store.num_episodes`."""
        return self.totals.num_episodes

    def add(self, trajectory: Trajectory, success: Tensor) -> str:
        """As `Store.add`."""
        flags = [bool(success[env]) for _, env in trajectory.last_index.tolist()]
        self.totals = write_demos(str(self._output), [trajectory], self._meta, [flags])
        return f"{self.totals.num_transitions} transitions"


@contextmanager
def stage(config: Root, checkpoint: str | None, noise_std: float) -> Iterator[tuple[VectorEnv, Demonstrator]]:
    """The environments of a recording and who plays in them; closed in the end.

    Raises ConfigError where there is no expert for the task, or none for action chunks.
    """
    section, setup = training_env(config), config.actor.model.policy_setup
    if checkpoint is None and config.actor.model.num_action_chunks != 1:
        raise ConfigError(
            "a scripted expert answers one action at a time; set actor.model.num_action_chunks=1 or give --checkpoint"
        )

    if checkpoint is None:
        with expert_stage(section, setup, noise_std) as pair:
            yield pair
        return
    env = _opened(section, setup)
    try:
        yield env, TrainedPolicy(config, env.spaces, checkpoint, explore=noise_std > 0)
    finally:
        env.close()


@contextmanager
def expert_stage(
    section: EnvConfig, policy_setup: str | None, noise_std: float
) -> Iterator[tuple[VectorEnv, Demonstrator]]:
    """`stage` of the task's scripted expert in environments without auto-reset."""
    opened = [_opened(section, policy_setup)]
    try:
        expert: Demonstrator = ScriptedExpert(task_of(section), noise_std)
        seeing = with_full_state(section)
        if seeing is not None:
            opened.append(_opened(seeing, policy_setup))
            expert = SeeingExpert(expert, opened[1])
        yield opened[0], expert
    finally:
        for env in opened:
            env.close()


def _opened(section: EnvConfig, policy_setup: str | None) -> VectorEnv:
    return make_env(
        section, num_envs=section.total_num_envs, seed=section.seed, policy_setup=policy_setup, render=False
    )


def training_env(config: Root) -> EnvConfig:
    """The training environments of a recipe, in which finished ones wait for the others."""
    return config.env.train.model_copy(update={"auto_reset": False})


def with_full_state(env: EnvConfig) -> EnvConfig | None:
    """The environment that shows what a scripted expert must know where `env` hides it behind pictures, else None."""
    if isinstance(env, FrankaSimConfig) and env.gym_id == "PandaPickCubeVision-v0":
        return env.model_copy(update={"gym_id": "PandaPickCube-v0", "obs_mode": None})
    if isinstance(env, LiberoConfig):
        return env.model_copy(update={"show_objects": True, "image_size": UNSEEN_PIXELS})
    if isinstance(env, RealWorldConfig) and not env.show_goal and not env.paced_by_clock():
        blind = env.override_cfg.model_copy(update={"cameras": {}})
        return env.model_copy(update={"show_goal": True, "teleop": "none", "override_cfg": blind})
    if isinstance(env, ManiSkillConfig) and env.init_params.obs_mode == "rgb":
        return env.model_copy(update={"init_params": env.init_params.model_copy(update={"obs_mode": "state"})})
    return None


def record_into(
    store: Store,
    env: VectorEnv,
    expert: Demonstrator,
    episodes: int,
    chunks: int,
    seed: int,
    only_successes: bool,
    note: Callable[[str], None],
) -> None:
    """Play rounds of one episode per environment until `store` holds `episodes`.

    Raises DataError after `MAX_FAILED_ROUNDS` rounds without a success.
    """
    failed = 0
    while store.num_episodes < episodes:
        # A function of what is recorded, so that a stopped recording goes on as if it had not been stopped.
        round_seed = derive_seed(seed, f"demos/{store.num_episodes}/{failed}")
        expert.begin(round_seed)
        trajectory, success = play(env, expert, round_seed, chunks)
        kept = success.nonzero().flatten() if only_successes else torch.arange(env.num_envs)
        kept = kept[: episodes - store.num_episodes]
        if not len(kept):
            failed += 1
            if failed == MAX_FAILED_ROUNDS:
                raise DataError(
                    f"{expert.about}: no success in {failed * env.num_envs} episodes; lower --noise, choose another "
                    "--checkpoint, or keep failures with --all"
                )
            continue
        failed = 0
        there = store.add(select_envs(trajectory, kept), success[kept])
        share = success.float().mean().item()
        note(f"{store.num_episodes}/{episodes} episodes, {there}; success {share:.0%}")


def play(
    env: VectorEnv,
    expert: Demonstrator,
    seed: int,
    chunks: int,
    watch: Callable[[EnvStep], None] = lambda step: None,
) -> tuple[Trajectory, Tensor]:
    """One episode in every environment, and whether it was a success, bool [N]. `watch` is shown every step."""
    builder = TrajectoryBuilder((0, 0), auto_reset=False)
    obs = env.reset(seed=env_seed(seed))
    builder.start(obs, continues=False)
    success = torch.zeros(env.num_envs, dtype=torch.bool)
    playing = ~success
    for _ in range(chunks):
        out = expert.act(obs)
        step = env.step(out.action)
        builder.append(obs, out, step)
        watch(step)
        done = step.done.cpu() & playing
        success |= done & step.info["episode/success_once"].cpu()
        playing &= ~done
        obs = step.obs
        if not bool(playing.any()):
            break
    return builder.build(), success


def task_of(env: EnvConfig) -> str:
    """What the simulator calls the task."""
    if isinstance(env, LiberoConfig):
        return env.task_suite_name
    return env.init_params.id if isinstance(env, ManiSkillConfig | RealWorldConfig) else env.env_type
