"""Feeds experience to an algorithm and publishes what the algorithm wants acted upon.

In the configuration this role is called `actor`, the name that upstream gave it.

Over several ranks there is a worker on each, with its own part of the experience. Whatever is called on one is called
on all: they update together, fail together, and report the same; rank 0 publishes, and writes what all have in common.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlinf.core.errors import CheckpointError, NonFiniteError
from rlinf.core.protocols import Algorithm
from rlinf.core.ranks import ONE_RANK, Ranks
from rlinf.core.types import Trajectory
from rlinf.metrics.aggregate import MetricMean, mean_of_ranks, whole_buffer
from rlinf.runtime.local import Channel, Flag, Weights
from rlinf.workers.finite import non_finite
from rlinf.workers.offload import Offload
from rlinf.workers.state_files import load_state, save_state, save_weights

POLICY_FILE = "model.safetensors"
LEARNER_FILE = "learner.pt"
BUFFERS = "buffers"


@dataclass(frozen=True)
class Progress:
    """How far a learner has come.

    `env_steps` counts single environment steps (not chunks) that were played and taken in by all ranks, `updates`
    the calls of `Algorithm.update` on each.
    """

    env_steps: int = 0
    updates: int = 0


class LearnerWorker:
    """Hosts one algorithm, or one rank of it. Takes from `experience` what is for its rank.

    `ranks` is that of the algorithm; `num_threads` the thread count of torch in the thread that builds and runs this
    worker. With `offload_from`, a device, networks and optimizers leave it after a publication until they are needed.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        experience: Channel,
        weights: Weights,
        stop: Flag,
        *,
        ranks: Ranks = ONE_RANK,
        num_threads: int = 1,
        offload_from: torch.device | None = None,
    ) -> None:
        self.algorithm, self.experience, self.weights, self.stop = algorithm, experience, weights, stop
        self.ranks = ranks
        self.progress = Progress()
        self._staleness: list[int] = []
        self._offload = Offload(algorithm.held, offload_from) if offload_from is not None else None
        torch.set_num_threads(num_threads)

    def ingest(self) -> Progress:
        """Give the algorithm every trajectory that waits, in an order that does not depend on timing."""
        self._needed()
        trajectories: list[Trajectory] = self.experience.drain(key=self.ranks.rank)
        # Stable: segments of one source keep their order. Sources are told apart by rank and stage.
        trajectories.sort(key=lambda trajectory: trajectory.source)
        played = 0
        for trajectory in trajectories:
            self.algorithm.observe(trajectory)
            self._staleness.append(self.progress.updates - max(trajectory.version, 0))
            played += int(trajectory.valid.sum()) * trajectory.reward.shape[-1]
        env_steps = self.progress.env_steps + sum(self.ranks.gather(played))
        self.progress = Progress(env_steps, self.progress.updates)
        return self.progress

    def discard(self) -> None:
        """Forget every trajectory that waits."""
        self.experience.drain(key=self.ranks.rank)

    def ready(self) -> bool:
        """Whether there is enough experience to learn from."""
        self._needed()
        return self.algorithm.ready()

    def report(self) -> Progress:
        """How far the learner has come."""
        return self.progress

    def update(self, epochs: int) -> dict[str, float]:
        """Make `epochs` updates, fewer if the run is asked to stop, none before the algorithm is ready.

        Returns, all without the `train/` prefix, the means of its metrics, the statistics of its buffers, and
        `staleness/mean` and `staleness/max` of the segments taken in since the last call: how many updates older
        than the learner the weights were that played them, the oldest of each segment. All are over all ranks.
        Raises NonFiniteError when a loss was NaN or infinite on any of them.
        """
        self._needed()
        metrics, losses = MetricMean(), dict[str, list[tuple[int, Tensor | float]]]()
        if self.algorithm.ready():
            for _ in range(epochs):
                if self.ranks.any(self.stop.is_set()):
                    break
                with self.ranks.meeting():
                    latest = self.algorithm.update()
                if not latest:
                    break
                self.progress = Progress(self.progress.env_steps, self.progress.updates + 1)
                metrics.add(latest)
                for tag, value in latest.items():
                    if tag.endswith("loss"):
                        kept = value.detach().clone() if isinstance(value, Tensor) else value
                        losses.setdefault(tag, []).append((self.progress.updates, kept))
        means = mean_of_ranks(self.ranks.gather(metrics.mean()))
        for tag, values in losses.items():
            if not math.isfinite(means[tag]):
                own = [(number, float(value)) for number, value in values]
                number, bad = min(p for part in self.ranks.gather(own) for p in part if not math.isfinite(p[1]))
                raise NonFiniteError(
                    f"train/{tag} is {bad} at update {number}; the weights were not published. Resume "
                    "from the last checkpoint with a smaller learning rate or with gradient clipping "
                    "(actor.optim.lr, actor.optim.clip_grad)"
                )
        for name, buffer in self.algorithm.buffers().items():
            statistics = whole_buffer(self.ranks.gather(buffer.statistics()))
            means |= {f"{name}/{tag}": value for tag, value in statistics.items()}
        if stale := [updates for part in self.ranks.gather(self._staleness) for updates in part]:
            means |= {"staleness/mean": sum(stale) / len(stale), "staleness/max": float(max(stale))}
        self._staleness = []
        return means

    def publish(self, wait: bool = True) -> int:
        """Publish the acting weights, those of rank 0. Returns their version.

        Without `wait` they may still be on their way.

        Raises NonFiniteError, before anything is published, when they hold NaN or infinity on any rank.
        """
        self._needed()
        version, state = self.algorithm.acting_weights()
        if bad := self._non_finite(state):
            raise NonFiniteError(
                f"weights '{bad}' of the policy are not finite after {self.progress.updates} updates; they "
                "were not published. Resume from the last checkpoint with a smaller actor.optim.lr"
            )
        if self.ranks.rank == 0:
            self.weights.publish(version, state, wait=wait)
        if self._offload is not None:
            self._offload.leave()
        return version

    def _needed(self) -> None:
        """Bring back to the device what rests elsewhere."""
        if self._offload is not None:
            self._offload.come_back()

    def _non_finite(self, state: dict[str, Any]) -> str | None:
        """Path of a tensor in `state` that is not finite, on whichever rank."""
        bad = non_finite(state)
        return next((path for path in self.ranks.gather(bad and bad[0]) if path), None)

    def save(self, directory: Path) -> Progress:
        """Write policy, learner state and buffers into `directory`, which all ranks see. Raises CheckpointError."""
        self._needed()
        state = self.algorithm.state_dict()
        if bad := self._non_finite(state):
            raise CheckpointError(f"nothing was saved, because '{bad}' of the learner is not finite")
        acting = self.algorithm.acting_weights()
        if self.ranks.rank == 0:
            save_weights(directory / POLICY_FILE, *acting)
            content = {"algorithm": state, "progress": asdict(self.progress), "ranks": self.ranks.size}
            save_state(directory / LEARNER_FILE, content)
        for name, buffer in self.algorithm.buffers().items():
            target = _buffer_directories(directory, name, self.ranks.size)[self.ranks.rank]
            target.mkdir(parents=True)
            buffer.save(str(target))
        return self.progress

    def load(self, directory: Path) -> Progress:
        """Inverse of `save`, also by another number of ranks, over which the buffers are then dealt out anew.

        Raises CheckpointError naming what is missing or does not fit.
        """
        self._needed()
        # Ranks on one machine then share its memory, and each reads only what it keeps.
        state = load_state(directory / LEARNER_FILE, mapped=self.ranks.size > 1)
        if not {"algorithm", "progress"} <= state.keys():
            raise CheckpointError(f"{directory / LEARNER_FILE} is not a learner's state; choose another checkpoint")
        self.algorithm.load_state_dict(state["algorithm"])
        for name, buffer in self.algorithm.buffers().items():
            sources = _buffer_directories(directory, name, state.get("ranks", 1))
            if missing := [source for source in sources if not source.is_dir()]:
                raise CheckpointError(
                    f"{missing[0]} is missing: the checkpoint was made without this buffer; "
                    f"remove '{name}' from the configuration or choose another checkpoint"
                )
            if len(sources) == self.ranks.size:
                buffer.load(str(sources[self.ranks.rank]))
            else:
                buffer.load_share([str(source) for source in sources], self.ranks.rank, self.ranks.size)
        self.progress = Progress(**state["progress"])
        return self.progress


def _buffer_directories(directory: Path, name: str, size: int) -> list[Path]:
    """Where each of `size` ranks keeps its part of a buffer."""
    whole = directory / BUFFERS / name
    return [whole] if size == 1 else [whole / f"rank_{rank}" for rank in range(size)]
