"""Franka-Sim as a `VectorEnv`: N worlds in this process or spread over several."""

from __future__ import annotations

from functools import partial

from rlinf.core.protocols import VectorEnv
from rlinf.envs.episodes import EpisodeRules, ReplayedEnv, episode_rules
from rlinf.envs.frankasim.config import OBS_MODES, FrankaSimConfig
from rlinf.envs.frankasim.worlds import PickCubeWorlds
from rlinf.envs.subproc import SubprocessEnv


def make(
    config: FrankaSimConfig,
    *,
    num_envs: int,
    seed: int,
    control_mode: str | None,
    num_workers: int,
    render: bool,
) -> VectorEnv:
    """Environments as configured.

    Args:
        config: what to build; of its numbers of environments and workers, the arguments here are used.
        num_envs: N.
        seed: root seed until the first seeded reset.
        control_mode: means nothing here: there is one controller.
        num_workers: processes; 0 steps in the calling one.
        render: whether the first `video_cfg.max_envs` environments can be rendered.
    """
    num_filmed = min(config.video_cfg.max_envs, num_envs) if render else 0
    if num_workers == 0:
        return make_share(config, seed, num_filmed=num_filmed, first_row=0, num_envs=num_envs)
    makers, first_row = [], 0
    for share in range(min(num_workers, num_envs)):
        rows = num_envs // min(num_workers, num_envs) + (share < num_envs % min(num_workers, num_envs))
        filmed = max(0, min(num_filmed - first_row, rows))
        makers.append(partial(make_share, config, seed, num_filmed=filmed, first_row=first_row, num_envs=rows))
        first_row += rows
    return SubprocessEnv(makers, label=config.gym_id)


def make_share(config: FrankaSimConfig, seed: int, *, num_filmed: int, first_row: int, num_envs: int) -> ReplayedEnv:
    """Environments first_row to first_row + num_envs − 1, stepped in this process."""
    worlds = PickCubeWorlds(
        num_envs,
        obs_mode=OBS_MODES[config.gym_id],
        image_size=config.image_size,
        rendering=config.rendering,
        stepping=config.stepping,
        num_filmed=num_filmed,
        film_size=(config.video_cfg.width, config.video_cfg.height),
    )
    rules: EpisodeRules = episode_rules(config)
    return ReplayedEnv(worlds, rules, seed=seed, first_row=first_row)
