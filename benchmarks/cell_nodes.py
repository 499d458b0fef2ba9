"""A recipe for a robot in its own layout, over two raylets on this machine: learner and policy on one, the arm's
environment on the other, a fake arm behind a robot server. By hand; two minutes on two cores.

    .venv/bin/python benchmarks/cell_nodes.py

Looks at where each process runs, asks one run to end by SIGTERM, and kills all of the learner's machine under another
one. Exit code 1 when something was not as documented.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from measure import ROOT, Checks, print_setting

MARK = "RLINF_CELL_NODES"
"""In the environment of all processes of a cluster."""
START_DEADLINE_S = 180.0
STILL_M_PER_S = 1e-3
END_DEADLINE_S = 20.0
"""Within which a run that is asked to end has ended."""
HELD_DEADLINE_S = 15.0
"""Within which the arm stands still: the way to an episode, and the server's watchdog."""
ORPHANS_DEADLINE_S = 60.0

GPU_MACHINE = """
import json, os, sys
from pathlib import Path
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from ray.cluster_utils import Cluster
# Ray looks after its machines every 3 s; here more often, so that a death is known sooner.
health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3,
          "gcs_rpc_server_reconnect_timeout_s": 3}
few = {"num_cpus": 1, "object_store_memory": 100 << 20}
head = {**few, "include_dashboard": False, "node_name": "server", "_system_config": health}
cluster = Cluster(initialize_head=True, head_node_args=head)
cluster.add_node(**few, node_name="robot")
ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
from rlinf.launch import run
from rlinf.launch.parse import load_config

directory, recipe, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]

def seat(worker):
    return os.getpid(), ray.get_runtime_context().get_node_id()

def build(config, runtime, layout):
    crew = made(config, runtime, layout)
    seats = {role: getattr(crew, role).run(seat).wait() for role in ("env", "rollout", "learner")}
    names = {node["NodeID"]: node["NodeName"] for node in ray.nodes()}
    found = {role: [(pid, names[node]) for pid, node in places] for role, places in seats.items()}
    (directory / "partial").write_text(json.dumps(found))
    (directory / "partial").rename(directory / "seats.json")
    return crew

made, run.build_crew = run.build_crew, build
code = run.train(load_config(recipe, words, Path("examples/embodiment/config")))
ray.shutdown()
cluster.shutdown()
sys.exit(code)
"""


class Robot:
    """A robot server with a fake arm, as a process of its own: the robot's computer."""

    def __init__(self) -> None:
        words = [sys.executable, "-m", "rlinf", "robot_server", "--driver", "fake", "--port", "0"]
        self._process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        match = re.search(r"http://\S+", said)
        if match is None:
            raise RuntimeError(f"the robot server did not start: {said}")
        self.url = match[0]

    def ask(self, route: str) -> Any:
        """What the server answers."""
        with urllib.request.urlopen(f"{self.url}/{route}", timeout=5) as answer:
            return json.loads(answer.read())

    def stands_still(self, seconds: float = 1.0) -> bool:
        """Whether the arm does not move for so long."""
        before = self.ask("getstate")["pose"]
        time.sleep(seconds)
        state = self.ask("getstate")
        away = max(abs(a - b) for a, b in zip(before, state["pose"], strict=True))
        return max(away, *(abs(speed) for speed in state["vel"])) < STILL_M_PER_S

    def close(self) -> None:
        """End the server, which holds the arm."""
        self._process.terminate()
        self._process.wait()


def words(url: str, directory: Path) -> list[str]:
    """The recipe's own layout, small networks and no demonstrations."""
    groups = (
        '[{label: "4090", node_ranks: 0}, {label: franka, node_ranks: 1, '
        "hardware: {type: Franka, configs: [{robot_ip: 127.0.0.1, node_rank: 1}]}}]"
    )
    server, robot = (f"{{node_group: {label}, placement: 0}}" for label in ('"4090"', "franka"))
    cell = "env.train.override_cfg"
    return [
        "profile=cpu", "cluster.num_nodes=2", f"cluster.node_groups={groups}",
        f"cluster.component_placement={{actor: {server}, rollout: {server}, env: {robot}}}",
        "runner.asynchronous=True", "runner.max_epochs=100000", "runner.val_check_interval=-1",
        "runner.save_interval=2", f"runner.logger.log_path={directory}", "runner.logger.logger_backends=[]",
        "algorithm.demo_buffer=null", "algorithm.update_epoch=1", "algorithm.replay_buffer.min_buffer_size=8",
        "algorithm.replay_buffer.samples_per_insert=1", "actor.micro_batch_size=8", "actor.global_batch_size=8",
        "actor.num_threads=1", f"{cell}.driver=serl_http", f"{cell}.robot_url={url}",
        f"{cell}.target_ee_pose=[0.5,0,0.1,3.14159265,0,0]", f"{cell}.lift_m=0", f"{cell}.reset_s=0.5",
        f"{cell}.cameras={{wrist_1: {{driver: fake, size: [32, 32]}}}}", "env.train.max_episode_steps=10",
    ]  # fmt: skip


def processes(mark: str) -> dict[int, str]:
    """pid → command of the processes that have this in their environment."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def parent(pid: int) -> int:
    """Of a process; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def kill(pids: set[int]) -> None:
    """At once; what is gone already is no problem."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until(what: Callable[[], bool], seconds: float) -> float | None:
    """How long it took; None where it did not come."""
    began = time.monotonic()
    while not what():
        if time.monotonic() - began > seconds:
            return None
        time.sleep(0.1)
    return time.monotonic() - began


class Started:
    """A run over both machines that has written a checkpoint."""

    def __init__(self, recipe: str, robot: Robot, directory: Path, checks: Checks) -> None:
        self.mark, self.output, self.run_dir = f"{MARK}={directory}", directory / "output", directory / recipe
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", GPU_MACHINE, str(directory), recipe, *words(robot.url, directory)],
                cwd=ROOT, stdout=file, stderr=file,
                env=environment | {MARK: str(directory), "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        checkpoints = self.run_dir / "checkpoints"
        learned = wait_until(
            lambda: self.process.poll() is not None or any(checkpoints.glob("global_step_*")), START_DEADLINE_S
        )
        if learned is None or self.process.poll() is not None:
            raise RuntimeError(f"the run came to no checkpoint: {self.output.read_text()[-2000:]}")
        checks.expect("a run over both machines learns and saves", True, f"{learned:.0f} s after its start")
        self.seats = json.loads((directory / "seats.json").read_text())
        self.machines = {role: [machine for _, machine in places] for role, places in self.seats.items()}


@contextlib.contextmanager
def started(recipe: str, robot: Robot, directory: Path, checks: Checks) -> Iterator[Started]:
    """A run; nothing of it is left behind."""
    directory.mkdir()
    try:
        yield Started(recipe, robot, directory, checks)
    finally:
        while left := processes(f"{MARK}={directory}"):
            kill(set(left))
            time.sleep(0.1)


def end_by_signal(recipe: str, robot: Robot, directory: Path, checks: Checks) -> None:
    """Where everybody sits, and how a run ends that is asked to."""
    with started(recipe, robot, directory, checks) as run:
        wanted = {"env": ["robot"], "rollout": ["server"], "learner": ["server"]}
        checks.expect("each process is on its machine", run.machines == wanted, json.dumps(run.machines))
        run.process.send_signal(signal.SIGTERM)
        taken = wait_until(lambda: run.process.poll() is not None, END_DEADLINE_S + 20)
        checks.expect(
            "SIGTERM ends it", run.process.poll() == 128 + signal.SIGTERM and taken is not None,
            f"code {run.process.poll()}" + (f", {taken:.1f} s later" if taken else ""),
        )  # fmt: skip
        told = run.output.read_text()
        kept = re.findall(r"nothing is lost\. Go on with: runner\.resume_dir=(\S+)", told)
        checks.expect("with a checkpoint", len(kept) == 1 and Path(kept[0]).is_dir(), "".join(kept) or told[-1500:])
        checks.expect("the arm is held", robot.stands_still() and robot.ask("safety")["stopped"] == "")
        left = wait_until(lambda: not processes(run.mark), ORPHANS_DEADLINE_S)
        checks.expect("nobody is left", left is not None, ", ".join(processes(run.mark).values()))


def kill_the_learners_machine(recipe: str, robot: Robot, directory: Path, checks: Checks) -> None:
    """The driver, Ray's head, its raylet, the learner and the policy go in one moment."""
    with started(recipe, robot, directory, checks) as run:
        [[env, _]] = run.seats["env"]
        there = processes(run.mark)
        raylet = parent(env)
        stays = {env, raylet} | {pid for pid in there if parent(pid) == raylet}
        lost = set(there) - stays
        owned = {run.seats["learner"][0][0], run.seats["rollout"][0][0], run.process.pid}
        checks.expect("the arm's environment is in a raylet of its own", owned <= lost and "raylet" in there[raylet])
        kill(lost)
        held = wait_until(robot.stands_still, HELD_DEADLINE_S)
        checks.expect("the arm is held", held is not None, f"{held:.1f} s later" if held else "")
        # Once or more: between slow steps on a busy machine, too.
        silences = robot.ask("safety")["counts"].get("watchdog", 0)
        checks.expect("by the server's watchdog", silences > 0, f"{silences} times in all")
        pose = robot.ask("getpos")["pose"]
        gone = wait_until(lambda: not stays & set(processes(run.mark)), ORPHANS_DEADLINE_S)
        checks.expect("the processes over there end by themselves", gone is not None, f"{gone:.0f} s" if gone else "")
        away = max(abs(a - b) for a, b in zip(pose, robot.ask("getpos")["pose"], strict=True))
        checks.expect("and leave the arm where it is", away < STILL_M_PER_S, f"{1000 * away:.2f} mm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Both runs."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--recipe", default="realworld_sac_flow_image", help="of a robot (realworld_sac_flow_image)")
    options = made.parse_args(arguments)
    print_setting(threads=1)
    checks, robot = Checks(), Robot()
    try:
        with tempfile.TemporaryDirectory() as folder:
            end_by_signal(options.recipe, robot, Path(folder) / "signal", checks)
            kill_the_learners_machine(options.recipe, robot, Path(folder) / "kill", checks)
    finally:
        robot.close()
    return int(checks.failed)


if __name__ == "__main__":
    sys.exit(main())
