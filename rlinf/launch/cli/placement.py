"""Shows how a recipe is spread over nodes and devices, before anything is started."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlinf.launch.cluster_config import node_groups_of, reason_for_ray, resolve_backend
from rlinf.launch.config import Root
from rlinf.launch.machine import this_node
from rlinf.launch.parse import load_config
from rlinf.launch.plan_check import check_plan
from rlinf.runtime.placement import Node, Plan, Process, make_plan
from rlinf.runtime.placement_text import format_ranks
from rlinf.runtime.routes import Routes

WIDTH = 80
DEVICES_PER_LINE = 8
DEVICE_WIDTH = 6
STYLES = {"env": "green", "rollout": "cyan", "actor": "magenta"}


def show(recipe: str, overrides: Sequence[str], folder: Path, gpus_per_node: int | None) -> None:
    """Print the plan of a recipe on as many nodes as it wants, each with so many accelerators (None: as many as here).

    Raises ConfigError when the recipe is wrong or the nodes do not have what it asks for.
    """
    has_gpu = None if gpus_per_node is None else lambda: gpus_per_node > 0
    config = load_config(recipe, overrides, folder, has_gpu=has_gpu)
    accelerators = this_node(config).num_accelerators if gpus_per_node is None else gpus_per_node
    nodes = [Node(rank, num_accelerators=accelerators) for rank in range(config.cluster.num_nodes)]
    plan = make_plan(config.cluster.component_placement, nodes, node_groups_of(config.cluster))
    check_plan(config, plan)
    source = (
        f"every node is like this machine with profile {config.profile}"
        if gpus_per_node is None
        else f"--gpus-per-node {gpus_per_node}"
    )
    console = Console(highlight=False)
    console.width = min(WIDTH, console.width)
    console.print(Drawing(config, plan).whole(Path(recipe).stem, source))


@dataclass(frozen=True)
class Drawing:
    """A plan as text for a terminal of 80 columns."""

    config: Root
    plan: Plan

    @property
    def stages(self) -> int:
        """Pipeline stages of every environment process."""
        return self.config.rollout.pipeline_stage_num

    @cached_property
    def routes(self) -> Routes:
        """Who answers whom."""
        return self.plan.routes(self.stages)

    @cached_property
    def host_of(self) -> dict[tuple[str, int], int]:
        """(role, rank) → number of the operating-system process."""
        hosts = self.plan.hosts(self.stages)
        return {(process.role, process.rank): number for number, host in enumerate(hosts) for process in host}

    def whole(self, title: str, source: str) -> RenderableType:
        """Everything, top to bottom; `source` says where the number of accelerators comes from."""
        nodes = self.plan.nodes
        count = nodes[0].num_accelerators
        has = _count(count, "accelerator") if count else "no accelerator"
        each = " each" if len(nodes) > 1 else ""
        head = Text.assemble((title, "bold"), f" on {_count(len(nodes), 'node')} with {has}{each}")
        return Group(
            head,
            Text(f"assumed: {source}", style="dim"),
            self.table(),
            *map(self.node, nodes),
            self.messages(),
            *self.remarks(),
        )

    # ---- the table of processes

    def table(self) -> RenderableType:
        """A line for every run of neighbouring processes that are alike."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for column in ("role", "rank", "node", "devices", "share of each", "host process"):
            table.add_column(column)
        for role, style in STYLES.items():
            for alike in self.runs(role):
                table.add_row(
                    Text(role, style=style),
                    format_ranks([process.rank for process in alike]),
                    str(alike[0].node_rank),
                    devices_text(alike),
                    self.share(alike[0]),
                    _ranks(self.host_of[role, process.rank] for process in alike),
                )
        return table

    def runs(self, role: str) -> Iterator[list[Process]]:
        """Neighbouring processes of a role on one node with equal shares."""

        def kind(process: Process) -> tuple[int, str]:
            return process.node_rank, self.share(process)

        for _, alike in groupby(self.plan.processes[role], key=kind):
            yield list(alike)

    def share(self, process: Process) -> str:
        """What one process has to do."""
        envs, batch = self.config.env.train.total_num_envs, self.config.actor.global_batch_size
        num_env = self.plan.world_size("env")
        if process.role == "env":
            stages = f" in {self.stages} stages" if self.stages > 1 else ""
            return f"{_count(envs // num_env, 'environment')}{stages}"
        if process.role == "rollout":
            per_source = envs // (num_env * self.stages)
            return _count(len(self.routes.sources_of(process.rank)) * per_source, "environment")
        return f"{batch // self.plan.world_size('actor'):,} of {_count(batch, 'sample')}"

    # ---- the picture of a node

    def node(self, node: Node) -> RenderableType:
        """The devices of a node as columns, with the ranks that sit there."""
        seats = self.seats(node)
        per_line = DEVICES_PER_LINE if all(len(device) <= DEVICE_WIDTH for device in seats) else 4
        grids = []
        for begin in range(0, len(seats), per_line):
            shown = list(seats)[begin : begin + per_line]
            grid = Table.grid(padding=(0, 1))
            grid.add_column(width=8)
            for _ in shown:
                grid.add_column(justify="center", min_width=DEVICE_WIDTH)
            grid.add_row(Text("device", style="dim"), *(Text(device, style="bold") for device in shown))
            for role, style in STYLES.items():
                ranks = [format_ranks(seats[device].get(role, [])) or "·" for device in shown]
                grid.add_row(Text(role, style=style), *(Text(text, style=style) for text in ranks))
            grids.append(grid)
        return Panel(Group(*grids), title=f"node {node.rank}", title_align="left", border_style="dim")

    def seats(self, node: Node) -> dict[str, dict[str, list[int]]]:
        """Device → role → ranks there. Devices are accelerators, robots, and the CPU where it is used alone."""
        seats: dict[str, dict[str, list[int]]] = {str(index): {} for index in range(node.num_accelerators)}
        for role, processes in self.plan.processes.items():
            for process in processes:
                if process.node_rank == node.rank:
                    for seat in map(str, process.devices or (process.hardware or "CPU",)):
                        seats.setdefault(seat, {}).setdefault(role, []).append(process.rank)
        return seats or {"CPU": {}}

    # ---- who sends what to whom

    def messages(self) -> RenderableType:
        """A line for every run of sources: who answers them, how they reach it, who learns from them."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for column in ("obs from", "stage", "actions from", "by way of", "experience to"):
            table.add_column(column)
        for stage in range(self.stages):
            for ranks in self.regular_runs(stage):
                sources = [(rank, stage) for rank in ranks]
                learners = [self.routes.learners[source] for source in sources]
                shared = f" ({len(learners[0])} for each)" if len(learners[0]) > 1 else ""
                table.add_row(
                    Text(f"env {format_ranks(ranks)}", style=STYLES["env"]),
                    str(stage),
                    Text(f"rollout {_ranks(self.routes.rollout[s] for s in sources)}", style=STYLES["rollout"]),
                    self.way(*sources[0]),
                    Text(f"actor {_ranks(rank for group in learners for rank in group)}{shared}", STYLES["actor"]),
                )
        return table

    def regular_runs(self, stage: int) -> Iterator[list[int]]:
        """Neighbouring environment processes whose partners are neighbours too, or the same."""
        run: list[int] = []
        for rank in range(self.plan.world_size("env")):
            if run and not self.is_regular([*run, rank], stage):
                yield run
                run = []
            run.append(rank)
        yield run

    def is_regular(self, ranks: Sequence[int], stage: int) -> bool:
        """Whether one line can tell about all these environment processes."""
        sources = [(rank, stage) for rank in ranks]
        partners = [(self.routes.rollout[source], *self.routes.learners[source]) for source in sources]
        steps = {tuple(b - a for a, b in zip(*pair, strict=False)) for pair in pairwise(partners)}
        alike = {(self.way(*source), len(self.routes.learners[source])) for source in sources}
        return len(steps) == len(alike) == 1 and min(min(step) for step in steps) >= 0

    def way(self, env_rank: int, stage: int) -> str:
        """How observations come to who answers them."""
        process = self.plan.processes["env"][env_rank]
        server = self.plan.processes["rollout"][self.routes.rollout[env_rank, stage]]
        if self.host_of["env", env_rank] == self.host_of["rollout", server.rank]:
            return "own memory"
        return "same node" if process.node_rank == server.node_rank else "network"

    def remarks(self) -> Iterator[Text]:
        """What else goes from whom to whom, and what will run it all."""
        config, cluster = self.config, self.config.cluster
        interval = config.runner.weight_sync_interval
        often = "each global step" if interval == 1 else f"every {interval} global steps"
        yield Text(f"Weights: actor 0 to rollout {_ranks(range(self.plan.world_size('rollout')))}, {often}.")
        if (learners := self.plan.world_size("actor")) > 1:
            dealt = config.actor.fsdp_config.strategy == "fsdp2"
            what = "Weights, gradients and moments: shared out" if dealt else "Gradients: averaged"
            yield Text(f"{what} over actor {_ranks(range(learners))}, each update.")
        if resolve_backend(cluster, self.plan) == "local":
            yield Text("Backend: local, threads of one process.")
            return
        joined = f"the cluster at {cluster.address}" if cluster.address else "a running cluster, else one of its own"
        yield Text(f"Backend: ray ({reason_for_ray(cluster, self.plan) or 'as configured'}) on {joined}.")
        yield Text(f"Restarts: at most {cluster.max_restarts} in all, of processes of env and rollout.")


def devices_text(alike: Sequence[Process]) -> str:
    """The devices of neighbouring processes: `0-7`, `0-3, 2 on each`, `0-7, 2 for each`, robots, or CPU."""
    robots = [process.hardware for process in alike if process.hardware is not None]
    devices = sorted({device for process in alike for device in process.devices})
    if robots or not devices:
        return ", ".join(robots) or "CPU"
    text, held = format_ranks(devices), len(alike[0].devices)
    if len(alike) > len(devices):
        return f"{text}, {len(alike) / len(devices):g} on each"
    return f"{text}, {held} for each" if held > 1 and len(alike) > 1 else text


def _ranks(ranks: Iterable[int]) -> str:
    return format_ranks(sorted(set(ranks)))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")
