"""Learner updates per second, against Stable-Baselines3 and against SAC-Flow's usual form.

    python benchmarks/updates.py                        # all tables, about ten minutes
    python benchmarks/updates.py --only mlp --threads 2
    python benchmarks/updates.py --quick                # one table of each kind with small batches, some seconds

mlp    Gaussian policy, two critics, batch 256, on networks 3x256 and 2x256 with relu. Both learners have the same
       networks, batch, threads and replay contents, and update critic, actor and temperature every time.
       sb3 is its own `SAC.train()`. "recipe's norms" adds what the recipe has besides: layer norms
       in the critics and running normalisation of the state.
flow   Flow-T policy and batch of the published recipe (batch 512, D = 96, two layers, K = 4, critics 3x256 with
       layer norm and tanh, an actor update in every third), with 2 and 10 critics. The peer is `full_form.py`: the
       same function and losses with the full decoder at every step and a loop over critics. "state 3x256" adds the
       tanh layers that the published recipe's code has before the flow network, and rlinf's recipe has not.

ppo    Gaussian policy with a value function, 3x256 tanh, minibatches of 256 out of 25,600 decisions: one optimizer step
       of policy and value. The peer is Stable-Baselines3's own `PPO.train()` on the same experience; it clips the joint
       gradient of both networks and rlinf that of each, the work is the same.

torch's fp32   float32 products as torch comes: by MKL
fp32           as rlinf sets its process: by oneDNN where that stays in float32, see `rlinf.launch.machine`; for the
               peers in rows of their own, so that what the setting alone brings can be told
bf16           `actor.precision: bf16`: rlinf's networks under autocast

Freed memory is kept in the process for all of them, as in a run of rlinf. "batch given" leaves the replay buffer out.

limit rows: the matrix products of one rlinf update at the rate that this machine reaches with 1024 x 1024 matrices.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from full_form import FullFlowPolicy, FullFormSac, LoopedCritics
from measure import ROOT, Contender, Run, in_turns, number, parser, print_setting, print_table, repeat
from torch.utils.flop_counter import FlopCounterMode

from rlinf.algorithms.optimize import OptimizerSettings
from rlinf.algorithms.ppo import PPO
from rlinf.algorithms.sac import SAC
from rlinf.core.types import EnvSpaces, Trajectory, Transition
from rlinf.launch.build import build_algorithm, build_networks
from rlinf.launch.machine import choose_float32_products, keep_freed_memory
from rlinf.launch.parse import load_config
from rlinf.models.embodiment.mlp_actor_critic import MlpActorCritic

STATE, ACTION, ENVS = 42, 4, 16
SPACES = EnvSpaces({"state": (STATE,)}, {"state": "float32"}, ACTION)
CONFIG_DIR = ROOT / "examples" / "embodiment" / "config"
MATRIX = 1024
FLOW_STEPS, FLOW_WIDTH, FLOW_HEADS, FLOW_LAYERS, FLOW_RATIO = 4, 96, 4, 2, 3

Kernels = Literal["torch's fp32", "fp32", "bf16"]
"""What products are computed by and in; see the end of the module's docstring."""

KERNELS: tuple[Kernels, ...] = ("torch's fp32", "fp32", "bf16")


@dataclass(frozen=True)
class Row:
    """A learner in a table: its name, what does the work, the learner if it is ours, and the name of its peer."""

    name: str
    run: Run
    learner: SAC | PPO | None = None
    peer: str | None = None


class GivenBatch:
    """A replay buffer that has nothing to do: every draw is the same batch."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def sample(self, batch_size: int, env: object = None) -> Any:
        """As both libraries ask for one."""
        return self.batch


def experience(steps: int, seed: int = 0) -> Trajectory:
    """A random segment of `steps` decisions in each of ENVS environments, without episode ends."""
    draw = np.random.default_rng(seed)
    state = torch.from_numpy(draw.standard_normal((steps + 1, ENVS, STATE), np.float32))
    action = torch.from_numpy(draw.uniform(-1, 1, (steps, ENVS, ACTION)).astype(np.float32))
    flags = torch.zeros(steps, ENVS, 1, dtype=torch.bool)
    return Trajectory(
        obs={"state": state},
        last_obs={"state": state[0, :0]},
        last_index=torch.zeros(0, 2, dtype=torch.int64),
        decision=action,
        action=action[:, :, None],
        reward=torch.from_numpy(draw.random((steps, ENVS, 1), np.float32)),
        terminated=flags,
        truncated=flags[..., 0],
        intervened=flags,
        valid=~flags[..., 0],
    )


def rlinf_learner(recipe: str, batch_size: int, played: Trajectory, *overrides: str) -> SAC:
    """The learner that a run of this recipe would have, its replay buffer filled with `played`."""
    config = load_config(
        recipe,
        [
            "profile=gpu",  # the recipe as published: nothing is laid over it for a smaller machine
            "actor.compile_model=False",
            f"actor.global_batch_size={batch_size}",
            f"actor.micro_batch_size={batch_size}",
            f"algorithm.replay_buffer.capacity={2 * played.num_steps * ENVS}",
            "algorithm.replay_buffer.min_buffer_size=1",
            "algorithm.target_update_freq=1",
            "algorithm.train_actor_steps=0",
            "algorithm.critic_subsample_size=null",
            *overrides,
        ],
        CONFIG_DIR,
    )
    learner = build_algorithm(config, build_networks(config, SPACES), torch.device("cpu"))
    assert isinstance(learner, SAC)
    learner.observe(played)
    return learner


def sb3_learner(widths: list[int], played: Trajectory) -> Any:
    """Stable-Baselines3's SAC with these networks and the same replay contents; None, and why, without it."""
    try:
        sb3 = importlib.import_module("stable_baselines3")
        vec_env = importlib.import_module("stable_baselines3.common.vec_env")
        logger = importlib.import_module("stable_baselines3.common.logger")
    except ImportError as error:
        print(f"(stable_baselines3 skipped: {error}; `bash requirements/install.sh embodied --bench` adds it)")
        return None

    learner = sb3.SAC(
        "MlpPolicy",
        vec_env.DummyVecEnv([nowhere()] * ENVS),
        gamma=0.8,
        buffer_size=played.num_steps * ENVS,
        policy_kwargs={"net_arch": widths},
        device="cpu",
        seed=0,
    )
    learner.set_logger(logger.configure(None, []))
    buffer = learner.replay_buffer
    buffer.observations[:] = played.obs["state"][:-1].numpy()
    buffer.next_observations[:] = played.obs["state"][1:].numpy()
    buffer.actions[:] = played.decision.numpy()
    buffer.rewards[:] = played.reward[..., 0].numpy()
    buffer.full = True
    return learner


def with_kernels(kernels: Kernels, run: Run, learner: SAC | PPO | None = None) -> Run:
    """`run` as a run of rlinf sets its process and its learner, or as torch comes."""

    def measured(budget_s: float) -> float:
        if kernels == "torch's fp32":
            torch.set_float32_matmul_precision("highest")
        else:
            choose_float32_products()
        if learner is not None:
            learner.autocast = kernels == "bf16"
        return run(budget_s)

    return measured


def limits(updates_gflop: float) -> list[Contender]:
    """Updates per second if an update were only its matrix products, and those as fast as large ones."""
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    share = 2e-9 * MATRIX**3 / updates_gflop
    contenders: list[Contender] = []
    for kernels in KERNELS:
        x, y = (a.bfloat16(), b.bfloat16()) if kernels == "bf16" else (a, b)
        product = partial(torch.mm, x, y, out=torch.empty_like(x))
        contenders.append(Contender(limit_name(kernels), with_kernels(kernels, repeat(product, share))))
    return contenders


def limit_name(kernels: Kernels) -> str:
    """As in the table."""
    return f"limit: matrix products, {kernels}"


def gflop_per_update(learner: SAC | PPO, updates: int) -> float:
    """Matrix products of one update, the mean over `updates`, in 1e9 multiplications and additions."""
    with FlopCounterMode(display=False) as counter:
        for _ in range(updates):
            learner.update()
    return counter.get_total_flops() / updates / 1e9


def both_ways(learner: Any, buffer_owner: str, batch_size: int, update: Callable[[], object], units: int) -> list[Run]:
    """`update` with its replay buffer, and with one batch that is already there."""
    buffer = getattr(learner, buffer_owner)
    given = GivenBatch(buffer.sample(batch_size))

    def from_given() -> None:
        setattr(learner, buffer_owner, given)
        try:
            update()
        finally:
            setattr(learner, buffer_owner, buffer)

    return [repeat(update, units), repeat(from_given, units)]


def several(learner: SAC | PPO, count: int) -> Callable[[], object]:
    """`count` updates, so that critic and actor updates are in their proportion."""

    def updates() -> None:
        for _ in range(count):
            learner.update()

    return updates


SOURCES = ("", ", batch given")


def report_mlp(layers: int, batch_size: int, stored: int, rounds: int, budget_s: float) -> None:
    """The Gaussian policy against Stable-Baselines3."""
    widths, played = [256] * layers, experience(stored // ENVS)
    nets = [
        f"actor.model.hidden_dims={widths}",
        f"actor.model.q_hidden_dims={widths}",
        "actor.model.activation=relu",
        "actor.model.q_activation=relu",
        "actor.model.num_q_heads=2",
        "algorithm.critic_actor_ratio=1",
    ]
    plain = ["actor.model.q_layer_norm=False", "actor.model.normalize_obs=False"]
    normed = ["actor.model.q_layer_norm=True", "actor.model.normalize_obs=True"]
    ours = rlinf_learner("maniskill_sac_mlp", batch_size, played, *nets, *plain)
    ours_normed = rlinf_learner("maniskill_sac_mlp", batch_size, played, *nets, *normed)
    gflop = gflop_per_update(ours, 1)

    rows: list[Row] = []
    for source, run in zip(SOURCES, both_ways(ours, "sampler", batch_size, several(ours, 5), 5), strict=True):
        rows.append(Row(f"rlinf{source}", run, ours, peer=f"sb3{source}"))
    normed_run = repeat(several(ours_normed, 5), 5)
    rows.append(Row("rlinf, recipe's norms", normed_run, ours_normed, peer="sb3"))
    theirs = sb3_learner(widths, played)
    if theirs is not None:
        train = both_ways(theirs, "replay_buffer", batch_size, lambda: theirs.train(5, batch_size), 5)
        rows += [Row(f"sb3{source}", run) for source, run in zip(SOURCES, train, strict=True)]
    title = f"mlp: actor and 2 critics {layers}x256, batch {batch_size}, {stored:,} transitions"
    measure(title, rows, gflop, rounds, budget_s)


def report_flow(num_critics: int, batch_size: int, stored: int, rounds: int, budget_s: float) -> None:
    """The flow policy against its usual form."""
    played = experience(stored // ENVS)
    ours = rlinf_learner(
        "maniskill_sac_flow_state",
        batch_size,
        played,
        "actor.model.flow_actor_type=JaxFlowTActor",
        "actor.model.backbone_dims=[]",
        f"actor.model.denoising_steps={FLOW_STEPS}",
        f"actor.model.d_model={FLOW_WIDTH}",
        f"actor.model.n_head={FLOW_HEADS}",
        f"actor.model.n_layers={FLOW_LAYERS}",
        "actor.model.noise_std_head=True",
        "actor.model.use_batch_norm=False",
        "actor.model.drift_correction=False",
        "actor.model.normalize_obs=False",
        f"actor.model.num_q_heads={num_critics}",
        "actor.model.q_hidden_dims=[256,256,256]",
        "actor.model.q_activation=tanh",
        "actor.model.q_layer_norm=True",
        f"algorithm.critic_actor_ratio={FLOW_RATIO}",
    )
    gflop = gflop_per_update(ours, FLOW_RATIO)
    given: Transition = ours.sampler.sample(batch_size)

    def peer(draw: Callable[[], Transition], backbone_dims: tuple[int, ...] = ()) -> Run:
        learner = FullFormSac(
            *full_form(num_critics, backbone_dims),
            target_entropy=ours.target_entropy,
            critic_actor_ratio=FLOW_RATIO,
        )

        def updates() -> None:
            for _ in range(FLOW_RATIO):
                learner.update(draw())

        return repeat(updates, FLOW_RATIO)

    def stored_batch() -> Transition:
        return ours.sampler.sample(batch_size)

    ours_runs = both_ways(ours, "sampler", batch_size, several(ours, FLOW_RATIO), FLOW_RATIO)
    rows = [
        Row(f"rlinf{source}", run, ours, peer=f"full form{source}")
        for source, run in zip(SOURCES, ours_runs, strict=True)
    ]
    rows += [
        Row("full form", peer(stored_batch)),
        Row("full form, batch given", peer(lambda: given)),
        Row("full form, state 3x256", peer(stored_batch, (256, 256, 256))),
    ]
    title = f"flow: d_model {FLOW_WIDTH}, {num_critics} critics 3x256, batch {batch_size}, actor every third"
    measure(title, rows, gflop, rounds, budget_s)


def report_ppo(batch_size: int, stored: int, rounds: int, budget_s: float) -> None:
    """Minibatches of PPO against Stable-Baselines3."""
    steps = stored // ENVS
    widths = [256, 256, 256]
    torch.manual_seed(0)
    network = MlpActorCritic(STATE, ACTION, tuple(widths), tuple(widths))
    optim = OptimizerSettings(lr=3e-4, clip_grad=0.5)
    ours = PPO(
        network, gamma=0.99, update_epoch=1_000_000_000, batch_size=batch_size, policy_optim=optim, value_optim=optim
    )
    segment = acted(network, experience(steps))
    ours.observe(segment)
    gflop = gflop_per_update(ours, 1)
    rows = [Row("rlinf", repeat(several(ours, 10), 10), ours, peer="sb3")]
    theirs = sb3_ppo(widths, segment, batch_size)
    if theirs is not None:
        rows.append(Row("sb3", repeat(theirs.train, steps * ENVS / batch_size)))
    title = f"ppo: policy and value 3x256, minibatches of {batch_size} out of {steps * ENVS:,}"
    measure(title, rows, gflop, rounds, budget_s)


def acted(network: MlpActorCritic, played: Trajectory) -> Trajectory:
    """The same experience as if `network` had acted, with densities and values."""
    steps = played.num_steps
    state = played.obs["state"][:-1].flatten(0, 1)
    out = network.act({"state": state}, "train", torch.randn(len(state), ACTION))
    assert out.log_prob is not None
    assert out.value is not None
    return replace(
        played,
        decision=out.decision.unflatten(0, (steps, ENVS)),
        log_prob=out.log_prob.unflatten(0, (steps, ENVS)),
        value=out.value.unflatten(0, (steps, ENVS)),
    )


def sb3_ppo(widths: list[int], played: Trajectory, batch_size: int) -> Any:
    """Stable-Baselines3's PPO with these networks and the same experience; None without it."""
    try:
        sb3 = importlib.import_module("stable_baselines3")
        vec_env = importlib.import_module("stable_baselines3.common.vec_env")
        logger = importlib.import_module("stable_baselines3.common.logger")
    except ImportError:
        return None
    steps = played.num_steps
    learner = sb3.PPO(
        "MlpPolicy",
        vec_env.DummyVecEnv([nowhere()] * ENVS),
        learning_rate=3e-4,
        n_steps=steps,
        batch_size=batch_size,
        n_epochs=1,
        policy_kwargs={"net_arch": {"pi": widths, "vf": widths}},
        device="cpu",
        seed=0,
    )
    learner.set_logger(logger.configure(None, []))
    buffer = learner.rollout_buffer
    buffer.reset()
    assert played.value is not None
    assert played.log_prob is not None
    for t in range(steps):
        buffer.add(
            played.obs["state"][t].numpy(),
            played.decision[t].numpy(),
            played.reward[t, :, 0].numpy(),
            np.full(ENVS, t == 0),
            played.value[t],
            played.log_prob[t].sum((-1, -2)),
        )
    buffer.compute_returns_and_advantage(played.value[-1], np.zeros(ENVS))
    return learner


def nowhere() -> type:
    """An environment that only says what a learner asks before it is stepped."""
    gymnasium = importlib.import_module("gymnasium")

    class Nowhere(gymnasium.Env):  # type: ignore[name-defined, misc]
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (STATE,), np.float32)
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION,), np.float32)

    return Nowhere


def full_form(num_critics: int, backbone_dims: tuple[int, ...] = ()) -> tuple[FullFlowPolicy, LoopedCritics]:
    """The peer's networks at the sizes of the flow table."""
    torch.manual_seed(0)
    actor = FullFlowPolicy(
        STATE,
        ACTION,
        steps=FLOW_STEPS,
        width=FLOW_WIDTH,
        heads=FLOW_HEADS,
        layers=FLOW_LAYERS,
        backbone_dims=backbone_dims,
    )
    return actor, LoopedCritics(STATE + ACTION, (256, 256, 256), num_critics)


def measure(title: str, rows: list[Row], gflop: float, rounds: int, budget_s: float) -> None:
    """Measure every learner with the kernels that it can have, and print the table."""
    contenders = []
    for row in rows:
        kinds: tuple[Kernels, ...] = ("torch's fp32", "fp32") if row.learner is None else ("fp32", "bf16")
        for kernels in kinds:
            peer = None if row.peer is None else f"{row.peer}, torch's fp32"
            run = with_kernels(kernels, row.run, row.learner)
            contenders.append(Contender(f"{row.name}, {kernels}", run, peer=peer, limit=limit_name(kernels)))
    contenders += limits(gflop)
    results = in_turns(contenders, rounds=rounds, budget_s=budget_s)
    print_table(f"{title}; {rounds} rounds of {budget_s:g} s", "updates", contenders, results)
    rates = [
        f"{number(gflop * float(np.median(results[limit_name(kernels)].wall)))} in {kernels}" for kernels in KERNELS
    ]
    print(
        f"x peer: against the peer with torch's fp32. The products of one rlinf update are {number(gflop)} GFLOP;\n"
        f"the machine does {', '.join(rates)}, in GFLOP/s"
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=("mlp", "flow", "ppo"), help="only these tables (default: both)")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    print_setting(arguments.threads)
    quick = arguments.quick
    rounds, budget_s = (1, 0.02) if quick else (arguments.rounds, arguments.seconds)
    stored = 2_000 if quick else 100_000
    small, large = (32, 32) if quick else (256, 512)
    if arguments.only in (None, "mlp"):
        for layers in (3,) if quick else (3, 2):
            report_mlp(layers, small, stored, rounds, budget_s)
    if arguments.only in (None, "flow"):
        for num_critics in (2,) if quick else (2, 10):
            report_flow(num_critics, large, stored, rounds, budget_s)
    if arguments.only in (None, "ppo"):
        report_ppo(small, stored // 4, rounds, budget_s)


if __name__ == "__main__":
    main()
