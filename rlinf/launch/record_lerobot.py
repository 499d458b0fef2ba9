"""Record episodes of any environment as a LeRobot data set (v3.0).

    observation.state              what the environment calls `state`
    observation.images.<camera>    its pictures, as videos or images
    observation.<other.leaf>       whatever else it shows
    action                         what was executed
    next.reward, next.done         of the step that the action made
    next.success                   true in the last frame of an episode in which the task was solved
    intervention                   a person acted (recordings with a person alone)

A frame is one environment step; chunks of a policy are played action by action. The text of the task is the one that
the environment gives, or the one that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from rlinf.core import tree
from rlinf.core.errors import ConfigError
from rlinf.core.protocols import VectorEnv
from rlinf.core.types import EnvSpaces, Trajectory
from rlinf.data.lerobot.layout import Feature
from rlinf.data.lerobot.packages import check_packages
from rlinf.envs.config import EnvConfig
from rlinf.envs.maniskill.config import ManiSkillConfig
from rlinf.envs.realworld.config import RealWorldConfig
from rlinf.launch.build import control_mode_of
from rlinf.launch.config import Root
from rlinf.launch.demonstrators import Demonstrator, StepByStep
from rlinf.launch.record import record_into, stage, task_of, training_env

if TYPE_CHECKING:
    from rlinf.data.lerobot.writer import LeRobotWriter

TASK_TEXTS = {
    "PandaPutOnPlateInScene25DigitalTwin-v1": "Pick up the object on the table and place it into the white tray.",
    "PandaPutOnTrayDigitalTwin-v1": "Pick up the object on the table and place it into the white tray.",
    "PickCube-v1": "Pick up the cube and hold it at the goal.",
    "PushCube-v1": "Push the cube onto the target.",
    "frankasim": "Pick up the cube.",
    "reach": "Move the point onto the target.",
}
"""What a policy is told where the environment gives no instruction."""
INTERVENTION = "intervention"
STEPS_PER_S = {"frankasim": 50, "libero": 20}


@dataclass(frozen=True)
class DatasetOptions:
    """How episodes become a data set.

    Attributes:
        fps: frames per second; None for the environment's own rate of control.
        pictures: how cameras are stored. Videos are far smaller, images lossless.
        task: text of the task; None for the environment's own.
        robot_type: name of the robot, for people.
        codec: of videos.
    """

    fps: int | None = None
    pictures: Literal["image", "video"] = "video"
    task: str | None = None
    robot_type: str | None = None
    codec: str = "h264"


@dataclass(frozen=True)
class Recorded:
    """What a data set holds after a recording."""

    num_episodes: int
    num_frames: int


def record_dataset(
    config: Root,
    output: str | Path,
    options: DatasetOptions,
    *,
    episodes: int,
    checkpoint: str | None = None,
    noise_std: float = 0.1,
    only_successes: bool = True,
    note: Callable[[str], None],
) -> Recorded:
    """Record into `output` until it holds `episodes` episodes, and return what it holds; as `record.record`.

    Raises:
        ConfigError: there is no expert for the task, no rate for the frames, or no text for the task.
        DataError: `output` holds something else, or no round has a success.
    """
    check_packages()
    section, setup = training_env(config), config.actor.model.policy_setup
    frames_per_second(section, options.fps)  # before the simulator starts
    with stage(config, checkpoint, noise_std) as (env, player):
        return record_episodes(
            section,
            env,
            player,
            output,
            options,
            episodes=episodes,
            policy_setup=setup,
            seed=config.runner.seed,
            only_successes=only_successes,
            note=note,
        )


def record_episodes(
    section: EnvConfig,
    env: VectorEnv,
    player: Demonstrator,
    output: str | Path,
    options: DatasetOptions,
    *,
    episodes: int,
    policy_setup: str | None,
    seed: int,
    only_successes: bool,
    note: Callable[[str], None],
) -> Recorded:
    """`record_dataset` of a demonstrator in an environment that was made from `section`, without auto-reset."""
    rate = frames_per_second(section, options.fps)
    with open_dataset(output, section, env.spaces, options, rate, policy_setup) as writer:
        if writer.num_episodes:
            note(f"{output} holds {writer.num_episodes} episodes already")
        store = DatasetStore(writer, options.task, task_of(section))
        steps = section.max_episode_steps
        record_into(store, env, StepByStep(player), episodes, steps, seed, only_successes, note)
    return Recorded(writer.info.total_episodes, writer.info.total_frames)


def open_dataset(
    output: str | Path,
    section: EnvConfig,
    spaces: EnvSpaces,
    options: DatasetOptions,
    rate: int,
    policy_setup: str | None,
    *,
    interventions: bool = False,
) -> LeRobotWriter:
    """A writer for episodes of an environment that was made from `section`; it commits when it is told to."""
    from rlinf.data.lerobot.writer import LeRobotWriter  # an optional package, which other forms do without

    return LeRobotWriter(
        output,
        fps=rate,
        features=features_of(spaces, options.pictures, interventions=interventions),
        robot_type=options.robot_type,
        notes={"env_id": task_of(section), "control_mode": control_mode_of(section, policy_setup) or ""},
        codec=options.codec,
        commit_every=0,
    )


class DatasetStore:
    """A data set as a `record.Store`; every round is one commit."""

    def __init__(self, writer: LeRobotWriter, task: str | None, env_task: str) -> None:
        self._writer, self._task, self._env_task = writer, task, env_task

    @property
    def num_episodes(self) -> int:
        """As `Store.num_episodes`."""
        return self._writer.num_episodes

    def add(self, trajectory: Trajectory, success: Tensor) -> str:
        """As `Store.add`."""
        for env_index in range(trajectory.num_envs):
            data, instruction = episode_of(trajectory, env_index, bool(success[env_index]))
            if INTERVENTION in self._writer.info.features:
                data[INTERVENTION] = trajectory.intervened[: len(data["action"]), env_index, 0].cpu().numpy()
            self._writer.add_episode(data, task_text(self._task, instruction, self._env_task))
        self._writer.commit()
        return f"{self._writer.info.total_frames} frames"


def features_of(
    spaces: EnvSpaces, pictures: Literal["image", "video"], *, interventions: bool = False
) -> dict[str, Feature]:
    """The features of the frames of an environment; with `interventions` also whether a person acted."""
    features: dict[str, Feature] = {INTERVENTION: Feature("bool", (1,))} if interventions else {}
    for path, shape in spaces.obs_shapes.items():
        kind = spaces.obs_dtypes[path]
        if kind == "str":
            continue  # an instruction is the task
        if path.startswith("images/"):
            features[feature_name(path)] = Feature(pictures, shape, ["height", "width", "channels"])
        else:
            features[feature_name(path)] = Feature(kind, shape or (1,))
    return features | {
        "action": Feature("float32", (spaces.action_dim,)),
        "next.reward": Feature("float32", (1,)),
        "next.done": Feature("bool", (1,)),
        "next.success": Feature("bool", (1,)),
    }


def feature_name(path: str) -> str:
    """Name of an observation's leaf: images/front → observation.images.front."""
    return "observation." + path.replace("/", ".")


def episode_of(trajectory: Trajectory, env_index: int, success: bool) -> tuple[dict[str, Any], str | None]:
    """The frames that one environment played before its episode ended, and its instruction, if there is one.

    The trajectory has one action per decision and begins with the episode.
    """
    steps = int(trajectory.valid[:, env_index].sum())
    data: dict[str, np.ndarray] = {}
    instruction = None
    for path, leaf in tree.leaves(trajectory.obs):
        if isinstance(leaf, list):
            instruction = leaf[0][env_index]
        else:
            values = leaf[:steps, env_index].cpu().numpy()
            data[feature_name(path)] = values if values.ndim > 1 else values[:, None]
    done = trajectory.terminated[:steps, env_index].any(-1) | trajectory.truncated[:steps, env_index]
    last = np.arange(steps) == steps - 1
    data |= {
        "action": trajectory.action[:steps, env_index, 0].cpu().numpy(),
        "next.reward": trajectory.reward[:steps, env_index, 0].cpu().numpy(),
        "next.done": done.cpu().numpy(),
        "next.success": last & success,
    }
    return data, instruction


def task_text(asked_for: str | None, instruction: str | None, env_task: str) -> str:
    """The text of an episode's task. Raises ConfigError where there is none."""
    text = asked_for or instruction or TASK_TEXTS.get(env_task)
    if not text:
        raise ConfigError(f"{env_task} gives no instruction: say what the robot does with --task TEXT")
    return text


def frames_per_second(env: EnvConfig, asked_for: int | None) -> int:
    """Frames per second of a recording. Raises ConfigError where neither the environment nor the user says."""
    if asked_for is not None:
        return asked_for
    if (rate := control_rate(env)) is not None:
        return rate
    raise ConfigError(f"{env.env_type} has no rate of control: say how many frames a second has with --fps N")


def control_rate(env: EnvConfig) -> int | None:
    """Environment steps per second; None where there is no such thing."""
    if isinstance(env, ManiSkillConfig):
        return env.init_params.sim_config.control_freq
    if isinstance(env, RealWorldConfig):
        return max(1, round(env.override_cfg.step_frequency))
    return STEPS_PER_S.get(env.env_type)
