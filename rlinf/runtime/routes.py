"""Who answers whom: environments ask policies for actions and send learners their experience.

A source is a pipeline stage of an environment process, (rank, stage). A place is where a process is: its node and
the accelerators that it uses there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlinf.core.errors import ConfigError

Source = tuple[int, int]
Place = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Routes:
    """The partners of every source.

    `rollout` is the rank of the rollout process that answers it. `learners` are the ranks of the learner processes
    that get its experience: one, or several that share its environments when there are more learners than sources.
    """

    rollout: Mapping[Source, int]
    learners: Mapping[Source, tuple[int, ...]]

    def sources_of(self, rollout_rank: int) -> tuple[Source, ...]:
        """The sources that a rollout process answers, in the order in which it serves them."""
        return tuple(source for source, rank in self.rollout.items() if rank == rollout_rank)


def make_routes(
    env: Sequence[Place], rollout: Sequence[Place], learner: Sequence[Place], num_stages: int = 1
) -> Routes:
    """Routes between processes that are given by their places, in order of rank.

    Raises ConfigError when there are more rollout processes than sources: one would have nothing to do.
    """
    check_sources(len(env), len(rollout), num_stages)
    sources = [(rank, stage) for rank in range(len(env)) for stage in range(num_stages)]
    places = [env[rank] for rank, _ in sources]
    answered_by = assign(places, rollout)
    learners: list[tuple[int, ...]]
    if len(learner) <= len(sources):
        learners = [(rank,) for rank in assign(places, learner)]
    else:
        learns_from = assign(learner, places)
        learners = [
            tuple(rank for rank, source in enumerate(learns_from) if source == position)
            for position in range(len(sources))
        ]
    return Routes(dict(zip(sources, answered_by, strict=True)), dict(zip(sources, learners, strict=True)))


def check_sources(num_env: int, num_rollout: int, num_stages: int) -> None:
    """Raise ConfigError when so many rollout processes are more than the sources that they would share."""
    num_sources = num_env * num_stages
    if num_rollout > num_sources:
        raise ConfigError(
            f"cluster.component_placement gives rollout {num_rollout} processes, but env has {num_sources} to ask them "
            f"(processes of env: {num_env}, rollout.pipeline_stage_num: {num_stages}); write "
            f"rollout.pipeline_stage_num: {-(-num_rollout // num_env)} or give rollout at most {num_sources}"
        )


def assign(clients: Sequence[Place], servers: Sequence[Place]) -> tuple[int, ...]:
    """The server of every client, so that the servers' loads differ by at most one.

    Within that, a client goes to a server at its own place; the rest are shared out in blocks of neighbours.
    """
    least, extra = divmod(len(clients), len(servers))
    free = [least] * len(servers)
    waiting = Counter(clients)
    waiting.subtract({place: least * count for place, count in Counter(servers).items()})
    for _ in range(extra):
        chosen = max(
            (rank for rank, load in enumerate(free) if load == least),
            key=lambda rank: (max(waiting[servers[rank]], 0), -rank),
        )
        free[chosen] += 1
        waiting[servers[chosen]] -= 1
    assigned: list[int | None] = []
    for place in clients:
        near = next((rank for rank, at in enumerate(servers) if at == place and free[rank]), None)
        if near is not None:
            free[near] -= 1
        assigned.append(near)
    rest = iter([rank for rank, load in enumerate(free) for _ in range(load)])
    return tuple(next(rest) if rank is None else rank for rank in assigned)
