"""Behaviour cloning of a flow policy: flow matching on the actions of demonstrations.

Straight paths lead from Gaussian noise to the demonstrated chunk; the network learns their mean velocity (Lipman et al.
2022, arXiv:2210.02747). With enough data the walk along it has the demonstrations' distribution of actions.

    B batch, H actions per chunk, A action size
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlinf.algorithms.optimize import OptimizerSettings, Stepper, load_generator, load_parts
from rlinf.algorithms.parallel import Replicated
from rlinf.core import tree
from rlinf.core.protocols import Network
from rlinf.core.ranks import ONE_RANK
from rlinf.core.types import Metrics, Obs
from rlinf.data.chunks import ChunkBatch
from rlinf.functional.flow import straight_path


class FlowModel(Protocol):
    """A network that knows where noise should move."""

    def velocity(self, obs: Obs, x: Tensor, t: Tensor) -> Tensor:
        """v [B, H, A] at x [B, H, A] and time t [B] in [0, 1]."""
        ...


class FlowNetwork(FlowModel, Network, Protocol):
    """A trainable one."""


def flow_matching_loss(
    model: FlowModel,
    obs: Obs,
    action: Float[Tensor, "B H A"],
    valid: Bool[Tensor, "B H"],
    noise: Float[Tensor, "B H A"],
    t: Float[Tensor, " B"],
) -> tuple[Float[Tensor, ""], Metrics]:
    """J(θ) = E ‖v_θ(s, x_t, t) − (a − ε)‖² / A with x_t = (1 − t) ε + t a, over the valid actions.

    Args:
        noise: ε, standard normal.
        t: uniform in [0, 1].
    """
    x, velocity = straight_path(noise, action, t)
    error = (model.velocity(obs, x, t) - velocity).square().mean(-1)
    loss = (error * valid).sum() / valid.sum()
    return loss, {"flow_loss": loss.detach()}


class FlowCloning:
    """The stateful half: an optimizer and the randomness of the loss.

    Args:
        model: network on `device`.
        optim: its optimizer.
        device: where batches go.
        generator: of noise and time, on `device`.
    """

    def __init__(
        self,
        model: FlowNetwork,
        optim: OptimizerSettings,
        *,
        device: torch.device | str = "cpu",
        generator: torch.Generator,
    ) -> None:
        self.model, self.device, self.generator = model, torch.device(device), generator
        self.stepper = Stepper(model.parameters(), optim)

    def update(self, batch: ChunkBatch) -> Metrics:
        """One gradient step."""
        action, valid = batch.action.to(self.device), batch.valid.to(self.device)
        noise = torch.randn(action.shape, generator=self.generator, device=self.device)
        t = torch.rand(len(action), generator=self.generator, device=self.device)
        obs = tree.to(batch.obs, self.device)
        stats = self.stepper.descend(lambda _: flow_matching_loss(self.model, obs, action, valid, noise, t), [None])
        return {f"bc/{name}": value for name, value in stats.items()}

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments and generator."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        return state | {"generators": [self.generator.get_state()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`. Raises CheckpointError naming the part that is missing or does not fit."""
        load_parts(self._parts(), state, Replicated().load)
        load_generator(self.generator, state, ONE_RANK)

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optim": self.stepper}
