"""SAC-Flow as its equations are usually typed in: the peer of `updates.py`, independent of rlinf's code.

    velocity   h = decoder(W_a x_k + e(k/K); memory = enc(s)),  v_k = W_v h,
               log s_k = lo + (hi - lo)/2 (tanh(W_s h) + 1) - log K
    walk       x_{k+1} = x_k + v_k/K + s_k eps_k,  x_0 = eps_0;  a = tanh(x_K)
    density    log pi = log N(x_0; 0, I) + sum_k log N(x_{k+1}; x_k + v_k/K, s_k) - sum_j log(1 - a_j^2)
    losses     of soft actor-critic, with a critic step per update and an actor and temperature step in every n-th

The decoder is `torch.nn.TransformerDecoderLayer`, run in full at each of the K steps; the critics are separate
modules evaluated one after the other; the temperature's loss samples actions of its own, after the actor's step;
gradients come from `backward()` into `.grad`.

    B batch, S state size, A action size, D width, K steps, E critics
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from rlinf.core.types import Transition

LOG_STD_RANGE = (-5.0, 2.0)


class FullFlowPolicy(nn.Module):
    """Actions [B, A] and path log densities [B] from states [B, S] and noise [B, K + 1, A].

    `backbone_dims` are widths of tanh layers before the observation's encoder.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        steps: int,
        width: int,
        heads: int,
        layers: int,
        backbone_dims: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.steps = steps
        self.backbone = nn.Sequential()
        for backbone_dim in backbone_dims:
            self.backbone.extend([nn.Linear(obs_dim, backbone_dim), nn.Tanh()])
            obs_dim = backbone_dim
        self.obs_encoder = nn.Sequential(nn.Linear(obs_dim, width // 2), nn.SiLU(), nn.Linear(width // 2, width))
        self.action_proj = nn.Linear(action_dim, width)
        self.time_embedding = nn.Sequential(
            nn.Linear(1, width // 4),
            nn.SiLU(),
            nn.Linear(width // 4, width // 2),
            nn.SiLU(),
            nn.Linear(width // 2, width),
        )
        self.transformer_layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
            for _ in range(layers)
        )
        self.velocity_mean_head = nn.Linear(width, action_dim)
        self.log_std_head = nn.Linear(width, action_dim)

    def forward(self, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The walk from noise[:, 0] with noise[:, k + 1] in step k."""
        memory = self.obs_encoder(self.backbone(state)).unsqueeze(1)
        x = noise[:, 0]
        log_prob = Normal(0.0, 1.0).log_prob(x).sum(-1)
        low, high = LOG_STD_RANGE
        for k in range(self.steps):
            time = torch.full((len(x), 1), k / self.steps)
            hidden = (self.action_proj(x) + self.time_embedding(time)).unsqueeze(1)
            for layer in self.transformer_layers:
                hidden = layer(hidden, memory)
            hidden = hidden.squeeze(1)
            log_std = low + 0.5 * (high - low) * (torch.tanh(self.log_std_head(hidden)) + 1)
            mean, std = x + self.velocity_mean_head(hidden) / self.steps, log_std.exp() / self.steps
            x = mean + std * noise[:, k + 1]
            log_prob = log_prob + Normal(mean, std).log_prob(x).sum(-1)
        action = torch.tanh(x)
        return action, log_prob - torch.log(1 - action.square() + 1e-6).sum(-1)


class LoopedCritics(nn.Module):
    """Q values [E, B] of separate networks [linear, layer norm, tanh] x 3, linear."""

    def __init__(self, in_dim: int, hidden_dims: tuple[int, ...], heads: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(self._head(in_dim, hidden_dims) for _ in range(heads))

    @staticmethod
    def _head(in_dim: int, hidden_dims: tuple[int, ...]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in hidden_dims:
            layers += [nn.Linear(in_dim, width), nn.LayerNorm(width), nn.Tanh()]
            in_dim = width
        return nn.Sequential(*layers, nn.Linear(in_dim, 1))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        """One network after the other."""
        features = torch.cat([state, action], -1)
        return torch.stack([head(features).squeeze(-1) for head in self.heads])


class FullFormSac:
    """Soft actor-critic on the two networks above.

    Args:
        actor, critics: the networks; the target is a copy of the critics.
        target_entropy: in nats of the path density.
        critic_actor_ratio: critic steps per actor and temperature step.
        lr, tau, clip_grad: as in the recipe.
    """

    def __init__(
        self,
        actor: FullFlowPolicy,
        critics: LoopedCritics,
        *,
        target_entropy: float,
        critic_actor_ratio: int,
        lr: float = 3e-4,
        tau: float = 0.005,
        clip_grad: float = 1.0,
    ) -> None:
        self.actor, self.critics, self.target = actor, critics, copy.deepcopy(critics)
        self.target_entropy, self.ratio = target_entropy, critic_actor_ratio
        self.tau, self.clip_grad = tau, clip_grad
        self.raw_alpha = torch.tensor(math.log(math.expm1(0.2)), requires_grad=True)
        self.actor_optimizer = torch.optim.Adam(actor.parameters(), lr)
        self.critic_optimizer = torch.optim.Adam(critics.parameters(), lr)
        self.alpha_optimizer = torch.optim.Adam([self.raw_alpha], lr)
        self.updates = 0

    def update(self, batch: Transition) -> None:
        """One critic step; an actor and a temperature step where due; the target follows."""
        alpha = nn.functional.softplus(self.raw_alpha).detach()
        with torch.no_grad():
            next_state = batch.next_obs["state"]
            action, log_prob = self.actor(next_state, self._noise(batch))
            next_value = self.target(next_state, action).amin(0) - alpha * log_prob
            wanted = batch.reward + batch.discount * next_value
        q = self.critics(batch.obs["state"], batch.decision)
        self._step((q - wanted).square().mean(), self.critic_optimizer, self.critics)
        if self.updates % self.ratio == 0:
            action, log_prob = self.actor(batch.obs["state"], self._noise(batch))
            q = self.critics(batch.obs["state"], action).amin(0)
            self._step((alpha * log_prob - q).mean(), self.actor_optimizer, self.actor)
            with torch.no_grad():
                entropy = -self.actor(batch.obs["state"], self._noise(batch))[1].mean()
            self.alpha_optimizer.zero_grad()
            (nn.functional.softplus(self.raw_alpha) * (entropy - self.target_entropy)).backward()
            self.alpha_optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.critics.parameters(), strict=True):
                slow.lerp_(fast, self.tau)
        self.updates += 1

    def _noise(self, batch: Transition) -> Tensor:
        return torch.randn(len(batch.reward), self.actor.steps + 1, batch.decision.shape[1])

    def _step(self, loss: Tensor, optimizer: torch.optim.Optimizer, network: nn.Module) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), self.clip_grad)
        optimizer.step()
