"""π0 or π0.5 as the policy that PPO trains: built from what the configuration names."""

from __future__ import annotations

import threading

import torch

from rlinf.core.types import EnvSpaces
from rlinf.functional.denoising import annealed
from rlinf.launch.config import Root
from rlinf.launch.decoders import RANDOM_MARK, check_openpi, kept_dtype, tokenizer_of
from rlinf.models.embodiment.openpi.actor_critic import Pi0ActorCritic
from rlinf.models.embodiment.openpi.decoder import load_openpi, random_openpi, weights_mark
from rlinf.models.embodiment.openpi.model import Pi0, stays_float32
from rlinf.models.embodiment.openpi.norm_stats import read_norm_stats
from rlinf.models.embodiment.openpi.policy_config import OpenpiConfig, OpenpiKeys

_building = threading.Lock()
"""Reading takes memory for a whole model besides, which the policies of a process take one after the other."""


def build_pi0_policy(config: Root, model: OpenpiConfig, spaces: EnvSpaces, *, acts: bool) -> Pi0ActorCritic:
    """The policy on the CPU; new heads are drawn from torch's generator.

    Args:
        acts: the copy that acts, whose weights are all of the kept type. Otherwise what learns is float32, and what is
            frozen is of the kept type unless weights are to be shared out, for which all have to be of one.

    Raises ConfigError, CheckpointError or DataError where the model does not fit the environment or cannot be read.
    """
    check_openpi(model, spaces)
    whole, kept = acts or config.actor.fsdp_config.strategy != "fsdp2", kept_dtype(config, model)
    with _building:
        policy = open_pi0_policy(model, dtype=kept if acts else torch.float32)
        if not acts:
            if whole:
                _shrink_frozen(policy.model, kept)
            policy.model.recompute_layers(config.actor.gradient_checkpointing)
        # An offloaded policy empties its tensors, which nobody else may be using then.
        if whole and not config.rollout.enable_offload:
            policy.share_frozen(f"{model.model_path} {model.robot().model}")
    return policy


def open_pi0_policy(model: OpenpiConfig, *, dtype: torch.dtype) -> Pi0ActorCritic:
    """The policy with the weights that the keys name, on the CPU, all of one type but for what `stays_float32`.

    Raises CheckpointError or DataError where they cannot be read.
    """
    keys, path = model.openpi, model.weights()
    with torch.random.fork_rng(devices=[]):  # new heads are alike with weights that were read and without
        if path is None:
            pi0, pipeline = random_openpi(model.robot(), dtype=dtype)
        else:
            pi0, pipeline = load_openpi(model.robot(), path, tokenizer_of(model, path), dtype=dtype)
    return Pi0ActorCritic(
        pi0,
        pipeline,
        model.walk(),
        train_expert_only=keys.train_expert_only,
        value_after_vlm=keys.value_after_vlm,
        detach_critic_input=keys.detach_critic_input,
        value_hidden_dims=keys.value_hidden_dims,
        eval_noise=keys.eval_noise,
        frozen_mark=RANDOM_MARK if path is None else weights_mark(path),
        anneal=keys.noise_anneal,
    )


def _shrink_frozen(pi0: Pi0, dtype: torch.dtype) -> None:
    for name, parameter in pi0.named_parameters():
        if not parameter.requires_grad and not stays_float32(name):
            parameter.data = parameter.data.to(dtype)


def find_pi0(model: OpenpiConfig) -> None:
    """Raise CheckpointError or DataError where weights, statistics or tokenizer are missing; nothing else is read."""
    path, folder = model.weights(), model.folder()
    if path is None or folder is None:
        return
    weights_mark(path)
    read_norm_stats(folder, model.robot().asset_id)
    tokenizer_of(model, path)


class NoiseSchedule:
    """`openpi.noise_anneal`: the noise level of a policy after so many collections."""

    def __init__(self, policy: Pi0ActorCritic, keys: OpenpiKeys) -> None:
        self._policy, self._params = policy, keys.noise_params

    def __call__(self, collections: int) -> None:
        """Set it."""
        start, end, steps = self._params
        self._policy.set_noise_level(annealed(start, end, steps, collections))
