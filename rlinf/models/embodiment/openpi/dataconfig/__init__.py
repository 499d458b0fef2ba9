"""Which robot a checkpoint was trained for: cameras, normalisation, meaning of actions, by the names in recipes.

    π0 on LIBERO          two cameras; z-scores; the first six numbers of an action are relative to the state
    π0.5 on LIBERO        two cameras; quantiles; chunks of 10; no state at all
    … on ManiSkill        one camera
    π0.5, sim and real    one camera in front of a Franka; quantiles; chunks of 8; no state at all

π0.5 reads the state as words of its prompt or, as in all of these, not at all.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace

from rlinf.core.errors import ConfigError
from rlinf.models.embodiment.openpi.config import PI0, PI05
from rlinf.models.embodiment.openpi.dataconfig.robot import DataConfig, Pipeline

__all__ = ["DATA_CONFIGS", "DataConfig", "Pipeline", "data_config"]

FRONT = ("agentview", "main", "front", "base", "image")
WRIST = ("wrist", "robot0_eye_in_hand", "eye_in_hand", "wrist_image")

PI0_LIBERO = DataConfig(
    name="pi0_libero",
    model=PI0,
    asset_id="physical-intelligence/libero",
    cameras={"base_0_rgb": FRONT, "left_wrist_0_rgb": WRIST},
    columns={"images/agentview": "image", "images/wrist": "wrist_image", "state": "state", "actions": "actions"},
    # LIBERO's actions are differences already; the published π0 was trained on these differences of differences.
    delta_mask=(True, True, True, True, True, True, False),
)
PI05_LIBERO = replace(PI0_LIBERO, name="pi05_libero", model=replace(PI05, action_horizon=10), delta_mask=None)

PI0_MANISKILL = DataConfig(
    name="pi0_maniskill",
    model=PI0,
    asset_id="physical-intelligence/maniskill",
    cameras={"base_0_rgb": FRONT},
    columns={"images/front": "observation.images.top", "state": "observation.state", "actions": "actions"},
)
PI05_MANISKILL = replace(PI0_MANISKILL, name="pi05_maniskill", model=replace(PI05, action_horizon=10))

CO_TRAINING = DataConfig(
    name="pi05_maniskill_sim_real_co_training",
    model=replace(PI05, action_horizon=8),
    asset_id="physical-intelligence/pick_and_place_real",
    cameras={"base_0_rgb": FRONT},
    columns={"images/front": "image", "state": "state", "actions": "actions"},
    pad_first=True,
)

DATA_CONFIGS: Mapping[str, DataConfig] = {
    config.name: config
    for config in (
        PI0_LIBERO,
        replace(PI0_LIBERO, name="pi0_libero_horizon10", model=replace(PI0, action_horizon=10)),
        PI05_LIBERO,
        PI0_MANISKILL,
        PI05_MANISKILL,
        CO_TRAINING,
    )
}


def data_config(name: str) -> DataConfig:
    """The configuration called `name`. Raises ConfigError with the nearest name where there is none."""
    if name not in DATA_CONFIGS:
        near = difflib.get_close_matches(name, DATA_CONFIGS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(DATA_CONFIGS)}"
        raise ConfigError(f"no data config is called {name!r}; {hint}")
    return DATA_CONFIGS[name]
