"""Feeds experience to an algorithm and publishes what the algorithm wants acted upon.

In the configuration this role is called `actor`, the name that upstream gave it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlinf.core.errors import CheckpointError, NonFiniteError
from rlinf.core.protocols import Algorithm
from rlinf.core.types import Trajectory
from rlinf.metrics.aggregate import MetricMean
from rlinf.runtime.local import Channel, Flag, Weights
from rlinf.workers.finite import non_finite
from rlinf.workers.state_files import load_state, save_state, save_weights

POLICY_FILE = "model.safetensors"
LEARNER_FILE = "learner.pt"
BUFFERS = "buffers"


@dataclass(frozen=True)
class Progress:
    """How far a learner has come.

    `env_steps` counts single environment steps (not chunks) that were played and taken in, `updates` the
    calls of `Algorithm.update`.
    """

    env_steps: int = 0
    updates: int = 0


class LearnerWorker:
    """Hosts one algorithm. Takes from `experience` what is for its `rank`.

    `num_threads` is the thread count of torch in the thread that builds and runs this worker.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        experience: Channel,
        weights: Weights,
        stop: Flag,
        *,
        rank: int = 0,
        num_threads: int = 1,
    ) -> None:
        self.rank = rank
        self.algorithm, self.experience, self.weights, self.stop = algorithm, experience, weights, stop
        self.progress = Progress()
        self._staleness: list[int] = []
        torch.set_num_threads(num_threads)

    def ingest(self) -> Progress:
        """Give the algorithm every trajectory that waits, in an order that does not depend on timing."""
        trajectories: list[Trajectory] = self.experience.drain(key=self.rank)
        # Stable: segments of one source keep their order. Sources are told apart by rank and stage.
        trajectories.sort(key=lambda trajectory: trajectory.source)
        env_steps = self.progress.env_steps
        for trajectory in trajectories:
            self.algorithm.observe(trajectory)
            self._staleness.append(self.progress.updates - max(trajectory.version, 0))
            env_steps += int(trajectory.valid.sum()) * trajectory.reward.shape[-1]
        self.progress = Progress(env_steps, self.progress.updates)
        return self.progress

    def ready(self) -> bool:
        """Whether there is enough experience to learn from."""
        return self.algorithm.ready()

    def report(self) -> Progress:
        """How far the learner has come."""
        return self.progress

    def update(self, epochs: int) -> dict[str, float]:
        """Make `epochs` updates, fewer if the run is asked to stop, none before the algorithm is ready.

        Returns, all without the `train/` prefix, the means of its metrics, the statistics of its buffers, and
        `staleness/mean` and `staleness/max` of the segments taken in since the last call: how many updates older
        than the learner the weights were that played them, the oldest of each segment.
        Raises NonFiniteError when a loss was NaN or infinite.
        """
        metrics, losses = MetricMean(), dict[str, list[tuple[int, Tensor | float]]]()
        if self.algorithm.ready():
            for _ in range(epochs):
                if self.stop.is_set():
                    break
                if not (latest := self.algorithm.update()):
                    break
                self.progress = Progress(self.progress.env_steps, self.progress.updates + 1)
                metrics.add(latest)
                for tag, value in latest.items():
                    if tag.endswith("loss"):
                        kept = value.detach().clone() if isinstance(value, Tensor) else value
                        losses.setdefault(tag, []).append((self.progress.updates, kept))
        means = metrics.mean()
        for tag, values in losses.items():
            if not math.isfinite(means[tag]):
                number, bad = next(pair for pair in values if not math.isfinite(float(pair[1])))
                raise NonFiniteError(
                    f"train/{tag} is {float(bad)} at update {number}; the weights were not published. Resume "
                    "from the last checkpoint with a smaller learning rate or with gradient clipping "
                    "(actor.optim.lr, actor.optim.clip_grad)"
                )
        for name, buffer in self.algorithm.buffers().items():
            means |= {f"{name}/{tag}": value for tag, value in buffer.statistics().items()}
        if stale := self._staleness:
            means |= {"staleness/mean": sum(stale) / len(stale), "staleness/max": float(max(stale))}
            self._staleness = []
        return means

    def publish(self, wait: bool = True) -> int:
        """Publish the acting weights. Returns their version. Without `wait` they may still be on their way.

        Raises NonFiniteError, before anything is published, when they hold NaN or infinity.
        """
        version, state = self.algorithm.acting_weights()
        if bad := non_finite(state):
            raise NonFiniteError(
                f"weights '{bad[0]}' of the policy are not finite after {self.progress.updates} updates; they "
                "were not published. Resume from the last checkpoint with a smaller actor.optim.lr"
            )
        self.weights.publish(version, state, wait=wait)
        return version

    def save(self, directory: Path) -> Progress:
        """Write policy, learner state and buffers into `directory`. Raises CheckpointError."""
        state = self.algorithm.state_dict()
        if bad := non_finite(state):
            raise CheckpointError(f"nothing was saved, because '{bad[0]}' of the learner is not finite")
        save_weights(directory / POLICY_FILE, *self.algorithm.acting_weights())
        save_state(directory / LEARNER_FILE, {"algorithm": state, "progress": asdict(self.progress)})
        for name, buffer in self.algorithm.buffers().items():
            target = directory / BUFFERS / name
            target.mkdir(parents=True)
            buffer.save(str(target))
        return self.progress

    def load(self, directory: Path) -> Progress:
        """Inverse of `save`. Raises CheckpointError naming what is missing or does not fit."""
        state = load_state(directory / LEARNER_FILE)
        if not {"algorithm", "progress"} <= state.keys():
            raise CheckpointError(f"{directory / LEARNER_FILE} is not a learner's state; choose another checkpoint")
        self.algorithm.load_state_dict(state["algorithm"])
        for name, buffer in self.algorithm.buffers().items():
            source = directory / BUFFERS / name
            if not source.is_dir():
                raise CheckpointError(
                    f"{source} is missing: the checkpoint was made without this buffer; "
                    f"remove '{name}' from the configuration or choose another checkpoint"
                )
            buffer.load(str(source))
        self.progress = Progress(**state["progress"])
        return self.progress
