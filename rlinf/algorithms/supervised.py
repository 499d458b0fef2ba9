"""Supervised fine-tuning of a flow VLA on demonstrations: flow matching, and an average of the weights.

    J(θ) = E |v_θ(s, x_t, t) − u|²,   x_t = t ε + (1 − t) a,   u = ε − a                                  [1]

over the robot's numbers of the actions before the end of their episode. The average θ̄ ← d θ̄ + (1 − d) θ is kept in
float32; it is what acts and what is exported.

    [1] π0: A Vision-Language-Action Flow Model for General Robot Control, arXiv:2410.24164

B batch, R noises per example, H actions per chunk, A action size of the model, A' of the robot
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from rlinf.algorithms.optimize import OptimizerSettings, Stepper, accumulate, flatten, load_generator, load_parts
from rlinf.algorithms.parallel import Replicated
from rlinf.core import tree
from rlinf.core.errors import CheckpointError
from rlinf.core.protocols import Network
from rlinf.core.ranks import ONE_RANK
from rlinf.core.types import Metrics, Obs
from rlinf.data.chunks import ChunkBatch


class ClonedNetwork(Network, Protocol):
    """A flow VLA that can be trained on demonstrations.

    Attributes:
        noise_shape: (R, H, A).
    """

    noise_shape: tuple[int, ...]

    def flow_matching_loss(self, obs: Obs, actions: Tensor, valid: Tensor, *, noise: Tensor, time: Tensor) -> Tensor:
        """[B, R, H], 0 where not valid; actions [B, H, A'], valid [B, H], noise [B, R, H, A], time [B, R]."""
        ...


class SupervisedTuning:
    """The stateful half: an optimizer, the average of the weights, and the randomness of the loss.

    Args:
        network: on `device`, float32; what needs no gradient stays as it is.
        optim: its optimizer.
        draw_time: t [n], from a generator.
        micro_batch_size: examples whose activations are kept at a time; None for the whole batch. The update does not
            depend on it, but for rounding.
        ema_decay: d of the average; None for none. In the first updates it is (1 + n) / (10 + n) where that is less,
            so that the average does not remember where training began.
        autocast: compute in bfloat16; weights, gradients and moments stay float32.
        device: where batches go.
        generator: of noise and time, on `device`.
    """

    def __init__(
        self,
        network: ClonedNetwork,
        optim: OptimizerSettings,
        draw_time: Callable[[int, torch.Generator], Tensor],
        *,
        micro_batch_size: int | None = None,
        ema_decay: float | None = None,
        autocast: bool = False,
        device: torch.device | str = "cpu",
        generator: torch.Generator,
    ) -> None:
        self.network, self.draw_time, self.micro_batch_size = network, draw_time, micro_batch_size
        self.ema_decay, self.autocast = ema_decay, autocast
        self.device, self.generator = torch.device(device), generator
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.stepper = Stepper(self.trained, optim)
        self.average = None if ema_decay is None else flatten(self.trained).clone()

    def update(self, batch: ChunkBatch, groups: Mapping[str, slice] | None = None) -> Metrics:
        """One gradient step on the mean over all valid actions of the batch.

        `groups` names rows whose loss is told apart, as `sft_loss/<name>`.
        """
        rows, repeats = len(batch.action), self.network.noise_shape[0]
        noise = torch.randn(rows, *self.network.noise_shape, generator=self.generator, device=self.device)
        time = self.draw_time(rows * repeats, self.generator).view(rows, repeats)
        size = self.micro_batch_size or rows
        parts = [torch.arange(begin, min(begin + size, rows)) for begin in range(0, rows, size)]
        shares = [(batch.valid[part].sum() / batch.valid.sum()).item() for part in parts]
        of_rows = torch.zeros(rows, device=self.device)  # sum of the loss over each example's actions

        def loss_of(part: Tensor) -> tuple[Tensor, Metrics]:
            obs, valid = tree.to(tree.index(batch.obs, part), self.device), batch.valid[part].to(self.device)
            action, here = batch.action[part].to(self.device), part.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                error = self.network.flow_matching_loss(obs, action, valid, noise=noise[here], time=time[here])
            of_rows[here] = error.detach().float().sum(-1).mean(-1)
            loss = error.float().sum() / (valid.sum() * repeats)
            return loss, {"sft_loss": loss.detach()}

        self.stepper.begin()
        stats = accumulate(loss_of, parts, [self.stepper], shares)
        lr, norm = self.stepper.lr, self.stepper.apply()
        self._follow()
        counts = batch.valid.sum(1).to(self.device)
        for name, where in (groups or {}).items():
            stats[f"sft_loss/{name}"] = of_rows[where].sum() / counts[where].sum()
        return stats | {"grad_norm": norm, "lr": lr}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the network's weights are the average, where there is one; only to be read."""
        if self.average is None:
            yield
            return
        swap_(flatten(self.trained), self.average)
        try:
            yield
        finally:
            swap_(flatten(self.trained), self.average)

    @torch.no_grad()
    def _follow(self) -> None:
        if self.average is not None and self.ema_decay is not None:
            updates = self.stepper.steps
            decay = min(self.ema_decay, (1 + updates) / (10 + updates))
            self.average.lerp_(flatten(self.trained), 1 - decay)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Trained weights, their average, moments and generator.

        The weights and the average are copies on the CPU: beside what learns, a GPU has no room for another of each.
        """
        state: dict[str, Any] = {"weights": _copy_on_cpu(flatten(self.trained)), "optim": self.stepper.state_dict()}
        if self.average is not None:
            state["average"] = _copy_on_cpu(self.average)
        return state | {"generators": [self.generator.get_state()]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`. Raises CheckpointError naming the part that is missing or does not fit."""
        places = {"weights": flatten(self.trained)} | ({} if self.average is None else {"average": self.average})
        for name, place in places.items():
            found = state.get(name)
            if not isinstance(found, Tensor) or found.shape != place.shape:
                raise CheckpointError(
                    f"{name!r} in the checkpoint does not fit this configuration; resume with the configuration that "
                    "wrote it, kept as config.yaml in its run directory"
                )
            place.copy_(found)
        load_parts({"optim": self.stepper}, state, Replicated().load)
        load_generator(self.generator, state, ONE_RANK)


def _copy_on_cpu(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True)


@torch.no_grad()
def swap_(one: Tensor, other: Tensor, size: int = 1 << 24) -> None:
    """Exchange the values of two vectors, with memory for `size` numbers."""
    for begin in range(0, len(one), size):
        part = slice(begin, begin + size)
        kept = one[part].clone()
        one[part] = other[part]
        other[part] = kept
