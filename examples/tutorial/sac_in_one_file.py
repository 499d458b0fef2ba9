"""Soft actor-critic on one page: a point learns to go to its target, in half a minute on one core.

    python examples/tutorial/sac_in_one_file.py [--flow]

The parts are those of the recipes; only the loop is written out here. There are no workers, no configuration and no
checkpoints: for those, read `rlinf/runners/synchronous.py`, which makes the same steps in the same order.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from rlinf.algorithms.optimize import OptimizerSettings
from rlinf.algorithms.sac import SAC
from rlinf.algorithms.temperature import Temperature
from rlinf.data.replay import ReplayBuffer
from rlinf.data.trajectory import TrajectoryBuilder
from rlinf.envs.reach import ReachConfig
from rlinf.envs.reach import make as make_reach
from rlinf.models.embodiment.flow_policy import FlowPolicy, FlowPolicyConfig, build_flow_policy
from rlinf.models.embodiment.mlp_policy import MlpPolicy, MlpPolicyConfig, build_mlp_policy
from rlinf.models.embodiment.state_critic import StateCritic

NUM_ENVS = 16
SEGMENT = 10  # environment steps between updates
UPDATES = 40  # gradient steps after every segment
SEGMENTS = 40


def build_policy(flow: bool, obs_dim: int, action_dim: int) -> FlowPolicy | MlpPolicy:
    """A small policy of either kind. To SAC they are the same: something with `sample` and `act`."""
    if flow:
        small = FlowPolicyConfig(d_model=32, n_layers=1, denoising_steps=4)
        return build_flow_policy(small, obs_dim=obs_dim, action_dim=action_dim, normalizer=None)
    gaussian = MlpPolicyConfig(hidden_dims=(64, 64))
    return build_mlp_policy(gaussian, obs_dim=obs_dim, action_dim=action_dim, normalizer=None)


def build_sac(policy: FlowPolicy | MlpPolicy, obs_dim: int, action_dim: int) -> SAC:
    """The algorithm owns the critics, the optimizers, the temperature and the replay buffer."""
    critic = StateCritic(obs_dim, action_dim, hidden_dims=(64, 64), num_heads=2, activation="relu", layer_norm=True)
    adam = OptimizerSettings(lr=5e-4, clip_grad=10.0)
    return SAC(
        policy,
        critic,
        critic.make_target(),
        Temperature("softplus", initial_alpha=0.1),
        ReplayBuffer(50_000, generator=np.random.default_rng(0)),
        gamma=0.9,
        tau=0.02,
        target_entropy=policy.default_target_entropy(),
        batch_size=128,
        actor_optim=adam,
        critic_optim=adam,
        alpha_optim=adam,
        generator=torch.Generator().manual_seed(1),
    )


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, print the share of episodes that reached the target every tenth segment, and return the last."""
    parser = argparse.ArgumentParser(description="Soft actor-critic on one page.")
    parser.add_argument("--flow", action="store_true", help="a flow-matching policy in place of a Gaussian one")
    flow = parser.parse_args(arguments).flow
    torch.manual_seed(0)
    torch.set_num_threads(1)
    env = make_reach(
        ReachConfig(total_num_envs=NUM_ENVS), num_envs=NUM_ENVS, seed=0, control_mode=None, num_workers=0, render=False
    )
    obs_dim, action_dim = env.spaces.obs_shapes["state"][0], env.spaces.action_dim
    policy = build_policy(flow, obs_dim, action_dim)
    sac = build_sac(policy, obs_dim, action_dim)

    builder = TrajectoryBuilder(source=(0, 0), auto_reset=True)
    generator = torch.Generator().manual_seed(2)
    obs, solved, share = env.reset(seed=0), [], 0.0
    for segment in range(1, SEGMENTS + 1):
        # Collect: one segment is a Trajectory, whatever episodes begin and end inside it.
        builder.start(obs, continues=segment > 1)
        for _ in range(SEGMENT):
            noise = torch.randn((NUM_ENVS, *policy.noise_shape), generator=generator)
            out = policy.act(obs, "train", noise)
            step = env.step(out.action)
            builder.append(obs, out, step)
            solved += step.info["episode/success_once"][step.done].tolist()
            obs = step.obs

        # Learn: `observe` turns the segment into transitions, `update` is the box in the paper.
        sac.observe(builder.build())
        for _ in range(UPDATES):
            metrics = sac.update()

        if segment % 10 == 0:
            share = sum(solved) / len(solved)
            print(
                f"segment {segment:3d}   reached the target: {share:4.0%}"
                f"   critic loss {metrics['sac/critic_loss']:.4f}   entropy {metrics['actor/entropy']:.2f}"
            )
            solved = []
    env.close()
    return share


if __name__ == "__main__":
    main()
