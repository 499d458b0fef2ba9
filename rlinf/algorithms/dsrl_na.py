"""DSRL with noise aliasing (DSRL-NA) [1]: what is learned of actions is passed on to all noise that leads to them.

Many w make nearly the same chunk a, so a critic of noise learns the same thing many times over. Here rewards teach a
critic of actions, and noise is judged by what the decoder makes of it:

    Q^A(s, a)   of executed chunks: J = E (Q^A(s, a) − y)²,  y = r + D (Q̄^A(s′, decode(s′, w′)) − α log π^W(w′|s′))
    Q^W(s, w)   of noise:           J = E (Q^W(s, w) − Q^A(s, decode(s, w)))²,  w ~ N(0, I)
    π^W(w|s)    of noise:           J = E [α log π^W(w|s) − Q^W(s, w)]

The first is SAC's critic loss where the actor is one that decodes, the last is SAC's actor loss where the critic is
Q^W; so they are those of `sac.py`. Nothing is differentiated through the decoder. Since Q^A learns from actions, the
replay buffer holds executed chunks and no noise, and may begin with anybody's.

Differs from [1]'s implementation: there Q^W takes its steps after a round of the others' (ten after 20 or 30), here
after each of them.

    [1] DSRL, Wagenmaker et al. 2025, arXiv:2506.15799, algorithm 1.

    B batch, D size of w, E critics, H actions per chunk, A action size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlinf.algorithms.optimize import OptimizerSettings, load_parts
from rlinf.algorithms.sac import SAC, Samples
from rlinf.core.protocols import Buffer, Critic, CriticNetwork
from rlinf.core.types import Metrics, Obs, Trajectory, Transition

Decode = Callable[[Obs, Tensor], Tensor]
"""Whole observations and w [B, D] → chunks [B, H, A]: a function of both, without gradients."""


@dataclass(frozen=True)
class DecodedActor:
    """π^W followed by the decoder: samples chunks of actions, with the density of the noise."""

    actor: Samples
    decode: Decode

    def sample(self, obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Flattened chunks [B, H·A] and log π^W(w|s) [B]; noise [B, D]. The chunks carry no gradient."""
        latent, log_prob = self.actor.sample(obs, noise)
        return self.decode(obs, latent.detach()).flatten(1), log_prob


def noise_critic_loss(
    noise_critic: Critic, critic: Critic, decode: Decode, obs: Obs, latent: Float[Tensor, "B D"]
) -> tuple[Float[Tensor, ""], Metrics]:
    """J(Q^W) = E (Q^W_e(s, w) − Q^A_e(s, decode(s, w)))², head by head; Q^A is not moved by it.

    Args:
        latent: w, drawn from N(0, I).
    """
    with torch.no_grad():
        target = critic(obs, decode(obs, latent).flatten(1))
    loss = (noise_critic(obs, latent) - target).square().mean()
    return loss, {"noise_critic_loss": loss.detach(), "q_decoded": target.mean()}


class NoiseAliasing:
    """SAC on Q^A and π^W, and a critic of noise between the two.

    Args:
        sac: with Q^A as its critic, a `DecodedActor` as its `backup_actor` and Q^W as its `policy_critic`.
        noise_critic: Q^W, with as many heads as Q^A.
        decode: the frozen decoder.
        optim: of Q^W.
        steps: of Q^W in each update, each on states of its own.
    """

    def __init__(
        self, sac: SAC, noise_critic: CriticNetwork, decode: Decode, *, optim: OptimizerSettings, steps: int = 1
    ) -> None:
        if sac.policy_critic is not noise_critic:
            raise ValueError("the policy must learn from the noise critic: give it to SAC as policy_critic")
        self.sac, self.noise_critic, self.decode, self.steps = sac, noise_critic, decode, steps
        self.noise_critic_stepper = sac.data_parallel.stepper(noise_critic.parameters(), optim)

    def observe(self, trajectory: Trajectory) -> None:
        """Store the executed chunks; the noise that led to them is not needed."""
        self.sac.observe(replace(trajectory, decision=trajectory.action.flatten(2)))

    def ready(self) -> bool:
        """As SAC."""
        return self.sac.ready()

    def update(self) -> Metrics:
        """Q^A, and in their turns π^W and α; then Q^W."""
        metrics = self.sac.update()
        for _ in range(self.steps):
            stats = self.noise_critic_stepper.descend(self._distillation, self.sac.sample())
            metrics |= {"sac/noise_critic_loss": stats.pop("noise_critic_loss")}
            metrics |= {f"noise_critic/{name}": value for name, value in stats.items()}
        return metrics

    def _distillation(self, batch: Transition) -> tuple[Tensor, Metrics]:
        with self.sac.precision():
            latent = self.sac.draw_noise(batch)
            return noise_critic_loss(self.noise_critic, self.sac.critic, self.decode, batch.obs, latent)

    def acting_weights(self) -> tuple[int, dict[str, Tensor]]:
        """As SAC: the policy's alone."""
        return self.sac.acting_weights()

    def trained(self) -> dict[str, Sequence[tuple[str, Tensor]]]:
        """As SAC, and Q^W."""
        return self.sac.trained() | {"noise_critic": list(self.noise_critic.named_parameters())}

    def buffers(self) -> dict[str, Buffer]:
        """As SAC."""
        return self.sac.buffers()

    def _parts(self) -> dict[str, Any]:
        return {"noise_critic": self.noise_critic, "noise_critic_optim": self.noise_critic_stepper}

    def state_dict(self) -> dict[str, Any]:
        """SAC's, and Q^W with its optimizer. Collective."""
        own = {name: self.sac.data_parallel.state_of(part) for name, part in self._parts().items()}
        return self.sac.state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`. Raises CheckpointError naming the part that is missing or does not fit."""
        load_parts(self._parts(), state, self.sac.data_parallel.load)
        self.sac.load_state_dict(state)

    def held(self) -> dict[str, Any]:
        """As SAC, and Q^W with its optimizer."""
        own = {name: self.sac.data_parallel.held_of(part) for name, part in self._parts().items()}
        return self.sac.held() | own
