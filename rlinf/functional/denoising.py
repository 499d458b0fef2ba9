"""A flow's denoising steps as Gaussians: they give the action of a π0 the density that a policy gradient needs.

Time as in π0's weights: x_t = t ε + (1 − t) a, from noise at t = 1 to the action at t = 0, with velocity v = ε − a. A
network's v at x_t contains an estimate of both ends,

    â = x − t v,        ε̂ = x + (1 − t) v,

and a step of δ = 1/K to t' = t − δ is one of

    ODE          x' = (1 − t') â + t' ε̂  =  x − δ v
    flow_sde     N((1 − t') â + (t' − σ² δ / 2t) ε̂,  σ² δ),   σ = α √(t / (1 − t))                      [1] [2]
    flow_cps     N((1 − t') â + t' cos(πα/2) ε̂,  (t' sin(πα/2))²)                                          [3]
    flow_noise   N(the ODE's x',  s²),   s from a network                                               [1] [4]

with the noise level α. In flow_sde, whose σ is infinite at t = 1, the next t stands in the denominator there; its x_t
are distributed as the ODE's but for the discretisation. flow_cps replaces a part of the estimated noise by as much new
noise, none in its last step, where t' = 0. (`functional.flow` counts time the other way; its drift-corrected step is
flow_sde's.)

    [1] π_RL, arXiv:2510.25889, §4     [2] Flow-GRPO, arXiv:2505.05470, Eq. 12
    [3] Flow-CPS, arXiv:2509.05952     [4] ReinFlow, arXiv:2505.22094

    B batch, H actions per chunk, A action size, K denoising steps
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rlinf.functional.squash import LOG_SQRT_TAU

NoiseMethod = Literal["flow_sde", "flow_cps", "flow_noise"]


class Step(NamedTuple):
    """N(mean, std²) of x', element by element.

    Attributes:
        mean: [B, H, A].
        std: broadcastable to it; zero for a step that draws nothing.
    """

    mean: Tensor
    std: Tensor


def ends(x: Float[Tensor, "B H A"], velocity: Float[Tensor, "B H A"], t: Tensor) -> tuple[Tensor, Tensor]:
    """(â, ε̂): the action and the noise between which x lies at time t."""
    return x - t * velocity, x + (1 - t) * velocity


def ode_step(x: Float[Tensor, "B H A"], velocity: Float[Tensor, "B H A"], delta: float) -> Float[Tensor, "B H A"]:
    """x − δ v."""
    return x - delta * velocity


def sde_step(
    x: Float[Tensor, "B H A"], velocity: Float[Tensor, "B H A"], t: Float[Tensor, " B"], delta: float, level: Tensor
) -> Step:
    """flow_sde with noise level α; t in [δ, 1]."""
    t = t[:, None, None]
    remaining = torch.where(t > 1 - delta / 2, delta, 1 - t)
    sigma = level * (t / remaining).sqrt()
    action, noise = ends(x, velocity, t)
    after = t - delta
    return Step((1 - after) * action + (after - sigma.square() * delta / (2 * t)) * noise, sigma * math.sqrt(delta))


def cps_step(
    x: Float[Tensor, "B H A"], velocity: Float[Tensor, "B H A"], t: Float[Tensor, " B"], delta: float, level: Tensor
) -> Step:
    """flow_cps with noise level α; the last step, t = δ, draws nothing."""
    t = t[:, None, None]
    after = torch.where(t < 1.5 * delta, 0.0, t - delta)  # without the rounding of t − δ
    action, noise = ends(x, velocity, t)
    angle = 0.5 * math.pi * level
    return Step((1 - after) * action + after * angle.cos() * noise, after * angle.sin())


def noisy_steps(method: NoiseMethod, num_steps: int) -> int:
    """How many of K steps, the first ones, draw anything."""
    return num_steps - 1 if method == "flow_cps" else num_steps


def step_log_prob(after: Float[Tensor, "*b"], step: Step) -> Float[Tensor, "*b"]:
    """log N(x'; mean, std²) of every element; the derivative goes through mean and std."""
    return -0.5 * ((after - step.mean) / step.std).square() - step.std.log() - LOG_SQRT_TAU


def step_entropy(step: Step) -> Tensor:
    """Entropy of every element in nats, in the shape of the mean: ½ log 2πe s²."""
    return (step.std.log() + 0.5 + LOG_SQRT_TAU).expand_as(step.mean)


def std_in_range(x: Tensor, low: float, high: float) -> Tensor:
    """A network's output x → s in [low, high]: tanh, then linear in log s².                              [4]

    exp ½(l + (h − l)(tanh x + 1)/2) with l = log low², h = log high²: `low` at −∞, √(low · high) at 0.
    """
    least, most = 2 * math.log(low), 2 * math.log(high)
    return (0.5 * (least + (most - least) * 0.5 * (x.tanh() + 1))).exp()


def annealed(start: float, end: float, steps: int, now: int) -> float:
    """From `start` to `end` in a straight line over `steps`, and `end` from then on."""
    return start + (end - start) * min(now, steps) / steps
