"""What people see: captions in the pictures of an evaluation, and the last episodes of training as films."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rlinf.core import tree
from rlinf.core.protocols import VectorEnv
from rlinf.core.types import EnvStep, Obs
from rlinf.metrics.video import overlay, write_video
from rlinf.workers.env_worker import Resumable

_LOG = logging.getLogger(__name__)
KEPT_FILMS = 5
CLOSE_TIMEOUT_S = 10.0


class CaptionedEnv:
    """A `VectorEnv` that writes step, reward and success into its pictures; otherwise the one that it wraps."""

    def __init__(self, env: VectorEnv) -> None:
        self._env = env
        self.num_envs, self.spaces = env.num_envs, env.spaces
        self._begin(torch.ones(env.num_envs, dtype=torch.bool))

    def reset(self, seed: int | None = None) -> Obs:
        """As `VectorEnv.reset`."""
        self._begin(torch.ones(self.num_envs, dtype=torch.bool))
        return self._env.reset(seed)

    def step(self, action: Tensor) -> EnvStep:
        """As `VectorEnv.step`."""
        step = self._env.step(action)
        self._steps += action.shape[1]
        self._reward = step.reward.sum(-1).cpu()
        self._success = step.info["success"].cpu().clone()
        self._begin(step.done.cpu())
        return step

    def render(self) -> np.ndarray | None:
        """As `VectorEnv.render`, with captions."""
        pictures = self._env.render()
        if pictures is None:
            return None
        return overlay(pictures, [self._caption(row) for row in range(len(pictures))])

    def close(self) -> None:
        """As `VectorEnv.close`."""
        self._env.close()

    def _begin(self, rows: Tensor) -> None:
        """Rows whose picture is, from now on, that of a new episode."""
        if bool(rows.all()):
            self._steps = torch.zeros(self.num_envs, dtype=torch.int64)
            self._reward, self._success = torch.zeros(self.num_envs), torch.zeros_like(rows)
        else:
            self._steps[rows] = 0
            self._reward[rows] = 0
            self._success[rows] = False

    def _caption(self, row: int) -> str:
        success = "\nsuccess" if self._success[row] else ""
        return f"step {int(self._steps[row])}\nreward {self._reward[row]:.3f}{success}"


class LastEpisodes:
    """A `VectorEnv` that keeps films of its first environment's last episodes; otherwise the one that it wraps.

    The pictures are those of the cameras that the policy sees, beside each other. A film is written in the background;
    an episode that ends while one is being written has none, so that no step waits for a film.

    Args:
        env: shows pictures; without them nothing is filmed.
        folder: of `last_0.mp4`, `last_1.mp4`, ..., used in turn.
        fps: pictures per second.
        kept: number of films.
    """

    def __init__(self, env: VectorEnv, folder: Path, fps: float, kept: int = KEPT_FILMS) -> None:
        self._env, self._folder, self._fps, self._kept = env, folder, fps, kept
        self.num_envs, self.spaces = env.num_envs, env.spaces
        self._frames: list[list[np.ndarray]] = []
        self._writer: threading.Thread | None = None
        self._written = 0
        self._told = False

    def reset(self, seed: int | None = None) -> Obs:
        """As `VectorEnv.reset`."""
        obs = self._env.reset(seed)
        self._frames = [cameras_of(obs)]
        return obs

    def step(self, action: Tensor) -> EnvStep:
        """As `VectorEnv.step`."""
        step = self._env.step(action)
        self._frames.append(cameras_of(step.last_obs))
        if bool(step.done[0]):
            self._write()
            self._frames = [cameras_of(step.obs)]
        return step

    def render(self) -> np.ndarray | None:
        """As `VectorEnv.render`."""
        return self._env.render()

    def close(self) -> None:
        """As `VectorEnv.close`; waits for a film that is being written."""
        self._env.close()
        if self._writer is not None:
            self._writer.join(CLOSE_TIMEOUT_S)

    def _write(self) -> None:
        frames, busy = self._frames, self._writer is not None and self._writer.is_alive()
        if busy or len(frames) < 2:
            return
        path = self._folder / f"last_{self._written % self._kept}.mp4"
        self._written += 1
        self._writer = threading.Thread(target=self._film, args=(path, frames), name="film", daemon=True)
        self._writer.start()

    def _film(self, path: Path, frames: list[list[np.ndarray]]) -> None:
        try:
            write_video(path, np.stack([beside(cameras) for cameras in frames]), self._fps)
        except Exception as error:  # a film must not end a run
            if not self._told:
                self._told = True
                _LOG.warning("no films of episodes: %s", error)


class ResumableLastEpisodes(LastEpisodes):
    """The same around an environment whose exact state can be saved."""

    def state_dict(self) -> dict[str, Any]:
        """As `Resumable.state_dict`."""
        return cast(Resumable, self._env).state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Resumable.load_state_dict`; the episode that goes on has a film from here."""
        cast(Resumable, self._env).load_state_dict(state)
        self._frames = []


def film_last_episodes(env: VectorEnv, folder: Path, fps: float) -> VectorEnv:
    """`env` with films of its last episodes; itself where it shows no pictures."""
    if not any(path.startswith("images/") for path in env.spaces.obs_shapes):
        return env
    return (ResumableLastEpisodes if isinstance(env, Resumable) else LastEpisodes)(env, folder, fps)


def cameras_of(obs: Obs) -> list[np.ndarray]:
    """Pictures uint8 [H, W, 3] of the first environment, by the names of the cameras."""
    return [leaf[0].cpu().numpy() for path, leaf in sorted(tree.leaves(obs)) if path.startswith("images/")]


def beside(pictures: list[np.ndarray]) -> np.ndarray:
    """One picture of several; lower ones stand on black."""
    height = max(len(picture) for picture in pictures)
    return np.concatenate([np.pad(p, ((0, height - len(p)), (0, 0), (0, 0))) for p in pictures], 1)
