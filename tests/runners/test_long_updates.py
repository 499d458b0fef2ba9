"""Updates that take longer than a stop may take otherwise, and workers that take long to build."""

import threading

import pytest

from rlinf.core.errors import WorkerDied
from rlinf.launch.crew import build_crew as build_whole_crew
from rlinf.launch.parse import load_config
from rlinf.runners.checkpoint import CheckpointStore, find, verify
from rlinf.runners.run import Run
from rlinf.runners.schedule import Schedule
from rlinf.runners.synchronous import run_sync
from rlinf.runtime.local import LEARNER_STOP_TIMEOUT_S, STOP_TIMEOUT_S, Flag, Group, LocalRuntime
from rlinf.workers.learner_worker import LearnerWorker
from tests.fakes import CountingActor, CountingAlgorithm, CountingEnv, RecordingReporter, build_crew
from tests.launch.conftest import CONFIG_DIR


class Waiter:
    """Does nothing until it may."""

    def __init__(self, until=None):
        if until is not None:
            until.wait(20)

    def wait(self, until):
        until.wait(20)


@pytest.fixture
def released():
    event = threading.Event()
    yield event
    event.set()


def test_a_group_may_have_longer_after_a_stop_than_the_others(monkeypatch, released):
    monkeypatch.setattr("rlinf.runtime.local.STOP_TIMEOUT_S", 0.2)
    stop = Flag()
    patient = LocalRuntime().group("learner", [Waiter], [0], stop=stop, stop_timeout_s=5.0)
    hasty = LocalRuntime().group("env", [Waiter], [0], stop=stop)
    assert (patient.stop_timeout_s, hasty.stop_timeout_s) == (5.0, 0.2)
    calls = [group.run(Waiter.wait, released) for group in (patient, hasty)]
    stop.set("SIGTERM")
    with pytest.raises(WorkerDied, match=r"env\.wait: no answer within 0\.2 s"):
        calls[1].wait(20)
    released.set()
    assert calls[0].wait(20) == [None]
    limited = LocalRuntime().group("learner", [Waiter], [0], stop=stop, stop_timeout_s=0.1)
    with pytest.raises(WorkerDied, match=r"learner\.wait: no answer within 0\.1 s"):
        limited.run(Waiter.wait, threading.Event()).wait(20)


def test_the_learner_of_a_run_gets_its_time():
    crew = build_whole_crew(load_config("reach_sac_mlp", ["profile=cpu"], CONFIG_DIR), LocalRuntime())
    assert crew.learner.stop_timeout_s == LEARNER_STOP_TIMEOUT_S
    assert crew.env.stop_timeout_s == crew.rollout.stop_timeout_s == STOP_TIMEOUT_S
    assert crew.close() == []


class SlowAlgorithm(CountingAlgorithm):
    """Its updates say when they begin, and take 0.8 s."""

    def __init__(self):
        self.begun = threading.Event()
        super().__init__(self._take_long)

    def _take_long(self):
        self.begun.set()
        threading.Event().wait(0.8)


@pytest.fixture
def slow_crew(monkeypatch):
    monkeypatch.setattr("rlinf.runtime.local.STOP_TIMEOUT_S", 0.2)
    algorithm = SlowAlgorithm()
    crew = build_crew([[CountingEnv(2)]], [CountingActor()], algorithm)
    crew.learner._stop_timeout_s = 20.0
    return crew, algorithm


def test_an_update_under_way_is_waited_for_when_a_run_is_stopped(tmp_path, slow_crew):
    (crew, algorithm), reporter = slow_crew, RecordingReporter()
    threading.Thread(target=lambda: (algorithm.begun.wait(20), crew.stop.set("SIGTERM"))).start()
    run_sync(crew, Schedule(num_steps=50, chunks=4, updates=9), CheckpointStore(tmp_path), reporter)
    assert reporter.notes[0].startswith("stopped by SIGTERM in step 1; nothing is lost")
    assert verify(find(tmp_path)).progress.updates == algorithm.updates == 1


def test_an_update_under_way_is_waited_for_when_a_run_fails(tmp_path, slow_crew, monkeypatch):
    monkeypatch.setattr("rlinf.runners.run.GRACE_S", 0.1)
    (crew, algorithm), reporter = slow_crew, RecordingReporter()
    run = Run(crew, Schedule(num_steps=50, chunks=4), CheckpointStore(tmp_path), reporter, None)
    crew.collect(4, 1).wait()
    crew.ingest()
    crew.learner.run(LearnerWorker.update, 9)
    algorithm.begun.wait(20)
    run.rescue(1, RuntimeError("an environment broke"))
    assert reporter.notes[0] == "the run has failed; waiting up to 20 s for the update under way, to save it"
    assert verify(find(tmp_path)).progress.updates == algorithm.updates == 1
    crew.close()


def test_building_that_takes_long_says_who_is_still_being_built(monkeypatch, released):
    monkeypatch.setattr("rlinf.runtime.local.HEARTBEAT_S", 0.2)
    notes = []

    def note(text):
        notes.append(text)
        if len(notes) == 2:
            released.set()

    assert len(LocalRuntime(note).group("actor", [Waiter, lambda: Waiter(released)], [0, 0])) == 2
    assert len(notes) == 2
    assert notes[0].startswith("building actor: after 0 s still waiting for actor[1] (at ")
    assert "actor[0]" not in notes[0]


def test_building_has_an_end(monkeypatch, released):
    monkeypatch.setattr("rlinf.runtime.local.BUILD_TIMEOUT_S", 0.2)
    with pytest.raises(WorkerDied, match=r"building actor: no answer within 0\.2 s from actor\[0\]"):
        Group("actor", [lambda: Waiter(released)])
