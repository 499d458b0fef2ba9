"""What `actor.model` says about DSRL → the latent policy and its critics.

`DsrlKeys` are the keys of every policy that is steered. `DsrlFlowConfig` is the one whose decoder is a small flow
policy of our own (`flow_decoder`); the other decoder is π0, with `openpi.policy_config.OpenpiConfig`.

    H actions per chunk, A action size, D size of the noise that is chosen
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from rlinf.core.config import Config
from rlinf.core.errors import ConfigError
from rlinf.models.embodiment.dsrl_keys import DsrlKeys
from rlinf.models.embodiment.latent_policy import Decoder, LatentCritic, LatentHead, LatentPolicy
from rlinf.models.embodiment.openpi.policy_config import OpenpiConfig
from rlinf.models.embodiment.state_policy import StatePolicyConfig
from rlinf.models.modules.compact_encoder import CompactEncoder
from rlinf.models.modules.running_norm import RunningNorm


class DsrlFlowConfig(DsrlKeys, StatePolicyConfig):
    """Keys of `actor.model` for `model_type: dsrl_flow`: a steered flow policy that was trained by run_sft.sh."""

    model_type: Literal["dsrl_flow"] = Field("dsrl_flow", description="Selects this policy.")
    decoder_path: str = Field(description="Folder with the frozen flow policy, or a run or checkpoint of run_sft.sh.")
    decoder_recipe: str | None = Field(
        None,
        description="Recipe of examples/sft that makes the decoder where decoder_path is not there; null: an error.",
    )


def steering_keys(model: Config) -> DsrlKeys | None:
    """The keys of a policy that steers a decoder; None for other policies."""
    if isinstance(model, OpenpiConfig):
        return model.openpi if model.openpi.use_dsrl else None
    return model if isinstance(model, DsrlKeys) else None


def latent_dim(keys: DsrlKeys, noise_shape: tuple[int, int]) -> int:
    """D. Raises ConfigError where the decoder's noise is of another size than `dsrl_action_noise_dim` says."""
    horizon, size = noise_shape
    if keys.dsrl_action_noise_dim not in (None, size):
        raise ConfigError(
            f"dsrl_action_noise_dim is {keys.dsrl_action_noise_dim}, but the decoder's noise has {size} "
            f"numbers for an action; write {size} or remove the key"
        )
    return size if keys.dsrl_repeat_noise else horizon * size


def build_latent_policy(
    keys: DsrlKeys,
    *,
    obs_shapes: Mapping[str, tuple[int, ...]],
    noise_shape: tuple[int, int],
    decoder: Decoder | None,
    decoder_mark: int,
    num_action_chunks: int,
    normalizer: RunningNorm | None,
) -> LatentPolicy:
    """The policy that the keys describe.

    Args:
        obs_shapes: of the environment, leaf path → shape without the leading N.
        noise_shape: the decoder's.
        decoder: frozen; None for a policy that only learns.
        decoder_mark: tells this decoder from others, see `LatentHead`.
        num_action_chunks: actions that are played of each chunk.
        normalizer: running normalisation of the state; None for none.

    Raises ConfigError where environment or decoder are not what the keys say.
    """
    if num_action_chunks > noise_shape[0]:
        raise ConfigError(
            f"actor.model.num_action_chunks is {num_action_chunks}, but the decoder makes {noise_shape[0]} actions at "
            "once; lower it, or train a decoder with a longer chunk"
        )
    head = LatentHead(
        build_encoder(keys, obs_shapes, normalizer),
        latent_dim(keys, noise_shape),
        keys.dsrl_hidden_dims,
        keys.dsrl_action_magnitude,
        decoder_mark=decoder_mark,
    )
    return LatentPolicy(head, decoder, num_action_chunks=num_action_chunks, repeat_noise=keys.dsrl_repeat_noise)


def build_latent_critic(
    keys: DsrlKeys, decision_dim: int, *, obs_shapes: Mapping[str, tuple[int, ...]], normalizer: RunningNorm | None
) -> LatentCritic:
    """Critics of decisions of this size, with an encoder of their own."""
    encoder = build_encoder(keys, obs_shapes, normalizer)
    return LatentCritic(encoder, decision_dim, hidden_dims=keys.dsrl_hidden_dims, num_heads=keys.dsrl_num_q_heads)


def build_encoder(
    keys: DsrlKeys, obs_shapes: Mapping[str, tuple[int, ...]], normalizer: RunningNorm | None
) -> CompactEncoder:
    """The small encoder. Raises ConfigError where the environment does not have what it looks at."""
    state_dim, camera = obs_shapes["state"][0], keys.dsrl_camera
    if keys.dsrl_state_dim not in (None, state_dim):
        raise ConfigError(
            f"dsrl_state_dim is {keys.dsrl_state_dim}, but the environment's state has {state_dim}; write "
            f"{state_dim} or remove the key"
        )
    if camera is not None and f"images/{camera}" not in obs_shapes:
        cameras = [path.removeprefix("images/") for path in obs_shapes if path.startswith("images/")]
        raise ConfigError(f"dsrl_camera is {camera}, but the environment has {', '.join(cameras) or 'no camera'}")
    return CompactEncoder(
        state_dim,
        keys.dsrl_state_latent_dim,
        camera=camera,
        image_feature_dim=keys.dsrl_image_latent_dim,
        image_strides=keys.dsrl_image_strides,
        normalizer=normalizer,
    )
