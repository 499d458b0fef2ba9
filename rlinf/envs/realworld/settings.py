"""Settings of a cell: one JSON file, checked key by key, into plain records. No pydantic: see the package."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rlinf.core.errors import ConfigError
from rlinf.envs.realworld.arm import Arm
from rlinf.envs.realworld.safety import SafetyLimits

HERE = "rlinf.envs.realworld"
ARMS = {
    "fake": f"{HERE}.arms.fake:FakeArm",
    "twin": f"{HERE}.arms.twin:TwinArm",
    "serl_http": f"{HERE}.arms.serl_http:SerlHttpArm",
    "franky": f"{HERE}.arms.franky:FrankyArm",
    "panda_py": f"{HERE}.arms.panda_py:PandaPyArm",
}
CAMERAS = {
    "fake": f"{HERE}.cameras.fake:FakeSource",
    "twin": f"{HERE}.cameras.twin:TwinSource",
    "opencv": f"{HERE}.cameras.opencv:OpencvSource",
    "realsense": f"{HERE}.cameras.realsense:RealsenseSource",
    "http": f"{HERE}.cameras.http:HttpSource",
}
WITHOUT_ROBOT = ("fake", "twin")
TWIN_BOX = ((0.4, -0.1, 0.05), (0.6, 0.1, 0.25))
"""Corners in m that `fake` and `twin` have without a `safety` section."""


@dataclass(frozen=True)
class CameraSettings:
    """One camera.

    Attributes:
        driver: one of `CAMERAS`.
        options: keywords of the driver.
        crop: top, left, bottom, right as fractions of the picture; None: the largest square in the middle.
        size: height and width in pixels that the cropped picture is scaled to.
        stale_s: a newest picture older than this is none.
        retries: so often in a row a camera that fails is opened again.
        retry_s: pause before the first of them; it doubles each time.
    """

    driver: str
    options: dict[str, Any] = field(default_factory=dict)
    crop: tuple[float, float, float, float] | None = None
    size: tuple[int, int] = (128, 128)
    stale_s: float = 0.5
    retries: int = 5
    retry_s: float = 0.5


@dataclass(frozen=True)
class CellSettings:
    """A cell as the robot server runs it.

    Attributes:
        driver: one of `ARMS`.
        arm: keywords of the driver.
        safety: what the arm may do.
        cameras: by name.
        control_hz: how often the gate moves the arm's target.
        park: move to the reset joints when the server ends, instead of holding; never after a stop. The way is the
            driver's own from wherever the arm is, out of a hole too: the environment's `at_end: joints` lifts first.
    """

    driver: str
    safety: SafetyLimits
    arm: dict[str, Any] = field(default_factory=dict)
    cameras: dict[str, CameraSettings] = field(default_factory=dict)
    control_hz: float = 100.0
    park: bool = False


def read_cell(path: Path | None, driver: str | None = None, arm: Mapping[str, Any] | None = None) -> CellSettings:
    """The settings of a file, over which a driver and options of the command line win.

    Raises:
        ConfigError: the file cannot be read, names what is not known, or leaves out the limits of a real arm.
    """
    found: dict[str, Any] = {}
    if path is not None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; name a JSON file with the settings of the cell") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{path} must hold one JSON object, with the keys {', '.join(_names(CellSettings))}")
    if driver is not None and found.get("driver", driver) != driver:
        found.pop("arm", None)  # options of another driver
    found["driver"] = driver or found.get("driver", "")
    _known(found["driver"], ARMS, "driver")
    found["arm"] = {**found.get("arm", {}), **(arm or {})}
    if "safety" not in found:
        if found["driver"] not in WITHOUT_ROBOT:
            raise ConfigError(
                f"driver {found['driver']} moves a real arm: give its limits, at least "
                '{"safety": {"box_low": [x, y, z], "box_high": [x, y, z]}} in m, in a file named with --config'
            )
        found["safety"] = {"box_low": TWIN_BOX[0], "box_high": TWIN_BOX[1]}
    found["safety"] = read_limits(found["safety"])
    found["cameras"] = {
        name: record(CameraSettings, options, f"cameras.{name}") for name, options in found.get("cameras", {}).items()
    }
    cell = record(CellSettings, found, "the cell")
    if not 10 <= cell.control_hz <= 1000:
        raise ConfigError(f"control_hz {cell.control_hz} must lie between 10 and 1000")
    for name, camera in cell.cameras.items():
        if not name.isidentifier():
            raise ConfigError(f"cameras.{name}: a name is letters, digits and _")
        _known(camera.driver, CAMERAS, f"cameras.{name}.driver")
    return cell


def read_limits(values: Any, where: str = "safety") -> SafetyLimits:
    """Limits from a mapping. Raises ConfigError."""
    return record(SafetyLimits, values, where)


def record(cls: type, values: Any, where: str) -> Any:
    """A dataclass from a mapping; lists become tuples. Raises ConfigError for unknown and missing keys."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be an object with the keys {', '.join(_names(cls))}")
    for key in values:
        _known(key, _names(cls), where)
    needed = [f.name for f in dataclasses.fields(cls)
              if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]  # fmt: skip
    missing = [name for name in needed if name not in values]
    if missing:
        raise ConfigError(f"{where} needs {', '.join(missing)}")
    try:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def make_arm(driver: str, options: Mapping[str, Any]) -> Arm:
    """The arm of a driver. Raises ConfigError for unknown drivers and options."""
    arm: Arm = construct(_known(driver, ARMS, "driver"), ARMS[driver], options, f"options of driver {driver}")
    return arm


def construct(name: str, place: str, options: Mapping[str, Any], where: str) -> Any:
    """Call a class, named as "module:Class", with keywords that its signature knows. Raises ConfigError."""
    module, _, attribute = place.partition(":")
    make: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    parameters = inspect.signature(make).parameters
    for key in options:
        _known(key, list(parameters), where)
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise ConfigError(f"{where}: {name} needs {', '.join(missing)}")
    return make(**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _known(name: Any, names: Any, where: str) -> str:
    if name not in names:
        near = get_close_matches(str(name), list(names), 1)
        guess = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
        raise ConfigError(f"{where}: unknown {name or 'empty name'}; {guess}")
    return str(name)
