"""What all benchmarks share: contenders that take turns, CPU time, the machine, and the table.

Contenders are measured in rounds, A B C A B C, so that a machine that slows down or is used by others does so to
all of them. Besides wall clock each is measured per second of CPU time, of this process and of all that work for
it: code on one thread is then judged the same on a busy core as on an idle one.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
GIT_TIMEOUT_S = 10.0
NAME_WIDTH = 37

Run = Callable[[float], float]
"""Works for about so many seconds and returns how many units of work that was."""


@dataclass(frozen=True)
class Contender:
    """One row of a table.

    Attributes:
        name: what is measured.
        run: does the work.
        pids: processes that work for it besides this one.
        peer: name of the row that it is compared with; None for no comparison.
        limit: name of the row that it cannot exceed; None where there is none.
    """

    name: str
    run: Run
    pids: Sequence[int] = ()
    peer: str | None = None
    limit: str | None = None


@dataclass(frozen=True)
class Rates:
    """Units per second of wall clock and of CPU time, one number per round."""

    wall: list[float]
    cpu: list[float]


def repeat(call: Callable[[], object], units: float = 1.0) -> Run:
    """A `Run` that calls `call`, which does `units` of work, until its time is over."""

    def run(budget_s: float) -> float:
        done, end = 0.0, time.perf_counter() + budget_s
        while done == 0 or time.perf_counter() < end:
            call()
            done += units
        return done

    return run


def in_turns(contenders: Sequence[Contender], *, rounds: int, budget_s: float) -> dict[str, Rates]:
    """Rates by name, after one unmeasured round of a quarter of the time."""
    results = {contender.name: Rates([], []) for contender in contenders}
    began = time.monotonic()
    for contender in contenders:
        contender.run(budget_s / 4)
    for number in range(rounds):
        for contender in contenders:
            cpu_s, wall_s = cpu_seconds(contender.pids), time.perf_counter()
            units = contender.run(budget_s)
            wall_s, cpu_s = time.perf_counter() - wall_s, cpu_seconds(contender.pids) - cpu_s
            results[contender.name].wall.append(units / wall_s)
            results[contender.name].cpu.append(units / cpu_s if cpu_s > 0 else float("nan"))
        share = (number + 1.25) / (rounds + 0.25)
        left_s = (time.monotonic() - began) * (1 / share - 1)
        print(f"round {number + 1} of {rounds}; {left_s:.0f} s to go", file=sys.stderr, flush=True)
    return results


def cpu_seconds(pids: Sequence[int] = ()) -> float:
    """CPU time of this process, all its threads, and of the processes `pids` (Linux; elsewhere they count as 0)."""
    return time.process_time() + sum(process_seconds(pid) for pid in pids)


def process_seconds(pid: int) -> float:
    """CPU time of one process by the kernel's account; 0 when it has ended."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def descendants(pid: int) -> list[int]:
    """The process and all below it (Linux; elsewhere itself alone)."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        if fields := _stat(int(path.name)):
            parents[int(path.name)] = int(fields[1])
    found = [pid]
    for parent in found:  # grows while it is walked
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat behind the command's name, or nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def print_table(title: str, unit: str, contenders: Sequence[Contender], results: dict[str, Rates]) -> None:
    """One row per contender: median and range by wall clock and by CPU time, and the two comparisons by wall clock.

    A comparison is the median over rounds of the ratio within a round.
    """
    print(f"\n{title}")
    print(f"{'':{NAME_WIDTH}}{unit + '/s':>24}{unit + ' per CPU-s':>24}{'x peer':>8}{'limit':>7}")
    for contender in contenders:
        rates = results[contender.name]
        times = ratio(results, contender.name, contender.peer)
        share = ratio(results, contender.name, contender.limit)
        print(
            f"{contender.name:{NAME_WIDTH}}{spread(rates.wall):>24}{spread(rates.cpu):>24}"
            f"{'' if times is None else f'{times:.2f}':>8}{'' if share is None else f'{share:.0%}':>7}"
        )


def ratio(results: dict[str, Rates], name: str, other: str | None) -> float | None:
    """How many times faster than `other`, by wall clock; None where there is no such row."""
    if other is None or other not in results:
        return None
    return median(a / b for a, b in zip(results[name].wall, results[other].wall, strict=True))


def spread(values: Sequence[float]) -> str:
    """median (lowest - highest)."""
    return f"{number(median(values))} ({number(min(values))}-{number(max(values))})"


def number(value: float) -> str:
    """At least three digits."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def machine() -> str:
    """Processor, cores, what of bfloat16 they know, load, and versions."""
    model, extras = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        entries = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        values = {key.strip(): value.strip() for key, _, value in entries}
        model = values.get("model name", model)
        known = set(values.get("flags", "").split()) & {"amx_bf16", "avx512_bf16"}
        extras = f" ({', '.join(sorted(known))})" if known else ""
    return (
        f"{model}, {os.cpu_count()} cores{extras}, load {os.getloadavg()[0]:.1f}; "
        f"python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}"
    )


def commit() -> str:
    """Short hash of the code, and whether the working tree differs from it."""
    head, changes = (_git(*words) for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain")))
    return f"{head} with local changes" if head and changes else head or "unknown"


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=GIT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def print_setting(threads: int) -> None:
    """What has to stand beside the numbers: machine, code, threads, date."""
    print(machine())
    print(f"commit {commit()}; torch threads {threads}; {datetime.date.today().isoformat()}", flush=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="tiny sizes and times: shows that it works, not how fast")
    made.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    made.add_argument("--rounds", type=int, default=5, help="turns of every contender (default: 5)")
    made.add_argument("--seconds", type=float, default=2.0, help="time of a contender's turn (default: 2)")
    return made


class Checks:
    """What was expected, and whether it was so; for scripts that show behaviour rather than speed."""

    def __init__(self) -> None:
        self.failed = False

    def expect(self, what: str, holds: bool, seen: str = "") -> None:
        """One line."""
        print(f"{'ok    ' if holds else 'WRONG '}{what}{f': {seen}' if seen else ''}", flush=True)
        self.failed |= not holds
