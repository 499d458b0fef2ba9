import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from rlinf.core.protocols import VectorEnv
from rlinf.envs.reach import ReachConfig, make
from rlinf.launch import film
from rlinf.launch.film import CaptionedEnv, LastEpisodes, ResumableLastEpisodes, film_last_episodes


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> CaptionedEnv:
    inner = make(
        ReachConfig(total_num_envs=2, max_episode_steps=2, ignore_terminations=True),
        num_envs=2,
        seed=0,
        control_mode=None,
        num_workers=0,
        render=True,
    )
    monkeypatch.setattr(inner, "render", lambda: np.zeros((2, 64, 96, 3), np.uint8))
    return CaptionedEnv(inner)


def captions(env: CaptionedEnv, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    monkeypatch.setattr(film, "overlay", lambda pictures, texts: seen.extend(texts) or pictures)
    env.render()
    return seen


def test_it_is_a_vector_env(env: CaptionedEnv) -> None:
    assert isinstance(env, VectorEnv)
    assert env.spaces.action_dim == 1


def test_captions_follow_the_episode(env: CaptionedEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    state = env.reset(seed=1)["state"]
    assert captions(env, monkeypatch) == ["step 0\nreward 0.000"] * 2
    # The first row goes right onto its target, by a step of any length.
    env._env._simulator._target[0] = state[0, 0]
    step = env.step(torch.tensor([[[0.0]], [[1.0]]]))
    assert captions(env, monkeypatch) == [
        "step 1\nreward 0.000\nsuccess",
        f"step 1\nreward {step.reward[1, 0]:.3f}",
    ]
    env.step(torch.zeros(2, 1, 1))
    assert captions(env, monkeypatch) == ["step 0\nreward 0.000"] * 2


def test_captions_are_seen(env: CaptionedEnv) -> None:
    env.reset(seed=1)
    pictures = env.render()
    assert pictures is not None
    assert pictures.shape == (2, 64, 96, 3)
    assert pictures.max() > 200


def test_without_pictures_there_is_nothing_to_write_on(env: CaptionedEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env._env, "render", lambda: None)
    assert env.render() is None


# --- the last episodes of training


def cell(**changed) -> VectorEnv:
    from rlinf.envs.realworld.config import RealWorldConfig
    from rlinf.envs.realworld.env import make as make_cell

    config = RealWorldConfig(override_cfg={"driver": "fake"}, max_episode_steps=3, **changed)
    return make_cell(config, num_envs=1, seed=0, control_mode=None, num_workers=0, render=False)


def wait_for_film(env: LastEpisodes) -> None:
    if env._writer is not None:
        env._writer.join()


def test_the_last_episodes_are_films_used_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, tuple[int, ...], float]] = []
    monkeypatch.setattr(film, "write_video", lambda path, frames, fps: written.append((path.name, frames.shape, fps)))
    env = LastEpisodes(cell(), tmp_path, 10.0, kept=2)
    assert isinstance(env, VectorEnv)
    env.reset(seed=0)
    for _ in range(3):
        for _ in range(3):
            step = env.step(torch.zeros(1, 1, 6))
        assert bool(step.done[0])
        wait_for_film(env)
    env.close()
    # What was seen before each of the three steps, and after the last one.
    assert written == [(name, (4, 128, 128, 3), 10.0) for name in ("last_0.mp4", "last_1.mp4", "last_0.mp4")]


def test_a_film_is_written_and_a_full_disk_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    env = film_last_episodes(cell(), tmp_path / "videos", 10.0)
    assert isinstance(env, ResumableLastEpisodes)  # the twin's state can be saved, and still can be
    env.reset(seed=0)
    state = env.state_dict()
    for _ in range(3):
        env.step(torch.zeros(1, 1, 6))
    wait_for_film(env)
    assert (tmp_path / "videos/last_0.mp4").stat().st_size > 500
    env.reset()
    env.load_state_dict(state)

    def fails(path: Path, frames: np.ndarray, fps: float) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(film, "write_video", fails)
    for _ in range(6):
        env.step(torch.zeros(1, 1, 6))
        wait_for_film(env)
    env.close()
    assert [record.message for record in caplog.records] == ["no films of episodes: No space left on device"]


def test_no_step_waits_for_a_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = threading.Event()
    written: list[str] = []

    def slow(path: Path, frames: np.ndarray, fps: float) -> None:
        finish.wait(10)
        written.append(path.name)

    monkeypatch.setattr(film, "write_video", slow)
    env = LastEpisodes(cell(), tmp_path, 10.0)
    env.reset(seed=0)
    for _ in range(9):
        env.step(torch.zeros(1, 1, 6))
    assert written == []
    finish.set()
    env.close()
    assert written == ["last_0.mp4"]


def test_an_environment_without_pictures_is_left_alone(tmp_path: Path) -> None:
    blind = make(ReachConfig(total_num_envs=1), num_envs=1, seed=0, control_mode=None, num_workers=0, render=False)
    assert film_last_episodes(blind, tmp_path, 10.0) is blind


def test_cameras_stand_beside_each_other() -> None:
    low, high = np.full((2, 3, 3), 7, np.uint8), np.full((4, 2, 3), 9, np.uint8)
    picture = film.beside([low, high])
    assert picture.shape == (4, 5, 3)
    assert picture[:, 0, 0].tolist() == [7, 7, 0, 0] and picture[:, 4, 0].tolist() == [9] * 4


def test_a_cell_that_is_trained_leaves_films(reach_configs: Path, tmp_path: Path) -> None:
    from rlinf.launch.parse import load_config
    from rlinf.launch.run import run_directory, train

    (reach_configs / "env/cell.yaml").write_text(
        "env_type: realworld\noverride_cfg: {driver: fake}\nmax_episode_steps: 5\nmax_steps_per_rollout_epoch: 12\n"
        "video_cfg: {save_video: True}\n"
    )
    text = (reach_configs / "reach.yaml").read_text()
    text = text.replace("env@env.train: reach", "env@env.train: cell").replace(
        "env@env.eval: reach", "env@env.eval: null"
    )
    text = text.replace("  train: {total_num_envs: 4, max_steps_per_rollout_epoch: 6}\n", "")
    text = text.replace("  eval: {total_num_envs: 2, use_fixed_reset_state_ids: True}\n", "").replace("\nenv:\n", "\n")
    (reach_configs / "cell.yaml").write_text(text)
    overrides = ["runner.max_epochs=2", "runner.val_check_interval=-1"]
    config = load_config("cell", overrides, reach_configs, has_gpu=lambda: False)
    assert train(config) == 0
    films = run_directory(config) / "videos/train"
    assert "last_0.mp4" in {path.name for path in films.iterdir()}
