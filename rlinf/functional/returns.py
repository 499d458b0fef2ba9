"""Rewards and discounts of action chunks. Time limits, termination and γ^H are settled here, once.

H actions per chunk
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Bootstrap = Literal["standard", "always"]


def fold_chunk(
    reward: Float[Tensor, "*b H"],
    terminated: Bool[Tensor, "*b H"],
    gamma: float,
    bootstrap: Bootstrap = "standard",
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """R = Σ_{h ≤ end} γ^h r_h and D = γ^H (1 − terminated), so that a backup is R + D·V(s′).

    A time limit leaves D as it is: the last state of a truncated episode still has a value.

    Args:
        reward: one reward per executed action; actions after the end of an episode count nothing.
        terminated: true at the action that ended the episode.
        gamma: discount per environment step.
        bootstrap: `always` also bootstraps from terminal states. It suits tasks whose success ends the
            episode although staying successful would go on paying (ManiSkill's dense rewards).
    """
    chunk = reward.shape[-1]
    powers = gamma ** torch.arange(chunk, dtype=reward.dtype, device=reward.device)
    ended_before = terminated.to(torch.int64).cumsum(-1) - terminated.to(torch.int64)
    folded = (powers * reward * (ended_before == 0)).sum(-1)
    discount = torch.full_like(folded, gamma**chunk)
    if bootstrap == "standard":
        discount = discount * ~terminated.any(-1)
    return folded, discount
