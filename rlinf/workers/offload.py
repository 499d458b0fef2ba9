"""Lends the memory of a worker's tensors to others on the same device while the worker rests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlinf.core import tree

State = Callable[[], Any]
"""Nested dicts and lists in which the tensors of a worker are found themselves, not copies."""


class Offload:
    """Moves tensors to the CPU's memory and back, in place.

    Their storages are emptied and filled again: views, flat parameters and optimizers go on pointing at them.

    Args:
        state: what to move; asked anew each time.
        device: only what lives there is moved.
    """

    def __init__(self, state: State, device: torch.device | str) -> None:
        self._state, self._device = state, torch.device(device)
        self._away: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []

    @property
    def is_away(self) -> bool:
        """Whether the tensors are out of reach."""
        return bool(self._away)

    def leave(self) -> None:
        """Free the device's memory; the tensors may not be touched until `come_back`."""
        if self._away:
            return
        for storage in self._storages():
            self._away.append((storage, storage.cpu() if storage.device.type != "cpu" else storage.clone()))
            storage.resize_(0)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # torch would keep what is free for this process alone

    def come_back(self) -> None:
        """Put everything where it was. Does nothing when it is there."""
        for storage, kept in self._away:
            storage.resize_(kept.nbytes())
            storage.copy_(kept)
        self._away = []

    def _storages(self) -> list[torch.UntypedStorage]:
        found = {}
        for _, leaf in tree.leaves_of_state(self._state()):
            if isinstance(leaf, Tensor) and leaf.device.type == self._device.type:
                storage = leaf.untyped_storage()
                # Memory of numpy's cannot be given back, and what holds nothing frees nothing.
                if storage.nbytes() and storage.resizable():
                    found[storage.data_ptr()] = storage
        return list(found.values())
