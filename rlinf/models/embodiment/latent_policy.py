"""DSRL: a small policy that chooses the noise which a frozen decoder turns into actions.

To SAC the noise w is the action, and the decoder is a part of the environment [1]. `LatentHead` is the policy
π^W(w|s): a Gaussian, squashed to the box [−b, b]^D, w = b tanh(x). `LatentPolicy` puts the decoder behind it. Only the
head is trained, copied, published and saved; the decoder is no submodule, so that nothing can do it to both.

The same noise starts every action of the chunk: w is repeated over the decoder's horizon, as dsrl_pi0, the reference
implementation, does. `LatentHead` may also choose all of it (`repeat_noise: False`).

Until learning begins the noise is N(0, I), not cut at the bound, as in dsrl_pi0: the first experience is that of the
decoder's own policy, and the critics see the noise that it was trained with.

References:
    [1] DSRL, Wagenmaker et al. 2025, arXiv:2506.15799.

    B batch, N environments, D size of the noise that is chosen, E critics
    H actions that the decoder makes at once, A action size
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlinf.core.errors import CheckpointError
from rlinf.core.protocols import Mode
from rlinf.core.types import ActionOut, Obs
from rlinf.functional.squash import tanh_log_det, unit_gaussian_log_prob
from rlinf.models.modules.compact_encoder import CompactEncoder
from rlinf.models.modules.q_ensemble import QEnsemble

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
HEAD_GAIN = 0.01


class Decoder(Protocol):
    """A pretrained policy that turns noise into actions, the same ones whenever it sees the same.

    Attributes:
        noise_shape: (H, D') of the noise that makes one chunk.
    """

    noise_shape: tuple[int, int]

    def decode(self, obs: Obs, noise: Tensor) -> Tensor:
        """Actions [N, H, A] from noise [N, H, D'], by an ODE without noise of its own and without gradients.

        What depends on the observation alone is to be computed once, before the walk.
        """
        ...

    def to(self, device: torch.device | str) -> Any:
        """Move to a device, in place."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Its tensors themselves, by name."""
        ...


class LatentHead(nn.Module):
    """π^W: w = b tanh(μ(s) + σ(s) ε), with log σ cut to [−20, 2].

    The output layers begin near zero: μ = 0, σ = 1.

    Args:
        encoder: of the observation; this network's own.
        latent_dim: D.
        hidden_dims: widths of the hidden layers [linear, layer norm, relu].
        bound: b.
        decoder_mark: number of the decoder that is steered; weights that steer another are refused. 0: of any.

    Attributes:
        noise_shape: (D,).
        begun: whether learning has begun; until then `act` explores by the noise itself.
    """

    noise_shape: tuple[int, ...]
    begun: Tensor
    decoder_mark: Tensor

    def __init__(
        self,
        encoder: CompactEncoder,
        latent_dim: int,
        hidden_dims: Sequence[int],
        bound: float,
        *,
        decoder_mark: int = 0,
    ) -> None:
        super().__init__()
        self.noise_shape, self.bound = (latent_dim,), bound
        self.encoder = encoder
        layers: list[nn.Module] = []
        for fan_in, width in zip((encoder.out_dim, *hidden_dims), hidden_dims, strict=False):
            layers += [nn.Linear(fan_in, width), nn.LayerNorm(width), nn.ReLU(inplace=True)]
        self.net = nn.Sequential(*layers)
        self.mean, self.log_std = (nn.Linear(hidden_dims[-1], latent_dim) for _ in range(2))
        for layer in (self.mean, self.log_std):
            nn.init.xavier_normal_(layer.weight, HEAD_GAIN)
            nn.init.zeros_(layer.bias)
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))
        self.register_buffer("decoder_mark", torch.tensor(decoder_mark))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        ours, theirs = int(self.decoder_mark), int(state_dict.get(f"{prefix}decoder_mark", 0))
        if ours and theirs and ours != theirs:
            raise CheckpointError(
                "these weights have learned to steer another decoder; name theirs in actor.model.decoder_path (of pi0, "
                "actor.model.model_path)"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def begin_learning(self) -> None:
        """From now on `act` asks the network."""
        self.begun.fill_(True)

    def _gaussian(self, obs: Obs) -> tuple[Tensor, Tensor]:
        hidden = self.net(self.encoder(obs))
        return self.mean(hidden).float(), self.log_std(hidden).float().clamp(LOG_STD_MIN, LOG_STD_MAX)

    def sample(self, obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
        """w [B, D] in (−b, b) and log densities [B]; noise ε [B, D].

        log π(w) = log N(x; μ, σ²) − Σ log(b (1 − tanh² x)), by the change of variables.
        """
        mean, log_std = self._gaussian(obs)
        x = mean + log_std.exp() * noise
        log_det = tanh_log_det(x) + noise.shape[-1] * math.log(self.bound)
        # log N(x; μ, σ²) at x = μ + σ ε depends on ε and σ alone.
        return self.bound * torch.tanh(x), unit_gaussian_log_prob(noise) - log_std.sum(-1) - log_det

    @torch.no_grad()
    def act(self, obs: Obs, mode: Mode, noise: Tensor | None = None) -> ActionOut:
        """`train`: a sample, or `noise` itself until learning begins. `eval`: b tanh(μ), or zero until then.

        The action is w, as a chunk of one, for the environment that the decoder is a part of.
        """
        log_prob: Tensor | None = None
        if mode == "train":
            if noise is None:
                raise ValueError(f"mode='train' explores: give noise [N, {self.noise_shape}]")
            latent = noise
            if self.begun:
                latent, log_prob = self.sample(obs, noise)
        else:
            latent = self.bound * torch.tanh(self._gaussian(obs)[0]) * self.begun
        return ActionOut(action=latent[:, None], decision=latent, log_prob=log_prob)

    def default_target_entropy(self) -> float:
        """D (log b − ½): −D/2 as in dsrl_pi0 (−16 for pi0), moved by what the bound itself adds to an entropy."""
        return self.noise_shape[0] * (math.log(self.bound) - 0.5)


class LatentPolicy(nn.Module):
    """The head chooses w, the decoder acts on it.

    Its state is the head's. The decoder moves with it to another device, and shares in nothing else.

    Args:
        head: π^W.
        decoder: frozen; None where nobody acts, on a learner that needs no actions.
        num_action_chunks: the first so many of the decoder's actions are played.
        repeat_noise: w is the noise of one action, repeated; else all of the decoder's noise, flattened.
    """

    noise_shape: tuple[int, ...]

    def __init__(
        self, head: LatentHead, decoder: Decoder | None, *, num_action_chunks: int, repeat_noise: bool = True
    ) -> None:
        super().__init__()
        self.head, self.noise_shape = head, head.noise_shape
        self.num_action_chunks, self.repeat_noise = num_action_chunks, repeat_noise
        # In a tuple, where torch does not look for submodules.
        self._decoder = () if decoder is None else (decoder,)

    def _apply(self, fn: Any, recurse: bool = True) -> LatentPolicy:
        super()._apply(fn, recurse)
        for decoder in self._decoder:
            decoder.to(self.head.begun.device)
        return self

    def held(self) -> dict[str, Any]:
        """All tensors that acting keeps on its device: those of the state, and the decoder's."""
        return {"policy": self.state_dict(), "decoder": [decoder.state_dict() for decoder in self._decoder]}

    def decode(self, obs: Obs, latent: Tensor) -> Tensor:
        """The chunk [N, num_action_chunks, A] that w [N, D] stands for in whole observations. Raises RuntimeError."""
        if not self._decoder:
            raise RuntimeError("this copy of the policy was built without its decoder and cannot act")
        decoder = self._decoder[0]
        horizon, size = decoder.noise_shape
        noise = latent[:, None].expand(-1, horizon, -1) if self.repeat_noise else latent.view(-1, horizon, size)
        return decoder.decode(obs, noise)[:, : self.num_action_chunks]

    def sample(self, obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The head's w [B, D] and log densities [B]."""
        return self.head.sample(obs, noise)

    @torch.no_grad()
    def act(self, obs: Obs, mode: Mode, noise: Tensor | None = None) -> ActionOut:
        """The head's decision w, and the decoder's action for it."""
        out = self.head.act(obs, mode, noise)
        return replace(out, action=self.decode(obs, out.decision))

    def default_target_entropy(self) -> float:
        """The head's."""
        return self.head.default_target_entropy()


class LatentCritic(nn.Module):
    """Q_e(s, w) [E, B], or Q_e(s, a) of flattened chunks of actions.

    Args:
        encoder: of the observation; this network's own, shared by its heads.
        decision_dim: size of w or a.
        hidden_dims, num_heads: of the heads [linear, layer norm, relu].
    """

    def __init__(
        self, encoder: CompactEncoder, decision_dim: int, *, hidden_dims: Sequence[int], num_heads: int
    ) -> None:
        super().__init__()
        self.encoder, self.num_heads = encoder, num_heads
        self.q = QEnsemble(encoder.out_dim + decision_dim, hidden_dims, num_heads)

    def forward(self, obs: Obs, decision: Tensor) -> Tensor:
        """Q values [E, B]."""
        return self.q(self.encoder(obs), decision)

    def make_target(self) -> LatentCritic:
        """A frozen copy with the same weights that goes on sharing the normaliser."""
        normalizer = self.encoder.normalizer
        shared = {id(normalizer): normalizer} if normalizer is not None else {}
        return copy.deepcopy(self, shared).requires_grad_(False)
