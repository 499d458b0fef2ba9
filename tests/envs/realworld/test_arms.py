"""One suite for every arm that runs here, and what each adds."""

import threading
import time

import numpy as np
import pytest

from rlinf.core.errors import ConfigError, MissingDependency
from rlinf.envs.realworld import frames
from rlinf.envs.realworld.arm import ArmError, Compliance
from rlinf.envs.realworld.arms.fake import FakeArm
from rlinf.envs.realworld.arms.serl_http import HttpRefusal, SerlHttpArm
from rlinf.envs.realworld.settings import ARMS, make_arm
from tests.envs.realworld.cell import LIMITS, Clock, pose, served

NEAR_M, NEAR_RAD = 0.004, 0.02


class Rig:
    """An arm, how its time passes, and how somebody makes it fail."""

    def __init__(self, arm, wait, fail, fault_of):
        self.arm, self.wait, self.fail, self.fault_of = arm, wait, fail, fault_of

    def go(self, target, seconds=2.0):
        """As an environment does: a target ten times a second, until it is there."""
        for _ in range(round(seconds / 0.1)):
            self.arm.set_target_pose(target)
            self.wait(0.1)
            here = self.arm.state().pose
            if np.linalg.norm(here[:3] - target[:3]) < NEAR_M and frames.angle_between(here[3:], target[3:]) < NEAR_RAD:
                return here
        raise AssertionError(f"at {here} and not at {target}")


def _fail(arm):
    def fail(text):
        arm.fault = text

    return fail


@pytest.fixture(params=["fake", "serl_http", pytest.param("twin", marks=pytest.mark.sim)])
def rig(request):
    if request.param == "fake":
        clock = Clock()
        arm = FakeArm(home=tuple(pose(0.5, 0, 0.155)), clock=clock)
        yield Rig(arm, clock.advance, _fail(arm), lambda: arm.fault)
    elif request.param == "twin":
        from rlinf.envs.realworld.arms.twin import TwinArm

        arm = TwinArm(realtime=False)
        yield Rig(arm, arm.advance, _fail(arm), lambda: arm.fault)
    else:
        behind = FakeArm(home=tuple(pose(0.5, 0, 0.155)), lag_s=0.02)
        with served(behind) as (_, url):
            arm = SerlHttpArm(url, person="Ada")
            yield Rig(arm, time.sleep, _fail(behind), lambda: behind.fault)
            arm.close()


def test_a_state_is_whole(rig):
    rig.arm.connect()
    state = rig.arm.state()
    shapes = [np.shape(x) for x in (state.pose, state.velocity, state.force_n, state.torque_nm, state.q, state.dq)]
    assert shapes == [(7,), (6,), (3,), (3,), (7,), (7,)] and state.jacobian.shape == (6, 7)
    assert state.is_finite() and state.error == "" and 0 <= state.gripper <= 1
    assert np.linalg.norm(state.pose[3:]) == pytest.approx(1)
    rig.arm.close()


def test_connecting_and_closing_move_nothing(rig):
    rig.arm.connect()
    before = rig.arm.state().pose
    rig.wait(0.2)
    np.testing.assert_allclose(rig.arm.state().pose, before, atol=1e-3)
    rig.arm.close()
    rig.arm.close()


def test_it_goes_where_it_is_told_in_all_directions(rig):
    rig.arm.connect()
    here = rig.arm.state().pose
    for motion in (
        [0.02, 0, 0, 0, 0, 0],
        [-0.01, 0.02, -0.02, 0, 0, 0],
        [0, 0, 0.01, 0, 0, 0.15],
        [0, -0.01, 0, 0.1, -0.1, 0],
    ):
        rig.go(frames.moved(here, np.array(motion)))
    rig.arm.close()


def test_velocity_is_what_the_joints_do_and_points_to_the_target(rig):
    rig.arm.connect()
    here = rig.arm.state().pose
    rig.arm.set_target_pose(frames.moved(here, np.array([0, 0, 0.03, 0, 0, 0])))
    rig.wait(0.05)
    state = rig.arm.state()
    assert state.velocity[2] > 0.01
    np.testing.assert_allclose(state.jacobian @ state.dq, state.velocity, atol=1e-6)
    rig.arm.close()


def test_time_stamps_go_on(rig):
    rig.arm.connect()
    first = rig.arm.state().time_s
    rig.wait(0.1)
    assert 0.05 < rig.arm.state().time_s - first < 0.5
    rig.arm.close()


def test_it_stays_at_the_last_target(rig):
    rig.arm.connect()
    target = frames.moved(rig.arm.state().pose, np.array([0.01, 0.01, 0, 0, 0, 0.05]))
    rig.go(target)
    rig.wait(0.7)
    np.testing.assert_allclose(rig.arm.state().pose[:3], target[:3], atol=NEAR_M)
    rig.arm.close()


def test_joint_reset_brings_it_home(rig):
    rig.arm.connect()
    home = rig.arm.state().pose
    rig.go(frames.moved(home, np.array([0.02, -0.02, 0.01, 0, 0, 0.1])))
    rig.arm.joint_reset()
    here = rig.arm.state().pose
    np.testing.assert_allclose(here[:3], home[:3], atol=0.01)
    assert frames.angle_between(here[3:], home[3:]) < 0.05
    rig.go(home)  # and it takes targets again
    rig.arm.close()


def test_the_gripper_closes_and_opens(rig):
    rig.arm.connect()
    for opening in (0.0, 1.0, 0.4):
        rig.arm.gripper(opening)
        rig.wait(0.1)
        assert rig.arm.state().gripper == pytest.approx(opening, abs=0.01)
    rig.arm.close()


def test_gains_are_taken(rig):
    rig.arm.connect()
    rig.arm.set_compliance(Compliance(translational_stiffness=1500, translational_clip=(0.01, 0.01, 0.01)))
    rig.go(frames.moved(rig.arm.state().pose, np.array([0.02, 0, 0, 0, 0, 0])))
    rig.arm.close()


def test_an_error_is_shown_and_only_recovery_clears_it(rig):
    rig.arm.connect()
    here = rig.arm.state().pose
    rig.fail("cartesian_reflex")
    rig.wait(0.1)
    assert "cartesian_reflex" in rig.arm.state().error
    for command in (
        lambda: rig.arm.set_target_pose(frames.moved(here, np.array([0.02, 0, 0, 0, 0, 0]))),
        lambda: rig.arm.joint_reset(),
        lambda: rig.arm.gripper(0.0),
    ):
        with pytest.raises(ArmError, match="cartesian_reflex"):
            command()
    rig.wait(0.2)
    assert rig.fault_of() == "cartesian_reflex"  # nobody cleared it on the way
    np.testing.assert_allclose(rig.arm.state().pose[:3], here[:3], atol=NEAR_M)
    rig.arm.recover()
    rig.wait(0.1)
    assert rig.arm.state().error == "" and rig.fault_of() == ""
    rig.go(frames.moved(here, np.array([0.01, 0, 0, 0, 0, 0])))
    rig.arm.close()


# ---- drivers by name


@pytest.mark.parametrize("driver", ARMS)
def test_every_driver_can_be_made_without_its_robot(driver):
    options = {"serl_http": {"url": "http://127.0.0.1:1"}, "franky": {"host": "192.0.2.1"}, "panda_py": {"host": "x"}}
    arm = make_arm(driver, options.get(driver, {"realtime": False} if driver == "twin" else {}))
    for method in (
        "connect",
        "state",
        "set_target_pose",
        "set_compliance",
        "joint_reset",
        "recover",
        "gripper",
        "close",
    ):
        assert callable(getattr(arm, method))


@pytest.mark.parametrize(
    ("driver", "options", "message"),
    [
        ("frankly", {}, "did you mean franky"),
        ("", {}, "known: fake, twin"),
        ("franky", {}, "needs host"),
        ("franky", {"hots": "1"}, "did you mean host"),
    ],
)
def test_what_is_wrong_about_a_driver_is_said(driver, options, message):
    with pytest.raises(ConfigError, match=message):
        make_arm(driver, options)


@pytest.mark.parametrize(("driver", "package"), [("franky", "franky-control"), ("panda_py", "panda-python")])
def test_a_missing_library_is_named_with_its_command(driver, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, driver, None)
    with pytest.raises(MissingDependency, match=f"run `pip install {package}`"):
        make_arm(driver, {"host": "192.0.2.1"}).connect()


# ---- compliance


def test_gains_speak_serl():
    names = Compliance().to_serl()
    assert names["translational_stiffness"] == 2000 and names["rotational_clip_neg_z"] == 0.02
    assert len(names) == 2 * (2 + 1 + 6)
    assert Compliance().from_serl({}) == Compliance()
    changed = Compliance().from_serl({"translational_Ki": 0.1, "translational_clip_neg_y": 0.01})
    assert changed.translational_ki == 0.1 and changed.translational_clip_neg == (0.003, 0.01, 0.01)
    assert changed.translational_clip == Compliance().translational_clip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"translational_stifness": 1}, "did you mean translational_stiffness"),
        ({"rotational_Ki": "much"}, "no number"),
        ({"rotational_damping": True}, "no number"),
        ({"rotational_damping": -1}, "not negative"),
        ({"rotational_damping": 10**400}, "beyond every number"),
        ({"translational_clip_x": float("nan")}, "finite"),
    ],
)
def test_gains_that_are_none(given, message):
    with pytest.raises(ArmError, match=message):
        Compliance().from_serl(given)


def test_the_springs_press_with_stiffness_times_clip():
    assert Compliance().largest_force_n() == pytest.approx(2000 * 0.01)
    assert Compliance().largest_torque_nm() == pytest.approx(150 * 0.02)
    assert Compliance(rotational_clip_neg=(0, 0.1, 0)).largest_torque_nm() == pytest.approx(15)


# ---- the twin


@pytest.mark.sim
def test_the_twin_presses_as_its_gains_say():
    from rlinf.envs.realworld.arms.twin import TwinArm
    from rlinf.envs.realworld.arms.twin_scene import FRICTION

    twin = TwinArm(realtime=False)
    twin.connect()
    twin.restart(pose(0.5, 0.06, 0.06))
    for stiffness, clip in ((2000, 0.01), (1000, 0.005)):
        twin.set_compliance(Compliance(translational_stiffness=stiffness, translational_clip_neg=(0.003, 0.003, clip)))
        twin.set_target_pose(pose(0.5, 0.06, 0.0))
        twin.advance(2.0)
        state = twin.state()
        # The table pushes back along the base's +z, which is −z of a tool that points down.
        assert state.force_n[2] == pytest.approx(-stiffness * clip, rel=0.02)
        assert np.linalg.norm(state.force_n[:2]) < 1.5 * FRICTION[0] * stiffness * clip  # it also slides
        assert twin.tip()[2] == pytest.approx(0, abs=1e-3)


@pytest.mark.sim
def test_the_twins_peg_goes_into_its_hole_and_not_beside_it():
    from rlinf.envs.realworld.arms.twin import TwinArm
    from rlinf.envs.realworld.arms.twin_scene import HOLE_DEPTH_M, INSERTED_POSE

    twin = TwinArm(realtime=False)
    inserted = np.array(INSERTED_POSE)
    for aside, reached in ((0.0, 0.0), (0.006, HOLE_DEPTH_M)):
        above = inserted + np.array([aside, 0, HOLE_DEPTH_M + 0.01, 0, 0, 0, 0])
        twin.restart(above)
        twin.connect()
        for share in np.linspace(0, 1, 100):
            twin.set_target_pose(above - share * np.array([0, 0, HOLE_DEPTH_M + 0.01, 0, 0, 0, 0]))
            twin.advance(0.01)
        twin.advance(0.3)
        assert twin.tip()[2] == pytest.approx(reached, abs=2e-3)


@pytest.mark.sim
def test_the_twin_lives_at_the_pace_of_the_clock():
    from rlinf.envs.realworld.arms.twin import TwinArm

    twin = TwinArm()
    twin.connect()
    target = frames.moved(twin.state().pose, np.array([0.02, 0, 0, 0, 0, 0]))
    twin.set_target_pose(target)
    deadline = time.monotonic() + 5
    while np.abs(twin.state().pose[:3] - target[:3]).max() > NEAR_M and time.monotonic() < deadline:
        time.sleep(0.05)
    np.testing.assert_allclose(twin.state().pose[:3], target[:3], atol=NEAR_M)
    twin.close()
    stopped = twin.data.time
    time.sleep(0.05)
    assert twin.data.time == stopped > 0


# ---- over HTTP


def test_nobody_there_is_said_in_one_line():
    with pytest.raises(ArmError, match=r"http://127.0.0.1:1/getstate: no answer .*is the robot server running"):
        SerlHttpArm("127.0.0.1:1").connect()
    with pytest.raises(ArmError, match="no address of a robot server"):
        SerlHttpArm("ftp://somewhere")


def test_a_server_that_dies_and_comes_back():
    behind = FakeArm()
    with served(behind) as (_, url):
        arm = SerlHttpArm(url, timeout_s=0.5)
        arm.connect()
    with pytest.raises(ArmError, match="no answer"):
        arm.state()
    port = int(url.rsplit(":", 1)[1])
    from rlinf.envs.realworld.server.http_server import RobotServer, Routes
    from rlinf.envs.realworld.server.station import Station

    station = Station(behind, LIMITS)
    station.start()
    server = RobotServer(("127.0.0.1", port), Routes(station, {}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    assert arm.state().error == ""
    server.shutdown()
    server.server_close()
    station.close()


def test_the_state_is_read_while_the_joints_are_reset():
    behind, gate = FakeArm(), threading.Event()
    behind.joint_reset = lambda q=None: gate.wait(5)
    with served(behind) as (station, url):
        arm = SerlHttpArm(url, timeout_s=2.0)
        arm.connect()
        thread = threading.Thread(target=arm.joint_reset)
        thread.start()
        while not station.report()["busy"]:
            time.sleep(0.01)
        assert arm.state().error == "" and thread.is_alive()
        gate.set()
        thread.join()


def test_a_target_chosen_on_an_old_measurement_is_refused_by_the_server():
    with served(FakeArm()) as (_, url):
        arm = SerlHttpArm(url)
        arm.connect()
        state = arm.state()
        arm.set_target_pose(state.pose)
        time.sleep(LIMITS.max_target_age_s + 0.1)
        with pytest.raises(HttpRefusal, match="old"):
            arm.set_target_pose(state.pose)
        assert arm.safety()["counts"]["stale_target"] == 1
        arm.state()
        arm.set_target_pose(state.pose)
        assert time.monotonic() - arm.state().time_s < 0.2


def test_serls_own_server_is_understood():
    """It reports no times and no errors, a Jacobian as a list, and the Franka hand's width in metres."""
    import http.server
    import json

    got = []
    old = {"pose": [0.5, 0, 0.2, 1, 0, 0, 0], "vel": [0] * 6, "force": [0] * 3, "torque": [0] * 3, "q": [0] * 7,
           "dq": [0] * 7, "jacobian": [[0] * 7] * 6, "gripper_pos": 0.08}  # fmt: skip

    class Serl(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            got.append((self.path, json.loads(body)))
            answer = (json.dumps(old) if self.path == "/getstate" else "Moved").encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Serl)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    arm = SerlHttpArm(f"http://127.0.0.1:{server.server_port}", gripper_full=0.08)
    arm.connect()
    state = arm.state()
    assert state.gripper == pytest.approx(1) and state.error == ""
    arm.set_target_pose(state.pose)
    arm.recover()
    arm.gripper(0.5)
    arm.set_compliance(Compliance())
    assert got[2:] == [
        ("/pose", {"arr": [0.5, 0, 0.2, 1, 0, 0, 0]}),
        ("/clearerr", {}),
        ("/move_gripper", {"gripper_pos": 128}),
        ("/update_param", Compliance().to_serl()),
    ]
    server.shutdown()
    server.server_close()
