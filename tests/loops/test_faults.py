"""Whatever fails ends the run within seconds, with its own traceback, and without losing what was learned."""

import threading
import time
import traceback

import pytest
import torch

from rlinf.core.errors import CheckpointError, NonFiniteError, WorkerDied
from rlinf.runners.checkpoint import CheckpointStore, find, load_policy, load_run, verify
from rlinf.runners.schedule import Schedule
from rlinf.runners.synchronous import run_sync
from tests.fakes import (
    CountingActor,
    CountingAlgorithm,
    CountingEnv,
    ReachEnv,
    RecordingReporter,
    TinyActor,
    TinyAlgorithm,
    build_crew,
    failing_at,
    slow,
)


class SimulatorError(Exception):
    pass


def run_until_failure(tmp_path, envs, actor, algorithm, error, **schedule):
    crew, reporter = build_crew(envs, [actor], algorithm), RecordingReporter()
    settings = {"num_steps": 50, "chunks": 4, "updates": 2} | schedule
    began = time.monotonic()
    with pytest.raises(error) as caught:
        run_sync(crew, Schedule(**settings), CheckpointStore(tmp_path), reporter)
    assert time.monotonic() - began < 5
    return reporter, "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failing_env_ends_the_run_and_the_learner_is_saved(tmp_path, overlap):
    broken = CountingEnv(2, before_step=failing_at(10, SimulatorError("joint 3 exploded")))
    healthy = CountingEnv(2, 2)
    algorithm = CountingAlgorithm()
    reporter, trace = run_until_failure(
        tmp_path, [[healthy], [broken]], CountingActor(), algorithm, SimulatorError, overlap=overlap
    )
    assert "joint 3 exploded" in trace
    assert "before_step" in trace, "the traceback leads into the environment"
    assert healthy.closed == broken.closed == 1
    manifest = verify(find(tmp_path))
    # The segment that fails is collected ahead, while step 2 learns, and may fail before or after that is over.
    assert manifest.global_step in ({2, 3} if overlap else {3})
    assert manifest.progress.updates == algorithm.updates
    assert f"Go on with: runner.resume_dir={find(tmp_path)}" in reporter.notes[0]


def test_a_run_goes_on_from_the_checkpoint_of_a_failure(tmp_path):
    env = ReachEnv(2)
    before_step, inner = failing_at(6, SimulatorError()), env.step
    env.step = lambda action: (before_step(), inner(action))[1]
    schedule, store = Schedule(num_steps=3, chunks=4), CheckpointStore(tmp_path)
    crew = build_crew([[env]], [TinyActor()], TinyAlgorithm())
    with pytest.raises(SimulatorError):
        run_sync(crew, schedule, store, RecordingReporter())
    again = build_crew([[ReachEnv(2)]], [TinyActor()], TinyAlgorithm())
    assert load_run(again, tmp_path) == 2
    assert again.progress().env_steps == 4 * 2 * 2
    run_sync(again, schedule, store, RecordingReporter(), last_step=2)
    assert find(tmp_path).name == "global_step_3"


def test_a_failure_before_anything_was_learned_leaves_no_checkpoint(tmp_path):
    broken = CountingEnv(2, before_step=failing_at(1, SimulatorError("no license")))
    reporter, _ = run_until_failure(tmp_path / "run", [[broken]], CountingActor(), CountingAlgorithm(), SimulatorError)
    assert reporter.notes == ["the run failed in step 1. There is no checkpoint yet"]
    assert not (tmp_path / "run").exists()


def test_a_failing_actor_ends_the_run(tmp_path):
    actor = CountingActor(before_act=failing_at(11, FloatingPointError("in the actor")))
    reporter, trace = run_until_failure(
        tmp_path, [[CountingEnv(2)], [CountingEnv(2, 2)]], actor, CountingAlgorithm(), FloatingPointError
    )
    assert "before_act" in trace
    assert "runner.resume_dir=" in reporter.notes[0]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failing_algorithm_ends_the_run_though_the_env_still_plays(tmp_path, overlap):
    algorithm = CountingAlgorithm(before_update=failing_at(5, ArithmeticError("in the update")))
    _, trace = run_until_failure(
        tmp_path, [[CountingEnv(2, before_step=slow(0.05))]], CountingActor(), algorithm, ArithmeticError,
        overlap=overlap,
    )  # fmt: skip
    assert "before_update" in trace
    assert verify(find(tmp_path)).progress.updates == 4


def test_a_nan_loss_keeps_the_last_good_checkpoint(tmp_path):
    algorithm = TinyAlgorithm()
    inner = algorithm.update

    def poisoned():
        metrics = inner()
        if algorithm.updates == 5:
            with torch.no_grad():
                algorithm.actor.layer.weight.fill_(torch.nan)
        return metrics

    algorithm.update = poisoned
    reporter, trace = run_until_failure(
        tmp_path, [[ReachEnv(2)]], TinyActor(), algorithm, NonFiniteError, save_interval=1
    )
    assert "train/tiny/loss is nan at update 6" in trace
    assert find(tmp_path).name == "global_step_2"
    assert all(torch.isfinite(weight).all() for weight in load_policy(tmp_path)[1].values())
    assert "'actor/layer.weight' of the learner is not finite" in reporter.notes[0]
    assert f"Go on with: runner.resume_dir={find(tmp_path)}" in reporter.notes[0]


def test_a_failure_after_the_checkpoint_of_a_step_does_not_write_it_again(tmp_path):
    crew, reporter = build_crew([[CountingEnv(2)]], [CountingActor()], CountingAlgorithm()), RecordingReporter()
    reporter.log = lambda step, metrics: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run_sync(crew, Schedule(num_steps=1, chunks=2), CheckpointStore(tmp_path), reporter)
    assert reporter.notes == [f"the run failed in step 1. Go on with: runner.resume_dir={find(tmp_path)}"]


def test_a_run_that_is_done_says_so(tmp_path):
    env, reporter = CountingEnv(2), RecordingReporter()
    crew = build_crew([[env]], [CountingActor()], CountingAlgorithm())
    assert run_sync(crew, Schedule(num_steps=3, chunks=2), CheckpointStore(tmp_path), reporter, last_step=3) == 3
    assert reporter.notes == ["nothing to do: step 3 of 3 is done; raise runner.max_epochs"]
    assert env.closed == 1


def test_an_env_that_hangs_is_named_and_does_not_keep_the_learner_from_being_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("rlinf.runtime.local.STOP_TIMEOUT_S", 0.3)
    monkeypatch.setattr("rlinf.runners.crew.STOP_TIMEOUT_S", 0.3)
    released = threading.Event()
    calls = iter(range(100))
    env = CountingEnv(2, before_step=lambda: released.wait(30) if next(calls) == 9 else None)
    crew, reporter = build_crew([[env]], [CountingActor()], CountingAlgorithm(), timeout_s=0.5), RecordingReporter()
    with pytest.raises(WorkerDied, match=r"nothing arrived on channel 'obs' for \(0, 0\) within 0\.5 s"):
        run_sync(crew, Schedule(num_steps=50, chunks=4), CheckpointStore(tmp_path), reporter)
    assert verify(find(tmp_path)).global_step == 3
    assert any("env.close: no answer within" in note for note in reporter.notes)
    released.set()


def test_a_checkpoint_that_cannot_be_written_does_not_end_training(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rlinf.runners.checkpoint._sync_tree", failing_at_save(2, OSError(28, "No space left on device"))
    )
    crew, reporter = build_crew([[CountingEnv(2)]], [CountingActor()], CountingAlgorithm()), RecordingReporter()
    last = run_sync(crew, Schedule(num_steps=3, chunks=2, save_interval=1), CheckpointStore(tmp_path), reporter)
    assert last == 3
    [note] = reporter.notes
    assert "no checkpoint was written for step 2" in note
    assert "No space left on device" in note
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_1", "global_step_3", "latest"]


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rlinf.runners.checkpoint._sync_tree", failing_at_save(1, OSError(28, "No space left on device"))
    )
    crew = build_crew([[CountingEnv(2)]], [CountingActor()], CountingAlgorithm())
    with pytest.raises(CheckpointError, match="No space left on device"):
        run_sync(crew, Schedule(num_steps=1, chunks=2), CheckpointStore(tmp_path), RecordingReporter())


def failing_at_save(number, error):
    hook = failing_at(number, error)
    return lambda directory: hook()
