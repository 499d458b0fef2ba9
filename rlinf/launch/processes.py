"""The processes of a run, as its configuration asks for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rlinf.launch.config import Root
from rlinf.launch.crew import Layout
from rlinf.launch.machine import prepare_process
from rlinf.runtime.interface import Runtime
from rlinf.runtime.local import LocalRuntime


@contextlib.contextmanager
def open_runtime(config: Root, note: Callable[[str], None]) -> Iterator[tuple[Runtime, Layout]]:
    """The runtime of the configuration and who sits where; its processes end with the context.

    Args:
        note: gets a line whenever something takes long.
    """
    prepare_process(config)
    yield LocalRuntime(), Layout()
