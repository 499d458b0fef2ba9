"""Operators' devices by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from rlinf.envs.realworld.teleop.operator import Operator, TeleopError

PLACES = {
    "spacemouse": "rlinf.envs.realworld.teleop.spacemouse:SpaceMouse",
    "keyboard": "rlinf.envs.realworld.teleop.keyboard:Keyboard",
    "gamepad": "rlinf.envs.realworld.teleop.gamepad:Gamepad",
}
"""Name → class. Each is imported when somebody asks for it."""
DEVICES = tuple(PLACES)


def open_operator(name: str, options: Mapping[str, Any] | None = None) -> Operator:
    """The device of that name, with keywords of its class.

    Raises TeleopError, also for a name or keyword that is not known; MissingDependency.
    """
    if name not in PLACES:
        raise TeleopError(f"no operator's device is called {name!r}; there are {', '.join(DEVICES)}")
    module, _, attribute = PLACES[name].partition(":")
    device = getattr(importlib.import_module(module), attribute)
    known = list(inspect.signature(device).parameters)
    unknown = [key for key in options or {} if key not in known]
    if unknown:
        raise TeleopError(f"the {name} does not know {', '.join(unknown)}; it knows {', '.join(known)}")
    operator: Operator = device(**(options or {}))
    return operator
