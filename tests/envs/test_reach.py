import numpy as np
import pytest
import torch

from rlinf.envs.reach import ReachConfig, ReachExpert, ReachWorlds, make


def test_moves_rewards_and_success_by_hand():
    worlds = ReachWorlds(3, dim=2, max_speed=0.5, tolerance=0.1)
    worlds.begin(range(3), [1, 2, 3])
    worlds._point = torch.tensor([[0.0, 0.0], [0.9, 0.0], [0.0, 0.0]])
    worlds._target = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.0, 0.6]])
    action = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 1.0]])
    outcome = worlds.advance(action, torch.tensor([True, True, False]))
    assert worlds.observe()["state"][:, :2].tolist() == [[0.5, 0.0], [1.0, 0.0], [0.0, 0.0]]
    assert outcome.reward.tolist() == pytest.approx([0.0, -1.0, -0.6])
    assert outcome.success.tolist() == [True, False, False]
    assert not outcome.failure.any()


def test_a_proportional_controller_solves_it():
    config = ReachConfig(total_num_envs=16, dim=2)
    env = make(config, num_envs=16, seed=0, control_mode=None, num_workers=0, render=False)
    state = env.reset()["state"]
    succeeded = torch.zeros(16, dtype=torch.bool)
    for _ in range(config.max_episode_steps):
        step = env.step(((state[:, 2:] - state[:, :2]) / config.max_speed).clamp(-1, 1)[:, None])
        succeeded |= step.terminated[:, 0]
        state = step.obs["state"]
    assert succeeded.all()


def test_the_expert_goes_straight_to_the_target():
    state = np.array([[0.0, 0.1], [0.5, -0.5], [0.3, 0.3]], np.float32)
    assert ReachExpert().act(state) == pytest.approx(np.array([[0.5], [-1.0], [0.0]]))
    noisy = ReachExpert(0.5, np.random.default_rng(0)).act(np.repeat(state[2:], 2000, 0))
    assert noisy.std() == pytest.approx(0.5, abs=0.06) and np.abs(noisy).max() <= 1
    with pytest.raises(ValueError, match="needs a generator"):
        ReachExpert(0.5)
