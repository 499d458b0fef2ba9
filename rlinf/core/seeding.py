"""One root seed becomes one named generator per role and rank. The library never touches global seeds."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive_seed(root: int, name: str) -> int:
    """A 63-bit seed for the stream called `name` ("env/3", "replay", "policy/0").

    Hashing keeps streams independent of the order in which they are asked for, and of each other.
    """
    digest = hashlib.blake2b(f"{root}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def numpy_generator(root: int, name: str) -> np.random.Generator:
    """Numpy generator of the stream `name`."""
    return np.random.Generator(np.random.PCG64(derive_seed(root, name)))


def torch_generator(root: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Torch generator of the stream `name` on `device`."""
    return torch.Generator(device).manual_seed(derive_seed(root, name))
