"""Generalised advantage estimation.

[1] Schulman et al. 2016, arXiv:1506.02438

T time    N environments
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def gae(
    reward: Float[Tensor, "T N"],
    discount: Float[Tensor, "T N"],
    done: Bool[Tensor, "T N"],
    value: Float[Tensor, "T N"],
    next_value: Float[Tensor, "T N"],
    lam: float,
    gamma: float,
) -> tuple[Float[Tensor, "T N"], Float[Tensor, "T N"]]:
    """Advantages A_t = δ_t + γ λ (1 − done_t) A_{t+1} and returns A_t + V_t,  δ_t = r_t + D_t V′_t − V_t.   [1, Eq. 16]

    Two different things end a sum. `discount` D = γ (1 − terminated) says whether the state after the step has a
    value: it has one after a time limit. `done` says that the next row belongs to another episode, whose advantages
    are not this one's.

    Args:
        reward, discount: of a decision, as `functional.returns.fold_chunk` gives them.
        done: the episode ended with this decision, for either reason.
        value: V(s_t).
        next_value: V of the true state after the decision: at the end of an episode that is its last observation and
            not the first of the next one.
        lam: λ.
        gamma: discount of one whole decision, γ^H for a chunk of H actions.
    """
    delta = reward + discount * next_value - value
    carried = gamma * lam * (~done).to(delta.dtype)
    advantage = torch.empty_like(delta)
    later = torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        later = delta[t] + carried[t] * later
        advantage[t] = later
    return advantage, advantage + value
