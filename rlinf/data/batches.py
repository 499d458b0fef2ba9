"""Preallocated batches of transitions, handed out in turns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rlinf.core import tree
from rlinf.core.types import Transition
from rlinf.data.columns import Column

_MAX_SIZES = 4


@dataclass(frozen=True)
class Batch:
    """A transition and the numpy views into it.

    Attributes:
        transition: what the caller gets; its tensors share memory with `arrays`.
        arrays: `obs/<leaf>`, `next_obs/<leaf>`, `decision`, `reward`, `discount` → array [B, ...].
        texts: the same names of text leaves → list of B strings.
    """

    transition: Transition
    arrays: dict[str, np.ndarray]
    texts: dict[str, list[str]]


class Batches:
    """Two batches per batch size, in turns: a batch stays as it is until the second next one of its size.

    For images, writing into pages that the process already has is four times as fast as into fresh ones.
    The four batch sizes used last are kept.

    Args:
        obs: leaf path → what one row of it is.
        decision: what one decision is.
    """

    def __init__(self, obs: dict[str, Column], decision: Column) -> None:
        self._obs = obs
        self._decision = decision
        self._pairs: dict[int, tuple[Batch, Batch]] = {}

    def next(self, batch_size: int) -> Batch:
        """The batch of this size that was not given last."""
        pair = self._pairs.pop(batch_size, None)
        if pair is None:
            pair = (self._allocate(batch_size), self._allocate(batch_size))
        # The dict's last entry is the size used last; a pair's first batch is the one whose turn it is.
        self._pairs[batch_size] = (pair[1], pair[0])
        if len(self._pairs) > _MAX_SIZES:
            del self._pairs[next(iter(self._pairs))]
        return pair[0]

    def _allocate(self, batch_size: int) -> Batch:
        arrays: dict[str, np.ndarray] = {}
        texts: dict[str, list[str]] = {}
        trees = {}
        for name in ("obs", "next_obs"):
            leaves: dict[str, list[str] | torch.Tensor] = {}
            for path, column in self._obs.items():
                if column.text:
                    leaves[path] = texts[f"{name}/{path}"] = [""] * batch_size
                else:
                    array = np.zeros((batch_size, *column.shape), column.dtype)
                    arrays[f"{name}/{path}"] = array
                    leaves[path] = torch.from_numpy(array)
            trees[name] = tree.from_leaves(leaves)
        arrays["decision"] = np.zeros((batch_size, *self._decision.shape), self._decision.dtype)
        for name in ("reward", "discount"):
            arrays[name] = np.zeros(batch_size, np.float32)
        transition = Transition(
            obs=trees["obs"],
            decision=torch.from_numpy(arrays["decision"]),
            reward=torch.from_numpy(arrays["reward"]),
            discount=torch.from_numpy(arrays["discount"]),
            next_obs=trees["next_obs"],
        )
        return Batch(transition, arrays, texts)
