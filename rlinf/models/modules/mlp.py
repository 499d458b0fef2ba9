"""Plain multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

ActivationName = Literal["relu", "tanh", "silu", "gelu"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU, "gelu": nn.GELU}


def mlp(
    in_dim: int,
    hidden_dims: Sequence[int],
    out_dim: int | None = None,
    *,
    activation: ActivationName = "relu",
) -> nn.Sequential:
    """Linear and activation per hidden layer, then a linear output of `out_dim` unless it is None."""
    layers: list[nn.Module] = []
    for width in hidden_dims:
        layers += [nn.Linear(in_dim, width), ACTIVATIONS[activation]()]
        in_dim = width
    if out_dim is not None:
        layers.append(nn.Linear(in_dim, out_dim))
    return nn.Sequential(*layers)
