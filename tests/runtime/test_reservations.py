"""Robots that Ray keeps from other runs, GPUs that a process does not see, and the interface of its ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlinf.core.errors import ConfigError
from rlinf.launch.processes import nodes_of, robots_of, seats_of
from rlinf.runtime.cluster import Machine, Reservation, Robot
from rlinf.runtime.placement import NodeGroup, make_plan
from rlinf.runtime.ray_process import Host, visible_devices

ROOT = Path(__file__).resolve().parents[2]
SERVER = Machine("id 0", "server", "10.0.0.1", 16, 2)
CELL = Machine("id 1", "cell", "10.0.0.2", 8, 0, {"Franka": 1.0})
ARM = NodeGroup("arm", (1,), hardware=(("Franka", 1, "172.16.0.2"),))


def test_the_process_that_commands_a_robot_has_its_reservation():
    placement = {"env,rollout": {"node_group": "arm", "placement": 0}, "actor": 0}
    plan = make_plan(placement, nodes_of([SERVER, CELL], accelerators=False), [ARM])
    robots = robots_of(plan, [SERVER, CELL])
    assert robots == {0: Robot("Franka", "172.16.0.2", CELL)}, "once, although the policy is placed there too"
    held = Reservation("Franka", object())
    seats = seats_of(plan.hosts(1), [SERVER, CELL], plan.nodes, {0: held})
    assert {seat.name: seat.robot for seat in seats} == {"env 0 + rollout 0": held, "actor 0": None}


def test_a_process_that_is_given_none_of_the_accelerators_there_sees_none():
    placement = {"env": {"node_group": "node", "placement": "0-1"}, "rollout,actor": "0"}
    plan = make_plan(placement, nodes_of([SERVER, CELL], accelerators=True))
    seats = {seat.name: seat for seat in seats_of(plan.hosts(1), [SERVER, CELL], plan.nodes)}
    assert (seats["env 0"].devices, seats["env 0"].sees_none) == ((), True)
    assert not seats["env 1"].sees_none, "there are none"
    assert seats["actor 0"].devices == (0,)
    chosen = NodeGroup("chosen", (0,), {0: {"CUDA_VISIBLE_DEVICES": "1"}})
    assert not any(
        seat.sees_none
        for seat in seats_of(
            make_plan({"env,rollout,actor": {"node_group": "chosen", "placement": 0}}, [*plan.nodes], [chosen]).hosts(
                1
            ),
            [SERVER, CELL],
            plan.nodes,
        )
    )


@pytest.mark.parametrize(
    ("visible", "devices", "seen"),
    [(None, (0, 3), "0,3"), ("4,6", (1,), "6"), ("4,6", (), ""), ("", (1,), "1"), ("4,6", (0, 2), None)],
)
def test_devices_are_counted_among_those_that_ray_sees(visible, devices, seen):
    if seen is not None:
        assert visible_devices(visible, devices) == seen
        return
    with pytest.raises(ConfigError, match=r"GPU 2 of .* but CUDA_VISIBLE_DEVICES=4,6 names 2 there; set it as it was"):
        visible_devices(visible, devices)


LIVE = """
import json, os, sys
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": "2,3"}
import ray
quiet = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
ray.init("local", num_cpus=1, num_gpus=2, resources={"Franka": 1}, object_store_memory=100 << 20,
         _node_ip_address="127.0.0.1", **quiet)
from dataclasses import replace
from rlinf.core.errors import ConfigError, WorkerDied
from rlinf.runtime.cluster import Robot, joined, reserved
from rlinf.runtime.ray_backend import RayRuntime, Seat
said, notes = {}, []
def environment(worker):
    return [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]
with joined() as [machine]:
    robot = Robot("Franka", "172.16.0.2", replace(machine, name="cell"))
    with reserved([robot, Robot("UR5", "elsewhere", machine)]) as [held, none]:
        said["none"] = none is None
        seat = Seat("env 0", machine.node_id, "127.0.0.1", "cell", sees_none=True, robot=held)
        runtime = RayRuntime([seat])
        said["sees"] = runtime.group("env", [dict], [0]).run(environment).wait()[0]
        runtime.replace([0])
        said["replaced"] = runtime.dead() == []
        try:
            with reserved([robot], notes.append, timeout_s=2.5):
                pass
        except WorkerDied as problem:
            said["held"] = str(problem)
        runtime.close()
    with reserved([robot]) as [again]:
        said["free again"] = again is not None
    try:
        RayRuntime([Seat("actor 0", machine.node_id, "127.0.0.1", "cell", (5,))])
    except ConfigError as problem:
        said["few"] = str(problem)
said["notes"], said["pid"] = notes, os.getpid()
print("SAID", json.dumps(said), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def said():
    """What happened in a cluster of one machine with two GPUs, of which there are none, and one robot."""
    pytest.importorskip("ray")
    done = subprocess.run([sys.executable, "-c", LIVE], cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr + done.stdout
    [line] = [line for line in done.stdout.splitlines() if line.startswith("SAID ")]
    return json.loads(line.removeprefix("SAID "))


def test_a_robot_is_kept_from_other_runs_until_its_own_has_ended(said):
    holder = f"process {said['pid']} on {os.uname().nodename}"
    held = f"robot 172.16.0.2 (Franka on cell) is held by another run ({holder})"
    assert said["held"] == f"{held}; end that run, or start this one when it has ended"
    assert said["notes"] == [f"{held}; waiting up to 2.5 s"]
    assert said["none"], "what its machine does not offer is not reserved"
    assert said["replaced"] and said["free again"]


def test_a_process_knows_the_interface_of_its_ranks_and_sees_what_it_is_to_see(said):
    assert said["sees"] == ["", "lo", "=lo"]
    assert "GPU 5 of" in said["few"] and "CUDA_VISIBLE_DEVICES=2,3 names 2 there" in said["few"]


def test_an_interface_that_the_user_names_is_kept(monkeypatch):
    pytest.importorskip("ray")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "mine")
    Host(0, "127.0.0.1", b"k" * 32, [], None, b"")
    assert {os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")} == {"mine"}
