"""One rank of a learner: its share of every size, streams of its own, and the weights that all have."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rlinf.algorithms import fsdp
from rlinf.algorithms.parallel import Replicated
from rlinf.core import tree
from rlinf.core.errors import ConfigError, DataError
from rlinf.core.ranks import ONE_RANK
from rlinf.core.types import EnvSpaces, Trajectory
from rlinf.launch import build
from rlinf.launch.parse import load_config
from tests.launch.conftest import CONFIG_DIR
from tests.ranks import run_ranks

SPACES = EnvSpaces({"state": (3,)}, {"state": "float32"}, action_dim=2)


def built(recipe, ranks, *overrides, cameras=()):
    config = load_config(recipe, overrides, CONFIG_DIR, has_gpu=lambda: False)
    shapes = {"state": (config.actor.model.obs_dim or 3,)} | {f"images/{name}": (32, 32, 3) for name in cameras}
    spaces = replace(SPACES, obs_shapes=shapes, action_dim=config.actor.model.action_dim or 2)
    networks = build.build_networks(config, spaces)
    return config, build.build_algorithm(config, networks, torch.device("cpu"), ranks=ranks)


@pytest.mark.parametrize("recipe", ["reach_sac_mlp", "reach_ppo_mlp"])
def test_ranks_differ_in_their_streams_alone(recipe):
    config, alone = built(recipe, ONE_RANK)
    first, second = (built(recipe, replace(ONE_RANK, rank=rank, size=2))[1] for rank in range(2))
    assert first.batch_size == second.batch_size == config.actor.global_batch_size // 2
    for one, other in zip(first.acting_weights()[1].values(), second.acting_weights()[1].values(), strict=True):
        assert torch.equal(one, other)
    streams = [algorithm.generator.get_state() for algorithm in (alone, first, second)]
    assert torch.equal(streams[0], streams[1]) and not torch.equal(streams[0], streams[2])


def test_ranks_share_the_capacity_and_keep_their_rows_apart(tmp_path):
    rows = f"algorithm.replay_buffer.storage_dir={tmp_path}"
    config, algorithm = built("reach_sac_mlp", replace(ONE_RANK, rank=1, size=2), rows)
    _, other = built("reach_sac_mlp", replace(ONE_RANK, rank=0, size=2), rows)
    assert algorithm.replay.capacity == config.algorithm.replay_buffer.capacity // 2
    assert algorithm.min_buffer_size == config.algorithm.replay_buffer.min_buffer_size // 2
    assert algorithm.replay._storage_dir == tmp_path / "rank_1"
    assert algorithm.replay._generator.random() != other.replay._generator.random()


@pytest.fixture
def recordings(monkeypatch):
    names = ["a", "b", "c"]
    monkeypatch.setattr(build, "read_demos", lambda path: (names, None))
    monkeypatch.setattr(build, "check_demos", lambda *found: None)


@pytest.mark.usefixtures("recordings")
def test_more_ranks_than_recordings_are_refused():
    config = load_config("maniskill_sac_flow_rlpd", (), CONFIG_DIR, has_gpu=lambda: False)
    with pytest.raises(DataError, match="are 3 recordings, too few for 4 learner ranks"):
        build.build_demo_buffer(config, config.algorithm.demo_buffer, SPACES, replace(ONE_RANK, size=4))


# --- weights that are shared out ----------------------------------------------------------------------------

TWO = replace(ONE_RANK, size=2)


class Shares:
    """In place of FullySharded."""

    def __init__(self, ranks, device, **settings):
        self.ranks, self.settings, self.networks = ranks, settings, []

    def shard(self, network):
        self.networks.append(network)


@pytest.mark.parametrize(
    ("ranks", "trained", "overrides", "shared"),
    [
        (TWO, 10, [], False),
        (TWO, build.SHARED_OUT_FROM // 10, [], True),
        (TWO, build.SHARED_OUT_FROM // 10, ["actor.fsdp_config.strategy=ddp"], False),
        (TWO, build.SHARED_OUT_FROM // 10, ["actor.compile_model=True"], False),
        (TWO, 10, ["actor.fsdp_config.strategy=fsdp2"], True),
        (TWO, 10, ["actor.fsdp_config.strategy=fsdp"], True),
        (ONE_RANK, build.SHARED_OUT_FROM // 10, ["actor.fsdp_config.strategy=fsdp2"], False),
    ],
)
def test_large_networks_of_several_ranks_are_shared_out(monkeypatch, ranks, trained, overrides, shared):
    monkeypatch.setattr(fsdp, "FullySharded", Shares)
    config = load_config("reach_sac_mlp", overrides, CONFIG_DIR, has_gpu=lambda: False)
    # Tensors without memory; what is frozen does not count.
    networks = [nn.Linear(10, trained, bias=False, device="meta"), nn.Linear(100, build.SHARED_OUT_FROM, device="meta")]
    networks[1].requires_grad_(False)
    found = build.lay_out(config, networks, torch.device("meta"), ranks)
    assert isinstance(found, Shares if shared else Replicated) and found.ranks is ranks
    assert not shared or found.networks == networks


def test_keys_of_fsdp_config_arrive(monkeypatch):
    monkeypatch.setattr(fsdp, "FullySharded", Shares)
    monkeypatch.setattr(build, "runs_in_bf16", lambda config, device: config.actor.precision == "bf16")
    settings = {
        (): {"unit_dtype": None, "reshard_after_forward": True, "reduce_last_only": True},
        ("actor.fsdp_config.reshard_after_forward=False",): {"reshard_after_forward": False},
        ("actor.fsdp_config.enable_gradient_accumulation=False",): {"reduce_last_only": False},
        ("actor.precision=bf16",): {"unit_dtype": torch.bfloat16},
    }
    for overrides, expected in settings.items():
        asked = ["actor.fsdp_config.strategy=fsdp2", *overrides]
        config = load_config("reach_sac_mlp", asked, CONFIG_DIR, has_gpu=lambda: False)
        found = build.lay_out(config, [], torch.device("cpu"), TWO)
        assert found.settings | expected == found.settings


def test_compiled_losses_are_not_shared_out():
    with pytest.raises(ConfigError, match=r"actor\.compile_model: losses of networks that are shared out"):
        load_config("reach_sac_mlp", ["actor.compile_model=True", "actor.fsdp_config.strategy=fsdp2"], CONFIG_DIR)


CAMERAS = {"frankasim_sac_cnn_async": ("front", "wrist")}


def experience(algorithm, action_dim, state_dim, cameras):
    """Four decisions of eight environments, of which this rank has half."""
    draw = torch.Generator().manual_seed(0)
    half = slice(algorithm.ranks.rank, None, algorithm.ranks.size)
    obs = {"state": torch.randn(5, 8, state_dim, generator=draw)[:, half]}
    if cameras:
        shape = (5, 8, 32, 32, 3)
        obs["images"] = {name: torch.randint(256, shape, generator=draw).byte()[:, half] for name in cameras}
    decision = torch.rand(4, 8, action_dim, generator=draw)[:, half] - 0.5
    no = torch.zeros(4, 4, 1, dtype=torch.bool)
    return Trajectory(
        obs=obs,
        last_obs=tree.tree_map(lambda leaf: leaf[0, :0], obs),
        last_index=torch.empty(0, 2, dtype=torch.long),
        decision=decision,
        action=decision[:, :, None],
        reward=torch.randn(4, 8, 1, generator=draw)[:, half],
        terminated=no,
        truncated=no[..., 0],
        intervened=no,
        valid=~no[..., 0],
        log_prob=torch.full((4, 4, 1, action_dim), -1.0),
        value=torch.zeros(4, 4),
    )


def run_recipe(recipe, strategy, ranks):
    """Bytes of the network or critic on this rank, and on rank 0 what acts before and after two updates."""
    overrides = [f"actor.fsdp_config.strategy={strategy}", "actor.global_batch_size=16", "actor.micro_batch_size=4"]
    if "sac" in recipe:
        overrides += ["algorithm.replay_buffer.min_buffer_size=1", "algorithm.replay_buffer.capacity=100"]
    cameras = CAMERAS.get(recipe, ())
    config, algorithm = built(recipe, ranks, *overrides, cameras=cameras)
    model = config.actor.model
    algorithm.observe(experience(algorithm, model.action_dim or 2, model.obs_dim or 3, cameras))
    before = algorithm.acting_weights()[1]
    assert algorithm.ready()
    for _ in range(2):
        algorithm.update()
    held = algorithm.held()["network" if "ppo" in recipe else "critic"]
    return sum(tensor.nbytes for tensor in held.values()), before, algorithm.acting_weights()[1]


RECIPES = ("reach_sac_flow", "reach_ppo_mlp", "frankasim_sac_cnn_async")


def run_recipes(ranks):
    return {(recipe, how): run_recipe(recipe, how, ranks) for recipe in RECIPES for how in ("fsdp2", "ddp")}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    return run_ranks(run_recipes, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_learns_the_same_with_its_weights_shared_out(recipes, recipe):
    held, before, after = recipes[0][recipe, "fsdp2"]
    held_whole, before_whole, after_whole = recipes[0][recipe, "ddp"]
    torch.testing.assert_close(before, before_whole, rtol=0, atol=0)
    torch.testing.assert_close(after, after_whole, rtol=1e-4, atol=1e-5)
    still = [name for name, value in after.items() if value.ndim > 1 and torch.equal(value, before[name])]
    assert not still, "no weight has moved"
    assert held < 0.6 * held_whole
    assert recipes[1][recipe, "fsdp2"][2] == {}
