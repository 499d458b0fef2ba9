"""The runtime on Ray: worker groups in processes that may be on several machines.

Ray starts the processes, finds the machines, carries calls and their results, and keeps one copy of the published
weights on every machine. What workers say to each other meanwhile goes over `exchange`. The names are those of
`local`, of which these are kinds: whoever uses them does not see the difference.

A process hosts any number of replicas, each with a thread of its own, exactly as in `local`: an environment worker and
the policy that answers it are put into one process where the placement allows, and their messages stay there.

Only this module, `ray_process`, which runs in the processes, and `cluster` know Ray.
"""

from __future__ import annotations

import itertools
import secrets
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
from ray import cloudpickle
from ray.exceptions import ActorUnschedulableError, GetTimeoutError, OutOfMemoryError, RayError, RuntimeEnvSetupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
from torch import Tensor

from rlinf.core.errors import ProcessDied, WorkerDied
from rlinf.runtime.cluster import Reservation, alive
from rlinf.runtime.exchange import Address, RoutedChannel, as_array
from rlinf.runtime.local import (
    BUILD_TIMEOUT_S,
    CHANNEL_TIMEOUT_S,
    Channel,
    Flag,
    Group,
    Handle,
    Note,
    Weights,
    cause_of,
)
from rlinf.runtime.ray_process import (
    DEATHS,
    Build,
    Call,
    Host,
    HostedWeights,
    Outcome,
    pack_error,
    process_flag,
    unpack_error,
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
        machine: name of the machine.
        devices: accelerators of the machine that the process sees, among those that Ray sees there.
        env_vars: environment variables of the process, beside those that Ray was started with on that machine.
        python: its interpreter; None for that of the caller.
        sees_none: without `devices` it sees no accelerator; otherwise then all that Ray was started with.
        robot: the robot that it commands, where Ray keeps other runs from it.
    """

    name: str
    node_id: str
    ip: str
    machine: str = "this machine"
    devices: tuple[int, ...] = ()
    env_vars: Mapping[str, str] = field(default_factory=dict)
    python: str | None = None
    sees_none: bool = False
    robot: Reservation | None = None


class RayFlag(Flag):
    """A flag that is thrown in all processes when it is thrown at the driver, by a signal handler for instance."""

    def __init__(self, runtime: RayRuntime, name: str) -> None:
        super().__init__()
        self.name = name
        threading.Thread(target=self._pass_on, args=[runtime], name=f"flag {name}", daemon=True).start()

    def _pass_on(self, runtime: RayRuntime) -> None:
        self._event.wait()
        runtime.tell_all(Host.set_flag, self.name, self.reason)

    def __reduce__(self) -> Any:
        return process_flag, (self.name,)


class RayChannel(RoutedChannel):
    """The driver's end: it can only close the channel, everywhere."""

    def __init__(self, runtime: RayRuntime, name: str, owners: Mapping[Any, int], *, confirm: bool) -> None:
        super().__init__(name, owners, confirm=confirm)
        self._runtime = runtime

    def close(self, cause: BaseException) -> None:
        """Wake all who wait here, in every process."""
        self._runtime.close_channels([self.name], self._runtime.generation, cause)


class RayWeights(Weights):
    """The driver's end: publishes what was read from a file, and copies from one name to another in the processes."""

    def __init__(self, runtime: RayRuntime, name: str, readers: Sequence[int]) -> None:
        super().__init__()
        self._runtime, self.name, self.readers = runtime, name, tuple(readers)

    def __reduce__(self) -> Any:
        return HostedWeights, (self.name, self.readers)

    def publish(self, version: int, state: dict[str, Tensor], *, wait: bool = True) -> None:
        """See Weights."""
        shared = ray.put({key: as_array(tensor) for key, tensor in state.items()})
        self._runtime.tell(Host.take_weights, self.readers, self.name, version, shared, timeout_s=CHANNEL_TIMEOUT_S)

    def take_over(self, source: Weights) -> int:
        """See Weights; the state itself does not pass the driver."""
        assert isinstance(source, RayWeights)
        versions = self._runtime.tell(Host.copy_weights, self.readers, source.name, self.name)
        return min(versions)

    @property
    def version(self) -> int:
        """See Weights."""
        return min(self._runtime.tell(Host.copy_weights, self.readers[:1], self.name, self.name))

    def newer_than(self, version: int) -> tuple[int, dict[str, Tensor]] | None:
        """Raises RuntimeError: the driver has no copy."""
        raise RuntimeError(f"weights '{self.name}' are read in processes {list(self.readers)}, not in the driver")


class _RemoteReplica:
    """What the driver has of a replica."""

    def __init__(self, runtime: RayRuntime, name: str, host: int) -> None:
        self._runtime, self.name, self.host = runtime, name, host
        self._id, self._numbers = runtime.new_number(), itertools.count()

    def submit(self, call: Build | Call) -> Future[Any]:
        blob = cloudpickle.dumps(call)
        answer: Future[Any] = Future()
        sent = self._runtime.actor(self.host).call.remote(self._id, next(self._numbers), blob)
        sent.future().add_done_callback(lambda ended: self._take(ended, answer))
        return answer

    def _take(self, ended: Future[Outcome], answer: Future[Any]) -> None:
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
        if not isinstance(problem, DEATHS):
            return problem
        how = "was ended by Ray: memory is full there" if isinstance(problem, OutOfMemoryError) else "ended"
        return ProcessDied(f"{self.name} is gone: the process {self._runtime.describe(self.host)} {how}", self.host)

    def whereabouts(self) -> str:
        """The line that it is at, if its process says so in time."""
        try:
            where = ray.get(self._runtime.actor(self.host).whereabouts.remote(self._id), timeout=2)
        except (RayError, GetTimeoutError):
            where = "its process does not answer"
        return f"{self.name} ({where}), {self._runtime.describe(self.host)}"


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
        stop_timeout_s: float | None = None,
    ) -> None:
        """Build replica i with `builders[i]`, which can be pickled, in process number `hosts[i]`."""
        self.name, self._channels, self._stop = name, tuple(channels), stop
        self._runtime, self._stop_timeout_s = runtime, stop_timeout_s
        self._builders, self._hosts = tuple(builders), tuple(hosts)
        self._remote = [self._replica(runtime, rank) for rank in range(len(hosts))]
        building = self._begin("building", [Build(builder) for builder in builders])
        building.wait(BUILD_TIMEOUT_S, heartbeat=runtime.note)

    def _replica(self, runtime: RayRuntime, rank: int) -> _RemoteReplica:
        return _RemoteReplica(runtime, f"{self.name}[{rank}]", self._hosts[rank])

    @property
    def hosts(self) -> tuple[int, ...]:
        """See Group."""
        return self._hosts

    def rebuild(self, hosts: Sequence[int]) -> None:
        """Build the replicas in processes `hosts`, which are new."""
        ranks = [rank for rank, host in enumerate(self._hosts) if host in hosts]
        for rank in ranks:
            self._remote[rank] = self._replica(self._runtime, rank)
        building = [(self._remote[rank], self._remote[rank].submit(Build(self._builders[rank]))) for rank in ranks]
        handle = Handle(f"{self.name}.building", building, self._stop)
        handle.wait(BUILD_TIMEOUT_S, heartbeat=self._runtime.note)

    def __len__(self) -> int:
        return len(self._remote)

    def run(self, method: Callable[Concatenate[W, P], R], *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """See Group."""
        return self._begin(_name_of(method), [Call(method, args, kwargs)] * len(self))

    def run_each(self, method: Callable[[W, Any], R], arguments: Sequence[Any]) -> Handle[R]:
        """See Group."""
        if len(arguments) != len(self):
            raise ValueError(f"{self.name} has {len(self)} replicas but got {len(arguments)} arguments")
        return self._begin(_name_of(method), [Call(method, (argument,), {}) for argument in arguments])

    def _begin(self, what: str, calls: Sequence[Build | Call]) -> Handle[Any]:
        started = [(replica, replica.submit(call)) for replica, call in zip(self._remote, calls, strict=True)]
        # The failure of a call may become known only when what it did not survive has long been replaced.
        note_failure = partial(self._note_failure, self._runtime.generation)
        for _, future in started:
            future.add_done_callback(note_failure)
        return Handle(f"{self.name}.{what}", started, self._stop, self._stop_timeout_s)

    def _note_failure(self, generation: int, ended: Future[Any]) -> None:
        if (error := ended.exception()) is not None:
            self._runtime.close_channels([channel.name for channel in self._channels], generation, cause_of(error))

    def end(self) -> None:
        """Nothing: the processes end with the runtime."""


def _name_of(method: Callable[..., Any]) -> str:
    return getattr(method, "__name__", str(method))


class RayRuntime:
    """The processes of a run and everything between them. Ray must have been joined (`cluster.join`).

    Args:
        seats: where the processes are started; a process is named by its place in this list.
        prepare: called first in every process; can be pickled.
        note: gets a line now and then while building workers takes long.
    """

    def __init__(
        self, seats: Sequence[Seat], prepare: Callable[[], None] = lambda: None, note: Note | None = None
    ) -> None:
        self.seats, self.note = tuple(seats), note
        self._key, self._prepare = secrets.token_bytes(32), cloudpickle.dumps(prepare)
        self._counter = itertools.count()
        self._groups: list[RayGroup[Any]] = []
        self._kept: dict[str, bool] = {}
        self._flags: list[RayFlag] = []
        self.generation = 0
        self._introductions: dict[int, tuple[Address, int, str]] = {}
        self._incomplete: set[int] = set()
        self._actors = {index: self._start(index) for index in range(len(seats))}
        try:
            self._introduce_all()
        except BaseException:
            self.close()
            raise

    def _start(self, index: int) -> Any:
        seat = self.seats[index]
        # With an environment of its own a process takes a second longer to start: Ray imports itself twice for it.
        environment: dict[str, Any] = {"env_vars": dict(seat.env_vars)} if seat.env_vars else {}
        if seat.python is not None:
            environment["py_executable"] = seat.python
        strategy: Any = NodeAffinitySchedulingStrategy(seat.node_id, soft=False)
        if seat.robot is not None:
            strategy = PlacementGroupSchedulingStrategy(seat.robot.group, 0)
        devices = None if not seat.devices and not seat.sees_none else seat.devices
        return (
            ray.remote(Host)
            .options(
                name=f"rlinf {secrets.token_hex(4)} {seat.name}",
                # Without this an actor keeps one CPU for itself, and three roles on two CPUs wait for ever.
                num_cpus=0,
                resources={seat.robot.kind: 1} if seat.robot is not None else None,
                max_concurrency=1000,
                scheduling_strategy=strategy,
                runtime_env=environment or None,
            )
            .remote(index, seat.ip, self._key, sys.path, devices, self._prepare)
        )

    def _introduce_all(self) -> None:
        for index, actor in self._actors.items():
            if index not in self._introductions:
                *introduction, problem = self._answer(actor.introduce.remote(), index, CHANNEL_TIMEOUT_S)
                self._introductions[index] = tuple(introduction)
                if problem is not None:
                    raise unpack_error(problem)
        addresses = {index: address for index, (address, _, _) in self._introductions.items()}
        for index, actor in self._actors.items():
            self._answer(actor.meet.remote(addresses, self._actors), index, ANSWER_TIMEOUT_S)

    def _answer(self, reference: Any, index: int, timeout_s: float) -> Any:
        try:
            return ray.get(reference, timeout=timeout_s)
        except GetTimeoutError as error:
            raise WorkerDied(f"the process {self.describe(index)} gave no answer for {timeout_s:g} s") from error
        except (*DEATHS, RuntimeEnvSetupError, ActorUnschedulableError) as error:
            raise ProcessDied(f"the process {self.describe(index)} ended: {error}", index) from error

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

    def tell(
        self, method: Callable[..., Any], hosts: Iterable[int], *args: Any, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> list[Any]:
        """Call a method of `Host` in processes and wait for their answers."""
        sent = [(host, getattr(self._actors[host], method.__name__).remote(*args)) for host in hosts]
        return [self._answer(reference, host, timeout_s) for host, reference in sent]

    def tell_all(self, method: Callable[..., Any], *args: Any) -> None:
        """Call a method of `Host` in all processes; those that are gone do not matter. Does not wait."""
        for actor in list(self._actors.values()):
            getattr(actor, method.__name__).remote(*args)

    def close_channels(self, names: Sequence[str], generation: int, cause: BaseException) -> None:
        """Wake whoever waits on these channels in any process, unless they were opened again since `generation`."""
        if names:
            self.tell_all(Host.close_channels, names, generation, pack_error(cause))

    def new_number(self) -> int:
        """One that was not given before."""
        return next(self._counter)

    # ---- the four names

    def flag(self) -> Flag:
        """A switch that every process sees."""
        self._flags.append(RayFlag(self, f"flag {self.new_number()}"))
        return self._flags[-1]

    def channel(self, name: str, owners: Mapping[Any, int], *, confirm: bool = False) -> Channel:
        """A channel whose items of key k are taken out in process `owners[k]`."""
        self._kept[name] = confirm
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
        stop_timeout_s: float | None = None,
    ) -> Group[W]:
        """Replicas in the given processes."""
        group = RayGroup(self, name, builders, hosts, channels=channels, stop=stop, stop_timeout_s=stop_timeout_s)
        self._groups.append(group)
        return group

    def dead(self) -> list[int]:
        """See Runtime."""
        asked = {index: actor.ping.remote() for index, actor in self._actors.items()}
        return [index for index, reference in asked.items() if self._is_dead(index, reference)]

    def _require_machines(self, hosts: Sequence[int]) -> None:
        there = {machine.node_id for machine in alive()}
        for seat in (self.seats[index] for index in hosts):
            if seat.node_id not in there:
                raise WorkerDied(f"machine '{seat.machine}' ({seat.ip}) has left the run; '{seat.name}' was on it")

    def _is_dead(self, index: int, reference: Any) -> bool:
        try:
            self._answer(reference, index, ANSWER_TIMEOUT_S)
        except ProcessDied:
            return True
        return False

    def interrupt(self, cause: BaseException) -> None:
        """See Runtime."""
        self.close_channels(list(self._kept), self.generation, cause)

    def replace(self, hosts: Sequence[int]) -> None:
        """See Runtime."""
        # What another death has left half made is made anew with the rest.
        hosts = sorted({*hosts, *self._incomplete})
        self._require_machines(hosts)
        self.generation += 1
        self._incomplete.update(hosts)
        for index in hosts:
            ray.kill(self._actors[index])
            self._introductions.pop(index, None)
            self._actors[index] = self._start(index)
        try:
            self._introduce_all()
        except ProcessDied:
            self._require_machines(hosts)  # Ray takes some seconds to find out that one is gone
            raise
        self.tell(Host.reopen_channels, self._actors, self.generation, self._kept)
        for group in self._groups:
            group.rebuild(hosts)
        for flag in self._flags:
            if flag.is_set():
                self.tell(Host.set_flag, hosts, flag.name, flag.reason)
        self._incomplete.clear()

    def meeting_point(self, host: int) -> str:
        """See Runtime. The port was free a moment ago."""
        [port] = self.tell(Host.free_port, [host])
        return f"{self.seats[host].ip}:{port}"

    def close(self) -> None:
        """End all processes."""
        for actor in self._actors.values():
            ray.kill(actor)
