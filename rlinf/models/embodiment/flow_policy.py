"""The flow-matching policy of SAC Flow: a velocity network walked from noise to action.

`sample` returns the end of a noisy walk through tanh, with the log density of the *whole path* (x_0 … x_K).
That density is what SAC's entropy term differentiates. Its entropy is not the entropy of the action: it counts
the noise of every step,

    H(path) = A [(K + 1) h + Σ_k E log s_k] + E Σ_j log(1 − tanh² x_K,j),    h = ½ log 2πe,

so a target in "−A" units, right for a Gaussian policy, is far out of reach here (A = 4, K = 4, s = 0.3 gives a
constant of +9.1 nats). `default_target_entropy` gives one in the units of the path.

References:
    [1] SAC Flow, arXiv:2509.25756.        Equations in `docs/algorithms/sac_flow.md`.

    B batch, N environments, H actions per chunk, A action size, S state size
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from rlinf.core.protocols import Mode
from rlinf.core.types import ActionOut, Obs
from rlinf.functional.flow import Velocity, integrate, largest_corrected_std, sample_path
from rlinf.functional.squash import UNIT_GAUSSIAN_ENTROPY, tanh_log_det
from rlinf.models.embodiment.image_encoder import ImageEncoderKeys
from rlinf.models.embodiment.state_policy import ActivationKey, QPolicyConfig
from rlinf.models.modules.flow_actor import FlowGate, FlowTransformer, NoiseRange
from rlinf.models.modules.mlp import mlp
from rlinf.models.modules.running_norm import RunningNorm

FlowActorType = Literal["JaxFlowTActor", "FlowTActor", "FlowGActor"]

SQUASH_ENTROPY_PER_DIM = -1.0
"""E log(1 − tanh²x) that the default target allows per action element; a uniform action on (−1, 1) has −0.61."""


class FlowPolicyConfig(ImageEncoderKeys, QPolicyConfig):
    """Keys of `actor.model` for `model_type: flow_policy`."""

    model_type: Literal["flow_policy"] = Field("flow_policy", description="Selects this policy.")
    input_type: Literal["state", "mixed"] = Field(  # type: ignore[assignment]
        "state", description="What the policy sees: the state vector, or all cameras and the robot's state."
    )
    backbone_dims: tuple[PositiveInt, ...] = Field(
        (), description="Widths of tanh layers between state and flow network."
    )
    flow_actor_type: FlowActorType = Field(
        "JaxFlowTActor",
        description="`JaxFlowTActor`: transformer decoder, all noise settings below. `FlowTActor`: the same network "
        "with an always learned noise whose training range also holds in rollouts. `FlowGActor`: gated unit.",
    )
    denoising_steps: int = Field(4, gt=0, description="K, Euler steps from noise to action.")
    d_model: int = Field(96, gt=0, multiple_of=4, description="D, width of the velocity network.")
    n_head: int = Field(
        4,
        gt=0,
        description="Attention heads of the checkpoint layout; one-token attention has no use for more.",
    )
    n_layers: int = Field(2, gt=0, description="Decoder layers (Flow-T) or hidden layers of the candidate (Flow-G).")
    use_batch_norm: bool = Field(False, description="Batch renormalisation of the network's two inputs.")
    batch_norm_momentum: float = Field(0.99, gt=0, lt=1, description="Share of the old running statistics kept.")
    noise_std_head: bool = Field(False, description="Learn the noise (a head predicts log σ) or keep it fixed.")
    log_std_min_train: float = Field(-5.0, description="Lower end of the learned log σ in losses.")
    log_std_max_train: float = Field(2.0, description="Upper end of the learned log σ in losses.")
    log_std_min_rollout: float = Field(-20.0, description="Lower end of the learned log σ when acting.")
    log_std_max_rollout: float = Field(0.0, description="Upper end of the learned log σ when acting.")
    noise_std_train: float = Field(0.3, gt=0, description="Fixed noise per step in losses.")
    noise_std_rollout: float = Field(0.02, gt=0, description="Fixed noise per step when acting.")
    drift_correction: bool = Field(
        False,
        description="Add ½ s² ∇log p_t to every step, so that the noise does not widen the action distribution of a "
        "matched flow. Needs s ≤ √(2/K) at the largest noise that the ranges above allow.",
    )
    q_activation: ActivationKey = Field("tanh", description="Critics' activation.")

    def noise_ranges(self) -> tuple[NoiseRange, NoiseRange]:
        """The noise in losses and when acting."""
        train = NoiseRange(None, self.log_std_min_train, self.log_std_max_train)
        if self.flow_actor_type == "FlowTActor":
            return train, train
        if self.noise_std_head:
            return train, NoiseRange(None, self.log_std_min_rollout, self.log_std_max_rollout)
        return NoiseRange(self.noise_std_train), NoiseRange(self.noise_std_rollout)

    @model_validator(mode="after")
    def _check(self) -> FlowPolicyConfig:
        if self.d_model % self.n_head:
            raise ValueError(f"d_model ({self.d_model}) must be a multiple of n_head ({self.n_head})")
        if self.input_type == "state" and (self.image_num is not None or self.model_path is not None):
            key = "image_num" if self.image_num is not None else "model_path"
            raise ValueError(f"{key} is for policies that see images; write input_type: mixed or remove the key")
        for phase in ("train", "rollout"):
            low, high = getattr(self, f"log_std_min_{phase}"), getattr(self, f"log_std_max_{phase}")
            if low >= high:
                raise ValueError(f"log_std_min_{phase} ({low:g}) must be below log_std_max_{phase} ({high:g})")
        bound = largest_corrected_std(self.denoising_steps)
        largest = max(noise.largest_step_std(self.denoising_steps) for noise in self.noise_ranges())
        if self.drift_correction and largest > bound:
            remedy = (
                f"log_std_max_train and log_std_max_rollout to at most {math.log(bound * self.denoising_steps):.2f}"
                if self.noise_ranges()[0].std is None
                else f"noise_std_train and noise_std_rollout to at most {bound:.3f}"
            )
            raise ValueError(
                f"drift_correction holds for noise up to √(2/K) = {bound:.3f} per step, but these settings allow "
                f"{largest:.3f}: lower {remedy}, raise denoising_steps, or set drift_correction: False"
            )
        return self


class FlowPolicy(nn.Module):
    """Actor: state → action by K Euler steps of a learned velocity.

    Args:
        flow_actor: velocity network.
        normalizer: running normalisation of the state, shared with the critics; None for none.
        num_action_chunks: H.
        drift_correction: see `functional.flow.sample_path`.
        backbone: map from state to the features that `flow_actor` takes; None for the state itself.
    """

    noise_shape: tuple[int, ...]

    def __init__(
        self,
        flow_actor: FlowTransformer | FlowGate,
        *,
        normalizer: RunningNorm | None = None,
        num_action_chunks: int = 1,
        drift_correction: bool = False,
        backbone: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.flow_actor, self.normalizer, self.backbone = flow_actor, normalizer, backbone
        self.num_action_chunks, self.drift_correction = num_action_chunks, drift_correction
        self.noise_shape = (flow_actor.steps + 1, flow_actor.action_dim)

    def _bind(self, obs: Obs, rollout: bool) -> tuple[Velocity, Tensor]:
        features = obs["state"]
        if self.normalizer is not None:
            features = self.normalizer(features)
        if self.backbone is not None:
            features = self.backbone(features)
        return self.flow_actor.bind(features, rollout), features

    def sample(self, obs: Obs, noise: Tensor, *, rollout: bool = False) -> tuple[Tensor, Tensor]:
        """Actions [B, H·A] in (−1, 1) and path log densities [B]; with the training noise unless `rollout`.

        `noise` [B, K + 1, H·A] is x_0 and the ε of every step.
        """
        velocity, _ = self._bind(obs, rollout)
        path = sample_path(velocity, noise, drift_correction=self.drift_correction)
        return torch.tanh(path.end), path.log_prob - tanh_log_det(path.end)

    @torch.no_grad()
    def act(self, obs: Obs, mode: Mode, noise: Tensor | None = None) -> ActionOut:
        """`train`: a noisy walk with the rollout noise. `eval`: the noiseless walk from x_0 = 0, the prior's mode."""
        log_prob: Tensor | None
        if mode == "train":
            if noise is None:
                raise ValueError(f"mode='train' explores: give noise [N, {self.noise_shape}]")
            decision, log_prob = self.sample(obs, noise, rollout=True)
        else:
            velocity, features = self._bind(obs, rollout=True)
            start = features.new_zeros(len(features), self.flow_actor.action_dim)
            decision, log_prob = torch.tanh(integrate(velocity, start, steps=self.flow_actor.steps)), None
        action = decision.unflatten(-1, (self.num_action_chunks, -1))
        return ActionOut(action=action, decision=decision, log_prob=log_prob)

    def default_target_entropy(self) -> float:
        """A target for the path entropy: A [(K + 1) h + K log s_ref − 1].

        s_ref is the fixed noise, or the middle of its learned log range: the walk keeps about that much noise at
        every step, and the squashing may cost one nat per action element, as in the usual −A of Gaussian policies.
        """
        flow = self.flow_actor
        step_std = flow.step_noise.train_range.reference_step_std(flow.steps)
        per_dim = (flow.steps + 1) * UNIT_GAUSSIAN_ENTROPY + flow.steps * math.log(step_std)
        return flow.action_dim * (per_dim + SQUASH_ENTROPY_PER_DIM)


def build_flow_policy(
    config: FlowPolicyConfig, *, obs_dim: int, action_dim: int, normalizer: RunningNorm | None
) -> FlowPolicy:
    """The policy that `config` describes, for states of size `obs_dim` and actions of size `action_dim`."""
    train_noise, rollout_noise = config.noise_ranges()
    network = FlowGate if config.flow_actor_type == "FlowGActor" else FlowTransformer
    flow_actor = network(
        config.backbone_dims[-1] if config.backbone_dims else obs_dim,
        action_dim * config.num_action_chunks,
        steps=config.denoising_steps,
        width=config.d_model,
        num_layers=config.n_layers,
        train_noise=train_noise,
        rollout_noise=rollout_noise,
        batch_norm_momentum=config.batch_norm_momentum if config.use_batch_norm else None,
    )
    return FlowPolicy(
        flow_actor,
        normalizer=normalizer,
        num_action_chunks=config.num_action_chunks,
        drift_correction=config.drift_correction,
        backbone=mlp(obs_dim, config.backbone_dims, activation="tanh") if config.backbone_dims else None,
    )
