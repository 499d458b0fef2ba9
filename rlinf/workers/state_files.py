"""Write and read the files of a checkpoint: weights as safetensors, the rest without executing pickles.

State is nested dicts, lists and tuples of tensors, numpy arrays, numbers, strings, bools and None.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlinf.core.errors import CheckpointError, first_line
from rlinf.core.tensor_file import save_tensors

ARRAY = "__numpy__"
"""Key that marks a numpy array among tensors: torch's safe loader does not read numpy arrays."""


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`. Raises CheckpointError naming the file when it cannot be written."""
    try:
        torch.save(_pack(state), path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise CheckpointError(f"{path} could not be written: {first_line(error)}") from error


def load_state(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """What `save_state` wrote, tensors on the CPU. Raises CheckpointError when missing or not readable.

    With `mapped` the file is read where tensors are used; who keeps one has to copy it.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; choose another checkpoint") from error
    # The unpickler raises whatever a damaged byte stream leads to; all of it means the same here.
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read ({first_line(error)}): it is damaged or was not written by rlinf; "
            "choose another checkpoint"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state; choose another checkpoint")
    return _unpack(state)


def save_weights(path: Path, version: int, weights: dict[str, Tensor]) -> None:
    """Write a flat state dict as safetensors, its version in the metadata. Raises CheckpointError."""
    # Own contiguous copies: safetensors refuses views and tensors that share memory.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
    try:
        save_tensors(tensors, path, {"format": "pt", "version": str(version)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be written: {first_line(error)}") from error


def load_weights(path: Path) -> tuple[int, dict[str, Tensor]]:
    """(version, state dict) of a safetensors file; version 0 if it has none. Raises CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            version = (file.metadata() or {}).get("version", "0")
            return int(version), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; choose another checkpoint") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({first_line(error)}): it is damaged or no safetensors file; "
            "choose another checkpoint"
        ) from error


def _pack(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _pack(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_pack(value) for value in state)
    if isinstance(state, np.ndarray):
        return {ARRAY: torch.from_numpy(np.ascontiguousarray(state)).reshape(state.shape)}
    if isinstance(state, np.generic):
        return state.item()
    return state


def _unpack(state: Any) -> Any:
    if isinstance(state, dict):
        if state.keys() == {ARRAY}:
            return state[ARRAY].numpy()
        return {key: _unpack(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_unpack(value) for value in state)
    return state
