"""Answers observations with actions, using the newest weights it can get without waiting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlinf.core import tree
from rlinf.core.protocols import Mode
from rlinf.core.seeding import derive_seed
from rlinf.core.types import ActionOut, Obs
from rlinf.runtime.local import CHANNEL_TIMEOUT_S, Channel, Weights
from rlinf.workers.offload import Offload


class ActingNetwork(Protocol):
    """The part of a policy network that acting needs; any `nn.Module` that is an Actor has it."""

    noise_shape: tuple[int, ...]

    def act(self, obs: Obs, mode: Mode, noise: Tensor | None = None) -> ActionOut:
        """See core.protocols.Actor."""
        ...

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> Any:
        """See torch.nn.Module."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """See torch.nn.Module."""
        ...


@runtime_checkable
class HoldsMore(Protocol):
    """A policy that keeps more on its device than its state."""

    def held(self) -> Any:
        """All tensors that acting needs, in nested dicts and lists; not copied."""
        ...


@runtime_checkable
class ActsByNoise(Protocol):
    """A policy that evaluation gives noise, too, where `eval_noise` says so: the same in every evaluation."""

    eval_noise: bool


class RolloutWorker:
    """Hosts a copy of the policy and serves the environments in `sources`, always in that order.

    The fixed order is what makes a run reproducible: all sources draw from one generator.

    Exploration may be correlated in time: z_{t+1} = ρ z_t + √(1 − ρ²) ξ_t per environment, with ρ =
    `noise_correlation`. Each z_t alone stays standard normal, so each decision alone stays distributed as the
    policy says; but consecutive ones push the same way, which reaches further than white noise does (Eberhard et
    al. 2023, "Pink noise is all you need", compare such processes).

    With `offload` the network's memory on `device` is free while nothing is served.
    """

    def __init__(
        self,
        actor: ActingNetwork,
        obs: Channel,
        actions: Channel,
        weights: Weights,
        *,
        sources: Sequence[tuple[int, int]],
        generator: torch.Generator,
        noise_correlation: float = 0.0,
        device: torch.device | str = "cpu",
        timeout_s: float = CHANNEL_TIMEOUT_S,
        offload: bool = False,
    ) -> None:
        self.actor, self.obs, self.actions, self.weights = actor, obs, actions, weights
        self.sources, self.generator = list(sources), generator
        self.device, self.timeout_s = device, timeout_s
        self.noise_correlation = noise_correlation
        held = actor.held if isinstance(actor, HoldsMore) else actor.state_dict
        self._offload = Offload(held, device) if offload else None
        self._noise: dict[tuple[int, int], Tensor] = {}
        self.version = -1
        # Batches are small here, and a second OpenMP thread would spin against the learner's.
        torch.set_num_threads(1)

    def refresh(self) -> int:
        """Take over newer weights if there are any. Returns the version that acts."""
        if (new := self.weights.newer_than(self.version)) is not None:
            version, state = new
            self.actor.load_state_dict(state)
            self.version = version
        return self.version

    @torch.no_grad()
    def serve(self, mode: Mode) -> int:
        """Answer every source until it says (by None) that it asks no more. Returns the number of answers."""
        if self._offload is None:
            return self._serve(mode)
        self._offload.come_back()
        try:
            return self._serve(mode)
        finally:
            self._offload.leave()

    def _serve(self, mode: Mode) -> int:
        asking, answers = list(self.sources), 0
        draws = mode == "train"
        if not draws and isinstance(self.actor, ActsByNoise) and self.actor.eval_noise:
            self.generator.manual_seed(self.generator.initial_seed())
            draws = True
        while asking:
            for source in list(asking):
                obs = self.obs.get(key=source, timeout_s=self.timeout_s)
                if obs is None:
                    asking.remove(source)
                    continue
                version = self.refresh()
                noise = self._draw(source, _rows(obs)) if draws else None
                out = self.actor.act(tree.to(obs, self.device), mode, noise)
                self.actions.put(replace(out, version=version), key=source)
                answers += 1
        return answers

    def _draw(self, source: tuple[int, int], rows: int) -> Tensor:
        """Standard normal numbers [rows, *noise_shape], correlated with the source's previous ones."""
        shape = (rows, *self.actor.noise_shape)
        fresh = torch.randn(shape, generator=self.generator, device=self.generator.device)
        last, rho = self._noise.get(source), self.noise_correlation
        noise = fresh if last is None or rho == 0 else rho * last + math.sqrt(1 - rho**2) * fresh
        self._noise[source] = noise
        return noise

    def abandon(self, name: str) -> None:
        """Forget the segment that was interrupted; exploration goes on with noise of its own, seeded by `name`."""
        self._noise.clear()
        self.generator.manual_seed(derive_seed(self.generator.initial_seed(), name))

    def checkpoint(self) -> dict[str, Any]:
        """State of the generator, for `restore`. The noise of the past is forgotten, here as there."""
        self._noise.clear()
        return {"generator": self.generator.get_state()}

    def restore(self, saved: tuple[int, dict[str, Any]]) -> None:
        """Continue from (global step, what `checkpoint` returned then; when empty, noise of that step)."""
        global_step, state = saved
        self._noise.clear()
        if state:
            self.generator.set_state(state["generator"])
        else:
            self.generator.manual_seed(derive_seed(self.generator.initial_seed(), f"step/{global_step}"))


def _rows(obs: Obs) -> int:
    """N of an observation."""
    return len(next(leaf for _, leaf in tree.leaves(obs)))
