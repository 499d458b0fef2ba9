"""One gradient step, the same everywhere: accumulate over micro-batches, clip by the true norm, step.

Gradients are accumulated into the parameters of one network alone (`backward(inputs=...)`), from zero. So a loss that
runs through other networks (the actor's, through the critics) leaves nothing behind in them, and neither the step
nor its norm can contain gradients of an earlier loss.

The parameters of a network, and their gradients, are views of one flat tensor each. Norm, clipping, Adam and the
tracking of a target are then one operation instead of one for every parameter, which for the small networks of RL
is a sixth of an update; a gradient cannot be laid out in memory unlike its parameter, which the fused
optimizers, that read both as if they were not, take without complaint; and over several ranks one all-reduce makes
it the gradient of the whole batch.
"""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from rlinf.core.errors import CheckpointError
from rlinf.core.protocols import Network
from rlinf.core.ranks import ONE_RANK, Ranks
from rlinf.core.types import Metrics

Scheduler = Literal["torch_constant", "constant", "torch_cosine", "cosine"]

LossOf = Callable[[Any], tuple[Tensor, Metrics]]
"""Maps a micro-batch to (loss, statistics)."""


@dataclass(frozen=True)
class OptimizerSettings:
    """Adam and its schedule.

    Attributes:
        lr: learning rate after warm-up.
        betas, eps: Adam's decay rates and denominator term.
        weight_decay: decoupled (AdamW) when positive.
        clip_grad: largest global gradient norm; None for no clipping.
        lr_scheduler: `constant`, or `cosine` down to `min_lr` at `total_training_steps`; the `torch_` spellings
            are the same two.
        lr_warmup_steps: steps of linear warm-up from zero.
        total_training_steps: length of the cosine; needed by it alone.
        min_lr: where the cosine ends.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float | None = None
    lr_scheduler: Scheduler = "torch_constant"
    lr_warmup_steps: int = 0
    total_training_steps: int | None = None
    min_lr: float = 0.0

    def scale_at(self, step: int) -> float:
        """Learning rate at `step`, as a share of `lr`."""
        if step < self.lr_warmup_steps:
            return (step + 1) / self.lr_warmup_steps
        if not self.lr_scheduler.endswith("cosine") or self.total_training_steps is None:
            return 1.0
        span = max(1, self.total_training_steps - self.lr_warmup_steps)
        progress = min(1.0, (step - self.lr_warmup_steps) / span)
        floor = self.min_lr / self.lr
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def make_optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Adam:
        """Adam, or AdamW; one kernel for all parameters."""
        adam = torch.optim.AdamW if self.weight_decay > 0 else torch.optim.Adam
        return adam(parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True)


class AnyStepper(Protocol):
    """An optimizer with everything that belongs to its step: `Stepper`, or that of `fsdp` over sharded parameters."""

    parameters: list[nn.Parameter]
    steps: int

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        ...

    def descend(self, loss_of: LossOf, micro_batches: Sequence[Any]) -> Metrics:
        """One step on the mean of `loss_of` over equal micro-batches, see `Stepper.descend`."""
        ...

    def begin(self) -> None:
        """Start from no gradient."""
        ...

    def leaves(self, *, last: bool) -> Sequence[nn.Parameter]:
        """What the next backward pass adds gradients to; `last`: that of the last micro-batch before `apply`."""
        ...

    def apply(self) -> Tensor:
        """Step along the gradients that were added up since `begin`. Returns their norm before clipping."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Moments and step count."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        ...


def flatten(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One contiguous tensor [P] of which every parameter is a view, in their order.

    Parameters that are not so yet are moved there. They have to be of one type and device and to stay on it:
    `module.to(...)` would take them apart again.
    """
    sizes = [parameter.numel() for parameter in parameters]
    if not _are_flat(parameters, sizes):
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        for parameter, view in zip(parameters, flat.split(sizes), strict=True):
            parameter.data = view.view(parameter.shape)
    return parameters[0].detach().as_strided((sum(sizes),), (1,))


def _are_flat(parameters: Sequence[nn.Parameter], sizes: Sequence[int]) -> bool:
    storage, offset = parameters[0].untyped_storage().data_ptr(), parameters[0].storage_offset()
    for parameter, size in zip(parameters, sizes, strict=True):
        place = (parameter.untyped_storage().data_ptr(), parameter.storage_offset())
        if place != (storage, offset) or not parameter.is_contiguous():
            return False
        offset += size
    return True


class Stepper:
    """An optimizer with everything that belongs to its step, over a fixed list of parameters.

    From then on they live in `flat`, see `flatten`.

    A step whose gradient norm is not finite changes neither weights nor moments: on every device, without a
    synchronisation. The norm itself is returned, so the caller sees it and can stop.

    Over several `ranks` the step, its norm and the decision above are those of the mean of their gradients, so ranks
    that begin with the same weights keep the same. The statistics of the losses stay those of the own batch.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], settings: OptimizerSettings, ranks: Ranks = ONE_RANK
    ) -> None:
        self.parameters: list[nn.Parameter] = list(parameters)
        self.settings, self.ranks, self.steps = settings, ranks, 0
        self.flat = nn.Parameter(flatten(self.parameters))
        self.flat.grad = torch.zeros_like(self.flat)
        sizes = [parameter.numel() for parameter in self.parameters]
        self._grads = [
            grad.view(parameter.shape)
            for grad, parameter in zip(self.flat.grad.split(sizes), self.parameters, strict=True)
        ]
        self.optimizer = settings.make_optimizer([self.flat])

    def descend(self, loss_of: LossOf, micro_batches: Sequence[Any]) -> Metrics:
        """One step on the mean of `loss_of` over equal micro-batches.

        Returns the means of its statistics over them, with `grad_norm` (before clipping) and `lr`.
        """
        return descend(self, loss_of, micro_batches)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.settings.lr * self.settings.scale_at(self.steps)

    def begin(self) -> None:
        """Set the gradients to zero, in the place where `apply` expects them: backward adds to them in place."""
        if self.parameters[0].data_ptr() != self.flat.data_ptr():
            raise RuntimeError("the parameters were moved after their Stepper was made: move the network first")
        assert self.flat.grad is not None
        self.flat.grad.zero_()
        for parameter, grad in zip(self.parameters, self._grads, strict=True):
            parameter.grad = grad

    def leaves(self, *, last: bool) -> Sequence[nn.Parameter]:
        """The parameters; ranks meet in `apply` alone, whichever is the `last` pass."""
        return self.parameters

    def apply(self) -> Tensor:
        """Step along the gradients that were added up since `begin`. Returns their norm before clipping."""
        assert self.flat.grad is not None
        grad = self.ranks.mean_(self.flat.grad)
        norm = torch.linalg.vector_norm(grad)
        if self.settings.clip_grad is not None:
            grad.mul_((self.settings.clip_grad / (norm + 1e-6)).clamp(max=1.0))
        self._move(norm)
        for parameter in self.parameters:
            parameter.grad = None
        self.steps += 1
        return norm

    def _move(self, norm: Tensor) -> None:
        """`step_if_finite`, by Adam's function alone once its moments are there.

        What torch's class does around it takes longer than the step itself of a small network.
        """
        state = self.optimizer.state[self.flat]
        if not state or self.settings.weight_decay > 0:  # AdamW's function has another name in older torch
            step_if_finite(self.optimizer, self.lr, norm)
            return
        group, flat = self.optimizer.param_groups[0], self.flat
        group["lr"] = self.lr
        assert flat.grad is not None
        with torch.no_grad():
            adam(
                [flat],
                [flat.grad],
                [state["exp_avg"]],
                [state["exp_avg_sq"]],
                [],
                [state["step"]],
                fused=True,
                found_inf=(~torch.isfinite(norm)).to(torch.float32),
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=self.lr,
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )

    def state_dict(self) -> dict[str, Any]:
        """Moments and step count."""
        return {"optimizer": self.optimizer.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        # A copy: torch would keep the given tensors, which may be another's, or a file that is mapped into memory.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.steps = state["steps"]


def descend(stepper: AnyStepper, loss_of: LossOf, micro_batches: Sequence[Any]) -> Metrics:
    """See `Stepper.descend`."""
    stepper.begin()
    metrics = accumulate(loss_of, micro_batches, [stepper])
    lr, norm = stepper.lr, stepper.apply()
    return metrics | {"grad_norm": norm, "lr": lr}


def step_if_finite(optimizer: torch.optim.Optimizer, lr: float, norm: Tensor) -> None:
    """A step of a fused optimizer, that does nothing where the gradient's norm is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    # The fused optimizers skip the step where this flag is 1 (torch.amp.GradScaler relies on the same).
    optimizer.found_inf = (~torch.isfinite(norm)).to(torch.float32)  # type: ignore[attr-defined]
    optimizer.step()


def accumulate(
    loss_of: LossOf,
    micro_batches: Sequence[Any],
    steppers: Sequence[AnyStepper],
    shares: Sequence[float] | None = None,
) -> Metrics:
    """Add the gradients of a mean loss to those of `steppers` and to nothing else.

    Args:
        shares: weight of each micro-batch; None for equal ones.

    Returns the mean of the statistics, weighted alike.
    """
    metrics: Metrics = {}
    weighted = zip(micro_batches, shares or [1 / len(micro_batches)] * len(micro_batches), strict=True)
    for number, (micro_batch, share) in enumerate(weighted, start=1):
        loss, stats = loss_of(micro_batch)
        last = number == len(micro_batches)
        leaves = [leaf for stepper in steppers for leaf in stepper.leaves(last=last)]
        (loss * share if share < 1 else loss).backward(inputs=leaves)
        if share == 1:
            metrics = stats
        else:
            metrics = {name: metrics.get(name, 0.0) + value * share for name, value in stats.items()}
    return metrics


@torch.no_grad()
def track(target: Network, source: Network, tau: float) -> None:
    """θ̄ ← (1 − τ) θ̄ + τ θ over all parameters.

    Both must be float32: with τ = 0.005 the increments fall below the resolution of bfloat16 and a target kept
    in it stands still. Both are moved into flat tensors, see `flatten`.
    """
    flatten(list(target.parameters())).lerp_(flatten(list(source.parameters())), tau)


def load_generator(generator: torch.Generator, state: Mapping[str, Any], ranks: Ranks) -> None:
    """Take up this rank's stream of random numbers where `state` was saved, by as many ranks.

    By another number of ranks, the generator is left at the beginning of the stream that it was made for.
    """
    # Checkpoints of before there were several ranks have one state.
    states = state["generators"] if "generators" in state else [state["generator"]]
    if len(states) == ranks.size:
        generator.set_state(states[ranks.rank].cpu())


def load_parts(parts: Mapping[str, Any], state: Mapping[str, Any], load: Callable[[Any, Any], None]) -> None:
    """`load(part, its state)` for every part of an algorithm. Raises CheckpointError naming one that does not fit."""
    for name, part in parts.items():
        if name not in state:
            raise CheckpointError(f"the checkpoint has no {name!r}: it was written by another algorithm")
        try:
            load(part, state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = textwrap.shorten(str(error), 300, placeholder=" ...")  # torch lists every tensor
            raise CheckpointError(
                f"{name!r} in the checkpoint does not fit this configuration ({reason}); "
                "resume with the configuration that wrote it, kept as config.yaml in its run directory"
            ) from error
