"""How many parameters a run trains, told by name when it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from rlinf.runtime.local import Group
from rlinf.workers.learner_worker import LearnerWorker

Named = Mapping[str, Sequence[tuple[str, Tensor]]]
"""Network → named parameters."""


def describe_parameters(learner: Group[LearnerWorker]) -> str:
    """One line with what the optimizers of a learner move."""
    return learner.run(_of_worker).wait()[0]


def describe(trained: Named) -> str:
    """`actor 58,432 (encoder 2,816, net 55,616) + temperature 1 = 58,433 trained parameters`."""
    sizes = {network: _by_part(named) for network, named in trained.items()}
    total = sum(sum(parts.values()) for parts in sizes.values())
    told = [_line(network, parts) for network, parts in sizes.items() if parts]
    return f"trained parameters: {' + '.join(told)} = {total:,}"


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
