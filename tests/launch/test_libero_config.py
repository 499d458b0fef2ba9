"""LIBERO in a whole configuration: what fits together, and what goes to whom."""

from functools import partial
from pathlib import Path
from textwrap import dedent

import pytest

from rlinf.core.errors import ConfigError
from rlinf.envs.libero.config import LiberoConfig
from rlinf.launch import build, crew
from rlinf.launch.config import Root
from rlinf.launch.machine import simulates_on_cpu
from rlinf.launch.parse import load_config
from rlinf.launch.record import task_of, with_full_state
from tests.launch.conftest import CONFIG_DIR

RECIPE = """\
    # A recipe for these tests.
    defaults:
      - env@env.train: libero_spatial
      - env@env.eval: libero_spatial
      - model@actor.model: mlp_policy
      - _self_

    env:
      train: {total_num_envs: 12}
      eval: {total_num_envs: 10, is_eval: True}
    """


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for group in ("env", "model"):
        (tmp_path / group).symlink_to(CONFIG_DIR / group)
    (tmp_path / "recipe.yaml").write_text(dedent(RECIPE))
    return tmp_path


def load(folder: Path, *overrides: str) -> Root:
    return load_config("recipe", overrides, folder, has_gpu=lambda: False)


def test_the_group_agrees_with_the_schema_and_says_every_key_of_its_own(folder):
    train = load(folder).env.train
    assert isinstance(train, LiberoConfig)
    assert train == LiberoConfig(total_num_envs=12)
    assert simulates_on_cpu(train)
    assert task_of(train) == "libero_spatial"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("env.train.is_eval=True", "env.train.is_eval: only an evaluation comes to an end; write it under env.eval"),
        ("env.eval.specific_reset_id=3", "remove specific_reset_id, or write is_eval: False"),
        ("+env.train.reset_gripper_open=True", "num_steps_wait"),
        (
            "+env.eval.init_params.camera_heights=256",
            "env.eval.init_params: not a key of env_type: libero; camera_heights: write env.*.image_size",
        ),
        ("env.train.task_suite_name=libero_spatia", "libero_spatial"),
        ("+env.train.use_stepp_penalty=True", "use_step_penalty"),
    ],
)
def test_what_does_not_fit_is_said(folder, override, message):
    with pytest.raises(ConfigError) as caught:
        load(folder, override)
    assert message in str(caught.value)


def test_who_demonstrates_sees_the_objects(folder):
    train = load(folder).env.train
    seeing = with_full_state(train)
    assert isinstance(seeing, LiberoConfig) and seeing.show_objects
    assert seeing.model_copy(update={"show_objects": False, "image_size": train.image_size}) == train


def test_every_worker_and_stage_gets_environments_of_its_own(folder, monkeypatch):
    made = []

    def make(config, *, num_envs, first_row=0, **others):
        made.append((first_row, num_envs))

    monkeypatch.setattr(build, "lookup", lambda kind, name, table: make)
    config = load(folder)
    for rank in range(3):
        crew._make_stages(config, config.env.train, rank, 3, seed=0, stages=2, render=False, cores=1)
    assert made == [(2 * k, 2) for k in range(6)]


def test_other_simulators_are_not_asked_which_environments_they_are(folder, monkeypatch):
    reach = load_config("reach_sac_mlp", [], CONFIG_DIR, has_gpu=lambda: False)
    seen = []
    monkeypatch.setattr(build, "lookup", lambda kind, name, table: partial(lambda config, **keys: seen.append(keys)))
    crew._make_stages(reach, reach.env.train, 0, 1, seed=0, stages=1, render=False, cores=1)
    assert "first_row" not in seen[0]
