"""2k steps == k steps, a checkpoint, a new process' worth of objects, k steps: bit for bit."""

import copy

import numpy as np
import pytest
import torch

from rlinf.runners.checkpoint import CheckpointStore, load_policy, load_run
from rlinf.runners.schedule import Schedule
from rlinf.runners.synchronous import run_sync
from tests.fakes import (
    ReachEnv,
    RecordingReporter,
    ResumableReachEnv,
    TinyActor,
    TinyAlgorithm,
    build_crew,
)


def build(env, workers=2, stages=1):
    algorithm = TinyAlgorithm()
    envs = [[env(3) for _ in range(stages)] for _ in range(workers)]
    return build_crew(envs, [TinyActor()], algorithm), algorithm


def train(env, directory, num_steps, resume=None, **settings):
    crew, algorithm = build(env)
    last_step = load_run(crew, resume) if resume else 0
    reporter = RecordingReporter()
    schedule = Schedule(num_steps=num_steps, chunks=4, segments=2, updates=5, save_interval=3, **settings)
    run_sync(crew, schedule, CheckpointStore(directory), reporter, last_step=last_step)
    numbers = {
        step: {tag: value for tag, value in metrics.items() if not tag.startswith("time/")}
        for step, metrics in reporter.logged.items()
    }
    return algorithm, numbers, reporter


def assert_same_learner(one, other):
    assert torch.equal(one.generator.get_state(), other.generator.get_state())
    assert np.array_equal(one.buffer.states, other.buffer.states)
    assert one.buffer.generator.bit_generator.state == other.buffer.generator.bit_generator.state
    state, expected = one.state_dict(), other.state_dict()
    assert torch.equal(state["actor"]["layer.weight"], expected["actor"]["layer.weight"])
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(state["optimizer"]["state"][0][key], expected["optimizer"]["state"][0][key])


@pytest.mark.parametrize("env", [ReachEnv, ResumableReachEnv])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_resumed_run_is_the_run_that_never_ended(tmp_path, env, overlap):
    whole, expected, _ = train(env, tmp_path / "whole", 6, overlap=overlap)
    train(env, tmp_path / "first", 3, overlap=overlap)
    second, numbers, reporter = train(env, tmp_path / "second", 6, resume=tmp_path / "first", overlap=overlap)
    assert sorted(numbers) == [4, 5, 6]
    assert numbers == {step: expected[step] for step in (4, 5, 6)}
    assert reporter.logged[6]["time/updates"] == 30
    assert reporter.logged[6]["time/env_steps"] == 6 * 2 * 4 * 6 * 2
    assert_same_learner(second, whole)


def test_two_runs_with_the_same_seeds_are_equal_and_learn(tmp_path):
    one, numbers, _ = train(ReachEnv, tmp_path / "a", 30, overlap=True)
    other, same, _ = train(ReachEnv, tmp_path / "b", 30, overlap=True)
    assert numbers == same
    assert_same_learner(one, other)
    returns = [metrics["env/return"] for metrics in numbers.values() if "env/return" in metrics]
    assert np.mean(returns[-4:]) > np.mean(returns[:4]) + 2


def test_the_policy_in_a_checkpoint_is_the_one_that_was_learned(tmp_path):
    algorithm, _, _ = train(ReachEnv, tmp_path, 2)
    for path in (tmp_path, tmp_path / "latest", tmp_path / "latest" / "model.safetensors"):
        version, weights = load_policy(path)
        assert version == 10
        assert torch.equal(weights["layer.weight"], algorithm.actor.layer.weight)


def test_saving_does_not_depend_on_how_often_it_is_done_within_a_step(tmp_path):
    """What a checkpoint holds must not change while the run goes on."""
    crew, algorithm = build(ReachEnv)
    reporter = RecordingReporter()
    run_sync(crew, Schedule(num_steps=2, chunks=3, updates=2, save_interval=1), CheckpointStore(tmp_path), reporter)
    final = copy.deepcopy(algorithm.actor.layer.weight)
    _, first = load_policy(tmp_path / "global_step_1")
    _, second = load_policy(tmp_path / "global_step_2")
    assert not torch.equal(first["layer.weight"], final)
    assert torch.equal(second["layer.weight"], final)


def test_a_run_goes_on_with_another_number_of_environments(tmp_path, caplog):
    def crew_of(workers):
        algorithm = TinyAlgorithm()
        return build_crew([[ReachEnv(2)] for _ in range(workers)], [TinyActor()], algorithm), algorithm

    first, learned = crew_of(2)
    run_sync(first, Schedule(num_steps=2, chunks=3), CheckpointStore(tmp_path), RecordingReporter())
    again, algorithm = crew_of(1)
    assert load_run(again, tmp_path) == 2
    assert "was saved by a run with 2 env workers and this one has 1: they begin anew" in caplog.text
    assert algorithm.updates == learned.updates
    reporter = RecordingReporter()
    assert run_sync(again, Schedule(num_steps=3, chunks=3), CheckpointStore(tmp_path / "b"), reporter, last_step=2) == 3
