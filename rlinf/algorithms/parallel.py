"""How the weights of a learner lie on its ranks, as an algorithm sees it: `DataParallel`.

`Replicated`: whole on every rank, for all networks that fit into its device. For larger ones `rlinf.algorithms.fsdp`
has `FullySharded`, which an algorithm cannot tell from it. Losses know of neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from rlinf.algorithms.optimize import AnyStepper, OptimizerSettings, Stepper, track
from rlinf.core.protocols import Network
from rlinf.core.ranks import ONE_RANK, Ranks


class Part(Protocol):
    """A network, a stepper, or whatever else an algorithm saves."""

    def state_dict(self) -> dict[str, Any]:
        """Everything by name."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Inverse of `state_dict`."""
        ...


class DataParallel(Protocol):
    """Makes steppers, moves targets, and brings together what is saved. All methods are collective, see `Ranks`."""

    @property
    def ranks(self) -> Ranks:
        """Who learns together."""
        ...

    def stepper(self, parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> AnyStepper:
        """An optimizer of parameters that lie so."""
        ...

    def track(self, target: Network, source: Network, tau: float) -> None:
        """θ̄ ← (1 − τ) θ̄ + τ θ over all parameters."""
        ...

    def copy_of(self, network: Network) -> dict[str, Tensor]:
        """Whole weights and statistics that do not change later; where they are shared out, on rank 0 alone."""
        ...

    def state_of(self, part: Part) -> dict[str, Any]:
        """Its state for a checkpoint, the same however the weights lie; except on rank 0 without what is shared out."""
        ...

    def load(self, part: Part, state: dict[str, Any]) -> None:
        """Inverse of `state_of`, for a state that all ranks have."""
        ...

    def held_of(self, part: Part) -> Mapping[str, Any]:
        """The very tensors of it that this rank keeps between updates."""
        ...

    def missing_passes(self, passes: int) -> int:
        """How many forward passes more than its own `passes` a rank has to make so that all make equally many."""
        ...


@dataclass(frozen=True)
class Replicated:
    """The same whole weights on every rank, kept equal by averaging gradients; see `Stepper`."""

    ranks: Ranks = ONE_RANK

    def stepper(self, parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> Stepper:
        """A `Stepper`."""
        return Stepper(parameters, settings, self.ranks)

    def track(self, target: Network, source: Network, tau: float) -> None:
        """See `optimize.track`."""
        track(target, source, tau)

    def copy_of(self, network: Network) -> dict[str, Tensor]:
        """A copy on the same device, on every rank."""
        return {name: value.detach().clone() for name, value in network.state_dict().items()}

    def state_of(self, part: Part) -> dict[str, Any]:
        """The part's own, on every rank."""
        return part.state_dict()

    def load(self, part: Part, state: dict[str, Any]) -> None:
        """The part's own."""
        part.load_state_dict(state)

    def held_of(self, part: Part) -> Mapping[str, Any]:
        """The part's own state, which is no copy."""
        return part.state_dict()

    def missing_passes(self, passes: int) -> int:
        """None: a forward pass is nobody else's business."""
        return 0
