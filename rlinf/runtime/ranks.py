"""The ranks of a learner as processes of torch.distributed: gloo between CPUs, NCCL between GPUs.

Nothing here knows how the processes were started. Each calls `join_ranks` once, and `leave` at its end.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlinf.core.errors import WorkerDied, first_line

T = TypeVar("T")

Backend = Literal["gloo", "nccl"]
# Flags and small values stay on the CPU, so that agreeing on them does not wait for the GPU.
_BACKENDS: dict[Backend, str] = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}

JOIN_TIMEOUT_S = 120.0
MEET_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class DistributedRanks:
    """This process among others, see `core.ranks.Ranks`. Made by `join_ranks`.

    `timeout_s` is how long the others are waited for. On a GPU a rank that fails shows when NCCL's watchdog ends
    the process after that time; everything on the CPU raises.
    """

    rank: int
    size: int
    timeout_s: float

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        self._meet(dist.all_reduce, tensor)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """The mean over all ranks, in place."""
        return self.sum_(tensor).div_(self.size)

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """What rank 0 has, in place."""
        self._meet(dist.broadcast, tensor, 0)
        return tensor

    def cat(self, rows: Tensor, numbers: Sequence[int] | None = None) -> Tensor:
        """The rows [M, ...] of all ranks, in the order of ranks; their numbers may differ."""
        numbers = self.gather(len(rows)) if numbers is None else numbers
        padded = rows.new_zeros((max(numbers), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in numbers]
        self._meet(dist.all_gather, parts, padded)
        return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in the order of ranks."""
        values: list[Any] = [None] * self.size
        self._meet(dist.all_gather_object, values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        return bool(self.sum_(torch.tensor(int(flag))))

    def all(self, flag: bool) -> bool:
        """Whether it is true on every rank."""
        return not self.any(not flag)

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """Raises WorkerDied for what gloo and NCCL raise in here, whoever calls them."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise self._alone(error) from error

    def _meet(self, collective: Callable[..., Any], *arguments: Any) -> None:
        try:
            collective(*arguments)
        except RuntimeError as error:
            raise self._alone(error) from error

    def _alone(self, error: RuntimeError) -> WorkerDied:
        return WorkerDied(
            f"rank {self.rank} of {self.size} waited in vain for the other ranks of the learner: one of them has "
            f"failed, see its own message, or did not answer within {self.timeout_s:g} s ({first_line(error)})"
        )

    def leave(self) -> None:
        """Close the connections. Does not wait for the others."""
        dist.destroy_process_group()


def join_ranks(
    rank: int,
    size: int,
    address: str,
    *,
    backend: Backend = "gloo",
    join_timeout_s: float = JOIN_TIMEOUT_S,
    timeout_s: float = MEET_TIMEOUT_S,
) -> DistributedRanks:
    """Meet the other ranks at `address` and connect to them. Once per process; torch keeps the group.

    Args:
        rank: which one this is, from 0 to `size` - 1.
        address: `host:port`, of the machine on which rank 0 runs; or `file:///path` of a file that does not exist yet,
            in a directory that all ranks see.
        backend: nccl needs a GPU of its own for every rank, chosen with `torch.cuda.set_device` before.
        join_timeout_s: how long the others may take to come here.
        timeout_s: how long they may take later, wherever ranks meet: longer than anything that one rank does alone.

    Raises WorkerDied naming this rank, the address and the ranks that did not come.
    """
    try:
        store = _store(rank, size, address, timedelta(seconds=join_timeout_s))
        store.set(_key(rank), "here")
    except OSError as error:
        raise WorkerDied(
            f"rank {rank} of {size} cannot listen at {address} ({error.strerror}): start the run again, which takes "
            "another port, or correct the address of this machine"
        ) from error
    except RuntimeError as error:
        raise WorkerDied(
            f"rank {rank} of {size} could not reach {address} within {join_timeout_s:g} s ({first_line(error)}): "
            "is rank 0 running there, and does it listen on that address?"
        ) from error
    try:
        store.wait([_key(other) for other in range(size)], timedelta(seconds=join_timeout_s))
    except RuntimeError as error:
        missing = ", ".join(str(other) for other in range(size) if not store.check([_key(other)]))
        raise WorkerDied(
            f"rank {rank} of {size} waited {join_timeout_s:g} s at {address} for rank {missing}, which did not come: "
            "it failed before, was not started, or was given another address"
        ) from error
    try:
        dist.init_process_group(
            _BACKENDS[backend], store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
        )
    except RuntimeError as error:
        raise WorkerDied(
            f"rank {rank} of {size} met the others at {address} but could not connect to them ({first_line(error)}): "
            "for gloo, name the network interface in GLOO_SOCKET_IFNAME, for NCCL in NCCL_SOCKET_IFNAME"
        ) from error
    return DistributedRanks(rank, size, timeout_s)


def _store(rank: int, size: int, address: str, timeout: timedelta) -> dist.Store:
    if address.startswith("file://"):
        return dist.FileStore(address.removeprefix("file://"), size)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{address!r} is no address of the ranks: write host:port or file:///path")
    # By itself the store would listen on all addresses of the machine, and it answers everybody.
    listening = socket.create_server((host, int(port))).detach() if rank == 0 else None
    return dist.TCPStore(
        host, int(port), size, is_master=rank == 0, timeout=timeout, wait_for_workers=False, master_listen_fd=listening
    )


def _key(rank: int) -> str:
    return f"rank_{rank}"
