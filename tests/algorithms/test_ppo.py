import copy
import math

import numpy as np
import pytest
import torch
from segments import ACTION, STATE, network, played
from torch import nn

from rlinf.algorithms import ppo as ppo_module
from rlinf.algorithms.optimize import OptimizerSettings, Stepper
from rlinf.algorithms.ppo import PPO, explained_variance, policy_loss, reduce_to, value_loss
from rlinf.core.errors import CheckpointError
from rlinf.models.modules.running_norm import RunningNorm


def column(*values):
    return torch.tensor(values, dtype=torch.float32)


# Losses by hand -------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    """Ratios 1.5, 0.5, 1.5, 0.5 with advantages +1, +1, -1, -1 and clipping at 1 ± 0.2."""
    log_ratio = column(1.5, 0.5, 1.5, 0.5).log()[:, None]
    loss, stats = policy_loss(
        log_ratio, torch.zeros(4, 1), column(1, 1, -1, -1), torch.ones(4), clip_low=0.2, clip_high=0.2
    )
    # min(1.5, 1.2) = 1.2;  min(0.5, 0.8) = 0.5;  min(-1.5, -1.2) = -1.5;  min(-0.5, -0.8) = -0.8
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    assert stats["clip_fraction"].item() == 1.0
    assert stats["clipped_ratio"].item() == pytest.approx(1.0)
    assert stats["ratio"].item() == pytest.approx(1.0)
    expected_kl = sum(r - 1 - math.log(r) for r in (1.5, 0.5)) / 2
    assert stats["approx_kl"].item() == pytest.approx(expected_kl)


def test_the_two_clips_are_independent():
    log_ratio = column(1.5, 0.5).log()[:, None]
    loss, stats = policy_loss(log_ratio, torch.zeros(2, 1), column(1, -1), torch.ones(2), clip_low=0.1, clip_high=0.3)
    assert loss.item() == pytest.approx(-(1.3 - 0.9) / 2)
    assert stats["clipped_ratio"].item() == pytest.approx((1.3 + 0.9) / 2)


def test_dual_clip_bounds_what_a_negative_advantage_costs():
    log_ratio = column(10.0, 2.0, 10.0).log()[:, None]
    arguments = (log_ratio, torch.zeros(3, 1), column(-1, -1, 1), torch.ones(3))
    unbounded, _ = policy_loss(*arguments, clip_low=0.2, clip_high=0.2)
    bounded, stats = policy_loss(*arguments, clip_low=0.2, clip_high=0.2, clip_c=3.0)
    assert unbounded.item() == pytest.approx((10 + 2 - 1.2) / 3)
    assert bounded.item() == pytest.approx((3 + 2 - 1.2) / 3)
    assert stats["dual_clip_fraction"].item() == pytest.approx(1 / 3)


def test_a_clipped_ratio_has_no_gradient():
    log_prob = column(0.5, 0.0, -0.5)[:, None].requires_grad_()
    loss, _ = policy_loss(log_prob, torch.zeros(3, 1), column(1, 1, -1), torch.ones(3), clip_low=0.2, clip_high=0.2)
    loss.backward()
    assert log_prob.grad[0] == log_prob.grad[2] == 0
    assert log_prob.grad[1].item() == pytest.approx(-1 / 3)


def test_weights_scale_the_samples():
    loss, _ = policy_loss(
        torch.zeros(2, 1), torch.zeros(2, 1), column(1, 3), column(0.5, 1.5), clip_low=0.2, clip_high=0.2
    )
    assert loss.item() == pytest.approx(-(0.5 * 1 + 1.5 * 3) / 2)


def test_value_loss_by_hand():
    """h(e) = e²/2 up to δ, δ(|e| - δ/2) beyond; the larger error of the clipped and the free value counts."""
    value, old, returns = column(1.0, 3.0, 0.0), column(0.0, 0.0, 0.0), column(1.0, 4.0, 20.0)
    loss, stats = value_loss(value, old, returns, torch.ones(3), value_clip=0.5, huber_delta=10.0)
    # free: 0, 0.5, 10 (20 - 5) = 150; clipped to 0.5, 0.5, 0: 0.125, 3.5²/2 = 6.125, 150
    assert loss.item() == pytest.approx((0.125 + 6.125 + 150) / 3)
    assert stats["value_clip_ratio"].item() == pytest.approx(2 / 3)
    free, stats = value_loss(value, old, returns, torch.ones(3), value_clip=None, huber_delta=10.0)
    assert free.item() == pytest.approx((0 + 0.5 + 150) / 3)
    assert "value_clip_ratio" not in stats


def test_explained_variance():
    returns = column(1, 2, 3, 4)
    assert explained_variance(returns, returns).item() == 1
    assert explained_variance(returns + 5, returns).item() == 1
    assert explained_variance(torch.full((4,), 2.5), returns).item() == 0
    assert explained_variance(returns, torch.ones(4)).item() == 0


def test_levels_of_a_decision():
    x = torch.arange(12.0).view(1, 3, 4)  # three actions of four elements
    assert reduce_to("token_level", x).tolist() == [list(range(12))]
    assert reduce_to("action_level", x).tolist() == [[6, 22, 38]]
    assert reduce_to("chunk_level", x).tolist() == [[66]]


# The schedule ---------------------------------------------------------------------------------------


def make_ppo(net=None, **settings):
    options = {"update_epoch": 2, "batch_size": 8, "gamma": 0.9} | settings
    return PPO(net if net is not None else network(), **options)


def test_the_collection_is_gone_through_in_new_orders_and_then_used_up():
    ppo = make_ppo()
    assert not ppo.ready()
    ppo.observe(played(ppo.network))
    assert ppo.ready()
    seen = []
    original = ppo._step

    def step(batch):
        seen.append(batch.returns)
        return original(batch)

    ppo._step = step
    metrics = [ppo.update() for _ in range(6)]
    assert all(metrics)
    assert ppo.updates == 6
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)
    assert len(first.unique()) == 24
    assert ppo.update() == {}
    ppo.observe(played(ppo.network, seed=1))
    assert ppo.update()


def test_a_collection_too_large_to_be_put_in_order_gives_the_same_minibatches(monkeypatch):
    weights = []
    for limit in (ppo_module.SHUFFLED_WHOLE_BYTES, 0):
        monkeypatch.setattr(ppo_module, "SHUFFLED_WHOLE_BYTES", limit)
        ppo = make_ppo(network(), batch_size=7)
        ppo.observe(played(ppo.network))
        while ppo.update():
            pass
        assert ppo.updates == 8
        weights.append(torch.cat([p.detach().flatten() for p in ppo.network.parameters()]))
    assert torch.equal(*weights)


def test_a_step_is_that_of_torchs_adam_and_none_where_a_gradient_is_not_finite():
    """The first step, those after it, and the first after a resumption."""
    settings = OptimizerSettings(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, lr_warmup_steps=3)
    torch.manual_seed(0)
    start = torch.randn(5)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    stepper, adam = Stepper([ours], settings), torch.optim.Adam([theirs], betas=(0.8, 0.95), eps=1e-6, fused=True)
    for number in range(8):
        if number == 5:
            saved = stepper.state_dict()
            stepper = Stepper([ours], settings)
            stepper.load_state_dict(saved)
        factor = torch.randn(5)
        broken = number in (2, 6)
        stepper.begin()
        (ours * factor * (float("inf") if broken else 1.0)).sum().backward()
        adam.param_groups[0]["lr"] = stepper.lr
        norm = stepper.apply()
        assert bool(norm.isfinite()) != broken
        if not broken:
            theirs.grad = factor.clone()
            adam.step()
        assert torch.equal(ours.detach(), theirs.detach()), number
    state = stepper.optimizer.state_dict()
    assert state["state"][0]["step"] == 6 and state["param_groups"][0]["lr"] == stepper.settings.lr


def test_the_first_minibatch_compares_the_policy_with_itself():
    ppo = make_ppo()
    ppo.observe(played(ppo.network))
    metrics = ppo.update()
    assert metrics["actor/ratio"].item() == pytest.approx(1.0, abs=1e-5)
    assert metrics["actor/approx_kl"].item() == pytest.approx(0.0, abs=1e-5)
    assert metrics["actor/clip_fraction"].item() == 0


def test_the_normaliser_rests_while_a_collection_is_learned_from():
    norm = RunningNorm(STATE)
    ppo = make_ppo(network(norm), normalizer=norm, update_epoch=1)
    ppo.observe(played(ppo.network))
    for _ in range(2):
        ppo.update()
        assert norm.count == 0
    ppo.update()
    assert norm.count == 24


def test_values_after_a_segment_are_those_of_the_true_next_observations():
    ppo = make_ppo(normalize_advantages=False, gae_lambda=0.0)
    segment = played(ppo.network, ends=[(2, 1, False), (3, 0, True)])
    ppo.observe(segment)
    samples, _ = ppo._prepare()
    value = lambda state: ppo.network.value({"state": state}).detach()  # noqa: E731
    advantage = samples.advantage.view(6, 4)
    reward, now = segment.reward[..., 0], segment.value
    for t in range(6):
        for n in range(4):
            following = value(segment.obs["state"][t + 1, n])
            if (t, n) == (2, 1):
                following = value(segment.last_obs["state"][0])
            if (t, n) == (3, 0):
                following = 0.0
            expected = reward[t, n] + 0.9 * following - now[t, n]
            assert advantage[t, n].item() == pytest.approx(float(expected), abs=1e-5)


def test_rows_after_an_episode_that_nothing_resets_are_no_samples():
    ppo = make_ppo(weighting="seq-mean-token-mean", normalize_advantages=False)
    valid = torch.ones(6, 4, dtype=torch.bool)
    valid[2:, 0] = False
    ppo.observe(played(ppo.network, ends=[(1, 0, True)], valid=valid))
    samples, metrics = ppo._prepare()
    assert len(samples) == 2 + 3 * 6
    assert samples.weight.mean().item() == pytest.approx(1.0)
    short, long = samples.weight.max(), samples.weight.min()
    assert (short / long).item() == pytest.approx(6 / 2)
    assert torch.isfinite(metrics["rollout/advantages_max"])


def test_advantages_are_normalised_only_when_asked():
    for asked in (True, False):
        ppo = make_ppo(normalize_advantages=asked)
        ppo.observe(played(ppo.network))
        samples, metrics = ppo._prepare()
        normal = abs(samples.advantage.mean().item()) < 1e-5 and abs(samples.advantage.std().item() - 1) < 1e-3
        assert normal == asked
        assert metrics["rollout/advantages_mean"].item() != pytest.approx(0.0, abs=1e-4)


def test_micro_batches_change_nothing():
    whole, parts = make_ppo(batch_size=24), make_ppo(batch_size=24, micro_batch_size=5)
    for ppo in (whole, parts):
        ppo.observe(played(network()))
        ppo.update()
    for one, other in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_the_value_function_warms_up_alone():
    ppo = make_ppo(critic_warmup_steps=2, target_kl=10.0)
    ppo.observe(played(ppo.network))
    policy = [p.detach().clone() for p in ppo.network.policy_parameters()]
    value = [p.detach().clone() for p in ppo.network.value_parameters()]
    for _ in range(2):
        assert "actor/policy_loss" not in ppo.update()
    assert all(torch.equal(p, q) for p, q in zip(policy, ppo.network.policy_parameters(), strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(value, ppo.network.value_parameters(), strict=True))
    assert "actor/policy_loss" in ppo.update()


def test_a_large_change_of_the_policy_ends_the_collection():
    ppo = make_ppo(target_kl=1e-4, policy_optim=OptimizerSettings(lr=0.1), update_epoch=50)
    ppo.observe(played(ppo.network))
    count = 0
    while ppo.update():
        count += 1
    assert 1 < count < 10


def test_gradients_of_the_two_losses_stay_apart():
    ppo = make_ppo(batch_size=24, entropy_bonus=0.1)
    ppo.observe(played(ppo.network))
    ppo._samples, _ = ppo._prepare()
    batch = ppo._samples
    loss, _ = ppo._losses(batch, True)
    policy = torch.autograd.grad(loss, ppo.network.policy_parameters(), retain_graph=True)
    expected = torch.linalg.vector_norm(torch.cat([g.flatten() for g in policy]))
    metrics = ppo._step(batch)
    torch.testing.assert_close(metrics["actor/grad_norm"], expected)
    assert all(p.grad is None for p in ppo.network.parameters())


def test_entropy_is_that_of_the_gaussian_and_pays():
    ppo = make_ppo(batch_size=24, entropy_bonus=1.0)
    ppo.observe(played(ppo.network))
    metrics = ppo.update()
    expected = ACTION * (0.5 * math.log(2 * math.pi * math.e) - 0.5)
    assert metrics["entropy_loss"].item() == pytest.approx(expected, abs=1e-4)
    total = metrics["actor/policy_loss"] + metrics["critic/value_loss"] - metrics["entropy_loss"]
    torch.testing.assert_close(metrics["loss"], total)
    assert (ppo.network.log_std > -0.5).any()


def test_experience_without_densities_is_refused():
    ppo = make_ppo()
    segment = played(ppo.network)
    object.__setattr__(segment, "log_prob", None)
    with pytest.raises(ValueError, match="density and value were recorded"):
        ppo.observe(segment)


def test_state_dict_resumes_bit_for_bit():
    straight = make_ppo()
    straight.observe(played(straight.network))
    while straight.update():
        pass
    saved = copy.deepcopy(straight.state_dict())
    resumed = make_ppo(generator=torch.Generator().manual_seed(5))
    resumed.load_state_dict(saved)
    for ppo in (straight, resumed):
        ppo.observe(played(ppo.network, seed=3))
        while ppo.update():
            pass
    for one, other in zip(straight.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert resumed.updates == straight.updates


def test_a_foreign_checkpoint_is_refused_by_name():
    with pytest.raises(CheckpointError, match="has no 'network'"):
        make_ppo().load_state_dict({})


# The networks ---------------------------------------------------------------------------------------


def test_act_and_evaluate_agree_with_a_torch_gaussian():
    net = network(chunks=2)
    with torch.no_grad():
        net.log_std += torch.randn_like(net.log_std)
        net.net[-1].weight *= 50
    obs, noise = {"state": torch.randn(5, STATE)}, torch.randn(5, 2 * ACTION)
    out = net.act(obs, "train", noise)
    gaussian = torch.distributions.Normal(net.net(obs["state"]), net.log_std.exp())
    expected = gaussian.log_prob(out.decision).view(5, 2, ACTION)
    torch.testing.assert_close(out.log_prob, expected, atol=1e-5, rtol=1e-5)
    log_prob, entropy, value = net.evaluate(obs, out.decision)
    torch.testing.assert_close(log_prob, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, gaussian.entropy().view(5, 2, ACTION))
    torch.testing.assert_close(value, out.value)
    torch.testing.assert_close(net.value(obs), out.value)
    assert out.action.abs().max() <= 1 < out.decision.abs().max()
    still = net.act(obs, "eval")
    torch.testing.assert_close(still.decision, net.net(obs["state"]))
    assert still.log_prob is None


def test_parameters_belong_to_one_optimizer_each():
    net = network()
    policy, value = ({id(p) for p in parameters} for parameters in (net.policy_parameters(), net.value_parameters()))
    assert not policy & value
    assert policy | value == {id(p) for p in net.parameters()}
    assert isinstance(net.net[0], nn.Linear)


# Against Stable-Baselines3 --------------------------------------------------------------------------


def test_a_collection_is_learned_from_as_in_stable_baselines3():
    """One pass in one minibatch over the same experience ends in the same weights as SB3's own `PPO.train()`."""
    sb3 = pytest.importorskip("stable_baselines3")
    gymnasium = pytest.importorskip("gymnasium")
    logger = pytest.importorskip("stable_baselines3.common.logger")

    class Nowhere(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-10, 10, (STATE,))
        action_space = gymnasium.spaces.Box(-1, 1, (ACTION,))

    steps, envs = 6, 4
    theirs = sb3.PPO(
        "MlpPolicy",
        sb3.common.vec_env.DummyVecEnv([Nowhere] * envs),
        learning_rate=1e-3,
        n_steps=steps,
        batch_size=steps * envs,
        n_epochs=1,
        gamma=0.9,
        gae_lambda=0.8,
        ent_coef=0.01,
        max_grad_norm=1e9,
        policy_kwargs={"net_arch": [16], "log_std_init": -0.5},
        device="cpu",
    )
    theirs.set_logger(logger.configure(None, []))
    net = network()
    pairs = [
        (theirs.policy.mlp_extractor.policy_net[0], net.net[0]),
        (theirs.policy.action_net, net.net[2]),
        (theirs.policy.mlp_extractor.value_net[0], net.value_net[0]),
        (theirs.policy.value_net, net.value_net[2]),
    ]
    for layer, ours in pairs:
        layer.load_state_dict(ours.state_dict())

    segment = played(net, steps, envs)
    buffer = theirs.rollout_buffer
    buffer.reset()
    for t in range(steps):
        buffer.add(
            segment.obs["state"][t].numpy(),
            segment.decision[t].numpy(),
            segment.reward[t, :, 0].numpy(),
            np.full(envs, t == 0),
            segment.value[t],
            segment.log_prob[t].sum((-1, -2)),
        )
    buffer.compute_returns_and_advantage(net.value({"state": segment.obs["state"][-1]}).detach(), np.zeros(envs))
    theirs.train()

    optim = OptimizerSettings(lr=1e-3, eps=1e-5)
    ppo = make_ppo(
        net,
        batch_size=24,
        update_epoch=1,
        gae_lambda=0.8,
        huber_delta=1e9,
        entropy_bonus=0.01,
        logprob_level="chunk_level",
        policy_optim=optim,
        value_optim=optim,
    )
    ppo.observe(segment)
    assert ppo.update()
    # Their value loss is e², weighted by one half; their advantages are divided by a slightly other deviation.
    for layer, ours in pairs:
        torch.testing.assert_close(layer.weight, ours.weight, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(layer.bias, ours.bias, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(theirs.policy.log_std, net.log_std, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("target_kl", [None, 1e-12])
def test_the_end_of_a_collection_is_told_once_also_where_it_is_left_early(target_kl):
    ended, net = [], network()
    ppo = PPO(net, batch_size=8, update_epoch=3, target_kl=target_kl, after_collection=ended.append)
    for number in (1, 2):
        ppo.observe(played(net))
        updates = 0
        while ppo.update():
            updates += 1
        assert ended == list(range(1, number + 1))
        assert updates == 9 if target_kl is None else updates < 9
    other = PPO(network(), batch_size=8)
    other.load_state_dict(ppo.state_dict())
    assert other.collections == 2
