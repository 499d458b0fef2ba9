"""Machines, devices and robots: how a run is spread over them, as it is written in a configuration.

What a placement means is decided in `rlinf.runtime.placement`; here it gets its keys and its choice of a backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from rlinf.core.config import Config
from rlinf.core.errors import ConfigError
from rlinf.runtime.placement import NodeGroup, Plan, process_counts
from rlinf.runtime.placement_text import KEY, parse_ranks

Backend = Literal["local", "ray"]


class NodeEnvConfig(Config):
    """What the processes on some nodes of a group start with."""

    node_ranks: tuple[NonNegativeInt, ...] = Field(description="These nodes: 0, 0-3 or a list.")
    env_vars: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables of the processes there, as a mapping or as a list of mappings.",
    )
    python_interpreter_path: str | None = Field(
        None, description="Python that runs the processes there; null: the one that runs the whole."
    )

    @field_validator("node_ranks", mode="before")
    @classmethod
    def _read_ranks(cls, ranks: Any) -> Any:
        return _node_ranks(ranks)

    @field_validator("env_vars", mode="before")
    @classmethod
    def _one_mapping(cls, given: Any) -> Any:
        listed = given if isinstance(given, (list, tuple)) else [given]
        if not all(isinstance(part, Mapping) for part in listed):
            return given
        merged = {str(name): value for part in listed for name, value in part.items()}
        for name, value in merged.items():
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise ValueError(f"{name} should be text or a number; put it in quotes")
        return {name: str(value) for name, value in merged.items()}


class RobotConfig(Config):
    """One robot."""

    robot_ip: str = Field(min_length=1, description="Address of the robot's controller; names the robot in messages.")
    node_rank: NonNegativeInt = Field(description="Rank of the node that controls it.")


class HardwareConfig(Config):
    """The robots of a node group."""

    type: Literal["Franka"] = Field("Franka", description="Kind of robot.")
    configs: tuple[RobotConfig, ...] = Field(min_length=1, description="The robots; the first is robot 0.")


class NodeGroupConfig(Config):
    """Nodes that are alike, under a label that a role's `node_group` names."""

    label: str = Field(min_length=1, description="Name of the group; cluster and node are reserved.")
    node_ranks: tuple[NonNegativeInt, ...] = Field(min_length=1, description="Its nodes: 0, 0-3 or a list.")
    env_configs: tuple[NodeEnvConfig, ...] = Field((), description="Environment variables and Python of its nodes.")
    hardware: HardwareConfig | None = Field(
        None, description="Robots of the group; roles that are placed in it are placed on these. null: none."
    )

    @field_validator("label", mode="before")
    @classmethod
    def _number_as_label(cls, label: Any) -> Any:
        return str(label) if isinstance(label, int) and not isinstance(label, bool) else label

    @field_validator("node_ranks", mode="before")
    @classmethod
    def _read_ranks(cls, ranks: Any) -> Any:
        return _node_ranks(ranks)


def _node_ranks(ranks: Any) -> Any:
    """Ranks as written (a number, "0-3,5", or a list of such) as a list of numbers; anything else as it is."""
    listed = ranks if isinstance(ranks, (list, tuple)) else [ranks]
    if any(isinstance(part, bool) or not isinstance(part, (int, str)) for part in listed):
        return ranks
    text = ",".join(str(part) for part in listed)
    try:
        return list(parse_ranks(text, "node ranks"))
    except ConfigError as problem:
        raise ValueError(str(problem)) from None


class ClusterConfig(Config):
    """Machines and devices."""

    num_nodes: PositiveInt = Field(1, description="Machines of the run.")
    component_placement: dict[str, Any] | str = Field(
        "actor,env,rollout: 0",
        description="Roles → resources, with one process on each: `env,rollout: 0-7`, `actor: all`; `0-3:0-7` puts "
        "processes 0-7 on resources 0-3. A mapping {node_group, placement} in place of the ranks chooses nodes too. "
        "Resources are the robots of the node group, else its accelerators, else (on CPUs) its nodes.",
    )
    node_groups: tuple[NodeGroupConfig, ...] = Field(
        (), description="Groups of nodes that placements name, besides cluster (all nodes) and node (all, as nodes)."
    )
    backend: Literal["auto", "local", "ray"] = Field(
        "auto",
        description="How the roles are run. local: threads of one process; ray: processes on one or several machines; "
        "auto: local where one process of each role on at most one accelerator is all, else ray.",
    )
    address: str | None = Field(
        None, description="Address of the Ray cluster to join; null: join the one that runs here or start one."
    )
    max_restarts: NonNegativeInt = Field(
        3, description="So often a process of env or rollout that dies is replaced under Ray; then the run ends."
    )


def node_groups_of(cluster: ClusterConfig) -> tuple[NodeGroup, ...]:
    """The node groups as placement wants them; a robot is named by its address."""
    return tuple(
        NodeGroup(
            group.label,
            group.node_ranks,
            {rank: entry.env_vars for entry in group.env_configs for rank in entry.node_ranks},
            {
                rank: entry.python_interpreter_path
                for entry in group.env_configs
                for rank in entry.node_ranks
                if entry.python_interpreter_path is not None
            },
            tuple((group.hardware.type, robot.node_rank, robot.robot_ip) for robot in group.hardware.configs)
            if group.hardware is not None
            else (),
        )
        for group in cluster.node_groups
    )


def cluster_problems(cluster: ClusterConfig) -> tuple[list[tuple[str, str]], dict[str, int | None]]:
    """(key, message) of what is wrong on any nodes, and the processes of every role as far as they are known."""
    try:
        counts = process_counts(cluster.component_placement, cluster.num_nodes, node_groups_of(cluster))
    except ConfigError as problem:
        key, _, _ = str(problem).partition(":")
        return [(key if key == "cluster.node_groups" else KEY, str(problem))], {}
    beyond = next(_beyond_local(cluster, counts), None)
    if cluster.backend == "local" and beyond is not None:
        return [("cluster.backend", _only_local(beyond))], counts
    if cluster.backend == "local" and cluster.address is not None:
        return [("cluster.address", f"cluster.address ({cluster.address}) names a Ray cluster to join, and "
                 "cluster.backend: local joins none; write ray or auto, or remove the address")], counts  # fmt: skip
    return [], counts


def resolve_backend(cluster: ClusterConfig, plan: Plan) -> Backend:
    """The backend that `cluster.backend` means for this plan.

    Raises ConfigError where it says local and the plan needs more than one process.
    """
    beyond = reason_for_ray(cluster, plan)
    if cluster.backend == "local" and beyond is not None:
        raise ConfigError(_only_local(beyond))
    return "ray" if cluster.backend == "ray" or beyond is not None else "local"


def reason_for_ray(cluster: ClusterConfig, plan: Plan) -> str | None:
    """What of the plan one process cannot do; None where it can do all."""
    counts = {role: plan.world_size(role) for role in plan.processes}
    if (beyond := next(_beyond_local(cluster, counts), None)) is not None:
        return beyond
    processes = [process for role in plan.processes.values() for process in role]
    devices = sorted({device for process in processes for device in process.devices})
    if devices not in ([], [0]):
        return f"the roles are on accelerator{'s' * (len(devices) > 1)} {', '.join(map(str, devices))}"
    if any(process.env_vars or process.python for process in processes):
        return "cluster.node_groups sets up the processes (env_configs)"
    return None


def _beyond_local(cluster: ClusterConfig, counts: Mapping[str, int | None]) -> Iterator[str]:
    if cluster.num_nodes > 1:
        yield f"cluster.num_nodes is {cluster.num_nodes}"
    for role, count in counts.items():
        if count is not None and count > 1:
            yield f"{role} has {count} processes"


def _only_local(beyond: str) -> str:
    return (
        "cluster.backend: local runs one process of each role on one machine and accelerator 0, but "
        f"{beyond}; write ray or auto"
    )
