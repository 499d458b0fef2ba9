"""Attention in which several query heads may share a head of keys and values.

B batch, N query heads, G key heads, S queries, T keys, D head size
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k / √D + bias) v, with the heads side by side in the result.

    Args:
        query: [B, N, S, D].
        key, value: [B, G, T, D]; N a multiple of G.
        bias: added to the scores, in the type of `query`, broadcastable to [B, N, S, T].

    Returns [B, S, N·D].
    """
    batch, heads, length, size = query.shape
    shared = heads // key.shape[1]
    if query.device.type == "cpu":
        out = _attend_by_products(query, key, value, bias, shared)
    else:
        key, value = (_repeat(x, shared) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return out.transpose(1, 2).reshape(batch, length, heads * size)


def _repeat(x: Tensor, times: int) -> Tensor:
    """[B, G, T, D] → [B, G·times, T, D]; a view where G is 1."""
    return x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) if times > 1 else x


def _attend_by_products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, shared: int) -> Tensor:
    """The same as two matrix products.

    On CPUs torch's own kernel is slower: forward and backward take 20 times as long for the few tokens of a tiny model,
    and 1.5 times for 300 tokens of full size, in float32; in bfloat16 1.6 to 3 times.

    The queries that share a key head are rows of one product.
    """
    batch, heads, length, size = query.shape
    rows = (batch, heads // shared, shared * length)
    scores = torch.matmul(query.reshape(*rows, size) * size**-0.5, key.transpose(-1, -2))
    scores = scores.view(batch, heads, length, -1)
    weights = torch.softmax(scores if bias is None else scores + bias, -1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights.view(*rows, -1), value).view(batch, heads, length, size)


def run_layer(layer: Callable[..., Any], recompute: bool, *arguments: Any) -> Any:
    """`layer(*arguments)`; with `recompute`, its activations are computed again in the backward pass, not kept."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
    return layer(*arguments)


def in_float32(x: Tensor) -> torch.autocast:
    """A context on x's device in which autocast does not reach."""
    return torch.autocast(x.device.type, enabled=False)


def linear_in_its_type(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """`layer(x)` in the type of its weights: float32, or what a sharded run casts them to."""
    return layer(x.to(layer.weight.dtype))
