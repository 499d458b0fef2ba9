"""Proximal policy optimisation [1] with generalised advantages, value clipping and dual clipping [2].

The losses are pure: densities, advantages and values in, a scalar and its statistics out. `PPO` below holds what they
are fed with: one collection of experience, that is gone through `update_epoch` times in minibatches.

Differs from [1]: the value loss is Huber's, taken as the larger one of the clipped and the unclipped error; policy and
value function have an optimizer each, so their gradient norms and learning rates are their own.

With demonstrations beside it, it is RL-Co; see `co_training`.

Over several ranks each has the trajectories of its own environments. What is normalised or reported over a collection
is that of all of them, and so is every step.

    [1] Schulman et al. 2017, arXiv:1707.06347      [2] Ye et al. 2020, arXiv:1912.09729

    B batch, H actions per chunk, A action size
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlinf.algorithms.co_training import Demonstrations, loss_ratio
from rlinf.algorithms.optimize import OptimizerSettings, accumulate, load_generator, load_parts
from rlinf.algorithms.parallel import DataParallel, Replicated
from rlinf.core import tree
from rlinf.core.protocols import ActorCriticNetwork, Buffer, Prepares, RunningStatistics
from rlinf.core.ranks import ONE_RANK, Ranks, share_of
from rlinf.core.types import Metrics, Obs, Trajectory
from rlinf.functional.gae import gae
from rlinf.functional.returns import Bootstrap, fold_chunk

Level = Literal["token_level", "action_level", "chunk_level"]
Weighting = Literal["token-mean", "seq-mean-token-mean"]

DEFAULT_OPTIMIZER = OptimizerSettings()
ADVANTAGE_EPSILON = 1e-5
SHUFFLED_WHOLE_BYTES = 1 << 26
"""A collection of so many bytes is put in order once per pass, which takes less time than to pick every minibatch from
it; of a larger one, with pictures, that would be too much memory.
"""


def reduce_to(level: Level, x: Float[Tensor, "*b H A"]) -> Float[Tensor, "*b n"]:
    """Sum the terms of a decision: per element [H·A], per action [H], or all of the chunk [1]."""
    if level == "token_level":
        return x.flatten(-2)
    return x.sum(-1) if level == "action_level" else x.sum((-1, -2)).unsqueeze(-1)


def policy_loss(
    log_prob: Float[Tensor, "B n"],
    old_log_prob: Float[Tensor, "B n"],
    advantage: Float[Tensor, " B"],
    weight: Float[Tensor, " B"],
    *,
    clip_low: float,
    clip_high: float,
    clip_c: float | None = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """L = −E min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A),  ρ = π(a|s) / π_old(a|s).                       [1, Eq. 7]

    With `clip_c` c > 1, what a negative advantage can cost is bounded too: the minimum is not less than c A.
                                                                                                         [2, Eq. 5]

    Args:
        log_prob, old_log_prob: of the n parts of a decision that have a ratio of their own.
        weight: of a sample, 1 on average.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    a = advantage[:, None]
    objective = torch.minimum(ratio * a, clipped * a)
    if clip_c is not None:
        objective = torch.where(a < 0, torch.maximum(objective, clip_c * a), objective)
    loss = -(weight[:, None] * objective).mean()
    with torch.no_grad():
        stats: Metrics = {
            "policy_loss": loss.detach(),
            "approx_kl": (ratio - 1 - log_ratio).mean(),
            "clip_fraction": (ratio != clipped).to(ratio.dtype).mean(),
            "clipped_ratio": clipped.mean(),
            "ratio": ratio.mean(),
        }
        if clip_c is not None:
            stats["dual_clip_fraction"] = ((a < 0) & (ratio > clip_c)).to(ratio.dtype).mean()
    return loss, stats


def value_loss(
    value: Float[Tensor, " B"],
    old_value: Float[Tensor, " B"],
    returns: Float[Tensor, " B"],
    weight: Float[Tensor, " B"],
    *,
    value_clip: float | None,
    huber_delta: float,
) -> tuple[Float[Tensor, ""], Metrics]:
    """E max(h(R − V), h(R − V_clip)),  V_clip = V_old + clip(V − V_old, ±ε_v),  h Huber's loss of threshold δ."""
    error = F.huber_loss(value, returns, reduction="none", delta=huber_delta)
    stats: Metrics = {}
    if value_clip is not None:
        change = value - old_value
        near = old_value + change.clamp(-value_clip, value_clip)
        error = torch.maximum(error, F.huber_loss(near, returns, reduction="none", delta=huber_delta))
        stats["value_clip_ratio"] = (change.detach().abs() > value_clip).to(value.dtype).mean()
    loss = (weight * error).mean()
    return loss, stats | {"value_loss": loss.detach()}


def explained_variance(value: Tensor, returns: Tensor) -> Tensor:
    """1 − Var(R − V) / Var(R): 1 for a perfect value function, 0 for one as good as a constant, or without spread."""
    spread = returns.var(correction=0)
    return torch.where(spread > 0, 1 - (returns - value).var(correction=0) / spread, 0.0)


@dataclass(frozen=True)
class Samples:
    """M decisions of one collection, with what the losses compare them to. Everything has M rows.

    `log_prob` [M, n] is that of the policy that acted; `weight` is 1 on average.
    """

    obs: Obs
    decision: Tensor
    log_prob: Tensor
    value: Tensor
    advantage: Tensor
    returns: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.returns)

    @property
    def num_bytes(self) -> int:
        """Of observations and decisions; the rest is a few numbers for each."""
        leaves = [self.decision, *(leaf for _, leaf in tree.leaves(self.obs) if isinstance(leaf, Tensor))]
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves)

    def take(self, rows: Tensor | slice) -> Samples:
        """Those rows."""
        return Samples(
            tree.index(self.obs, rows),
            self.decision[rows],
            self.log_prob[rows],
            self.value[rows],
            self.advantage[rows],
            self.returns[rows],
            self.weight[rows],
        )


class PPO:
    """The stateful half: the collection at hand, its minibatches, and the two optimizers.

    `update` is one minibatch. The collection is gone through `update_epoch` times, in a new order each time; then, or
    once `target_kl` is exceeded, there is nothing to do until the next one is observed.

    Every rank gives its share of each minibatch, from its own samples. They make equally many updates: where some have
    more samples, each pass leaves out so many of theirs, drawn anew, that all have as many as the one with the fewest.

    Args:
        network: policy and value function, on `device`.
        normalizer: running observation statistics. They move after the last minibatch of a collection, so that within
            it the policy that is compared with the one that acted differs from it by its weights alone.
        gamma: discount per environment step.
        gae_lambda: λ per decision.
        batch_size, micro_batch_size: samples per optimizer step, over all ranks, and per forward pass of one.
        logprob_level, entropy_level: what a decision's terms are summed to, see `reduce_to`.
        weighting: `token-mean`: all samples alike; `seq-mean-token-mean`: all environments' segments alike, however
            many of their samples count.
        entropy_bonus: weight of the policy's entropy.
        critic_warmup_steps: optimizer steps in which only the value function learns.
        target_kl: leave the rest of a collection once `approx_kl` of a minibatch is larger; None for never.
        recompute_log_prob: compare with the density that this learner computes before the first step, rather than the
            one that was recorded when acting, whose rounding differs where networks are large or not in float32.
        demonstrations: a further loss of the policy, in the same backward pass; None for none.
        after_collection: called with the number of collections that were learned from, after the last minibatch of
            each, to change how the policy explores; None for nothing.
        generator: of the shuffles, on the CPU; a stream of its own on every rank.
        ranks: who learns together. They need equal networks to begin with.
        data_parallel: how the weights of `network` lie on `ranks`; None for whole on each.
        Others: see the losses.
    """

    def __init__(
        self,
        network: ActorCriticNetwork,
        *,
        normalizer: RunningStatistics | None = None,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        bootstrap: Bootstrap = "standard",
        update_epoch: int = 4,
        batch_size: int = 256,
        micro_batch_size: int | None = None,
        normalize_advantages: bool = True,
        clip_ratio_low: float = 0.2,
        clip_ratio_high: float = 0.2,
        clip_ratio_c: float | None = None,
        value_clip: float | None = None,
        huber_delta: float = 10.0,
        entropy_bonus: float = 0.0,
        logprob_level: Level = "action_level",
        entropy_level: Level = "action_level",
        weighting: Weighting = "token-mean",
        critic_warmup_steps: int = 0,
        target_kl: float | None = None,
        recompute_log_prob: bool = False,
        demonstrations: Demonstrations | None = None,
        after_collection: Callable[[int], None] | None = None,
        policy_optim: OptimizerSettings = DEFAULT_OPTIMIZER,
        value_optim: OptimizerSettings = DEFAULT_OPTIMIZER,
        autocast: bool = False,
        compile: bool = False,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
        ranks: Ranks = ONE_RANK,
        data_parallel: DataParallel | None = None,
    ) -> None:
        self.ranks, self.data_parallel = ranks, data_parallel or Replicated(ranks)
        self.network, self.normalizer = network, normalizer
        self.gamma, self.gae_lambda, self.bootstrap = gamma, gae_lambda, bootstrap
        self.update_epoch = update_epoch
        self.batch_size = share_of(batch_size, ranks, "actor.global_batch_size")
        self.micro_batch_size = micro_batch_size or self.batch_size
        self.normalize_advantages = normalize_advantages
        self.clip_ratio_low, self.clip_ratio_high, self.clip_ratio_c = clip_ratio_low, clip_ratio_high, clip_ratio_c
        self.value_clip, self.huber_delta, self.entropy_bonus = value_clip, huber_delta, entropy_bonus
        self.logprob_level, self.entropy_level, self.weighting = logprob_level, entropy_level, weighting
        self.critic_warmup_steps, self.target_kl = critic_warmup_steps, target_kl
        self.recompute_log_prob, self.demonstrations = recompute_log_prob, demonstrations
        self.after_collection, self.collections = after_collection, 0
        self.autocast, self.device = autocast, torch.device(device)
        self.generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self.losses = torch.compile(self._losses, dynamic=False) if compile else self._losses
        self.policy_stepper = self.data_parallel.stepper(network.policy_parameters(), policy_optim)
        self.value_stepper = self.data_parallel.stepper(network.value_parameters(), value_optim)
        self.updates = 0
        self._forget()

    def _forget(self) -> None:
        self._segments: list[Trajectory] = []
        self._samples: Samples | None = None
        self._samples_per_pass = 0
        self._minibatches: list[Callable[[], Samples]] = []
        self._passes_left = self.update_epoch

    def observe(self, trajectory: Trajectory) -> None:
        """Take in a segment. The collection that was learned from before is dropped: it is of an older policy."""
        if trajectory.log_prob is None or trajectory.value is None:
            raise ValueError("PPO learns from decisions whose density and value were recorded when acting")
        if self._samples is not None:
            self._forget()
        self._segments.append(trajectory)

    def ready(self) -> bool:
        """Whether there is a collection to learn from, on all ranks. Collective."""
        return self.ranks.all(bool(self._segments))

    def update(self) -> Metrics:
        """One minibatch of the collection; with the first one also `rollout/...`. Nothing when it is used up."""
        metrics: Metrics = {}
        if self._samples is None:
            self._samples, metrics = self._prepare()
            self._samples_per_pass = min(self.ranks.gather(len(self._samples)))
        if not self._minibatches:
            if self._passes_left == 0:
                return metrics
            self._passes_left -= 1
            self._minibatches = self._shuffled(self._samples)
        metrics |= self._step(self._minibatches.pop(0)())
        self.updates += 1
        if self._moved_too_far(metrics):
            self._minibatches, self._passes_left = [], 0
        if not self._minibatches and self._passes_left == 0:
            self._end_collection(self._samples)
        return metrics

    def _shuffled(self, samples: Samples) -> list[Callable[[], Samples]]:
        """The minibatches of a pass, made when they are asked for."""
        rows = torch.randperm(len(samples), generator=self.generator).to(self.device)[: self._samples_per_pass]
        if samples.num_bytes > SHUFFLED_WHOLE_BYTES:
            return [partial(samples.take, some) for some in rows.split(self.batch_size)]
        ordered, size = samples.take(rows), self.batch_size
        return [partial(ordered.take, slice(i, i + size)) for i in range(0, len(rows), size)]

    def _end_collection(self, samples: Samples) -> None:
        """What may change the policy besides its weights; not before, or ratios would not begin at 1."""
        self.collections += 1
        if self.normalizer is not None:
            self.normalizer.update(samples.obs["state"], self.ranks)
        if self.after_collection is not None:
            self.after_collection(self.collections)

    def _moved_too_far(self, metrics: Metrics) -> bool:
        """By the mean over the minibatch of all ranks, so that they stop together; not during the warm-up."""
        if self.target_kl is None or "actor/approx_kl" not in metrics:
            return False
        return float(self.ranks.mean_(torch.as_tensor(metrics["actor/approx_kl"]))) > self.target_kl

    @torch.no_grad()
    def _prepare(self) -> tuple[Samples, Metrics]:
        """Advantages and returns of the collection, as samples, and statistics of it."""
        passes = sum(1 + bool(len(segment.last_index)) for segment in self._segments)
        missing = self.data_parallel.missing_passes(passes)  # before the first of them: ranks talk in the same order
        parts, rewards = [], []
        for segment in self._segments:
            samples, reward = self._samples_of(segment)
            parts.append(samples)
            rewards.append(reward)
        self._pass_along(missing)
        advantage = torch.cat([part.advantage for part in parts])
        returns = torch.cat([part.returns for part in parts])
        value = torch.cat([part.value for part in parts])
        weight = torch.cat([part.weight for part in parts])
        all_advantages, all_returns = self.ranks.cat(advantage), self.ranks.cat(returns)
        metrics: Metrics = {
            "rollout/rewards": self.ranks.cat(torch.cat(rewards)).mean(),
            "rollout/advantages_mean": all_advantages.mean(),
            "rollout/advantages_max": all_advantages.max(),
            "rollout/advantages_min": all_advantages.min(),
            "rollout/returns_mean": all_returns.mean(),
            "critic/explained_variance": explained_variance(self.ranks.cat(value), all_returns),
        }
        if self.normalize_advantages:
            advantage = (advantage - all_advantages.mean()) / (all_advantages.std() + ADVANTAGE_EPSILON)
        obs = tree.cat([part.obs for part in parts])
        if isinstance(self.network, Prepares):
            obs = self.network.prepare(obs)
        samples = Samples(
            obs=obs,
            decision=torch.cat([part.decision for part in parts]),
            log_prob=torch.cat([part.log_prob for part in parts]),
            value=value,
            advantage=advantage,
            returns=returns,
            weight=weight / self.ranks.cat(weight).mean(),
        )
        return self._recomputed(samples) if self.recompute_log_prob else samples, metrics

    def _recomputed(self, samples: Samples) -> Samples:
        """The same with the densities of the weights at hand."""
        size = self.micro_batch_size
        passes = -(-len(samples) // size)
        missing = self.data_parallel.missing_passes(passes)
        log_probs = []
        for i in range(passes + missing):  # the last ones for the sake of other ranks, as in `_pass_along`
            part = samples.take(slice(i * size, (i + 1) * size) if i < passes else slice(0, 1))
            with self._precision():
                log_prob = self.network.log_prob(part.obs, part.decision)
            log_probs.append(reduce_to(self.logprob_level, log_prob.float()))
        return replace(samples, log_prob=torch.cat(log_probs[:passes]))

    def _pass_along(self, passes: int) -> None:
        """Forward passes for the sake of other ranks, who need this one's share of the weights."""
        obs = tree.to(tree.index(tree.index(self._segments[0].obs, -1), slice(0, 1)), self.device)
        with self._precision():
            for _ in range(passes):
                self.network.value(obs)

    def _samples_of(self, segment: Trajectory) -> tuple[Samples, Tensor]:
        """The valid decisions of a segment in time-major order, and the reward of each."""
        device = self.device
        reward, discount = fold_chunk(segment.reward, segment.terminated, self.gamma, self.bootstrap)
        assert segment.value is not None and segment.log_prob is not None
        value = segment.value.to(device)
        obs, last_obs = tree.to(segment.obs, device), tree.to(segment.last_obs, device)
        with self._precision():
            after = self.network.value(tree.index(obs, -1)).float()
            next_value = torch.cat([value[1:], after[None]])
            if len(segment.last_index):
                t, n = segment.last_index.to(device).unbind(1)
                next_value[t, n] = self.network.value(last_obs).float()
        done = (segment.terminated.any(-1) | segment.truncated).to(device)
        advantage, returns = gae(
            reward.to(device),
            discount.to(device),
            done,
            value,
            next_value,
            lam=self.gae_lambda,
            gamma=self.gamma ** segment.reward.shape[-1],
        )
        valid = segment.valid.to(device)
        weight = torch.ones_like(advantage)
        if self.weighting == "seq-mean-token-mean":
            weight = (1 / valid.sum(0).clamp(min=1)).expand_as(weight)
        rows = valid.flatten().nonzero().flatten()

        kept = rows.tolist()

        def flat(x: Tensor) -> Tensor:
            return x.to(device).flatten(0, 1)[rows]

        def flat_leaf(leaf: Tensor | list[list[str]]) -> Tensor | list[str]:
            if isinstance(leaf, Tensor):
                return flat(leaf)
            texts = [text for row in leaf for text in row]
            return [texts[i] for i in kept]

        now = tree.index(obs, slice(0, -1))
        samples = Samples(
            obs=tree.tree_map(flat_leaf, now),
            decision=flat(segment.decision),
            log_prob=reduce_to(self.logprob_level, flat(segment.log_prob)),
            value=flat(value),
            advantage=flat(advantage),
            returns=flat(returns),
            weight=flat(weight),
        )
        return samples, flat(segment.reward.sum(-1))

    def _step(self, batch: Samples) -> Metrics:
        """One optimizer step of both networks, of the value function alone while it warms up."""
        size = self.micro_batch_size
        parts = [batch.take(slice(i, i + size)) for i in range(0, len(batch), size)] if len(batch) > size else [batch]
        steppers = {"critic": self.value_stepper}
        if self.updates >= self.critic_warmup_steps:
            steppers["actor"] = self.policy_stepper
        for stepper in steppers.values():
            stepper.begin()
        shares = [len(part) / len(batch) for part in parts]
        metrics = accumulate(
            lambda part: self._total_loss(part, "actor" in steppers), parts, [*steppers.values()], shares
        )
        if self.demonstrations is not None and "actor" in steppers:
            rl, sft = (torch.as_tensor(metrics[name]) for name in ("ppo_loss", "sft_loss"))
            metrics["loss_ratio"] = loss_ratio(rl, sft, self.demonstrations.weight)
        for name, stepper in steppers.items():
            metrics[f"{name}/lr"] = stepper.lr
            metrics[f"{name}/grad_norm"] = stepper.apply()
        return metrics

    def _total_loss(self, batch: Samples, policy_too: bool) -> tuple[Tensor, Metrics]:
        """L_RL, or L_RL + β L_SFT where there are demonstrations and the policy learns."""
        loss, stats = self.losses(batch, policy_too)
        if self.demonstrations is None or not policy_too:
            return loss, stats
        with self._precision():
            sft = self.demonstrations.loss().float()
        total = loss + self.demonstrations.weight * sft
        parts = {"ppo_loss": loss.detach(), "sft_loss": sft.detach(), "actor/total_loss": total.detach()}
        return total, stats | parts

    def _losses(self, batch: Samples, policy_too: bool) -> tuple[Tensor, Metrics]:
        with self._precision():
            log_prob, entropy, value = self.network.evaluate(batch.obs, batch.decision)
        loss, critic = value_loss(
            value.float(),
            batch.value,
            batch.returns,
            batch.weight,
            value_clip=self.value_clip,
            huber_delta=self.huber_delta,
        )
        stats: Metrics = {f"critic/{name}": number for name, number in critic.items()}
        if policy_too:
            surrogate, actor = policy_loss(
                reduce_to(self.logprob_level, log_prob.float()),
                batch.log_prob,
                batch.advantage,
                batch.weight,
                clip_low=self.clip_ratio_low,
                clip_high=self.clip_ratio_high,
                clip_c=self.clip_ratio_c,
            )
            bonus = (batch.weight[:, None] * reduce_to(self.entropy_level, entropy.float())).mean()
            loss = loss + surrogate - self.entropy_bonus * bonus
            stats |= {f"actor/{name}": number for name, number in actor.items()}
            stats["entropy_loss"] = bonus.detach()
        return loss, stats | {"loss": loss.detach()}

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def acting_weights(self) -> tuple[int, dict[str, Tensor]]:
        """(number of updates, copy of all weights and statistics)."""
        return self.updates, self.data_parallel.copy_of(self.network)

    def trained(self) -> dict[str, Sequence[tuple[str, Tensor]]]:
        """Named parameters of the policy and of the value function."""
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        parts = {"policy": self.network.policy_parameters(), "value": self.network.value_parameters()}
        return {part: [(names[id(p)], p) for p in parameters] for part, parameters in parts.items()}

    def buffers(self) -> dict[str, Buffer]:
        """None: what was learned from is of no more use."""
        return {}

    def _parts(self) -> dict[str, Any]:
        return {"network": self.network, "policy_optim": self.policy_stepper, "value_optim": self.value_stepper}

    def state_dict(self) -> dict[str, Any]:
        """Network, optimizers, the generators of all ranks, update counter; not the collection at hand. Collective."""
        state: dict[str, Any] = {name: self.data_parallel.state_of(part) for name, part in self._parts().items()}
        if self.demonstrations is not None:
            state["demonstrations"] = self.demonstrations.state_dict(self.ranks)
        counters = {"updates": self.updates, "collections": self.collections}
        return state | counters | {"generators": self.ranks.gather(self.generator.get_state())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`. Raises CheckpointError naming the part that is missing or does not fit."""
        load_parts(self._parts(), state, self.data_parallel.load)
        self.updates, self.collections = state["updates"], state.get("collections", 0)
        load_generator(self.generator, state, self.ranks)
        if self.demonstrations is not None and "demonstrations" in state:
            self.demonstrations.load_state_dict(state["demonstrations"], self.ranks)
        self._forget()

    def held(self) -> dict[str, Any]:
        """The tensors of network and optimizers that this rank keeps."""
        return {name: self.data_parallel.held_of(part) for name, part in self._parts().items()}
