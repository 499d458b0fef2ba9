"""What a run of Stable-Baselines3 writes so that `time_to_success.py` can time it, and how its policy is evaluated."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import gymnasium
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

EVALUATION_SEED = 10**9
PROGRESS_STEPS = 2_000


def success_once(
    act: Callable[[np.ndarray], np.ndarray], envs: Sequence[gymnasium.Env], episodes: int, episode_steps: int
) -> float:
    """Share of `episodes` episodes, always the same ones, in which a policy ever succeeds.

    Args:
        act: actions [N, A] of the policy for observations [N, S].
        envs: play N episodes at a time; their `info` holds `success`.
        episodes: how many.
        episode_steps: length of each.
    """
    successes = 0
    for first in range(0, episodes, len(envs)):
        playing = envs[: episodes - first]
        obs = np.stack([env.reset(seed=EVALUATION_SEED + first + i)[0] for i, env in enumerate(playing)])
        reached = np.zeros(len(playing), bool)
        for _ in range(episode_steps):
            steps = [env.step(action) for env, action in zip(playing, act(obs), strict=True)]
            obs = np.stack([step[0] for step in steps])
            reached |= np.array([step[4]["success"] for step in steps])
        successes += int(reached.sum())
    return successes / episodes


class Journal(BaseCallback):
    """Evaluates every `eval_steps` environment steps, between learning and collecting, and writes what happened.

    Args:
        path: file that lines are appended to.
        evaluate: success_once of the present policy.
        eval_steps: environment steps between evaluations.
        updates_per_count: updates in what the library counts as one.
    """

    def __init__(
        self, path: Path, evaluate: Callable[[], float], eval_steps: int, *, updates_per_count: int = 1
    ) -> None:
        super().__init__()
        self._file = path.open("a")
        self._evaluate, self._eval_steps, self._updates_per_count = evaluate, eval_steps, updates_per_count
        self._began_s = time.monotonic()
        self._next_eval, self._next_line = eval_steps, PROGRESS_STEPS
        self._collected_s: float | None = None
        self._learning_s = 0.0

    def _on_rollout_start(self) -> None:
        if self._collected_s is not None:
            self._learning_s += time.monotonic() - self._collected_s
        row: dict[str, float] = {}
        if self.num_timesteps >= self._next_eval:
            self._next_eval += self._eval_steps
            began_s = time.monotonic()
            row["eval/success_once"] = self._evaluate()
            row["time/eval"] = time.monotonic() - began_s
        if row or self.num_timesteps >= self._next_line:
            self._next_line = self.num_timesteps + PROGRESS_STEPS
            self._write(row)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._collected_s = time.monotonic()

    def _on_training_end(self) -> None:
        self._on_rollout_start()

    def _write(self, row: dict[str, float]) -> None:
        row |= {
            "step": self.n_calls,
            "elapsed_s": time.monotonic() - self._began_s,
            "time/env_steps": self.num_timesteps,
            "time/updates": self.model._n_updates * self._updates_per_count,
            "time/actor_training": self._learning_s,
        }
        self._learning_s = 0.0
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def parser(description: str | None, eval_steps: int) -> argparse.ArgumentParser:
    """The options that every peer has.

    Args:
        description: of the peer.
        eval_steps: the default.
    """
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--journal", type=Path, required=True, help="file that lines are appended to")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--eval-steps", type=int, default=eval_steps, help="environment steps between evaluations")
    options.add_argument("--episodes", type=int, default=100, help="episodes of an evaluation")
    options.add_argument("--steps", type=int, default=10**9, help="environment steps after which it ends")
    options.add_argument("--threads", type=int, default=1, help="threads of torch")
    return options
