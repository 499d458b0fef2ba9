"""Whether a configuration fits the processes of its plan, on the nodes that are there; before any of them starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

from rlinf.core.errors import ConfigError
from rlinf.envs.realworld.config import ROBOT_URL, RealWorldConfig
from rlinf.launch.cluster_config import node_groups_of
from rlinf.launch.config import Root, share_problems
from rlinf.runtime.placement import Node, Plan
from rlinf.runtime.placement_text import KEY as PLACEMENT

NODE_GROUPS = "cluster.node_groups"
OWN = ("127.0.0.1", "localhost")
"""Hosts that are another one on every node."""


def check_plan(root: Root, plan: Plan) -> None:
    """Raise ConfigError, with a line for each problem, when batches, environments, devices or robots do not fit."""
    counts = {role: plan.world_size(role) for role in plan.processes}
    problems = [message for _, message in share_problems(root, counts)]
    problems += [*_device_problems(root, plan), *_offer_problems(root, plan), *_arm_problems(root, plan)]
    if problems:
        raise ConfigError("\n".join(problems))


def _device_problems(root: Root, plan: Plan) -> Iterator[str]:
    places = [process.place for process in plan.processes["actor"] if process.devices]
    if len(set(places)) < len(places):
        yield (
            f"{PLACEMENT} puts two processes of actor on one accelerator, which NCCL refuses; give each one of its own"
        )
    if root.profile == "cpu" or not any(node.num_accelerators for node in plan.nodes):
        return
    for role in ("rollout", "actor"):
        bare = next((process for process in plan.processes[role] if not process.devices), None)
        if bare is not None:
            where = _called(plan.nodes[bare.node_rank])
            yield (
                f"{PLACEMENT} gives {role} {bare.rank} no accelerator (on {where}), which profile gpu needs; place it "
                "on one, or write profile=cpu"
            )


def _offer_problems(root: Root, plan: Plan) -> Iterator[str]:
    """Robots on nodes that do not offer them, where some node says (`ray start --resources`) that it offers such."""
    for group in node_groups_of(root.cluster):
        for (kind, rank), wanted in Counter((kind, rank) for kind, rank, _ in group.hardware).items():
            offered = {node.rank: int(node.resources.get(kind, 0)) for node in plan.nodes}
            if any(offered.values()) and wanted > offered[rank]:
                there = ", ".join(f"{_called(plan.nodes[r])} offers {count}" for r, count in offered.items() if count)
                yield (
                    f"{NODE_GROUPS}: {group.label} has {wanted} {kind} on {_called(plan.nodes[rank])}, which offers "
                    f"{offered[rank]}; {there}. Correct node_rank, or start Ray there with --resource {kind}={wanted}"
                )


def _arm_problems(root: Root, plan: Plan) -> Iterator[str]:
    """Several processes of env, or several stages, that would command one arm."""
    env, processes = root.env.train, plan.processes["env"]
    if not isinstance(env, RealWorldConfig) or env.is_simulated():
        return
    if (stages := root.rollout.pipeline_stage_num) > 1:
        yield f"rollout.pipeline_stage_num: each of {stages} stages would move the same arm; write 1"
    url = env.override_cfg.robot_url if env.override_cfg.driver == "serl_http" else None
    if len(processes) > 1 and url is not None and urlsplit(url).hostname not in OWN:
        yield (
            f"env.train.override_cfg.robot_url: all {len(processes)} processes of env would move the arm at {url}; "
            f"remove it, and name each robot's server as {ROBOT_URL} in the env_vars of its node ({NODE_GROUPS})"
        )
    rank, number = Counter(process.node_rank for process in processes).most_common(1)[0]
    if number > 1:
        yield (
            f"{PLACEMENT} puts {number} processes of env on {_called(plan.nodes[rank])}, and all would move the same "
            "arm; give each robot a node of its own"
        )


def _called(node: Node) -> str:
    return f"node {node.rank}" + (f" ({node.name})" if node.name else "")
