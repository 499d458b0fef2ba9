import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import Future

import pytest

from rlinf.core.errors import WorkerDied
from rlinf.runtime.local import Channel, ChannelClosed, Flag, Group, Handle, Weights, wait_for_one


class Worker:
    def __init__(self, rank, channel=None):
        self.rank, self.channel, self.calls = rank, channel, []
        self.thread = threading.get_ident()

    def note(self, value):
        assert threading.get_ident() == self.thread, "called from a thread that did not build it"
        time.sleep(0.01)
        self.calls.append(value)
        return (self.rank, list(self.calls))

    def receive(self):
        return self.channel.get(key=self.rank, timeout_s=20)

    def fail_or_wait(self, failing):
        if self.rank == failing:
            raise ZeroDivisionError("here")
        return self.channel.get(key=self.rank, timeout_s=20)

    def hang(self, released):
        released.wait(20)

    def one(self, argument):
        return argument + self.rank


def group(number, channel=None, stop=None):
    builders = [lambda r=r: Worker(r, channel) for r in range(number)]
    return Group("worker", builders, channels=[channel] if channel else [], stop=stop)


def test_calls_to_a_replica_run_in_order_in_the_thread_that_built_it():
    workers = group(3)
    handles = [workers.run(Worker.note, i) for i in range(5)]
    assert handles[-1].wait(10) == [(rank, [0, 1, 2, 3, 4]) for rank in range(3)]
    assert handles[0].wait(10) is not None, "may be asked again"
    assert handles[0].seconds >= 0.01


def test_run_each_gives_every_replica_its_own_argument():
    assert group(2).run_each(Worker.one, [10, 20]).wait(10) == [10, 21]
    with pytest.raises(ValueError, match="worker has 2 replicas but got 1 arguments"):
        group(2).run_each(Worker.one, [10])


def test_the_first_failure_reaches_the_caller_at_once_and_wakes_the_others():
    channel = Channel("words")
    workers = group(3, channel)
    began = time.monotonic()
    handle = workers.run(Worker.fail_or_wait, 1)
    with pytest.raises(ZeroDivisionError, match="here") as caught:
        handle.wait(20)
    assert "fail_or_wait" in "".join(traceback.format_tb(caught.tb))
    assert len(handle.failures(5)) == 3, "the two that waited have been woken"
    assert time.monotonic() - began < 2


def test_a_call_that_only_lost_its_channel_reports_who_closed_it():
    channel = Channel("words")
    receiver, culprit = group(1, channel), group(1, channel)
    waiting = receiver.run(Worker.receive)
    culprit.run(Worker.fail_or_wait, 0)
    with pytest.raises(ZeroDivisionError, match="here"):
        waiting.wait(20)


def test_a_watched_call_fails_the_wait():
    channel, released = Channel("words"), threading.Event()
    busy, culprit = group(1), group(1, channel)
    handle = busy.run(Worker.hang, released)
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        handle.wait(20, watching=[culprit.run(Worker.fail_or_wait, 0)])
    assert time.monotonic() - began < 2
    released.set()


@pytest.mark.parametrize("wait", ["for all", "for one"])
@pytest.mark.parametrize("late_s", [0.0, 0.3])
@pytest.mark.parametrize("closed", [False, True])
def test_whoever_only_missed_another_is_not_the_cause(wait, late_s, closed):
    """A rank of a learner is left by another that has failed, and may say so first."""
    ranks = [Future() for _ in range(3)]
    handle = Handle("update", [(Silent(f"learner[{i}]"), future) for i, future in enumerate(ranks)], None)
    missed = WorkerDied("rank 0 of 3 waited in vain for the other ranks (connection closed by peer)")
    ranks[0].set_exception(ChannelClosed("experience", missed) if closed else missed)
    fail = threading.Timer(late_s, ranks[1].set_exception, [ZeroDivisionError("in rank 1")])
    fail.start()
    fail.join() if not late_s else None
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="in rank 1"):
        handle.wait(20) if wait == "for all" else wait_for_one([handle])
    assert time.monotonic() - began < 1, "nobody waits longer than it takes to know the cause"


def test_who_missed_another_that_says_nothing_is_what_is_known(monkeypatch):
    monkeypatch.setattr("rlinf.runtime.local.GRACE_S", 0.1)
    gone, silent = Future(), Future()
    gone.set_exception(WorkerDied("waited in vain"))
    handle = Handle("update", [(Silent("a"), gone), (Silent("b"), silent)], None)
    with pytest.raises(WorkerDied, match="waited in vain"):
        wait_for_one([handle])


class Silent:
    def __init__(self, name):
        self.name = name

    def whereabouts(self):
        return self.name


def test_a_watched_call_that_succeeds_is_not_waited_for_and_does_not_end_the_wait():
    released = threading.Event()
    watched = group(1).run(Worker.hang, released)
    assert group(1).run(Worker.one, 1).wait(10, watching=[watched]) == [1]
    released.set()


def test_building_fails_with_the_builders_own_error():
    def broken():
        raise FileNotFoundError("robot.urdf")

    with pytest.raises(FileNotFoundError, match=r"robot\.urdf"):
        Group("env", [lambda: Worker(0), broken])


def test_a_hanging_replica_is_named_with_the_line_that_it_hangs_at():
    released = threading.Event()
    with pytest.raises(WorkerDied, match=r"worker\.hang: no answer within 0\.3 s from worker\[0\] \(at .*\.py:\d+"):
        group(1).run(Worker.hang, released).wait(0.3)
    released.set()


def test_a_stop_cuts_waiting_short_unless_there_is_no_hurry(monkeypatch):
    monkeypatch.setattr("rlinf.runtime.local.STOP_TIMEOUT_S", 0.2)
    stop, released = Flag(), threading.Event()
    handle = group(1, stop=stop).run(Worker.hang, released)
    stop.set("SIGTERM")
    stop.set("later reasons do not count")
    assert stop.reason == "SIGTERM"
    with pytest.raises(WorkerDied, match=r"within 0\.2 s"):
        handle.wait(20)
    threading.Timer(0.6, released.set).start()
    assert handle.wait(20, hurry=False) == [None]


def test_channel_is_a_fifo_per_key():
    channel = Channel("words")
    for i in range(3):
        channel.put(i, key="a")
        channel.put(10 + i, key=("b", 1))
    assert [channel.get("a", 1), channel.get(("b", 1), 1)] == [0, 10]
    assert channel.drain("a") == [1, 2]
    assert channel.drain("a") == []
    assert channel.drain(("b", 1)) == [11, 12]


def test_channel_does_not_wait_for_ever_and_names_what_is_missing():
    with pytest.raises(WorkerDied, match=r"channel 'words' for \(3, 1\) within 0\.05 s"):
        Channel("words").get(key=(3, 1), timeout_s=0.05)


def test_closed_channel_refuses_but_can_be_drained():
    channel = Channel("words")
    channel.put("kept")
    cause = OSError("cable")
    channel.close(cause)
    channel.close(ValueError("second"))
    with pytest.raises(ChannelClosed, match="cable") as caught:
        channel.get(timeout_s=1)
    assert caught.value.cause is cause
    with pytest.raises(ChannelClosed):
        channel.put("more")
    assert channel.drain() == ["kept"]


def test_a_producer_and_a_consumer_thread_lose_nothing():
    channel, number = Channel("words"), 2000
    threading.Thread(target=lambda: [channel.put(i) for i in range(number)], daemon=True).start()
    assert [channel.get(timeout_s=10) for _ in range(number)] == list(range(number))


def test_weights_give_the_newest_or_nothing():
    weights = Weights()
    assert weights.newer_than(-1) is None
    weights.publish(3, {"a": 1})
    weights.publish(5, {"a": 2})
    assert weights.newer_than(3) == (5, {"a": 2})
    assert weights.newer_than(5) is None


LEAVING = """
import time, torch
from rlinf.runtime.local import Group, leave
class Worker:
    def hang(self):
        x = torch.ones(99, 99, requires_grad=True)
        while True:
            (x @ x).sum().backward()
workers = Group("worker", [Worker])
workers.run(Worker.hang)
time.sleep(0.2)
print("the last words")
leave(3)
"""


def test_leaving_ends_the_process_although_a_replica_hangs_in_foreign_code():
    ended = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "the last words\n", "")
