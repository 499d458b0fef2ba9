"""Stable-Baselines3's SAC on the scene that rlinf steps: the peer of `time_to_success.py`, which starts it.

    python benchmarks/sb3_pickcube.py --journal sb3.jsonl --seed 0

One process: four scenes stepped in turn, one update per two environment steps, networks 2x256, discount 0.8; all else
is the library's default. It runs until it is stopped, and writes lines with the names of a run's metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from rlinf.envs.maniskill.fast import FastScene
from rlinf.envs.maniskill.scene import SceneSpec

NUM_ENVS = 4
UPDATES_PER_ROUND = NUM_ENVS // 2
FIRST_UPDATE_STEPS = 2_000
EPISODE_STEPS = 50
EPISODE_SEEDS = 10**5  # of one scene
EVALUATION_SEED = 10**9
PROGRESS_STEPS = 2_000


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


def success_once(model: SAC, envs: list[SceneEnv], episodes: int) -> float:
    """Share of `episodes` episodes, always the same ones, in which the deterministic policy ever succeeds."""
    successes = 0
    for first in range(0, episodes, len(envs)):
        playing = envs[: episodes - first]
        obs = np.stack([env.reset(seed=EVALUATION_SEED + first + i)[0] for i, env in enumerate(playing)])
        reached = np.zeros(len(playing), bool)
        for _ in range(EPISODE_STEPS):
            actions, _ = model.predict(obs, deterministic=True)
            steps = [env.step(action) for env, action in zip(playing, actions, strict=True)]
            obs = np.stack([step[0] for step in steps])
            reached |= np.array([step[4]["success"] for step in steps])
        successes += int(reached.sum())
    return successes / episodes


class Journal(BaseCallback):
    """Evaluates every `eval_steps` environment steps and writes what happened."""

    def __init__(self, path: Path, envs: list[SceneEnv], eval_steps: int, episodes: int) -> None:
        super().__init__()
        self._file = path.open("a")
        self._envs, self._eval_steps, self._episodes = envs, eval_steps, episodes
        self._began_s = time.monotonic()
        self._next_eval, self._next_line = eval_steps, PROGRESS_STEPS
        self._collected_s: float | None = None
        self._learning_s = 0.0

    def _on_rollout_start(self) -> None:
        if self._collected_s is not None:
            self._learning_s += time.monotonic() - self._collected_s

    def _on_rollout_end(self) -> None:
        self._collected_s = time.monotonic()

    def _on_step(self) -> bool:
        row: dict[str, float] = {}
        if self.num_timesteps >= self._next_eval:
            self._next_eval += self._eval_steps
            began_s = time.monotonic()
            assert isinstance(self.model, SAC)
            row["eval/success_once"] = success_once(self.model, self._envs, self._episodes)
            row["time/eval"] = time.monotonic() - began_s
        if row or self.num_timesteps >= self._next_line:
            self._next_line = self.num_timesteps + PROGRESS_STEPS
            self._write(row)
        return True

    def _write(self, row: dict[str, float]) -> None:
        row |= {
            "step": self.n_calls,
            "elapsed_s": time.monotonic() - self._began_s,
            "time/env_steps": self.num_timesteps,
            "time/updates": self.model._n_updates,
            "time/actor_training": self._learning_s,
        }
        self._learning_s = 0.0
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--journal", type=Path, required=True, help="file that lines are appended to")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--task", default="PickCube-v1")
    options.add_argument("--control-mode", default="pd_ee_delta_pos")
    options.add_argument("--eval-steps", type=int, default=10_000, help="environment steps between evaluations")
    options.add_argument("--episodes", type=int, default=100, help="episodes of an evaluation")
    options.add_argument("--steps", type=int, default=10**9, help="environment steps after which it ends")
    options.add_argument("--threads", type=int, default=1, help="threads of torch")
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
    journal = Journal(arguments.journal, evaluated, arguments.eval_steps, arguments.episodes)
    model.learn(arguments.steps, callback=journal, log_interval=10**9)


if __name__ == "__main__":
    main()
