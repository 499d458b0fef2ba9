"""The root of the configuration. What configures one component lives beside it; here the tree is assembled.

Checks between sections are in `cross_field_problems`: each says which keys disagree and what to change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rlinf.core.config import Config
from rlinf.core.errors import ConfigError
from rlinf.envs.config import EnvConfig
from rlinf.envs.frankasim.config import FrankaSimConfig
from rlinf.envs.libero.config import LiberoConfig
from rlinf.envs.maniskill.config import ManiSkillConfig, control_mode
from rlinf.envs.reach import ReachConfig
from rlinf.envs.realworld.config import RealWorldConfig
from rlinf.launch.algorithm_config import AnyAlgorithm, FsdpConfig, OptimConfig, PpoConfig, SacConfig
from rlinf.launch.cluster_config import ClusterConfig, cluster_problems
from rlinf.launch.openpi_problems import co_training_problems, openpi_problems
from rlinf.models.embodiment.cnn_policy import CnnPolicyConfig
from rlinf.models.embodiment.dsrl_policy import DsrlFlowConfig, steering_keys
from rlinf.models.embodiment.flow_policy import FlowPolicyConfig
from rlinf.models.embodiment.mlp_actor_critic import MlpActorCriticConfig
from rlinf.models.embodiment.mlp_policy import MlpPolicyConfig
from rlinf.models.embodiment.openpi.policy_config import OpenpiConfig
from rlinf.models.embodiment.state_policy import QPolicyConfig
from rlinf.runtime.placement_text import KEY as PLACEMENT
from rlinf.runtime.routes import check_sources

AnyEnv = Annotated[
    ManiSkillConfig | FrankaSimConfig | LiberoConfig | RealWorldConfig | ReachConfig, Field(discriminator="env_type")
]
AnyModel = Annotated[
    FlowPolicyConfig | MlpPolicyConfig | CnnPolicyConfig | MlpActorCriticConfig | DsrlFlowConfig | OpenpiConfig,
    Field(discriminator="model_type"),
]


# ---- runner


class LoggerConfig(Config):
    """Where results go and who shows them."""

    log_path: str = Field("logs", description="Root of all results; relative paths start at the working directory.")
    project_name: str = Field("rlinf", description="Project under which W&B and SwanLab group runs.")
    experiment_name: str = Field(
        "run", description="Name of the run: a folder in log_path, which holds its checkpoints and all else."
    )
    logger_backends: tuple[Literal["tensorboard", "wandb", "swanlab"], ...] = Field(
        ("tensorboard",), description="Besides metrics.jsonl and the terminal, who receives the metrics."
    )

    @field_validator("experiment_name")
    @classmethod
    def _is_one_folder(cls, name: str) -> str:
        if name in ("", ".", "..") or "/" in name:
            raise ValueError("should be the name of one folder; what stands above it belongs into log_path")
        return name


class RunnerConfig(Config):
    """How long to train, when to evaluate and to save, and where to start."""

    task_type: Literal["embodied"] = Field("embodied", description="Kind of task: a robot in an environment.")
    logger: LoggerConfig = Field(default_factory=LoggerConfig, description="Results and loggers.")
    seed: NonNegativeInt = Field(
        0, description="Root seed of the run: networks, exploration, replay and training episodes follow from it."
    )
    max_epochs: PositiveInt = Field(
        1000, description="Global steps; one is a collection of experience and `update_epoch` updates."
    )
    max_steps: int = Field(-1, ge=-1, description="Upper limit on max_epochs, for short tries; -1 for none.")
    val_check_interval: int = Field(-1, ge=-1, description="Evaluate every so many global steps; -1 for never.")
    save_interval: int = Field(
        -1,
        ge=-1,
        description="Write a checkpoint every so many global steps; -1 for only at the end and when interrupted.",
    )
    keep_checkpoints: PositiveInt = Field(3, description="So many of the newest checkpoints are kept.")
    only_eval: bool = Field(False, description="Evaluate once and stop; nothing is trained.")
    resume_dir: str | None = Field(
        None,
        description="Checkpoint from which to go on exactly: .../checkpoints/global_step_<N>, .../checkpoints/latest, "
        "or a run directory.",
    )
    ckpt_path: str | None = Field(
        None, description="Checkpoint of which only the policy's weights are taken; all else starts fresh."
    )
    overlap: bool = Field(
        True,
        description="Collect the next experience while learning from the last. The acting weights are then one global "
        "step older. Without effect on an asynchronous run.",
    )
    asynchronous: bool = Field(
        False,
        description="Collect on and on while learning on and on, neither waiting for the other; a global step is then "
        "`update_epoch` updates. Faster, but no longer repeatable exactly from the seed. run_async.sh sets it.",
    )
    weight_sync_interval: PositiveInt = Field(
        1, description="Global steps after which the acting policy gets the learner's weights."
    )
    max_staleness: PositiveInt | None = Field(
        None,
        description="In an asynchronous run, the learner waits rather than be more updates ahead of the weights that "
        "act; at least `update_epoch`. null: no limit.",
    )

    @property
    def total_steps(self) -> int:
        """Global steps of the run."""
        return self.max_epochs if self.max_steps < 0 else min(self.max_epochs, self.max_steps)


# ---- roles


class ActorConfig(Config):
    """The learner: networks, batches and optimizers."""

    group_name: str = Field("ActorGroup", description="Name of the role in messages.")
    seed: NonNegativeInt = Field(1234, description="Varies networks and batches at the same runner.seed.")
    micro_batch_size: PositiveInt = Field(256, description="Samples that are computed at once.")
    global_batch_size: PositiveInt = Field(
        256, description="Samples of one update; a multiple of micro_batch_size, whose gradients are summed."
    )
    num_threads: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="CPU threads of torch in each learner process. auto: its share of the cores of its machine that do "
        "not step simulators while it learns, at most half of all and at least one.",
    )
    compile_model: bool = Field(False, description="Compile the losses with torch.compile.")
    enable_offload: bool = Field(
        False,
        description="While experience is collected, networks and optimizers wait in the CPU's memory, for a learner "
        "that shares its GPU. Not in runs that learn while collecting.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="What the learner's networks compute in. bf16 is autocast: weights, optimizers, averages and "
        "losses stay in float32. On a CPU without AMX or AVX512-BF16, which would lose by it, bf16 changes nothing.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="pi0 under PPO: keep no activations within layers and compute them again in the backward pass. "
        "Takes a third more time and a fraction of the memory.",
    )
    use_real_data_co_training: bool = Field(
        False,
        description="RL-Co: train pi0 on demonstrations of the real robot beside PPO, in the same backward pass. "
        "False: PPO alone. `enable_sft_co_train` is another name.",
    )
    sft_loss_weight: float = Field(
        0.2, gt=0, description="RL-Co: β, the weight of the demonstrations' flow-matching loss in the whole loss."
    )
    sft_batch_size: PositiveInt = Field(
        16, description="RL-Co: demonstrations beside each micro-batch, over all processes of actor."
    )
    sft_data_path: str | None = Field(
        None,
        description="RL-Co: LeRobot data set, a folder or a name below $HF_LEROBOT_HOME; null: $HF_LEROBOT_HOME itself "
        "where it is one, or physical-intelligence/pick_and_place_real or pick_and_place_real in it.",
    )
    sft_map_to: str | None = Field(
        None,
        description="RL-Co: folder for packed pictures as memory-mapped files, which further runs and processes find "
        "again, for data sets of images that are larger than memory; null: in memory. As data.map_to of run_sft.sh.",
    )
    fsdp_config: FsdpConfig = Field(default_factory=FsdpConfig, description="Several learner processes.")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="Optimizer of the policy.")
    critic_optim: OptimConfig = Field(default_factory=OptimConfig, description="Optimizer of the critics.")
    model: AnyModel = Field(description="Policy and critics; model_type chooses.")


class RolloutConfig(Config):
    """The policy that acts."""

    group_name: str = Field("RolloutGroup", description="Name of the role in messages.")
    pipeline_stage_num: PositiveInt = Field(
        1, description="Parts of the environments that take turns, so that one is stepped while another is answered."
    )
    enable_offload: bool = Field(
        False, description="While nobody asks it, keep the acting policy in the CPU's memory. Not in asynchronous runs."
    )
    noise_correlation: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Correlation of the exploration noise of consecutive decisions; 0 for independent noise. Each "
        "decision alone stays distributed as the policy says.",
    )


class EnvsConfig(Config):
    """The environments."""

    group_name: str = Field("EnvGroup", description="Name of the role in messages.")
    train: AnyEnv = Field(description="Environments that experience is collected in.")
    eval: AnyEnv | None = Field(None, description="Environments for evaluation; null: none.")


class Root(Config):
    """The whole configuration of a run."""

    profile: Literal["cpu", "gpu"] = Field(
        "cpu", description="Device and sizes of the run. On the command line also auto: gpu where torch sees one."
    )
    runner: RunnerConfig = Field(default_factory=RunnerConfig, description="Duration, results, checkpoints.")
    cluster: ClusterConfig = Field(default_factory=ClusterConfig, description="Machines and devices.")
    algorithm: AnyAlgorithm = Field(
        default_factory=SacConfig, description="Losses and schedule; loss_type chooses, embodied_sac when left out."
    )
    env: EnvsConfig = Field(description="Environments.")
    rollout: RolloutConfig = Field(default_factory=RolloutConfig, description="The acting policy.")
    actor: ActorConfig = Field(description="The learner.")

    @model_validator(mode="after")
    def _sections_agree(self) -> Root:
        problems = list(cross_field_problems(self))
        if problems:
            text = "; ".join(message for _, message in problems)
            raise PydanticCustomError("cross_field", "{text}", {"text": text, "problems": problems})
        return self


# ---- checks between sections


def cross_field_problems(root: Root) -> Iterator[tuple[str, str]]:
    """(key, message) for every disagreement between sections that are valid by themselves."""
    problems, counts = cluster_problems(root.cluster)
    yield from problems
    yield from share_problems(root, counts)
    yield from _sac_problems(root) if isinstance(root.algorithm, SacConfig) else _ppo_problems(root)
    yield from openpi_problems(root)
    yield from _env_problems("env.train", root.env.train, root)
    if root.env.eval is not None:
        yield from _env_problems("env.eval", root.env.eval, root)
    elif root.runner.val_check_interval > 0 or root.runner.only_eval:
        key = "runner.only_eval" if root.runner.only_eval else "runner.val_check_interval"
        yield key, f"{key} asks for evaluation, but there is no env.eval; add it or set {key}={_off(key)}"
    begun = (
        isinstance(root.actor.model, OpenpiConfig)
        and not steering_keys(root.actor.model)
        and root.actor.model.model_path
    )
    if root.runner.only_eval and not (root.runner.resume_dir or root.runner.ckpt_path or begun):
        yield (
            "runner.only_eval",
            "runner.only_eval needs something to evaluate; give runner.ckpt_path (or runner.resume_dir) a checkpoint",
        )
    if root.actor.enable_offload and (root.runner.overlap or root.runner.asynchronous):
        key = "runner.asynchronous" if root.runner.asynchronous else "runner.overlap"
        yield (
            "actor.enable_offload",
            f"actor.enable_offload: the learner works while the environments play; write {key}=False or remove the key",
        )
    if root.actor.compile_model and root.actor.fsdp_config.strategy == "fsdp2":
        yield (
            "actor.compile_model",
            "actor.compile_model: losses of networks that are shared out (actor.fsdp_config.strategy: fsdp2) are not "
            "compiled; write False",
        )
    if root.rollout.enable_offload and root.runner.asynchronous:
        yield (
            "rollout.enable_offload",
            "rollout.enable_offload: in an asynchronous run the policy never rests; remove the key",
        )
    staleness = root.runner.max_staleness
    if staleness is not None and root.runner.asynchronous and staleness < updates_per_step(root):
        yield (
            "runner.max_staleness",
            f"runner.max_staleness ({staleness}) is less than the {updates_per_step(root)} updates of a global step: "
            "learning would never begin; raise it or lower algorithm.update_epoch",
        )
    if root.runner.val_check_interval > 0 and _is_robot(root.env.eval):
        yield (
            "runner.val_check_interval",
            "runner.val_check_interval: a robot cannot be evaluated while it learns; what it does meanwhile is counted "
            "(env/success_once). Write -1, and evaluate the finished run with `python -m rlinf eval RUN`",
        )
    if root.env.train.video_cfg.save_video and not isinstance(root.env.train, RealWorldConfig):
        yield (
            "env.train.video_cfg.save_video",
            "env.train.video_cfg.save_video: only evaluation is filmed; write it under env.eval",
        )
    if root.runner.resume_dir is not None and root.runner.ckpt_path is not None:
        yield (
            "runner.ckpt_path",
            "runner.ckpt_path takes only weights and runner.resume_dir takes everything; give one of them",
        )


def _is_robot(env: EnvConfig | None) -> bool:
    return isinstance(env, RealWorldConfig) and not env.is_simulated()


def _off(key: str) -> str:
    return "False" if key.endswith("only_eval") else "-1"


def share_problems(root: Root, counts: Mapping[str, int | None]) -> Iterator[tuple[str, str]]:
    """(key, message) for what cannot be shared among so many processes of each role; None: not known yet."""
    learners, stages = counts.get("actor") or 1, root.rollout.pipeline_stage_num
    yield from _batch_problems(root.actor.global_batch_size, root.actor.micro_batch_size, learners)
    yield from _demo_problems(root, learners)
    yield from co_training_problems(root.actor.use_real_data_co_training, root.actor.sft_batch_size, learners)
    yield from _env_share_problems("env.train", root.env.train, counts.get("env") or 1, stages)
    if root.env.eval is not None:
        yield from _env_share_problems("env.eval", root.env.eval, counts.get("env") or 1, 1)
    if (num_env := counts.get("env")) is not None:
        try:
            check_sources(num_env, counts.get("rollout") or 1, stages)
        except ConfigError as problem:
            yield PLACEMENT, str(problem)
    if learners > root.env.train.total_num_envs:
        yield (
            PLACEMENT,
            f"{PLACEMENT} gives actor {learners} processes, but there are only {root.env.train.total_num_envs} "
            "environments to learn from; raise env.train.total_num_envs or give actor fewer",
        )


def _batch_problems(whole: int, part: int, learners: int) -> Iterator[tuple[str, str]]:
    if whole % (part * learners) == 0:
        return
    key = "actor.micro_batch_size"
    if learners == 1:
        yield (
            key,
            f"actor.global_batch_size ({whole}) is not a multiple of actor.micro_batch_size ({part}); "
            f"{_nearby_divisors(whole, part)}",
        )
    elif whole % learners:
        yield (
            "actor.global_batch_size",
            f"actor.global_batch_size ({whole}) cannot be shared evenly by the {learners} processes of actor; write "
            f"{_nearby_multiples(whole, learners)}",
        )
    else:
        yield (
            key,
            f"actor.global_batch_size ({whole}) is not a multiple of actor.micro_batch_size ({part}) x the {learners} "
            f"processes of actor; {_nearby_divisors(whole // learners, part)}",
        )


def _demo_problems(root: Root, learners: int) -> Iterator[tuple[str, str]]:
    demo = root.algorithm.demo_buffer if isinstance(root.algorithm, SacConfig) else None
    whole = root.actor.global_batch_size
    if demo is None or whole % learners or 1 <= round(demo.fraction * whole / learners) < whole // learners:
        return
    shared = f", shared by the {learners} processes of actor," if learners > 1 else ""
    yield (
        "algorithm.demo_buffer.fraction",
        f"algorithm.demo_buffer.fraction ({demo.fraction:g}) of actor.global_batch_size ({whole}){shared} leaves no "
        "sample of one kind; bring it nearer to 0.5" + (" or raise the batch" if learners > 1 else ""),
    )


def _env_share_problems(section: str, env: EnvConfig, processes: int, stages: int) -> Iterator[tuple[str, str]]:
    total, parts = env.total_num_envs, processes * stages
    if env.plays_a_list():
        if total < parts:
            yield (
                f"{section}.total_num_envs",
                f"{section}.total_num_envs ({total}) is fewer than the {processes} processes of env; write {parts} or "
                "more, at most as many as there are initial states",
            )
        return
    factors = [f"the {processes} processes of env"] * (processes > 1)
    factors += [f"rollout.pipeline_stage_num ({stages})"] * (stages > 1)
    if total % parts:
        yield (
            f"{section}.total_num_envs",
            f"{section}.total_num_envs ({total}) is not a multiple of {' x '.join(factors)}; write "
            f"{_nearby_multiples(total, parts)}",
        )
    elif isinstance(env.num_workers, int) and env.num_workers > 0 and total // parts % env.num_workers:
        shown = "".join(f" / {factor}" for factor in factors)
        yield (
            f"{section}.num_workers",
            f"{section}.total_num_envs ({total}){shown} is not a multiple of {section}.num_workers "
            f"({env.num_workers}); {_nearby_divisors(total // parts, env.num_workers)}",
        )


def _sac_problems(root: Root) -> Iterator[tuple[str, str]]:
    algorithm, model = root.algorithm, root.actor.model
    assert isinstance(algorithm, SacConfig)
    steering = steering_keys(model)
    if steering is not None:
        sees, heads = steering.dsrl_camera is not None, steering.dsrl_num_q_heads
        key = "openpi.dsrl_num_q_heads" if isinstance(model, OpenpiConfig) else "dsrl_num_q_heads"
    elif isinstance(model, QPolicyConfig):
        sees, key, heads = model.input_type == "mixed", "num_q_heads", model.num_q_heads
    elif isinstance(model, OpenpiConfig):
        yield (
            "actor.model.openpi.use_dsrl",
            "actor.model.openpi.use_dsrl: SAC can steer pi0 by its noise and not train it; write True",
        )
        return
    else:
        yield (
            "actor.model.model_type",
            f"SAC has no use for {model.model_type}; write flow_policy, mlp_policy, cnn_policy, dsrl_flow or openpi",
        )
        return
    yield from _steering_problems(root, algorithm)
    if algorithm.random_shift and not sees:
        yield (
            "algorithm.random_shift",
            f"algorithm.random_shift shifts images, and {model.model_type} sees none; write 0 or remove the key",
        )
    subset = algorithm.critic_subsample_size
    if subset is not None and subset > heads and not algorithm.subsample_with_replacement:
        yield (
            "algorithm.critic_subsample_size",
            f"algorithm.critic_subsample_size ({subset}) is more than actor.model.{key} ({heads}); "
            f"lower it to {heads}, add heads, or set algorithm.subsample_with_replacement: True",
        )
    replay = algorithm.replay_buffer
    if replay.min_buffer_size > replay.capacity:
        yield (
            "algorithm.replay_buffer.min_buffer_size",
            f"algorithm.replay_buffer.min_buffer_size ({replay.min_buffer_size}) is more than "
            f"algorithm.replay_buffer.capacity ({replay.capacity}): training would never begin; raise the capacity",
        )


def _steering_problems(root: Root, algorithm: SacConfig) -> Iterator[tuple[str, str]]:
    steers = steering_keys(root.actor.model) is not None
    if algorithm.noise_aliasing and not steers:
        yield (
            "algorithm.noise_aliasing",
            "algorithm.noise_aliasing is for policies that steer a decoder, and "
            f"{root.actor.model.model_type} has none; remove the key or write actor.model.model_type: dsrl_flow",
        )
    if steers and algorithm.demo_buffer is not None and not algorithm.noise_aliasing:
        yield (
            "algorithm.demo_buffer",
            "algorithm.demo_buffer: demonstrations hold actions, and this policy learns from the noise that led to "
            "them; write algorithm.noise_aliasing: True, or remove the demonstrations",
        )
    if steers and root.actor.precision == "bf16":
        yield (
            "actor.precision",
            "actor.precision: networks that steer a decoder are small and learn in float32; write fp32",
        )


def _ppo_problems(root: Root) -> Iterator[tuple[str, str]]:
    algorithm, model = root.algorithm, root.actor.model
    assert isinstance(algorithm, PpoConfig)
    if not isinstance(model, MlpActorCriticConfig | OpenpiConfig):
        yield (
            "actor.model.model_type",
            f"PPO needs a value function, which {model.model_type} has not; write mlp_actor_critic or openpi",
        )
    if algorithm.reward_type == "action_level" and model.num_action_chunks > 1:
        yield (
            "algorithm.reward_type",
            f"algorithm.reward_type: action_level needs a value for each of the {model.num_action_chunks} actions of a "
            "chunk, and there is one for the chunk; write chunk_level",
        )
    if root.rollout.noise_correlation > 0:
        yield (
            "rollout.noise_correlation",
            "rollout.noise_correlation: PPO needs the true density of what was done, which correlated noise has not; "
            "write 0",
        )
    if root.runner.asynchronous:
        yield (
            "runner.asynchronous",
            "runner.asynchronous: PPO learns from what the present policy did; write False, or start it with "
            "run_embodiment.sh",
        )
    collected = root.env.train.total_num_envs * _decisions_per_step(root)
    if root.actor.global_batch_size > collected:
        yield (
            "actor.global_batch_size",
            f"actor.global_batch_size ({root.actor.global_batch_size}) is more than the {collected} decisions of a "
            "global step; lower it or raise env.train.max_steps_per_rollout_epoch",
        )


def _decisions_per_step(root: Root) -> int:
    train = root.env.train
    return train.max_steps_per_rollout_epoch // root.actor.model.num_action_chunks * train.rollout_epoch


def updates_per_step(root: Root) -> int:
    """Gradient updates in a global step: `update_epoch` for SAC; for PPO all minibatches of so many passes, at most."""
    if isinstance(root.algorithm, SacConfig):
        return root.algorithm.update_epoch
    collected = root.env.train.total_num_envs * _decisions_per_step(root)
    return root.algorithm.update_epoch * math.ceil(collected / root.actor.global_batch_size)


def _env_problems(section: str, env: EnvConfig, root: Root) -> Iterator[tuple[str, str]]:
    chunk = root.actor.model.num_action_chunks
    for name in ("max_episode_steps", "max_steps_per_rollout_epoch"):
        steps = getattr(env, name)
        if steps % chunk:
            fitting = [str(count) for count in (steps // chunk * chunk, (steps // chunk + 1) * chunk) if count]
            yield (
                f"{section}.{name}",
                f"{section}.{name} ({steps}) is not a multiple of actor.model.num_action_chunks ({chunk}); write "
                f"{' or '.join(fitting)}",
            )
    if section == "env.eval" and env.max_steps_per_rollout_epoch < env.max_episode_steps:
        yield (
            "env.eval.max_steps_per_rollout_epoch",
            f"env.eval.max_steps_per_rollout_epoch ({env.max_steps_per_rollout_epoch}) is less than "
            f"env.eval.max_episode_steps ({env.max_episode_steps}): no episode would come to its end; raise it",
        )
    if isinstance(env, LiberoConfig) and env.is_eval and section == "env.train":
        yield (
            "env.train.is_eval",
            "env.train.is_eval: only an evaluation comes to an end; write it under env.eval, and "
            "use_ordered_reset_state_ids: True here to go through all reset ids again and again",
        )
    if isinstance(env, ManiSkillConfig):
        try:
            control_mode(env.init_params, root.actor.model.policy_setup)
        except ValueError as problem:
            yield "actor.model.policy_setup", str(problem)


def _nearby_divisors(whole: int, part: int) -> str:
    """The divisors of `whole` around `part`, as advice."""
    divisors = [number for number in range(1, whole + 1) if whole % number == 0]
    below = max(number for number in divisors if number <= part)
    above = [number for number in divisors if number > part]
    return f"write {below}" + (f" or {above[0]}" if above else "")


def _nearby_multiples(whole: int, part: int) -> str:
    """The multiples of `part` around `whole`, as advice."""
    return " or ".join(str(number) for number in (whole // part * part, (whole // part + 1) * part) if number)
