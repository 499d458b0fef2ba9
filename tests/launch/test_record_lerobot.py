"""Recording LeRobot data sets, and the commands that record and show them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlinf.core.errors import ConfigError, DataError
from rlinf.core.types import ActionOut, EnvSpaces, Obs, Trajectory
from rlinf.data.demos import read_demos
from rlinf.data.lerobot.reader import LeRobotDataset
from rlinf.launch import record as recording
from rlinf.launch.cli.dataset import describe, duration
from rlinf.launch.cli.main import main
from rlinf.launch.config import Root
from rlinf.launch.demonstrators import StepByStep
from rlinf.launch.parse import load_config
from rlinf.launch.record_lerobot import DatasetOptions, episode_of, features_of, record_dataset, task_text
from tests.data.lerobot_sets import features, write
from tests.launch.conftest import CONFIG_DIR

HAS_FRANKASIM = importlib.util.find_spec("mujoco") is not None and importlib.util.find_spec("gym_hil") is not None
OPTIONS = DatasetOptions(fps=10)


def load(folder: Path, *overrides: str) -> Root:
    return load_config("reach", overrides, folder, has_gpu=lambda: False)


def quiet(text: str) -> None:
    pass


class Stumbler:
    """Walks to the target where that is to the right, and stands still elsewhere."""

    about = "a stumbler"

    def begin(self, seed: int) -> None:
        pass

    def act(self, obs: Obs) -> ActionOut:
        state: Tensor = obs["state"]
        action = ((state[:, 1:] - state[:, :1]) / 0.2).clamp(-1, 1)
        action = torch.where(state[:, 1:] > 0, action, 0 * action)
        return ActionOut(action=action[:, None], decision=action)


@pytest.fixture
def expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "ScriptedExpert", lambda task, noise_std: Stumbler())


# --- recording ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("expert")
def test_successful_episodes_become_a_data_set(reach_configs: Path, tmp_path: Path) -> None:
    recorded = record_dataset(load(reach_configs), tmp_path / "set", OPTIONS, episodes=9, note=quiet)
    data = LeRobotDataset(tmp_path / "set", windows={"observation.state": [0, 1]})
    assert (recorded.num_episodes, recorded.num_frames) == (9, len(data))
    assert data.info.fps == 10
    assert set(data.batch(range(len(data)))["task"]) == {"Move the point onto the target."}
    batch = data.batch(range(len(data)))
    last = data.ends - 1
    assert batch["next.done"].nonzero()[0].tolist() == last.tolist()
    assert batch["next.success"].nonzero()[0].tolist() == last.tolist()
    # The point goes where the action sends it, and the reward is the distance that is left then.
    state, action = batch["observation.state"], batch["action"]
    inside = ~batch["observation.state_is_pad"][:, 1]
    moved = (state[:, 0, 0] + 0.2 * action.clip(-1, 1)).clip(-1, 1)
    np.testing.assert_allclose(moved[inside], state[inside, 1, 0], atol=1e-6)
    np.testing.assert_allclose(batch["next.reward"], -np.abs(moved - state[:, 0, 1]), atol=1e-6)
    assert (np.abs(moved - state[:, 0, 1])[last] <= 0.05).all()


@pytest.mark.usefixtures("expert")
def test_it_holds_the_same_episodes_as_demonstrations(reach_configs: Path, tmp_path: Path) -> None:
    config = load(reach_configs)
    recording.record(config, tmp_path / "demos", episodes=6, only_successes=False, note=quiet)
    record_dataset(config, tmp_path / "set", OPTIONS, episodes=6, only_successes=False, note=quiet)
    data, episodes = LeRobotDataset(tmp_path / "set"), []
    for trajectory in read_demos(str(tmp_path / "demos"))[0]:
        for env in range(trajectory.num_envs):
            steps = int(trajectory.valid[:, env].sum())
            episodes.append((trajectory.obs["state"][:steps, env], trajectory.action[:steps, env, 0]))
    assert data.meta.length.tolist() == [len(states) for states, _ in episodes]
    assert np.array_equal(data.column("observation.state"), torch.cat([states for states, _ in episodes]).numpy())
    assert np.array_equal(data.column("action"), torch.cat([actions for _, actions in episodes])[:, 0].numpy())
    assert 0 < data.column("next.success").sum() < 6
    assert data.column("next.done").sum() == 6


@pytest.mark.usefixtures("expert")
def test_a_stopped_recording_goes_on_with_the_same_frames(reach_configs: Path, tmp_path: Path) -> None:
    config = load(reach_configs)
    record_dataset(config, tmp_path / "whole", OPTIONS, episodes=9, note=quiet)

    def stop_after_one(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_dataset(config, tmp_path / "parts", OPTIONS, episodes=9, note=stop_after_one)
    lines: list[str] = []
    record_dataset(config, tmp_path / "parts", OPTIONS, episodes=9, note=lines.append)
    assert "episodes already" in lines[0]
    whole, parts = (LeRobotDataset(tmp_path / name) for name in ("whole", "parts"))
    assert len(whole) == len(parts)
    assert all(np.array_equal(whole.column(key), parts.column(key)) for key in whole.keys)
    assert record_dataset(config, tmp_path / "parts", OPTIONS, episodes=2, note=quiet).num_episodes == 9
    with pytest.raises(DataError, match=r"has 10 frames per second, not 20: record into another folder"):
        record_dataset(config, tmp_path / "parts", DatasetOptions(fps=20), episodes=10, note=quiet)


def test_chunks_of_a_policy_are_played_action_by_action(reach_configs: Path, tmp_path: Path) -> None:
    from rlinf.launch.run import run_directory, train

    overrides = ("actor.model.num_action_chunks=2", "runner.max_epochs=1", "runner.val_check_interval=-1")
    config = load(reach_configs, *overrides)
    assert train(config) == 0
    options = DatasetOptions(fps=5, task="go there", robot_type="a point")
    record_dataset(
        config, tmp_path / "set", options, episodes=5, checkpoint=str(run_directory(config)), noise_std=0,
        only_successes=False, note=quiet,
    )  # fmt: skip
    data = LeRobotDataset(tmp_path / "set", windows={"observation.state": [0, 1]})
    assert (data.info.robot_type, data[0]["task"]) == ("a point", "go there")
    batch = data.batch(range(len(data)))
    inside = ~batch["observation.state_is_pad"][:, 1]
    before, after = batch["observation.state"][:, 0, 0], batch["observation.state"][:, 1, 0]
    moved = (before + 0.2 * batch["action"].clip(-1, 1)).clip(-1, 1)
    np.testing.assert_allclose(moved[inside], after[inside], atol=1e-6)
    assert inside.sum() > 5


def test_a_chunk_is_asked_for_when_the_last_one_is_played() -> None:
    class Counting:
        about = "counting"
        asked = 0

        def begin(self, seed: int) -> None:
            self.asked = 0

        def act(self, obs: Obs) -> ActionOut:
            self.asked += 1
            chunk = torch.tensor([[[1.0], [2.0], [3.0]]]) + 10 * self.asked
            return ActionOut(action=chunk, decision=chunk.flatten(1), log_prob=torch.zeros(1))

    player = StepByStep(Counting())
    player.begin(0)
    assert [player.act({}).action.item() for _ in range(4)] == [11, 12, 13, 21]
    player.begin(0)
    out = player.act({})
    assert (out.action.item(), out.action.shape, out.log_prob) == (11, (1, 1, 1), None)


def test_features_follow_from_what_the_environment_shows() -> None:
    spaces = EnvSpaces(
        {"state": (7,), "images/front": (8, 8, 3), "force/left": (3,), "depth": (), "instruction": ()},
        {
            "state": "float32",
            "images/front": "uint8",
            "force/left": "float32",
            "depth": "float32",
            "instruction": "str",
        },
        action_dim=4,
    )
    made = features_of(spaces, "image")
    assert {key: (feature.dtype, feature.shape) for key, feature in made.items()} == {
        "observation.state": ("float32", (7,)),
        "observation.images.front": ("image", (8, 8, 3)),
        "observation.force.left": ("float32", (3,)),
        "observation.depth": ("float32", (1,)),
        "action": ("float32", (4,)),
        "next.reward": ("float32", (1,)),
        "next.done": ("bool", (1,)),
        "next.success": ("bool", (1,)),
    }


def test_an_episode_ends_where_it_is_no_longer_valid() -> None:
    steps, envs = 4, 2
    valid = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0]], dtype=torch.bool)
    terminated = torch.zeros(steps, envs, 1, dtype=torch.bool)
    terminated[1, 1] = True
    truncated = torch.zeros(steps, envs, dtype=torch.bool)
    truncated[3, 0] = True
    trajectory = Trajectory(
        obs={
            "state": torch.arange(10.0).reshape(5, 2, 1),
            "depth": torch.arange(10.0).reshape(5, 2),
            "instruction": [["go", "stop"]] * 5,
        },
        last_obs={},
        last_index=torch.tensor([[1, 1], [3, 0]]),
        decision=torch.zeros(steps, envs, 1),
        action=torch.arange(8.0).reshape(steps, envs, 1, 1),
        reward=torch.arange(8.0).reshape(steps, envs, 1),
        terminated=terminated,
        truncated=truncated,
        intervened=terminated,
        valid=valid,
    )
    data, text = episode_of(trajectory, 1, success=True)
    assert text == "stop"
    assert {key: values.tolist() for key, values in data.items()} == {
        "observation.state": [[1], [3]],
        "observation.depth": [[1], [3]],
        "action": [[1], [3]],
        "next.reward": [1, 3],
        "next.done": [False, True],
        "next.success": [False, True],
    }
    data, _ = episode_of(trajectory, 0, success=False)
    assert (len(data["action"]), data["next.done"].tolist()) == (4, [False, False, False, True])
    assert not data["next.success"].any()


def test_the_text_of_the_task_is_the_one_asked_for_or_the_environments() -> None:
    assert task_text("do it", "push", "reach") == "do it"
    assert task_text(None, "push", "reach") == "push"
    assert task_text(None, None, "PickCube-v1") == "Pick up the cube and hold it at the goal."
    with pytest.raises(ConfigError, match="StackCube-v1 gives no instruction: say what the robot does with --task"):
        task_text(None, None, "StackCube-v1")


def test_frames_need_a_rate(reach_configs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reach has no rate of control: .* with --fps N"):
        record_dataset(load(reach_configs), tmp_path / "set", DatasetOptions(), episodes=1, note=quiet)


# --- two cameras ----------------------------------------------------------------------------------------------


@pytest.mark.sim
@pytest.mark.skipif(not HAS_FRANKASIM, reason="gym-hil with MuJoCo is not installed")
@pytest.mark.parametrize("pictures", ["video", "image"])
def test_the_expert_sees_through_the_pictures_and_both_cameras_are_recorded(tmp_path, monkeypatch, pictures) -> None:
    from rlinf.launch.demonstrators import SeeingExpert

    act, seen = SeeingExpert.act, []

    def watched(self, obs: Obs) -> ActionOut:
        seen.append(torch.equal(obs["state"], self._obs["state"][:, :7]))
        return act(self, obs)

    monkeypatch.setattr(SeeingExpert, "act", watched)
    overrides = [
        "env.train.total_num_envs=2", "env.train.max_episode_steps=6", "env.train.num_workers=0",
        "env.train.image_size=64",
    ]  # fmt: skip
    config = load_config("frankasim_sac_cnn_async", overrides, CONFIG_DIR, has_gpu=lambda: False)
    options = DatasetOptions(pictures=pictures)
    record_dataset(config, tmp_path / "set", options, episodes=2, only_successes=False, note=quiet)
    # Its own environment is in step with the one that is recorded: the same arm at the same places.
    assert seen == [True] * 6
    data = LeRobotDataset(tmp_path / "set")
    assert (len(data), data.info.fps, data[0]["task"]) == (12, 50, "Pick up the cube.")
    cameras = {key: f for key, f in data.info.features.items() if f.is_picture}
    assert {key: (f.dtype, f.shape) for key, f in cameras.items()} == dict.fromkeys(
        ("observation.images.front", "observation.images.wrist"), (pictures, (64, 64, 3))
    )
    batch = data.batch(range(12))
    front, wrist = (batch[key].astype(float) for key in cameras)
    assert front.std() > 10 and wrist.std() > 10
    assert np.abs(front - wrist).mean() > 5
    assert np.abs(front[0] - front[5]).max() > 30  # the arm moves
    # Demonstrations of pictures are recorded in the same way.
    recording.record(config, tmp_path / "demos", episodes=1, only_successes=False, note=quiet)
    [trajectory], _ = read_demos(str(tmp_path / "demos"))
    assert np.array_equal(trajectory.obs["state"][:6, 0].numpy(), batch["observation.state"][:6])
    assert trajectory.obs["instruction"][0] == ["Pick up the cube."]
    if pictures == "image":
        assert np.array_equal(trajectory.obs["images"]["front"][:6, 0].numpy(), batch["observation.images.front"][:6])


# --- commands -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("expert")
def test_record_and_look_at_it(reach_configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "set"
    words = ["--dir", str(reach_configs), "--episodes", "5", "--output", str(output)]
    lerobot = ["--format", "lerobot", "--fps", "10", "--task", "go", "--robot", "point"]
    assert main(["record", "reach", *words, *lerobot, "env.train.total_num_envs=6"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "5/5 episodes" in out[-2]
    assert out[-1].endswith(f"to look at it: python -m rlinf dataset info {output}")
    assert main(["dataset", "info", str(output), "--check"]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert shown[:4] == [str(output), "version v3.0", "robot point", "episodes 5"]
    assert "1 task" in shown and "5 go" in shown
    assert "observation.state float32 2" in shown
    assert shown[-1] == "everything can be read"


@pytest.mark.usefixtures("expert")
def test_record_makes_demonstrations_where_nothing_else_is_said(reach_configs: Path, tmp_path: Path, capsys) -> None:
    words = ["record", "reach", "--dir", str(reach_configs), "--episodes", "3", "--output", str(tmp_path / "demos")]
    assert main(words) == 0
    assert "demos: 3 episodes, 3 of them successful" in capsys.readouterr().out
    assert len(read_demos(str(tmp_path / "demos"))[0]) > 0
    for more, message in [
        (["--fps", "5"], "error: --fps needs --format lerobot"),
        (["--episodes", "0"], "error: --episodes must be at least 1"),
        (["--format", "lerobot"], "error: reach has no rate of control"),
        (["--format", "lerobot", "--fps", "5"], "demos holds something else than a data set"),
    ]:
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_data_set_is_described_within_the_terminal(tmp_path: Path, capsys, monkeypatch) -> None:
    write(tmp_path / "set", [5, 9, 2, 4], "video", robot_type="panda")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    assert main(["dataset", "info", "set"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "episodes 4\nframes 20, 2.0 s at 10 per second" in text
    assert "lengths 2 to 9 frames, median 4" in text
    assert "3 tasks\n2 pick up the cube\n1 push the cube\n1 wait" in text
    assert f"{len(features()) + 5} features\nobservation.state float32 3" in text
    assert "observation.images.front video 32 x 32 x 3" in text
    assert any(line.endswith("…") for line in lines)
    whole = [" ".join(line.split()) for line in describe(LeRobotDataset(tmp_path / "set").meta)]
    assert "observation.state float32 3 episode, frame, both" in whole
    assert "observation.images.front video 32 x 32 x 3 h264 yuv420p" in whole


def test_a_check_that_finds_something_says_so(tmp_path: Path, capsys) -> None:
    write(tmp_path, [5])
    (tmp_path / "meta/stats.json").unlink()
    assert main(["dataset", "info", str(tmp_path), "--check"]) == 1
    said = capsys.readouterr()
    assert said.out.endswith("1 problem\n")
    assert said.err.startswith(f"problem: {tmp_path}/meta/stats.json is missing")
    assert main(["dataset", "info", str(tmp_path / "no")]) == 2
    assert "no is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0.5 s"), (59.94, "59.9 s"), (61, "1 min 1 s"), (7265, "2 h 1 min")]
)
def test_durations(seconds, text) -> None:
    assert duration(seconds) == text
