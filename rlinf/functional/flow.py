"""Flow matching on the straight path x_t = (1 − t) x_0 + t x_1, from noise (t = 0) to action (t = 1).

A K-step Euler walk with a little Gaussian noise at every step. The noise gives each step a density, so the
whole path (x_0 … x_K) has a likelihood that can be differentiated: SAC's entropy term needs one, and the
density of x_K alone is not available in closed form.

References:
    [1] SAC Flow, arXiv:2509.25756, noise-augmented rollout.
    [2] Flow-GRPO, arXiv:2505.05470: the same corrected step, written in diffusion time 1 − t.
    [3] Flow matching: Lipman et al. 2022, arXiv:2210.02747; rectified flow: Liu et al. 2022, arXiv:2209.03003.

    B batch, A flattened action, K denoising steps
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rlinf.functional.squash import LOG_SQRT_TAU, unit_gaussian_log_prob

Velocity = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Maps (x_k [B, A], k) to (v_k [B, A], s_k): the velocity at t = k/K with the observation bound, and the
standard deviation of the noise that step k adds to x, broadcastable to [B, A]."""


class Path(NamedTuple):
    """The end of a walk and the log density of all of it.

    Attributes:
        end: x_K [B, A], not squashed.
        log_prob: log p(x_0 … x_K) [B].
    """

    end: Tensor
    log_prob: Tensor


def straight_path(
    noise: Float[Tensor, "B ..."], action: Float[Tensor, "B ..."], t: Float[Tensor, " B"]
) -> tuple[Float[Tensor, "B ..."], Float[Tensor, "B ..."]]:
    """x_t = (1 − t) x_0 + t x_1 and its velocity x_1 − x_0, which flow matching regresses on.      [3]"""
    t = t.view(-1, *(1,) * (noise.ndim - 1))
    return torch.lerp(noise, action, t), action - noise


def score(x: Float[Tensor, "B A"], velocity: Float[Tensor, "B A"], t: float) -> Float[Tensor, "B A"]:
    """∇ log p_t(x) of the straight path, read off its velocity: (t v − x) / (1 − t).

    Follows from E[x_0 | x_t] = x_t − t v and ∇ log p_t(x) = −E[x_0 | x_t = x] / (1 − t). Requires t < 1, and
    that v is the velocity of a straight-path flow: exact after flow matching, a parameterisation otherwise.
    """
    return (t * velocity - x) / (1 - t)


def largest_corrected_std(steps: int) -> float:
    """√(2/K): the largest per-step noise for which the corrected step keeps the sign of x at every step.

    The correction takes s² / (2 (1 − t)) of x away. That is most at the last step, where 1 − t = 1/K, and more than
    all of x beyond s² = 2/K: the walk then overshoots. The bound is necessary, not sufficient: where the flow is
    narrow, Var(x_t) < s²/2, a step is too coarse for the correction to be accurate, whatever K.
    """
    return math.sqrt(2 / steps)


def sample_path(
    velocity: Velocity,
    noise: Float[Tensor, "B N A"],
    *,
    drift_correction: bool,
) -> Path:
    """x_{k+1} = x_k + v_k/K [+ ½ s_k² ∇log p_t(x_k)] + s_k ε_k, with the path's log density.   [1]

    log p(path) = log N(x_0; 0, I) + Σ_k log N(x_{k+1}; mean_k, s_k² I). Since x_{k+1} = mean_k + s_k ε_k, a
    step's term is −½ε² − log s_k − ½ log 2π: the derivative is taken through s_k, and through nothing else.

    Args:
        noise: standard normal numbers: x_0 and then ε_0 … ε_{K−1}, so N = K + 1.
        drift_correction: add ½ s² ∇log p_t, which cancels the widening by the noise up to the discretisation
            error O(1/K), so that the end keeps the distribution of the noiseless flow. Needs
            s ≤ `largest_corrected_std(K)`.
    """
    x, *epsilons = noise.unbind(1)
    steps = len(epsilons)
    dt = 1 / steps
    log_prob = unit_gaussian_log_prob(x)
    for k, epsilon in enumerate(epsilons):
        v, std = velocity(x, k)
        mean = x + v * dt
        if drift_correction:
            mean = mean + 0.5 * std.square() * score(x, v, k * dt)
        x = mean + std * epsilon
        log_prob = log_prob - (0.5 * epsilon.square() + std.log() + LOG_SQRT_TAU).sum(-1)
    return Path(x, log_prob)


def integrate(velocity: Velocity, noise: Float[Tensor, "B A"], *, steps: int) -> Float[Tensor, "B A"]:
    """x_K of the noiseless walk x_{k+1} = x_k + v_k/K: the flow's ODE by Euler's method."""
    x = noise
    for k in range(steps):
        v, _ = velocity(x, k)
        x = x + v / steps
    return x
