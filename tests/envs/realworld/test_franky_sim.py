"""The real libfranka, through franky, against franky-sim, which speaks a Franka's network protocol.

    pip install franky-control franky-sim

It is not strict about real time and feels no forces in free space, so it shows the wiring and not the safety.
"""

import time

import numpy as np
import pytest

from rlinf.envs.realworld import frames
from rlinf.envs.realworld.arm import ArmError, Compliance
from rlinf.envs.realworld.arms.franky import FrankyArm
from rlinf.envs.realworld.safety import SafetyLimits
from tests.envs.realworld.cell import SerlClient, served

CLIPS = {"translational_clip": (0.01,) * 3, "translational_clip_neg": (0.01,) * 3}


@pytest.fixture(scope="module")
def host():
    from franky_sim import SimulationServer
    from franky_sim.mujoco_simulator import MujocoSimulator

    with MujocoSimulator(enable_visualization=False) as simulator:
        robot = simulator.add_robot()
        with SimulationServer(simulator) as server:
            server.run_async()
            yield robot.hostname


@pytest.fixture
def arm(host):
    arm = FrankyArm(host, speed=0.3)
    arm.connect()
    yield arm
    arm.close()


def test_reset_two_hundred_targets_gripper_and_gains(arm):
    arm.joint_reset()
    state = arm.state()
    np.testing.assert_allclose(state.q, [0, 0, 0, -1.9, 0, 2, 0], atol=0.06)
    arm.set_compliance(Compliance(**CLIPS))
    seen = []
    for k in range(200):
        wave = np.array([0.04 * np.sin(k / 25), 0, 0.03 * np.sin(k / 16), 0, 0, 0.1 * np.sin(k / 30)])
        target = frames.moved(state.pose, wave)
        arm.set_target_pose(target)
        time.sleep(0.02)
        now = arm.state()
        assert now.error == ""
        np.testing.assert_allclose(now.jacobian @ now.dq, now.velocity, atol=1e-9)
        seen.append(now.pose[:3])
    # How far behind it is on the way depends on how fast the simulator runs on a busy machine.
    assert np.ptp(seen, 0)[[0, 2]].min() > 0.01
    deadline = time.monotonic() + 10
    while np.linalg.norm(arm.state().pose[:3] - target[:3]) > 0.01:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for opening in (0.0, 1.0):
        arm.gripper(opening)
        deadline = time.monotonic() + 5
        while abs(arm.state().gripper - opening) > 0.05:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_controller_that_ended_is_an_error_until_recovery(arm):
    arm._robot.stop()
    deadline = time.monotonic() + 5
    while "ended by itself" not in arm.state().error:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(ArmError, match="a person must look"):
        arm.set_target_pose(arm.state().pose)
    arm.recover()
    assert arm.state().error == ""
    arm.set_target_pose(arm.state().pose)


def test_behind_the_server(host):
    arm = FrankyArm(host, speed=0.3)
    limits = SafetyLimits(box_low=(0.3, -0.3, 0.2), box_high=(0.8, 0.3, 0.8), max_rotation_rad=(0.5, 0.5, 1.2))
    with served(arm, limits) as (station, url):
        client = SerlClient(url, timeout=60)  # the simulated joints are as slow as the machine is busy
        assert client.post("jointreset") == "Reset Joint"
        here = np.array(client.post("getpos")["pose"])
        for k in range(20):
            assert client.move(here + np.array([0, 0.002 * k, 0, 0, 0, 0, 0])) == "Moved"
            time.sleep(0.05)
        deadline = time.monotonic() + 10
        while client.post("getpos")["pose"][1] < here[1] + 0.02:
            assert time.monotonic() < deadline
            assert client.move(here + np.array([0, 0.038, 0, 0, 0, 0, 0])) == "Moved"
            time.sleep(0.05)
        assert not station.gate.stopped


def test_a_controller_that_is_gone_without_an_error_is_recovered_at_the_server(host):
    """As after a joint reset that failed, or a user stop that was released before anybody looked."""
    arm = FrankyArm(host, speed=0.3)
    limits = SafetyLimits(box_low=(0.3, -0.3, 0.2), box_high=(0.8, 0.3, 0.8), max_rotation_rad=(0.5, 0.5, 1.2))
    with served(arm, limits) as (station, url):
        client = SerlClient(url, timeout=60)
        client.post("jointreset")
        arm._halt()
        deadline = time.monotonic() + 10
        while not station.gate.stopped:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert arm.state().error == ""
        assert client.post("recover", {"person": "Ada"}) == "Recovered"
        time.sleep(0.5)
        assert not station.gate.stopped
        assert client.move(np.array(client.post("getpos")["pose"])) == "Moved"


def test_nobody_there():
    with pytest.raises(ArmError, match=r"no robot at 127\.0\.0\.99"):
        FrankyArm("127.0.0.99").connect()
