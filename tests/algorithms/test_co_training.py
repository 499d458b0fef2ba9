"""PPO with demonstrations beside it."""

import copy
from dataclasses import replace

import pytest
import torch
from segments import ACTION, STATE, network, played
from torch import nn

from rlinf.algorithms.co_training import Demonstrations, loss_ratio
from rlinf.algorithms.ppo import PPO
from rlinf.data.chunks import ChunkBatch

BETA = 0.2


class Cloned(nn.Module):
    """The small policy with a loss of demonstrations: (μ(s) + t ε − a)², so that noise and time count."""

    noise_shape = (2, 1, ACTION)

    def __init__(self):
        super().__init__()
        self.net = network()

    def flow_matching_loss(self, obs, actions, valid, *, noise, time):
        return (self.net.net(obs["state"])[:, None] + time[:, None, None] * noise - actions).square().mean()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)


def batch(number, size=5):
    draw = torch.Generator().manual_seed(100 + number)
    obs = {"state": torch.randn(size, STATE, generator=draw)}
    return ChunkBatch(obs, torch.randn(size, 1, ACTION, generator=draw), torch.ones(size, 1, dtype=torch.bool))


def demonstrations(net, weight=BETA):
    generator = torch.Generator().manual_seed(1)
    return Demonstrations(net, batch, lambda size, g: torch.rand(size, generator=g), weight=weight, generator=generator)


def learner(net=None, beside=True, **settings):
    net = net if net is not None else Cloned()
    options = {"update_epoch": 2, "batch_size": 9, "micro_batch_size": 4, "gamma": 0.9} | settings
    ppo = PPO(net, demonstrations=demonstrations(net) if beside else None, **options)
    ppo.observe(played(net.net))
    return ppo


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_gradients_are_the_sum_over_uneven_micro_batches():
    """A minibatch of 9 in parts of 4, 4 and 1, each with its own batch of demonstrations."""
    ppo = learner()
    ppo._samples, _ = ppo._prepare()
    nine = ppo._samples.take(torch.arange(9))
    twin = copy.deepcopy(ppo.network)
    alone = PPO(twin, batch_size=9, micro_batch_size=9, gamma=0.9)
    loss, _ = alone.losses(nine, True)
    other = demonstrations(twin)
    loss = loss + BETA * sum(share * other.loss() for share in (4 / 9, 4 / 9, 1 / 9))
    loss.backward()
    expected = gradients(twin)

    ppo.policy_stepper.apply = ppo.value_stepper.apply = lambda: torch.zeros(())
    ppo._step(nine)
    found = gradients(ppo.network)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)
    assert ppo.demonstrations.batches == 3


def test_metrics_by_hand():
    ppo = learner(micro_batch_size=9)
    sft = demonstrations(ppo.network).loss().item()
    metrics = {name: float(value) for name, value in ppo.update().items()}
    assert metrics["sft_loss"] == pytest.approx(sft)
    assert metrics["ppo_loss"] == pytest.approx(metrics["loss"])
    assert metrics["actor/total_loss"] == pytest.approx(metrics["ppo_loss"] + BETA * sft)
    assert metrics["loss_ratio"] == pytest.approx(BETA * sft / abs(metrics["ppo_loss"]))
    assert loss_ratio(torch.tensor(-2.0), torch.tensor(3.0), 0.2).item() == pytest.approx(0.3)
    assert loss_ratio(torch.tensor(0.0), torch.tensor(3.0), 0.2).item() == float("inf")


def test_without_weight_it_is_ppo_and_without_demonstrations_exactly():
    co_trained, plain, reference = learner(), learner(beside=False), learner(beside=False)
    co_trained.demonstrations.weight = 0.0
    for _ in range(4):
        expected = reference.update()
        assert torch.equal(plain.update()["loss"], expected["loss"])
        torch.testing.assert_close(co_trained.update()["ppo_loss"], expected["loss"])
    assert "sft_loss" not in expected and "loss_ratio" not in expected
    for ours, theirs in zip(co_trained.network.parameters(), reference.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_demonstrations_wait_while_the_value_function_warms_up():
    ppo = learner(critic_warmup_steps=1)
    assert "sft_loss" not in ppo.update() and ppo.demonstrations.batches == 0
    assert "sft_loss" in ppo.update() and ppo.demonstrations.batches == 3


def test_resuming_goes_on_with_the_next_demonstrations():
    first = learner()
    first.update()
    state = copy.deepcopy(first.state_dict())
    expected = first.demonstrations.loss().item()
    second = learner()
    second.load_state_dict(state)
    assert second.demonstrations.batches == 3
    assert second.demonstrations.loss().item() == expected


def test_densities_may_be_computed_again_before_the_first_step():
    """Where those that were recorded are off, the first ratio is 1 all the same."""
    net = Cloned()
    segment = played(net.net)
    off = replace(segment, log_prob=segment.log_prob + 0.1)
    for recompute in (True, False):
        ppo = PPO(net, batch_size=24, gamma=0.9, recompute_log_prob=recompute)
        ppo.observe(off)
        assert (float(ppo.update()["actor/ratio"]) == pytest.approx(1, abs=1e-6)) == recompute


def test_computing_densities_again_computes_nothing_else(monkeypatch):
    net = Cloned()
    ppo = PPO(net, batch_size=24, micro_batch_size=5, gamma=0.9, recompute_log_prob=True)
    ppo.observe(played(net.net))
    monkeypatch.setattr(net.net, "evaluate", lambda *_: pytest.fail("values and entropies are not needed"))
    samples, _ = ppo._prepare()
    again = net.net.log_prob(samples.obs, samples.decision).sum(-1)
    torch.testing.assert_close(samples.log_prob, again)


def test_prompts_stay_with_their_samples():
    net = network()
    segment = played(net)
    texts = [[f"{t}/{n}" for n in range(segment.num_envs)] for t in range(segment.num_steps + 1)]
    valid = torch.ones(segment.num_steps, segment.num_envs, dtype=torch.bool)
    valid[2, 1] = False
    ppo = PPO(net, batch_size=8)
    ppo.observe(replace(segment, obs={**segment.obs, "instruction": texts}, valid=valid))
    samples, _ = ppo._prepare()
    expected = [f"{t}/{n}" for t in range(segment.num_steps) for n in range(segment.num_envs) if (t, n) != (2, 1)]
    assert samples.obs["instruction"] == expected
    assert samples.take(torch.tensor([3, 0])).obs["instruction"] == [expected[3], expected[0]]
