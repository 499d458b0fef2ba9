"""The runtime in one process: every replica of a worker is an object with a thread of its own.

Four names move objects between workers: `Group` and `Handle` call replicas, `Channel` is a FIFO between them,
`Weights` holds the newest published state; `Flag` asks them to come to an end. Nothing here knows of
reinforcement learning.

Whatever travels is handed over by reference: the receiver sees the sender's own arrays. Everybody treats what
came out of a channel as read-only and makes new arrays instead of writing into old ones.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import sys
import threading
import time
import traceback
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for_futures
from functools import partial
from typing import Any, Concatenate, Generic, NoReturn, ParamSpec, Protocol, TypeVar

from torch import Tensor

from rlinf.core.errors import ProcessDied, RlinfError, WorkerDied

W = TypeVar("W")
P = ParamSpec("P")
R = TypeVar("R")

CHANNEL_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 3600.0
PLAY_TIMEOUT_S = 7 * 86_400.0
"""For playing and answering, which take as long as there is to play: who hangs is missed by the other in
`CHANNEL_TIMEOUT_S`."""
GRACE_S = 2.0
"""For the cause of a failure to show itself after its first consequence."""
STOP_TIMEOUT_S = 10.0
"""How long a call may still take once its run has been asked to stop."""
LEARNER_STOP_TIMEOUT_S = 600.0
"""The same for calls to learners: an update that is cut off would be lost, and one of a large network takes minutes."""
BUILD_TIMEOUT_S = 3600.0
"""For building workers: the weights of a large network may come from a slow disk."""
HEARTBEAT_S = 60.0
"""So often it is said who is still being built."""

Note = Callable[[str], None]
"""Shows one line to the people who watch."""


class ChannelClosed(RlinfError):
    """Whoever was on the other side of the channel has failed; `cause` is that failure."""

    def __init__(self, name: str, cause: BaseException) -> None:
        super().__init__(f"channel '{name}' was closed: {cause}")
        self.name, self.cause = name, cause


class Flag:
    """A switch that is thrown once, with a reason, and that workers look at between pieces of work."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reason = ""

    def set(self, reason: str) -> None:
        """Throw the switch. The first reason is kept."""
        if not self._event.is_set():
            self.reason = reason
            self._event.set()

    def is_set(self) -> bool:
        """Whether the switch has been thrown."""
        return self._event.is_set()


class Channel:
    """FIFO between worker groups, split by key so that rank 3 can wait for what is meant for rank 3."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._items: dict[Any, deque[Any]] = defaultdict(deque)
        self._changed = threading.Condition()
        self._cause: BaseException | None = None

    def require_open(self) -> None:
        """Raises ChannelClosed if it is closed."""
        with self._changed:
            if self._cause is not None:
                raise ChannelClosed(self.name, self._cause)

    def put(self, item: Any, key: Any = 0) -> None:
        """Append `item` to the queue of `key`. Raises ChannelClosed."""
        with self._changed:
            if self._cause is not None:
                raise ChannelClosed(self.name, self._cause)
            self._items[key].append(item)
            self._changed.notify_all()

    def get(self, key: Any = 0, timeout_s: float = CHANNEL_TIMEOUT_S) -> Any:
        """Oldest item of `key`, waiting for it if need be.

        Raises WorkerDied when nothing arrives in time, ChannelClosed when the other side has failed.
        """
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: self._cause is not None or len(self._items[key]) > 0, timeout=timeout_s
            )
            if self._cause is not None:
                raise ChannelClosed(self.name, self._cause)
            if not arrived:
                raise WorkerDied(
                    f"nothing arrived on channel '{self.name}' for {key!r} within {timeout_s:g} s: "
                    "the worker that should have sent it hangs or was never started"
                )
            return self._items[key].popleft()

    def drain(self, key: Any = 0) -> list[Any]:
        """Everything waiting now for `key`, oldest first, without blocking; also after `close`."""
        with self._changed:
            items = list(self._items[key])
            self._items[key].clear()
            return items

    def close(self, cause: BaseException) -> None:
        """Wake all who wait here, now and later, with ChannelClosed. The first cause is kept."""
        with self._changed:
            if self._cause is None:
                self._cause = cause
            self._changed.notify_all()

    def reopen(self, *, keep: bool) -> None:
        """Make a closed channel work again, with the items that wait in it or without."""
        with self._changed:
            if not keep:
                self._items.clear()
            self._cause = None


class Weights:
    """The newest published weights and their version. Readers take the newest or nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._version = -1
        self._state: dict[str, Tensor] = {}

    @property
    def version(self) -> int:
        """Of what readers get now; -1 before the first publication."""
        return self._version

    def publish(self, version: int, state: dict[str, Tensor], *, wait: bool = True) -> None:
        """Make `state` what readers get. The caller must not write into it afterwards.

        Between processes it takes a while to arrive; without `wait` that goes on after the return.
        """
        with self._lock:
            self._version, self._state = version, state

    def take_over(self, source: Weights) -> int:
        """Publish what is published on `source` at this moment. Returns its version, -1 for nothing."""
        newest = source.newer_than(-1)
        if newest is None:
            return -1
        self.publish(*newest)
        return newest[0]

    def newer_than(self, version: int) -> tuple[int, dict[str, Tensor]] | None:
        """(version, state) if something newer than `version` is published, else None. Never waits."""
        with self._lock:
            return (self._version, self._state) if self._version > version else None


class Answering(Protocol):
    """Whoever a call was made to."""

    name: str

    def whereabouts(self) -> str:
        """The line that it is at, for error messages."""
        ...


class Replica:
    """The only thread that ever touches one worker object; calls queue up and run in order."""

    def __init__(self, name: str, on_failure: Callable[[BaseException], None]) -> None:
        self.name, self.busy = name, False
        self._on_failure = on_failure
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        # A daemon, so that a worker stuck in foreign code cannot keep the interpreter from ending.
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()
        _REPLICAS.add(self)

    def _serve(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            self.busy = True
            try:
                future.set_result(call())
            except BaseException as error:  # the thread's edge: whatever it is belongs to the caller
                future.set_exception(error)
                self._on_failure(error)
            self.busy = False

    def submit(self, call: Callable[[], R]) -> Future[R]:
        """Queue a call; its future result."""
        future: Future[R] = Future()
        self._calls.put((future, call))
        return future

    def end(self) -> None:
        """Let the thread end after the calls that are queued."""
        self._calls.put(None)

    def whereabouts(self) -> str:
        """The line that the thread is at, for error messages."""
        return f"{self.name} ({self.where()})"

    def where(self) -> str:
        """That line alone."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        if frame is None:
            return "its thread has ended"
        at = traceback.extract_stack(frame)[-1]
        return f"at {at.filename}:{at.lineno}, in {at.name}"


_REPLICAS: weakref.WeakSet[Replica] = weakref.WeakSet()


def leave(code: int) -> NoReturn:
    """End the process with `code`, also when a replica hangs in the middle of a call.

    Python would end with that thread inside of foreign code, which C++ answers by aborting the process.
    """
    if any(replica.busy for replica in _REPLICAS):
        for child in multiprocessing.active_children():
            child.terminate()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class Handle(Generic[R]):
    """A call running on every replica of a group."""

    def __init__(
        self,
        what: str,
        calls: Sequence[tuple[Answering, Future[R]]],
        stop: Flag | None,
        stop_timeout_s: float | None = None,
    ) -> None:
        """`stop_timeout_s` is how long the call may still take once `stop` is set; None: STOP_TIMEOUT_S."""
        self._what, self._calls, self._stop, self._stop_timeout_s = what, calls, stop, stop_timeout_s
        self._started = self._ended = time.perf_counter()
        for _, future in calls:
            future.add_done_callback(self._note_end)

    def _note_end(self, _: Future[R]) -> None:
        self._ended = time.perf_counter()

    @property
    def done(self) -> bool:
        """Whether `wait` would return or raise at once."""
        return all(future.done() for _, future in self._calls)

    @property
    def succeeded(self) -> bool:
        """Whether `wait` would return at once."""
        return all(future.done() and future.exception() is None for _, future in self._calls)

    @property
    def any_done(self) -> bool:
        """Whether the call has ended on one of the replicas at least."""
        return any(future.done() for _, future in self._calls)

    @property
    def seconds(self) -> float:
        """From the call to the end of the replica that ended last so far."""
        return self._ended - self._started

    def wait(
        self,
        timeout_s: float = CALL_TIMEOUT_S,
        *,
        watching: Iterable[Handle[Any]] = (),
        hurry: bool = True,
        heartbeat: Note | None = None,
    ) -> list[R]:
        """Results in rank order. May be asked again.

        The first exception, of this call or of the calls in `watching`, is raised at once, the very object
        that was thrown in the replica, with its traceback; a worker that only failed because a channel was
        closed on it stands for the failure that closed the channel.

        Raises WorkerDied, naming who did not answer and where it is, after `timeout_s`; with `hurry`, at the
        latest STOP_TIMEOUT_S (or what the group has instead) after the run was asked to stop.

        `heartbeat` gets a line that names them every HEARTBEAT_S until then.
        """
        own = [future for _, future in self._calls]
        watched = _futures_of([self, *watching])
        began = noted = time.monotonic()
        deadline = began + timeout_s
        hurried, stop_timeout_s = False, STOP_TIMEOUT_S if self._stop_timeout_s is None else self._stop_timeout_s
        while True:
            if _failed(watched):
                raise _first_cause(watched)
            if all(future.done() for future in own):
                return [future.result() for _, future in self._calls]
            if hurry and not hurried and self._stop is not None and self._stop.is_set():
                hurried, deadline = True, min(deadline, time.monotonic() + stop_timeout_s)
            if (left := deadline - time.monotonic()) <= 0:
                raise WorkerDied(self._overdue(timeout_s if not hurried else stop_timeout_s))
            if heartbeat is not None and (now := time.monotonic()) - noted >= HEARTBEAT_S:
                noted = now
                heartbeat(f"{self._what}: after {now - began:.0f} s still waiting for {self._late()}")
            # Slices, because a stop may be asked for while nothing else happens.
            pending = [future for future in watched if not future.done()]
            wait_for_futures(pending, timeout=min(left, 0.2), return_when=FIRST_COMPLETED)

    def failures(self, timeout_s: float) -> list[str]:
        """One line for every replica that failed or did not answer in time. For clean-up: does not raise."""
        wait_for_futures([future for _, future in self._calls], timeout=timeout_s)
        lines = [self._overdue(timeout_s)] if any(not future.done() for _, future in self._calls) else []
        for replica, future in self._calls:
            if future.done() and (error := future.exception()) is not None:
                lines.append(f"{self._what} on {replica.name}: {type(error).__name__}: {error}")
        return lines

    def _overdue(self, seconds: float) -> str:
        return f"{self._what}: no answer within {seconds:g} s from {self._late()}"

    def _late(self) -> str:
        """Who has not answered, and where it is."""
        return ", ".join(replica.whereabouts() for replica, future in self._calls if not future.done())


def wait_for_one(
    handles: Sequence[Handle[Any]], *, watching: Iterable[Handle[Any]] = (), timeout_s: float = CALL_TIMEOUT_S
) -> None:
    """Return when a call of one of `handles` has ended everywhere, or the run is asked to stop.

    The first exception, of these calls or of those in `watching`, is raised at once. Raises WorkerDied, naming who
    did not answer and where it is, after `timeout_s`.
    """
    futures = _futures_of([*handles, *watching])
    deadline = time.monotonic() + timeout_s
    while True:
        if _failed(futures):
            raise _first_cause(futures)
        if any(handle.done or (handle._stop is not None and handle._stop.is_set()) for handle in handles):
            return
        if (left := deadline - time.monotonic()) <= 0:
            raise WorkerDied("; ".join(handle._overdue(timeout_s) for handle in handles))
        pending = [future for future in futures if not future.done()]
        wait_for_futures(pending, timeout=min(left, 0.2), return_when=FIRST_COMPLETED)


def _futures_of(handles: Sequence[Handle[Any]]) -> list[Future[Any]]:
    """In the order of handles and ranks, each once."""
    return list(dict.fromkeys(future for handle in handles for _, future in handle._calls))


def _failed(futures: Iterable[Future[Any]]) -> list[BaseException]:
    """What was raised in the calls that have ended so far."""
    ended = [future for future in futures if future.done()]
    return [error for future in ended if (error := future.exception()) is not None]


def _first_cause(futures: Sequence[Future[Any]]) -> BaseException:
    """The failure that was first among calls of which some have failed: one that was not itself caused by another.

    Whoever only missed somebody (`WorkerDied` itself) may say so before the end of the one who was missed is known:
    that is waited for a moment.
    """
    until = time.monotonic() + GRACE_S
    while True:
        cause = cause_of(min(_failed(futures), key=_consequence))
        pending = [future for future in futures if not future.done()]
        if type(cause) is not WorkerDied or not pending or (left := until - time.monotonic()) <= 0:
            return cause
        wait_for_futures(pending, timeout=left, return_when=FIRST_COMPLETED)


def _consequence(error: BaseException) -> tuple[bool, bool, bool]:
    """A key to sort failures by: causes before their consequences, and a death before what else went wrong."""
    missed_somebody = type(cause_of(error)) is WorkerDied
    return missed_somebody, isinstance(error, ChannelClosed), not isinstance(error, ProcessDied)


def cause_of(error: BaseException) -> BaseException:
    """What closed the channel, of a failure that is nothing but the consequence of that; else the failure itself."""
    return error.cause if isinstance(error, ChannelClosed) else error


class Group(Generic[W]):
    """N replicas of one worker class, called together.

    The method is passed as an object, `group.run(LearnerWorker.update, 4)`, never by name: an editor can
    follow it and a type checker sees its arguments. Calls to one replica run one after the other, in order.
    """

    def __init__(
        self,
        name: str,
        builders: Sequence[Callable[[], W]],
        *,
        channels: Iterable[Channel] = (),
        stop: Flag | None = None,
        stop_timeout_s: float | None = None,
        note: Note | None = None,
    ) -> None:
        """Build replica i with `builders[i]`, each in its own thread, all at the same time.

        `channels` are closed as soon as a replica fails, so that nobody waits for it in vain. Once `stop` is
        set, waiting for this group is cut short, to `stop_timeout_s` where that is given (see `Handle.wait`).
        `note` gets a line now and then while building takes long.
        """
        self.name = name
        self._channels = tuple(channels)
        self._stop, self._stop_timeout_s = stop, stop_timeout_s
        self._replicas: list[Replica] = [Replica(f"{name}[{rank}]", self._on_failure) for rank in range(len(builders))]
        building = [(r, r.submit(build)) for r, build in zip(self._replicas, builders, strict=True)]
        self._workers = Handle(f"building {name}", building, stop).wait(BUILD_TIMEOUT_S, heartbeat=note)

    def __len__(self) -> int:
        return len(self._replicas)

    @property
    def hosts(self) -> tuple[int, ...]:
        """Number of the process of each replica."""
        return (0,) * len(self)

    @property
    def stop_timeout_s(self) -> float:
        """How long a call to this group may still take once the run has been asked to stop."""
        return STOP_TIMEOUT_S if self._stop_timeout_s is None else self._stop_timeout_s

    def _on_failure(self, error: BaseException) -> None:
        for channel in self._channels:
            channel.close(cause_of(error))

    def run(self, method: Callable[Concatenate[W, P], R], *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """Start `method(replica, *args, **kwargs)` on every replica."""
        return self._start(method, [partial(method, worker, *args, **kwargs) for worker in self._workers])

    def run_each(self, method: Callable[[W, Any], R], arguments: Sequence[Any]) -> Handle[R]:
        """Start `method(replica, arguments[rank])` on every replica."""
        if len(arguments) != len(self):
            raise ValueError(f"{self.name} has {len(self)} replicas but got {len(arguments)} arguments")
        pairs = zip(self._workers, arguments, strict=True)
        return self._start(method, [partial(method, worker, argument) for worker, argument in pairs])

    def _start(self, method: Callable[..., R], calls: Sequence[Callable[[], R]]) -> Handle[R]:
        started = [(r, r.submit(call)) for r, call in zip(self._replicas, calls, strict=True)]
        what = f"{self.name}.{getattr(method, '__name__', method)}"
        return Handle(what, started, self._stop, self._stop_timeout_s)

    def end(self) -> None:
        """Let the threads end after the calls that are queued. Does not wait."""
        for replica in self._replicas:
            replica.end()


class LocalRuntime:
    """Makes the names of this module for one process, as `ray_backend.RayRuntime` does for several.

    `note` gets a line now and then while building a group takes long.
    """

    def __init__(self, note: Note | None = None) -> None:
        self._note = note

    def flag(self) -> Flag:
        """A switch."""
        return Flag()

    def channel(self, name: str, owners: Mapping[Any, int], *, confirm: bool = False) -> Channel:
        """A channel; who takes out what makes no difference here."""
        return Channel(name)

    def weights(self, name: str, readers: Iterable[int]) -> Weights:
        """Weights; who reads them makes no difference here."""
        return Weights()

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
        """Replicas with a thread each; the numbers of processes in `hosts` make no difference here."""
        return Group(name, builders, channels=channels, stop=stop, stop_timeout_s=stop_timeout_s, note=self._note)

    def meeting_point(self, host: int) -> str:
        """None is needed: there is one process."""
        return ""

    def describe(self, host: int) -> str:
        """The only one."""
        return "of the run itself"

    def dead(self) -> list[int]:
        """None: the one process would have died with the caller."""
        return []

    def interrupt(self, cause: BaseException) -> None:
        """Nothing: see `dead`."""

    def replace(self, hosts: Sequence[int]) -> None:
        """Nothing: see `dead`."""

    def close(self) -> None:
        """Nothing: the threads end with their groups."""
