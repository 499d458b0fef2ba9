"""The layout of the recipes for a robot on two machines. Over two raylets it runs in benchmarks/cell_nodes.py."""

from pathlib import Path

import pytest

from rlinf.launch.cluster_config import node_groups_of, resolve_backend
from rlinf.launch.parse import load_config
from rlinf.launch.processes import layout_of, nodes_of, seats_of
from rlinf.runtime.cluster import Machine
from rlinf.runtime.placement import make_plan

RECIPES = Path(__file__).parents[2] / "examples/embodiment/config"
MACHINES = [Machine("id 0", "server", "10.0.0.1", 16, 1), Machine("id 1", "robot", "10.0.0.2", 8, 0)]


@pytest.mark.parametrize("recipe", ["realworld_sac_flow_image", "realworld_rlpd_cnn"])
def test_the_learner_is_on_the_gpus_machine_and_the_environment_on_the_robots(recipe):
    config = load_config(recipe, ["profile=gpu"], RECIPES, has_gpu=lambda: True)
    plan = make_plan(
        config.cluster.component_placement, nodes_of(MACHINES, accelerators=True), node_groups_of(config.cluster)
    )
    assert resolve_backend(config.cluster, plan) == "ray"
    hosts = plan.hosts(1)
    seats, layout = seats_of(hosts, MACHINES), layout_of(plan, hosts, 1)
    places = {role: [seats[host] for host in getattr(layout, role)] for role in ("learner", "rollout", "env")}
    assert {role: [(seat.machine, seat.devices) for seat in found] for role, found in places.items()} == {
        "learner": [("server", (0,))],
        "rollout": [("server", (0,))],
        "env": [("robot", ())],
    }
    assert len(set(layout.env) | set(layout.rollout) | set(layout.learner)) == 3
    assert places["env"][0].ip == "10.0.0.2" and layout.machines[layout.env[0]] == 1
