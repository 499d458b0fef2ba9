"""What policies that steer a frozen decoder need when a run is built: their networks, and what they learn from."""

from __future__ import annotations

import torch

from rlinf.core.types import EnvSpaces
from rlinf.data.trajectory import View, whole
from rlinf.launch.algorithm_config import SacConfig
from rlinf.launch.config import Root
from rlinf.launch.decoders import NamedDecoder, named_decoder
from rlinf.models.embodiment.dsrl_keys import DsrlKeys
from rlinf.models.embodiment.dsrl_policy import build_latent_critic, build_latent_policy, latent_dim, steering_keys
from rlinf.models.embodiment.latent_policy import Decoder, LatentCritic, LatentPolicy
from rlinf.models.modules.compact_view import CompactView
from rlinf.models.modules.running_norm import RunningNorm


def learner_view(config: Root) -> View:
    """What of the observations is kept for learning: all, or what the small networks of a steered policy see.

    With noise aliasing the decoder is asked again about what was seen, so that has to be whole.
    """
    keys = steering_keys(config.actor.model)
    return whole if keys is None or aliases_noise(config) else CompactView(keys.dsrl_camera)


def aliases_noise(config: Root) -> bool:
    """Whether the algorithm is DSRL-NA."""
    return isinstance(config.algorithm, SacConfig) and config.algorithm.noise_aliasing


def decision_dim(config: Root, action_dim: int) -> int:
    """Numbers that the replay buffer keeps of a decision: of the chunk of actions, or of the noise that is chosen."""
    keys = steering_keys(config.actor.model)
    if keys is not None and not aliases_noise(config):
        return latent_dim(keys, named_decoder(config).noise_shape)
    return action_dim * config.actor.model.num_action_chunks


def build_steering(
    config: Root, keys: DsrlKeys, spaces: EnvSpaces, normalizer: RunningNorm | None, *, acts: bool
) -> tuple[LatentPolicy, LatentCritic, LatentCritic | None]:
    """The policy, its critic, and the critic of noise where noise is aliased (the other is then one of actions).

    Args:
        acts: whether the policy needs its decoder to act; aliasing noise needs it anyway.

    Raises ConfigError or CheckpointError where there is no decoder or it does not fit environment and keys.
    """
    named, chunk = named_decoder(config), config.actor.model.num_action_chunks
    named.check(spaces)
    shapes, aliased = spaces.obs_shapes, aliases_noise(config)
    policy = build_latent_policy(
        keys,
        obs_shapes=shapes,
        noise_shape=named.noise_shape,
        decoder=_load(named) if acts or aliased else None,
        decoder_mark=named.mark(),
        num_action_chunks=chunk,
        normalizer=normalizer,
    )
    of_noise = build_latent_critic(keys, policy.noise_shape[0], obs_shapes=shapes, normalizer=normalizer)
    if not aliased:
        return policy, of_noise, None
    size = spaces.action_dim * chunk
    return policy, build_latent_critic(keys, size, obs_shapes=shapes, normalizer=normalizer), of_noise


def _load(named: NamedDecoder) -> Decoder:
    with torch.random.fork_rng(devices=[]):  # the networks that follow begin alike with it and without
        return named.load()
