"""What does not fit the nodes that turn out to be there."""

from pathlib import Path

import pytest

from rlinf.core.errors import ConfigError
from rlinf.launch.cluster_config import node_groups_of
from rlinf.launch.config import Root
from rlinf.launch.parse import load_config
from rlinf.launch.plan_check import check_plan
from rlinf.runtime.placement import Node, make_plan
from tests.launch.conftest import CONFIG_DIR


def load(folder: Path, *overrides: str, recipe: str = "reach") -> Root:
    return load_config(recipe, overrides, folder, has_gpu=lambda: True)


def told(root: Root, *nodes: Node) -> list[str]:
    """The lines in which `check_plan` says what does not fit."""
    plan = make_plan(root.cluster.component_placement, nodes, node_groups_of(root.cluster))
    try:
        check_plan(root, plan)
    except ConfigError as problem:
        return str(problem).splitlines()
    return []


def test_batches_are_shared_by_the_processes_that_the_nodes_turn_out_to_have(reach_configs: Path) -> None:
    root = load(reach_configs, "cluster.component_placement='actor,env,rollout: all'")
    assert told(root, Node(0)) == []
    assert told(root, Node(0, num_accelerators=3)) == [
        "actor.global_batch_size (16) cannot be shared evenly by the 3 processes of actor; write 15 or 18",
        "env.train.total_num_envs (4) is not a multiple of the 3 processes of env; write 3 or 6",
        "env.eval.total_num_envs (2) is not a multiple of the 3 processes of env; write 3",
    ]


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_who_computes_needs_one_of_the_accelerators_that_are_there(reach_configs: Path, profile: str) -> None:
    bare = "cluster.component_placement={rollout: {node_group: robot, placement: 0}, env: 0, actor: 0}"
    robot = "cluster.node_groups=[{label: robot, node_ranks: 1}]"
    root = load(reach_configs, "cluster.num_nodes=2", bare, robot, f"profile={profile}")
    nodes = Node(0, "server", num_accelerators=1), Node(1, "nuc")
    refused = [
        "cluster.component_placement gives rollout 0 no accelerator (on node 1 (nuc)), which profile gpu needs; place "
        "it on one, or write profile=cpu"
    ]
    assert told(root, *nodes) == (refused if profile == "gpu" else [])
    there = "cluster.component_placement={env: {node_group: robot, placement: 0}, rollout: 0, actor: 0}"
    env = load(reach_configs, "cluster.num_nodes=2", there, robot, "profile=gpu")
    assert told(env, *nodes) == [], "environments need none"
    assert told(root, Node(0), Node(1)) == [], "where there is none at all, torch is asked, and says so"


ROBOT = "cluster.node_groups=[{label: arm, node_ranks: 1, hardware: {configs: [{robot_ip: x, node_rank: 1}]}}]"


@pytest.mark.parametrize(
    ("offered", "lines"),
    [
        ((0, 0), []),
        ((0, 1), []),
        (
            (1, 0),
            [
                "cluster.node_groups: arm has 1 Franka on node 1 (b), which offers 0; node 0 (a) offers 1. Correct "
                "node_rank, or start Ray there with --resource Franka=1"
            ],
        ),
    ],
)
def test_a_robot_is_on_a_node_that_offers_it(reach_configs: Path, offered: tuple[int, int], lines: list[str]) -> None:
    nodes = [Node(rank, "ab"[rank], resources={"Franka": number}) for rank, number in enumerate(offered)]
    assert told(load(reach_configs, "cluster.num_nodes=2", ROBOT), *nodes) == lines


LIKE_EACH_OTHER = (
    "cluster.component_placement puts 2 processes of env on node 0, and all would move the same arm; give each robot a "
    "node of its own"
)
ONE_SERVER = (
    "env.train.override_cfg.robot_url: all 2 processes of env would move the arm at http://10.0.0.9:5000; remove it, "
    "and name each robot's server as RLINF_ROBOT_URL in the env_vars of its node (cluster.node_groups)"
)


@pytest.mark.parametrize(
    ("env", "overrides", "lines"),
    [
        ("0-1", ["robot_url=null"], []),
        ("0-1", ["robot_url=http://127.0.0.1:5000"], []),
        ("0-1", ["robot_url=http://10.0.0.9:5000"], [ONE_SERVER]),
        ("0-1", ["robot_url=http://10.0.0.9:5000", "driver=fake"], []),
        ("0-1", ["driver=franky", "robot_ip=172.16.0.2"], []),
        ("0:0-1", ["driver=franky", "robot_ip=172.16.0.2"], [LIKE_EACH_OTHER]),
        ("0:0-1", ["robot_url=null"], [LIKE_EACH_OTHER]),
    ],
)
def test_two_processes_do_not_move_one_arm(env: str, overrides: list[str], lines: list[str]) -> None:
    root = load(
        CONFIG_DIR, "cluster.num_nodes=2", "cluster.node_groups=[]", "env.train.total_num_envs=2",
        "env.eval.total_num_envs=2",
        f"cluster.component_placement='env: {env}; actor,rollout: 0'", "env.train.override_cfg.driver=serl_http",
        *(f"env.train.override_cfg.{word}" for word in overrides), recipe="realworld_rlpd_cnn",
    )  # fmt: skip
    assert told(root, Node(0), Node(1)) == lines


def test_two_stages_do_not_move_one_arm() -> None:
    words = ["cluster.num_nodes=1", "cluster.node_groups=[]", "cluster.component_placement='env,actor,rollout: 0'"]
    words += ["rollout.pipeline_stage_num=2", "env.train.total_num_envs=2"]
    root = load(CONFIG_DIR, *words, "env.train.override_cfg.driver=serl_http", recipe="realworld_rlpd_cnn")
    assert told(root, Node(0)) == ["rollout.pipeline_stage_num: each of 2 stages would move the same arm; write 1"]
