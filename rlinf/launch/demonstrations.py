"""RL-Co: the real robot's demonstrations that a configuration puts beside PPO, and what is told of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlinf.algorithms.co_training import Demonstrations
from rlinf.core.errors import DataError
from rlinf.core.ranks import ONE_RANK, Ranks
from rlinf.core.seeding import derive_seed, torch_generator
from rlinf.data.chunk_mixture import Ahead, MixedChunks
from rlinf.data.lerobot.layout import INFO_FILE
from rlinf.launch.algorithm_config import PpoConfig
from rlinf.launch.config import Root
from rlinf.launch.lerobot_stats import check_normalised
from rlinf.launch.machine import num_cores
from rlinf.models.embodiment.openpi.actor_critic import Pi0ActorCritic
from rlinf.models.embodiment.openpi.model import training_time
from rlinf.models.embodiment.openpi.norm_stats import find_norm_stats, read_norm_stats
from rlinf.models.embodiment.openpi.policy_config import OpenpiConfig
from rlinf.models.embodiment.openpi.transforms import resize_with_pad

if TYPE_CHECKING:
    from rlinf.data.lerobot.chunks import LeRobotChunks

HOME = "HF_LEROBOT_HOME"
RECORD = (
    "python -m rlinf record maniskill_sac_mlp --format lerobot --episodes 50 --output FOLDER "
    "env@env.train=maniskill_pick_and_place_shifted_twin env.train.ignore_terminations=False "
    "env.train.max_episode_steps=40 env.train.max_steps_per_rollout_epoch=40 env.train.total_num_envs=8"
)


def open_demonstrations(
    config: Root, network: Pi0ActorCritic, device: torch.device, ranks: Ranks = ONE_RANK
) -> Demonstrations | None:
    """What is trained on beside the reward; None where the configuration asks for none. Raises DataError."""
    actor = config.actor
    if not actor.use_real_data_co_training:
        return None
    seed = derive_seed(config.runner.seed, f"actor/{actor.seed}/demonstrations")
    batches = MixedChunks(
        [read_demonstrations(config)], None, actor.sft_batch_size, seed=seed, rank=ranks.rank, num_ranks=ranks.size
    )
    return Demonstrations(
        network,
        Ahead(batches),
        _draw_time,
        weight=actor.sft_loss_weight,
        device=device,
        generator=torch_generator(seed, f"noise/{ranks.rank}", device),
    )


def read_demonstrations(config: Root) -> LeRobotChunks:
    """The data set, with pictures of the model's size. Raises DataError naming what is missing or does not fit.

    Its numbers are checked against the statistics beside the weights.
    """
    from rlinf.data.lerobot.chunks import LeRobotChunks  # an optional package, which other recipes do without

    actor, model = config.actor, config.actor.model
    assert isinstance(model, OpenpiConfig)  # the schema checks it
    robot = model.robot()
    size = robot.model.vision.image_size

    def resize(pictures: Tensor) -> Tensor:
        return resize_with_pad(pictures, size, size)

    try:
        data = LeRobotChunks(
            find_demonstrations(config),
            robot.columns,
            robot.model.action_horizon,
            action_dim=robot.action_dim,
            resize=resize,
            map_to=None if actor.sft_map_to is None else Path(actor.sft_map_to).expanduser(),
            num_threads=max(1, num_cores() // 4),
        )
    except DataError as problem:
        raise DataError(f"actor.sft_data_path: {problem}. To record some: {RECORD}") from problem
    if (folder := model.folder()) is not None:
        file = find_norm_stats(folder, robot.asset_id)
        if file is not None:
            check_normalised(robot, data, read_norm_stats(file), str(file))
    return data


def find_demonstrations(config: Root) -> str:
    """Folder or name of the data set: `sft_data_path`, or else what HF_LEROBOT_HOME is or holds. Raises DataError."""
    actor, home = config.actor, os.environ.get(HOME)
    if actor.sft_data_path is not None:
        return str(Path(actor.sft_data_path).expanduser())
    assert isinstance(actor.model, OpenpiConfig)
    name = actor.model.robot().asset_id
    if home is None:
        raise DataError(f"no data set is named; write its folder there, or export {HOME}, the folder with {name}")
    places = (Path(home).expanduser() / part for part in ("", name, name.rpartition("/")[2]))
    return next((str(place) for place in places if (place / INFO_FILE).is_file()), name)


def describe_batches(config: Root, learners: int) -> str | None:
    """One line on L_SFT where PPO trains pi0: the sizes of an update's two batches, or that there is none."""
    actor = config.actor
    if not actor.use_real_data_co_training:
        if not isinstance(actor.model, OpenpiConfig) or not isinstance(config.algorithm, PpoConfig):
            return None
        return (
            "co-training: off, L_RL alone; demonstrations are put beside it by actor.use_real_data_co_training=True "
            "actor.sft_data_path=FOLDER"
        )
    whole, micro, beside = actor.global_batch_size, actor.micro_batch_size, actor.sft_batch_size
    return (
        f"co-training: L_RL + {actor.sft_loss_weight:g} L_SFT; an update takes {whole} decisions, and demonstrations "
        "to the true batch size of global_batch_size x sft_batch_size / (micro_batch_size x learners) = "
        f"{whole} x {beside} / ({micro} x {learners}) = {whole * beside // (micro * learners)}"
    )


def _draw_time(batch: int, generator: torch.Generator) -> Tensor:
    return training_time(batch, generator, generator.device)
