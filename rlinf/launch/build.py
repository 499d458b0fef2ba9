"""A configuration → environments, networks and algorithm.

The only place that knows both configurations and classes: everything below gets values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from rlinf.algorithms.augment import RandomShift
from rlinf.algorithms.dsrl_na import DecodedActor, NoiseAliasing
from rlinf.algorithms.optimize import OptimizerSettings
from rlinf.algorithms.parallel import DataParallel, Replicated
from rlinf.algorithms.ppo import PPO
from rlinf.algorithms.sac import SAC
from rlinf.algorithms.temperature import Temperature
from rlinf.core.errors import CheckpointError, ConfigError, DataError
from rlinf.core.protocols import VectorEnv
from rlinf.core.ranks import ONE_RANK, Ranks
from rlinf.core.seeding import derive_seed, numpy_generator, torch_generator
from rlinf.core.types import EnvSpaces
from rlinf.data.columns import gigabytes
from rlinf.data.demos import check_demos, read_demos
from rlinf.data.mix import MixedReplay
from rlinf.data.replay import BOOKKEEPING_BYTES, ReplayBuffer
from rlinf.envs.config import EnvConfig
from rlinf.envs.libero.config import LiberoConfig
from rlinf.envs.maniskill.config import ManiSkillConfig, control_mode
from rlinf.envs.realworld.config import RealWorldConfig
from rlinf.functional.returns import fold_chunk
from rlinf.launch.algorithm_config import DemoBufferConfig, OptimConfig, PpoConfig, SacConfig
from rlinf.launch.config import Root, updates_per_step
from rlinf.launch.demonstrations import open_demonstrations
from rlinf.launch.machine import num_simulator_processes, runs_in_bf16
from rlinf.launch.pi0_policy import NoiseSchedule, build_pi0_policy
from rlinf.launch.registry import ENVS, lookup
from rlinf.launch.steering import build_steering, decision_dim, learner_view
from rlinf.models.embodiment.cnn_policy import CnnPolicy, CnnPolicyConfig, build_cnn_policy
from rlinf.models.embodiment.dsrl_policy import DsrlFlowConfig, steering_keys
from rlinf.models.embodiment.flow_policy import FlowPolicy, FlowPolicyConfig, build_flow_policy
from rlinf.models.embodiment.image_encoder import ImageEncoder
from rlinf.models.embodiment.latent_policy import LatentCritic, LatentPolicy
from rlinf.models.embodiment.mlp_actor_critic import MlpActorCritic, MlpActorCriticConfig, build_mlp_actor_critic
from rlinf.models.embodiment.mlp_policy import MlpPolicy, build_mlp_policy
from rlinf.models.embodiment.openpi.actor_critic import Pi0ActorCritic
from rlinf.models.embodiment.openpi.policy_config import OpenpiConfig
from rlinf.models.embodiment.state_critic import StateCritic
from rlinf.models.modules.compact_view import viewed_spaces
from rlinf.models.modules.running_norm import RunningNorm

Policy = FlowPolicy | MlpPolicy | CnnPolicy | MlpActorCritic | Pi0ActorCritic | LatentPolicy

SHARED_OUT_FROM = 500_000_000
"""Trained parameters, of which several learners with `strategy: auto` keep a share each. So many take 8 GB: weights,
gradients and Adam's moments in float32.
"""

# ---- environments


def make_env(
    env: EnvConfig,
    *,
    num_envs: int,
    seed: int,
    policy_setup: str | None,
    render: bool,
    cores: int | None = None,
    first_row: int = 0,
) -> VectorEnv:
    """The environments of one worker and stage, stepped on so many cores (None: all). Imports the simulator.

    `first_row` is the number of the first of them among all environments of the section: where initial states are dealt
    out, each worker and stage has to have its own.
    """
    make = lookup("environment", env.env_type, ENVS)
    if isinstance(env, LiberoConfig):
        make = partial(make, first_row=first_row)
    return make(
        env,
        num_envs=num_envs,
        seed=seed,
        control_mode=control_mode_of(env, policy_setup),
        num_workers=num_simulator_processes(env, num_envs, cores),
        render=render,
    )


def control_mode_of(env: EnvConfig, policy_setup: str | None) -> str | None:
    """The simulator's name for what an action means; None where it has only one."""
    if isinstance(env, RealWorldConfig):
        return f"motion along {'tool' if env.use_relative_frame else 'base'} axes, {env.rotation}"
    return control_mode(env.init_params, policy_setup) if isinstance(env, ManiSkillConfig) else None


def check_spaces(config: Root, spaces: EnvSpaces) -> tuple[int, int]:
    """(state size, action size) of the environment. Raises ConfigError where the model expects others."""
    model = config.actor.model
    found = {"obs_dim": spaces.obs_shapes["state"][0], "action_dim": spaces.action_dim}
    for key, size in found.items():
        expected = getattr(model, key)
        if expected is not None and expected != size:
            raise ConfigError(
                f"actor.model.{key} is {expected}, but the environment has {size}; write {size} or remove the key"
            )
    return found["obs_dim"], found["action_dim"]


# ---- networks and algorithm


@dataclass(frozen=True)
class Networks:
    """Everything with weights. PPO's value function is part of its policy, so there is no critic; the normaliser is
    shared by both, or None. A critic of noise stands beside one of actions (DSRL-NA).
    """

    actor: Policy
    critic: StateCritic | LatentCritic | None
    normalizer: RunningNorm | None
    noise_critic: LatentCritic | None = None

    @property
    def encoder(self) -> ImageEncoder | None:
        """What images go through before the policy's head and the critics see them; a part of `actor`."""
        return self.actor.encoder if isinstance(self.actor, CnnPolicy) else None


def build_networks(config: Root, spaces: EnvSpaces, *, acts: bool = True) -> Networks:
    """Fresh networks on the CPU; their weights are a function of runner.seed and actor.seed.

    Without `acts`, a policy may lack what only acting needs, and has what learning needs.
    """
    model = config.actor.model
    obs_dim, action_dim = check_spaces(config, spaces)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(learner_seed(config, "networks"))
        normalizer = RunningNorm(obs_dim) if model.normalize_obs else None
        actor: Policy
        if isinstance(model, MlpActorCriticConfig):
            actor = build_mlp_actor_critic(model, obs_dim=obs_dim, action_dim=action_dim, normalizer=normalizer)
            return Networks(actor, None, normalizer)
        if isinstance(model, DsrlFlowConfig | OpenpiConfig):
            keys = steering_keys(model)
            if keys is None:
                assert isinstance(model, OpenpiConfig)
                return Networks(build_pi0_policy(config, model, spaces, acts=acts), None, None)
            actor, latent_critic, noise_critic = build_steering(config, keys, spaces, normalizer, acts=acts)
            return Networks(actor, latent_critic, normalizer, noise_critic)
        if isinstance(model, CnnPolicyConfig | FlowPolicyConfig) and model.input_type == "mixed":
            shapes = spaces.obs_shapes
            actor = build_cnn_policy(model, obs_shapes=shapes, action_dim=action_dim, normalizer=normalizer)
        elif isinstance(model, FlowPolicyConfig):
            actor = build_flow_policy(model, obs_dim=obs_dim, action_dim=action_dim, normalizer=normalizer)
        else:
            actor = build_mlp_policy(model, obs_dim=obs_dim, action_dim=action_dim, normalizer=normalizer)
        encoder = actor.encoder if isinstance(actor, CnnPolicy) else None
        critic = StateCritic(
            obs_dim if encoder is None else encoder.out_dim,
            action_dim * model.num_action_chunks,
            hidden_dims=model.q_hidden_dims,
            num_heads=model.num_q_heads,
            activation=model.q_activation,
            layer_norm=model.q_layer_norm,
            normalizer=normalizer if encoder is None else None,
        )
    return Networks(actor, critic, normalizer)


def load_weights_into(actor: Policy, state: dict[str, Tensor], source: str) -> None:
    """Load a policy's weights. Raises CheckpointError when they are those of another network."""
    ours = {name: list(tensor.shape) for name, tensor in actor.state_dict().items()}
    theirs = {name: list(tensor.shape) for name, tensor in state.items()}
    differing = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if differing:
        first, more = differing[0], len(differing) - 1
        raise CheckpointError(
            f"the weights in {source} do not fit actor.model: {first} is {theirs.get(first, 'absent')} there and "
            f"{ours.get(first, 'absent')} here" + (f", and {more} more differ" if more else "") + "; use the model of "
            "the run that made them"
        )
    actor.load_state_dict(state)


def learner_seed(config: Root, stream: str, ranks: Ranks = ONE_RANK) -> int:
    """Seed of one of the learner's streams; with `ranks`, of this rank's own, of which rank 0 has the usual one."""
    own = f"/{ranks.rank}" if ranks.rank else ""
    return derive_seed(config.runner.seed, f"actor/{config.actor.seed}/{stream}{own}")


def build_algorithm(
    config: Root,
    networks: Networks,
    device: torch.device,
    demos: ReplayBuffer | None = None,
    ranks: Ranks = ONE_RANK,
) -> SAC | NoiseAliasing | PPO:
    """The algorithm of the configuration on `device`, without experience; `demos` are mixed into SAC's batches.

    Of several `ranks` this is one; sizes in the configuration are those of all together.
    """
    if isinstance(config.algorithm, PpoConfig):
        return build_ppo(config, config.algorithm, networks, device, ranks)
    sac = build_sac(config, config.algorithm, networks, device, demos, ranks)
    if networks.noise_critic is None:
        return sac
    assert isinstance(networks.actor, LatentPolicy)
    updates = config.runner.total_steps * config.algorithm.update_epoch * config.algorithm.noise_critic_steps
    optim, steps = optimizer_settings(config.actor.critic_optim, updates), config.algorithm.noise_critic_steps
    return NoiseAliasing(sac, networks.noise_critic, networks.actor.decode, optim=optim, steps=steps)


def lay_out(config: Root, networks: Sequence[nn.Module], device: torch.device, ranks: Ranks) -> DataParallel:
    """Bring fresh networks onto the device, whole or this rank's share of them, as actor.fsdp_config says."""
    actor, fsdp = config.actor, config.actor.fsdp_config
    trained = sum(p.numel() for network in networks for p in network.parameters() if p.requires_grad)
    large = trained >= SHARED_OUT_FROM and not actor.compile_model
    if ranks.size == 1 or fsdp.strategy == "ddp" or (fsdp.strategy == "auto" and not large):
        for network in networks:
            network.to(device)
        return Replicated(ranks)
    from rlinf.algorithms.fsdp import FullySharded  # draws in a second's worth of torch

    shared = FullySharded(
        ranks,
        device,
        unit_dtype=torch.bfloat16 if runs_in_bf16(config, device) else None,
        reshard_after_forward=fsdp.reshard_after_forward,
        reduce_last_only=fsdp.enable_gradient_accumulation,
    )
    for network in networks:
        shared.shard(network)
    return shared


def build_ppo(
    config: Root, algorithm: PpoConfig, networks: Networks, device: torch.device, ranks: Ranks = ONE_RANK
) -> PPO:
    """Proximal policy optimisation on `device`."""
    actor, network = config.actor, networks.actor
    assert isinstance(network, MlpActorCritic | Pi0ActorCritic)
    data_parallel = lay_out(config, [network], device, ranks)
    demonstrations, anneal = None, None
    if isinstance(network, Pi0ActorCritic) and isinstance(actor.model, OpenpiConfig):
        demonstrations = open_demonstrations(config, network, device, ranks)
        anneal = NoiseSchedule(network, actor.model.openpi) if actor.model.openpi.noise_anneal else None
    updates = config.runner.total_steps * updates_per_step(config)
    return PPO(
        network,
        normalizer=networks.normalizer,
        gamma=algorithm.gamma,
        gae_lambda=algorithm.gae_lambda,
        bootstrap=algorithm.bootstrap_type,
        update_epoch=algorithm.update_epoch,
        batch_size=actor.global_batch_size,
        micro_batch_size=actor.micro_batch_size,
        normalize_advantages=algorithm.normalize_advantages,
        clip_ratio_low=algorithm.clip_ratio_low,
        clip_ratio_high=algorithm.clip_ratio_high,
        clip_ratio_c=algorithm.clip_ratio_c,
        value_clip=algorithm.value_clip,
        huber_delta=algorithm.huber_delta,
        entropy_bonus=algorithm.entropy_bonus,
        logprob_level=algorithm.logprob_type,
        entropy_level=algorithm.entropy_type,
        weighting=algorithm.loss_agg_func,
        critic_warmup_steps=algorithm.critic_warmup_steps,
        target_kl=algorithm.target_kl,
        recompute_log_prob=algorithm.recompute_logprobs,
        demonstrations=demonstrations,
        after_collection=anneal,
        policy_optim=optimizer_settings(actor.optim, updates),
        value_optim=optimizer_settings(actor.critic_optim, updates),
        autocast=runs_in_bf16(config, device),
        compile=actor.compile_model,
        device=device,
        generator=torch_generator(learner_seed(config, "losses", ranks), "shuffles", torch.device("cpu")),
        ranks=ranks,
        data_parallel=data_parallel,
    )


def build_sac(
    config: Root,
    algorithm: SacConfig,
    networks: Networks,
    device: torch.device,
    demos: ReplayBuffer | None,
    ranks: Ranks = ONE_RANK,
) -> SAC:
    """Soft actor-critic on `device` with an empty replay buffer."""
    actor, policy, critic = config.actor, networks.actor, networks.critic
    entropy, replay_config = algorithm.entropy_tuning, algorithm.replay_buffer
    assert critic is not None and not isinstance(policy, MlpActorCritic | Pi0ActorCritic)
    target_critic, noise_critic = critic.make_target(), networks.noise_critic
    parts: list[nn.Module] = [policy.head, policy.encoder] if isinstance(policy, CnnPolicy) else [policy]
    if isinstance(policy, LatentPolicy):
        policy.to(device)  # with its decoder, of which nothing is trained
        parts = [policy.head]
    others = [] if noise_critic is None else [noise_critic]
    data_parallel = lay_out(config, [*parts, critic, target_critic, *others], device, ranks)
    decoded = DecodedActor(policy.head, policy.decode) if noise_critic and isinstance(policy, LatentPolicy) else None
    storage = replay_config.storage_dir
    replay = ReplayBuffer(
        math.ceil(replay_config.capacity / ranks.size),
        generator=numpy_generator(learner_seed(config, "replay", ranks), "draws"),
        storage_dir=storage if storage is None or ranks.size == 1 else f"{storage}/rank_{ranks.rank}",
    )
    sampler = None
    if demos is not None and algorithm.demo_buffer is not None:
        sampler = MixedReplay(replay, demos, prior_fraction=algorithm.demo_buffer.fraction)
    critic_updates = config.runner.total_steps * algorithm.update_epoch
    actor_updates = max(1, critic_updates // algorithm.critic_actor_ratio)
    target_entropy = entropy.target_entropy
    if target_entropy == "auto":
        target_entropy = policy.default_target_entropy()
    return SAC(
        policy.head if isinstance(policy, CnnPolicy | LatentPolicy) else policy,
        critic,
        target_critic,
        Temperature(entropy.alpha_type, entropy.initial_alpha).to(device),
        replay,
        sampler=sampler,
        demo_buffer=demos,
        normalizer=networks.normalizer,
        encoder=networks.encoder,
        acting=policy,
        backup_actor=decoded,
        policy_critic=noise_critic,
        augment=RandomShift(algorithm.random_shift) if algorithm.random_shift else None,
        gamma=algorithm.gamma,
        tau=algorithm.tau,
        target_entropy=target_entropy,
        batch_size=actor.global_batch_size,
        micro_batch_size=actor.micro_batch_size,
        min_buffer_size=replay_config.min_buffer_size,
        actor_optim=optimizer_settings(actor.optim, actor_updates),
        critic_optim=optimizer_settings(actor.critic_optim, critic_updates),
        alpha_optim=optimizer_settings(entropy.optim, actor_updates),
        critic_actor_ratio=algorithm.critic_actor_ratio,
        actor_delay=algorithm.train_actor_steps,
        target_update_freq=algorithm.target_update_freq,
        agg_q=algorithm.agg_q,
        actor_agg_q=algorithm.actor_agg_q,
        critic_subsample_size=algorithm.critic_subsample_size or 0,
        subsample_with_replacement=algorithm.subsample_with_replacement,
        backup_entropy=algorithm.backup_entropy,
        bootstrap=algorithm.bootstrap_type,
        autocast=runs_in_bf16(config, device),
        compile=actor.compile_model,
        device=device,
        generator=torch_generator(learner_seed(config, "losses", ranks), "noise", device),
        ranks=ranks,
        data_parallel=data_parallel,
    )


def describe_replay(config: Root, spaces: EnvSpaces) -> str | None:
    """One line that says how much memory the replay buffer will take; None where there is none."""
    if not isinstance(config.algorithm, SacConfig):
        return None
    replay = config.algorithm.replay_buffer
    decision = 4 * decision_dim(config, spaces.action_dim)
    spaces = viewed_spaces(spaces, learner_view(config))
    # Sentences are kept as ids.
    kinds = {path: "int32" if kind == "str" else kind for path, kind in spaces.obs_dtypes.items()}
    frame = sum(math.prod(shape) * np.dtype(kinds[path]).itemsize for path, shape in spaces.obs_shapes.items())
    row = frame + decision + BOOKKEEPING_BYTES
    place = "in memory" if replay.storage_dir is None else f"in {replay.storage_dir}"
    return f"replay buffer: up to {replay.capacity:,} rows of {row:,} bytes, {gigabytes(replay.capacity * row)} {place}"


def build_demo_buffer(config: Root, demo: DemoBufferConfig, spaces: EnvSpaces, ranks: Ranks = ONE_RANK) -> ReplayBuffer:
    """A buffer with the demonstrations of `demo.load_path`, folded like experience; recordings are dealt to `ranks`.

    Raises DataError when they are missing, corrupt, of another environment, or fewer than the ranks.
    """
    try:
        trajectories, meta = read_demos(demo.load_path)
        check_demos(meta, spaces, control_mode_of(config.env.train, config.actor.model.policy_setup))
    except DataError as problem:
        cell = isinstance(config.env.train, RealWorldConfig)
        command = "collect_data.sh" if cell else "record_demos.sh RECIPE"
        raise DataError(
            f"algorithm.demo_buffer.load_path: {problem} To record: bash examples/embodiment/{command}"
        ) from problem
    if len(trajectories) < ranks.size:
        raise DataError(
            f"the demonstrations in {demo.load_path} are {len(trajectories)} recordings, too few for {ranks.size} "
            "learner ranks; record more or use fewer ranks"
        )
    trajectories = trajectories[ranks.rank :: ranks.size]
    chunk = config.actor.model.num_action_chunks
    needed = 0
    for trajectory in trajectories:
        if trajectory.reward.shape[-1] != chunk:
            raise DataError(
                f"the demonstrations in {demo.load_path} have {trajectory.reward.shape[-1]} actions per decision and "
                f"actor.model.num_action_chunks is {chunk}; record them anew or change the key"
            )
        needed += (trajectory.num_steps + 1) * trajectory.num_envs + len(trajectory.last_index)
    buffer = ReplayBuffer(
        math.ceil(demo.capacity / ranks.size) if demo.capacity else needed + demo.room,
        generator=numpy_generator(learner_seed(config, "demos", ranks), "draws"),
        config_key="algorithm.demo_buffer",
    )
    for trajectory in trajectories:
        reward, discount = fold_chunk(
            trajectory.reward, trajectory.terminated, config.algorithm.gamma, config.algorithm.bootstrap_type
        )
        buffer.add(trajectory, reward, discount)
    return buffer


def optimizer_settings(optim: OptimConfig, updates: int) -> OptimizerSettings:
    """The optimizer of a network that is updated `updates` times in the run."""
    return OptimizerSettings(
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_grad=optim.clip_grad,
        lr_scheduler=optim.lr_scheduler,
        lr_warmup_steps=optim.lr_warmup_steps,
        total_training_steps=optim.total_training_steps or updates,
        min_lr=optim.min_lr,
    )
