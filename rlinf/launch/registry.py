"""Names in YAML → code, imported only when a run needs it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from rlinf.core.errors import ConfigError

ENVS: Mapping[str, str] = {
    "frankasim": "rlinf.envs.frankasim.env:make",
    "libero": "rlinf.envs.libero.env:make",
    "maniskill": "rlinf.envs.maniskill.env:make",
    "reach": "rlinf.envs.reach:make",
    "realworld": "rlinf.envs.realworld.env:make",
}
"""`env.*.env_type` → function that makes a `VectorEnv`."""

EXPERTS: Mapping[str, str] = {
    "frankasim": "rlinf.envs.frankasim.expert:PickCubeExpert",
    "libero_spatial": "rlinf.envs.libero.expert:BowlExpert",
    "reach": "rlinf.envs.reach:ReachExpert",
    "PandaPutOnPlateInScene25DigitalTwin-v1": "rlinf.envs.maniskill.twin_expert:PutOnTrayExpert",
    "PandaPutOnTrayDigitalTwin-v1": "rlinf.envs.maniskill.twin_expert:PutOnTrayExpert",
    "PegInsertionEnv-v1": "rlinf.envs.realworld.expert:PegInsertionExpert",
    "PickCube-v1": "rlinf.envs.maniskill.expert:PickCubeExpert",
    "StackCube-v1": "rlinf.envs.maniskill.expert:StackCubeExpert",
}
"""Task → class of a scripted demonstrator, made with (noise_std, generator) and asked with act(state [N, S])."""


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name in `known` that is spelt most like `name` or, failing that, alone begins with it; or None."""
    known = list(known)
    found = difflib.get_close_matches(name, known, 1, cutoff)
    if found:
        return found[0]
    begun = [candidate for candidate in known if name and candidate.startswith(name)]
    return begun[0] if len(begun) == 1 else None


def lookup(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """The object registered as `name`. Raises ConfigError with the nearest name where there is none."""
    if name not in table:
        near = closest(name, table)
        hint = f"did you mean {near!r}?" if near else f"there are: {', '.join(sorted(table))}"
        raise ConfigError(f"no {kind} is called {name!r}; {hint}")
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
