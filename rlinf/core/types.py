"""The records that travel between environments, policies and algorithms.

Nothing here computes. Every record is frozen: a worker may pass it on without copying, and nobody
may write into it. Within a process tensors stay on the device on which they were made, from another
process they come on the CPU; the receiver moves them.

Letters used for shapes everywhere in this package:

    B batch        T time             N environments      H actions per chunk
    A action size  S state size       E critics           K denoising steps
    C cameras      D network width    M finished episodes in a segment
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Obs = dict[str, Any]
"""Nested dict of tensors with one leading batch axis, raw as the environment gives it.

    state               float32 [N, S]
    images/<camera>     uint8   [N, H, W, 3]
    instruction         list[str] of length N

The policy owns every further step (scaling, normalisation, tokenisation).
"""

Metrics = dict[str, Tensor | float]
"""Name → scalar. Algorithms give 0-d tensors, so that nothing waits for the device in the update loop."""


@dataclass(frozen=True)
class EnvSpaces:
    """What an environment emits and takes; enough to build networks and buffers without the environment.

    Attributes:
        obs_shapes: leaf path ("state", "images/front") → shape without the leading N.
        obs_dtypes: the same paths → numpy dtype name ("float32", "uint8").
        action_dim: A.
        action_low, action_high: bounds of every action element, the same for all A.
        max_episode_steps: time limit in environment steps; None when there is none.
        tasks: names of the tasks, where episodes may be of several; `EnvStep.info["task"]` counts them.
    """

    obs_shapes: dict[str, tuple[int, ...]]
    obs_dtypes: dict[str, str]
    action_dim: int
    action_low: float = -1.0
    action_high: float = 1.0
    max_episode_steps: int | None = None
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class EnvStep:
    """What one chunk of H actions did to N environments.

    Attributes:
        obs: observation to act on next, after any automatic reset.
        last_obs: observation before that reset. Equals `obs` in every row that did not finish.
        reward: float32 [N, H]; zero for actions that were not executed because the episode ended.
        terminated: bool [N, H]; true at the action that ended the episode by the task's own rule.
        truncated: bool [N]; true where the time limit ended the episode with this chunk.
        executed: float32 [N, H, A]; the actions really applied (an operator may have replaced some).
        intervened: bool [N, H]; true where an operator replaced the policy's action.
        info: tensors [N] by name. `success` (bool) is the task's flag after the chunk. Rows of
            `episode/<name>` are meaningful where `done`: `success_once`, `success_at_end`, `return`,
            `episode_len`, `reward` (= return / episode_len). Two more say what the episode is part of: `task` (int64)
            is the index of its task in `EnvSpaces.tasks`, `goes_on` (bool) whether the next episode of the row belongs
            to the same list of initial states, each of which an evaluation counts once.
    """

    obs: Obs
    last_obs: Obs
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    executed: Tensor
    intervened: Tensor
    info: dict[str, Tensor] = field(default_factory=dict)

    @property
    def done(self) -> Tensor:
        """bool [N]: the episode ended within this chunk, for either reason."""
        return self.terminated.any(-1) | self.truncated


@dataclass(frozen=True)
class ActionOut:
    """A policy's answer to N observations.

    Attributes:
        action: float32 [N, H, A], for the robot.
        decision: [N, ...], the random variable that the algorithm reasons about. For plain SAC the
            flattened action [N, H·A]; for DSRL the latent noise; for PPO on a flow policy the chain.
        log_prob: float32 [N], log density of the decision, or [N, H, A], that of each of its elements (policies with a
            value head); None where no algorithm asks for it.
        value: float32 [N], critic's estimate; None for policies without a value head.
        version: number of learner updates in the weights that acted; -1 before the first publication.
    """

    action: Tensor
    decision: Tensor
    log_prob: Tensor | None = None
    value: Tensor | None = None
    version: int = -1


@dataclass(frozen=True)
class Transition:
    """B decisions with everything that a Bellman backup needs.

    `discount` is γ^H (1 − terminated) as settled once by `functional.returns.fold_chunk`: chunks,
    time limits, n-step returns and `bootstrap_type` all live in it, so no loss knows of them.
    """

    obs: Obs
    decision: Tensor
    reward: Tensor
    discount: Tensor
    next_obs: Obs


@dataclass(frozen=True)
class Trajectory:
    """T consecutive decisions of the N environments of one source (an env worker's pipeline stage).

    A segment, not an episode: episodes may begin and end anywhere inside, and go on in the next segment
    of the same source.

    Attributes:
        obs: leaves [T + 1, N, ...]. `obs[t]` was acted on at t; `obs[T]` is what the source acts on next.
        last_obs: leaves [M, ...], the true last observations of the M episodes that ended inside.
        last_index: int64 [M, 2], the (t, n) to which each row of `last_obs` belongs; time-major order.
        decision: [T, N, ...], see `ActionOut.decision`.
        action: float32 [T, N, H, A], actions really executed.
        reward: float32 [T, N, H].
        terminated: bool [T, N, H].
        truncated: bool [T, N].
        intervened: bool [T, N, H].
        valid: bool [T, N]; false for rows played after an episode's end when nothing resets it
            (`auto_reset: False`); such rows are no experience.
        log_prob, value: float32 [T, N, ...] and [T, N] as given by the acting policy, or None.
        version: int, the oldest weights version that acted in the segment.
        source: who played it, (env worker rank, pipeline stage).
        continues: whether `obs[0]` is the previous segment's `obs[T]` of the same source.
    """

    obs: Obs
    last_obs: Obs
    last_index: Tensor
    decision: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    intervened: Tensor
    valid: Tensor
    log_prob: Tensor | None = None
    value: Tensor | None = None
    version: int = -1
    source: tuple[int, int] = (0, 0)
    continues: bool = False

    @property
    def num_steps(self) -> int:
        """T."""
        return self.reward.shape[0]

    @property
    def num_envs(self) -> int:
        """N."""
        return self.reward.shape[1]
