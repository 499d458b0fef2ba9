import time
from types import SimpleNamespace

import pytest

from rlinf.runners.schedule import Schedule
from rlinf.runtime.local import Weights
from tests.fakes import (
    CountingActor,
    CountingAlgorithm,
    CountingEnv,
    RecordingReporter,
    build_crew,
    build_evaluator,
    slow,
)


@pytest.mark.parametrize(
    ("film_every", "expected"), [(1, [2, 4, 6, 7]), (2, [4, 7]), (0, [7])], ids=["each", "second", "last"]
)
def test_which_evaluations_are_filmed(film_every, expected):
    schedule = Schedule(num_steps=7, chunks=1, eval_interval=2, film_every=film_every)
    evaluated = [step for step in range(1, 8) if schedule.evaluates(step)]
    assert evaluated == [2, 4, 6, 7]
    assert [step for step in evaluated if schedule.films(step)] == expected


def test_an_evaluation_without_a_film_records_nothing():
    evaluator = build_evaluator(
        [[CountingEnv(3)]], CountingActor(), Weights(), episodes_per_env=1, chunks=10, seed=0, num_recorded=2
    )
    reporter = RecordingReporter()
    evaluator.run(reporter, 1, film=False)
    assert reporter.videos == {}
    evaluator.run(reporter, 2)
    assert list(reporter.videos) == ["eval_step_000002"]


def make_a_second_three_hours(monkeypatch):
    """For whoever waits for a call from now on."""
    fast = SimpleNamespace(monotonic=lambda: 10_800 * time.monotonic(), perf_counter=time.perf_counter)
    monkeypatch.setattr("rlinf.runtime.local.time", fast)


def test_an_evaluation_may_take_hours(monkeypatch):
    env = CountingEnv(1, before_step=slow(0.3))
    evaluator = build_evaluator([[env]], CountingActor(), Weights(), episodes_per_env=1, chunks=4, seed=0)
    evaluating = evaluator.start(1)
    make_a_second_three_hours(monkeypatch)
    assert evaluating.finish(RecordingReporter())["eval/num_episodes"] == 1
    assert evaluator.close() == []


def test_a_collection_may_take_hours(monkeypatch):
    crew = build_crew([[CountingEnv(1, before_step=slow(0.3))]], [CountingActor()], CountingAlgorithm())
    crew.publish()
    played = crew.collect(chunks=2, segments=1)
    make_a_second_three_hours(monkeypatch)
    assert played.wait()["num_episodes"] == 1
    assert crew.close() == []
