"""SERL's pretrained ResNet-10, a pickle of flax parameters, rewritten as a file that `load_resnet10` reads.

The pickle `resnet10_params.pkl` of SERL's releases (github.com/rail-berkeley/serl) is a nested dict: `conv_init`,
`norm_init`, `ResNetBlock_0` to `_3` with `Conv_0`, `Conv_1`, `MyGroupNorm_0`, `MyGroupNorm_1` and, where the shape
changes, `conv_proj` and `norm_proj`; and the classifier `output_head`, which is left out. Kernels are stored
[height, width, in, out]. A pickle may name any function to be called; here only those that build arrays are.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from rlinf.core.errors import DataError, first_line
from rlinf.core.tensor_file import save_tensors
from rlinf.core.tree import leaves
from rlinf.models.modules.resnet10 import FILE_STEM, ResNet10, first_mismatch

WRAPPERS = ("params", "pretrained_encoder")
"""Keys that may lie around the parameters: in what flax's `init` returns, and in SERL's agents."""

CLASSIFIER = "output_head/"


def convert_resnet10(source: str | Path, target: str | Path) -> Path:
    """Rewrite SERL's resnet10_params.pkl as safetensors, with the padding of flax named in the metadata.

    Args:
        source: the pickle. Nothing in it is executed but the building of arrays.
        target: a .safetensors file, or a folder that is to hold resnet10_pretrained.safetensors; created when needed.

    Returns the file, for `model_path`. Raises DataError when the source is missing, damaged, not a ResNet-10 or asks
    for anything but arrays, and when the target cannot be written.
    """
    source, target = Path(source), Path(target)
    weights = torch_weights(_read(source), source)
    file = target if target.suffix == ".safetensors" else target / f"{FILE_STEM}.safetensors"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(weights, file, {"format": "pt", "padding": "same"})
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} could not be written: {error}") from error
    return file


def torch_weights(parameters: dict[str, Any], source: Path) -> dict[str, Tensor]:
    """A ResNet-10's flax parameters by torch's names, float32, kernels as [out, in, height, width].

    Raises DataError, in which they are said to be of `source`, when they are not those of a ResNet-10.
    """
    for key in WRAPPERS:
        parameters = parameters.get(key, parameters)
    names, weights = _torch_names(), {}
    for path, leaf in leaves(parameters):
        if path.startswith(CLASSIFIER):
            continue
        if path not in names or not isinstance(leaf, np.ndarray) or leaf.dtype.kind != "f":
            raise DataError(f"{source} does not hold SERL's ResNet-10: {path!r} is not one of its arrays")
        array = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf
        weights[names[path]] = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    if problem := first_mismatch(weights, ResNet10().state_dict()):
        raise DataError(f"{source} does not hold SERL's ResNet-10: {problem}")
    return weights


def _torch_names() -> dict[str, str]:
    """flax path → torch name."""
    names = {"conv_init/kernel": "conv1.weight"}
    norms = {"norm_init": "bn1"}
    for index in range(4):
        block, layer = f"ResNetBlock_{index}", f"layer{index + 1}.0"
        names[f"{block}/conv_proj/kernel"] = f"{layer}.downsample.0.weight"
        norms[f"{block}/norm_proj"] = f"{layer}.downsample.1"
        for part in range(2):
            names[f"{block}/Conv_{part}/kernel"] = f"{layer}.conv{part + 1}.weight"
            # SERL subclasses the norm; without that flax would have named it GroupNorm.
            norms[f"{block}/MyGroupNorm_{part}"] = norms[f"{block}/GroupNorm_{part}"] = f"{layer}.bn{part + 1}"
    for path, name in norms.items():
        names |= {f"{path}/scale": f"{name}.weight", f"{path}/bias": f"{name}.bias"}
    return names


def _jax_array(function: Callable[..., np.ndarray], args: tuple[Any, ...], state: Any, aval: Any) -> np.ndarray:
    """What jax pickles an array as: a numpy array's parts, and a description of its type."""
    array = function(*args)
    array.__setstate__(state)
    return array


# What numpy's own pickles call; asked for by way of an array, since the modules that hold them are private.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_FROM_BUFFER = np.empty(0).__reduce_ex__(5)[0]

_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,  # numpy 1
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,  # pickle protocol 5
    ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("jax._src.array", "_reconstruct_array"): _jax_array,
    ("jax._src.device_array", "reconstruct_device_array"): _jax_array,  # jax before 0.4
    ("flax.core.frozen_dict", "FrozenDict"): dict,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds containers and arrays, refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """The admitted global, or DataError."""
        if (module, name) not in _ADMITTED:
            raise DataError(f"it asks for {module}.{name}, and only arrays are admitted")
        return _ADMITTED[module, name]


def _read(source: Path) -> dict[str, Any]:
    try:
        with source.open("rb") as stream:
            parameters = _ArrayUnpickler(stream).load()
    except FileNotFoundError as error:
        raise DataError(
            f"{source} does not exist; resnet10_params.pkl is among the releases of github.com/rail-berkeley/serl"
        ) from error
    except DataError as refusal:
        raise DataError(f"{source} was not loaded: {refusal}") from refusal
    # The unpickler raises whatever a damaged byte stream leads to; all of it means the same here.
    except Exception as error:
        raise DataError(f"{source} cannot be read ({first_line(error)}); download it again") from error
    if not isinstance(parameters, dict):
        raise DataError(f"{source} holds a {type(parameters).__name__}, not parameters by name")
    return parameters
