"""Losses with numbers that can be checked by hand, and the schedule of the stateful half."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from rlinf.algorithms import sac
from rlinf.algorithms.optimize import OptimizerSettings, Stepper, flatten, track
from rlinf.algorithms.temperature import Temperature
from rlinf.core.errors import CheckpointError
from rlinf.core.types import Trajectory, Transition
from rlinf.models.modules.q_ensemble import QEnsemble


class Constant:
    """Actor that always plays 0.3 with log-probability −2."""

    def sample(self, obs, noise):
        return torch.full((len(obs["state"]), 1), 0.3), torch.full((len(obs["state"]),), -2.0)


def critics(*offsets):
    """Q_e = w_e + a."""
    w = torch.tensor(offsets, requires_grad=True)
    return w, lambda obs, decision: w[:, None] + decision.squeeze(-1)


def make_batch():
    state = {"state": torch.zeros(2, 3)}
    return Transition(
        obs=state,
        next_obs=state,
        decision=torch.zeros(2, 1),
        reward=torch.ones(2),
        discount=torch.tensor([0.9, 0.0]),
    )


def target_of(**keys):
    _, target_critic = critics(5.0, 3.0, 4.0)
    _, critic = critics(0.0, 0.0, 0.0)
    loss, stats = sac.critic_loss(
        critic, Constant(), target_critic, torch.tensor(0.5), make_batch(), torch.zeros(2, 1), **keys
    )
    return loss.item(), stats["target_q"].item()


def test_critic_target_by_hand():
    # min_e Q̄_e = 3 + 0.3, entropy bonus 0.5 · 2; the second row terminated.
    y = torch.tensor([1 + 0.9 * (3.3 + 1.0), 1.0])
    loss, target = target_of()
    assert target == pytest.approx(y.mean().item())
    assert loss == pytest.approx(y.square().mean().item())


def test_critic_target_variants_by_hand():
    assert target_of(entropy=False)[1] == pytest.approx((1 + 0.9 * 3.3 + 1) / 2)
    assert target_of(agg_q="mean")[1] == pytest.approx((1 + 0.9 * (4.3 + 1.0) + 1) / 2)
    assert target_of(subset=torch.tensor([0, 2]))[1] == pytest.approx((1 + 0.9 * (4.3 + 1.0) + 1) / 2)


def test_target_carries_no_gradient():
    w_target, target_critic = critics(5.0, 3.0)
    w, critic = critics(0.0, 0.0)
    loss, _ = sac.critic_loss(critic, Constant(), target_critic, torch.tensor(0.5), make_batch(), torch.zeros(2, 1))
    grads = torch.autograd.grad(loss, (w, w_target), allow_unused=True)
    assert grads[0] is not None
    assert grads[1] is None


def test_actor_loss_by_hand():
    _, critic = critics(5.0, 3.0)
    loss, stats = sac.actor_loss(Constant(), critic, torch.tensor(0.5), make_batch(), torch.zeros(2, 1))
    assert loss.item() == pytest.approx(0.5 * -2 - 3.3)
    assert stats["entropy"].item() == 2.0
    loss, _ = sac.actor_loss(Constant(), critic, torch.tensor(0.5), make_batch(), torch.zeros(2, 1), agg_q="mean")
    assert loss.item() == pytest.approx(0.5 * -2 - 4.3)


@pytest.mark.parametrize("alpha_type", ["softplus", "exp"])
def test_alpha_falls_when_entropy_is_above_its_target_and_rises_below(alpha_type):
    for entropy, direction in ((2.0, 1), (-6.0, -1)):
        temperature = Temperature(alpha_type, 0.2)
        assert temperature().item() == pytest.approx(0.2)
        loss = sac.alpha_loss(temperature(), torch.tensor(entropy), -4.0)
        (grad,) = torch.autograd.grad(loss, temperature.theta)
        assert torch.sign(grad) == direction  # gradient descent moves alpha the other way


def test_fixed_temperature_is_not_learned():
    temperature = Temperature("fixed", 0.2)
    assert temperature().item() == pytest.approx(0.2)
    assert not temperature.theta.requires_grad


# The stateful half ---------------------------------------------------------------------------------


class LinearActor(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.noise_shape = nn.Linear(3, 1), (1,)

    def sample(self, obs, noise):
        mean = self.net(obs["state"])
        return torch.tanh(mean + noise), -0.5 * noise.square().sum(-1) - mean.square().sum(-1)


class LinearCritic(nn.Module):
    def __init__(self, num_heads=4):
        super().__init__()
        self.q, self.num_heads = nn.Linear(4, num_heads), num_heads

    def forward(self, obs, decision):
        return self.q(torch.cat([obs["state"], decision], -1)).T


class FixedReplay:
    def __init__(self, size=64):
        g = torch.Generator().manual_seed(0)
        self.data = [
            torch.randn(size, 3, generator=g),
            torch.randn(size, 1, generator=g),
            torch.randn(size, 3, generator=g),
        ]
        self.cursor = 0

    def __len__(self):
        return len(self.data[0])

    def sample(self, n):
        rows = (torch.arange(n) + self.cursor) % len(self)
        self.cursor += n
        obs, decision, next_obs = (x[rows] for x in self.data)
        return Transition({"state": obs}, decision, obs.sum(-1), torch.full((n,), 0.9), {"state": next_obs})


def make_sac(seed=0, **keys):
    torch.manual_seed(seed)
    actor, critic = LinearActor(), LinearCritic()
    target = copy.deepcopy(critic).requires_grad_(False)
    settings = {"target_entropy": -1.0, "batch_size": 16, "tau": 0.1} | keys
    return sac.SAC(actor, critic, target, Temperature("softplus", 0.2), FixedReplay(), **settings)


class Recorded(FixedReplay):
    def add(self, trajectory, reward, discount):
        self.trajectory = trajectory


def test_what_an_operator_did_goes_into_both_buffers_as_the_decision():
    agent = make_sac(demo_buffer=(demos := Recorded()))
    agent.replay = Recorded()
    flags = torch.zeros(3, 2, 1, dtype=torch.bool)
    intervened = flags.clone()
    intervened[1, 0] = True
    segment = Trajectory(
        obs={"state": torch.zeros(4, 2, 3)},
        last_obs={"state": torch.zeros(0, 3)},
        last_index=torch.zeros(0, 2, dtype=torch.int64),
        decision=torch.zeros(3, 2, 1),
        action=torch.full((3, 2, 1, 1), 0.5),
        reward=torch.zeros(3, 2, 1),
        terminated=flags,
        truncated=flags[..., 0],
        intervened=intervened,
        valid=~flags[..., 0],
    )
    agent.observe(segment)
    assert agent.replay.trajectory.decision[:, :, 0].tolist() == [[0, 0], [0.5, 0], [0, 0]]
    assert agent.replay.trajectory.valid.all()
    assert demos.trajectory.valid.tolist() == [[False, False], [True, False], [False, False]]
    assert demos.trajectory.decision[1, 0, 0] == 0.5
    del demos.trajectory
    agent.observe(dataclasses.replace(segment, intervened=flags))
    assert not hasattr(demos, "trajectory")


def weights(module):
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def test_actor_and_temperature_move_every_nth_update():
    learner = make_sac(critic_actor_ratio=3, actor_delay=2)
    moved = []
    for _ in range(7):
        before = weights(learner.actor), learner.temperature().item()
        metrics = learner.update()
        actor_moved = not torch.equal(before[0], weights(learner.actor))
        assert actor_moved == (learner.temperature().item() != before[1]) == ("sac/actor_loss" in metrics)
        moved.append(actor_moved)
    assert moved == [False, False, False, True, False, False, True]


def test_target_tracks_the_critic_in_its_own_time():
    learner = make_sac(target_update_freq=2)
    start = weights(learner.target_critic)
    learner.update()
    torch.testing.assert_close(weights(learner.target_critic), start, atol=0, rtol=0)
    learner.update()
    torch.testing.assert_close(weights(learner.target_critic), start.lerp(weights(learner.critic), 0.1))


def test_gradient_norms_belong_to_one_network_each():
    """The critic's norm must not contain what the actor's loss sent through the critic, and the other way round."""
    learner = make_sac()
    batch = learner._micro_batches(learner.replay.sample(16))[0]
    alpha = learner.temperature().detach()
    state = learner.generator.get_state()
    noise = torch.randn(16, 1, generator=learner.generator)
    loss, _ = sac.critic_loss(learner.critic, learner.actor, learner.target_critic, alpha, batch, noise)
    own = torch.autograd.grad(loss, list(learner.critic.parameters()))
    learner.replay.cursor = 0
    learner.generator.set_state(state)
    for _ in range(2):  # the second time there has been an actor step in between
        metrics = learner.update()
        if _ == 0:
            expected = torch.linalg.vector_norm(torch.cat([g.flatten() for g in own]))
            torch.testing.assert_close(metrics["critic/grad_norm"], expected)
        assert all(p.grad is None for p in learner.critic.parameters())
        assert all(p.grad is None for p in learner.actor.parameters())


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    whole, parts = make_sac(), make_sac(micro_batch_size=4)

    class Deterministic(LinearActor):
        def sample(self, obs, noise):
            mean = self.net(obs["state"])
            return torch.tanh(mean), -mean.square().sum(-1)

    initial = copy.deepcopy(whole.actor.state_dict())
    for learner in (whole, parts):
        actor = Deterministic()
        actor.load_state_dict(initial)
        learner.actor = actor
        learner.actor_stepper = Stepper(actor.parameters(), OptimizerSettings())
        metrics = learner.update()
    torch.testing.assert_close(weights(parts.critic), weights(whole.critic))
    torch.testing.assert_close(weights(parts.actor), weights(whole.actor))
    assert "critic/grad_norm" in metrics


def test_critics_are_drawn_without_replacement_unless_asked_otherwise():
    learner = make_sac(critic_subsample_size=2)
    draws = torch.stack([learner._draw_critics() for _ in range(400)])
    assert (draws[:, 0] != draws[:, 1]).all()
    assert draws.unique().tolist() == [0, 1, 2, 3]
    with_replacement = make_sac(critic_subsample_size=2, subsample_with_replacement=True)
    draws = torch.stack([with_replacement._draw_critics() for _ in range(400)])
    assert (draws[:, 0] == draws[:, 1]).float().mean() == pytest.approx(0.25, abs=0.1)
    assert make_sac(critic_subsample_size=4)._draw_critics() is None


def test_state_dict_resumes_bit_for_bit():
    straight = make_sac(critic_actor_ratio=2, critic_subsample_size=2)
    for _ in range(5):
        straight.update()
    saved, cursor = copy.deepcopy(straight.state_dict()), straight.replay.cursor
    resumed = make_sac(seed=99, critic_actor_ratio=2, critic_subsample_size=2)
    resumed.load_state_dict(saved)
    resumed.replay.cursor = cursor
    for _ in range(5):
        straight.update()
        resumed.update()
    for name in ("actor", "critic", "target_critic", "temperature"):
        assert torch.equal(weights(getattr(straight, name)), weights(getattr(resumed, name)))


def test_foreign_state_is_refused_by_name():
    learner = make_sac()
    with pytest.raises(CheckpointError, match="the checkpoint has no 'actor'"):
        learner.load_state_dict({})
    state = learner.state_dict()
    state["critic"] = LinearCritic(num_heads=7).state_dict()
    with pytest.raises(CheckpointError, match="'critic' in the checkpoint does not fit"):
        make_sac().load_state_dict(state)


def test_acting_weights_are_a_copy_of_the_actor_alone():
    learner = make_sac()
    version, state = learner.acting_weights()
    assert version == 0
    assert set(state) == {"net.weight", "net.bias"}
    learner.update()
    assert not torch.equal(state["net.weight"], learner.actor.net.weight)


# Optimizers ----------------------------------------------------------------------------------------


def quadratic(parameter):
    return lambda target: ((parameter - target).square().sum(), {})


def test_clipping_scales_to_the_norm_and_reports_the_norm_before():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    stepper = Stepper([p], OptimizerSettings(clip_grad=1.0))
    metrics = stepper.descend(quadratic(p), [torch.zeros(2)])
    assert metrics["grad_norm"].item() == pytest.approx(10.0)
    first_moment = stepper.optimizer.state[stepper.flat]["exp_avg"]
    torch.testing.assert_close(first_moment, 0.1 * torch.tensor([0.6, 0.8]), atol=1e-6, rtol=1e-5)


def test_stepper_is_adam():
    ours, theirs = nn.Parameter(torch.tensor([3.0, -4.0])), nn.Parameter(torch.tensor([3.0, -4.0]))
    stepper, adam = Stepper([ours], OptimizerSettings(lr=0.1)), torch.optim.Adam([theirs], lr=0.1)
    for _ in range(10):
        stepper.descend(quadratic(ours), [torch.ones(2)])
        adam.zero_grad()
        (theirs - 1).square().sum().backward()
        adam.step()
    torch.testing.assert_close(ours, theirs)


def test_stepper_is_adam_for_every_layout_of_gradient():
    """Batched and transposed weights: the fused optimizer must not read a gradient in another order than its weight."""
    torch.manual_seed(0)
    ours, theirs = (QEnsemble(5, (8, 6), 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    features, action, target = torch.randn(32, 3), torch.randn(32, 2), torch.randn(2, 32)
    stepper, adam = (
        Stepper(ours.parameters(), OptimizerSettings(lr=0.01)),
        torch.optim.Adam(theirs.parameters(), lr=0.01),
    )
    for _ in range(5):
        stepper.descend(lambda _: ((ours(features, action) - target).square().mean(), {}), [None])
        adam.zero_grad()
        (theirs(features, action) - target).square().mean().backward()
        adam.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_flatten_moves_once_and_keeps_values_and_shapes():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4, bias=False))
    parameters, before = list(net.parameters()), [p.detach().clone() for p in net.parameters()]
    flat = flatten(parameters)
    assert torch.equal(flat, torch.cat([p.flatten() for p in before]))
    for p, value in zip(parameters, before, strict=True):
        assert torch.equal(p, value)
    assert flatten(parameters).data_ptr() == flat.data_ptr()
    flat.zero_()
    assert all((p == 0).all() for p in parameters)


def test_flatten_of_a_part_is_its_part():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    flatten(list(net.parameters()))
    assert torch.equal(flatten(list(net[1].parameters())), torch.cat([net[1].weight.flatten(), net[1].bias]).detach())


def test_a_network_moved_after_its_stepper_was_made_is_refused():
    net = nn.Linear(2, 2)
    stepper = Stepper(net.parameters(), OptimizerSettings())
    net.double()
    with pytest.raises(RuntimeError, match="move the network first"):
        stepper.descend(lambda x: (net(x).sum(), {}), [torch.zeros(1, 2, dtype=torch.float64)])


def test_a_step_that_is_not_finite_changes_nothing():
    p = nn.Parameter(torch.tensor([3.0]))
    stepper = Stepper([p], OptimizerSettings(clip_grad=1.0))
    metrics = stepper.descend(quadratic(p), [torch.tensor([float("nan")])])
    assert not torch.isfinite(metrics["grad_norm"])
    assert p.item() == 3.0
    stepper.descend(quadratic(p), [torch.tensor([0.0])])
    assert 2.9 < p.item() < 3.0


def test_learning_rate_schedules():
    cosine = OptimizerSettings(lr=1.0, lr_scheduler="cosine", total_training_steps=10, min_lr=0.1, lr_warmup_steps=2)
    scales = [cosine.scale_at(step) for step in (0, 1, 2, 6, 10, 50)]
    assert scales == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1, 0.1])
    assert OptimizerSettings().scale_at(10**9) == 1.0


def test_track_by_hand():
    target, source = nn.Linear(1, 1), nn.Linear(1, 1)
    for module, value in ((target, 0.0), (source, 1.0)):
        for p in module.parameters():
            p.data.fill_(value)
    track(target, source, 0.25)
    assert target.weight.item() == target.bias.item() == 0.25
