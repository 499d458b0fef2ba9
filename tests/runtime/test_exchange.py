"""Channels of one generation and messages of another."""

import time

import pytest

from rlinf.core.errors import WorkerDied
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


def test_a_message_for_a_closed_channel_is_told_to_who_waits_for_its_arrival(two):
    sender, receiver = two
    receiver.close_channels(["deeds"], 0, WorkerDied("gone"))
    with pytest.raises(ChannelClosed, match="gone"):
        sender.send(1, "deeds", 0, 1, confirm=True)
    began = time.monotonic()
    sender.send(1, "deeds", 0, 1, confirm=False)
    assert time.monotonic() - began < 5
