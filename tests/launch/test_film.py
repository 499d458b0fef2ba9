import numpy as np
import pytest
import torch

from rlinf.core.protocols import VectorEnv
from rlinf.envs.reach import ReachConfig, make
from rlinf.launch import film
from rlinf.launch.film import CaptionedEnv


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
