"""N worlds of a LIBERO suite as a `Simulator`.

Action [7] in [−1, 1], for 0.05 s: the tool's target moves by up to 5 cm in each direction and turns by up to 0.5 rad
about each axis; above 0 the gripper closes, below 0 it opens, at 0 its fingers stop.

State [8], in the frame of the world, as openpi's policies for LIBERO have it:

    0-2  tool position in m      3-5  hand orientation as axis times angle      6-7  positions of both fingers in m

It is that of the start of the last physics step, 2 ms ago, and so are the pictures. They are turned by 180 degrees as
MuJoCo reads them, which is again openpi's way: the right way up, but mirrored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlinf.core.types import EnvSpaces, Obs
from rlinf.envs.episodes import Outcome
from rlinf.envs.libero.config import Rendering
from rlinf.envs.libero.control import ACTION_DIM
from rlinf.envs.libero.package import Suite, import_problems
from rlinf.envs.libero.pictures import CAMERAS, Painter
from rlinf.envs.libero.scene import FULL_STATE_DIM, STATE_DIM, Scene, World

FILM_CAMERA = "agentview"


class LiberoWorlds:
    """N worlds, each in one task at a time, stepped in the calling process.

    Worlds of the same task share its scene. Scenes of tasks that no world is in are kept for later, the most recent
    ones: a task that does not change is not built again.

    Args:
        suite: the tasks; an episode's seed modulo the number of reset ids is its reset id.
        num_envs: N.
        image_size: height and width of the observed pictures.
        num_steps_wait: steps of rest after a reset.
        show_objects: whether the state is the full one, of which policies should know nothing.
        success_reward: what a step earns after which the task is solved.
        rendering: how pictures are drawn.
        max_scenes: most scenes of other tasks that are kept.
        num_filmed: so many of the first worlds can be rendered for people.
        film_size: (width, height) of that picture.

    Raises:
        MissingDependency: LIBERO, MuJoCo or OpenGL is not here.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        suite: Suite,
        num_envs: int,
        *,
        image_size: int = 256,
        num_steps_wait: int = 10,
        show_objects: bool = False,
        success_reward: float = 1.0,
        rendering: Rendering = "auto",
        max_scenes: int = 16,
        num_filmed: int = 0,
        film_size: tuple[int, int] = (256, 256),
    ) -> None:
        self.num_envs = num_envs
        self._suite, self._trials = suite, suite.trials
        self._num_steps_wait, self._max_scenes = num_steps_wait, max_scenes
        self._success_reward, self._show_objects = success_reward, show_objects
        self._tasks = [0] * num_envs
        self._worlds: list[World | None] = [None] * num_envs
        self._scenes: dict[int, Scene] = {}  # task → scene, the one used last at the end
        self._num_filmed, self._film_size = min(num_filmed, num_envs), film_size
        width, height = film_size if self._num_filmed else (0, 0)
        import_problems()  # what is missing is missed now
        self._painter = Painter(max(width, image_size), max(height, image_size), rendering)
        self._outdated = np.ones(num_envs, bool)
        self._images = {name: np.zeros((num_envs, image_size, image_size, 3), np.uint8) for name in CAMERAS}
        self.spaces = _spaces(suite, image_size, FULL_STATE_DIM if show_objects else STATE_DIM)

    def begin(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """Stored initial states, after the steps of rest; see `reset_ids.py` for what a seed means."""
        for row in rows:
            self._worlds[row] = None
        for row, seed in zip(rows, seeds, strict=True):
            self._tasks[row], trial = self._trials.locate(seed % self._trials.total)
            scene = self._scene(self._tasks[row])
            self._worlds[row] = scene.begin(trial, seed, steps=self._num_steps_wait)
        self._outdated[list(rows)] = True

    def advance(self, action: Tensor, active: Tensor) -> Outcome:
        """Apply one action, clipped to [−1, 1]; see the module."""
        success = np.zeros(self.num_envs, bool)
        actions = action.numpy()
        for row in active.nonzero().flatten().tolist():
            success[row] = self._scenes[self._tasks[row]].advance(self._world(row), actions[row])
        self._outdated |= active.numpy()
        reward = np.where(success, self._success_reward, 0.0).astype(np.float32)
        return Outcome(torch.from_numpy(reward), torch.from_numpy(success), torch.zeros_like(active))

    def observe(self) -> Obs:
        """{"state": float32 [N, 8 or 14], "images": {main, wrist: uint8 [N, size, size, 3]}, "instruction": [N]}."""
        states = [self._state(row) for row in range(self.num_envs)]
        for row in np.flatnonzero(self._outdated).tolist():
            for name, camera in CAMERAS.items():
                picture = self._images[name][row]
                self._painter.draw(self._scenes[self._tasks[row]], self._world(row), camera, picture)
                picture[:] = picture[:, ::-1].copy()
        self._outdated[:] = False
        return {
            "state": torch.from_numpy(np.stack(states)),
            "images": {name: torch.from_numpy(images.copy()) for name, images in self._images.items()},
            "instruction": [self._suite.tasks[task].language for task in self._tasks],
        }

    def render(self) -> np.ndarray | None:
        """uint8 [num_filmed, height, width, 3] of the scene, not mirrored, or None if none is filmed."""
        if not self._num_filmed:
            return None
        width, height = self._film_size
        pictures = np.empty((self._num_filmed, height, width, 3), np.uint8)
        for row, picture in enumerate(pictures):
            self._painter.draw(self._scenes[self._tasks[row]], self._world(row), FILM_CAMERA, picture)
        return pictures

    def close(self) -> None:
        """As `Simulator.close`."""
        self._painter.close()
        self._worlds = [None] * self.num_envs
        self._scenes.clear()

    def world(self, row: int) -> tuple[Scene, World]:
        """A world and its scene, to look into or to change."""
        self._outdated[row] = True
        return self._scenes[self._tasks[row]], self._world(row)

    def _state(self, row: int) -> np.ndarray:
        scene, world = self._scenes[self._tasks[row]], self._world(row)
        return scene.full_state(world) if self._show_objects else scene.state(world)

    def _world(self, row: int) -> World:
        world = self._worlds[row]
        if world is None:
            raise RuntimeError(f"environment {row} was not begun")
        return world

    def _scene(self, task: int) -> Scene:
        """The scene of a task, built unless it is kept. Builds of too many tasks ago are given up."""
        if task in self._scenes:
            self._scenes[task] = self._scenes.pop(task)
            return self._scenes[task]
        used = {self._tasks[row] for row, world in enumerate(self._worlds) if world is not None}
        idle = [kept for kept in self._scenes if kept not in used]
        for old in idle[: max(0, len(idle) - self._max_scenes)]:
            self._painter.forget(self._scenes.pop(old))
        self._scenes[task] = Scene(self._suite, task)
        return self._scenes[task]


def _spaces(suite: Suite, image_size: int, state_dim: int) -> EnvSpaces:
    cameras = [f"images/{name}" for name in CAMERAS]
    shapes = {"state": (state_dim,)} | dict.fromkeys(cameras, (image_size, image_size, 3))
    dtypes = {"state": "float32"} | dict.fromkeys(cameras, "uint8")
    return EnvSpaces(
        shapes | {"instruction": ()},
        dtypes | {"instruction": "str"},
        ACTION_DIM,
        tasks=tuple(task.language for task in suite.tasks),
    )
