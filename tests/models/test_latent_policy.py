"""The policy of DSRL: its density, what it acts by, and that its decoder is in nothing that is trained or sent."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution

from rlinf.core.errors import CheckpointError, ConfigError
from rlinf.models.embodiment.dsrl_policy import DsrlKeys, build_latent_critic, build_latent_policy
from rlinf.models.embodiment.latent_policy import LatentHead, LatentPolicy
from rlinf.models.modules.compact_encoder import CompactEncoder

SEED_SHAPES = {"state": (8,), "images/main": (256, 256, 3)}


class EchoDecoder:
    """Actions are the noise, plus the first number of the state; counts what it is asked."""

    noise_shape = (4, 3)

    def __init__(self):
        self.weight = torch.ones(1)
        self.device = "cpu"
        self.seen = []

    def decode(self, obs, noise):
        self.seen.append(noise)
        return noise * self.weight + obs["state"][:, :1, None]

    def to(self, device):
        self.device = str(device)
        return self

    def state_dict(self):
        return {"weight": self.weight}


def head_of(dim=3, bound=1.0, mark=0, state_dim=2):
    torch.manual_seed(0)
    head = LatentHead(CompactEncoder(state_dim, 16), dim, (32, 32), bound, decoder_mark=mark)
    # Beyond the start, where mean and deviation are nearly the same everywhere.
    for layer in (head.mean, head.log_std):
        nn.init.normal_(layer.weight, std=0.3)
    return head


def states(n=5, state_dim=2):
    return {"state": torch.randn(n, state_dim, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("bound", [0.5, 1.0, 2.5])
def test_density_is_that_of_a_scaled_squashed_gaussian(bound):
    head, obs, noise = head_of(bound=bound).double(), states(), torch.randn(5, 3).double()
    obs = {"state": obs["state"].double()}
    mean, log_std = head._gaussian(obs)
    oracle = TransformedDistribution(
        Normal(mean.double(), log_std.double().exp()), [TanhTransform(), AffineTransform(0.0, bound)]
    )
    latent, log_prob = head.sample(obs, noise)
    torch.testing.assert_close(log_prob, oracle.log_prob(latent).sum(-1), atol=1e-5, rtol=1e-5)
    assert latent.abs().max() < bound


def test_density_integrates_to_one_within_the_bound():
    """∫ p(w) dw over (−b, b), from samples of x on a grid: dw = b (1 − tanh²x) dx."""
    head, bound = head_of(dim=1, bound=1.5), 1.5
    obs = {"state": torch.zeros(1, 2)}
    mean = head._gaussian(obs)[0].item()
    noise = torch.linspace(-8, 8, 4001, dtype=torch.float64)  # tanh is 1 in float32 where some mass still is
    latent, log_prob = head.sample({"state": torch.zeros(4001, 2)}, noise[:, None])
    mass = torch.trapezoid(log_prob.exp().double(), latent[:, 0].double()).item()
    assert mass == pytest.approx(1.0, abs=1e-3)
    assert latent[2000].item() == pytest.approx(bound * math.tanh(mean), abs=1e-5)


def test_entropy_grows_by_the_log_of_the_bound():
    """A wider box is the same policy, measured in other units: so is the default target."""
    noise = torch.randn(5, 3)
    narrow, wide = head_of(bound=1.0), head_of(bound=2.0)
    (w1, log1), (w2, log2) = narrow.sample(states(), noise), wide.sample(states(), noise)
    torch.testing.assert_close(w2, 2 * w1)
    torch.testing.assert_close(log1 - log2, torch.full((5,), 3 * math.log(2)))
    assert wide.default_target_entropy() - narrow.default_target_entropy() == pytest.approx(3 * math.log(2))
    assert LatentHead(CompactEncoder(8, 4), 32, (8,), 1.0).default_target_entropy() == -16


def test_before_learning_the_noise_itself_is_played_and_then_the_network_decides():
    head = head_of(bound=0.5)
    noise = 3 * torch.randn(5, 3)
    out = head.act(states(), "train", noise)
    assert torch.equal(out.decision, noise), "beyond the bound too: the first experience is the decoder's own"
    assert out.log_prob is None
    assert head.act(states(), "eval").decision.abs().max() == 0
    head.begin_learning()
    out = head.act(states(), "train", noise)
    latent, log_prob = head.sample(states(), noise)
    assert torch.equal(out.decision, latent) and torch.equal(out.log_prob, log_prob)
    mean, _ = head._gaussian(states())
    torch.testing.assert_close(head.act(states(), "eval").decision, 0.5 * torch.tanh(mean))
    with pytest.raises(ValueError, match="give noise"):
        head.act(states(), "train")


def test_that_learning_has_begun_travels_with_the_weights():
    head, copy = head_of(), head_of()
    head.begin_learning()
    copy.load_state_dict(head.state_dict())
    assert copy.begun


def test_one_noise_is_repeated_over_the_chunk():
    decoder = EchoDecoder()
    policy = LatentPolicy(head_of(), decoder, num_action_chunks=2)
    out = policy.act(states(), "train", torch.randn(5, 3))
    [noise] = decoder.seen
    assert noise.shape == (5, 4, 3)
    assert torch.equal(noise, out.decision[:, None].expand(5, 4, 3))
    assert out.decision.shape == (5, 3), "what is learned from is small"
    torch.testing.assert_close(out.action, (noise + states()["state"][:, :1, None])[:, :2])


def test_or_every_action_has_a_noise_of_its_own():
    decoder = EchoDecoder()
    policy = LatentPolicy(head_of(dim=12), decoder, num_action_chunks=4, repeat_noise=False)
    out = policy.act(states(), "train", torch.randn(5, 12))
    assert torch.equal(decoder.seen[0].flatten(1), out.decision)
    assert out.action.shape == (5, 4, 3)


def test_the_decoder_is_in_no_state_and_no_parameters():
    class Trainable(EchoDecoder, nn.Module):
        def __init__(self):
            nn.Module.__init__(self)
            self.big = nn.Linear(100, 100)
            self.seen = []
            self.weight = torch.ones(1)

    decoder = Trainable()
    policy = LatentPolicy(head_of(), decoder, num_action_chunks=2)
    assert set(policy.state_dict()) == {f"head.{name}" for name in head_of().state_dict()}
    assert not {id(p) for p in decoder.parameters()} & {id(p) for p in policy.parameters()}
    alone = LatentPolicy(head_of(), None, num_action_chunks=2)
    alone.load_state_dict(policy.state_dict())
    with pytest.raises(RuntimeError, match="without its decoder"):
        alone.act(states(), "eval")


def test_the_decoder_moves_with_the_policy():
    decoder = EchoDecoder()
    LatentPolicy(head_of(), decoder, num_action_chunks=2).to("meta")
    assert decoder.device == "meta"


def test_what_acting_holds_is_more_than_its_state():
    """A policy that rests gives back the decoder's memory too."""
    decoder = EchoDecoder()
    policy = LatentPolicy(head_of(), decoder, num_action_chunks=2)
    held = policy.held()
    assert held["decoder"][0]["weight"] is decoder.weight
    assert held["policy"]["head.mean.weight"].data_ptr() == policy.head.mean.weight.data_ptr()


def test_weights_that_steer_another_decoder_are_refused():
    mine, other, unknown = head_of(mark=11), head_of(mark=12), head_of()
    with pytest.raises(CheckpointError, match="another decoder"):
        mine.load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match="another decoder"):
        LatentPolicy(mine, None, num_action_chunks=1).load_state_dict(
            LatentPolicy(other, None, num_action_chunks=1).state_dict()
        )
    unknown.load_state_dict(other.state_dict())
    head_of(mark=12).load_state_dict(other.state_dict())


def test_log_deviation_is_cut():
    head = head_of()
    nn.init.constant_(head.log_std.bias, 100.0)
    assert (head._gaussian(states())[1] == 2).all()
    nn.init.constant_(head.log_std.bias, -100.0)
    assert (head._gaussian(states())[1] == -20).all()


# ---- as the keys describe it


def build(keys, noise_shape=(50, 32), shapes=SEED_SHAPES, chunk=5):
    policy = build_latent_policy(
        keys,
        obs_shapes=shapes,
        noise_shape=noise_shape,
        decoder=None,
        decoder_mark=0,
        num_action_chunks=chunk,
        normalizer=None,
    )
    return policy, build_latent_critic(keys, policy.noise_shape[0], obs_shapes=shapes, normalizer=None)


def size(module):
    return sum(p.numel() for p in module.parameters())


def test_the_published_sizes_give_a_small_actor_and_critic():
    keys = DsrlKeys(dsrl_state_dim=8, dsrl_action_noise_dim=32, dsrl_camera="main")
    policy, critic = build(keys)
    state = 8 * 64 + 64 + 2 * 64
    conv = 3 * 32 * 9 + 32 + 3 * (32 * 32 * 9 + 32)
    image = conv + 32 * 4 * 4 * 64 + 64 + 2 * 64
    hidden = 3 * (128 * 128 + 128 + 2 * 128)
    assert size(policy) == state + image + hidden + 2 * (128 * 32 + 32)
    heads = 10 * ((160 * 128 + 128) + 2 * (128 * 128 + 128) + 3 * 2 * 128 + 129)
    assert size(critic) == state + image + heads
    assert size(policy) + size(critic) < 750_000, "upstream's are 4.9 million, and announced as half a million"
    assert policy.noise_shape == (32,)


def test_actor_and_critic_share_no_encoder():
    policy, critic = build(DsrlKeys(dsrl_camera="main"))
    assert not {id(p) for p in policy.parameters()} & {id(p) for p in critic.parameters()}
    target = critic.make_target()
    assert not any(p.requires_grad for p in target.parameters())
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), critic.parameters(), strict=True))


def test_everything_that_learns_is_float32():
    policy, critic = build(DsrlKeys(dsrl_camera="main"))
    assert {p.dtype for p in [*policy.parameters(), *critic.parameters()]} == {torch.float32}


def test_keys_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match=r"dsrl_action_noise_dim is 32, but the decoder's noise has 7"):
        build(DsrlKeys(dsrl_action_noise_dim=32), noise_shape=(10, 7))
    with pytest.raises(ConfigError, match=r"dsrl_state_dim is 9, but the environment's state has 8"):
        build(DsrlKeys(dsrl_state_dim=9))
    with pytest.raises(ConfigError, match=r"dsrl_camera is wrist, but the environment has main"):
        build(DsrlKeys(dsrl_camera="wrist"))
    with pytest.raises(ConfigError, match=r"num_action_chunks is 51, but the decoder makes 50"):
        build(DsrlKeys(), chunk=51)
