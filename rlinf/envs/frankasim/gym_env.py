"""PandaPickCube as gymnasium environments: one world behind gymnasium's own interface.

    import gymnasium
    import rlinf.envs.frankasim.gym_env  # registers both ids
    env = gymnasium.make("PandaPickCube-v0")

For trying things out and for other libraries; training uses `env.py`, which steps many worlds at once.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from rlinf.envs.frankasim.config import OBS_MODES, GymId, Rendering, Stepping
from rlinf.envs.frankasim.worlds import ACTION_DIM, INSTRUCTION, PickCubeWorlds

MAX_EPISODE_STEPS = 100
FPS = 50
MAX_SEED = 2**31
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.")


class PandaPickCubeEnv(gymnasium.Env[Any, np.ndarray]):
    """One world of `PickCubeWorlds`. It never terminates; gymnasium's time limit truncates after 100 steps.

    `info` holds `success`: whether the block is lifted by 0.1 m.

    Args:
        gym_id: PandaPickCube-v0, whose observation is float32 [10], or PandaPickCubeVision-v0, whose is
            {"state": float32 [7], "images": {"front", "wrist": uint8 [S, S, 3]}, "instruction": str}.
        image_size: S.
        rendering, stepping: as in `config.FrankaSimConfig`.
        render_mode: rgb_array for pictures from the front, or None.
        render_size: height and width of those.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012  # gymnasium declares it so

    def __init__(
        self,
        gym_id: GymId = "PandaPickCube-v0",
        *,
        image_size: int = 128,
        rendering: Rendering = "auto",
        stepping: Stepping = "auto",
        render_mode: str | None = None,
        render_size: int = 256,
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode is {render_mode!r}; there is only rgb_array")
        self.render_mode = render_mode
        self._worlds = PickCubeWorlds(
            1,
            obs_mode=OBS_MODES[gym_id],
            image_size=image_size,
            rendering=rendering,
            stepping=stepping,
            num_filmed=int(render_mode is not None),
            film_size=(render_size, render_size),
        )
        self._vision = OBS_MODES[gym_id] == "rgb"
        self.action_space = spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
        shapes = self._worlds.spaces.obs_shapes
        state = spaces.Box(-np.inf, np.inf, shapes["state"], np.float32)
        self.observation_space: spaces.Space[Any] = state
        if self._vision:
            pictures: dict[str, spaces.Space[Any]] = {
                path.removeprefix("images/"): spaces.Box(0, 255, shape, np.uint8)
                for path, shape in shapes.items()
                if path.startswith("images/")
            }
            text = spaces.Text(min_length=1, max_length=len(INSTRUCTION), charset=LETTERS)
            parts: dict[str, spaces.Space[Any]] = {"state": state, "images": spaces.Dict(pictures), "instruction": text}
            self.observation_space = spaces.Dict(parts)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """A fresh episode; with a seed it depends on that alone. No options are known."""
        super().reset(seed=seed, options=options)
        self._worlds.begin([0], [int(self.np_random.integers(MAX_SEED))])
        return self._observe(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Play one action, float32 [4], clipped to [−1, 1]."""
        taken = torch.from_numpy(np.asarray(action, np.float32).reshape(1, ACTION_DIM))
        if not bool(torch.isfinite(taken).all()):
            raise ValueError(f"the action is not finite: {taken[0].tolist()}")
        outcome = self._worlds.advance(taken, torch.ones(1, dtype=torch.bool))
        return self._observe(), float(outcome.reward), False, False, {"success": bool(outcome.success)}

    def render(self) -> np.ndarray | None:  # type: ignore[override]  # gymnasium allows for kinds that are not here
        """uint8 [render_size, render_size, 3] from the front, or None without a render mode."""
        pictures = self._worlds.render()
        return None if pictures is None else pictures[0]

    def close(self) -> None:
        """Free the simulator. Calling it twice is allowed."""
        self._worlds.close()

    def _observe(self) -> Any:
        obs = self._worlds.observe()
        state = obs["state"][0].numpy()
        if not self._vision:
            return state
        images = {name: image[0].numpy() for name, image in obs["images"].items()}
        return {"state": state, "images": images, "instruction": obs["instruction"][0]}


for _id in OBS_MODES:
    gymnasium.register(
        _id,
        entry_point=f"{__name__}:PandaPickCubeEnv",
        max_episode_steps=MAX_EPISODE_STEPS,
        kwargs={"gym_id": _id},
    )
