"""Weights that never change, once in a process for all policies that keep the same ones.

A process may hold three policies of π0: that which learns, that which acts and that which is evaluated. What is frozen
in them has equal numbers, and where type and device agree too, they can read the same memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

Place = tuple[str, str, torch.dtype, torch.device]
Move = Callable[[Tensor], Tensor]

_in_use: WeakValueDictionary[Place, Tensor] = WeakValueDictionary()
_lock = threading.Lock()


class SharedWeights:
    """Some parameters of one policy, and its hold on the memory that they share with those of others.

    They keep sharing when their module is moved. Nobody may write into them.

    Args:
        key: tells this model from others. What has another name, type, device or other numbers is not shared in any
            case.
        parameters: by name; their memory is exchanged for that which is there already.
    """

    def __init__(self, key: str, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._key, self._parameters = key, dict(parameters)
        self._held: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            parameter.data = self._join(name, parameter.data)

    def moving(self, move: Move) -> Move:
        """`move`, which `nn.Module._apply` calls with every tensor, without a copy of what is there already."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}

        def moved(x: Tensor) -> Tensor:
            name = names.get(id(x))
            if name is None:
                return move(x)
            probe = move(x[:0])
            with _lock:
                there = _in_use.get((self._key, name, probe.dtype, probe.device))
            if there is None or there.shape != x.shape:
                return self._join(name, move(x).detach())
            self._held[name] = there
            return there

        return moved

    def _join(self, name: str, own: Tensor) -> Tensor:
        place = (self._key, name, own.dtype, own.device)
        with _lock:
            there = _in_use.get(place)
            if there is None or type(there) is not type(own) or not torch.equal(there, own):
                there = _in_use[place] = own
        self._held[name] = there
        return there
