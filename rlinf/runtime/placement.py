"""Which process of which role runs where: `make_plan` turns a placement and the nodes there are into a `Plan`.

How placements are written stands in `placement_text`, who talks to whom in `routes`. Nothing here starts anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlinf.core.errors import ConfigError
from rlinf.runtime.placement_text import (
    EVERYWHERE,
    KEY,
    RolePlacement,
    Span,
    check_divides,
    did_you_mean,
    read_placement,
)
from rlinf.runtime.routes import Routes, make_routes

NODES_ALONE = "node"
"""The node group whose resources are all nodes themselves, whatever accelerators they have."""
RESERVED = (EVERYWHERE, NODES_ALONE)


@dataclass(frozen=True)
class Node:
    """A machine. `resources` are further things that it offers, by name; `labels` are what it was started with."""

    rank: int
    name: str = ""
    address: str = ""
    num_accelerators: int = 0
    num_cpus: int = 1
    resources: Mapping[str, float] = field(default_factory=dict, hash=False)
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class NodeGroup:
    """Nodes under a label.

    `env_vars` and `python_interpreter` hold, by node rank, what processes of this group get there. `hardware` are
    its robots: (type, rank of the node that controls it, name).
    """

    label: str
    node_ranks: tuple[int, ...]
    env_vars: Mapping[int, Mapping[str, str]] = field(default_factory=dict, hash=False)
    python_interpreter: Mapping[int, str] = field(default_factory=dict, hash=False)
    hardware: tuple[tuple[str, int, str], ...] = ()


@dataclass(frozen=True)
class Process:
    """One process of a role.

    `devices` are indices of accelerators on its node, none on a CPU; `hardware` is the name of its robot and
    `hardware_kind` what it is. `python` is the interpreter that runs it, None for the one of the run.
    """

    role: str
    rank: int
    node_rank: int
    devices: tuple[int, ...] = ()
    hardware: str | None = None
    env_vars: Mapping[str, str] = field(default_factory=dict, hash=False)
    python: str | None = None
    hardware_kind: str | None = None

    @property
    def place(self) -> tuple[int, tuple[int, ...]]:
        """(node rank, devices)."""
        return self.node_rank, self.devices


@dataclass(frozen=True)
class Plan:
    """All processes of a run, by role and in order of rank, and the nodes they run on."""

    nodes: tuple[Node, ...]
    processes: Mapping[str, tuple[Process, ...]]

    def world_size(self, role: str) -> int:
        """Number of processes of a role."""
        return len(self.processes[role])

    def is_collocated(self, env_process: Process, rollout_process: Process) -> bool:
        """Whether both use the same devices of the same node."""
        return env_process.place == rollout_process.place

    def routes(self, num_stages: int = 1) -> Routes:
        """Who answers whom with so many pipeline stages. Raises ConfigError when a rollout process has nobody."""
        env, rollout, learner = ([process.place for process in self.processes[r]] for r in ("env", "rollout", "actor"))
        return make_routes(env, rollout, learner, num_stages)

    def hosts(self, num_stages: int = 1) -> tuple[tuple[Process, ...], ...]:
        """The processes that share one operating-system process, for every such process.

        An environment process and the rollout process that answers it share one when they are collocated and the
        latter answers no other: their messages then need no copy. All others are alone.
        """
        routes, hosts = self.routes(num_stages), list[tuple[Process, ...]]()
        rollout_alone = dict(enumerate(self.processes["rollout"]))
        for process in self.processes["env"]:
            own = {source for source in routes.rollout if source[0] == process.rank}
            servers = {routes.rollout[source] for source in own}
            server = self.processes["rollout"][min(servers)]
            alike = (process.python, process.env_vars) == (server.python, server.env_vars)
            exclusive = len(servers) == 1 and set(routes.sources_of(server.rank)) == own
            if exclusive and alike and self.is_collocated(process, server):
                hosts.append((process, rollout_alone.pop(server.rank)))
            else:
                hosts.append((process,))
        return (*hosts, *((process,) for process in (*rollout_alone.values(), *self.processes["actor"])))


@dataclass(frozen=True)
class _Resource:
    """What a process can be placed on: an accelerator, a robot, or a node as such."""

    node_rank: int
    accelerator: int | None = None
    hardware: str | None = None
    hardware_kind: str | None = None


def make_plan(placement: Mapping[str, Any] | str, nodes: Sequence[Node], groups: Sequence[NodeGroup] = ()) -> Plan:
    """Place every role on `nodes`.

    The resources of a role are the robots of its node group if that has any, else the accelerators of the group's
    nodes in order of node rank, else those nodes themselves.

    Args:
        placement: as `placement_text.read_placement` takes it.
        groups: what a role's `node_group` may name besides `cluster` (all nodes) and `node` (all, as nodes).

    Raises:
        ConfigError: in one sentence, when the placement cannot be read or the nodes do not have what it asks for.
    """
    nodes = sorted(nodes, key=lambda node: node.rank)
    if missing := sorted(set(range(max(len(nodes), 1))) - {node.rank for node in nodes}):
        raise ConfigError(f"cluster.num_nodes: node {missing[0]} is missing; start it, or give it that rank")
    wanted = read_placement(placement)
    check_groups(groups, len(nodes))
    processes = {}
    for role, where in wanted.items():
        members = _members(role, where, groups)
        resources = _resources(where, nodes, members)
        held = _held(role, where, resources, _scope(where, nodes, members, resources))
        processes[role] = tuple(_process(role, rank, own, members) for rank, own in enumerate(held))
    return Plan(tuple(nodes), processes)


def process_counts(
    placement: Mapping[str, Any] | str, num_nodes: int, groups: Sequence[NodeGroup] = ()
) -> dict[str, int | None]:
    """Processes of every role as far as they are known without looking at the nodes; None for all accelerators.

    Raises ConfigError as `make_plan` does, for whatever is wrong on any nodes.
    """
    check_groups(groups, num_nodes)
    bare, counts = [Node(rank) for rank in range(num_nodes)], dict[str, int | None]()
    for role, where in read_placement(placement).items():
        members = _members(role, where, groups)
        if where.node_groups == (NODES_ALONE,) or any(group.hardware for group in members):
            resources = _resources(where, bare, members)
            counts[role] = len(_held(role, where, resources, _scope(where, bare, members, resources)))
        elif any(span.resources is None and span.num_processes is None for span in where.spans):
            counts[role] = None
        else:
            counts[role] = sum(span.num_processes or len(span.resources or ()) for span in where.spans)
    return counts


def check_groups(groups: Sequence[NodeGroup], num_nodes: int) -> None:
    """Raise ConfigError when a label is reserved or there twice, or a group holds what its nodes cannot have."""
    labels = [group.label for group in groups]
    there = f"{_nodes(num_nodes)} ({'0' if num_nodes == 1 else f'0-{num_nodes - 1}'})"
    for position, group in enumerate(groups):
        where = f"cluster.node_groups: {group.label}"
        if group.label in RESERVED:
            raise ConfigError(f"{where} is a reserved label; choose another")
        if not group.node_ranks:
            raise ConfigError(f"{where} has no nodes; name some in node_ranks")
        if group.label in labels[:position]:
            raise ConfigError(f"{where} is there twice; give each group a label of its own")
        if absent := [rank for rank in group.node_ranks if rank >= num_nodes]:
            raise ConfigError(
                f"{where} needs node {absent[0]}, but the run has {there}; correct node_ranks or raise "
                "cluster.num_nodes"
            )
        set_up = {*group.env_vars, *group.python_interpreter, *(rank for _, rank, _ in group.hardware)}
        if strangers := sorted(set_up - set(group.node_ranks)):
            raise ConfigError(
                f"{where} configures node {strangers[0]}, which is not among its nodes; add it to node_ranks or "
                "correct the entry"
            )


def _members(role: str, where: RolePlacement, groups: Sequence[NodeGroup]) -> list[NodeGroup]:
    """The declared groups that the role names."""
    by_label = {group.label: group for group in groups}
    for label in where.node_groups:
        if label not in by_label and label not in RESERVED:
            hint = did_you_mean(label, [*by_label, *RESERVED])
            raise ConfigError(f"{KEY}: {role}: no node group is called {label!r}; {hint}")
    if NODES_ALONE in where.node_groups and len(where.node_groups) > 1:
        raise ConfigError(f"{KEY}: {role}: node group {NODES_ALONE} means all nodes; name it alone")
    members = [by_label[label] for label in where.node_groups if label in by_label]
    with_hardware = [group for group in members if group.hardware]
    if with_hardware and len(with_hardware) < len(where.node_groups):
        other = next(label for label in where.node_groups if label not in {group.label for group in with_hardware})
        raise ConfigError(
            f"{KEY}: {role}: node group {with_hardware[0].label} has robots and {other} has none; name groups of one "
            "kind"
        )
    return members


def _resources(where: RolePlacement, nodes: Sequence[Node], members: Sequence[NodeGroup]) -> list[_Resource]:
    robots = [
        _Resource(rank, hardware=name, hardware_kind=kind) for group in members for kind, rank, name in group.hardware
    ]
    if robots:
        return robots
    everywhere = bool(set(where.node_groups) & set(RESERVED))
    mine = [node for node in nodes if everywhere or any(node.rank in group.node_ranks for group in members)]
    accelerators = [_Resource(node.rank, index) for node in mine for index in range(node.num_accelerators)]
    as_nodes = where.node_groups == (NODES_ALONE,) or not accelerators
    return [_Resource(node.rank) for node in mine] if as_nodes else accelerators


def _scope(
    where: RolePlacement, nodes: Sequence[Node], members: Sequence[NodeGroup], resources: Sequence[_Resource]
) -> tuple[str, str, str]:
    """(what a resource is called, who has how many of them, how to have more), for messages."""
    labels = " and ".join(where.node_groups)
    whole = where.node_groups in ((EVERYWHERE,), (NODES_ALONE,))
    if resources[0].hardware is not None:
        return "robot", f"node group {labels} has {len(resources)}", "add robots to its hardware.configs"
    num_nodes = len(nodes) if whole else len({rank for group in members for rank in group.node_ranks})
    who = f"the {_nodes(num_nodes)}" + ("" if whole else f" of node group {labels}")
    more = "raise cluster.num_nodes" if whole else "add nodes to its node_ranks"
    if resources[0].accelerator is not None:
        return "accelerator", f"{who} {'has' if num_nodes == 1 else 'have'} {len(resources)}", more
    bare = "" if where.node_groups == (NODES_ALONE,) else " and no accelerator"
    return "node", f"there {'is' if num_nodes == 1 else 'are'} {who.removeprefix('the ')}{bare}", more


def _held(
    role: str, where: RolePlacement, resources: Sequence[_Resource], scope: tuple[str, str, str]
) -> list[tuple[_Resource, ...]]:
    """The resources of every process of a role, in order of rank."""
    asked = f"{KEY}: {role}: {where.text}"
    kind, who_has, more = scope
    highest = max(span.resources[-1] for span in where.spans if span.resources) if where.spans[0].resources else 0
    if highest >= len(resources):
        fewer = "write 0" if len(resources) == 1 else f"stay below {len(resources)}"
        minutes = f" (without quotes, YAML reads {highest // 60}:{highest % 60} as {highest})"
        read = minutes if highest >= 60 and where.text == str(highest) else ""
        raise ConfigError(f"{asked} needs {kind} {highest}, but {who_has}; {fewer} or {more}{read}")
    held: list[tuple[_Resource, ...]] = []
    for span in where.spans:
        held += _split(asked, span, resources)
    for rank, own in enumerate(held):
        if len({resource.node_rank for resource in own}) > 1:
            first, last = own[0].node_rank, own[-1].node_rank
            raise ConfigError(
                f"{asked} spreads process {rank} over nodes {first} and {last}; give each process resources of one node"
            )
    if kind == "robot" and not len(held) == len({own[0] for own in held}) == sum(map(len, held)):
        raise ConfigError(f"{asked} does not give every robot a process of its own; name the robots without a colon")
    return held


def _split(asked: str, span: Span, resources: Sequence[_Resource]) -> list[tuple[_Resource, ...]]:
    own = [resources[rank] for rank in (range(len(resources)) if span.resources is None else span.resources)]
    num_processes = span.num_processes or len(own)
    check_divides(num_processes, len(own), asked)
    if num_processes >= len(own):
        return [(resource,) for resource in own for _ in range(num_processes // len(own))]
    size = len(own) // num_processes
    return [tuple(own[begin : begin + size]) for begin in range(0, len(own), size)]


def _process(role: str, rank: int, own: Sequence[_Resource], members: Sequence[NodeGroup]) -> Process:
    node_rank, env_vars, python = own[0].node_rank, dict[str, str](), None
    for group in members:
        env_vars |= group.env_vars.get(node_rank, {})
        python = group.python_interpreter.get(node_rank, python)
    return Process(
        role,
        rank,
        node_rank,
        tuple(resource.accelerator for resource in own if resource.accelerator is not None),
        own[0].hardware,
        env_vars,
        python,
        own[0].hardware_kind,
    )


def _nodes(count: int) -> str:
    return f"{count} node" + ("s" if count > 1 else "")
