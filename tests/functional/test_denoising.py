"""Denoising steps by hand, against the equations of the papers as they write them, and in distribution."""

import math

import pytest
import torch
from torch.distributions import Normal

from rlinf.functional.denoising import (
    Step,
    annealed,
    cps_step,
    noisy_steps,
    ode_step,
    sde_step,
    std_in_range,
    step_entropy,
    step_log_prob,
)
from rlinf.functional.flow import largest_corrected_std, sample_path


def number(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def at(t: float) -> torch.Tensor:
    return number(t).view(1)


def single(x: float) -> torch.Tensor:
    return number(x).view(1, 1, 1)


def grid(num_steps: int):
    return [1 - k / num_steps for k in range(num_steps)]


def test_ode_and_sde_by_hand():
    """x = 3, v = 2 at t = 1/2, δ = 1/4: â = 2, ε̂ = 4, t' = 1/4; α = 1/2: σ² = 1/4."""
    assert ode_step(single(3), single(2), 0.25).item() == 2.5
    step = sde_step(single(3), single(2), at(0.5), 0.25, number(0.5))
    # ¾ · 2 + (¼ − ¼ · ¼ / 1) · 4
    assert step.mean.item() == pytest.approx(2.25, abs=1e-12)
    assert step.std.item() == pytest.approx(0.5 * 0.5, abs=1e-12)


def test_the_first_sde_step_takes_the_next_time_in_the_denominator():
    """At t = 1 of K = 4: σ = α √(1 / (1 − ¾)) = 2 α, so the deviation is 2 α √¼ = α."""
    assert sde_step(single(1), single(1), at(1.0), 0.25, number(0.3)).std.item() == pytest.approx(0.3, abs=1e-12)


def test_cps_by_hand_and_its_last_step_draws_nothing():
    step = cps_step(single(3), single(2), at(0.5), 0.25, number(1 / 3))
    assert step.mean.item() == pytest.approx(0.75 * 2 + 0.25 * math.cos(math.pi / 6) * 4, abs=1e-12)
    assert step.std.item() == pytest.approx(0.25 * 0.5, abs=1e-12)
    last = cps_step(single(3), single(2), at(0.25 + 1e-9), 0.25, number(1 / 3))
    assert last.std.item() == 0 and last.mean.item() == pytest.approx(2.5, abs=1e-8)
    assert noisy_steps("flow_cps", 4) == 3 and noisy_steps("flow_sde", 4) == noisy_steps("flow_noise", 4) == 4


@pytest.mark.parametrize("t", grid(10)[1:])
def test_sde_is_the_step_of_flow_grpo(t):
    """Flow-GRPO, Eq. 12, with Δt = −δ: x + [v + σ²/2t (x + (1 − t) v)] Δt + σ √|Δt| ε."""
    x, v, delta, level = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64), 0.1, 0.7
    sigma = level * math.sqrt(t / (1 - t))
    theirs = x - (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * delta
    step = sde_step(x, v, number(t).expand(2), delta, number(level))
    assert torch.allclose(step.mean, theirs, rtol=0, atol=1e-12)
    assert step.std.flatten().tolist() == pytest.approx([sigma * math.sqrt(delta)] * 2, abs=1e-12)


def test_sde_is_the_drift_corrected_walk_of_the_other_time():
    """A walk of `functional.flow` with the same noise: velocity −v at time 1 − t, deviation σ √δ."""
    num_steps, level = 16, 0.2
    noise = torch.randn(5, num_steps + 1, 3, dtype=torch.float64)

    def velocity(x, t):
        return torch.sin(2 * x) + t

    x, stds = noise[:, 0], []
    for k, t in enumerate(grid(num_steps)):
        time = number(t).expand(5)
        step = sde_step(x[:, None], velocity(x, t)[:, None], time, 1 / num_steps, number(level))
        x = (step.mean + step.std * noise[:, k + 1, None])[:, 0]
        stds.append(step.std[0, 0, 0])
    assert max(stds) <= largest_corrected_std(num_steps)
    walk = sample_path(lambda x, k: (-velocity(x, 1 - k / num_steps), stds[k]), noise, drift_correction=True)
    assert torch.allclose(x, walk.end, rtol=0, atol=1e-6)


def test_cps_keeps_the_amount_of_noise():
    """With one action a, whose velocity is known exactly, x at t is N((1 − t) a, t²), and so is every x'."""
    generator = torch.Generator().manual_seed(0)
    action, count = 0.5, 40_000
    x = torch.randn(count, 1, 1, generator=generator, dtype=torch.float64)
    for t in grid(4)[:-1]:
        step = cps_step(x, (x - action) / t, number(t).expand(count), 0.25, number(0.6))
        x = step.mean + step.std * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        assert x.mean().item() == pytest.approx((1 - (t - 0.25)) * action, abs=0.02)
        assert x.std().item() == pytest.approx(t - 0.25, rel=0.02)


def test_noise_of_the_sde_does_not_change_where_actions_end():
    """With the exact velocity for actions N(½, 0.6²) the ends have that distribution, whatever the noise."""
    generator = torch.Generator().manual_seed(0)
    mean, std, num_steps, count = 0.5, 0.6, 200, 40_000
    x = torch.randn(count, 1, 1, generator=generator, dtype=torch.float64)
    for t in grid(num_steps):
        variance = t * t + (1 - t) ** 2 * std**2
        z = (x - (1 - t) * mean) / variance
        velocity = t * z - (mean + (1 - t) * std**2 * z)  # E[ε | x] − E[a | x]
        step = sde_step(x, velocity, number(t).expand(count), 1 / num_steps, number(0.3))
        x = step.mean + step.std * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(std, rel=0.03)


def test_densities_and_entropies_are_those_of_torch():
    mean, std, after = torch.randn(3, 2, 4), torch.rand(3, 2, 1) + 0.1, torch.randn(3, 2, 4)
    normal = Normal(mean, std.expand_as(mean))
    assert torch.allclose(step_log_prob(after, Step(mean, std)), normal.log_prob(after), atol=1e-5)
    assert torch.allclose(step_entropy(Step(mean, std)), normal.entropy(), atol=1e-6)


def test_a_learned_deviation_stays_in_its_range():
    low, middle, high = std_in_range(torch.tensor([-50.0, 0.0, 50.0]), 0.08, 0.16).tolist()
    assert (low, high) == (pytest.approx(0.08), pytest.approx(0.16))
    assert middle == pytest.approx(math.sqrt(0.08 * 0.16))


def test_annealing_is_a_line_that_ends():
    assert [annealed(0.7, 0.3, 400, now) for now in (0, 100, 400, 900)] == pytest.approx([0.7, 0.6, 0.3, 0.3])
