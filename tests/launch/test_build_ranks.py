"""One rank of a learner: its share of every size, streams of its own, and the weights that all have."""

from dataclasses import replace

import pytest
import torch

from rlinf.core.errors import DataError
from rlinf.core.ranks import ONE_RANK
from rlinf.core.types import EnvSpaces
from rlinf.launch import build
from rlinf.launch.parse import load_config
from tests.launch.conftest import CONFIG_DIR

SPACES = EnvSpaces({"state": (3,)}, {"state": "float32"}, action_dim=2)


def built(recipe, ranks, *overrides):
    config = load_config(recipe, overrides, CONFIG_DIR, has_gpu=lambda: False)
    spaces = replace(SPACES, obs_shapes={"state": (config.actor.model.obs_dim or 3,)})
    spaces = replace(spaces, action_dim=config.actor.model.action_dim or 2)
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
