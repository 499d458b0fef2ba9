"""Asynchronous training: nobody waits for anybody, and still nothing is lost, doubled or mixed."""

import threading
import time

import pytest
import torch

from rlinf.core.errors import WorkerDied
from rlinf.runners.asynchronous import run_async
from rlinf.runners.checkpoint import CheckpointStore, find, load_run, verify
from rlinf.runners.schedule import Schedule
from rlinf.runtime.local import Weights
from tests.fakes import (
    CountingActor,
    CountingAlgorithm,
    CountingEnv,
    H,
    ReachEnv,
    RecordingReporter,
    TinyActor,
    TinyAlgorithm,
    build_crew,
    build_evaluator,
    failing_at,
    slow,
)


def run(tmp_path, envs, algorithm=None, actor=None, evaluator=None, **schedule):
    algorithm, reporter = algorithm or CountingAlgorithm(), RecordingReporter()
    crew = build_crew(envs, [actor or CountingActor()], algorithm)
    store = CheckpointStore(tmp_path / "checkpoints")
    last = run_async(crew, Schedule(**schedule), store, reporter, evaluator=evaluator)
    assert last == schedule["num_steps"]
    return algorithm, reporter


@pytest.mark.parametrize(("workers", "stages"), [(1, 1), (1, 2), (2, 1)])
def test_every_observation_meets_its_action_once(tmp_path, workers, stages):
    envs = [[CountingEnv(2, 2 * (w * stages + s)) for s in range(stages)] for w in range(workers)]
    algorithm, reporter = run(
        tmp_path, envs, CountingAlgorithm(slow(0.003)), num_steps=6, chunks=3, updates=4, save_interval=2
    )
    # CountingEnv and CountingAlgorithm have compared every single one; after a checkpoint episodes begin anew.
    assert algorithm.updates == 24
    played = {(w, s): [t for t in algorithm.seen if t.source == (w, s)] for w in range(workers) for s in range(stages)}
    counts = {len(segments) for segments in played.values()}
    assert len(counts) == 1 and counts.pop() >= 4, "all sources play alike, and at least two between checkpoints"
    steps = [metrics["time/env_steps"] for metrics in reporter.logged.values()]
    assert steps == sorted(steps)
    manifest = verify(find(tmp_path))
    assert manifest.global_step == 6
    assert manifest.progress.env_steps == sum(len(t) for t in played.values()) * 3 * 2 * H
    assert all(env.closed == 1 for stage in envs for env in stage)


def test_the_learner_does_not_wait_for_a_slow_env(tmp_path):
    envs = [[CountingEnv(2, before_step=slow(0.02))]]
    algorithm, reporter = run(tmp_path, envs, num_steps=200, chunks=4, updates=2)
    assert algorithm.updates == 400
    assert len(algorithm.seen) < 20
    assert "env/episode_len" not in reporter.logged[2], "no episode had ended yet"


def test_the_env_does_not_wait_for_a_slow_learner(tmp_path):
    algorithm, reporter = run(
        tmp_path, [[CountingEnv(2)]], CountingAlgorithm(slow(0.05)), num_steps=3, chunks=4, updates=4
    )
    assert len(algorithm.seen) > 10
    stale = [metrics["train/staleness/max"] for step, metrics in reporter.logged.items() if step > 1]
    assert 4 <= max(stale) <= 8, "what came in during a step was played by weights from before it, or one step older"


def test_all_episodes_are_reported_once(tmp_path):
    algorithm, reporter = run(
        tmp_path, [[CountingEnv(3)]], CountingAlgorithm(slow(0.005)), num_steps=10, chunks=5, updates=2
    )
    ended = sum(int(t.truncated.sum()) for t in algorithm.seen)
    reported = sum(metrics.get("env/num_episodes", 0) for metrics in reporter.logged.values())  # perhaps none
    assert reported == ended > 0


@pytest.mark.parametrize("limit", [0.05, 0.5])
def test_the_learner_waits_rather_than_sample_too_much(tmp_path, limit):
    _, reporter = run(tmp_path, [[CountingEnv(2)]], num_steps=20, chunks=2, updates=3, max_updates_per_env_step=limit)
    for metrics in reporter.logged.values():
        assert metrics["time/updates"] <= limit * metrics["time/env_steps"]
    assert reporter.logged[20]["time/updates"] == 60


def test_nothing_is_learned_before_the_algorithm_is_ready(tmp_path):
    algorithm = CountingAlgorithm()
    algorithm.ready = lambda: len(algorithm.seen) >= 3
    _, reporter = run(tmp_path, [[CountingEnv(2, before_step=slow(0.01))]], algorithm, num_steps=2, chunks=1, updates=2)
    assert reporter.logged[1]["time/updates"] == 2
    assert reporter.logged[1]["time/env_steps"] >= 3 * 2 * H


def test_weights_are_published_every_few_steps(tmp_path):
    versions = set()
    actor = CountingActor()
    actor.before_act = lambda: versions.add(int(actor.updates))
    run(
        tmp_path, [[CountingEnv(2)]], CountingAlgorithm(slow(0.01)), actor,
        num_steps=9, chunks=1, updates=2, sync_interval=3,
    )  # fmt: skip
    assert versions == {0, 6, 12}


def test_an_evaluation_keeps_its_weights_while_training_goes_on(tmp_path):
    acted = []
    actor = CountingActor()
    actor.before_act = lambda: acted.append(int(actor.updates))
    evaluator = build_evaluator(
        [[CountingEnv(3, before_step=slow(0.02))]], actor, Weights(), episodes_per_env=1, chunks=4, seed=0
    )
    algorithm, reporter = run(
        tmp_path, [[CountingEnv(2)]], CountingAlgorithm(slow(0.02)), evaluator=evaluator,
        num_steps=30, chunks=3, updates=2, eval_interval=12,
    )  # fmt: skip
    assert algorithm.updates == 60
    assert acted == [24] * 4 + [48] * 4 + [60] * 4, "three evaluations of four chunks, each by one version"
    evaluated = {step: m for step, m in reporter.logged.items() if "eval/weights_version" in m}
    assert [m["eval/weights_version"] for m in evaluated.values()] == [24, 48, 60]
    first, second, last = evaluated
    assert first > 12 and second > 24 and last == 30, "it was reported when it had ended, some steps later"
    assert all(m["eval/num_episodes"] == 3 for m in evaluated.values())


def test_an_evaluation_that_is_due_during_another_is_left_out_and_said(tmp_path):
    evaluator = build_evaluator(
        [[CountingEnv(1, before_step=slow(0.2))]], CountingActor(), Weights(), episodes_per_env=1, chunks=4, seed=0
    )
    _, reporter = run(
        tmp_path, [[CountingEnv(2)]], CountingAlgorithm(slow(0.01)), evaluator=evaluator,
        num_steps=3, chunks=3, updates=1, eval_interval=1,
    )  # fmt: skip
    assert reporter.notes == [
        "step 2 is not evaluated: the evaluation of step 1 is still under way; raise runner.val_check_interval or "
        "lower env.eval.rollout_epoch"
    ]
    assert reporter.logged[3]["eval/weights_version"] == 3


def test_the_evaluator_may_not_share_the_weights_of_training(tmp_path):
    crew = build_crew([[CountingEnv(1)]], [CountingActor()], CountingAlgorithm())
    evaluator = build_evaluator([[CountingEnv(1)]], CountingActor(), crew.weights, episodes_per_env=1, chunks=4, seed=0)
    with pytest.raises(ValueError, match="Weights of its own"):
        run_async(crew, Schedule(1, 1), CheckpointStore(tmp_path), RecordingReporter(), evaluator=evaluator)
    crew.close()
    evaluator.close()


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("who", ["env", "policy", "learner", "evaluation"])
def test_whoever_fails_ends_the_run_and_the_learner_is_saved(tmp_path, who):
    hook = {who: failing_at(9, BrokenError(who))}
    env = CountingEnv(2, before_step=hook.get("env", lambda: None))
    algorithm = CountingAlgorithm(hook.get("learner", slow(0.01)))
    crew = build_crew([[env]], [CountingActor(hook.get("policy", lambda: None))], algorithm)
    evaluator = build_evaluator(
        [[CountingEnv(1, before_step=hook.get("evaluation", lambda: None))]], CountingActor(), Weights(),
        episodes_per_env=9, chunks=4, seed=0,
    )  # fmt: skip
    reporter, began = RecordingReporter(), time.monotonic()
    schedule = Schedule(num_steps=1000, chunks=4, updates=2, eval_interval=2)
    with pytest.raises(BrokenError, match=who):
        run_async(crew, schedule, CheckpointStore(tmp_path), reporter, evaluator=evaluator)
    assert time.monotonic() - began < 5
    assert env.closed == 1
    assert verify(find(tmp_path)).progress.updates == algorithm.updates
    assert "runner.resume_dir=" in reporter.notes[-1]


def test_an_env_that_hangs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("rlinf.runtime.local.STOP_TIMEOUT_S", 0.3)
    monkeypatch.setattr("rlinf.runners.crew.STOP_TIMEOUT_S", 0.3)
    released, calls = threading.Event(), iter(range(10**6))
    env = CountingEnv(2, before_step=lambda: released.wait(30) if next(calls) == 9 else None)
    algorithm = CountingAlgorithm(slow(0.01))
    crew = build_crew([[env]], [CountingActor()], algorithm, timeout_s=0.5)
    with pytest.raises(WorkerDied, match=r"nothing arrived on channel 'obs' for \(0, 0\) within 0\.5 s"):
        run_async(crew, Schedule(num_steps=10**6, chunks=4), CheckpointStore(tmp_path), RecordingReporter())
    released.set()
    assert verify(find(tmp_path)).progress.updates > 0


def test_a_stop_keeps_what_was_learned_and_played(tmp_path):
    algorithm, reporter = CountingAlgorithm(slow(0.005)), RecordingReporter()
    crew = build_crew([[CountingEnv(2)]], [CountingActor()], algorithm)
    threading.Timer(0.3, crew.stop.set, ["SIGTERM"]).start()
    last = run_async(crew, Schedule(num_steps=10**6, chunks=3, updates=3), CheckpointStore(tmp_path), reporter)
    manifest = verify(find(tmp_path))
    assert manifest.global_step == last
    assert manifest.progress.updates == algorithm.updates > 0
    assert manifest.progress.env_steps == sum(int(t.valid.sum()) * H for t in algorithm.seen)
    assert reporter.notes[0].startswith(f"stopped by SIGTERM in step {last}; nothing is lost")


def test_a_run_goes_on_from_a_checkpoint(tmp_path):
    schedule = dict(chunks=4, updates=3)
    first = TinyAlgorithm()
    crew = build_crew([[ReachEnv(2)]], [TinyActor()], first)
    run_async(crew, Schedule(num_steps=5, **schedule), CheckpointStore(tmp_path), RecordingReporter())
    second = TinyAlgorithm(seed=1)
    again = build_crew([[ReachEnv(2)]], [TinyActor()], second)
    assert load_run(again, tmp_path) == 5
    assert torch.equal(second.actor.layer.weight, first.actor.layer.weight)
    reporter = RecordingReporter()
    run_async(again, Schedule(num_steps=8, **schedule), CheckpointStore(tmp_path), reporter, last_step=5)
    assert list(reporter.logged) == [6, 7, 8]
    assert reporter.logged[8]["time/updates"] == 24
