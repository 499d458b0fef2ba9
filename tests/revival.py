"""Processes on Ray that outlive a test, though it kills some of them."""

from __future__ import annotations

from rlinf.runtime.ray_backend import RayRuntime


def all_alive(runtime: RayRuntime) -> RayRuntime:
    """The runtime, with new processes for those that died, and without what it remembers of earlier tests."""
    for remembered in (runtime._groups, runtime._kept, runtime._flags):
        remembered.clear()
    runtime.replace(runtime.dead())
    return runtime
