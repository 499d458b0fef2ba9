"""What a runtime makes. `local.LocalRuntime` does it within one process, `ray_backend.RayRuntime` over many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from rlinf.runtime.local import Channel, Flag, Group, Weights

W = TypeVar("W")


class Runtime(Protocol):
    """Groups of workers and what connects them. Processes are numbers; what they mean is the plan's affair."""

    def flag(self) -> Flag:
        """A switch that all workers see."""
        ...

    def channel(self, name: str, owners: Mapping[Any, int], *, confirm: bool = False) -> Channel:
        """A channel whose items of key k are taken out in process `owners[k]`.

        With `confirm`, whoever is told by the sender that something was put will find it there.
        """
        ...

    def weights(self, name: str, readers: Iterable[int]) -> Weights:
        """Weights that are read in the given processes."""
        ...

    def group(
        self,
        name: str,
        builders: Sequence[Callable[[], W]],
        hosts: Sequence[int],
        *,
        channels: Iterable[Channel] = (),
        stop: Flag | None = None,
        stop_timeout_s: float | None = None,
    ) -> Group[W]:
        """Replica i, built by `builders[i]`, in process `hosts[i]`; builders can be pickled.

        Calls to it may take `stop_timeout_s` after `stop`; None: `local.STOP_TIMEOUT_S`.
        """
        ...

    def meeting_point(self, host: int) -> str:
        """host:port at which processes can meet that of number `host`, which is to listen there."""
        ...

    def describe(self, host: int) -> str:
        """A process in words."""
        ...

    def dead(self) -> list[int]:
        """Numbers of the processes that have ended."""
        ...

    def interrupt(self, cause: BaseException) -> None:
        """Close all channels, so that whoever waits for messages comes to an end; `replace` opens them again."""
        ...

    def replace(self, hosts: Sequence[int]) -> None:
        """Start these processes anew, build in them again what was built in them, and open all channels again.

        Only while nothing runs in the others. Items that wait in channels with `confirm` are kept. Weights have to be
        published again. Raises ProcessDied when another process died meanwhile: to be called again, with that one.
        Raises WorkerDied where it cannot be done.
        """
        ...

    def close(self) -> None:
        """End everything."""
        ...
