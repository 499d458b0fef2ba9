"""How much of what a run does, and how often."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """How much of what, and how often. A global step is `updates` updates, with the experience that goes with them.

    Attributes:
        num_steps: global step at which training ends.
        chunks: action chunks per environment and segment.
        segments: segments collected per global step; asynchronous runs collect on and on, and do not count them.
        updates: calls of `Algorithm.update` per global step, once the algorithm is ready.
        eval_interval: global steps between evaluations, also at the end; 0 or less for none.
        film_every: evaluations per filmed one, also at the end; 0 for the last alone.
        save_interval: global steps between checkpoints; 0 or less for one at the end only.
        overlap: synchronous runs only: collect the next segments while learning.
        sync_interval: global steps between publications of the acting weights. They are also published at the
            start, before an evaluation and after a checkpoint.
        max_updates_per_env_step: asynchronous runs only: the learner waits for experience rather than make more
            updates than this per environment step of the whole run; None for no limit.
        max_staleness: asynchronous runs only: the learner waits for what is being played rather than be more updates
            ahead of the weights that play it; at least `updates`; None for no limit.
    """

    num_steps: int
    chunks: int
    segments: int = 1
    updates: int = 1
    eval_interval: int = 0
    film_every: int = 1
    save_interval: int = 0
    overlap: bool = False
    sync_interval: int = 1
    max_updates_per_env_step: float | None = None
    max_staleness: int | None = None

    def evaluates(self, step: int) -> bool:
        """Whether `step` ends with an evaluation."""
        return self.eval_interval > 0 and (step % self.eval_interval == 0 or step == self.num_steps)

    def films(self, step: int) -> bool:
        """Whether the evaluation at the end of `step` is filmed."""
        if step == self.num_steps:
            return True
        return self.film_every > 0 and step // self.eval_interval % self.film_every == 0

    def saves(self, step: int) -> bool:
        """Whether `step` ends with a checkpoint."""
        return step == self.num_steps or (self.save_interval > 0 and step % self.save_interval == 0)
