"""Gemma transformers that attend together: one stream's keys and values are given to the other, layer by layer.

π0 runs two of them over one sequence: the language model over the prefix (images, text), the action expert over the
suffix. The prefix never attends to the suffix. So the two need not be run together: the prefix is run alone and leaves
its keys and values, and every pass over the suffix attends to those and to its own. That is the same function as one
attention over the whole sequence, forwards and backwards, and the prefix is computed once for all denoising steps.

    B batch, S tokens, P tokens of the other stream, N query heads, G key heads, D head size, W width

References:
    [1] Gemma, arXiv:2403.08295.
    [2] π0, arXiv:2410.24164, appendix B: the two streams.
    [3] π0.5, arXiv:2504.16054: the adaptive norms; DiT, arXiv:2212.09748, §3.2, for their zero-initialised gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlinf.models.embodiment.openpi.attention import attend, in_float32, linear_in_its_type, run_layer
from rlinf.models.embodiment.openpi.config import GemmaConfig

EPS = 1e-6
ROPE_BASE = 10_000.0
MASKED = -2.3819763e38
"""Added to the score of a key that is not there. Finite: a row without any key gives an average, not NaN."""

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the positions, float32 [B, 1, S, D/2] each."""

KeysValues = tuple[Tensor, Tensor]
"""Keys, already rotated, and values of a layer, [B, G, S, D] each."""

LayerModulation = tuple[Tensor, Tensor]
"""What the two adaptive norms of a layer take, float32 [B or 1, 1, 3 W] each."""


@dataclass(frozen=True)
class Modulations:
    """What all adaptive norms of a stream take, computed ahead for several conditions.

    Attributes:
        layers: for each layer, two tensors float32 [K, 1, 3 W].
        final: of the last norm, float32 [K, 1, 3 W].
    """

    layers: tuple[LayerModulation, ...]
    final: Tensor

    def row(self, k: int) -> Modulations:
        """Those of condition k, to be broadcast over a batch."""
        one = slice(k, k + 1)
        return Modulations(tuple((first[one], second[one]) for first, second in self.layers), self.final[one])


class RmsNorm(nn.Module):
    """x / rms(x) · (1 + weight), in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> tuple[Tensor, None]:
        """[B, S, W] → the same in its type, and no gate."""
        y = F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), EPS)
        return y.to(x.dtype), None


class AdaRmsNorm(nn.Module):
    """x / rms(x) · (1 + scale) + shift, with scale, shift and a gate linear in a condition; all in float32.   [3]"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def modulation(self, condition: Tensor) -> Tensor:
        """[B, W] → scale, shift and gate, float32 [B, 1, 3 W]."""
        with in_float32(condition):
            return linear_in_its_type(self.dense, condition).float()[:, None]

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, W] → the same in its type, and the gate [B or 1, 1, W]."""
        scale, shift, gate = modulation.chunk(3, -1)
        y = F.rms_norm(x.float(), x.shape[-1:], eps=EPS) * (1 + scale) + shift
        return y.to(x.dtype), gate.to(x.dtype)


class GemmaAttention(nn.Module):
    """The projections of one stream."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, queries, bias=False)
        self.k_proj = nn.Linear(config.width, keys, bias=False)
        self.v_proj = nn.Linear(config.width, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.width, bias=False)

    def keys_values(self, x: Tensor, rope: Rope) -> KeysValues:
        """[B, S, W] → keys and values [B, G, S, D]."""
        return rotate(self._heads(self.k_proj(x)), rope), self._heads(self.v_proj(x))

    def forward(self, x: Tensor, rope: Rope, bias: Tensor, own: KeysValues, past: KeysValues | None) -> Tensor:
        """[B, S, W] → [B, S, W], attending to `past` and then to the stream's own keys."""
        key, value = own
        if past is not None:
            key, value = (torch.cat([p.to(o.dtype), o], 2) for p, o in zip(past, own, strict=True))
        query = rotate(self._heads(self.q_proj(x)), rope)
        return self.o_proj(attend(query, key, value, bias.to(query.dtype)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class GemmaMlp(nn.Module):
    """down(gelu(gate(x)) · up(x)), with the tanh approximation of GELU."""

    def __init__(self, width: int, mlp_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, mlp_dim, bias=False)
        self.up_proj = nn.Linear(width, mlp_dim, bias=False)
        self.down_proj = nn.Linear(mlp_dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, W] → [B, S, W]."""
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaLayer(nn.Module):
    """x + gate · attention(norm(x)), then x + gate · mlp(norm(x)); the gates are 1 where norms are not adaptive."""

    def __init__(self, config: GemmaConfig, *, adaptive: bool) -> None:
        super().__init__()
        norm: Callable[[int], Any] = AdaRmsNorm if adaptive else RmsNorm
        self.input_layernorm = norm(config.width)
        self.self_attn = GemmaAttention(config)
        self.post_attention_layernorm = norm(config.width)
        self.mlp = GemmaMlp(config.width, config.mlp_dim)

    def modulation(self, condition: Tensor) -> LayerModulation:
        """What its adaptive norms take for a condition [B, W]."""
        return self._modulation(condition)

    def _modulation(self, condition: Tensor) -> LayerModulation:
        return self.input_layernorm.modulation(condition), self.post_attention_layernorm.modulation(condition)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        bias: Tensor,
        past: KeysValues | None = None,
        condition: Tensor | LayerModulation | None = None,
        with_output: bool = True,
    ) -> tuple[Tensor, KeysValues]:
        """The next layer's input and this one's keys and values.

        Args:
            x: [B, S, W].
            rope: of the S positions.
            bias: added to the scores, broadcastable to [B, N, S, P + S].
            past: keys and values of the other stream's layer; only read.
            condition: of adaptive norms, [B, W], or what `modulation` made of it.
            with_output: False computes no more than keys and values; x is then returned as it came.
        """
        x = x.to(self.mlp.up_proj.weight.dtype)
        modulation = self._modulation(condition) if isinstance(condition, Tensor) else condition or (None, None)
        y, gate = self.input_layernorm(x, modulation[0])
        own = self.self_attn.keys_values(y, rope)
        if not with_output:
            return x, own
        x = _residual(x, self.self_attn(y, rope, bias, own, past), gate)
        y, gate = self.post_attention_layernorm(x, modulation[1])
        return _residual(x, self.mlp(y), gate), own


class Gemma(nn.Module):
    """One stream.

    Args:
        config: sizes.
        vocab_size: rows of the token embedding; None for a stream that is given embedded tokens.
        adaptive: norms that take a condition of the stream's width.
    """

    def __init__(self, config: GemmaConfig, *, vocab_size: int | None = None, adaptive: bool = False) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        if vocab_size is not None:
            self.embed_tokens = nn.Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(GemmaLayer(config, adaptive=adaptive) for _ in range(config.depth))
        self.norm: Any = AdaRmsNorm(config.width) if adaptive else RmsNorm(config.width)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [B, S] → √W · embedding [B, S, W]."""
        return self.embed_tokens(tokens) * self.config.width**0.5

    def modulations(self, conditions: Tensor) -> Modulations:
        """What the adaptive norms take for conditions [K, W]; computed once where one condition serves a batch."""
        layers = tuple(layer.modulation(conditions) for layer in self.layers if isinstance(layer, GemmaLayer))
        return Modulations(layers, self.norm.modulation(conditions))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        bias: Tensor,
        past: Sequence[KeysValues] | None = None,
        condition: Tensor | Modulations | None = None,
        *,
        with_output: bool = True,
    ) -> tuple[Tensor | None, tuple[KeysValues, ...]]:
        """Normed output [B, S, W] and the keys and values of every layer.

        Args:
            x: embedded tokens [B, S, W].
            positions: int64 [B, S].
            bias: float32, 0 where a query sees a key and `MASKED` where not, broadcastable to [B, N, S, P + S].
            past: of the stream attended to before one's own tokens; only read.
            condition: of adaptive norms, [B, W], or the row of `modulations`.
            with_output: False returns None for the output and leaves out what only it needs.
        """
        rope = rotation(positions, self.config.head_dim)
        bias = bias.to(self.layers[0].get_parameter("mlp.up_proj.weight").dtype)
        left: list[KeysValues] = []
        for n, layer in enumerate(self.layers):
            given = condition.layers[n] if isinstance(condition, Modulations) else condition
            others = None if past is None else past[n]
            wanted = with_output or n + 1 < len(self.layers)
            x, own = run_layer(layer, self.recompute, x, rope, bias, others, given, wanted)
            left.append(own)
        if not with_output:
            return None, tuple(left)
        if isinstance(condition, Tensor):
            return self.norm(x, self.norm.modulation(condition))[0], tuple(left)
        return self.norm(x, None if condition is None else condition.final)[0], tuple(left)


def rotation(positions: Tensor, head_dim: int) -> Rope:
    """Cosines and sines of rotary position embedding for positions int64 [B, S]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    # Rounded in this order everywhere: at position 900 the last bit of a frequency is 5e-5 of angle.
    angles = (positions[..., None].float() * (1.0 / ROPE_BASE**exponents))[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """[B, N, S, D] with its two halves rotated against each other, computed in float32."""
    cos, sin = rope
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def key_bias(visible: Tensor) -> Tensor:
    """bool → float32 of the same shape: 0 where true, `MASKED` where not."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, MASKED)


def _residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x + y if gate is None else x + y * gate
