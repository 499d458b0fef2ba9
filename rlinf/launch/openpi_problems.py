"""What π0 under PPO, and demonstrations beside it, do not go together with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlinf.launch.algorithm_config import PpoConfig
from rlinf.models.embodiment.openpi.policy_config import OpenpiConfig

if TYPE_CHECKING:
    from rlinf.launch.config import Root


def openpi_problems(root: Root) -> Iterator[tuple[str, str]]:
    """(key, message) for every disagreement."""
    model, actor = root.actor.model, root.actor
    on_policy = isinstance(root.algorithm, PpoConfig)
    trained = isinstance(model, OpenpiConfig) and not model.openpi.use_dsrl
    if actor.use_real_data_co_training and not (trained and on_policy):
        yield (
            "actor.use_real_data_co_training",
            "actor.use_real_data_co_training: demonstrations beside the reward are for pi0 or pi0.5 under PPO "
            "(model_type: openpi, loss_type: actor_critic); remove the key",
        )
    if actor.gradient_checkpointing and not trained:
        yield (
            "actor.gradient_checkpointing",
            f"actor.gradient_checkpointing: nothing of {model.model_type} is worth computing twice; remove the key",
        )
    if isinstance(root.algorithm, PpoConfig) and root.algorithm.recompute_logprobs and root.runner.overlap:
        yield (
            "runner.overlap",
            "runner.overlap: algorithm.recompute_logprobs would compare with weights that did not act; write one of "
            "them False",
        )
    if not on_policy or not isinstance(model, OpenpiConfig):
        return
    if model.openpi.use_dsrl:
        yield (
            "actor.model.openpi.use_dsrl",
            "actor.model.openpi.use_dsrl: PPO trains pi0 itself; write False, or loss_type: embodied_sac",
        )
    if model.normalize_obs:
        yield (
            "actor.model.normalize_obs",
            "actor.model.normalize_obs: pi0 normalises by the statistics beside its weights; write False",
        )
    if actor.compile_model:
        yield "actor.compile_model", "actor.compile_model: the losses of pi0 are not compiled; write False"
    if model.openpi.noise_anneal and root.runner.overlap:
        yield (
            "runner.overlap",
            "runner.overlap: with actor.model.openpi.noise_anneal a policy that is one step older would explore with "
            "other noise than it is compared with; write runner.overlap: False",
        )


def co_training_problems(co_trains: bool, batch_size: int, learners: int) -> Iterator[tuple[str, str]]:
    """(key, message) where demonstrations cannot be shared by so many learners."""
    if co_trains and batch_size % learners:
        yield (
            "actor.sft_batch_size",
            f"actor.sft_batch_size ({batch_size}) cannot be shared evenly by the {learners} processes of actor; write "
            f"{batch_size // learners * learners or learners} or {(batch_size // learners + 1) * learners}",
        )
