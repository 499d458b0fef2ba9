"""The temperature α of maximum-entropy RL, kept positive by a parameterisation.

softplus   α = log(1 + e^θ)
exp        α = e^θ
fixed      α is the initial one
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AlphaType = Literal["softplus", "exp", "fixed"]


class Temperature(nn.Module):
    """α(θ), differentiable in θ unless it is fixed.

    Args:
        alpha_type: parameterisation.
        initial_alpha: α at the start, positive (zero is allowed when fixed).
    """

    def __init__(self, alpha_type: AlphaType, initial_alpha: float) -> None:
        super().__init__()
        self.alpha_type = alpha_type
        theta = {
            "softplus": lambda a: math.log(math.expm1(a)) if a < 30 else a,
            "exp": math.log,
            "fixed": float,
        }[alpha_type](initial_alpha)
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float32), requires_grad=alpha_type != "fixed")

    def forward(self) -> Tensor:
        """α, a 0-d tensor."""
        if self.alpha_type == "softplus":
            return F.softplus(self.theta)
        return self.theta.exp() if self.alpha_type == "exp" else self.theta
