"""SAC on the noise of a frozen decoder: what it stores, what it trains, and what it leaves alone."""

import copy

import numpy as np
import pytest
import torch

from rlinf.algorithms.dsrl_na import DecodedActor, NoiseAliasing
from rlinf.algorithms.optimize import OptimizerSettings, track
from rlinf.algorithms.sac import SAC
from rlinf.algorithms.temperature import Temperature
from rlinf.core.ranks import ONE_RANK
from rlinf.core.types import Trajectory
from rlinf.data.replay import ReplayBuffer
from rlinf.models.embodiment.dsrl_policy import DsrlKeys, build_latent_critic, build_latent_policy
from rlinf.models.embodiment.flow_decoder import FlowDecoder, FlowDecoderSpec
from tests.algorithms.learners import shared_out

S, A, H, CHUNK, GAMMA = 6, 2, 4, 3, 0.9
KEYS = DsrlKeys(dsrl_num_q_heads=3, dsrl_state_latent_dim=8, dsrl_hidden_dims=(16, 16))


def decoder_of(seed=0):
    torch.manual_seed(seed)
    return FlowDecoder(FlowDecoderSpec(S, A, H, (16, 16), 3)).requires_grad_(False)


def learner_of(decoder, *, aliasing=False, seed=0, ranks=ONE_RANK, share=None, **settings):
    torch.manual_seed(seed)
    shapes = {"state": (S,)}
    policy = build_latent_policy(
        KEYS,
        obs_shapes=shapes,
        noise_shape=decoder.noise_shape,
        decoder=decoder,
        decoder_mark=0,
        num_action_chunks=CHUNK,
        normalizer=None,
    )
    critic = build_latent_critic(KEYS, CHUNK * A if aliasing else A, obs_shapes=shapes, normalizer=None)
    noise_critic = build_latent_critic(KEYS, A, obs_shapes=shapes, normalizer=None) if aliasing else None
    target = critic.make_target()
    networks = [policy.head, critic, target, *([noise_critic] if aliasing else [])]
    sac = SAC(
        policy.head,
        critic,
        target,
        Temperature("softplus", 1.0),
        ReplayBuffer(1000, generator=np.random.Generator(np.random.PCG64(seed))),
        acting=policy,
        backup_actor=DecodedActor(policy.head, policy.decode) if aliasing else None,
        policy_critic=noise_critic,
        target_entropy=policy.default_target_entropy(),
        batch_size=16,
        gamma=GAMMA,
        agg_q="mean",
        actor_agg_q="mean",
        backup_entropy=False,
        ranks=ranks,
        data_parallel=shared_out(ranks, share, *networks),
        **settings,
    )
    if noise_critic is None:
        return sac
    return NoiseAliasing(sac, noise_critic, policy.decode, optim=OptimizerSettings())


def segment(steps=6, envs=4, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    flags = torch.zeros(steps, envs, CHUNK, dtype=torch.bool)
    fields = {
        "obs": {"state": torch.randn(steps + 1, envs, S, generator=generator)},
        "last_obs": {"state": torch.zeros(0, S)},
        "last_index": torch.zeros(0, 2, dtype=torch.int64),
        "decision": torch.randn(steps, envs, A, generator=generator),
        "action": torch.randn(steps, envs, CHUNK, A, generator=generator).clamp(-1, 1),
        "reward": -torch.ones(steps, envs, CHUNK),
        "terminated": flags,
        "truncated": flags[..., 0],
        "intervened": flags,
        "valid": ~flags[..., 0],
    }
    return Trajectory(**fields | changes)


def weights(module):
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def test_a_chunk_pays_until_its_success_and_a_time_limit_is_no_end():
    """Three decisions of one environment: nothing, success at the second action, time limit."""
    reward = torch.tensor([[-1.0, -1, -1], [-1, 0, 0], [-1, -1, -1]])[:, None]
    terminated = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)[:, None]
    truncated = torch.tensor([[False], [False], [True]])
    learner = learner_of(decoder_of())
    learner.observe(
        segment(3, 1, reward=reward, terminated=terminated, truncated=truncated,
                last_obs={"state": torch.zeros(2, S)}, last_index=torch.tensor([[1, 0], [2, 0]]))
    )  # fmt: skip
    batch = learner.replay.sample(200)
    found = {(round(r, 4), round(d, 4)) for r, d in zip(batch.reward.tolist(), batch.discount.tolist(), strict=True)}
    whole = -(1 + GAMMA + GAMMA**2)
    assert found == {(round(whole, 4), round(GAMMA**CHUNK, 4)), (-1.0, 0.0)}
    assert batch.decision.shape == (200, A), "the noise and nothing else"
    assert sum(array[0].nbytes for array in learner.replay._arrays.values()) < 100


def test_the_average_moves_in_float32_where_it_would_stand_still_in_bfloat16():
    critic = learner_of(decoder_of()).critic
    target = critic.make_target()
    with torch.no_grad():
        for p in target.parameters():
            p.fill_(1.0)
        for p in critic.parameters():
            p.fill_(1.3)
    halved = copy.deepcopy(target).bfloat16()
    source = copy.deepcopy(critic).bfloat16()
    for _ in range(100):
        track(target, critic, 0.005)
        for p, q in zip(halved.parameters(), source.parameters(), strict=True):
            p.lerp_(q, 0.005)
    assert weights(target).dtype == torch.float32
    torch.testing.assert_close(weights(target), torch.full_like(weights(target), 1.3 - 0.3 * 0.995**100))
    assert (weights(halved) == 1.0).all()


def optimized(learner):
    """Storages of everything that an optimizer moves."""
    sac = learner.sac if isinstance(learner, NoiseAliasing) else learner
    steppers = [sac.actor_stepper, sac.critic_stepper, sac.alpha_stepper]
    if isinstance(learner, NoiseAliasing):
        steppers.append(learner.noise_critic_stepper)
    return {p.untyped_storage().data_ptr() for stepper in steppers for p in stepper.parameters}


def tensors(state):
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for child in state.values():
            yield from tensors(child)
    elif isinstance(state, list | tuple):
        for child in state:
            yield from tensors(child)


@pytest.mark.parametrize("aliasing", [False, True])
def test_the_decoder_never_changes_and_is_in_no_optimizer_average_message_or_checkpoint(aliasing):
    decoder = decoder_of()
    before = copy.deepcopy(decoder.state_dict())
    learner = learner_of(decoder, aliasing=aliasing)
    sac = learner.sac if aliasing else learner
    learner.observe(segment())
    sac.acting.act({"state": torch.randn(3, S)}, "train", torch.randn(3, A))
    start = weights(sac.actor), weights(sac.critic), weights(sac.target_critic)
    for _ in range(5):
        learner.update()
    now = weights(sac.actor), weights(sac.critic), weights(sac.target_critic)
    assert not any(torch.equal(one, other) for one, other in zip(start, now, strict=True)), "the others do learn"

    assert all(torch.equal(before[name], tensor) for name, tensor in decoder.state_dict().items())
    frozen = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    assert not frozen & optimized(learner)
    version, message = learner.acting_weights()
    assert version == 5 and all(name.startswith("head.") for name in message)
    shapes = {tuple(p.shape) for p in decoder.parameters() if p.ndim == 2} - {(16, 16)}
    for kept in (learner.state_dict(), message):
        assert shapes and not shapes & {tuple(tensor.shape) for tensor in tensors(kept)}
    trained = sum(p.numel() for named in learner.trained().values() for _, p in named)
    own = [sac.actor, sac.critic, sac.temperature, *([learner.noise_critic] if aliasing else [])]
    assert trained == sum(p.numel() for module in own for p in module.parameters())
    assert weights(sac.target_critic).numel() == weights(sac.critic).numel()


def test_critics_learn_first():
    learner = learner_of(decoder_of(), actor_delay=3)
    learner.observe(segment())
    moved = []
    for _ in range(5):
        before = weights(learner.actor)
        learner.update()
        moved.append(not torch.equal(before, weights(learner.actor)))
    assert moved == [False, False, False, True, True]


@pytest.mark.parametrize("aliasing", [False, True])
def test_learning_begins_once_and_is_known_after_a_resumption(aliasing):
    learner = learner_of(decoder_of(), aliasing=aliasing)
    learner.observe(segment())
    assert not learner.acting_weights()[1]["head.begun"]
    learner.update()
    assert learner.acting_weights()[1]["head.begun"]
    resumed = learner_of(decoder_of(), aliasing=aliasing, seed=5)
    resumed.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert resumed.acting_weights()[1]["head.begun"]


@pytest.mark.parametrize("aliasing", [False, True])
def test_learning_resumes_bit_for_bit(aliasing, tmp_path):
    straight, resumed = (learner_of(decoder_of(), aliasing=aliasing, seed=seed) for seed in (0, 7))
    straight.observe(segment())
    for _ in range(4):
        straight.update()
    saved = copy.deepcopy(straight.state_dict())
    straight.buffers()["replay_buffer"].save(str(tmp_path))
    resumed.load_state_dict(saved)
    resumed.buffers()["replay_buffer"].load(str(tmp_path))
    for _ in range(4):
        straight.update()
        resumed.update()
    one, other = (list(tensors(learner.state_dict())) for learner in (straight, resumed))
    assert len(one) == len(other) > 50
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
