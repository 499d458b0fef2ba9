"""A person moves the robot of a recipe, and what is done well is kept.

Every episode is on the disk before the next one begins: as demonstrations, as a LeRobot data set, or as both in one
pass. A collection that was stopped, whatever by, goes on with the same command.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor

from rlinf.core.errors import ConfigError, DataError
from rlinf.core.protocols import VectorEnv
from rlinf.core.seeding import derive_seed, numpy_generator
from rlinf.core.types import ActionOut, EnvStep, Obs, Trajectory
from rlinf.data.demo_folder import list_episodes, read_episode
from rlinf.data.lerobot.packages import check_packages
from rlinf.data.trim import trim_idle
from rlinf.envs.config import EnvConfig
from rlinf.envs.realworld.teleop.devices import DEVICES, open_operator
from rlinf.envs.teleoperated import OperatorStopped, Rule, TeleoperatedEnv
from rlinf.launch.build import make_env
from rlinf.launch.config import Root
from rlinf.launch.demonstrators import Demonstrator, StepByStep, TrainedPolicy, env_seed
from rlinf.launch.record import DemoStore, Store, describe, play, task_of, training_env, with_full_state
from rlinf.launch.record_lerobot import DatasetOptions, DatasetStore, control_rate, frames_per_second, open_dataset
from rlinf.launch.registry import EXPERTS, lookup

OPERATORS = (*DEVICES, "scripted")
PACE_OVER = 10
"""Episodes over which the time per episode is averaged."""
CLOSES_BY = {"frankasim": 1}
"""Sign of the action that closes the gripper, where it is not −1."""


@dataclass(frozen=True)
class CollectOptions:
    """What is kept, and in which form.

    Attributes:
        operator: out of `OPERATORS`; None for the one that the recipe's environment asks itself.
        episodes: that the folders are to hold in the end.
        demos, dataset: folders of the two forms; None leaves one out.
        lerobot: how episodes become a data set.
        only_successes: forget episodes without success.
        keep_idle: steps that stay of the waiting at an episode's end.
        checkpoint: a policy that acts while the person does not; None: nothing moves then.
        noise_std: of the scripted operator.
        patience: so many episodes in a row of which none is kept end the collection; None: as many as it takes.
    """

    operator: str | None
    episodes: int
    demos: str | None = None
    dataset: str | None = None
    lerobot: DatasetOptions = field(default_factory=DatasetOptions)
    only_successes: bool = True
    keep_idle: int = 5
    checkpoint: str | None = None
    noise_std: float = 0.0
    patience: int | None = None


class Progress(Protocol):
    """Shows the person how it goes."""

    def note(self, text: str) -> None:
        """A line that stays."""
        ...

    def status(self, text: str) -> None:
        """A line that the next one replaces."""
        ...


@dataclass
class Tally:
    """What came of the episodes of this session."""

    kept: int = 0
    failed: int = 0
    untouched: int = 0

    def __str__(self) -> str:
        parts = [f"{self.kept} kept", f"{self.failed} without success" if self.failed else ""]
        parts += [f"{self.untouched} untouched" if self.untouched else ""]
        return ", ".join(part for part in parts if part)


def collect(config: Root, options: CollectOptions, progress: Progress) -> Tally:
    """Let a person play until the folders hold `options.episodes` episodes, or until they say stop.

    Raises:
        ConfigError: the recipe has several environments or action chunks, or no such operator can play it.
        TeleopError, MissingDependency: the operator's device is not there, or was lost.
        DataError: a folder holds something else, or the disk refuses; what was recorded before is safe.
    """
    if options.dataset is not None:
        check_packages()
    section = training_env(config)
    if config.actor.model.num_action_chunks != 1:
        raise ConfigError("a person gives one action at a time: set actor.model.num_action_chunks=1")
    with ExitStack() as stack:
        stack.enter_context(_terminated_like_interrupted())
        env, player = open_stage(config, section, options)
        stack.callback(player.close)
        store = open_stores(stack, config, section, env, player.about, options, progress.note)
        session = _Session(store, env, player, options, progress)
        try:
            session.run(section.max_episode_steps, config.runner.seed)
        except OperatorStopped as stopped:
            progress.note(f"{stopped}; {store.num_episodes} episodes are kept, the same command goes on")
    return session.tally


# ---- who plays where


def open_stage(config: Root, section: EnvConfig, options: CollectOptions) -> tuple[VectorEnv, Player]:
    """The environment, moved by an operator, and who acts while the operator does not; the latter closes both."""
    operator, seed = options.operator, config.runner.seed
    if section.total_num_envs != 1:
        section = section.model_copy(update={"total_num_envs": 1, "group_size": 1})

    def make(part: EnvConfig) -> VectorEnv:
        setup = config.actor.model.policy_setup
        return make_env(part, num_envs=1, seed=part.seed, policy_setup=setup, render=False)

    opened = [make(section)]
    try:
        env, closing, hand, mirror = opened[0], CLOSES_BY.get(section.env_type, -1), None, None
        if operator == "scripted":
            task = task_of(section)
            hand = Rule(
                lookup("scripted expert", task, EXPERTS)(options.noise_std, numpy_generator(seed, task)), closing
            )
            env = TeleoperatedEnv(env, hand.operator(), closing=closing)
            if (seeing := with_full_state(section)) is not None:
                mirror = make(seeing)
                opened.append(mirror)
        elif operator is not None:
            env = TeleoperatedEnv(env, open_operator(operator), closing=closing, rate_hz=control_rate(section))
        opened[0] = env
        about = f"{operator or getattr(section, 'teleop', 'operator')} in {task_of(section)}"
        policy: Demonstrator = _Still(env.spaces.action_dim)
        if options.checkpoint is not None:
            policy = StepByStep(TrainedPolicy(config, env.spaces, options.checkpoint, explore=False))
            about += f", over {policy.about}"
        return env, Player(policy, hand, mirror, about, opened)
    except BaseException:
        for part in opened:
            part.close()
        raise


class _Still:
    """Moves nothing."""

    about = "nobody"

    def __init__(self, action_dim: int) -> None:
        self._action = torch.zeros(1, 1, action_dim)

    def begin(self, seed: int) -> None:
        """As `Demonstrator.begin`."""

    def act(self, obs: Obs) -> ActionOut:
        """As `Demonstrator.act`."""
        return ActionOut(action=self._action, decision=self._action[:, 0])


class Player:
    """A policy, and beside it, where the operator is a script, the eyes of that one.

    Args:
        policy: acts while the operator does not.
        hand: the script's; None for a person's.
        mirror: an environment that shows what the script must know; it is begun and stepped like the other one.
        about: who plays, for people.
        opened: environments to be closed in the end.
    """

    def __init__(
        self, policy: Demonstrator, hand: Rule | None, mirror: VectorEnv | None, about: str, opened: list[VectorEnv]
    ) -> None:
        self._policy, self._hand, self._mirror, self.about = policy, hand, mirror, about
        self._opened, self._shown = opened, Obs()

    def begin(self, seed: int) -> None:
        """As `Demonstrator.begin`."""
        self._policy.begin(seed)
        if self._mirror is not None:
            self._shown = self._mirror.reset(seed=env_seed(seed))

    def act(self, obs: Obs) -> ActionOut:
        """As `Demonstrator.act`."""
        if self._hand is not None:
            self._hand.see(obs if self._mirror is None else self._shown)
        return self._policy.act(obs)

    def saw(self, step: EnvStep) -> None:
        """A step was made."""
        if self._mirror is not None:
            self._shown = self._mirror.step(step.executed).obs

    def close(self) -> None:
        """Close the environments."""
        for env in self._opened:
            env.close()


# ---- where it goes


class _Both:
    """Demonstrations and a data set of the same episodes. The second follows the first."""

    def __init__(self, first: Store, second: Store) -> None:
        self._first, self._second = first, second

    @property
    def num_episodes(self) -> int:
        """As `Store.num_episodes`."""
        return self._second.num_episodes

    def add(self, trajectory: Trajectory, success: Tensor) -> str:
        """As `Store.add`."""
        return f"{self._first.add(trajectory, success)}, {self._second.add(trajectory, success)}"


def open_stores(
    stack: ExitStack,
    config: Root,
    section: EnvConfig,
    env: VectorEnv,
    about: str,
    options: CollectOptions,
    note: Callable[[str], None],
) -> Store:
    """Where episodes are recorded; what an interruption left out of the data set is brought into it first."""
    setup = config.actor.model.policy_setup
    stores: list[Store] = []
    if options.demos is not None:
        meta = describe(section, env.spaces, setup, about)
        stores.append(DemoStore(Path(options.demos), meta, env, note))
    if options.dataset is not None:
        rate = frames_per_second(section, options.lerobot.fps)
        writer = open_dataset(options.dataset, section, env.spaces, options.lerobot, rate, setup, interventions=True)
        stack.enter_context(writer)
        if writer.num_episodes:
            note(f"{options.dataset} holds {writer.num_episodes} episodes already")
        stores.append(DatasetStore(writer, options.lerobot.task, task_of(section)))
    if len(stores) == 2 and options.demos is not None and options.dataset is not None:
        _catch_up(stores[0].num_episodes, stores[1], writer.info.total_frames, options.demos, options.dataset, note)
        return _Both(stores[0], stores[1])
    return stores[0]


def _catch_up(there: int, store: Store, frames: int, demos: str, dataset: str, note: Callable[[str], None]) -> None:
    """Bring the last episodes of `demos` into the data set, which has `frames` steps.

    Raises DataError where that has more, or others: as many steps in as many episodes count as the same.
    """
    missing = there - store.num_episodes
    remedy = f"remove {dataset}, and it is written anew from those, or record into other folders"
    if missing < 0:
        raise DataError(f"{dataset} has {-missing} episodes that {demos} has not: {remedy}")
    episodes = list_episodes(demos)[1] if there else []
    common = episodes[: store.num_episodes]
    if (steps := sum(episode.end - episode.begin for episode in common)) != frames:
        raise DataError(
            f"{dataset} has {frames} steps in {len(common)} episodes, {demos} {steps} in its first {len(common)}: "
            f"they are not of the same episodes; {remedy}"
        )
    if not missing:
        return
    note(f"{dataset}: taking over {missing} episodes from {demos}")
    for episode in episodes[-missing:]:
        store.add(read_episode(demos, episode), torch.tensor([bool(episode.success)]))


# ---- the session


class _Session:
    """Episode after episode, and what is said about them."""

    def __init__(
        self, store: Store, env: VectorEnv, player: Player, options: CollectOptions, progress: Progress
    ) -> None:
        self._store, self._env, self._player = store, env, player
        self._options, self._progress = options, progress
        self.tally = Tally()
        self._ends: deque[float] = deque([time.monotonic()], PACE_OVER + 1)
        self._shown_s = 0.0

    def run(self, steps: int, seed: int) -> None:
        """Until the store holds enough."""
        attempt = 0
        while self._store.num_episodes < self._options.episodes:
            # Other initial states after a failure, the same ones when the collection is taken up again.
            round_seed = derive_seed(seed, f"collect/{self._store.num_episodes}/{attempt}")
            self._player.begin(round_seed)
            self._seen = (0, 0)
            trajectory, success = play(self._env, self._player, round_seed, steps, self._watch)
            with _uninterrupted():
                kept = self._judge(trajectory, success)
            attempt = 0 if kept else attempt + 1
            if attempt == self._options.patience:
                raise DataError(
                    f"{self._player.about}: nothing to keep in {attempt} episodes; keep failures with --all"
                )

    def _judge(self, trajectory: Trajectory, success: Tensor) -> bool:
        """Whether the episode is kept; then it is on disk."""
        options, number = self._options, self._store.num_episodes + 1
        trimmed = trim_idle(trajectory, options.keep_idle)
        if trimmed is None:
            self.tally.untouched += 1
            self._progress.note(f"episode {number}: nobody moved, not kept")
            return False
        steps, total = trimmed.trajectory.num_steps, float(trimmed.trajectory.reward.sum())
        hands = float(trimmed.trajectory.intervened.float().mean())
        word = "success" if bool(success) else "no success"
        what = f"{word}, {steps} steps, return {total:.2f}, by hand {hands:.0%}"
        if options.only_successes and not bool(success):
            self.tally.failed += 1
            self._progress.note(f"episode {number}: {what}; not kept")
            return False
        there = self._store.add(trimmed.trajectory, success)
        self.tally.kept += 1
        self._ends.append(time.monotonic())
        cut = trimmed.start + trimmed.end
        idle = f", {cut} idle steps trimmed" if cut else ""
        self._progress.note(f"{number}/{options.episodes}: {what}{idle}; {there}{self._left()}")
        return True

    def _watch(self, step: EnvStep) -> None:
        self._player.saw(step)
        steps, hands = self._seen
        self._seen = (steps + 1, hands + int(step.intervened.any()))
        if (now := time.monotonic()) - self._shown_s >= 0.2:
            self._shown_s = now
            number, wanted = self._store.num_episodes + 1, self._options.episodes
            self._progress.status(
                f"episode {number}/{wanted}: step {self._seen[0]}, by hand {self._seen[1]}; {self.tally}{self._left()}"
            )

    def _left(self) -> str:
        left = self._options.episodes - self._store.num_episodes
        if len(self._ends) < 2 or left <= 0:
            return ""
        seconds = left * (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return f"; about {max(1, round(seconds / 60))} min left" if seconds >= 60 else f"; about {seconds:.0f} s left"


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until a finished episode is on the disk."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends the collection as Ctrl-C does, so that the arm is left in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
