"""What runs do when a process dies, with processes that die in name only: a fake runtime opens their channels again."""

import itertools
import time

import pytest

from rlinf.core.errors import ProcessDied
from rlinf.runners import run as runner
from rlinf.runners.asynchronous import run_async
from rlinf.runners.checkpoint import CheckpointStore, find, verify
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
    slow,
)


class Reviving:
    """A runtime that can be told that a process has died, and replaces it by doing nothing."""

    def __init__(self):
        self.groups, self.down, self.replaced = [], [], 0

    def channels(self):
        return dict.fromkeys(channel for group in self.groups for channel in group._channels)

    def dies(self):
        self.down = [9]
        return ProcessDied("process 9 is gone", 9)

    def dead(self):
        return self.down

    def describe(self, host):
        return f"number {host}"

    def interrupt(self, cause):
        for channel in self.channels():
            channel.close(cause)

    def replace(self, hosts):
        assert hosts == self.down == [9]
        busy = [replica.name for group in self.groups for replica in group._replicas if replica.busy]
        assert set(busy) <= {"learner[0]"}, f"{busy} play on beside those that are new"
        for channel in self.channels():
            channel.reopen(keep=channel.name == "experience")
        self.down, self.replaced = [], self.replaced + 1


def dying_at(call, runtime, pause_s=0.0):
    """A hook by which a process dies at the `call`-th call, once; others have `pause_s` to get ahead of it."""
    calls = itertools.count(1)

    def hook():
        if next(calls) == call:
            time.sleep(pause_s)
            raise runtime.dies()

    return hook


def crew_on(runtime, envs, algorithm):
    crew = build_crew(envs, [CountingActor() for _ in envs], algorithm)
    crew.runtime, crew.max_restarts = runtime, 2
    runtime.groups += [crew.env, crew.rollout]
    return crew


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("call", [2, 5])
def test_a_step_learns_from_one_collection_though_part_of_another_had_arrived(tmp_path, overlap, call):
    runtime, algorithm = Reviving(), CountingAlgorithm()
    envs = [[CountingEnv(2)], [CountingEnv(2, 2, before_step=dying_at(call, runtime, pause_s=0.2))]]
    crew = crew_on(runtime, envs, algorithm)
    steps = []
    reporter = RecordingReporter()
    reporter.log = lambda step, metrics: steps.append((len(algorithm.seen), metrics["time/env_steps"]))
    run_sync(crew, Schedule(num_steps=4, chunks=3, overlap=overlap), CheckpointStore(tmp_path), reporter)
    assert runtime.replaced == 1
    # The process that went on had played its part of the interrupted collection, and shipped it.
    assert steps == [(2 * step, 2 * step * 3 * 2 * H) for step in range(1, 5)]


def test_what_was_collected_before_an_evaluation_is_not_collected_again_when_that_is_interrupted(tmp_path):
    runtime, algorithm = Reviving(), CountingAlgorithm()
    crew, reporter = crew_on(runtime, [[CountingEnv(2)]], algorithm), RecordingReporter()
    dying = CountingEnv(1, before_step=dying_at(2, runtime, pause_s=0.1))
    evaluator = build_evaluator([[dying]], CountingActor(), crew.weights, episodes_per_env=1, chunks=4, seed=0)
    runtime.groups += [evaluator.env, evaluator.rollout]
    schedule = Schedule(num_steps=4, chunks=3, overlap=True, eval_interval=2)
    run_sync(crew, schedule, CheckpointStore(tmp_path), reporter, evaluator=evaluator)
    assert runtime.replaced == 1
    assert [step for step, metrics in reporter.logged.items() if "eval/num_episodes" in metrics] == [2, 4]
    assert len(algorithm.seen) == 4
    assert verify(find(tmp_path)).progress.env_steps == 4 * 3 * 2 * H


def test_a_death_while_saving_interrupts_the_evaluation_that_goes_on_meanwhile(tmp_path, monkeypatch):
    runtime, save_run, saved = Reviving(), runner.save_run, []
    crew, reporter = crew_on(runtime, [[CountingEnv(2)]], CountingAlgorithm(slow(0.005))), RecordingReporter()
    # It has nothing to do with who dies, and would take a minute: nobody waits for its end.
    endless = CountingEnv(1, before_step=lambda: time.sleep(0 if runtime.replaced else 0.05))
    evaluator = build_evaluator([[endless]], CountingActor(), Weights(), episodes_per_env=400, chunks=4, seed=0)
    runtime.groups += [evaluator.env, evaluator.rollout]

    def save(store, crew, step, **settings):
        if not runtime.replaced:
            raise runtime.dies()
        saved.append(step)
        return save_run(store, crew, step, **settings)

    monkeypatch.setattr(runner, "save_run", save)
    began = time.monotonic()
    schedule = Schedule(num_steps=6, chunks=2, eval_interval=2, save_interval=3)
    assert run_async(crew, schedule, CheckpointStore(tmp_path), reporter, evaluator=evaluator) == 6
    assert time.monotonic() - began < 15
    assert saved == [3, 6]
    assert "the evaluation of step 2 was interrupted by that" in reporter.notes
    assert [note for note in reporter.notes if "Restarts left: 1" in note]
    assert reporter.logged[6]["eval/num_episodes"] == 400


def test_a_death_beyond_max_restarts_ends_the_run_at_once(tmp_path):
    runtime = Reviving()
    crew = crew_on(runtime, [[CountingEnv(2, before_step=dying_at(9, runtime))]], CountingAlgorithm())
    crew.max_restarts = 0
    with pytest.raises(ProcessDied, match="process 9 is gone"):
        run_sync(crew, Schedule(num_steps=9, chunks=2), CheckpointStore(tmp_path), RecordingReporter())
    assert runtime.replaced == 0
    assert verify(find(tmp_path)).progress.updates == 4
