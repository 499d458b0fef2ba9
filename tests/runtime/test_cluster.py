"""Several machines, as several raylets on this one, each in a run of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlinf.core.errors import WorkerDied, first_line
from rlinf.runtime.cluster import Machine, joined, show_token

ROOT = Path(__file__).resolve().parents[2]

PRELUDE = """
import json, os, sys, threading, time
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from functools import partial
from ray.cluster_utils import Cluster
from rlinf.core.errors import RlinfError, WorkerDied
from rlinf.runtime.cluster import joined
# Ray looks after its machines every 3 s; here more often, so that a death is known sooner.
health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
head = {"num_cpus": 1, "include_dashboard": False, "node_name": "server", "_system_config": health}
cluster = Cluster(initialize_head=True, head_node_args=head)
ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
said = {}
def add():
    return cluster.add_node(num_cpus=1, node_name="robot", resources={"arm": 1}, labels={"role": "robot"})
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[dict, Path]:
    """What one cluster says, which a machine joins and leaves, and the folder of the checkpoints of its run."""
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("checkpoints")
    script = f"DIRECTORY = {str(folder)!r}" + MISSING_AND_LATE + A_MACHINE_LEAVES
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script + "\nprint('SAID', json.dumps(said), flush=True)\nos._exit(0)"],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    [line] = [line for line in done.stdout.splitlines() if line.startswith("SAID ")]
    return json.loads(line.removeprefix("SAID ")), folder


@pytest.mark.parametrize(
    ("token", "given", "mode"),
    [
        ("file", {}, "token"),
        ("path", {}, "token"),
        ("variable", {}, "token"),
        ("file", {"RAY_AUTH_MODE": "disabled"}, "disabled"),
        ("none", {}, None),
    ],
)
def test_a_token_is_shown_to_the_cluster_unless_the_user_says_otherwise(tmp_path, monkeypatch, token, given, mode):
    """Ray shows it by itself only to clusters that it finds by itself."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what `show_token` sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / (".ray/auth_token" if token == "file" else "elsewhere")
    path.parent.mkdir(exist_ok=True)
    if token in ("file", "path"):
        path.write_text("secret")
    if token == "path":
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    if token == "variable":
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    show_token()
    assert os.environ.get("RAY_AUTH_MODE") == mode


def test_a_cluster_that_refuses_without_a_word_is_one_line(monkeypatch):
    ray = pytest.importorskip("ray")

    def refuse(*arguments, **settings):
        raise ConnectionError

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    said = r"no Ray cluster answers at 10\.0\.0\.1:6379 \(ConnectionError\); start it with: bash examples"
    with pytest.raises(WorkerDied, match=said), joined(address="10.0.0.1:6379"):
        pass


@pytest.mark.parametrize(
    ("text", "line"), [("", "OSError"), ("  \n ", "OSError"), ("\n first \nsecond", "first"), ("one", "one")]
)
def test_an_error_in_a_line(text, line):
    assert first_line(OSError(text)) == line


@pytest.mark.parametrize(
    ("names", "refused"), [(["b", "a", "b"], False), (["a", "a"], False), (["h", "a", "b", "b"], True)]
)
def test_machines_that_are_numbered_by_name_need_different_names(monkeypatch, names, refused):
    ray = pytest.importorskip("ray")
    head, *others = [Machine(f"id {i}", name, f"10.0.0.{i}", 1, 0) for i, name in enumerate(names)]
    there = [head, *sorted(others, key=lambda machine: machine.name)]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr("rlinf.runtime.cluster.alive", lambda: there)
    if not refused:
        with joined(len(names)) as machines:
            assert machines == there
        return
    with pytest.raises(WorkerDied, match=r"two machines are called 'b' \(10\.0\.0\.2 and 10\.0\.0\.3\)"), joined(4):
        pass


MISSING_AND_LATE = """
from rlinf.runtime import cluster as module
module.NOTE_EVERY_S = 0.5
notes = []
try:
    with joined(2, note=notes.append, timeout_s=1.5):
        pass
except WorkerDied as error:
    said["missing"] = str(error)
said["waited"] = len(notes), notes[0]
def wait():
    with joined(2, timeout_s=60) as machines:
        said["machines"] = [(m.name, m.num_cpus, m.resources.get("arm", 0), m.labels.get("role")) for m in machines]
waiting = threading.Thread(target=wait)
waiting.start()
time.sleep(1)
node = add()
waiting.join()
"""


def test_machines_that_are_missing_are_counted_and_late_ones_awaited(run):
    said, _ = run
    assert said["missing"] == (
        "1 of 2 machines are there (server) after 1.5 s; start the others with: "
        "bash examples/embodiment/ray_up.sh worker HEAD_ADDRESS, or lower cluster.num_nodes"
    )
    assert said["waited"][0] >= 1
    assert said["waited"][1] == "waiting for machines: 1 of 2 machines are there (server)"
    assert said["machines"] == [["server", 1, 0, None], ["robot", 1, 1.0, "robot"]]


A_MACHINE_LEAVES = """
from rlinf.launch.crew import Layout
from rlinf.runners.checkpoint import CheckpointStore, find, verify
from rlinf.runners.schedule import Schedule
from rlinf.runners.synchronous import run_sync
from rlinf.runtime.ray_backend import RayRuntime, Seat
from tests.fakes import CountingActor, CountingAlgorithm, CountingEnv, RecordingReporter, build_crew_on, slow
with joined(2, timeout_s=60) as machines:
    server, robot = machines
    runtime = RayRuntime([
        Seat("actor", server.node_id, "127.0.0.1", server.name), Seat("env", robot.node_id, "127.0.0.1", robot.name),
    ])
    crew = build_crew_on(runtime, Layout((1,), (1,), (0,)), [[partial(CountingEnv, 2, 0, slow(0.01))]],
                         CountingActor, CountingAlgorithm)
    crew.runtime, crew.max_restarts = runtime, 5
    said["where"] = crew.env.run(lambda worker: ray.get_runtime_context().get_node_id()).wait() == [robot.node_id]
    def leave():
        while crew.progress().env_steps < 100:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)
    threading.Thread(target=leave, daemon=True).start()
    reporter = RecordingReporter()
    try:
        run_sync(crew, Schedule(10**6, 4, save_interval=3), CheckpointStore(DIRECTORY),
                 reporter)
    except RlinfError as error:
        said["error"] = str(error)
    said["notes"] = reporter.notes
"""


def test_a_machine_that_leaves_ends_the_run_by_name_with_what_was_learned(run):
    said, folder = run
    assert said["where"]
    assert said["error"] == "machine 'robot' (127.0.0.1) has left the run; 'env' was on it"
    assert any("runner.resume_dir=" in note for note in said["notes"])
    from rlinf.runners.checkpoint import find, verify

    assert verify(find(folder)).progress.env_steps >= 100
