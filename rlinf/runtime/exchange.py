"""Messages between processes: channels whose ends are in different ones.

Every process of a run has one `Exchange`. What is put into a channel goes straight to the process in which it will be
taken out, over one connection for each pair of processes; nothing passes a third one. A message between two workers
of the same process is handed over by reference, as in `local`.

Arrays and tensors travel as raw memory beside the pickle that describes them. Only who knows the run's key is listened
to: what arrives is unpickled, and a pickle may run code.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlinf.core.errors import ProcessDied, WorkerDied
from rlinf.runtime.local import CHANNEL_TIMEOUT_S, Channel, ChannelClosed

INLINE_BYTES = 1 << 15
"""Arrays up to this size go into the pickle: copying so little is cheaper than one more piece."""
CONNECT_TIMEOUT_S = 20.0
ACCEPT_PAUSE_S = 0.1
"""Before listening again after something went wrong with that."""

Address = tuple[str, int]


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays; torch's own way copies them through a file in memory."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not Tensor or obj.layout != torch.strided:
            return NotImplemented
        return as_tensor, as_array(obj)


def as_array(tensor: Tensor) -> tuple[np.ndarray, str]:
    """(array, name of the dtype), sharing the memory of a contiguous tensor on the CPU."""
    tensor = tensor.detach().cpu()
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.dtype is torch.bfloat16:  # numpy has no such type
        tensor = tensor.view(torch.int16)
    return tensor.numpy(), name


def as_tensor(array: np.ndarray, dtype: str) -> Tensor:
    """The tensor of which `as_array` gave this; it shares the memory."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def pack(item: Any) -> list[Any]:
    """`item` as a pickle, followed by the memory of its large arrays."""
    stream, memories = io.BytesIO(), list[memoryview]()

    def keep_apart(buffer: pickle.PickleBuffer) -> bool:
        memory = buffer.raw()
        if inline := memory.nbytes <= INLINE_BYTES:
            return inline
        memories.append(memory)
        return False

    _Pickler(stream, protocol=5, buffer_callback=keep_apart).dump(item)
    return [stream.getbuffer(), *memories]


class _Line:
    """A connection to another process, used by one thread at a time."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def send(self, message: Any, confirm: bool, timeout_s: float) -> str:
        """Returns what the other end says about it: nothing, if all is well or if no confirmation is asked for."""
        pieces = pack(message)
        sizes = [memory.nbytes for memory in pieces[1:]]
        head = struct.pack(f"<?I{len(sizes)}Q", confirm, len(sizes), *sizes)
        with self._lock:
            self._connection.send_bytes(head + bytes(pieces[0]))
            for memory in pieces[1:]:
                self._connection.send_bytes(memory)
            if not confirm:
                return ""
            if not self._connection.poll(timeout_s):
                raise TimeoutError(f"no confirmation within {timeout_s:g} s")
            return self._connection.recv_bytes().decode()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.close()


class Exchange:
    """The channels that are taken from in this process, and its connections to the other processes of the run.

    Args:
        index: number of this process.
        ip: address of this machine at which it listens, on a port that the system chooses.
        key: secret of the run.

    After a death channels are opened again, as those of another `generation`: what belongs to an older one and
    arrives late is left out.
    """

    def __init__(self, index: int, ip: str, key: bytes) -> None:
        self.index, self._key = index, key
        self.generation = 0
        self._opening = threading.Lock()
        self._channels: dict[str, Channel] = {}
        self._addresses: dict[int, Address] = {}
        self._lines: dict[int, _Line] = {}
        self._lock = threading.Lock()
        self._connecting: dict[int, threading.Lock] = {}
        self._closed = False
        self._server = socket.create_server((ip, 0))
        self.address: Address = self._server.getsockname()[:2]
        threading.Thread(target=self._accept, name="exchange", daemon=True).start()

    def meet(self, addresses: Mapping[int, Address]) -> None:
        """Learn where the processes are; called again when one was replaced."""
        with self._lock:
            for index, line in list(self._lines.items()):
                if addresses.get(index) != self._addresses.get(index):
                    line.close()
                    del self._lines[index]
            self._addresses = dict(addresses)

    def channel(self, name: str) -> Channel:
        """This process's end of the channel."""
        with self._lock:
            return self._channels.setdefault(name, Channel(name))

    def close_channels(self, names: Iterable[str], generation: int, cause: BaseException) -> None:
        """Close these channels here, unless they have been opened again since `generation`."""
        with self._opening:
            if generation < self.generation:
                return
            for name in names:
                self.channel(name).close(cause)

    def reopen_channels(self, generation: int, kept: Mapping[str, bool]) -> None:
        """Make closed channels work again, by name and whether they keep what waits in them."""
        with self._opening:
            self.generation = generation
            for name, keep in kept.items():
                self.channel(name).reopen(keep=keep)

    def send(self, to: int, channel: str, key: Any, item: Any, *, confirm: bool) -> None:
        """Put `item` into the channel in process number `to`. With `confirm`, return when it is there.

        Without, it is lost when channels are opened again before it is there.

        Raises ProcessDied when that process cannot be reached, ChannelClosed when the channel is closed there.
        """
        try:
            problem = self._line(to).send((self.generation, channel, key, item), confirm, CHANNEL_TIMEOUT_S)
        except (OSError, EOFError, AuthenticationError) as error:
            reason = str(error) or type(error).__name__
            message = f"process {to}, at {self._addresses.get(to)}, cannot be reached: {reason}"
            raise ProcessDied(message, to) from error
        if problem:
            raise ChannelClosed(channel, WorkerDied(problem))

    def close(self) -> None:
        """Stop listening and hang up."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for callers
        self._server.close()
        for line in self._lines.values():
            line.close()

    def _line(self, to: int) -> _Line:
        with self._lock:
            if (line := self._lines.get(to)) is not None:
                return line
            address, connecting = self._addresses[to], self._connecting.setdefault(to, threading.Lock())
        with connecting:  # others need the lock of all meanwhile
            with self._lock:
                if (line := self._lines.get(to)) is not None:
                    return line
            called = socket.create_connection(address, CONNECT_TIMEOUT_S)
            connection = _connection(called, CONNECT_TIMEOUT_S)
            answer_challenge(connection, self._key)
            deliver_challenge(connection, self._key)
            _set_deadline(connection.fileno(), CHANNEL_TIMEOUT_S)
            line = _Line(connection)
            with self._lock:
                if self._addresses.get(to) == address:
                    self._lines[to] = line
            return line

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._server.accept()
                connection = _connection(caller, CONNECT_TIMEOUT_S)
            except OSError:  # too many open files, or a caller that has hung up already
                if self._closed:
                    return
                time.sleep(ACCEPT_PAUSE_S)
                continue
            threading.Thread(target=self._listen, args=[connection], name="line", daemon=True).start()

    def _listen(self, connection: Connection) -> None:
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            _set_deadline(connection.fileno(), None)  # it may be silent for as long as it likes
            while True:
                self._receive(connection)
        except (OSError, EOFError, AuthenticationError):
            connection.close()  # the other end hung up, or is none of ours

    def _receive(self, connection: Connection) -> None:
        message = memoryview(connection.recv_bytes())
        confirm, count = struct.unpack_from("<?I", message)
        sizes = struct.unpack_from(f"<{count}Q", message, 5)
        memories = [bytearray(size) for size in sizes]
        for memory in memories:
            connection.recv_bytes_into(memory)
        problem = ""
        try:
            generation, channel, key, item = pickle.loads(message[5 + 8 * count :], buffers=memories)
            with self._opening:  # not between what was there being cleared away and the channel being open
                if confirm or generation == self.generation:
                    self.channel(channel).put(item, key)
        except ChannelClosed as closed:
            problem = str(closed.cause)  # whoever sent it without waiting is told by the run
        except Exception as error:  # whatever unpickling raises, for instance for a class that is missing here
            problem = f"a message could not be read: {type(error).__name__}: {error}"
            for mine in list(self._channels.values()):
                mine.close(WorkerDied(problem))
        if confirm:
            connection.send_bytes(problem.encode())


def _connection(sock: socket.socket, deadline_s: float) -> Connection:
    """Of a connected socket; sending and receiving raise OSError after `deadline_s`."""
    sock.settimeout(None)
    # Small messages go at once instead of waiting to be joined with the next one.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection = Connection(sock.detach())
    _set_deadline(connection.fileno(), deadline_s)
    return connection


def _set_deadline(descriptor: int, seconds: float | None) -> None:
    """By the kernel: Connection itself knows none. None: wait for ever."""
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds or 0), 0))


_here: Exchange | None = None


def open_exchange(index: int, ip: str, key: bytes) -> Exchange:
    """Make this process take part in a run."""
    global _here
    _here = Exchange(index, ip, key)
    return _here


def this_exchange() -> Exchange:
    """That of this process. Raises RuntimeError where `open_exchange` was not called."""
    if _here is None:
        raise RuntimeError("this process takes part in no run")
    return _here


class RoutedChannel(Channel):
    """A channel that knows in which process each key is taken out. May be pickled: it is then the same channel there.

    Args:
        name: the same in all processes.
        owners: key → number of the process that takes it out.
        confirm: whether `put` returns only when the item has arrived, so that whoever is told that it was put may
            count on it.
    """

    def __init__(self, name: str, owners: Mapping[Any, int], *, confirm: bool = False) -> None:
        super().__init__(name)
        self.owners, self.confirm = dict(owners), confirm

    def __reduce__(self) -> Any:
        return _routed, (self.name, self.owners, self.confirm)

    def put(self, item: Any, key: Any = 0) -> None:
        """Append `item` to the queue of `key`, wherever that is. Raises ChannelClosed, WorkerDied."""
        here, owner = this_exchange(), self.owners[key]
        if owner == here.index:
            here.channel(self.name).put(item, key)
            return
        here.channel(self.name).require_open()
        here.send(owner, self.name, key, item, confirm=self.confirm)

    def get(self, key: Any = 0, timeout_s: float = CHANNEL_TIMEOUT_S) -> Any:
        """As `Channel.get`; only in the process that owns the key."""
        return self._mine(key).get(key, timeout_s)

    def drain(self, key: Any = 0) -> list[Any]:
        """As `Channel.drain`; only in the process that owns the key."""
        return self._mine(key).drain(key)

    def close(self, cause: BaseException) -> None:
        """As `Channel.close`, in this process."""
        this_exchange().channel(self.name).close(cause)

    def _mine(self, key: Any) -> Channel:
        here = this_exchange()
        if self.owners[key] != here.index:
            raise RuntimeError(f"channel '{self.name}' is taken from in process {self.owners[key]}, not {here.index}")
        return here.channel(self.name)


def _routed(name: str, owners: dict[Any, int], confirm: bool) -> RoutedChannel:
    return RoutedChannel(name, owners, confirm=confirm)
