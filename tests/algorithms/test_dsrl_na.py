"""Noise aliasing: targets and regressions by hand, and who is moved by which loss."""

import copy

import pytest
import torch

from rlinf.algorithms import sac
from rlinf.algorithms.dsrl_na import DecodedActor, NoiseAliasing, noise_critic_loss
from rlinf.algorithms.optimize import OptimizerSettings
from rlinf.core.errors import CheckpointError
from rlinf.core.types import Transition
from tests.algorithms.test_dsrl import CHUNK, A, decoder_of, learner_of, segment, weights
from tests.algorithms.test_fsdp import shares
from tests.ranks import run_ranks


class Constant:
    """π^W that always chooses 0.3, with log-probability −2."""

    def sample(self, obs, noise):
        return torch.full((len(obs["state"]), 1), 0.3, requires_grad=True), torch.full((len(obs["state"]),), -2.0)


def double(obs, latent):
    """A decoder to chunks of two: [2w, 2w + s]."""
    return torch.stack([2 * latent, 2 * latent + obs["state"][:, :1]], 1)


def critics(*offsets):
    """Q_e = w_e + the sum of the decision."""
    w = torch.tensor(offsets, requires_grad=True)
    return w, lambda obs, decision: w[:, None] + decision.sum(-1)


def make_batch():
    return Transition(
        obs={"state": torch.zeros(2, 3)},
        next_obs={"state": torch.tensor([[0.0, 0, 0], [1, 0, 0]])},
        decision=torch.zeros(2, 2),
        reward=torch.ones(2),
        discount=torch.tensor([0.9, 0.5]),
    )


def test_target_of_the_action_critic_by_hand():
    """a′ = decode(s′, 0.3) = [0.6, 0.6 + s′]: Q̄ = 3 + 1.2 + s′; the entropy is that of the noise."""
    _, critic = critics(0.0, 0.0)
    _, target_critic = critics(5.0, 3.0)
    actor = DecodedActor(Constant(), double)
    loss, stats = sac.critic_loss(
        critic, actor, target_critic, torch.tensor(0.5), make_batch(), torch.zeros(2, 1), entropy=True
    )
    y = torch.tensor([1 + 0.9 * (4.2 + 1.0), 1 + 0.5 * (5.2 + 1.0)])
    assert stats["target_q"].item() == pytest.approx(y.mean().item())
    assert loss.item() == pytest.approx(y.square().mean().item())


def test_nothing_is_differentiated_through_the_decoder():
    action, _ = DecodedActor(Constant(), double).sample({"state": torch.zeros(2, 3)}, torch.zeros(2, 1))
    assert not action.requires_grad and action.tolist() == [[pytest.approx(0.6)] * 2] * 2


def test_the_noise_critic_is_regressed_head_by_head():
    w_noise, noise_critic = critics(0.0, 10.0)
    w_action, critic = critics(1.0, 12.0)
    obs, latent = {"state": torch.zeros(2, 3)}, torch.tensor([[0.5], [-1.0]])
    # Q^A = w + 4 latent, Q^W = w' + latent: differences 1 + 3 latent and 2 + 3 latent.
    loss, stats = noise_critic_loss(noise_critic, critic, double, obs, latent)
    expected = torch.tensor([[2.5, -2.0], [3.5, -1.0]])
    assert loss.item() == pytest.approx(expected.square().mean().item())
    assert stats["q_decoded"].item() == pytest.approx(6.5 + 4 * -0.25)
    loss.backward()
    assert w_action.grad is None
    torch.testing.assert_close(w_noise.grad, -expected.sum(1) * 2 / 4)


# The stateful half ---------------------------------------------------------------------------------


def test_executed_chunks_are_stored_and_no_noise():
    learner, trajectory = learner_of(decoder_of(), aliasing=True), segment()
    learner.observe(trajectory)
    batch = learner.sac.sample()[0]
    assert batch.decision.shape == (16, CHUNK * A)
    played = {tuple(row) for row in trajectory.action.flatten(2).flatten(0, 1).tolist()}
    assert all(tuple(row) in played for row in batch.decision.tolist())


def test_every_network_moves_and_the_action_critic_not_by_the_regression():
    learner = learner_of(decoder_of(), aliasing=True)
    learner.observe(segment())
    before = [weights(net) for net in (learner.sac.critic, learner.noise_critic, learner.sac.actor)]
    metrics = learner.update()
    after = [weights(net) for net in (learner.sac.critic, learner.noise_critic, learner.sac.actor)]
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert {"sac/noise_critic_loss", "noise_critic/q_decoded", "noise_critic/grad_norm"} <= metrics.keys()
    alone = weights(learner.sac.critic)
    learner.noise_critic_stepper.descend(learner._distillation, learner.sac.sample())
    assert torch.equal(alone, weights(learner.sac.critic))
    assert not torch.equal(after[1], weights(learner.noise_critic))


def test_the_policy_learns_from_the_noise_critic_alone():
    learner = learner_of(decoder_of(), aliasing=True)
    learner.observe(segment())
    seen = []
    learner.noise_critic.register_forward_hook(lambda module, inputs, out: seen.append(inputs[1].shape[-1]))
    learner.sac.update()
    assert seen == [A]
    with pytest.raises(ValueError, match="give it to SAC as policy_critic"):
        NoiseAliasing(learner.sac, learner.sac.critic, double, optim=OptimizerSettings())


def test_the_noise_critic_takes_as_many_steps_as_asked():
    learner = learner_of(decoder_of(), aliasing=True)
    learner.steps = 3
    learner.observe(segment())
    learner.update()
    assert learner.noise_critic_stepper.steps == 3 and learner.sac.updates == 1


def test_a_checkpoint_of_plain_dsrl_is_refused_by_name():
    plain, aliased = learner_of(decoder_of()), learner_of(decoder_of(), aliasing=True)
    with pytest.raises(CheckpointError, match="the checkpoint has no 'noise_critic'"):
        aliased.load_state_dict(copy.deepcopy(plain.state_dict()))


def run_on_ranks(ranks):
    """Each rank learns from a segment of its own, twice. What is saved, published and held, and norms of gradients."""
    results = []
    for share in (None, shares):
        learner = learner_of(decoder_of(), aliasing=True, ranks=ranks, share=share)
        learner.observe(segment(seed=ranks.rank))
        assert learner.ready()
        norms = [learner.update()["noise_critic/grad_norm"].item() for _ in range(3)]
        results.append((learner.state_dict(), learner.acting_weights()[1], norms, set(learner.held())))
    return results


def test_ranks_learn_together_with_whole_weights_and_with_shares(tmp_path):
    (one, shared), (other, rest) = run_ranks(run_on_ranks, tmp_path)
    assert one[2] == other[2], "the gradient is that of all ranks"
    assert one[3] == shared[3] and {"noise_critic", "noise_critic_optim"} <= one[3]
    for name in ("actor", "critic", "target_critic", "noise_critic"):
        torch.testing.assert_close(shared[0][name], one[0][name], atol=1e-5, rtol=1e-4)
    assert one[1].keys() == shared[1].keys() and all(name.startswith("head.") for name in one[1])
    assert not rest[1], "of shares, rank 0 alone publishes"

    alone = learner_of(decoder_of(), aliasing=True, seed=5)
    alone.load_state_dict(shared[0])
    torch.testing.assert_close(dict(alone.noise_critic.state_dict()), dict(shared[0]["noise_critic"]))
    assert torch.isfinite(alone.noise_critic_stepper.optimizer.state_dict()["state"][0]["exp_avg"]).all()
