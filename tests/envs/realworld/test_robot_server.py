"""The robot server: SERL's routes, refusals, silence, death of whoever talks to it, and what it must not load."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlinf.core.errors import ConfigError
from rlinf.envs.realworld.arm import ArmError
from rlinf.envs.realworld.arms.fake import FakeArm
from rlinf.envs.realworld.arms.serl_http import SerlHttpArm
from rlinf.envs.realworld.cameras.camera import Camera
from rlinf.envs.realworld.cameras.fake import FakeSource
from rlinf.envs.realworld.server import run
from rlinf.envs.realworld.server.station import Station
from rlinf.envs.realworld.settings import CameraSettings, CellSettings, read_cell
from tests.envs.realworld.cell import LIMITS, Clock, SerlClient, pose, served

ROOT = Path(__file__).resolve().parents[3]


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


@pytest.fixture
def cell():
    """A fake arm, its station, and SERL's client of it."""
    arm = FakeArm(lag_s=0.02)
    with served(arm) as (station, url):
        client = SerlClient(url)
        yield arm, station, client
        client.close()


# ---- SERL's client


def test_serls_client_reads_and_moves(cell):
    _, _, client = cell
    state = client.post("getstate")
    assert {"pose", "vel", "force", "torque", "q", "dq", "jacobian", "gripper_pos"} <= state.keys()
    assert np.shape(state["jacobian"]) == (6, 7)
    target = [0.53, 0.01, 0.22, 1, 0, 0, 0]
    for _ in range(5):
        assert client.post("clearerr") == "Clear"
        assert client.post("pose", {"arr": target}) == "Moved"
        time.sleep(0.1)
    np.testing.assert_allclose(client.post("getpos")["pose"], target, atol=2e-3)
    np.testing.assert_allclose(client.post("getpos_euler")["pose"], [*target[:3], np.pi, 0, 0], atol=2e-3)


def test_every_single_quantity_has_its_route(cell):
    _, _, client = cell
    state = client.post("getstate")
    for route, name, key in (
        ("getvel", "vel", "vel"),
        ("getforce", "force", "force"),
        ("gettorque", "torque", "torque"),
        ("getq", "q", "q"),
        ("getdq", "dq", "dq"),
        ("getjacobian", "jacobian", "jacobian"),
        ("get_gripper", "gripper", "gripper_pos"),
    ):
        assert client.post(route)[name] == pytest.approx(state[key]) if route != "getjacobian" else True
        assert client.post(route, method="GET").keys() == {name}


def test_gripper_gains_and_reset(cell):
    arm, _, client = cell
    assert client.post("close_gripper") == "Closed" and arm.state().gripper == 0
    assert client.post("open_gripper") == "Opened" and arm.state().gripper == 1
    assert client.post("move_gripper", {"gripper_pos": 51}) == "Moved Gripper"
    assert arm.state().gripper == pytest.approx(0.2)
    assert client.post("activate_gripper") == "Activated" and client.post("reset_gripper") == "Reset"
    assert client.post("update_param", {"translational_stiffness": 1500}) == "Updated compliance parameters"
    assert arm.compliance.translational_stiffness == 1500 and arm.compliance.translational_damping == 89
    client.move(pose(0.52, 0, 0.2))
    time.sleep(0.2)
    assert client.post("jointreset") == "Reset Joint"
    np.testing.assert_allclose(client.post("getpos")["pose"], [0.5, 0, 0.2, 1, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("route", "body", "status", "message"),
    [
        ("pose", {"arr": [9, 9]}, 409, "7 numbers"),
        ("pose", {"arr": [float("nan")] * 7}, 409, "not finite"),
        ("pose", {}, 400, '{"arr":'),
        ("pose", {"arr": [0.5, 0, 0.2, 1, 0, 0, 0], "based_on_s": "now"}, 400, "based_on_s"),
        ("pose", {"arr": [0.5, 0, 0.2, 1, 0, 0, 0], "based_on_s": 10**400}, 400, "based_on_s"),
        ("pose", {"arr": [10**400] * 7}, 409, "7 numbers"),
        ("pose", [1, 2], 400, "JSON object"),
        ("update_param", {"translational_stifness": 1}, 409, "did you mean translational_stiffness"),
        ("update_param", {"translational_clip_x": 1.0}, 409, "more than max_force_n"),
        ("move_gripper", {"gripper_pos": "wide"}, 400, "gripper_pos"),
        ("move_gripper", {"gripper_pos": 300}, 400, "between 0 and 255"),
        ("set_load", {"mass": 1}, 400, "not supported"),
        ("recover", {}, 409, "name who"),
        ("getstat", {}, 404, "did you mean /getstate"),
        ("camera/wrist", {}, 400, "no camera wrist"),
    ],
)
def test_what_a_request_does_wrong_is_said(cell, route, body, status, message):
    arm, _, client = cell
    before = arm.state().pose
    answer = client.post(route, body)
    assert client.status == status and message in answer["error"]
    np.testing.assert_array_equal(arm.state().pose, before)


def test_looking_is_free_and_moving_is_not(cell):
    _, _, client = cell
    assert "moves the robot" in client.post("pose", method="GET")["error"] and client.status == 405


def test_bodies_that_are_no_json_or_too_long_leave_the_server_well(cell):
    _, station, client = cell
    client._connection.request("POST", "/pose", b"{" * 100)
    answer = client._connection.getresponse()
    assert answer.status == 400 and b"not JSON" in answer.read()
    client._connection.request("POST", "/pose", b"x", {"Content-Length": "99999999"})
    assert client._connection.getresponse().status == 400
    client._connection.close()
    assert client.post("getstate")["error"] == "" and station.report()["counts"] == {}


def test_a_web_page_and_a_stranger_move_nothing():
    with served(FakeArm(), token="secret", operator_token="key") as (station, url):
        target = {"arr": [0.52, 0, 0.2, 1, 0, 0, 0]}
        stranger = SerlClient(url)
        assert "wants the token" in stranger.post("pose", target)["error"] and stranger.status == 401
        wrong = SerlClient(url, {"Authorization": "Bearer sécret"})
        wrong.post("getstate")
        assert wrong.status == 401
        page = SerlClient(url, {"Authorization": "Bearer secret", "Origin": "http://elsewhere"})
        assert "web pages" in page.post("pose", target)["error"] and page.status == 403
        friend = SerlHttpArm(url, token="secret", person="Ada")
        friend.connect()
        friend.set_target_pose(np.array(target["arr"]))
        station.stop("person", "button")
        with pytest.raises(ArmError, match="operator's token"):
            friend.recover()
        operator = SerlHttpArm(url, token="key", person="Ada")
        operator.recover()
        assert station.is_well() == ""


# ---- safety inside the server


def test_silence_holds_the_arm(cell):
    _, station, client = cell
    client.move(pose(0.59, 0, 0.2))
    time.sleep(0.1)
    wait_until(lambda: station.report()["counts"].get("watchdog") == 1)
    time.sleep(0.2)  # on a busy machine it was still under way, and is a lag behind
    held = client.post("getpos")["pose"]
    time.sleep(0.2)
    np.testing.assert_allclose(client.post("getpos")["pose"], held, atol=1e-3)
    assert held[0] < 0.59 + 1e-3
    client.move(pose(0.5, 0, 0.2))
    wait_until(lambda: abs(client.post("getpos")["pose"][0] - held[0]) > 0.005)


def test_a_far_wish_is_walked_to_at_the_speed_limit(cell):
    _, _, client = cell
    track, started = [], time.monotonic()
    while time.monotonic() - started < 0.3:
        client.move(pose(0.6, 0, 0.2))
        track.append((time.monotonic(), client.post("getpos")["pose"][0]))
        time.sleep(0.02)
    (t0, x0), (t1, x1) = track[0], track[-1]
    assert x1 - x0 > 0.01 and (x1 - x0) / (t1 - t0) < 1.5 * LIMITS.max_speed


def test_force_stops_the_arm_and_clearerr_does_not_clear_it(cell):
    arm, station, client = cell
    client.move(pose(0.55, 0, 0.2))
    time.sleep(0.05)
    arm.load[2] = -70.0
    wait_until(lambda: station.gate.stopped)
    held = client.post("getpos")["pose"]
    for _ in range(5):
        assert "stopped (force: force 70.0 N" in client.move(pose(0.6, 0, 0.2))["error"] and client.status == 409
        assert "A person looks" in client.post("clearerr")["error"]
        assert "A person looks" in client.post("startimp")["error"]
        time.sleep(0.02)
    assert "stopped" in client.post("jointreset")["error"] and "stopped" in client.post("open_gripper")["error"]
    np.testing.assert_allclose(client.post("getpos")["pose"], held, atol=5e-3)
    assert client.post("getstate")["error"].startswith("force:")
    assert "free it by hand" in client.post("recover", {"person": "Ada"})["error"]
    arm.load[:] = 0
    time.sleep(0.05)
    assert client.post("recover", {"person": "Ada"}) == "Recovered"
    assert client.move(pose(0.5, 0, 0.2)) == "Moved"
    report = client.post("safety", method="GET")
    assert report["counts"]["force"] == 1 and any(
        e["kind"] == "clear" and "Ada" in e["reason"] for e in report["events"]
    )


def test_an_error_of_the_arm_is_shown_and_kept(cell):
    arm, _, client = cell
    arm.fault = "communication_constraints_violation"
    wait_until(lambda: "communication" in client.post("getstate")["error"])
    assert client.post("clearerr") and client.status == 409
    client.move(pose(0.52, 0, 0.2))
    assert arm.fault
    assert client.post("recover", {"person": "Ada"}) == "Recovered" and arm.fault == ""
    assert client.post("startimp") == "Started impedance"


def test_stopimp_stops_until_a_person_clears(cell):
    _, _, client = cell
    assert client.post("stopimp") == "Stopped impedance"
    assert "stopped" in client.move(pose(0.52, 0, 0.2))["error"]
    client.post("recover", {"person": "Ada"})
    assert client.move(pose(0.52, 0, 0.2)) == "Moved"


def test_a_lost_arm_stops_and_is_asked_again_without_haste():
    arm, clock = FakeArm(), Clock()
    station = Station(arm, LIMITS, clock=clock)
    station.open()
    asked = []
    arm.unreachable, state = True, arm.state
    arm.state = lambda: (asked.append(clock()), state())[1]
    for _ in range(100):
        clock.advance(0.01)
        station.tick()
    assert len(asked) in (2, 3) and "not heard of" in station.gate.stopped
    arm.unreachable = False
    clock.advance(1)
    station.tick()
    assert "not heard of" in station.submit(pose(0.5, 0, 0.2)).reason  # back, and still a person must look
    station.recover("Ada")
    assert station.submit(pose(0.5, 0, 0.2)).accepted


def test_a_loop_that_crashes_says_so_and_takes_no_targets():
    arm = FakeArm()
    with served(arm) as (station, url):
        client = SerlClient(url)
        arm.state = lambda: 1 / 0
        wait_until(lambda: station.crashed)
        assert "ZeroDivisionError" in client.move(pose(0.5, 0, 0.2))["error"]
        assert "the control loop ended" in client.post("safety")["stopped"]
        del arm.state
        assert "the control loop ended" in client.post("recover", {"person": "Ada"})["error"]


def test_during_a_joint_reset_others_wait_and_may_look():
    arm, gate = FakeArm(), threading.Event()
    reset = arm.joint_reset
    arm.joint_reset = lambda q=None: (gate.wait(5), reset(q))[1]
    with served(arm) as (station, url):
        client, other = SerlClient(url), SerlClient(url)
        thread = threading.Thread(target=client.post, args=("jointreset",))
        thread.start()
        wait_until(lambda: station.report()["busy"])
        assert "busy: joint reset" in other.move(pose(0.5, 0, 0.2))["error"]
        assert "busy" in other.post("jointreset")["error"]
        assert other.post("getstate")["age_s"] < 0.2
        assert station.report()["counts"] == {"busy": 1}
        gate.set()
        thread.join()
        assert other.move(pose(0.5, 0, 0.2)) == "Moved"


class Late:
    """A lock; before it is taken for the first time, something else happens."""

    def __init__(self, lock, before):
        self._lock, self._before = lock, [before]

    def acquire(self, blocking=True):
        if self._before:
            self._before.pop()()
        return self._lock.acquire(blocking)

    def release(self):
        self._lock.release()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *_):
        self.release()


@pytest.fixture
def at_the_side():
    """A station whose arm was moved 8 cm from its reset pose, and the targets that it sends from then on."""
    clock, sent = Clock(), []
    arm = FakeArm(clock=clock)
    station = Station(arm, LIMITS, clock=clock)
    station.open()
    for _ in range(60):
        station.submit(pose(0.42, 0, 0.2))
        station.tick()
        clock.advance(0.01)
    pass_on = arm.set_target_pose
    arm.set_target_pose = lambda target: (sent.append(target), pass_on(target))
    return arm, station, clock, sent


def test_a_joint_reset_is_not_undone_by_a_target_of_before(at_the_side):
    arm, station, _, sent = at_the_side
    here = arm.state().pose[0]

    def reset():
        thread = threading.Thread(target=station.joint_reset)
        thread.start()
        thread.join(5)

    station._driver = Late(station._driver, reset)
    station.tick()
    assert here < 0.45 and arm.state().pose[0] == pytest.approx(0.5)
    for target in sent:
        assert target[0] == pytest.approx(0.5)


def test_a_joint_reset_is_not_undone_when_the_measurement_after_it_fails(at_the_side):
    arm, station, clock, sent = at_the_side
    reset = arm.joint_reset

    def and_lose_the_link(q=None):
        clock.advance(3.0)
        reset(q)
        arm.unreachable = True

    arm.joint_reset = and_lose_the_link
    station.joint_reset()
    arm.unreachable = False
    station.tick()
    assert sent[-1][0] == pytest.approx(0.5)


def test_whoever_else_moves_the_arm_does_not_hold_up_the_loop():
    arm, slow = FakeArm(), threading.Event()
    station = Station(arm, LIMITS)
    station.open()
    change = arm.set_compliance
    arm.set_compliance = lambda gains: (slow.wait(5), change(gains))[1]
    thread = threading.Thread(target=station.update_compliance, args=({"translational_stiffness": 500},))
    thread.start()
    wait_until(lambda: not station._driver.acquire(blocking=False) or station._driver.release())
    arm.load[:3] = (0, 0, 99)
    before = time.monotonic()
    station.tick()
    assert time.monotonic() - before < 1.0
    assert station.gate.stopped.startswith("force")  # and the arm is watched meanwhile
    slow.set()
    thread.join()


def test_an_arm_whose_controller_ended_without_an_error_is_recovered_too():
    """The user stop was pressed and released: the robot reports nothing any more, and nothing runs."""
    clock = Clock()
    arm = FakeArm(clock=clock)
    station = Station(arm, LIMITS, clock=clock)
    station.open()
    runs, recover, pass_on = [False], arm.recover, arm.set_target_pose

    def only_if_it_runs(target):
        if not runs[0]:
            raise ArmError("the impedance controller does not run")
        pass_on(target)

    arm.set_target_pose = only_if_it_runs
    arm.recover = lambda: (runs.__setitem__(0, True), recover())[1]
    station.tick()
    assert station.gate.stopped == "arm_error: the impedance controller does not run"
    station.recover("Ada")
    clock.advance(0.01)
    station.tick()
    assert not station.gate.stopped and runs[0]


def test_what_a_drivers_library_throws_is_answered(cell):
    arm, _, client = cell
    arm.gripper = lambda opening: 1 / 0
    assert "ZeroDivisionError" in client.post("open_gripper")["error"] and client.status == 500
    assert client.post("getpos")["pose"]


@pytest.mark.parametrize("quaternion", [[0, 0, 0, 0], [float("nan")] * 4])
def test_a_server_without_a_pose_is_an_error_of_the_arm(quaternion, monkeypatch):
    with served(FakeArm()) as (_, url):
        arm = SerlHttpArm(url)
        answer = arm._eye.json("getstate")
        monkeypatch.setattr(arm._eye, "json", lambda route: {**answer, "pose": [0.5, 0, 0.2, *quaternion]})
        with pytest.raises(ArmError, match="not the answer of a robot server"):
            arm.state()
        arm.close()


def test_a_camera_that_does_not_end_keeps_nobody_from_holding_the_arm(monkeypatch, capsys):
    class Stuck(FakeSource):
        def close(self):
            raise OSError("stuck")

    monkeypatch.setattr(run, "make_camera", lambda *_: Camera("wrist_1", Stuck(8, 8), stale_s=0.0))
    monkeypatch.setattr(run, "FIRST_PICTURE_S", 0.05)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    cell = CellSettings("fake", LIMITS, cameras={"wrist_1": CameraSettings("fake")})
    with pytest.raises(OSError, match="stuck"):
        run.serve(cell, "127.0.0.1", 0)
    assert "robot server ended: arm held at" in capsys.readouterr().out


def test_after_ctrl_c_in_a_request_the_arm_can_still_be_held(monkeypatch):
    """Somebody who stops a collection hits one of three requests a step now and then."""
    with served(FakeArm()) as (station, url):
        arm = SerlHttpArm(url)
        arm.connect()
        here = arm.state().pose
        arm.set_target_pose(here)

        def interrupted():
            raise KeyboardInterrupt

        monkeypatch.setattr(arm._link._connection, "getresponse", interrupted)
        with pytest.raises(KeyboardInterrupt):
            arm.set_target_pose(here)
        arm.set_target_pose(here)
        assert not station.report()["counts"]
        arm.close()


def test_closing_holds_the_arm_or_parks_it():
    for park in (False, True):
        clock = Clock()
        arm = FakeArm(clock=clock)
        station = Station(arm, LIMITS, clock=clock)
        station.open()
        station.submit(pose(0.58, 0, 0.2))
        for _ in range(20):
            station.tick()
            clock.advance(0.01)
        here = arm.state().pose[0]
        assert station.close(park=park) == (
            "parked at the reset joints" if park else f"held at {here:.3f}, 0.000, 0.200 m"
        )
        clock.advance(5)
        assert arm.state().pose[0] == pytest.approx(0.5 if park else here, abs=1e-9)


# ---- cameras


def test_cameras_as_png_and_raw():
    camera = Camera("wrist", FakeSource(48, 64, 100), size=(32, 40), crop=(0, 0, 1, 1))
    camera.start()
    camera.newest(2.0)
    with served(FakeArm(), cameras={"wrist": camera}) as (_, url):
        client = SerlClient(url)
        assert client.post("cameras") == {"cameras": ["wrist"]}
        camera.close()  # so that both pictures are the same one
        png, raw = client.post("camera/wrist", method="GET"), client.post("camera/wrist?format=raw")
        from io import BytesIO

        picture = np.asarray(Image.open(BytesIO(png)))
        assert picture.shape == (32, 40, 3)
        np.testing.assert_array_equal(picture, np.frombuffer(raw, np.uint8).reshape(32, 40, 3))
        time.sleep(0.6)
        assert "wrist" in client.post("camera/wrist")["error"] and client.status == 503


# ---- processes


def start_server(*arguments, **environment):
    process = subprocess.Popen(
        [sys.executable, "-m", "rlinf", "robot_server", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    line = process.stdout.readline()
    assert "ready" in line, process.stderr.read()
    return process, line.split()[3]


CLIENT = """
import sys, time
import numpy as np
from rlinf.envs.realworld.arms.serl_http import SerlHttpArm
arm = SerlHttpArm(sys.argv[1])
arm.connect()
while True:
    arm.state()
    arm.set_target_pose(np.array([0.6, 0, 0.2, 1, 0, 0, 0]))
    print("sent", flush=True)
    time.sleep(0.02)
"""


def test_a_killed_client_leaves_the_arm_held_and_sigterm_ends_the_server():
    process, url = start_server("--driver", "fake")
    try:
        client = subprocess.Popen([sys.executable, "-c", CLIENT, url], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert client.stdout.readline() == "sent\n"
        client.kill()  # SIGKILL: it says no goodbye
        client.wait()
        eye = SerlHttpArm(url)
        wait_until(lambda: eye.safety()["counts"].get("watchdog") == 1)
        time.sleep(0.4)  # until it stands
        held = eye.state().pose
        time.sleep(0.3)
        np.testing.assert_allclose(eye.state().pose, held, atol=1e-3)
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "robot server ended: arm held at" in output
    with pytest.raises(ArmError, match="no answer"):
        eye.state()


def test_a_killed_server_is_noticed_at_once():
    process, url = start_server("--driver", "fake")
    arm = SerlHttpArm(url, timeout_s=2.0)
    arm.connect()
    process.kill()
    process.communicate(timeout=20)
    started = time.monotonic()
    for call in (arm.state, lambda: arm.set_target_pose(pose(0.5, 0, 0.2))):
        with pytest.raises(ArmError, match="is the robot server running there"):
            call()
    assert time.monotonic() - started < 2.0


def test_the_server_loads_only_what_a_robots_computer_has(tmp_path):
    """And every module of ours that it loads is Python 3.8."""
    code = (
        "import sys, json\n"
        "class Only:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        top = name.split('.')[0]\n"
        "        if top not in sys.stdlib_module_names | {'rlinf', 'numpy'}: raise ImportError('not here: ' + name)\n"
        "sys.meta_path.insert(0, Only())\n"
        "from rlinf.launch.cli import main, robot_server\n"
        "from rlinf.envs.realworld import settings\n"
        "import importlib\n"
        "for place in [*settings.ARMS.values(), *settings.CAMERAS.values()]:\n"
        "    if 'twin' not in place: importlib.import_module(place.split(':')[0])\n"
        "print(json.dumps([m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'rlinf' and m.__file__]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    import ast

    files = json.loads(done.stdout)
    assert len(files) > 15
    for file in files:
        tree = ast.parse(Path(file).read_text(), file, feature_version=(3, 8))
        future = any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body)
        written = [n.annotation for n in ast.walk(tree) if isinstance(n, ast.AnnAssign | ast.arg) and n.annotation]
        assert future or all(isinstance(annotation, ast.Name) for annotation in written), file


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, ["--driver", "franky", "--robot-ip", "192.0.2.1"], "moves a real arm: give its limits"),
        ({"driver": "fake", "safty": {}}, [], "did you mean safety"),
        ({"driver": "fake", "safety": {"box_low": [0, 0, 0]}}, [], "safety needs box_high"),
        ({"driver": "fake", "safety": {"box_low": [0, 0, 0], "box_high": [1, 1, -1]}}, [], "must be below box_high"),
        ({"driver": "fake", "cameras": {"wrist": {"driver": "opencvv"}}}, [], "did you mean opencv"),
        (
            {"driver": "fake", "cameras": {"wrist": {"driver": "fake", "options": {"hight": 3}}}},
            [],
            "did you mean height",
        ),
        ({"driver": "fake", "cameras": {"a b": {"driver": "fake"}}}, [], "letters, digits"),
        ({"driver": "fake", "cameras": {"w": {"driver": "twin"}}}, [], "only driver twin"),
        ({"driver": "fake", "control_hz": 1}, [], "between 10 and 1000"),
        ("no object", [], "one JSON object"),
    ],
)
def test_settings_that_are_wrong_end_in_one_line(settings, arguments, message, tmp_path, capsys):
    from rlinf.launch.cli.main import main

    path = tmp_path / "cell.json"
    path.write_text(json.dumps(settings))
    handlers = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)]
    try:
        assert main(["robot_server", "--config", str(path), "--port", "0", *arguments]) == 2
    finally:
        for name, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(name, handler)
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_settings_of_a_file_are_read_and_the_command_line_wins(tmp_path):
    path = tmp_path / "cell.json"
    written = {
        "driver": "franky",
        "arm": {"host": "192.0.2.1", "hand": False},
        "safety": dataclasses.asdict(LIMITS),
        "cameras": {"wrist": {"driver": "realsense", "options": {"serial": "1"}, "crop": [0, 0.1, 1, 0.9]}},
    }
    path.write_text(json.dumps(written))
    cell = read_cell(path, arm={"host": "192.0.2.2"})
    assert cell.arm == {"host": "192.0.2.2", "hand": False} and cell.safety == LIMITS
    assert cell.cameras["wrist"].crop == (0, 0.1, 1, 0.9) and cell.cameras["wrist"].size == (128, 128)
    assert read_cell(path, driver="fake").arm == {}
    with pytest.raises(ConfigError, match="name a JSON file"):
        read_cell(tmp_path / "nothing.json")


def test_a_taken_port_is_said(tmp_path):
    with served(FakeArm()) as (_, url):
        done = subprocess.run(
            [sys.executable, "-m", "rlinf", "robot_server", "--driver", "fake", "--port", url.rsplit(":", 1)[1]],
            capture_output=True, text=True, timeout=60, cwd=ROOT,
        )  # fmt: skip
    assert done.returncode == 2 and "cannot listen on" in done.stderr and "--port" in done.stderr
