"""Which (task, trial) an episode of LIBERO plays; no simulator here."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rlinf.core.errors import ConfigError
from rlinf.core.types import EnvSpaces
from rlinf.envs.episodes import EpisodeRules, EpisodicEnv, Outcome
from rlinf.envs.libero.config import LiberoConfig
from rlinf.envs.libero.reset_ids import Trials, TrialStarts, share, shuffled, starts_of, with_remainder

FIFTY = Trials((50,) * 10)

suites = st.lists(st.integers(1, 7), min_size=1, max_size=6).map(lambda counts: Trials(tuple(counts)))
seeds = st.integers(0, 2**31 - 1)


def config(**keys):
    return LiberoConfig(**({"total_num_envs": 4} | keys))


# ---- numbers


def test_reset_ids_number_the_trials_of_the_first_task_first():
    assert FIFTY.total == 500
    assert [FIFTY.locate(i) for i in (0, 49, 50, 499)] == [(0, 0), (0, 49), (1, 0), (9, 49)]


@given(suites)
def test_every_trial_has_one_reset_id(trials):
    found = [trials.locate(i) for i in range(trials.total)]
    assert found == [(task, trial) for task, count in enumerate(trials.counts) for trial in range(count)]
    assert [trials.reset_id(*pair) for pair in found] == list(range(trials.total))


@given(seeds, st.integers(1, 5000), st.data())
def test_a_seed_takes_up_a_reset_id_and_keeps_the_rest(seed, modulus, data):
    remainder = data.draw(st.integers(0, modulus - 1))
    moved = with_remainder(seed, remainder, modulus)
    assert moved % modulus == remainder
    assert 0 <= moved < 2**31 + modulus
    assert abs(moved - seed) < modulus


@given(st.integers(1, 700), st.data())
def test_shares_hold_everything_once_and_differ_by_one_at_most(total, data):
    rows = data.draw(st.integers(1, total))
    shares = [share(row, rows, total) for row in range(rows)]
    assert [i for own in shares for i in own] == list(range(total))
    sizes = {len(own) for own in shares}
    assert max(sizes) - min(sizes) <= 1


# ---- what a configuration asks for


def played(starts, episodes, root=3):
    """Reset ids of every episode, [episodes][rows]."""
    total = starts.trials.total
    return [[starts.seed(root, row, e) % total for row in range(starts.num_rows)] for e in range(episodes)]


@given(suites, st.data())
def test_an_evaluation_plays_every_trial_exactly_once(trials, data):
    rows = data.draw(st.integers(1, trials.total))
    starts = starts_of(config(total_num_envs=rows, is_eval=True), trials)
    ids = [starts.seed(7, row, e) % trials.total for row in range(rows) for e in range(starts.length(row))]
    assert sorted(ids) == list(range(trials.total))
    tasks = Counter(starts.task(starts.seed(7, row, e)) for row in range(rows) for e in range(starts.length(row)))
    assert tasks == Counter(dict(enumerate(trials.counts)))


def test_an_environment_seldom_changes_its_task_in_an_evaluation():
    starts = starts_of(config(total_num_envs=16, is_eval=True), FIFTY)
    for row in range(16):
        tasks = [starts.task(starts.seed(0, row, e)) for e in range(starts.length(row))]
        assert sum(a != b for a, b in pairwise(tasks)) <= 1


@given(suites, st.integers(1, 8), st.integers(0, 5))
def test_ordered_episodes_come_round_only_after_all_others(trials, rows, seed):
    starts = starts_of(config(total_num_envs=rows, use_ordered_reset_state_ids=True, seed=seed), trials)
    needed = -(-2 * trials.total // rows)
    flat = [i for episode in played(starts, needed) for i in episode][: 2 * trials.total]
    first, second = flat[: trials.total], flat[trials.total :]
    assert sorted(first) == list(range(trials.total))
    assert first == second


def test_the_order_follows_from_the_seed():
    assert shuffled(500, 1) == shuffled(500, 1) != shuffled(500, 2)


def test_a_specific_reset_id_goes_before_the_order():
    starts = starts_of(config(specific_reset_id=57, use_ordered_reset_state_ids=True), FIFTY)
    assert played(starts, 5) == [[57] * 4] * 5
    assert starts.task(starts.seed(0, 0, 0)) == 1
    assert len({starts.seed(0, row, e) for row in range(4) for e in range(5)}) == 20, "fixtures stand elsewhere"


@given(st.integers(0, 100))
def test_drawn_episodes_are_a_function_of_root_row_and_number(root):
    starts = starts_of(config(), FIFTY)
    assert played(starts, 3, root) == played(starts, 3, root) != played(starts, 3, root + 1)


def test_drawn_episodes_reach_every_task():
    starts = starts_of(config(total_num_envs=64), FIFTY)
    counts = Counter(FIFTY.locate(i)[0] for episode in played(starts, 50) for i in episode)
    assert set(counts) == set(range(10))
    assert min(counts.values()) > 0.7 * 320  # 320 expected, standard deviation 17


@pytest.mark.parametrize("keys", [{}, {"use_ordered_reset_state_ids": True}])
def test_groups_begin_alike(keys):
    starts = starts_of(config(total_num_envs=6, group_size=3, **keys), FIFTY)
    for episode in range(4):
        found = [starts.seed(1, row, episode) for row in range(6)]
        assert found[0] == found[1] == found[2] != found[3] == found[4] == found[5]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"specific_reset_id": 500}, "specific_reset_id is 500, but libero_spatial has the reset ids 0 to 499"),
        ({"total_num_envs": 501, "is_eval": True}, r"total_num_envs \(501\) is more than the 500 reset ids"),
    ],
)
def test_what_the_suite_has_not_is_named(keys, message):
    with pytest.raises(ConfigError, match=message):
        starts_of(config(**keys), FIFTY)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"is_eval": True, "auto_reset": False}, "write auto_reset: True"),
        ({"is_eval": True, "specific_reset_id": 0}, "remove specific_reset_id"),
        ({"is_eval": True, "group_size": 2}, "group_size: 1 and rollout_epoch: 1"),
        ({"is_eval": True, "rollout_epoch": 2}, "group_size: 1 and rollout_epoch: 1"),
        ({"use_standin_assets": True, "assets_dir": "x"}, "remove one of them"),
        ({"task_suite_name": "libero_100"}, "libero_spatial"),
    ],
)
def test_contradictions_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        config(**keys)


# ---- lists of starts in an environment


class Recorder:
    """A simulator that remembers what it was begun with; every episode is solved by its third action."""

    device = torch.device("cpu")

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.spaces = EnvSpaces({"state": (1,)}, {"state": "float32"}, 1, tasks=("a", "b", "c"))
        self.begun, self.age = [], torch.zeros(num_envs)

    def begin(self, rows, seeds):
        self.begun += [(row, seed) for row, seed in zip(rows, seeds, strict=True)]
        self.age[list(rows)] = 0

    def advance(self, action, active):
        self.age += active
        return Outcome(torch.ones(self.num_envs), self.age == 3, torch.zeros_like(active))

    def observe(self):
        return {"state": self.age[:, None].clone()}

    def render(self):
        return None

    def close(self):
        pass


def test_an_environment_plays_its_list_and_then_stands_still():
    trials = Trials((3, 2, 2))
    starts = TrialStarts(trials, 3, exhaustive=True)
    simulator = Recorder(3)
    env = EpisodicEnv(simulator, EpisodeRules(max_episode_steps=9), seed=0, starts=starts)
    for attempt in range(2):
        simulator.begun.clear()
        env.reset(5)
        done, goes_on, tasks = [], [], []
        for _ in range(12):
            step = env.step(torch.zeros(3, 1, 1))
            done += [row for row in range(3) if step.done[row]]
            goes_on += [row for row in range(3) if step.done[row] and step.info["goes_on"][row]]
            tasks += [int(step.info["task"][row]) for row in range(3) if step.done[row]]
        assert Counter(done) == {0: 2, 1: 2, 2: 3}
        assert Counter(goes_on) == {0: 1, 1: 1, 2: 2}
        assert Counter(tasks) == {0: 3, 1: 2, 2: 2}
        assert sorted(seed % 7 for _, seed in simulator.begun) == list(range(7)), f"attempt {attempt}"
        assert not step.done.any() and (step.reward == 0).all()


def test_without_lists_nothing_goes_on():
    env = EpisodicEnv(Recorder(2), EpisodeRules(max_episode_steps=9), seed=0)
    env.reset(5)
    steps = [env.step(torch.zeros(2, 1, 1)) for _ in range(7)]
    assert sum(int(step.done.sum()) for step in steps) == 4
    assert not any(step.info["goes_on"].any() for step in steps)
