"""Where each value of a composed configuration was written: a line of a YAML file or the command line.

Hydra merges files and forgets their lines. Here the same files are read once more with PyYAML's line marks, in the
order and under the packages of Hydra's own defaults list, so that an error can name the line to change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml


class SourceMap:
    """Dotted path → "file.yaml:12" or "command line: key=value"; what was merged last wins."""

    def __init__(self) -> None:
        self._sources: dict[str, str] = {}

    def add_file(self, path: Path, shown_as: str, package: str) -> None:
        """Record every key of a YAML file that Hydra merges at `package` ("" for the root)."""
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if isinstance(node, yaml.MappingNode):
            for key, line in _marks(node, package):
                self._sources[key] = f"{shown_as}:{line}"

    def add_override(self, key: str, value: Any, text: str) -> None:
        """Record a command-line override; a dict value is recorded for each key inside it."""
        self._sources[key] = f"command line: {text}"
        children: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, dict):
            children = value.items()
        elif isinstance(value, list):
            children = enumerate(value)
        for name, child in children:
            self.add_override(f"{key}.{name}", child, text)

    def find(self, path: str) -> str | None:
        """Where `path` was written; else something inside it; else its closest written parent; else None."""
        if path not in self._sources:
            inside = [source for key, source in self._sources.items() if key.startswith(f"{path}.")]
            if inside:
                return inside[0]
        while path not in self._sources and "." in path:
            path = path.rpartition(".")[0]
        return self._sources.get(path)


def _marks(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    """(dotted path, line number from 1) of every key and list element below `node`."""
    pairs: Sequence[tuple[str, yaml.Node, yaml.Node]] = ()
    if isinstance(node, yaml.MappingNode):
        pairs = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        pairs = [(str(position), item, item) for position, item in enumerate(node.value)]
    for name, marked, child in pairs:
        if name == "defaults" and not prefix:
            continue
        path = f"{prefix}.{name}" if prefix else name
        yield path, marked.start_mark.line + 1
        yield from _marks(child, path)
