"""Channels of one generation and messages of another."""

import contextlib
import errno
import socket
import threading
import time

import pytest

from rlinf.core.errors import ProcessDied, WorkerDied
from rlinf.runtime.exchange import Exchange
from rlinf.runtime.local import ChannelClosed


@pytest.fixture
def two():
    made = [Exchange(index, "127.0.0.1", b"secret") for index in range(2)]
    for exchange in made:
        exchange.meet({exchange.index: exchange.address for exchange in made})
    yield made
    for exchange in made:
        exchange.close()


def test_what_was_sent_before_channels_were_opened_again_does_not_arrive_after(two):
    sender, receiver = two
    receiver.reopen_channels(1, {"words": False, "deeds": True})
    sender.send(1, "words", 0, "of the past", confirm=False)
    sender.send(1, "deeds", 0, "of the past", confirm=True)
    sender.reopen_channels(1, {"words": False, "deeds": True})
    sender.send(1, "words", 0, "of today", confirm=False)
    assert receiver.channel("words").get(timeout_s=5) == "of today"
    assert receiver.channel("deeds").drain() == ["of the past"]


def test_only_what_is_meant_for_the_channels_of_now_closes_them(two):
    channel = two[0].channel("words")
    two[0].close_channels(["words"], 0, WorkerDied("first"))
    with pytest.raises(ChannelClosed, match="first"):
        channel.require_open()
    two[0].reopen_channels(3, {"words": True})
    for late in range(3):
        two[0].close_channels(["words"], late, WorkerDied("long ago"))
    channel.put("a")
    assert channel.get(timeout_s=1) == "a"
    two[0].close_channels(["words"], 3, WorkerDied("second"))
    with pytest.raises(ChannelClosed, match="second"):
        channel.put("b")


class Faulty:
    """A listening socket whose next `accept` fails."""

    def __init__(self, server, error):
        self.server, self.errors = server, [error]

    def accept(self):
        caller = self.server.accept()
        if self.errors:
            caller[0].close()
            raise self.errors.pop()
        return caller

    def __getattr__(self, name):
        return getattr(self.server, name)


def test_a_process_that_was_out_of_files_for_a_moment_listens_on(two):
    sender, receiver = two
    receiver._server = Faulty(receiver._server, OSError(errno.EMFILE, "Too many open files"))
    socket.create_connection(receiver.address, 5).close()  # served by the accept that was under way
    with contextlib.suppress(ProcessDied):
        sender.send(1, "words", 0, "lost", confirm=True)
    sender.send(1, "words", 0, "heard", confirm=True)
    assert receiver.channel("words").drain() == ["heard"]


def test_who_is_closed_listens_no_more():
    before = set(threading.enumerate())
    exchange = Exchange(0, "127.0.0.1", b"secret")
    [listening] = set(threading.enumerate()) - before
    exchange.close()
    listening.join(5)
    assert not listening.is_alive()


def test_a_message_for_a_closed_channel_is_told_to_who_waits_for_its_arrival(two):
    sender, receiver = two
    receiver.close_channels(["deeds"], 0, WorkerDied("gone"))
    with pytest.raises(ChannelClosed, match="gone"):
        sender.send(1, "deeds", 0, 1, confirm=True)
    began = time.monotonic()
    sender.send(1, "deeds", 0, 1, confirm=False)
    assert time.monotonic() - began < 5
