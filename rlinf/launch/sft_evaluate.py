"""Episodes of a policy that is being cloned: how often it succeeds, and a film."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlinf.core import tree
from rlinf.core.protocols import VectorEnv
from rlinf.core.seeding import derive_seed, torch_generator
from rlinf.core.types import Obs
from rlinf.envs.config import EnvConfig
from rlinf.launch.build import make_env
from rlinf.launch.film import CaptionedEnv
from rlinf.metrics.video import tile
from rlinf.workers.env_worker import EpisodeMean


@dataclass(frozen=True)
class ActingDecoder:
    """A policy that turns noise into chunks of actions.

    Attributes:
        decode: observations on `device` and noise [N, *noise_shape] → actions [N, H, A].
        noise_shape: of the noise of one chunk.
        device: where it computes.
        executed: so many actions of every chunk are played.
    """

    decode: Callable[[Obs, Tensor], Tensor]
    noise_shape: tuple[int, ...]
    device: torch.device
    executed: int


@contextlib.contextmanager
def evaluation_env(section: EnvConfig | None, policy_setup: str | None) -> Iterator[VectorEnv | None]:
    """The environments of evaluation, closed in the end; None where there are none."""
    if section is None:
        yield None
        return
    waiting = section.model_copy(update={"auto_reset": False})
    filming = section.video_cfg.save_video
    env = make_env(
        waiting, num_envs=section.total_num_envs, seed=section.seed, policy_setup=policy_setup, render=filming
    )
    try:
        yield CaptionedEnv(env) if filming and section.video_cfg.info_on_video else env
    finally:
        env.close()


@torch.no_grad()
def evaluate(
    section: EnvConfig, policy: ActingDecoder, env: VectorEnv, *, film: bool = False
) -> tuple[dict[str, float], np.ndarray | None]:
    """Means over `rollout_epoch` episodes in every environment, with noise drawn from N(0, I); the same every time.

    With `film` also pictures uint8 [T, height, width, 3] of the first episodes of the first environments, one before
    each chunk.
    """
    episodes, pictures = EpisodeMean(), []
    generator = torch_generator(section.seed, "evaluation")
    for epoch in range(section.rollout_epoch):
        obs = env.reset(seed=derive_seed(section.seed, f"evaluation/{epoch}") % 2**31)
        playing = torch.ones(env.num_envs, dtype=torch.bool)
        while bool(playing.any()):
            if film and epoch == 0 and (shown := env.render()) is not None:
                pictures.append(tile(shown[: section.video_cfg.max_envs]))
            noise = torch.randn(env.num_envs, *policy.noise_shape, generator=generator)
            action = policy.decode(tree.to(obs, policy.device), noise.to(policy.device))
            step = env.step(action[:, : policy.executed])
            done, obs = step.done.cpu(), step.obs
            episodes.add(step.info, done & playing)
            playing &= ~done
    return episodes.mean(), np.stack(pictures) if pictures else None
