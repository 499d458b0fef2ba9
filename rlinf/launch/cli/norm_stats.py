"""`python -m rlinf norm_stats`: the statistics by which a recipe of supervised fine-tuning normalises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlinf.core.errors import ConfigError
from rlinf.launch.lerobot_sources import open_datasets, shares_of
from rlinf.launch.lerobot_stats import norm_stats_of
from rlinf.launch.parse import load_as
from rlinf.launch.sft_config import SftConfig
from rlinf.models.embodiment.openpi.cloning import OpenpiCloningConfig
from rlinf.models.embodiment.openpi.norm_stats import NormStats, write_norm_stats


def run(recipe: str, overrides: Sequence[str], config_dir: Path, output: Path | None) -> None:
    """Compute, print and write them; nothing is recorded. Raises RlinfError."""
    config = load_as(SftConfig, recipe, overrides, config_dir)
    if not isinstance(config.model, OpenpiCloningConfig):
        raise ConfigError(f"{recipe} trains a {config.model.model_type}, which needs no norm_stats.json")
    robot = config.model.robot()
    datasets = open_datasets(
        config.data, robot, config.model.policy_setup, lambda text: print(text, flush=True), may_record=False
    )
    stats = norm_stats_of(robot, list(datasets.values()), shares_of(config.data))
    first = next(iter(datasets.values())).numbers(np.zeros(1, np.int64))[0]["state"]
    for name, rows in (("state", first.shape[-1]), ("actions", robot.action_dim)):
        print(f"{name}\n" + "\n".join(table(stats[name], rows)))
    file = write_norm_stats(stats, output or Path("norm_stats") / robot.name)
    print(f"{file}: use it with model.norm_stats_path={file}")


def table(stats: NormStats, rows: int) -> list[str]:
    """Lines of the first numbers: mean, deviation and quantiles."""
    lines = ["        mean        std        q01        q99"]
    q01, q99 = stats.q01, stats.q99
    for row in range(min(rows, stats.size)):
        values = [stats.mean[row], stats.std[row]] + ([] if q01 is None or q99 is None else [q01[row], q99[row]])
        lines.append(f"  {row:<2}" + "".join(f"{float(value):>11.4f}" for value in values).removeprefix(" " * 3))
    return lines
