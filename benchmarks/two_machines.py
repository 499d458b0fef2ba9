"""Two machines on one: runs over both, then the cable of one is cut. By hand, as root, on Linux with `ip` (iproute2).

    sudo .venv/bin/python benchmarks/two_machines.py          # some minutes
    sudo .venv/bin/python benchmarks/two_machines.py --cut "env: 0-1; rollout: 0-1; actor: 0-1"

Each machine is a set of namespaces (network, processes, host name, mounts with a /tmp and /dev/shm of its own); a pair
of virtual interfaces is the only way from one to the other, and none leads out. They are started as docs/cluster.md
says: `ray_up.sh head` and `ray_up.sh worker`, with the token copied by hand. All ends with this program. Exit code 1
when something was not as documented.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from measure import ROOT, Checks, print_setting

RAY_UP = "examples/embodiment/ray_up.sh"
LINK = "wire0"
SERVER, ROBOT = "10.77.0.1", "10.77.0.2"
START_DEADLINE_S = 20.0
RUN_DEADLINE_S = 300.0
CUT_DEADLINE_S = 60.0
"""Within which a run names the machine that it has lost."""
ORPHANS_DEADLINE_S = 300.0


class Machine:
    """A machine with its own home directory, joined to the others by what is plugged in later."""

    def __init__(self, name: str, ip: str, folder: Path) -> None:
        self.name, self.ip, self.home, self.folder = name, ip, folder / name, folder
        self.home.mkdir()
        boot = f"hostname {name}; mount -t tmpfs none /tmp; mount -t tmpfs none /dev/shm; sleep infinity & wait"
        spaces = ["--net", "--pid", "--uts", "--ipc", "--mount", "--fork", "--kill-child", "--mount-proc"]
        self._shell = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "bash", "-c", boot])
        try:
            self.pid = self._first_process()
            until = time.monotonic() + START_DEADLINE_S
            while (said := self.call("stat -f -c %T /dev/shm && hostname", check=False)).split() != ["tmpfs", name]:
                if time.monotonic() > until:
                    raise RuntimeError(f"machine {name} did not come up; this needs root ({said.strip()})")
                time.sleep(0.05)
            self.call("ip link set lo up")
        except BaseException:
            self.end()
            raise

    def _first_process(self) -> int:
        children = Path(f"/proc/{self._shell.pid}/task/{self._shell.pid}/children")
        until = time.monotonic() + START_DEADLINE_S
        while not (listed := children.read_text().split()):
            if time.monotonic() > until or self._shell.poll() is not None:
                raise RuntimeError("namespaces could not be made; this needs root and unshare (util-linux)")
            time.sleep(0.01)
        return int(listed[0])

    def words(self, command: str) -> list[str]:
        """What runs a command of the shell there."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--pid", "--uts", "--ipc", "--mount"]
        environment = f"HOME={shlex.quote(str(self.home))} PYTHONPATH={shlex.quote(str(ROOT))}"
        return [*enter, "bash", "-c", f"cd {shlex.quote(str(ROOT))}; export {environment}; {command}"]

    def call(self, command: str, *, check: bool = True, timeout_s: float = 120.0) -> str:
        """Its output, both kinds."""
        done = subprocess.run(
            self.words(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"on {self.name}, `{command}` ended with {done.returncode}: {done.stdout}")
        return done.stdout

    def processes(self) -> list[str]:
        """Commands of Ray and of runs that are there."""
        listed = self.call("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '", check=False)
        return re.findall(r"ray::\S*|raylet/raylet|gcs_server|train\.py", listed)

    def end(self) -> None:
        self._shell.kill()
        self._shell.wait()


@contextlib.contextmanager
def machines(folder: Path) -> Iterator[tuple[Machine, Machine]]:
    """Two machines with a wire between them."""
    made: list[Machine] = []
    try:
        for name, ip in (("server", SERVER), ("robot", ROBOT)):
            made.append(Machine(name, ip, folder))
        server, robot = made
        there = ["nsenter", "--target", str(server.pid), "--net", "ip", "link", "add", LINK, "type", "veth"]
        subprocess.run([*there, "peer", "name", LINK, "netns", str(robot.pid)], check=True)
        for machine in made:
            machine.call(f"ip address add {machine.ip}/24 dev {LINK} && ip link set {LINK} up")
        yield server, robot
    finally:
        for machine in made:
            machine.end()


def join(server: Machine, robot: Machine, checks: Checks) -> None:
    """Make a cluster of both, as documented."""
    began = time.monotonic()
    said = server.call(f"bash {RAY_UP} head --address {SERVER} --name server")
    checks.expect("the head starts", f"worker {SERVER}:6379" in said, f"{time.monotonic() - began:.1f} s")
    token = server.home / ".ray" / "auth_token"
    command = f"bash {RAY_UP} worker {SERVER}:6379 --address {ROBOT} --name robot"
    refused = robot.call(command, check=False)
    checks.expect("without the token it is refused", "auth_token is missing; copy it from the head" in refused)
    (robot.home / ".ray").mkdir(exist_ok=True)
    shutil.copy(token, robot.home / ".ray" / "auth_token")
    began = time.monotonic()
    said = robot.call(command)
    checks.expect("the worker takes part", "robot takes part" in said, f"{time.monotonic() - began:.1f} s")


def train_words(folder: Path, name: str, placement: str, steps: int) -> str:
    words = [
        ".venv/bin/python", "examples/embodiment/train.py", "--config-name", "reach_sac_mlp", "profile=cpu",
        "cluster.num_nodes=2", f"cluster.component_placement='{placement}'", f"runner.logger.log_path={folder / name}",
        f"runner.max_epochs={steps}", "runner.save_interval=5", "runner.val_check_interval=-1",
        "actor.micro_batch_size=32", "algorithm.update_epoch=4", "runner.logger.logger_backends=[]",
    ]  # fmt: skip
    return shlex.join(words)


def run_over_both(server: Machine, folder: Path, name: str, placement: str, checks: Checks) -> None:
    began = time.monotonic()
    said = server.call(train_words(folder, name, placement, 10), check=False, timeout_s=RUN_DEADLINE_S)
    journal = folder / name / "reach_sac_mlp" / "metrics.jsonl"
    rows = [json.loads(row) for row in journal.read_text().splitlines()] if journal.is_file() else []
    well = len(rows) == 10 and "processes on server, robot" in said
    checks.expect(f"a run with {placement}", well, f"{time.monotonic() - began:.1f} s" if well else said[-1500:])


def run_and_cut(server: Machine, robot: Machine, folder: Path, placement: str, checks: Checks) -> None:
    """Take the wire away under a run."""
    output = folder / "cut.txt"
    with output.open("w") as file:
        words = server.words(train_words(folder, "cut", placement, 10**6))
        run = subprocess.Popen(words, stdout=file, stderr=file)
    run_dir = folder / "cut" / "reach_sac_mlp"
    until = time.monotonic() + RUN_DEADLINE_S
    while not (run_dir / "checkpoints" / "global_step_10").exists():
        if time.monotonic() > until or run.poll() is not None:
            raise RuntimeError(f"the run that was to be cut did not come to step 10: {output.read_text()[-1500:]}")
        time.sleep(0.1)
    robot.call(f"ip link set {LINK} down")
    cut = time.monotonic()
    try:
        code: int | None = run.wait(ORPHANS_DEADLINE_S)
    except subprocess.TimeoutExpired:
        code = None
        run.kill()
    taken = time.monotonic() - cut
    said = output.read_text()
    checks.expect("the run ends when the wire is cut", code == 2, f"code {code}, {taken:.1f} s later")
    checks.expect(f"within {CUT_DEADLINE_S:g} s", taken < CUT_DEADLINE_S)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    checks.expect(
        "and names the machine", len(errors) == 1 and "robot" in errors[0], errors[0] if errors else said[-900:]
    )
    kept = re.findall(r"Go on with: runner\.resume_dir=(\S+)", said)
    checks.expect("and the checkpoint", len(kept) == 1 and Path(kept[0]).is_dir(), "".join(kept))
    while (left := robot.processes()) and time.monotonic() < cut + ORPHANS_DEADLINE_S:
        time.sleep(0.5)
    gone = "" if left else f"{time.monotonic() - cut:.0f} s after the cut"
    checks.expect("the processes over there end by themselves", not left, gone or ", ".join(left))


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cut", default="env: 1; rollout: 1; actor: 0", help="placement of the run whose wire is cut")
    options = made.parse_args(arguments)
    if ROOT.is_relative_to("/tmp"):
        made.error(f"{ROOT} is below /tmp, which the machines do not see: each has its own")
    print_setting(threads=1)
    checks = Checks()
    # Not below /tmp: there each machine has its own. Learners on both machines write into one folder.
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        with machines(folder) as (server, robot):
            ways = server.call("ip route").splitlines()
            checks.expect("there is no way out", len(ways) == 1 and LINK in ways[0])
            join(server, robot, checks)
            run_over_both(server, folder, "robot", "env: 1; rollout: 1; actor: 0", checks)
            run_over_both(server, folder, "both", "env: 0-1; rollout: 0-1; actor: 0-1", checks)
            run_and_cut(server, robot, folder, options.cut, checks)
            server.call(f"bash {RAY_UP} down")
            checks.expect("ray_up.sh down ends Ray", not server.processes(), ", ".join(server.processes()))
    finally:
        shutil.rmtree(folder)
    return int(checks.failed)


if __name__ == "__main__":
    sys.exit(main())
