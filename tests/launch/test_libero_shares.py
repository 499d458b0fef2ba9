"""How an evaluation that plays every initial state once is shared by processes of any number."""

import pytest

from rlinf.envs.libero.reset_ids import Trials, starts_of
from rlinf.launch import crew
from rlinf.launch.config import share_problems
from rlinf.launch.machine import num_simulator_processes
from rlinf.launch.parse import load_config
from rlinf.launch.plan_check import check_plan
from rlinf.runtime.placement import Node, make_plan
from tests.launch.conftest import CONFIG_DIR

RECIPE = "libero_spatial_dsrl_openpi"


def load(*overrides: str):
    return load_config(RECIPE, ["profile=gpu", *overrides], CONFIG_DIR, has_gpu=lambda: True)


@pytest.fixture
def made(monkeypatch):
    """(number, first row) of the environments that were made, instead of environments."""
    calls = []
    monkeypatch.setattr(crew, "make_env", lambda env, *, num_envs, first_row, **_: calls.append((num_envs, first_row)))
    return calls


def test_the_recipe_fits_eight_gpus_and_plays_every_state_once(made):
    config = load()
    check_plan(config, make_plan(config.cluster.component_placement, [Node(0, num_accelerators=8)]))
    evaluation = config.env.eval
    for rank in range(8):
        crew._make_stages(config, evaluation, rank, 8, 0, 1, render=False, cores=1)
    assert sorted({number for number, _ in made}) == [62, 63]
    rows = [row for number, first in made for row in range(first, first + number)]
    assert rows == list(range(500))
    starts = starts_of(evaluation, Trials((50,) * 10))
    played = [starts.seed(0, row, episode) % 500 for row in rows for episode in range(starts.length(row))]
    assert sorted(played) == list(range(500))


def test_training_is_shared_as_before(made):
    config = load("rollout.pipeline_stage_num=2")
    for rank in range(4):
        crew._make_stages(config, config.env.train, rank, 4, 0, 2, render=False, cores=1)
    assert made == [(2, first) for first in range(0, 16, 2)]


@pytest.mark.parametrize(
    ("overrides", "processes", "lines"),
    [
        ([], 8, []),
        (["env.eval.num_workers=3"], 8, []),
        (
            ["env.eval.total_num_envs=5"],
            8,
            [
                "env.eval.total_num_envs (5) is fewer than the 8 processes of env; write 8 or more, at most as many as "
                "there are initial states"
            ],
        ),
        (
            ["env.eval.is_eval=False"],
            8,
            ["env.eval.total_num_envs (500) is not a multiple of the 8 processes of env; write 496 or 504"],
        ),
    ],
)
def test_only_a_list_of_states_may_be_shared_unevenly(overrides, processes, lines):
    counts = {"env": processes, "rollout": processes, "actor": processes}
    assert [message for _, message in share_problems(load(*overrides), counts)] == lines


def test_an_odd_number_of_environments_still_uses_all_cores():
    evaluation = load().env.eval
    assert num_simulator_processes(evaluation, 62, 16) == 16
    assert num_simulator_processes(evaluation.model_copy(update={"is_eval": False}), 62, 16) == 2
