"""Is there NaN or infinity in it?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlinf.core import tree


def non_finite(state: Any) -> tuple[str, Tensor] | None:
    """(path, tensor) of the first tensor in nested dicts and lists that holds NaN or infinity, else None."""
    for path, leaf in tree.leaves_of_state(state):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not _all_finite(leaf):
            return path, leaf
    return None


def _all_finite(tensor: Tensor) -> bool:
    # A sum is a quarter of the work and shows nearly always that all is well; it may also have overflowed.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())
