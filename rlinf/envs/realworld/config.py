"""Keys of the real-robot cell, and of its software twin."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import os
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from rlinf.core.config import Config
from rlinf.core.errors import ConfigError, RlinfError
from rlinf.envs.config import EnvConfig
from rlinf.envs.realworld import settings
from rlinf.envs.realworld.arm import Compliance
from rlinf.envs.realworld.safety import SafetyLimits

Driver = Literal["twin", "fake", "serl_http", "franky", "panda_py"]
Teleop = Literal["none", "spacemouse", "keyboard", "gamepad", "scripted"]
Pose6 = tuple[float, float, float, float, float, float]
Triple = tuple[float, float, float]

ROBOT_URL = "RLINF_ROBOT_URL"
"""Environment variable with the address of the robot server, where the configuration names none."""

TWIN_TARGET = (0.5, 0.0, 0.055, math.pi, 0.0, 0.0)
"""Where the tool is when the twin's peg stands on the ground of its hole: m, then roll, pitch, yaw in rad."""

PRECISION = Compliance(
    translational_stiffness=3000.0,
    translational_ki=0.1,
    translational_clip=(0.01, 0.01, 0.01),
    translational_clip_neg=(0.01, 0.01, 0.01),
    rotational_stiffness=300.0,
    rotational_damping=9.0,
    rotational_ki=0.1,
    rotational_clip=(0.05, 0.05, 0.05),
    rotational_clip_neg=(0.05, 0.05, 0.05),
)
"""SERL's gains for moves that have to arrive where they are sent."""

SAFETY_KEYS = [field.name for field in dataclasses.fields(SafetyLimits)]


class CameraConfig(Config):
    """One camera of the cell."""

    driver: Literal["twin", "fake", "http", "opencv", "realsense"] = Field(description="What gives the pictures.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Keywords of the driver, such as serial (realsense) or device (opencv)."
    )
    crop: tuple[float, float, float, float] | None = Field(
        None, description="Top, left, bottom, right of the part that is used, as fractions; null: the middle square."
    )
    size: tuple[PositiveInt, PositiveInt] = Field((128, 128), description="Height and width in pixels.")
    stale_s: PositiveFloat = Field(0.5, description="A newest picture older than this is none.")
    retries: PositiveInt = Field(5, description="So often in a row a camera that fails is opened again.")
    retry_s: PositiveFloat = Field(0.5, description="Pause before the first of them in s; it doubles each time.")

    @model_validator(mode="after")
    def _options_are_known(self) -> CameraConfig:
        filled = {"twin"} if self.driver == "twin" else set()
        _check_keywords(settings.CAMERAS[self.driver], self.options, filled, "options")
        if self.crop is not None and not (
            0 <= self.crop[0] < self.crop[2] <= 1 and 0 <= self.crop[1] < self.crop[3] <= 1
        ):
            raise ValueError(f"crop {list(self.crop)} must be top, left, bottom, right as fractions from 0 to 1")
        return self

    def record(self) -> settings.CameraSettings:
        """As the drivers' side takes it."""
        return settings.CameraSettings(**{**self.model_dump(), "size": self.size, "crop": self.crop})


class PegInsertionConfig(Config):
    """The cell, and its task: bring the tool to a target pose, with a peg between the fingers."""

    driver: Driver = Field(
        "twin",
        description="What moves the arm. twin: MuJoCo station; fake: a tool in empty space; serl_http: a robot server "
        "(ours or SERL's) at robot_url; franky, panda_py: the arm at robot_ip, from this very machine.",
    )
    robot_url: str | None = Field(
        None, description=f"Address of the robot server, http://HOST:5000; null: the environment variable {ROBOT_URL}."
    )
    robot_ip: str | None = Field(None, description="Address of the arm's controller, for franky and panda_py.")
    driver_options: dict[str, Any] = Field(
        default_factory=dict, description="Further keywords of the driver; see rlinf/envs/realworld/arms."
    )
    step_frequency: PositiveFloat = Field(10.0, description="Environment steps per second.")
    target_ee_pose: Pose6 | None = Field(
        None,
        description="Pose of the tool with the peg inserted: x, y, z in m, roll, pitch, yaw in rad, as the server's "
        "/getpos_euler says it. null: that of the twin.",
    )
    reset_ee_pose: Pose6 | None = Field(
        None, description="Where episodes begin, before it is randomised; null: 0.1 m above the target."
    )
    reward_threshold: Pose6 = Field(
        (0.01, 0.01, 0.01, 0.2, 0.2, 0.2),
        description="The task is solved within these distances of the target: along x, y, z in m, about them in rad.",
    )
    success_hold_steps: PositiveInt = Field(1, description="So many steps in a row have to be within them.")
    use_dense_reward: bool = Field(
        False, description="Pay exp(-500 d^2) outside of the thresholds, d in m the distance to the target, not 0."
    )
    reward: Literal["pose", "keyboard", "classifier"] = Field(
        "pose",
        description="Who says that the task is solved. pose: the thresholds; keyboard: the operator's keys (Enter, "
        "Backspace); classifier: a network on the pictures.",
    )
    classifier_path: str | None = Field(
        None, description="Weights of the classifier, the safetensors file of `python -m rlinf reward_classifier`."
    )
    classifier_threshold: float = Field(0.85, gt=0, lt=1, description="Its probability that counts as success.")
    action_scale: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(
        (0.02, 0.1, 1.0), description="What an action of 1 means: m, rad, and the gripper's command."
    )
    enable_random_reset: bool = Field(True, description="Randomise where episodes begin.")
    random_xy_range: NonNegativeFloat = Field(0.05, description="By up to so many m along x and y, each way.")
    random_rz_range: NonNegativeFloat = Field(math.pi / 6, description="By up to so many rad about z, each way.")
    ee_pose_limit_min: Pose6 | None = Field(
        None,
        description="Lower corner of the box in which targets are kept: x, y, z in m, and turns about x, y, z from "
        "the target's orientation in rad, as far one way as the other. null: 0.05, 0.05, 0 m and 0.01, 0.01, pi/6 rad "
        "below the target.",
    )
    ee_pose_limit_max: Pose6 | None = Field(None, description="The upper corner; null: likewise, with 0.1 m above it.")
    compliance_param: dict[str, float] = Field(
        default_factory=dict, description="Gains while the policy acts, in SERL's names; others stay as in SERL's peg."
    )
    precision_param: dict[str, float] = Field(
        default_factory=dict, description="Gains of the way to where an episode begins, likewise."
    )
    joint_reset_cycle: int = Field(
        0,
        ge=0,
        description="Joint reset before every n-th episode; 0: never. The driver's reset joints must bring the tool "
        "into the box (ee_pose_limit_min, _max).",
    )
    lift_m: NonNegativeFloat = Field(0.1, description="Height by which a reset lifts the tool before it moves on.")
    lift_s: PositiveFloat = Field(1.0, description="Time for that.")
    reset_s: PositiveFloat = Field(1.5, description="Time for the way to where an episode begins.")
    no_gripper: bool = Field(True, description="The peg stays between the fingers; if false, actions have a seventh.")
    binary_gripper_threshold: float = Field(
        0.5, gt=0, lt=1, description="The fingers close at a seventh below minus this, and open above it."
    )
    gripper_sleep: NonNegativeFloat = Field(0.6, description="Seconds that a step with a gripper motion takes more.")
    enable_gripper_penalty: bool = Field(True, description="Whether a motion of the gripper costs gripper_penalty.")
    gripper_penalty: NonNegativeFloat = Field(0.1, description="Reward that it costs.")
    cameras: dict[str, CameraConfig] | None = Field(
        None, description="Cameras by name; null: wrist_1, of the driver's own kind."
    )
    safety: dict[str, Any] = Field(
        default_factory=dict,
        description="Limits of the environment's gate that differ from those of the task; see SafetyLimits.",
    )
    at_end: Literal["hold", "joints"] = Field(
        "hold", description="What the arm does when the environment is closed: stay, or go to its reset joints."
    )
    robot_wait_s: NonNegativeFloat = Field(
        30.0, description="So long a robot or a camera that is not heard of is waited for, with the arm held."
    )
    stop_wait_s: NonNegativeFloat = Field(
        300.0, description="So long a stopped arm waits for a person to clear it before the run ends."
    )

    @field_validator("compliance_param", "precision_param")
    @classmethod
    def _gains_are_gains(cls, given: dict[str, float]) -> dict[str, float]:
        try:
            Compliance().from_serl(given)
        except RlinfError as problem:
            raise ValueError(str(problem)) from None
        return given

    @field_validator("safety")
    @classmethod
    def _limits_are_known(cls, given: dict[str, Any]) -> dict[str, Any]:
        for key in given:
            _known(key, SAFETY_KEYS, "safety")
        return given

    @field_validator("cameras")
    @classmethod
    def _names_are_names(cls, given: dict[str, CameraConfig] | None) -> dict[str, CameraConfig] | None:
        for name in given or {}:
            if not name.isidentifier():
                raise ValueError(f"camera {name}: a name is letters, digits and _")
        return given

    @model_validator(mode="after")
    def _fits_the_driver(self) -> PegInsertionConfig:
        _check_keywords(settings.ARMS[self.driver], self.driver_options, set(), "driver_options")
        if self.reward == "classifier" and self.classifier_path is None:
            raise ValueError(
                "reward: classifier needs classifier_path, the file of `python -m rlinf reward_classifier FOLDER`"
            )
        if self.reward == "classifier" and not self.all_cameras():
            raise ValueError("reward: classifier needs a camera")
        for name, camera in self.all_cameras().items():
            if camera.driver == "twin" and self.driver != "twin":
                raise ValueError(f"camera {name}: only driver twin has cameras of the twin")
            if camera.driver == "http" and self.driver != "serl_http" and "url" not in camera.options:
                raise ValueError(f"camera {name}: without driver serl_http its options need the url of a robot server")
        try:
            limits = self.limits()
        except ValueError as problem:
            raise ValueError(f"{problem} (from ee_pose_limit_min, ee_pose_limit_max and safety)") from None
        if max(largest.largest_force_n() for largest in (self.compliance(), self.precision())) > limits.max_force_n:
            raise ValueError(
                f"stiffness times clip of the gains is more than safety.max_force_n ({limits.max_force_n:g} N)"
            )
        return self

    def unsaid(self, *, here: bool = True) -> list[str]:
        """What must be said of a real robot before anything moves, a line each.

        Args:
            here: it is reached from this very machine, whose environment variables count.
        """
        if self.driver in settings.WITHOUT_ROBOT:
            return []
        lines = []
        if self.target_ee_pose is None:
            lines.append(
                "target_ee_pose, where the peg is inserted: guide the arm there, and write what "
                "`curl -s http://ROBOT:5000/getpos_euler` says"
            )
        if self.driver == "serl_http" and here and not self.server_url():
            lines.append(
                "robot_url, http://HOST:5000 of a `python -m rlinf robot_server` (or the environment variable "
                f"{ROBOT_URL})"
            )
        if self.driver in ("franky", "panda_py") and self.robot_ip is None:
            lines.append("robot_ip, the address of the arm's controller")
        return lines

    def server_url(self) -> str:
        """Where the robot server is; empty if that is not known."""
        return self.robot_url or os.environ.get(ROBOT_URL, "")

    def target(self) -> Pose6:
        """The pose to reach."""
        return TWIN_TARGET if self.target_ee_pose is None else self.target_ee_pose

    def start(self) -> Pose6:
        """Where episodes begin, before it is randomised."""
        if self.reset_ee_pose is not None:
            return self.reset_ee_pose
        x, y, z, *turns = self.target()
        return (x, y, z + 0.1, *turns)  # type: ignore[return-value]

    def compliance(self) -> Compliance:
        """Gains while the policy acts."""
        return Compliance().from_serl(self.compliance_param)

    def precision(self) -> Compliance:
        """Gains of the way to where an episode begins."""
        return PRECISION.from_serl(self.precision_param)

    def all_cameras(self) -> dict[str, CameraConfig]:
        """Cameras by name."""
        if self.cameras is not None:
            return self.cameras
        kind = {"twin": "twin", "fake": "fake", "serl_http": "http"}.get(self.driver)
        return {} if kind is None else {"wrist_1": CameraConfig(driver=kind)}  # type: ignore[arg-type]

    def limits(self) -> SafetyLimits:
        """What the environment's gate allows. Raises ValueError for limits that are none."""
        from rlinf.envs.realworld import frames  # numpy alone, but parsing a recipe for another robot needs none of it

        target = self.target()
        low = self.ee_pose_limit_min or (target[0] - 0.05, target[1] - 0.05, target[2], -0.01, -0.01, -math.pi / 6)
        high = self.ee_pose_limit_max or (target[0] + 0.05, target[1] + 0.05, target[2] + 0.1, 0.01, 0.01, math.pi / 6)
        for axis, least, most in zip("xyz", low[3:], high[3:]):
            if not math.isclose(-least, most, rel_tol=1e-3, abs_tol=1e-6):
                raise ValueError(
                    f"turns about {axis} from {least:g} to {most:g} rad: the limits are the same both ways, -a and a"
                )
        turn = high[3:]
        task = {
            "box_low": low[:3],
            "box_high": high[:3],
            "max_rotation_rad": turn,
            "orientation": tuple(frames.pose_from_euler(target)[3:].tolist()),  # type: ignore[arg-type]
            "max_speed": 0.08,  # the twin's peg lands on the rim with 30 to 45 N
            "max_force_n": 60.0,
            "max_turn_rate": 1.0,
            # Time of an environment, whose steps are ten times as long as a server's control periods.
            "watchdog_s": 5 / self.step_frequency,
        }
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in self.safety.items()}
        return SafetyLimits(**{**task, **given})  # type: ignore[arg-type]


class RealWorldTask(Config):
    """Which task."""

    id: Literal["PegInsertionEnv-v1"] = Field("PegInsertionEnv-v1", description="Name of the task.")


class RealWorldConfig(EnvConfig):
    """A robot cell with one arm, or its software twin: one environment in each process."""

    env_type: Literal["realworld"] = Field("realworld", description="Which environment: a robot cell.")
    init_params: RealWorldTask = Field(default_factory=RealWorldTask, description="The task.")
    override_cfg: PegInsertionConfig = Field(default_factory=PegInsertionConfig, description="The cell and its task.")
    total_num_envs: PositiveInt = Field(
        1, description="Number of environments over all environment workers: as many as there are arms."
    )
    max_episode_steps: PositiveInt = Field(
        100, description="Time limit of an episode in environment steps; reaching it is a truncation."
    )
    max_steps_per_rollout_epoch: PositiveInt = Field(
        100, description="Environment steps that every environment makes in one rollout segment."
    )
    main_image_key: str = Field("wrist_1", description="Camera that people are shown.")
    use_relative_frame: bool = Field(
        True,
        description="Actions and velocities along the tool's axes, poses as seen from where the episode began; if "
        "false, all in the base's.",
    )
    rotation: Literal["euler", "quaternion"] = Field(
        "euler", description="How the state writes the tool's orientation: 3 angles, or 4 numbers x, y, z, w."
    )
    show_goal: bool = Field(
        False,
        description="Append the way to the target (3 m, 3 rad) to the state: what a scripted expert needs to know.",
    )
    teleop: Teleop = Field("none", description="Whose hands may take over from the policy; scripted: the expert's.")
    teleop_options: dict[str, Any] = Field(default_factory=dict, description="Keywords of the device.")
    pace: Literal["auto", "realtime", "free"] = Field(
        "auto",
        description="realtime: steps begin at step_frequency, by the clock. free: as fast as it goes, in simulated "
        "time, repeatable from the seed; twin and fake alone. auto: free for these, else realtime.",
    )

    @model_validator(mode="after")
    def _one_arm(self) -> RealWorldConfig:
        if self.pace == "free" and not self.is_simulated():
            raise ValueError(f"pace: free needs driver twin or fake; {self.override_cfg.driver} moves a real arm")
        if self.group_size != 1:
            raise ValueError("group_size must be 1: a cell has one arm")
        if self.num_workers not in ("auto", 0, 1):
            raise ValueError("num_workers must be 0 or auto: a cell is stepped in its own process")
        cameras = self.override_cfg.all_cameras()
        if cameras and self.main_image_key not in cameras:
            raise ValueError(f"main_image_key is {self.main_image_key}; there are {', '.join(sorted(cameras))}")
        if self.override_cfg.reward == "keyboard" and self.teleop == "none":
            raise ValueError("override_cfg.reward: keyboard needs teleop: keyboard, whose keys say how it went")
        return self

    def is_simulated(self) -> bool:
        """Whether there is no robot."""
        return self.override_cfg.driver in settings.WITHOUT_ROBOT

    def paced_by_clock(self) -> bool:
        """Whether steps begin by the clock."""
        return self.pace == "realtime" or (self.pace == "auto" and not self.is_simulated())

    def longest_wait_s(self) -> float:
        """So long a step may wait for a person, and then for the robot, before it gives up."""
        return self.override_cfg.stop_wait_s + self.override_cfg.robot_wait_s

    def describe(self) -> str:
        """One line that says what is moved."""
        cfg = self.override_cfg
        rate = f"{cfg.step_frequency:g} steps a second" if self.paced_by_clock() else "in simulated time"
        if self.is_simulated():
            what = "the software twin" if cfg.driver == "twin" else "a tool in empty space"
            return (
                f"no robot: {what} takes its place, {rate}. For a robot: profile=gpu, and of env.train.override_cfg "
                "robot_url and target_ee_pose (docs/realworld.md)"
            )
        return f"robot: {cfg.driver} at {cfg.server_url() or cfg.robot_ip}, {rate}; operator: {self.teleop}"


def check_said(config: RealWorldConfig, *, here: bool = True, section: str = "env.train") -> None:
    """Raise ConfigError when something must still be said of a real robot; see `PegInsertionConfig.unsaid`."""
    lines = config.override_cfg.unsaid(here=here)
    if lines:
        told = "".join(f"\n  {section}.override_cfg.{line}" for line in lines)
        raise ConfigError(
            f"driver {config.override_cfg.driver} moves a real arm, and this is not set:{told}\n"
            f"Without a robot: profile=cpu, or {section}.override_cfg.driver=twin (docs/realworld.md)"
        )


def _check_keywords(place: str, given: dict[str, Any], filled: set[str], where: str) -> None:
    """Raise ValueError for keywords that a driver's constructor does not take. Drivers import their library later."""
    module, _, attribute = place.partition(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters
    for key in given:
        _known(key, [name for name in parameters if name not in filled], where)


def _known(key: str, names: list[str], where: str) -> None:
    if key not in names:
        near = get_close_matches(key, names, 1)
        guess = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names)}"
        raise ValueError(f"{where}.{key}: unknown; {guess}")
