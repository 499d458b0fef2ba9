"""LIBERO as a `VectorEnv`: N worlds in this process or spread over several."""

from __future__ import annotations

from functools import partial

from rlinf.core.protocols import VectorEnv
from rlinf.envs.episodes import ReplayedEnv, episode_rules
from rlinf.envs.libero.config import LiberoConfig
from rlinf.envs.libero.package import open_suite
from rlinf.envs.libero.reset_ids import starts_of
from rlinf.envs.libero.worlds import LiberoWorlds
from rlinf.envs.subproc import SubprocessEnv


def make(
    config: LiberoConfig,
    *,
    num_envs: int,
    seed: int,
    control_mode: str | None,
    num_workers: int,
    render: bool,
    first_row: int = 0,
) -> VectorEnv:
    """Environments as configured.

    Args:
        config: what to build; of its numbers of environments and workers, the arguments here are used. Its
            total_num_envs decides how reset ids are dealt out.
        num_envs: N.
        seed: root seed until the first seeded reset.
        control_mode: means nothing here: there is one controller.
        num_workers: processes; 0 steps in the calling one.
        render: whether the first `video_cfg.max_envs` environments can be rendered.
        first_row: number of the first of them among all environments, those of other workers and stages too.
    """
    starts_of(config, open_suite(config).trials)  # whatever is missing or wrong is said here, once
    num_filmed = min(config.video_cfg.max_envs, num_envs) if render else 0
    if num_workers == 0:
        return make_share(config, seed, num_filmed=num_filmed, first_row=first_row, num_envs=num_envs)
    makers, first, parts = [], 0, min(num_workers, num_envs)
    for part in range(parts):
        rows = num_envs // parts + (part < num_envs % parts)
        filmed = max(0, min(num_filmed - first, rows))
        makers.append(partial(make_share, config, seed, num_filmed=filmed, first_row=first_row + first, num_envs=rows))
        first += rows
    return SubprocessEnv(makers, label=config.task_suite_name)


def make_share(config: LiberoConfig, seed: int, *, num_filmed: int, first_row: int, num_envs: int) -> ReplayedEnv:
    """Environments first_row to first_row + num_envs − 1, stepped in this process."""
    suite = open_suite(config)
    worlds = LiberoWorlds(
        suite,
        num_envs,
        image_size=config.image_size,
        num_steps_wait=config.num_steps_wait,
        show_objects=config.show_objects,
        success_reward=config.reward_coef,
        rendering=config.rendering,
        max_scenes=config.max_scenes,
        num_filmed=num_filmed,
        film_size=(config.video_cfg.width, config.video_cfg.height),
    )
    starts = starts_of(config, suite.trials)
    return ReplayedEnv(worlds, episode_rules(config), seed=seed, first_row=first_row, starts=starts)
