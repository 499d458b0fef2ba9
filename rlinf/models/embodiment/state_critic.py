"""Action values from the state: the critics of every state-based recipe."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from rlinf.core.types import Obs
from rlinf.models.modules.mlp import ActivationName
from rlinf.models.modules.q_ensemble import QEnsemble
from rlinf.models.modules.running_norm import RunningNorm


class StateCritic(nn.Module):
    """Q_e(s, a) [E, B] from the (normalised) state and the decision.

    Args:
        obs_dim: S.
        decision_dim: size of the flattened decision.
        hidden_dims, num_heads, activation, layer_norm: see `QEnsemble`.
        normalizer: running normalisation of the state, shared with the actor; None for none.
    """

    def __init__(
        self,
        obs_dim: int,
        decision_dim: int,
        *,
        hidden_dims: Sequence[int],
        num_heads: int,
        activation: ActivationName,
        layer_norm: bool,
        normalizer: RunningNorm | None = None,
    ) -> None:
        super().__init__()
        self.normalizer, self.num_heads = normalizer, num_heads
        self.q = QEnsemble(obs_dim + decision_dim, hidden_dims, num_heads, activation=activation, layer_norm=layer_norm)

    def forward(self, obs: Obs, decision: Tensor) -> Tensor:
        """Q values [E, B]."""
        state = obs["state"] if self.normalizer is None else self.normalizer(obs["state"])
        return self.q(state, decision)

    def make_target(self) -> StateCritic:
        """A frozen copy with the same weights that goes on sharing the normaliser."""
        shared = {id(self.normalizer): self.normalizer} if self.normalizer is not None else {}
        return copy.deepcopy(self, shared).requires_grad_(False)
