"""Stable-Baselines3's PPO on Franka-Sim's PandaPickCube-v0: the peer of `time_to_success.py`, which starts it.

    python benchmarks/sb3_frankasim.py --journal sb3.jsonl --seed 0

One process: 64 environments stepped in turn, each the single gymnasium form with its compiled controller. What the
library can be told of the recipe `frankasim_ppo_mlp` (profile=cpu) it is told: sizes, discounts, clipping, networks
and normalised observations; all else is its default. It runs until it is stopped, and writes lines with the names of
a run's metrics.jsonl.
"""

from __future__ import annotations

import math
from functools import partial

import gymnasium
import numpy as np
import torch
from sb3_journal import Journal, parser, success_once
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from rlinf.envs.frankasim.gym_env import MAX_EPISODE_STEPS

TASK = "PandaPickCube-v0"
NUM_ENVS, ROLLOUT_STEPS = 64, 100
BATCH = 400
HIDDEN = [256, 256]
EVALUATED_ENVS = 20


def build(num_envs: int, seed: int) -> PPO:
    """PPO with the recipe's settings; seeds of different runs share no environment's seed."""
    return PPO(
        "MlpPolicy",
        VecNormalize(DummyVecEnv([partial(gymnasium.make, TASK)] * num_envs), norm_reward=False),
        n_steps=ROLLOUT_STEPS,
        batch_size=BATCH,
        n_epochs=8,
        gamma=0.95,
        gae_lambda=0.95,
        clip_range=0.2,
        learning_rate=3e-4,
        max_grad_norm=0.5,
        policy_kwargs={
            "net_arch": {"pi": HIDDEN, "vf": HIDDEN},
            "activation_fn": torch.nn.Tanh,
            "log_std_init": -0.5,
        },
        device="cpu",
        seed=seed * num_envs,
    )


def deterministic_actions(model: PPO, obs: np.ndarray) -> np.ndarray:
    """Of the policy without noise, for observations as the environment gives them."""
    normalizer = model.get_vec_normalize_env()
    assert normalizer is not None
    return model.predict(np.asarray(normalizer.normalize_obs(obs)), deterministic=True)[0]


def main() -> None:
    options = parser(__doc__, eval_steps=64_000)
    options.add_argument("--envs", type=int, default=NUM_ENVS, help="environments that experience is collected in")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    model = build(arguments.envs, arguments.seed)
    evaluated = [gymnasium.make(TASK) for _ in range(min(EVALUATED_ENVS, arguments.episodes))]
    act = partial(deterministic_actions, model)
    evaluate = partial(success_once, act, evaluated, arguments.episodes, MAX_EPISODE_STEPS)
    minibatches = math.ceil(arguments.envs * ROLLOUT_STEPS / BATCH)
    journal = Journal(arguments.journal, evaluate, arguments.eval_steps, updates_per_count=minibatches)
    model.learn(arguments.steps, callback=journal, log_interval=10**9)


if __name__ == "__main__":
    main()
