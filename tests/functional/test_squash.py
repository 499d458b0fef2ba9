import math

import pytest
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from rlinf.functional.squash import (
    UNIT_GAUSSIAN_ENTROPY,
    gaussian_log_prob,
    tanh_log_det,
    unit_gaussian_log_prob,
)


def test_gaussian_log_prob_agrees_with_torch():
    x, mean, std = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5, 3) + 0.1
    expected = Independent(Normal(mean, std), 1).log_prob(x)
    torch.testing.assert_close(gaussian_log_prob(x, mean, std), expected)
    torch.testing.assert_close(unit_gaussian_log_prob(x), gaussian_log_prob(x, torch.zeros(3), torch.ones(3)))


def test_squashed_density_agrees_with_torch_transform():
    mean, std = torch.randn(64, 2, dtype=torch.float64), torch.rand(64, 2, dtype=torch.float64) + 0.2
    x = mean + std * torch.randn(64, 2, dtype=torch.float64)
    oracle = TransformedDistribution(Independent(Normal(mean, std), 1), [TanhTransform()])
    ours = gaussian_log_prob(x, mean, std) - tanh_log_det(x)
    torch.testing.assert_close(ours, oracle.log_prob(torch.tanh(x)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("x", [0.0, 1.0, -3.0, 8.0])
def test_tanh_log_det_is_the_derivative(x):
    eps = 1e-6
    at = torch.tensor([x], dtype=torch.float64)
    numeric = ((torch.tanh(at + eps) - torch.tanh(at - eps)) / (2 * eps)).log().item()
    assert tanh_log_det(at).item() == pytest.approx(numeric, abs=1e-3)


def test_tanh_log_det_is_finite_and_has_a_gradient_where_float32_tanh_is_exactly_one():
    x = torch.tensor([[60.0, -60.0]], requires_grad=True)
    value = tanh_log_det(x)
    assert value.item() == pytest.approx(2 * 2 * (math.log(2) - 60), rel=1e-5)
    (grad,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(grad, torch.tensor([[-2.0, 2.0]]))


def test_unit_gaussian_entropy():
    assert pytest.approx(Normal(0.0, 1.0).entropy().item()) == UNIT_GAUSSIAN_ENTROPY
