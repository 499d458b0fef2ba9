"""The published objects of the digital twin, where someone has them and does not ask for them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from rlinf.envs.config import EnvConfig
from rlinf.envs.maniskill.config import PUBLISHED_TWIN_TASK, TWIN_TASK, ManiSkillConfig

VARIABLE = "MANISKILL_ASSET_DIR"


def remark_on_objects(envs: Mapping[str, EnvConfig | None]) -> str | None:
    """One line where MANISKILL_ASSET_DIR is set and a section of the configuration has the twin without it.

    The variable alone changes no task: results would depend on who runs a recipe.

    Args:
        envs: by section, `env.train`.
    """
    twins = ((name, env) for name, env in envs.items() if isinstance(env, ManiSkillConfig))
    without = [name for name, env in twins if env.init_params.id == TWIN_TASK]
    if not without or not os.environ.get(VARIABLE):
        return None
    wanted = " ".join(f"{name}.init_params.id={PUBLISHED_TWIN_TASK}" for name in without)
    return f"{VARIABLE} is set, but {TWIN_TASK} has simple objects of its own; for those in the folder write {wanted}"
