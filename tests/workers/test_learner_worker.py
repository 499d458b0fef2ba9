import pytest
import torch

from rlinf.core.errors import CheckpointError, NonFiniteError
from rlinf.runtime.local import Channel, Flag, Weights
from rlinf.workers.learner_worker import LearnerWorker, Progress
from tests.fakes import CountingAlgorithm, TinyAlgorithm


def worker(algorithm, stop=None):
    return LearnerWorker(algorithm, Channel("experience"), Weights(), stop or Flag())


def test_metrics_are_means_over_the_updates_in_which_they_came():
    algorithm = CountingAlgorithm()
    inner = algorithm.update
    algorithm.update = lambda: inner() | ({"actor": algorithm.updates * 10.0} if algorithm.updates % 2 == 0 else {})
    learner = worker(algorithm)
    assert learner.update(4) == {"fake/loss": 2.5, "fake/number": 1.0, "actor": 30.0}
    assert learner.report() == Progress(env_steps=0, updates=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("nan"))])
def test_a_loss_that_is_not_finite_names_itself_and_the_update(value):
    algorithm = CountingAlgorithm()
    inner = algorithm.update
    algorithm.update = lambda: inner() | ({"sac/actor_loss": value} if algorithm.updates == 6 else {})
    learner = worker(algorithm)
    learner.update(4)
    with pytest.raises(NonFiniteError, match=r"train/sac/actor_loss is (nan|inf) at update 6"):
        learner.update(4)


def test_weights_that_are_not_finite_are_not_published_and_not_saved(tmp_path):
    algorithm = TinyAlgorithm()
    learner = worker(algorithm)
    assert learner.publish() == 0
    before = learner.weights.newer_than(-1)
    with torch.no_grad():
        algorithm.actor.layer.bias[0] = torch.nan
    algorithm.updates = 1
    with pytest.raises(NonFiniteError, match=r"weights 'layer\.bias' of the policy are not finite"):
        learner.publish()
    assert learner.weights.newer_than(-1) == before
    with pytest.raises(CheckpointError, match=r"'actor/layer\.bias' of the learner is not finite"):
        learner.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_stop_ends_the_updates_after_the_present_one():
    stop = Flag()
    algorithm = CountingAlgorithm(before_update=lambda: stop.set("test") if algorithm.updates == 2 else None)
    learner = worker(algorithm, stop)
    assert learner.update(1000) == {"fake/loss": 2.0, "fake/number": 1.0}
    assert learner.report().updates == 3


def test_a_checkpoint_without_a_buffer_that_is_configured_says_so(tmp_path):
    worker(CountingAlgorithm()).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"buffers/replay_buffer is missing"):
        algorithm = TinyAlgorithm()
        algorithm.load_state_dict = lambda state: None
        worker(algorithm).load(tmp_path)
