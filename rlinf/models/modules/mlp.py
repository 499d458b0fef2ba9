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
    """Linear and activation per hidden layer, then a linear output of `out_dim` unless it is None.

    Weights are orthogonal with the gain of the activation, biases zero.
    """
    layers: list[nn.Module] = []
    gain = nn.init.calculate_gain("tanh" if activation == "tanh" else "relu")
    for width in hidden_dims:
        layers += [orthogonal_linear(in_dim, width, gain), ACTIVATIONS[activation]()]
        in_dim = width
    if out_dim is not None:
        layers.append(orthogonal_linear(in_dim, out_dim, 1.0))
    return nn.Sequential(*layers)


def orthogonal_linear(in_dim: int, out_dim: int, gain: float) -> nn.Linear:
    """A linear layer with orthogonal weights of the given gain and zero bias."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
