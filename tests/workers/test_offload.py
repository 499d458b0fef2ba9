"""Memory that is lent to others comes back as it was, and everything still points at it."""

import pytest
import torch
from torch import nn

from rlinf.algorithms.optimize import OptimizerSettings, Stepper
from rlinf.core.errors import ConfigError
from rlinf.launch.parse import load_config
from rlinf.runners.checkpoint import CheckpointStore, find, load_policy
from rlinf.runners.schedule import Schedule
from rlinf.runners.synchronous import run_sync
from rlinf.workers.offload import Offload
from tests.fakes import ReachEnv, RecordingReporter, TinyActor, TinyAlgorithm, build_crew
from tests.launch.conftest import CONFIG_DIR


def trained(steps, offload=False):
    """A network and its stepper after so many steps; between them, everything is away once."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    stepper = Stepper(network.parameters(), OptimizerSettings(lr=0.01))
    resting = Offload(lambda: {"network": network.state_dict(), "stepper": stepper.state_dict()}, "cpu")
    for step in range(steps):
        x = torch.full((4, 3), float(step))
        stepper.descend(lambda x: (network(x).square().mean(), {}), [x])
        if offload:
            resting.leave()
            assert resting.is_away
            assert stepper.flat.untyped_storage().nbytes() == 0
            assert all(parameter.untyped_storage().nbytes() == 0 for parameter in network.parameters())
            resting.leave()  # a second time does nothing
            resting.come_back()
            resting.come_back()
    return network, stepper


def test_training_goes_on_as_if_nothing_had_moved():
    (network, stepper), (other, its_stepper) = trained(5), trained(5, offload=True)
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert other[0].weight.data_ptr() == its_stepper.flat.data_ptr(), "still views of one flat tensor"
    state, its = stepper.optimizer.state[stepper.flat], its_stepper.optimizer.state[its_stepper.flat]
    assert all(torch.equal(value, its[key]) for key, value in state.items())


def test_another_device_is_left_alone():
    network = nn.Linear(2, 2)
    resting = Offload(network.state_dict, "cuda")
    resting.leave()
    assert not resting.is_away
    assert network(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("in_use", [False, True])
def test_free_memory_is_given_back_to_others_once_everything_has_left(monkeypatch, in_use):
    """Torch keeps what was freed for its own process; a process without CUDA is not to begin with it."""
    network, emptied = nn.Linear(2, 2), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(network.weight.untyped_storage().nbytes()))
    resting = Offload(network.state_dict, "cpu")
    resting.leave()
    assert emptied == ([0] if in_use else [])
    resting.leave()
    resting.come_back()
    assert len(emptied) == int(in_use)


def test_a_run_with_offload_ends_in_the_same_weights(tmp_path):
    for name, offload in (("plain", False), ("offload", True)):
        crew = build_crew([[ReachEnv(3)]], [TinyActor()], TinyAlgorithm(), offload=offload)
        run_sync(crew, Schedule(num_steps=4, chunks=5, updates=3, save_interval=2), CheckpointStore(tmp_path / name),
                 RecordingReporter())  # fmt: skip
    (version, plain), (its_version, other) = (load_policy(find(tmp_path / name)) for name in ("plain", "offload"))
    assert version == its_version == 12
    assert all(torch.equal(value, other[key]) for key, value in plain.items())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["actor.enable_offload=True", "runner.overlap=True"], "write runner.overlap=False or remove"),
        (
            ["actor.enable_offload=True", "runner.asynchronous=True"],
            "write runner.asynchronous=False or remove",
        ),
        (["rollout.enable_offload=True", "runner.asynchronous=True"], "in an asynchronous run the policy never rests"),
    ],
)
def test_who_never_rests_lends_nothing(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load_config("reach_sac_mlp", ["profile=cpu", *overrides], CONFIG_DIR)
