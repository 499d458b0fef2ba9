"""The runtime on Ray: worker groups in processes that may be on several machines.

Ray starts the processes, finds the machines, carries calls and their results, and keeps one copy of the published
weights on every machine. What workers say to each other meanwhile goes over `exchange`. The names are those of
`local`, of which these are kinds: whoever uses them does not see the difference.

A process hosts any number of replicas, each with a thread of its own, exactly as in `local`: an environment worker and
the policy that answers it are put into one process where the placement allows, and their messages stay there.

Only this module and the tests know Ray.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from rlinf.core.errors import WorkerDied
from rlinf.runtime.exchange import Address, RoutedChannel, as_array, as_tensor, open_exchange, this_exchange
from rlinf.runtime.local import (
    CHANNEL_TIMEOUT_S,
    Channel,
    ChannelClosed,
    Flag,
    Group,
    Handle,
    Weights,
    _Replica,
)

W = TypeVar("W")
P = ParamSpec("P")
R = TypeVar("R")

ANSWER_TIMEOUT_S = 60.0
"""For what a process answers without working on it."""


@dataclass(frozen=True)
class Seat:
    """Where a process of the run is started.

    Attributes:
        name: in messages and in Ray's own lists.
        node_id: of the machine, as Ray calls it.
        ip: address of the machine, on which the process listens.
        env_vars: environment variables of the process, beside those that Ray was started with on that machine.
        python: its interpreter; None for that of the caller.
    """

    name: str
    node_id: str
    ip: str
    env_vars: Mapping[str, str] = field(default_factory=dict)
    python: str | None = None


# ---- in the processes


class _Host:
    """The actor that is a process of the run. All its methods run on one event loop; replicas have threads."""

    def __init__(self, index: int, ip: str, key: bytes, path: list[str], prepare: bytes) -> None:
        # What the driver could import by name is sent by name.
        sys.path += [entry for entry in path if entry not in sys.path]
        cloudpickle.loads(prepare)()
        # Published weights are read where they lie, in memory shared by the processes of a machine.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._exchange = open_exchange(index, ip, key)
        self._replicas: dict[int, _Replica] = {}
        self._workers: dict[int, Any] = {}
        self._expected: dict[int, int] = {}
        self._early: dict[tuple[int, int], tuple[Callable[[], Any], Future[Any]]] = {}
        self._peers: dict[int, Any] = {}
        _weights_of_process.clear()
        _flags_of_process.clear()

    async def introduce(self) -> tuple[Address, int, str]:
        """Where this process listens, its number on its machine, and the machine's name."""
        return self._exchange.address, os.getpid(), socket.gethostname()

    async def meet(self, addresses: dict[int, Address], peers: dict[int, Any]) -> None:
        """Learn who else takes part."""
        self._exchange.meet(addresses)
        _peers_of_process.clear()
        _peers_of_process.update(peers)

    async def call(self, replica: int, number: int, blob: bytes) -> _Outcome:
        """Run call `number` of a replica, which gets its calls in this order whatever the order of arrival."""
        if replica not in self._replicas:
            self._expected[replica] = 0
            self._replicas[replica] = _Replica(f"replica {replica}", lambda error: None)
        future: Future[Any] = Future()
        self._early[replica, number] = (lambda: self._run(replica, blob), future)
        while (turn := (replica, self._expected[replica])) in self._early:
            call, answer = self._early.pop(turn)
            self._expected[replica] += 1
            _forward(self._replicas[replica].submit(call), answer)
        try:
            return _Outcome(value=await asyncio.wrap_future(future))
        except BaseException as error:  # the process' edge: whatever it is belongs to the caller
            return _Outcome(error=pack_error(error), trace="".join(traceback.format_exception(error)))

    def _run(self, replica: int, blob: bytes) -> Any:
        call = cloudpickle.loads(blob)
        if isinstance(call, _Build):
            self._workers[replica] = call.builder()
            return None
        return call.method(self._workers[replica], *call.args, **call.kwargs)

    async def whereabouts(self, replica: int) -> str:
        """The line that the replica is at."""
        return self._replicas[replica].where() if replica in self._replicas else "not built"

    async def set_flag(self, name: str, reason: str) -> None:
        """Throw the switch in this process."""
        _process_flag(name).set(reason)

    async def close_channels(self, names: Sequence[str], cause: bytes) -> None:
        """Wake whoever waits on these channels in this process."""
        for name in names:
            self._exchange.channel(name).close(unpack_error(cause))

    async def reopen_channels(self, names: Sequence[str]) -> None:
        """Make closed channels work again, empty."""
        for name in names:
            self._exchange.channel(name).reopen()

    async def take_weights(self, name: str, version: int, state: Any) -> None:
        """Make `state`, arrays in shared memory, what readers of this process get."""
        tensors = {key: as_tensor(array, dtype) for key, (array, dtype) in state.items()}
        _process_weights(name).publish(version, tensors)

    async def copy_weights(self, source: str, target: str) -> int:
        """Publish under `target` what is published under `source`; its version, -1 for nothing."""
        if (newest := _process_weights(source).newer_than(-1)) is None:
            return -1
        _process_weights(target).publish(*newest)
        return newest[0]


@dataclass(frozen=True)
class _Build:
    builder: Callable[[], Any]


@dataclass(frozen=True)
class _Call:
    method: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    error: bytes | None = None
    trace: str = ""


def _forward(source: Future[Any], target: Future[Any]) -> None:
    def hand_over(ended: Future[Any]) -> None:
        if (error := ended.exception()) is not None:
            target.set_exception(error)
        else:
            target.set_result(ended.result())

    source.add_done_callback(hand_over)


def pack_error(error: BaseException) -> bytes:
    """An exception for another process; its constructor, which may want other arguments, is not called there."""
    if isinstance(error, ChannelClosed):
        return cloudpickle.dumps((ChannelClosed, (error.name, pack_error(error.cause)), {}))
    try:
        own = cloudpickle.dumps((type(error), error.args, error.__dict__))
        unpack_error(own)
    except Exception:  # whatever its own code raises when it is copied
        return cloudpickle.dumps((RuntimeError, (f"{type(error).__name__}: {error}",), {}))
    return own


def unpack_error(blob: bytes) -> BaseException:
    """Inverse of `pack_error`."""
    kind, args, state = cloudpickle.loads(blob)
    if kind is ChannelClosed:
        return ChannelClosed(args[0], unpack_error(args[1]))
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


_weights_of_process: dict[str, Weights] = {}
_flags_of_process: dict[str, Flag] = {}
_peers_of_process: dict[int, Any] = {}


def _process_weights(name: str) -> Weights:
    return _weights_of_process.setdefault(name, Weights())


def _process_flag(name: str) -> Flag:
    return _flags_of_process.setdefault(name, Flag())


class _HostedWeights(Weights):
    """The weights of a name as a process of the run sees them."""

    def __init__(self, name: str, readers: Sequence[int]) -> None:
        super().__init__()
        self.name, self.readers = name, tuple(readers)

    def publish(self, version: int, state: dict[str, Tensor], *, wait: bool = True) -> None:
        """Put one copy into Ray's object store, from which every reader's machine gets one."""
        here = this_exchange().index
        if here in self.readers:
            _process_weights(self.name).publish(version, state)
        others = [index for index in self.readers if index != here]
        if not others:
            return
        shared = ray.put({key: as_array(tensor) for key, tensor in state.items()})
        taken = [_peers_of_process[index].take_weights.remote(self.name, version, shared) for index in others]
        if wait:
            ray.get(taken, timeout=CHANNEL_TIMEOUT_S)

    def newer_than(self, version: int) -> tuple[int, dict[str, Tensor]] | None:
        """See Weights."""
        return _process_weights(self.name).newer_than(version)


# ---- at the driver


class RayFlag(Flag):
    """A flag that is thrown in all processes when it is thrown at the driver, by a signal handler for instance."""

    def __init__(self, runtime: RayRuntime, name: str) -> None:
        super().__init__()
        self.name = name
        threading.Thread(target=self._pass_on, args=[runtime], name=f"flag {name}", daemon=True).start()

    def _pass_on(self, runtime: RayRuntime) -> None:
        self._event.wait()
        runtime.tell_all("set_flag", self.name, self.reason)

    def __reduce__(self) -> Any:
        return _process_flag, (self.name,)


class RayChannel(RoutedChannel):
    """The driver's end: it can only close the channel, everywhere."""

    def __init__(self, runtime: RayRuntime, name: str, owners: Mapping[Any, int], *, confirm: bool) -> None:
        super().__init__(name, owners, confirm=confirm)
        self._runtime = runtime

    def close(self, cause: BaseException) -> None:
        """Wake all who wait here, in every process."""
        self._runtime.tell_all("close_channels", [self.name], pack_error(cause))


class RayWeights(Weights):
    """The driver's end: publishes what was read from a file, and copies from one name to another in the processes."""

    def __init__(self, runtime: RayRuntime, name: str, readers: Sequence[int]) -> None:
        super().__init__()
        self._runtime, self.name, self.readers = runtime, name, tuple(readers)

    def __reduce__(self) -> Any:
        return _HostedWeights, (self.name, self.readers)

    def publish(self, version: int, state: dict[str, Tensor], *, wait: bool = True) -> None:
        """See Weights."""
        shared = ray.put({key: as_array(tensor) for key, tensor in state.items()})
        self._runtime.tell("take_weights", self.readers, self.name, version, shared)

    def take_over(self, source: Weights) -> int:
        """See Weights; the state itself does not pass the driver."""
        assert isinstance(source, RayWeights)
        versions = self._runtime.tell("copy_weights", self.readers, source.name, self.name)
        return min(versions)

    @property
    def version(self) -> int:
        """See Weights."""
        return min(self._runtime.tell("copy_weights", self.readers[:1], self.name, self.name))


class _RemoteReplica:
    """What the driver has of a replica."""

    def __init__(self, runtime: RayRuntime, name: str, host: int) -> None:
        self._runtime, self.name, self.host = runtime, name, host
        self._id, self._numbers = runtime.new_number(), itertools.count()

    def submit(self, call: _Build | _Call) -> Future[Any]:
        blob = cloudpickle.dumps(call)
        answer: Future[Any] = Future()
        sent = self._runtime.actor(self.host).call.remote(self._id, next(self._numbers), blob)
        sent.future().add_done_callback(lambda ended: self._take(ended, answer))
        return answer

    def _take(self, ended: Future[_Outcome], answer: Future[Any]) -> None:
        if (problem := ended.exception()) is not None:
            answer.set_exception(self._died(problem))
            return
        outcome = ended.result()
        if outcome.error is None:
            answer.set_result(outcome.value)
            return
        error = unpack_error(outcome.error)
        error.add_note(f"in {self.name}, {self._runtime.describe(self.host)}:\n{outcome.trace.rstrip()}")
        answer.set_exception(error)

    def _died(self, problem: BaseException) -> BaseException:
        if not isinstance(problem, RayActorError):
            return problem
        return HostDied(f"{self.name} is gone: the process {self._runtime.describe(self.host)} ended", self.host)

    def whereabouts(self) -> str:
        """The line that it is at, if its process says so in time."""
        try:
            where = ray.get(self._runtime.actor(self.host).whereabouts.remote(self._id), timeout=2)
        except (RayError, GetTimeoutError):
            where = "its process does not answer"
        return f"{self.name} ({where}), {self._runtime.describe(self.host)}"


class HostDied(WorkerDied):
    """A process of the run ended by itself or was killed; `host` is its number."""

    def __init__(self, message: str, host: int) -> None:
        super().__init__(message)
        self.host = host


class RayGroup(Group[W]):
    """Replicas of a worker class in processes of the run; see `local.Group`."""

    def __init__(
        self,
        runtime: RayRuntime,
        name: str,
        builders: Sequence[Callable[[], W]],
        hosts: Sequence[int],
        *,
        channels: Iterable[Channel] = (),
        stop: Flag | None = None,
        build_timeout_s: float = CHANNEL_TIMEOUT_S,
    ) -> None:
        """Build replica i with `builders[i]`, which can be pickled, in process number `hosts[i]`."""
        self.name, self._channels, self._stop = name, tuple(channels), stop
        self._remote = [_RemoteReplica(runtime, f"{name}[{rank}]", host) for rank, host in enumerate(hosts)]
        self._builders = tuple(builders)
        self._begin("building", [_Build(builder) for builder in builders]).wait(build_timeout_s)

    def __len__(self) -> int:
        return len(self._remote)

    def run(self, method: Callable[Concatenate[W, P], R], *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """See Group."""
        return self._begin(_name_of(method), [_Call(method, args, kwargs)] * len(self))

    def run_each(self, method: Callable[[W, Any], R], arguments: Sequence[Any]) -> Handle[R]:
        """See Group."""
        if len(arguments) != len(self):
            raise ValueError(f"{self.name} has {len(self)} replicas but got {len(arguments)} arguments")
        return self._begin(_name_of(method), [_Call(method, (argument,), {}) for argument in arguments])

    def _begin(self, what: str, calls: Sequence[_Build | _Call]) -> Handle[Any]:
        started = [(replica, replica.submit(call)) for replica, call in zip(self._remote, calls, strict=True)]
        for _, future in started:
            future.add_done_callback(self._note_failure)
        return Handle(f"{self.name}.{what}", started, self._stop)

    def _note_failure(self, ended: Future[Any]) -> None:
        if (error := ended.exception()) is not None:
            self._on_failure(error)

    def end(self) -> None:
        """Nothing: the processes end with the runtime."""


def _name_of(method: Callable[..., Any]) -> str:
    return getattr(method, "__name__", str(method))


class RayRuntime:
    """The processes of a run and everything between them. Ray must have been joined (`cluster.join`).

    Args:
        seats: where the processes are started; a process is named by its place in this list.
        prepare: called first in every process; can be pickled.
    """

    def __init__(self, seats: Sequence[Seat], prepare: Callable[[], None] = lambda: None) -> None:
        self.seats = tuple(seats)
        self._key, self._prepare = secrets.token_bytes(32), cloudpickle.dumps(prepare)
        self._counter = itertools.count()
        self._introductions: dict[int, tuple[Address, int, str]] = {}
        self._actors = {index: self._start(index) for index in range(len(seats))}
        self._introduce_all()

    def _start(self, index: int) -> Any:
        seat = self.seats[index]
        environment: dict[str, Any] = {"env_vars": dict(seat.env_vars)} if seat.env_vars else {}
        if seat.python is not None:
            environment["py_executable"] = seat.python
        return (
            ray.remote(_Host)
            .options(
                name=f"rlinf {secrets.token_hex(4)} {seat.name}",
                # Without this an actor keeps one CPU for itself, and three roles on two CPUs wait for ever.
                num_cpus=0,
                max_concurrency=1000,
                scheduling_strategy=NodeAffinitySchedulingStrategy(seat.node_id, soft=False),
                runtime_env=environment or None,
            )
            .remote(index, seat.ip, self._key, sys.path, self._prepare)
        )

    def _introduce_all(self) -> None:
        for index, actor in self._actors.items():
            if index not in self._introductions:
                self._introductions[index] = self._answer(actor.introduce.remote(), index, CHANNEL_TIMEOUT_S)
        addresses = {index: address for index, (address, _, _) in self._introductions.items()}
        for index, actor in self._actors.items():
            self._answer(actor.meet.remote(addresses, self._actors), index, ANSWER_TIMEOUT_S)

    def _answer(self, reference: Any, index: int, timeout_s: float) -> Any:
        try:
            return ray.get(reference, timeout=timeout_s)
        except GetTimeoutError as error:
            raise WorkerDied(f"the process {self.describe(index)} gave no answer for {timeout_s:g} s") from error
        except RayActorError as error:
            raise HostDied(f"the process {self.describe(index)} ended: {error}", index) from error

    def actor(self, host: int) -> Any:
        """The actor that is process number `host`."""
        return self._actors[host]

    def describe(self, host: int) -> str:
        """A process in words."""
        seat = self.seats[host]
        if host not in self._introductions:
            return f"'{seat.name}' on {seat.ip}"
        _, pid, machine = self._introductions[host]
        return f"'{seat.name}' (process {pid} on {machine}, {seat.ip})"

    def tell(self, method: str, hosts: Iterable[int], *args: Any) -> list[Any]:
        """Call a method of processes and wait for their answers."""
        sent = [(host, getattr(self._actors[host], method).remote(*args)) for host in hosts]
        return [self._answer(reference, host, ANSWER_TIMEOUT_S) for host, reference in sent]

    def tell_all(self, method: str, *args: Any) -> None:
        """Call a method of all processes; those that are gone do not matter. Does not wait."""
        for actor in list(self._actors.values()):
            getattr(actor, method).remote(*args)

    def new_number(self) -> int:
        """One that was not given before."""
        return next(self._counter)

    # ---- the four names

    def flag(self) -> Flag:
        """A switch that every process sees."""
        return RayFlag(self, f"flag {self.new_number()}")

    def channel(self, name: str, owners: Mapping[Any, int], *, confirm: bool = False) -> Channel:
        """A channel whose items of key k are taken out in process `owners[k]`."""
        return RayChannel(self, name, owners, confirm=confirm)

    def weights(self, name: str, readers: Iterable[int]) -> Weights:
        """Weights that are read in the given processes."""
        return RayWeights(self, name, sorted(set(readers)))

    def group(
        self,
        name: str,
        builders: Sequence[Callable[[], W]],
        hosts: Sequence[int],
        *,
        channels: Iterable[Channel] = (),
        stop: Flag | None = None,
    ) -> Group[W]:
        """Replicas in the given processes."""
        return RayGroup(self, name, builders, hosts, channels=channels, stop=stop)

    def close(self) -> None:
        """End all processes."""
        for actor in self._actors.values():
            ray.kill(actor)
