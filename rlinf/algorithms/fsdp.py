"""Networks that are too large for every device to have whole: `FullySharded`, by torch's `fully_shard` (FSDP2) [1].

Every parameter lies on the ranks by rows (its first axis), with its gradient and its moments. A unit of the network is
gathered when it is computed, forward and backward, and forgotten again; its gradients are averaged and shared out in
one go. What is computed is what one rank would compute on the whole batch.

The optimizer sees this rank's rows alone, as ordinary tensors: Adam is elementwise. Norm and step are those of the
whole gradient.

What is saved has no trace of it. Rank 0 brings weights and moments together, one tensor after the other, in the form in
which a `Stepper` saves them, so the files are those of any learner and are read by any number of ranks. Each takes its
rows from the file. For this rank 0 needs memory for all of it, on the CPU.

Differs from [1]: units of computation in bfloat16 are declared by the network (`core.protocols.ShardUnits`); what
belongs to none, such as heads and deviations, is gathered in float32 and left to autocast.

    [1] Zhao et al. 2023, arXiv:2304.11277, and docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rlinf.algorithms.optimize import LossOf, OptimizerSettings, descend, step_if_finite
from rlinf.algorithms.parallel import Part
from rlinf.core.protocols import Network, ShardUnits
from rlinf.core.ranks import Ranks
from rlinf.core.types import Metrics

ROLE_METHODS = ("sample", "evaluate", "log_prob", "value", "flow_matching_loss")
"""What algorithms call of a network besides `forward`; none of them may call another."""

BY_ROWS = (Shard(0),)
MOMENTS = ("exp_avg", "exp_avg_sq")


def rows_of(length: int, rank: int, size: int) -> slice:
    """Which of `length` rows a rank has: equally many each, the last ones fewer or none."""
    share = -(-length // size)
    return slice(min(rank * share, length), min((rank + 1) * share, length))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory; of any other, itself."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class FullySharded:
    """The weights of several networks, shared out; see `parallel.DataParallel`.

    Args:
        ranks: processes of one torch.distributed group, at least two.
        device: where networks are computed; "cuda" means the current one.
        unit_dtype: what the units that a network declares are gathered and computed in, under autocast; None for the
            type of its weights. Gradients are averaged in float32 in any case.
        reshard_after_forward: forget a unit between forward and backward pass, which takes a second gathering; False:
            keep it, which takes the memory.
        reduce_last_only: average gradients with the last micro-batch of a step alone, which takes the memory of a whole
            gradient on every rank; False: with each.
    """

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device | str,
        *,
        unit_dtype: torch.dtype | None = None,
        reshard_after_forward: bool = True,
        reduce_last_only: bool = True,
    ) -> None:
        self.ranks, self.unit_dtype = ranks, unit_dtype
        self.reshard_after_forward, self.reduce_last_only = reshard_after_forward, reduce_last_only
        self.mesh = init_device_mesh(torch.device(device).type, (ranks.size,))
        # Of every trained parameter: the whole one that takes its place while it is computed, and its unit.
        self._whole: dict[nn.Parameter, tuple[nn.Parameter, FSDPModule]] = {}

    def shard(self, network: nn.Module) -> None:
        """Share out `network`, which all ranks have with equal weights, on any device; buffers stay whole.

        Before anything is made of its parameters. From then on it is computed by all ranks together: each has to make
        the same passes. Collective.
        """
        # The losses change no output of a network in place.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w*\) returned a view tensor", UserWarning)
        share_out = partial(fully_shard, mesh=self.mesh, reshard_after_forward=self.reshard_after_forward)
        precision = MixedPrecisionPolicy()
        if self.unit_dtype is not None:
            precision = MixedPrecisionPolicy(self.unit_dtype, torch.float32, cast_forward_inputs=False)
        for block in network.shard_units() if isinstance(network, ShardUnits) else ():
            share_out(block, mp_policy=precision)
        share_out(network)
        for method in ROLE_METHODS:
            if hasattr(network, method):
                register_fsdp_forward_method(network, method)
        trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        for unit in _units(network) if trained else ():
            unit.unshard()
            for name, parameter in network.named_parameters():
                if name in trained and parameter is not trained[name]:
                    self._whole[trained[name]] = (parameter, unit)
            unit.reshard()

    def whole_parameter(self, parameter: nn.Parameter) -> tuple[nn.Parameter, FSDPModule]:
        """What stands for a sharded parameter in the graph of a loss, always the same one, and its unit."""
        return self._whole[parameter]

    def stepper(self, parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> ShardedStepper:
        """A `ShardedStepper`."""
        return ShardedStepper(parameters, settings, self)

    @torch.no_grad()
    def track(self, target: Network, source: Network, tau: float) -> None:
        """As `optimize.track`, each rank its rows."""
        for network in (target, source):
            assert isinstance(network, nn.Module)
            forget_gathered(_units(network))
        for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
            local(ours).lerp_(local(theirs), tau)

    def gather(self, rows: Tensor, length: int) -> Tensor | None:
        """The whole tensor of `length` rows, on the CPU of rank 0; None on the others. Collective."""
        size = self.ranks.size
        numbers = [part.stop - part.start for part in (rows_of(length, rank, size) for rank in range(size))]
        whole = self.ranks.cat(rows, numbers)
        return whole.cpu() if self.ranks.rank == 0 else None

    def copy_of(self, network: Network) -> dict[str, Tensor]:
        """All weights and statistics on the CPU of rank 0; nothing on the others."""
        state, own = self.state_of(network), network.state_dict()
        if self.ranks.rank != 0:
            return {}
        # What was gathered is a copy already.
        return {
            name: value if isinstance(own[name], DTensor) else value.detach().to("cpu", copy=True)
            for name, value in state.items()
        }

    def state_of(self, part: Part) -> dict[str, Any]:
        """The state of a part. What is sharded is whole on rank 0 and left out on the others."""
        state: dict[str, Any] = {}
        for name, value in part.state_dict().items():
            if isinstance(value, DTensor):
                value = self.gather(local(value), len(value))
            if value is not None:
                state[name] = value
        return state

    def load(self, part: Part, state: dict[str, Any]) -> None:
        """Give a part its state; a sharded one takes its rows of each tensor."""
        if isinstance(part, FSDPModule):
            own = part.state_dict()
            state = {name: self._dealt(own.get(name), value) for name, value in state.items()}
        part.load_state_dict(state)

    def _dealt(self, own: Tensor | None, value: Tensor) -> Tensor:
        """Of `value` what this rank keeps, in the form of `own`; as it is where it does not fit, or is not sharded."""
        if not isinstance(own, DTensor) or own.shape != value.shape:
            return value
        rows = value[rows_of(len(value), self.ranks.rank, self.ranks.size)].to(own)
        return DTensor.from_local(rows, self.mesh, BY_ROWS, run_check=False, shape=own.shape, stride=own.stride())

    def held_of(self, part: Part) -> Mapping[str, Any]:
        """This rank's rows, and what is not sharded."""
        if isinstance(part, ShardedStepper):
            return part.optimizer.state_dict()
        return {name: local(value) if isinstance(value, Tensor) else value for name, value in part.state_dict().items()}

    def missing_passes(self, passes: int) -> int:
        """So many that all make as many as the one with the most."""
        return max(self.ranks.gather(passes)) - passes


class ShardedStepper:
    """What `optimize.Stepper` is, over parameters that are shared out; the optimizer has this rank's rows of them.

    A step whose gradient norm is not finite on whichever rank changes nothing on any.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], settings: OptimizerSettings, shares: FullySharded) -> None:
        self.parameters: list[nn.Parameter] = list(parameters)
        self.settings, self.steps, self._shares = settings, 0, shares
        whole = [shares.whole_parameter(parameter) for parameter in self.parameters]
        self._leaves = [leaf for leaf, _ in whole]
        self._units = list(dict.fromkeys(unit for _, unit in whole))
        self._rows = [nn.Parameter(local(parameter)) for parameter in self.parameters]
        self.optimizer = settings.make_optimizer(self._rows)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.settings.lr * self.settings.scale_at(self.steps)

    def descend(self, loss_of: LossOf, micro_batches: Sequence[Any]) -> Metrics:
        """One step on the mean of `loss_of` over equal micro-batches, see `optimize.Stepper.descend`."""
        return descend(self, loss_of, micro_batches)

    def begin(self) -> None:
        """Forget all gradients."""
        for parameter, rows, leaf in zip(self.parameters, self._rows, self._leaves, strict=True):
            if local(parameter).data_ptr() != rows.data_ptr():
                raise RuntimeError("the parameters were moved after their stepper was made")
            parameter.grad = rows.grad = leaf.grad = None

    def leaves(self, *, last: bool) -> Sequence[nn.Parameter]:
        """The whole parameters that a loss was computed with."""
        for unit in self._units:
            unit.set_requires_gradient_sync(last or not self._shares.reduce_last_only, recurse=False)
        return self._leaves

    @torch.no_grad()
    def apply(self) -> Tensor:
        """Step along the gradients that were added up since `begin`. Returns their norm before clipping."""
        for parameter, rows in zip(self.parameters, self._rows, strict=True):
            # As in a flat gradient, what a loss does not reach has the gradient zero.
            rows.grad = local(parameter.grad) if parameter.grad is not None else torch.zeros_like(rows)
        square = get_total_norm([rows.grad for rows in self._rows if rows.grad is not None]).square()
        norm = self._shares.ranks.sum_(square).sqrt()
        if self.settings.clip_grad is not None:
            clip_grads_with_norm_(self._rows, self.settings.clip_grad, norm)
        step_if_finite(self.optimizer, self.lr, norm)
        for parameter, rows in zip(self.parameters, self._rows, strict=True):
            parameter.grad = rows.grad = None
        forget_gathered(self._units)
        self.steps += 1
        return norm

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """On rank 0 what a `Stepper` of the whole parameters has. Collective."""
        saved = self.optimizer.state_dict()
        [group], state = saved["param_groups"], dict[str, Tensor]()
        if saved["state"]:
            state = {name: self._flat(name) for name in MOMENTS} | {"step": saved["state"][0]["step"]}
        whole = {"state": {0: state} if state else {}, "param_groups": [{**group, "params": [0]}]}
        return {"optimizer": whole, "steps": self.steps} if self._shares.ranks.rank == 0 else {"steps": self.steps}

    def _flat(self, name: str) -> Tensor:
        """The moments of all parameters one after the other, on rank 0; without elements elsewhere."""
        rank = self._shares.ranks.rank
        sizes = [parameter.numel() if rank == 0 else 0 for parameter in self.parameters]
        flat = self._rows[0].new_empty(sum(sizes), device="cpu")
        for parameter, rows, part in zip(self.parameters, self._rows, flat.split(sizes), strict=True):
            whole = self._shares.gather(self.optimizer.state[rows][name], len(parameter))
            if whole is not None:
                part.copy_(whole.flatten())
        return flat

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, also for what a `Stepper` saved."""
        saved, numbers = state["optimizer"], range(len(self._rows))
        own = {}
        if saved["state"]:
            flat = saved["state"][0]
            rows = {name: self._rows_of(flat[name]) for name in MOMENTS}
            own = {i: {"step": flat["step"].clone(), **{name: rows[name][i] for name in MOMENTS}} for i in numbers}
        [group] = saved["param_groups"]
        self.optimizer.load_state_dict({"state": own, "param_groups": [{**group, "params": [*numbers]}]})
        self.steps = state["steps"]

    def _rows_of(self, flat: Tensor) -> list[Tensor]:
        """This rank's part of moments, for each parameter."""
        ranks, sizes = self._shares.ranks, [parameter.numel() for parameter in self.parameters]
        if len(flat) != sum(sizes):
            raise ValueError(f"moments of {len(flat):,} parameters were saved, and there are {sum(sizes):,}")
        return [
            part.view(parameter.shape)[rows_of(len(parameter), ranks.rank, ranks.size)].clone()
            for part, parameter in zip(flat.split(sizes), self.parameters, strict=True)
        ]


def _units(network: nn.Module) -> list[FSDPModule]:
    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def forget_gathered(units: Iterable[FSDPModule]) -> None:
    """Drop what was gathered before the weights changed and is still kept."""
    for unit in units:
        unit.reshard()
