"""Densities of Gaussians and of their image under tanh.

A action size
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LOG_SQRT_TAU = 0.5 * math.log(2 * math.pi)

UNIT_GAUSSIAN_ENTROPY = 0.5 + LOG_SQRT_TAU
"""Entropy of N(0, 1) in nats, ½ log(2πe) ≈ 1.4189."""


def gaussian_log_prob(
    x: Float[Tensor, "*b A"], mean: Float[Tensor, "*b A"], std: Float[Tensor, "*b A"]
) -> Float[Tensor, "*b"]:
    """log N(x; mean, diag(std²)), summed over the last axis."""
    return (-0.5 * ((x - mean) / std).square() - std.log() - LOG_SQRT_TAU).sum(-1)


def unit_gaussian_log_prob(x: Float[Tensor, "*b A"]) -> Float[Tensor, "*b"]:
    """log N(x; 0, I), summed over the last axis."""
    return (-0.5 * x.square() - LOG_SQRT_TAU).sum(-1)


def tanh_log_det(x: Float[Tensor, "*b A"]) -> Float[Tensor, "*b"]:
    """log |det ∂tanh(x)/∂x| = Σ log(1 − tanh²x), finite for every finite x.

    Written as 2 (log 2 − x − softplus(−2x)): the literal form loses all precision once |x| > 8 or so, where a
    saturated gripper command lives.
    """
    return 2 * (math.log(2) - x - F.softplus(-2 * x)).sum(-1)
