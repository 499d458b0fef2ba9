"""Checkpoints of learners that share out their weights: resumed exactly, and by any number of ranks."""

import copy
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from rlinf.algorithms.fsdp import FullySharded, local
from rlinf.core.errors import CheckpointError, WorkerDied
from rlinf.core.ranks import ONE_RANK
from rlinf.runners.checkpoint import load_policy
from rlinf.runtime.local import Channel, Flag, Weights
from rlinf.runtime.ranks import join_ranks
from rlinf.workers.learner_worker import LearnerWorker, Progress
from rlinf.workers.state_files import load_state
from tests.algorithms.learners import ENVS, STEPS, LayeredActorCritic, make_ppo, played
from tests.ranks import run_ranks


def shares(ranks):
    return FullySharded(ranks, "cpu")


def make(ranks, share=shares, offload=False, kind=LayeredActorCritic):
    """A learner of PPO; of a new collection, each rank sees some environments."""
    ppo = make_ppo(ranks, share, kind, batch_size=STEPS * ENVS, micro_batch_size=4, update_epoch=2)
    rest = torch.device("cpu") if offload else None
    return LearnerWorker(ppo, Channel("experience"), Weights(), Flag(), ranks=ranks, offload_from=rest)


def learn(learner, seed):
    """All minibatches of a collection. Of three ranks, the first has two environments of the four."""
    ranks = learner.ranks
    envs = {1: [slice(0, 4)], 2: [slice(0, 2), slice(2, 4)], 3: [slice(0, 2), slice(2, 3), slice(3, 4)]}[ranks.size]
    learner.experience.put(played(seed, envs[ranks.rank]), key=ranks.rank)
    learner.ingest()
    return learner.update(100)


def state_of(learner):
    """A copy of weights, moments and counters; whole, on rank 0."""
    state = copy.deepcopy(learner.algorithm.state_dict())
    del state["generators"]
    return state


def raised(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    return "nothing"


def as_two(ranks, directory, of_one):
    """Ranks 0 and 1 learn, save, and go on; so does a learner that loads what they saved, and one that rests."""
    learner = make(ranks)
    found = {"first": learn(learner, 0), "published": (learner.publish(), learner.weights.newer_than(-1))}
    found["progress"], found["saved"] = learner.save(directory), state_of(learner)
    if ranks.rank == 0:
        for name in ("cut", "missing"):
            shutil.copytree(directory, directory.parent / name)
        (directory.parent / "missing" / "learner.pt").unlink()
        os.truncate(directory.parent / "cut" / "learner.pt", 5000)
    resumed, resting = make(ranks), make(ranks, offload=True)
    found["loaded"], found["loaded state"] = resumed.load(directory), state_of(resumed)
    resting.load(directory)
    resting.publish()
    held = [local(p) for p in resting.algorithm.network.parameters()]
    for stepper in (resting.algorithm.policy_stepper, resting.algorithm.value_stepper):
        held += [state[name] for state in stepper.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    found["bytes of who rests"] = len(held), sum(tensor.untyped_storage().nbytes() for tensor in held)
    found["afterwards"] = []
    for each in (learner, resumed, resting):
        found["afterwards"].append((learn(each, 1), state_of(each)))
    grown = make(ranks)
    grown.load(of_one)
    found["of one"] = state_of(grown), learn(grown, 1), state_of(grown)
    found["damaged"] = [
        raised(CheckpointError, partial(make(ranks, kind=kind).load, directory.parent / name))
        for name, kind in (("cut", LayeredActorCritic), ("missing", LayeredActorCritic), ("of_two", Wide))
    ]
    return found


class Wide(LayeredActorCritic):
    def __init__(self, obs_dim, action_dim, hidden_dims, value_hidden_dims, **settings):
        super().__init__(obs_dim, action_dim, (24,), value_hidden_dims, **settings)


def as_three(ranks, directory):
    """All three load what two saved, and learn on; once with shares, once with all weights everywhere."""
    found = []
    for share in (shares, None):
        learner = make(ranks, share)
        learner.load(directory)
        found.append((state_of(learner), learn(learner, 1), state_of(learner)))
    return found


def dying(ranks):
    """The last rank dies in the middle of an update."""
    learner = make(ranks)
    if ranks.rank == ranks.size - 1:
        learner.algorithm.network.net[0].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    started = time.monotonic()
    return raised(WorkerDied, lambda: learn(learner, 0)), time.monotonic() - started


def everything(ranks, directory, of_one):
    directory, rank = Path(directory), ranks.rank
    ranks.gather(None)  # nobody leaves before all have come
    ranks.leave()
    two = None
    if rank < 2:
        both = join_ranks(rank, 2, f"file://{directory}/two")
        two = as_two(both, directory / "of_two", Path(of_one))
        both.gather(None)
        both.leave()
    ranks = join_ranks(rank, 3, f"file://{directory}/three")
    three = as_three(ranks, directory / "of_two")
    gathered = ranks.gather((two, three))
    return gathered, dying(ranks)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A learner with one rank that has learned and saved, and its directory."""
    directory = tmp_path_factory.mktemp("of_one")
    learner = make(ONE_RANK, None)
    learn(learner, 0)
    learner.save(directory)
    saved = state_of(learner)
    return directory, saved, (learn(learner, 1), state_of(learner))


@pytest.fixture(scope="module")
def run(tmp_path_factory, alone):
    directory = tmp_path_factory.mktemp("ranks")
    (directory / "of_two").mkdir()
    return *run_ranks(everything, directory, str(directory), str(alone[0]), size=3, dying=[2])[0], directory


def assert_same(one, other):
    """Bit for bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def assert_near(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


def layout(state):
    """What is in it, with the shapes of tensors."""
    if isinstance(state, dict):
        return {name: layout(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return [layout(value) for value in state]
    return tuple(state.shape) if isinstance(state, torch.Tensor) else type(state)


def test_a_checkpoint_has_no_trace_of_shares(run, alone):
    """The files are those of a learner that has all weights, and the policy is one file."""
    of_two, of_one = run[2] / "of_two", alone[0]
    assert sorted(path.name for path in of_two.iterdir()) == ["learner.pt", "model.safetensors"]
    ours, expected = (load_state(directory / "learner.pt")["algorithm"] for directory in (of_two, of_one))
    assert [len(state.pop("generators")) for state in (ours, expected)] == [2, 1]
    assert layout(ours) == layout(expected)
    assert_near(ours, expected)
    version, policy = load_policy(of_two / "model.safetensors")
    assert_same(policy, dict(ours["network"]))
    (published, newest), (_, nothing) = (two["published"] for two, _ in run[0][:2])
    assert (version, newest[0], nothing) == (published, version, None)
    assert_same(newest[1], policy)


def test_as_many_ranks_go_on_exactly(run):
    for two, _ in run[0][:2]:
        assert two["loaded"] == two["progress"] == Progress(STEPS * ENVS, 2)
        assert_same(two["loaded state"], two["saved"])
        (metrics, after), *others = two["afterwards"]
        for other_metrics, other in others:
            assert other_metrics == metrics
            assert_same(other, after)
    before, after = (run[0][0][0][name] for name in ("saved", "afterwards"))
    assert not torch.equal(before["network"]["net.0.weight"], after[0][1]["network"]["net.0.weight"])


def test_one_rank_goes_on_where_two_were(run):
    two = run[0][0][0]
    learner = make(ONE_RANK, None)
    assert learner.load(run[2] / "of_two") == two["progress"]
    assert_same(state_of(learner), two["saved"])
    learn(learner, 1)
    assert_near(state_of(learner), two["afterwards"][0][1])


def test_two_ranks_go_on_where_one_was(run, alone):
    loaded, metrics, after = run[0][0][0]["of one"]
    _, saved, (expected_metrics, expected) = alone
    assert_same(loaded, saved)
    assert_near(after, expected)
    assert metrics["actor/grad_norm"] == pytest.approx(expected_metrics["actor/grad_norm"], rel=1e-4)


def test_three_ranks_go_on_where_two_were(run):
    saved = run[0][0][0]["saved"]
    (loaded, _, after), (loaded_whole, _, after_whole) = run[0][0][1]
    assert_same(loaded, saved)
    assert_same(loaded_whole, saved)
    assert_near(after, after_whole)
    for _, three in run[0]:
        (_, metrics, _), (_, expected, _) = three
        assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_learner_that_rests_holds_nothing(run):
    """Neither its rows of nine parameters nor two moments of each."""
    assert [two["bytes of who rests"] for two, _ in run[0][:2]] == [(9 * 3, 0)] * 2


def test_what_does_not_fit_is_one_error_on_every_rank(run):
    for two, _ in run[0][:2]:
        cut, missing, foreign = two["damaged"]
        assert "cut/learner.pt cannot be read" in cut and cut.endswith("choose another checkpoint")
        assert missing.endswith("missing/learner.pt is missing; choose another checkpoint")
        assert foreign.startswith("'network' in the checkpoint does not fit this configuration")
        assert "size mismatch for net.0.weight" in foreign


def test_a_rank_that_dies_in_a_forward_pass_makes_the_others_fail(run):
    message, seconds = run[1]
    assert message.startswith("rank 0 of 3 waited in vain for the other ranks of the learner")
    assert seconds < 60
