"""Answers observations with actions, using the newest weights it can get without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rlinf.core import tree
from rlinf.core.protocols import Mode
from rlinf.core.seeding import derive_seed
from rlinf.core.types import ActionOut, Obs
from rlinf.runtime.local import CHANNEL_TIMEOUT_S, Channel, Weights


class ActingNetwork(Protocol):
    """The part of a policy network that acting needs; any `nn.Module` that is an Actor has it."""

    def act(self, obs: Obs, mode: Mode, generator: torch.Generator | None = None) -> ActionOut:
        """See core.protocols.Actor."""
        ...

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> Any:
        """See torch.nn.Module."""
        ...


class RolloutWorker:
    """Hosts a copy of the policy and serves the environments in `sources`, always in that order.

    The fixed order is what makes a run reproducible: all sources draw from one generator.
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
        device: torch.device | str = "cpu",
        timeout_s: float = CHANNEL_TIMEOUT_S,
    ) -> None:
        self.actor, self.obs, self.actions, self.weights = actor, obs, actions, weights
        self.sources, self.generator = list(sources), generator
        self.device, self.timeout_s = device, timeout_s
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
        asking, answers = list(self.sources), 0
        while asking:
            for source in list(asking):
                obs = self.obs.get(key=source, timeout_s=self.timeout_s)
                if obs is None:
                    asking.remove(source)
                    continue
                version = self.refresh()
                out = self.actor.act(tree.to(obs, self.device), mode, self.generator)
                self.actions.put(replace(out, version=version), key=source)
                answers += 1
        return answers

    def checkpoint(self) -> dict[str, Any]:
        """State of the generator, for `restore`."""
        return {"generator": self.generator.get_state()}

    def restore(self, saved: tuple[int, dict[str, Any]]) -> None:
        """Continue from (global step, what `checkpoint` returned then; when empty, noise of that step)."""
        global_step, state = saved
        if state:
            self.generator.set_state(state["generator"])
        else:
            self.generator.manual_seed(derive_seed(self.generator.initial_seed(), f"step/{global_step}"))
