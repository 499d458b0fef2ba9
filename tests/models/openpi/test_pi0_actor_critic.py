"""π0 under PPO: what is drawn has the density that is told, and the gradients go where they should."""

from dataclasses import replace

import pytest
import torch
from pi0_samples import random_model
from torch.distributions import Normal

from rlinf.core.errors import ConfigError, ShapeError
from rlinf.models.embodiment.openpi.actor_critic import Pi0ActorCritic, Walk
from rlinf.models.embodiment.openpi.config import TINY, TINY_PI05
from rlinf.models.embodiment.openpi.dataconfig import data_config
from rlinf.models.embodiment.openpi.norm_stats import NormStats
from rlinf.models.embodiment.openpi.tokenizer import ByteTokenizer

B, C, ROBOT = 3, 4, 7
WALK = Walk(num_steps=3, method="flow_noise", executed=C, action_dim=ROBOT)
METHODS = ["flow_sde", "flow_cps", "flow_noise"]


def stats(size):
    return NormStats(torch.zeros(size), torch.ones(size), -torch.ones(size), torch.ones(size))


def policy(walk=WALK, config=TINY_PI05, dtype=torch.float32, **how):
    torch.manual_seed(0)
    # The same robot for both models: one camera in front, statistics that change nothing.
    robot = replace(data_config("pi05_maniskill_sim_real_co_training"), model=config, pad_first=False)
    pipeline = robot.pipeline({"state": stats(8), "actions": stats(ROBOT)}, ByteTokenizer())
    return Pi0ActorCritic(random_model(config, dtype), pipeline, walk, **how)


def observe(batch=B, instruction=("put the spoon on the towel", "stop", "put it back")):
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (batch, 56, 56, 3), dtype=torch.uint8, generator=generator)
    state = torch.randn(batch, 8, generator=generator)
    return {"images": {"front": image}, "state": state, "instruction": list(instruction[:batch])}


def draw(network, batch=B, seed=2):
    return torch.randn(batch, *network.noise_shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_the_ratio_is_one_before_the_first_step(method, joint, dtype):
    network = policy(replace(WALK, method=method, joint=joint), dtype=dtype)
    obs = observe()
    out = network.act(obs, "train", draw(network))
    assert out.action.shape == out.log_prob.shape == (B, C, ROBOT) and out.action.dtype == torch.float32
    log_prob, entropy, value = network.evaluate(obs, out.decision)
    assert torch.equal(log_prob, out.log_prob)
    assert torch.equal(value, out.value) and torch.equal(value, network.value(obs))
    assert entropy.shape == log_prob.shape


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("after_vlm", [True, False])
def test_densities_alone_are_the_same_numbers(joint, after_vlm, monkeypatch):
    network, obs = policy(replace(WALK, joint=joint), value_after_vlm=after_vlm), observe()
    decision = network.act(obs, "train", draw(network)).decision
    expected, _, _ = network.evaluate(obs, decision)
    monkeypatch.setattr(network, "_value", lambda _: pytest.fail("no value was asked for"))
    assert torch.equal(network.log_prob(obs, decision), expected)


@pytest.mark.parametrize("config", [TINY, TINY_PI05], ids=["pi0", "pi05"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_density_of_a_walk_is_that_of_its_gaussians(config, reduction):
    """From the equations: every x' around its mean, by torch's normal distribution."""
    level, steps = 0.4, 3
    walk = Walk(steps, "flow_sde", C, ROBOT, noise_level=level, reduction=reduction)
    network, obs = policy(walk, config), observe()
    out = network.act(obs, "train", draw(network))
    prefix = network.model.encode(network.pipeline.encode(obs))
    chain = out.decision
    assert chain.shape == (B, steps + 1, 8, 32)
    total = Normal(0.0, 1.0).log_prob(chain[:, 0])
    for k in range(steps):
        t, delta = 1 - k / steps, 1 / steps
        v = network.model.velocity(prefix, chain[:, k], torch.tensor([t]))
        sigma = level * (t / (1 - t if k else delta)) ** 0.5
        noise = chain[:, k] + (1 - t) * v
        mean = chain[:, k] - delta * v - sigma**2 * delta / (2 * t) * noise
        total = total + Normal(mean, sigma * delta**0.5).log_prob(chain[:, k + 1])
    if reduction == "mean":
        total = total / (steps + 1)
    assert torch.allclose(out.log_prob, total[:, :C, :ROBOT], atol=2e-3)
    assert torch.allclose(out.action, chain[:, -1, :C, :ROBOT], atol=1e-5)


def test_a_single_noisy_step_is_another_one_for_every_decision():
    """The rest of the walk is the ODE's, and the step is drawn evenly."""
    walk = replace(WALK, method="flow_sde", joint=False)
    network, obs = policy(walk), observe()
    noise = draw(network)
    noise[:, 2] = torch.tensor([-3.0, 0.0, 3.0])[:, None, None]
    out = network.act(obs, "train", noise)
    before, after, number = out.decision.unbind(1)
    assert [row.unique().tolist() for row in number] == [[0.0], [1.0], [2.0]]
    assert torch.equal(before[0], noise[0, 0]), "the first step begins with the noise"
    assert torch.allclose(out.action[2], after[2, :C, :ROBOT], atol=1e-5), "the last one ends with the action"
    prefix = network.model.encode(network.pipeline.encode(obs))
    v = network.model.velocity(prefix, noise[:, 0], torch.ones(1))
    assert torch.allclose(before[1], (noise[:, 0] - v / 3)[1], atol=1e-5)

    many = torch.special.ndtr(torch.randn(30_000, generator=torch.Generator().manual_seed(0)))
    assert torch.bincount((many * 3).long()).tolist() == pytest.approx([10_000] * 3, rel=0.03)


def test_noise_of_a_network_stays_in_its_range():
    network, obs = policy(replace(WALK, std_range=(0.08, 0.16))), observe()
    out = network.act(obs, "train", draw(network))
    _, entropy, _ = network.evaluate(obs, out.decision)
    lowest, highest = (3 * Normal(0.0, std).entropy() for std in (0.08, 0.16))
    assert (entropy > lowest).all() and (entropy < highest).all()
    assert entropy.std() > 0


def test_evaluation_follows_the_ode_from_given_noise_or_from_none():
    network, obs = policy(), observe()
    start = draw(network)
    out = network.act(obs, "eval", start)
    expected = network.model.sample_actions(network.pipeline.encode(obs), noise=start[:, 0], num_steps=3)
    assert torch.allclose(out.action, expected[:, :C, :ROBOT], atol=1e-5)
    silent = network.act(obs, "eval")
    assert torch.equal(silent.action, network.act(obs, "eval", torch.zeros_like(start)).action)
    assert silent.log_prob is None and torch.equal(silent.value, out.value)


def test_only_the_expert_and_the_heads_are_trained():
    network, obs = policy(), observe()
    out = network.act(obs, "train", draw(network))
    log_prob, entropy, value = network.evaluate(obs, out.decision)
    (log_prob.sum() + entropy.sum()).backward(retain_graph=True)
    trained = {id(p) for p in network.policy_parameters()}
    assert trained == {id(p) for p in network.model.expert_parameters()} | {
        id(p) for p in network.noise_head.parameters()
    }
    assert all(p.grad is None for p in network.value_parameters())
    moved = [name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert not [name for name in moved if name.startswith(("model.vision", "model.vlm", "model.projector"))]
    assert any(name.startswith("model.expert") for name in moved) and any(
        name.startswith("noise_head") for name in moved
    )
    before = {id(p): p.grad.clone() for p in network.policy_parameters() if p.grad is not None}
    value.sum().backward()
    assert all(torch.equal(before[id(p)], p.grad) for p in network.policy_parameters() if id(p) in before)
    assert all(p.grad.abs().max() > 0 for p in network.value_parameters())


@pytest.mark.parametrize("after_vlm", [True, False])
def test_the_value_reaches_what_it_reads_where_it_is_told_to(after_vlm):
    network = policy(value_after_vlm=after_vlm, detach_critic_input=False, train_expert_only=False)
    network.value(observe()).sum().backward()
    part = network.model.vlm if after_vlm else network.model.expert
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in part.layers[0].parameters())


def test_values_are_of_tokens_that_are_there():
    """A short prompt's value does not depend on how far a longer neighbour makes it be padded; on its words it does."""
    network = policy()
    short = observe(1, ("stop",))
    both = {"images": {"front": torch.cat([short["images"]["front"]] * 2)}, "state": torch.cat([short["state"]] * 2)}
    alone = network.value(short)[0]
    beside = network.value({**both, "instruction": ["stop", "a prompt that is very much longer than that"]})
    assert beside[0].item() == pytest.approx(alone.item(), abs=1e-5)
    assert beside[1].item() != pytest.approx(alone.item(), abs=1e-4)


def test_padding_has_no_part_in_demonstrations():
    """Neither the numbers that the robot has not give a gradient nor does the noise in them."""
    network, obs = policy(), observe()
    actions = torch.randn(B, 8, ROBOT)
    noise, time = torch.randn(B, 8, 32), torch.tensor([0.2, 0.5, 0.9])
    valid = torch.ones(B, 8, dtype=torch.bool)
    valid[1, 3:] = False
    loss = network.flow_matching_loss(obs, actions, valid, noise=noise, time=time)
    loss.backward()
    grad = network.model.action_out_proj.weight.grad
    assert (grad[:ROBOT].abs().amax(1) > 0).all() and (grad[ROBOT:] == 0).all()

    inputs = network.pipeline.encode(obs)
    chunk = torch.cat([actions, torch.zeros(B, 8, 25)], -1)
    elements = network.model.loss(inputs, chunk, noise=noise, time=time)
    assert loss.item() == pytest.approx(elements[valid][:, :ROBOT].mean().item(), rel=1e-4)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="no step of flow_cps would draw anything"):
        replace(WALK, method="flow_cps", num_steps=1)
    with pytest.raises(ConfigError, match=r"\[0.2, 0.1\] instead of two growing"):
        replace(WALK, std_range=(0.2, 0.1))
    with pytest.raises(ConfigError, match="num_action_chunks is 9, but the model gives chunks of 8"):
        policy(replace(WALK, executed=9))
    network = policy()
    with pytest.raises(ShapeError, match=r"noise is \[3, 3, 8, 32\] instead of \[B, 4, 8, 32\]"):
        network.act(observe(), "train", torch.zeros(3, 3, 8, 32))
