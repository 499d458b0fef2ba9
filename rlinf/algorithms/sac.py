"""Soft actor-critic [1] with an ensemble of critics and prior data [2].

The losses are pure: networks and a batch in, a scalar and its statistics out. They never touch an optimizer, a
device, a configuration or `self`; the class `SAC` below does. SAC Flow [3] is this file with another actor.

Differs from [1]: the actor loss may average the critics instead of taking their minimum [2]; actor and temperature
may be updated every n-th critic update; the temperature's loss is on α itself, whatever its parameterisation.

Images go through an encoder first, which the critics' loss alone trains; actor and critics then see its output as
their state. Augmentation is that of DrQ [4]; that the target reads the present encoder and that the actor learns on
the features that the critics have just used, detached, is DrQ-v2's way [5]: each frame is encoded once per update.

Over several ranks each draws its share of the batch from its own experience; the steps are those of the whole batch.

    [1] Haarnoja et al. 2018, arXiv:1812.05905      [4] DrQ, Kostrikov et al. 2020, arXiv:2004.13649
    [2] RLPD, Ball et al. 2023, arXiv:2302.02948    [5] DrQ-v2, Yarats et al. 2021, arXiv:2107.09645
    [3] SAC Flow, arXiv:2509.25756

    B batch, E critics in the ensemble
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlinf.algorithms.optimize import OptimizerSettings, Stepper, load_generator, load_parts
from rlinf.algorithms.parallel import DataParallel, Replicated
from rlinf.algorithms.temperature import Temperature
from rlinf.core import tree
from rlinf.core.protocols import ActorNetwork, Buffer, Critic, CriticNetwork, LearnsLater, Network, RunningStatistics
from rlinf.core.ranks import ONE_RANK, Ranks, share_of
from rlinf.core.types import Metrics, Obs, Trajectory, Transition
from rlinf.data.interventions import with_operators_decisions
from rlinf.functional.returns import Bootstrap, fold_chunk

Aggregate = Literal["min", "mean"]

DEFAULT_OPTIMIZER = OptimizerSettings()


class Samples(Protocol):
    """The part of an actor that losses use."""

    def sample(self, obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
        """See core.protocols.Actor."""
        ...


def aggregate(q: Float[Tensor, "E B"], how: Aggregate, subset: Int[Tensor, " M"] | None = None) -> Float[Tensor, " B"]:
    """min_e or mean_e of Q_e, over all critics or over the given ones."""
    q = q if subset is None else q[subset]
    return q.amin(0) if how == "min" else q.mean(0)


def soft_value(
    actor: Samples,
    critic: Critic,
    obs: Obs,
    alpha: Tensor,
    noise: Tensor,
    *,
    agg_q: Aggregate = "min",
    subset: Tensor | None = None,
    entropy: bool = True,
) -> Float[Tensor, " B"]:
    """V(s) = min_e Q_e(s, a) − α log π(a|s), with a ~ π(·|s).                          [1, Eq. 3]

    Args:
        noise: standard normal numbers [B, *actor.noise_shape] that make a.
        subset: indices of the critics that are aggregated; None for all.                    [2]
        entropy: whether the backup carries the entropy term.                                [2]
    """
    decision, log_prob = actor.sample(obs, noise)
    q = aggregate(critic(obs, decision), agg_q, subset)
    return q - alpha * log_prob if entropy else q


def critic_loss(
    critic: Critic,
    actor: Samples,
    target_critic: Critic,
    alpha: Tensor,
    batch: Transition,
    noise: Tensor,
    *,
    agg_q: Aggregate = "min",
    subset: Tensor | None = None,
    entropy: bool = True,
) -> tuple[Float[Tensor, ""], Metrics]:
    """J(θ) = E (Q_θ(s, a) − y)²,  y = r + D V̄(s′), averaged over critics.               [1, Eq. 5]

    `batch.discount` D already holds γ^H (1 − terminated); see `functional.returns.fold_chunk`.
    """
    with torch.no_grad():
        next_value = soft_value(
            actor,
            target_critic,
            batch.next_obs,
            alpha,
            noise,
            agg_q=agg_q,
            subset=subset,
            entropy=entropy,
        )
        target = batch.reward + batch.discount * next_value
    q = critic(batch.obs, batch.decision)
    loss = (q - target).square().mean()
    return loss, {"critic_loss": loss.detach(), "q_data": q.detach().mean(), "target_q": target.mean()}


def actor_loss(
    actor: Samples,
    critic: Critic,
    alpha: Tensor,
    batch: Transition,
    noise: Tensor,
    *,
    agg_q: Aggregate = "min",
) -> tuple[Float[Tensor, ""], Metrics]:
    """J(φ) = E [α log π_φ(a|s) − Q(s, a)],  a = f_φ(ε; s).                              [1, Eq. 9]"""
    decision, log_prob = actor.sample(batch.obs, noise)
    q = aggregate(critic(batch.obs, decision), agg_q)
    loss = (alpha * log_prob - q).mean()
    return loss, {
        "actor_loss": loss.detach(),
        "entropy": -log_prob.detach().mean(),
        "q_pi": q.detach().mean(),
    }


def alpha_loss(alpha: Float[Tensor, ""], entropy: Float[Tensor, ""], target_entropy: float) -> Float[Tensor, ""]:
    """J(α) = α (H − H̄): raises α while the policy is less random than asked.           [1, Eq. 18]"""
    return alpha * (entropy - target_entropy)


class ReplayStore(Buffer, Protocol):
    """What SAC needs of its replay buffer."""

    def __len__(self) -> int: ...

    def add(self, trajectory: Trajectory, reward: Tensor, discount: Tensor) -> None:
        """Store a segment with its folded rewards and discounts [T, N]."""
        ...


class Sampler(Protocol):
    """Where batches come from: the replay buffer itself, or a mixture with prior data."""

    def sample(self, batch_size: int) -> Transition:
        """B transitions on the CPU, valid until the next-but-one call."""
        ...


class Encoder(Protocol):
    """A network in front of actor and critics."""

    def __call__(self, obs: Obs, generator: torch.Generator | None = None) -> Obs:
        """{"state": features [B, F]} of raw observations; a generator draws what only losses have, such as dropout."""
        ...

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the critics' optimizer trains; the rest is frozen."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters by name."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Parameters and buffers by name, the frozen ones included."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Inverse of `state_dict`; strict."""
        ...


Augment = Callable[[Obs, torch.Generator], Obs]
"""Raw observations, changed at random in a way that leaves their values as they are."""


class SAC:
    """The stateful half: optimizers, target critic, temperature, replay and the update schedule.

    Args:
        actor, critic, target_critic: networks on `device`; the target a frozen copy of the critic.
        temperature: α; its target is `target_entropy`, in the units of the actor's log density.
        replay: store of online experience.
        sampler: where batches are drawn; None for `replay` itself.
        demo_buffer: prior data behind `sampler`, kept here to be saved and counted.
        normalizer: running observation statistics to be updated with every observed segment.
        encoder: what raw observations go through before actor and critics see them; None for nothing.
        acting: the network that acts on raw observations, of which `actor` (and `encoder`) are parts; None for `actor`.
        backup_actor: who decides in the critics' targets; None for `actor`.
        policy_critic: what the actor maximises; None for `critic`.
        augment: changes the observations of a batch, `obs` and `next_obs` independently; None for no change.
        gamma: discount per environment step.
        batch_size, micro_batch_size: transitions per update, over all ranks, and per forward pass of one.
        min_buffer_size: transitions before the first update; every rank has its share of them.
        critic_actor_ratio: critic updates per actor and temperature update.
        actor_delay: critic updates before the first actor update.
        target_update_freq: critic updates per target update.
        critic_subsample_size: critics in each target; 0 for all.
        autocast: run the networks in bfloat16 (weights, targets and optimizer states stay float32).
        compile: compile the losses with torch.compile (a one-off cost of a minute or so).
        device: where networks and batches live.
        generator: randomness of the losses, on `device`; a stream of its own on every rank.
        ranks: who learns together. They need equal networks to begin with.
        data_parallel: how the weights of the given networks lie on `ranks`; None for whole on each.
    """

    def __init__(
        self,
        actor: ActorNetwork,
        critic: CriticNetwork,
        target_critic: CriticNetwork,
        temperature: Temperature,
        replay: ReplayStore,
        *,
        sampler: Sampler | None = None,
        demo_buffer: ReplayStore | None = None,
        normalizer: RunningStatistics | None = None,
        encoder: Encoder | None = None,
        acting: Network | None = None,
        backup_actor: Samples | None = None,
        policy_critic: Critic | None = None,
        augment: Augment | None = None,
        gamma: float = 0.99,
        tau: float = 0.005,
        target_entropy: float,
        batch_size: int = 256,
        micro_batch_size: int | None = None,
        min_buffer_size: int = 1,
        actor_optim: OptimizerSettings = DEFAULT_OPTIMIZER,
        critic_optim: OptimizerSettings = DEFAULT_OPTIMIZER,
        alpha_optim: OptimizerSettings = DEFAULT_OPTIMIZER,
        critic_actor_ratio: int = 1,
        actor_delay: int = 0,
        target_update_freq: int = 1,
        agg_q: Aggregate = "min",
        actor_agg_q: Aggregate = "min",
        critic_subsample_size: int = 0,
        subsample_with_replacement: bool = False,
        backup_entropy: bool = True,
        bootstrap: Bootstrap = "standard",
        autocast: bool = False,
        compile: bool = False,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
        ranks: Ranks = ONE_RANK,
        data_parallel: DataParallel | None = None,
    ) -> None:
        self.ranks, self.data_parallel = ranks, data_parallel or Replicated(ranks)
        self.actor, self.critic, self.target_critic = actor, critic, target_critic
        self.temperature, self.replay = temperature, replay
        self.sampler: Sampler = sampler if sampler is not None else replay  # type: ignore[assignment]
        self.demo_buffer, self.normalizer = demo_buffer, normalizer
        self.encoder, self.augment = encoder, augment
        self.acting: Network = acting if acting is not None else actor
        self.backup_actor: Samples = backup_actor if backup_actor is not None else actor
        self.policy_critic: Critic = policy_critic if policy_critic is not None else critic
        self.gamma, self.tau, self.target_entropy = gamma, tau, target_entropy
        self.batch_size = share_of(batch_size, ranks, "actor.global_batch_size")
        self.min_buffer_size = math.ceil(min_buffer_size / ranks.size)
        self.micro_batch_size = micro_batch_size or self.batch_size
        self.critic_actor_ratio, self.actor_delay = critic_actor_ratio, actor_delay
        self.target_update_freq = target_update_freq
        self.agg_q, self.actor_agg_q, self.backup_entropy = agg_q, actor_agg_q, backup_entropy
        self.critic_subsample_size = critic_subsample_size
        self.subsample_with_replacement = subsample_with_replacement
        self.bootstrap, self.device = bootstrap, torch.device(device)
        self.autocast = autocast
        self.generator = generator if generator is not None else torch.Generator(self.device).manual_seed(0)
        self.critic_loss = torch.compile(critic_loss, dynamic=False) if compile else critic_loss
        self.actor_loss = torch.compile(actor_loss, dynamic=False) if compile else actor_loss
        self.actor_stepper = self.data_parallel.stepper(actor.parameters(), actor_optim)
        # The critics' own first: they stay one flat tensor, which `track` reads.
        trained = [*critic.parameters(), *(encoder.trained_parameters() if encoder is not None else [])]
        self.critic_stepper = self.data_parallel.stepper(trained, critic_optim)
        self.alpha_stepper: Stepper | None = None
        if temperature.theta.requires_grad:
            self.alpha_stepper = Stepper(temperature.parameters(), alpha_optim, ranks)
        self._unseen: list[Tensor] = []
        self.updates = 0

    def observe(self, trajectory: Trajectory) -> None:
        """Fold chunks into transitions and store them; take the observations into the running statistics.

        Where an operator took over, the decision is what was done, and the transition is prior data, too: it goes into
        both buffers (HIL-SERL, arXiv:2410.21845).

        Several ranks do the latter together, in `ready` or before a checkpoint: they need not observe equally many
        segments.
        """
        trajectory, taken_over = with_operators_decisions(trajectory)
        reward, discount = fold_chunk(trajectory.reward, trajectory.terminated, self.gamma, self.bootstrap)
        self.replay.add(trajectory, reward, discount)
        if self.demo_buffer is not None and bool((taken_over & trajectory.valid).any()):
            self.demo_buffer.add(replace(trajectory, valid=trajectory.valid & taken_over), reward, discount)
        if self.normalizer is not None:
            states = trajectory.obs["state"][1:].flatten(0, 1)
            if self.ranks.size == 1:
                self.normalizer.update(states)
            else:
                self._unseen.append(states)

    def ready(self) -> bool:
        """Whether the replay buffers of all ranks hold their share of `min_buffer_size`. Collective."""
        self._take_in_unseen()
        return self.ranks.all(len(self.replay) >= self.min_buffer_size)

    def _take_in_unseen(self) -> None:
        """Merge what each rank has observed since the last time into the running statistics. Collective."""
        if self.normalizer is not None and self.ranks.size > 1:
            self.normalizer.update(torch.cat(self._unseen) if self._unseen else torch.empty(0), self.ranks)
            self._unseen = []

    def update(self) -> Metrics:
        """One critic step; every `critic_actor_ratio`-th time an actor and a temperature step; track the target."""
        if self.updates == 0 and isinstance(self.actor, LearnsLater):
            self.actor.begin_learning()
        metrics, batches = self._update_critic(self.sample())
        if self.updates % self.critic_actor_ratio == 0 and self.updates >= self.actor_delay:
            metrics |= self._update_actor(batches)
        self.updates += 1
        if self.updates % self.target_update_freq == 0:
            self.data_parallel.track(self.target_critic, self.critic, self.tau)
        return metrics

    def sample(self) -> list[Transition]:
        """A new batch on the device, augmented, in micro-batches."""
        return [self._augmented(batch) for batch in self._micro_batches(self.sampler.sample(self.batch_size))]

    def _update_critic(self, batches: Sequence[Transition]) -> tuple[Metrics, list[Transition]]:
        """One step. Returns its statistics and the batches as the critics saw them: encoded, without gradients."""
        alpha, subset = self.temperature().detach(), self._draw_critics()
        seen: list[Transition] = []

        def loss_of(batch: Transition) -> tuple[Tensor, Metrics]:
            with self.precision():
                batch = self._encoded(batch)
                seen.append(replace(batch, obs=tree.tree_map(_detached, batch.obs)))
                return self.critic_loss(
                    self.critic,
                    self.backup_actor,
                    self.target_critic,
                    alpha,
                    batch,
                    self.draw_noise(batch),
                    agg_q=self.agg_q,
                    subset=subset,
                    entropy=self.backup_entropy,
                )

        stats = self.critic_stepper.descend(loss_of, batches)
        return {"sac/critic_loss": stats.pop("critic_loss")} | {f"critic/{k}": v for k, v in stats.items()}, seen

    def _update_actor(self, batches: Sequence[Transition]) -> Metrics:
        alpha = self.temperature().detach()

        def loss_of(batch: Transition) -> tuple[Tensor, Metrics]:
            with self.precision():
                noise = self.draw_noise(batch)
                return self.actor_loss(self.actor, self.policy_critic, alpha, batch, noise, agg_q=self.actor_agg_q)

        stats = self.actor_stepper.descend(loss_of, batches)
        metrics: Metrics = {"sac/actor_loss": stats.pop("actor_loss"), "sac/alpha": alpha}
        entropy = stats["entropy"]
        if self.alpha_stepper is not None:

            def alpha_loss_of(entropy: Tensor) -> tuple[Tensor, Metrics]:
                loss = alpha_loss(self.temperature(), entropy, self.target_entropy)
                return loss, {"alpha_loss": loss.detach()}

            alpha_stats = self.alpha_stepper.descend(alpha_loss_of, [entropy])
            metrics |= {
                "sac/alpha_loss": alpha_stats["alpha_loss"],
                "alpha/grad_norm": alpha_stats["grad_norm"],
            }
        return metrics | {f"actor/{k}": v for k, v in stats.items()}

    def _micro_batches(self, batch: Transition) -> list[Transition]:
        batch = Transition(
            obs=tree.to(batch.obs, self.device),
            decision=batch.decision.to(self.device),
            reward=batch.reward.to(self.device),
            discount=batch.discount.to(self.device),
            next_obs=tree.to(batch.next_obs, self.device),
        )
        if self.micro_batch_size >= self.batch_size:
            return [batch]
        return [
            Transition(
                obs=tree.index(batch.obs, rows),
                decision=batch.decision[rows],
                reward=batch.reward[rows],
                discount=batch.discount[rows],
                next_obs=tree.index(batch.next_obs, rows),
            )
            for start in range(0, self.batch_size, self.micro_batch_size)
            for rows in [slice(start, start + self.micro_batch_size)]
        ]

    def _augmented(self, batch: Transition) -> Transition:
        if self.augment is None:
            return batch
        obs, next_obs = (self.augment(obs, self.generator) for obs in (batch.obs, batch.next_obs))
        return replace(batch, obs=obs, next_obs=next_obs)

    def _encoded(self, batch: Transition) -> Transition:
        """The batch with features in place of raw observations; only those of `obs` carry gradients."""
        if self.encoder is None:
            return batch
        obs = self.encoder(batch.obs, self.generator)
        with torch.no_grad():
            next_obs = self.encoder(batch.next_obs, self.generator)
        return replace(batch, obs=obs, next_obs=next_obs)

    def draw_noise(self, batch: Transition) -> Tensor:
        """Standard normal numbers [B, *actor.noise_shape]."""
        shape = (len(batch.reward), *self.actor.noise_shape)
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _draw_critics(self) -> Tensor | None:
        """Indices of the critics in this update's targets, without replacement as in RLPD unless asked otherwise."""
        size = self.critic_subsample_size
        num_heads = self.critic.num_heads if size else 0
        if not size or (size >= num_heads and not self.subsample_with_replacement):
            return None
        if self.subsample_with_replacement:
            drawn = torch.randint(num_heads, (size,), generator=self.generator, device=self.device)
        else:
            drawn = torch.randperm(num_heads, generator=self.generator, device=self.device)[:size]
        return self.ranks.broadcast_(drawn)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """What losses are computed in."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def acting_weights(self) -> tuple[int, dict[str, Tensor]]:
        """(number of updates, copy of the weights and statistics of what acts): never the critics."""
        return self.updates, self.data_parallel.copy_of(self.acting)

    def trained(self) -> dict[str, Sequence[tuple[str, Tensor]]]:
        """Named parameters of everything that an optimizer moves, by network."""
        networks = {
            "actor": self.actor,
            "critic": self.critic,
            "encoder": self.encoder,
            "temperature": self.temperature,
        }
        named = {name: list(part.named_parameters()) for name, part in networks.items() if part is not None}
        return {name: [(key, p) for key, p in part if p.requires_grad] for name, part in named.items()}

    def buffers(self) -> dict[str, Buffer]:
        """`replay_buffer`, and `demo_buffer` where there is prior data."""
        stores: dict[str, Buffer] = {"replay_buffer": self.replay}
        return stores if self.demo_buffer is None else stores | {"demo_buffer": self.demo_buffer}

    def _parts(self) -> dict[str, Any]:
        parts = {
            "actor": self.actor,
            "critic": self.critic,
            "target_critic": self.target_critic,
            "temperature": self.temperature,
            "actor_optim": self.actor_stepper,
            "critic_optim": self.critic_stepper,
        }
        if self.encoder is not None:
            parts["encoder"] = self.encoder
        return parts if self.alpha_stepper is None else parts | {"alpha_optim": self.alpha_stepper}

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizers, target, temperature, the generators of all ranks and the update counter. Collective."""
        self._take_in_unseen()
        state: dict[str, Any] = {name: self.data_parallel.state_of(part) for name, part in self._parts().items()}
        return state | {"updates": self.updates, "generators": self.ranks.gather(self.generator.get_state())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`. Raises CheckpointError naming the part that is missing or does not fit."""
        load_parts(self._parts(), state, self.data_parallel.load)
        self.updates = state["updates"]
        load_generator(self.generator, state, self.ranks)

    def held(self) -> dict[str, Any]:
        """The tensors of networks, optimizers, target and temperature that this rank keeps."""
        return {name: self.data_parallel.held_of(part) for name, part in self._parts().items()}


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
