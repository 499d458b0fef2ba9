"""Learner updates per second, against Stable-Baselines3 and against SAC-Flow's usual form.

    python benchmarks/updates.py                        # all tables, about ten minutes
    python benchmarks/updates.py --only mlp --threads 2
    python benchmarks/updates.py --quick                # one table of each kind with small batches, some seconds

mlp    Gaussian policy, two critics, batch 256, on networks 3x256 and 2x256 with relu. Both learners have the same
       networks, batch, threads and replay contents, and update critic, actor and temperature every time.
       stable_baselines3 is its own `SAC.train()`. "recipe's norms" adds what the recipe has besides: layer norms
       in the critics and running normalisation of the state.
flow   Flow-T policy and batch of the published recipe (batch 512, D = 96, two layers, K = 4, critics 3x256 with
       layer norm and tanh, an actor update in every third), with 2 and 10 critics. The peer is `full_form.py`: the
       same function and losses with the full decoder at every step and a loop over critics. "state 3x256" adds the
       tanh layers that the published recipe's code has before the flow network, and rlinf's recipe has not.

ppo    Gaussian policy with a value function, 3x256 tanh, minibatches of 256 out of 25,600 decisions: one optimizer step
       of policy and value. The peer is Stable-Baselines3's own `PPO.train()` on the same experience; it clips the joint
       gradient of both networks and rlinf that of each, the work is the same.

bf16 is `actor.precision: bf16` on a CPU: float32 tensors, inner products in bfloat16 where the processor has them.
The peers get the same setting in rows of their own. Freed memory is kept in the process for all of them, as
in a run of rlinf. "batch given" leaves the replay buffer out.

limit rows: the matrix products of one rlinf update at the rate that this machine reaches with 1024 x 1024 matrices.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
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
from rlinf.launch.machine import keep_freed_memory
from rlinf.launch.parse import load_config
from rlinf.models.embodiment.mlp_actor_critic import MlpActorCritic

STATE, ACTION, ENVS = 42, 4, 16
SPACES = EnvSpaces({"state": (STATE,)}, {"state": "float32"}, ACTION)
CONFIG_DIR = ROOT / "examples" / "embodiment" / "config"
MATRIX = 1024
FLOW_STEPS, FLOW_WIDTH, FLOW_HEADS, FLOW_LAYERS, FLOW_RATIO = 4, 96, 4, 2, 3

Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


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


def in_precision(precision: Precision, run: Run) -> Run:
    """As `rlinf.launch.build.set_matmul_precision` sets it for a run."""

    def measured(budget_s: float) -> float:
        torch.set_float32_matmul_precision("medium" if precision == "bf16" else "highest")
        return run(budget_s)

    return measured


def limits(updates_gflop: float) -> list[Contender]:
    """Updates per second if an update were only its matrix products, and those as fast as large ones."""
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    out = torch.empty(MATRIX, MATRIX)
    share = 2e-9 * MATRIX**3 / updates_gflop
    return [
        Contender(limit_name(precision), in_precision(precision, repeat(lambda: torch.mm(a, b, out=out), share)))
        for precision in PRECISIONS
    ]


def limit_name(precision: Precision) -> str:
    """As in the table."""
    return f"limit: matrix products, {precision}"


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

    runs: list[tuple[str, Run]] = []
    for source, run in zip(SOURCES, both_ways(ours, "sampler", batch_size, several(ours, 5), 5), strict=True):
        runs.append((f"rlinf{source}", run))
    runs.append(("rlinf, recipe's norms", repeat(several(ours_normed, 5), 5)))
    theirs = sb3_learner(widths, played)
    if theirs is not None:
        train = both_ways(theirs, "replay_buffer", batch_size, lambda: theirs.train(5, batch_size), 5)
        runs += [(f"stable_baselines3{source}", run) for source, run in zip(SOURCES, train, strict=True)]

    def peer_of(name: str) -> str | None:
        if not name.startswith("rlinf"):
            return None
        return "stable_baselines3, batch given, fp32" if "given" in name else "stable_baselines3, fp32"

    title = f"mlp: actor and 2 critics {layers}x256, batch {batch_size}, {stored:,} transitions"
    measure(title, runs, peer_of, gflop, rounds, budget_s)


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
    runs = [(f"rlinf{source}", run) for source, run in zip(SOURCES, ours_runs, strict=True)]
    runs += [
        ("full form", peer(stored_batch)),
        ("full form, batch given", peer(lambda: given)),
        ("full form, state 3x256", peer(stored_batch, (256, 256, 256))),
    ]

    def peer_of(name: str) -> str | None:
        if not name.startswith("rlinf"):
            return None
        return "full form, batch given, fp32" if "given" in name else "full form, fp32"

    title = f"flow: d_model {FLOW_WIDTH}, {num_critics} critics 3x256, batch {batch_size}, actor every third"
    measure(title, runs, peer_of, gflop, rounds, budget_s)


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
    runs: list[tuple[str, Run]] = [("rlinf", repeat(several(ours, 10), 10))]
    theirs = sb3_ppo(widths, segment, batch_size)
    if theirs is not None:
        runs.append(("stable_baselines3", repeat(theirs.train, steps * ENVS / batch_size)))
    title = f"ppo: policy and value 3x256, minibatches of {batch_size} out of {steps * ENVS:,}"
    measure(
        title,
        runs,
        lambda name: "stable_baselines3, fp32" if name.startswith("rlinf") else None,
        gflop,
        rounds,
        budget_s,
    )


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


def measure(
    title: str,
    runs: list[tuple[str, Run]],
    peer_of: Callable[[str], str | None],
    gflop: float,
    rounds: int,
    budget_s: float,
) -> None:
    """Measure every learner in both precisions, and print the table."""
    contenders = [
        Contender(f"{name}, {precision}", in_precision(precision, run), peer=peer_of(name), limit=limit_name(precision))
        for name, run in runs
        for precision in PRECISIONS
    ]
    contenders += limits(gflop)
    results = in_turns(contenders, rounds=rounds, budget_s=budget_s)
    print_table(f"{title}; {rounds} rounds of {budget_s:g} s", "updates", contenders, results)
    peak = {p: number(gflop * float(np.median(results[limit_name(p)].wall))) for p in PRECISIONS}
    print(
        f"x peer: against float32 of the peer. The matrix products of one rlinf update are {number(gflop)} GFLOP;\n"
        f"the machine does {peak['fp32']} GFLOP/s in fp32 and {peak['bf16']} in bf16"
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
