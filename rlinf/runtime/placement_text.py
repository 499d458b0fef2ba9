"""How ranks and placements are written, and what they mean.

    0-7            processes 0 to 7 on resources 0 to 7, one each
    0-3,5          five processes; the fifth is on resource 5
    all            a process on every resource
    0-3:0-7        processes 0 to 7 on resources 0 to 3, two on each
    0-7:0-3        processes 0 to 3, each with two of the resources 0 to 7
    0:0-1,1-3      processes 0 and 1 on resource 0, processes 2 to 4 on resources 1 to 3

What a resource is (an accelerator, a robot, a node) and whether it exists is decided in `placement`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlinf.core.errors import ConfigError

KEY = "cluster.component_placement"
ROLES = ("actor", "env", "rollout")
"""The parts of a run that are placed."""
EVERYWHERE = "cluster"
"""The node group of all nodes, in which a role is placed when it names no other."""


@dataclass(frozen=True)
class Span:
    """So many processes, those that come next, over neighbouring resources.

    `resources` is None for all there are, `num_processes` None for one on each resource.
    """

    resources: range | None
    num_processes: int | None = None


@dataclass(frozen=True)
class RolePlacement:
    """Where one role shall be: `text` as written, what it means, and the labels of its node groups."""

    text: str
    spans: tuple[Span, ...]
    node_groups: tuple[str, ...] = (EVERYWHERE,)


def parse_ranks(text: str | int, where: str) -> tuple[int, ...]:
    """The ranks that `text` names, in its order: `3`, `0-7`, `0-3,5`.

    Raises ConfigError, beginning with `where`, when nothing is named, one twice, or it cannot be read.
    """
    ranks = tuple(rank for part in _parts(text, where) for rank in _range(part, where))
    _once(ranks, where, text)
    return ranks


def format_ranks(ranks: Sequence[int]) -> str:
    """The inverse of `parse_ranks`: `0-3,5`."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ",".join(_written(range(first, last + 1)) for first, last in parts)


def parse_spans(text: str | int, where: str) -> tuple[Span, ...]:
    """What a placement says. Raises ConfigError, beginning with `where`, when it cannot be read."""
    parts, spans, begun = _parts(text, where), list[Span](), 0
    for part in parts:
        left, colon, right = part.partition(":")
        resources = None if left.strip() == "all" else _range(left, where)
        if resources is None and len(parts) > 1:
            raise ConfigError(f"{where}: all already names every resource; write it alone")
        count = None
        if colon:
            processes = _range(right, where)
            if processes.start != begun:
                right_ones = _written(range(begun, begun + len(processes)))
                raise ConfigError(
                    f"{where}: {part} begins with process {processes.start}, but the next one is {begun}; write "
                    f"{left.strip()}:{right_ones}"
                )
            count = len(processes)
            if resources is not None:
                check_divides(count, len(resources), f"{where}: {part}")
        spans.append(Span(resources, count))
        begun += count or len(resources or ())
    _once([rank for span in spans for rank in span.resources or ()], where, text)
    return tuple(spans)


def check_divides(num_processes: int, num_resources: int, what: str) -> None:
    """Raise ConfigError, beginning with `what`, unless one number is a multiple of the other."""
    if num_processes % num_resources and num_resources % num_processes:
        raise ConfigError(
            f"{what} shares {num_resources} resources among {num_processes} processes; make one number a multiple of "
            "the other"
        )


def read_placement(placement: Mapping[str, Any] | str) -> dict[str, RolePlacement]:
    """Every role's placement from a mapping `"env,rollout" → 0-7`, or from `"env,rollout: 0-7; actor: 8-15"`.

    In a mapping, {node_group: label or labels, placement: 0-7} chooses nodes too. A key for one role overrides what a
    key for several says of it: that is how a command line changes one role of a recipe. Of two keys for the same roles
    in another order the later counts: that is how a recipe changes the one that it builds on.

    Raises ConfigError when it cannot be read, or a role is unknown, placed twice or left out.
    """
    placed: dict[str, tuple[bool, RolePlacement]] = {}
    for names, value in _pairs(placement):
        roles = [name.strip() for name in names.split(",")]
        for role in roles:
            if role not in ROLES:
                raise ConfigError(f"{KEY}: {role!r} is no role; {did_you_mean(role, ROLES)}")
            alone, wanted = len(roles) == 1, _role_placement(role, value)
            if role in placed and placed[role][0] == alone:
                raise ConfigError(f"{KEY} places {role} twice ({placed[role][1].text} and {wanted.text}); keep one")
            if role not in placed or alone:
                placed[role] = (alone, wanted)
    if missing := [role for role in ROLES if role not in placed]:
        raise ConfigError(f"{KEY} leaves out {', '.join(missing)}; add for example {','.join(missing)}: 0")
    return {role: placed[role][1] for role in ROLES}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean …?` where a known name is spelt like `name`, else a list of all."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"


def _pairs(placement: Mapping[str, Any] | str) -> Iterable[tuple[str, Any]]:
    if not isinstance(placement, str):
        latest = {frozenset(name.strip() for name in names.split(",")): names for names in placement}
        return [(names, placement[names]) for names in latest.values()]
    pairs = []
    for part in filter(str.strip, placement.split(";")):
        names, colon, value = part.partition(":")
        if not colon:
            raise ConfigError(f"{KEY}: {part.strip()!r} is no role with its devices; write for example env: 0-3")
        pairs.append((names, value))
    return pairs


def _role_placement(role: str, value: Any) -> RolePlacement:
    where = f"{KEY}: {role}"
    groups: tuple[str, ...] = (EVERYWHERE,)
    if isinstance(value, Mapping):
        if unknown := [str(key) for key in value if key not in ("node_group", "placement")]:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}; write node_group and placement")
        named = value.get("node_group", EVERYWHERE)
        listed = named if isinstance(named, (list, tuple)) else str(named).split(",")
        groups = tuple(dict.fromkeys(str(label).strip() for label in listed))
        if "" in groups or not groups:
            raise ConfigError(f"{where}: node_group is empty; name one of cluster.node_groups or remove the key")
        value = value.get("placement")
    if isinstance(value, bool) or not isinstance(value, (int, str, type(None))):
        raise ConfigError(f"{where}: {value!r} is no placement; write for example 0, 0-3, 0-3:0-7 or all")
    text = "" if value is None else str(value).strip()
    return RolePlacement(text, parse_spans(text, where), groups)


def _parts(text: str | int, where: str) -> list[str]:
    parts = [part.strip() for part in str(text).split(",")]
    if not all(parts):
        raise ConfigError(
            f"{where}: {'a rank is missing in ' + repr(text) if any(parts) else 'no rank is named'}; write for "
            "example 0, 0-3 or 0-3,5"
        )
    return parts


def _range(part: str, where: str) -> range:
    match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
    if match is None:
        if re.fullmatch(r"\s*-\s*\d+.*", part):
            raise ConfigError(f"{where}: {part.strip()} is negative; ranks begin at 0")
        raise ConfigError(f"{where}: {part.strip()!r} is neither a rank nor a range; write for example 0 or 0-3")
    first = int(match[1])
    last = int(match[2] or first)
    if last < first:
        raise ConfigError(f"{where}: {first}-{last} runs backwards; write {last}-{first}")
    return range(first, last + 1)


def _written(ranks: range) -> str:
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"


def _once(ranks: Sequence[int], where: str, text: str | int) -> None:
    seen: set[int] = set()
    for rank in ranks:
        if rank in seen:
            raise ConfigError(f"{where}: {text} names {rank} twice; keep one")
        seen.add(rank)
