"""What RL-Co's stage II costs: demonstrations beside PPO, and the runtime around policy and environments.

    python benchmarks/co_training.py                 # `maniskill_ppo_co_training_openpi_pi05_tiny`, about three minutes
    python benchmarks/co_training.py --only updates
    python benchmarks/co_training.py --quick         # few environments, small batches

updates     an update of the tiny recipe: 320 decisions in micro-batches of 160, each with 32 demonstrations beside it
            in "co-training" and with none in "ppo alone". Pictures are noise, and are there already; what a data set's
            reader does in threads of its own is not in it.
rollouts    decisions of the policy with its exploration in the digital twin, with pictures. "bare" is policy and
            environments in one loop; "rlinf" is the same under the local backend with all that a run records.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from measure import ROOT, Contender, Run, in_turns, parser, print_setting, print_table, repeat
from players import Team
from torch import Tensor

from rlinf.algorithms.co_training import Demonstrations
from rlinf.algorithms.ppo import PPO
from rlinf.core import tree
from rlinf.core.protocols import VectorEnv
from rlinf.core.types import EnvSpaces, Obs, Trajectory
from rlinf.data.chunks import ChunkBatch
from rlinf.launch.build import build_algorithm, build_networks, make_env
from rlinf.launch.config import Root
from rlinf.launch.crew import Layout
from rlinf.launch.machine import choose_float32_products, keep_freed_memory
from rlinf.launch.parse import load_config
from rlinf.models.embodiment.openpi.actor_critic import Pi0ActorCritic
from rlinf.models.embodiment.openpi.model import training_time
from rlinf.models.embodiment.openpi.policy_config import OpenpiConfig
from rlinf.runtime.local import LocalRuntime

RECIPE = "maniskill_ppo_co_training_openpi_pi05_tiny"
CONFIG_DIR = ROOT / "examples" / "embodiment" / "config"
INSTRUCTION = "Pick up the object on the table and place it into the white tray."
STATE = 7


def configuration(*overrides: str) -> Root:
    """The recipe with random weights, and without a data set."""
    free = ["actor.model.model_path=null", "actor.use_real_data_co_training=False"]
    return load_config(RECIPE, [*free, *overrides], CONFIG_DIR)


def random_obs(generator: torch.Generator, *shape: int) -> Obs:
    """What the twin's camera and robot would show, [*shape]."""
    pictures = torch.randint(0, 256, (*shape, 64, 64, 3), dtype=torch.uint8, generator=generator)
    said: object = INSTRUCTION
    for size in reversed(shape):
        said = [said] * size
    return {
        "state": torch.randn(*shape, STATE, generator=generator),
        "images": {"front": pictures},
        "instruction": said,
    }


def collection(config: Root, policy: Pi0ActorCritic, num_envs: int, decisions: int) -> Trajectory:
    """So many decisions of the policy in each environment, without ends of episodes."""
    draw = torch.Generator().manual_seed(0)
    obs = random_obs(draw, decisions + 1, num_envs)
    noise = torch.randn(decisions, num_envs, *policy.noise_shape, generator=draw)
    made = [policy.act(tree.index(obs, t), "train", noise[t]) for t in range(decisions)]
    flags = torch.zeros(decisions, num_envs, config.actor.model.num_action_chunks, dtype=torch.bool)
    return Trajectory(
        obs=obs,
        last_obs=tree.index(tree.index(obs, 0), slice(0, 0)),
        last_index=torch.zeros(0, 2, dtype=torch.int64),
        decision=torch.stack([out.decision for out in made]),
        action=torch.stack([out.action for out in made]),
        reward=torch.rand(flags.shape, generator=draw),
        terminated=flags,
        truncated=flags[..., 0],
        intervened=flags,
        valid=~flags[..., 0],
        log_prob=torch.stack([out.log_prob for out in made if out.log_prob is not None]),
        value=torch.stack([out.value for out in made if out.value is not None]),
    )


def demonstrations(config: Root, policy: Pi0ActorCritic) -> Demonstrations:
    """Random ones."""
    draw, model = torch.Generator().manual_seed(1), config.actor.model
    assert isinstance(model, OpenpiConfig)
    size, horizon = config.actor.sft_batch_size, model.robot().model.action_horizon
    action = torch.randn(size, horizon, model.robot().action_dim, generator=draw)
    batch = ChunkBatch(random_obs(draw, size), action, torch.ones(size, horizon, dtype=torch.bool))
    weight, noise = config.actor.sft_loss_weight, torch.Generator().manual_seed(2)
    return Demonstrations(policy, lambda number: batch, draw_time, weight=weight, generator=noise)


def draw_time(batch: int, generator: torch.Generator) -> Tensor:
    """As a run draws it."""
    return training_time(batch, generator, generator.device)


def learner(config: Root, num_envs: int, decisions: int, *, beside: bool) -> PPO:
    """PPO after the first update of a collection, with or without demonstrations."""
    shapes = {"state": (STATE,), "images/front": (64, 64, 3), "instruction": ()}
    kinds = {"state": "float32", "images/front": "uint8", "instruction": "str"}
    networks = build_networks(config, EnvSpaces(shapes, kinds, STATE), acts=False)
    policy = networks.actor
    assert isinstance(policy, Pi0ActorCritic)
    ppo = build_algorithm(config, networks, torch.device("cpu"))
    assert isinstance(ppo, PPO)
    ppo.demonstrations = demonstrations(config, policy) if beside else None
    ppo.observe(collection(config, policy, num_envs, decisions))
    ppo.update()  # with what is done once per collection
    return ppo


def updates(ppo: PPO) -> Run:
    """One update after the other; the collection is gone through as often as it takes."""

    def update() -> None:
        if not ppo.update():
            raise RuntimeError("the collection is used up: measure for a shorter time")

    return repeat(update)


def report_updates(batch: int, num_envs: int, decisions: int, rounds: int, budget_s: float) -> None:
    """An update with demonstrations and without."""
    config = configuration(
        "algorithm.update_epoch=100000",
        "algorithm.critic_warmup_steps=0",
        f"actor.global_batch_size={2 * batch}",
        f"actor.micro_batch_size={batch}",
    )
    rows = [
        Contender("ppo alone", updates(learner(config, num_envs, decisions, beside=False))),
        Contender("co-training", updates(learner(config, num_envs, decisions, beside=True)), peer="ppo alone"),
    ]
    results = in_turns(rows, rounds=rounds, budget_s=budget_s)
    title = f"updates of {2 * batch} decisions, {config.actor.sft_batch_size} demonstrations to each {batch}"
    print_table(f"{title}; {rounds} rounds of {budget_s:g} s", "updates", rows, results)
    alone, both = results["ppo alone"].cpu, results["co-training"].cpu
    print(f"co-training costs {median(a / b for a, b in zip(alone, both, strict=True)):.2f} of ppo alone by CPU time")


class Bare:
    """Policy and environments in one loop."""

    def __init__(self, env: VectorEnv, policy: Pi0ActorCritic) -> None:
        self.env, self.policy = env, policy
        self.obs, self.draw = env.reset(seed=0), torch.Generator().manual_seed(0)

    @torch.no_grad()
    def play(self, decisions: int) -> None:
        for _ in range(decisions):
            noise = torch.randn(self.env.num_envs, *self.policy.noise_shape, generator=self.draw)
            self.obs = self.env.step(self.policy.act(self.obs, "train", noise).action).obs


def report_rollouts(
    num_envs: int, decisions: int, rounds: int, budget_s: float, num_workers: int | str = "auto"
) -> None:
    """Decisions per second, the twin stepped in so many processes."""
    config = configuration(
        f"env.train.num_workers={num_workers}",
        f"env.train.total_num_envs={num_envs}",
        f"actor.global_batch_size={num_envs}",
        f"actor.micro_batch_size={num_envs}",
    )
    chunk = config.actor.model.num_action_chunks

    def envs(number: int) -> VectorEnv:
        setup = config.actor.model.policy_setup
        return make_env(config.env.train, num_envs=num_envs, seed=number, policy_setup=setup, render=False)

    env = envs(0)
    policy = partial(policy_of, config, env.spaces)
    team = Team(LocalRuntime(), Layout(), envs, policy, chunks=decisions, actions_per_answer=chunk, mode="train")
    pids = [pid for stage in team.env.run(stages_of).wait()[0] for pid in getattr(stage, "pids", [])]
    bare = Bare(env, policy())
    units = num_envs * decisions
    rows = [
        Contender("bare", repeat(lambda: bare.play(decisions), units), list(getattr(env, "pids", []))),
        Contender("rlinf", repeat(team.play, units), pids, limit="bare"),
    ]
    results = in_turns(rows, rounds=rounds, budget_s=budget_s)
    title = f"decisions of {chunk} actions in {num_envs} twins with pictures of 64 x 64"
    print_table(f"{title}; {rounds} rounds of {budget_s:g} s", "decisions", rows, results)
    team.close()
    env.close()


def policy_of(config: Root, spaces: EnvSpaces) -> Pi0ActorCritic:
    """A copy that acts."""
    policy = build_networks(config, spaces).actor
    assert isinstance(policy, Pi0ActorCritic)
    return policy


def stages_of(worker: object) -> Sequence[object]:
    """The environments of a worker."""
    return worker.stages  # type: ignore[attr-defined, no-any-return]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=("updates", "rollouts"), help="only this table")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    choose_float32_products()
    keep_freed_memory()
    print_setting(arguments.threads)
    rounds, budget_s = (1, 0.02) if arguments.quick else (arguments.rounds, max(8.0, arguments.seconds))
    if arguments.only in (None, "updates"):
        batch, num_envs, decisions = (4, 4, 2) if arguments.quick else (160, 64, 20)
        report_updates(batch, num_envs, decisions, rounds, budget_s)
    if arguments.only in (None, "rollouts"):
        num_envs, decisions = (2, 1) if arguments.quick else (64, 5)
        report_rollouts(num_envs, decisions, rounds, budget_s, num_workers=0 if arguments.quick else "auto")


if __name__ == "__main__":
    main()
