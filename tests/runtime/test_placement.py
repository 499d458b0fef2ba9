"""Placements as they are written, what they mean on some nodes, and who then talks to whom."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlinf.core.errors import ConfigError
from rlinf.runtime.placement import Node, NodeGroup, Plan, Process, make_plan, process_counts
from rlinf.runtime.placement_text import (
    ROLES,
    Span,
    format_ranks,
    parse_ranks,
    parse_spans,
    read_placement,
)
from rlinf.runtime.routes import assign, make_routes

KEY = "cluster.component_placement"
ROBOTS = NodeGroup("arms", (2,), hardware=(("Franka", 2, "10.0.0.1"), ("Franka", 2, "10.0.0.2")))


def gpus(*counts: int) -> list[Node]:
    return [Node(rank, num_accelerators=count) for rank, count in enumerate(counts)]


def places(plan: Plan, role: str) -> list[tuple[int, tuple[int, ...]]]:
    return [process.place for process in plan.processes[role]]


def of_env(placement: object, nodes: list[Node], groups: tuple[NodeGroup, ...] = ()) -> tuple[Process, ...]:
    return make_plan({"env": placement, "actor,rollout": 0}, nodes, groups).processes["env"]


def complaint(placement: object, nodes: list[Node] | None = None, groups: tuple[NodeGroup, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        make_plan(placement, gpus(8) if nodes is None else nodes, groups)  # type: ignore[arg-type]
    return str(caught.value)


# ---- how it is written


@pytest.mark.parametrize(
    ("text", "ranks"),
    [("0-7", tuple(range(8))), ("0-3,5", (0, 1, 2, 3, 5)), (3, (3,)), ("0", (0,)), (" 4 - 5 , 0 ", (4, 5, 0))],
)
def test_ranks(text: str | int, ranks: tuple[int, ...]) -> None:
    assert parse_ranks(text, "here") == ranks


def test_all_is_no_list_of_ranks() -> None:
    with pytest.raises(ConfigError, match="'all' is neither a rank nor a range"):
        parse_ranks("all", "here")


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("0-3:0-7", [Span(range(4), 8)]),
        ("0-7:0-3", [Span(range(8), 4)]),
        ("0:0-1,1-3", [Span(range(1), 2), Span(range(1, 4))]),
        ("0-1,5:2-3", [Span(range(2)), Span(range(5, 6), 2)]),
        ("all", [Span(None)]),
        ("all:0-7", [Span(None, 8)]),
        (0, [Span(range(1))]),
    ],
)
def test_spans(text: str | int, spans: list[Span]) -> None:
    assert list(parse_spans(text, "here")) == spans


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7-0", "here: 7-0 runs backwards; write 0-7"),
        ("0:3-1", "here: 3-1 runs backwards; write 1-3"),
        ("-1", "here: -1 is negative; ranks begin at 0"),
        ("", "here: no rank is named; write for example 0, 0-3 or 0-3,5"),
        ("0,,1", "here: a rank is missing in '0,,1'; write for example 0, 0-3 or 0-3,5"),
        ("0..3", "here: '0..3' is neither a rank nor a range; write for example 0 or 0-3"),
        ("0:", "here: '' is neither a rank nor a range; write for example 0 or 0-3"),
        ("0-3,2", "here: 0-3,2 names 2 twice; keep one"),
        ("0,all", "here: all already names every resource; write it alone"),
        ("0-3:1-4", "here: 0-3:1-4 begins with process 1, but the next one is 0; write 0-3:0-3"),
        ("0-1,2:3-4", "here: 2:3-4 begins with process 3, but the next one is 2; write 2:2-3"),
        (
            "0-3:0-5",
            "here: 0-3:0-5 shares 4 resources among 6 processes; make one number a multiple of the other",
        ),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spans(text, "here")
    assert str(caught.value) == message


@given(st.lists(st.integers(0, 40), min_size=1, unique=True))
def test_ranks_survive_being_written(ranks: list[int]) -> None:
    assert parse_ranks(format_ranks(ranks), "here") == tuple(ranks)


def format_spans(spans: list[Span]) -> str:
    """The inverse of `parse_spans`."""
    parts, begun = list[str](), 0
    for span in spans:
        written = "all" if span.resources is None else format_ranks(span.resources)
        if span.num_processes is not None:
            written += ":" + format_ranks(range(begun, begun + span.num_processes))
        parts.append(written)
        begun += span.num_processes or len(span.resources or ())
    return ",".join(parts)


@given(st.data())
def test_spans_survive_being_written(data: st.DataObject) -> None:
    spans, begin = [], 0
    for _ in range(data.draw(st.integers(1, 4))):
        begin += data.draw(st.integers(0, 3))
        resources = range(begin, begin + data.draw(st.integers(1, 6)))
        begin = resources.stop
        factor = data.draw(st.integers(1, 3))
        spans.append(Span(resources, data.draw(st.sampled_from([None, 1, len(resources), len(resources) * factor]))))
    spans = data.draw(st.sampled_from([spans, [Span(None)], [Span(None, begin)]]))
    assert list(parse_spans(format_spans(spans), "here")) == spans


# ---- mappings and strings


@pytest.mark.parametrize(
    "placement",
    [
        {"env": "0-3", "rollout": "4-7", "actor": "8-15"},
        "env: 0-3; rollout: 4-7; actor: 8-15",
        "env:0-3;rollout:4-7;actor:8-15;",
        {"actor,env,rollout": "all", "env": "0-3", "rollout": "4-7", "actor": "8-15"},
        {"env": "0-3", "env, actor , rollout": 0, "rollout": "4-7", "actor": "8-15"},
        {"env": {"placement": "0-3"}, "rollout": {"placement": "4-7", "node_group": "cluster"}, "actor": "8-15"},
        {"actor,rollout": 0, "env": "0-3", "rollout,actor": "4-7", "actor": "8-15"},
    ],
)
def test_one_meaning_in_several_forms(placement: object) -> None:
    read = read_placement(placement)  # type: ignore[arg-type]
    assert {role: where.text for role, where in read.items()} == {"env": "0-3", "rollout": "4-7", "actor": "8-15"}
    assert all(where.node_groups == ("cluster",) for where in read.values())


@pytest.mark.parametrize("named", ["a,b", ["a", "b"], " a , b ", ["a", "b", "a"]])
def test_node_groups_are_named_alone_or_together(named: object) -> None:
    read = read_placement({"env": {"node_group": named, "placement": 0}, "actor,rollout": 0})
    assert read["env"].node_groups == ("a", "b")


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ("env,rolout: 0", f"{KEY}: 'rolout' is no role; did you mean rollout?"),
        ("env: 0; critic: 0", f"{KEY}: 'critic' is no role; there are: actor, env, rollout"),
        ("env: 0; env: 1", f"{KEY} places env twice (0 and 1); keep one"),
        ({"env,actor": 0, "rollout,env": 1}, f"{KEY} places env twice (0 and 1); keep one"),
        ("env: 0", f"{KEY} leaves out actor, rollout; add for example actor,rollout: 0"),
        ("", f"{KEY} leaves out actor, env, rollout; add for example actor,env,rollout: 0"),
        ("all", f"{KEY}: 'all' is no role with its devices; write for example env: 0-3"),
        ("env: ; actor,rollout: 0", f"{KEY}: env: no rank is named; write for example 0, 0-3 or 0-3,5"),
        ({"env": -2, "actor,rollout": 0}, f"{KEY}: env: -2 is negative; ranks begin at 0"),
        (
            {"env": [0, 1], "actor,rollout": 0},
            f"{KEY}: env: [0, 1] is no placement; write for example 0, 0-3, 0-3:0-7 or all",
        ),
        (
            {"env": True, "actor,rollout": 0},
            f"{KEY}: env: True is no placement; write for example 0, 0-3, 0-3:0-7 or all",
        ),
        (
            {"env": {"placment": 0}, "actor,rollout": 0},
            f"{KEY}: env: unknown key 'placment'; write node_group and placement",
        ),
        (
            {"env": {"node_group": "a"}, "actor,rollout": 0},
            f"{KEY}: env: no rank is named; write for example 0, 0-3 or 0-3,5",
        ),
        (
            {"env": {"node_group": "", "placement": 0}, "actor,rollout": 0},
            f"{KEY}: env: node_group is empty; name one of cluster.node_groups or remove the key",
        ),
    ],
)
def test_what_is_no_placement(placement: object, message: str) -> None:
    assert complaint(placement) == message


# ---- on nodes


def test_accelerators_are_counted_over_the_nodes() -> None:
    plan = make_plan("env: 0-7; rollout: 8-15; actor: all", gpus(8, 8))
    assert places(plan, "env") == [(0, (index,)) for index in range(8)]
    assert places(plan, "rollout") == [(1, (index,)) for index in range(8)]
    assert places(plan, "actor") == places(plan, "env") + places(plan, "rollout")
    assert [process.rank for process in plan.processes["actor"]] == list(range(16))
    assert plan.world_size("actor") == 16


def test_nodes_without_accelerators_are_skipped_where_others_have_some() -> None:
    assert [process.place for process in of_env("0-2", gpus(2, 0, 1))] == [(0, (0,)), (0, (1,)), (2, (0,))]


@pytest.mark.parametrize(("text", "count"), [("all", 1), (0, 1), ("0:0-2", 3)])
def test_a_machine_without_accelerators_is_a_resource_itself(text: object, count: int) -> None:
    assert [process.place for process in of_env(text, gpus(0))] == [(0, ())] * count


def test_several_processes_share_a_resource() -> None:
    assert [process.place for process in of_env("0-1:0-3", gpus(2))] == [(0, (0,)), (0, (0,)), (0, (1,)), (0, (1,))]
    assert len(of_env("all:0-15", gpus(8))) == 16


def test_several_resources_belong_to_one_process() -> None:
    assert [process.place for process in of_env("0-7:0-1", gpus(4, 4))] == [(0, (0, 1, 2, 3)), (1, (0, 1, 2, 3))]


def test_the_group_of_bare_nodes_has_no_devices() -> None:
    assert [process.place for process in of_env({"node_group": "node", "placement": "all"}, gpus(8, 8))] == [
        (0, ()),
        (1, ()),
    ]


def test_a_group_counts_its_own_nodes_only() -> None:
    groups = (NodeGroup("a", (1,)), NodeGroup("b", (2,)))
    [process] = of_env({"node_group": "b", "placement": 1}, gpus(2, 2, 2), groups)
    assert process.place == (2, (1,))
    both = of_env({"node_group": "b,a", "placement": "all"}, gpus(2, 2, 2), groups)
    assert [process.node_rank for process in both] == [1, 1, 2, 2]  # in order of node rank


def test_robots_are_the_resources_of_their_group_even_beside_accelerators() -> None:
    processes = of_env({"node_group": "arms", "placement": "all"}, gpus(1, 1, 1), (ROBOTS,))
    assert [(process.place, process.hardware) for process in processes] == [
        ((2, ()), "10.0.0.1"),
        ((2, ()), "10.0.0.2"),
    ]


def test_processes_get_what_their_group_sets_up_on_their_node() -> None:
    group = NodeGroup("a", (0, 1), {0: {"IFACE": "eth0"}, 1: {"IFACE": "eth1"}}, {1: "/opt/python"})
    first, second = of_env({"node_group": "a", "placement": "0-1"}, gpus(1, 1), (group,))
    assert (first.env_vars, first.python) == ({"IFACE": "eth0"}, None)
    assert (second.env_vars, second.python) == ({"IFACE": "eth1"}, "/opt/python")
    assert all(process.env_vars == {} for process in of_env("0-1", gpus(1, 1), (group,)))


@pytest.mark.parametrize(
    ("env", "nodes", "message"),
    [
        ("8-15", [8], "8-15 needs accelerator 15, but the 1 node has 8; stay below 8 or raise cluster.num_nodes"),
        ("16", [8, 8], "16 needs accelerator 16, but the 2 nodes have 16; stay below 16 or raise cluster.num_nodes"),
        (1, [1], "1 needs accelerator 1, but the 1 node has 1; write 0 or raise cluster.num_nodes"),
        (180, [8], "180 needs accelerator 180, but the 1 node has 8; stay below 8 or raise cluster.num_nodes (without "
         "quotes, YAML reads 3:0 as 180)"),
        ("0-180", [8], "0-180 needs accelerator 180, but the 1 node has 8; stay below 8 or raise cluster.num_nodes"),
        ("0-199999", [8], "0-199999 needs accelerator 199999, but the 1 node has 8; stay below 8 or raise "
         "cluster.num_nodes"),
        ("0-1", [0], "0-1 needs node 1, but there is 1 node and no accelerator; write 0 or raise cluster.num_nodes"),
        ("0-2", [0, 0], "0-2 needs node 2, but there are 2 nodes and no accelerator; stay below 2 or raise "
         "cluster.num_nodes"),
        ("0-3:0", [2, 2], "0-3:0 spreads process 0 over nodes 0 and 1; give each process resources of one node"),
        ("all:0-4", [8], "all:0-4 shares 8 resources among 5 processes; make one number a multiple of the other"),
        ({"node_group": "node", "placement": "0-1"}, [8], "0-1 needs node 1, but there is 1 node; write 0 or raise "
         "cluster.num_nodes"),
        ({"node_group": "arms", "placement": "0-2"}, [1, 1, 1], "0-2 needs robot 2, but node group arms has 2; stay "
         "below 2 or add robots to its hardware.configs"),
        ({"node_group": "arms", "placement": "0:0-1"}, [1, 1, 1], "0:0-1 does not give every robot a process of its "
         "own; name the robots without a colon"),
        ({"node_group": "arms", "placement": "0-1:0"}, [1, 1, 1], "0-1:0 does not give every robot a process of its "
         "own; name the robots without a colon"),
        ({"node_group": "gpu", "placement": "2-3"}, [1, 1, 1], "2-3 needs accelerator 3, but the 2 nodes of node group "
         "gpu have 2; stay below 2 or add nodes to its node_ranks"),
        ({"node_group": "amrs", "placement": 0}, [1, 1, 1], "no node group is called 'amrs'; did you mean arms?"),
        ({"node_group": "x", "placement": 0}, [1, 1, 1], "no node group is called 'x'; there are: arms, gpu, cluster, "
         "node"),
        ({"node_group": "arms,gpu", "placement": 0}, [1, 1, 1], "node group arms has robots and gpu has none; name "
         "groups of one kind"),
        ({"node_group": "node,gpu", "placement": 0}, [1, 1, 1], "node group node means all nodes; name it alone"),
    ],
)  # fmt: skip
def test_what_the_nodes_do_not_have(env: object, nodes: list[int], message: str) -> None:
    groups = (ROBOTS, NodeGroup("gpu", (0, 1))) if len(nodes) == 3 else ()
    assert complaint({"env": env, "actor,rollout": 0}, gpus(*nodes), groups) == f"{KEY}: env: {message}"


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (NodeGroup("a", (0, 3)), "a needs node 3, but the run has 2 nodes (0-1); correct node_ranks or raise "
         "cluster.num_nodes"),
        (NodeGroup("node", (0,)), "node is a reserved label; choose another"),
        (NodeGroup("there", (0,)), "there is there twice; give each group a label of its own"),
        (NodeGroup("a", ()), "a has no nodes; name some in node_ranks"),
        (NodeGroup("a", (0,), hardware=(("Franka", 1, "x"),)), "a configures node 1, which is not among its nodes; add "
         "it to node_ranks or correct the entry"),
        (NodeGroup("a", (0,), python_interpreter={1: "p"}), "a configures node 1, which is not among its nodes; add it "
         "to node_ranks or correct the entry"),
    ],
)  # fmt: skip
def test_what_is_no_node_group(group: NodeGroup, message: str) -> None:
    groups = (NodeGroup("there", (0,)), group)
    assert complaint("actor,env,rollout: 0", gpus(1, 1), groups) == f"cluster.node_groups: {message}"


def test_a_missing_node_is_named() -> None:
    nodes = [Node(0), Node(2)]
    text = "cluster.num_nodes: node 1 is missing; start it, or give it that rank"
    assert complaint("actor,env,rollout: 0", nodes) == text
    assert complaint("actor,env,rollout: 0", []) == text.replace("node 1", "node 0")


def test_counts_are_known_without_nodes_unless_they_are_all_accelerators() -> None:
    placement = {"env": {"node_group": "arms", "placement": "all"}, "rollout": "0-3:0-7", "actor": "all"}
    assert process_counts(placement, 3, (ROBOTS,)) == {"actor": None, "env": 2, "rollout": 8}
    bare = {"env": {"node_group": "node", "placement": "all"}, "rollout": "all:0-7", "actor": "0-3:0-1"}
    assert process_counts(bare, 3) == {"actor": 2, "env": 3, "rollout": 8}
    with pytest.raises(ConfigError, match="env: 2 needs robot 2, but node group arms has 2"):
        process_counts(placement | {"env": {"node_group": "arms", "placement": 2}}, 3, (ROBOTS,))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.data())
def test_every_accelerator_is_on_its_node(counts: list[int], data: st.DataObject) -> None:
    nodes, total = gpus(*counts), sum(counts) or len(counts)
    factor = data.draw(st.integers(1, 3))
    texts = [f"0-{total - 1}", "all", f"all:0-{factor * total - 1}", str(total - 1)]
    plan = make_plan({role: data.draw(st.sampled_from(texts)) for role in ROLES}, nodes)
    for role, processes in plan.processes.items():
        assert [process.rank for process in processes] == list(range(plan.world_size(role)))
        for process in processes:
            assert all(0 <= index < counts[process.node_rank] for index in process.devices)
            assert len(process.devices) == (1 if sum(counts) else 0)


# ---- who talks to whom


def test_collocated_partners_are_preferred() -> None:
    plan = make_plan("env,actor: 0-3; rollout: 3:0,2:1,1:2,0:3", gpus(4))
    routes = plan.routes()
    assert routes.rollout == {(0, 0): 3, (1, 0): 2, (2, 0): 1, (3, 0): 0}
    assert routes.learners == {(rank, 0): (rank,) for rank in range(4)}


def test_blocks_of_neighbours_are_shared_out_where_nothing_is_collocated() -> None:
    routes = make_plan("env: 0-4; rollout: 5-6; actor: 7", gpus(8)).routes(num_stages=1)
    assert list(routes.rollout.values()) == [0, 0, 0, 1, 1]
    assert routes.sources_of(1) == ((3, 0), (4, 0))
    assert set(routes.learners.values()) == {(0,)}


def test_stages_are_sources_of_their_own() -> None:
    routes = make_plan("env: 0; rollout: 0-1; actor: 0", gpus(2)).routes(num_stages=2)
    assert routes.rollout == {(0, 0): 0, (0, 1): 1}


def test_an_additional_source_goes_to_who_has_most_of_its_own() -> None:
    near, far, distant = (0, (0,)), (0, (1,)), (0, (2,))
    assert assign([near, far, far], [near, far]) == (0, 1, 1)
    assert assign([near, near, near, far, far], [near, near, far]) == (0, 0, 1, 2, 2)
    assert assign([near, far, near], [distant, near]) == (1, 0, 1)


def test_more_learners_than_sources_share_the_environments_of_one() -> None:
    routes = make_plan("env: 0-3; rollout: 4-7; actor: 8-15", gpus(8, 8)).routes()
    assert routes.learners == {(rank, 0): (2 * rank, 2 * rank + 1) for rank in range(4)}


def test_too_many_rollout_processes_are_refused_with_the_key_to_change() -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan("env: 0-3; rollout: 0-7; actor: 0", gpus(8)).routes()
    assert str(caught.value) == (
        f"{KEY} gives rollout 8 processes, but env has 4 to ask them (processes of env: 4, rollout.pipeline_stage_num: "
        "1); write rollout.pipeline_stage_num: 2 or give rollout at most 4"
    )


numbers = st.integers(1, 6)
a_place = st.tuples(st.integers(0, 1), st.tuples(st.integers(0, 2)))


@given(st.lists(a_place, min_size=1, max_size=9), st.lists(a_place, min_size=1, max_size=9), numbers, st.data())
def test_every_source_has_its_partners_and_loads_are_even(env, rollout, stages, data) -> None:
    rollout = rollout[: len(env) * stages]
    learner = data.draw(st.lists(a_place, min_size=1, max_size=9))
    routes = make_routes(env, rollout, learner, stages)
    sources = {(rank, stage) for rank in range(len(env)) for stage in range(stages)}
    assert routes.rollout.keys() == routes.learners.keys() == sources
    served = [len(routes.sources_of(rank)) for rank in range(len(rollout))]
    assert sum(served) == len(sources)
    assert min(served) >= 1 and max(served) - min(served) <= 1
    shares = Counter(rank for group in routes.learners.values() for rank in group)
    assert shares.keys() == set(range(len(learner)))
    if len(learner) <= len(sources):
        assert all(len(group) == 1 for group in routes.learners.values())
        assert max(shares.values()) - min(shares.values()) <= 1
    else:
        assert set(shares.values()) == {1}
        assert {len(group) for group in routes.learners.values()} <= {
            len(learner) // len(sources),
            -(-len(learner) // len(sources)),
        }
    assert routes == make_routes(env, rollout, learner, stages)


@given(numbers, numbers)
def test_strangers_are_served_in_contiguous_blocks(clients: int, servers: int) -> None:
    assigned = assign([(0, ())] * clients, [(1, (rank,)) for rank in range(servers)])
    assert list(assigned) == sorted(assigned)
    loads = [assigned.count(rank) for rank in range(servers)]
    assert max(loads) - min(loads) <= 1


@given(st.permutations(range(6)), st.permutations(range(6)))
def test_nobody_leaves_home_when_everybody_has_one(clients: list[int], servers: list[int]) -> None:
    assigned = assign([(0, (index,)) for index in clients], [(0, (index,)) for index in servers])
    assert [servers[rank] for rank in assigned] == clients


# ---- who shares an operating-system process


def hosts(placement: object, nodes: list[Node], groups: tuple[NodeGroup, ...] = (), stages: int = 1) -> list[str]:
    plan = make_plan(placement, nodes, groups)  # type: ignore[arg-type]
    return ["+".join(f"{process.role}{process.rank}" for process in host) for host in plan.hosts(stages)]


def test_collocated_pairs_share_a_process_and_the_learner_has_its_own() -> None:
    assert hosts("actor,env,rollout: all", gpus(0)) == ["env0+rollout0", "actor0"]
    assert hosts("actor,env,rollout: all", gpus(2)) == ["env0+rollout0", "env1+rollout1", "actor0", "actor1"]
    assert hosts("actor,env,rollout: 0", gpus(1), stages=2) == ["env0+rollout0", "actor0"]


def test_others_are_alone() -> None:
    assert hosts("env: 0; rollout,actor: 1", gpus(2)) == ["env0", "rollout0", "actor0"]
    # Several were asked for, so that they run side by side.
    assert hosts("env: 0:0-1; rollout,actor: 0", gpus(1)) == ["env0", "env1", "rollout0", "actor0"]
    # The second stage asks somebody else.
    assert hosts("env: 0; rollout: 0-1; actor: 0", gpus(2), stages=2) == ["env0", "rollout0", "rollout1", "actor0"]


def test_another_python_is_another_process() -> None:
    group = NodeGroup("a", (0,), python_interpreter={0: "/opt/python"})
    placement = {"env": {"node_group": "a", "placement": 0}, "rollout,actor": 0}
    assert hosts(placement, gpus(1), (group,)) == ["env0", "rollout0", "actor0"]


def test_collocated_means_the_same_devices_of_the_same_node() -> None:
    plan = make_plan({"env": "0-1", "rollout": {"node_group": "node", "placement": 0}, "actor": 1}, gpus(2))
    env, bare, learner = plan.processes["env"], plan.processes["rollout"][0], plan.processes["actor"][0]
    assert [plan.is_collocated(process, learner) for process in env] == [False, True]
    assert not plan.is_collocated(env[0], bare)
