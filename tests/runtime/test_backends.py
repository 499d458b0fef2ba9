"""What every runtime does alike: calls, channels, weights, flags and failures."""

import itertools
import os
import re
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import pytest
import torch

from rlinf.core.errors import ProcessDied, RlinfError, WorkerDied
from rlinf.core.types import ActionOut

NUMBERS = itertools.count()


class Worker:
    """Takes part in everything."""

    def __init__(self, rank, channel, weights, stop):
        self.rank, self.channel, self.weights, self.stop = rank, channel, weights, stop
        self.calls = []

    def note(self, value):
        time.sleep(0.005)
        self.calls.append(value)
        return self.rank, list(self.calls)

    def one(self, argument):
        return argument + self.rank

    def send(self, to, item):
        self.channel.put(item, key=to)

    def receive(self):
        return self.channel.get(key=self.rank, timeout_s=20)

    def wait_for_what_never_comes(self):
        return self.channel.get(key=self.rank, timeout_s=0.2)

    def drained(self):
        return self.channel.drain(key=self.rank)

    def echo(self, number):
        for _ in range(number):
            self.channel.put(self.channel.get(key=self.rank, timeout_s=20), key=1 - self.rank)

    def ask(self, number, item):
        for _ in range(number):
            self.channel.put(item, key=1 - self.rank)
            answer = self.channel.get(key=self.rank, timeout_s=20)
        return answer

    def write_into(self):
        item = self.receive()
        item.action.add_(1)
        return item.action.sum().item()

    def publish(self, version, value):
        state = {
            "a": torch.full((3, 2), value),
            "b": torch.full((2,), value).bfloat16(),
            "n": torch.tensor(7),
        }
        self.weights.publish(version, state)

    def newest(self, than):
        return self.weights.newer_than(than)

    def stopped(self):
        return self.stop.is_set(), self.stop.reason

    def fail(self, rank):
        if self.rank == rank:
            raise UnluckyError("in the middle", 13)
        return self.receive()

    def hang(self):
        time.sleep(20)


class UnluckyError(RlinfError):
    """An error that pickle cannot make again from its text."""

    def __init__(self, text, number):
        super().__init__(f"{text} of {number}")


class Team:
    """Two workers, in two processes where there are processes."""

    def __init__(self, runtime, confirm=False):
        self.runtime = runtime
        self.channel = runtime.channel(f"words {next(NUMBERS)}", {0: 0, 1: 1}, confirm=confirm)
        self.weights, self.stop = runtime.weights(f"w {next(NUMBERS)}", [1]), runtime.flag()
        builders = [partial(Worker, rank, self.channel, self.weights, self.stop) for rank in range(2)]
        self.group = runtime.group("worker", builders, [0, 1], channels=[self.channel], stop=self.stop)


@pytest.fixture
def team(runtime):
    """Each test has a team of its own, all on one runtime: processes take a while to start."""
    return Team(runtime)


def test_calls_run_on_all_in_order(team):
    handles = [team.group.run(Worker.note, i) for i in range(8)]
    assert handles[-1].wait(20) == [(rank, list(range(8))) for rank in range(2)]
    assert handles[0].wait(20) == [(0, [0]), (1, [0])]
    assert all(handle.done and handle.seconds > 0 for handle in handles)
    assert team.group.run_each(Worker.one, [10, 20]).wait(20) == [10, 21]
    assert len(team.group) == 2


def test_items_arrive_in_order_at_the_one_they_are_for(team):
    for i in range(5):
        team.group.run_each(lambda worker, item: worker.send(1 - worker.rank, item), [(i, "to 1"), (i, "to 0")])
    received = [team.group.run(Worker.receive).wait(20) for _ in range(5)]
    assert received == [[(i, "to 0"), (i, "to 1")] for i in range(5)]


@pytest.mark.parametrize("rows", [1, 50_000])
def test_records_arrive_as_they_were_sent(team, rows):
    sent = ActionOut(
        torch.randn(rows, 2, 3), torch.arange(rows * 2).view(2, rows).T, torch.randn(rows).bfloat16(), version=3
    )
    nothing = replace(sent, action=torch.zeros(0, 2, 3), log_prob=None)
    for item in (sent, nothing):
        team.group.run_each(lambda worker, item: worker.send(1, item) if item else None, [item, None]).wait(20)
        _, got = team.group.run_each(lambda worker, mine: worker.receive() if mine else None, [False, True]).wait(20)
        assert torch.equal(got.action, item.action) and torch.equal(got.decision, item.decision)
        assert got.version == 3 and got.action.dtype == torch.float32
        if item is sent:
            assert torch.equal(got.log_prob, sent.log_prob) and got.log_prob.dtype == torch.bfloat16


def test_what_was_confirmed_is_there(runtime):
    team = Team(runtime, confirm=True)
    for _ in range(20):
        team.group.run_each(lambda worker, n: [worker.send(1, i) for i in range(n)], [3, 0]).wait(20)
        assert team.group.run(Worker.drained).wait(20) == [[], [0, 1, 2]]


def test_weights_reach_readers_by_version_and_stay_as_published(team):
    assert team.group.run(Worker.newest, -1).wait(20)[1] is None
    team.group.run_each(lambda worker, mine: worker.publish(4, 1.5) if mine else None, [True, False]).wait(20)
    _, (version, state) = team.group.run(Worker.newest, 3).wait(20)
    assert version == team.weights.version == 4
    assert team.group.run(lambda worker: worker.weights.version).wait(20)[1] == 4
    assert torch.equal(state["a"], torch.full((3, 2), 1.5)) and state["b"].dtype == torch.bfloat16
    assert state["n"].shape == () and state["n"] == 7
    assert team.group.run(Worker.newest, 4).wait(20)[1] is None
    other = team.runtime.weights(f"other {next(NUMBERS)}", [1])
    assert other.version == -1
    assert other.take_over(team.weights) == 4 == other.version
    team.weights.publish(9, {"a": torch.ones(1)})
    assert team.group.run(Worker.newest, 4).wait(20)[1][0] == 9
    assert other.version == 4, "it keeps what it took over"


def test_a_flag_is_seen_by_all_with_its_first_reason(team):
    assert team.group.run(Worker.stopped).wait(20) == [(False, "")] * 2
    team.stop.set("because")
    team.stop.set("too late")
    until = time.monotonic() + 10
    while (seen := team.group.run(Worker.stopped).wait(20)) != [(True, "because")] * 2:
        assert time.monotonic() < until, seen


def test_a_failure_reaches_the_caller_with_its_traceback_and_wakes_who_waits_for_it(team):
    began = time.monotonic()
    handle = team.group.run(Worker.fail, 1)
    with pytest.raises(RlinfError, match="in the middle of 13") as caught:
        handle.wait(20)
    assert time.monotonic() - began < 5
    text = "".join([str(caught.getrepr()), *getattr(caught.value, "__notes__", [])])
    assert "raise UnluckyError" in text
    assert any("closed: in the middle of 13" in line for line in handle.failures(10)), handle.failures(10)


def test_what_does_not_come_is_missed(team):
    with pytest.raises(WorkerDied, match=r"nothing arrived on channel 'words \d+' for [01] within 0\.2 s"):
        team.group.run(Worker.wait_for_what_never_comes).wait(20)


def test_who_hangs_is_named_with_the_line(team):
    handle = team.group.run(Worker.hang)
    time.sleep(0.2)
    with pytest.raises(
        WorkerDied, match=r"worker.hang: no answer within 0\.1 s from worker\[0\] \(at .*test_backends.py"
    ):
        handle.wait(0.1)


def test_an_error_while_building_is_the_builders_own(runtime):
    def build():
        raise UnluckyError("building", 1)

    with pytest.raises(RlinfError, match="building of 1"):
        runtime.group("broken", [build], [0])


# ---- of processes alone


@pytest.fixture
def pair(on_ray):
    """A team in processes, which may be killed."""
    return Team(on_ray)


def test_a_process_has_its_own_environment(ray_machine):
    from rlinf.runtime.ray_backend import RayRuntime, Seat

    assert ray_machine.num_gpus == 4
    seats = [
        Seat(
            f"process {i}", ray_machine.node_id, "127.0.0.1", devices=devices,
            env_vars={"WHO": f"number {i}", "CUDA_VISIBLE_DEVICES": "4,5,6,7"},
        )
        for i, devices in enumerate([(2,), (1, 3)])
    ]  # fmt: skip
    runtime = RayRuntime(seats)
    group = runtime.group("worker", [dict, dict], [0, 1])
    assert group.run(lambda worker: os.environ["WHO"]).wait(20) == ["number 0", "number 1"]
    seen = group.run(lambda worker: os.environ["CUDA_VISIBLE_DEVICES"]).wait(20)
    assert seen == ["6", "5,7"], "the accelerators of the placement, of four that are not there"
    assert group.run(lambda worker: os.nice(0)).wait(20) == [os.nice(0)] * 2, "Ray's default is 15 more"
    assert group.run(lambda worker: os.environ["GLOO_SOCKET_IFNAME"]).wait(20) == ["lo", "lo"], "as its address"
    own, other = group.run(lambda worker: os.getpid()).wait(20)
    assert len({own, other, os.getpid()}) == 3
    runtime.close()


def test_what_arrived_may_be_written_into(pair):
    item = ActionOut(torch.zeros(20_000, 1, 1), torch.zeros(1, 1))
    pair.group.run_each(lambda worker, give: worker.send(1, item) if give else None, [True, False]).wait(20)
    assert pair.group.run_each(lambda worker, take: worker.write_into() if take else None, [False, True]).wait(20) == [
        None, 20_000.0
    ]  # fmt: skip


def test_a_killed_process_is_named_at_once(pair):
    pid, _ = pair.group.run(lambda worker: os.getpid()).wait(20)
    handle = pair.group.run(Worker.receive)
    time.sleep(0.2)
    os.kill(pid, 9)
    began = time.monotonic()
    said = rf"worker\[0\] is gone: the process 'process 0' \(process {pid} on .*\) ended"
    with pytest.raises(ProcessDied, match=said):
        handle.wait(20)
    assert time.monotonic() - began < 5
    assert len(handle.failures(10)) == 2, "who waited for it was woken"


def test_a_failure_of_before_a_recovery_that_becomes_known_after_it_closes_nothing(pair):
    runtime, group = pair.runtime, pair.group
    pid, _ = group.run(lambda worker: os.getpid()).wait(20)
    waiting, fail_later = group.run(Worker.receive), partial(group._note_failure, runtime.generation)
    os.kill(pid, 9)
    assert len(waiting.failures(20)) == 2
    runtime.replace([0])
    failed = Future()
    failed.set_exception(WorkerDied("an old failure"))
    fail_later(failed)
    runtime.close_channels([pair.channel.name], runtime.generation - 1, WorkerDied("another"))
    asked = [(Worker.ask, 20, "word"), (Worker.echo, 20)]
    assert group.run_each(lambda worker, job: job[0](worker, *job[1:]), asked).wait(20)[0] == "word"
    pair.channel.close(WorkerDied("a new failure"))
    with pytest.raises(WorkerDied, match="a new failure"):
        group.run(Worker.receive).wait(20)


@pytest.mark.parametrize("who", ["another", "the new one"])
def test_a_death_during_a_recovery_is_recovered_from_like_any_other(pair, monkeypatch, who):
    import ray

    runtime, group = pair.runtime, pair.group
    first, second = group.run(lambda worker: os.getpid()).wait(20)
    os.kill(first, 9)
    assert runtime.dead() == [0]
    introduce_all = runtime._introduce_all

    def kill_and_introduce():
        if who == "another":
            os.kill(second, 9)
        else:
            ray.kill(runtime.actor(0))
        introduce_all()

    with monkeypatch.context() as patched:
        patched.setattr(runtime, "_introduce_all", kill_and_introduce)
        with pytest.raises(ProcessDied):
            runtime.replace([0])
    died = runtime.dead()
    assert died == ([1] if who == "another" else [0])
    runtime.replace(died)
    assert runtime.dead() == []
    assert group.run_each(Worker.one, [10, 20]).wait(20) == [10, 21], "both have their workers again"
    asked = [(Worker.ask, 20, "word"), (Worker.echo, 20)]
    assert group.run_each(lambda worker, job: job[0](worker, *job[1:]), asked).wait(20)[0] == "word"


def test_who_looks_for_the_dead_does_not_prepare_the_living_again(ray_machine, tmp_path):
    from rlinf.runtime.ray_backend import RayRuntime, Seat

    runtime = RayRuntime([Seat("alone", ray_machine.node_id, "127.0.0.1")], partial(note_in, tmp_path / "prepared"))
    assert runtime.dead() == [] == runtime.dead()
    runtime.close()
    assert (tmp_path / "prepared").read_text() == "once "


def note_in(path):
    with path.open("a") as file:
        file.write("once ")


def test_an_interruption_wakes_who_waits_in_any_process(pair):
    waiting = pair.group.run(Worker.receive)
    time.sleep(0.2)
    pair.runtime.interrupt(ProcessDied("somebody else is gone", 7))
    with pytest.raises(ProcessDied, match="somebody else is gone"):
        waiting.wait(10)
    assert len(waiting.failures(10)) == 2
    pair.runtime.replace([])
    assert pair.group.run_each(Worker.one, [1, 1]).wait(20) == [1, 2]


def test_the_driver_says_where_weights_are_read(pair):
    with pytest.raises(RuntimeError, match=r"weights 'w \d+' are read in processes \[1\], not in the driver"):
        pair.weights.newer_than(-1)


def test_a_process_that_ray_ends_for_its_memory_is_a_process_that_died(pair):
    from ray.exceptions import OutOfMemoryError

    died = pair.group._remote[1]._died(OutOfMemoryError("Task was killed due to the node running low on memory."))
    assert isinstance(died, ProcessDied) and died.process == 1
    said = r"worker\[1\] is gone: the process 'process 1' .* was ended by Ray: memory is full there"
    assert re.search(said, str(died))


def test_strangers_are_not_listened_to(pair):
    import socket
    from multiprocessing.connection import Connection

    (host, port), _, _ = pair.runtime._introductions[1]
    assert host == "127.0.0.1"
    called = socket.create_connection((host, port), 5)
    called.settimeout(None)
    stranger = Connection(called.detach())
    assert stranger.recv_bytes().startswith(b"#CHALLENGE#")
    stranger.send_bytes(b"let me in")
    assert stranger.recv_bytes() == b"#FAILURE#"
    with pytest.raises((EOFError, ConnectionError)):
        stranger.recv_bytes()
    assert pair.group.run_each(Worker.one, [1, 1]).wait(20) == [1, 2], "the process goes on"


def test_messages_between_processes_are_quick(pair):
    state = {"state": torch.randn(16, 42)}
    jobs = [(Worker.ask, 300, state), (Worker.echo, 300)]
    echo = pair.group.run_each(lambda worker, job: job[0](worker, *job[1:]), jobs)
    began = time.perf_counter()
    echo.wait(60)
    # A generous bound that only an accidental wait (Nagle's 40 ms) breaks; figures are in benchmarks/.
    assert time.perf_counter() - began < 300 * 0.02
