"""Build SAPIEN scenes on a machine where no Vulkan device exists.

SAPIEN makes a Vulkan device as soon as a material or a visual shape is created, even if nothing is ever
rendered, and fails where there is none. Physics needs neither: while `no_visuals` is active, materials are
inert and visual shapes are left out. Afterwards everything is as it was, so that a process may build a scene
without visuals and still render another one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_MATERIALS = ("RenderMaterial", "RenderTexture", "RenderTexture2D", "RenderCubemap")
_building = threading.RLock()


class _Inert:
    """Takes the attributes of a material and does nothing with them."""

    def __init__(self, *_: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("set_"):
            raise AttributeError(name)
        return lambda *_: None


def _no_shape(builder: Any, *_: Any, **__: Any) -> Any:
    """Stands in for `add_*_visual` of a builder: adds nothing and returns the builder, as those do."""
    return builder


@contextmanager
def no_visuals() -> Iterator[None]:
    """While active, scenes are built without anything to look at. One thread at a time."""
    # Everything that builds scenes must be imported before: `from ... import RenderMaterial` would keep an
    # inert class for good.
    import mani_skill.envs  # noqa: F401
    import sapien.pysapien.render
    import sapien.render
    import sapien.wrapper.urdf_loader
    from sapien.wrapper.actor_builder import ActorBuilder

    homes = (sapien.render, sapien.pysapien.render, sapien.wrapper.urdf_loader)
    changes: list[tuple[Any, str, Any]] = [
        (home, name, _Inert) for home in homes for name in _MATERIALS if hasattr(home, name)
    ]
    visuals = [name for name in vars(ActorBuilder) if name.startswith("add_") and "visual" in name]
    changes += [(ActorBuilder, name, _no_shape) for name in visuals]
    with _building:
        originals = [(home, name, vars(home)[name]) for home, name, _ in changes]
        try:
            for home, name, stand_in in changes:
                setattr(home, name, stand_in)
            yield
        finally:
            for home, name, original in originals:
                setattr(home, name, original)
