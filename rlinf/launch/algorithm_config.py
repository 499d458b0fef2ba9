"""Configuration of the algorithms: losses, schedules, buffers and optimizers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlinf.core.config import Config


class OptimConfig(Config):
    """Adam for one network."""

    lr: PositiveFloat = Field(3.0e-4, description="Learning rate after warm-up.")
    lr_scheduler: Literal["torch_constant", "constant", "torch_cosine", "cosine"] = Field(
        "torch_constant",
        description="The rate over time: constant, or a cosine down to min_lr. torch_constant and torch_cosine are "
        "other names of the two.",
    )
    lr_warmup_steps: NonNegativeInt = Field(0, description="Updates of this network with a linearly growing rate.")
    total_training_steps: PositiveInt | None = Field(
        None, description="Updates of this network until a cosine ends; null: all of the run's."
    )
    min_lr: float = Field(0.0, ge=0, description="Rate at the end of a cosine.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam's averaging factors of gradient and square.")
    eps: PositiveFloat = Field(1.0e-8, description="Term in Adam's denominator.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (AdamW).")
    clip_grad: PositiveFloat | None = Field(
        10.0, description="Gradients are scaled down to this norm over the network; null: never."
    )


class FsdpConfig(Config):
    """How several learner processes share one network."""

    strategy: Literal["auto", "ddp", "fsdp2"] = Field(
        "auto",
        description="ddp: each process has all of it, and gradients are averaged. fsdp2: each has its share of the "
        "weights, gradients and moments, for networks too large for one device; `fsdp` is another name of it. auto: "
        "fsdp2 from 500 million trained parameters on. One process alone has nothing to share.",
    )
    reshard_after_forward: bool = Field(
        True,
        description="fsdp2: forget gathered weights between forward and backward pass and gather them again; False: "
        "keep them, which is faster and takes more memory.",
    )
    enable_gradient_accumulation: bool = Field(
        True,
        description="fsdp2: exchange gradients once for all micro-batches of an update, which takes memory for a whole "
        "gradient on each device; False: for each micro-batch.",
    )


class EntropyTuningConfig(Config):
    """The temperature α, which weighs entropy against reward."""

    alpha_type: Literal["softplus", "exp", "fixed"] = Field(
        "softplus", description="How α is parameterised: softplus(x) or exp(x), learned; or fixed at initial_alpha."
    )
    initial_alpha: float = Field(0.01, ge=0, description="α before the first update; zero only with fixed.")
    target_entropy: float | Literal["auto"] = Field(
        "auto",
        description="Entropy that α steers to, in nats; auto: the policy's own default. The entropy of a flow policy "
        "is that of its whole path, see docs/algorithms/sac_flow.md.",
    )
    optim: OptimConfig = Field(default_factory=OptimConfig, description="Optimizer of α.")

    @model_validator(mode="after")
    def _learned_alpha_is_positive(self) -> EntropyTuningConfig:
        if self.initial_alpha == 0 and self.alpha_type != "fixed":
            raise ValueError(
                f"initial_alpha must be positive with alpha_type {self.alpha_type}; or write alpha_type: fixed"
            )
        return self


class ReplayBufferConfig(Config):
    """Experience of this run."""

    capacity: PositiveInt = Field(
        400_000,
        description="Rows that are kept; the oldest make room. A transition takes one, an episode's end one more.",
    )
    min_buffer_size: PositiveInt = Field(1, description="Transitions before the first update.")
    samples_per_insert: PositiveFloat | None = Field(
        None,
        description="Asynchronous runs: the learner waits rather than sample more transitions than this for each one "
        "stored; null: it never waits.",
    )
    storage_dir: str | None = Field(
        None, description="Folder for a memory-mapped buffer that may be larger than memory; null: in memory."
    )


class DemoBufferConfig(Config):
    """Prior experience that is mixed into every batch (RLPD)."""

    load_path: str = Field(description="Folder with demonstrations, as record_demos.sh writes them.")
    scripted_episodes: NonNegativeInt = Field(
        0, description="The task's scripted expert records until the folder holds so many; 0: take it as it is."
    )
    scripted_noise: float = Field(0.1, ge=0, description="Standard deviation of the noise on that expert's actions.")
    capacity: PositiveInt | None = Field(
        None, description="Rows that are kept, as in replay_buffer; null: all of the folder."
    )
    fraction: float = Field(0.5, gt=0, lt=1, description="Share of every batch that is prior experience.")
    room: NonNegativeInt = Field(
        0,
        description="Rows besides those of the folder, for what an operator does in the policy's place while it "
        "learns; once they are full, the oldest make room.",
    )


class SacConfig(Config):
    """Soft actor-critic, also with prior data (RLPD) and with a flow policy (SAC-Flow)."""

    loss_type: Literal["embodied_sac"] = Field("embodied_sac", description="The algorithm: soft actor-critic.")
    gamma: float = Field(0.99, gt=0, le=1, description="Discount per environment step.")
    tau: float = Field(0.005, gt=0, le=1, description="Share of the critic that the target critic takes over.")
    bootstrap_type: Literal["standard", "always"] = Field(
        "standard",
        description="Value after an episode's end. standard: none after termination, but after a time limit; always: "
        "also after termination, as if the task went on.",
    )
    agg_q: Literal["min", "mean"] = Field("min", description="How the target critics are joined in the backup.")
    actor_agg_q: Literal["min", "mean"] = Field("min", description="How the critics are joined in the actor's loss.")
    critic_subsample_size: PositiveInt | None = Field(
        None, description="So many target critics, drawn anew for every update, make the backup; null: all."
    )
    subsample_with_replacement: bool = Field(False, description="Whether a critic may be drawn twice.")
    backup_entropy: bool = Field(True, description="Whether the backup has the term -α log π.")
    update_epoch: PositiveInt = Field(1, description="Critic updates in one global step.")
    critic_actor_ratio: PositiveInt = Field(1, description="Critic updates for each update of actor and α.")
    target_update_freq: PositiveInt = Field(1, description="Critic updates for each update of the target critic.")
    train_actor_steps: NonNegativeInt = Field(0, description="Critic updates before the first update of actor and α.")
    random_shift: NonNegativeInt = Field(
        0,
        description="Images of every batch are shifted by up to so many pixels each way, at random (DrQ); 0: not at "
        "all. `enable_drq: True` is another name of 4.",
    )
    noise_aliasing: bool = Field(
        False,
        description="DSRL-NA, for policies that steer a decoder: critics judge actions, and a critic of noise learns "
        "from them what each noise leads to. Fewer environment steps for more computation.",
    )
    noise_critic_steps: PositiveInt = Field(
        1, description="With noise_aliasing: steps of the critic of noise in each update."
    )
    entropy_tuning: EntropyTuningConfig = Field(default_factory=EntropyTuningConfig, description="Temperature.")
    replay_buffer: ReplayBufferConfig = Field(default_factory=ReplayBufferConfig, description="Replay buffer.")
    demo_buffer: DemoBufferConfig | None = Field(None, description="Demonstrations in every batch; null: none.")


class PpoConfig(Config):
    """Proximal policy optimisation with generalised advantages."""

    loss_type: Literal["actor_critic"] = Field("actor_critic", description="The algorithm: PPO.")
    adv_type: Literal["gae"] = Field("gae", description="Advantages: generalised advantage estimation.")
    gamma: float = Field(0.99, gt=0, le=1, description="Discount per environment step.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="λ of the advantages, per decision.")
    bootstrap_type: Literal["standard", "always"] = Field(
        "standard",
        description="Value after an episode's end. standard: none after termination, but after a time limit; always: "
        "also after termination, as if the task went on.",
    )
    update_epoch: PositiveInt = Field(4, description="Times that the experience of a global step is gone through.")
    normalize_advantages: bool = Field(
        True, description="Shift and scale the advantages of a global step to mean 0 and deviation 1."
    )
    clip_ratio_low: float = Field(0.2, gt=0, lt=1, description="The probability ratio counts down to 1 - this.")
    clip_ratio_high: float = Field(0.2, gt=0, description="The probability ratio counts up to 1 + this.")
    clip_ratio_c: float | None = Field(
        None, gt=1, description="Dual clip: a ratio counts up to this where the advantage is negative; null: no limit."
    )
    value_clip: PositiveFloat | None = Field(
        None, description="A value counts as moved by at most this much from the one it had when acting; null: freely."
    )
    huber_delta: PositiveFloat = Field(
        10.0, description="Errors of the value count by their square up to here and linearly beyond."
    )
    entropy_bonus: float = Field(0.0, ge=0, description="Weight of the policy's entropy in the loss.")
    reward_type: Literal["chunk_level", "action_level"] = Field(
        "chunk_level",
        description="What has an advantage of its own: a whole chunk of actions, or (the same where a chunk has one) "
        "an action.",
    )
    logprob_type: Literal["token_level", "action_level", "chunk_level"] = Field(
        "action_level", description="What has a probability ratio of its own: an action's element, an action, a chunk."
    )
    entropy_type: Literal["token_level", "action_level", "chunk_level"] = Field(
        "action_level", description="What the entropy is that of: an action's element, an action, a chunk."
    )
    loss_agg_func: Literal["token-mean", "seq-mean-token-mean"] = Field(
        "token-mean",
        description="token-mean: all decisions count alike; seq-mean-token-mean: all environments' segments do, which "
        "differs where auto_reset is off.",
    )
    critic_warmup_steps: NonNegativeInt = Field(0, description="Minibatches in which only the value function learns.")
    recompute_logprobs: bool = Field(
        False,
        description="Compare with the density that the learner computes before its first update, rather than the one "
        "that was recorded when acting: for policies that act in another precision than they learn in.",
    )
    target_kl: PositiveFloat | None = Field(
        None, description="Leave the rest of a global step's minibatches once approx_kl is larger; null: never."
    )


AnyAlgorithm = Annotated[SacConfig | PpoConfig, Field(discriminator="loss_type")]
