"""A robot cell as a `VectorEnv` of one environment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rlinf.core.errors import ConfigError
from rlinf.core.protocols import VectorEnv
from rlinf.envs.episodes import EpisodicEnv, ReplayedEnv, episode_rules
from rlinf.envs.realworld import frames, settings
from rlinf.envs.realworld.arm import Arm
from rlinf.envs.realworld.config import PegInsertionConfig, RealWorldConfig, check_said
from rlinf.envs.realworld.expert import PegInsertionExpert
from rlinf.envs.realworld.pacing import Pace, RealTime, SimulatedTime, Stopwatch
from rlinf.envs.realworld.peg_insertion import PegInsertion, PegTask
from rlinf.envs.realworld.robot_cell import RobotCell
from rlinf.envs.realworld.server.run import TOKEN, make_camera
from rlinf.envs.realworld.task import PoseGoal
from rlinf.envs.realworld.teleop.at_desk import AtDesk
from rlinf.envs.realworld.teleop.devices import DEVICES, open_operator
from rlinf.envs.realworld.teleop.operator import Command, Operator, ScriptedOperator


def make(
    config: RealWorldConfig,
    *,
    num_envs: int,
    seed: int,
    control_mode: str | None,
    num_workers: int,
    render: bool,
) -> VectorEnv:
    """The cell as configured, connected and held.

    On a twin that runs freely its state can be saved (`ReplayedEnv`). A real cell's cannot: what the world did does not
    come back. A run that is resumed begins a fresh episode there, as at every checkpoint.

    Args:
        config: what to build.
        num_envs: 1.
        seed: root seed until the first seeded reset.
        control_mode: means nothing here: actions are small motions of the tool.
        num_workers: means nothing here: a cell is stepped in the calling process.
        render: whether it can be filmed.

    Raises:
        ConfigError: more than one environment is asked for in this process, or something of a robot is not said.
        ArmError, CameraError, TeleopError, MissingDependency: something of the cell is not there.
    """
    if num_envs != 1:
        raise ConfigError(
            f"env_type realworld: {num_envs} environments in one process, and a cell has one arm; write "
            "total_num_envs: 1, or place one env process on each robot (docs/cluster.md)"
        )
    check_said(config)
    cfg, by_clock = config.override_cfg, config.paced_by_clock()
    arm, pace = make_arm(cfg, by_clock)
    cameras = {name: make_camera(name, _camera(cfg, name), arm) for name in cfg.all_cameras()}
    cell = RobotCell(
        arm,
        cameras,
        cfg.limits(),
        pace,
        period_s=1 / cfg.step_frequency,
        robot_wait_s=cfg.robot_wait_s,
        stop_wait_s=cfg.stop_wait_s,
        at_end=cfg.at_end,
        lift_m=cfg.lift_m,
        lift_s=cfg.lift_s,
        simulated=config.is_simulated(),
    )
    cell.open()
    try:
        world = _world(config, cell, pace, arm, render)
        exact = not by_clock and config.teleop == "none"
        return (ReplayedEnv if exact else EpisodicEnv)(world, episode_rules(config), seed=seed)
    except BaseException:
        cell.close()
        raise


def make_arm(cfg: PegInsertionConfig, by_clock: bool) -> tuple[Arm, Pace]:
    """The arm, not yet connected, and how its time passes."""
    options: dict[str, Any] = dict(cfg.driver_options)
    if cfg.driver == "twin":
        start = tuple(frames.pose_from_euler(np.array(cfg.start())).tolist())
        twin: Any = settings.make_arm("twin", {"realtime": by_clock, "start": start, **options})
        return twin, RealTime() if by_clock else SimulatedTime(lambda: float(twin.data.time), twin.advance)
    if cfg.driver == "fake":
        start = tuple(frames.pose_from_euler(np.array(cfg.start())).tolist())
        watch = Stopwatch()
        clock: Callable[[], float] = time.monotonic if by_clock else watch
        fake = settings.make_arm("fake", {"home": start, "clock": clock, **options})
        return fake, RealTime() if by_clock else SimulatedTime(watch, watch.advance, watch.restart)
    if cfg.driver == "serl_http":
        options = {"url": cfg.server_url(), "token": os.environ.get(TOKEN, ""), **options}
    else:
        options = {"host": cfg.robot_ip, **options}
    return settings.make_arm(cfg.driver, options), RealTime()


def _camera(cfg: PegInsertionConfig, name: str) -> settings.CameraSettings:
    camera = cfg.all_cameras()[name]
    record = camera.record()
    if camera.driver == "http":
        server = {"url": cfg.server_url(), "name": name, "token": os.environ.get(TOKEN, "")}
        record.options.update({**server, **camera.options})
    return record


def _world(config: RealWorldConfig, cell: RobotCell, pace: Pace, arm: Arm, render: bool) -> PegInsertion:
    cfg = config.override_cfg
    by_clock = config.paced_by_clock()
    target = frames.pose_from_euler(np.array(cfg.target()))
    task = PegTask(
        start=frames.pose_from_euler(np.array(cfg.start())),
        random_xy_m=cfg.random_xy_range if cfg.enable_random_reset else 0.0,
        random_rz_rad=cfg.random_rz_range if cfg.enable_random_reset else 0.0,
        action_scale=cfg.action_scale,
        relative=config.use_relative_frame,
        rotation=config.rotation,
        show_goal=config.show_goal,
        acting=cfg.compliance(),
        moving=cfg.precision(),
        joint_reset_cycle=cfg.joint_reset_cycle,
        reset_s=cfg.reset_s,
        gripper=not cfg.no_gripper,
        gripper_threshold=cfg.binary_gripper_threshold,
        gripper_s=cfg.gripper_sleep,
        gripper_penalty=cfg.gripper_penalty if cfg.enable_gripper_penalty else 0.0,
        judged_by=cfg.reward,
        teleport=not by_clock,
    )
    goal = PoseGoal(target, cfg.reward_threshold, hold_steps=cfg.success_hold_steps, dense=cfg.use_dense_reward)
    shapes = {name: (*camera.size, 3) for name, camera in cfg.all_cameras().items()}
    film = _film(config, cell, arm) if render else None
    world = PegInsertion(cell, goal, task, pace, shapes, classifier=_classifier(cfg), film=film)
    world.operator = _operator(config, world)
    return world


def _operator(config: RealWorldConfig, world: PegInsertion) -> Operator | None:
    """Whose hands may take over. Raises TeleopError, MissingDependency where the device is not there."""
    if config.teleop in DEVICES:
        return AtDesk(open_operator(config.teleop, config.teleop_options))
    if config.teleop == "scripted":
        noise = float(config.teleop_options.get("noise_std", 0.0))
        expert = PegInsertionExpert(noise, np.random.default_rng(config.seed))
        script = ScriptedOperator(lambda: Command(expert.act(world.full_state())[0].astype(float)))
        return AtDesk(script) if config.paced_by_clock() else script
    return AtDesk(None) if config.paced_by_clock() else None


def _classifier(cfg: PegInsertionConfig) -> Callable[[dict[str, np.ndarray]], bool] | None:
    if cfg.reward != "classifier" or cfg.classifier_path is None:
        return None
    from rlinf.envs.realworld.classifier import load_classifier

    sizes = {name: camera.size for name, camera in cfg.all_cameras().items()}
    network = load_classifier(cfg.classifier_path, sizes)
    return lambda pictures: network.probability(pictures) >= cfg.classifier_threshold


def _film(config: RealWorldConfig, cell: RobotCell, arm: Arm) -> Callable[[], np.ndarray]:
    """Draws what people see: the twin from the front, a real cell by its main camera."""
    if config.override_cfg.driver == "twin":
        from rlinf.envs.realworld.cameras.twin import TwinSource

        size = config.video_cfg
        return TwinSource(arm, "front", size.height, size.width).read  # type: ignore[arg-type]
    return lambda: cell.pictures()[config.main_image_key]  # waited for as those of the policy are
