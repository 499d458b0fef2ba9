"""The smallest π0.5 there can be as what PPO trains beside demonstrations, and what it played."""

from dataclasses import replace

import torch

from rlinf.algorithms.co_training import Demonstrations
from rlinf.algorithms.optimize import OptimizerSettings
from rlinf.algorithms.ppo import PPO
from rlinf.core.types import Trajectory
from rlinf.data.chunks import ChunkBatch
from rlinf.models.embodiment.openpi.actor_critic import Pi0ActorCritic, Walk
from rlinf.models.embodiment.openpi.config import GemmaConfig, Pi0Config, SiglipConfig
from rlinf.models.embodiment.openpi.dataconfig import data_config
from rlinf.models.embodiment.openpi.model import build_pi0, training_time
from rlinf.models.embodiment.openpi.norm_stats import NormStats
from rlinf.models.embodiment.openpi.tokenizer import WordTokenizer
from tests.algorithms.learners import learn, shared_out

SIDE, ROBOT, CHUNK = 16, 7, 2
GEMMA = GemmaConfig(width=16, depth=2, mlp_dim=32, num_heads=2, head_dim=8)
CONFIG = Pi0Config(
    True,
    SiglipConfig(width=16, depth=1, mlp_dim=32, num_heads=2, image_size=SIDE, patch_size=SIDE),
    GEMMA,
    GEMMA,
    vocab_size=512,
    action_horizon=CHUNK,
    max_token_len=16,
)
WALK = Walk(num_steps=2, method="flow_sde", executed=CHUNK, action_dim=ROBOT, noise_level=0.5)


def build(walk=WALK, **how):
    one = torch.ones(ROBOT, dtype=torch.float64)
    robot = replace(data_config("pi05_maniskill_sim_real_co_training"), model=CONFIG, pad_first=False)
    pipeline = robot.pipeline({"actions": NormStats(0 * one, one, -one, one)}, WordTokenizer())
    torch.manual_seed(0)
    model = build_pi0(CONFIG, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # gates of adaptive norms that are open, so that the expert can do something
        for name, p in model.named_parameters():
            if ".dense." in name:
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return Pi0ActorCritic(model, pipeline, walk, value_hidden_dims=(16,), **how)


def look(shade):
    """One picture of each shade, 0 to 255."""
    picture = torch.as_tensor(shade).to(torch.uint8)[..., None, None, None]
    return {"images": {"front": picture.expand(*picture.shape[:-3], SIDE, SIDE, 3)}}


def played(envs=slice(None), steps=3, total=4):
    """What the policy played at random; `envs` of its four environments."""
    draw, net = torch.Generator().manual_seed(5), build()
    shade = torch.randint(0, 256, (steps + 1, total), generator=draw)
    texts = [["put it there"] * total] * (steps + 1)
    obs = look(shade) | {"state": torch.randn(steps + 1, total, ROBOT, generator=draw), "instruction": texts}
    noise = torch.randn(steps, total, *net.noise_shape, generator=draw)
    outs = [
        net.act(look(shade[t]) | {"state": obs["state"][t], "instruction": texts[t]}, "train", noise[t])
        for t in range(steps)
    ]
    reward = torch.randn(steps, total, CHUNK, generator=draw)[:, envs]
    never = torch.zeros(reward.shape, dtype=torch.bool)
    stacked = {
        name: torch.stack([getattr(out, name) for out in outs])[:, envs]
        for name in ("decision", "action", "log_prob", "value")
    }
    return Trajectory(
        obs={
            "state": obs["state"][:, envs],
            "images": {"front": obs["images"]["front"][:, envs]},
            "instruction": [row[envs] for row in texts],
        },
        last_obs={
            "state": torch.zeros(0, ROBOT),
            "images": {"front": obs["images"]["front"][0, :0]},
            "instruction": [],
        },
        last_index=torch.zeros(0, 2, dtype=torch.int64),
        reward=reward,
        terminated=never,
        truncated=never[..., 0],
        intervened=never,
        valid=~never[..., 0],
        **stacked,
    )


def demonstrations(network, ranks, rows=4, weight=0.5):
    """Examples of which every rank has its rows; time and noise are a rank's own, so weights of several differ."""

    def batch(number):
        draw = torch.Generator().manual_seed(number)
        shade = torch.randint(0, 256, (rows,), generator=draw)
        action = torch.randn(rows, CHUNK, ROBOT, generator=draw)
        mine = slice(ranks.rank, None, ranks.size)
        obs = look(shade[mine]) | {"state": torch.zeros(len(shade[mine]), ROBOT)}
        obs |= {"instruction": ["put it there"] * len(shade[mine])}
        return ChunkBatch(obs, action[mine], torch.ones(len(shade[mine]), CHUNK, dtype=torch.bool))

    generator = torch.Generator().manual_seed(ranks.rank)
    return Demonstrations(network, batch, training_time, weight=weight, generator=generator)


def run_vla(ranks, share=None):
    """PPO beside demonstrations, with densities computed anew, on this rank's half of the environments."""
    net = build()
    data_parallel = shared_out(ranks, share, net)
    per_rank = 4 // ranks.size
    optim = OptimizerSettings(lr=1e-3, eps=1e-4, clip_grad=1.0)
    ppo = PPO(
        net,
        gamma=0.9,
        update_epoch=2,
        batch_size=12,
        micro_batch_size=3,
        recompute_log_prob=True,
        logprob_level="chunk_level",
        entropy_bonus=0.01,
        demonstrations=demonstrations(net, ranks),
        policy_optim=optim,
        value_optim=optim,
        generator=torch.Generator().manual_seed(ranks.rank),
        ranks=ranks,
        data_parallel=data_parallel,
    )
    ppo.observe(played(slice(ranks.rank * per_rank, (ranks.rank + 1) * per_rank)))
    return learn(ppo)
