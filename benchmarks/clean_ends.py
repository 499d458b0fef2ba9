"""Whether whole runs end cleanly, time after time: exit code, deadline, last checkpoint, and no process left behind.

    python benchmarks/clean_ends.py                          # 20 runs on each backend, about ten minutes
    python benchmarks/clean_ends.py --how SIGTERM --runs 5   # runs that are stopped instead
    python benchmarks/clean_ends.py --quick

Every run is `examples/embodiment/train.py` in a process of its own, with a mark in its environment that all processes
inherit which work for it, those of Ray too. Linux. Exit code 1 when a run did not end as it should.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from measure import ROOT, print_setting

TRAIN = ROOT / "examples" / "embodiment" / "train.py"
MARK = "RLINF_CLEAN_ENDS"
LEAVE_S = 10.0
"""Ray's own processes end shortly after the run."""
BACKENDS = {
    "local": ["cluster.backend=local"],
    "ray": ["cluster.backend=ray"],
}
STEPS = {"finished": 3, "SIGTERM": 10**6, "SIGINT": 10**6, "SIGKILL": 10**6}


@dataclass(frozen=True)
class End:
    """How a run ended: `problems` is empty when all was well."""

    seconds: float
    problems: tuple[str, ...]


def end_of(backend: str, how: str, deadline_s: float) -> End:
    """Run once to the end, or send the signal `how` once the first checkpoint is there."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "--config-name", "reach_sac_mlp", "profile=cpu", f"runner.logger.log_path={folder}",
            f"runner.max_epochs={STEPS[how]}", "runner.save_interval=2", "runner.val_check_interval=-1",
            "actor.num_threads=1", "algorithm.update_epoch=4", "runner.logger.logger_backends=[]", *BACKENDS[backend],
        ]  # fmt: skip
        output = Path(folder) / "output"
        began = time.monotonic()
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, str(TRAIN), *words], stdout=file, stderr=file, env=os.environ | {MARK: mark}
            )
        checkpoints = Path(folder) / "reach_sac_mlp" / "checkpoints"
        if how != "finished":
            while not (checkpoints / "latest").exists() and time.monotonic() < began + deadline_s:
                time.sleep(0.05)
            os.kill(process.pid, signal.Signals[how])
        problems = []
        try:
            code = process.wait(max(0.0, began + deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            problems.append(f"still there after {deadline_s:g} s")
            process.kill()
            code = process.wait()
        seconds = time.monotonic() - began
        if code != expected_code(how):
            problems.append(f"exit code {code}: {output.read_text().strip()[-300:]}")
        if not (checkpoints / "latest").exists():
            problems.append("no checkpoint")
        until = time.monotonic() + LEAVE_S
        while (left := marked(mark)) and time.monotonic() < until:
            time.sleep(0.1)
        problems += [f"left behind: {command}" for command in left.values()]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return End(seconds, tuple(problems))


def expected_code(how: str) -> int:
    """0; for a run that saves and leaves at a signal 128 and its number; for one that is killed, as Python says it."""
    if how == "finished":
        return 0
    number = signal.Signals[how].value
    return -number if how == "SIGKILL" else 128 + number


def marked(mark: str) -> dict[int, str]:
    """Processes that work for a run: number and command."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if f"{MARK}={mark}".encode() in (path / "environ").read_bytes():
                words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(path.name)] = words[:100]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="one run on each backend")
    made.add_argument("--runs", type=int, default=20, help="runs on each backend (default: 20)")
    made.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    made.add_argument("--how", choices=STEPS, default="finished", help="how the runs come to their end")
    made.add_argument("--deadline", type=float, default=90.0, help="seconds that a run may take (default: 90)")
    options = made.parse_args(arguments)
    print_setting(threads=1)
    print(f"\nruns that are {options.how}" if options.how == "finished" else f"\nruns that get {options.how}")
    runs, failed = 1 if options.quick else options.runs, False
    for backend in options.backends:
        ends = []
        for number in range(runs):
            ends.append(end := end_of(backend, options.how, options.deadline))
            for problem in end.problems:
                print(f"{backend}, run {number + 1}: {problem}", flush=True)
        clean = sum(not end.problems for end in ends)
        failed |= clean < runs
        times = sorted(end.seconds for end in ends)
        print(f"{backend:8}{clean} of {runs} clean, {median(times):.1f} s ({times[0]:.1f}-{times[-1]:.1f})", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
