"""N worlds of PandaPickCube as a `Simulator`.

Action [4] in [−1, 1]: three moves of the tool's target, 0.1 m each, within a box; an increment of the gripper's
command, of which 0 is open and 1 closed. It holds for 0.02 s.

State [10], positions in m, velocity in m/s, in the frame of the robot's base:

    0-2  tool position      3-5  tool velocity      6  gripper command      7-9  block position

It is that of the start of the last physics step, 2 ms ago, as MuJoCo's sensors (and SERL) have it. With pictures the
state is its first seven numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlinf.core.errors import MissingDependency
from rlinf.core.types import EnvSpaces, Obs
from rlinf.envs.episodes import Outcome
from rlinf.envs.frankasim.config import ObsMode, Rendering, Stepping
from rlinf.envs.frankasim.control import (
    GRIPPER,
    PROPRIOCEPTION,
    STATE_DIM,
    NumpyControl,
    reward_and_success,
)
from rlinf.envs.frankasim.pictures import CAMERAS, Painter
from rlinf.envs.frankasim.scene import (
    ARM_HOME_RAD,
    ARM_JOINTS,
    BLOCK_HIGH_M,
    BLOCK_LOW_M,
    FULL_OPENING,
    INSTALL_COMMAND,
    Places,
    import_mujoco,
    physics_model,
)

ACTION_DIM = 4
INSTRUCTION = "Pick up the cube."
FILM_CAMERA = "front"


class Control(Protocol):
    """What moves the worlds; see `control.NumpyControl`."""

    def advance(self, action: np.ndarray, active: np.ndarray) -> None:
        """Apply one action, [N, 4] in [−1, 1], to the worlds that are active, bool [N]."""
        ...


class PickCubeWorlds:
    """N worlds with one model and one controller, stepped in the calling process.

    Args:
        num_envs: N.
        obs_mode: `state`, or `rgb` for pictures, proprioception and the instruction.
        image_size: height and width of the observed pictures.
        rendering: how they are drawn.
        stepping: how the controller runs.
        num_filmed: so many of the first worlds can be rendered for people.
        film_size: (width, height) of that picture.

    Raises:
        MissingDependency: MuJoCo, the scene, OpenGL or what the stepping needs is not here.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        num_envs: int,
        *,
        obs_mode: ObsMode = "state",
        image_size: int = 128,
        rendering: Rendering = "auto",
        stepping: Stepping = "auto",
        num_filmed: int = 0,
        film_size: tuple[int, int] = (256, 256),
    ) -> None:
        self._mujoco = import_mujoco()
        self.num_envs = num_envs
        self._model = physics_model()
        self._places = Places.of(self._model)
        self._worlds = [self._mujoco.MjData(self._model) for _ in range(num_envs)]
        self._control = make_control(stepping, self._model, self._worlds)
        self._start_height = np.zeros(num_envs)
        self._sensors = [world.sensordata for world in self._worlds]  # views: they show what is there now
        self._commands = [world.ctrl for world in self._worlds]
        places = self._places
        self._columns = np.concatenate(
            [np.arange(first, first + 3) for first in (places.tool_pos, places.tool_vel, places.block_pos)]
        )
        self._num_filmed, self._film_size = min(num_filmed, num_envs), film_size
        self._painter: Painter | None = None
        self._pictures = None if obs_mode == "state" else _Pictures(num_envs, image_size)
        if self._pictures or self._num_filmed:
            width, height = film_size if self._num_filmed else (0, 0)
            observed = image_size if self._pictures else 0
            self._painter = Painter(self._model, max(width, observed), max(height, observed), rendering)
        self.spaces = _spaces(obs_mode, image_size)
        self._tool_home = self._find_tool_home()
        self.begin(range(num_envs), [0] * num_envs)

    def begin(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """Arm at home, gripper open, block at a place on the floor that is drawn from the row's seed."""
        block = self._places.block_qpos
        for row, seed in zip(rows, seeds, strict=True):
            world = self._worlds[row]
            self._mujoco.mj_resetData(self._model, world)  # with controls, clock and the solver's last solution
            world.qpos[:ARM_JOINTS] = ARM_HOME_RAD
            world.qpos[block : block + 2] = np.random.default_rng(seed).uniform(BLOCK_LOW_M, BLOCK_HIGH_M)
            world.mocap_pos[0] = self._tool_home
            self._mujoco.mj_forward(self._model, world)
            self._start_height[row] = world.sensordata[self._places.block_pos + 2]
        if self._pictures:
            self._pictures.outdated[list(rows)] = True

    def advance(self, action: Tensor, active: Tensor) -> Outcome:
        """Apply one action, clipped to [−1, 1]; see the module."""
        moved = active.numpy()
        self._control.advance(action.numpy().clip(-1, 1), moved)
        if self._pictures:
            self._pictures.outdated |= moved
        reward, success = reward_and_success(self._state(), self._start_height)
        return Outcome(torch.from_numpy(reward.astype(np.float32)), torch.from_numpy(success), torch.zeros_like(active))

    def observe(self) -> Obs:
        """{"state": float32 [N, 10]}, or with pictures those, the first seven numbers and the instruction."""
        state = self._state().astype(np.float32)
        if self._pictures is None or self._painter is None:
            return {"state": torch.from_numpy(state)}
        return {
            "state": torch.from_numpy(state[:, PROPRIOCEPTION].copy()),
            "images": self._pictures.now(self._painter, self._worlds),
            "instruction": [INSTRUCTION] * self.num_envs,
        }

    def render(self) -> np.ndarray | None:
        """uint8 [num_filmed, height, width, 3] from the front, or None if none is filmed."""
        if not self._num_filmed or self._painter is None:
            return None
        width, height = self._film_size
        pictures = np.empty((self._num_filmed, height, width, 3), np.uint8)
        self._painter.draw(self._worlds[: self._num_filmed], CAMERAS[FILM_CAMERA], pictures)
        return pictures

    def close(self) -> None:
        """As `Simulator.close`."""
        if self._painter is not None:
            self._painter.close()

    def _state(self) -> np.ndarray:
        """float64 [N, 10]."""
        state = np.empty((self.num_envs, STATE_DIM))
        sensed = np.stack(self._sensors)[:, self._columns]
        state[:, :GRIPPER], state[:, GRIPPER + 1 :] = sensed[:, :GRIPPER], sensed[:, GRIPPER:]
        gripper = self._places.gripper
        state[:, GRIPPER] = [command[gripper] / FULL_OPENING for command in self._commands]
        return state

    def _find_tool_home(self) -> np.ndarray:
        world = self._worlds[0]
        self._mujoco.mj_resetData(self._model, world)
        world.qpos[:ARM_JOINTS] = ARM_HOME_RAD
        self._mujoco.mj_kinematics(self._model, world)
        return world.site_xpos[self._places.tool].copy()


class _Pictures:
    """The observed pictures of N worlds; those of worlds that moved are drawn anew when they are asked for."""

    def __init__(self, num_envs: int, size: int) -> None:
        self.outdated = np.ones(num_envs, bool)
        self._images = {name: np.zeros((num_envs, size, size, 3), np.uint8) for name in CAMERAS}

    def now(self, painter: Painter, worlds: Sequence[Any]) -> dict[str, Tensor]:
        """Camera → uint8 [N, size, size, 3] in new memory."""
        rows = np.flatnonzero(self.outdated).tolist()
        for name, images in self._images.items():
            drawn = np.empty((len(rows), *images.shape[1:]), np.uint8)
            painter.draw([worlds[row] for row in rows], CAMERAS[name], drawn)
            images[rows] = drawn
        self.outdated[:] = False
        return {name: torch.from_numpy(images.copy()) for name, images in self._images.items()}


def make_control(stepping: Stepping, model: Any, worlds: list[Any]) -> Control:
    """The controller of all worlds, in the form that is asked for.

    Raises:
        MissingDependency: `compiled` is asked for and numba is not here.
    """
    if stepping == "numpy":
        return NumpyControl(model, worlds)
    try:
        from rlinf.envs.frankasim.kernel import CompiledControl
    except ImportError as error:
        if stepping == "compiled":
            raise MissingDependency(
                f"env.*.stepping: compiled needs numba ({error}); run `{INSTALL_COMMAND}`, or set it to auto"
            ) from error
        return NumpyControl(model, worlds)
    return CompiledControl(model, worlds)


def _spaces(obs_mode: ObsMode, image_size: int) -> EnvSpaces:
    if obs_mode == "state":
        return EnvSpaces({"state": (STATE_DIM,)}, {"state": "float32"}, ACTION_DIM)
    cameras = [f"images/{name}" for name in CAMERAS]
    shapes = {"state": (PROPRIOCEPTION.stop,)} | dict.fromkeys(cameras, (image_size, image_size, 3))
    dtypes = {"state": "float32"} | dict.fromkeys(cameras, "uint8")
    return EnvSpaces(shapes | {"instruction": ()}, dtypes | {"instruction": "str"}, ACTION_DIM)
