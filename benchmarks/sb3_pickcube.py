"""Stable-Baselines3's SAC on the scene that rlinf steps: the peer of `time_to_success.py`, which starts it.

    python benchmarks/sb3_pickcube.py --journal sb3.jsonl --seed 0

One process: four scenes stepped in turn, one update per two environment steps, networks 2x256, discount 0.8; all else
is the library's default. It runs until it is stopped, and writes lines with the names of a run's metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from sb3_journal import Journal, parser, success_once
from stable_baselines3 import SAC
from stable_baselines3.common.vec_env import DummyVecEnv

from rlinf.envs.maniskill.fast import FastScene
from rlinf.envs.maniskill.scene import SceneSpec

NUM_ENVS = 4
UPDATES_PER_ROUND = NUM_ENVS // 2
FIRST_UPDATE_STEPS = 2_000
EPISODE_STEPS = 50
EPISODE_SEEDS = 10**5  # of one scene


class SceneEnv(gymnasium.Env):
    """One scene with episodes of 50 steps that success does not end, as in the recipes; seeds count up."""

    def __init__(self, task: str, control_mode: str, first_seed: int) -> None:
        self._scene = FastScene(SceneSpec(task, control_mode))
        self._next_seed = first_seed
        self._steps = 0
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (self._scene.state_dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (self._scene.action_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin the episode of `seed`, or the next one."""
        super().reset(seed=seed)
        self._scene.begin(self._next_seed if seed is None else seed)
        self._next_seed += 1
        self._steps = 0
        return self._scene.observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """One action; `success` is in the information."""
        reward, success, _ = self._scene.advance(action)
        self._steps += 1
        return self._scene.observe(), reward, False, self._steps >= EPISODE_STEPS, {"success": success}


def deterministic_actions(model: SAC, obs: np.ndarray) -> np.ndarray:
    """Of the policy without noise."""
    return model.predict(obs, deterministic=True)[0]


def main() -> None:
    options = parser(__doc__, eval_steps=10_000)
    options.add_argument("--task", default="PickCube-v1")
    options.add_argument("--control-mode", default="pd_ee_delta_pos")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    first_seed = arguments.seed * NUM_ENVS * EPISODE_SEEDS
    makers: list[Callable[[], gymnasium.Env]] = [
        partial(SceneEnv, arguments.task, arguments.control_mode, first_seed + i * EPISODE_SEEDS)
        for i in range(NUM_ENVS)
    ]
    model = SAC(
        "MlpPolicy",
        DummyVecEnv(makers),
        gamma=0.8,
        learning_starts=FIRST_UPDATE_STEPS,
        train_freq=1,
        gradient_steps=UPDATES_PER_ROUND,
        policy_kwargs={"net_arch": [256, 256]},
        buffer_size=1_000_000,
        device="cpu",
        seed=arguments.seed,
    )
    evaluated = [SceneEnv(arguments.task, arguments.control_mode, 0) for _ in range(NUM_ENVS)]
    act = partial(deterministic_actions, model)
    evaluate = partial(success_once, act, evaluated, arguments.episodes, EPISODE_STEPS)
    journal = Journal(arguments.journal, evaluate, arguments.eval_steps)
    model.learn(arguments.steps, callback=journal, log_interval=10**9)


if __name__ == "__main__":
    main()
