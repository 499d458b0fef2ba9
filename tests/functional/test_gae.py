import math

import pytest
import torch

from rlinf.functional.gae import gae


def loop(reward, terminated, truncated, value, next_value, gamma, lam):
    """The definition: A_t = Σ_l (γλ)^l δ_{t+l} up to the end of the episode, written as a double loop."""
    steps, envs = reward.shape
    advantage = torch.zeros(steps, envs, dtype=torch.float64)
    for n in range(envs):
        for t in range(steps):
            total, factor = 0.0, 1.0
            for later in range(t, steps):
                alive = 0.0 if terminated[later, n] else 1.0
                total += factor * (reward[later, n] + gamma * alive * next_value[later, n] - value[later, n])
                if terminated[later, n] or truncated[later, n]:
                    break
                factor *= gamma * lam
            advantage[t, n] = total
    return advantage


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_gae_is_its_definition(gamma, lam):
    draw = torch.Generator().manual_seed(0)
    shape = (12, 5)
    reward, value, next_value = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(3))
    terminated = torch.rand(shape, generator=draw) < 0.15
    truncated = (torch.rand(shape, generator=draw) < 0.15) & ~terminated
    assert terminated.any()
    assert truncated.any()
    discount = gamma * (~terminated).to(reward.dtype)
    advantage, returns = gae(reward, discount, terminated | truncated, value, next_value, lam=lam, gamma=gamma)
    torch.testing.assert_close(advantage, loop(reward, terminated, truncated, value, next_value, gamma, lam))
    torch.testing.assert_close(returns, advantage + value)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 1.0), (1.0, 0.9), (0.99, 0.9)])
def test_gae_by_hand_on_a_goal_at_the_end(gamma, lam):
    """Reward 1 at the last of 64 steps, value 0 everywhere: A_t = (γλ)^(T-1-t)."""
    steps = 64
    reward, zeros = torch.zeros(steps, 1), torch.zeros(steps, 1)
    reward[-1] = 1
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True
    advantage, _ = gae(reward, gamma * (~done).float(), done, zeros, zeros, lam=lam, gamma=gamma)
    expected = torch.tensor([(gamma * lam) ** (steps - 1 - t) for t in range(steps)])
    torch.testing.assert_close(advantage[:, 0], expected)


def test_a_time_limit_bootstraps_and_a_termination_does_not():
    reward, value = torch.ones(1, 2), torch.zeros(1, 2)
    done, next_value = torch.ones(1, 2, dtype=torch.bool), torch.full((1, 2), 10.0)
    discount = torch.tensor([[0.9, 0.0]])  # the first was cut off by the time limit, the second terminated
    _, returns = gae(reward, discount, done, value, next_value, lam=0.95, gamma=0.9)
    assert returns[0].tolist() == pytest.approx([1 + 0.9 * 10, 1.0])


def test_an_endless_reward_is_worth_one_over_one_minus_gamma_across_time_limits():
    """Reward 1 for ever, the true value everywhere: no advantage, wherever episodes are cut."""
    gamma, steps = 0.9, 20
    true = torch.full((steps, 1), 1 / (1 - gamma))
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[[4, 9, 19]] = True
    advantage, _ = gae(torch.ones(steps, 1), torch.full((steps, 1), gamma), done, true, true, lam=0.95, gamma=gamma)
    assert math.isclose(float(advantage.abs().max()), 0, abs_tol=1e-5)
