"""The demonstrations beside PPO: where they are found, when they are refused, and what is said of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rlinf.core.errors import CheckpointError, DataError
from rlinf.launch.demonstrations import RECORD, find_demonstrations, read_demonstrations
from rlinf.launch.parse import load_config
from rlinf.launch.prerequisites import check_pi0
from rlinf.launch.run import run_directory, train
from rlinf.launch.twin_objects import remark_on_objects
from rlinf.models.embodiment.openpi.norm_stats import read_norm_stats, write_norm_stats
from tests.launch.conftest import CONFIG_DIR
from tests.launch.test_co_training_openpi import load, save_tiny, write_real


@pytest.fixture(autouse=True)
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_LEROBOT_HOME", raising=False)


def test_the_data_set_is_found_by_path_or_below_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_demonstrations(load(tmp_path)) == str(tmp_path / "real")
    config = load(tmp_path, "actor.sft_data_path=null")
    with pytest.raises(DataError, match="no data set is named; write its folder there, or export HF_LEROBOT_HOME"):
        find_demonstrations(config)
    home = tmp_path / "home"
    monkeypatch.setenv("HF_LEROBOT_HOME", str(home))
    assert find_demonstrations(config) == "physical-intelligence/pick_and_place_real"
    for name in ("pick_and_place_real", "physical-intelligence/pick_and_place_real"):
        written = write_real(home / name)
        assert find_demonstrations(config) == str(written)
    itself = write_real(tmp_path / "itself")
    monkeypatch.setenv("HF_LEROBOT_HOME", str(itself))
    assert find_demonstrations(config) == str(itself)


def test_packed_pictures_may_lie_in_files_that_the_next_run_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_real(tmp_path / "real")
    rows = np.array([0, 7, 10])
    in_memory = read_demonstrations(load(tmp_path)).batch(rows)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load(tmp_path, "actor.sft_map_to='~/packed'")
    first = read_demonstrations(config).batch(rows)
    [file] = (tmp_path / "packed").iterdir()
    made = file.stat()
    again = read_demonstrations(config).batch(rows)
    assert [(f, f.stat()) for f in (tmp_path / "packed").iterdir()] == [(file, made)]
    for batch in (first, again):
        assert torch.equal(batch.obs["images"]["front"], in_memory.obs["images"]["front"])
        assert torch.equal(batch.action, in_memory.action)


def test_what_is_said_to_record_demonstrations_ends_episodes_with_their_success() -> None:
    words = RECORD.split()
    config = load_config(words[4], [word for word in words if "env.train" in word], CONFIG_DIR, has_gpu=lambda: False)
    train_env = config.env.train
    assert not train_env.ignore_terminations and (train_env.total_num_envs, train_env.max_episode_steps) == (8, 40)


def test_a_missing_or_foreign_data_set_is_refused_before_there_is_a_run(tmp_path: Path) -> None:
    config = load(tmp_path)
    with pytest.raises(DataError, match=r"actor.sft_data_path: .*real.*\n?.*To record some: python -m rlinf record"):
        train(config)
    assert not run_directory(config).exists()
    write_real(tmp_path / "narrow", action=4)
    with pytest.raises(DataError, match="feature action has 4 numbers and the robot's actions have 7"):
        train(load(tmp_path, f"actor.sft_data_path={tmp_path / 'narrow'}"))
    write_real(tmp_path / "other_camera", camera="observation.images.wrist")
    with pytest.raises(DataError, match=r"no feature image or observation.images.front .* observation.images.wrist"):
        train(load(tmp_path, f"actor.sft_data_path={tmp_path / 'other_camera'}"))


def test_demonstrations_outside_of_the_statistics_are_refused_before_there_is_a_run(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "stage1")
    write_real(tmp_path / "real")
    config = load(tmp_path, f"actor.model.model_path={folder}")
    assert len(read_demonstrations(config)) == 11
    stats = read_norm_stats(folder, "physical-intelligence/pick_and_place_real")
    assert stats["state"].q01 is not None
    stats["state"].q01[2] = 1.0  # as q99: a number that never changed
    file = write_norm_stats(stats, folder / "physical-intelligence" / "pick_and_place_real")
    with pytest.raises(
        DataError, match=rf"real: state number 2 \(from 0\) goes from .* to .*, {file}, from about 1 to 1"
    ):
        train(config)
    assert not run_directory(config).exists()


def test_the_twins_published_objects_are_named_where_somebody_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("maniskill_ppo_co_training_openpi_pi05", ["profile=cpu"], CONFIG_DIR)
    envs = {"env.train": config.env.train, "env.eval": config.env.eval}
    monkeypatch.delenv("MANISKILL_ASSET_DIR", raising=False)
    assert remark_on_objects(envs) is None
    monkeypatch.setenv("MANISKILL_ASSET_DIR", "/assets")
    told = remark_on_objects(envs)
    assert told is not None and told.endswith(
        "write env.train.init_params.id=PandaPutOnPlateInScene25DigitalTwin-v1 "
        "env.eval.init_params.id=PandaPutOnPlateInScene25DigitalTwin-v1"
    )
    overrides = [word for word in told.split() if ".id=" in word]
    asked = load_config("maniskill_ppo_co_training_openpi_pi05", ["profile=cpu", *overrides], CONFIG_DIR).env
    assert remark_on_objects({"env.train": asked.train, "env.eval": asked.eval}) is None


def test_the_recipe_of_stage_one_is_named_where_its_weights_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = "maniskill_ppo_co_training_openpi_pi05_tiny"
    config = load_config(recipe, ["profile=cpu"], CONFIG_DIR, has_gpu=lambda: False)
    with pytest.raises(CheckpointError, match=r"run_sft\.sh maniskill_sft_openpi_pi05_tiny$"):
        check_pi0(config)
