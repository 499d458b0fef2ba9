"""Batches of online experience and prior data in a fixed proportion.

Ball et al. 2023, Efficient Online Reinforcement Learning with Offline Data, arXiv:2302.02948
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from rlinf.core import tree
from rlinf.core.errors import ConfigError, DataError, ShapeError
from rlinf.core.types import Transition
from rlinf.data.batches import Batch, Batches
from rlinf.data.columns import Column


class Store(Protocol):
    """Transitions that can be sampled with replacement."""

    def __len__(self) -> int:
        """Number of transitions."""
        ...

    def sample(self, batch_size: int) -> Transition:
        """`batch_size` transitions."""
        ...


class MixedReplay:
    """Draws a fixed share of every batch from prior data and the rest from online experience.

    The rows of both are interleaved as evenly as they can be, at places that depend on the batch size alone: any
    m consecutive rows hold m · `prior_fraction` prior ones, rounded up or down. So micro-batches are balanced
    without shuffling. Both stores are drawn with replacement, so a store of any size above zero is enough.

    Args:
        online: store of experience that grows.
        prior: store of demonstrations.
        prior_fraction: share of prior rows, between 0 and 1. A batch of B has round(B · `prior_fraction`).
    """

    def __init__(self, online: Store, prior: Store, prior_fraction: float = 0.5) -> None:
        if not 0 < prior_fraction < 1:
            raise ConfigError(
                f"algorithm.demo_buffer.fraction={prior_fraction} must lie between 0 and 1; to train without "
                "demonstrations, remove algorithm.demo_buffer."
            )
        self.online, self.prior, self.prior_fraction = online, prior, prior_fraction
        self._batches: Batches | None = None
        self._places: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def sample(self, batch_size: int) -> Transition:
        """`batch_size` transitions; they stay as they are until the second next call with the same size.

        Raises:
            DataError: a store is empty.
            ConfigError: the batch is too small to hold rows of both.
            ShapeError: the two stores hold different observations or decisions.
        """
        for store, name in (
            (self.online, "the online replay buffer"),
            (self.prior, "the demonstration buffer"),
        ):
            if not len(store):
                raise DataError(f"{name} is empty, and every batch needs rows of it: fill it before training.")
        if batch_size not in self._places:
            self._places[batch_size] = interleave(batch_size, self.prior_fraction)
        places = self._places[batch_size]
        parts = [
            self._leaves(store.sample(len(where)))
            for store, where in zip((self.online, self.prior), places, strict=True)
        ]
        batch = self._batch(batch_size, *parts)
        for part, where in zip(parts, places, strict=True):
            for name, leaf in part.items():
                if isinstance(leaf, list):
                    for place, text in zip(where.tolist(), leaf, strict=True):
                        batch.texts[name][place] = text
                else:
                    batch.arrays[name][where] = leaf
        return batch.transition

    @staticmethod
    def _leaves(transition: Transition) -> dict[str, np.ndarray | list[str]]:
        named = {"obs": transition.obs, "next_obs": transition.next_obs, "decision": transition.decision}
        named |= {"reward": transition.reward, "discount": transition.discount}
        return {path: leaf.numpy() if isinstance(leaf, Tensor) else leaf for path, leaf in tree.leaves(named)}

    def _batch(
        self,
        batch_size: int,
        online: dict[str, np.ndarray | list[str]],
        prior: dict[str, np.ndarray | list[str]],
    ) -> Batch:
        if self._batches is None:
            rows, other = ({name: _column(leaf) for name, leaf in part.items()} for part in (online, prior))
            if rows != other:
                names = sorted(name for name in rows | other if rows.get(name) != other.get(name))
                raise ShapeError(
                    "demonstrations do not fit the online experience: "
                    + "; ".join(f"{name} is {other.get(name)} there and {rows.get(name)} here" for name in names)
                )
            obs = {name[4:]: column for name, column in rows.items() if name.startswith("obs/")}
            self._batches = Batches(obs, rows["decision"])
        return self._batches.next(batch_size)


def interleave(batch_size: int, prior_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Places of the online and of the prior rows in a batch, evenly mixed.

    Row i is prior where ⌊(i + 1) k / B⌋ > ⌊i k / B⌋, for k prior rows among B.
    """
    k = round(batch_size * prior_fraction)
    if not 0 < k < batch_size:
        raise ConfigError(
            f"algorithm.demo_buffer.fraction={prior_fraction} leaves no row for one of the two in a batch of "
            f"{batch_size}: raise the batch size."
        )
    steps = np.arange(batch_size + 1) * k // batch_size
    prior = np.diff(steps) > 0
    return np.flatnonzero(~prior), np.flatnonzero(prior)


def _column(leaf: np.ndarray | list[str]) -> Column:
    if isinstance(leaf, list):
        return Column("int32", (), text=True)
    return Column(str(leaf.dtype), leaf.shape[1:])
