"""π0 or π0.5 as a policy for PPO: noise in its denoising walk gives it a density, and it has a value head.

What PPO reasons about (the `decision`) is the walk x_1 … x_0, with

    log π(walk | s) = log N(x_1; 0, I) + Σ_k log N(x_{t_k − δ}; mean_k, std_k²)                            [1, §4]

summed over its steps (`joint`), or one step of it, drawn anew for every decision, while the others follow the ODE:

    log π(step | s) = log N(x_{t_k − δ}; mean_k, std_k²).

A density is given for every element of the actions that are executed: the first C of H, the robot's A' numbers of A.
The rest is drawn like them but has no part in ratios, as in [1]. `reduction: mean` divides by the number of terms, as
the original code does; the ratio is then that density's (terms)-th root.

The value is read off the language model (`value_after_vlm`): the mean of its last output over the tokens that are
there. Otherwise off the action expert: the mean of its output over the action tokens, for the noise x = 0 at t = 1.

What is frozen is no part of the state: it is not published, and not saved with every checkpoint. `frozen_mark` tells
one frozen model from another.

    [1] π_RL, arXiv:2510.25889

    B batch, N environments, K denoising steps, H actions per chunk, C of them executed, A action size of the model,
    A' of the robot, P prefix tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlinf.core import tree
from rlinf.core.errors import CheckpointError, ConfigError, ShapeError
from rlinf.core.protocols import Mode
from rlinf.core.types import ActionOut, Obs
from rlinf.functional.denoising import (
    NoiseMethod,
    Step,
    cps_step,
    noisy_steps,
    ode_step,
    sde_step,
    std_in_range,
    step_entropy,
    step_log_prob,
)
from rlinf.functional.squash import LOG_SQRT_TAU
from rlinf.models.embodiment.openpi.dataconfig.robot import Pipeline
from rlinf.models.embodiment.openpi.model import Pi0, Prefix, denoising_times
from rlinf.models.embodiment.openpi.shared_weights import SharedWeights
from rlinf.models.embodiment.openpi.transforms import compose, model_inputs
from rlinf.models.modules.mlp import mlp

NOISE_HIDDEN_DIMS = (128, 64)
VALUE_HIDDEN_DIMS = (512, 256, 128)
PREPARED = ("images", "state", "tokens", "token_mask")


@dataclass(frozen=True)
class Walk:
    """How a chunk of actions is drawn.

    Attributes:
        num_steps: K.
        method: the noise of a step, see `functional.denoising`.
        joint: noise in every step, rather than in one that is drawn for each decision.
        noise_level: α of flow_sde and flow_cps.
        std_range: of flow_noise's deviation.
        reduction: of a walk's terms to its log density.
        executed: C.
        action_dim: A'.

    Raises ConfigError for numbers that make no sense.
    """

    num_steps: int
    method: NoiseMethod
    executed: int
    action_dim: int
    joint: bool = True
    noise_level: float = 0.5
    std_range: tuple[float, float] = (0.08, 0.16)
    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        if noisy_steps(self.method, self.num_steps) < 1:
            raise ConfigError(f"num_steps is {self.num_steps}: no step of {self.method} would draw anything")
        if not 0 < self.std_range[0] < self.std_range[1]:
            raise ConfigError(f"the noise's range is {list(self.std_range)} instead of two growing positive numbers")

    @property
    def noisy(self) -> int:
        """How many steps, the first ones, may draw noise."""
        return noisy_steps(self.method, self.num_steps)

    @property
    def terms(self) -> int:
        """Of a log density: x_1 and every noisy step, or one step."""
        return 1 + self.noisy if self.joint else 1


class Pi0ActorCritic(nn.Module):
    """ActorCritic on a `Pi0`. The decision is float32 [B, K + 1, H, A], the walk; of a single noisy step [B, 3, H, A]:
    x before and after it, and its number k in every element.

    Args:
        model: its weights; the heads are created on its device.
        pipeline: between the robot's numbers and the model's.
        walk: how actions are drawn.
        train_expert_only: keep image encoder and language model as they are.
        value_after_vlm: see the module.
        detach_critic_input: the value's gradient ends at its head. Otherwise it reaches what the head reads.
        eval_noise: whether evaluation begins from noise, which whoever asks draws, or from zeros.
        frozen_mark: number of the model whose weights are kept; a state that was trained beside another is refused.
            0: of any.
        anneal: the noise level follows a schedule, and comes with weights that are loaded. Otherwise it stays that of
            `walk`.

    Raises ConfigError where more actions are executed than the model gives.
    """

    noise_shape: tuple[int, ...]
    noise_level: Tensor
    frozen_mark: Tensor

    def __init__(
        self,
        model: Pi0,
        pipeline: Pipeline,
        walk: Walk,
        *,
        train_expert_only: bool = True,
        value_after_vlm: bool = True,
        detach_critic_input: bool = True,
        value_hidden_dims: Sequence[int] = VALUE_HIDDEN_DIMS,
        eval_noise: bool = True,
        frozen_mark: int = 0,
        anneal: bool = False,
    ) -> None:
        super().__init__()
        config = model.config
        if walk.executed > config.action_horizon:
            raise ConfigError(
                f"num_action_chunks is {walk.executed}, but the model gives chunks of {config.action_horizon} actions"
            )
        self.model, self.pipeline, self.walk = model, pipeline, walk
        self.value_after_vlm, self.detach_critic_input = value_after_vlm, detach_critic_input
        self.eval_noise, self.anneal = eval_noise, anneal
        device = model.action_in_proj.weight.device
        self.noise_head: nn.Module | None = None
        width = config.vlm.width if value_after_vlm else config.expert.width
        with device:
            if walk.method == "flow_noise":
                self.noise_head = mlp(config.expert.width, NOISE_HIDDEN_DIMS, config.action_dim, activation="tanh")
            self.value_head = mlp(width, tuple(value_hidden_dims), 1, activation="relu")
        self.register_buffer("noise_level", torch.tensor(walk.noise_level, device=device))
        self.noise_shape = (walk.num_steps + 1 if walk.joint else 3, config.action_horizon, config.action_dim)
        self._times = denoising_times(walk.num_steps)
        if train_expert_only:
            kept = {id(p) for p in model.expert_parameters()}
            for p in model.parameters():
                p.requires_grad_(id(p) in kept)
        self._frozen = frozenset(name for name, p in self.named_parameters() if not p.requires_grad)
        self.register_buffer("frozen_mark", torch.tensor(frozen_mark if self._frozen else 0, device=device))
        self._shared: SharedWeights | None = None
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_post_hook(_miss_no_frozen)

    # ---- what trains it

    def policy_parameters(self) -> list[nn.Parameter]:
        """Of the model, as far as it is trained, and of the noise head."""
        head = [] if self.noise_head is None else list(self.noise_head.parameters())
        return [*(p for p in self.model.parameters() if p.requires_grad), *head]

    def value_parameters(self) -> list[nn.Parameter]:
        """Of the value head."""
        return list(self.value_head.parameters())

    def shard_units(self) -> list[nn.Module]:
        """The transformer layers of the model."""
        return self.model.shard_units()

    def held(self) -> list[Tensor]:
        """All tensors, those that are frozen too."""
        return [*self.parameters(), *self.buffers()]

    def share_frozen(self, key: str) -> None:
        """Keep what is frozen in the memory that other policies of this process have for it, here and where they go.

        `key` tells this model from others. From now on nobody may write into it, nor empty it.
        """
        frozen = [(name, p) for name, p in self.named_parameters() if name in self._frozen]
        self._shared = SharedWeights(f"{key} {int(self.frozen_mark)}", frozen)

    def _apply(self, fn: Any, recurse: bool = True) -> Pi0ActorCritic:
        return super()._apply(fn if self._shared is None else self._shared.moving(fn), recurse)

    def set_noise_level(self, level: float) -> None:
        """α of flow_sde and flow_cps from now on; the copies that act take it over with the weights."""
        self.noise_level.fill_(level)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        ours, theirs = int(self.frozen_mark), int(state_dict.get(f"{prefix}frozen_mark", 0))
        if ours and theirs and ours != theirs:
            raise CheckpointError(
                "these weights were trained beside another frozen model; name theirs in actor.model.model_path"
            )
        level = f"{prefix}noise_level"
        if level in state_dict and not self.anneal:
            state_dict = {**state_dict, level: self.noise_level}
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- ActorCritic

    def prepare(self, obs: Obs) -> Obs:
        """Observations → all that does not depend on the weights: resized pictures, tokens, the normalised state.

        Everything here that takes observations takes these, too. What is prepared stays as it is.
        """
        if "tokens" in obs:
            return obs
        sample = compose(self.pipeline.inputs)(obs)
        return tree.to({name: sample[name] for name in PREPARED}, sample["state"].device)

    @torch.no_grad()
    def act(self, obs: Obs, mode: Mode, noise: Tensor | None = None) -> ActionOut:
        """`train`: a walk with noise. `eval`: the ODE's from noise[:, 0], or from zeros where no noise is given."""
        prefix = self._encode(obs)
        value, log_prob = self._value(prefix), None
        if mode == "train":
            if noise is None:
                raise ValueError(f"mode='train' explores: give noise [N, {self.noise_shape}]")
            self._check("noise", noise)
            end, decision, log_prob = (self._draw_walk if self.walk.joint else self._draw_step)(prefix, noise)
        else:
            shape = (len(prefix.state), *self.noise_shape[1:])
            start = prefix.state.new_zeros(shape) if noise is None else noise[:, 0]
            decision = end = self.model.denoise(prefix, start, num_steps=self.walk.num_steps)
        action = self.pipeline.decode(end, obs["state"].to(end.device))[:, : self.walk.executed]
        return ActionOut(action, decision, log_prob, value)

    def evaluate(self, obs: Obs, decision: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log densities [B, C, A'], entropies of the noise [B, C, A'] and values [B]. The prefix is computed once."""
        self._check("decision", decision)
        prefix = self._encode(obs)
        log_prob, entropy = self._terms(prefix, decision)
        return log_prob, entropy, self._value(prefix)

    def log_prob(self, obs: Obs, decision: Tensor) -> Tensor:
        """Log densities [B, C, A'] alone: without the language model's last output, or the expert's for the value."""
        self._check("decision", decision)
        return self._terms(self._encode(obs, with_output=False), decision)[0]

    def value(self, obs: Obs) -> Tensor:
        """V(s) [B]."""
        return self._value(self._encode(obs))

    def flow_matching_loss(self, obs: Obs, actions: Tensor, valid: Tensor, *, noise: Tensor, time: Tensor) -> Tensor:
        """Mean of |v(x_t, t) − u|² over the robot's numbers of valid demonstrated actions; padding has no part in it.

        Args:
            obs: observations as an environment gives them.
            actions: float32 [B, H, A'] in the robot's units.
            valid: bool [B, H], false behind the end of an episode; at least one true.
            noise: standard normal numbers [B, H, A].
            time: [B]; see `model.training_time`.
        """
        inputs, chunk = self.pipeline.encode_with_actions(obs, actions, noise.device)
        error = self.model.loss(inputs, chunk, noise=noise, time=time)[..., : self.walk.action_dim].mean(-1)
        return (error * valid).sum() / valid.sum()

    # ---- walks

    def _draw_walk(self, prefix: Prefix, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = noise[:, 0]
        chain, log_prob = [x], self._executed(self._start_term(x))
        for k in range(self.walk.num_steps):
            _, step = self._velocity_and_step(prefix, x, self._time(k, x))
            x = step.mean + step.std * noise[:, k + 1]
            chain.append(x)
            if k < self.walk.noisy:
                log_prob = log_prob + self._executed(step_log_prob(x, step))
        return x, torch.stack(chain, 1), self._reduce(log_prob)

    def _terms(self, prefix: Prefix, decision: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities and entropies."""
        return (self._walk_terms if self.walk.joint else self._step_terms)(prefix, decision)

    def _walk_terms(self, prefix: Prefix, chain: Tensor) -> tuple[Tensor, Tensor]:
        log_prob = self._executed(self._start_term(chain[:, 0]))
        entropy = torch.zeros_like(log_prob)
        for k in range(self.walk.noisy):
            _, step = self._velocity_and_step(prefix, chain[:, k], self._time(k, chain))
            log_prob = log_prob + self._executed(step_log_prob(chain[:, k + 1], step))
            entropy = entropy + self._executed(step_entropy(step))
        return self._reduce(log_prob), self._reduce(entropy)

    def _draw_step(self, prefix: Prefix, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, epsilon, choice = noise.unbind(1)
        # Every decision its own step: Φ of a normal number is uniform.
        uniform = torch.special.ndtr(choice[:, 0, 0].double())
        chosen = (uniform * self.walk.noisy).long().clamp(max=self.walk.noisy - 1)
        before = after = x
        log_prob = x.new_zeros(len(x), self.walk.executed, self.walk.action_dim)
        for k in range(self.walk.num_steps):
            here = (chosen == k)[:, None, None]
            velocity, step = self._velocity_and_step(prefix, x, self._time(k, x).expand(len(x)))
            drawn = step.mean + step.std * epsilon
            ahead = torch.where(here, drawn, ode_step(x, velocity, 1 / self.walk.num_steps))
            if k < self.walk.noisy:
                before, after = torch.where(here, x, before), torch.where(here, drawn, after)
                log_prob = torch.where(here, self._executed(step_log_prob(drawn, step)), log_prob)
            x = ahead
        number = chosen.to(x.dtype)[:, None, None].expand_as(x)
        return x, torch.stack([before, after, number], 1), log_prob

    def _step_terms(self, prefix: Prefix, decision: Tensor) -> tuple[Tensor, Tensor]:
        before, after, number = decision.unbind(1)
        time = self._times.to(decision.device)[number[:, 0, 0].long()]
        _, step = self._velocity_and_step(prefix, before, time)
        return self._executed(step_log_prob(after, step)), self._executed(step_entropy(step))

    def _velocity_and_step(self, prefix: Prefix, x: Tensor, time: Tensor) -> tuple[Tensor, Step]:
        """At `time`, [B] or, for all rows, [1]; both in float32."""
        features = self.model.features(prefix, x, time)
        velocity, delta = self.model.project(features), 1 / self.walk.num_steps
        if self.noise_head is not None:
            with torch.autocast(x.device.type, enabled=False):
                std = std_in_range(self.noise_head(features.float()), *self.walk.std_range)
            return velocity, Step(ode_step(x, velocity, delta), std)
        make = sde_step if self.walk.method == "flow_sde" else cps_step
        return velocity, make(x, velocity, time, delta, self.noise_level)

    # ---- parts

    def _encode(self, obs: Obs, *, with_output: bool = True) -> Prefix:
        inputs = model_inputs(self.prepare(obs), self.model.action_in_proj.weight.device)
        return self.model.encode(inputs, with_output=with_output and self.value_after_vlm)

    def _value(self, prefix: Prefix) -> Tensor:
        if self.value_after_vlm:
            assert prefix.output is not None
            there = prefix.visible[..., None].float()
            read = (prefix.output.float() * there).sum(1) / there.sum(1)
        else:
            silent = prefix.state.new_zeros(len(prefix.state), *self.noise_shape[1:])
            read = self.model.features(prefix, silent, silent.new_ones(1)).mean(1)
        with torch.autocast(read.device.type, enabled=False):
            return self.value_head(read.detach() if self.detach_critic_input else read).squeeze(-1)

    def _time(self, k: int, x: Tensor) -> Tensor:
        return self._times[k : k + 1].to(x.device)

    def _start_term(self, x: Tensor) -> Tensor:
        return -0.5 * x.square() - LOG_SQRT_TAU

    def _executed(self, x: Tensor) -> Tensor:
        return x[:, : self.walk.executed, : self.walk.action_dim]

    def _reduce(self, total: Tensor) -> Tensor:
        return total / self.walk.terms if self.walk.reduction == "mean" else total

    def _check(self, name: str, x: Tensor) -> None:
        if x.shape[1:] != self.noise_shape:
            raise ShapeError(f"{name} is {list(x.shape)} instead of [B, {', '.join(map(str, self.noise_shape))}]")


def _leave_out_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, Pi0ActorCritic)
    for name in module._frozen:
        state_dict.pop(prefix + name, None)


def _miss_no_frozen(module: nn.Module, incompatible: Any) -> None:
    assert isinstance(module, Pi0ActorCritic)
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if key not in module._frozen]
