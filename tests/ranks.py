"""Run a function on several ranks, each a process of its own, that meet over a file and talk with gloo."""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from rlinf.runtime.ranks import join_ranks


def run_ranks(
    work: Callable[..., Any],
    directory: Path,
    *arguments: Any,
    size: int = 2,
    timeout_s: float = 120,
    dying: Collection[int] = (),
) -> list[Any]:
    """What `work(ranks, *arguments)` returned on every rank, None of those that are `dying` on purpose.

    `work` has to be a function of a module. A rank that raises fails the test with its traceback.
    """
    # One process imports what takes long, for all that it forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "pydantic", "hydra", "pytest"])
    children = [
        context.Process(target=_serve, args=(rank, size, str(directory), work, arguments), daemon=True)
        for rank in range(size)
    ]
    for child in children:
        child.start()
    deadline = time.monotonic() + timeout_s
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, child in enumerate(children) if child.is_alive()]
    for child in children:
        child.kill()
    outcomes = [(True, None) if rank in dying else _outcome(directory, rank) for rank in range(size)]
    failed = [f"rank {rank}: {result}" for rank, (done, result) in enumerate(outcomes) if not done]
    assert not late and not failed, "\n".join([f"late: {late}", *failed])
    return [result for _, result in outcomes]


def _serve(rank: int, size: int, directory: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        ranks = join_ranks(rank, size, f"file://{directory}/meeting", join_timeout_s=60, timeout_s=60)
        outcome = True, work(ranks, *arguments)
    except BaseException:
        outcome = False, traceback.format_exc()
    torch.save(outcome, f"{directory}/outcome_{rank}")


def _outcome(directory: Path, rank: int) -> tuple[bool, Any]:
    path = directory / f"outcome_{rank}"
    return torch.load(path, weights_only=False) if path.exists() else (False, "it died")
