"""Joining the machines of a run through Ray."""

from __future__ import annotations

import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlinf.core.errors import MissingDependency, WorkerDied, first_line

JOIN_TIMEOUT_S = 600.0
NOTE_EVERY_S = 15.0
RESERVE_TIMEOUT_S = 20.0
"""For the robot of a run that has just ended to be free again."""
NOTE_AFTER_S = 2.0


@dataclass(frozen=True)
class Machine:
    """A machine that Ray runs on.

    Attributes:
        node_id, name: as Ray calls it; the name is that given to `ray start --node-name`, or its address.
        ip: address at which other machines of the run reach it.
        num_cpus, num_gpus: that Ray may use.
        resources: named ones beside these, robots for instance, with their number.
        labels: given to `ray start --labels`.
    """

    node_id: str
    name: str
    ip: str
    num_cpus: int
    num_gpus: int
    resources: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Robot:
    """A robot of a run, by its kind, which is what its machine offers (`ray start --resources`), and its name."""

    kind: str
    name: str
    machine: Machine


@dataclass(frozen=True)
class Reservation:
    """One of a kind of robots on one machine, kept from all other runs; `group` is the placement group that has it."""

    kind: str
    group: Any = field(compare=False)


@contextmanager
def reserved(
    robots: Sequence[Robot], note: Callable[[str], None] = lambda text: None, timeout_s: float = RESERVE_TIMEOUT_S
) -> Iterator[list[Reservation | None]]:
    """Keep other runs of the cluster from these robots; None for one that its machine does not offer to Ray.

    They are free again with the end of the context, or of this process however it ends.

    Args:
        note: gets a line where one is not free at once.

    Raises WorkerDied, naming the robot and who holds it, where one is not free after `timeout_s`.
    """
    with ExitStack() as held:
        yield [
            held.enter_context(_reservation(robot, note, timeout_s))
            if robot.machine.resources.get(robot.kind, 0) > 0
            else None
            for robot in robots
        ]


@contextmanager
def _reservation(robot: Robot, note: Callable[[str], None], timeout_s: float) -> Iterator[Reservation]:
    from ray.util import placement_group, remove_placement_group

    group = placement_group(
        [{robot.kind: 1}],
        name=f"rlinf {robot.kind} {secrets.token_hex(4)}: process {os.getpid()} on {platform.node()}",
        bundle_label_selector=[{"ray.io/node-id": robot.machine.node_id}],
    )
    try:
        first_s = min(NOTE_AFTER_S, timeout_s)
        if not group.wait(first_s):
            called = (
                f"robot {robot.name} ({robot.kind} on {robot.machine.name}) is held by another run{_holders(robot)}"
            )
            note(f"{called}; waiting up to {timeout_s:g} s")
            if not group.wait(timeout_s - first_s):
                raise WorkerDied(f"{called}; end that run, or start this one when it has ended")
        yield Reservation(robot.kind, group)
    finally:
        remove_placement_group(group)


def _holders(robot: Robot) -> str:
    """The driver processes that hold robots of this kind on this machine, in brackets; nothing where they hide."""
    from ray.util import placement_group_table

    names = [
        entry["name"].partition(": ")[2]
        for entry in placement_group_table().values()
        if entry["state"] == "CREATED"
        and entry["name"].startswith(f"rlinf {robot.kind} ")
        and robot.machine.node_id in entry["bundles_to_node_id"].values()
    ]
    return f" ({', '.join(names)})" if names else ""


@contextmanager
def joined(
    num_nodes: int = 1,
    *,
    address: str | None = None,
    note: Callable[[str], None] = lambda text: None,
    timeout_s: float = JOIN_TIMEOUT_S,
) -> Iterator[list[Machine]]:
    """The machines of a Ray cluster, the one that Ray's head is on first. Leaves the cluster at the end.

    Without an address: the cluster that `ray start` made this machine part of, or for one node a new one that ends with
    the context.

    Args:
        note: gets a line now and then while machines are missing.

    Raises MissingDependency where Ray is not installed, WorkerDied when there is no cluster or a machine does not come.
    """
    if "ray" not in sys.modules:  # it has read the environment when it was imported
        show_token()
    try:
        import ray
    except ImportError as error:
        raise MissingDependency(
            "several processes need Ray: pip install 'rlinf[ray]', or bash requirements/install.sh embodied --ray"
        ) from error
    ours = not ray.is_initialized()
    if ours:
        _initialise(address or os.environ.get("RAY_ADDRESS"), num_nodes)
        # Ray would print a paragraph for each process that dies; the run itself says so, in a line.
        ray._private.worker._worker_logs_enabled = False
    try:
        machines = _gather(num_nodes, note, timeout_s)
        if len(machines) > num_nodes:
            raise WorkerDied(
                f"{len(machines)} machines are there ({', '.join(machine.name for machine in machines)}) and "
                f"cluster.num_nodes is {num_nodes}: which of them are meant? Write {len(machines)}, or take the others "
                "out with: bash examples/embodiment/ray_up.sh down"
            )
        _require_names(machines)
        yield machines
    finally:
        if ours:
            ray.shutdown()


def show_token() -> None:
    """Let Ray show this machine's token, where it has one, to the cluster that it joins; before Ray is imported.

    To a cluster that is named by its address Ray would not, and be refused by those that `ray_up.sh` makes. One that
    asks for no token, although there is one here, takes RAY_AUTH_MODE=disabled.
    """
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_TOKEN" in os.environ or path.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _initialise(address: str | None, num_nodes: int) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray runs its processes at niceness 15: whatever else the machine does would come before a run's own work.
    os.environ.setdefault("RAY_worker_niceness", "0")
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if (address := address or _started_here()) is None and num_nodes == 1:
        ray.init("local", include_dashboard=False, **quiet)
        return
    try:
        if address is None:
            raise ConnectionError("none was started")
        ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"at {address}" if address else "on this machine"
        raise WorkerDied(
            f"no Ray cluster answers {where} ({first_line(error)}); start it with: "
            "bash examples/embodiment/ray_up.sh head, and on every other machine: "
            "bash examples/embodiment/ray_up.sh worker HEAD_ADDRESS"
        ) from error


def _started_here() -> str | None:
    """Address of the cluster that `ray start` made this machine part of; those that other runs have to themselves are
    none of ours.
    """
    from ray._private.services import find_bootstrap_address, find_gcs_addresses

    address = find_bootstrap_address(None)
    return address if address in find_gcs_addresses() else None


def _gather(num_nodes: int, note: Callable[[str], None], timeout_s: float) -> list[Machine]:
    began = noted = time.monotonic()
    while len(machines := alive()) < num_nodes:
        now = time.monotonic()
        here = ", ".join(machine.name for machine in machines) or "none"
        waiting = f"{len(machines)} of {num_nodes} machines are there ({here})"
        if now - began > timeout_s:
            raise WorkerDied(
                f"{waiting} after {timeout_s:g} s; start the others with: "
                "bash examples/embodiment/ray_up.sh worker HEAD_ADDRESS, or lower cluster.num_nodes"
            )
        if now - noted > NOTE_EVERY_S:
            note(f"waiting for machines: {waiting}")
            noted = now
        time.sleep(0.2)
    return machines


def _require_names(machines: Sequence[Machine]) -> None:
    """Machines are numbered by name after the head: of two with one name, each run might take the other one."""
    for one, other in pairwise(machines[1:]):
        if one.name == other.name:
            raise WorkerDied(
                f"two machines are called '{one.name}' ({one.ip} and {other.ip}), and machines are numbered by name; "
                "start one of them anew: bash examples/embodiment/ray_up.sh worker HEAD_ADDRESS --name ANOTHER"
            )


def alive() -> list[Machine]:
    """The machines that take part now, the head first, the others by name."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    machines = [_machine(node) for node in nodes]
    heads = {node["NodeID"] for node in nodes if "node:__internal_head__" in node["Resources"]}
    return sorted(machines, key=lambda machine: (machine.node_id not in heads, machine.name, machine.node_id))


def _machine(node: dict[str, Any]) -> Machine:
    resources = dict(node["Resources"])
    counts = {name: int(resources.pop(name, 0)) for name in ("CPU", "GPU")}
    own = {name: number for name, number in resources.items() if not name.startswith(("node:", "memory", "object_"))}
    ip = node["NodeManagerAddress"]
    name = node.get("NodeName") or ip
    return Machine(node["NodeID"], name, ip, counts["CPU"], counts["GPU"], own, dict(node.get("Labels") or {}))
