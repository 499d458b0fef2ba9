import math
import re

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from torch.distributions import Normal

from rlinf.functional.flow import integrate
from rlinf.models.embodiment.flow_policy import FlowPolicyConfig, build_flow_policy
from rlinf.models.modules.running_norm import RunningNorm
from rlinf.models.modules.transformer import full_layout

S, A, B = 7, 3, 32


def make(**keys):
    torch.manual_seed(0)
    config = FlowPolicyConfig(d_model=16, n_head=4, **keys)
    return build_flow_policy(config, obs_dim=S, action_dim=A, normalizer=None)


def observations(seed=1, batch=B):
    return {"state": torch.randn(batch, S, generator=torch.Generator().manual_seed(seed))}


def reference_flow_t(state, obs, noise, epsilon, *, steps, log_std_range=None, fixed_std=None):
    """Flow-T from the paper's equations with torch's own decoder layers and the full parameter layout.

    The velocity of x at t is decoded from one query token, proj(x) + time(t), attending to one observation token.
    Noise of std σ on the velocity moves x by σ/K; a fixed noise is added to x itself. Everything is differentiable
    and every step's density is evaluated where the walk went, by torch.distributions.
    """
    width = state["action_proj.weight"].shape[0]
    decoder = nn.ModuleList(
        nn.TransformerDecoderLayer(width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
        for _ in range(2)
    ).to(noise.dtype)
    decoder.load_state_dict(
        {k.removeprefix("transformer_layers."): v for k, v in state.items() if k.startswith("transformer_layers.")}
    )

    def sequential(prefix, x, count):
        for i in range(count):
            x = F.linear(x, state[f"{prefix}.{2 * i}.weight"], state[f"{prefix}.{2 * i}.bias"])
            x = F.silu(x) if i + 1 < count else x
        return x

    memory = sequential("obs_encoder", obs, 2)[:, None]
    x, log_prob = noise, Normal(0.0, 1.0).log_prob(noise).sum(-1)
    for k in range(steps):
        t = torch.full((len(x), 1), k / steps, dtype=x.dtype)
        query = F.linear(x, state["action_proj.weight"], state["action_proj.bias"])
        hidden = (query + sequential("time_embedding", t, 3))[:, None]
        for layer in decoder:
            hidden = layer(hidden, memory)
        hidden = hidden[:, 0]
        v = F.linear(hidden, state["velocity_mean_head.weight"], state["velocity_mean_head.bias"])
        if fixed_std is None:
            raw = F.linear(hidden, state["step_noise.head.weight"], state["step_noise.head.bias"])
            low, high = log_std_range
            std = (low + (high - low) * (torch.tanh(raw) + 1) / 2).exp() / steps
        else:
            std = torch.full_like(v, fixed_std)
        step = Normal(x + v / steps, std)
        x = step.mean + std * epsilon[k]
        log_prob = log_prob + step.log_prob(x).sum(-1)
    action = torch.tanh(x)
    return action, log_prob - torch.log1p(-action.square()).sum(-1)


@pytest.mark.parametrize("noise_std_head", [True, False])
def test_sample_agrees_with_the_full_transformer(noise_std_head):
    policy = make(noise_std_head=noise_std_head).double()
    torch.manual_seed(3)
    for p in policy.parameters():  # biases and norms that are not at their trivial start
        p.data += 0.1 * torch.randn_like(p)
    obs = {"state": observations()["state"].double()}
    flow = policy.flow_actor
    noise, epsilon = torch.randn(B, A).double(), torch.randn(4, B, A).double()
    ours = policy.sample(obs, torch.cat([noise[:, None], epsilon.transpose(0, 1)], 1))
    expected = reference_flow_t(
        full_layout(flow.state_dict()),
        obs["state"],
        noise,
        epsilon,
        steps=4,
        log_std_range=(-5.0, 2.0) if noise_std_head else None,
        fixed_std=None if noise_std_head else 0.3,
    )
    torch.testing.assert_close(ours[0], expected[0], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(ours[1], expected[1], atol=1e-7, rtol=1e-7)


def test_full_layout_checkpoints_load_and_give_the_same_policy():
    source, fresh = make(noise_std_head=True), make(noise_std_head=True)
    for p in fresh.parameters():
        p.data.normal_()
    full = full_layout(source.state_dict())
    assert full["flow_actor.transformer_layers.0.self_attn.in_proj_weight"].shape == (48, 16)
    fresh.load_state_dict(full)
    obs = observations()
    torch.testing.assert_close(fresh.act(obs, "eval").action, source.act(obs, "eval").action, atol=0, rtol=0)


def test_every_row_and_every_action_element_has_noise_of_its_own():
    policy = make(noise_std_head=False, noise_std_rollout=0.3)
    obs = {"state": torch.zeros(2_000, S)}
    action, _ = policy.sample(obs, torch.randn(2_000, 5, A))
    x = torch.atanh(action.detach().double())
    correlation = torch.corrcoef(x.T) - torch.eye(A)
    # A noise shared by rows would make all rows equal; one shared by elements would correlate them fully.
    assert x.std(0).min() > 0.1
    assert correlation.abs().max() < 0.9
    assert len(torch.unique(action[:, 0])) > 1_990


def test_acting_uses_the_rollout_noise_and_losses_the_training_noise():
    policy = make(noise_std_train=0.5, noise_std_rollout=1e-6)
    obs = {"state": torch.zeros(1, S)}
    noise = torch.randn(1, 5, A)
    noiseless = torch.tanh(integrate(policy.flow_actor.bind(obs["state"], True), noise[:, 0], steps=4))
    torch.testing.assert_close(policy.act(obs, "train", noise).decision, noiseless, atol=1e-4, rtol=0)
    noisy, _ = policy.sample(obs, noise)
    assert (noisy - noiseless).abs().max() > 1e-2


def test_evaluation_is_deterministic():
    policy, obs = make(noise_std_head=True), observations()
    torch.testing.assert_close(policy.act(obs, "eval").action, policy.act(obs, "eval").action, atol=0, rtol=0)


def test_entropy_gradient_reaches_the_noise_head():
    policy = make(noise_std_head=True)
    _, log_prob = policy.sample(observations(), torch.randn(B, *policy.noise_shape))
    grad = torch.autograd.grad(log_prob.mean(), policy.flow_actor.step_noise.head.bias)[0]
    assert grad.abs().max() > 0
    q_like, _ = policy.sample(observations(), torch.randn(B, *policy.noise_shape))
    for p in policy.parameters():
        assert torch.autograd.grad(q_like.sum(), p, retain_graph=True, allow_unused=True)[0] is not None


def test_default_target_entropy_counts_every_step():
    h = 0.5 * math.log(2 * math.pi * math.e)
    fixed = make(noise_std_head=False, noise_std_train=0.3).default_target_entropy()
    assert fixed == pytest.approx(A * (5 * h + 4 * math.log(0.3) - 1))
    constant_for_six = 6 * (5 * h + 4 * math.log(0.3))
    assert constant_for_six == pytest.approx(13.67, abs=0.01)


@pytest.mark.parametrize("kind", ["JaxFlowTActor", "FlowTActor", "FlowGActor"])
@pytest.mark.parametrize("use_batch_norm", [False, True])
def test_every_kind_samples_acts_and_chunks(kind, use_batch_norm):
    config = FlowPolicyConfig(
        d_model=16,
        flow_actor_type=kind,
        use_batch_norm=use_batch_norm,
        num_action_chunks=2,
        backbone_dims=(8,),
    )
    policy = build_flow_policy(config, obs_dim=S, action_dim=A, normalizer=RunningNorm(S))
    action, log_prob = policy.sample(observations(), torch.randn(B, *policy.noise_shape))
    assert action.shape == (B, 2 * A)
    assert log_prob.shape == (B,)
    assert action.abs().max() <= 1
    out = policy.act(observations(), "train", torch.randn(B, *policy.noise_shape))
    assert out.action.shape == (B, 2, A)
    torch.testing.assert_close(out.action.flatten(1), out.decision)


def test_gate_starts_almost_open_and_bounds_the_walk():
    """v = g (v̂ − x) with g = σ(5): one step moves x by 0.9933/K of the way to v̂."""
    flow = make(flow_actor_type="FlowGActor").flow_actor
    obs, x = observations()["state"], torch.randn(B, A)
    velocity, _ = flow.bind(obs, False)(x, 0)
    other, _ = flow.bind(obs, False)(x + 1.0, 0)
    candidate = velocity / torch.sigmoid(torch.tensor(5.0)) + x
    inputs = torch.cat([obs, x, flow.time_embedding(flow._sinusoid(obs.device))[0].expand(B, -1)], -1)
    torch.testing.assert_close(candidate, flow.velocity_mean_head(flow.candidate_net(inputs)), atol=1e-5, rtol=1e-5)
    assert (other - velocity).abs().max() < 3


def test_flow_t_actor_always_learns_its_noise():
    policy = make(flow_actor_type="FlowTActor", noise_std_head=False)
    assert policy.flow_actor.step_noise.head is not None
    assert policy.flow_actor.step_noise.rollout_range == policy.flow_actor.step_noise.train_range


def test_drift_correction_beyond_its_bound_is_refused():
    with pytest.raises(ValidationError, match=re.escape("holds for noise up to √(2/K) = 0.707 per step")):
        FlowPolicyConfig(drift_correction=True, noise_std_train=0.8)
    with pytest.raises(ValidationError, match=r"log_std_max_rollout to at most 1\.04"):
        FlowPolicyConfig(drift_correction=True, noise_std_head=True, log_std_max_train=2.0)
    FlowPolicyConfig(drift_correction=True, noise_std_head=True, log_std_max_train=1.0)
    FlowPolicyConfig(drift_correction=True, noise_std_train=0.3)


def test_heads_must_divide_the_width():
    with pytest.raises(ValidationError, match=re.escape("d_model (96) must be a multiple of n_head (5)")):
        FlowPolicyConfig(d_model=96, n_head=5)
