"""The processes of a run, as its configuration asks for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from rlinf.launch.cluster_config import node_groups_of, resolve_backend
from rlinf.launch.config import Root
from rlinf.launch.crew import Layout
from rlinf.launch.machine import prepare_process, this_node
from rlinf.launch.plan_check import check_plan
from rlinf.runtime.cluster import Machine, Reservation, Robot, joined, reserved
from rlinf.runtime.interface import Runtime
from rlinf.runtime.local import LocalRuntime
from rlinf.runtime.placement import Node, Plan, Process, make_plan

if TYPE_CHECKING:
    from rlinf.runtime.ray_backend import Seat

LOOPBACK = "127.0.0.1"
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Venue:
    """What a run is spread over: the machines of its Ray cluster, none when it is one process, and who runs where.

    `robots` has, by the rank of the env process, the robots that no other run of the cluster gets meanwhile.
    """

    plan: Plan
    machines: tuple[Machine, ...] = ()
    robots: Mapping[int, Reservation] = field(default_factory=dict)


@contextlib.contextmanager
def open_venue(config: Root, note: Callable[[str], None]) -> Iterator[Venue]:
    """Find the machines of the configuration and check that they can do what it asks for. Starts none of its workers.

    Args:
        note: gets a line now and then while machines are missing, or where a robot is not free.

    Raises ConfigError when the machines do not have what the placement asks for; MissingDependency, WorkerDied as
    `joined` and `reserved`.
    """
    cluster = config.cluster
    if cluster.num_nodes == 1 and cluster.address is None:
        plan = make_plan(cluster.component_placement, [this_node(config)], node_groups_of(cluster))
        check_plan(config, plan)
        if resolve_backend(cluster, plan) == "local":
            prepare_process(config)
            yield Venue(plan)
            return
    with joined(cluster.num_nodes, address=cluster.address, note=note) as machines:
        nodes = nodes_of(machines, accelerators=config.profile == "gpu")
        plan = make_plan(cluster.component_placement, nodes, node_groups_of(cluster))
        check_plan(config, plan)
        robots = robots_of(plan, machines)
        with reserved(list(robots.values()), note) as held:
            found = {rank: own for rank, own in zip(robots, held, strict=True) if own is not None}
            yield Venue(plan, tuple(machines), found)


@contextlib.contextmanager
def open_runtime(config: Root, venue: Venue, note: Callable[[str], None]) -> Iterator[tuple[Runtime, Layout]]:
    """The runtime of the configuration and who sits where; its processes end with the context.

    Args:
        note: gets a line whenever something takes long.
    """
    if not venue.machines:
        yield LocalRuntime(note), Layout()
        return
    from rlinf.runtime.ray_backend import RayRuntime

    machines, stages = venue.machines, config.rollout.pipeline_stage_num
    hosts = venue.plan.hosts(stages)
    where = "this machine" if len(machines) == 1 else ", ".join(machine.name for machine in machines)
    note(f"starting {len(hosts)} processes on {where}")
    seats = seats_of(hosts, machines, venue.plan.nodes, venue.robots)
    runtime = RayRuntime(seats, partial(prepare_process, config, needs_device=False), note)
    try:
        yield runtime, layout_of(venue.plan, hosts, stages)
    finally:
        runtime.close()


def nodes_of(machines: Sequence[Machine], *, accelerators: bool) -> list[Node]:
    """The machines as nodes of a placement, ranked in their order; without their accelerators if these are not used."""
    return [
        Node(
            rank,
            machine.name,
            machine.ip,
            machine.num_gpus if accelerators else 0,
            machine.num_cpus,
            machine.resources,
            machine.labels,
        )
        for rank, machine in enumerate(machines)
    ]


def robots_of(plan: Plan, machines: Sequence[Machine]) -> dict[int, Robot]:
    """The robot of every env process that has one, by rank."""
    return {
        process.rank: Robot(process.hardware_kind, process.hardware, machines[process.node_rank])
        for process in plan.processes["env"]
        if process.hardware is not None and process.hardware_kind is not None
    }


def seats_of(
    hosts: Sequence[Sequence[Process]],
    machines: Sequence[Machine],
    nodes: Sequence[Node] = (),
    robots: Mapping[int, Reservation] | None = None,
) -> list[Seat]:
    """Where every process is started, and with what environment.

    Args:
        hosts: the processes of the plan that share one process of the system.
        machines: by rank.
        nodes: the same as the plan has them: a process that it gives none of a node's accelerators sees none.
        robots: what is reserved, by the rank of the env process.
    """
    from rlinf.runtime.ray_backend import Seat

    accelerators = {node.rank: node.num_accelerators for node in nodes}
    seats = []
    for processes in hosts:
        first, machine = processes[0], machines[processes[0].node_rank]
        own = (robots.get(process.rank) for process in processes if process.role == "env") if robots else ()
        seats.append(
            Seat(
                " + ".join(f"{process.role} {process.rank}" for process in processes),
                machine.node_id,
                LOOPBACK if len(machines) == 1 else machine.ip,
                machine.name,
                first.devices,
                first.env_vars,
                first.python,
                sees_none=accelerators.get(first.node_rank, 0) > 0 and VISIBLE_DEVICES not in first.env_vars,
                robot=next(iter(own), None),
            )
        )
    return seats


def layout_of(plan: Plan, hosts: Sequence[Sequence[Process]], num_stages: int) -> Layout:
    """Who sits in which of `hosts`, and who talks to whom."""
    sits = {(process.role, process.rank): index for index, processes in enumerate(hosts) for process in processes}
    routes = plan.routes(num_stages)

    def of(role: str) -> tuple[int, ...]:
        return tuple(sits[role, rank] for rank in range(plan.world_size(role)))

    return Layout(
        of("env"),
        of("rollout"),
        of("actor"),
        dict(routes.rollout),
        dict(routes.learners),
        tuple(processes[0].node_rank for processes in hosts),
        backend="ray",
    )
