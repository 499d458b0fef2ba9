"""What runs in a process of a run on Ray: replicas with a thread each, and its ends of all that connects them.

See `ray_backend` for the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError
from torch import Tensor

from rlinf.core.errors import ConfigError, WorkerDied
from rlinf.runtime.exchange import Address, as_array, as_tensor, open_exchange, this_exchange
from rlinf.runtime.local import CHANNEL_TIMEOUT_S, ChannelClosed, Flag, Replica, Weights

DEATHS = (RayActorError, OutOfMemoryError)
"""What Ray raises for a process that is no more."""
SIOCGIFADDR = 0x8915
"""Of linux/sockios.h: the address of an interface."""


class Host:
    """The actor that is a process of the run. All its methods run on one event loop; replicas have threads."""

    def __init__(
        self, index: int, ip: str, key: bytes, path: list[str], devices: Sequence[int] | None, prepare: bytes
    ) -> None:
        """`devices` are the accelerators that the process sees, None for all that there are."""
        self._problem: Exception | None = None
        if devices is not None:  # before anybody asks CUDA for them
            try:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES"), devices)
            except ConfigError as problem:
                self._problem = problem
        if (interface := interface_of(ip)) is not None:
            # Ranks of a learner look for each other under the machine's name, which may be known to nobody, or on
            # the first interface there is. NCCL takes a name for the beginning of one, but for "=".
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
        # What the driver could import by name is sent by name.
        sys.path += [entry for entry in path if entry not in sys.path]
        self._prepare = prepare
        # Published weights are read where they lie, in memory shared by the processes of a machine.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._exchange = open_exchange(index, ip, key)
        self._replicas: dict[int, Replica] = {}
        self._workers: dict[int, Any] = {}
        self._expected: dict[int, int] = {}
        self._early: dict[tuple[int, int], tuple[Callable[[], Any], Future[Any]]] = {}
        self._peers: dict[int, Any] = {}
        _weights_of_process.clear()
        _flags_of_process.clear()

    async def introduce(self) -> tuple[Address, int, str, bytes | None]:
        """Where this process listens, its number on its machine, the machine's name, and what keeps it from working."""
        problem = None
        try:
            if self._problem is not None:
                raise self._problem
            cloudpickle.loads(self._prepare)()
        except Exception as error:  # whatever it is belongs to the caller
            problem = pack_error(error)
        return self._exchange.address, os.getpid(), socket.gethostname(), problem

    async def ping(self) -> None:
        """Nothing: whoever gets an answer knows that the process is there."""

    async def free_port(self) -> int:
        """A port that nobody listens on."""
        with socket.create_server((self._exchange.address[0], 0)) as server:
            return server.getsockname()[1]

    async def meet(self, addresses: dict[int, Address], peers: dict[int, Any]) -> None:
        """Learn who else takes part."""
        self._exchange.meet(addresses)
        _peers_of_process.clear()
        _peers_of_process.update(peers)

    async def call(self, replica: int, number: int, blob: bytes) -> Outcome:
        """Run call `number` of a replica, which gets its calls in this order whatever the order of arrival."""
        if replica not in self._replicas:
            self._expected[replica] = 0
            self._replicas[replica] = Replica(f"replica {replica}", lambda error: None)
        future: Future[Any] = Future()
        self._early[replica, number] = (lambda: self._run(replica, blob), future)
        while (turn := (replica, self._expected[replica])) in self._early:
            call, answer = self._early.pop(turn)
            self._expected[replica] += 1
            _forward(self._replicas[replica].submit(call), answer)
        return await asyncio.wrap_future(future)

    def _run(self, replica: int, blob: bytes) -> Outcome:
        try:
            call = cloudpickle.loads(blob)
            if isinstance(call, Build):
                self._workers[replica] = call.builder()
                return Outcome()
            return Outcome(value=call.method(self._workers[replica], *call.args, **call.kwargs))
        except BaseException as error:  # the process' edge: whatever it is belongs to the caller
            return Outcome(error=pack_error(error), trace="".join(traceback.format_exception(error)))

    async def whereabouts(self, replica: int) -> str:
        """The line that the replica is at."""
        return self._replicas[replica].where() if replica in self._replicas else "not built"

    async def set_flag(self, name: str, reason: str) -> None:
        """Throw the switch in this process."""
        process_flag(name).set(reason)

    async def close_channels(self, names: Sequence[str], generation: int, cause: bytes) -> None:
        """Wake whoever waits on these channels in this process; see Exchange."""
        self._exchange.close_channels(names, generation, unpack_error(cause))

    async def reopen_channels(self, generation: int, kept: Mapping[str, bool]) -> None:
        """Make closed channels work again; see Exchange."""
        self._exchange.reopen_channels(generation, kept)

    async def take_weights(self, name: str, version: int, state: Any) -> None:
        """Make `state`, arrays in shared memory, what readers of this process get."""
        if version > process_weights(name).version:  # an older one may arrive later
            tensors = {key: as_tensor(array, dtype) for key, (array, dtype) in state.items()}
            process_weights(name).publish(version, tensors)

    async def copy_weights(self, source: str, target: str) -> int:
        """Publish under `target` what is published under `source`; its version, -1 for nothing."""
        if (newest := process_weights(source).newer_than(-1)) is None:
            return -1
        process_weights(target).publish(*newest)
        return newest[0]


@dataclass(frozen=True)
class Build:
    """A replica's first call: makes its worker."""

    builder: Callable[[], Any]


@dataclass(frozen=True)
class Call:
    """`method(worker, *args, **kwargs)`."""

    method: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a call returned, or the packed error that it raised with its traceback."""

    value: Any = None
    error: bytes | None = None
    trace: str = ""


def visible_devices(visible: str | None, devices: Sequence[int]) -> str:
    """What CUDA_VISIBLE_DEVICES has to be for `devices` to be seen, which are counted among those `visible` now.

    Raises ConfigError where there are fewer of these.
    """
    names = visible.split(",") if visible else None
    if names is not None and devices and max(devices) >= len(names):
        raise ConfigError(
            f"GPU {max(devices)} of {socket.gethostname()} is asked for, but CUDA_VISIBLE_DEVICES={visible} names "
            f"{len(names)} there; set it as it was when Ray was started there (env_vars of the node group, or start "
            "Ray anew)"
        )
    return ",".join(names[device] if names else str(device) for device in devices)


def interface_of(ip: str) -> str | None:
    """The network interface of this machine that has the IPv4 address `ip`; None where there is none (Linux)."""
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                answer = fcntl.ioctl(sock.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == ip:
                    return name
    return None


def _forward(source: Future[Any], target: Future[Any]) -> None:
    def hand_over(ended: Future[Any]) -> None:
        if (error := ended.exception()) is not None:
            target.set_exception(error)
        else:
            target.set_result(ended.result())

    source.add_done_callback(hand_over)


def pack_error(error: BaseException) -> bytes:
    """An exception for another process: itself, or what says the same."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, ChannelClosed):
        return cloudpickle.dumps((said, cloudpickle.dumps((ChannelClosed, error.name, pack_error(error.cause)))))
    # Pickle makes it anew from its arguments, which its constructor may refuse; then it is made without that.
    for parts in ((error,), (type(error), error.args, error.__dict__)):
        with contextlib.suppress(Exception):  # whatever its own code raises when it is copied
            blob = cloudpickle.dumps((said, cloudpickle.dumps(parts)))
            if str(unpack_error(blob)) == str(error):
                return blob
    return cloudpickle.dumps((said, b""))


def unpack_error(blob: bytes) -> BaseException:
    """Inverse of `pack_error`; a RuntimeError with its text where the class is not known here."""
    said, inner = cloudpickle.loads(blob)
    try:
        return _error_of(inner)
    except Exception:  # a missing module, above all
        return RuntimeError(said)


def _error_of(inner: bytes) -> BaseException:
    kind, *rest = cloudpickle.loads(inner)
    if isinstance(kind, BaseException):
        return kind
    if kind is ChannelClosed:
        return ChannelClosed(rest[0], unpack_error(rest[1]))
    error = kind.__new__(kind, *rest[0])
    error.__dict__.update(rest[1])
    return error


_weights_of_process: dict[str, Weights] = {}
_flags_of_process: dict[str, Flag] = {}
_peers_of_process: dict[int, Any] = {}


def process_weights(name: str) -> Weights:
    """This process's copy of the weights of that name."""
    return _weights_of_process.setdefault(name, Weights())


def process_flag(name: str) -> Flag:
    """This process's flag of that name."""
    return _flags_of_process.setdefault(name, Flag())


class HostedWeights(Weights):
    """The weights of a name as a process of the run sees them."""

    def __init__(self, name: str, readers: Sequence[int]) -> None:
        super().__init__()
        self.name, self.readers = name, tuple(readers)

    def publish(self, version: int, state: dict[str, Tensor], *, wait: bool = True) -> None:
        """Put one copy into Ray's object store, from which every reader's machine gets one."""
        here = this_exchange().index
        if here in self.readers:
            process_weights(self.name).publish(version, state)
        others = [index for index in self.readers if index != here]
        if not others:
            return
        shared = ray.put({key: as_array(tensor) for key, tensor in state.items()})
        taken = [_peers_of_process[index].take_weights.remote(self.name, version, shared) for index in others]
        if wait:
            for index, reference in zip(others, taken, strict=True):
                self._await(index, reference)

    def _await(self, index: int, taken: Any) -> None:
        try:
            ray.get(taken, timeout=CHANNEL_TIMEOUT_S)
        except GetTimeoutError as error:
            raise WorkerDied(
                f"process {index} did not take over weights '{self.name}' within {CHANNEL_TIMEOUT_S:g} s"
            ) from error
        except DEATHS:
            pass  # whoever plays with it will notice

    @property
    def version(self) -> int:
        """See Weights; of this process's copy."""
        return process_weights(self.name).version

    def newer_than(self, version: int) -> tuple[int, dict[str, Tensor]] | None:
        """See Weights."""
        return process_weights(self.name).newer_than(version)
