"""Map, stack and index nested dicts whose leaves are tensors, numpy arrays or lists of strings.

An `Obs` is such a tree. A leaf's path joins its keys with "/": `images/front`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Tree = Any


def tree_map(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply `function` to corresponding leaves. Raises KeyError where the trees differ in keys."""
    if isinstance(tree, dict):
        for other in rest:
            if other.keys() != tree.keys():
                raise KeyError(f"trees differ in keys: {sorted(tree)} against {sorted(other)}")
        return {key: tree_map(function, child, *(other[key] for other in rest)) for key, child in tree.items()}
    return function(tree, *rest)


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) pairs in key order of the dicts."""
    if isinstance(tree, dict):
        for key, child in tree.items():
            yield from leaves(child, f"{prefix}{key}/")
    else:
        yield prefix.removesuffix("/"), tree


def leaves_of_state(state: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """As `leaves`, of a state, in which lists and tuples are no leaves: their places are keys."""
    if isinstance(state, list | tuple):
        state = dict(enumerate(state))
    if isinstance(state, dict):
        for key, child in state.items():
            yield from leaves_of_state(child, f"{prefix}{key}/")
    else:
        yield prefix.removesuffix("/"), state


def from_leaves(pairs: dict[str, Any]) -> Tree:
    """Inverse of `leaves`: a nested dict from paths."""
    tree: dict[str, Any] = {}
    for path, leaf in pairs.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def stack(trees: Sequence[Tree]) -> Tree:
    """Stack corresponding tensor leaves along a new leading axis; lists of strings are collected."""
    return tree_map(lambda *xs: torch.stack(xs) if isinstance(xs[0], Tensor) else list(xs), *trees)


def cat(trees: Sequence[Tree]) -> Tree:
    """Concatenate corresponding leaves along their leading axis."""
    return tree_map(
        lambda *xs: torch.cat(xs) if isinstance(xs[0], Tensor) else [item for x in xs for item in x], *trees
    )


def index(tree: Tree, rows: Any) -> Tree:
    """`leaf[rows]` for every leaf; `rows` is an int, a slice or an int64 tensor."""

    def take(leaf: Any) -> Any:
        if isinstance(leaf, list) and isinstance(rows, Tensor):
            return [leaf[i] for i in rows.tolist()]
        return leaf[rows]

    return tree_map(take, tree)


def to(tree: Tree, device: torch.device | str) -> Tree:
    """Tensor leaves on `device`; numpy leaves become tensors there; other leaves unchanged."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = torch.from_numpy(leaf)
        return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    return tree_map(move, tree)
