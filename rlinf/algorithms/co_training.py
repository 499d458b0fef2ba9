"""RL-Co: a policy learns in simulation by reinforcement and keeps to demonstrations of the real robot.

    L_Total = L_RL + β L_SFT                                                                             [1]

with the flow-matching loss of the demonstrations as L_SFT. Each micro-batch of PPO is paired with a batch of
demonstrations, and both losses go through one backward pass.

    [1] Beyond Imitation: RL-based sim-real co-training, arXiv:2602.12628

Actions behind the end of a demonstration have no part in it.

B batch, H actions per chunk, A action size of the model, A' of the robot
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from rlinf.algorithms.optimize import load_generator
from rlinf.core import tree
from rlinf.core.ranks import ONE_RANK, Ranks
from rlinf.core.types import Obs
from rlinf.data.chunks import ChunkBatch


class LearnsFromDemos(Protocol):
    """A flow policy that can be trained on demonstrations."""

    noise_shape: tuple[int, ...]

    def flow_matching_loss(self, obs: Obs, actions: Tensor, valid: Tensor, *, noise: Tensor, time: Tensor) -> Tensor:
        """Differentiable scalar; actions [B, H, A'], valid [B, H] as in `ChunkBatch`, noise [B, H, A], time [B]."""
        ...


class Demonstrations:
    """L_SFT on batch after batch of demonstrations, none of them twice.

    Args:
        network: the policy that PPO trains.
        batch: the batch of a number, on the CPU; on every rank its own.
        draw_time: t [B] for a batch of so many, from a generator.
        weight: β.
        device: of the network.
        generator: of noise and time, on `device`; a stream of its own on every rank.
    """

    def __init__(
        self,
        network: LearnsFromDemos,
        batch: Callable[[int], ChunkBatch],
        draw_time: Callable[[int, torch.Generator], Tensor],
        *,
        weight: float,
        device: torch.device | str = "cpu",
        generator: torch.Generator,
    ) -> None:
        self.network, self.batch, self.draw_time = network, batch, draw_time
        self.weight, self.device, self.generator = weight, torch.device(device), generator
        self.batches = 0

    def loss(self) -> Float[Tensor, ""]:
        """L_SFT on the next batch."""
        demos = self.batch(self.batches)
        self.batches += 1
        actions = demos.action.to(self.device)
        shape = (len(actions), *self.network.noise_shape[1:])
        noise = torch.randn(shape, generator=self.generator, device=self.device)
        time = self.draw_time(len(actions), self.generator)
        obs, valid = tree.to(demos.obs, self.device), demos.valid.to(self.device)
        return self.network.flow_matching_loss(obs, actions, valid, noise=noise, time=time)

    def state_dict(self, ranks: Ranks = ONE_RANK) -> dict[str, Any]:
        """How many batches there were, and the generators of all ranks. Collective."""
        return {"batches": self.batches, "generators": ranks.gather(self.generator.get_state())}

    def load_state_dict(self, state: dict[str, Any], ranks: Ranks = ONE_RANK) -> None:
        """Inverse of `state_dict`; with another number of ranks, noise begins anew."""
        self.batches = state["batches"]
        load_generator(self.generator, state, ranks)


def loss_ratio(rl: Tensor, sft: Tensor, weight: float) -> Tensor:
    """β |L_SFT| / |L_RL|: how much more demonstrations pull than the reward does; infinite where L_RL is 0."""
    return weight * sft.abs() / rl.abs()
