from dataclasses import replace

import numpy as np
import pytest
import torch

from rlinf.core.errors import NonFiniteError, RlinfError, RunEnding, ShapeError
from rlinf.runners.evaluate import task_table
from rlinf.runtime.local import Weights
from rlinf.workers.env_worker import EnvWorker, Resumable, merge_episode_means
from tests.fakes import (
    CountingActor,
    CountingAlgorithm,
    CountingEnv,
    H,
    ReachEnv,
    RecordingReporter,
    ResumableReachEnv,
    TinyActor,
    build_crew,
    build_evaluator,
    failing_at,
)


def crew_of(env, actor=None, **settings):
    return build_crew([[env]], [actor or CountingActor()], CountingAlgorithm(), **settings)


def play(crew, chunks, segments=1):
    episodes = crew.collect(chunks, segments).wait()
    crew.ingest()
    return episodes


def test_merged_means_weigh_every_episode_equally():
    parts = [{"num_episodes": 1.0, "return": 4.0}, {"num_episodes": 0.0}, {"num_episodes": 3.0, "return": 8.0}]
    assert merge_episode_means(parts) == {"num_episodes": 4.0, "return": 7.0}
    assert merge_episode_means([{"num_episodes": 0.0}]) == {"num_episodes": 0.0}


def test_merged_means_of_a_task_weigh_its_own_episodes():
    parts = [
        {"num_episodes": 3.0, "success_once": 1 / 3, "task_00/num_episodes": 1.0, "task_00/success_once": 1.0},
        {"num_episodes": 3.0, "success_once": 0.0, "task_00/num_episodes": 3.0, "task_00/success_once": 0.0},
    ]
    merged = merge_episode_means(parts)
    assert merged["success_once"] == pytest.approx(1 / 6)
    assert merged["task_00/success_once"] == pytest.approx(1 / 4)
    assert merged["task_00/num_episodes"] == 4


def test_without_automatic_reset_only_the_first_episode_of_a_segment_counts():
    env, algorithm = CountingEnv(3), CountingAlgorithm()
    algorithm.observe = algorithm.seen.append
    crew = build_crew([[env]], [CountingActor()], algorithm, auto_reset=False)
    episodes = play(crew, chunks=6, segments=2)
    assert episodes["num_episodes"] == 6
    assert episodes["episode_len"] == H * (2 + 3 + 4) / 3
    assert [t.continues for t in algorithm.seen] == [False, False]
    assert [t.valid.sum(0).tolist() for t in algorithm.seen] == [[2, 3, 4], [2, 3, 4]]
    assert crew.progress().env_steps == 2 * (2 + 3 + 4) * H
    assert len(env.seeds) == 2
    assert env.seeds[1] is None


@pytest.mark.parametrize("stage", [0, 1])
def test_a_wait_that_the_end_of_the_run_ends_leaves_what_was_played_and_no_answer_behind(stage):
    hooks = [lambda: None, lambda: None]
    hooks[stage] = failing_at(3, RunEnding("a robot was waited for"))
    envs = [CountingEnv(2, 2 * i, hooks[i]) for i in range(2)]
    algorithm = CountingAlgorithm()
    algorithm.observe = algorithm.seen.append
    crew = build_crew([envs], [CountingActor()], algorithm)
    play(crew, chunks=5)
    assert [len(part.reward) for part in algorithm.seen] == ([2, 2] if stage == 0 else [3, 2])
    assert play(crew, chunks=2)["num_episodes"] > 0  # these environments refuse the answer to another observation
    assert [part.continues for part in algorithm.seen] == [False] * 4
    assert [len(part.reward) for part in algorithm.seen[2:]] == [2, 2]


def test_an_evaluation_that_the_end_of_the_run_interrupts_tells_of_the_episodes_before():
    weights = Weights()
    envs = [[CountingEnv(1, before_step=failing_at(5, RunEnding("a robot was waited for"))), CountingEnv(1, 1)]]
    evaluator = build_evaluator(envs, CountingActor(), weights, episodes_per_env=3, chunks=4, seed=7)
    metrics = evaluator.run(RecordingReporter(), 5)
    assert metrics["eval/num_episodes"] == 2  # of three; the second was under way


@pytest.mark.parametrize("epochs", [1, 3])
def test_evaluation_plays_exactly_one_episode_per_environment_and_epoch(epochs):
    weights, reporter = Weights(), RecordingReporter()
    envs = [[CountingEnv(3), CountingEnv(2, 3)], [CountingEnv(4, 5)]]
    evaluator = build_evaluator(envs, CountingActor(), weights, episodes_per_env=epochs, chunks=4, seed=7)
    metrics = evaluator.run(reporter, 5)
    # Fast environments finish more than once meanwhile; every one counts the same.
    assert metrics["eval/num_episodes"] == 9 * epochs
    assert metrics["eval/env"] == pytest.approx(sum(range(9)) / 9)
    assert metrics["eval/episode_len"] == pytest.approx(H * (2 + 3 + 4) / 3)


def test_evaluations_start_from_the_same_states_unless_told_otherwise():
    def seeds(same):
        env = CountingEnv(2)
        evaluator = build_evaluator(
            [[env]], CountingActor(), Weights(), episodes_per_env=2, chunks=4, seed=7, same_episodes=same
        )
        for step in (1, 2):
            evaluator.run(RecordingReporter(), step)
        return env.seeds

    first, second, *again = seeds(same=True)
    assert first != second
    assert again == [first, second]
    assert len(set(seeds(same=False))) == 4


def test_recorded_frames_show_the_first_episode_and_hold_its_last_picture():
    reporter = RecordingReporter()
    evaluator = build_evaluator(
        [[CountingEnv(3)]], CountingActor(), Weights(), episodes_per_env=2, chunks=4, seed=0, num_recorded=2
    )
    evaluator.run(reporter, 12)
    frames = reporter.videos["eval_step_000012"]
    left, right = frames[:, 0, 0, 0], frames[:, 0, 2, 0]  # tiles of 2 x 2 pixels whose grey is the count
    assert left.tolist() == [0, 1, 1, 1]
    assert right.tolist() == [0, 1, 2, 2]


def test_environments_without_pictures_give_no_video():
    reporter = RecordingReporter()
    evaluator = build_evaluator(
        [[ReachEnv(2)]], TinyActor(), Weights(), episodes_per_env=1, chunks=7, seed=0, num_recorded=2
    )
    evaluator.run(reporter, 0)
    assert reporter.videos == {}


def test_an_episode_longer_than_the_evaluation_is_an_error():
    evaluator = build_evaluator([[CountingEnv(3)]], CountingActor(), Weights(), episodes_per_env=1, chunks=3, seed=0)
    with pytest.raises(RlinfError, match=r"1 episodes of env worker 0 did not end within 6 steps; raise env\.eval"):
        evaluator.run(RecordingReporter(), 0)


class ListEnv(CountingEnv):
    """A CountingEnv whose environment i has a list of 1 + i episodes, of the tasks 0, 1, 2, 0 ... in turn."""

    def __init__(self, num_envs, first=0):
        super().__init__(num_envs, first)
        self.spaces = replace(self.spaces, tasks=("push", "pull", "turn"))
        self.ended = torch.zeros(num_envs)

    def reset(self, seed=None):
        self.ended = torch.zeros(self.num_envs)
        return super().reset(seed)

    def step(self, action):
        step = super().step(action)
        number = self.ended.clone()
        self.ended += step.truncated
        info = {
            "task": (self.ids + number).long() % 3,
            "goes_on": self.ended < 1 + self.ids,
            "episode/success_once": (self.ids + number).long() % 2 == 0,
        }
        return replace(step, info=step.info | info)


def test_every_episode_of_a_list_counts_once_and_for_its_task():
    settings = {"episodes_per_env": 1, "chunks": 4, "seed": 7, "tasks": ListEnv(1).spaces.tasks}
    evaluator = build_evaluator([[ListEnv(2)], [ListEnv(3, first=2)]], CountingActor(), Weights(), **settings)
    reporter = RecordingReporter()
    metrics = evaluator.run(reporter, 5)
    # Environment i plays i + 0, ..., i + i: of 15 episodes, those with an even number are solved.
    numbers = [i + e for i in range(5) for e in range(1 + i)]
    assert metrics["eval/num_episodes"] == len(numbers) == 15
    assert metrics["eval/success_once"] == pytest.approx(sum(n % 2 == 0 for n in numbers) / 15)
    for task in range(3):
        own = [n for n in numbers if n % 3 == task]
        assert metrics[f"eval/task_{task:02d}/num_episodes"] == len(own)
        assert metrics[f"eval/task_{task:02d}/success_once"] == pytest.approx(sum(n % 2 == 0 for n in own) / len(own))
    solved = sum(n % 6 == 4 for n in numbers)
    played = sum(n % 3 == 1 for n in numbers)
    assert task_table(metrics, evaluator.tasks)[1] == f"task 01: {solved} of {played} solved: pull"
    assert len(task_table(metrics, evaluator.tasks)) == 3
    assert task_table({"eval/num_episodes": 3.0}, ()) == []


def test_a_list_may_take_longer_than_an_episode_but_its_episodes_may_not():
    evaluator = build_evaluator(
        [[ListEnv(4)]], CountingActor(), Weights(), episodes_per_env=1, chunks=3, seed=0, num_recorded=2
    )
    with pytest.raises(RlinfError, match=r"1 episodes of env worker 0 did not end within 6 steps"):
        evaluator.run(RecordingReporter(), 0)  # environment 2 takes four chunks for each
    evaluator = build_evaluator(
        [[ListEnv(4)]], CountingActor(), Weights(), episodes_per_env=1, chunks=4, seed=0, num_recorded=2
    )
    reporter = RecordingReporter()
    evaluator.run(reporter, 0)
    assert len(reporter.videos["eval_step_000000"]) == 4, "only first episodes are filmed"


class NaNActor(CountingActor):
    def act(self, obs, mode, noise=None):
        out = super().act(obs, mode, noise)
        return replace(out, action=torch.where(obs["state"][:, None, 1:] >= 2, torch.nan, out.action))


class NaNEnv(CountingEnv):
    def __init__(self, what):
        super().__init__(3)
        self.what = what

    def step(self, action):
        step = super().step(action)
        if self.what == "reward":
            step.reward[1, 0] = torch.nan
            return step
        return replace(step, last_obs={"state": step.obs["state"] / torch.tensor([[1.0], [1.0], [0.0]])})


@pytest.mark.parametrize(
    ("env", "actor", "message"),
    [
        (CountingEnv(2), NaNActor(), "action of environment 0 (env worker 0, stage 0) is not finite"),
        (NaNEnv("reward"), None, "reward of environment 1 (env worker 0, stage 0) is not finite: [nan, 0.0]"),
        (NaNEnv("obs"), None, "observation/state of environment 2 (env worker 0, stage 0) is not finite"),
    ],
)
def test_nan_is_caught_where_it_appears(env, actor, message):
    with pytest.raises(NonFiniteError) as caught:
        play(crew_of(env, actor), chunks=4)
    assert message in str(caught.value)


def test_a_policy_with_another_chunk_length_is_named():
    class Short(CountingActor):
        def act(self, obs, mode, noise=None):
            out = super().act(obs, mode, noise)
            return replace(out, action=out.action[:, :1])

    with pytest.raises(ShapeError, match=r"actions \(2, 1, 2\), but env worker 0 needs \[N=2, H=2, A\]"):
        play(crew_of(CountingEnv(2), Short()), chunks=1)


def test_a_checkpoint_begins_fresh_episodes_that_depend_on_the_step():
    env = CountingEnv(2)
    crew = crew_of(env)
    for step in (1, 2):
        play(crew, chunks=3)
        assert crew.env.run(EnvWorker.checkpoint, step).wait() == [{}]
    play(crew, chunks=1)
    resumed = CountingEnv(2)
    crew = crew_of(resumed)
    crew.env.run_each(EnvWorker.restore, [(2, {})]).wait()
    play(crew, chunks=1)
    assert len(set(env.seeds)) == 3
    assert resumed.seeds == env.seeds[2:]


def test_a_resumable_environment_continues_in_the_middle_of_an_episode():
    assert isinstance(ResumableReachEnv(1), Resumable)
    assert not isinstance(ReachEnv(1), Resumable)

    def rewards(crew, algorithm):
        play(crew, chunks=9)
        return np.concatenate([t.reward.numpy() for t in algorithm.seen])

    def crew_with(algorithm):
        algorithm.observe = algorithm.seen.append
        actor = TinyActor()
        actor.load_state_dict = lambda state: None
        return build_crew([[ResumableReachEnv(3)]], [actor], algorithm)

    first, second = CountingAlgorithm(), CountingAlgorithm()
    crew = crew_with(first)
    play(crew, chunks=4)
    [state] = crew.env.run(EnvWorker.checkpoint, 1).wait()
    noise = [r.clone() for r in [state["stages"][0]["generator"]]]
    crew_generator = crew.rollout.run(lambda worker: worker.checkpoint()).wait()
    first.seen.clear()
    expected = rewards(crew, first)
    state["stages"][0]["generator"] = noise[0]

    other = crew_with(second)
    other.env.run_each(EnvWorker.restore, [(1, state)]).wait()
    other.rollout.run_each(lambda worker, saved: worker.restore((1, saved)), crew_generator).wait()
    assert np.array_equal(rewards(other, second), expected)
    assert second.seen[0].truncated[2].all(), "the episode of 7 chunks began 4 chunks before"
