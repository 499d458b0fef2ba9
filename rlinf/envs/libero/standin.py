"""Scenes and objects of our own, from boxes and cylinders, for where LIBERO's assets are not.

They have the names, joints, sites and sizes that LIBERO's code and stored initial states expect, so that every task of
the five suites is built, begins and steps. Nothing of LIBERO's own shapes or pictures is in them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from PIL import Image

from rlinf.envs.libero.package import own_folder
from rlinf.envs.libero.shapes import (
    SEEN,
    UPRIGHT,
    WALL_M,
    Y_UP,
    Shape,
    Vector,
    body,
    bottle,
    box,
    can,
    carton,
    crate,
    hinge,
    model,
    mug,
    ring,
    site,
)

WHITE, BLACK, GREY, STEEL = (0.93, 0.93, 0.9), (0.07, 0.07, 0.07), (0.5, 0.5, 0.5), (0.7, 0.7, 0.72)
WOOD, DARK_WOOD, RED, YELLOW = (0.6, 0.42, 0.25), (0.38, 0.24, 0.13), (0.75, 0.13, 0.12), (0.9, 0.75, 0.15)
GREEN, BLUE, ORANGE, BROWN = (0.2, 0.5, 0.2), (0.2, 0.35, 0.7), (0.9, 0.5, 0.1), (0.35, 0.18, 0.08)


FIXTURE_DROP_M = 0.04
"""LIBERO puts a fixture's bottom so far below the middle of what it stands on."""

# ---- objects that can be taken


OBJECTS: dict[str, dict[str, list[Shape]]] = {
    "stable_scanned_objects": {
        "akita_black_bowl": ring(0.042, 0.025, BLACK),
        "white_bowl": ring(0.042, 0.025, WHITE),
        "plate": [
            *ring(0.062, 0.008, (0.85, 0.87, 0.95)),
            replace(can(0.03, 0.0005, BLUE, at=(0, 0, -0.002)), felt=False),
        ],
        "glazed_rim_porcelain_ramekin": ring(0.037, 0.045, (0.9, 0.87, 0.75)),
        "chefmate_8_frypan": [*ring(0.085, 0.018, BLACK), box(0.07, 0.01, 0.007, GREY, at=(0.155, 0, 0.01))],
        "basket": crate(0.1, 0.13, 0.05, WOOD),
    },
    "stable_hope_objects": {
        "alphabet_soup": [can(0.033, 0.04, RED), can(0.0335, 0.012, BLUE)],
        "tomato_sauce": [can(0.033, 0.04, RED), can(0.0335, 0.012, GREEN)],
        "bbq_sauce": bottle(0.028, 0.055, BROWN, RED),
        "ketchup": bottle(0.028, 0.055, RED, WHITE),
        "salad_dressing": bottle(0.028, 0.055, YELLOW, GREEN),
        "new_salad_dressing": bottle(0.028, 0.055, GREEN, WHITE),
        "milk": carton(WHITE, BLUE),
        "orange_juice": carton(ORANGE, GREEN),
        "butter": [box(0.045, 0.025, 0.018, YELLOW)],
        "cream_cheese": [box(0.045, 0.027, 0.022, BLUE), box(0.03, 0.0275, 0.01, WHITE)],
        "chocolate_pudding": [box(0.03, 0.03, 0.02, BROWN)],
        "cookies": [box(0.037, 0.03, 0.048, RED), box(0.02, 0.0305, 0.02, WHITE)],
    },
    "turbosquid_objects": {
        "moka_pot": [*bottle(0.035, 0.055, STEEL, BLACK), box(0.014, 0.005, 0.03, BLACK, at=(0.047, 0, 0))],
        "black_book": [box(0.02, 0.03, 0.055, BLACK)],
        "yellow_book": [box(0.02, 0.03, 0.055, YELLOW)],
        "red_coffee_mug": mug(RED),
        "porcelain_mug": mug(WHITE),
        "white_yellow_mug": mug(YELLOW),
        "wine_bottle": bottle(0.028, 0.058, (0.1, 0.25, 0.12), RED),
        "wooden_tray": crate(0.13, 0.1, 0.025, DARK_WOOD),
    },
}
Y_UP_OBJECTS = {
    "alphabet_soup", "tomato_sauce", "ketchup", "salad_dressing", "new_salad_dressing", "milk", "orange_juice"
}  # fmt: skip
REGIONS = {
    "basket": site("contain_region", (0.09, 0.12, 0.045), (0, 0, 0)),
    "wooden_tray": site("contain_region", (0.12, 0.09, 0.03), (0, 0, 0)),
}


def graspable(name: str, shapes: list[Shape]) -> str:
    """The file of an object that LIBERO lets fall onto a table or the floor."""
    turn = Y_UP if name in Y_UP_OBJECTS else UPRIGHT
    content = body("object", [shape.turned(turn) for shape in shapes], REGIONS.get(name, ""))
    return model(name, content, bottom=-0.06, top=0.04, radius=0.03)


# ---- fixtures


def fixture(name: str, shapes: list[Shape], inside: str = "", *, top: float, radius: float) -> str:
    """The file of something that stands on a table; its origin is the middle of its bottom."""
    content = body("object", [], body("base", shapes, inside))
    return model(name, content, bottom=-FIXTURE_DROP_M, top=top, radius=radius)


def cabinet(name: str, color: Vector, drawer_color: Vector) -> str:
    """Three drawers one above the other, open towards −y."""
    shell = [
        box(0.118, WALL_M, 0.13, color, at=(0, 0.107, 0.13)),
        *(box(WALL_M, 0.1, 0.13, color, at=(x, 0.01, 0.13)) for x in (-0.118, 0.118)),
        *(box(0.118, 0.1, WALL_M, color, at=(0, 0.01, z)) for z in (WALL_M, 0.257)),
    ]
    drawers = ""
    for drawer, z in (("top", 0.18), ("middle", 0.11), ("bottom", 0.04)):
        shapes = [
            box(0.105, 0.003, 0.028, drawer_color, at=(0, -0.09, z)),
            box(0.105, 0.09, 0.002, drawer_color, at=(0, 0.0, z - 0.026)),
            box(0.03, 0.004, 0.004, STEEL, at=(0, -0.115, z)),
            *(box(0.004, 0.012, 0.004, STEEL, at=(x, -0.103, z)) for x in (-0.026, 0.026)),
        ]
        joint = hinge(f"{drawer}_level", "slide", "0 1 0", -0.16, 0.01, 50)
        drawers += body(f"cabinet_{drawer}", shapes, joint + site(f"{drawer}_region", (0.1, 0.08, 0.03), (0, 0, z)))
    return fixture(
        name, shell, site("top_side", (0.115, 0.095, 0.0015), (0, 0.01, 0.2615)) + drawers, top=0.26, radius=0.1
    )


def stove() -> str:
    """One plate that glows when the knob is turned."""
    burner = body(
        "burner",
        [
            box(0.095, 0.095, 0.02, STEEL, at=(0.15, 0, 0.02)),
            replace(can(0.07, 0.001, BLACK, at=(0.15, 0, 0.04)), felt=False),
        ],
        site("cook_region", (0.075, 0.075, 0.0025), (0.15, 0, 0.04))
        + '<site name="burner" type="cylinder" size="0.0625 0.0005" pos="0.15 0 0.0415" rgba="0.9 0.05 0.05 0"/>',
    )
    knob = [can(0.03, 0.012, BLACK, at=(0, 0, 0.012)), box(0.004, 0.025, 0.012, GREY, at=(0, 0, 0.032))]
    button = body("button", knob, hinge("button", "hinge", "0 0 1", -0.005, 2.1, 1))
    return fixture("flat_stove", [], burner + button, top=0.05, radius=0.1)


def microwave() -> str:
    """A door in front of a hollow block, which swings open towards −y."""
    shell = [
        box(0.15, 0.005, 0.13, WHITE, at=(0, 0.12, 0.135)),
        *(box(0.005, 0.12, 0.13, WHITE, at=(x, 0, 0.135)) for x in (-0.15, 0.15)),
        *(box(0.15, 0.12, 0.005, WHITE, at=(0, 0, z)) for z in (0.005, 0.265)),
    ]
    # The hinge is at the left edge: the door's frame has its origin there.
    door = [box(0.15, 0.004, 0.125, BLACK, at=(0.15, 0, 0)), box(0.006, 0.015, 0.08, STEEL, at=(0.28, -0.015, 0))]
    swing = hinge("microjoint", "hinge", "0 0 1", -2.094, 0, 2)
    leaf = f'<body name="door" pos="-0.15 -0.127 0.135">{"".join(shape.xml() for shape in door)}{swing}</body>'
    sites = site("heating_region", (0.13, 0.1, 0.11), (0, 0, 0.125)) + site(
        "top_side", (0.14, 0.11, 0.0015), (0, 0, 0.27)
    )
    return fixture("microwave", shell, sites + leaf, top=0.27, radius=0.15)


def rack() -> str:
    """Two rails that a bottle lies on."""
    rails = [box(0.09, 0.01, 0.06, WOOD, at=(0, y, 0.06)) for y in (-0.05, 0.05)]
    board = box(0.09, 0.06, 0.005, WOOD, at=(0, 0, 0.095))
    return fixture(
        "wine_rack", [*rails, board], site("top_region", (0.09, 0.06, 0.005), (0, 0, 0.1)), top=0.12, radius=0.09
    )


def caddy() -> str:
    """An open box of four compartments."""
    frame = crate(0.13, 0.105, 0.05, DARK_WOOD, at=(0, 0, 0.05))
    walls = [
        *(box(0.12, WALL_M, 0.045, DARK_WOOD, at=(0, y, 0.05)) for y in (-0.045, 0.045)),
        box(WALL_M, 0.045, 0.045, DARK_WOOD, at=(-0.03, 0, 0.05)),
    ]
    regions = {
        "left_contain_region": ((0.12, 0.028, 0.06), (0, -0.075, 0.06)),
        "right_contain_region": ((0.12, 0.028, 0.06), (0, 0.075, 0.06)),
        "front_contain_region": ((0.075, 0.04, 0.06), (0.05, 0, 0.06)),
        "back_contain_region": ((0.045, 0.04, 0.06), (-0.08, 0, 0.06)),
    }
    sites = "".join(site(name, size, pos) for name, (size, pos) in regions.items())
    return fixture("desk_caddy", [*frame, *walls], sites, top=0.1, radius=0.14)


def shelf() -> str:
    """Two storeys, open in front and behind."""
    boards = [box(0.14, 0.1, 0.004, WOOD, at=(0, 0, z)) for z in (0.004, 0.13, 0.256)]
    sides = [box(0.004, 0.1, 0.13, WOOD, at=(x, 0, 0.13)) for x in (-0.14, 0.14)]
    regions = {
        "bottom_region": ((0.13, 0.09, 0.06), (0, 0, 0.07)),
        "top_region": ((0.13, 0.09, 0.06), (0, 0, 0.195)),
        "top_side": ((0.13, 0.09, 0.0015), (0, 0, 0.26)),
    }
    sites = "".join(site(name, size, pos) for name, (size, pos) in regions.items())
    return fixture("wooden_two_layer_shelf", [*boards, *sides], sites, top=0.26, radius=0.12)


FIXTURES: dict[str, Callable[[], str]] = {
    "articulated_objects/wooden_cabinet": lambda: cabinet("wooden_cabinet", DARK_WOOD, WOOD),
    "articulated_objects/white_cabinet": lambda: cabinet("white_cabinet", WHITE, (0.8, 0.8, 0.8)),
    "articulated_objects/flat_stove": stove,
    "articulated_objects/microwave": microwave,
    "turbosquid_objects/wine_rack/wine_rack": rack,
    "turbosquid_objects/desk_caddy/desk_caddy": caddy,
    "turbosquid_objects/wooden_two_layer_shelf/wooden_two_layer_shelf": shelf,
}

# ---- scenes


STUDY_TOP_M, LIVING_ROOM_TOP_M, FLOOR_M = 0.867, 0.41, -0.035
"""Heights that LIBERO places objects from."""


def scene(floor: str, wall: str, content: str, floor_height: float = 0.0) -> str:
    """The file of a room: floor, walls, light and what else is in it. LIBERO chooses the textures' files."""
    walls = [
        replace(box(0.01, 3, 1.5, GREY, at=(-2, 0, 1.5)), felt=False),
        *(replace(box(3, 0.01, 1.5, GREY, at=(1, y, 1.5)), felt=False) for y in (-3, 3)),
    ]
    lights = "".join(
        f'<light pos="{x} {y} 4" dir="{-0.2 * x} {-0.2 * y} -1" diffuse=".5 .5 .5" castshadow="false"/>'
        for x, y in ((1, 1), (-2, -2))
    )
    return (
        '<mujoco model="room"><asset>'
        '<texture name="sky" type="skybox" builtin="gradient" rgb1=".9 .9 1" rgb2=".3 .4 .5" width="16" height="96"/>'
        f'<texture name="texplane" type="2d" file="../textures/{floor}"/>'
        '<material name="floorplane" texture="texplane" texrepeat="3 3" texuniform="true"/>'
        f'<texture name="tex-wall" type="2d" file="../textures/{wall}"/><material name="walls" texture="tex-wall"/>'
        "</asset><worldbody>"
        f'<geom name="floor" type="plane" size="3 3 .125" pos="0 0 {floor_height}" group="1" material="floorplane"/>'
        f"{''.join(shape.xml() for shape in walls)}{lights}{content}</worldbody></mujoco>"
    )


def adjustable_table() -> str:
    """A table whose place and size LIBERO sets."""
    block = 'type="box" size="0.5 0.6 0.025"'
    legs = "".join(
        f'<geom name="table_leg{leg}_visual" type="cylinder" size="0.025 0.4" rgba=".4 .3 .2 1" {SEEN}/>'
        for leg in range(1, 5)
    )
    return (
        '<body name="table" pos="0 0 0.875">'
        f'<geom name="table_collision" {block} group="0"/>'
        f'<geom name="table_visual" {block} rgba=".6 .45 .3 1" {SEEN}/>'
        f'<site name="table_top" pos="0 0 0.025" size="0.001" rgba="0 0 0 0"/>{legs}</body>'
    )


def standing_table(name: str, x: float, half_x: float, half_y: float, height: float, color: Vector) -> str:
    """A block from the floor up to `height`."""
    return body(name, [box(half_x, half_y, height / 2, color, at=(x, 0, height / 2))])


SCENES: dict[str, Callable[[], str]] = {
    "libero_tabletop_base_style": lambda: scene("a.png", "b.png", adjustable_table()),
    "libero_kitchen_tabletop_base_style": lambda: scene("a.png", "b.png", adjustable_table()),
    "libero_living_room_tabletop_base_style": lambda: scene(
        "a.png", "b.png", standing_table("living_room_table", 0.0, 0.35, 0.8, LIVING_ROOM_TOP_M, DARK_WOOD)
    ),
    "libero_study_base_style": lambda: scene(
        "a.png", "b.png", standing_table("study_table", -0.175, 0.475, 0.6, STUDY_TOP_M, WOOD)
    ),
    "libero_floor_base_style": lambda: scene("a.png", "b.png", body("floor", []), FLOOR_M),
}
TEXTURES: dict[str, Vector] = {
    "light-gray-floor-tile": (0.62, 0.6, 0.57),
    "gray_ceramic_tile": (0.5, 0.5, 0.52),
    "seamless_wood_planks_floor": (0.55, 0.42, 0.3),
    "light-gray-plaster": (0.8, 0.8, 0.78),
    "yellow_linen_wall_texture": (0.85, 0.8, 0.62),
}


# ---- files


def files() -> dict[str, str]:
    """Relative path → content of everything but the textures."""
    return {
        **{f"scenes/{name}.xml": make() for name, make in SCENES.items()},
        **{f"{name}.xml": make() for name, make in FIXTURES.items()},
        **{
            f"{folder}/{name}/{name}.xml": graspable(name, shapes)
            for folder, objects in OBJECTS.items()
            for name, shapes in objects.items()
        },
    }


def standin_folder() -> Path:
    """A folder with all files, written once and kept; processes that write it at the same time do no harm."""
    contents = files()
    digest = hashlib.sha256(repr((sorted(contents.items()), sorted(TEXTURES.items()))).encode()).hexdigest()[:12]
    home = own_folder()
    place = home / f"standin-{digest}"
    if place.is_dir():
        return place
    part = Path(tempfile.mkdtemp(dir=home))
    try:
        write(part, contents)
        part.chmod(0o755)
        os.rename(part, place)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        if not place.is_dir():  # else another process was quicker
            raise
    return place


def write(folder: Path, contents: dict[str, str]) -> None:
    """Write the files and the textures, which are of one colour."""
    for relative, content in contents.items():
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (folder / "textures").mkdir()
    for name, color in TEXTURES.items():
        pixel = tuple(round(255 * part) for part in color)
        Image.new("RGB", (16, 16), pixel).save(folder / "textures" / f"{name}.png")
