"""How many parameters a run trains, and what its tensors take, told when it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rlinf.core import tree
from rlinf.core.protocols import Algorithm
from rlinf.data.columns import gigabytes
from rlinf.models.embodiment.latent_policy import LatentPolicy
from rlinf.runtime.local import Group
from rlinf.workers.learner_worker import LearnerWorker
from rlinf.workers.rollout_worker import RolloutWorker

Named = Mapping[str, Sequence[tuple[str, Tensor]]]
"""Network → named parameters."""

WORTH_TELLING = 1000
"""Bytes; a temperature has four."""


def describe_parameters(learner: Group[LearnerWorker]) -> str:
    """One line with what the optimizers of a learner move."""
    return learner.run(_of_worker).wait()[0]


def describe(trained: Named) -> str:
    """`actor 58,432 (encoder 2,816, net 55,616) + temperature 1 = 58,433 trained parameters`."""
    sizes = {network: _by_part(named) for network, named in trained.items()}
    total = sum(sum(parts.values()) for parts in sizes.values())
    told = [_line(network, parts) for network, parts in sizes.items() if parts]
    return f"trained parameters: {' + '.join(told)} = {total:,}"


def describe_memory(learner: Group[LearnerWorker], rollout: Group[RolloutWorker]) -> str | None:
    """One line with the bytes of what learns and of what acts, where a policy steers a decoder; else None."""
    acting = rollout.run(_acting_bytes).wait()[0]
    return None if acting is None else told_memory(learner.run(_learning_bytes).wait()[0], acting)


def told_memory(learning: Mapping[str, int], acting: Mapping[str, int]) -> str:
    """`memory: learning takes 14 MB (actor 0.5 MB, ...); acting, in each process that does, 6.5 GB (...)`."""
    return f"memory: learning takes {_sizes(learning)}; acting, in each process that does, {_sizes(acting)}"


def learning_bytes(algorithm: Algorithm) -> dict[str, int]:
    """Bytes of an algorithm's networks by name, and of what Adam keeps of those that it trains."""
    held = {name: part for name, part in algorithm.held().items() if not name.endswith("_optim")}
    trained = bytes_of({name: dict(named) for name, named in algorithm.trained().items()})
    return bytes_of(held) | {"gradients and two moments": 3 * sum(trained.values())}


def bytes_of(state: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the tensors of a state, by its first names."""
    return {
        name: sum(x.numel() * x.element_size() for _, x in tree.leaves_of_state(part) if isinstance(x, Tensor))
        for name, part in state.items()
    }


def _sizes(parts: Mapping[str, int]) -> str:
    told = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size >= WORTH_TELLING)
    return f"{_size(sum(parts.values()))} ({told})"


def _size(num_bytes: int) -> str:
    return gigabytes(num_bytes) if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2g} MB"


def _learning_bytes(worker: LearnerWorker) -> dict[str, int]:
    return learning_bytes(worker.algorithm)


def _acting_bytes(worker: RolloutWorker) -> dict[str, int] | None:
    return bytes_of(worker.actor.held()) if isinstance(worker.actor, LatentPolicy) else None


def _of_worker(worker: LearnerWorker) -> str:
    # In the worker's process: the parameters themselves do not travel.
    return describe(worker.algorithm.trained())


def _by_part(named: Sequence[tuple[str, Tensor]]) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, parameter in named:
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def _line(network: str, parts: Mapping[str, int]) -> str:
    whole = f"{network} {sum(parts.values()):,}"
    if len(parts) == 1:
        return whole
    return f"{whole} ({', '.join(f'{part} {size:,}' for part, size in parts.items())})"
