"""Whole runs on every backend: the same results, nothing lost, doubled or mixed, and deaths survived."""

import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from rlinf.core.errors import ProcessDied
from rlinf.launch.crew import Layout
from rlinf.runners import run as runner
from rlinf.runners.asynchronous import run_async
from rlinf.runners.checkpoint import CheckpointStore, find, load_run, verify
from rlinf.runners.evaluate import Evaluator
from rlinf.runners.schedule import Schedule
from rlinf.runners.synchronous import run_sync
from rlinf.runtime.local import LocalRuntime
from tests.fakes import (
    CountingActor,
    CountingAlgorithm,
    CountingEnv,
    H,
    ReachEnv,
    RecordingReporter,
    TinyActor,
    TinyAlgorithm,
    build_crew_on,
    slow,
)

TOGETHER = Layout()
# Each role in a process of its own; and two environments, of which one shares a process with its policy.
APART = Layout((0,), (1,), (2,))
HYBRID = Layout((0, 1), (0, 2), (2,), {(0, 0): 0, (0, 1): 0, (1, 0): 1, (1, 1): 1})


def counting_envs(layout, stages=1):
    number = 2 * stages
    return [
        [partial(CountingEnv, 2, number * rank + 2 * stage) for stage in range(stages)]
        for rank in range(len(layout.env))
    ]


def run_and_look(run, crew, schedule, directory, reporter, look):
    """Run to the end. Returns what `look` sees in the learner's worker then."""
    looked, close = [], crew.close

    def look_and_close():
        looked.extend(crew.learner.run(look).wait())
        return close()

    crew.close = look_and_close
    assert run(crew, schedule, CheckpointStore(directory), reporter) == schedule.num_steps
    return looked[0]


def seen(worker):
    return worker.algorithm.seen


@pytest.mark.parametrize("layout", [TOGETHER, APART, HYBRID], ids=["together", "apart", "hybrid"])
@pytest.mark.parametrize("overlap", [False, True])
def test_every_observation_meets_its_action_once(runtime, tmp_path, layout, overlap):
    stages = 2 if layout is HYBRID else 1
    crew = build_crew_on(
        runtime, layout, counting_envs(layout, stages), CountingActor, CountingAlgorithm, name=str(tmp_path)
    )
    schedule = Schedule(num_steps=5, chunks=4, segments=2, updates=3, overlap=overlap)
    reporter = RecordingReporter()
    played = {}
    reporter.log = lambda step, metrics: played.update(steps=metrics["time/env_steps"], updates=metrics["time/updates"])
    trajectories = run_and_look(run_sync, crew, schedule, tmp_path, reporter, seen)
    # CountingEnv and CountingAlgorithm have compared every single one; here: all of them came.
    sources = len(layout.env) * stages
    assert played == {"steps": 5 * 2 * 4 * 2 * sources * H, "updates": 15}
    for rank in range(len(layout.env)):
        for stage in range(stages):
            counts = torch.cat([t.obs["state"][:-1, :, 1] for t in trajectories if t.source == (rank, stage)])
            assert torch.equal(counts, torch.arange(40.0)[:, None].expand(-1, 2))


def test_backends_give_the_same_run(tmp_path, on_ray):
    runs = {}
    for name, runtime in {"local": LocalRuntime(), "ray": on_ray}.items():
        envs = [[partial(ReachEnv, 3), partial(ReachEnv, 2)] for _ in HYBRID.env]
        crew = build_crew_on(runtime, HYBRID, envs, TinyActor, TinyAlgorithm, name=str(tmp_path))
        reporter = RecordingReporter()
        schedule = Schedule(num_steps=6, chunks=5, segments=2, updates=4, overlap=True, save_interval=4)
        version, weights = run_and_look(
            run_sync, crew, schedule, tmp_path / name, reporter, lambda worker: worker.algorithm.acting_weights()
        )
        metrics = {
            step: {tag: value for tag, value in logged.items() if not tag.startswith("time/")}
            for step, logged in reporter.logged.items()
        }
        runs[name] = version, weights, metrics
    assert runs["local"][2] == runs["ray"][2]
    assert runs["local"][0] == runs["ray"][0] == 24
    assert all(torch.equal(value, runs["ray"][1][key]) for key, value in runs["local"][1].items())


def test_asynchronous_runs_lose_nothing(runtime, tmp_path):
    algorithm = partial(CountingAlgorithm, slow(0.003))
    envs = counting_envs(HYBRID, 2)
    crew = build_crew_on(runtime, HYBRID, envs, CountingActor, algorithm, name=str(tmp_path))
    schedule = Schedule(num_steps=6, chunks=3, updates=4)
    trajectories = run_and_look(run_async, crew, schedule, tmp_path, RecordingReporter(), seen)
    counts = [sum(t.source == (rank, stage) for t in trajectories) for rank in range(2) for stage in range(2)]
    assert len(set(counts)) == 1 and counts[0] >= 1
    manifest = verify(find(tmp_path))
    assert manifest.progress.env_steps == len(trajectories) * 3 * 2 * H
    assert manifest.progress.updates == 24


@pytest.mark.parametrize("limit", [4, 9])
def test_weights_are_never_staler_than_allowed(runtime, tmp_path, limit):
    envs = [[partial(CountingEnv, 2, 0, slow(0.004))]]
    algorithm = partial(CountingAlgorithm, slow(0.001))
    crew = build_crew_on(runtime, APART, envs, CountingActor, algorithm, name=str(tmp_path))
    schedule = Schedule(num_steps=20, chunks=4, updates=4, sync_interval=3, max_staleness=limit)
    look = lambda worker: worker.algorithm.staleness  # noqa: E731
    stale = run_and_look(run_async, crew, schedule, tmp_path, RecordingReporter(), look)
    assert max(max(updates) for updates in stale) <= limit
    assert verify(find(tmp_path)).progress.updates == 80


# ---- deaths


def kill_when(crew, process, steps):
    """Kill a process once the learner has taken in so many environment steps."""
    pid = crew.runtime._introductions[process][1]

    def wait():
        while crew.progress().env_steps < steps:
            time.sleep(0.02)
        os.kill(pid, 9)

    threading.Thread(target=wait, daemon=True).start()


PAIRS = Layout((0, 1), (0, 1), (2,), {(0, 0): 0, (1, 0): 1})


def deadly_crew(runtime, name, max_restarts=2, layout=PAIRS):
    envs = [[partial(CountingEnv, 2, 2 * rank, slow(0.004))] for rank in range(len(layout.env))]
    crew = build_crew_on(runtime, layout, envs, CountingActor, ForgivingAlgorithm, name=str(name))
    crew.runtime, crew.max_restarts = runtime, max_restarts
    return crew


class ForgivingAlgorithm(CountingAlgorithm):
    """Allows a source to begin again, and nothing else."""

    def __init__(self):
        super().__init__(slow(0.002))

    def observe(self, trajectory):
        if not trajectory.continues:
            self.seen_before = getattr(self, "seen_before", []) + self.seen
            self.seen = [t for t in self.seen if t.source != trajectory.source]
        super().observe(trajectory)


@pytest.mark.parametrize(
    ("run", "overlap", "layout", "killed"),
    [
        (run_sync, True, PAIRS, 1),
        (run_async, False, PAIRS, 1),
        (run_sync, False, APART, 0),
        (run_sync, True, APART, 1),
    ],
)
def test_a_killed_process_of_env_and_rollout_is_replaced(on_ray, tmp_path, run, overlap, layout, killed):
    crew, reporter = deadly_crew(on_ray, tmp_path, layout=layout), RecordingReporter()
    kill_when(crew, killed, 300)
    schedule = Schedule(num_steps=60, chunks=4, updates=3, overlap=overlap, save_interval=7)
    assert run(crew, schedule, CheckpointStore(tmp_path), reporter) == 60
    assert verify(find(tmp_path)).progress.updates == 180
    [note] = [note for note in reporter.notes if "Restarts left: 1" in note]
    assert f"'process {killed}'" in note or f"process {killed}, at" in note


def test_a_death_at_a_checkpoint_interrupts_the_evaluation_and_nothing_else(on_ray, tmp_path, monkeypatch):
    crew, reporter = deadly_crew(on_ray, tmp_path), RecordingReporter()
    envs = [[partial(CountingEnv, 1, rank, slow(0.05))] for rank in range(2)]
    evaluated = build_crew_on(on_ray, PAIRS, envs, CountingActor, CountingAlgorithm, name=f"{tmp_path} eval")
    evaluator = Evaluator(evaluated.env, evaluated.rollout, evaluated.weights, episodes_per_env=20, chunks=4, seed=0)
    pid, save_run = on_ray._introductions[1][1], runner.save_run

    def kill_and_save(store, crew, step, **settings):
        if not crew.restarts:
            os.kill(pid, 9)
        return save_run(store, crew, step, **settings)

    monkeypatch.setattr(runner, "save_run", kill_and_save)
    schedule = Schedule(num_steps=6, chunks=4, updates=3, eval_interval=2, save_interval=3)
    assert run_async(crew, schedule, CheckpointStore(tmp_path), reporter, evaluator=evaluator) == 6
    assert "the evaluation of step 2 was interrupted by that" in reporter.notes
    assert any("Restarts left: 1" in note for note in reporter.notes)
    assert reporter.logged[6]["eval/num_episodes"] == 40
    assert verify(find(tmp_path)).progress.updates == 18


def test_too_many_deaths_end_the_run_and_the_learner_is_saved(on_ray, tmp_path):
    crew = deadly_crew(on_ray, tmp_path, max_restarts=0)
    kill_when(crew, 0, 200)
    with pytest.raises(ProcessDied, match="is gone: the process 'process 0'"):
        run_sync(crew, Schedule(num_steps=10**6, chunks=4), CheckpointStore(tmp_path), RecordingReporter())
    assert verify(find(tmp_path)).progress.updates > 0


def test_a_killed_learner_ends_the_run_with_the_checkpoint_to_go_on_from(on_ray, tmp_path):
    from tests.revival import all_alive

    crew, reporter = deadly_crew(on_ray, tmp_path), RecordingReporter()
    kill_when(crew, 2, 500)
    began = time.monotonic()
    with pytest.raises(ProcessDied, match=r"learner(\[0\])? is gone: the process 'process 2'"):
        run_sync(
            crew, Schedule(num_steps=10**6, chunks=4, updates=2, save_interval=5), CheckpointStore(tmp_path), reporter
        )
    assert time.monotonic() - began < 60
    manifest = verify(find(tmp_path))
    assert manifest.global_step % 5 == 0 and manifest.progress.env_steps <= 500 + 5 * 4 * 4 * H
    assert f"runner.resume_dir={find(tmp_path)}" in reporter.notes[-1]
    again = deadly_crew(all_alive(on_ray), tmp_path / "again")
    assert load_run(again, tmp_path) == manifest.global_step


def test_runs_end_cleanly_time_after_time(runtime, tmp_path):
    """Whole processes: benchmarks/clean_ends.py."""
    before = set(threading.enumerate())
    for number in range(20):
        crew = build_crew_on(
            runtime, APART, counting_envs(APART), CountingActor, CountingAlgorithm, name=f"{tmp_path} {number}"
        )
        run = run_async if number % 2 else run_sync
        store = CheckpointStore(tmp_path / str(number))
        began = time.monotonic()
        assert run(crew, Schedule(num_steps=2, chunks=2, overlap=True), store, RecordingReporter()) == 2
        assert time.monotonic() - began < 20
        assert find(tmp_path / str(number)).name == "global_step_2"
        assert runtime.dead() == []
    left = {thread for thread in threading.enumerate() if thread not in before and not thread.name.startswith("flag ")}
    for thread in left:
        thread.join(5)
    assert not any(thread.is_alive() for thread in left), left


def test_processes_end_with_their_runtime(ray_machine):
    from rlinf.runtime.ray_backend import RayRuntime, Seat

    runtime = RayRuntime([Seat(f"process {i}", ray_machine.node_id, "127.0.0.1") for i in range(2)])
    pids = [pid for _, pid, _ in runtime._introductions.values()]
    assert all(is_alive(pid) for pid in pids)
    runtime.close()
    until = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < until, pids
        time.sleep(0.02)


def is_alive(pid):
    """Whether the process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
