"""A trajectory as checked numpy arrays: what a store of transitions needs of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from rlinf.core import tree
from rlinf.core.errors import DataError, NonFiniteError, ShapeError
from rlinf.core.types import Trajectory

Encode = Callable[[Sequence[str]], np.ndarray]
"""Strings → int32 ids, one per string."""


@dataclass(frozen=True)
class Segment:
    """The arrays of a trajectory, its rewards folded over chunks. Letters as in `core.types`.

    Attributes:
        obs: leaf path → [T + 1, N, ...]; text leaves as ids.
        last_obs: leaf path → [M, ...].
        last_index: (t [M], n [M]) of every row of `last_obs`; only of valid rows.
        decision: [T, N, ...].
        reward, discount: float32 [T, N].
        valid: bool [T, N].
        ended: bool [T, N]; true where a valid step ended its episode: the next observation is in `last_obs`.
        texts: paths of the text leaves.
    """

    obs: dict[str, np.ndarray]
    last_obs: dict[str, np.ndarray]
    last_index: tuple[np.ndarray, np.ndarray]
    decision: np.ndarray
    reward: np.ndarray
    discount: np.ndarray
    valid: np.ndarray
    ended: np.ndarray
    texts: frozenset[str]


def read_segment(trajectory: Trajectory, reward: Tensor, discount: Tensor, encode: Encode) -> Segment:
    """Arrays of `trajectory`, without a copy where its tensors are in main memory.

    Args:
        trajectory: the segment.
        reward: float32 [T, N], reward of each decision.
        discount: float32 [T, N], discount of each decision's next value.
        encode: gives the ids of strings.

    Raises:
        ShapeError: a leaf does not have T, N or M rows, or an ended episode has no last observation.
        NonFiniteError: a reward, discount, decision or observation is NaN or infinite.
        DataError: a leaf has a type that cannot be stored.
    """
    steps, envs = reward.shape
    valid = _array("valid", trajectory.valid, (steps, envs))
    obs, texts = _observations("obs", trajectory.obs, (steps + 1, envs), encode)
    index = _array("last_index", trajectory.last_index, (len(trajectory.last_index), 2))
    last_obs, _ = _observations("last_obs", trajectory.last_obs, (len(index),), encode)
    if last_obs.keys() != obs.keys():
        raise ShapeError(f"last_obs has the leaves {sorted(last_obs)} and obs has {sorted(obs)}.")

    terminated = _array("terminated", trajectory.terminated, (steps, envs))
    done = terminated.any(-1) | _array("truncated", trajectory.truncated, (steps, envs))
    ended = np.zeros_like(done)
    ended[index[:, 0], index[:, 1]] = True
    if len(index) != np.count_nonzero(ended) or (ended & ~done).any() or (done & valid & ~ended).any():
        raise ShapeError(
            f"the trajectory of source {trajectory.source} ends {np.count_nonzero(done & valid)} episodes, "
            f"and its last_index ({len(index)} rows) does not name exactly these steps: every ended episode "
            "needs one last observation."
        )
    counted = valid[index[:, 0], index[:, 1]]
    if not counted.all():
        index = index[counted]
        last_obs = {path: leaf[counted] for path, leaf in last_obs.items()}

    segment = Segment(
        obs=obs,
        last_obs=last_obs,
        last_index=(index[:, 0], index[:, 1]),
        decision=_array("decision", trajectory.decision, (steps, envs)),
        reward=_array("reward", reward, (steps, envs)).astype(np.float32, copy=False),
        discount=_array("discount", discount, (steps, envs)).astype(np.float32, copy=False),
        valid=valid,
        ended=ended & valid,
        texts=frozenset(texts),
    )
    _check_finite(segment, trajectory.source)
    return segment


def _observations(
    name: str, obs: Any, lead: tuple[int, ...], encode: Encode
) -> tuple[dict[str, np.ndarray], list[str]]:
    arrays, texts = {}, []
    for path, leaf in tree.leaves(obs):
        if isinstance(leaf, list):
            rows = leaf if len(lead) == 1 else [text for step in leaf for text in step]
            if len(rows) != np.prod(lead):
                raise ShapeError(f"{name} leaf '{path}' holds {len(rows)} strings where {list(lead)} are expected.")
            arrays[path] = encode(rows).reshape(lead)
            texts.append(path)
        else:
            arrays[path] = _array(f"{name} leaf '{path}'", leaf, lead)
    return arrays, texts


def _array(name: str, leaf: Tensor | np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
    try:
        array = leaf.detach().cpu().numpy() if isinstance(leaf, Tensor) else np.asarray(leaf)
    except TypeError as error:
        raise DataError(f"{name} cannot be stored: {error}. Convert it where it is made.") from error
    if array.shape[: len(lead)] != lead:
        raise ShapeError(f"{name} has the shape {list(array.shape)} where {list(lead)} must lead.")
    return array


def _check_finite(segment: Segment, source: tuple[int, int]) -> None:
    named = {f"observation leaf '{path}'": leaf for path, leaf in segment.obs.items()}
    named |= {f"last observation leaf '{path}'": leaf for path, leaf in segment.last_obs.items()}
    named |= {"decision": segment.decision, "reward": segment.reward, "discount": segment.discount}
    for name, array in named.items():
        if array.dtype.kind != "f" or np.isfinite(array).all():
            continue
        where = np.argwhere(~np.isfinite(array))[0]
        if name.startswith("last"):
            step, env = (int(axis[where[0]]) for axis in segment.last_index)
        else:
            step, env = int(where[0]), int(where[1])
        raise NonFiniteError(
            f"{name} is {array[tuple(where)]} at step {step} of environment {env}, source {source}: "
            "the segment was not stored."
        )
