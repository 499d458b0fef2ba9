"""`PegInsertionEnv-v1` by hand: what is paid, what actions mean, who acts, and what happens when something fails."""

import importlib.util
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rlinf.core.errors import ConfigError
from rlinf.envs.realworld import frames
from rlinf.envs.realworld.arm import ArmError
from rlinf.envs.realworld.arms.fake import FakeArm
from rlinf.envs.realworld.cameras.camera import CameraError
from rlinf.envs.realworld.config import PRECISION, PegInsertionConfig, RealWorldConfig
from rlinf.envs.realworld.env import _film, make
from rlinf.envs.realworld.expert import PegInsertionExpert
from rlinf.envs.realworld.observation import action_of, motion_of, proprioception
from rlinf.envs.realworld.pacing import Metronome, RealTime, SimulatedTime
from rlinf.envs.realworld.robot_cell import RobotCell
from rlinf.envs.realworld.task import PoseGoal
from rlinf.envs.realworld.teleop.operator import Command, ScriptedOperator
from tests.envs.realworld.cell import DOWN, LIMITS, Clock, pose, served

needs_twin = [
    pytest.mark.sim,
    pytest.mark.skipif(importlib.util.find_spec("gym_hil") is None, reason="gym-hil is not installed"),
]
TARGET = pose(0.5, 0.0, 0.055)
THRESHOLD = (0.01, 0.01, 0.01, 0.2, 0.2, 0.2)


def made(num_envs=1, seed=0, **keys):
    cell = {"driver": "fake", "cameras": {}} | keys.pop("override_cfg", {})
    config = RealWorldConfig(override_cfg=cell, **keys)
    return make(config, num_envs=num_envs, seed=seed, control_mode=None, num_workers=0, render=False)


def cell_of(env):
    return env._simulator.cell


def act(env, *elements):
    action = torch.zeros(1, 1, env.spaces.action_dim)
    action[0, 0, : len(elements)] = torch.tensor(elements)
    return env.step(action)


# ---- the task


def test_success_wants_every_threshold_and_the_hold_time():
    goal = PoseGoal(TARGET, THRESHOLD, hold_steps=3, dense=False)
    near, beside = pose(0.509, -0.009, 0.064), pose(0.511, 0.0, 0.055)
    turned = pose(0.5, 0, 0.055, frames.multiply(frames.quaternion_from_rotation_vector([0, 0, 0.21]), DOWN))
    assert [goal.judge(here) for here in (near, near, beside, near, turned)] == [
        (1.0, False),
        (1.0, False),
        (0.0, False),
        (1.0, False),
        (0.0, False),
    ]
    assert [goal.judge(near)[1] for _ in range(4)] == [False, False, True, True]
    goal.begin()
    assert goal.judge(near) == (1.0, False)


def test_dense_reward_is_that_of_the_distance_outside():
    goal = PoseGoal(TARGET, THRESHOLD, dense=True)
    assert goal.judge(pose(0.53, 0.04, 0.055))[0] == pytest.approx(math.exp(-500 * 0.05**2))
    assert goal.judge(TARGET) == (1.0, True)


# ---- what actions and observations mean

UNIT = st.floats(-1, 1, width=32)
POSES = st.tuples(UNIT, UNIT, UNIT, UNIT, UNIT, UNIT).map(
    lambda v: frames.pose_of(np.array(v[:3]), frames.quaternion_from_rotation_vector(2.9 * np.array(v[3:]) / 2))
)


@given(POSES, st.tuples(UNIT, UNIT, UNIT))
def test_a_pure_translation_of_the_tool_stays_one(here, way):
    """Through the adjoint it would also turn the tool, by p × v."""
    motion = motion_of(np.array([*way, 0, 0, 0]), here, (0.02, 0.1, 1.0), relative=True)
    np.testing.assert_allclose(motion[3:], 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(motion[:3]), 0.02 * np.linalg.norm(way), atol=1e-9)
    there = frames.relative_pose(frames.moved(here, motion), here)
    np.testing.assert_allclose(there[:3], 0.02 * np.array(way), atol=1e-9)
    assert frames.angle_between(there[3:], np.array([0, 0, 0, 1.0])) < 1e-6


@given(POSES, st.tuples(UNIT, UNIT, UNIT, UNIT, UNIT, UNIT))
def test_an_operators_command_keeps_its_direction_in_the_tools_axes(here, command):
    command = np.array(command)
    action = action_of(command, here, relative=True)
    assert np.abs(action).max() <= 1 + 1e-9
    back = frames.in_base_axes(action, here)
    for half in (slice(0, 3), slice(3, 6)):
        share = np.linalg.norm(back[half]) / max(np.linalg.norm(command[half]), 1e-9)
        np.testing.assert_allclose(back[half], share * command[half], atol=1e-6)
    np.testing.assert_array_equal(action_of(command, here, relative=False), command)


def test_the_state_is_in_serls_order_and_relative_to_where_the_episode_began():
    arm = FakeArm(home=(*pose(0.52, 0.01, 0.1),), clock=Clock())
    arm.load[:] = (1, 2, 3, 4, 5, 6)
    state = arm.state()
    here = proprioception(state, pose(0.5, 0.0, 0.1), "euler")
    assert here.shape == (19,)
    np.testing.assert_allclose(here[:4], (1.0, 1, 2, 3))
    np.testing.assert_allclose(here[4:10], (0.02, -0.01, 0, 0, 0, 0), atol=1e-12)  # y of a tool that points down
    np.testing.assert_allclose(here[10:13], (4, 5, 6))
    absolute = proprioception(state, None, "euler")
    np.testing.assert_allclose(absolute[4:10], (0.52, 0.01, 0.1, math.pi, 0, 0), atol=1e-12)
    assert proprioception(state, None, "quaternion").shape == (20,)


@pytest.mark.parametrize("relative", [True, False])
def test_an_action_moves_the_tool_along_its_axes(relative):
    env = made(use_relative_frame=relative, override_cfg={"random_xy_range": 0.0})
    env.reset(4)
    before = cell_of(env).state.pose
    act(env, 0.25, 0.1, 0.2)
    moved = cell_of(env).state.pose[:3] - before[:3]
    wanted = 0.02 * np.array([0.25, 0.1, 0.2])
    if relative:
        wanted = frames.in_base_axes(np.append(wanted, np.zeros(3)), before)[:3]
        wanted[2] = max(wanted[2], -0.02)
    else:
        wanted[2] = 0.0  # the start is at the box's top
    np.testing.assert_allclose(moved, wanted * (1 - math.exp(-0.1 / 0.05)), atol=2e-4)
    assert frames.angle_between(cell_of(env).state.pose[3:], before[3:]) < 1e-9
    env.close()


# ---- where episodes begin


def test_starts_are_drawn_inside_their_ranges_and_the_gains_are_applied():
    env = made(override_cfg={"compliance_param": {"translational_stiffness": 1500.0}})
    found = []
    for _ in range(60):
        env.reset()
        here = cell_of(env).state.pose
        turn = frames.rotation_vector(frames.multiply(here[3:], frames.conjugate(np.array(DOWN))))
        found.append([*(here[:3] - TARGET[:3]), *turn])
    low, high = np.min(found, 0), np.max(found, 0)
    assert (np.abs(low[:2]) <= 0.05).all() and (high[:2] <= 0.05).all() and high[0] > 0.03 and low[1] < -0.03
    np.testing.assert_allclose([low[2], high[2]], 0.1, atol=1e-9)
    assert 0.4 < high[5] <= math.pi / 6 + 1e-6 and low[5] < -0.4
    assert cell_of(env).arm.compliance.translational_stiffness == 1500.0
    env.close()


def test_by_the_clock_the_arm_lifts_and_goes_there_with_other_gains(monkeypatch):
    clock = Clock()
    env = made(pace="realtime", override_cfg={"driver_options": {"clock": clock}})
    cell, gains = cell_of(env), []
    cell._pace = cell.metronome.pace = RealTime(clock, clock.advance)
    cell.hold()
    monkeypatch.setattr(cell.arm, "set_compliance", gains.append)
    env.reset(0)
    low = pose(0.53, -0.02, 0.07)
    cell.arm.restart(low)
    cell.measure()
    before, heights = clock.now, []
    sent = cell.arm.set_target_pose
    monkeypatch.setattr(cell.arm, "set_target_pose", lambda target: (heights.append(target[2]), sent(target))[1])
    env.reset(1)
    start = env._simulator._draw_start(np.random.default_rng(env._episode_seed[0]))
    assert np.linalg.norm(cell.state.pose[:3] - start[:3]) < 0.005
    assert 2.5 <= clock.now - before < 8.0
    assert max(heights[:12]) > 0.14 and np.abs(np.diff(heights)).max() < 0.0161  # up first; two periods at 0.08 m/s
    assert [gain.translational_stiffness for gain in gains[-2:]] == [PRECISION.translational_stiffness, 2000.0]
    env.close()


# ---- who acts


def test_what_an_operator_does_is_recorded_as_theirs():
    env = made()
    world = env._simulator
    rest = Command(np.zeros(6))  # the first is asked for by the reset
    commands = iter([rest, rest, Command(np.array([0, 1.0, 0, 0, 0, 0])), *[rest] * 9])
    world.operator = ScriptedOperator(lambda: next(commands))
    env.reset(0)
    steps = [act(env, 0.3, 0.1) for _ in range(8)]
    assert [bool(step.intervened[0, 0]) for step in steps] == [False] + [True] * 5 + [False] * 2  # 0.5 s after the last
    assert torch.allclose(steps[0].executed[0, 0, :2], torch.tensor([0.3, 0.1]))
    theirs = steps[1].executed[0, 0].double().numpy()
    np.testing.assert_allclose(frames.in_base_axes(theirs, cell_of(env).state.pose), (0, 1, 0, 0, 0, 0), atol=1e-6)
    assert (steps[2].executed == 0).all()
    assert float(steps[-1].info["episode/interventions"]) == 5
    assert not hasattr(made(teleop="scripted"), "state_dict")  # hands cannot be replayed
    env.close()


def test_an_operator_may_end_an_episode():
    for mark, reward in (("success", 1.0), ("failure", 0.0)):
        env = made(teleop="scripted", override_cfg={"reward": "keyboard"})
        env._simulator.operator = ScriptedOperator(lambda mark=mark: Command(np.zeros(6), mark=mark))
        env.reset(0)
        step = act(env)
        assert bool(step.terminated[0, 0]) and float(step.reward[0, 0]) == reward
        assert bool(step.info["episode/success_once"][0]) == (mark == "success")
        env.close()


def test_the_gripper_is_a_seventh_element_that_costs():
    env = made(override_cfg={"no_gripper": False, "random_xy_range": 0.0})
    env.reset(0)
    rewards = [float(act(env, 0, 0, 0, 0, 0, 0, value).reward) for value in (0.4, -0.6, 0.4, 0.6)]
    assert rewards == pytest.approx([0.0, -0.1, 0.0, -0.1])
    assert cell_of(env).state.gripper == 1.0
    env.close()


# ---- safety


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(*[st.floats(-1e3, 1e3, width=32)] * 6), min_size=1, max_size=30), st.integers(0, 99))
def test_no_action_brings_a_target_out_of_the_box(actions, seed):
    env = made(max_episode_steps=50)
    cell, sent = cell_of(env), []
    passed_on = cell.arm.set_target_pose
    cell.arm.set_target_pose = lambda target: (sent.append(target.copy()), passed_on(target))[1]
    env.reset(seed)
    for action in actions:
        step = act(env, *action)
        assert (step.executed.abs() >= 0).all()
    limits = cell.gate.limits
    targets = np.array(sent)
    assert (targets[:, :3] >= np.array(limits.box_low) - 1e-9).all()
    assert (targets[:, :3] <= np.array(limits.box_high) + 1e-9).all()
    env.close()


def test_force_stops_the_arm_and_ends_the_episode_and_without_a_robot_nobody_has_to_look():
    env = made()
    env.reset(0)
    cell = cell_of(env)
    cell.arm.load[:3] = (0, 0, 70)
    step = act(env, 1.0)
    assert bool(step.terminated[0, 0]) and float(step.reward[0, 0]) == 0
    assert float(step.info["episode/stops"]) == 1 and not bool(step.info["success"])
    cell.arm.load[:] = 0
    env.reset()
    assert not cell.gate.stopped
    assert not act(env, 0.5).done.any()
    env.close()


def test_a_stop_at_the_target_is_no_success():
    env = made(override_cfg={"reset_ee_pose": [0.5, 0, 0.055, math.pi, 0, 0], "enable_random_reset": False})
    env.reset(0)
    cell_of(env).arm.load[:3] = (0, 0, 70)
    step = act(env)
    assert bool(step.terminated[0, 0]) and float(step.reward[0, 0]) == 0 and not bool(step.info["success"])
    cell_of(env).arm.load[:] = 0
    env.reset()
    step = act(env)
    assert float(step.reward[0, 0]) == 1 and bool(step.info["success"])
    env.close()


def a_cell(arm, clock, **keys):
    pace = SimulatedTime(clock, clock.advance)
    cell = RobotCell(arm, {}, LIMITS, pace, period_s=0.1, robot_wait_s=2.0, stop_wait_s=3.0, **keys)
    cell.open()
    return cell


class Stoppable(FakeArm):
    """As behind our server: stopped in one place for both gates."""

    def stop(self, reason):
        self.fault = f"stopped (person: {reason})"


def test_a_stopped_robot_waits_for_a_person_and_not_for_ever():
    clock = Clock()
    arm = Stoppable(clock=clock)
    cell = a_cell(arm, clock)
    arm.load[2] = 70
    cell.measure()
    assert cell.gate.stopped.startswith("force") and "the environment's gate" in arm.fault
    with pytest.raises(ArmError, match="nobody cleared it in 3 s"):
        cell.clear_stop()
    arm.load[2] = 0
    cell._pace.wait_until = lambda due: (setattr(arm, "fault", ""), clock.advance(0.2))[1]  # a person has looked
    cell.clear_stop()
    assert not cell.gate.stopped
    cell.close()


def test_a_robot_without_a_server_is_not_cleared_by_a_program():
    clock = Clock()
    arm = FakeArm(clock=clock)
    cell = a_cell(arm, clock)
    arm.fault = "reflex"
    cell.measure()
    with pytest.raises(ArmError, match=r"stopped and is held \(arm_error: reflex\)"):
        cell.clear_stop()
    assert arm.fault == "reflex"
    assert cell.close().startswith("left in error")


# ---- what fails


def test_a_robot_that_is_silent_for_a_while_is_held_and_gone_on_with():
    clock = Clock()
    arm = FakeArm(clock=clock)
    cell = a_cell(arm, clock)
    cell.command(pose(0.52, 0, 0.2))
    arm.unreachable = True
    waited = []

    def come_back(due):
        waited.append(due)
        clock.advance(due - clock.now)
        arm.unreachable = len(waited) < 4

    cell._pace.wait_until = come_back
    here = cell.measure().pose
    assert len(waited) == 4
    clock.advance(1.0)
    np.testing.assert_allclose(cell.measure().pose, here, atol=1e-9)  # it does not go on to the old target
    cell.close()


def test_a_dead_server_in_an_episode_ends_it_with_one_line():
    with served(FakeArm()) as (_, url):
        env = made(
            override_cfg={
                "driver": "serl_http",
                "robot_url": url,
                "target_ee_pose": (0.5, 0, 0.1, math.pi, 0, 0),
                "robot_wait_s": 0.3,
                "reset_s": 0.1,
                "lift_s": 0.1,
                "enable_random_reset": False,
                "gripper_sleep": 0.0,
            }
        )
        env.reset(0)
        assert not act(env, 0.1).done.any()
    with pytest.raises(ArmError, match=r"the robot did not come back in 0\.3 s"):
        act(env, 0.1)
    env.close()


class DeadCamera:
    restarts, image = 3, np.zeros((4, 4, 3), np.uint8)

    def __init__(self, failures):
        self.failures = failures

    def newest(self, wait_s=0.0):
        self.failures -= 1
        if self.failures >= 0:
            raise CameraError("camera wrist_1: no picture")
        return self

    def start(self):
        """Nothing."""

    close = start


def test_a_dead_camera_holds_the_arm_and_is_not_waited_for_without_end():
    clock = Clock()
    arm = FakeArm(clock=clock)
    cell = a_cell(arm, clock)
    cell.cameras = {"wrist_1": DeadCamera(4)}
    cell.command(pose(0.53, 0, 0.2))
    clock.advance(0.02)
    cell.measure()
    here = cell.state.pose
    assert cell.pictures()["wrist_1"].shape == (4, 4, 3)  # after four attempts
    clock.advance(2.0)
    np.testing.assert_allclose(cell.measure().pose, here, atol=1e-9)
    cell.cameras = {"wrist_1": DeadCamera(10**6)}
    with pytest.raises(CameraError, match=r"camera wrist_1 did not come back in 2 s"):
        cell.pictures()
    assert cell.camera_restarts == 3
    cell.close()


def test_a_film_waits_for_its_camera_as_the_policy_does():
    clock = Clock()
    cell = a_cell(FakeArm(clock=clock), clock)
    cell.cameras = {"wrist_1": DeadCamera(4)}
    config = RealWorldConfig(override_cfg={"driver": "fake"})
    assert _film(config, cell, cell.arm)().shape == (4, 4, 3)
    cell.close()


def test_closing_holds_or_parks_the_arm():
    for at_end, said in (("hold", "held"), ("joints", "parked at the reset joints")):
        clock = Clock()
        arm = FakeArm(clock=clock)
        cell = a_cell(arm, clock, at_end=at_end)
        cell.command(pose(0.53, 0, 0.2))
        clock.advance(0.02)
        assert cell.close() == said and cell.close() == ""
        here = arm.state().pose
        clock.advance(5.0)
        np.testing.assert_allclose(arm.state().pose, here, atol=1e-9)
        if at_end == "joints":
            np.testing.assert_allclose(here[:3], (0.5, 0, 0.2))


PLAYER = """
    import sys, torch
    from rlinf.envs.realworld.config import RealWorldConfig
    from rlinf.envs.realworld.env import make
    cell = {"driver": "serl_http", "robot_url": sys.argv[1], "target_ee_pose": (0.5, 0, 0.1, 3.14159, 0, 0),
            "cameras": {}, "reset_s": 0.1, "lift_s": 0.1, "enable_random_reset": False, "gripper_sleep": 0.0}
    env = make(RealWorldConfig(override_cfg=cell, max_episode_steps=10000), num_envs=1, seed=0, control_mode=None,
               num_workers=0, render=False)
    env.reset(0)
    print("playing", flush=True)
    while True:
        env.step(torch.tensor([[[0.2, 0.0, 0.3, 0.0, 0.0, 0.0]]]))
"""


def test_when_the_environments_process_is_killed_the_server_holds_the_arm():
    with served(FakeArm()) as (station, url):
        command = [sys.executable, "-c", textwrap.dedent(PLAYER), url]
        player = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert player.stdout.readline() == "playing\n"
        time.sleep(0.3)
        os.kill(player.pid, signal.SIGKILL)
        player.wait(30)
        deadline = time.monotonic() + 5
        while not station.report()["counts"].get("watchdog") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert station.report()["counts"]["watchdog"] >= 1
        time.sleep(0.3)
        here = station.state().pose
        time.sleep(0.3)
        np.testing.assert_allclose(station.state().pose, here, atol=1e-6)


# ---- pace


def test_steps_begin_at_their_rate_and_late_ones_are_counted():
    clock = Clock(0.0)
    beat = Metronome(RealTime(clock, clock.advance), 0.1)
    beat.begin()
    for work in (0.03, 0.09, 0.105, 0.25, 0.0):
        clock.advance(work)
        beat.wait()
    assert clock.now == pytest.approx(0.1 + 0.1 + 0.105 + 0.25 + 0.1, abs=0.006)
    assert beat.missed == 1 and len(beat.late_s) == 5
    assert beat.jitter_ms()["p50"] == pytest.approx(0, abs=1e-6)
    assert beat.jitter_ms()["max"] == pytest.approx(155, abs=1)


def test_in_simulated_time_nobody_waits():
    env = made()
    begun = time.monotonic()
    env.reset(0)
    info = [act(env) for _ in range(99)][-1].info
    assert time.monotonic() - begun < 5
    assert float(info["episode/jitter_max_ms"]) < 1e-6 and float(info["episode/missed_deadlines"]) == 0
    env.close()


# ---- configuration


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ({"drivr": "twin"}, "drivr"),
        ({"compliance_param": {"translational_stifness": 1.0}}, "did you mean translational_stiffness"),
        ({"safety": {"max_sped": 1.0}}, "did you mean max_speed"),
        ({"driver_options": {"realtim": True}}, "did you mean realtime"),
        ({"driver": "fake", "cameras": {"wrist_1": {"driver": "twin"}}}, "only driver twin"),
        ({"cameras": {"wrist_1": {"driver": "twin", "options": {"vew": "front"}}}}, "did you mean view"),
        ({"compliance_param": {"translational_stiffness": 9000.0}}, "max_force_n"),
        (
            {
                "ee_pose_limit_min": (0.4, -0.1, 0, -0.01, -0.01, -0.1),
                "ee_pose_limit_max": (0.6, 0.1, 1, 0.01, 0.01, 0.5),
            },
            "turns about z from -0.1 to 0.5 rad",
        ),
        ({"ee_pose_limit_min": (0.6, 0, 0, 0, 0, 0), "ee_pose_limit_max": (0.5, 1, 1, 1, 1, 1)}, "ee_pose_limit_min"),
    ],
)
def test_wrong_keys_of_the_cell_are_named(cell, said, monkeypatch):
    monkeypatch.delenv("RLINF_ROBOT_URL", raising=False)
    with pytest.raises(ValidationError) as error:
        PegInsertionConfig(**cell)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ({"driver": "serl_http"}, ["target_ee_pose", "RLINF_ROBOT_URL", "driver=twin"]),
        ({"driver": "serl_http", "target_ee_pose": (0.5, 0, 0.1, 3.14, 0, 0)}, ["robot_url"]),
        ({"driver": "franky", "target_ee_pose": (0.5, 0, 0.1, 3.14, 0, 0)}, ["robot_ip"]),
    ],
)
def test_a_robot_of_which_too_little_is_said_is_not_moved(cell, said, monkeypatch):
    monkeypatch.delenv("RLINF_ROBOT_URL", raising=False)
    with pytest.raises(ConfigError) as error:
        made(override_cfg=cell)
    assert all(word in str(error.value) for word in said)
    elsewhere = PegInsertionConfig(driver="serl_http", target_ee_pose=(0.5, 0, 0.1, 3.14, 0, 0))
    assert not elsewhere.unsaid(here=False)
    monkeypatch.setenv("RLINF_ROBOT_URL", "http://robot:5000")
    assert not elsewhere.unsaid()


def test_a_process_holds_one_arm():
    with pytest.raises(ConfigError, match="a cell has one arm"):
        made(num_envs=2)
    with pytest.raises(ValidationError, match="moves a real arm"):
        robot = {"driver": "franky", "robot_ip": "10.0.0.2", "target_ee_pose": (0.5, 0, 0.1, 3.14, 0, 0)}
        RealWorldConfig(pace="free", override_cfg=robot)


# ---- the twin


@pytest.mark.parametrize("path", [pytest.param(path, marks=needs_twin) for path in ("policy", "operator")])
def test_the_expert_solves_the_twin_as_policy_and_as_operator(path):
    hands = {"teleop": "scripted"} if path == "operator" else {"show_goal": True}
    env = made(override_cfg={"driver": "twin"}, **hands)
    expert, obs, solved = PegInsertionExpert(), env.reset(0), 0
    for _ in range(4):
        for _ in range(100):
            action = torch.zeros(1, 6) if path == "operator" else torch.from_numpy(expert.act(obs["state"].numpy()))
            step = env.step(action[:, None])
            obs = step.obs
            assert bool(step.intervened.all()) == (path == "operator")
            if step.done.any():
                break
        solved += bool(step.info["episode/success_once"])
    assert solved == 4
    env.close()
