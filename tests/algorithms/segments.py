"""A small policy with a value head, and segments that it played at random."""

import torch

from rlinf.core.types import Trajectory
from rlinf.models.embodiment.mlp_actor_critic import MlpActorCritic

STATE, ACTION = 3, 2


def network(normalizer=None, chunks=1):
    torch.manual_seed(0)
    return MlpActorCritic(STATE, ACTION * chunks, (16,), (16,), normalizer=normalizer, num_action_chunks=chunks)


def played(net, steps=6, envs=4, seed=0, *, ends=(), valid=None, chunks=1):
    """A segment that `net` played, with (t, n, terminated) in `ends`."""
    draw = torch.Generator().manual_seed(seed)
    obs = torch.randn(steps + 1, envs, STATE, generator=draw)
    outs = [
        net.act({"state": obs[t]}, "train", torch.randn(envs, ACTION * chunks, generator=draw)) for t in range(steps)
    ]
    terminated = torch.zeros(steps, envs, chunks, dtype=torch.bool)
    truncated = torch.zeros(steps, envs, dtype=torch.bool)
    for t, n, by_task in ends:
        if by_task:
            terminated[t, n, -1] = True
        else:
            truncated[t, n] = True
    index = (terminated.any(-1) | truncated).nonzero()
    return Trajectory(
        obs={"state": obs},
        last_obs={"state": torch.randn(len(index), STATE, generator=draw)},
        last_index=index,
        decision=torch.stack([out.decision for out in outs]),
        action=torch.stack([out.action for out in outs]),
        reward=torch.randn(steps, envs, chunks, generator=draw),
        terminated=terminated,
        truncated=truncated,
        intervened=torch.zeros(steps, envs, chunks, dtype=torch.bool),
        valid=torch.ones(steps, envs, dtype=torch.bool) if valid is None else valid,
        log_prob=torch.stack([out.log_prob for out in outs]),
        value=torch.stack([out.value for out in outs]),
    )
