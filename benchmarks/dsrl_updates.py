"""Cost of DSRL's updates against the same SAC on an environment that shows the state alone.

    python benchmarks/dsrl_updates.py                        # both tables, about two minutes
    python benchmarks/dsrl_updates.py --only libero --threads 2
    python benchmarks/dsrl_updates.py --quick                # tiny batches, some seconds

To SAC the noise is the action and the frozen policy a part of the environment, so steering should cost what SAC
costs. The peer, "sac", is rlinf's SAC of the recipe `maniskill_sac_mlp` at the sizes of DSRL: state, size of the
decision, hidden layers, critics, batch, micro-batches, losses and optimizers are equal; what DSRL has besides is a
layer of features in front of each network, and layer norms in the policy.

maniskill   `maniskill_dsrl_flow`: 42 numbers of state, noise of 4, ten critics 3x128, batch 256. "dsrl-na" asks the
            decoder (three layers of 256, five steps) twice in every update and has a second ensemble of critics.
libero      `libero_spatial_dsrl_openpi` at full size but for pi0 itself, which no update needs: 8 numbers of state,
            noise of 32, ten critics 3x128, batch 512 in micro-batches of 64. "dsrl and picture" is the recipe as it
            is, whose networks see 64 x 64 pixels besides; "image encoders" are the passes through these alone.

Replay buffers are filled with the same random experience. Products are float32 as in a run (`rlinf.launch.machine`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from measure import ROOT, Contender, Rates, in_turns, parser, print_setting, print_table, repeat
from torch import Tensor

from rlinf.algorithms.dsrl_na import NoiseAliasing
from rlinf.algorithms.sac import SAC
from rlinf.core.types import EnvSpaces, Trajectory
from rlinf.launch.build import build_algorithm, build_networks
from rlinf.launch.config import Root
from rlinf.launch.machine import choose_float32_products, keep_freed_memory
from rlinf.launch.parse import load_config
from rlinf.launch.steering import decision_dim
from rlinf.models.embodiment.dsrl_policy import steering_keys
from rlinf.models.embodiment.flow_decoder import FlowDecoder, FlowDecoderSpec, save_flow_decoder
from rlinf.models.embodiment.latent_policy import LatentCritic, LatentHead
from rlinf.models.modules.compact_view import IMAGE_SIZE

CONFIG_DIR = ROOT / "examples" / "embodiment" / "config"
ENVS, CHUNK = 16, 5
STEERED, PLAIN = "dsrl", "sac"

Learner = SAC | NoiseAliasing


def spaces_of(state: int, action: int, camera: bool = False) -> EnvSpaces:
    """What an environment shows; with a camera also what pi0 asks for."""
    shapes: dict[str, tuple[int, ...]] = {"state": (state,)}
    kinds = {"state": "float32"}
    if camera:
        picture = (IMAGE_SIZE, IMAGE_SIZE, 3)
        shapes |= {"images/main": picture, "images/wrist": picture, "instruction": ()}
        kinds |= {"images/main": "uint8", "images/wrist": "uint8", "instruction": "str"}
    return EnvSpaces(shapes, kinds, action)


def experience(steps: int, state: int, decision: int, action: int, camera: bool) -> Trajectory:
    """A random segment of `steps` chunks in each of ENVS environments, without episode ends."""
    draw = np.random.default_rng(0)
    obs: dict[str, Tensor | dict[str, Tensor]] = {"state": normal(draw, steps + 1, ENVS, state)}
    last: dict[str, Tensor | dict[str, Tensor]] = {"state": torch.zeros(0, state)}
    if camera:
        shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
        pictures = draw.integers(0, 256, (steps + 1, ENVS, *shape), np.uint8)
        obs["images"] = {"main": torch.from_numpy(pictures)}
        last["images"] = {"main": torch.zeros(0, *shape, dtype=torch.uint8)}
    flags = torch.zeros(steps, ENVS, CHUNK, dtype=torch.bool)
    return Trajectory(
        obs=obs,
        last_obs=last,
        last_index=torch.zeros(0, 2, dtype=torch.int64),
        decision=normal(draw, steps, ENVS, decision).clamp(-1, 1),
        action=normal(draw, steps, ENVS, CHUNK, action).clamp(-1, 1),
        reward=-torch.ones(steps, ENVS, CHUNK),
        terminated=flags,
        truncated=flags[..., 0],
        intervened=flags,
        valid=~flags[..., 0],
    )


def normal(draw: np.random.Generator, *shape: int) -> Tensor:
    """Standard normal numbers in float32."""
    return torch.from_numpy(draw.standard_normal(shape, np.float32))


def steered(recipe: str, spaces: EnvSpaces, batch_size: int, stored: int, *overrides: str) -> tuple[Root, Learner]:
    """(configuration, learner) that a run of this recipe would have, its replay buffer full."""
    shared = [*every_time(stored), "algorithm.train_actor_steps=0"]
    config = load_config(recipe, ["profile=gpu", *batch(recipe, batch_size), *shared, *overrides], CONFIG_DIR)
    learner = build_algorithm(config, build_networks(config, spaces, acts=False), torch.device("cpu"))
    keys = steering_keys(config.actor.model)
    assert keys is not None
    assert isinstance(learner, SAC | NoiseAliasing)
    noise, state = decision_dim(config, spaces.action_dim), spaces.obs_shapes["state"][0]
    learner.observe(experience(stored // ENVS, state, noise, spaces.action_dim, keys.dsrl_camera is not None))
    return config, learner


def plain(like: Root, state: int, stored: int) -> SAC:
    """SAC at the sizes of a steered recipe, where the noise is an action of the environment."""
    keys, algorithm, actor = steering_keys(like.actor.model), like.algorithm, like.actor
    assert keys is not None
    widths, noise = list(keys.dsrl_hidden_dims), decision_dim(like, 0)
    config = load_config(
        "maniskill_sac_mlp",
        [
            "profile=gpu",
            *every_time(stored),
            *(f"actor.{name}={getattr(actor, name)}" for name in ("global_batch_size", "micro_batch_size")),
            *(f"actor.{name}.clip_grad={getattr(actor, name).clip_grad}" for name in ("optim", "critic_optim")),
            f"actor.model.hidden_dims={widths}",
            f"actor.model.q_hidden_dims={widths}",
            f"actor.model.num_q_heads={keys.dsrl_num_q_heads}",
            "actor.model.q_layer_norm=True",
            f"actor.model.normalize_obs={actor.model.normalize_obs}",
            "algorithm.critic_subsample_size=null",
            *(f"algorithm.{name}={getattr(algorithm, name)}" for name in ("agg_q", "actor_agg_q", "backup_entropy")),
        ],
        CONFIG_DIR,
    )
    learner = build_algorithm(config, build_networks(config, spaces_of(state, noise)), torch.device("cpu"))
    assert isinstance(learner, SAC)
    learner.observe(experience(stored // ENVS, state, noise, noise, camera=False))
    return learner


def every_time(stored: int) -> list[str]:
    """Critics, actor, temperature and target move in every update."""
    return [
        "actor.compile_model=False",
        f"algorithm.replay_buffer.capacity={2 * stored}",
        "algorithm.replay_buffer.min_buffer_size=1",
        "algorithm.critic_actor_ratio=1",
        "algorithm.target_update_freq=1",
    ]


def batch(recipe: str, size: int) -> list[str]:
    """Sizes of the recipe, or smaller ones."""
    actor = load_config(recipe, ["profile=gpu"], CONFIG_DIR).actor
    whole, part = min(size, actor.global_batch_size), min(size, actor.micro_batch_size)
    return [f"actor.global_batch_size={whole}", f"actor.micro_batch_size={part}"]


def image_encoders(learner: SAC, part: int) -> Callable[[], object]:
    """All that an update does with pictures: five passes forward, two of them with gradients."""
    head, critic, target = learner.actor, learner.critic, learner.target_critic
    assert isinstance(head, LatentHead) and isinstance(critic, LatentCritic) and isinstance(target, LatentCritic)
    actors, critics, targets = (network.encoder.image for network in (head, critic, target))
    assert actors is not None and critics is not None and targets is not None
    images = learner.replay.sample(learner.batch_size).obs["images"]["main"]  # type: ignore[attr-defined]

    def passes() -> None:
        for some in images.split(part):
            with torch.no_grad():
                actors(some)
                targets(some)
            for encoder in (critics, actors):
                features = encoder(some)
                torch.autograd.grad(features.sum(), list(encoder.parameters()))
            critics(some)

    return passes


def report(title: str, rows: list[Contender], rounds: int, budget_s: float) -> None:
    """Measure, print the table, and say how the costs compare."""
    results = in_turns(rows, rounds=rounds, budget_s=budget_s)
    print_table(f"{title}; {rounds} rounds of {budget_s:g} s", "updates", rows, results)
    for row in rows:
        if row.peer is not None:
            print(f"{row.name} costs {cost(results, row.name, row.peer):.2f} of {row.peer} by CPU time")


def cost(results: dict[str, Rates], name: str, other: str) -> float:
    """CPU time of an update, in updates of `other`: the median over rounds."""
    return median(b / a for a, b in zip(results[name].cpu, results[other].cpu, strict=True))


def report_maniskill(batch_size: int, stored: int, rounds: int, budget_s: float) -> None:
    """A small decoder, networks that see the state."""
    state, action = 42, 4
    with tempfile.TemporaryDirectory() as folder:
        spec = FlowDecoderSpec(state, action, CHUNK, (256, 256, 256), 5, control_mode="pd_ee_delta_pos")
        save_flow_decoder(FlowDecoder(spec), Path(folder) / "decoder")
        named, spaces = f"actor.model.decoder_path={folder}/decoder", spaces_of(state, action)
        config, ours = steered("maniskill_dsrl_flow", spaces, batch_size, stored, named)
        _, aliased = steered("maniskill_dsrl_flow", spaces, batch_size, stored, named, "algorithm.noise_aliasing=True")
        theirs = plain(config, state, stored)
    rows = [
        Contender(STEERED, repeat(ours.update), peer=PLAIN),
        Contender(PLAIN, repeat(theirs.update)),
        Contender("dsrl-na", repeat(aliased.update), peer=STEERED),
    ]
    actor = config.actor
    report(f"maniskill: state {state}, noise {action}, batch {actor.global_batch_size}", rows, rounds, budget_s)


def report_libero(batch_size: int, stored: int, rounds: int, budget_s: float) -> None:
    """The sizes that are steered pi0's."""
    state, action = 8, 7
    # No update asks pi0: a tiny one has the same noise.
    free = ["actor.model.model_path=null", "actor.model.openpi.size=tiny"]
    recipe, spaces = "libero_spatial_dsrl_openpi", spaces_of(state, action, camera=True)
    config, blind = steered(recipe, spaces, batch_size, stored, *free, "actor.model.openpi.dsrl_camera=null")
    _, seeing = steered(recipe, spaces, batch_size, stored, *free)
    theirs = plain(config, state, stored)
    assert isinstance(seeing, SAC)
    passes = image_encoders(seeing, config.actor.micro_batch_size)
    rows = [
        Contender(STEERED, repeat(blind.update), peer=PLAIN),
        Contender(PLAIN, repeat(theirs.update)),
        Contender("dsrl and picture", repeat(seeing.update), peer=PLAIN),
        Contender("image encoders", repeat(passes), peer="dsrl and picture"),
    ]
    report(f"libero: state {state}, noise 32, batch {config.actor.global_batch_size}", rows, rounds, budget_s)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=("maniskill", "libero"), help="only this table")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    choose_float32_products()
    keep_freed_memory()
    print_setting(arguments.threads)
    rounds, budget_s = (1, 0.02) if arguments.quick else (arguments.rounds, arguments.seconds)
    batch_size, stored = (16, 64) if arguments.quick else (512, 16_000)
    if arguments.only in (None, "maniskill"):
        report_maniskill(batch_size, stored, rounds, budget_s)
    if arguments.only in (None, "libero"):
        report_libero(batch_size, stored // 4, rounds, budget_s)


if __name__ == "__main__":
    main()
