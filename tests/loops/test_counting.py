"""A counting env and agent through the whole runtime: nothing lost, doubled, mixed, or staler than promised."""

import pytest
import torch

from rlinf.runners.checkpoint import CheckpointStore
from rlinf.runners.schedule import Schedule
from rlinf.runners.synchronous import run_sync
from rlinf.runtime.local import Weights
from tests.fakes import (
    CountingActor,
    CountingAlgorithm,
    CountingEnv,
    H,
    RecordingReporter,
    build_crew,
    build_evaluator,
)


def run(tmp_path, envs, num_actors=1, evaluator=None, weights=None, **schedule):
    algorithm, reporter = CountingAlgorithm(), RecordingReporter()
    crew = build_crew(envs, [CountingActor() for _ in range(num_actors)], algorithm, weights=weights)
    store = CheckpointStore(tmp_path / "checkpoints")
    last = run_sync(crew, Schedule(**schedule), store, reporter, evaluator=evaluator)
    assert last == schedule["num_steps"]
    return algorithm, reporter


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("workers", "stages", "actors"), [(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 2, 2)])
def test_every_observation_meets_its_action_once(tmp_path, overlap, workers, stages, actors):
    width = 12 // (workers * stages)
    envs = [[CountingEnv(width, width * (w * stages + s)) for s in range(stages)] for w in range(workers)]
    algorithm, reporter = run(tmp_path, envs, actors, num_steps=5, chunks=4, segments=2, updates=3, overlap=overlap)
    # CountingEnv and CountingAlgorithm have compared every single one; here: all of them came, for every env.
    for w in range(workers):
        for s in range(stages):
            counts = [t.obs["state"][:-1, :, 1] for t in algorithm.seen if t.source == (w, s)]
            expected = torch.arange(5 * 2 * 4).float()[:, None].expand(-1, width)
            assert torch.equal(torch.cat(counts), expected)
    assert algorithm.updates == 15
    assert reporter.logged[5]["time/env_steps"] == 5 * 2 * 4 * 12 * H
    assert reporter.logged[5]["time/updates"] == 15
    assert all(env.closed == 1 for stage in envs for env in stage)


def test_workers_and_stages_do_not_change_the_episode_metrics(tmp_path):
    def metrics(name, envs):
        _, reporter = run(tmp_path / name, envs, num_steps=3, chunks=5)
        return [{k: v for k, v in logged.items() if k.startswith("env/")} for logged in reporter.logged.values()]

    whole = metrics("a", [[CountingEnv(6)]])
    assert whole == metrics("b", [[CountingEnv(3), CountingEnv(3, 3)]])
    for one, other in zip(whole, metrics("c", [[CountingEnv(2)], [CountingEnv(4, 2)]]), strict=True):
        assert one == pytest.approx(other)
    # Lengths 2, 3, 4, 2, 3, 4 chunks, 5 played: 2 + 1 + 1 + 2 + 1 + 1 episodes in the first step.
    assert whole[0]["env/num_episodes"] == 8
    assert whole[0]["env/episode_len"] == pytest.approx(H * (2 * 4 + 3 * 2 + 4 * 2) / 8)


@pytest.mark.parametrize("segments", [1, 2])
def test_staleness_without_overlap_is_zero(tmp_path, segments):
    algorithm, _ = run(tmp_path, [[CountingEnv(2)]], num_steps=4, chunks=3, updates=5, segments=segments)
    assert algorithm.staleness == [{0}] * 4 * segments


def test_staleness_with_overlap_is_one_step_of_updates(tmp_path):
    algorithm, _ = run(tmp_path, [[CountingEnv(2)]], num_steps=5, chunks=3, updates=5, overlap=True)
    assert algorithm.staleness == [{0}, {5}, {5}, {5}, {5}]


def test_overlap_starts_anew_after_a_checkpoint(tmp_path):
    algorithm, _ = run(tmp_path, [[CountingEnv(2)]], num_steps=6, chunks=3, updates=5, overlap=True, save_interval=3)
    assert algorithm.staleness == [{0}, {5}, {5}, {0}, {5}, {5}]


def test_evaluation_sees_the_newest_weights_and_leaves_the_collection_alone(tmp_path):
    weights, acted = Weights(), []
    actor = CountingActor(before_act=lambda: acted.append(int(actor.updates)))
    evaluator = build_evaluator([[CountingEnv(3)]], actor, weights, episodes_per_env=1, chunks=4, seed=0)
    algorithm, reporter = run(
        tmp_path, [[CountingEnv(2)]], evaluator=evaluator, weights=weights,
        num_steps=4, chunks=3, updates=5, eval_interval=2, overlap=True,
    )  # fmt: skip
    assert set(acted) == {10, 20}
    assert algorithm.staleness == [{0}, {5}, {5}, {5}]
    assert [step for step, metrics in reporter.logged.items() if "eval/num_episodes" in metrics] == [2, 4]


def test_no_updates_before_the_algorithm_is_ready(tmp_path):
    algorithm, reporter = CountingAlgorithm(), RecordingReporter()
    algorithm.ready = lambda: len(algorithm.seen) >= 3
    crew = build_crew([[CountingEnv(2)]], [CountingActor()], algorithm)
    run_sync(crew, Schedule(num_steps=4, chunks=1, updates=2), CheckpointStore(tmp_path), reporter)
    assert [reporter.logged[step]["time/updates"] for step in (1, 2, 3, 4)] == [0, 0, 2, 4]
    assert "train/fake/loss" not in reporter.logged[2]
    assert reporter.logged[4]["train/fake/loss"] == 3.5


def test_every_tag_that_people_watch_is_logged(tmp_path):
    _, reporter = run(tmp_path, [[CountingEnv(2)]], num_steps=1, chunks=4, updates=2)
    times = {"step", "generate_rollouts", "actor_training", "sync_weights", "checkpoint"}
    rates = {"env_steps_per_s", "updates_per_s", "env_steps", "updates"}
    assert {f"time/{name}" for name in times | rates} <= reporter.logged[1].keys()
    assert all(reporter.logged[1][f"time/{name}"] > 0 for name in times | rates)
