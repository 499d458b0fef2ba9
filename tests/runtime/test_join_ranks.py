"""Ranks that do not come are named in time. How ranks meet and talk is tested where they learn."""

import socket
import time
from datetime import timedelta

import pytest

from rlinf.core.errors import WorkerDied
from rlinf.runtime.ranks import _store, join_ranks


def test_ranks_that_do_not_come_are_named(tmp_path):
    started = time.monotonic()
    with pytest.raises(WorkerDied, match=r"rank 0 of 3 waited 0\.3 s at file://.*/meeting for rank 1, 2, which"):
        join_ranks(0, 3, f"file://{tmp_path}/meeting", join_timeout_s=0.3)
    assert time.monotonic() - started < 20


def test_an_address_where_rank_0_is_not_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(WorkerDied, match=rf"rank 1 of 2 could not reach {address} within 1 s .*is rank 0 running"):
            join_ranks(1, 2, address, join_timeout_s=1)


def test_ranks_meet_on_their_address_alone_and_say_when_they_cannot():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    store = _store(0, 2, f"127.0.0.1:{port}", timedelta(seconds=5))
    store.set("key", "value")
    assert _store(1, 2, f"127.0.0.1:{port}", timedelta(seconds=5)).get("key") == b"value"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), 5)
    said = rf"rank 0 of 2 cannot listen at 127\.0\.0\.1:{port} \(Address already in use .*\): start the run again"
    with pytest.raises(WorkerDied, match=said):
        join_ranks(0, 2, f"127.0.0.1:{port}", join_timeout_s=1)


def test_an_address_without_a_port_is_refused():
    with pytest.raises(ValueError, match="host:port or file:///path"):
        join_ranks(0, 2, "localhost")
