from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlinf.core.errors import ConfigError, DataError
from rlinf.core.types import ActionOut, Obs
from rlinf.data.demos import read_demos
from rlinf.envs.reach import ReachConfig
from rlinf.envs.reach import make as make_reach
from rlinf.launch import record as recording
from rlinf.launch import registry
from rlinf.launch.config import Root
from rlinf.launch.parse import load_config
from rlinf.launch.record import play, record, select_envs


def load(folder: Path, *overrides: str) -> Root:
    return load_config("reach", overrides, folder, has_gpu=lambda: False)


class Walker:
    """Walks to the target, unless `lazy`."""

    about = "a walker"

    def __init__(self, lazy: bool = False) -> None:
        self.lazy = lazy

    def begin(self, seed: int) -> None:
        pass

    def act(self, obs: Obs) -> ActionOut:
        state: Tensor = obs["state"]
        action = torch.zeros(len(state), 1) if self.lazy else ((state[:, 1:] - state[:, :1]) / 0.2).clamp(-1, 1)
        return ActionOut(action=action[:, None], decision=action)


class Stumbler(Walker):
    """Walks only in the environments with a target to the right."""

    def act(self, obs: Obs) -> ActionOut:
        out = super().act(obs)
        action = torch.where(obs["state"][:, 1:, None] > 0, out.action, 0 * out.action)
        return ActionOut(action=action, decision=action[:, 0])


@pytest.fixture
def expert(monkeypatch: pytest.MonkeyPatch) -> type[Walker]:
    monkeypatch.setattr(recording, "ScriptedExpert", lambda task, noise_std: Stumbler())
    return Stumbler


def quiet(text: str) -> None:
    pass


@pytest.mark.usefixtures("expert")
def test_only_whole_successful_episodes_are_recorded(reach_configs: Path, tmp_path: Path) -> None:
    meta = record(load(reach_configs), tmp_path / "demos", episodes=9, note=quiet)
    trajectories, stored = read_demos(str(tmp_path / "demos"))
    assert meta == stored
    assert (meta.num_episodes, meta.num_successes, meta.env_id, meta.recorded_by) == (9, 9, "reach", "a walker")
    for trajectory in trajectories:
        ends = (trajectory.terminated.any(-1) | trajectory.truncated) & trajectory.valid
        assert torch.equal(ends.sum(0), torch.ones(trajectory.num_envs, dtype=torch.int64))
        assert bool(trajectory.terminated.any(0).all())
        # The last observation that belongs to each end is on the target.
        assert trajectory.last_index.tolist() == ends.nonzero().tolist()
        state = trajectory.last_obs["state"]
        assert bool(((state[:, 0] - state[:, 1]).abs() <= 0.05).all())


@pytest.mark.usefixtures("expert")
def test_failures_are_kept_when_asked_for(reach_configs: Path, tmp_path: Path) -> None:
    meta = record(load(reach_configs), tmp_path / "demos", episodes=8, only_successes=False, note=quiet)
    assert meta.num_episodes == 8
    assert 0 < meta.num_successes < 8


@pytest.mark.usefixtures("expert")
def test_a_stopped_recording_goes_on_with_the_same_episodes(reach_configs: Path, tmp_path: Path) -> None:
    config = load(reach_configs)
    record(config, tmp_path / "whole", episodes=9, note=quiet)

    def stop_after_one(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(config, tmp_path / "parts", episodes=9, note=stop_after_one)
    lines: list[str] = []
    record(config, tmp_path / "parts", episodes=9, note=lines.append)
    assert "episodes already" in lines[0]
    whole, parts = read_demos(str(tmp_path / "whole"))[0], read_demos(str(tmp_path / "parts"))[0]
    assert len(whole) == len(parts) > 1
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.obs["state"], other.obs["state"])


@pytest.mark.usefixtures("expert")
def test_a_full_folder_is_left_alone(reach_configs: Path, tmp_path: Path) -> None:
    config = load(reach_configs)
    first = record(config, tmp_path / "demos", episodes=3, note=quiet)
    assert record(config, tmp_path / "demos", episodes=2, note=quiet).num_episodes == first.num_episodes


def test_an_expert_that_never_succeeds_is_given_up(
    reach_configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "ScriptedExpert", lambda task, noise_std: Walker(lazy=True))
    config = load(reach_configs, "env.train.tolerance=0.000001")
    with pytest.raises(DataError, match="a walker: no success in 80 episodes; lower --noise"):
        record(config, tmp_path / "demos", episodes=3, note=quiet)
    assert not (tmp_path / "demos").exists()


def test_a_task_without_an_expert_is_named(
    reach_configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(registry.EXPERTS, "reach")
    with pytest.raises(ConfigError, match=r"no scripted expert is called 'reach'; there are: .*PickCube-v1"):
        record(load(reach_configs), tmp_path / "demos", episodes=3, note=quiet)


def test_a_scripted_expert_plays_no_chunks(reach_configs: Path, tmp_path: Path) -> None:
    config = load(reach_configs, "actor.model.num_action_chunks=2")
    with pytest.raises(ConfigError, match="answers one action at a time"):
        record(config, tmp_path / "demos", episodes=3, note=quiet)


def test_a_trained_policy_can_demonstrate_chunks(reach_configs: Path, tmp_path: Path) -> None:
    from rlinf.launch.run import run_directory, train

    overrides = ("actor.model.num_action_chunks=2", "runner.max_epochs=1", "runner.val_check_interval=-1")
    config = load(reach_configs, *overrides)
    assert train(config) == 0
    meta = record(
        config,
        tmp_path / "demos",
        episodes=5,
        checkpoint=str(run_directory(config)),
        only_successes=False,
        note=quiet,
    )
    [first, *_], _ = read_demos(str(tmp_path / "demos"))
    assert meta.num_episodes == 5
    assert first.action.shape[2] == 2
    again = load(
        reach_configs,
        *overrides,
        f"algorithm.demo_buffer={{load_path: {tmp_path}/demos}}",
        f"runner.logger.log_path={tmp_path}/again",
    )
    assert train(again) == 0


def test_chosen_environments_keep_their_own_last_observations() -> None:
    env = make_reach(
        ReachConfig(total_num_envs=6, max_episode_steps=12, auto_reset=False),
        num_envs=6,
        seed=0,
        control_mode=None,
        num_workers=0,
        render=False,
    )
    trajectory, success = play(env, Walker(), seed=3, chunks=12)
    assert bool(success.all())
    chosen = select_envs(trajectory, torch.tensor([1, 4]))
    assert chosen.num_envs == 2
    for (_, env_index), state in zip(chosen.last_index.tolist(), chosen.last_obs["state"], strict=True):
        # A target never moves, so it tells the environments apart.
        assert state[1] == chosen.obs["state"][0, env_index, 1]
