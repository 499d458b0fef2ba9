"""The gymnasium face of PandaPickCube."""

import importlib.util

import numpy as np
import pytest
import torch

if importlib.util.find_spec("gym_hil") is None:
    pytest.skip("gym-hil is not installed", allow_module_level=True)

import gymnasium
from gymnasium.utils.env_checker import check_env

from rlinf.envs.frankasim import gym_env
from rlinf.envs.frankasim.worlds import INSTRUCTION, PickCubeWorlds

pytestmark = [
    pytest.mark.sim,
    # A state has no bounds, which gymnasium remarks upon.
    pytest.mark.filterwarnings("ignore:.*observation space (minimum|maximum) value:UserWarning"),
]


@pytest.mark.parametrize("task", ["PandaPickCube-v0", "PandaPickCubeVision-v0"])
def test_gymnasium_finds_nothing_to_complain_of(task):
    keys = {"image_size": 32} if "Vision" in task else {}
    env = gymnasium.make(task, render_mode="rgb_array", **keys)
    check_env(env.unwrapped)
    obs, info = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    assert info == {"success": False}
    env.close()


def test_it_is_the_simulator_behind_another_interface():
    env, worlds = gymnasium.make("PandaPickCube-v0"), PickCubeWorlds(1)
    state, _ = env.reset(seed=3)
    drawn = np.random.Generator(np.random.PCG64(np.random.SeedSequence(3))).integers(gym_env.MAX_SEED)
    worlds.begin([0], [int(drawn)])
    assert np.array_equal(state, worlds.observe()["state"][0].numpy())
    action = np.array([0.3, -0.2, -0.9, 1], np.float32)
    state, reward, terminated, truncated, _ = env.step(action)
    outcome = worlds.advance(torch.from_numpy(action[None]), torch.ones(1, dtype=torch.bool))
    assert reward == float(outcome.reward) and not terminated and not truncated
    assert np.array_equal(state, worlds.observe()["state"][0].numpy())


def test_time_limit_truncates_after_a_hundred_steps():
    env = gymnasium.make("PandaPickCube-v0")
    env.reset(seed=0)
    ends = [env.step(np.zeros(4, np.float32))[2:4] for _ in range(100)]
    assert ends == [(False, False)] * 99 + [(False, True)]


def test_instruction_is_observed_with_the_pictures():
    env = gymnasium.make("PandaPickCubeVision-v0", image_size=32)
    obs, _ = env.reset(seed=0)
    assert obs["instruction"] == INSTRUCTION
    assert obs["images"]["wrist"].shape == (32, 32, 3)
    env.close()


def test_bad_input_is_refused():
    env = gym_env.PandaPickCubeEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="not finite"):
        env.step(np.array([0, np.nan, 0, 0]))
    with pytest.raises(ValueError, match="rgb_array"):
        gym_env.PandaPickCubeEnv(render_mode="human")
