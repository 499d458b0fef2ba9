"""What of Python, torch, GPU, rendering, simulators and services works here, and what mends the rest."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

State = Literal["works", "missing", "broken"]

INSTALL = "bash requirements/install.sh embodied"
MANISKILL = f"{INSTALL} --env maniskill"
FRANKASIM = f"{INSTALL} --env frankasim"
LIBERO = f"{INSTALL} --env libero"


@dataclass(frozen=True)
class Check:
    """One thing to look at.

    Attributes:
        probe: name of the function in `probes`.
        title: how the table calls it.
        mend: command or advice for when it does not work; empty where nothing needs mending.
        core: whether nothing works without it.
    """

    probe: str
    title: str
    mend: str
    core: bool = False


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    check: Check
    state: State
    detail: str


CHECKS = (
    Check("python", "Python", f"PYTHON=/path/to/python3.11 {INSTALL}", core=True),
    Check("packages", "packages", INSTALL, core=True),
    Check("torch", "torch", INSTALL, core=True),
    Check(
        "disk",
        "disk",
        "remove old runs under logs/, or write elsewhere: runner.logger.log_path=PATH",
        core=True,
    ),
    Check("shared", "shared memory", "start the container with --shm-size=2g", core=True),
    Check("gpu", "GPU", f"RLINF_DEVICE=cuda {INSTALL}"),
    Check("maniskill", "ManiSkill", MANISKILL),
    Check("vulkan", "Vulkan", MANISKILL),
    Check("ffmpeg", "video", INSTALL),
    Check("frankasim", "Franka-Sim", FRANKASIM),
    Check("mujoco", "MuJoCo and EGL", FRANKASIM),
    Check("libero", "LIBERO", LIBERO),
    Check("ray", "Ray", ""),
    Check("wandb", "wandb", f'{sys.executable} -m pip install -e ".[wandb]"'),
    Check("swanlab", "SwanLab", f'{sys.executable} -m pip install -e ".[swanlab]"'),
)
# Missing, and fine so: only some recipes need it, or none of this version.
OPTIONAL = {"gpu", "frankasim", "mujoco", "libero", "ray"}
SIGNS: Mapping[State, tuple[str, str]] = {
    "works": ("ok", "32"),
    "missing": ("--", "33"),
    "broken": ("XX", "31"),
}


def examine(timeout_s: float) -> int:
    """Run all checks, print what they found; exit code 1 when a core part does not work."""
    with ThreadPoolExecutor(max_workers=max(2, min(4, os.cpu_count() or 2))) as pool:
        findings = list(pool.map(lambda check: look(check, timeout_s), CHECKS))
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\n".join(report(findings, shutil.get_terminal_size((100, 24)).columns, color)))
    return 1 if any(finding.check.core and finding.state != "works" for finding in findings) else 0


def look(check: Check, timeout_s: float) -> Finding:
    """Run one check in a process of its own, so that its crash or its silence is a finding too."""
    command = [sys.executable, "-W", "ignore", "-m", "rlinf.launch.cli.probes", check.probe]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with its children, which hold the pipes open
        process.communicate()
        return Finding(check, "broken", f"no answer within {timeout_s:g} s")
    lines = stdout.strip().splitlines()
    if process.returncode == 0 and lines and lines[-1].startswith("{"):
        answer = json.loads(lines[-1])
        return Finding(check, answer["state"], answer["detail"])
    if process.returncode < 0:
        return Finding(check, "broken", f"crashed with {signal.Signals(-process.returncode).name}")
    words = stderr.strip().splitlines() or ["no message"]
    return Finding(check, "broken", f"ended with exit code {process.returncode}: {words[-1]}")


def report(findings: list[Finding], width: int, color: bool) -> list[str]:
    """Lines of the table, then the commands that mend what is missing or broken, unfolded to be copied."""
    margin = max(len(finding.check.title) for finding in findings)
    indent = " " * (margin + 14)
    lines = []
    for finding in findings:
        sign, code = SIGNS[finding.state]
        sign = f"{sign} {finding.state:<7}"
        head = f"{finding.check.title:<{margin}}  {sign}  "
        text = textwrap.wrap(finding.detail, max(30, width - len(indent)), break_on_hyphens=False) or [""]
        painted = head.replace(sign, f"\x1b[{code}m{sign}\x1b[0m") if color else head
        lines += [painted + text[0], *(indent + line for line in text[1:])]
    mends: dict[str, list[str]] = {}
    for finding in findings:
        fine = finding.state == "works" or (finding.state == "missing" and finding.check.probe in OPTIONAL)
        if not fine and finding.check.mend:
            mends.setdefault(finding.check.mend, []).append(finding.check.title)
    if mends:
        lines += ["", "To mend or to add:"]
        for mend, titles in mends.items():
            lines += [f"  {', '.join(titles)}:", f"    {mend}"]
    failed = [finding.check.title for finding in findings if finding.check.core and finding.state != "works"]
    lines += ["", f"The core does not work: {', '.join(failed)}." if failed else "The core works."]
    return lines
