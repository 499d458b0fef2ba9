"""SAC behind an encoder: who trains it, what the actor sees, and how often a frame is encoded."""

import copy

import torch
from torch import nn

from rlinf.algorithms import sac
from rlinf.algorithms.augment import RandomShift
from rlinf.algorithms.temperature import Temperature
from rlinf.core.types import Transition
from tests.algorithms.test_sac import LinearActor, LinearCritic, weights


class LinearEncoder(nn.Module):
    """Three features of five raw numbers, plus two weights that are frozen."""

    def __init__(self):
        super().__init__()
        self.net, self.frozen = nn.Linear(5, 3), nn.Linear(1, 1).requires_grad_(False)
        self.calls, self.generators = [], []

    def forward(self, obs, generator=None):
        self.calls.append((torch.is_grad_enabled(), obs["state"]))
        self.generators.append(generator)
        return {"state": torch.tanh(self.net(obs["state"])).float()}

    def trained_parameters(self):
        return list(self.net.parameters())


class Acting(nn.Module):
    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head


class RawReplay:
    def __len__(self):
        return 100

    def sample(self, n):
        g = torch.Generator().manual_seed(n)
        obs, next_obs = torch.randn(n, 5, generator=g), torch.randn(n, 5, generator=g)
        decision, reward = torch.randn(n, 1, generator=g), torch.randn(n, generator=g)
        return Transition({"state": obs}, decision, reward, torch.full((n,), 0.9), {"state": next_obs})


def make(**keys):
    torch.manual_seed(0)
    encoder, actor, critic = LinearEncoder(), LinearActor(), LinearCritic()
    target = copy.deepcopy(critic).requires_grad_(False)
    settings = {"target_entropy": -1.0, "batch_size": 8, "tau": 0.1} | keys
    temperature = Temperature("softplus", 0.2)
    acting = Acting(encoder, actor)
    return sac.SAC(actor, critic, target, temperature, RawReplay(), encoder=encoder, acting=acting, **settings)


def test_the_critics_loss_alone_trains_the_encoder():
    learner = make(critic_actor_ratio=2, actor_delay=1)
    encoder = learner.encoder
    before, frozen = weights(encoder.net), weights(encoder.frozen)
    learner.update()  # without the actor
    assert not torch.equal(weights(encoder.net), before)
    torch.testing.assert_close(weights(encoder.frozen), frozen, atol=0, rtol=0)

    [batch] = learner._micro_batches(learner.replay.sample(8))
    _, seen = learner._update_critic([batch])
    after_critic = weights(encoder.net)
    learner._update_actor(seen)
    torch.testing.assert_close(weights(encoder.net), after_critic, atol=0, rtol=0)
    assert not seen[0].obs["state"].requires_grad
    assert all(p.grad is None for p in encoder.parameters())


def test_its_gradient_is_that_of_the_bellman_error():
    learner = make()
    batch = learner._micro_batches(learner.replay.sample(8))[0]
    state = learner.generator.get_state()
    noise = torch.randn(8, 1, generator=learner.generator)
    learner.generator.set_state(state)
    encoded = learner._encoded(batch)
    alpha = learner.temperature().detach()
    loss, _ = sac.critic_loss(learner.critic, learner.actor, learner.target_critic, alpha, encoded, noise)
    own = torch.autograd.grad(loss, [*learner.critic.parameters(), *learner.encoder.net.parameters()])
    metrics, _ = learner._update_critic([batch])
    expected = torch.linalg.vector_norm(torch.cat([g.flatten() for g in own]))
    torch.testing.assert_close(metrics["critic/grad_norm"], expected)


def test_each_frame_is_encoded_once_and_only_the_present_one_with_gradients():
    learner = make()
    learner.update()
    batch = learner.replay.sample(8)
    assert [enabled for enabled, _ in learner.encoder.calls] == [True, False]
    assert torch.equal(learner.encoder.calls[0][1], batch.obs["state"])
    assert torch.equal(learner.encoder.calls[1][1], batch.next_obs["state"])
    assert learner.encoder.generators == [learner.generator] * 2


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    whole, parts = make(backup_entropy=False), make(micro_batch_size=2, backup_entropy=False)
    for learner in (whole, parts):
        learner.actor.sample = lambda obs, noise: (obs["state"][:, :1] * 0, obs["state"][:, 0] * 0)
        learner._update_critic(learner._micro_batches(learner.replay.sample(8)))
    torch.testing.assert_close(weights(parts.encoder), weights(whole.encoder))


def test_what_acts_and_what_is_saved_include_the_encoder():
    learner = make()
    learner.update()
    names = set(learner.acting_weights()[1])
    assert {"encoder.net.weight", "encoder.frozen.weight", "head.net.weight"} <= names
    other = make()
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    for one, two in ((learner, other), (learner, other)):
        one.update()
        two.update()
    assert torch.equal(weights(learner.encoder), weights(other.encoder))
    assert torch.equal(weights(learner.critic), weights(other.critic))


def test_observations_and_next_observations_are_augmented_independently():
    drawn = []

    def augment(obs, generator):
        shift = torch.rand(1, generator=generator)
        drawn.append(float(shift))
        return {"state": obs["state"] + shift}

    learner = make(augment=augment)
    learner.update()
    batch = learner.replay.sample(8)
    (_, obs), (_, next_obs) = learner.encoder.calls
    assert drawn[0] != drawn[1]
    torch.testing.assert_close(obs, batch.obs["state"] + drawn[0])
    torch.testing.assert_close(next_obs, batch.next_obs["state"] + drawn[1])


def test_a_random_shift_moves_every_camera_by_itself_and_nothing_else():
    picture = torch.arange(12 * 12, dtype=torch.uint8).view(1, 12, 12, 1).expand(64, -1, -1, 3).contiguous()
    obs = {"state": torch.randn(64, 2), "images": {"front": picture, "wrist": picture}, "instruction": ["lift"] * 64}
    shifted = RandomShift(2)(obs, torch.Generator().manual_seed(0))
    assert shifted["state"] is obs["state"]
    assert shifted["instruction"] is obs["instruction"]
    centres = {camera: images[:, 6, 6, 0].int() - 78 for camera, images in shifted["images"].items()}
    steps = {(int(c) + 2 * 13) // 12 - 2 for c in centres["front"]}
    assert steps <= {-2, -1, 0, 1, 2} and len(steps) > 2
    assert not torch.equal(centres["front"], centres["wrist"])
    assert torch.equal(obs["images"]["front"], picture), "the batch itself is left alone"


def test_under_autocast_the_encoder_runs_in_bfloat16_and_its_weights_stay_in_float32():
    seen = []
    learner = make(autocast=True)
    learner.encoder.net.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    learner.update()
    assert seen == [torch.bfloat16] * 2, "of obs and of next_obs"
    assert learner.encoder.net.weight.dtype == torch.float32
