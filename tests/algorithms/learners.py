"""Small learners that several ranks can be, SAC and PPO, and what they learn from.

`share`, where it is given, makes a `FullySharded` of the ranks; without it every rank has all weights.
"""

import copy

import torch
from torch import nn

from rlinf.algorithms.co_training import Demonstrations
from rlinf.algorithms.optimize import OptimizerSettings
from rlinf.algorithms.ppo import PPO
from rlinf.algorithms.sac import SAC
from rlinf.algorithms.temperature import Temperature
from rlinf.core.types import Trajectory, Transition
from rlinf.data.chunks import ChunkBatch
from rlinf.models.embodiment.mlp_actor_critic import MlpActorCritic
from rlinf.models.modules.running_norm import RunningNorm

STATE, ACTION, STEPS, ENVS = 3, 2, 6, 4

# SAC in double precision, so that what differs is not rounding ----------------------------------------


class LinearActor(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.net, self.noise_shape = norm, nn.Linear(STATE, 1), (1,)

    def sample(self, obs, noise):
        mean = self.net(self.norm(obs["state"]).double())
        return torch.tanh(mean + noise), -0.5 * noise.square().sum(-1) - mean.square().sum(-1)


class LinearCritic(nn.Module):
    def __init__(self, num_heads=4):
        super().__init__()
        self.q, self.num_heads = nn.Linear(STATE + 1, num_heads), num_heads

    def forward(self, obs, decision):
        return self.q(torch.cat([obs["state"], decision], -1)).T


class DealtReplay:
    """Batch after batch of a fixed sequence; each rank gets its rows of it."""

    def __init__(self, ranks):
        self.ranks, self.cursor, self.added = ranks, 0, 0
        self.draw = torch.Generator().manual_seed(0)

    def __len__(self):
        return self.added

    def add(self, trajectory, reward, discount):
        self.added += trajectory.valid.numel()

    def sample(self, n):
        rows = [torch.randn(n * self.ranks.size, d, generator=self.draw).double() for d in (STATE, 1, STATE)]
        obs, decision, next_obs = (x[self.ranks.rank :: self.ranks.size] for x in rows)
        return Transition({"state": obs}, decision, obs.sum(-1), torch.full((n,), 0.9).double(), {"state": next_obs})


class LayeredCritic(nn.Module):
    """Two blocks of 3 rows, and a head outside of them."""

    def __init__(self, num_heads=4):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(STATE + 1, 3), nn.Linear(3, 3)])
        self.head, self.num_heads = nn.Linear(3, num_heads), num_heads

    def forward(self, obs, decision):
        x = torch.cat([obs["state"], decision], -1)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x).T

    def shard_units(self):
        return list(self.blocks)


def shared_out(ranks, share, *networks):
    """What keeps the networks: nothing, or shares of them."""
    if share is None:
        return None
    shares = share(ranks)
    for network in networks:
        shares.shard(network)
    return shares


def make_sac(ranks, share=None, critic=LinearCritic):
    torch.manual_seed(0)
    norm = RunningNorm(STATE)
    actor, critic = LinearActor(norm).double(), critic().double()
    target = copy.deepcopy(critic).requires_grad_(False)
    data_parallel = shared_out(ranks, share, actor, critic, target)
    optim = OptimizerSettings(lr=0.01, clip_grad=0.5)
    learner = SAC(
        actor, critic, target, Temperature("softplus", 0.2).double(), DealtReplay(ranks), normalizer=norm,
        target_entropy=-1.0, batch_size=16, micro_batch_size=4, tau=0.1, min_buffer_size=60, critic_actor_ratio=2,
        critic_subsample_size=2, actor_optim=optim, critic_optim=optim, alpha_optim=optim,
        generator=torch.Generator().manual_seed(ranks.rank), ranks=ranks, data_parallel=data_parallel,
    )  # fmt: skip
    learner.draw_noise = lambda batch: batch.decision  # noise that belongs to the row
    return learner


def segments():
    return [played(seed=seed) for seed in range(4)]


def run_sac(ranks, seen, share=None, critic=LinearCritic):
    """`seen` are the segments that this rank observes: at first, and later."""
    learner = make_sac(ranks, share, critic)
    ready = []
    for numbers in seen:
        for number in numbers:
            learner.observe(segments()[number])
        ready.append(learner.ready())
    metrics = [learner.update() for _ in range(6)]
    networks = ("actor", "critic", "target_critic", "temperature")
    return {
        "ready": ready,
        "metrics": metrics,
        "weights": {name: weights(learner, getattr(learner, name)) for name in networks},
        "generators": learner.state_dict()["generators"],
    }


# PPO --------------------------------------------------------------------------------------------------


class LayeredActorCritic(MlpActorCritic):
    """Every layer is a unit; the deviation is in none."""

    def shard_units(self):
        return [layer for layer in (*self.net, *self.value_net) if isinstance(layer, nn.Linear)]


class LayeredCloned(LayeredActorCritic):
    """Learns from demonstrations too: (μ(s) + ε − a)² of valid actions, with noise that belongs to the row."""

    def flow_matching_loss(self, obs, actions, valid, *, noise, time):
        error = (self.net(self._state(obs)) + obs["noise"] - actions[:, 0]).square().mean(-1)
        return (error * valid[:, 0]).sum() / valid.sum()


def demonstrations(network, ranks, weight=0.5):
    """Eight examples at a time, of which every rank has its rows."""

    def batch(number):
        draw = torch.Generator().manual_seed(number)
        state, noise, action = (torch.randn(8, size, generator=draw) for size in (STATE, ACTION, ACTION))
        mine = slice(ranks.rank, None, ranks.size)
        obs = {"state": state[mine], "noise": noise[mine]}
        return ChunkBatch(obs, action[mine, None], torch.ones(len(state[mine]), 1, dtype=torch.bool))

    generator = torch.Generator().manual_seed(ranks.rank)
    return Demonstrations(network, batch, lambda n, g: torch.rand(n, generator=g), weight=weight, generator=generator)


def run_co_training(ranks, share=None):
    """Three micro-batches to a step, each beside demonstrations of its own."""
    per_rank = ENVS // ranks.size
    ppo = make_ppo(ranks, share, LayeredCloned, micro_batch_size=STEPS * per_rank // 3)
    ppo.demonstrations = demonstrations(ppo.network, ranks)
    ppo.observe(played(0, slice(ranks.rank * per_rank, (ranks.rank + 1) * per_rank)))
    return learn(ppo) | {"batches": ppo.demonstrations.batches}


def network(norm=None, kind=MlpActorCritic):
    torch.manual_seed(0)
    return kind(STATE, ACTION, (16,), (16,), normalizer=norm, num_action_chunks=1)


def played(seed=0, envs=slice(None), valid=None):
    """What the first network played; `envs` of its four environments."""
    draw = torch.Generator().manual_seed(seed)
    net, obs = network(), torch.randn(STEPS + 1, ENVS, STATE, generator=draw)
    outs = [net.act({"state": obs[t]}, "train", torch.randn(ENVS, ACTION, generator=draw)) for t in range(STEPS)]
    truncated = torch.zeros(STEPS, ENVS, dtype=torch.bool)
    truncated[2, 1] = truncated[4, 3] = True
    terminated = torch.zeros(STEPS, ENVS, 1, dtype=torch.bool)
    terminated[3, 0] = True
    last = torch.randn(STEPS, ENVS, STATE, generator=draw)[:, envs]
    index = (terminated.any(-1) | truncated)[:, envs].nonzero()
    reward = torch.randn(STEPS, ENVS, 1, generator=draw)[:, envs]
    return Trajectory(
        obs={"state": obs[:, envs]}, last_obs={"state": last[index[:, 0], index[:, 1]]}, last_index=index,
        decision=torch.stack([out.decision for out in outs])[:, envs],
        action=torch.stack([out.action for out in outs])[:, envs],
        reward=reward, terminated=terminated[:, envs], truncated=truncated[:, envs],
        intervened=torch.zeros_like(terminated[:, envs]),
        valid=torch.ones(reward.shape[:2], dtype=torch.bool) if valid is None else valid,
        log_prob=torch.stack([out.log_prob for out in outs])[:, envs],
        value=torch.stack([out.value for out in outs])[:, envs],
    )  # fmt: skip


def make_ppo(ranks, share=None, kind=MlpActorCritic, **settings):
    norm = RunningNorm(STATE)
    net = network(norm, kind)
    data_parallel = shared_out(ranks, share, net)
    options = {"update_epoch": 3, "batch_size": STEPS * ENVS, "gamma": 0.9, "weighting": "seq-mean-token-mean"}
    optim = OptimizerSettings(lr=0.01, clip_grad=0.05, eps=1e-5)
    generator = torch.Generator().manual_seed(ranks.rank)
    options |= {"policy_optim": optim, "value_optim": optim, "generator": generator} | settings
    return PPO(net, normalizer=norm, ranks=ranks, data_parallel=data_parallel, **options)


def learn(ppo):
    metrics = []
    while latest := ppo.update():
        metrics.append({tag: float(value) for tag, value in latest.items()})
    return {"metrics": metrics, "weights": weights(ppo, ppo.network)}


def weights(learner, network):
    """A copy: whole, on rank 0 at least."""
    return copy.deepcopy(learner.data_parallel.state_of(network))


def run_ppo(ranks, share=None, kind=MlpActorCritic):
    ppo = make_ppo(ranks, share, kind)
    per_rank = ENVS // ranks.size
    results = []
    for seed in (0, 1):
        ppo.observe(played(seed, slice(ranks.rank * per_rank, (ranks.rank + 1) * per_rank)))
        assert ppo.ready()
        results.append(learn(ppo))
    return results
