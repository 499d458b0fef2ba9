"""Boxes and cylinders, and the vessels made of them, in MuJoCo's language.

What of a body is felt and what is seen are different geometries (groups 0 and 1), as in LIBERO. Vessels stand on their
floor alone: a ring of ten walls on a table would be forty contacts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

Vector = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]

UPRIGHT: Quaternion = (1.0, 0.0, 0.0, 0.0)
Y_UP: Quaternion = (math.sqrt(0.5), -math.sqrt(0.5), 0.0, 0.0)
"""Some objects of LIBERO have their second axis upwards: this turns ours to it."""

WALL_M = 0.003
LIFT_M = 0.002
"""Walls end so far above what their floor stands on."""
FELT = 'group="0" density="150" friction="0.95 0.3 0.1" solref="0.01 1" solimp="0.95 0.99 0.001"'
SEEN = 'group="1" contype="0" conaffinity="0" density="0"'


@dataclass(frozen=True)
class Shape:
    """One geometry; sizes are halves, as MuJoCo has them, in m."""

    kind: str
    size: tuple[float, ...]
    color: Vector
    pos: Vector = (0.0, 0.0, 0.0)
    quat: Quaternion = UPRIGHT
    seen: bool = True
    felt: bool = True

    def turned(self, quat: Quaternion) -> Shape:
        """The shape in a body whose axes are turned so."""
        return replace(self, pos=_rotate(quat, self.pos), quat=_multiply(quat, self.quat))

    def xml(self) -> str:
        """As geometries of a body."""
        place = f'type="{self.kind}" size="{_text(self.size)}" pos="{_text(self.pos)}" quat="{_text(self.quat)}"'
        color = f'rgba="{_text((*self.color, 1.0))}"'
        return f"<geom {place} {color} {SEEN}/>" * self.seen + f"<geom {place} {FELT}/>" * self.felt


def box(x: float, y: float, z: float, color: Vector, *, at: Vector = (0, 0, 0), quat: Quaternion = UPRIGHT) -> Shape:
    """A block of half sizes x, y, z."""
    return Shape("box", (x, y, z), color, at, quat)


def can(radius: float, half_height: float, color: Vector, *, at: Vector = (0, 0, 0)) -> Shape:
    """A standing cylinder."""
    return Shape("cylinder", (radius, half_height), color, at)


def ring(radius: float, half_height: float, color: Vector, *, sides: int = 10, floor: bool = True) -> list[Shape]:
    """A round vessel of so many walls around the origin; with a floor, or else floating above one."""
    width = radius * math.tan(math.pi / sides) * 1.05
    shapes = []
    for k in range(sides):
        angle = 2 * math.pi * k / sides
        at = (radius * math.cos(angle), radius * math.sin(angle), LIFT_M / 2)
        quat = (math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2))
        shapes.append(box(WALL_M, width, half_height - LIFT_M / 2, color, at=at, quat=quat))
    if floor:
        flat = (0.0, 0.0, WALL_M - half_height)
        # What it stands on is square: MuJoCo finds four contacts there, where a disc has a dozen that come and go.
        stand = box(radius * 0.6, radius * 0.6, WALL_M, color, at=flat)
        shapes += [replace(can(radius, WALL_M, color, at=flat), felt=False), replace(stand, seen=False)]
    return shapes


def crate(x: float, y: float, z: float, color: Vector, *, at: Vector = (0, 0, 0)) -> list[Shape]:
    """A box of half sizes x, y, z that is open above."""
    high, middle = z - LIFT_M / 2, at[2] + LIFT_M / 2
    walls = [(x * side, 0.0, WALL_M, y) for side in (-1, 1)] + [(0.0, y * side, x, WALL_M) for side in (-1, 1)]
    return [
        box(x, y, WALL_M, color, at=(at[0], at[1], at[2] - z + WALL_M)),
        *(box(half_x, half_y, high, color, at=(at[0] + dx, at[1] + dy, middle)) for dx, dy, half_x, half_y in walls),
    ]


def mug(color: Vector) -> list[Shape]:
    """A cup with a handle."""
    return [*ring(0.036, 0.045, color), box(0.014, 0.005, 0.025, color, at=(0.052, 0, 0))]


def bottle(radius: float, half_height: float, color: Vector, top: Vector) -> list[Shape]:
    """A cylinder with a neck."""
    neck = half_height * 0.35
    body = can(radius, half_height - neck, color, at=(0, 0, -neck))
    return [body, can(radius * 0.45, neck, top, at=(0, 0, half_height - neck))]


def carton(color: Vector, top: Vector) -> list[Shape]:
    """A milk carton."""
    return [box(0.03, 0.03, 0.045, color, at=(0, 0, -0.012)), box(0.03, 0.012, 0.014, top, at=(0, 0, 0.047))]


def site(name: str, size: Vector, pos: Vector) -> str:
    """A region that LIBERO's goals ask about."""
    return f'<site name="{name}" type="box" size="{_text(size)}" pos="{_text(pos)}" quat="1 0 0 0" rgba="0 0 0 0"/>'


def body(name: str, shapes: Iterable[Shape], inside: str = "") -> str:
    """A body and what it holds besides."""
    return f'<body name="{name}">{"".join(shape.xml() for shape in shapes)}{inside}</body>'


def hinge(name: str, kind: str, axis: str, low: float, high: float, damping: float) -> str:
    """A joint of a fixture, whose inertia is not that of its thin parts."""
    return (
        '<inertial pos="0 0 0" mass="3" diaginertia="1 1 1"/>'
        f'<joint name="{name}" type="{kind}" axis="{axis}" limited="true" range="{low} {high}" damping="{damping}"/>'
    )


def model(name: str, content: str, *, bottom: float, top: float, radius: float) -> str:
    """A file of one object: its content, and the sites from which LIBERO takes its size."""
    sizes = {"bottom_site": (0, 0, bottom), "top_site": (0, 0, top), "horizontal_radius_site": (radius, radius, 0)}
    sites = "".join(
        f'<site name="{site}" pos="{_text(pos)}" size="0.005" rgba="0 0 0 0"/>' for site, pos in sizes.items()
    )
    world = f"<worldbody><body>{content}{sites}</body></worldbody>"
    return f'<mujoco model="{name}"><compiler angle="radian"/>{world}</mujoco>'


def _text(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:.6g}" for number in numbers)


def _multiply(a: Quaternion, b: Quaternion) -> Quaternion:
    (w, x, y, z), (s, i, j, k) = a, b
    return (
        w * s - x * i - y * j - z * k,
        w * i + x * s + y * k - z * j,
        w * j - x * k + y * s + z * i,
        w * k + x * j - y * i + z * s,
    )


def _rotate(quat: Quaternion, vector: Vector) -> Vector:
    w, x, y, z = quat
    _, *rotated = _multiply(_multiply(quat, (0.0, *vector)), (w, -x, -y, -z))
    return (rotated[0], rotated[1], rotated[2])
