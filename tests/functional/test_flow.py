"""The noisy walk must end where the noiseless flow ends, and its density must be its density."""

import math

import pytest
import torch
from torch.distributions import Normal

from rlinf.functional.flow import integrate, largest_corrected_std, sample_path, score
from rlinf.functional.squash import gaussian_log_prob

MEAN, STD = 0.5, 0.3  # the target N(MEAN, STD²); the velocity of its straight path is known exactly


def exact_velocity(steps, step_std):
    def velocity(x, k):
        t = k / steps
        var = (1 - t) ** 2 + (t * STD) ** 2
        x1 = MEAN + t * STD**2 / var * (x - t * MEAN)
        x0 = (1 - t) / var * (x - t * MEAN)
        return x1 - x0, torch.tensor(step_std, dtype=x.dtype)

    return velocity


def end_std(steps, sigma, corrected, samples=100_000):
    """Standard deviation of x_K for noise of rate sigma (per-step std sigma / √K)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(samples, steps + 1, 1, generator=generator)
    velocity = exact_velocity(steps, sigma / math.sqrt(steps))
    path = sample_path(velocity, noise, drift_correction=corrected)
    return path.end.std().item(), path.end.mean().item()


@pytest.mark.parametrize(("sigma", "expected"), [(0.1, 0.297), (0.3, 0.297), (1.0, 0.302)])
def test_drift_correction_keeps_the_terminal_distribution(sigma, expected):
    std, mean = end_std(128, sigma, corrected=True)
    assert std == pytest.approx(expected, rel=0.02)
    assert std == pytest.approx(STD, rel=0.02)
    assert mean == pytest.approx(MEAN, abs=0.01)


@pytest.mark.parametrize(("sigma", "expected"), [(0.3, 0.360), (1.0, 0.745)])
def test_without_it_the_noise_widens_the_terminal_distribution(sigma, expected):
    assert end_std(128, sigma, corrected=False)[0] == pytest.approx(expected, rel=0.02)


def test_corrected_step_is_the_flow_grpo_step():
    """mean = x (1 − σ² d / 2τ) + v_τ d (1 + σ² (1 − τ) / 2τ) in diffusion time τ = 1 − t, where v_τ = −v."""
    torch.manual_seed(0)
    x, v = torch.randn(100, 3, dtype=torch.float64), torch.randn(100, 3, dtype=torch.float64)
    t, d, sigma = 0.4, 0.1, 0.7
    tau = 1 - t
    ours = x + v * d + 0.5 * sigma**2 * d * score(x, v, t)
    theirs = x * (1 - sigma**2 * d / (2 * tau)) + v * d * (1 + sigma**2 * (1 - tau) / (2 * tau))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_bound_of_the_correction_is_where_the_last_step_stops_contracting():
    steps = 4
    std = largest_corrected_std(steps)
    last_t = (steps - 1) / steps
    assert 1 - std**2 / (2 * (1 - last_t)) == pytest.approx(0.0)
    assert std == pytest.approx(math.sqrt(0.5))


def test_log_prob_of_one_step_is_the_closed_form():
    """K = 1: log N(x_0; 0, 1) + log N(x_1; x_0 + v, s²)."""
    noise, epsilon, s = torch.randn(7, 2), torch.randn(7, 2), 0.4
    path = sample_path(
        lambda x, k: (2 * x + 1, torch.tensor(s)), torch.stack([noise, epsilon], 1), drift_correction=False
    )
    first = Normal(0.0, 1.0).log_prob(noise).sum(-1)
    second = Normal(noise + 2 * noise + 1, s).log_prob(path.end).sum(-1)
    torch.testing.assert_close(path.log_prob, first + second)


def test_log_prob_is_the_density_of_the_path_that_was_walked():
    steps, batch, size = 3, 5, 2
    noise, epsilon = torch.randn(batch, size), torch.randn(steps, batch, size)
    stds = torch.rand(steps, batch, size) + 0.1

    def velocity(x, k):
        return torch.sin(x) + k, stds[k]

    path = sample_path(velocity, torch.cat([noise[:, None], epsilon.transpose(0, 1)], 1), drift_correction=True)
    x, expected = noise, gaussian_log_prob(noise, torch.zeros(size), torch.ones(size))
    for k in range(steps):
        v = velocity(x, k)[0]
        mean = x + v / steps + 0.5 * stds[k] ** 2 * score(x, v, k / steps)
        x = mean + stds[k] * epsilon[k]
        expected = expected + gaussian_log_prob(x, mean, stds[k])
    torch.testing.assert_close(path.end, x)
    torch.testing.assert_close(path.log_prob, expected, atol=1e-5, rtol=1e-5)


def test_one_dimensional_path_density_integrates_to_one():
    """∫∫ p(x_0, x_1) dx_0 dx_1 = 1 for K = 1, by the trapezoid rule on a grid of both variables."""
    grid = torch.linspace(-8, 8, 801, dtype=torch.float64)
    x0, x1 = torch.meshgrid(grid, grid, indexing="ij")
    s = 0.5
    drift = torch.tanh(x0.reshape(-1, 1))
    epsilon = (x1.reshape(-1, 1) - x0.reshape(-1, 1) - drift) / s
    path = sample_path(
        lambda x, k: (torch.tanh(x), torch.tensor(s, dtype=x.dtype)),
        torch.stack([x0.reshape(-1, 1), epsilon], 1),
        drift_correction=False,
    )
    torch.testing.assert_close(path.end, x1.reshape(-1, 1))
    density = path.log_prob.exp().reshape(x0.shape)
    total = torch.trapezoid(torch.trapezoid(density, grid), grid)
    assert total.item() == pytest.approx(1.0, abs=1e-6)


def test_entropy_gradient_reaches_the_noise_and_only_the_noise():
    std = torch.full((512, 4), 0.3, requires_grad=True)
    shift = torch.zeros(4, requires_grad=True)
    path = sample_path(lambda x, k: (shift - x, std), torch.randn(512, 5, 4), drift_correction=False)
    std_grad, shift_grad = torch.autograd.grad(path.log_prob.mean(), (std, shift), materialize_grads=True)
    torch.testing.assert_close(std_grad.sum(0), torch.full((4,), -4 / 0.3))  # d(−K log s)/ds per element
    assert shift_grad.abs().max() == 0


def test_noiseless_walk_is_the_mean_of_the_noisy_one():
    noise = torch.randn(6, 3)
    velocity = exact_velocity(4, 0.2)
    path = sample_path(velocity, torch.stack([noise, *torch.zeros(4, 6, 3)], 1), drift_correction=False)
    torch.testing.assert_close(integrate(velocity, noise, steps=4), path.end)
