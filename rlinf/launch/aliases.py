"""Other spellings of our keys, and keys of other set-ups that mean nothing here.

An alias is accepted in YAML and on the command line and becomes our key before validation. A retired key is an error
that says what to write instead: a key that is read by nobody is worse than a key that is refused.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

Tree = dict[str, Any]


@dataclass(frozen=True)
class Alias:
    """`old` is accepted for `new`, unless `when(value)` is false.

    `convert(value, whole tree)` changes units where they differ.
    """

    old: str
    new: str
    convert: Callable[[Any, Tree], Any] | None = None
    when: Callable[[Any], bool] = lambda _: True


def get(tree: Tree, path: str, default: Any = None) -> Any:
    """The value at a dotted path, or `default`."""
    node: Any = tree
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            return default
        node = node[key]
    return node


def put(tree: Tree, path: str, value: Any) -> None:
    """Set a dotted path; parents that are not there are made."""
    *parents, leaf = path.split(".")
    for key in parents:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[leaf] = value


def drop(tree: Tree, path: str) -> None:
    """Remove a dotted path that exists, and the sections that are empty then."""
    parent, _, leaf = path.rpartition(".")
    section = get(tree, parent) if parent else tree
    del section[leaf]
    if parent and not section:
        drop(tree, parent)


def _trajectories_to_transitions(count: Any, tree: Tree) -> Any:
    """Upstream counts its cache in trajectories of (environments x decisions per segment) transitions."""
    envs = get(tree, "env.train.total_num_envs", 1)
    steps = get(tree, "env.train.max_steps_per_rollout_epoch", 1)
    chunk = get(tree, "actor.model.num_action_chunks", 1)
    if all(isinstance(number, int) for number in (count, envs, steps, chunk)) and chunk > 0:
        return count * envs * max(steps // chunk, 1)
    return count


def _alpha_type(value: Any, tree: Tree) -> Any:
    """`fixed_alpha` is called `fixed` here."""
    return "fixed" if value == "fixed_alpha" else value


def _model_type(value: Any, tree: Tree) -> Any:
    """The MLP policy of PPO has a class of its own here: it has a value function and no critics."""
    on_policy = get(tree, "algorithm.loss_type") == "actor_critic"
    return "mlp_actor_critic" if on_policy and value == "mlp_policy" else value


def _random_shift(value: Any, tree: Tree) -> Any:
    """DrQ's shift is 4 pixels wherever it is only switched on."""
    return {True: 4, False: 0}.get(value, value) if isinstance(value, bool) else value


def _strategy(value: Any, tree: Tree) -> Any:
    """Torch's first FSDP shares out the same things in another way."""
    return "fsdp2" if value == "fsdp" else value


def _dummy_driver(value: Any, tree: Tree) -> Any:
    """A cell without hardware."""
    return "fake"


ALIASES: tuple[Alias, ...] = (
    Alias("algorithm.adv_type", "algorithm.loss_type", when=lambda value: value != "gae"),
    Alias("actor.model.model_type", "actor.model.model_type", _model_type),
    Alias("actor.optim.value_lr", "actor.critic_optim.lr"),
    Alias("actor.optim.critic_warmup_steps", "algorithm.critic_warmup_steps"),
    Alias("algorithm.entropy_tuning.alpha_type", "algorithm.entropy_tuning.alpha_type", _alpha_type),
    Alias("algorithm.replay_buffer.cache_size", "algorithm.replay_buffer.capacity", _trajectories_to_transitions),
    Alias(
        "algorithm.replay_buffer.sample_window_size", "algorithm.replay_buffer.capacity", _trajectories_to_transitions
    ),
    *(
        Alias(f"{section}.adam_eps", f"{section}.eps")
        for section in ("actor.optim", "actor.critic_optim", "algorithm.entropy_tuning.optim")
    ),
    Alias("actor.fsdp_config.strategy", "actor.fsdp_config.strategy", _strategy),
    Alias("actor.enable_drq", "algorithm.random_shift", _random_shift),
    Alias("algorithm.enable_drq", "algorithm.random_shift", _random_shift),
    Alias("rollout.model.model_path", "actor.model.model_path"),
    Alias("rollout.recompute_logprobs", "algorithm.recompute_logprobs"),
    Alias("actor.enable_sft_co_train", "actor.use_real_data_co_training"),
    Alias("actor.config_name", "actor.model.openpi.config_name"),
    Alias("actor.fsdp_config.gradient_checkpointing", "actor.gradient_checkpointing"),
    Alias("actor.model.openpi.num_steps", "actor.model.num_steps"),
    Alias("actor.model.openpi.action_chunk", "actor.model.num_action_chunks"),
    Alias("actor.model.openpi.action_env_dim", "actor.model.action_dim"),
    Alias("actor.model.state_dim", "actor.model.obs_dim"),
    Alias("algorithm.replay_buffer.auto_save_path", "algorithm.replay_buffer.storage_dir"),
    *(
        alias
        for cell in ("env.train", "env.eval")
        for alias in (
            Alias(f"{cell}.no_gripper", f"{cell}.override_cfg.no_gripper"),
            Alias(f"{cell}.override_cfg.max_num_steps", f"{cell}.max_episode_steps"),
            Alias(
                f"{cell}.override_cfg.is_dummy",
                f"{cell}.override_cfg.driver",
                _dummy_driver,
                lambda dummy: dummy is True,
            ),
        )
    ),
)

_PRECISION = "write actor.precision: fp32 or bf16"
_ONE_WAY = "there is one way to share out a network (docs/cluster.md); remove the key"
_WEIGHTS = (
    "weights reach every machine once, and asynchronous runs do not wait for them (docs/cluster.md); remove the key"
)
_NO_SUCH_TERM = "no loss here has such a term; remove the key"
_ONLY_IN_PPO = "only PPO (loss_type: actor_critic) has this; remove the key"
_WHOLE_FOLDER = "all of load_path is kept, or algorithm.demo_buffer.capacity transitions of it; remove the key"
_FROM_ALGORITHM = "the heads follow from algorithm.loss_type; remove the key"

RETIRED: Mapping[str, str] = {
    "runner.seq_length": "belongs to language models; remove the key",
    "runner.max_prompt_length": "belongs to language models; remove the key",
    "runner.per_worker_log": "there is one log per run; remove the key",
    "algorithm.num_updates_per_step": "write algorithm.update_epoch, the gradient updates per global step",
    "algorithm.target_entropy": "write algorithm.entropy_tuning.target_entropy",
    "algorithm.normalize_advantages": _ONLY_IN_PPO,
    "algorithm.kl_penalty": _NO_SUCH_TERM,
    "algorithm.kl_beta": _NO_SUCH_TERM,
    "algorithm.group_size": _NO_SUCH_TERM,
    "algorithm.reward_type": _ONLY_IN_PPO,
    "algorithm.logprob_type": _ONLY_IN_PPO,
    "algorithm.entropy_type": _ONLY_IN_PPO,
    "algorithm.loss_agg_func": _ONLY_IN_PPO,
    "algorithm.replay_buffer.enable_cache": "the buffer is always in memory, or under storage_dir; remove the key",
    "algorithm.replay_buffer.auto_save": "checkpoints hold the buffer; write storage_dir to have it on disk",
    "algorithm.demo_buffer.cache_size": _WHOLE_FOLDER,
    "algorithm.demo_buffer.sample_window_size": _WHOLE_FOLDER,
    "algorithm.demo_buffer.enable_cache": _WHOLE_FOLDER,
    "algorithm.demo_buffer.min_buffer_size": "replay_buffer.min_buffer_size is what learning waits for; remove the key",
    "algorithm.demo_buffer.auto_save*": "demonstrations stay in load_path (docs/collecting.md); remove the key",
    "env.*.use_spacemouse": "write env.*.teleop: spacemouse, or none",
    "env.*.keyboard_reward_wrapper": "write env.*.override_cfg.reward: keyboard",
    "env.*.override_cfg.is_dummy": "write env.*.override_cfg.driver: fake for True; for False remove the key",
    "env.*.camera_serials": "write env.*.override_cfg.cameras: {wrist_1: {driver: realsense, options: {serial: ...}}}",
    "env.*.enable_offload": "simulators stay on their device; remove the key",
    "env.*.reset_gripper_open": "the gripper opens in the num_steps_wait steps after a reset; remove the key",
    "env.*.init_params.camera_heights": "write env.*.image_size, height and width of every picture",
    "env.*.init_params.camera_widths": "write env.*.image_size, height and width of every picture",
    "env.*.use_full_state": "the state is always complete; remove the key",
    "rollout.backend": "the policy itself acts; remove the key",
    "rollout.generation_backend": "the policy itself acts; remove the key",
    "rollout.collect_transitions": "transitions are always recorded; remove the key",
    "rollout.collect_prev_infos": "what the algorithm needs is recorded; remove the key",
    "actor.training_backend": "torch alone trains; write actor.fsdp_config.strategy: auto, ddp or fsdp2",
    "actor.fsdp_config.sharding_strategy": "write actor.fsdp_config.strategy: ddp for no_shard, fsdp2 for the others",
    "actor.fsdp_config.mixed_precision": _PRECISION,
    "actor.fsdp_config.amp_autocast": _PRECISION,
    "actor.fsdp_config.grad_scaler": "bfloat16 needs no scaling; remove the key",
    "actor.fsdp_config.cpu_offload": "write actor.enable_offload, which empties the device while the learner rests",
    "actor.fsdp_config.offload_pin_memory": _ONE_WAY,
    "actor.fsdp_config.use_orig_params": _ONE_WAY,
    "actor.fsdp_config.forward_prefetch": _ONE_WAY,
    "actor.fsdp_config.backward_prefetch": _ONE_WAY,
    "actor.fsdp_config.limit_all_gathers": _ONE_WAY,
    "actor.fsdp_config.use_liger_kernel": "belongs to language models; remove the key",
    "actor.fsdp_config.save_full_model_weights": "model.safetensors is always whole; remove the key",
    "actor.sync_weight_no_wait": _WEIGHTS,
    "actor.*optim.adam_beta1": "write betas: [0.9, 0.999] in the same section",
    "actor.*optim.adam_beta2": "write betas: [0.9, 0.999] in the same section",
    "actor.model.hidden_dim": "write hidden_dims (mlp_policy) or d_model (flow_policy)",
    "actor.model.add_q_head": _FROM_ALGORITHM,
    "actor.model.add_value_head": _FROM_ALGORITHM,
    "actor.model.openpi.add_value_head": _FROM_ALGORITHM,
    "actor.model.openpi.num_images_in_input": "cameras follow from config_name; remove the key",
    "actor.model.openpi.value_vlm_mode": "the value is read off the mean of all tokens that are there; remove the key",
    "actor.model.is_lora": "LoRA is for large models; remove the key",
    "weight_syncer": _WEIGHTS,
    "reward": "rewards come from the environment; write env.train.reward_mode",
    "critic": "the critic is written under actor (critic_optim, model.num_q_heads)",
    "hydra": "Hydra only composes here: nothing is run or logged by it; remove the key",
}
"""Pattern of a dotted path → what to write instead."""


def remedy_for(path: str) -> str | None:
    """What to write instead of a retired key (or of any key below it), or None for other keys."""
    for pattern, remedy in RETIRED.items():
        if fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, pattern + ".*"):
            return remedy
    return None


def apply_aliases(tree: Tree, typed: Collection[str] = ()) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Rename aliases inside `tree`.

    Args:
        typed: paths from the command line; where an alias and our key are both there, the only typed one wins.

    Returns:
        our path → the spelling that the user wrote, and conflicts as (path, message).
    """
    spelt: dict[str, str] = {}
    conflicts: list[tuple[str, str]] = []
    missing = object()
    for alias in ALIASES:
        value = get(tree, alias.old, missing)
        if value is missing or not alias.when(value):
            continue
        if alias.convert is not None:
            value = alias.convert(value, tree)
        if alias.old == alias.new:
            put(tree, alias.new, value)
            continue
        present = get(tree, alias.new, missing)
        drop(tree, alias.old)
        if present is missing or (alias.old in typed and alias.new not in typed):
            put(tree, alias.new, value)
            spelt[alias.new] = alias.old
        elif present != value and not (alias.new in typed and alias.old not in typed):
            also = spelt.get(alias.new, alias.new)
            conflicts.append((alias.old, f"says {value!r}, but {also} says {present!r}; keep one of them"))
    return spelt, conflicts
